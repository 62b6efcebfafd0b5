"""Plain torch: what the kernels must equal.

A point is (x, y) in [0, 1] of the image's width and height. Logits and binary masks are sampled as
`F.grid_sample(2 points - 1, align_corners=False)` does it: bilinear, zero outside. Ids are taken from the pixel that
holds the point; one that is no slot counts as void. All sums are in float32 or better.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmseg_fast.kernels.backend import at_least_float32


def point_logits(mask_logits: Tensor, points: Tensor) -> Tensor:  # [B, Q, h, w], [B, P, 2] -> [B, Q, P]
    """Samples float logits [B, Q, h, w] at points [B, P, 2]: [B, Q, P], float32 (float64 for float64)."""
    mask_logits = at_least_float32(mask_logits)
    grid = 2 * points.to(mask_logits.dtype)[:, :, None] - 1  # [B, P, 1, 2]
    return F.grid_sample(mask_logits, grid, mode="bilinear", align_corners=False)[..., 0]


def point_margin(mask_logits: Tensor, points: Tensor) -> Tensor:  # -> [B, P], best logit - second best
    """Computes best minus second best logit, float [B, P]; arguments as in `point_logits`."""
    best = point_logits(mask_logits, points).topk(2, 1).values
    return best[:, 0] - best[:, 1]


def slot_logits(mask_logits: Tensor, image_index: Tensor, slots: Tensor, points: Tensor) -> Tensor:  # -> [M, P]
    """Samples float logits [B, Q, h, w] of slot `slots[m]` of image `image_index[m]` at points [M, P, 2]: [M, P].

    A slot beyond the last has logit 0.
    """
    planes = mask_logits[image_index, clamp_slots(mask_logits, slots)]  # [M, h, w]
    return point_logits(planes[:, None], points)[:, 0].masked_fill((slots >= mask_logits.shape[1])[:, None], 0)


def clamp_slots(mask_logits: Tensor, slots: Tensor) -> Tensor:
    """Moves int64 slots [M] that do not exist to the nearest that does."""
    return slots.clamp(0, mask_logits.shape[1] - 1)


def point_ids(segment_ids: Tensor, points: Tensor, slots: int) -> Tensor:  # [B, H, W], [B, P, 2] -> int64 [B, P]
    """Looks up ids, integer [B, H, W], at points [B, P, 2]: int64 [B, P], 0 for what is none of `slots` slots."""
    height, width = segment_ids.shape[1:]
    x = (points[..., 0] * width).long().clamp(0, width - 1)
    y = (points[..., 1] * height).long().clamp(0, height - 1)
    ids = segment_ids.flatten(1).gather(1, y * width + x).long()
    return ids.masked_fill((ids < 0) | (ids >= slots), 0)


def slot_targets(
    segment_ids: Tensor,  # [B, H, W]
    image_index: Tensor,  # [M]
    slots: Tensor,  # [M]
    points: Tensor,  # [M, P, 2]
) -> Tensor:  # [M, P], the binary masks `segment_ids == slot` sampled bilinearly, without building them
    """Samples the binary masks `segment_ids == slot` bilinearly, without building them.

    Args:
        segment_ids: integer [B, H, W].
        image_index, slots: int64 [M].
        points: float [M, P, 2].

    Returns:
        [M, P] in [0, 1], of the dtype of `points`.
    """
    height, width = segment_ids.shape[1:]
    x, y = points[..., 0] * width - 0.5, points[..., 1] * height - 0.5
    left, top = x.floor(), y.floor()
    target = torch.zeros_like(x)
    for column, weight_x in ((left, 1 - (x - left)), (left + 1, x - left)):
        for row, weight_y in ((top, 1 - (y - top)), (top + 1, y - top)):
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            pixel = row.long().clamp(0, height - 1) * width + column.long().clamp(0, width - 1)
            ids = segment_ids.flatten(1)[image_index[:, None], pixel]  # [M, P]
            target += weight_x * weight_y * (inside & (ids == slots[:, None]))
    return target


def sample_ce(
    mask_logits: Tensor, segment_ids: Tensor, points: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Computes summed cross entropy and the number of points that are not void, float scalars, as `op.sample_ce`."""
    logits = point_logits(mask_logits, points)  # [B, Q, P]
    target = point_ids(segment_ids, points, mask_logits.shape[1])  # [B, P]
    weights = None if weights is None else weights.to(logits.dtype)
    loss = F.cross_entropy(logits, target, weights, ignore_index=0, reduction="sum")
    return loss, (target > 0).sum().to(loss.dtype)


def sample_bce_dice(
    mask_logits: Tensor, segment_ids: Tensor, image_index: Tensor, slots: Tensor, points: Tensor
) -> tuple[Tensor, Tensor]:
    """Computes the summed losses of the rows, float scalars, as `op.sample_losses`."""
    logits = slot_logits(mask_logits, image_index, slots, points)  # [M, P]
    target = slot_targets(segment_ids, image_index, slots, points.to(logits.dtype))
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)  # [M]
    probability = logits.sigmoid()
    dice = 1 - (2 * (probability * target).sum(1) + 1) / (probability.sum(1) + target.sum(1) + 1)
    present = (slots > 0) & (slots < mask_logits.shape[1])
    return (bce * present).sum(), (dice * present).sum()


def sample_losses(
    mask_logits: Tensor,
    segment_ids: Tensor,
    points: Tensor,
    image_index: Tensor,
    slots: Tensor,
    row_points: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes (cross entropy, its count, BCE, Dice), float scalars, as `op.sample_losses`."""
    rows = sample_bce_dice(mask_logits, segment_ids, image_index, slots, row_points)
    return *sample_ce(mask_logits, segment_ids, points), *rows


def sample_ce_forward(
    mask_logits: Tensor, segment_ids: Tensor, points: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes (summed loss, count, logsumexp float [B, P]), as `op.sample_ce_op`."""
    loss, count = sample_ce(mask_logits, segment_ids, points, weights)
    return loss, count, point_logits(mask_logits, points).logsumexp(1)


def sample_ce_backward(
    grad_loss: Tensor,
    mask_logits: Tensor,
    segment_ids: Tensor,
    points: Tensor,
    logsumexp: Tensor,
    weights: Tensor | None = None,
) -> Tensor:
    """Computes the gradient of the logits, float [B, Q, h, w], as `op.sample_ce_backward_op`."""
    target = point_ids(segment_ids, points, mask_logits.shape[1])[:, None]  # [B, 1, P]
    grad = (point_logits(mask_logits, points) - logsumexp[:, None]).exp()  # [B, Q, P]
    grad = grad.scatter_add(1, target, -torch.ones_like(grad[:, :1]))
    factor = (target > 0) * grad_loss if weights is None else (target > 0) * grad_loss * weights.to(grad.dtype)[target]
    return _scatter(grad * factor, mask_logits, points)


def sample_bce_dice_forward(
    mask_logits: Tensor, segment_ids: Tensor, image_index: Tensor, slots: Tensor, points: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes (BCE, Dice, float sums [M, 3] over points of p t, p and t), as `host.sample_bce_dice_forward`."""
    bce, dice = sample_bce_dice(mask_logits, segment_ids, image_index, slots, points)
    p = slot_logits(mask_logits, image_index, slots, points).sigmoid()
    t = slot_targets(segment_ids, image_index, slots, points.to(p.dtype))
    return bce, dice, torch.stack([(p * t).sum(1), p.sum(1), t.sum(1)], 1)


def sample_bce_dice_backward(
    grad_bce: Tensor,
    grad_dice: Tensor,
    mask_logits: Tensor,
    segment_ids: Tensor,
    image_index: Tensor,
    slots: Tensor,
    points: Tensor,
    sums: Tensor,
) -> Tensor:
    """Computes the gradient of the logits, float [B, Q, h, w], of the rows' losses alone."""
    p = slot_logits(mask_logits, image_index, slots, points).sigmoid()  # [M, P]
    t = slot_targets(segment_ids, image_index, slots, points.to(p.dtype))
    numerator, denominator = 2 * sums[:, :1] + 1, sums[:, 1:2] + sums[:, 2:] + 1
    grad = grad_bce * (p - t) / points.shape[1]
    grad = grad + grad_dice * (numerator - 2 * t * denominator) / denominator**2 * p * (1 - p)
    index = image_index, clamp_slots(mask_logits, slots)
    present = (slots > 0) & (slots < mask_logits.shape[1])
    grad_planes = _scatter((grad * present[:, None])[:, None], mask_logits[index][:, None], points)[:, 0]
    return torch.zeros_like(mask_logits).index_put(index, grad_planes, accumulate=True)


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
    """Computes the gradient of the logits, float [B, Q, h, w], as `op.sample_losses_backward_op`."""
    grad = sample_ce_backward(grad_ce, mask_logits, segment_ids, points, logsumexp)
    return grad + sample_bce_dice_backward(
        grad_bce, grad_dice, mask_logits, segment_ids, image_index, slots, row_points, sums
    )


def _scatter(grad: Tensor, mask_logits: Tensor, points: Tensor) -> Tensor:
    """The transpose of `point_logits`: [B, Q, P] -> [B, Q, h, w]."""
    grid = 2 * points.to(grad.dtype)[:, :, None] - 1
    bilinear, zeros, align_corners = 0, 0, False
    grad_logits, _ = torch.ops.aten.grid_sampler_2d_backward(
        grad[..., None].contiguous(), mask_logits.to(grad.dtype), grid, bilinear, zeros, align_corners, [True, False]
    )
    return grad_logits.to(mask_logits.dtype)
