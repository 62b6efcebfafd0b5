"""Keeps what TensorRT-RTX compiles while an engine runs in GRAPH.kernels beside it, for the next start."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ldmseg_fast.backends.trt.api import TrtApi
from ldmseg_fast.backends.trt.passport import Passport
from ldmseg_fast.files import replacing

MAGIC = b"ldmseg_fast kernels\n"
HEAD = (
    len(MAGIC) + hashlib.sha256().digest_size
)  # bytes before the kernels: the above, and a hash of them and their engine


def kernels_file(folder: Path, graph: str) -> Path:
    """Names the file of kernels that were compiled for a graph's engine."""
    return folder / f"{graph}.kernels"


def read_kernels(folder: Path, passport: Passport) -> bytes:
    """Reads the kernels of an engine; none where they are missing, damaged, or of another engine."""
    try:
        content = kernels_file(folder, passport.graph).read_bytes()
    except OSError:
        return b""
    head, kernels = content[:HEAD], content[HEAD:]
    return kernels if head == _head(passport, kernels) else b""


def keep_kernels(api: TrtApi, folder: Path, passports: Mapping[str, Passport], configs: Mapping[str, Any]) -> None:
    """Writes the kernels of every engine that has new ones, where the folder can be written and no other file is there.

    Args:
        api: the imported TensorRT.
        folder: of the engines.
        passports: by graph.
        configs: the engines' runtime configurations, by graph.
    """
    for name, config in configs.items():
        kernels, path = api.compiled_kernels(config), kernels_file(folder, name)
        if not kernels or kernels == read_kernels(folder, passports[name]):
            continue
        with suppress(OSError):  # a start is slower without
            if path.exists() and not path.read_bytes().startswith(MAGIC):
                continue
            with replacing(path) as temporary:
                temporary.write_bytes(_head(passports[name], kernels) + kernels)


def _head(passport: Passport, kernels: bytes) -> bytes:
    return MAGIC + hashlib.sha256(passport.engine_sha256.encode() + kernels).digest()
