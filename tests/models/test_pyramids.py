"""EfficientNet-Lite's features against numbers of an independent implementation, and the encoder made of them."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ldmseg_fast.checkpoints.init_from import resolve_start
from ldmseg_fast.checkpoints.shipped import SHIPPED
from ldmseg_fast.checkpoints.start_weights import check_start, load_image_encoder
from ldmseg_fast.checkpoints.tensors import load_weights, save_weights
from ldmseg_fast.config import ImageEncoderConfig, load_config
from ldmseg_fast.config.settings import PYRAMID_STRIDES
from ldmseg_fast.errors import CheckpointError, ConfigError
from ldmseg_fast.models.efficientnet_lite import ConvNorm, EfficientNetLite, efficientnet_lite_names
from ldmseg_fast.models.image_vae import build_image_encoder
from ldmseg_fast.models.pyramids import PYRAMIDS, as_patches, fold_norms

WEIGHTS = SHIPPED / "efficientnet_lite0" / "model.safetensors"
# PyPI's efficientnet-lite-pytorch 0.1.0 in float64 with these weights on `picture()`: a stride's mean, deviation, and
# its values at channels 0 to 3 of cell (1, 0)
EXPECTED = [
    (4, 24, -0.9475210530, 12.9490592032, [-9.626866, -19.680524, -9.169792, -1.682949]),
    (8, 40, -1.5466518356, 9.5700378629, [-4.595547, -4.436918, 5.734209, -20.773183]),
    (16, 112, 0.6566661812, 6.7001296712, [6.609055, 9.031344, 5.745574, 4.9396]),
    (32, 320, -0.0666800196, 2.8884856747, [3.010747, 0.085817, 1.614666, 0.274988]),
]
PHOTOGRAPHS = ["image_encoder.kind=efficientnet_lite", "image_encoder.picture_scale=2"]


def picture(size=64):
    return (torch.arange(3 * size * size) * 37 // 11 % 256).to(torch.uint8).view(1, 3, size, size)


def pretrained():
    network = EfficientNetLite()
    network.load_state_dict(load_weights(WEIGHTS))
    return network


@torch.no_grad()
def test_features_are_those_of_another_implementation():
    features = pretrained().double()(picture())
    for found, (stride, channels, mean, deviation, values) in zip(features, EXPECTED, strict=True):
        assert found.shape == (1, channels, 64 // stride, 64 // stride)
        assert float(found.mean()) == pytest.approx(mean, abs=1e-5)
        assert float(found.std()) == pytest.approx(deviation, abs=1e-5)
        assert found[0, :4, 1, 0].tolist() == pytest.approx(values, abs=1e-5)


@torch.no_grad()
def test_float32_is_near_float64():
    network = pretrained()
    exact = [features.clone() for features in EfficientNetLite.forward(network.double(), picture())]
    for found, expected in zip(network.float()(picture()), exact):
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_cpu_trains_depthwise_convolutions_in_float32(monkeypatch):
    """Their gradients in bfloat16 take several times as long; what is not trained stays in bfloat16."""
    layer, seen, convolve = ConvNorm(16, 16, 5, groups=16), [], F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda x, *args, **options: seen.append(x.dtype) or convolve(x, *args, **options))
    x = torch.randn(2, 16, 8, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        trained = layer(x)
        with torch.no_grad():
            plain = layer(x)
    assert seen == [torch.float32, torch.bfloat16] and trained.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(trained, plain, rtol=2e-2, atol=2e-2)
    trained.float().sum().backward()
    assert layer.conv.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("variant", "channels", "parameters"),
    [
        (0, (24, 40, 112, 320), 2919392),
        (1, (24, 40, 112, 320), 3672416),
        (2, (24, 48, 120, 352), 4302416),
        (3, (32, 48, 136, 384), 6347904),
        (4, (32, 56, 160, 448), 11039760),
    ],
)
def test_the_five_sizes(variant, channels, parameters):
    with torch.device("meta"):
        network = EfficientNetLite(variant)
    assert network.channels == channels
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.parametrize("kernel", [3, 5])
def test_stride_two_pads_more_at_the_end(kernel):
    layer = ConvNorm(1, 1, kernel, 2, activates=False)
    x = torch.randn(1, 1, 8, 8)
    total = (8 // 2 - 1) * 2 + kernel - 8  # TensorFlow's "same"
    before, after = total // 2, total - total // 2
    expected = F.conv2d(F.pad(x, (before, after, before, after)), layer.conv.weight / (1 + 1e-3) ** 0.5, stride=2)
    torch.testing.assert_close(layer(x), expected)


def test_names_of_the_published_files():
    tensor = torch.zeros(1)
    published = {
        "_conv_stem.weight": "stem.conv.weight",
        "_bn0.running_var": "stem.norm.running_var",
        "_blocks.0._bn1.bias": "blocks.0.depthwise.norm.bias",
        "_blocks.12._expand_conv.weight": "blocks.12.expand.conv.weight",
        "_blocks.12._bn0.weight": "blocks.12.expand.norm.weight",
        "_blocks.12._project_conv.weight": "blocks.12.project.conv.weight",
        "_blocks.12._bn2.running_mean": "blocks.12.project.norm.running_mean",
    }
    dropped = ["_fc.bias", "_conv_head.weight", "_bn1.weight", "_blocks.3._bn0.num_batches_tracked"]
    assert list(efficientnet_lite_names(dict.fromkeys([*published, *dropped], tensor))) == list(published.values())
    assert list(efficientnet_lite_names(dict.fromkeys(published.values(), tensor))) == list(published.values())


def test_strides_in_the_settings_are_the_networks():
    for kind, build in PYRAMIDS.items():
        with torch.device("meta"):
            assert max(build(ImageEncoderConfig(kind=kind)).strides) == PYRAMID_STRIDES[kind]
    assert PYRAMID_STRIDES.keys() == PYRAMIDS.keys()


@pytest.mark.parametrize("scale", [1, 2, 4, 8, 16])
def test_latents_lie_at_their_stride(scale):
    config = ImageEncoderConfig("efficientnet_lite", 6, downsampling=4, scaling_factor=0.5, picture_scale=scale)
    encoder = build_image_encoder(config)
    latents = encoder(picture(64 if scale < 16 else 128))
    assert latents.shape[1:] == (6, *[(64 if scale < 16 else 128) // (4 * scale)] * 2)
    latents.sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


@torch.no_grad()
def test_folded_norms_change_nothing():
    start = resolve_start(load_config("tiny", PHOTOGRAPHS))
    encoder = build_image_encoder(start.config.image_encoder)
    load_image_encoder(encoder, start)
    expected = encoder.train()(picture())  # norms are frozen in training too
    found = fold_norms(encoder.eval())(picture())
    assert not any("norm" in name for name, _ in encoder.named_buffers())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_random_features_neither_vanish_nor_explode():
    torch.manual_seed(0)
    for features in EfficientNetLite()(picture()):
        assert 0.1 < float(features.detach().std()) < 10


def started(*settings):
    return resolve_start(load_config("tiny", [*PHOTOGRAPHS, *settings]))


def test_random_weights_are_asked_for_by_name():
    start = started("image_encoder.path=random")
    assert start.features is None and start.image_vae is None
    assert started().features == WEIGHTS


def test_weights_of_another_network_are_refused(tmp_path):
    other, partial, missing = (tmp_path / f"{name}.safetensors" for name in ("other", "partial", "missing"))
    save_weights({"a.weight": torch.zeros(1)}, other)
    state = load_weights(WEIGHTS)
    save_weights({key: value for key, value in state.items() if not key.startswith("blocks.15.")}, partial)
    start = started(f"image_encoder.path={other}")
    with pytest.raises(CheckpointError, match=r"other\.safetensors: weights of another architecture"):
        check_start(start)
    start = started(f"image_encoder.path={partial}")
    with pytest.raises(CheckpointError, match=r"partial\.safetensors.*missing: blocks\.15\."):
        load_image_encoder(build_image_encoder(start.config.image_encoder), start)
    with pytest.raises(CheckpointError, match=r"image_encoder\.path=.*missing\.safetensors: no such file; leave "):
        check_start(started(f"image_encoder.path={missing}"))
    with pytest.raises(CheckpointError, match=r"variant=4, image_encoder\.path=.*another architecture.*; leave"):
        check_start(started(f"image_encoder.path={WEIGHTS}", "image_encoder.variant=4"))
    with pytest.raises(ConfigError, match="no weights of efficientnet_lite 3 come with the package"):
        started("image_encoder.variant=3")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.image_size=80", "image_encoder.picture_scale=1"], "pictures of 80 pixels, no multiple of 32"),
        (["image_encoder.picture_scale=3"], r"picture_scale=3: 1, 2, 4, 8 or 16 expected"),
        (["image_encoder.picture_scale=32"], r"picture_scale=32: from 1 to 16 expected"),
        (["image_encoder.variant=5"], r"variant=5: from 0 to 4 expected"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        load_config("tiny", [*PHOTOGRAPHS, *settings])


@torch.no_grad()
@pytest.mark.parametrize("fine", ["patches", "convolutions"])
@pytest.mark.parametrize("scale", [1, 2, 4])
def test_finer_features_begin_as_means(scale, fine):
    """They compute the same, and then tell where in a patch something lies."""
    config = ImageEncoderConfig("efficientnet_lite", 8, downsampling=4, scaling_factor=1.0, picture_scale=scale)
    means = build_image_encoder(config).eval()
    patches = build_image_encoder(replace(config, fine_features=fine)).eval()
    state = as_patches(means.state_dict(), patches.config)
    patches.load_state_dict(state)
    images = picture(128)
    expected = means(images)
    assert (patches(images) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert all(torch.equal(value, state[name]) for name, value in as_patches(state, patches.config).items())
    sides = [projection.kernel_size[0] for projection in patches.projections]
    assert sides == [max(1, 4 * scale // stride) for stride in patches.network.strides]


@torch.no_grad()
def test_convolutions_go_on_from_patches():
    """Their last layer starts at zero, so that nothing changes; then they add what they see at the masks' size."""
    config = ImageEncoderConfig("efficientnet_lite", 8, downsampling=4, scaling_factor=1.0, picture_scale=2)
    patches = build_image_encoder(replace(config, fine_features="patches")).eval()
    both = build_image_encoder(replace(config, fine_features="convolutions")).eval()
    both.load_state_dict(as_patches(patches.state_dict(), both.config))
    images = picture(128)
    expected = patches(images)
    assert torch.equal(both(images), expected)
    torch.nn.init.ones_(both.convolutions.layers[-1].weight)
    small = torch.nn.functional.avg_pool2d(images.float(), 2)
    assert torch.allclose(both(images), expected + both.convolutions(small), rtol=1e-5, atol=1e-5)
