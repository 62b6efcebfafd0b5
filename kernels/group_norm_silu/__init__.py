"""GroupNorm with what follows it in a ResNet block: time embedding, SiLU, residual."""

from ldmseg_fast.kernels.group_norm_silu.op import group_norm_silu

__all__ = ["group_norm_silu"]
