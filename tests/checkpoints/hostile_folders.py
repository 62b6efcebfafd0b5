"""Makes hostile model folders: mutations of good ones, drawn from a seed."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 100\n"
VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 3, 7, 10**9, 10**30, -(10**12), 2**63, 0.0, -0.5, 1e308, 1e-300, 4.5),
    *(float("nan"), float("inf"), float("-inf"), "", "text", "nan", "1e9", "0x10", "../../etc/passwd", "a\0b"),
    *("x" * 100_000, [], [1], [1] * 5000, [[[[]]]], [10**9] * 4, [16384] * 4, [None], ["a"], {}, {"a": {"b": 1}}),
    *([-1, 0], [0.5], "random", "gaussian", "Å\u200b", [True, False], ["CrossAttnDownBlock2D"] * 3, {"enabled": 1}),
]
RAW: list[bytes] = [
    *(b"", b"{", b"null", b"[]", b"3", b'"text"', b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe{}", LFS),
    *(b'{"a": ' + b"9" * 10_000 + b"}", b"\x00" * 100, b"{'a': 1}", b"\x80\x04K\x01."),
]


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in items for place in ((*path, key), *_places(item, (*path, key)))]


def _change_json(path: Path, rng: random.Random) -> str:
    if rng.random() < 0.15:
        content = rng.choice(RAW)
        path.write_bytes(content)
        return f"{path.name} is {content[:20]!r}"
    values = json.loads(path.read_text())
    place = rng.choice(_places(values) or [("new",)])
    owner = values
    for key in place[:-1]:
        owner = owner[key]
    what = rng.random()
    if what < 0.1 and isinstance(owner, dict):
        owner.pop(place[-1], None)
        note = f"without {place}"
    elif what < 0.2 and isinstance(owner, dict):
        owner[f"{place[-1]}s"] = owner.pop(place[-1], 1)
        note = f"{place} renamed"
    elif what < 0.25 and isinstance(owner, dict):
        path.write_text(json.dumps(values)[:-1] + f', "{place[0]}": 5}}')
        return f"{path.name}: {place[0]} twice"
    else:
        owner[place[-1]] = rng.choice(VALUES)
        note = f"{place} is {str(owner[place[-1]])[:40]!r}"
    path.write_text(json.dumps(values))
    return f"{path.name}: {note}"


def _header(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _write_header(path: Path, header: dict[str, Any], body: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def zip_bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"vae": {}}, 2))
        archive.writestr("archive/data/0", bytes(50 << 20))
    return buffer.getvalue()


def _change_bytes(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    kind = rng.randrange(7)
    if kind == 0:
        path.write_bytes(content[: rng.randrange(len(content))])
        return "cut"
    if kind == 1:
        for _ in range(rng.randrange(1, 20)):
            content[rng.randrange(min(len(content), 4000))] ^= rng.randrange(1, 256)
        path.write_bytes(content)
        return "bytes flipped"
    if kind == 2:
        length = rng.choice([2**60, 2**63, 2**64 - 1, 0, 1, 100_000_001, len(content), len(content) - 8])
        path.write_bytes(struct.pack("<Q", length) + bytes(content[8:]))
        return f"a header of {length} bytes"
    replacement = [b"", LFS, zip_bomb(), pickle.dumps({"a": os.getcwd}), rng.randbytes(5000)][rng.randrange(5)]
    path.write_bytes(replacement)
    return f"is {replacement[:12]!r}"


def _change_header(path: Path, rng: random.Random) -> str:
    header, body = _header(path)
    names = [name for name in header if name != "__metadata__"]
    name, other = rng.choice(names), rng.choice(names)
    entry, kind = header[name], rng.randrange(6)
    if kind == 0:
        entry["data_offsets"] = header[other]["data_offsets"]
    elif kind == 1:
        entry["data_offsets"] = rng.choice([[0, 2**62], [-1, 4], [8, 0], [len(body) - 4, len(body) + 4], [], "0", None])
    elif kind == 2:
        entry["dtype"] = rng.choice(["F8_E4M3", "F8_E5M2", "I32", "U64", "BOOL", "F64", "C64", "X", "", None, 3])
    elif kind == 3:
        entry["shape"] = rng.choice([[2**62], [2**32, 2**32], [-1], [0], [], "x", None, [1.5], [10**9, 0]])
    elif kind == 4:
        header[rng.choice(VALUES) if rng.random() < 0.2 else f"{name}.more"] = header.pop(name)
    else:
        header["__metadata__"] = rng.choice([{"a": 1}, [], "x", {"a": "b" * 10**6}])
    _write_header(path, {str(key)[:1000]: value for key, value in header.items()}, body)
    return f"header: {name} changed ({kind})"


def _change_tensor(path: Path, rng: random.Random) -> str:
    state = load_file(path)
    name = rng.choice(sorted(state))
    value, kind = state[name], rng.randrange(11)
    if kind == 0:
        del state[name]
    elif kind == 1:
        state["extra.weight"] = torch.zeros(3)
    elif kind in (2, 3, 4):
        flat = value.float().flatten().clone()
        flat[rng.randrange(len(flat))] = [float("nan"), float("inf"), -float("inf")][kind - 2]
        state[name] = flat.view(value.shape)
    elif kind == 5:
        kinds = [torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64]
        state[name] = value.to(rng.choice(kinds))
    elif kind == 6:
        state[name] = torch.full(value.shape, 1e300, dtype=torch.float64)
    elif kind == 7:
        state[name] = rng.choice([value[None], value.flatten(), value[:1].clone(), torch.zeros(0), torch.zeros(())])
    elif kind == 8:  # what would be expanded to terabytes
        state[name] = torch.zeros(1, 1 << 16, dtype=torch.int8)
        state[f"{name}.int8_scale"] = torch.ones(1 << 16, dtype=torch.float16)
    elif kind == 9:
        state = {f"{rng.choice(['module', '_orig_mod', 'module._orig_mod'])}.{key}": v for key, v in state.items()}
    else:
        state = {key: v.to(rng.choice([torch.float16, torch.bfloat16, torch.float64])) for key, v in state.items()}
    save_file({key: v.contiguous() for key, v in state.items()}, path)
    return f"{name} changed ({kind})"


def _change_place(path: Path, rng: random.Random) -> str:
    kind = rng.randrange(6)
    outside = path.parents[1].with_suffix(".outside")
    path.rename(outside) if kind < 3 else path.unlink()
    if kind == 0:
        path.symlink_to(outside)
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        os.mkfifo(path)
    elif kind == 3:
        path.symlink_to(path)
    elif kind == 4:
        path.symlink_to("/dev/zero")
    return ["a link out", "a folder", "a pipe", "a link to itself", "a link to /dev/zero", "missing"][kind]


def make_hostile(good: Path, folder: Path, seed: int) -> str:
    """Copies the model folder `good` to `folder`, changes one thing or a few, and says which."""
    rng = random.Random(seed)
    shutil.copytree(good, folder)
    notes = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        files = [path for path in files if path.suffix in (".json", ".safetensors")]
        path = rng.choice(files)
        change: Callable[[Path, random.Random], str]
        if rng.random() < 0.08:
            change = _change_place
        elif path.suffix == ".json":
            change = _change_json
        else:
            change = rng.choice([_change_bytes, _change_header, _change_tensor, _change_tensor])
        try:
            notes.append(f"{path.relative_to(folder)}: {change(path, rng)}")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
            notes.append(f"{path.relative_to(folder)}: twice damaged ({type(error).__name__})")
        except Exception as error:  # safetensors' own type, of a file that was damaged before
            notes.append(f"{path.relative_to(folder)}: twice damaged ({type(error).__name__})")
    return "; ".join(notes)
