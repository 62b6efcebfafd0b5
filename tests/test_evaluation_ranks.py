"""Two ranks say the same as one, to the last digit, in every mode."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ldmseg_fast.evaluation import EvaluationOptions, evaluate

ROOT = Path(__file__).resolve().parents[1]
BASE = {"steps": 1, "limit": 7, "batch_size": 2, "mask_threshold": 0.0, "count_threshold": 0}
MODES = {
    "class-agnostic": {"model": "", "seeds": 2},
    "class-aware": {"model": "", "class_aware": "GT", "instances": "i.json", "page": "i.html", "worst": 1, "random": 1},
    "inpainting": {"model": "", "inpainting": True, "blocks": [8], "probabilities": [0.3]},
    "reconstruction": {"model": "-autoencoder", "class_aware": "GT", "id_assignment": "random"},
    "reconstructed inpainting": {"model": "-autoencoder", "inpainting": True, "probabilities": [0.5], "blocks": [8]},
}
SCRIPT = """
import json, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from ldmseg_fast import distributed
from ldmseg_fast.evaluation import evaluate
from tests.test_evaluation_ranks import MODES, options_of
distributed.start()
out = Path(sys.argv[3])
for mode in MODES:
    report = evaluate(sys.argv[1] + MODES[mode]["model"], sys.argv[2], options_of(mode, out))
    (out / f"{mode}.{distributed.rank()}.json").write_text(json.dumps(report))
distributed.stop()
"""


def options_of(mode: str, out: Path) -> EvaluationOptions:
    settings = BASE | {key: value for key, value in MODES[mode].items() if key != "model"}
    settings |= {key: str(out / settings[key]) for key in ("instances", "page") if key in settings}
    settings |= {key: tuple(settings[key]) for key in ("blocks", "probabilities") if key in settings}
    return EvaluationOptions(**settings, out=str(out / mode))


@pytest.fixture(scope="module")
def two_ranks(model_dir, scenes, tmp_path_factory):
    """A folder with each mode's report by each rank."""
    out = tmp_path_factory.mktemp("two_ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(model_dir), str(scenes), str(out)],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    return out


@pytest.mark.parametrize("mode", MODES)
def test_equal_to_one_rank(two_ranks, model_dir, scenes, tmp_path, mode):
    one = json.loads(json.dumps(evaluate(str(model_dir) + MODES[mode]["model"], scenes, options_of(mode, tmp_path))))
    reports = [one, *(json.loads((two_ranks / f"{mode}.{rank}.json").read_text()) for rank in range(2))]
    for report in reports:
        report.pop("seconds_per_image")
    assert reports[1] == one and reports[2] == one
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    for path in written:
        if not path.name.startswith("."):  # journals are each rank's own
            assert (two_ranks / path).read_bytes() == (tmp_path / path).read_bytes(), path
