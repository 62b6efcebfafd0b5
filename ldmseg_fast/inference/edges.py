"""Makes edges of segments follow edges of the picture, by the guided filter over the probabilities of slots.

Within a window a probability is an affine function of the picture's colours (He, Sun and Tang, "Guided Image
Filtering", TPAMI 2013, equations 14 to 16): where these jump, so may it, and elsewhere it is smooth. The functions are
found on the slots' grid, and applied to a picture twice as fine (He and Sun, "Fast Guided Filter", arXiv 1505.00996).
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_RADIUS = 16
EPSILON = 1e-4  # variance of colours, from 0 to 1, below which a window counts as flat
FINER = 2  # cells of the result on one of the grid's
SEEN = 0.1  # where a slot is less likely than this, before and after, it stays as it is


def follow_edges(slots: Tensor, pictures: Tensor, radius: int) -> Tensor:
    """Sharpens slot logits where the picture has edges.

    Args:
        slots: float32 [B, Q, h, w].
        pictures: uint8 [B, 3, P, P], of any size P.
        radius: of a window, in cells of the slots' grid, from 1 to MAX_RADIUS; a window is 2 radius + 1 cells wide.

    Returns:
        Float32 [B, Q, 2 h, 2 w]: the logits, changed by as much as the filter changes the logarithm of a probability,
        where those below SEEN count as SEEN. So a logit changes by at most log(1 / SEEN), and only near an edge.
    """
    size = [FINER * side for side in slots.shape[-2:]]
    finer = F.interpolate(slots, size, mode="bilinear", align_corners=False)
    for image, (coarse, picture) in enumerate(zip(slots, pictures.float() / 255)):
        probabilities = coarse.softmax(0)
        seen = probabilities.amax((1, 2)) > SEEN
        if not seen.any():
            continue
        colours, guide = (
            F.interpolate(picture[None], list(shape), mode="bilinear", antialias=True, align_corners=False)[0]
            for shape in (coarse.shape[-2:], size)
        )
        filtered = guided(probabilities[seen], colours, guide, radius)
        change = filtered.clamp(min=SEEN).log() - finer[image].log_softmax(0)[seen].clamp(min=math.log(SEEN))
        finer[image, seen] += change
    return finer


def guided(values: Tensor, colours: Tensor, guide: Tensor, radius: int) -> Tensor:
    """Filters values, float32 [N, h, w], that share the picture [3, h, w]; `guide` [3, H, W] is the picture finer.

    Returns:
        float32 [N, H, W], which may leave the range of `values` a little.
    """
    averaged = partial(_averaged, radius=radius)
    exact = colours.double()  # grey windows have a covariance of rank 1, of which float32 would leave noise
    mean = averaged(exact)
    covariance = averaged((exact[:, None] * exact).flatten(0, 1)).unflatten(0, (3, 3)) - mean[:, None] * mean
    inverse = _inverse(covariance + EPSILON * torch.eye(3, device=values.device)[:, :, None, None]).float()
    mean, mean_of_values = mean.float(), averaged(values)
    joint = averaged((colours[:, None] * values).flatten(0, 1)).unflatten(0, (3, -1)) - mean[:, None] * mean_of_values
    slopes = torch.stack([(row[:, None] * joint).sum(0) for row in inverse])  # [3, N, h, w]
    offsets = mean_of_values - (slopes * mean[:, None]).sum(0)  # [N, h, w]
    fitted = averaged(torch.cat([slopes.flatten(0, 1), offsets]))  # of all windows that hold a cell
    fitted = F.interpolate(fitted[None], list(guide.shape[-2:]), mode="bilinear", align_corners=False)[0]
    return (fitted[: -len(values)].unflatten(0, (3, -1)) * guide[:, None]).sum(0) + fitted[-len(values) :]


def _averaged(maps: Tensor, radius: int) -> Tensor:
    """Averages maps, float [n, h, w], over the window of each cell, cut off at the border."""
    for kernel, padding in (((2 * radius + 1, 1), (radius, 0)), ((1, 2 * radius + 1), (0, radius))):
        maps = F.avg_pool2d(maps[None], kernel, stride=1, padding=padding, count_include_pad=False)[0]
    return maps


def _inverse(matrices: Tensor) -> Tensor:
    """Inverts symmetric matrices, float64 [3, 3, h, w], of full rank."""
    one, two, three = matrices
    pairs = ((two, three), (three, one), (one, two))
    rows = torch.stack([torch.linalg.cross(*pair, dim=0) for pair in pairs])
    return rows / (one * rows[0]).sum(0)
