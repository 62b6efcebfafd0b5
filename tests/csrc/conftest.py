"""Fixtures of the extension's tests."""

from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def harness() -> ModuleType:
    """benchmarks/harness.py, for its memory measurement."""
    from benchmarks import harness

    return harness
