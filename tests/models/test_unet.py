"""The UNet is diffusers' UNet2DConditionModel, with and without cross-attention."""

from dataclasses import replace

import pytest
import torch

from ldmseg_fast.config import UNetConfig
from ldmseg_fast.models.layers import timestep_embedding
from ldmseg_fast.models.unet import UNet, input_parts

SMALL = UNetConfig(
    in_channels=12,
    block_out_channels=(16, 32),
    attention=(True, False),
    layers_per_block=1,
    num_heads=(2, 2),
    norm_groups=8,
)


def diffusers_unet(config: UNetConfig, cross_attention_dim: int):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    names = [("CrossAttn" if attended else "") for attended in config.attention]
    return UNet2DConditionModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=config.block_out_channels,
        down_block_types=tuple(f"{name}DownBlock2D" for name in names),
        up_block_types=tuple(f"{name}UpBlock2D" for name in reversed(names)),
        layers_per_block=config.layers_per_block,
        attention_head_dim=config.num_heads,
        norm_num_groups=config.norm_groups,
        norm_eps=config.norm_eps,
        cross_attention_dim=cross_attention_dim,
        use_linear_projection=config.linear_projection,
        transformer_layers_per_block=config.transformer_layers,
    ).eval()


CASES = {
    "sd1": replace(SMALL, block_out_channels=(16, 32, 32, 32), attention=(True, True, True, False), num_heads=(2,) * 4),
    "sd2": replace(SMALL, linear_projection=True, num_heads=(2, 4), attention=(True, True)),
    "two layers": replace(SMALL, layers_per_block=2),
    "two transformers": replace(SMALL, transformer_layers=2, norm_eps=1e-6),
    "eight channels in": replace(SMALL, in_channels=8),
}


@pytest.mark.parametrize("case", CASES)
def test_parity_with_diffusers(case):
    config = CASES[case]
    theirs = diffusers_unet(config, cross_attention_dim=20)
    sample = torch.randn(2, config.in_channels, 16, 8)
    timesteps, context = torch.tensor([3, 741]), torch.randn(2, 7, 20)

    ours = UNet(replace(config, conditioning="learned", cross_attention_dim=20)).eval()
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        expected = theirs(sample, timesteps, encoder_hidden_states=context).sample
        torch.testing.assert_close(ours(sample, timesteps, context), expected, rtol=1e-5, atol=1e-5)

    for name, parameter in theirs.named_parameters():
        if "attn2.to_out.0.bias" in name:
            torch.nn.init.zeros_(parameter)  # then a zero context adds nothing
    plain = UNet(config).eval()
    plain.load_state_dict({name: value for name, value in theirs.state_dict().items() if name in plain.state_dict()})
    inputs = [sample.clone().requires_grad_(), sample.clone().requires_grad_()]
    expected = theirs(inputs[0], timesteps, encoder_hidden_states=torch.zeros_like(context)).sample
    actual = plain(inputs[1], timesteps)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (actual * weight).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-4, atol=1e-5)


def test_timestep_embedding_is_diffusers():
    from diffusers.models.embeddings import get_timestep_embedding

    timesteps = torch.tensor([0, 1, 500, 999])
    expected = get_timestep_embedding(timesteps, 32, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_embedding(timesteps, 32), expected, rtol=1e-6, atol=1e-6)


def test_published_size():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        ours = UNet(UNetConfig()).state_dict()
        theirs = UNet2DConditionModel(in_channels=12, cross_attention_dim=768).state_dict()
    kept = {name for name in theirs if "attn2" not in name and not ("transformer_blocks" in name and "norm2" in name)}
    assert {name: value.shape for name, value in ours.items()} == {name: theirs[name].shape for name in kept}
    assert round(sum(value.numel() for value in ours.values()) / 1e6, 1) == 815.6


def test_activation_checkpointing_changes_nothing():
    torch.manual_seed(0)
    unet, sample, timesteps = UNet(SMALL), torch.randn(1, 12, 8, 8), torch.tensor([5])
    gradients = []
    for checkpointing in (False, True):
        unet.checkpointing = checkpointing
        unet.zero_grad()
        unet(sample, timesteps).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in unet.parameters()])
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(plain, recomputed)


@torch.no_grad()
def test_fused_projections_change_nothing():
    unet = UNet(replace(SMALL, conditioning="learned", cross_attention_dim=16)).eval()
    inputs = torch.randn(2, 12, 8, 8), torch.tensor([5, 900]), torch.randn(2, 3, 16)
    before = unet(*inputs)
    names = unet.state_dict().keys()
    unet.fuse_qkv()
    unet.fuse_time()
    torch.testing.assert_close(unet(*inputs), before, rtol=1e-5, atol=1e-5)
    assert unet.state_dict().keys() == names
    unet.unfuse()
    assert torch.equal(unet(*inputs), before)
    assert unet.half().fused_time is None and not any(getattr(m, "time_slice", None) for m in unet.modules())


@torch.no_grad()
def test_the_fused_time_is_what_each_block_computes():
    unet = UNet(replace(SMALL, separate_conv_in=True, separate_image_encoder=True)).eval()
    time = torch.randn(2, unet.time_embedding.linear_2.out_features)
    unet.fuse_time()
    found = unet.project_time(time)
    blocks = [module for module in unet.modules() if getattr(module, "time_slice", None)]
    assert found.shape[1] == sum(block.time_emb_proj.out_features for block in blocks) and len(blocks) > 8
    for block in blocks:
        torch.testing.assert_close(found[:, block.time_slice], block.time_emb_proj(time))


@torch.no_grad()
@pytest.mark.parametrize("change", [{}, {"separate_conv_in": True, "separate_image_encoder": True}])
def test_one_graph_for_every_input(change):
    """Nothing in the forward pass depends on data, or the compiler would break the graph."""
    unet = UNet(replace(SMALL, **change)).eval()
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    for time in (0, 999):
        sample, timesteps = torch.randn(1, 12, 8, 8), torch.tensor([time])
        torch.testing.assert_close(compiled(sample, timesteps), unet(sample, timesteps))


def test_separate_inputs():
    config = replace(SMALL, separate_conv_in=True, separate_image_encoder=True)
    assert input_parts(config) == [4, 4, 4]
    assert input_parts(replace(config, in_channels=8)) == [4, 4]
    unet = UNet(config)
    sample, timesteps = torch.randn(1, 12, 8, 8), torch.tensor([5])
    unet(sample, timesteps).square().mean().backward()
    assert unet.image_projections[0].weight.grad.abs().max() > 0
    torch.nn.init.normal_(unet.image_projections[-1].weight)
    other = sample.clone()
    other[:, 4:8] += 1
    with torch.no_grad():
        for part in unet.conv_in.parts[1:2]:
            torch.nn.init.zeros_(part.weight)
        assert not torch.allclose(unet(sample, timesteps), unet(other, timesteps))


def test_a_context_is_asked_for():
    unet = UNet(replace(SMALL, conditioning="clip_text", cross_attention_dim=16))
    with pytest.raises(ValueError, match=r"unet\.conditioning=clip_text: the UNet needs `context`"):
        unet(torch.randn(1, 12, 8, 8), torch.tensor([5]))
