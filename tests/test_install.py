"""The package as users get it: an sdist, a wheel of it for each Python, and a fresh environment outside the checkout.

LDMSEG_PYTHONS names interpreters as PATH does; python3.11, python3.12 and python3.13 of PATH are tried too.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("3.11", "3.12", "3.13")
EXTRAS_ONLY = {"deepspeed", "diffusers", "transformers", "tensorboard", "matplotlib", "gradio", "onnxruntime"}
OWN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in OWN}

pytestmark = [pytest.mark.soak, pytest.mark.serial]


def run(*command: str | Path, cwd: Path) -> str:
    """Runs a command without this process's own packages; returns what it prints."""
    done = subprocess.run([*map(str, command)], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def find_python(version: str) -> str | None:
    """Finds an interpreter of a version."""
    for name in (*os.environ.get("LDMSEG_PYTHONS", "").split(os.pathsep), f"python{version}"):
        path = shutil.which(name) if name else None
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        if path and subprocess.run([path, "-c", code], capture_output=True, text=True).stdout.strip() == version:
            return path
    return None


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The source distribution of this checkout."""
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    return next(out.glob("*.tar.gz"))


def test_the_sdist_holds_what_the_wheel_is_made_of(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").iterdir()}
    for folder in ("ldmseg_fast", "kernels", "export"):
        files = (path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix not in (".so", ".pyc"))
        expected |= {path.relative_to(ROOT).as_posix() for path in files}
    assert expected - names == set()
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, cwd=sdist.parent)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_wheel_predicts_and_scores_in_a_fresh_environment(version, sdist, tmp_path, scenes):
    python = find_python(version)
    if python is None:
        pytest.skip(f"no Python {version} in LDMSEG_PYTHONS or on PATH")
    run(python, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    own = tmp_path / "venv" / "bin" / "python"
    run(own, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path / "dist", sdist, cwd=tmp_path)
    wheel = next((tmp_path / "dist").glob("*.whl"))
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, cwd=tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        assert any(name.startswith("ldmseg_fast/_C.") for name in archive.namelist()), "the C++ extension is missing"
    # torch of these versions can be gigabytes: nothing of them is kept
    run(own, "-m", "pip", "install", "-q", "--no-cache-dir", "-c", ROOT / "constraints.txt", wheel, cwd=tmp_path)
    run(own, "-m", "pip", "check", cwd=tmp_path)
    installed = {
        entry["name"].lower() for entry in json.loads(run(own, "-m", "pip", "list", "--format=json", cwd=tmp_path))
    }
    assert not installed & EXTRAS_ONLY

    code = "import ldmseg_fast; from ldmseg_fast.native import _C; assert _C; print(ldmseg_fast.__file__)"
    assert Path(run(own, "-c", code, cwd=tmp_path).strip()).is_relative_to(tmp_path / "venv")
    ldmseg = tmp_path / "venv" / "bin" / "ldmseg"
    assert "predict" in run(ldmseg, "--help", cwd=tmp_path)
    predicted = json.loads(run(ldmseg, "predict", "tiny", scenes / "val2017", "--out", "maps", "--json", cwd=tmp_path))
    assert len(predicted["written"]) == 8
    report = json.loads(run(ldmseg, "evaluate", "tiny", "--data", scenes, "--out", "results", "--json", cwd=tmp_path))
    truth = scenes / "annotations" / "panoptic_val2017.json"
    scored = run(ldmseg, "pq", truth, "results/panoptic.json", "--class-agnostic", "--json", cwd=tmp_path)
    assert 100 * json.loads(scored)["All"]["pq"] == pytest.approx(report["class_agnostic"]["pq"], abs=1e-6)
    assert "C++ extension" in run(ldmseg, "doctor", cwd=tmp_path)
    shutil.rmtree(tmp_path / "venv")
