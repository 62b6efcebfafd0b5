"""One step without noise: training, saving, sampling and export start from zeros."""

import numpy as np
import pytest
import torch

from ldmseg_fast import LDMSegPipeline
from ldmseg_fast.checkpoints.model_folder import load_component_config
from ldmseg_fast.config import PostprocessConfig, SchedulerConfig, load_config
from ldmseg_fast.data.coco_panoptic import CocoPanoptic, collate
from ldmseg_fast.diffusion.sampler import image_noise
from ldmseg_fast.errors import ArgumentError, ConfigError
from ldmseg_fast.export.model_export import ExportSettings, export_model
from ldmseg_fast.training.stages import DiffusionStage, OneStepStage
from tests.conftest import NARROW

ANYTHING = PostprocessConfig(0.0, 0, 0.0)


@pytest.fixture
def one_step(model_dir):
    def make(*settings, start=None):
        torch.manual_seed(0)
        where = f"model.init_from={start}" if start else f"model.mask_vae={model_dir}-autoencoder"
        return OneStepStage(load_config("tiny", [*NARROW, where, "few_step.matching=none", *settings]))

    return make


@pytest.fixture
def silent(one_step, tmp_path):
    """A model folder of a stage without noise."""
    one_step("scheduler.init_noise_sigma=0").save(tmp_path / "silent")
    return tmp_path / "silent"


def test_deviation_of_the_noise():
    plain = image_noise(3, ["a", 7], (2, 4, 4))
    torch.testing.assert_close(image_noise(3, ["a", 7], (2, 4, 4), 0.5), 0.5 * plain)
    assert torch.equal(image_noise(3, ["a", 7], (2, 4, 4), 0.0), torch.zeros(2, 2, 4, 4))
    assert image_noise(3, [], (2, 4, 4), 0.0).shape == (0, 2, 4, 4)


def test_training_starts_from_zeros(one_step, scenes):
    dataset = CocoPanoptic(scenes, "train2017", 64, num_slots=32, id_assignment="position")
    batch = collate([dataset[index] for index in range(2)])
    noisy, silent = one_step(), one_step("scheduler.init_noise_sigma=0")
    latents = silent.image_latents(batch)
    assert noisy.initial_noise(batch, 0, latents).std() > 0.9
    assert not silent.initial_noise(batch, 0, latents).any()
    silent(batch, 0)["loss"].backward()
    first, second = (silent.eval().sample(batch, 1, seed) for seed in (0, 1))
    assert torch.equal(first, second)


def test_a_picture_has_one_map(silent):
    assert load_component_config(silent, "scheduler")[0].init_noise_sigma == 0
    pipe = LDMSegPipeline.from_pretrained(silent)
    picture = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    maps = [pipe(picture, 1, seed=seed, thresholds=ANYTHING)[0].segmentation for seed in (0, 1)]
    maps.append(pipe(picture, 1, generator=torch.Generator().manual_seed(5), thresholds=ANYTHING)[0].segmentation)
    assert all(np.array_equal(maps[0], other) for other in maps)
    (alone,) = pipe.ensemble(picture, thresholds=ANYTHING)
    assert np.array_equal(alone.segmentation, maps[0]) and (alone.agreement == 1).all()
    assert pipe.ensemble(picture, flip=True, thresholds=ANYTHING)[0].segmentation.shape == (48, 64)
    with pytest.raises(ArgumentError, match=r"num_samples=2: this model starts from no noise"):
        pipe.ensemble(picture, 2)


def test_what_has_none_stays_without(one_step, silent, model_dir):
    assert one_step(start=silent).config.scheduler.init_noise_sigma == 0
    assert one_step(start=model_dir).config.scheduler.init_noise_sigma == 1
    assert one_step("scheduler.init_noise_sigma=0", start=model_dir).config.scheduler.init_noise_sigma == 0


def test_learning_to_denoise_needs_noise(model_dir, silent):
    settings = [*NARROW, f"model.mask_vae={model_dir}-autoencoder", "scheduler.init_noise_sigma=0"]
    with pytest.raises(ConfigError, match=r"scheduler\.init_noise_sigma=0: stage diffusion learns to denoise"):
        DiffusionStage(load_config("tiny", settings))
    stage = DiffusionStage(load_config("tiny", [*NARROW, f"model.init_from={silent}"]))
    assert stage.config.scheduler.init_noise_sigma == 1  # whatever it starts from


def test_graphs_start_there_too(silent, tmp_path):
    report = export_model(silent, tmp_path / "graphs", ExportSettings("fp32", parity_images=1))
    assert report.ok, report.table()
    picture = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    both = [
        LDMSegPipeline.from_pretrained(silent, *where)(picture, 1, thresholds=ANYTHING)[0].segmentation
        for where in ((), ("onnxruntime", tmp_path / "graphs"))
    ]
    assert (both[0] == both[1]).mean() > 0.999


def test_a_schedule_without_the_setting_has_noise():
    assert SchedulerConfig().init_noise_sigma == 1.0
