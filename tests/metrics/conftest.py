"""Fixtures of the metrics' tests."""

from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def plain_pq() -> ModuleType:
    """The straightforward implementation in benchmarks/."""
    from benchmarks.peers import plain_pq

    return plain_pq
