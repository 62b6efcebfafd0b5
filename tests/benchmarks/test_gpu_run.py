"""The calls for a bare GPU machine that stand beside the checkout are understood by today's scripts."""

import importlib
import re
import shlex
from pathlib import Path

from ldmseg_fast.kernels.backend import KERNELS

ROOT = Path(__file__).resolve().parents[2]
CALL = re.compile(r"(?<![\w/])(?:benchmarks/)?(\w+)\.py((?: +[-$./\w]+)*)")
TEXT = """
1. `for k in mask_bits; do python3 benchmarks/bench_kernels.py --quick --only $k --out $OUT/k; done` and one more,
`(python3 benchmarks/random_model.py --preset coco --out $T/M > $T/m.txt 2>&1) & wait`; `profile_loop.py --rows 60`.
"""


def calls(text: str, folder: str) -> list[tuple[str, list[str]]]:
    """Finds the benchmarks that Markdown names in backticks with their arguments; `$k` is every kernel in turn."""
    found = []
    for code in re.findall(r"`([^`]+)`", text):
        for name, arguments in CALL.findall(re.sub(r" \d?>.*?(?=[;&|)]|$)", "", code)):
            if (ROOT / "benchmarks" / f"{name}.py").is_file():
                kernels = KERNELS if "$k" in arguments else ("",)
                texts = [re.sub(r"\$[A-Z]+", folder, arguments.replace("$k", kernel)) for kernel in kernels]
                found += [(name, shlex.split(text)) for text in texts]
    return found


def check(text: str, folder: str, understands) -> list[str]:
    named = calls(text, folder)
    for name, arguments in named:
        understands(importlib.import_module(f"benchmarks.{name}"), arguments)
    return [name for name, _ in named]


def test_calls_are_found(tmp_path, understands):
    names = check(TEXT, str(tmp_path), understands)
    assert names == ["bench_kernels"] * len(KERNELS) + ["random_model", "profile_loop"]


def test_every_call_is_understood(shared, tmp_path, understands):
    text = (shared / "GPU_RUN.md").read_text(encoding="utf-8")
    assert {"random_model", "bench_kernels", "bench_latency", "bench_training"} <= set(
        check(text, str(tmp_path), understands)
    )
    tests = re.findall(r"tests/kernels/test_\$k\*\.py", text)
    kernels = re.search(r"for k in ([\w ]+); do \(timeout", text)
    assert tests and kernels
    for kernel in kernels[1].split():
        assert list((ROOT / "tests" / "kernels").glob(f"test_{kernel}*.py"))
