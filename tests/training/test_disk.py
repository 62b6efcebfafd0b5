"""What a run will have on disk, and frozen weights that its checkpoints share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from ldmseg_fast.config import Config, TrainConfig
from ldmseg_fast.errors import CheckpointError
from ldmseg_fast.training import checkpoints, disk
from ldmseg_fast.training.disk import SLACK, describe_disk, disk_need
from ldmseg_fast.training.loop import train
from tests.training.helpers import losses

Settings = Callable[..., Config]


def size_of(folder: Path) -> int:
    """Bytes of the files below a folder, each file once however many names it has."""
    return sum({path.stat().st_ino: path.stat().st_size for path in folder.rglob("*") if path.is_file()}.values())


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_forecast_is_what_a_run_writes(ema: float, settings: Settings, autoencoder: Path) -> None:
    options = [
        f"model.mask_vae={autoencoder}",
        "train.steps=6",
        "train.save_every=1",
        "train.keep=2",
        f"train.ema={ema}",
    ]
    config = settings("run", *options, "train.validate_every=3", "data.val_limit=1")
    folder = train("diffusion", config)
    need = disk_need(*sizes(folder), config.train)
    assert need.checkpoints == 4
    steps = sorted((folder / "checkpoints").glob("step-*"))
    for step in steps:
        assert need.checkpoint < size_of(step) < need.checkpoint + 300_000
    assert size_of(folder / "unet") + size_of(folder / "image_vae") + size_of(folder / "mask_vae") < need.models / 2
    assert size_of(folder) < need.total
    assert size_of(folder) > (need.total - SLACK) / 2


def sizes(folder: Path) -> tuple[int, int]:
    """Trained and all parameters of a run's model folder."""
    from safetensors import safe_open

    counts = {}
    for part in ("unet", "mask_vae", "image_vae"):
        with safe_open(folder / part / "model.safetensors", "pt") as file:
            tensors = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        counts[part] = sum(_product(shape) for name, shape in tensors.items() if not name.startswith("time_embedding"))
        counts[part + "-frozen"] = sum(_product(s) for name, s in tensors.items() if name.startswith("time_embedding"))
    return counts["unet"] + counts["image_vae"], sum(counts.values())


def _product(shape: list[int]) -> int:
    product = 1
    for side in shape:
        product *= side
    return product


def test_a_short_run_has_few_checkpoints() -> None:
    train_config = TrainConfig(steps=100, save_every=50, keep=3, keep_best=1, ema=0)
    need = disk_need(1000, 1500, train_config)
    assert (need.checkpoint, need.checkpoints, need.frozen) == (12_000, 2, 2000)
    assert disk_need(1000, 1500, replace(train_config, steps=10**6)).checkpoints == 5
    assert disk_need(1000, 1500, train_config, step=100).checkpoints == 1
    assert "2 checkpoints of 0.0 MiB" in describe_disk(need)
    assert "model folder" not in describe_disk(need)  # by which the end of a run is known


def test_frozen_weights_are_stored_once(settings: Settings, autoencoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a resume."""
    monkeypatch.setattr(checkpoints, "WORTH_SHARING", 0)
    options = [f"model.mask_vae={autoencoder}", "train.save_every=1", "train.validate_every=100", "data.val_limit=1"]
    folder = train("diffusion", settings("run", *options, "train.steps=3"))
    train("diffusion", settings("run", *options, "train.steps=5"), resume=True)
    files = [path.stat().st_ino for path in (folder / "checkpoints").glob("step-*/fixed.safetensors")]
    assert len(files) == 5 and len(set(files)) == 1
    assert len(losses(folder)) == 5


def test_what_changes_is_not_shared(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The auto-encoder's deviation of the latents is a buffer that each step moves."""
    monkeypatch.setattr(checkpoints, "WORTH_SHARING", 0)
    folder = train("autoencoder", settings("run", "train.steps=3", "train.save_every=1", "data.val_limit=1"))
    files = [path.stat().st_ino for path in (folder / "checkpoints").glob("step-*/fixed.safetensors")]
    assert len(files) == len(set(files)) == 3


def test_a_disk_that_will_not_hold_the_run_is_refused_before_the_first_step(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=SLACK))
    config = settings("run", "train.steps=100", "train.save_every=1")
    wanted = r"output_dir=.*run: disk: .*11 checkpoints of .*, but 16\.0 MiB are free there; lower train\.keep"
    with pytest.raises(CheckpointError, match=wanted) as caught:
        train("autoencoder", config)
    assert "\n" not in str(caught.value) and not (Path(config.output_dir) / "logs").exists()
