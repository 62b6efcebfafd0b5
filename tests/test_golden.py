"""The original's numbers, from its own checkpoints: every stage of the method, and the whole path."""

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from ldmseg_fast import LDMSegPipeline
from ldmseg_fast.checkpoints.model_folder import load_component, load_component_config
from ldmseg_fast.commands.convert import convert_checkpoint
from ldmseg_fast.config import PostprocessConfig
from ldmseg_fast.diffusion.sampler import ddim, unet_input
from ldmseg_fast.diffusion.scheduler import Scheduler
from ldmseg_fast.kernels.mask_bits import decode_mask_bits, encode_mask_bits
from ldmseg_fast.panoptic.postprocess import postprocess


@pytest.fixture(scope="module")
def reference(shared):
    with safe_open(shared / "golden" / "reference.safetensors", "pt") as file:
        names = list(file.keys())
        return {name: file.get_tensor(name) for name in names}


@pytest.fixture(scope="module")
def model(shared, tmp_path_factory):
    golden = shared / "golden"
    return convert_checkpoint(
        golden / "original_ldm.pt",
        tmp_path_factory.mktemp("golden") / "model",
        golden / "base_unet_config.json",
        golden / "image_vae_config.json",
    )


@pytest.fixture(scope="module")
def mask_vae(model):
    return load_component(model, "mask_vae")


@pytest.fixture(scope="module")
def scheduler(model):
    return Scheduler(load_component_config(model, "scheduler")[0])


@pytest.fixture(scope="module")
def pipe(model):
    return LDMSegPipeline.from_pretrained(model, device="cpu", dtype=torch.float32)


def assert_within(actual, expected, tolerance, relative=False):
    """Largest absolute difference, for `relative` in units of the largest expected value."""
    assert actual.shape == expected.shape
    difference = (actual.double() - expected.double()).abs().max().item()
    assert difference <= tolerance * (expected.abs().max().item() if relative else 1.0)


def test_bits_are_exact(reference):
    bits = encode_mask_bits(reference["segment_ids"], 7)
    assert torch.equal(bits, reference["bits_minus1_1"])
    assert torch.equal(decode_mask_bits(bits), reference["bits_decoded"].int())


def test_noise_schedule(reference, scheduler):
    assert_within(scheduler.alphas_cumprod, reference["alphas_cumprod"], 5e-6)
    assert_within(scheduler.loss_weights, reference["loss_weights"], 5e-6)


@torch.no_grad()
def test_mask_auto_encoder(reference, mask_vae):
    posterior = mask_vae.encode(reference["bits_minus1_1"])
    assert_within(mask_vae.encode_latents(reference["bits_minus1_1"]), reference["mask_latents_mean"], 1e-5)
    assert_within(posterior.logvar, reference["mask_latents_logvar"], 1e-5)
    assert_within(posterior.kl(), reference["kl"], 1e-4)
    assert_within(mask_vae.decode(posterior.mean), reference["mask_logits_half"], 2e-5)


@torch.no_grad()
def test_auto_encoder_alone(shared, reference, tmp_path):
    model = convert_checkpoint(shared / "golden" / "original_ae.pt", tmp_path / "ae")
    vae = load_component(model, "mask_vae")
    assert sorted(path.name for path in model.iterdir()) == ["README.md", "mask_vae", "model_index.json"]
    assert vae.config.scaling_factor == 0.18215
    assert vae.encode(reference["bits_minus1_1"]).mean.shape == reference["mask_latents_mean"].shape


@torch.no_grad()
def test_image_encoder(reference, model):
    encoder = load_component(model, "image_vae")
    assert_within(encoder(reference["image_uint8"]), reference["image_latents"], 1e-5)


def test_noising(reference, scheduler):
    noisy = scheduler.add_noise(reference["mask_latents_mean"], reference["noise"], reference["timesteps"])
    assert_within(noisy, reference["noisy_latents"], 1e-5)


@torch.no_grad()
def test_unet_estimate_and_loss(reference, model, scheduler):
    unet, timesteps = load_component(model, "unet"), reference["timesteps"]
    inputs = unet_input(reference["noisy_latents"], reference["image_latents"], reference["condition"])
    output = unet(inputs, timesteps)
    assert_within(output, reference["unet_output"], 2e-5, relative=True)
    estimate = scheduler.pred_original_sample(output, reference["noisy_latents"], timesteps)
    assert_within(estimate, reference["x0_from_eps"], 2e-5, relative=True)

    mask = F.interpolate(reference["segment_ids"][:, None].float(), output.shape[-2:], mode="nearest") > 0
    weights = scheduler.loss_weights[timesteps].view(-1, 1, 1, 1)
    loss = (weights * mask * (reference["unet_output"] - reference["noise"]).square()).mean()
    assert_within(loss.view(1), reference["ldm_loss"], 1e-5)


@pytest.mark.parametrize("steps", [50, 10, 4, 1])
def test_whole_path(reference, pipe, steps):
    images = [image.permute(1, 2, 0).numpy() for image in reference["image_uint8"]]
    latents = pipe(images, steps, latents=reference["noise"], output_type="latent")
    assert_within(latents, reference[f"sampled_latents_{steps}"], 1e-5, relative=True)


def test_sampler_from_image_latents(reference, pipe, scheduler):
    latents = ddim(pipe.backend.denoise, reference["noise"], reference["image_latents"], scheduler, 4)
    assert_within(latents, reference["sampled_latents_4"], 1e-5, relative=True)


def test_decoded_logits(reference, pipe):
    image = reference["image_uint8"][0].permute(1, 2, 0).numpy()
    logits = pipe(image, 10, latents=reference["noise"][:1], output_type="logits")
    assert_within(logits[:, :, ::2, ::2], reference["decoded_logits_10"], 2e-5)


@pytest.mark.parametrize("case", ["post", "post_rules"])
def test_postprocessing(reference, case):
    expected = reference[f"{case}_segmentation"]
    result = postprocess(
        reference[f"{case}_logits_half"][None], (128, 128), [tuple(expected.shape)], PostprocessConfig(0.5, 512, 0.5)
    )[0]
    assert (torch.from_numpy(result.segmentation) != expected).sum() <= 10
    assert [segment["id"] for segment in result.segments_info] == reference[f"{case}_segment_ids"].sort()[0].tolist()


def test_settings_of_the_converted_model(pipe):
    assert pipe.info.image_size == 128
    assert pipe.info.self_condition
    assert pipe.info.num_inference_steps == 50
    assert pipe.info.postprocess == PostprocessConfig(0.5, 512, 0.5)
