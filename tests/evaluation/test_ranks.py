"""Two ranks say the same as one, to the last digit, in every mode; when one fails, both end."""

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ldmseg_fast.distributed.liveness import LOST_RANK
from ldmseg_fast.evaluation import EvaluationOptions, evaluate

pytestmark = pytest.mark.serial

ROOT = Path(__file__).resolve().parents[2]
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
from tests.evaluation.test_ranks import MODES, options_of
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


def run_two_ranks(script: str, *arguments: object) -> list[tuple[int, str, float]]:
    """Exit code, stderr and time of the end of each rank; no launcher ends one when the other has failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script, *map(str, arguments)],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in range(2)
    ]

    def wait(rank: subprocess.Popen) -> tuple[int, str, float]:
        error = rank.communicate(timeout=300)[1]
        return rank.returncode, error, time.monotonic()

    try:
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(wait, ranks))
    finally:
        for rank in ranks:
            rank.kill()


@pytest.fixture(scope="module")
def two_ranks(model_dir, scenes, tmp_path_factory):
    """A folder with each mode's report by each rank."""
    out = tmp_path_factory.mktemp("two_ranks")
    ended = run_two_ranks(SCRIPT, model_dir, scenes, out)
    assert [code for code, _, _ in ended] == [0, 0], ended
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


FAILING = """
import os, signal, sys, torch
torch.set_num_threads(1)
from ldmseg_fast.cli import main
from ldmseg_fast.errors import DataError
from ldmseg_fast.evaluation.predictors import DiffusionModel
segment, calls = DiffusionModel.segment, []
def fails(self, indices, seed):
    calls.append(indices)
    if len(calls) == 2 and os.environ["RANK"] == sys.argv[1]:
        if sys.argv[2] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if sys.argv[2] == "stopped":
            os.kill(os.getpid(), signal.SIGTERM)
        raise (DataError if sys.argv[2] == "DataError" else KeyError)("picture 7 is upside down")
    return segment(self, indices, seed)
DiffusionModel.segment = fails
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.parametrize(
    ("rank", "how", "code", "message"),
    [
        (1, "DataError", 2, "error: picture 7 is upside down\n"),
        (0, "KeyError", 1, "KeyError: 'picture 7 is upside down'\n"),
        (1, "killed", -9, ""),
        (1, "stopped", 143, "stopped by SIGTERM\n"),
    ],
)
def test_a_rank_that_fails_ends_the_other(model_dir, scenes, rank, how, code, message):
    command = ["evaluate", model_dir, "--data", scenes, "--steps", "1", "--batch-size", "2", "--no-baselines"]
    ended = run_two_ranks(FAILING, rank, how, *command)
    (own_code, own_error, end), (other_code, other_error, other_end) = ended[rank], ended[1 - rank]
    assert own_code == code and own_error.endswith(message), ended
    assert "Traceback" not in own_error or how == "KeyError"
    assert other_code == (143 if how == "stopped" else LOST_RANK) and "Traceback" not in other_error, ended
    words = {"killed": f"rank {rank} (process", "stopped": f"rank {rank} was stopped"}.get(
        how, f"rank {rank} has failed"
    )
    assert f"rank {1 - rank}: " in other_error and words in other_error
    assert abs(other_end - end) < 15


def test_what_is_wrong_for_all_ranks_is_said_once(model_dir, scenes):
    ended = run_two_ranks(FAILING, "no", "", "evaluate", model_dir, "--data", scenes, "--split", "test2017")
    assert [code for code, _, _ in ended] == [2, 2], ended
    assert sorted(error.count("test2017.json does not exist") for _, error, _ in ended) == [0, 1], ended
