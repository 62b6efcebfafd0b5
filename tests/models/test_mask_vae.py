"""Mask auto-encoder: shapes of every size, the four bottlenecks, the published number of parameters."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ldmseg_fast.config import MaskVAEConfig
from ldmseg_fast.models import posterior
from ldmseg_fast.models.mask_vae import ChannelLayerNorm, MaskVAE

SMALL = MaskVAEConfig(num_bits=4, num_slots=16, widths=(8, 16, 16), decoder_width=16, num_upscalers=1, norm_groups=4)


def test_published_size_and_names():
    with torch.device("meta"):
        state = MaskVAE(MaskVAEConfig()).state_dict()
    assert round(sum(value.numel() for value in state.values()) / 1e6, 2) == 2.02
    positions = {"encoder": (0, 2, 3, 5, 6, 8, 9, 11, 13, 15), "decoder": (0, 2, 3, 5, 6, 8, 10)}
    expected = {f"{part}.{i}.{kind}" for part, where in positions.items() for i in where for kind in ("weight", "bias")}
    assert state.keys() == expected


@pytest.mark.parametrize("upscalers", [1, 2, 3])
@pytest.mark.parametrize("mid_blocks", [0, 1, 2])
@torch.no_grad()
def test_shapes(upscalers, mid_blocks):
    config = MaskVAEConfig(
        num_bits=5,
        num_slots=30,
        widths=(8, 8, 16, 16),
        middle_width=24,
        decoder_width=16,
        upscale_width=8,
        num_upscalers=upscalers,
        num_mid_blocks=mid_blocks,
        norm_groups=4,
    )
    vae = MaskVAE(config)
    bits = torch.randn(2, 5, 32, 48)
    found = vae.encode(bits)
    assert found.mean.shape == found.logvar.shape == (2, 4, 4, 6)
    assert torch.equal(vae.encode_latents(bits), found.mode() * config.scaling_factor)
    logits = vae.decode(found.mean)
    assert logits.shape == (2, 30, 4 * 2**upscalers, 6 * 2**upscalers)
    torch.testing.assert_close(vae.decode_latents(vae.encode_latents(bits)), logits, rtol=1e-4, atol=1e-5)
    assert vae.upsample(logits).shape == (2, 30, 32, 48)
    assert {key for key in vae.state_dict() if key.startswith("decoder.1.")} == {
        f"decoder.1.resnets.{i}.{layer}.{kind}"
        for i in range(2 if mid_blocks else 0)
        for layer in ("norm1", "conv1", "norm2", "conv2")
        for kind in ("weight", "bias")
    }


@torch.no_grad()
def test_mid_block_is_diffusers():
    from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D

    theirs = UNetMidBlock2D(
        in_channels=16, temb_channels=None, add_attention=False, resnet_eps=1e-6, resnet_groups=4
    ).eval()
    ours = MaskVAE(replace(SMALL, num_mid_blocks=1)).decoder[1]
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 16, 4, 4)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_layer_norm_runs_over_channels():
    norm = ChannelLayerNorm(6)
    x = torch.randn(2, 6, 3, 5)
    expected = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    torch.testing.assert_close(norm(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parametrization", ["gaussian", "auto", "discrete", "gumbel"])
def test_each_bottleneck_learns(parametrization):
    torch.manual_seed(0)
    vae = MaskVAE(replace(SMALL, parametrization=parametrization, codebook_size=16))
    ids = torch.randint(0, 16, (4, 4, 4)).repeat_interleave(4, 1).repeat_interleave(4, 2)
    bits = ((ids[:, None] >> torch.arange(4)[:, None, None]) & 1) * 2.0 - 1.0
    optimizer = torch.optim.AdamW(vae.parameters(), 3e-3)
    losses = []
    for _ in range(8):
        found = vae.encode(bits)
        loss = F.cross_entropy(vae.upsample(vae.decode(found.sample())), ids)
        if found.loss is not None:
            assert found.loss.ndim == 0
            loss = loss + found.loss
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in vae.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        assert torch.equal(vae.eval().encode(bits).mode(), vae.encode(bits).mode())


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        ("none", lambda x: x),
        ("tanh", torch.tanh),
        ("sigmoid", torch.sigmoid),
        ("clip", lambda x: x.clamp(-1, 1)),
        ("l2", lambda x: x / x.norm(dim=1, keepdim=True)),
    ],
)
def test_output_activations(activation, expected):
    x = torch.randn(2, 4, 3, 3) * 3
    found = posterior.point(x, activation)
    torch.testing.assert_close(found.mode(), expected(x))
    assert torch.equal(found.sample(), found.mode())
    assert torch.equal(found.kl(), torch.zeros(2))


def test_gaussian_posterior_is_torchs():
    moments = torch.randn(3, 8, 2, 2) * 2
    moments[0, 5] = 100.0
    moments[1, 6] = -100.0
    found = posterior.gaussian(moments)
    assert found.logvar.max() == 20
    assert found.logvar.min() == -30
    reference = torch.distributions.Normal(found.mean.double(), (0.5 * found.logvar.double()).exp())
    standard = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64))
    expected = torch.distributions.kl_divergence(reference, standard).sum((1, 2, 3))
    torch.testing.assert_close(found.kl().double(), expected, rtol=1e-5, atol=1e-4)
    noise = torch.randn(3, 4, 2, 2)
    torch.testing.assert_close(found.sample(noise).double(), reference.loc + reference.scale * noise)


def test_a_codebook_takes_the_nearest_entry():
    torch.manual_seed(0)
    book = posterior.Codebook(8, 4)
    latents = book.embedding[[3, 7]].detach().view(1, 2, 4, 1).permute(0, 2, 1, 3) + 1e-4
    latents.requires_grad_()
    found = book(latents)
    torch.testing.assert_close(found.mode()[0, :, 0, 0], book.embedding[3])
    torch.testing.assert_close(found.mode()[0, :, 1, 0], book.embedding[7])
    found.mode().sum().backward()
    assert torch.equal(latents.grad, torch.ones_like(latents))  # straight through
