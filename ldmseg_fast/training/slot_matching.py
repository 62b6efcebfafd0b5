"""Finds which slot a segment is: the assignment of predicted slots to true segments that costs least.

Where ids are arbitrary, a prediction may name the segments otherwise than the annotation does and be as right. The cost
of a pair is what the auto-encoder's loss would be for it (as Cheng et al. 2022, Mask2Former, section 3.3.1, with the
cross-entropy over slots in the place of the class), on points that all pairs of an image share.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldmseg_fast.config import LossConfig
from ldmseg_fast.errors import ConfigError
from ldmseg_fast.kernels.point_loss import point_logits

GIVEN = 1e8  # above any sum of costs, so that a given pair is always part of the best assignment


def require_assignment_solver() -> None:
    """Checks that SciPy, whose Hungarian algorithm is used, is installed.

    Raises:
        ConfigError: it is not.
    """
    try:
        import scipy.optimize  # noqa: F401
    except ImportError:
        raise ConfigError(
            "few_step.matching=hungarian needs SciPy: pip install 'ldmseg_fast[train]', or few_step.matching=none"
        ) from None


@torch.no_grad()
def matching_costs(logits: Tensor, dense: Tensor, num_segments: int, config: LossConfig) -> Tensor:
    """Computes the cost of giving slot q to segment m, for one image.

    Args:
        logits: float32 [Q, P] at P points.
        dense: integer [P], the segment at each point: 1..num_segments, 0 = void.
        num_segments: M.
        config: weights of CE, BCE and Dice.

    Returns:
        float32 [M, Q - 1]: slots 1..Q-1; slot 0 is void and no segment's.
    """
    target = F.one_hot(dense.long(), num_segments + 1)[:, 1:].T.to(logits.dtype)  # [M, P]
    slots = logits[1:]  # [Q - 1, P]
    area = target.sum(1, keepdim=True)  # [M, 1]
    ce = -(target @ logits.log_softmax(0)[1:].T) / area.clamp(min=1)
    bce = (F.softplus(slots).sum(1) - target @ slots.T) / logits.shape[1]
    probability = slots.sigmoid()
    dice = 1 - (2 * target @ probability.T + 1) / (area + probability.sum(1) + 1)
    return config.ce * ce + config.bce * bce + config.dice * dice


@torch.no_grad()
def match_slots(
    mask_logits: Tensor, segment_ids: Tensor, points: Tensor, config: LossConfig, given: Tensor | None = None
) -> Tensor:
    """Finds the table of slots under which `mask_logits` fit the segments best (Kuhn 1955; Crouse 2016, as in SciPy).

    Args:
        mask_logits: [B, Q, h, w], any float type.
        segment_ids: integer [B, H, W], dense: 1..M segments of an image, 0 = void; M < Q.
        points: float [B, P, 2], (x, y) in [0, 1], where the two are compared.
        config: weights of the costs.
        given: integer [B, 256], the slots of the segments that the model was told, which stay; 0 for those to match.

    Returns:
        int64 [B, 256], dense id -> slot, 0 where an id is void or absent; distinct slots within an image.
    """
    from scipy.optimize import linear_sum_assignment

    batch, height, width = segment_ids.shape
    logits = point_logits(mask_logits.detach().float(), points)  # [B, Q, P]
    x = (points[..., 0] * width).long().clamp(0, width - 1)
    y = (points[..., 1] * height).long().clamp(0, height - 1)
    dense = segment_ids.flatten(1).long().gather(1, y * width + x)  # [B, P]
    counts = segment_ids.flatten(1).amax(1).tolist()
    table = torch.zeros(batch, 256, dtype=torch.int64)
    for row, count in enumerate(counts):
        if count == 0:
            continue
        costs = matching_costs(logits[row], dense[row], count, config).nan_to_num(nan=1e4, posinf=1e4, neginf=-1e4)
        if given is not None:
            told = given[row, 1 : count + 1].nonzero().flatten()
            costs[told, given[row, told + 1].long() - 1] -= GIVEN
        segments, slots = linear_sum_assignment(costs.cpu().numpy().astype(np.float64))
        table[row, torch.from_numpy(segments) + 1] = torch.from_numpy(slots) + 1
    return table.to(mask_logits.device)
