"""A diffusion model that learns to complete maps: what its condition is, and that the option is off by default."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ldmseg_fast.checkpoints.model_folder import load_index
from ldmseg_fast.config import Config
from ldmseg_fast.distributed.liveness import Interrupt
from ldmseg_fast.errors import ConfigError
from ldmseg_fast.training.loop import Run, train
from tests.training.helpers import losses

Settings = Callable[..., Config]


@pytest.fixture
def run(settings: Settings, autoencoder: Path) -> Any:
    common = [f"model.mask_vae={autoencoder}", "diffusion.inpainting=0.5", "diffusion.inpainting_block=8"]
    run = Run("diffusion", settings("run", *common, "train.batch_size=16"), Interrupt())
    yield run
    run.close()


def known_latents(stage: Any, batch: Any, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    return stage.known_latents(batch, stage.given_pixels(batch, step))


def test_the_condition_holds_known_latents(run: Run) -> None:
    stage: Any = run.stage
    [batch] = next(run.prefetched)
    known, cells = known_latents(stage, batch, 0)
    share = cells.float().mean((1, 2, 3))
    assert (share == 0).any() and (share > 0).any() and (share < 1).all()
    seen: list[torch.Tensor] = []
    stage.unet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    loss = stage(batch, 0)["loss"]
    channels = known.shape[1]
    first, second = (sample[:, -channels:] for sample in seen)
    assert torch.equal(first, torch.where(cells, known, 0.0))  # nothing is known elsewhere
    inside = cells.expand_as(known)
    assert torch.equal(second[inside], known[inside])
    assert (second[~inside] != 0).float().mean() > 0.9  # the first pass's estimate
    assert torch.isfinite(loss)
    again = known_latents(stage, batch, 7)
    assert torch.equal(again[0], known) and torch.equal(again[1], cells)  # drawn by item, not by step


def test_known_latents_are_of_the_dropped_map(run: Run) -> None:
    """An image that shows all of its map has the latents of its map; one that shows nothing is not asked for any."""
    stage: Any = run.stage
    [batch] = next(run.prefetched)
    whole = stage.mask_vae.encode_latents(stage.mask_bits(batch, batch["segment_ids"], batch["table"]))
    known, cells = known_latents(stage, batch, 0)
    inside = cells.expand_as(known)
    error = (known - whole)[inside].abs().mean() / whole.abs().mean()
    assert 0 < error < 1.0  # convolutions see across the borders of blocks


def test_parts_of_a_batch_draw_the_same_blocks(run: Run) -> None:
    stage: Any = run.stage
    [batch] = next(run.prefetched)
    one = {
        key: batch[key][3:4] if not isinstance(batch[key], list) else [batch[key][3]]
        for key in ("segment_ids", "table", "sample")
    }
    assert torch.equal(known_latents(stage, one, 0)[1], known_latents(stage, batch, 0)[1][3:4])


def test_it_trains_and_says_so(settings: Settings, autoencoder: Path) -> None:
    common = [f"model.mask_vae={autoencoder}", "train.steps=4", "data.val_limit=1"]
    plain = train("diffusion", settings("plain", *common))
    filled = train("diffusion", settings("filled", *common, "diffusion.inpainting=0.5"))
    assert load_index(filled)["inpainting"] and not load_index(plain)["inpainting"]
    assert len(losses(filled)) == 4 and losses(filled) != losses(plain)


@pytest.mark.parametrize(
    "overrides",
    [["diffusion.inpainting=1.5"], ["diffusion.inpainting=0.5", "diffusion.self_condition=0", "unet.in_channels=12"]],
)
def test_settings_that_cannot_be(overrides: list[str], settings: Settings) -> None:
    with pytest.raises(ConfigError, match=r"diffusion\.inpainting"):
        settings("run", *overrides)
