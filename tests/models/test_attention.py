"""The backends of attention agree, forward and backward."""

from dataclasses import replace

import pytest
import torch

from ldmseg_fast.config.presets import TINY
from ldmseg_fast.errors import ArgumentError, BackendError
from ldmseg_fast.kernels import configs
from ldmseg_fast.models.attention import attention, check_backend
from ldmseg_fast.models.unet import UNet


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


@pytest.mark.parametrize("head_size", [12, 168])
def test_head_sizes_that_the_kernel_does_not_take(head_size: int) -> None:
    q = torch.randn(1, 5, 2, head_size)
    assert torch.equal(attention(q, q, q), attention(q, q, q, "sdpa"))
    with pytest.raises(ArgumentError, match=f"attention=fp8 takes no heads of {head_size} channels; use"):
        attention(q, q, q, "fp8")


CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_backends_that_cannot_run_are_refused() -> None:
    q = torch.zeros(1, 2, 1, 8)
    with pytest.raises(BackendError, match="attention=triton needs a GPU, the model is on cpu; use"):
        attention(q, q, q, "triton")
    for name in ("auto", "sdpa"):
        check_backend(name, CPU, torch.float32)
    check_backend("triton", GPU, torch.float32)
    with pytest.raises(ArgumentError, match="attention='flash': one of auto"):
        check_backend("flash", GPU, torch.float16)
    with configs.architecture(89):
        check_backend("fp8", GPU, torch.bfloat16)
        with pytest.raises(BackendError, match="attention=fp8 takes float16 or bfloat16, not float32; use"):
            check_backend("fp8", GPU, torch.float32)
        with pytest.raises(BackendError, match="attention=fp8 needs a GPU of sm_89 or newer, not cpu; use"):
            check_backend("fp8", CPU, torch.bfloat16)
    with configs.architecture(80), pytest.raises(BackendError, match="this is sm_80; use attention=auto"):
        check_backend("fp8", GPU, torch.bfloat16)


def test_a_missing_xformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendError, match="attention=xformers: xformers is not installed"):
        check_backend("xformers", GPU, torch.float16)


def test_fp8_reaches_the_attention_layers_of_a_unet() -> None:
    """On a CPU by the reference, which rounds where the kernel rounds."""
    config = replace(TINY.unet, conditioning="none", cross_attention_dim=0)
    torch.manual_seed(0)
    exact = UNet(config).bfloat16().eval()
    rounded = UNet(config, "fp8").bfloat16().eval()
    rounded.load_state_dict(exact.state_dict())
    x = torch.randn(1, config.in_channels, 8, 8).bfloat16()
    with torch.no_grad():
        expected, result = (unet(x, torch.tensor([500])).float() for unet in (exact, rounded))
    error = float((result - expected).norm() / expected.norm())
    assert 0 < error < 0.1
    with pytest.raises(ValueError, match="fp8: has no gradient"):
        rounded(x, torch.tensor([500]))
