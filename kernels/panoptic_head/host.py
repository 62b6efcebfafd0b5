"""Launches post-processing (arXiv 2401.10227, section 3.3) in Triton.

Both resizings, softmax and argmax run for one tile of target pixels at a time; a pass over tiles with logits that are
not finite (as a rule none) and two passes over the labels follow.

Two bilinear resizings of an axis are one sparse matrix. A program composes them for its tile: a small matrix product
resizes the columns of each row of logits once, in parts that keep float32's precision, and each target row is a sum of
at most three such rows, which the program holds (of four where logits are shrunk).
Full-size logits therefore exist in registers only. All sums over pixels are of integers, so that results do not depend
on the order of the programs.
"""

import struct
from functools import cache

import torch
import triton
from torch import Tensor

from ldmseg_fast.kernels.configs import find_config
from ldmseg_fast.kernels.launch import launch
from ldmseg_fast.kernels.panoptic_head import reference
from ldmseg_fast.kernels.panoptic_head.pixels import panoptic_tile_kernel
from ldmseg_fast.kernels.panoptic_head.segments import panoptic_filter_kernel, panoptic_statistics_kernel

MAX_SLOTS = 256
MAX_WINDOW = 128  # columns of logits under one tile


@cache
def least_logit(threshold: float) -> float:
    """Finds the smallest float32 whose sigmoid, as torch computes it, is at least `threshold`."""

    def reaches(logit: float) -> bool:
        return bool(torch.tensor(logit, dtype=torch.float32, device="cpu").sigmoid() >= threshold)

    low, high = -1e4, 1e4
    if reaches(low):
        return float("-inf")
    if not reaches(high):
        return float("inf")
    while True:
        middle = float(torch.tensor((low + high) / 2, dtype=torch.float32, device="cpu"))
        if middle in (low, high):
            return high
        low, high = (low, middle) if reaches(middle) else (middle, high)


@cache
def window_columns(width: int, network_width: int, target_width: int, block: int, alignment: int) -> int:
    """Counts the most columns of logits, from an aligned one on, that a tile of `block` target columns touches."""

    def low(position: int, inner: int, outer: int) -> int:
        return min(int(max((position + 0.5) * (inner / outer) - 0.5, 0.0)), inner - 1)

    most = 1
    for first in range(0, target_width, block):
        last = min(first + block, target_width) - 1
        start = low(low(first, network_width, target_width), width, network_width) // alignment * alignment
        right = min(low(last, network_width, target_width) + 1, network_width - 1)
        most = max(most, min(low(right, width, network_width) + 1, width - 1) - start + 1)
    return most + 1  # the kernel's float32 may fall on the other side of an integer


def panoptic_head(
    mask_logits: Tensor,
    network_size: tuple[int, int],
    target_size: tuple[int, int],
    mask_threshold: float,
    count_threshold: int,
    overlap_threshold: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launches the kernels, or runs the reference for more slots or a stronger reduction than they take.

    Args:
        mask_logits: float16, bfloat16 or float32 [B, Q, h, w], either memory format.
        network_size, target_size: (height, width) in pixels.
        mask_threshold, count_threshold, overlap_threshold: as in `op.panoptic_head`.

    Returns:
        segmentation int32 [B, H, W], probability float32 [B, H, W], area int32 [B, Q], box int32 [B, Q, 4], score
        float32 [B, Q], as in `op.panoptic_head`.
    """
    batch, slots, height, width = mask_logits.shape
    block_q = max(16, triton.next_power_of_2(slots))
    slots_first = mask_logits.stride(1) == 1  # channels_last
    kind = "q256" if block_q > 128 else "q128_half" if mask_logits.element_size() == 2 else "q128"
    config = find_config("panoptic_head", f"{kind}_{'channels_last' if slots_first else 'planes'}")
    alignment = 1 if slots_first else 16 // mask_logits.element_size()
    block_x = config.constants["BLOCK_X"]
    window = window_columns(width, network_size[1], target_size[1], block_x, alignment)
    window = max(16, triton.next_power_of_2(window))
    if slots > MAX_SLOTS or window > MAX_WINDOW:  # shrinking by more than four, or a different model
        return reference.panoptic_head(
            mask_logits, network_size, target_size, mask_threshold, count_threshold, overlap_threshold
        )

    device = mask_logits.device
    segmentation = torch.empty((batch, *target_size), dtype=torch.int32, device=device)
    probability = torch.empty((batch, *target_size), dtype=torch.float32, device=device)
    counts = torch.zeros((batch, 6, slots), dtype=torch.int32, device=device)
    scores = torch.zeros((batch, slots), dtype=torch.int64, device=device)
    grid = (triton.cdiv(target_size[1], block_x), triton.cdiv(target_size[0], config.constants["BLOCK_Y"]), batch)
    unsure = torch.empty(grid, dtype=torch.int32, device=device)
    for careful in (False, True):
        launch(
            panoptic_tile_kernel,
            grid,
            *(mask_logits, segmentation, probability, counts, unsure, mask_threshold, least_logit(mask_threshold)),
            *(slots, height, width, *network_size, *target_size),
            *(height / network_size[0], width / network_size[1]),
            *(network_size[0] / target_size[0], network_size[1] / target_size[1]),
            *mask_logits.stride(),
            config=config,
            CAREFUL=careful,
            INTERPRETED=triton.knobs.runtime.interpret,
            ALL_SLOTS=slots == block_q,
            ALIGNMENT=alignment,
            WINDOW=window,
            SOURCE_ROWS=3 if height <= network_size[0] else 4,
            BLOCK_Q=block_q,
        )
    config = find_config("panoptic_statistics", "all")
    launch(
        panoptic_statistics_kernel,
        (
            triton.cdiv(target_size[1], config.constants["BLOCK_X"]),
            triton.cdiv(target_size[0], config.constants["BLOCK_Y"]),
            batch,
        ),
        *(segmentation, probability, counts, scores, slots, *target_size),
        config=config,
    )
    area = torch.empty((batch, slots), dtype=torch.int32, device=device)
    box = torch.empty((batch, slots, 4), dtype=torch.int32, device=device)
    score = torch.empty((batch, slots), dtype=torch.float32, device=device)
    config = find_config("panoptic_filter", "all")
    launch(
        panoptic_filter_kernel,
        (triton.cdiv(target_size[0] * target_size[1], config.constants["BLOCK"]), batch),
        *(segmentation, counts, scores, area, box, score, count_threshold),
        *(struct.unpack("<q", struct.pack("<d", overlap_threshold))[0], slots, *target_size),
        config=config,
        BLOCK_Q=block_q,
    )
    return segmentation, probability, area, box, score
