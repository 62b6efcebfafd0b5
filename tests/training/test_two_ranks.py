"""Two ranks under DeepSpeed, on CPUs: what must be equal is equal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ldmseg_fast.config import load_config
from ldmseg_fast.distributed.liveness import Interrupt
from ldmseg_fast.training.checkpoints import TrainingCheckpoints
from ldmseg_fast.training.loop import Run, train
from ldmseg_fast.training.noise_scale import MICRO, WHOLE
from tests.training.helpers import TINY, Job, assembled, deepspeed, losses, metrics
from tests.training.two_ranks import measured

pytestmark = pytest.mark.serial

SCENARIOS = [
    "resume:2", "stage:0", "stage:1", "stage:2", "stage:3", "accumulation:1", "fp16:0", "fp16:2", "validation",
    "resave:0", "resave:1", "resave:3", "nonfinite:0", "nonfinite:1", "nonfinite:3",
    "offload:2", "trust:2", "bf16:1", "bf16:3", "noise:0", "noise:1", "noise:2", "noise:3",
    "muon:0", "muon:1", "muon:2", "muon:3",
]  # fmt: skip
SCRIPT = Path(__file__).with_name("two_ranks.py")


def settings(scenes: Path, autoencoder: Path, out: Path, *overrides: str):
    fixed = [f"data.root={scenes}", f"output_dir={out}", f"model.mask_vae={autoencoder}", "train.threads=1"]
    return load_config(str(TINY), [*fixed, *overrides])


@pytest.fixture(scope="module")
def one_rank(scenes: Path, autoencoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that two ranks write to; in it `one-rank`, a run of one process, and `to-resave`, its first half."""
    out = tmp_path_factory.mktemp("two_ranks")
    torch.set_num_threads(1)
    train("diffusion", settings(scenes, autoencoder, out / "one-rank"))
    shutil.copytree(out / "one-rank", out / "to-resave")
    shutil.rmtree(out / "to-resave" / "checkpoints" / "step-00000008")
    return out


@pytest.fixture(scope="module")
def out(one_rank: Path, scenes: Path, autoencoder: Path) -> Path:
    """All scenarios of SCENARIOS have run there."""
    import os
    import subprocess

    command = deepspeed(2, SCRIPT, scenes, autoencoder, one_rank, *SCENARIOS)
    log = one_rank / "log.txt"
    with log.open("w") as output:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "LDMSEG_TEST_JOB": str(log)}
        process = subprocess.Popen(
            list(map(str, command)), stdout=output, stderr=output, env=environment, start_new_session=True
        )
        job = Job(process, log)
        try:
            code = job.wait(300)
        finally:
            job.end()
    assert code == 0, log.read_text()[-4000:]
    return one_rank


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario_ran(out: Path, scenario: str) -> None:
    for path in sorted(out.glob(f"failed-{scenario}-*")):
        pytest.fail(path.read_text())


def test_a_resumed_run_repeats_every_bit(out: Path) -> None:
    whole, cut = losses(out / "whole-2"), losses(out / "cut-2")
    assert len(whole) == 8 and whole == cut
    first, second = (assembled(out / name / "checkpoints" / "step-00000008") for name in ("whole-2", "cut-2"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_zero_stages_agree(out: Path) -> None:
    reference = losses(out / "stage-0")
    for zero in (1, 2, 3):
        assert losses(out / f"stage-{zero}") == pytest.approx(reference, rel=1e-5)
        assert metrics(out / f"stage-{zero}")[0]["val/pq"] == pytest.approx(
            metrics(out / "stage-0")[0]["val/pq"], abs=0.5
        )


def test_two_ranks_train_as_one_does(out: Path, scenes: Path, autoencoder: Path) -> None:
    assert losses(out / "whole-2") == pytest.approx(losses(out / "one-rank"), rel=1e-4)


def test_two_ranks_train_the_autoencoder_as_one_does(out: Path, scenes: Path, autoencoder: Path) -> None:
    """Segments and points in void are counted over all ranks."""
    config = settings(scenes, autoencoder, out / "one-rank-autoencoder", "train.steps=4", "data.val_limit=1")
    assert losses(out / "stage-0") == pytest.approx(losses(train("autoencoder", config)), rel=1e-3)


def test_accumulation_changes_nothing(out: Path) -> None:
    assert losses(out / "accumulation-1") == pytest.approx(losses(out / "one-rank")[:4], rel=1e-4)


@pytest.mark.parametrize("zero", [0, 2])
def test_fp16_scales_its_loss(out: Path, zero: int) -> None:
    assert losses(out / f"fp16-{zero}") == pytest.approx(losses(out / "one-rank")[:3], rel=2e-2)
    state = json.loads((out / f"fp16-{zero}" / "checkpoints" / "step-00000003" / "state.json").read_text())
    assert state["counters"]["loss_scale"] >= 1.0 and state["counters"]["steps"] >= 1


def test_validation_is_that_of_one_rank(out: Path, scenes: Path, autoencoder: Path) -> None:
    alone = measured(settings(scenes, autoencoder, out / "validation"))
    assert json.loads((out / "validation.json").read_text()) == alone
    assert 0 < alone["val/pq"] < 100 and len(alone["maps"]) == 24


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_state_moves_between_numbers_of_ranks(out: Path, scenes: Path, autoencoder: Path, zero: int) -> None:
    """1 -> 2 -> 1 ranks: weights, moments and averages are the same bits."""
    before = assembled(out / "to-resave" / "checkpoints" / "step-00000004")
    after = assembled(out / f"resaved-{zero}" / "step-00000004")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    run = Run("diffusion", settings(scenes, autoencoder, out / "unused"), Interrupt())
    progress = TrainingCheckpoints(out / f"resaved-{zero}", 9).load(run.stage, run.optimizer, "diffusion", print)
    assert (progress.step, progress.items) == (4, 16)
    for shard in run.optimizer.shards:
        assert torch.equal(shard.weight.flatten(), before[f"weight/{shard.name}"])
        assert torch.equal(shard.moments["exp_avg_sq"].flatten(), before[f"exp_avg_sq/{shard.name}"])
    run.close()


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_a_nan_on_one_rank_skips_the_step_on_all(out: Path, zero: int) -> None:
    results = json.loads((out / f"nonfinite-{zero}.json").read_text())
    assert results == [[True, 1], [True, 1]]


def test_bf16_at_every_stage(out: Path) -> None:
    assert losses(out / "bf16-1") == pytest.approx(losses(out / "one-rank")[:4], rel=2e-2)
    assert losses(out / "bf16-3") == pytest.approx(losses(out / "bf16-1"), rel=2e-3)


def test_the_noise_scale_is_that_of_the_ranks_gradients(out: Path) -> None:
    """At every stage of ZeRO, whatever it does with gradients."""
    found = [json.loads((out / f"noise-{zero}.json").read_text()) for zero in range(4)]
    for ranks in found:
        for rank, first in zip(ranks, found[0]):
            assert rank == {name: pytest.approx(value, rel=1e-3) for name, value in first.items()}
    first, second = found[0]
    assert first[MICRO] != second[MICRO] and first[WHOLE] == pytest.approx(second[WHOLE])
    assert 0 < first[WHOLE] <= (first[MICRO] + second[MICRO]) / 2 * 1.001


def test_muon_turns_every_matrix_or_says_why_it_cannot(out: Path) -> None:
    """DeepSpeed has passed such optimizers by without a word. Ranks share the work, and the weights are the same."""
    ranks = json.loads((out / "muon-0.json").read_text())
    turned, hidden = [each[0] for each in ranks], ranks[0][1]
    assert sum(turned) == hidden > 10 and max(turned) - min(turned) <= 1
    assert len({weights for each in ranks for weights in each[2:]}) == 1
    for zero in (1, 2, 3):
        for message in json.loads((out / f"muon-{zero}.json").read_text()):
            assert message.startswith(f"train.optimizer=muon: train.zero_stage={zero} cuts the matrices")


def test_offloading_changes_nothing(out: Path) -> None:
    assert losses(out / "offload-2") == pytest.approx(losses(out / "one-rank")[:3], rel=1e-4)


@pytest.mark.soak
def test_more_of_every_stage(scenes: Path, autoencoder: Path, tmp_path: Path, start: Callable[..., Job]) -> None:
    scenarios = [f"{name}:{zero}" for name in ("offload", "trust", "accumulation", "fp16") for zero in (1, 2, 3)]
    job = start(
        deepspeed(2, SCRIPT, scenes, autoencoder, tmp_path, *scenarios, "compiled:0", "compiled:1", "compiled:2")
    )
    assert job.wait(600) == 0, job.output[-4000:]
    assert not [path.read_text() for path in tmp_path.glob("failed-*")]
    for zero in (1, 2, 3):
        assert losses(tmp_path / f"offload-{zero}") == pytest.approx(losses(tmp_path / "compiled-0"), rel=1e-4)
        assert losses(tmp_path / f"accumulation-{zero}")[:3] == pytest.approx(losses(tmp_path / "compiled-0"), rel=1e-4)
    for zero in (1, 2):
        assert losses(tmp_path / f"compiled-{zero}") == pytest.approx(losses(tmp_path / "compiled-0"), rel=1e-5)


@pytest.mark.soak
def test_inductor_keeps_the_loss_curve_on_two_ranks(
    scenes: Path, autoencoder: Path, tmp_path: Path, start: Callable[..., Job]
) -> None:
    """At the stages of ZeRO that compiled blocks go with."""
    job = start(deepspeed(2, SCRIPT, scenes, autoencoder, tmp_path, "compiled:0", *(f"inductor:{n}" for n in range(3))))
    assert job.wait(1800) == 0, job.output[-4000:]
    assert not [path.read_text() for path in tmp_path.glob("failed-*")]
    for zero in range(3):
        assert losses(tmp_path / f"inductor-{zero}") == pytest.approx(losses(tmp_path / "compiled-0"), rel=1e-3)


@pytest.mark.soak
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_every_zero_stage_resumes_exactly(
    zero: int, scenes: Path, autoencoder: Path, tmp_path: Path, start: Callable[..., Job]
) -> None:
    job = start(deepspeed(2, SCRIPT, scenes, autoencoder, tmp_path, f"resume:{zero}"))
    assert job.wait() == 0, job.output[-4000:]
    assert not list(tmp_path.glob("failed-*"))
    assert losses(tmp_path / f"whole-{zero}") == losses(tmp_path / f"cut-{zero}")
