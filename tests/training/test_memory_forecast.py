"""The memory that a run is forecast to need is what its ranks need, within a tenth."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch

from ldmseg_fast.config import load_config
from ldmseg_fast.training.estimate import (
    LOADER,
    LOADER_SERVER,
    PROGRAM,
    count_parameters,
    passing_memory,
    peak_memory_forecast,
    report,
    state_memory,
)
from tests.training.helpers import Job, deepspeed, losses, train_command

GIB = 2**30
# 158 million parameters on pictures of 64x64, so that steps are quick and activations few
WIDE = [
    *("unet.block_out_channels=208,416,624", "unet.layers_per_block=2", "unet.num_heads=4,8,8", "unet.norm_groups=16"),
    *("train.batch_size=4", "train.precision=fp32", "data.cache=false"),
]
ENDLESS = ["train.steps=100000", "train.save_every=100000", "train.validate_every=100000", "train.log_every=1"]


def peak_of(process: int) -> int:
    """The most memory that a process has held, in bytes."""
    status = Path(f"/proc/{process}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) << 10


CASES = [*product((1, 2), range(4), (0, 2), ("adamw",)), (1, 0, 0, "adamw_8bit")]


@pytest.mark.soak
@pytest.mark.parametrize(
    ("ranks", "zero_stage", "workers", "optimizer"),
    CASES,
    ids=["-".join(map(str, case)).removesuffix("-adamw") for case in CASES],
)
def test_the_forecast_is_within_a_tenth(
    ranks: int,
    zero_stage: int,
    workers: int,
    optimizer: str,
    scenes: Path,
    tmp_path: Path,
    start: Callable[..., Job],
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    own = [f"train.zero_stage={zero_stage}", f"data.num_workers={workers}", f"train.optimizer={optimizer}"]
    measured, forecast = measure_and_forecast("tiny", ranks, [*WIDE, *own], scenes, tmp_path, start, monkeypatch)
    record_property("measured_gib", round(measured, 3))
    record_property("forecast_gib", round(forecast, 3))
    assert forecast == pytest.approx(measured, rel=0.1)


@pytest.mark.soak
def test_the_forecast_at_full_size(
    scenes: Path,
    tmp_path: Path,
    start: Callable[..., Job],
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    """815.6 million parameters on pictures of 512x512, one rank, ZeRO 0: the first three steps from random weights.

    The image encoder is a small one, as Stable Diffusion's would have to be fetched.
    """
    if (free := free_memory()) < 18 * GIB:
        pytest.skip(f"needs 18 GiB of free memory; {free / GIB:.1f} GiB are free")
    settings = ["train.precision=fp32", "train.batch_size=1", "train.accumulation=1", "data.num_workers=0"]
    settings += ["train.zero_stage=0", "image_encoder.kind=conv", "image_encoder.downsampling=8"]
    settings += ["image_encoder.widths=32,64,96,96", "image_encoder.blocks=0,1,1,1", "image_encoder.norm_groups=8"]
    measured, forecast = measure_and_forecast("coco", 1, settings, scenes, tmp_path, start, monkeypatch)
    record_property("measured_gib", round(measured, 3))
    record_property("forecast_gib", round(forecast, 3))
    for line in map(json.loads, (tmp_path / "run" / "logs" / "log.jsonl").read_text().splitlines()[:3]):
        for name in ("loss", "grad_norm", "seconds"):
            record_property(f"{name}, step {line['step']}", round(line[name], 4))
    assert forecast == pytest.approx(measured, rel=0.1)


def free_memory() -> int:
    """Bytes that programs can still get; 0 where the system does not tell."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) << 10 if found else 0


def measure_and_forecast(
    preset: str,
    ranks: int,
    own: list[str],
    scenes: Path,
    folder: Path,
    start: Callable[..., Job],
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[float, float]:
    """The most that a rank held of three steps, and what was forecast, in GiB."""
    from ldmseg_fast.training.loop import train

    vae = train("autoencoder", load_config(preset, [f"data.root={scenes}", f"output_dir={folder / 'vae'}", *SHORT]))
    settings, run = [*ENDLESS, *own], folder / "run"
    command = train_command("diffusion", run, scenes, "--config", preset, f"model.mask_vae={vae}", *settings)
    job = start(deepspeed(ranks, *command))
    job.wait_for(lambda: (run / "logs" / "log.jsonl").is_file() and len(losses(run)) >= 3, 900)
    measured = max(map(peak_of, job.ranks()))
    for name, value in {"RANK": "0", "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    forecast, _ = peak_memory_forecast("diffusion", load_config(preset, settings), ranks)
    return measured / GIB, forecast / GIB


SHORT = ["train.steps=1", "train.batch_size=2", "data.val_limit=1", "train.precision=fp32"]


def test_the_forecast_is_the_count_of_bytes() -> None:
    """One process: weights, gradients, two moments and averages; loader processes beside them."""
    config = load_config("tiny", [*WIDE, "data.num_workers=2", "train.batch_size=1"])
    counts = count_parameters("diffusion", config)
    assert 158e6 < counts.trainable < 159e6
    rank, loaders = peak_memory_forecast("diffusion", config, 1)
    assert 20 * counts.trainable < rank - PROGRAM < 20 * counts.trainable + 0.1 * GIB
    assert loaders == LOADER_SERVER + 2 * LOADER
    several = [
        peak_memory_forecast("diffusion", load_config("tiny", [*WIDE, f"train.zero_stage={stage}"]), 2)[0]
        for stage in range(4)
    ]
    assert several[0] > several[1] > several[2] and several[0] > rank


def test_a_dry_run_prints_what_a_rank_needs_at_full_size() -> None:
    """With DeepSpeed's copies at each stage, and the most main memory where there is no GPU."""
    config = load_config("coco", ["train.precision=fp32", "train.batch_size=2"])
    counts = count_parameters("diffusion", config)
    lines = "\n".join(report("diffusion", config, 2))
    table = [float(value) for value in re.findall(r"ZeRO \d: +([\d.]+)", lines)]
    for zero_stage, printed in enumerate(table):
        state = state_memory(counts, config, 2, zero_stage).device
        passing = passing_memory(counts.trainable, 2, zero_stage)
        assert passing > 0 or zero_stage == 2
        assert printed == pytest.approx((state + passing) / GIB, abs=0.01)
    most = re.search(r"forecast of the most main memory, GiB: ([\d.]+) for each of 2 ranks", lines)
    if not torch.cuda.is_available():
        assert most is not None and float(most[1]) > 12
