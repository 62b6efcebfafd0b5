"""Settings: presets, overrides, files, and errors that name the key."""

import json
import re
from dataclasses import fields, is_dataclass, replace
from operator import attrgetter

import pytest

from ldmseg_fast.config import PRESETS, Config, describe, from_dict, load_config, to_dict, update, validate
from ldmseg_fast.config.checks import USED_BY
from ldmseg_fast.config.recipes import STAGE_NAMES
from ldmseg_fast.errors import ConfigError


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name):
    assert validate(load_config(name)) == PRESETS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip(name):
    config = PRESETS[name]
    assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("name", PRESETS)
def test_description_leads_back(name):
    """What a run prints can be given to another run."""
    lines = describe(PRESETS[name])
    settings = [line for line in lines if not line.endswith("=")]
    rebuilt = Config()
    for line in settings:
        key, _, value = line.partition("=")
        for part in reversed(key.split(".")):
            value = {part: value}
        rebuilt = update(rebuilt, json.loads(json.dumps(value).replace("'", "")))
    assert rebuilt == PRESETS[name]


def test_every_setting_can_be_overridden_by_its_own_default():
    def keys(config, prefix=""):
        for item in fields(config):
            value = getattr(config, item.name)
            yield from (
                keys(value, f"{prefix}{item.name}.") if is_dataclass(value) else [(f"{prefix}{item.name}", value)]
            )

    for key, value in keys(PRESETS["tiny"]):
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        assert load_config("tiny", [f"{key}={text}"]) == PRESETS["tiny"], key


def test_overrides_of_every_type():
    config = load_config(
        "tiny",
        [
            "train.steps=1e3",
            "train.learning_rate=3e-4",
            "train.clip=2",
            "data.cache=FALSE",
            "train.channels_last=no",
            "unet.num_heads=(4, 4, 2)",
            "unet.attention=[true,no,1]",
            "model.freeze=",
            "data.root=/data/coco=2017",
            "train.betas=0.9,0.95",
        ],
    )
    assert (config.train.steps, config.train.learning_rate, config.train.clip) == (1000, 3e-4, 2.0)
    assert (config.data.cache, config.train.channels_last) == (False, False)
    assert (config.unet.num_heads, config.unet.attention) == ((4, 4, 2), (True, False, True))
    assert (config.model.freeze, config.data.root, config.train.betas) == ((), "/data/coco=2017", (0.9, 0.95))
    assert load_config("tiny", ["model.freeze=time_embedding,conv_in"]).model.freeze == ("time_embedding", "conv_in")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.step=5", r"unknown setting train\.step; did you mean train\.steps\?"),
        ("trian.steps=5", r"unknown setting trian; did you mean train\?"),
        ("zzz=5", "unknown setting zzz; known: .*unet"),
        ("train.steps.more=5", r"train\.steps="),
        ("train=5", "train"),
        ("train.steps=many", r"train\.steps='many': a whole number expected"),
        ("train.steps=1.5", r"train\.steps='1\.5': a whole number expected"),
        ("train.steps=inf", "a whole number expected"),
        ("train.steps=nan", "a whole number expected"),
        ("train.clip=much", r"train\.clip='much': a number expected"),
        ("data.cache=maybe", r"data\.cache='maybe': true or false expected"),
        ("unet.num_heads=4,x,4", r"unet\.num_heads='x': a whole number expected"),
        ("train.betas=0.9", r"train\.betas='0\.9': 2 values expected"),
        ("scheduler.prediction_type=noise", "one of epsilon, sample, v_prediction expected"),
        ("train.steps", "settings are written key=value"),
        ("=5", "settings are written key=value"),
    ],
)
def test_wrong_settings_are_named(setting, message):
    with pytest.raises(ConfigError, match=message):
        load_config("tiny", [setting])


CONVOLUTIONS = ["image_encoder.kind=efficientnet_lite", "image_encoder.fine_features=convolutions"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["mask_vae.num_bits=4"], "mask_vae.num_bits=4 cannot name 32 slots"),
        (["unet.in_channels=36"], "unet.in_channels=36: mask \\+ image \\+ condition make 40"),
        (["unet.out_channels=8"], "unet.out_channels"),
        (["unet.num_heads=4,4"], "equally long"),
        (["image_encoder.blocks=0,1"], "equally long"),
        ([*CONVOLUTIONS, "image_encoder.blocks=0,1"], "equally long"),
        (["image_encoder.downsampling=8"], "image_encoder.downsampling=8"),
        (["data.image_size=60"], "data.image_size=60 must be a multiple of 16"),
        (["mask_vae.num_upscalers=3"], "overshoots"),
        (["mask_vae.norm_groups=7"], "mask_vae.widths: 128 must be a multiple of mask_vae.norm_groups=7"),
        (["mask_vae.middle_width=12"], "mask_vae.middle_width: 12 must be a multiple"),
        (["mask_vae.upscale_width=63"], "mask_vae.upscale_width: 63 must be a multiple"),
        (["mask_vae.decoder_width=63"], "mask_vae.decoder_width: 63 must be a multiple"),
        (["unet.norm_groups=48"], "unet.block_out_channels: 64 must be a multiple of unet.norm_groups=48"),
        (["image_encoder.norm_groups=5"], "image_encoder.widths: 64 must be a multiple"),
        (["unet.num_heads=4,4,5"], "192 must be a multiple of its unet.num_heads, 5"),
        (["unet.attention=false,true,false", "unet.num_heads=4,4,5"], "a multiple of its unet.num_heads, 5"),
        (["scheduler.beta_start=0.5"], "scheduler.beta_start=0.5 must not exceed scheduler.beta_end"),
        (["num_inference_steps=2000"], "scheduler.num_train_timesteps has 1000"),
        (["train.steps=0"], "train.steps=0: from 1"),
        (["train.accumulation=0"], "train.accumulation=0: from 1"),
        (["train.accumulation=3"], "a multiple of train.accumulation"),
        (["train.ema=1"], "train.ema=1.0"),
        (["diffusion.self_condition=1.5"], "from 0 to 1"),
        (["unet.conditioning=learned"], "contradict each other"),
        (["unet.cross_attention_dim=16"], "contradict each other"),
        (["unet.separate_conv_in=true", "unet.image_channels=4"], "=4 must be image_encoder.latent_channels, 32"),
        (["conditioning.caption_dropout=2"], "caption_dropout=2.0: from 0 to 1"),
        (["train.learning_rate=nan"], "learning_rate=nan"),
        (["train.learning_rate=-1"], "learning_rate=-1.0"),
        (["postprocess.mask_threshold=7"], "mask_threshold=7.0: from 0 to 1"),
        (["loss.num_points=0"], "num_points=0: from 1"),
        (["num_inference_steps=-3"], "num_inference_steps=-3: from 1"),
        (["model.attention=fp8"], "model.attention=fp8 has no backward pass: train with auto"),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(ConfigError, match=message):
        load_config("tiny", settings)


def test_the_unet_has_the_channels_of_the_latents(tmp_path):
    """Where nobody has said others: whoever changes the latents need not add up."""
    unet = load_config("tiny", ["mask_vae.latent_channels=16"]).unet
    assert (unet.in_channels, unet.out_channels) == (16 + 32 + 16, 16)
    unet = load_config("tiny", ["diffusion.self_condition=0", "image_encoder.latent_channels=8"]).unet
    assert (unet.in_channels, unet.out_channels) == (12, 4)
    assert load_config("tiny", ["unet.separate_conv_in=true"]).unet.image_channels == 32
    file = tmp_path / "run.yaml"
    with pytest.raises(ConfigError, match=r"^mask_vae\.latent_channels=9999.* no room for so many"):
        load_config("tiny", ["mask_vae.latent_channels=9999"])
    file.write_text("mask_vae:\n  latent_channels: 8\n")
    assert load_config(str(file)).unet.out_channels == 8
    file.write_text("mask_vae:\n  latent_channels: 8\nunet:\n  out_channels: 4\n")
    with pytest.raises(ConfigError, match=r"unet\.out_channels must equal mask_vae\.latent_channels"):
        load_config(str(file))
    assert all(load_config(name) == preset for name, preset in PRESETS.items())


def test_files(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("train:\n  steps: 12\n  betas: [0.8, 0.9]\nunet:\n  attention: [true, true, true, true]\n")
    config = load_config(str(file), ["train.steps=13"])
    assert (config.train.steps, config.train.betas) == (13, (0.8, 0.9))
    assert config.unet.attention == (True,) * 4
    file = tmp_path / "run.json"
    file.write_text(json.dumps(to_dict(PRESETS["tiny"])))
    assert load_config(str(file)) == PRESETS["tiny"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {steps: x}", r"train\.steps='x'"),
        ("train:\n  stepz: 3", r"did you mean train\.steps"),
        ("train: 3", "train"),
        ("train: {steps: true}", r"train\.steps=True: a whole number expected"),
        ("data: {root: 3}", r"data\.root=3: text expected"),
        ("unet: {num_heads: 4}", r"unet\.num_heads=4: a list expected"),
        ("- a\n- b", "a mapping of settings expected"),
        ("", "a mapping of settings expected"),
        ("a: [", "not readable as YAML or JSON"),
        ("!!python/object/apply:os.system ['true']", "not readable as YAML or JSON"),
    ],
)
def test_wrong_files(text, message, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(str(tmp_path / "run.yaml"))


def test_neither_preset_nor_file(tmp_path):
    with pytest.raises(ConfigError, match=r"neither a preset \(tiny, coco.*\) nor a file"):
        load_config(str(tmp_path / "nothing.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match="not readable"):
        load_config(str(tmp_path / "binary.yaml"))


@pytest.mark.parametrize(("name", "side", "pictures"), [("photographs", 128, 256), ("photographs_256", 256, 512)])
def test_the_presets_for_photographs(name, side, pictures):
    config = load_config(name)
    assert config.data.image_size == side and side * config.image_encoder.picture_scale == pictures
    assert config.data.scale_min < 1 and config.data.color_jitter > 0 and config.data.aspect_jitter > 0
    assert 2**config.mask_vae.num_bits == config.mask_vae.num_slots
    for other in ("tiny", "coco"):
        data = load_config(other).data
        assert (data.scale_min, data.color_jitter, data.aspect_jitter) == (1, 0, 0)


def test_a_pipeline_is_no_folder():
    class StableDiffusionPipeline:
        def save_pretrained(self, folder):
            """As diffusers' pipelines have it."""

    config = load_config("tiny")
    with pytest.raises(ConfigError, match=r"model\.init_from is a StableDiffusionPipeline and a folder is expected"):
        validate(replace(config, model=replace(config.model, init_from=StableDiffusionPipeline())))


@pytest.mark.parametrize("overrides", ["train.steps=1", [5], [None], ["train.steps"], ["=1"]])
def test_settings_that_are_not_written_as_such(overrides):
    with pytest.raises(ConfigError, match=r"a list of settings expected|settings are written key=value"):
        load_config("tiny", overrides)


@pytest.mark.parametrize(
    ("stage", "setting", "message"),
    [
        ("one_step", "diffusion.hard_examples=0.5", "only stage diffusion uses it; leave it out"),
        ("one_step", "diffusion.own_estimate=0.5", "only stage diffusion uses it; leave it out"),
        ("one_step", "diffusion.area_weights=true", "only stage diffusion uses it; leave it out"),
        ("one_step", "conditioning.caption_dropout=0.5", "only stage diffusion uses it; leave it out"),
        ("distillation", "loss.dice=2", "only stages autoencoder, diffusion, one_step use it; leave it out"),
        ("diffusion", "loss.dice=2", "stage diffusion uses it in its task loss, which is off; set"),
        ("diffusion", "loss.drop_blocks=0.5", "only stage autoencoder uses it; leave it out"),
        ("diffusion", "few_step.teacher_steps=4", "only stage distillation uses it; leave it out"),
        ("diffusion", "diffusion.sample_posterior=true", "no stage uses it; leave it out"),
        ("autoencoder", "few_step.steps=4", "only stages one_step, distillation use it; leave it out"),
        ("autoencoder", "model.init_from=tiny", "only stages diffusion, one_step, distillation use it; leave it out"),
    ],
)
def test_a_setting_that_the_stage_ignores_is_refused(stage, setting, message):
    with pytest.raises(ConfigError, match=re.escape(f"{setting}: {message}")):
        load_config("tiny", [setting], stage)


def test_what_all_stages_are_given_may_be_of_one():
    """Defaults, what a preset or a file has, and what describes data and networks."""
    for stage in STAGE_NAMES:
        load_config("photographs", ["few_step.train_decoder=false", "few_step.steps=1", "loss.kl=1e-6"], stage)
        load_config("photographs", ["few_step.train_decoder=true", "unet.sample_size=32", "loss.num_points=8"], stage)
    load_config("tiny", ["loss.dice=2", "diffusion.task_loss=0.1"], "diffusion")
    assert load_config("tiny", ["few_step.steps=4"]).few_step.steps == 4  # of no stage in particular


def test_the_settings_that_stages_share_out_are_there():
    for key, stages in USED_BY.items():
        assert attrgetter(key)(Config()) is not None and set(stages) < set(STAGE_NAMES)
