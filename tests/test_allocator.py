"""Freed memory stays with the processes that run networks, and the user's own settings of malloc stay."""

import os
import platform
import subprocess
import sys

import pytest

from ldmseg_fast import allocator, cli

FAULTS = """
import resource
import numpy as np
from ldmseg_fast.allocator import keep_freed_memory

kept = keep_freed_memory()
np.empty(2**24, np.float32).fill(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    np.empty(2**24, np.float32).fill(1)  # 64 MiB
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**environment):
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", FAULTS]
    run = subprocess.run(command, env=own | environment, check=True, capture_output=True, text=True)
    kept, found = run.stdout.split()
    return kept == "True", int(found)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc has no such settings")
def test_freed_memory_is_used_again():
    kept, found = faults()
    asked, mapped_anew = faults(MALLOC_ARENA_MAX="8")
    assert kept and not asked
    assert found < mapped_anew / 4


def test_commands_that_run_networks_ask_for_it(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: asked.append(1))
    assert cli.main(["pq", str(tmp_path / "none.json"), str(tmp_path / "none.json")]) == 2 and not asked
    for command in (
        ["predict", str(tmp_path / "none"), "x.png", "--out", str(tmp_path)],
        ["evaluate", "tiny", "--data", str(tmp_path)],
    ):
        assert cli.main(command) == 2 and asked.pop()
    capsys.readouterr()


def test_another_c_library_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: object())
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_"))]:
        monkeypatch.delenv(name)
    assert not allocator.keep_freed_memory()
