"""Learned queries, CLIP image tokens and captions: each trains a step, samples, and comes back from a folder."""

from pathlib import Path

import pytest
import torch

from ldmseg_fast import LDMSegPipeline
from ldmseg_fast.checkpoints.model_folder import load_component, load_index
from ldmseg_fast.config import ConditioningConfig, UNetConfig, load_config
from ldmseg_fast.diffusion.sampler import ddim, image_noise
from ldmseg_fast.errors import ConfigError
from ldmseg_fast.models.conditioning import build_conditioning, drop_captions, with_context
from ldmseg_fast.training.stages import AutoencoderStage, DiffusionStage
from tests.conftest import NARROW

WIDTH = 12


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """Small random CLIP models and a tokenizer of letters, laid out as in a Stable Diffusion folder."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModel

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokenizer = CLIPTokenizer({word: index for index, word in enumerate(words)}, [])
    tokenizer.save_pretrained(folder / "tokenizer")
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = CLIPTextConfig(vocab_size=len(words), max_position_embeddings=10, bos_token_id=0, eos_token_id=1, **size)
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    CLIPVisionModel(CLIPVisionConfig(image_size=16, patch_size=8, **size)).save_pretrained(folder / "image_encoder")
    return folder


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("conditioning") / "ae"
    AutoencoderStage(load_config("tiny", NARROW)).save(folder)
    return folder


@pytest.fixture
def make_stage(autoencoder, clip):
    def make(*settings: str) -> DiffusionStage:
        torch.manual_seed(0)
        return DiffusionStage(load_config("tiny", [*NARROW, f"model.mask_vae={autoencoder}", *settings]))

    return make


def settings_of(kind: str, clip: Path) -> list[str]:
    if kind == "separate":
        return ["unet.separate_conv_in=true", "unet.separate_image_encoder=true", "unet.image_channels=8"]
    return [
        f"unet.conditioning={kind}",
        f"unet.cross_attention_dim={WIDTH}",
        "conditioning.num_queries=5",
        f"conditioning.path={clip if kind.startswith('clip') else ''}",
    ]


def batch():
    generator = torch.Generator().manual_seed(5)
    return {
        "image": torch.randint(0, 256, (2, 3, 64, 64), generator=generator, dtype=torch.uint8),
        "segment_ids": torch.randint(0, 5, (2, 64, 64), generator=generator, dtype=torch.uint8),
        "table": torch.arange(256).clamp(max=31).expand(2, -1),
        "image_id": [3, 8],
        "captions": ["a cat", "two dogs on a road"],
    }


KINDS = ["learned", "clip_image", "clip_text", "separate"]


@pytest.mark.parametrize("kind", KINDS)
def test_trains_a_step_samples_and_saves(kind, make_stage, clip, tmp_path):
    stage = make_stage(*settings_of(kind, clip))
    trainable = [parameter for parameter in stage.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in trainable]
    stage(batch(), 0)["loss"].backward()
    unused = [name for name, p in stage.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused
    with torch.no_grad():
        for parameter in trainable:
            parameter -= 0.1 * parameter.grad
    changed = sum(not torch.equal(old, new) for old, new in zip(before, trainable))
    assert changed > len(trainable) / 2
    clip_weights = [p for name, p in stage.named_parameters() if name.startswith("conditioning.encoder.")]
    assert not any(parameter.requires_grad for parameter in clip_weights)

    stage.eval()
    images, captions = batch()["image"], batch()["captions"]
    sampled = stage.sample(batch(), 3)
    assert torch.isfinite(sampled).all()
    assert len(stage.predict(batch() | {"image_id": [3, 8]}, [(64, 64)] * 2)) == 2

    stage.save(tmp_path / "model")
    assert ("conditioning" in load_index(tmp_path / "model")["components"]) == (kind != "separate")
    unet = load_component(tmp_path / "model", "unet")
    denoise = unet
    if kind != "separate":
        conditioning = load_component(tmp_path / "model", "conditioning")
        state = conditioning.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in stage.conditioning.state_dict().items())
        assert str(clip) not in (tmp_path / "model" / "conditioning" / "config.json").read_text()
        denoise = with_context(unet, conditioning, images, captions)
    image_latents = load_component(tmp_path / "model", "image_vae")(images)
    again = ddim(denoise, image_noise(0, [3, 8], sampled.shape[1:]), image_latents, stage.scheduler, 3)
    torch.testing.assert_close(again, sampled, rtol=1e-4, atol=1e-4)

    pipe = LDMSegPipeline.from_pretrained(tmp_path / "model", device="cpu")
    arrays = [image.permute(1, 2, 0).numpy() for image in images]
    given = captions if kind == "clip_text" else None
    latents = pipe(arrays, 3, output_type="latent", image_ids=[3, 8], captions=given, batch_size=1)
    torch.testing.assert_close(latents, sampled, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="captions: 1 for 2 images"):
        pipe(arrays, 3, captions=["a cat"])


@torch.no_grad()
def test_guidance_is_its_formula(make_stage, clip):
    stage = make_stage(*settings_of("clip_text", clip), "conditioning.guidance_scale=7.5").eval()
    images, captions = batch()["image"], batch()["captions"]
    x, timesteps = torch.randn(2, 16, 16, 16), torch.tensor([400, 400])
    plain = stage.unet(x, timesteps, stage.conditioning(images, ["", ""]))
    captioned = stage.unet(x, timesteps, stage.conditioning(images, captions))
    guided = with_context(stage.unet, stage.conditioning, images, captions)(x, timesteps)
    torch.testing.assert_close(guided, plain + 7.5 * (captioned - plain), rtol=1e-4, atol=1e-4)
    without = with_context(stage.unet, stage.conditioning, images)(x, timesteps)
    torch.testing.assert_close(without, plain, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_contexts_depend_on_what_they_should(clip):
    images = batch()["image"]
    config = ConditioningConfig(num_queries=5, path=str(clip))

    def context(kind, images, captions=None):
        torch.manual_seed(0)
        return build_conditioning(UNetConfig(conditioning=kind, cross_attention_dim=WIDTH), config)(images, captions)

    assert build_conditioning(UNetConfig(), config) is None
    assert context("learned", images).shape == (2, 5, WIDTH)
    assert torch.equal(context("learned", images), context("learned", images.flip(3)))
    assert context("clip_image", images).shape == (2, 1 + 2 * 2, WIDTH)
    assert not torch.allclose(context("clip_image", images), context("clip_image", images.flip(3)))
    tokens = context("clip_text", images, ["a cat", ""])
    assert tokens.shape == (2, 10, WIDTH)
    assert not torch.allclose(tokens[0], tokens[1])
    empty = context("clip_text", images)
    assert torch.equal(empty, context("clip_text", images, ["", ""]))
    torch.testing.assert_close(tokens[1], empty[1])  # another batch, so other roundings
    long = context("clip_text", images, ["a cat " * 50, "b"])
    assert long.shape == tokens.shape
    with pytest.raises(ValueError, match="captions: 1 for 2 images"):
        context("clip_text", images, ["a cat"])


def test_clip_pixels_are_transformers_own(clip):
    """The picture that CLIP sees here is the one its own processor would make."""
    from transformers import CLIPImageProcessor

    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (1, 3, 16, 16), generator=generator, dtype=torch.uint8)
    unet = UNetConfig(conditioning="clip_image", cross_attention_dim=16)
    tokens = build_conditioning(unet, ConditioningConfig(path=str(clip)))
    processor = CLIPImageProcessor(size={"height": 16, "width": 16}, do_center_crop=False)
    pixels = processor(image[0].permute(1, 2, 0).numpy(), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = tokens.encoder(pixel_values=pixels).last_hidden_state
        torch.testing.assert_close(tokens(image), expected, rtol=1e-4, atol=1e-4)


def test_captions_are_dropped_at_their_share():
    captions = ["caption"] * 2000
    kept = drop_captions(captions, 0.25, torch.Generator().manual_seed(0))
    assert 0.2 < kept.count("") / len(kept) < 0.3
    assert drop_captions(captions, 0.0, torch.Generator()) == captions
    assert drop_captions(captions, 1.0, torch.Generator()) == [""] * 2000
    assert drop_captions(None, 0.5, torch.Generator()) is None


@pytest.mark.parametrize("kind", ["clip_image", "clip_text"])
def test_a_clip_folder_is_asked_for(kind, make_stage, tmp_path):
    settings = [f"unet.conditioning={kind}", f"unet.cross_attention_dim={WIDTH}"]
    for path in ("", str(tmp_path / "nothing")):
        with pytest.raises(ConfigError, match=r"needs a CLIP folder"):
            make_stage(*settings, f"conditioning.path={path}")
