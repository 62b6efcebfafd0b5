"""Plain torch: what the kernel must equal."""

import torch.nn.functional as F
from torch import Tensor

from ldmseg_fast.kernels.backend import at_least_float32


def geglu(x: Tensor) -> Tensor:  # [..., 2 C] -> [..., C]
    """Computes value * gelu(gate) of x = [value, gate] (Shazeer, arXiv 2002.05202, equation 6).

    All arithmetic is in float32 or better; x is [..., 2 C], the result [..., C] of its dtype.
    """
    value, gate = at_least_float32(x).chunk(2, dim=-1)
    return (value * F.gelu(gate)).to(x.dtype)
