"""Where the system lets no thread start, fewer do the work: no abort, the same results."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ldmseg_fast.native import _C
from ldmseg_fast.panoptic.format import write_panoptic_png
from ldmseg_fast.threads import limit_threads, startable_threads

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import os, sys
from ldmseg_fast.threads import limit_threads, startable_threads

os.environ["OMP_NUM_THREADS"] = "7"
limit_threads()
found = [startable_threads(3), *(os.environ[name] for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"))]

import numpy as np
from ldmseg_fast.data.reader import PatientReader
from ldmseg_fast.metrics.pq_files import evaluate_files
from ldmseg_fast.native import _C

logits = np.random.default_rng(0).normal(0, 3, (1, 20, 16, 16)).astype(np.float32)
found.append(int(_C.panoptic_head(logits, (64, 64), (64, 64), 0.3, 3, 0.2, 4)[0].sum()) if _C else 0)
found.append(evaluate_files(sys.argv[1], sys.argv[1], num_threads=4, replicates=1)["All"]["pq"])
found.append(PatientReader(5.0, lambda: "a file").call(lambda: "read"))
print(*found)
"""


def without_threads() -> None:
    """Makes a thread's stack larger than the address space."""
    resource.setrlimit(resource.RLIMIT_STACK, (2**40, resource.getrlimit(resource.RLIMIT_STACK)[1]))
    resource.setrlimit(resource.RLIMIT_AS, (2**39, resource.getrlimit(resource.RLIMIT_AS)[1]))


def test_no_thread_can_start(tmp_path: Path) -> None:
    if resource.getrlimit(resource.RLIMIT_STACK)[1] not in (resource.RLIM_INFINITY, -1):
        pytest.skip("this system does not let stacks grow")
    (tmp_path / "x").mkdir()
    for name in ("a.png", "b.png", "c.png"):
        write_panoptic_png(tmp_path / "x" / name, np.arange(1, 13).reshape(3, 4))
    segments = [{"id": k, "category_id": 1, "iscrowd": 0, "area": 1} for k in range(1, 13)]
    content = {
        "images": [{"id": k, "file_name": f"{k}.jpg", "height": 3, "width": 4} for k in range(3)],
        "annotations": [{"image_id": k, "file_name": f"{'abc'[k]}.png", "segments_info": segments} for k in range(3)],
        "categories": [{"id": 1, "name": "object", "isthing": 1}],
    }
    (tmp_path / "x.json").write_text(json.dumps(content))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "x.json")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        preexec_fn=without_threads,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "this system lets 0 more threads be started" in done.stderr
    logits = np.random.default_rng(0).normal(0, 3, (1, 20, 16, 16)).astype(np.float32)
    ids = int(_C.panoptic_head(logits, (64, 64), (64, 64), 0.3, 3, 0.2, 1)[0].sum()) if _C else 0
    assert done.stdout.split() == ["0", "1", "1", str(ids), "1.0", "read"]


def test_threads_that_start_change_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert startable_threads(0) == 0
    assert startable_threads(5) == 5
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    limit_threads()
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert capsys.readouterr().err == ""
