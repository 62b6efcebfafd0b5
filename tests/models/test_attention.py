"""The backends of attention agree, forward and backward."""

import pytest
import torch

from ldmseg_fast.models.attention import attention


@pytest.mark.parametrize("lengths", [(64, 64), (16, 77), (300, 300)])
def test_training_in_bfloat16_agrees_with_float32(lengths: tuple[int, int]) -> None:
    queries, keys = lengths
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, queries, 3, 24), (2, keys, 3, 24), (2, keys, 3, 24)]
    exact = [torch.randn(shape, generator=generator).bfloat16().float().requires_grad_() for shape in shapes]
    half = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    expected, result = attention(*exact, backend="sdpa"), attention(*half)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), expected, rtol=0.02, atol=0.01)
    weights = torch.randn(expected.shape, generator=generator)
    (expected * weights).sum().backward()
    (result.float() * weights).sum().backward()
    for ours, reference in zip(half, exact):
        torch.testing.assert_close(ours.grad.float(), reference.grad, rtol=0.05, atol=0.02)


def test_an_unknown_backend_is_named() -> None:
    q = torch.zeros(1, 2, 1, 8)
    with pytest.raises(ValueError, match="attention='flash'"):
        attention(q, q, q, backend="flash")
