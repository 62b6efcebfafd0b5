"""The mask auto-encoder's loss on sampled points (PointRend, arXiv 1912.08193): sampling fused with the terms."""

from ldmseg_fast.kernels.point_loss.op import (
    point_logits,
    point_margin,
    sample_ce,
    sample_losses,
    slot_logits,
)

__all__ = ["point_logits", "point_margin", "sample_ce", "sample_losses", "slot_logits"]
