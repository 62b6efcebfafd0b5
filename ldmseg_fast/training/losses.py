"""Computes the auto-encoder's loss: cross-entropy, and BCE + Dice per segment, on sampled points.

Models with categories add a cross-entropy over these, at the points of the other.

It is LDMSeg's (arXiv 2401.10227, section 3.1). Points are drawn as in PointRend (Kirillov et al. 2020, section 3.1):
`oversample` times too many at random, of which the most uncertain make `importance` of the result and new random ones
the rest. Slot = id, so nothing is matched.

Cross-entropy ignores void. So the uncertain points are looked for where there is a label, and in void only where labels
do not suffice: no points are spent on pixels that count for nothing, and how many do count is known beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldmseg_fast.config import LossConfig
from ldmseg_fast.distributed import all_reduce_mean
from ldmseg_fast.kernels.point_loss import point_margin, sample_ce, sample_losses, slot_logits

TINY = 1e-6  # a divisor where there is nothing to divide


@dataclass(frozen=True)
class MaskLosses:
    """Holds float32 scalars: `total` is the weighted sum of the others; `category` is None without categories."""

    total: Tensor
    ce: Tensor
    bce: Tensor
    dice: Tensor
    category: Tensor | None = None

    def parts(self) -> dict[str, Tensor]:
        """Lists all but the total by name, as the log has them: float32 scalars."""
        named = {"ce": self.ce, "bce": self.bce, "dice": self.dice, "category": self.category}
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True)
class Segments:
    """Lists the segments of a batch, void left out, image after image.

    Attributes:
        image, slot: int64 [M].
        counts: how many there are in each image.
    """

    image: Tensor
    slot: Tensor
    counts: Sequence[int]


Generators = torch.Generator | Sequence[torch.Generator] | None  # of a batch, or one for each of its images


def _random_points(rows: Sequence[int], count: int, device: torch.device, generator: Generators) -> Tensor:
    """[R, count, 2], x and y in [0, 1]; `rows` of each image."""
    if generator is None or isinstance(generator, torch.Generator):
        return torch.rand(
            sum(rows), count, 2, generator=generator, device=generator.device if generator else device
        ).to(device)
    points = [torch.rand(number, count, 2, generator=one, device=one.device) for number, one in zip(rows, generator)]
    return torch.cat(points).to(device)


def _uncertain_points(
    uncertainty_of: Callable[[Tensor], Tensor],
    rows: Sequence[int],
    config: LossConfig,
    device: torch.device,
    generator: Generators,
) -> Tensor:
    """[R, P, 2] points; `uncertainty_of` maps points [R, P', 2] to [R, P'], larger is less certain."""
    num_important = _num_important(config)
    candidates = _candidates(rows, config, device, generator)
    with torch.no_grad():
        uncertainty = uncertainty_of(candidates)
    chosen = uncertainty.topk(num_important, dim=1, sorted=False).indices  # [R, P_important]
    important = candidates.gather(1, chosen[..., None].expand(-1, -1, 2))
    return torch.cat([important, _random_points(rows, config.num_points - num_important, device, generator)], dim=1)


def _num_important(config: LossConfig) -> int:
    return int(config.importance * config.num_points)


def _candidates(rows: Sequence[int], config: LossConfig, device: torch.device, generator: Generators) -> Tensor:
    return _random_points(rows, int(config.num_points * config.oversample), device, generator)


def labelled_points(segment_ids: Tensor, config: LossConfig, generator: Generators) -> Tensor:
    """Counts how many CE points of `mask_losses` will not be void, whatever the logits: a float32 scalar.

    Args:
        segment_ids: integer [B, H, W], 0 = void.
        config: point counts.
        generator: of the points, in the state in which `mask_losses` will have it.
    """
    device, rows, num_important = segment_ids.device, [1] * len(segment_ids), _num_important(config)
    candidates = _labelled(segment_ids, _candidates(rows, config, device, generator)).sum(1)  # [B]
    points = _random_points(rows, config.num_points - num_important, device, generator)
    return candidates.clamp(max=num_important).sum().float() + _labelled(segment_ids, points).sum()


def _labelled(segment_ids: Tensor, points: Tensor) -> Tensor:
    """Whether the pixels [B, H, W] that hold the points [B, P, 2] are not void, bool [B, P]."""
    height, width = segment_ids.shape[1:]
    x = (points[..., 0] * width).long().clamp(0, width - 1)
    y = (points[..., 1] * height).long().clamp(0, height - 1)
    return segment_ids.flatten(1).gather(1, y * width + x) > 0


def present_segments(segment_ids: Tensor, num_slots: int) -> Segments:
    """Lists the segments of ids integer [B, H, W] by their values; on a GPU this waits for the device."""
    flat = segment_ids.flatten(1).long()
    present = torch.zeros(flat.shape[0], num_slots, dtype=torch.bool, device=flat.device)
    present.scatter_(1, flat, True)
    present[:, 0] = False
    image, slot = present.nonzero(as_tuple=True)
    return Segments(image, slot, present.sum(1).tolist())


def share_num_masks(batches: Sequence[dict[str, Any]], device: torch.device) -> None:
    """Puts `num_masks` into the micro-batches of a step: the mean of their segment counts, over them and all ranks.

    With it as the divisor, the gradients that parts and ranks average are those of the whole batch at once.
    """
    mean = sum(sum(batch["segment_counts"]) for batch in batches) / len(batches)
    num_masks = all_reduce_mean(torch.full((), mean, device=device))  # filled there: a copy would wait for the device
    for batch in batches:
        batch["num_masks"] = num_masks


def share_num_labelled(
    batches: Sequence[dict[str, Any]], config: LossConfig, generators_of: Callable[[dict[str, Any]], Generators]
) -> None:
    """Puts `num_labelled` into the micro-batches of a step, which is to CE what `num_masks` is to BCE and Dice.

    It is the mean of their `labelled_points`, over them and all ranks.

    Args:
        batches: the micro-batches.
        config: point counts.
        generators_of: a batch's generators, as its `mask_losses` will get them.
    """
    counts = [labelled_points(batch["segment_ids"], config, generators_of(batch)) for batch in batches]
    num_labelled = all_reduce_mean(torch.stack(counts).mean())
    for batch in batches:
        batch["num_labelled"] = num_labelled


def mask_losses(
    mask_logits: Tensor,
    segment_ids: Tensor,
    config: LossConfig,
    generator: Generators = None,
    segments: Segments | None = None,
    num_masks: Tensor | None = None,
    num_labelled: Tensor | None = None,
    category_logits: Tensor | None = None,
    category_ids: Tensor | None = None,
    category_weights: Tensor | None = None,
) -> MaskLosses:
    """Scores slot logits against a segment map.

    With a generator for each image its points do not depend on the rest of the batch. Then the losses and their
    gradients, averaged over micro-batches, are the same for any cut of a batch into ranks and micro-batches, where both
    divisors are given; without them for any cut into ranks.

    Args:
        mask_logits: [B, Q, h, w], any float type; may be smaller than the map (points are in [0, 1]).
        segment_ids: integer [B, H, W], 0 = void, below Q.
        config: weights and point counts.
        generator: generator of the points, or one for each image.
        segments: what `present_segments` would find.
        num_masks: divisor of BCE and Dice, from `share_num_masks`; None: the mean of this micro-batch over the ranks.
        num_labelled: divisor of CE, from `share_num_labelled`; None: likewise.
        category_logits: [B, C + 1, h, w], of models with categories.
        category_ids: integer [B, H, W], 0 where `segment_ids` is void and nowhere else, at most C.
        category_weights: float32 [C + 1], by which a point's cross-entropy over categories is multiplied; None: 1.

    Returns:
        CE, of slots and of categories, averaged over points that are not void; BCE and Dice (+1 smoothing) averaged
        over segments; of all ranks.
    """
    device = mask_logits.device
    if device.type != "cuda":
        mask_logits = mask_logits.float()  # kernels take halves as they are, and add up in float32
    segments = segments or present_segments(segment_ids, mask_logits.shape[1])

    def where_labelled(points: Tensor) -> Tensor:
        return torch.where(_labelled(segment_ids, points), -point_margin(mask_logits, points), -torch.inf)

    points = _uncertain_points(where_labelled, [1] * len(mask_logits), config, device, generator)
    image, slot = segments.image, segments.slot
    row_points = _uncertain_points(
        lambda points: -slot_logits(mask_logits, image, slot, points).abs(), segments.counts, config, device, generator
    )
    ce_sum, ce_count, bce_sum, dice_sum = sample_losses(mask_logits, segment_ids, points, image, slot, row_points)
    category_sum = None
    if category_logits is not None and category_ids is not None:
        category_logits = category_logits if device.type == "cuda" else category_logits.float()
        category_sum, _ = sample_ce(category_logits, category_ids, points, category_weights)

    if num_masks is None:
        num_masks = all_reduce_mean(torch.full((), float(len(image)), device=device))
    if num_labelled is None:
        num_labelled = all_reduce_mean(ce_count)
    ce = ce_sum / num_labelled.clamp(min=TINY)
    bce, dice = bce_sum / num_masks.clamp(min=TINY), dice_sum / num_masks.clamp(min=TINY)
    total = config.ce * ce + config.bce * bce + config.dice * dice
    if category_sum is None:
        return MaskLosses(total, ce, bce, dice)
    category = category_sum / num_labelled.clamp(min=TINY)
    return MaskLosses(total + config.category * category, ce, bce, dice, category)
