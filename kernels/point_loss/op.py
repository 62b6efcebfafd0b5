"""Runs Triton on CUDA and the reference elsewhere; no step waits for the device.

The losses are those of PointRend's point sampling, arXiv 1912.08193; Dice: Milletari et al., arXiv 1606.04797.
"""

import torch
from torch import Tensor

from ldmseg_fast.kernels.backend import runs_reference
from ldmseg_fast.kernels.point_loss import reference
from ldmseg_fast.kernels.point_loss.checks import check_ce, check_indices, check_losses, check_points, check_rows
from ldmseg_fast.kernels.point_loss.custom_ops import (
    point_logits_op,
    point_margin_op,
    sample_ce_op,
    sample_losses_op,
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
        ValueError: wrong shape, dtype or device; on a CPU also an image or a slot that is not there.
    """
    if _runs_reference(mask_logits) or _needs_grad(mask_logits):
        check_rows(mask_logits, image_index, slots, points)
        check_indices(mask_logits, image_index, slots)
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


def sample_losses(
    mask_logits: Tensor,
    segment_ids: Tensor,
    points: Tensor,
    image_index: Tensor,
    slots: Tensor,
    row_points: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes `sample_ce` of all slots, and BCE and Dice (+1 smoothing) of present segments, each on its own plane.

    On CUDA their gradients are added up in one float32 tensor.

    Args:
        mask_logits: [B, Q, h, w] float, either memory format.
        segment_ids: [B, H, W] integer; 0 is void.
        points: float32 [B, P, 2], (x, y) in [0, 1], of the cross entropy.
        image_index, slots: int64 [M], which segment each row is. Rows whose slot is 0 or none of the Q, and on CUDA
            those whose image is none of the B, add nothing, so that a list of fixed length needs no count on the host.
        row_points: float32 [M, P', 2], (x, y) in [0, 1]. The binary mask `segment_ids == slot` is sampled bilinearly.

    Returns:
        the cross entropy summed over points, and the number of points that were not void, as `sample_ce`; sum over
        rows of the mean BCE and sum over rows of the Dice loss. All are float32 scalars, the losses differentiable in
        `mask_logits`.

    Raises:
        ValueError: wrong shape, dtype or device; on a CPU also an image or a slot that is not there.
    """
    args = (mask_logits, segment_ids, points, image_index, slots, row_points)
    if _runs_reference(mask_logits):
        check_losses(*args)
        check_indices(mask_logits, image_index, slots)
        return reference.sample_losses(*args)
    ce, count, bce, dice, _, _ = sample_losses_op(*args)
    return ce, count, bce, dice


def _runs_reference(mask_logits: Tensor) -> bool:
    return runs_reference("point_loss", mask_logits) or mask_logits.dtype == torch.float64


def _needs_grad(mask_logits: Tensor) -> bool:
    return mask_logits.requires_grad and torch.is_grad_enabled()
