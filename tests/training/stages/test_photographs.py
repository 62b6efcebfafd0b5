"""A pre-trained image encoder in training: what is trained at which rate, from where, and what the folder then does."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ldmseg_fast import LDMSegPipeline
from ldmseg_fast.checkpoints.model_folder import load_component_config
from ldmseg_fast.config import load_config
from ldmseg_fast.errors import BackendError, CheckpointError, ConfigError
from ldmseg_fast.evaluation import EvaluationOptions, evaluate
from ldmseg_fast.training.estimate import count_parameters
from ldmseg_fast.training.loop import train
from ldmseg_fast.training.stages import DiffusionStage, DistillationStage, OneStepStage
from tests.conftest import NARROW

ENCODER = ["image_encoder.kind=efficientnet_lite", "image_encoder.picture_scale=2"]
SMALL = [*NARROW, *ENCODER, "few_step.matching=none", "train.ema=0", "train.warmup=1", "data.val_limit=2"]
SMALL += ["train.validate_every=1000", "train.batch_size=2", "train.steps=2", "train.log_every=1"]


@pytest.fixture
def autoencoder(model_dir):
    return model_dir.with_name(model_dir.name + "-autoencoder")


def config(*overrides):
    return load_config("tiny", [*SMALL, *overrides])


def test_the_factor_is_for_what_is_pretrained(autoencoder):
    stage = OneStepStage(config(f"model.mask_vae={autoencoder}", "train.image_encoder_lr=0.1"))
    factors = {id(p): group["lr_factor"] for group in stage.parameter_groups() for p in group["params"]}
    trained = {name: factors[id(p)] for name, p in stage.named_parameters() if p.requires_grad}
    assert {factor for name, factor in trained.items() if "image_vae.network." in name} == {0.1}
    assert {factor for name, factor in trained.items() if "image_vae.network." not in name} == {1.0}
    assert "image_vae.projections.0.weight" in trained


def test_a_factor_of_zero_freezes_it(autoencoder):
    stage = DiffusionStage(config(f"model.mask_vae={autoencoder}", "train.image_encoder_lr=0"))
    names = [name for name, p in stage.named_parameters() if p.requires_grad and name.startswith("image_vae.")]
    assert names and all(name.startswith("image_vae.projections.") for name in names)
    stage.parameter_groups()


@pytest.mark.parametrize("start", ["model.init_from", "model.mask_vae"])
def test_it_takes_the_place_of_another_encoder(model_dir, autoencoder, start):
    folder = model_dir if start == "model.init_from" else autoencoder
    stage = OneStepStage(config(f"{start}={folder}"))
    assert stage.config.image_encoder.kind == "efficientnet_lite"
    own = DiffusionStage(config(f"model.mask_vae={autoencoder}")).image_vae.network.state_dict()
    for name, value in stage.image_vae.network.state_dict().items():
        assert torch.equal(value, own[name])


def test_the_fast_preset_trains_and_predicts_in_one_step(scenes, tmp_path):
    small = [
        "data.image_size=64", "data.num_workers=0", "mask_vae.num_bits=5", "mask_vae.num_slots=32",
        "mask_vae.widths=8,8,16,16", "mask_vae.decoder_width=16", "image_encoder.latent_channels=16",
        "unet.in_channels=20", "unet.block_out_channels=32,32", "unet.attention=false,true", "unet.num_heads=2,4",
        "unet.layers_per_block=1", "unet.sample_size=8", "loss.num_points=128", "train.batch_size=2", "train.steps=2",
        "train.precision=fp32", "train.compile=none", "train.threads=1", "train.warmup=1", "train.log_every=1",
        "data.val_limit=2", f"data.root={scenes}",
    ]  # fmt: skip
    first = train("autoencoder", load_config("coco-fast", [*small, f"output_dir={tmp_path / 'a'}"], "autoencoder"))
    settings = [*small, "few_step.matching=none", f"model.mask_vae={first}", f"output_dir={tmp_path / 'b'}"]
    whole = train("one_step", load_config("coco-fast", settings, "one_step"))
    pipe = LDMSegPipeline.from_pretrained(whole)
    assert pipe.info.num_inference_steps == 1 and not pipe.info.self_condition
    picture = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    assert pipe(picture)[0].segmentation.shape == (50, 70)


@pytest.mark.parametrize("stage", ["diffusion", "one_step"])
def test_training_goes_on_and_its_model_predicts(autoencoder, scenes, tmp_path, stage):
    settings = [f"model.mask_vae={autoencoder}", f"data.root={scenes}"]
    whole = train(stage, config(*settings, f"output_dir={tmp_path / 'whole'}"))
    parts = tmp_path / "parts"
    train(stage, config(*settings, f"output_dir={parts}", "train.steps=1", "train.schedule=constant"))
    train(stage, config(*settings, f"output_dir={parts}", "train.schedule=constant"), resume=True)
    lines = (whole / "logs" / "log.jsonl").read_text().splitlines()
    assert len([line for line in map(json.loads, lines) if "loss" in line]) == 2
    saved, _ = load_component_config(whole, "image_vae")
    assert saved.kind == "efficientnet_lite" and saved.picture_scale == 2

    pipe = LDMSegPipeline.from_pretrained(whole)
    assert pipe.info.picture_size == 128 and pipe.info.size_multiple == 16
    picture = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    (result,) = pipe(Image.fromarray(picture), 1)
    assert result.segmentation.shape == (50, 70)
    assert pipe(picture, 1, output_type="logits").shape[-2:] == (64, 64)
    report = evaluate(whole, scenes, EvaluationOptions(limit=2, baselines=False))
    assert report["image_size"] == 64


def test_a_size_that_it_does_not_divide_by(autoencoder, tmp_path):
    DiffusionStage(config(f"model.mask_vae={autoencoder}", "image_encoder.picture_scale=1")).save(tmp_path / "model")
    pipe = LDMSegPipeline.from_pretrained(tmp_path / "model")
    assert pipe.info.size_multiple == 32
    with pytest.raises(BackendError, match="image_size=48: this model takes multiples of 32 pixels"):
        LDMSegPipeline.from_pretrained(tmp_path / "model", image_size=48)


@pytest.mark.parametrize("kind", ["conv", "taesd"])
def test_another_encoder_at_a_scale_that_it_does_not_reduce(autoencoder, kind, tmp_path):
    """Without the check its latents would be twice as large as the masks'."""
    (tmp_path / "x.safetensors").touch()
    settings = [f"model.mask_vae={autoencoder}", f"image_encoder.kind={kind}", "image_encoder.picture_scale=4"]
    settings.append(f"image_encoder.path={tmp_path / 'x.safetensors'}")
    with pytest.raises(
        ConfigError, match=rf"picture_scale=4 make 16, but image_encoder.kind={kind} divides .* by [48]; "
    ):
        DiffusionStage(config(*settings))


def test_an_encoder_of_ones_own_sees_pictures_of_the_same_size(autoencoder, scenes, tmp_path):
    """It is the control of what pre-training gives."""
    settings = ["image_encoder.kind=conv", "image_encoder.widths=8,8,16,16", "image_encoder.blocks=0,0,1,1"]
    settings += [f"model.mask_vae={autoencoder}", f"data.root={scenes}", f"output_dir={tmp_path / 'run'}"]
    folder = train("one_step", config(*settings))
    assert LDMSegPipeline.from_pretrained(folder).info.picture_size == 128


def test_distillation_needs_a_model(autoencoder):
    with pytest.raises(ConfigError, match=r"model\.init_from is missing"):
        DistillationStage(config(f"model.mask_vae={autoencoder}"))


def test_training_on_the_model_keeps_its_encoder(autoencoder, tmp_path):
    stage = DiffusionStage(config(f"model.mask_vae={autoencoder}"))
    with torch.no_grad():
        stage.image_vae.network.stem.conv.weight += 1
    stage.save(tmp_path / "model")
    again = OneStepStage(replace(config(f"model.init_from={tmp_path / 'model'}")))
    assert torch.equal(again.image_vae.network.stem.conv.weight, stage.image_vae.network.stem.conv.weight)
    assert torch.equal(again.image_vae.projections[0].weight, stage.image_vae.projections[0].weight)


def test_a_model_goes_on_at_another_size(autoencoder, tmp_path):
    DiffusionStage(config(f"model.mask_vae={autoencoder}", "image_encoder.picture_scale=2")).save(tmp_path / "model")
    sizes = ["data.image_size=128", "image_encoder.picture_scale=1", "unet.sample_size=32"]
    kept, resized = (
        OneStepStage(config(f"model.init_from={tmp_path / 'model'}", f"few_step.resize={resize}", *sizes))
        for resize in ("false", "true")
    )
    assert kept.config.data.image_size == 64 and kept.config.image_encoder.picture_scale == 2
    assert resized.config.data.image_size == 128 and resized.config.image_encoder.picture_scale == 1
    assert resized.config.unet.sample_size == 32
    for (name, value), other in zip(kept.state_dict().items(), resized.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    resized.save(tmp_path / "resized")
    pipe = LDMSegPipeline.from_pretrained(tmp_path / "resized")
    assert pipe.info.image_size == 128 and pipe.info.picture_size == 128


def test_convolutions_reach_the_latents(autoencoder, tmp_path):
    both = [f"model.mask_vae={autoencoder}", "image_encoder.fine_features=convolutions"]
    with pytest.raises(ConfigError, match=r"downsampling=4, but 2 image_encoder.widths make 2; choose another of the"):
        DiffusionStage(config(*both, "image_encoder.widths=8,16", "image_encoder.blocks=0,1"))
    DiffusionStage(config(*both)).save(tmp_path / "model")
    file = tmp_path / "model" / "image_vae" / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"widths": [8, 16], "blocks": [0, 1]}))
    with pytest.raises(
        CheckpointError, match=r"image_vae/config.json: downsampling=4, its 2 widths make another number"
    ):
        LDMSegPipeline.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("fine", ["patches", "convolutions"])
def test_a_model_goes_on_with_finer_features(fine, autoencoder, scenes, tmp_path):
    """It starts where the averages ended; the folder that it writes is predicted with and trained on again."""
    DiffusionStage(config(f"model.mask_vae={autoencoder}", "image_encoder.picture_scale=2")).save(tmp_path / "model")
    start = [f"model.init_from={tmp_path / 'model'}", f"data.root={scenes}", f"output_dir={tmp_path / 'run'}"]
    images = torch.randint(0, 256, (1, 3, 128, 128), dtype=torch.uint8)
    old, new = (OneStepStage(config(*start, *more)) for more in ([], [f"image_encoder.fine_features={fine}"]))
    with torch.no_grad():
        expected = old.encode_images(images)
        assert (new.encode_images(images) - expected).abs().max() < 1e-4 * expected.abs().max()
    folder = train("one_step", config(*start, f"image_encoder.fine_features={fine}"))
    pipe = LDMSegPipeline.from_pretrained(folder)
    assert pipe(np.zeros((40, 60, 3), np.uint8))[0].segmentation.shape == (40, 60)
    assert load_component_config(folder, "image_vae")[0].fine_features == fine
    again = OneStepStage(config(f"model.init_from={folder}"))
    assert again.config.image_encoder.fine_features == fine


@pytest.mark.parametrize(
    "settings",
    [
        ["train.image_encoder_lr=0", "few_step.train_decoder=true"],
        ["train.lr_factors=image_vae.network.:0,image_vae.network.blocks.15.:0.1", "model.freeze=time_embedding"],
    ],
    ids=["decoder", "last block"],
)
def test_the_forecast_counts_what_is_trained(autoencoder, settings):
    run = config(f"model.mask_vae={autoencoder}", *settings)
    stage = OneStepStage(run)
    groups = stage.parameter_groups()
    trained = sum(parameter.numel() for group in groups for parameter in group["params"])
    assert trained == sum(parameter.numel() for parameter in stage.parameters() if parameter.requires_grad)
    assert count_parameters("one_step", stage.config).trainable == trained
