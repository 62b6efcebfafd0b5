"""Presets, and how a run's settings are put together: a preset and its stage's recipe or a file, then `key=value`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ldmseg_fast.config.checks import check_used, validate
from ldmseg_fast.config.recipes import recipe_of
from ldmseg_fast.config.settings import (
    Config,
    DataConfig,
    DiffusionConfig,
    FewStepConfig,
    ImageEncoderConfig,
    LossConfig,
    MaskVAEConfig,
    ModelConfig,
    PostprocessConfig,
    SchedulerConfig,
    TrainConfig,
    UNetConfig,
)
from ldmseg_fast.config.values import update
from ldmseg_fast.config.yaml_file import MAX_CHARACTERS, parse_yaml
from ldmseg_fast.errors import ConfigError
from ldmseg_fast.files import read_text

# 64x64 pictures on a CPU, minutes.
TINY = Config(
    data=DataConfig(image_size=64, num_workers=0, cache=True, id_assignment="position_cell"),
    mask_vae=MaskVAEConfig(
        num_bits=5,
        num_slots=32,
        widths=(32, 64, 128),
        decoder_width=64,
        num_upscalers=1,
        norm_groups=8,
        scaling_factor=0.0,
    ),
    image_encoder=ImageEncoderConfig(
        kind="conv", latent_channels=32, widths=(32, 64, 96), downsampling=4, scaling_factor=1.0
    ),
    unet=UNetConfig(
        sample_size=16,
        in_channels=40,
        block_out_channels=(64, 128, 192),
        attention=(False, True, True),
        num_heads=(4, 4, 4),
        layers_per_block=1,
        norm_groups=8,
    ),
    model=ModelConfig(freeze=()),
    scheduler=SchedulerConfig(prediction_type="sample", loss_weighting="none"),
    loss=LossConfig(num_points=1024, kl=1e-6, latent_noise=0.3),
    # with latents scaled down most steps are noise to the network, which then has to look at the picture
    diffusion=DiffusionConfig(self_condition=0.5, latent_scale=0.5),
    train=TrainConfig(
        steps=3000,
        batch_size=32,
        learning_rate=1e-3,
        warmup=100,
        ema=0.998,
        zero_stage=0,  # cutting so small a model costs its ranks more than it saves
        validate_every=1000,
        save_every=500,
    ),
    postprocess=PostprocessConfig(count_threshold=8),
    num_inference_steps=10,
)

# Photographs on a CPU, hours: 128x128 masks, pictures of 256x256 through a pre-trained encoder. First `autoencoder`,
# then `one_step` with model.mask_vae. Slots are for nine pictures of ten of BSDS500, which has most segments.
PHOTOGRAPHS = replace(
    TINY,
    data=DataConfig(
        image_size=128,
        num_workers=2,
        scale_min=0.5,
        aspect_jitter=0.25,
        color_jitter=0.3,
        id_assignment="position_cell",
    ),
    mask_vae=replace(TINY.mask_vae, num_bits=6, num_slots=64),
    image_encoder=ImageEncoderConfig(
        kind="efficientnet_lite", latent_channels=32, downsampling=4, scaling_factor=1.0, picture_scale=2
    ),
    unet=replace(TINY.unet, sample_size=32),
    loss=replace(TINY.loss, num_points=2048),
    diffusion=replace(TINY.diffusion, latent_scale=1.0),
    few_step=FewStepConfig(train_decoder=True),
    train=replace(TINY.train, steps=6000, batch_size=16, image_encoder_lr=0.1),
    postprocess=PostprocessConfig(count_threshold=16),
)

# The same on a GPU, half an hour: 256x256 masks, pictures of 512x512, 36 M parameters.
PHOTOGRAPHS_256 = replace(
    PHOTOGRAPHS,
    data=replace(PHOTOGRAPHS.data, image_size=256, num_workers=14, resize="torch"),
    mask_vae=replace(
        PHOTOGRAPHS.mask_vae, num_bits=7, num_slots=128, widths=(32, 64, 128, 256), decoder_width=128, num_upscalers=2
    ),
    image_encoder=replace(PHOTOGRAPHS.image_encoder, latent_channels=64, downsampling=8),
    unet=replace(
        PHOTOGRAPHS.unet, in_channels=72, block_out_channels=(128, 256, 352), num_heads=(4, 8, 8), norm_groups=32
    ),
    loss=replace(PHOTOGRAPHS.loss, num_points=4096),
    train=replace(PHOTOGRAPHS.train, steps=20000, batch_size=128, compile="blocks", precision="auto"),
    postprocess=PostprocessConfig(count_threshold=64),
)

# The paper's run: COCO, Stable Diffusion 1.4, 8 GPUs.
COCO = Config(
    data=DataConfig(num_workers=8),
    train=TrainConfig(checkpointing="blocks", compile="blocks"),
)

# COCO in one step, for speed: a fifth of the paper's UNet, with sides that e4m3 products take, and EfficientNet-Lite0
# in the place of Stable Diffusion's encoder, which costs more than its UNet. First `autoencoder`, then `one_step`.
COCO_FAST = replace(
    PHOTOGRAPHS_256,
    data=replace(PHOTOGRAPHS_256.data, image_size=512),
    image_encoder=replace(PHOTOGRAPHS_256.image_encoder, picture_scale=1),
    unet=UNetConfig(in_channels=68, block_out_channels=(160, 320, 512, 640), num_heads=(4, 8, 8, 8)),
    diffusion=replace(PHOTOGRAPHS_256.diffusion, self_condition=0.0),  # one step has no estimate to look at
    postprocess=PostprocessConfig(),
    num_inference_steps=1,
)

PRESETS: dict[str, Config] = {
    "tiny": TINY,
    "coco": COCO,
    "coco-fast": COCO_FAST,
    "photographs": PHOTOGRAPHS,
    "photographs_256": PHOTOGRAPHS_256,
}


def load_config(
    name_or_file: str,
    overrides: list[str] | tuple[str, ...] = (),
    stage: str = "",
    begun: Mapping[str, Any] = MappingProxyType({}),
) -> Config:
    """Loads a preset (a name of PRESETS) or a YAML/JSON file, with `key=value` overrides.

    Args:
        name_or_file: the preset or the file. A file may say which `stage` its settings are for, as a run's config.json.
        overrides: these win.
        stage: whose recipe is laid over the preset, and which uses what `overrides` set; "": any.
        begun: the settings of a run that goes on, nested; they take the place of the recipe's.

    Raises:
        ConfigError: no such preset or file, an unknown key, a wrong type, values that contradict each other, a file for
            another stage, an override that the stage ignores.
    """
    recipe: list[str] = []
    given: set[str] = set()  # settings of the UNet
    if name_or_file in PRESETS:
        config = PRESETS[name_or_file]
        if stage:
            settings = recipe_of(name_or_file, stage).settings
            recipe = [f"{key}={value}" for key, value in (dict(settings) | _recorded(begun, settings)).items()]
    else:
        values = _read_file(Path(name_or_file))
        meant = values.pop("stage", stage)
        values.pop("settings_version", None)
        if stage and meant != stage:
            raise ConfigError(
                f"{name_or_file}: stage={meant}: settings of another stage than {stage}; take those of {stage}, or "
                f"delete the line `stage` there"
            )
        if isinstance(values.get("unet"), dict):
            given |= values["unet"].keys()
        try:
            config = update(Config(), values)
        except ConfigError as error:
            raise ConfigError(f"{name_or_file}: {error}") from None
    if isinstance(overrides, str):
        raise ConfigError(f"{overrides!r}: a list of settings expected, such as ['train.steps=1000']")
    base, texts = config, {}
    for item in (*recipe, *overrides):
        key, equals, value = item.partition("=") if isinstance(item, str) else ("", "", "")
        if not equals or not key:
            raise ConfigError(f"{item!r}: settings are written key=value, such as train.steps=1000")
        if key.startswith("unet."):
            given.add(key.removeprefix("unet."))
        texts[key] = value
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        config = update(config, nested)
    config = validate(_with_fitting_channels(config, given))
    if stage:
        check_used(stage, texts, config, base)
    return config


def _with_fitting_channels(config: Config, given: Iterable[str]) -> Config:
    """Gives the UNet the channels that the latents have, where its settings do not say another number."""
    mask, image = config.mask_vae.latent_channels, config.image_encoder.latent_channels
    fitting = {"in_channels": mask * (2 if config.diffusion.self_condition > 0 else 1) + image, "out_channels": mask}
    if config.unet.separate_conv_in or config.unet.separate_image_encoder:
        fitting["image_channels"] = image
    values = {name: channels for name, channels in fitting.items() if name not in given}
    try:
        return update(config, {"unet": values})
    except ConfigError as error:
        raise ConfigError(
            f"mask_vae.latent_channels={mask}, image_encoder.latent_channels={image}: the UNet has no room for so many "
            f"({error}); choose fewer"
        ) from None


def _recorded(begun: Mapping[str, Any], keys: Iterable[str]) -> dict[str, str]:
    """What a run has recorded of the settings `keys`, as text."""
    found = {}
    for key in keys:
        value: Any = begun
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            found[key] = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return found


def _read_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"--config {path}: neither a preset ({', '.join(PRESETS)}) nor a file")
    if path.stat().st_size > 4 * MAX_CHARACTERS:
        raise ConfigError(f"{path}: {path.stat().st_size >> 10} KiB of settings; a run's are a few")
    try:
        values = parse_yaml(read_text(path, ConfigError), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not readable as YAML or JSON ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a mapping of settings expected")
    return values
