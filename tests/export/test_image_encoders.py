"""Graphs of Stable Diffusion's image encoder, of TAESD and of EfficientNet-Lite, against PyTorch."""

from dataclasses import replace
from pathlib import Path

import onnxruntime
import pytest
import torch

from ldmseg_fast.backends.graphs.modules import build_graph
from ldmseg_fast.backends.graphs.specs import GraphOptions, image_encoder, sample_inputs
from ldmseg_fast.backends.model_info import ModelInfo, read_model_info
from ldmseg_fast.checkpoints.init_from import Start, resolve_start
from ldmseg_fast.checkpoints.model_folder import save_component
from ldmseg_fast.checkpoints.start_weights import load_image_encoder
from ldmseg_fast.config import ImageEncoderConfig, load_config
from ldmseg_fast.export.graph_export import export_graph
from ldmseg_fast.export.networks import load_network
from ldmseg_fast.models.image_vae import KLEncoder, build_image_encoder

STABLE_DIFFUSION = {
    "block_out_channels": [8, 16, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "norm_num_groups": 4,
    "layers_per_block": 2,
}


@pytest.fixture(params=["autoencoder_kl", "taesd", "efficientnet_lite"])
def info(request, model_dir: Path, tmp_path: Path) -> ModelInfo:
    """Of a model folder with such an encoder, which reduces eightfold to 4 channels."""
    if request.param == "taesd":
        config = ImageEncoderConfig(kind="taesd", scaling_factor=1.0)
        encoder, extra = build_image_encoder(config), {}
        weights = request.getfixturevalue("shared") / "weights" / "taesd_encoder.safetensors"
        load_image_encoder(encoder, Start(load_config("coco"), image_vae=weights))
    elif request.param == "efficientnet_lite":
        start = resolve_start(load_config("tiny", ["image_encoder.kind=efficientnet_lite"]))
        config = ImageEncoderConfig("efficientnet_lite", scaling_factor=0.1, picture_scale=2)
        encoder, extra = build_image_encoder(config), {}
        load_image_encoder(encoder, replace(start, config=replace(start.config, image_encoder=config)))
    else:
        torch.manual_seed(0)
        config, extra = ImageEncoderConfig(), {"_vae_config": STABLE_DIFFUSION}
        encoder = KLEncoder(config, STABLE_DIFFUSION)
    save_component(tmp_path / "model", "image_vae", config, encoder.state_dict(), extra)
    info = read_model_info(model_dir)
    mask_vae = replace(info.mask_vae, widths=(8, 16, 16, 32))
    info = replace(info, folder=tmp_path / "model", image_latent_channels=4, mask_vae=mask_vae)
    return replace(info, picture_scale=config.picture_scale, picture_stride=config.stride)


def export(info: ModelInfo, folder: Path, options: GraphOptions):
    """The exported graph of pictures -> latents as a function, and the same in PyTorch, float32."""
    spec = image_encoder(info, options)
    networks = {"image_vae": load_network(info, "image_vae", getattr(torch, options.dtype))}
    export_graph(spec, build_graph(spec, info, networks), info, folder, 21, {})
    session = onnxruntime.InferenceSession(str(folder / "image_encoder.onnx"))
    reference = load_network(info, "image_vae", torch.float32)

    def run(**sizes: int) -> tuple[torch.Tensor, torch.Tensor]:
        images = sample_inputs(spec, info, sizes)["images"]
        (found,) = session.run(None, {"images": images.numpy()})
        return torch.from_numpy(found), reference(images)

    return run


@torch.no_grad()
def test_any_size_in_float32(info, tmp_path):
    run = export(info, tmp_path, GraphOptions())
    for batch, height, width in ((1, 8, 8), (2, 8, 12), (5, 4, 4)):
        found, expected = run(batch=batch, latent_height=height, latent_width=width)
        assert found.shape == (batch, 4, height, width)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_half(info, tmp_path):
    found, expected = export(info, tmp_path, GraphOptions("float16", image_size=64))(batch=2)
    cosine = torch.cosine_similarity(found.double().flatten(), expected.double().flatten(), dim=0)
    assert found.dtype == torch.float16 and cosine >= 0.999
