"""Lists the shapes of the kernel that count, and launches where every size is 1."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ldmseg_fast.kernels.attention import host, reference
from ldmseg_fast.kernels.case import Case, meta, normal


def cases() -> Iterator[Case]:
    """Yields the cases of the kernel; they reach every entry of its table."""
    shapes = [(1, 4096, 40), (4, 4096, 40), (16, 4096, 40), (16, 1024, 80), (16, 256, 160), (4, 4095, 40)]
    shapes += [(4, 1024, 64), (4, 1024, 128)]  # what other models use
    shapes += [(1, 1024, 40), (1, 1024, 80), (1, 256, 160), (1, 1024, 128)]  # few programs

    def forward_backward(q, k, v, scale):
        out, logsumexp = host.attention_forward(q, k, v, scale)
        return out, *host.attention_backward(torch.ones_like(out), q, k, v, out, logsumexp, scale)

    for batch, tokens, head_size in shapes:
        for dtype in (torch.float16, torch.bfloat16) if (batch, tokens) == (4, 4096) else (torch.bfloat16,):
            heads, scale = 8, head_size**-0.5
            pairs = batch * heads * tokens * tokens
            element = batch * tokens * heads * head_size * 2

            def make(device, shape=(batch, tokens, 3, heads, head_size), dtype=dtype, scale=scale):
                qkv = normal(*shape, device=device, dtype=dtype)  # one fused projection
                return *qkv.unbind(2), scale

            about: dict[str, Any] = {
                "dtype": dtype,
                "batch": batch,
                "make": make,
                "torch": reference.attention,
            }
            about |= {"exponentials": pairs, "headline": batch == 4 and tokens == 4096 and dtype == torch.bfloat16}
            name = f"[{batch}, {tokens}, {heads}, {head_size}]"
            yield Case(
                "attention",
                f"forward {name}",
                triton=lambda *arguments: host.attention_forward(*arguments)[0],
                bytes_moved=4 * element,
                operations=4 * pairs * head_size,
                **about,
            )
            if dtype == torch.bfloat16 and tokens % 128 == 0 and head_size != 64:
                yield Case(
                    "attention",
                    f"forward fp8 {name}",
                    triton=host.attention_fp8,
                    bytes_moved=4 * element,  # the e4m3 copies of q, k and v may stay in L2
                    operations=4 * pairs * head_size,
                    fp8=True,
                    **about,
                )
            yield Case(
                "attention",
                f"forward, backward {name}",
                triton=forward_backward,
                bytes_moved=12 * element,
                operations=14 * pairs * head_size,  # two products, then scores again and four
                leaves=(0, 1, 2),
                **about,
            )


def edge_cases() -> Iterator[Callable[[], object]]:
    """Yields functions that launch each kernel on meta tensors whose sizes are all 1 (the head's is 8, the least)."""
    q = meta(1, 1, 1, 8)

    def run() -> None:
        out, logsumexp = host.attention_forward(q, q, q, 1.0)
        host.attention_backward(out, q, q, q, out, logsumexp, 1.0)
        host.attention_fp8(q, q, q, 1.0)

    yield run
