"""Fixtures of the metrics' tests."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def plain_pq() -> ModuleType:
    """The straightforward implementation in benchmarks/."""
    spec = importlib.util.spec_from_file_location("plain_pq", ROOT / "benchmarks" / "plain_pq.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
