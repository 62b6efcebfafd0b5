"""Finds the weights of a component's folder in diffusers' layout: one file or shards, with or without a variant."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from ldmseg_fast.checkpoints.safe_pickle import check_tensors, load_torch_file
from ldmseg_fast.checkpoints.schema import read_settings
from ldmseg_fast.checkpoints.tensors import load_weights, plain_names
from ldmseg_fast.errors import CheckpointError
from ldmseg_fast.files import check_no_pointer, inside

SAFE, OLD = "safetensors", "bin"  # endings: `.bin` files are of `torch.save`
# NAME.ENDING, NAME.VARIANT.ENDING, and their shards; transformers once put the variant last
FILES = {
    ending: re.compile(
        r"(?P<name>diffusion_pytorch_model|model)(\.(?P<variant>[A-Za-z0-9_]+))?"
        rf"(-(?P<shard>\d{{5}})-of-(?P<shards>\d{{5}}))?(\.(?P<late>[A-Za-z0-9_]+))?\.{ending}"
    )
    for ending in (SAFE, OLD)
}
INDICES = {
    ending: re.compile(
        rf"(diffusion_pytorch_model|model)(\.(?P<early>[A-Za-z0-9_]+))?\.{ending}\.index"
        r"(\.(?P<variant>[A-Za-z0-9_]+))?\.json"
    )
    for ending in (SAFE, OLD)
}
ORDER = ("", "fp32", "bf16", "fp16")  # full precision goes before half


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Reads the tensors, any shape and dtype, of a component's folder.

    They lie in one or several safetensors files; full precision goes before half. An index says which shards there are;
    without it, their own names do. Folders of before safetensors have `.bin` files instead, which are read without
    running anything in them (see `safe_pickle`).

    Raises:
        CheckpointError: none there, a shard that is missing, a pickle of more than tensors, damaged, or links out of
            the folder.
    """
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    for ending in (SAFE, OLD):
        files, indices, variants = _variants(names, ending)
        if len(variants) > 1 and variants[0] not in ORDER:
            raise CheckpointError(
                f"{folder}: weights of several variants ({', '.join(variants)}); leave one of them there"
            )
        if variants:
            found = {name: folder / name for name in files.get(variants[0], [])}
            index = indices.get(variants[0])
            whole = [path for name, path in found.items() if "-of-" not in name]
            if whole:
                return _read_file(inside(folder, whole[0]))
            return _read_shards(folder, found, None if index is None else folder / index, ending)
    raise CheckpointError(_why_none(folder))


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == f".{SAFE}":
        return load_weights(path)
    return plain_names(check_tensors(load_torch_file(path), str(path)), str(path))


def choose_files(names: Iterable[str]) -> list[str]:
    """Lists those of a component's safetensors files that `read_weights` reads: of one variant, the file or the shards.

    Where nothing says which of several unknown variants is meant, it is the first.
    """
    files, indices, variants = _variants(sorted(names), SAFE)
    if not variants:
        return []
    found = files.get(variants[0], [])
    whole = [name for name in found if "-of-" not in name]
    return whole[:1] or [*found, *([indices[variants[0]]] if variants[0] in indices else [])]


def _variants(names: Iterable[str], ending: str) -> tuple[dict[str, list[str]], dict[str, str], list[str]]:
    """Groups the names of weight files and indices by variant, and lists the variants, the best first."""
    files: dict[str, list[str]] = defaultdict(list)
    indices: dict[str, str] = {}
    for name in names:
        if match := FILES[ending].fullmatch(name):
            files[match["variant"] or match["late"] or ""].append(name)
        elif match := INDICES[ending].fullmatch(name):
            indices[match["variant"] or match["early"] or ""] = name
    variants = [variant for variant in ORDER if variant in files or variant in indices]
    return files, indices, variants or sorted(files.keys() | indices.keys())


def _read_shards(folder: Path, found: dict[str, Path], index: Path | None, ending: str) -> dict[str, Tensor]:
    weight_map: dict[str, str] = {}
    if index is not None:
        entries = read_settings(inside(folder, index)).get("weight_map")
        texts = isinstance(entries, dict) and all(isinstance(name, str) for name in entries.values())
        if not isinstance(entries, dict) or not entries or not texts:
            raise CheckpointError(f"{index}: no weight_map of names and files in it; download it again")
        weight_map = entries
        names = sorted(set(weight_map.values()))
        foreign = [name for name in names if FILES[ending].fullmatch(name) is None]
        if foreign:
            raise CheckpointError(f"{index}: {foreign[0][:200]!r} is no name of a {ending} file beside it")
    else:
        first = next(iter(found))
        count = int(FILES[ending].fullmatch(first)["shards"])  # type: ignore[index]
        if count > 10_000 or count < len(found):
            raise CheckpointError(f"{folder}: {len(found)} shards that call themselves parts of {count}")
        names = [re.sub(r"-\d{5}-of", f"-{number:05d}-of", first) for number in range(1, count + 1)]
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        said = "by its index" if index is not None else "by their names"
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(names)} shards are missing ({said}): {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}; download them too"
        )
    state: dict[str, Tensor] = {}
    for name in names:
        shard = _read_file(inside(folder, folder / name))
        twice = sorted(state.keys() & shard.keys())
        if twice:
            raise CheckpointError(f"{folder / name}: {twice[0]} is in another shard too; download the shards again")
        state |= shard
    return state


def _why_none(folder: Path) -> str:
    """Says what a folder without safetensors files holds instead."""
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.ckpt")):
        for path in folder.glob("*.bin"):
            check_no_pointer(path, CheckpointError)
        return (
            f"{folder}: only pickled weights of other names than diffusion_pytorch_model.bin; take the same model's "
            f".safetensors file, or load it in diffusers on a machine you can lose and save_pretrained it"
        )
    if any(folder.glob("*.msgpack")):
        return f"{folder}: weights of Flax only (.msgpack); take the same model's .safetensors file"
    others = [path.name for path in folder.glob("*.safetensors")]
    if others:
        return (
            f"{folder}: no diffusion_pytorch_model.safetensors in it; rename {others[0]} if that is the network's file"
        )
    return f"{folder}: no diffusion_pytorch_model.safetensors in it"


def states_of(folder: Path, patterns: Sequence[str]) -> dict[str, list[int]]:
    """Reads size and time of the last change (nanoseconds) of the files that match `patterns`, by name.

    Results of other contents are other results, whatever the folder is called.
    """
    files = sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
    states = {path.relative_to(folder).as_posix(): path.stat() for path in files}
    return {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()}
