"""Triton: logits are gathered at points and used in registers; gradients go back by atomic additions in float32.

The order of those additions is not fixed, so gradients differ in the last bits from run to run (as those of
`F.grid_sample` do). The losses are those of PointRend's point sampling (arXiv 1912.08193) and Dice (Milletari et al.,
arXiv 1606.04797). Logits are read in either memory format; channels_last, where the slots of a pixel lie together, is
the fast one.
"""

import torch
import triton
from torch import Tensor

from ldmseg_fast.kernels.configs import find_config
from ldmseg_fast.kernels.launch import launch
from ldmseg_fast.kernels.point_loss.bce_dice import bce_dice_backward_kernel, bce_dice_forward_kernel
from ldmseg_fast.kernels.point_loss.cross_entropy import ce_backward_kernel, ce_forward_kernel
from ldmseg_fast.kernels.point_loss.logits import point_logits_kernel, slot_logits_kernel


def _format(mask_logits: Tensor) -> str:
    return "channels_last" if mask_logits.stride(1) == 1 else "planes"


def _ce_class(mask_logits: Tensor) -> str:
    """Categories are rarely a multiple of 16, and then reads are narrower and addresses take more registers."""
    kind = _format(mask_logits)
    return "uneven channels_last" if kind == "channels_last" and mask_logits.shape[1] % 16 else kind


def point_logits(mask_logits: Tensor, points: Tensor) -> Tensor:
    """Launches the sampling of all slots at points.

    Args:
        mask_logits: float [B, Q, h, w], either memory format.
        points: float32 [B, P, 2], (x, y) in [0, 1].

    Returns:
        float32 [B, Q, P].
    """
    return _point_logits(mask_logits, points, margin=False)


def point_margin(mask_logits: Tensor, points: Tensor) -> Tensor:
    """Launches best minus second best logit at points.

    Args:
        mask_logits: float [B, Q, h, w], either memory format.
        points: float32 [B, P, 2], (x, y) in [0, 1].

    Returns:
        float32 [B, P].
    """
    return _point_logits(mask_logits, points, margin=True)


def _point_logits(mask_logits: Tensor, points: Tensor, margin: bool) -> Tensor:
    batch, slots, height, width = mask_logits.shape
    count = points.shape[1]
    out = torch.empty((batch, count) if margin else (batch, slots, count), dtype=torch.float32, device=points.device)
    config = find_config("point_logits", _format(mask_logits))
    launch(
        point_logits_kernel,
        (triton.cdiv(count, config.constants["BLOCK_P"]), batch),
        *(mask_logits, points.contiguous(), out, count, slots, height, width, *mask_logits.stride()),
        config=config,
        MARGIN=margin,
    )
    return out


def slot_logits(mask_logits: Tensor, image_index: Tensor, slots: Tensor, points: Tensor) -> Tensor:
    """Launches the sampling of one slot per row.

    Args:
        mask_logits: float [B, Q, h, w], either memory format.
        image_index, slots: int64 [M].
        points: float32 [M, P, 2], (x, y) in [0, 1].

    Returns:
        float32 [M, P].
    """
    rows, count = points.shape[:2]
    out = torch.empty((rows, count), dtype=torch.float32, device=points.device)
    config = find_config("slot_logits", "all")
    launch(
        slot_logits_kernel,
        (triton.cdiv(count, config.constants["BLOCK_P"]), rows),
        *(mask_logits, image_index.contiguous(), slots.contiguous(), points.contiguous(), out, count),
        *(*mask_logits.shape, *mask_logits.stride()),
        config=config,
    )
    return out


def sample_ce_forward(
    mask_logits: Tensor, segment_ids: Tensor, points: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches cross entropy over slots at points.

    Args:
        mask_logits: float [B, Q, h, w], either memory format.
        segment_ids: integer [B, H, W].
        points: float32 [B, P, 2], (x, y) in [0, 1].
        weights: float32 [Q], of each target.

    Returns:
        the summed loss and the number of points that are not void, scalars, and the logsumexp [B, P]; all float32.
    """
    batch, slots, height, width = mask_logits.shape
    count = points.shape[1]
    config = find_config("sample_ce", _ce_class(mask_logits))
    blocks = triton.cdiv(count, config.constants["BLOCK_P"])
    logsumexp = torch.empty((batch, count), dtype=torch.float32, device=points.device)
    losses, counts = (torch.empty((batch, blocks), dtype=torch.float32, device=points.device) for _ in range(2))
    launch(
        ce_forward_kernel,
        (blocks, batch),
        *(mask_logits, segment_ids.contiguous(), points.contiguous(), _weights(weights, points)),
        *(logsumexp, losses, counts, count, slots, height, width, *segment_ids.shape[1:], *mask_logits.stride()),
        config=config,
        WEIGHTED=weights is not None,
    )
    return losses.sum(), counts.sum(), logsumexp


def _weights(weights: Tensor | None, points: Tensor) -> Tensor:
    """Gives a pointer that nothing reads where there are no weights."""
    return points if weights is None else weights.contiguous()


def sample_ce_backward(
    grad_loss: Tensor,
    mask_logits: Tensor,
    segment_ids: Tensor,
    points: Tensor,
    logsumexp: Tensor,
    weights: Tensor | None = None,
) -> Tensor:
    """Launches the gradient of `sample_ce_forward`.

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
    grad = torch.zeros_like(mask_logits, dtype=torch.float32)
    _add_ce_gradient(grad, grad_loss, mask_logits, segment_ids, points, logsumexp, weights)
    return grad.to(mask_logits.dtype)


def _add_ce_gradient(
    grad: Tensor,
    grad_loss: Tensor,
    mask_logits: Tensor,
    segment_ids: Tensor,
    points: Tensor,
    logsumexp: Tensor,
    weights: Tensor | None,
) -> None:
    batch, slots, height, width = mask_logits.shape
    count = points.shape[1]
    config = find_config("sample_ce", _ce_class(mask_logits))
    launch(
        ce_backward_kernel,
        (triton.cdiv(count, config.constants["BLOCK_P"]), batch),
        *(grad_loss, mask_logits, segment_ids.contiguous(), points.contiguous(), _weights(weights, points), logsumexp),
        *(grad, count, slots, height, width, *segment_ids.shape[1:], *mask_logits.stride(), *grad.stride()),
        config=config,
        WEIGHTED=weights is not None,
    )


def sample_bce_dice_forward(
    mask_logits: Tensor, segment_ids: Tensor, image_index: Tensor, slots: Tensor, points: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches binary cross entropy and Dice of one segment per row.

    Args:
        mask_logits: float [B, Q, h, w], either memory format.
        segment_ids: integer [B, H, W].
        image_index, slots: int64 [M].
        points: float32 [M, P, 2], (x, y) in [0, 1].

    Returns:
        both summed losses, scalars, and sums over the points of p t, p and t [M, 3], with p the sigmoid and t the
        target; all float32.
    """
    rows, count = points.shape[:2]
    bce, dice = (torch.empty(rows, dtype=torch.float32, device=points.device) for _ in range(2))
    sums = torch.empty((rows, 3), dtype=torch.float32, device=points.device)
    launch(
        bce_dice_forward_kernel,
        (rows,),
        *(mask_logits, segment_ids.contiguous(), image_index.contiguous(), slots.contiguous(), points.contiguous()),
        *(bce, dice, sums, count, *mask_logits.shape, *segment_ids.shape[1:], *mask_logits.stride()),
        config=find_config("sample_bce_dice_forward", "all"),
    )
    return bce.sum(), dice.sum(), sums


def sample_losses_backward(
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
    """Launches the gradient of `sample_ce_forward` and `sample_bce_dice_forward`, added up in one float32 tensor.

    Args:
        grad_ce, grad_bce, grad_dice: scalars, the gradients of the losses.
        mask_logits: float [B, Q, h, w], either memory format.
        segment_ids: integer [B, H, W].
        points: float32 [B, P, 2], (x, y) in [0, 1], of the cross entropy.
        logsumexp: [B, P], what its forward pass returned.
        image_index, slots: int64 [M].
        row_points: float32 [M, P', 2], (x, y) in [0, 1].
        sums: [M, 3], what the rows' forward pass returned.

    Returns:
        the gradient of `mask_logits`, in its shape, dtype and memory format.
    """
    grad = torch.zeros_like(mask_logits, dtype=torch.float32)
    _add_ce_gradient(grad, grad_ce, mask_logits, segment_ids, points, logsumexp, None)
    rows, count = row_points.shape[:2]
    config = find_config("sample_bce_dice_backward", "all")
    launch(
        bce_dice_backward_kernel,
        (triton.cdiv(count, config.constants["BLOCK_P"]), rows),
        *(grad_bce, grad_dice, mask_logits, segment_ids.contiguous(), image_index.contiguous(), slots.contiguous()),
        *(row_points.contiguous(), sums, grad, count, *mask_logits.shape, *segment_ids.shape[1:]),
        *(*mask_logits.stride(), *grad.stride()),
        config=config,
    )
    return grad.to(mask_logits.dtype)
