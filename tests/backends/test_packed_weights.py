"""Packed weights change the time and nothing else."""

import shutil
import time

import pytest
import torch
from torch import nn

from ldmseg_fast.backends import packed_weights
from ldmseg_fast.backends.model_info import read_model_info
from ldmseg_fast.backends.packed_weights import can_pack, compile_frozen, pack_weights
from ldmseg_fast.backends.torch_backend import TorchBackend
from ldmseg_fast.diffusion.sampler import image_noise
from ldmseg_fast.diffusion.scheduler import Scheduler

CPU = torch.device("cpu")
BFLOAT16 = torch.bfloat16
needs_packing = pytest.mark.skipif(not can_pack(CPU, BFLOAT16), reason="no packed bfloat16 layers on this processor")


@pytest.fixture(scope="module")
def info(model_dir):
    return read_model_info(model_dir)


def make_layers():
    layers = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.Conv2d(16, 32, 1, bias=False), nn.Linear(4, 24))
    return layers.to(BFLOAT16, memory_format=torch.channels_last)


LAYOUTS = (torch.contiguous_format, torch.channels_last)


def picture(batch=1):
    return torch.randn(batch, 8, 8, 8, generator=torch.Generator().manual_seed(0)).to(BFLOAT16)


def run_whole(backend, batch, size):
    pictures = torch.randint(0, 256, (batch, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image_latents = backend.encode_image(pictures)
    noise = image_noise(0, range(batch), backend.info.latent_shape)
    latents = backend.sample(noise, image_latents, Scheduler(backend.info.scheduler), 3)
    return image_latents, latents, backend.decode_mask(latents, size, "logits")


@needs_packing
@pytest.mark.parametrize("batch", [1, 3])
def test_a_whole_model_is_as_exact(info, monkeypatch, batch):
    """Packed weights lie otherwise in memory: sums may be taken in another order, but none gets less exact."""
    packed = TorchBackend(info, "cpu", BFLOAT16)
    monkeypatch.setattr("ldmseg_fast.backends.torch_backend.can_pack", lambda *_: False)
    plain = TorchBackend(info, "cpu", BFLOAT16)
    assert "forward" in vars(packed.unet.conv_in) and "forward" not in vars(plain.unet.conv_in)
    exact = run_whole(TorchBackend(info, "cpu", torch.float32), batch, (48, 80))
    for truth, one, other in zip(exact, run_whole(packed, batch, (48, 80)), run_whole(plain, batch, (48, 80))):
        assert (one - truth).norm() <= 2 * (other - truth).norm()  # twice what torch's own layers lose
    for name in ("unet", "image_vae", "mask_vae"):
        one, other = (getattr(backend, name).state_dict() for backend in (packed, plain))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@needs_packing
def test_every_layer_that_can_be_is_packed(info):
    unet = TorchBackend(info, "cpu", BFLOAT16).unet
    layers = [layer for layer in unet.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert layers and all("forward" in vars(layer) for layer in layers)
    attentions = [layer for layer in unet.modules() if hasattr(layer, "fused_qkv")]
    assert attentions and all("project_qkv" in vars(layer) for layer in attentions)


@needs_packing
def test_training_runs_the_plain_layers():
    layers = make_layers()
    assert pack_weights(layers) == 3
    layers(picture()).sum().backward()
    assert all(parameter.grad is not None for parameter in layers.parameters())
    with torch.no_grad():
        assert layers(picture(0)).shape == (0, 32, 4, 24)
        one, other = (layers(picture(2).to(memory_format=layout)) for layout in LAYOUTS)
        torch.testing.assert_close(one, other, rtol=1.6e-2, atol=1e-2)  # two roundings to bfloat16
    assert layers.float()(picture().float()).dtype == torch.float32  # another dtype since: no packed weight is used


def test_float32_is_left_alone(info):
    assert not can_pack(CPU, torch.float32) and not can_pack(torch.device("meta"), BFLOAT16)
    assert pack_weights(make_layers().float()) == 0
    assert "forward" not in vars(TorchBackend(info, "cpu", torch.float32).unet.conv_in)


def test_a_pytorch_without_the_operators_runs_the_plain_layers(info, monkeypatch):
    monkeypatch.setattr(packed_weights, "OPERATORS", ("_convolution_of_another_version",))
    assert not can_pack(CPU, BFLOAT16)
    backend = TorchBackend(info, "cpu", BFLOAT16)
    assert "forward" not in vars(backend.unet.conv_in)
    assert run_whole(backend, 1, (64, 64))[1].isfinite().all()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_weights_are_packed():
    layers = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 16, 3, padding=1))
    layers = layers.eval().requires_grad_(False)
    before = torch._dynamo.utils.counters["inductor"]["mkldnn_conv_weight_pack_matcher_count"]
    compiled = compile_frozen(layers)
    with torch.inference_mode():
        for batch in (1, 2):
            x = picture(batch).float()
            torch.testing.assert_close(compiled(x), layers(x), rtol=1e-4, atol=1e-5)
    if torch.backends.mkldnn.is_available():
        assert torch._dynamo.utils.counters["inductor"]["mkldnn_conv_weight_pack_matcher_count"] > before


def test_the_compiled_backend_freezes_its_weights(info, monkeypatch):
    frozen = []
    monkeypatch.setattr("ldmseg_fast.backends.compiled.can_package", lambda network: False)
    monkeypatch.setattr("ldmseg_fast.backends.compiled.compile_frozen", lambda network: frozen.append(network))
    backend = TorchBackend(info, "cpu", BFLOAT16, compile_networks=True)
    assert frozen == [backend.unet, backend.image_vae]
    assert "forward" not in vars(backend.unet.conv_in)  # packed layers are nothing that a compiler sees through
    assert ("forward" in vars(backend.mask_vae.decoder[0])) == can_pack(CPU, BFLOAT16)


@needs_packing
def test_a_convolution_is_as_fast_as_a_plain_one_at_any_size():
    """A layout for pictures of another size made small pictures of many channels a hundred times slower."""
    torch.manual_seed(0)
    plain = nn.Conv2d(384, 192, 3, padding=1).to(BFLOAT16, memory_format=torch.channels_last)
    packed = nn.Sequential(plain)
    reference = nn.Conv2d(384, 192, 3, padding=1).to(BFLOAT16, memory_format=torch.channels_last)
    reference.load_state_dict(plain.state_dict())
    assert pack_weights(packed) == 1
    with torch.no_grad():
        for side in (4, 32, 4, 8):  # more sizes than are kept
            x = torch.randn(1, 384, side, side).to(BFLOAT16)
            torch.testing.assert_close(packed(x), reference(x), rtol=1.6e-2, atol=1e-2)
            ours, theirs = (min(timed(layer, x) for _ in range(5)) for layer in (packed, reference))
            assert ours < 5 * theirs, f"{1000 * ours:.2f} ms at {side}x{side}, {1000 * theirs:.2f} ms plain"


def timed(layer, x):
    start = time.perf_counter()
    layer(x)
    return time.perf_counter() - start
