"""Plain torch: what the kernel and the C++ helper must equal."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmseg_fast.kernels.backend import at_least_float32

LARGEST = 3.39e38  # logits are clamped to it, so that no weighted sum of theirs overflows; bfloat16 ends below
UNSOUND_WEIGHT = 1e-4  # more than what two ways of rounding a position differ by


def panoptic_head(
    mask_logits: Tensor,  # [B, Q, h, w]
    network_size: tuple[int, int],
    target_size: tuple[int, int],
    mask_threshold: float,
    count_threshold: int,
    overlap_threshold: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Computes the map and what is known of its segments (arXiv 2401.10227, section 3.3).

    Arguments and results as in `op.panoptic_head`; the logits are float [B, Q, h, w].
    """
    logits = at_least_float32(mask_logits)
    unsound = (~(logits.abs() <= torch.finfo(logits.dtype).max)).to(logits.dtype).amax(1, keepdim=True)  # [B, 1, h, w]
    logits = torch.where(unsound > 0, 0.0, logits.clamp(-LARGEST, LARGEST))
    logits, unsound = (
        F.interpolate(
            F.interpolate(each, network_size, mode="bilinear", align_corners=False),
            target_size,
            mode="bilinear",
            align_corners=False,
        )
        for each in (logits, unsound)
    )  # [B, Q, H, W], [B, 1, H, W]
    sound = unsound[:, 0] <= UNSOUND_WEIGHT  # [B, H, W]
    batch, slots, height, width = logits.shape

    label = logits.argmax(1)  # [B, H, W], the lowest slot among equals
    probability = logits.softmax(1).gather(1, label[:, None])[:, 0].float()  # [B, H, W]
    probability = torch.where(sound, probability, 0.0)
    confident = sound & (probability >= mask_threshold)

    flat_label, flat_confident = label.flatten(1), confident.flatten(1)  # [B, H W]
    zeros = torch.zeros((batch, slots), dtype=torch.int32, device=logits.device)
    area = zeros.scatter_add(1, flat_label, flat_confident.int())  # [B, Q]
    sigmoid_area = (sound[:, None] & (logits.sigmoid() >= mask_threshold)).sum((2, 3))  # [B, Q]
    overlap = area.double() / sigmoid_area.clamp(min=1)
    kept = (area >= count_threshold) & ((sigmoid_area == 0) | (overlap >= overlap_threshold))
    kept[:, :1] = False  # slot 0 is void

    mine = flat_confident & kept.gather(1, flat_label)  # [B, H W]
    segmentation = torch.where(mine.view_as(label), label + 1, 0).int()
    area = area * kept
    total = zeros.double().scatter_add(1, flat_label, torch.where(mine, probability.flatten(1), 0).double())
    score = (total / area.clamp(min=1)).float()

    pixel = torch.arange(height * width, device=logits.device).expand(batch, -1)
    box = []
    for size, position in ((width, pixel % width), (height, pixel // width)):
        low = zeros.long().scatter_reduce(1, flat_label, torch.where(mine, size - position, 0), "amax")  # size - min
        high = zeros.long().scatter_reduce(1, flat_label, torch.where(mine, position + 1, 0), "amax")
        box.append((torch.where(area > 0, size - low, 0), torch.where(area > 0, high - (size - low), 0)))
    (x, w), (y, h) = box
    return segmentation, probability, area, torch.stack([x, y, w, h], 2).int(), score
