"""A kernel is added in its folder and one line: `KERNELS` of `kernels/backend.py`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

FILES = {
    "__init__.py": "",
    "reference.py": "def double(x):\n    return 2 * x\n",
    "configs.py": """
from ldmseg_fast.kernels.configs import Candidates, Table, make_config

TABLE: Table = {"double": {80: {"all": make_config(4, 1, BLOCK=256)}}}
CANDIDATES: Candidates = {"double": [make_config(8, 1, BLOCK=512)]}
""",
    "forward.py": """
import triton
import triton.language as tl


@triton.jit
def double_kernel(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + index, 2 * tl.load(x_ptr + index, mask=index < count), mask=index < count)
""",
    "host.py": """
import torch
import triton

from ldmseg_fast.kernels.configs import find_config
from ldmseg_fast.kernels.doubling.forward import double_kernel
from ldmseg_fast.kernels.launch import launch


def double(x):
    y = torch.empty_like(x)
    config = find_config("double", "all")
    launch(double_kernel, (triton.cdiv(x.numel(), config.constants["BLOCK"]),), x, y, x.numel(), config=config)
    return y
""",
    "cases.py": """
from functools import partial

import torch

from ldmseg_fast.kernels.case import Case, meta, normal
from ldmseg_fast.kernels.doubling import host, reference


def cases():
    make = lambda device: (normal(1024, device=device, dtype=torch.float16),)
    yield Case("doubling", "1024", torch.float16, 1, make, host.double, reference.double, 4096)


def edge_cases():
    yield partial(host.double, meta(1))
""",
}

COMMANDS = """
import sys
from ldmseg_fast.kernels import aot, backend, configs, roofline

if __name__ == "__main__":
    assert configs.all_candidates()["double"] and configs.find_config("double", "all").constants == {"BLOCK": 256}
    with backend.backend("doubling", "torch"):
        assert backend.get_backend("doubling") == "torch"
    sys.exit(roofline.main(["--only", "doubling"]) or aot.main(["--only", "doubling", "--sm", "90", "--jobs", "1"]))
"""


def test_a_folder_and_one_line_are_enough(tmp_path):
    left_out = shutil.ignore_patterns("__pycache__", "*.so", "weights")
    for folder in ("ldmseg_fast", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=left_out)
    (tmp_path / "csrc").mkdir()  # a checkout
    for name, text in FILES.items():
        path = tmp_path / "kernels" / "doubling" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    backend = tmp_path / "kernels" / "backend.py"
    before = backend.read_text()
    backend.write_text(before.replace('"point_loss")', '"point_loss", "doubling")'))
    assert backend.read_text() != before

    script = tmp_path / "commands.py"
    script.write_text(COMMANDS)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(tmp_path)
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split()[:3] for line in done.stdout.splitlines() if line.startswith("doubling")]
    assert rows[0][:2] == ["doubling", "1024"]
    assert rows[1] == ["doubling", "90", "2"], "the case and the edge case are built"
