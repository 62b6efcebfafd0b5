"""Feature caching: what is computed when, and that nothing changes where nothing can."""

import pytest
import torch

from ldmseg_fast import LDMSegPipeline
from ldmseg_fast.config import UNetConfig
from ldmseg_fast.models.unet import FeatureCache, UNet

CONFIG = UNetConfig(
    in_channels=10,
    out_channels=4,
    block_out_channels=(8, 16, 24),
    attention=(False, True, False),
    num_heads=(2, 2, 2),
    layers_per_block=2,
    norm_groups=4,
)


@pytest.fixture(scope="module", params=[False, True], ids=["one encoder", "separate image encoder"])
def unet(request):
    torch.manual_seed(0)
    config = CONFIG
    if request.param:
        config = UNetConfig(**{**vars(CONFIG), "separate_image_encoder": True, "image_channels": 2})
    network = UNet(config).eval()
    for projection in getattr(network, "image_projections", []):  # zero at the start of training
        torch.nn.init.normal_(projection.weight, std=0.3)
    return network


def inputs(seed):
    return torch.randn(2, 10, 8, 8, generator=torch.Generator().manual_seed(seed)), torch.tensor([500, 500])


@torch.no_grad()
def test_features_of_the_same_input_give_the_same_output(unet):
    """Every branch: nothing is missing, nothing is taken twice."""
    x, times = inputs(0)
    expected = unet(x, times)
    assert unet.num_skips == 9
    for branch in range(unet.num_skips):
        cache = FeatureCache(branch)
        assert torch.equal(unet(x, times, None, cache), expected)
        assert torch.equal(unet(x, times, None, cache), expected)


@torch.no_grad()
def test_deeper_branches_are_nearer(unet):
    (x, times), (other, _) = inputs(0), inputs(1)
    other = x + 0.3 * other
    errors = []
    for branch in range(unet.num_skips):
        cache = FeatureCache(branch)
        unet(x, times, None, cache)
        kept = cache.features
        errors.append((unet(other, times, None, cache) - unet(other, times)).norm().item())
        assert cache.features is kept
    assert 0 < errors[-1] < errors[0]


@torch.no_grad()
def test_deep_layers_do_not_run(unet):
    calls = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, module in unet.named_modules()
        if name.endswith(("conv1", "conv_in", "mid_block", "downsamplers.0", "upsamplers.0"))
    ]
    x, times = inputs(0)
    cache = FeatureCache(3)  # conv_in, two layers of the first level, its downsampling
    unet(x, times, None, cache)
    calls.clear()
    unet(x, times, None, cache)
    for handle in handles:
        handle.remove()
    assert "mid_block" not in calls
    own = [name for name in calls if not name.startswith("image_")]
    assert own == [
        "conv_in",
        "down_blocks.0.resnets.0.conv1",
        "down_blocks.0.resnets.1.conv1",
        "down_blocks.0.downsamplers.0",
        "up_blocks.1.resnets.2.conv1",
        "up_blocks.1.upsamplers.0",
        *(f"up_blocks.2.resnets.{layer}.conv1" for layer in range(3)),
    ]


@pytest.fixture(scope="module")
def pipe(model_dir):
    return LDMSegPipeline.from_pretrained(model_dir)


def test_the_pipeline_computes_deep_features_each_kth_time(pipe):
    image = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8).numpy()
    plain = pipe(image, 5, output_type="latent")
    calls = []
    handle = pipe.backend.unet.mid_block.register_forward_hook(lambda *_: calls.append(1))
    cached = pipe(image, 5, output_type="latent", cache_interval=2)
    again = pipe(image, 5, output_type="latent", cache_interval=2)
    assert len(calls) == 2 * 3
    handle.remove()
    assert torch.equal(cached, again) and not torch.equal(cached, plain)
    assert (cached - plain).norm() < plain.norm()
    one = pipe(image, 1, output_type="latent", cache_interval=3)
    torch.testing.assert_close(one, pipe(image, 1, output_type="latent"))
    for solver in ("dpmpp_2m", "heun"):
        assert torch.isfinite(pipe(image, 4, output_type="latent", solver=solver, cache_interval=2)).all()


def test_what_is_refused(pipe, monkeypatch):
    image = torch.zeros(8, 8, 3, dtype=torch.uint8).numpy()
    with pytest.raises(ValueError, match="cache_interval=0"):
        pipe(image, 2, cache_interval=0)
    with pytest.raises(ValueError, match="cache_branch=40: from 0 to"):
        pipe(image, 2, cache_interval=2, cache_branch=40)
    monkeypatch.setattr(pipe.backend, "cache_branches", 0)
    with pytest.raises(ValueError, match="use backend=torch"):
        pipe(image, 2, cache_interval=2)
