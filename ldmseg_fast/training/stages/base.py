"""Defines a stage as the training loop sees it, and the random draws that stages share."""

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
from ldmseg_fast.config.categories import CategoryTable
from ldmseg_fast.config.precision import DTYPES, resolve_precision
from ldmseg_fast.diffusion.sampler import seed_of
from ldmseg_fast.errors import ConfigError
from ldmseg_fast.kernels.mask_bits import encode_mask_bits
from ldmseg_fast.panoptic.postprocess import PanopticResult, postprocess
from ldmseg_fast.training.losses import (
    MaskLosses,
    Segments,
    labelled_points,
    mask_losses,
    share_num_labelled,
    share_num_masks,
)
from ldmseg_fast.training.rates import factor_of, rate_factors

T = TypeVar("T")


class Stage(nn.Module, abc.ABC):
    """Holds the networks of one stage of training. Its `forward` is the loss, so that DeepSpeed can wrap it.

    A batch holds image uint8 [B, 3, P, P], P being S times `image_encoder.picture_scale`, segment_ids uint8 [B, S, S]
    numbered 1..n with 0 for void, table [B, 256] from those numbers to slots, and a list of B: image_id; of models with
    categories also category_ids, uint8 or int16 [B, S, S]. In training also sample, a list of B numbers that no other
    draw of the run has, and what `segments_of` takes.
    """

    mask_vae: Any  # a MaskVAE, trained or frozen
    categories: CategoryTable | None = None  # of models with categories
    category_weights: Tensor | None = None  # float32 [C + 1], of `loss.category_balance`

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def started(cls, config: Config) -> Config:
        """Puts into `config` what the run's start fixes; no weights are read.

        Raises:
            ConfigError, CheckpointError: settings that the stage, or what it starts from, contradicts.
        """
        return config

    @abc.abstractmethod
    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """Computes float32 scalars by name; "loss" is what is minimised.

        Random numbers depend on the seed, `step` (0-based) and the images alone.
        """

    def prepare(self, batches: Sequence[dict[str, Any]]) -> None:
        """Puts into the micro-batches of a step what their losses need to know of each other.

        The loop calls it with all of them before the first is used.
        """

    @abc.abstractmethod
    def predict(self, batch: dict[str, Any], target_sizes: Sequence[tuple[int, int]]) -> list[PanopticResult]:
        """Predicts panoptic maps of a validation batch, one each of `target_sizes`, (height, width) in pixels."""

    @torch.no_grad()
    def held_out_loss(self, batch: dict[str, Any]) -> Tensor:
        """Computes the loss of a validation batch, a float32 scalar, under the noise that its images always get.

        So losses of two validations differ by the weights alone, whatever the number of ranks.
        """
        labelled = labelled_points(batch["segment_ids"], self.config.loss, self.generators(0, batch, "points"))
        counts = {"num_masks": batch["num_segments"].sum().float(), "num_labelled": labelled}
        return self.forward(batch | counts, 0)["loss"]

    @abc.abstractmethod
    def save(self, folder: Path) -> None:
        """Writes components, index and model card into a model folder."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the networks compute in: `train.precision` on this stage's device."""
        precision, _ = resolve_precision(self.config.train.precision, next(self.parameters()).device)
        return DTYPES[precision]

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Runs what is inside in `train.precision` (Micikevicius et al. 2018)."""
        dtype = self.compute_dtype
        device = next(self.parameters()).device.type
        # under ZeRO 3 a cached copy of a weight, made by the pass for self-conditioning, would outlive the weight
        cached = self.config.train.zero_stage < 3
        with torch.autocast(device, dtype=dtype, enabled=dtype is not torch.float32, cache_enabled=cached):
            yield

    def recompute(self, function: Callable[..., T], *inputs: Any) -> T:
        """Calls `function(*inputs)`.

        Where `train.checkpointing` is "all", its inner activations are not kept but computed again in the backward pass
        (Chen et al. 2016).
        """
        if self.config.train.checkpointing == "all" and self.training and torch.is_grad_enabled():
            return checkpoint(function, *inputs, use_reentrant=False)
        return function(*inputs)

    def generator(self, step: int, batch: dict[str, Any], purpose: str, device: str | None = None) -> torch.Generator:
        """Makes a generator for this step, these images and `purpose`, the same after a resume.

        It lies on the batch's device unless `device` names another.
        """
        seed = seed_of(self.config.train.seed, purpose, step, *_draws(step, batch))
        return torch.Generator(device or batch["segment_ids"].device).manual_seed(seed)

    def chance(self, step: int, purpose: str) -> float:
        """Draws a number in [0, 1) that all ranks and micro-batches of a step share."""
        return seed_of(self.config.train.seed, purpose, step) / 2.0**63

    def generators(self, step: int, batch: dict[str, Any], purpose: str) -> list[torch.Generator]:
        """Makes a generator for each of the B images, on the batch's device.

        An image's random numbers are the same in any micro-batch, on any rank, at any accumulation.
        """
        device = batch["segment_ids"].device
        seeds = [seed_of(self.config.train.seed, purpose, draw) for draw in _draws(step, batch)]
        return [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def share_counts(self, batches: Sequence[dict[str, Any]]) -> None:
        """Puts into the micro-batches what `slot_losses` divides by, over the whole step; for `prepare`."""
        share_num_masks(batches, batches[0]["segment_ids"].device)
        share_num_labelled(batches, self.config.loss, lambda batch: self.generators(0, batch, "points"))

    def mask_bits(
        self, batch: dict[str, Any], segment_ids: Tensor, table: Tensor, channels_last: bool = False
    ) -> Tensor:
        """Encodes a batch's maps as planes float [B, K, H, W]: of slots, and of the categories that the batch has.

        The ids are not checked on a GPU: those of the loader fit, and looking at them would wait for the device.

        Args:
            batch: as the class has it.
            segment_ids: uint8 [B, H, W], the batch's, or a part of it and void elsewhere.
            table: [B, 256], id -> slot.
            channels_last: memory format of the result.
        """
        config, category_ids = self.mask_vae.config, batch.get("category_ids")
        if config.num_categories and category_ids is not None:
            category_ids = category_ids * (segment_ids > 0)
        return encode_mask_bits(
            segment_ids,
            config.num_bits,
            table,
            channels_last=channels_last,
            check_ids=not segment_ids.is_cuda,
            category_ids=category_ids if config.num_categories else None,
            category_bits=config.category_bits,
        )

    def panoptic(
        self,
        logits: tuple[Tensor, Tensor | None],
        size: tuple[int, int],
        target_sizes: Sequence[tuple[int, int]],
    ) -> list[PanopticResult]:
        """Makes maps of `target_sizes` of what the decoder gives for pictures of `size`, (height, width) each.

        logits: of slots, float [B, Q, h, w], and of categories where the model has any.
        """
        slots, categories = (None if part is None else part.float() for part in logits)
        assert slots is not None
        return postprocess(slots, size, list(target_sizes), self.config.postprocess, categories, self.categories)

    def slot_losses(
        self, mask_logits: Tensor, batch: dict[str, Any], step: int, category_logits: Tensor | None = None
    ) -> MaskLosses:
        """Scores logits of slots, float [B, Q, h, w], and of categories against the batch's maps; see `mask_losses`."""
        return mask_losses(
            mask_logits,
            remap(batch["segment_ids"], batch["table"]),
            self.config.loss,
            self.generators(step, batch, "points"),
            segments_of(batch),
            batch.get("num_masks"),
            batch.get("num_labelled"),
            category_logits,
            batch.get("category_ids"),
            self.category_weights,
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Sorts trained parameters into AdamW's groups, by `train.no_decay` and `train.lr_factors`.

        A factor of 0 freezes what it is for.

        Raises:
            ConfigError: a factor that is no number, or for a prefix that no trained parameter has; nothing is trained.
        """
        train, factors = self.config.train, rate_factors(self.config)
        kinds = parameter_kinds(self)
        trained = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        given = {item.partition(":")[0] for item in train.lr_factors}
        if unused := sorted(prefix for prefix in given if not any(name.startswith(prefix) for name in trained)):
            raise ConfigError(f"train.lr_factors: no trained parameter's name starts with {', '.join(unused)}")
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in trained.items():
            factor = factor_of(name, factors)
            if factor == 0:
                parameter.requires_grad_(False)
                continue
            decay = 0.0 if kinds[name] in train.no_decay else train.weight_decay
            groups.setdefault((decay, factor), []).append(parameter)
        if not groups:
            raise ConfigError(
                "nothing is trained: model.freeze, train.lr_factors and train.image_encoder_lr stop every parameter; "
                "leave one of them out"
            )
        return [
            {"params": parameters, "weight_decay": decay, "lr_factor": factor}
            for (decay, factor), parameters in groups.items()
        ]


def _draws(step: int, batch: dict[str, Any]) -> list[str]:
    """What tells each image's draw from all others of the run."""
    if "sample" in batch:
        return [str(sample) for sample in batch["sample"]]
    return [f"{step}/{image_id}" for image_id in batch["image_id"]]


def per_image(draw: Callable[..., Tensor], shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Draws `draw(*shape)` for each image from its own generator: [B, *shape], in the dtype that `draw` gives."""
    return torch.stack([draw(*shape, generator=generator, device=generator.device) for generator in generators])


def random_integers(high: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Draws an integer from 0 to `high` - 1 for each image from its own generator: int64 [B]."""
    return torch.cat([torch.randint(0, high, (1,), generator=own, device=own.device) for own in generators])


def kept_blocks(dropped: Tensor, size: Sequence[int], block: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Draws which pixels are kept, bool [B, H, W].

    Args:
        dropped: float [B, 1, 1], the probability of an image's blocks to be dropped.
        size: H and W.
        block: side of the blocks in pixels.
        generators: one for each image.
    """
    height, width = size
    keep = per_image(torch.rand, (-(-height // block), -(-width // block)), generators) >= dropped
    return keep.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :height, :width]


def parameter_kinds(module: nn.Module) -> dict[str, str]:
    """Tells the kind of each parameter by its name: "norm", "bias", "embedding" or "weight"."""
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
    """Gives the segments of a training batch, or None where the loader has not listed them.

    It lists them (segments, int64 [M, 2]: image and number; segment_counts, a list of B) so that nothing waits for the
    device to do so.
    """
    if "segments" not in batch:
        return None
    image, number = batch["segments"].unbind(1)  # [M] each
    return Segments(image, batch["table"][image, number].long(), batch["segment_counts"])


def remap(segment_ids: Tensor, table: Tensor) -> Tensor:
    """Looks up the slots of dense ids: integer [B, H, W] through a table [B, T], as int64 [B, H, W]."""
    return table.long().gather(1, segment_ids.flatten(1).long()).view(segment_ids.shape)
