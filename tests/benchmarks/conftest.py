"""The benchmark scripts as they are run: each in a process of its own, from the checkout."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def script():
    """Runs `python benchmarks/NAME.py ARGUMENTS`; the finished process, whose failure is not an error here."""

    def run(name: str, *arguments: object, timeout: float = 240.0) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment.pop("TRITON_INTERPRET", None)
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )

    return run


class Understood(Exception):
    """Raised in the place of work."""


@pytest.fixture
def understands(monkeypatch):
    """Asserts that a script's own parser takes arguments, to the last; nothing is run."""
    plain = argparse.ArgumentParser.parse_known_args

    def parse(self, args=None, namespace=None):
        _, rest = plain(self, args, namespace)
        assert not rest
        raise Understood

    def check(module, arguments):
        with monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
            patch.setattr(sys, "argv", [module.__name__, *arguments])
            with pytest.raises(Understood):
                module.main()

    return check


@pytest.fixture
def record():
    """A valid record with one timed row and one value."""
    row = {"name": "whole image", "variant": "ours", "case": {"batch": 1}, "unit": "ms", "baseline": None}
    row |= {"ratio": None, "floor_share": None, "peak_memory_bytes": None, "spread": 1.1, "target": None, "samples": 9}
    row |= {"p5": 9.0, "p20": 9.5, "p50": 10.0, "p80": 10.5, "p95": 11.0, "p99": 12.0}
    value = {"name": "PQ", "variant": "ours", "case": {}, "unit": "%", "value": 51.7}
    environment = {"time": "2026-01-01T00:00:00Z", "command": "python x.py", "commit": "0" * 40, "python": "3.11"}
    environment |= {"packages": {"torch": "2.13.0"}, "cuda": None, "gpu": {"name": None}}
    environment |= {"cpu": {"name": "a cpu", "cores": 2, "torch_threads": 1, "load_before": 0.0}}
    whole = {"schema": 1, "suite": "latency", "quick": False, "environment": environment, "checks": {}}
    return json.loads(json.dumps(whole | {"results": [row, value]}))
