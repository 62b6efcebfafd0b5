"""Image encoders: Stable Diffusion's as diffusers has it, TAESD with its published weights, and our small one."""

import pytest
import torch

from ldmseg_fast.checkpoints.init_from import Start
from ldmseg_fast.checkpoints.start_weights import load_image_encoder
from ldmseg_fast.config import ImageEncoderConfig, load_config
from ldmseg_fast.errors import CheckpointError
from ldmseg_fast.models.image_vae import (
    KLEncoder,
    TaesdEncoder,
    build_image_encoder,
    modern_attention_names,
    normalize,
)

VAE = {
    "block_out_channels": [8, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "norm_num_groups": 4,
    "layers_per_block": 2,
}


def pictures(count=2, size=64):
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def encoder_state(vae):
    return {key: value for key, value in vae.state_dict().items() if key.startswith(("encoder.", "quant_conv."))}


@pytest.mark.parametrize(
    "change", [{}, {"use_quant_conv": False}, {"mid_block_add_attention": False}, {"latent_channels": 8}]
)
@torch.no_grad()
def test_parity_with_diffusers(change):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL.from_config(VAE | change).eval()
    encoder = KLEncoder(ImageEncoderConfig(scaling_factor=0.5), VAE | change)
    encoder.load_state_dict(encoder_state(vae))
    images = pictures()
    expected = vae.encode(images.float() / 127.5 - 1).latent_dist.mode() * 0.5
    torch.testing.assert_close(encoder(images), expected, rtol=1e-5, atol=1e-5)


def test_published_size():
    from diffusers import AutoencoderKL

    from ldmseg_fast.models.image_vae import SD_VAE_CONFIG

    with torch.device("meta"):
        ours = KLEncoder(ImageEncoderConfig()).state_dict()
        theirs = encoder_state(AutoencoderKL.from_config(SD_VAE_CONFIG))
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


def test_other_auto_encoders_are_named():
    with pytest.raises(ValueError, match=r"act_fn='gelu', shift_factor=0\.1"):
        KLEncoder(ImageEncoderConfig(), VAE | {"act_fn": "gelu", "shift_factor": 0.1})


def test_older_names_of_the_attention():
    state = {
        "encoder.mid_block.attentions.0.query.weight": torch.zeros(4, 4, 1, 1),
        "encoder.mid_block.attentions.0.proj_attn.bias": torch.zeros(4),
        "encoder.conv_in.weight": torch.zeros(4, 4, 1, 1),
    }
    shapes = {key: tuple(value.shape) for key, value in modern_attention_names(state).items()}
    assert shapes == {
        "encoder.mid_block.attentions.0.to_q.weight": (4, 4),
        "encoder.mid_block.attentions.0.to_out.0.bias": (4,),
        "encoder.conv_in.weight": (4, 4, 1, 1),
    }


@torch.no_grad()
def test_taesd_with_its_published_weights(shared):
    from diffusers import AutoencoderTiny
    from PIL import Image
    from safetensors.torch import load_file

    path = shared / "weights" / "taesd_encoder.safetensors"
    config = ImageEncoderConfig(kind="taesd", scaling_factor=1.0)
    encoder = build_image_encoder(config)
    load_image_encoder(encoder, Start(load_config("coco"), image_vae=path))

    theirs = AutoencoderTiny().eval()
    theirs.encoder.load_state_dict({f"layers.{key}": value for key, value in load_file(path).items()})
    theirs.decoder.load_state_dict(
        # position 0 of the decoder is its input clamp, which diffusers leaves out of the layers
        {
            f"layers.{int(key.split('.')[0]) - 1}.{key.partition('.')[2]}": value
            for key, value in load_file(shared / "weights" / "taesd_decoder.safetensors").items()
        }
    )
    file = next((shared / "data" / "coco_mini").rglob("*.jpg"))
    image = Image.open(file).convert("RGB").resize((64, 64))
    images = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, 64, 64, 3).permute(0, 3, 1, 2)
    latents = encoder(images)
    torch.testing.assert_close(latents, theirs.encode(images / 127.5 - 1).latents, rtol=1e-5, atol=1e-5)
    decoded = (theirs.decode(latents).sample.clamp(-1, 1) + 1) / 2
    assert (decoded - images / 255).abs().mean() < 0.08  # it is a picture of the picture


def test_taesd_refuses_other_weights(shared, tmp_path):
    start = Start(load_config("coco"), image_vae=shared / "weights" / "taesd_decoder.safetensors")
    with pytest.raises(CheckpointError, match="weights of another architecture"):
        load_image_encoder(TaesdEncoder(ImageEncoderConfig(kind="taesd")), start)


@pytest.mark.parametrize("kind", ["conv", "taesd", "autoencoder_kl"])
@torch.no_grad()
def test_half_precision_and_shapes(kind):
    """As a backend runs it: weights in bfloat16, pictures in bytes, no autocast."""
    config = ImageEncoderConfig(kind=kind, widths=(8, 16, 16), blocks=(0, 1, 1), downsampling=4)
    encoder = build_image_encoder(config, VAE).eval()
    single = encoder(pictures()).float()
    factor = 8 if kind == "taesd" else 4
    assert single.shape == (2, 4, 64 // factor, 64 // factor)
    half = encoder.to(torch.bfloat16)(pictures())
    assert half.dtype == torch.bfloat16
    assert (half.float() - single).abs().max() < 0.1 * single.abs().max() + 1e-3


def test_normalize():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(1, 3, 1, 2)
    assert normalize(images).flatten().tolist() == [-1.0, 1.0] * 3
    assert normalize(images, torch.float16).dtype == torch.float16
