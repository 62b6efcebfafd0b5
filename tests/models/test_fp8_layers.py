"""Layers of e4m3 numbers are products of these very numbers, and what they lose is what rounding loses."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldmseg_fast.config import UNetConfig
from ldmseg_fast.models import fp8_layers
from ldmseg_fast.models.fp8_layers import FP8Conv2d, FP8Linear, quantise, use_fp8
from ldmseg_fast.models.unet import FeatureCache, UNet

CONFIG = UNetConfig(
    block_out_channels=(16, 32), layers_per_block=1, num_heads=(2, 4), attention=(True, True), norm_groups=4,
    sample_size=16,
)  # fmt: skip


def rounded(x: torch.Tensor) -> torch.Tensor:
    codes, scale = quantise(x)
    return codes.float() * scale.view(-1, *[1] * (x.ndim - 1))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", [(3, 32), (2, 7, 32), (1, 2, 3, 32)], ids=str)
def test_a_product_is_one_of_rounded_numbers(shape):
    layer, x = nn.Linear(32, 48), 100 * torch.randn(shape)
    found = FP8Linear(layer.weight, layer.bias)(x)
    torch.testing.assert_close(found, F.linear(rounded(x), rounded(layer.weight), layer.bias), rtol=1e-5, atol=1e-4)
    assert (found - layer(x)).norm() < 0.06 * layer(x).norm()


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(1, 1, 0), (3, 1, 1), (3, 2, 1), (1, 2, 0)])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_convolution_is_one_of_rounded_numbers(kernel, stride, padding, bias):
    layer = nn.Conv2d(16, 32, kernel, stride, padding, bias=bias)
    x = torch.randn(3, 16, 9, 12).contiguous(memory_format=torch.channels_last)
    x[1] *= 1000  # a picture's scale is its own
    found = FP8Conv2d(layer)(x)
    expected = F.conv2d(rounded(x), rounded(layer.weight), layer.bias, stride, padding)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_kernel_of_a_gpu_computes_what_is_emulated(dtype, stride, bias, monkeypatch):
    """Its reference stands in for it; without the kernel windows are multiplied as before."""
    layer, x = FP8Conv2d(nn.Conv2d(16, 32, 3, stride, 1, bias=bias)), torch.randn(3, 16, 9, 12).to(dtype)
    emulated = layer(x)
    layer.emulated = False
    calls = []
    monkeypatch.setattr(fp8_layers, "runs_reference", lambda *_: False)
    kernel = fp8_layers.convolution
    monkeypatch.setattr(fp8_layers, "convolution", lambda *args, **what: calls.append(1) or kernel(*args, **what))
    found = layer(x.contiguous(memory_format=torch.channels_last))
    assert calls and found.dtype == dtype
    torch.testing.assert_close(found, emulated, rtol=2**-7, atol=2**-7)


def test_many_windows_go_one_picture_after_the_other(monkeypatch):
    layer, x = FP8Conv2d(nn.Conv2d(16, 16, 3, padding=1)), torch.randn(3, 16, 8, 8)
    expected = layer(x)
    monkeypatch.setattr(fp8_layers, "MAX_WINDOWS", 1)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_operator_of_a_gpu_computes_what_is_emulated(bias):
    layer, x = nn.Linear(64, 48, bias=bias), torch.randn(2, 5, 64)
    fast = FP8Linear(layer.weight, layer.bias)
    emulated = fast(x)
    fast.emulated = False  # a CPU has the operator too
    for other in (x, x[:1].mT.contiguous().mT):  # as features of a picture that is not channels_last
        torch.testing.assert_close(fast(other), emulated[: len(other)], rtol=2**-7, atol=2**-7)


def test_zeros_stay_and_what_is_not_finite_shows():
    layer = FP8Linear(torch.randn(16, 16))
    assert torch.equal(layer(torch.zeros(2, 16)), torch.zeros(2, 16))
    assert layer(torch.zeros(0, 3, 16)).shape == (0, 3, 16)
    for value in (torch.nan, torch.inf):
        x = torch.ones(2, 16)
        x[0, 3] = value
        assert layer(x)[0].isnan().all() and layer(x)[1].isfinite().all()


def test_a_unet_loses_what_rounding_loses_and_three_quarters_of_its_bytes():
    unet = UNet(CONFIG).eval().requires_grad_(False)
    unet.fuse_qkv()
    unet.fuse_time()
    sample, times = torch.randn(2, CONFIG.in_channels, 16, 16), torch.tensor([7, 930])
    expected = unet(sample, times)
    blocks = (unet.down_blocks, unet.mid_block, unet.up_blocks)
    before = sum(value.nbytes for block in blocks for name, value in block.named_parameters() if "time" not in name)
    assert use_fp8(unet) > 20
    assert type(unet.conv_in) is type(unet.conv_out) is nn.Conv2d
    found = unet(sample, times)
    assert 0 < (found - expected).norm() < 0.1 * expected.norm()
    assert torch.equal(unet(sample, times, None, FeatureCache(1)), found)
    torch.testing.assert_close(unet(sample[:1], times[:1]), found[:1])  # whatever else is in the batch
    values = [
        value
        for block in blocks
        for name, value in (*block.named_parameters(), *block.named_buffers())
        if "time" not in name
    ]
    assert sum(value.nbytes for value in values) < 0.4 * before  # scales, biases and norms stay wide


def test_layers_of_odd_sides_stay():
    unet = UNet(UNetConfig(block_out_channels=(8, 24), num_heads=(1, 1), attention=(True, True), norm_groups=4))
    unet.fuse_qkv()
    use_fp8(unet)
    assert all(type(block.conv1) is nn.Conv2d for block in unet.down_blocks[1].resnets[:1])
    sample = torch.randn(1, unet.config.in_channels, 8, 8)
    assert unet(sample, torch.tensor([3])).isfinite().all()
