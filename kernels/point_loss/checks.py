"""Refuses what the public functions and their ops do not take, before anything runs.

The losses are those of PointRend's point sampling, arXiv 1912.08193; Dice: Milletari et al., arXiv 1606.04797.
"""

import torch
from torch import Tensor

from ldmseg_fast.kernels.backend import require, require_same_device

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)


def check_points(mask_logits: Tensor, points: Tensor, least_slots: int = 1) -> None:
    """Refuses points that do not fit the logits.

    Args:
        mask_logits: float [B, Q, h, w], Q from `least_slots` on.
        points: float32 [B, P, 2]; also float64 for float64 logits.

    Raises:
        ValueError: wrong shape, dtype or device; the message starts with the argument's name.
    """
    _check_logits(mask_logits, least_slots)
    require(
        points.ndim == 3 and points.shape[0] == mask_logits.shape[0] and points.shape[2] == 2,
        "points: expected [{}, P, 2], got shape {}",
        mask_logits.shape[0],
        points.shape,
    )
    _check_coordinates(mask_logits, points)


def check_rows(
    mask_logits: Tensor, image_index: Tensor, slots: Tensor, points: Tensor, name_of_points: str = "points"
) -> None:
    """Refuses rows that do not fit the logits.

    Args:
        mask_logits: float [B, Q, h, w].
        image_index, slots: int64 [M].
        points: float32 [M, P, 2]; also float64 for float64 logits.
        name_of_points: as the message calls them.

    Raises:
        ValueError: wrong shape, dtype or device; the message starts with the argument's name.
    """
    _check_logits(mask_logits, 1)
    for name, tensor in (("image_index", image_index), ("slots", slots)):
        require(tensor.ndim == 1, "{}: expected [M], got shape {}", name, tensor.shape)
        require(tensor.dtype == torch.int64, "{}: expected int64, got {}", name, tensor.dtype)
    require(
        slots.shape == image_index.shape,
        "slots: shape {} differs from image_index's {}",
        slots.shape,
        image_index.shape,
    )
    require(
        points.ndim == 3 and points.shape[0] == slots.shape[0] and points.shape[2] == 2,
        "{}: expected [{}, P, 2], got shape {}",
        name_of_points,
        slots.shape[0],
        points.shape,
    )
    _check_coordinates(mask_logits, points, name_of_points)
    require_same_device(mask_logits, image_index=image_index, slots=slots)


def check_indices(mask_logits: Tensor, image_index: Tensor, slots: Tensor) -> None:
    """Refuses rows, int64 [M], of images or slots that logits, float [B, Q, h, w], do not have.

    It is asked on a CPU only, and not while a graph is traced: to look at a GPU's values is to wait for it.

    Raises:
        ValueError: an index is negative or too large; the message starts with the argument's name.
    """
    if mask_logits.device.type != "cpu" or torch.compiler.is_compiling():
        return
    for name, indices, count in zip(("image_index", "slots"), (image_index, slots), mask_logits.shape):
        if indices.numel():
            low, high = map(int, indices.aminmax())
            require(low >= 0 and high < count, "{}: expected 0 to {}, got {} to {}", name, count - 1, low, high)


def check_ids(mask_logits: Tensor, segment_ids: Tensor) -> None:
    """Refuses maps, integer [B, H, W], that do not fit the logits, float [B, Q, h, w].

    Raises:
        ValueError: wrong shape, dtype or device, or no pixels.
    """
    require(
        segment_ids.ndim == 3 and segment_ids.shape[0] == mask_logits.shape[0],
        "segment_ids: expected [{}, H, W], got shape {}",
        mask_logits.shape[0],
        segment_ids.shape,
    )
    require(segment_ids.dtype in INTEGERS, "segment_ids: expected an integer tensor, got {}", segment_ids.dtype)
    require(segment_ids.shape[1] > 0 and segment_ids.shape[2] > 0, "segment_ids: no pixels in {}", segment_ids.shape)
    require_same_device(mask_logits, segment_ids=segment_ids)


def _check_logits(mask_logits: Tensor, least_slots: int) -> None:
    require(mask_logits.ndim == 4, "mask_logits: expected [B, Q, h, w], got shape {}", mask_logits.shape)
    require(mask_logits.dtype in FLOATS, "mask_logits: expected a float tensor, got {}", mask_logits.dtype)
    require(
        mask_logits.shape[1] >= least_slots,
        "mask_logits: expected at least {} slots, got shape {}",
        least_slots,
        mask_logits.shape,
    )
    require(mask_logits.shape[2] > 0 and mask_logits.shape[3] > 0, "mask_logits: no cells in {}", mask_logits.shape)


def _check_coordinates(mask_logits: Tensor, points: Tensor, name: str = "points") -> None:
    expected = (torch.float32, torch.float64) if mask_logits.dtype == torch.float64 else (torch.float32,)
    require(points.dtype in expected, "{}: expected float32, got {}", name, points.dtype)
    require_same_device(mask_logits, **{name: points})


def check_ce(mask_logits: Tensor, segment_ids: Tensor, points: Tensor, weights: Tensor | None = None) -> None:
    """Refuses what `sample_ce` does not take: logits float [B, Q, h, w], ids integer [B, H, W]; arguments as there.

    Raises:
        ValueError: see `check_points` and `check_ids`; weights of another shape, dtype or device.
    """
    check_points(mask_logits, points)
    check_ids(mask_logits, segment_ids)
    if weights is not None:
        require(weights.dtype == torch.float32, "weights: expected float32, got {}", weights.dtype)
        require(
            weights.shape == mask_logits.shape[1:2],
            "weights: expected [{}], got shape {}",
            mask_logits.shape[1],
            weights.shape,
        )
        require_same_device(mask_logits, weights=weights)


def check_losses(
    mask_logits: Tensor,
    segment_ids: Tensor,
    points: Tensor,
    image_index: Tensor,
    slots: Tensor,
    row_points: Tensor,
) -> None:
    """Refuses what `sample_losses` does not take: logits float [B, Q, h, w], ids integer [B, H, W]; arguments as there.

    Raises:
        ValueError: see `check_ce` and `check_rows`.
    """
    check_ce(mask_logits, segment_ids, points)
    check_rows(mask_logits, image_index, slots, row_points, "row_points")
