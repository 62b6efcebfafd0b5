"""Finds the launch configuration of a kernel for the GPU at hand; nothing is tuned at import.

Every kernel's `configs.py` holds its own `TABLE`. The entries are choices that compile without spills
(`python -m ldmseg_fast.kernels.aot`). Better ones for a GPU at hand come from
`python benchmarks/bench_kernels.py --tune`, which writes a JSON file of the same shape; the environment variable
LDMSEG_FAST_KERNEL_CONFIGS names such a file, and its entries come first.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ldmseg_fast.files import read_text
from ldmseg_fast.kernels.backend import KERNELS

ENVIRONMENT_VARIABLE = "LDMSEG_FAST_KERNEL_CONFIGS"


@dataclass(frozen=True)
class Config:
    """Holds one launch configuration; `constants` are the kernel's block sizes."""

    constants: dict[str, int]
    num_warps: int = 4
    num_stages: int = 2


# what a kernel looks up -> architecture (the largest that the GPU reaches is taken) -> shape class. The entries of 80
# also serve 86, 89 and 120, so they keep within 99 KiB of shared memory.
Table = dict[str, dict[int, dict[str, Config]]]
Candidates = dict[str, list[Config]]  # what a kernel looks up -> what tuning tries in its place


def make_config(num_warps: int, num_stages: int, **constants: int) -> Config:
    """Writes a configuration in one line of a table."""
    return Config(constants, num_warps, num_stages)


@cache
def all_configs() -> Table:
    """Gathers `TABLE` of every kernel's `configs.py`."""
    return {name: entry for own in _own_configs() for name, entry in own.TABLE.items()}


@cache
def all_candidates() -> Candidates:
    """Gathers `CANDIDATES` of every kernel's `configs.py`."""
    return {name: configs for own in _own_configs() for name, configs in own.CANDIDATES.items()}


def _own_configs() -> list[Any]:
    return [import_module(f"ldmseg_fast.kernels.{kernel}.configs") for kernel in KERNELS]


_architecture: int | None = None


@contextmanager
def architecture(sm: int) -> Iterator[None]:
    """Chooses configurations as a GPU of compute capability `sm` (80, 90) would, whatever is installed."""
    global _architecture
    before, _architecture = _architecture, sm
    try:
        yield
    finally:
        _architecture = before


_switches: dict[str, int] = {}


@contextmanager
def switched(switches: Mapping[str, int]) -> Iterator[None]:
    """Puts constants, by their names, in the place of those of every configuration that has them."""
    global _switches
    before, _switches = _switches, dict(switches)
    try:
        yield
    finally:
        _switches = before


_lookups: set[tuple[str, str]] | None = None


@contextmanager
def trace_lookups() -> Iterator[set[tuple[str, str]]]:
    """Collects the (kernel, shape class) pairs that are looked up."""
    global _lookups
    before, _lookups = _lookups, set()
    try:
        yield _lookups
    finally:
        _lookups = before


def find_config(kernel: str, shape_class: str) -> Config:
    """Finds the entry for this GPU; without one, that of the nearest older architecture.

    Raises:
        KeyError: the table has no such kernel or shape class.
        ValueError: the file that LDMSEG_FAST_KERNEL_CONFIGS names is no table, see `load_configs`.
    """
    if _lookups is not None:
        _lookups.add((kernel, shape_class))
    sm = table_architecture()
    override = _overrides().get(kernel, {})
    for table in (override, all_configs()[kernel]):
        for entry in sorted((entry for entry in table if entry <= sm), reverse=True):
            if shape_class in table[entry]:
                found = table[entry][shape_class]
                known = {name: value for name, value in _switches.items() if name in found.constants}
                return replace(found, constants=found.constants | known) if known else found
    raise KeyError(f"no configuration of {kernel} for sm_{sm} and shape class {shape_class!r}")


def current_architecture() -> int:
    """Returns 10 times the compute capability of the GPU, or what `architecture` chose; 80 without a GPU."""
    return _architecture if _architecture is not None else _device_architecture()


def table_architecture() -> int:
    """Returns what this GPU is looked up as: consumer Blackwell (120) has the shared memory of sm_89."""
    sm = current_architecture()
    return 89 if sm >= 120 else sm


@cache
def _device_architecture() -> int:
    if not torch.cuda.is_available():
        return 80
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


@cache
def _overrides() -> Table:
    path = os.environ.get(ENVIRONMENT_VARIABLE)
    return {} if not path else load_configs(Path(path))


def load_configs(path: Path) -> Table:
    """Reads a table that `dump_configs` wrote.

    Raises:
        ValueError: the file is not such a table, or names what `all_configs` does not know.
    """
    try:
        plain: dict[str, dict[str, dict[str, Any]]] = json.loads(read_text(path))
        table = {
            kernel: {
                int(sm): {name: Config(**entry) for name, entry in classes.items()} for sm, classes in per_sm.items()
            }
            for kernel, per_sm in plain.items()
        }
        for kernel, per_sm in table.items():
            for classes in per_sm.values():
                for name, config in classes.items():
                    classes[name] = _with_switches(kernel, name, config)
                    _check_entry(kernel, name, classes[name])
        return table
    except (OSError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}: {path} is not a table of kernel configurations: {error}") from error


def _with_switches(kernel: str, shape_class: str, config: Config) -> Config:
    """Adds the switches that came after an entry was tuned, off as they are in what is shipped."""
    shipped = [classes[shape_class] for classes in all_configs().get(kernel, {}).values() if shape_class in classes]
    off = {name: 0 for entry in shipped for name, value in entry.constants.items() if value == 0}
    return replace(config, constants=off | config.constants)


def _check_entry(kernel: str, shape_class: str, config: Config) -> None:
    shipped = {name: entry for classes in all_configs().get(kernel, {}).values() for name, entry in classes.items()}
    if shape_class not in shipped:
        known = ", ".join(shipped) if shipped else ", ".join(all_configs())
        raise ValueError(f"{kernel} {shape_class!r}: one of {known} expected")
    if config.constants.keys() != shipped[shape_class].constants.keys():
        expected = ", ".join(shipped[shape_class].constants) or "none"
        raise ValueError(f"{kernel} {shape_class!r}: constants {', '.join(config.constants)}, expected {expected}")


def dump_configs(table: Table) -> str:
    """Writes a table as JSON."""
    plain = {
        kernel: {str(sm): {name: vars(config) for name, config in classes.items()} for sm, classes in per_sm.items()}
        for kernel, per_sm in table.items()
    }
    return json.dumps(plain, indent=2)
