"""Averages what several views of one picture say of each pixel.

Averaging probabilities is the usual test-time augmentation (Krizhevsky et al. 2012, section 4.1). Slots of
two views are named at random, so they are matched first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TINY = 1e-30  # the least probability, so that its logarithm is a number


@dataclass(frozen=True)
class ViewLogits:
    """What the decoder makes of one view, turned back to the picture.

    Attributes:
        slots: float [B, Q, h, w].
        categories: float [B, C + 1, h / f, w / f]; None of models without categories.
    """

    slots: Tensor
    categories: Tensor | None


def average(views: Sequence[ViewLogits]) -> tuple[Tensor, Tensor | None, Tensor]:
    """Averages the probabilities of k >= 1 views, on the finest of their grids.

    Slots of the others are matched to those of the first view by their soft Dice coefficients, highest first. Softmax
    says nothing of how high a pixel's logits stand, which the overlap threshold asks; so they keep the mean level.

    Returns:
        Slot logits, float32 [B, Q, h, w]: their softmax is the mean of the views' probabilities, their logarithm of the
        sum of exponentials the mean of the views'; one view keeps its own. Logarithms of the categories' mean
        probabilities, float32 [B, C + 1, h / f, w / f], or None. The share of views whose likeliest slot is the mean's,
        float32 [B, h, w].
    """
    size = max((tuple(view.slots.shape[-2:]) for view in views), key=lambda shape: shape[0])
    first, *others = (_resized(view.slots.float().softmax(1), size) for view in views)
    aligned = [first]
    for other in others:
        order = torch.stack([match(*pair) for pair in zip(first, other)])  # [B, Q]
        aligned.append(other.gather(1, order[:, :, None, None].expand_as(other)))
    mean = torch.stack(aligned).mean(0)
    logits = views[0].slots.float()
    if others:
        levels = [_resized(view.slots.float().logsumexp(1, keepdim=True), size) for view in views]
        logits = mean.clamp(min=TINY).log() + torch.stack(levels).mean(0)
    label = mean.argmax(1)
    agreement = torch.stack([(each.argmax(1) == label).float() for each in aligned]).mean(0)
    named = [view.categories.float().softmax(1) for view in views if view.categories is not None]
    if not named:
        return logits, None, agreement
    size = max((tuple(each.shape[-2:]) for each in named), key=lambda shape: shape[0])
    categories = torch.stack([_resized(each, size) for each in named]).mean(0)
    return logits, categories.clamp(min=TINY).log(), agreement


def match(first: Tensor, other: Tensor) -> Tensor:
    """Names for each slot of one view the slot of another that covers the same pixels.

    Args:
        first, other: probabilities of slots, float32 [Q, h, w]. Slot 0 is void in both.

    Returns:
        int64 [Q], a permutation with 0 in its first place.
    """
    a, b = first.flatten(1), other.flatten(1)
    dice = (2 * (a @ b.T) / (a.sum(1)[:, None] + b.sum(1)[None] + TINY)).cpu()
    dice[0] = dice[:, 0] = -1.0
    dice[0, 0] = 2.0
    order = torch.zeros(len(first), dtype=torch.int64)
    for _ in range(len(first)):
        row, column = divmod(int(dice.argmax()), len(first))
        order[row] = column
        dice[row] = dice[:, column] = -torch.inf
    return order.to(first.device)


def _resized(values: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(values.shape[-2:]) == size:
        return values
    return F.interpolate(values, list(size), mode="bilinear", align_corners=False)
