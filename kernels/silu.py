"""Triton: the activation of every normalisation (SiLU: Elfwing et al., arXiv 1702.03118)."""

import triton
import triton.language as tl

MINUS_LOG2_E = tl.constexpr(-1.4426950408889634)


@triton.jit
def silu_of(u, INTERPRETED: tl.constexpr):
    """Computes u / (1 + exp(-u)) by the base-2 exponential and the approximate reciprocal, both within 2 ulp."""
    denominator = 1.0 + tl.math.exp2(u * MINUS_LOG2_E)
    if INTERPRETED:
        return u / denominator
    reciprocal = tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [denominator], dtype=tl.float32, is_pure=True, pack=1
    )
    return u * reciprocal
