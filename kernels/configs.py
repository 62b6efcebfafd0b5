"""Launch configurations: a plain table per kernel, architecture and shape class; nothing is tuned at import.

The entries are choices that compile without spills (`python -m ldmseg_fast.kernels.aot`). Better ones for a GPU at hand
come from `python benchmarks/bench_kernels.py --tune`, which writes a JSON file of the same shape as `TABLE`; the
environment variable LDMSEG_FAST_KERNEL_CONFIGS names such a file, and its entries come first.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

ENVIRONMENT_VARIABLE = "LDMSEG_FAST_KERNEL_CONFIGS"


@dataclass(frozen=True)
class Config:
    """`constants` are the kernel's block sizes."""

    constants: dict[str, int]
    num_warps: int = 4
    num_stages: int = 2


def _config(num_warps: int, num_stages: int, **constants: int) -> Config:
    return Config(constants, num_warps, num_stages)


# kernel -> architecture (the largest that the GPU reaches is taken) -> shape class -> configuration. The entries of 80
# also serve 86, 89 and 120, so they keep within 99 KiB of shared memory.
TABLE: dict[str, dict[int, dict[str, Config]]] = {
    "encode_mask_bits": {
        80: {"planes": _config(4, 1, BLOCK=1024), "channels_last": _config(4, 1, BLOCK=1024)},
    },
    "decode_mask_bits": {80: {"all": _config(4, 1, BLOCK=1024)}},
    "attention_forward": {
        80: {
            "d48": _config(4, 3, BLOCK_M=64, BLOCK_N=64),
            "d96": _config(4, 3, BLOCK_M=64, BLOCK_N=32),
            "d128": _config(8, 2, BLOCK_M=128, BLOCK_N=32),
            "d160": _config(4, 2, BLOCK_M=64, BLOCK_N=16),
        },
        90: {
            "d48": _config(8, 3, BLOCK_M=128, BLOCK_N=64),
            "d96": _config(8, 3, BLOCK_M=128, BLOCK_N=64),
            "d128": _config(8, 2, BLOCK_M=128, BLOCK_N=64),
            "d160": _config(8, 2, BLOCK_M=128, BLOCK_N=64),
        },
    },
    "attention_delta": {
        80: {
            "d48": _config(4, 1, BLOCK_M=64),
            "d96": _config(4, 1, BLOCK_M=32),
            "d128": _config(4, 1, BLOCK_M=32),
            "d160": _config(4, 1, BLOCK_M=16),
        },
    },
    "attention_backward_kv": {
        80: {
            "d48": _config(4, 2, BLOCK_M=32, BLOCK_N=64),
            "d96": _config(8, 2, BLOCK_M=32, BLOCK_N=64),
            "d128": _config(8, 2, BLOCK_M=64, BLOCK_N=32),
            "d160": _config(4, 2, BLOCK_M=32, BLOCK_N=16),
        },
        90: {
            "d48": _config(4, 2, BLOCK_M=64, BLOCK_N=64),
            "d96": _config(8, 2, BLOCK_M=64, BLOCK_N=64),
            "d128": _config(8, 2, BLOCK_M=32, BLOCK_N=64),
            "d160": _config(8, 2, BLOCK_M=32, BLOCK_N=64),
        },
    },
    "attention_backward_q": {
        80: {
            "d48": _config(4, 2, BLOCK_M=64, BLOCK_N=32),
            "d96": _config(4, 2, BLOCK_M=64, BLOCK_N=32),
            "d128": _config(8, 2, BLOCK_M=128, BLOCK_N=32),
            "d160": _config(4, 2, BLOCK_M=32, BLOCK_N=16),
        },
        90: {
            "d48": _config(8, 2, BLOCK_M=128, BLOCK_N=64),
            "d96": _config(8, 2, BLOCK_M=128, BLOCK_N=64),
            "d128": _config(8, 2, BLOCK_M=128, BLOCK_N=32),
            "d160": _config(8, 2, BLOCK_M=128, BLOCK_N=32),
        },
    },
    "attention_fp8_prepare": {89: {"all": _config(4, 1, ELEMENTS=8192)}},
    "attention_fp8": {
        89: {
            "d48": _config(4, 3, BLOCK_M=64, BLOCK_N=64),
            "d96": _config(4, 3, BLOCK_M=64, BLOCK_N=64),
            "d128": _config(8, 2, BLOCK_M=128, BLOCK_N=64),
            "d160": _config(8, 2, BLOCK_M=128, BLOCK_N=32),
        },
        90: {
            "d48": _config(8, 3, BLOCK_M=128, BLOCK_N=128),
            "d96": _config(8, 3, BLOCK_M=128, BLOCK_N=64),
            "d128": _config(8, 3, BLOCK_M=128, BLOCK_N=64),
            "d160": _config(8, 3, BLOCK_M=128, BLOCK_N=64),
        },
    },
    "panoptic_head": {
        80: {
            "q128_channels_last": _config(4, 1, BLOCK_X=32, BLOCK_Y=16),
            "q128_planes": _config(4, 1, BLOCK_X=32, BLOCK_Y=16),
            "q256_channels_last": _config(8, 1, BLOCK_X=32, BLOCK_Y=16),
            "q256_planes": _config(8, 1, BLOCK_X=32, BLOCK_Y=16),
        },
        90: {
            "q128_channels_last": _config(4, 2, BLOCK_X=64, BLOCK_Y=16),
            "q128_planes": _config(8, 1, BLOCK_X=64, BLOCK_Y=16),
            "q256_channels_last": _config(8, 1, BLOCK_X=64, BLOCK_Y=16),
            "q256_planes": _config(8, 1, BLOCK_X=32, BLOCK_Y=16),
        },
    },
    "panoptic_statistics": {80: {"all": _config(1, 1, BLOCK_X=32, BLOCK_Y=16)}},
    "panoptic_filter": {80: {"all": _config(8, 1, BLOCK=1024)}},
    "group_norm_silu_forward": {
        80: {"small": _config(4, 1), "large": _config(16, 1), "tiled": _config(4, 1, ELEMENTS=4096)},
    },
    "group_norm_silu_backward": {
        80: {"small": _config(4, 1), "large": _config(16, 1), "tiled": _config(4, 1, ELEMENTS=2048)},
    },
    "ddim_step": {80: {"all": _config(4, 1, BLOCK=128)}},
    "point_logits": {
        80: {
            "channels_last": _config(4, 1, BLOCK_P=16, BLOCK_Q=128),
            "planes": _config(4, 1, BLOCK_P=64, BLOCK_Q=8),
        },
    },
    "slot_logits": {80: {"all": _config(4, 1, BLOCK_P=256)}},
    "sample_ce": {
        80: {
            "channels_last": _config(4, 1, BLOCK_P=8, BLOCK_Q=128),
            "planes": _config(4, 1, BLOCK_P=64, BLOCK_Q=8),
        },
        90: {
            "channels_last": _config(4, 1, BLOCK_P=16, BLOCK_Q=128),
            "planes": _config(4, 1, BLOCK_P=64, BLOCK_Q=8),
        },
    },
    "sample_bce_dice_forward": {80: {"all": _config(8, 1, BLOCK_P=1024)}},
    "sample_bce_dice_backward": {80: {"all": _config(4, 1, BLOCK_P=256)}},
    "group_norm_silu_reduce": {80: {"all": _config(4, 1)}},
    "group_norm_silu_affine": {80: {"all": _config(1, 1, BLOCK_C=32)}},
}


_architecture: int | None = None


@contextmanager
def architecture(sm: int) -> Iterator[None]:
    """Choose configurations as a GPU of compute capability `sm` (80, 90) would, whatever is installed."""
    global _architecture
    before, _architecture = _architecture, sm
    try:
        yield
    finally:
        _architecture = before


_lookups: set[tuple[str, str]] | None = None


@contextmanager
def trace_lookups() -> Iterator[set[tuple[str, str]]]:
    """Collect the (kernel, shape class) pairs that are looked up."""
    global _lookups
    before, _lookups = _lookups, set()
    try:
        yield _lookups
    finally:
        _lookups = before


def find_config(kernel: str, shape_class: str) -> Config:
    """The entry for this GPU; without one, that of the nearest older architecture.

    Raises:
        KeyError: the table has no such kernel or shape class.
    """
    if _lookups is not None:
        _lookups.add((kernel, shape_class))
    sm = table_architecture()
    override = _overrides().get(kernel, {})
    for table in (override, TABLE[kernel]):
        for entry in sorted((entry for entry in table if entry <= sm), reverse=True):
            if shape_class in table[entry]:
                return table[entry][shape_class]
    raise KeyError(f"no configuration of {kernel} for sm_{sm} and shape class {shape_class!r}")


def current_architecture() -> int:
    """10 times the compute capability of the GPU, or what `architecture` chose; 80 without a GPU."""
    return _architecture if _architecture is not None else _device_architecture()


def table_architecture() -> int:
    """Under which architecture this GPU is looked up: consumer Blackwell (120) has the shared memory of sm_89."""
    sm = current_architecture()
    return 89 if sm >= 120 else sm


@cache
def _device_architecture() -> int:
    if not torch.cuda.is_available():
        return 80
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


@cache
def _overrides() -> dict[str, dict[int, dict[str, Config]]]:
    path = os.environ.get(ENVIRONMENT_VARIABLE)
    return {} if not path else load_configs(Path(path))


def load_configs(path: Path) -> dict[str, dict[int, dict[str, Config]]]:
    """A table written by `dump_configs`.

    Raises:
        ValueError: the file is not such a table, or names what `TABLE` does not know.
    """
    try:
        plain: dict[str, dict[str, dict[str, Any]]] = json.loads(path.read_text(encoding="utf-8"))
        table = {
            kernel: {
                int(sm): {name: Config(**entry) for name, entry in classes.items()} for sm, classes in per_sm.items()
            }
            for kernel, per_sm in plain.items()
        }
        for kernel, per_sm in table.items():
            for classes in per_sm.values():
                for name, config in classes.items():
                    _check_entry(kernel, name, config)
        return table
    except (OSError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}: {path} is not a table of kernel configurations: {error}") from error


def _check_entry(kernel: str, shape_class: str, config: Config) -> None:
    shipped = {name: entry for classes in TABLE.get(kernel, {}).values() for name, entry in classes.items()}
    if shape_class not in shipped:
        known = ", ".join(shipped) if shipped else ", ".join(TABLE)
        raise ValueError(f"{kernel} {shape_class!r}: one of {known} expected")
    if config.constants.keys() != shipped[shape_class].constants.keys():
        expected = ", ".join(shipped[shape_class].constants) or "none"
        raise ValueError(f"{kernel} {shape_class!r}: constants {', '.join(config.constants)}, expected {expected}")


def dump_configs(table: dict[str, dict[int, dict[str, Config]]]) -> str:
    plain = {
        kernel: {str(sm): {name: vars(config) for name, config in classes.items()} for sm, classes in per_sm.items()}
        for kernel, per_sm in table.items()
    }
    return json.dumps(plain, indent=2)
