"""The extension's tests once more under AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTS = (
    "tests/csrc",
    "tests/data/test_reading.py",
    "tests/data/test_transforms.py",
    "tests/kernels/test_panoptic_head_special_values.py::test_heads_agree",
    "tests/metrics",
    "tests/panoptic",
)
MEASURING = (  # would measure the sanitizer's own memory
    "tests/csrc/test_extension.py::test_head_needs_little_memory",
    "tests/csrc/test_memory.py",
    "tests/metrics/test_imports.py",
    "tests/metrics/test_pq_memory.py",
)
# Leaks are not looked for: Python and torch keep what they allocate until the process ends.
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1", "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1"}
RUNNER = """
import importlib.util, sys
import ldmseg_fast
spec = importlib.util.spec_from_file_location("ldmseg_fast._C", sys.argv[1])
ldmseg_fast._C = sys.modules["ldmseg_fast._C"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ldmseg_fast._C)
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-m", "not soak", *sys.argv[2:]]))
"""


@pytest.mark.soak
@pytest.mark.parametrize("defines", [[], ["-DLDMSEG_BASELINE_ONLY"]], ids=["dispatch", "baseline"])
def test_extension_under_sanitizers(tmp_path, defines, record_property):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ on this machine")
    import pybind11

    library = tmp_path / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    sources = [str(path) for path in sorted((ROOT / "csrc").glob("*.cpp"))]
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    flags = ["-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-omit-frame-pointer"]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    subprocess.run([compiler, *flags, *defines, *sanitizers, *includes, *sources, "-o", str(library)], check=True)
    preload = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = (
        os.environ | OPTIONS | {"LD_PRELOAD": " ".join(preload), "OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    )
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(library), *(f"--deselect={name}" for name in MEASURING), *TESTS],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    record_property("tests under both sanitizers", int(passed[1]))
    assert "runtime error" not in done.stderr
