"""Reads `torch.save` files of others without running anything that is in them."""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmseg_fast.errors import CheckpointError
from ldmseg_fast.files import check_no_pointer, require_file

# What tensors and plain dictionaries are made of in a pickle. torch's own list for weights_only is longer: some of its
# entries allocate whatever size a file asks for.
ALLOWED = {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch.Size",
    "torch.device",
    *(
        f"torch.{kind}Storage"
        for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Byte", "Bool")
    ),
    *(
        f"torch.{kind}"
        for kind in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "uint8", "bool")
    ),
}
MAX_PICKLE_BYTES = 64 << 20  # of structure alone; tensors lie outside it


def load_torch_file(path: Path) -> dict[str, Any]:
    """Reads what `torch.save` wrote: a dictionary of tensors, numbers, text and further dictionaries.

    The pickle is looked through before it is read, and then read by `torch.load(weights_only=True)`. Tensors stay on
    the disk until they are used.

    Raises:
        CheckpointError: no such file, not written by `torch.save`, damaged, larger than it looks, or asking for
            anything
            but tensors and plain values; nothing in it has run.
    """
    _check_archive(path)
    try:
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # torch raises many kinds for damaged files
        raise CheckpointError(f"{path}: damaged checkpoint ({_first_line(error)}); copy or download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, not the dictionary of a checkpoint")
    return value


def check_tensors(state: Any, source: str) -> dict[str, Tensor]:
    """Returns `state` itself, once it is a dictionary of real tensors of any shape and dtype.

    None may be larger than its own bytes.

    Raises:
        CheckpointError: listing what is wrong.
    """
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{source}: a dictionary of tensors expected, not {type(state).__name__}")
    wrong = []
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            wrong.append(f"{key} is a {type(value).__name__}")
        elif value.device.type != "cpu" or value.layout != torch.strided:
            wrong.append(f"{key} has no data on the disk")
        elif value.numel() * value.element_size() > value.untyped_storage().nbytes():
            wrong.append(f"{key} claims shape {tuple(value.shape)}, more than is stored")
    if wrong:
        raise CheckpointError(f"{source}: {'; '.join(wrong[:5])}{'; ...' if len(wrong) > 5 else ''}")
    return state


def _check_archive(path: Path) -> None:
    if not path.exists() and not path.is_symlink():
        raise CheckpointError(f"{path}: no such file")
    require_file(path, CheckpointError, "checkpoint")
    check_no_pointer(path, CheckpointError)
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path}: no checkpoint of torch.save, or a truncated one; files older than torch 1.6, plain pickles and "
            f"safetensors are not read here"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            total = sum(entry.file_size for entry in entries)
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or total > path.stat().st_size:
                raise CheckpointError(f"{path}: compressed entries; torch.save writes none, so the file is refused")
            pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
            if len(pickles) != 1:
                raise CheckpointError(f"{path}: a zip file, but no checkpoint of torch.save (no data.pkl in it)")
            if pickles[0].file_size > MAX_PICKLE_BYTES:
                raise CheckpointError(
                    f"{path}: data.pkl of {pickles[0].file_size} bytes; a checkpoint's is far smaller"
                )
            for entry in entries:
                entry.CRC = entry.CRC or None  # type: ignore[assignment]  # torch.save can leave checksums out
            asked = sorted(set(_globals(archive.read(pickles[0]))) - ALLOWED)
            for entry in entries:
                if entry.CRC and not asked:  # torch.load does not look at it
                    _read_through(archive, entry)
    except CheckpointError:
        raise
    except Exception as error:  # zipfile and pickletools raise many kinds for damaged files
        raise CheckpointError(f"{path}: damaged checkpoint ({_first_line(error)}); copy or download it again") from None
    if asked:
        raise CheckpointError(
            f"{path}: refused, nothing was run: besides tensors and plain values its pickle asks for "
            f"{', '.join(asked[:5])}{', ...' if len(asked) > 5 else ''}"
        )


def _read_through(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    """Reads an entry to its end. Raises BadZipFile where its checksum is another."""
    with archive.open(entry) as file:
        while file.read(1 << 20):
            pass


def _globals(data: bytes) -> Iterator[str]:
    """Every `module.name` that a pickle looks up."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "GLOBAL":
            yield str(argument).replace(" ", ".")
        elif opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
            # torch.save writes GLOBAL only; what these look up depends on the stack
            yield opcode.name if argument is None else f"{opcode.name} {argument}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
