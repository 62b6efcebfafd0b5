"""Runs Triton on CUDA and the reference elsewhere; no step waits for the device.

The losses are those of PointRend's point sampling, arXiv 1912.08193; Dice: Milletari et al., arXiv 1606.04797.
"""

import torch
from torch import Tensor

from ldmseg_fast.kernels.backend import runs_reference
from ldmseg_fast.kernels.point_loss import reference
from ldmseg_fast.kernels.point_loss.checks import check_bce_dice, check_ce, check_points, check_rows
from ldmseg_fast.kernels.point_loss.custom_ops import (
    point_logits_op,
    point_margin_op,
    sample_bce_dice_op,
    sample_ce_op,
    slot_logits_op,
)


def point_logits(mask_logits: Tensor, points: Tensor) -> Tensor:
    """Samples the logits of all slots at points: bilinear, align_corners false, zero outside (arXiv 1912.08193).

    Args:
        mask_logits: [B, Q, h, w] float, either memory format.
        points: float32 [B, P, 2], (x, y) in [0, 1].

    Returns:
        float32 [B, Q, P] (float64 for float64 logits).

    Raises:
        ValueError: wrong shape, dtype or device.
    """
    if _runs_reference(mask_logits) or _needs_grad(mask_logits):
        check_points(mask_logits, points)
        return reference.point_logits(mask_logits, points)
    return point_logits_op(mask_logits, points)


def point_margin(mask_logits: Tensor, points: Tensor) -> Tensor:
    """Computes best minus second best logit at points: minus the uncertainty by which CE points are chosen.

    Args:
        mask_logits: [B, Q, h, w] float, either memory format, at least two slots.
        points: float32 [B, P, 2], (x, y) in [0, 1].

    Returns:
        float32 [B, P] (float64 for float64 logits), not differentiable.

    Raises:
        ValueError: wrong shape, dtype or device.
    """
    mask_logits = mask_logits.detach()
    if _runs_reference(mask_logits):
        check_points(mask_logits, points, least_slots=2)
        return reference.point_margin(mask_logits, points)
    return point_margin_op(mask_logits, points)


def slot_logits(mask_logits: Tensor, image_index: Tensor, slots: Tensor, points: Tensor) -> Tensor:
    """Samples the logit of one slot per row at the row's own points.

    Minus its absolute value is the uncertainty by which points of BCE and Dice are chosen (arXiv 1912.08193).

    Args:
        mask_logits: [B, Q, h, w] float, either memory format.
        image_index, slots: int64 [M].
        points: float32 [M, P, 2], (x, y) in [0, 1].

    Returns:
        float32 [M, P] (float64 for float64 logits).

    Raises:
        ValueError: wrong shape, dtype or device.
    """
    if _runs_reference(mask_logits) or _needs_grad(mask_logits):
        check_rows(mask_logits, image_index, slots, points)
        return reference.slot_logits(mask_logits, image_index, slots, points)
    return slot_logits_op(mask_logits, image_index, slots, points)


def sample_ce(
    mask_logits: Tensor, segment_ids: Tensor, points: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Computes cross entropy over slots at points, void ignored (slot = id, so there is no matching).

    Args:
        mask_logits: [B, Q, h, w] float, either memory format.
        segment_ids: [B, H, W] integer; 0 and what is no slot (Q or more, negative) is void. H, W need not be h, w.
        points: float32 [B, P, 2], (x, y) in [0, 1]. The target is the id of the pixel that holds the point.
        weights: float32 [Q], by which the loss of a point with this target is multiplied; None: 1 for all.

    Returns:
        the loss summed over points, differentiable in `mask_logits`, and the number of points that were not void;
        both float32 scalars, so that sums over ranks can be formed before dividing.

    Raises:
        ValueError: wrong shape, dtype or device.
    """
    if _runs_reference(mask_logits):
        check_ce(mask_logits, segment_ids, points, weights)
        return reference.sample_ce(mask_logits, segment_ids, points, weights)
    loss, count, _ = sample_ce_op(mask_logits, segment_ids, points, weights)
    return loss, count


def sample_bce_dice(
    mask_logits: Tensor, segment_ids: Tensor, image_index: Tensor, slots: Tensor, points: Tensor
) -> tuple[Tensor, Tensor]:
    """Computes binary cross entropy and Dice (+1 smoothing) of present segments, each on its own slot's plane.

    Args:
        mask_logits: [B, Q, h, w] float, either memory format.
        segment_ids: [B, H, W] integer; 0 is void.
        image_index, slots: int64 [M], which segment each row is. Rows whose slot is 0 or none of the Q, and on CUDA
            those whose image is none of the B, add nothing, so that a list of fixed length needs no count on the host.
        points: float32 [M, P, 2], (x, y) in [0, 1]. The binary mask `segment_ids == slot` is sampled bilinearly.

    Returns:
        sum over rows of the mean BCE and sum over rows of the Dice loss; float32 scalars, differentiable in
        `mask_logits`.

    Raises:
        ValueError: wrong shape, dtype or device.
    """
    if _runs_reference(mask_logits):
        check_bce_dice(mask_logits, segment_ids, image_index, slots, points)
        return reference.sample_bce_dice(mask_logits, segment_ids, image_index, slots, points)
    bce, dice, _ = sample_bce_dice_op(mask_logits, segment_ids, image_index, slots, points)
    return bce, dice


def _runs_reference(mask_logits: Tensor) -> bool:
    return runs_reference("point_loss", mask_logits) or mask_logits.dtype == torch.float64


def _needs_grad(mask_logits: Tensor) -> bool:
    return mask_logits.requires_grad and torch.is_grad_enabled()
