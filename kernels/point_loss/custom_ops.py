"""Registers the operators of `op.py` with torch: CUDA and reference, shape inference, autograd."""

from typing import Any

import torch
from torch import Tensor

from ldmseg_fast.kernels.backend import at_least_float32
from ldmseg_fast.kernels.point_loss import reference
from ldmseg_fast.kernels.point_loss.checks import check_ce, check_indices, check_losses, check_points, check_rows


@torch.library.custom_op("ldmseg_fast::point_logits", mutates_args=())
def point_logits_op(mask_logits: Tensor, points: Tensor) -> Tensor:
    """Runs `point_logits`, without gradient.

    Args:
        mask_logits: float [B, Q, h, w], either memory format.
        points: float32 [B, P, 2], (x, y) in [0, 1].

    Returns:
        float32 [B, Q, P].

    Raises:
        ValueError: see `checks.check_points`.
    """
    check_points(mask_logits, points)
    return reference.point_logits(mask_logits, points).contiguous()


@point_logits_op.register_kernel("cuda")
def _(*args: Tensor) -> Tensor:
    from ldmseg_fast.kernels.point_loss import host  # Triton is imported on CUDA only

    check_points(*args)
    return host.point_logits(*args)


@point_logits_op.register_fake
def _(mask_logits: Tensor, points: Tensor) -> Tensor:
    check_points(mask_logits, points)
    return points.new_empty((points.shape[0], mask_logits.shape[1], points.shape[1]))


@torch.library.custom_op("ldmseg_fast::point_margin", mutates_args=())
def point_margin_op(mask_logits: Tensor, points: Tensor) -> Tensor:
    """Runs `point_margin`.

    Args:
        mask_logits: float [B, Q, h, w], either memory format.
        points: float32 [B, P, 2], (x, y) in [0, 1].

    Returns:
        float32 [B, P].

    Raises:
        ValueError: see `checks.check_points`.
    """
    check_points(mask_logits, points, least_slots=2)
    return reference.point_margin(mask_logits, points)


@point_margin_op.register_kernel("cuda")
def _(*args: Tensor) -> Tensor:
    from ldmseg_fast.kernels.point_loss import host

    check_points(*args, least_slots=2)
    return host.point_margin(*args)


@point_margin_op.register_fake
def _(mask_logits: Tensor, points: Tensor) -> Tensor:
    check_points(mask_logits, points, least_slots=2)
    return points.new_empty(points.shape[:2])


@torch.library.custom_op("ldmseg_fast::slot_logits", mutates_args=())
def slot_logits_op(mask_logits: Tensor, image_index: Tensor, slots: Tensor, points: Tensor) -> Tensor:
    """Runs `slot_logits`, without gradient.

    Args:
        mask_logits: float [B, Q, h, w], either memory format.
        image_index, slots: int64 [M].
        points: float32 [M, P, 2], (x, y) in [0, 1].

    Returns:
        float32 [M, P].

    Raises:
        ValueError: see `checks.check_rows` and, on a CPU, `checks.check_indices`.
    """
    check_rows(mask_logits, image_index, slots, points)
    check_indices(mask_logits, image_index, slots)
    return reference.slot_logits(mask_logits, image_index, slots, points).contiguous()


@slot_logits_op.register_kernel("cuda")
def _(*args: Tensor) -> Tensor:
    from ldmseg_fast.kernels.point_loss import host

    check_rows(*args)
    return host.slot_logits(*args)


@slot_logits_op.register_fake
def _(mask_logits: Tensor, image_index: Tensor, slots: Tensor, points: Tensor) -> Tensor:
    check_rows(mask_logits, image_index, slots, points)
    return points.new_empty(points.shape[:2])


@torch.library.custom_op("ldmseg_fast::sample_ce", mutates_args=())
def sample_ce_op(
    mask_logits: Tensor, segment_ids: Tensor, points: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the forward pass of `sample_ce`, and keeps what the backward pass needs; differentiable.

    Args:
        mask_logits: float [B, Q, h, w], either memory format.
        segment_ids: integer [B, H, W].
        points: float32 [B, P, 2], (x, y) in [0, 1].
        weights: float32 [Q], of each target; not differentiable.

    Returns:
        the summed loss and the number of points that are not void, scalars, and the logsumexp [B, P]; all float32
        (float64 for float64 logits).

    Raises:
        ValueError: see `checks.check_ce`.
    """
    check_ce(mask_logits, segment_ids, points, weights)
    return reference.sample_ce_forward(mask_logits, segment_ids, points, weights)


@sample_ce_op.register_kernel("cuda")
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from ldmseg_fast.kernels.point_loss import host

    check_ce(*args)
    return host.sample_ce_forward(*args)


@sample_ce_op.register_fake
def _(
    mask_logits: Tensor, segment_ids: Tensor, points: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    check_ce(mask_logits, segment_ids, points, weights)
    dtype = at_least_float32(mask_logits).dtype
    return (
        points.new_empty((), dtype=dtype),
        points.new_empty((), dtype=dtype),
        points.new_empty(points.shape[:2], dtype=dtype),
    )


@torch.library.custom_op("ldmseg_fast::sample_ce_backward", mutates_args=())
def sample_ce_backward_op(
    grad_loss: Tensor,
    mask_logits: Tensor,
    segment_ids: Tensor,
    points: Tensor,
    logsumexp: Tensor,
    weights: Tensor | None = None,
) -> Tensor:
    """Runs the backward pass of `sample_ce_op`.

    Args:
        grad_loss: scalar, the gradient of the loss.
        mask_logits: float [B, Q, h, w], either memory format.
        segment_ids: integer [B, H, W].
        points: float32 [B, P, 2], (x, y) in [0, 1].
        logsumexp: [B, P], what the forward pass returned.
        weights: float32 [Q], of each target.

    Returns:
        the gradient of `mask_logits`, in its shape, dtype and memory format.
    """
    grad = reference.sample_ce_backward(grad_loss, mask_logits, segment_ids, points, logsumexp, weights)
    return _like(grad, mask_logits)


@sample_ce_backward_op.register_kernel("cuda")
def _(*args: Any) -> Tensor:
    from ldmseg_fast.kernels.point_loss import host

    return host.sample_ce_backward(*args)


@sample_ce_backward_op.register_fake
def _(
    grad_loss: Tensor,
    mask_logits: Tensor,
    segment_ids: Tensor,
    points: Tensor,
    logsumexp: Tensor,
    weights: Tensor | None = None,
) -> Tensor:
    return torch.empty_like(mask_logits)


@torch.library.custom_op("ldmseg_fast::sample_losses", mutates_args=())
def sample_losses_op(
    mask_logits: Tensor,
    segment_ids: Tensor,
    points: Tensor,
    image_index: Tensor,
    slots: Tensor,
    row_points: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Runs the forward pass of `sample_losses`, and keeps what the backward pass needs; differentiable.

    Args:
        mask_logits: float [B, Q, h, w], either memory format.
        segment_ids: integer [B, H, W].
        points: float32 [B, P, 2], (x, y) in [0, 1], of the cross entropy.
        image_index, slots: int64 [M].
        row_points: float32 [M, P', 2], (x, y) in [0, 1].

    Returns:
        the summed cross entropy, its number of points that are not void, the summed BCE and Dice, scalars; the
        logsumexp [B, P]; sums over the rows' points of p t, p and t [M, 3], with p the sigmoid and t the target. All
        are float32 (float64 for float64 logits).

    Raises:
        ValueError: see `checks.check_losses` and, on a CPU, `checks.check_indices`.
    """
    check_losses(mask_logits, segment_ids, points, image_index, slots, row_points)
    check_indices(mask_logits, image_index, slots)
    ce, count, logsumexp = reference.sample_ce_forward(mask_logits, segment_ids, points)
    rows = (image_index, slots, row_points)
    bce, dice, sums = reference.sample_bce_dice_forward(mask_logits, segment_ids, *rows)
    return ce, count, bce, dice, logsumexp, sums


@sample_losses_op.register_kernel("cuda")
def _(
    mask_logits: Tensor,
    segment_ids: Tensor,
    points: Tensor,
    image_index: Tensor,
    slots: Tensor,
    row_points: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from ldmseg_fast.kernels.point_loss import host

    check_losses(mask_logits, segment_ids, points, image_index, slots, row_points)
    ce, count, logsumexp = host.sample_ce_forward(mask_logits, segment_ids, points)
    bce, dice, sums = host.sample_bce_dice_forward(mask_logits, segment_ids, image_index, slots, row_points)
    return ce, count, bce, dice, logsumexp, sums


@sample_losses_op.register_fake
def _(
    mask_logits: Tensor,
    segment_ids: Tensor,
    points: Tensor,
    image_index: Tensor,
    slots: Tensor,
    row_points: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_losses(mask_logits, segment_ids, points, image_index, slots, row_points)
    dtype = at_least_float32(mask_logits).dtype
    ce, count, bce, dice = (points.new_empty((), dtype=dtype) for _ in range(4))
    logsumexp, sums = (points.new_empty(shape, dtype=dtype) for shape in (points.shape[:2], (slots.shape[0], 3)))
    return ce, count, bce, dice, logsumexp, sums


@torch.library.custom_op("ldmseg_fast::sample_losses_backward", mutates_args=())
def sample_losses_backward_op(
    grad_ce: Tensor,
    grad_bce: Tensor,
    grad_dice: Tensor,
    mask_logits: Tensor,
    segment_ids: Tensor,
    points: Tensor,
    logsumexp: Tensor,
    image_index: Tensor,
    slots: Tensor,
    row_points: Tensor,
    sums: Tensor,
) -> Tensor:
    """Runs the backward pass of `sample_losses_op`; the losses' gradients are added up in float32.

    Args:
        grad_ce, grad_bce, grad_dice: scalars, the gradients of the losses.
        mask_logits: float [B, Q, h, w], either memory format.
        segment_ids: integer [B, H, W].
        points: float32 [B, P, 2], (x, y) in [0, 1].
        logsumexp: [B, P], what the forward pass returned.
        image_index, slots: int64 [M].
        row_points: float32 [M, P', 2], (x, y) in [0, 1].
        sums: [M, 3], what the forward pass returned.

    Returns:
        the gradient of `mask_logits`, in its shape, dtype and memory format.
    """
    rows = (image_index, slots, row_points, sums)
    grads = (grad_ce, grad_bce, grad_dice)
    grad = reference.sample_losses_backward(*grads, mask_logits, segment_ids, points, logsumexp, *rows)
    return _like(grad, mask_logits)


@sample_losses_backward_op.register_kernel("cuda")
def _(*args: Tensor) -> Tensor:
    from ldmseg_fast.kernels.point_loss import host

    return host.sample_losses_backward(*args)


@sample_losses_backward_op.register_fake
def _(
    grad_ce: Tensor,
    grad_bce: Tensor,
    grad_dice: Tensor,
    mask_logits: Tensor,
    segment_ids: Tensor,
    points: Tensor,
    logsumexp: Tensor,
    image_index: Tensor,
    slots: Tensor,
    row_points: Tensor,
    sums: Tensor,
) -> Tensor:
    return torch.empty_like(mask_logits)


def _like(grad: Tensor, mask_logits: Tensor) -> Tensor:
    """In the memory format of `mask_logits`, as the fake function promises."""
    return torch.empty_like(mask_logits).copy_(grad)


def _save_ce(ctx, inputs, output) -> None:
    mask_logits, segment_ids, points, weights = inputs
    _, count, logsumexp = output
    ctx.save_for_backward(mask_logits, segment_ids, points, logsumexp, weights)
    ctx.mark_non_differentiable(count, logsumexp)


def _backward_ce(ctx, grad_loss: Tensor, _grad_count: Tensor | None, _grad_logsumexp: Tensor | None):
    return sample_ce_backward_op(grad_loss, *ctx.saved_tensors), None, None, None


def _save_losses(ctx, inputs, output) -> None:
    _, count, _, _, logsumexp, sums = output
    ctx.save_for_backward(*inputs, logsumexp, sums)
    ctx.mark_non_differentiable(count, logsumexp, sums)


def _backward_losses(ctx, grad_ce: Tensor, _grad_count: Tensor | None, grad_bce: Tensor, grad_dice: Tensor, *_: Any):
    mask_logits, segment_ids, points, image_index, slots, row_points, logsumexp, sums = ctx.saved_tensors
    rows = (image_index, slots, row_points, sums)
    grads = (grad_ce, grad_bce, grad_dice)
    grad = sample_losses_backward_op(*grads, mask_logits, segment_ids, points, logsumexp, *rows)
    return grad, None, None, None, None, None


sample_ce_op.register_autograd(_backward_ce, setup_context=_save_ce)
sample_losses_op.register_autograd(_backward_losses, setup_context=_save_losses)
