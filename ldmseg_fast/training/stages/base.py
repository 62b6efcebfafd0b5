"""The face that the training loop sees."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldmseg_fast.config import Config
from ldmseg_fast.config.precision import DTYPES, resolve_precision
from ldmseg_fast.diffusion.sampler import seed_of
from ldmseg_fast.errors import ConfigError
from ldmseg_fast.panoptic.postprocess import PanopticResult
from ldmseg_fast.training.losses import Segments, share_num_labelled, share_num_masks

T = TypeVar("T")


class Stage(nn.Module, abc.ABC):
    """One stage of training. Its `forward` is the loss, so that DeepSpeed can wrap it.

    A batch holds image uint8 [B, 3, S, S], segment_ids uint8 [B, S, S] numbered 1..n, table [B, 256] from those numbers
    to slots, and a list of B: image_id. In training also sample, a list of numbers that no other draw of the run has,
    and what `segments_of` takes.
    """

    mask_vae: Any  # a MaskVAE, trained or frozen

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    @abc.abstractmethod
    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """Scalars; "loss" is what is minimised. Random numbers depend on (seed, step, image ids) alone."""

    def prepare(self, batches: Sequence[dict[str, Any]]) -> None:
        """Called with all micro-batches of a step before the first is used: what their losses need to know of each
        other goes into them."""

    @abc.abstractmethod
    def predict(self, batch: dict[str, Any], target_sizes: Sequence[tuple[int, int]]) -> list[PanopticResult]:
        """Panoptic maps of a validation batch, at `target_sizes`."""

    @abc.abstractmethod
    def save(self, folder: Path) -> None:
        """Components and index into the model folder."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the networks compute in: `train.precision` on this stage's device."""
        precision, _ = resolve_precision(self.config.train.precision, next(self.parameters()).device)
        return DTYPES[precision]

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        dtype = self.compute_dtype
        device = next(self.parameters()).device.type
        # under ZeRO 3 a cached copy of a weight, made by the pass for self-conditioning, would outlive the weight
        cached = self.config.train.zero_stage < 3
        with torch.autocast(device, dtype=dtype, enabled=dtype is not torch.float32, cache_enabled=cached):
            yield

    def recompute(self, function: Callable[..., T], *inputs: Any) -> T:
        """`function(*inputs)`, whose inner activations are computed again in the backward pass where
        `train.checkpointing` is "all" (Chen et al. 2016)."""
        if self.config.train.checkpointing == "all" and self.training and torch.is_grad_enabled():
            return checkpoint(function, *inputs, use_reentrant=False)
        return function(*inputs)

    def generator(self, step: int, batch: dict[str, Any], purpose: str, device: str | None = None) -> torch.Generator:
        """Random numbers of this step and these images, the same after a resume; default on the batch's device."""
        seed = seed_of(self.config.train.seed, purpose, step, *_draws(step, batch))
        return torch.Generator(device or batch["segment_ids"].device).manual_seed(seed)

    def chance(self, step: int, purpose: str) -> float:
        """A number in [0, 1) that all ranks and micro-batches of a step share."""
        return seed_of(self.config.train.seed, purpose, step) / 2.0**63

    def generators(self, step: int, batch: dict[str, Any], purpose: str) -> list[torch.Generator]:
        """One per image: its random numbers are the same in any micro-batch, on any rank, at any accumulation."""
        device = batch["segment_ids"].device
        seeds = [seed_of(self.config.train.seed, purpose, draw) for draw in _draws(step, batch)]
        return [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def share_counts(self, batches: Sequence[dict[str, Any]]) -> None:
        """For `prepare`: what `mask_losses` with generators for "points" divides by, over the whole step."""
        share_num_masks(batches, batches[0]["segment_ids"].device)
        share_num_labelled(batches, self.config.loss, lambda batch: self.generators(0, batch, "points"))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """AdamW's groups by weight decay (`train.no_decay`) and learning-rate factor (`train.lr_factors`).

        Raises:
            ConfigError: a factor that is no number, or for a prefix that no trained parameter has.
        """
        train = self.config.train
        factors = {"image_vae.": train.image_encoder_lr} if train.image_encoder_lr != 1.0 else {}
        factors |= _parse_factors(train.lr_factors)
        kinds = parameter_kinds(self)
        unused = set(factors) - {"image_vae."}
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            matching = [prefix for prefix in factors if name.startswith(prefix)]
            unused -= set(matching)
            factor = factors[max(matching, key=len)] if matching else 1.0
            decay = 0.0 if kinds[name] in train.no_decay else train.weight_decay
            groups.setdefault((decay, factor), []).append(parameter)
        if unused:
            raise ConfigError(f"train.lr_factors: no trained parameter's name starts with {', '.join(sorted(unused))}")
        return [
            {"params": parameters, "weight_decay": decay, "lr_factor": factor}
            for (decay, factor), parameters in groups.items()
        ]


def _draws(step: int, batch: dict[str, Any]) -> list[str]:
    """What tells each image's draw from all others of the run."""
    if "sample" in batch:
        return [str(sample) for sample in batch["sample"]]
    return [f"{step}/{image_id}" for image_id in batch["image_id"]]


def _parse_factors(items: Sequence[str]) -> dict[str, float]:
    factors = {}
    for item in items:
        prefix, _, value = item.partition(":")
        try:
            factors[prefix] = float(value)
        except ValueError:
            raise ConfigError(f"train.lr_factors: {item!r} is not PREFIX:NUMBER, such as unet.conv_in:10") from None
    return factors


def per_image(draw: Callable[..., Tensor], shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """`draw(shape)` for each image from its own generator, stacked: [B, *shape] on the generators' device."""
    return torch.stack([draw(*shape, generator=generator, device=generator.device) for generator in generators])


def kept_blocks(dropped: Tensor, size: Sequence[int], block: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Kept pixels, bool [B, H, W]: each block of block x block is dropped with its image's probability, [B, 1, 1]."""
    height, width = size
    keep = per_image(torch.rand, (-(-height // block), -(-width // block)), generators) >= dropped
    return keep.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :height, :width]


def parameter_kinds(module: nn.Module) -> dict[str, str]:
    """ "norm", "bias", "embedding" or "weight" for each parameter's name."""
    kinds = {}
    for path, owner in module.named_modules():
        for name, _ in owner.named_parameters(recurse=False):
            if "Norm" in type(owner).__name__:
                kind = "norm"
            elif isinstance(owner, nn.Embedding):
                kind = "embedding"
            else:
                kind = "bias" if name == "bias" else "weight"
            kinds[f"{path}.{name}".lstrip(".")] = kind
    return kinds


def segments_of(batch: dict[str, Any]) -> Segments | None:
    """The segments of a training batch, which the loader has listed so that nobody waits for the device to do so."""
    if "segments" not in batch:
        return None
    image, number = batch["segments"].unbind(1)  # [M] each
    return Segments(image, batch["table"][image, number].long(), batch["segment_counts"])


def remap(segment_ids: Tensor, table: Tensor) -> Tensor:
    """Slots of dense ids: segment_ids [B, H, W] through table [B, T], int64 [B, H, W]."""
    return table.long().gather(1, segment_ids.flatten(1).long()).view(segment_ids.shape)
