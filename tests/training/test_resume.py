"""Checkpoints of one process: exact, complete or absent, and honest about damage."""

from __future__ import annotations

import errno
import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldmseg_fast.checkpoints.tensors import save_weights
from ldmseg_fast.config import Config
from ldmseg_fast.distributed.liveness import Interrupt
from ldmseg_fast.errors import CheckpointError
from ldmseg_fast.files import entry_of
from ldmseg_fast.training import checkpoints as resume_module
from ldmseg_fast.training import disk
from ldmseg_fast.training.loop import Run, train
from ldmseg_fast.training.shards import random_state
from tests.training.helpers import Job, assembled, losses

Settings = Callable[..., Config]


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_the_next_twenty_losses_are_the_same_bits(
    stage: str, settings: Settings, autoencoder: Path, tmp_path: Path
) -> None:
    common = [f"model.mask_vae={autoencoder}", "train.steps=25", "train.save_every=5", "data.num_workers=2"]
    whole = train(stage, settings("whole", *common))
    shutil.copytree(whole, tmp_path / "cut")
    for step in (10, 15, 20, 25):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"step-{step:08d}")
    cut = train(stage, settings("cut", *common), resume=True)
    assert len(losses(cut)) == 25 and losses(cut) == losses(whole)
    first, second = (assembled(folder / "checkpoints" / "step-00000025") for folder in (whole, cut))
    assert all(torch.equal(first[key], second[key]) for key in first)
    weights = [next((folder).glob("*/model.safetensors")).read_bytes() for folder in (whole, cut)]
    assert weights[0] == weights[1]


@pytest.fixture
def run(settings: Settings) -> Iterator[Run]:
    """A run that has just begun, whose weights a test may set."""
    run = Run("autoencoder", settings("run", "train.keep=2", "train.keep_best=1"), Interrupt())
    yield run
    run.close()


def save_at(run: Run, *steps: int) -> None:
    for step in steps:
        run.progress.step = step
        for shard in run.optimizer.shards:
            shard.weight.fill_(step)
        run.checkpoints.save(run.stage, run.optimizer, run.progress)


def load(run: Run) -> tuple[int, str]:
    """(step, warnings) of what a resume finds; the weights belong to that step."""
    said: list[str] = []
    progress = run.checkpoints.load(run.stage, run.optimizer, "autoencoder", said.append)
    assert all((shard.weight == progress.step).all() for shard in run.optimizer.shards)
    return progress.step, "\n".join(said)


def test_the_newest_and_the_best_are_kept(run: Run) -> None:
    for step, quality in ((1, 10.0), (2, 50.0), (3, 30.0), (4, 20.0), (5, 40.0)):
        run.progress.best[step] = quality
        save_at(run, step)
    assert run.checkpoints.steps() == [2, 4, 5]
    assert json.loads((run.checkpoints.folder / "latest").read_text()) == "step-00000005"


@pytest.mark.parametrize("latest", [None, "step-00000099", "../../etc"])
def test_latest_is_not_believed(run: Run, latest: str | None) -> None:
    save_at(run, 1, 2)
    (run.checkpoints.folder / "latest").unlink()
    if latest:
        (run.checkpoints.folder / "latest").write_text(latest)
    assert load(run)[0] == 2


def test_a_kill_between_two_renames(run: Run) -> None:
    """A step that is saved again: its older checkpoint is aside when the newer one is not there yet."""
    save_at(run, 1)
    run.checkpoints.path(1).rename(run.checkpoints.folder / ".old-step-00000001")
    run.checkpoints.check_start(resume=True)
    assert load(run) == (1, "")
    shutil.copytree(run.checkpoints.path(1), run.checkpoints.folder / ".old-step-00000001")
    run.checkpoints.check_start(resume=True)
    assert load(run) == (1, "") and not list(run.checkpoints.folder.glob(".old*"))


def test_unfinished_folders_do_not_count(run: Run) -> None:
    save_at(run, 1)
    shutil.copytree(run.checkpoints.path(1), run.checkpoints.folder / ".new-00000007")
    shutil.copytree(run.checkpoints.path(1), run.checkpoints.path(8))
    (run.checkpoints.path(8) / "manifest.json").unlink()
    assert load(run) == (1, "")
    assert not (run.checkpoints.folder / ".new-00000007").exists()


@pytest.mark.parametrize(
    "name", ["shard-00000-of-00001.safetensors", "state.json", "fixed.safetensors", "manifest.json"]
)
def test_one_flipped_bit_is_found(run: Run, name: str) -> None:
    save_at(run, 1, 2)
    path = run.checkpoints.path(2) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    step, said = load(run)
    assert step == 1
    assert "step-00000002" in said and ("damaged" in said or "missing" in said or "bytes instead of" in said)
    shutil.rmtree(run.checkpoints.path(1))
    with pytest.raises(CheckpointError, match="step-00000002"):
        load(run)


def forge(run: Run, name: str, content: bytes) -> None:
    """Changes a file of the only checkpoint, and the manifest with it."""
    folder = run.checkpoints.path(1)
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = entry_of(folder / name)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "change",
    [
        {"progress": None},
        {"progress": {"stage": "autoencoder"}},
        {"progress": {"stage": "autoencoder", "step": "x", "best": {}}},
        {"progress": {"stage": "autoencoder", "best": {"x": 1}}},
        {"shapes": {"mask_vae.encoder.0.weight": [-1]}},
        {"shapes": {"mask_vae.encoder.0.weight": [2**62, 2**62]}},
        {"shapes": []},
        {"counters": {}},
        {"counters": None},
        {"world_size": "many"},
    ],
)
def test_a_state_that_agrees_with_a_forged_manifest(run: Run, change: dict) -> None:
    save_at(run, 1)
    state = json.loads((run.checkpoints.path(1) / "state.json").read_text())
    forge(run, "state.json", json.dumps(state | change).encode())
    with pytest.raises(CheckpointError, match="step-00000001"):
        load(run)


@pytest.mark.parametrize("name", ["set_counters", "set_random_state"])
def test_a_fault_of_our_own_is_no_damage(name: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(*_: object) -> None:
        raise KeyError("ours")

    save_at(run, 1)
    monkeypatch.setattr(run.optimizer if name == "set_counters" else resume_module, name, faulty)
    with pytest.raises(KeyError, match="ours"):
        load(run)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("gauss"),
        lambda state: state.update(torch=torch.zeros(5056, dtype=torch.uint8)),
        lambda state: state.update(python=state["python"][:5]),
        lambda state: state["python"].fill_(-1),
        lambda state: state.update(numpy=state["numpy"].float()),
        lambda state: state.update(numpy_place=torch.zeros(3, dtype=torch.int64)),
    ],
)
def test_random_states_that_agree_with_a_forged_manifest(run: Run, change: Callable[[dict], object]) -> None:
    save_at(run, 1)
    path = run.checkpoints.path(1) / "random-00000.safetensors"
    state, before = random_state(), random.getstate()
    change(state)
    save_weights(state, path)
    forge(run, path.name, path.read_bytes())
    with pytest.raises(CheckpointError, match=r"random-00000\.safetensors: damaged"):
        load(run)
    assert random.getstate() == before


@pytest.mark.parametrize("value", ["1", None, -1, float("nan"), 2**70, [1]])
def test_counters_that_agree_with_a_forged_manifest(run: Run, value: Any) -> None:
    save_at(run, 1)
    state = json.loads((run.checkpoints.path(1) / "state.json").read_text())
    for key in state["counters"]:
        changed = state | {"counters": state["counters"] | {key: value}}
        forge(run, "state.json", json.dumps(changed).encode())
        with pytest.raises(CheckpointError, match="step-00000001"):
            load(run)


def test_shards_that_agree_with_a_forged_manifest(run: Run) -> None:
    save_at(run, 1)
    for name in ("shard-00000-of-00001.safetensors", "fixed.safetensors", "random-00000.safetensors"):
        whole = (run.checkpoints.path(1) / name).read_bytes()
        for content in (b"", whole[:20], whole[:-1], b"\xff" * 100):
            forge(run, name, content)
            with pytest.raises(CheckpointError, match=name):
                load(run)
        forge(run, name, whole)
    assert load(run)[0] == 1
    for content in ("[]", "{}", '{"files": 3}', '{"files": {"state.json": {}}}', "[" * 10_000):
        (run.checkpoints.path(1) / "manifest.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"manifest\.json|state\.json"):
            load(run)


@pytest.mark.parametrize("change", [lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-1])])
def test_missing_and_short_files_are_found(run: Run, change: Callable[[Path], object]) -> None:
    save_at(run, 1, 2)
    change(run.checkpoints.path(2) / "shard-00000-of-00001.safetensors")
    assert load(run)[0] == 1


def test_a_full_disk_leaves_the_old_checkpoint(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    save_at(run, 1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(resume_module, "save_shards", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*MiB free.*train.keep.*step 1"):
        save_at(run, 2)
    monkeypatch.undo()
    assert load(run)[0] == 1
    assert sorted(path.name for path in run.checkpoints.folder.iterdir()) == ["latest", "step-00000001"]


def test_every_generator_is_seeded(settings: Settings) -> None:
    states = []
    for _ in range(2):
        random.random(), np.random.random()  # noqa: NPY002
        Run("autoencoder", settings("run", "train.seed=3"), Interrupt()).close()
        states.append(random_state())
    assert all(torch.equal(states[0][key], states[1][key]) or key == "gauss" for key in states[0])


def test_other_architectures_and_stages(settings: Settings, autoencoder: Path) -> None:
    train("autoencoder", settings("run", "train.steps=1"))
    with pytest.raises(CheckpointError, match=r"another architecture; .*mask_vae\.decoder.*instead of"):
        train("autoencoder", settings("run", "train.steps=2", "mask_vae.decoder_width=20"), resume=True)
    with pytest.raises(CheckpointError, match="autoencoder stage"):
        train("diffusion", settings("run", "train.steps=2", f"model.mask_vae={autoencoder}"), resume=True)


def test_another_batch_size_goes_on_at_the_same_item(settings: Settings) -> None:
    train("autoencoder", settings("run", "train.steps=3"))
    run = Run("autoencoder", settings("run", "train.steps=5", "train.batch_size=6"), Interrupt(), resume=True)
    batch = next(run.batches)
    assert run.progress.items == 12
    assert batch["sample"] == [epoch * 24 + index for epoch, index in run.batches.order(0)]
    run.close()


def killing(trials: int, scenes: Path, folder: Path) -> list[str]:
    return list(map(str, [sys.executable, Path(__file__).with_name("killed_while_saving.py"), trials, scenes, folder]))


def test_kill_while_saving(scenes: Path, tmp_path: Path, start: Callable[..., Job]) -> None:
    job = start(killing(3, scenes, tmp_path / "run"))
    assert job.wait() == 0, job.output
    found = json.loads(job.output.splitlines()[-1])
    assert (found["kills"], found["resumed"], found["lost_checkpoints"]) == (3, 3, 0)


@pytest.mark.soak
def test_a_hundred_kills_while_saving(
    scenes: Path, tmp_path: Path, start: Callable[..., Job], record_property: Callable[[str, object], None]
) -> None:
    job = start(killing(100, scenes, tmp_path / "run"))
    assert job.wait(1200) == 0, job.output
    found = json.loads(job.output.splitlines()[-1])
    for name, value in found.items():
        record_property(name, value)
    assert (found["kills"], found["resumed"], found["lost_checkpoints"]) == (100, 100, 0)
    assert found["half_written"] > 10, "the kills did not come while something was written"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no right to mount a small tmpfs: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_really_full(
    small_disk: Path, settings: Settings, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ldmseg_fast.train import main
    from tests.training.helpers import TINY

    root = settings("x").data.root
    arguments = ["--config", str(TINY), f"data.root={root}", f"output_dir={small_disk / 'run'}", "train.save_every=1"]
    (small_disk / "ballast").write_bytes(bytes(1_200_000))
    assert main(["autoencoder", *arguments, "train.keep=50", "train.steps=10"]) == 2
    error = capfd.readouterr().err.strip()
    assert re.search(r"disk: .*\(10 checkpoints of .*, but .* are free there; lower train\.keep", error)
    assert len(error.splitlines()) == 1 and not (small_disk / "run" / "checkpoints").exists()
    monkeypatch.setattr(disk, "disk_need", lambda *_: disk.DiskNeed(0, 1, 0, -disk.SLACK))  # another fills it meanwhile
    assert main(["autoencoder", *arguments, "train.keep=50", "train.steps=10"]) == 2
    error = capfd.readouterr().err
    assert "No space left on device" in error and "train.keep" in error
    (small_disk / "ballast").unlink()
    assert main(["autoencoder", *arguments, "train.keep=1", "train.keep_best=0", "train.steps=10", "--resume"]) == 0
