"""Print how far attention with e4m3 products is from exact attention, beside what half precision costs.

    python -m ldmseg_fast.kernels.fp8_error [--tokens 1024] [--images 2] [--heads 4]

The error is relative: the norm of the difference over that of the exact result, computed in float64. The column "only
q k" keeps weights and values in bfloat16, which is the other way to build such a kernel. Inputs: normal numbers, the
same with scores three times as wide (few keys count), and keys and values that have a mean in every channel.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ldmseg_fast.kernels.attention import reference

HEAD_SIZES = (40, 64, 80, 128, 160)
INPUTS = ("normal", "wide scores", "channel means")


def make_inputs(kind: str, images: int, tokens: int, heads: int, head_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draws q, k and v, bfloat16 [B, N, heads, d] each; `kind` is one of INPUTS."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn((3, images, tokens, heads, head_size), generator=generator)
    if kind == "wide scores":
        q = q * 3
    if kind == "channel means":
        k, v = (x + torch.randn((1, 1, heads, head_size), generator=generator) for x in (k, v))
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


def only_scores(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Computes attention with scores from e4m3 q and k; weights and values are bfloat16.

    Args:
        q, k, v: bfloat16 [B, N, heads, d].
        scale: of the scores.

    Returns:
        bfloat16 [B, N, heads, d].
    """
    (q8, q_unit), (k8, k_unit) = reference.quantise(q), reference.quantise(k)
    factor = (q_unit * k_unit).transpose(1, 2) * scale
    weights = (torch.einsum("bnhd,bmhd->bhnm", q8, k8) * factor).softmax(-1)
    return torch.einsum("bhnm,bmhd->bnhd", weights.bfloat16().float(), v.float()).bfloat16()


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Computes the norm of the difference over that of the exact result, float64 of any shape."""
    return float((actual.double() - exact).norm() / exact.norm())


def rows(images: int, tokens: int, heads: int) -> Iterator[tuple[str, int, float, float, float]]:
    """Yields (inputs, head size, error of torch in bfloat16, of e4m3 scores only, of all products in e4m3)."""
    for kind in INPUTS:
        for head_size in HEAD_SIZES:
            q, k, v = make_inputs(kind, images, tokens, heads, head_size)
            scale = 1 / math.sqrt(head_size)
            exact, _ = reference.attention_forward(q.double(), k.double(), v.double(), scale)
            results = (run(q, k, v, scale) for run in (reference.attention, only_scores, reference.attention_fp8))
            half, scores, whole = (relative_error(result, exact) for result in results)
            yield kind, head_size, half, scores, whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    options = parser.parse_args(arguments)
    print(f"{'inputs':<15}{'d':>5}{'bfloat16':>12}{'e4m3 only q k':>20}{'e4m3 all':>15}")
    for kind, head_size, half, scores, whole in rows(options.images, options.tokens, options.heads):
        print(f"{kind:<15}{head_size:>5}{half:>12.4f}{scores:>20.4f}{whole:>15.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
