"""`kernels` and `export` are importable as parts of the package, in a checkout and installed, and nothing else is."""

import multiprocessing
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WHERE = (
    "import ldmseg_fast.export, ldmseg_fast.kernels as k; print(ldmseg_fast.export.__file__, *k.__path__, sep='\\n')"
)


def run_python(*arguments: str, path: Path) -> subprocess.CompletedProcess[str]:
    """Python without site-packages, so without any installed copy of the package."""
    environment = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run(
        [sys.executable, "-S", *arguments], env=environment, cwd=path, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("name", ["setup", "tests", "benchmarks", "csrc", "kernel", "exports"])
def test_the_rest_of_a_checkout_is_no_part_of_the_package(name):
    with pytest.raises(ModuleNotFoundError):
        __import__(f"ldmseg_fast.{name}")
    assert find_spec(f"ldmseg_fast.{name}") is None


def test_kernels_and_export_are_those_of_this_checkout():
    assert find_spec("ldmseg_fast.export").origin == str(ROOT / "export" / "__init__.py")
    assert find_spec("ldmseg_fast.kernels.attention").origin == str(ROOT / "kernels" / "attention" / "__init__.py")
    assert find_spec("ldmseg_fast.kernels.nothing") is None


def test_a_checkout_on_the_path_is_enough(tmp_path):
    result = run_python("-c", WHERE, path=ROOT)
    assert result.stdout.split() == [str(ROOT / "export" / "__init__.py"), str(ROOT / "kernels")], result.stderr
    (tmp_path / "here").symlink_to(ROOT)
    assert run_python("-c", WHERE, path=tmp_path / "here").stdout == result.stdout


def test_an_installed_package_holds_both_folders(tmp_path):
    """`setup.PACKAGE_DIR` maps them into the package."""
    ignore = shutil.ignore_patterns("weights", "__pycache__")
    shutil.copytree(ROOT / "ldmseg_fast", tmp_path / "ldmseg_fast", ignore=ignore)
    for folder in ("kernels", "export"):
        shutil.copytree(ROOT / folder, tmp_path / "ldmseg_fast" / folder, ignore=ignore)
    installed = tmp_path / "ldmseg_fast"
    result = run_python("-c", WHERE, path=tmp_path)
    assert result.stdout.split() == [str(installed / "export" / "__init__.py"), str(installed / "kernels")], (
        result.stderr
    )
    finders = run_python("-c", "import ldmseg_fast, sys; print(*sys.meta_path)", path=tmp_path).stdout
    assert "_CheckoutFinder" not in finders


def where_a_worker_finds_them(queue) -> None:
    queue.put(
        [find_spec(f"ldmseg_fast.{name}.{child}").origin for name, child in (("kernels", "case"), ("export", "parity"))]
    )


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_workers_find_them(method):
    context = multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    worker = context.Process(target=where_a_worker_finds_them, args=(queue,))
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0
    assert queue.get() == [str(ROOT / "kernels" / "case.py"), str(ROOT / "export" / "parity.py")]
