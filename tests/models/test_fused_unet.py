"""The UNet of few launches is the plain one: the same function of the same weights, in every configuration it takes."""

from dataclasses import replace

import pytest
import torch

from ldmseg_fast.config import UNetConfig
from ldmseg_fast.models.epilogue_unet import EpilogueUNet
from ldmseg_fast.models.fused_unet import FusedUNet, why_not_fused
from ldmseg_fast.models.layers import GroupNorm
from ldmseg_fast.models.unet import FeatureCache, UNet

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = UNetConfig(
    block_out_channels=(16, 32, 32), layers_per_block=2, num_heads=(2, 4, 4), attention=(True, True, False),
    norm_groups=4, sample_size=16,
)  # fmt: skip
CONFIGS = {
    "as Stable Diffusion's": SMALL,
    "linear projections, two blocks": replace(SMALL, linear_projection=True, transformer_layers=2),
    "parts of the input apart": replace(SMALL, separate_conv_in=True),
    "no attention": replace(SMALL, attention=(False, False, False), mid_attention=False),
    "equal widths": replace(SMALL, block_out_channels=(16, 16, 16), layers_per_block=1),
}


def make_unet(config: UNetConfig, dtype: torch.dtype = torch.float32, device: str = "cpu") -> UNet:
    """With random biases, and norms that are no identity."""
    torch.manual_seed(0)
    unet = UNet(config).eval().requires_grad_(False)
    for name, parameter in unet.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()
        elif "norm" in name:
            parameter.add_(0.3 * torch.randn_like(parameter))
    unet = unet.to(device, dtype).to(memory_format=torch.channels_last)
    unet.fuse_qkv()
    unet.fuse_time()
    return unet


def make_inputs(config: UNetConfig, batch: int = 2):
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(batch, config.in_channels, 16, 24, generator=generator)
    return sample, torch.tensor([7, 930, 400][:batch])


@pytest.mark.parametrize("form", [FusedUNet, EpilogueUNet])
@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_same_function(name, form):
    unet = make_unet(CONFIGS[name])
    sample, times = make_inputs(unet.config)
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    kept = sample.clone()
    fused = form(unet)
    expected = unet(sample, times)
    for _ in range(2):  # nothing of the first call is left in the second
        torch.testing.assert_close(fused(sample, times), expected, rtol=1e-4, atol=1e-4)
    time = fused.embed_time(times[:1], sample.dtype)[0]
    one = fused.denoise(sample, time.expand(2, *time.shape))
    torch.testing.assert_close(one, unet(sample, times[:1].expand(2)), rtol=1e-4, atol=1e-4)
    assert torch.equal(sample, kept)
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())


@pytest.mark.parametrize("attention", [False, True])
def test_no_norm_reads_its_features_twice(attention):
    """What makes features leaves their moments, whether it is a convolution, a shortcut, a transformer or a join."""
    config = replace(SMALL, block_out_channels=(16, 32, 64), attention=(True, True, attention), layers_per_block=1)
    unet = make_unet(config)
    calls = []
    norms = [module for module in unet.modules() if isinstance(module, GroupNorm)]
    for norm in norms:
        norm.register_forward_hook(lambda *_: calls.append(1))
    sample, times = make_inputs(config)
    found = EpilogueUNet(unet)(sample, times)
    assert not calls
    torch.testing.assert_close(found, unet(sample, times), rtol=1e-4, atol=1e-4)
    assert len(calls) == len(norms)


def test_it_is_no_worse_than_the_plain_one_in_half_precision():
    config = CONFIGS["as Stable Diffusion's"]
    exact_unet, half_unet = make_unet(config), make_unet(config, torch.bfloat16, DEVICE)
    exact_unet.load_state_dict({key: value.float() for key, value in half_unet.state_dict().items()})
    exact_unet.fuse_qkv()
    exact_unet.fuse_time()
    sample, times = make_inputs(config)
    half = sample.bfloat16()
    exact = exact_unet(half.float(), times)
    networks = (half_unet, FusedUNet(half_unet), EpilogueUNet(half_unet))
    args = (half.to(DEVICE), times.to(DEVICE))
    plain, *fused = ((network(*args).float().cpu() - exact).norm() for network in networks)
    assert max(fused) < 1.2 * plain


def test_a_cache_is_the_plain_one_s():
    unet = make_unet(SMALL)
    sample, times = make_inputs(SMALL)
    fused = FusedUNet(unet)
    caches = FeatureCache(2), FeatureCache(2)
    for _ in range(2):
        assert torch.equal(fused(sample, times, None, caches[0]), unet(sample, times, None, caches[1]))


def test_what_it_does_not_have_is_named():
    assert why_not_fused(SMALL) == ""
    assert "no cross-attention" in why_not_fused(replace(SMALL, conditioning="learned", cross_attention_dim=8))
    assert "separate_image_encoder" in why_not_fused(replace(SMALL, separate_image_encoder=True))
