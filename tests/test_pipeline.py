"""The public face: LDMSegPipeline."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldmseg_fast import LDMSegPipeline
from ldmseg_fast.config import PostprocessConfig
from ldmseg_fast.errors import CheckpointError
from ldmseg_fast.panoptic.postprocess import connected

ANYTHING_GOES = PostprocessConfig(mask_threshold=0.0, count_threshold=0, overlap_threshold=0.0)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def pipe(model_dir):
    return LDMSegPipeline.from_pretrained(model_dir)


def test_maps_have_the_pictures_own_sizes(pipe):
    images = [picture(64, 64), Image.fromarray(picture(48, 100)), picture(1, 1), picture(300, 7)]
    results = pipe(images, num_inference_steps=2, thresholds=ANYTHING_GOES)
    assert [result.segmentation.shape for result in results] == [(64, 64), (48, 100), (1, 1), (300, 7)]
    for result in results:
        assert result.segmentation.dtype == np.int32
        ids = [segment["id"] for segment in result.segments_info]
        assert sorted(ids) == sorted(set(np.unique(result.segmentation)) - {0})
        assert sum(segment["area"] for segment in result.segments_info) == (result.segmentation > 0).sum()


def test_results_do_not_depend_on_the_batch(pipe):
    images = [picture(64, 64, seed) for seed in range(5)]
    together = pipe(images, 3, output_type="latent", image_ids=list("abcde"))
    alone = torch.cat(
        [pipe([image], 3, output_type="latent", image_ids=[name]) for image, name in zip(images, "abcde")]
    )
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    pairs = pipe(images, 3, output_type="latent", image_ids=list("abcde"), batch_size=2)
    torch.testing.assert_close(together, pairs, rtol=1e-4, atol=1e-5)


def test_noise_can_be_given(pipe):
    noise = torch.randn(2, *pipe.info.latent_shape, generator=torch.Generator().manual_seed(3))
    images = [picture(64, 64, seed) for seed in range(2)]
    given = pipe(images, 2, latents=noise, output_type="latent")
    drawn = pipe(images, 2, generator=torch.Generator().manual_seed(3), output_type="latent")
    torch.testing.assert_close(given, drawn)
    assert not torch.allclose(given, pipe(images, 2, seed=1, output_type="latent"))


def test_logits_decode_to_the_same_map(pipe):
    image = picture(64, 64)
    logits = pipe(image, 2, output_type="logits")
    assert logits.shape == (1, pipe.info.mask_vae.num_slots, 64, 64)
    result = pipe(image, 2, thresholds=ANYTHING_GOES)[0]
    labels = logits[0].argmax(0).numpy()
    assert (np.where(labels > 0, labels + 1, 0) == result.segmentation).mean() > 0.999


def test_connected_pieces(pipe):
    settings = {"images": picture(48, 64), "num_inference_steps": 1, "thresholds": ANYTHING_GOES}
    whole, split = pipe(**settings)[0], pipe(**settings, connected=9)[0]
    assert len(split.segments_info) != len(whole.segments_info)
    assert min(segment["area"] for segment in split.segments_info) >= 9
    np.testing.assert_array_equal(split.segmentation, connected(whole, 9).segmentation)
    settings["num_samples"] = 2
    (whole,), (split,) = pipe.ensemble(**settings), pipe.ensemble(**settings, connected=9)
    np.testing.assert_array_equal(split.segmentation, connected(whole, 9).segmentation)
    np.testing.assert_array_equal(split.agreement, whole.agreement)


def test_callback_sees_every_step(pipe):
    seen = []
    pipe(picture(64, 64), 4, output_type="latent", callback=lambda step, time, latents, x0: seen.append((step, time)))
    assert seen == [(0, 999), (1, 749), (2, 499), (3, 249)]


def test_grey_and_transparent_pictures_work(pipe):
    for mode in ("L", "RGBA", "P", "CMYK", "1"):
        assert pipe(Image.new(mode, (20, 30)), 1)[0].segmentation.shape == (30, 20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": np.zeros((4, 4), np.uint8)}, r"images\[0\]: uint8 of shape \(4, 4\)"),
        ({"images": [np.zeros((4, 4, 3), np.float32)]}, "float32"),
        ({"output_type": "mask"}, "output_type='mask'"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"num_inference_steps": 1001}, "num_inference_steps=1001"),
        ({"latents": torch.zeros(1, 4, 3, 3)}, r"latents: shape \(1, 4, 3, 3\)"),
        ({"image_ids": [1, 2]}, "2 ids for 1 images"),
        ({"batch_size": 0}, "batch_size=0: at least 1"),
        ({"connected": -1}, "connected=-1: at least 0"),
        ({"connected": 0.5}, "connected=0.5: a whole number"),
    ],
)
def test_wrong_arguments_are_named(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**({"images": picture(8, 8), "num_inference_steps": 1} | arguments))


def test_save_pretrained_copies_bit_for_bit(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "copy")
    again = LDMSegPipeline.from_pretrained(tmp_path / "copy")
    image = picture(64, 64)
    assert torch.equal(pipe(image, 2, output_type="latent"), again(image, 2, output_type="latent"))
    with pytest.raises(FileExistsError, match="not empty"):
        pipe.save_pretrained(tmp_path / "copy")


def test_folders_that_are_no_models(model_dir, tmp_path):
    with pytest.raises(CheckpointError, match="no such model folder"):
        LDMSegPipeline.from_pretrained(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"no model_index\.json"):
        LDMSegPipeline.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="it is a mask auto-encoder"):
        LDMSegPipeline.from_pretrained(f"{model_dir}-autoencoder")


@pytest.mark.parametrize("settings", [{"solver": "dpmpp_2m"}, {"solver": "heun"}, {"eta": 0.8}], ids=str)
def test_every_solver_is_reproducible_whatever_the_batch(pipe, settings):
    images = [picture(64, 64, seed) for seed in range(3)]
    together = pipe(images, 4, output_type="latent", image_ids=list("abc"), **settings)
    assert torch.equal(together, pipe(images, 4, output_type="latent", image_ids=list("abc"), **settings))
    for row, name in enumerate("abc"):
        alone = pipe(images[row], 4, output_type="latent", image_ids=[name], **settings)
        torch.testing.assert_close(together[[row]], alone, rtol=1e-4, atol=1e-4)
    plain = pipe(images, 4, output_type="latent", image_ids=list("abc"))
    assert not torch.allclose(together, plain)
    one = [pipe(images, 1, output_type="latent", **each) for each in ({}, settings)]
    torch.testing.assert_close(*one, rtol=1e-4, atol=1e-5)


def test_timesteps_are_the_callers(pipe):
    image, seen = picture(64, 64), []
    pipe(image, timesteps=[999, 600, 40], callback=lambda step, time, *_: seen.append(time))
    assert seen == [999, 600, 40]
    leading = pipe(image, 4, timesteps="leading", output_type="latent")
    assert torch.equal(leading, pipe(image, timesteps=[750, 500, 250, 0], output_type="latent"))
    assert torch.equal(pipe(image, 4, timesteps="trailing", output_type="latent"), pipe(image, 4, output_type="latent"))


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "heun"])
@pytest.mark.parametrize(
    "settings",
    [
        ("scheduler.prediction_type=epsilon", "scheduler.rescale_zero_snr=false"),
        ("scheduler.prediction_type=v_prediction", "scheduler.rescale_zero_snr=true"),
        ("scheduler.prediction_type=sample", "scheduler.rescale_zero_snr=true"),
    ],
    ids=["epsilon", "v, zero SNR", "x0, zero SNR"],
)
def test_every_prediction_from_loss_to_map(settings, solver, tmp_path):
    """The stage's loss has gradients, the saved model samples."""
    from ldmseg_fast.config import load_config
    from ldmseg_fast.training.stages import DiffusionStage
    from tests.conftest import NARROW, make_model

    model = make_model(tmp_path / "model", settings)
    stage = DiffusionStage(load_config("tiny", [*NARROW, *settings, f"model.mask_vae={model}-autoencoder"]))
    batch = {
        "image": torch.zeros(2, 3, 64, 64, dtype=torch.uint8),
        "segment_ids": torch.ones(2, 64, 64, dtype=torch.uint8),
        "table": torch.arange(256, dtype=torch.uint8).clamp(max=31).repeat(2, 1),
        "image_id": [1, 2],
    }
    loss = stage(batch, 0)["loss"]
    loss.backward()
    assert torch.isfinite(loss) and all(
        torch.isfinite(p.grad).all() for p in stage.unet.parameters() if p.grad is not None
    )
    latents = LDMSegPipeline.from_pretrained(model)(picture(64, 64), 3, solver=solver, output_type="latent")
    assert torch.isfinite(latents).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "euler"}, "solver='euler': one of ddim, dpmpp_2m, heun"),
        ({"eta": 2.0}, "eta=2.0"),
        ({"eta": 0.5, "solver": "heun"}, "heun is deterministic"),
        ({"timesteps": [3, 5]}, r"timesteps=\[3, 5\]"),
        ({"timesteps": "sideways"}, "timesteps='sideways'"),
    ],
)
def test_wrong_sampling_is_refused_before_any_work(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe([], 1, **arguments)
