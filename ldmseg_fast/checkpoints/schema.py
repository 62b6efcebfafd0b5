"""Holds every JSON of a model folder to types and ranges, before anything is built or allocated from it."""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from ldmseg_fast.config import (
    ConditioningConfig,
    Config,
    DataConfig,
    DiffusionConfig,
    ImageEncoderConfig,
    MaskVAEConfig,
    PostprocessConfig,
    SchedulerConfig,
    UNetConfig,
    from_dict,
    validate,
)
from ldmseg_fast.config.checks import part_checks
from ldmseg_fast.config.limits import Length, Range
from ldmseg_fast.config.settings import IdAssignment, Layers, Pixels, Timesteps, Width, Widths
from ldmseg_fast.config.values import shown
from ldmseg_fast.errors import CheckpointError, ConfigError
from ldmseg_fast.files import read_json

COMPONENTS = {
    "unet": UNetConfig,
    "mask_vae": MaskVAEConfig,
    "image_vae": ImageEncoderConfig,
    "scheduler": SchedulerConfig,
    "conditioning": ConditioningConfig,
}
# what every version has written: without one of these a file is damaged, and a default would be another model
REQUIRED = {
    "unet": ("in_channels", "out_channels", "block_out_channels", "attention", "num_heads", "norm_groups", "norm_eps"),
    "mask_vae": ("num_bits", "num_slots", "latent_channels", "widths", "norm_groups", "scaling_factor"),
    "image_vae": ("kind", "latent_channels", "downsampling", "scaling_factor"),
    "scheduler": ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type"),
    "conditioning": (),
}
THRESHOLDS = ("mask_threshold", "count_threshold", "overlap_threshold")  # as REQUIRED, of the index's `postprocess`
HEAD = ("_class_name", "format_version", "ldmseg_fast")  # of the index, for readers of other versions
MAX_BYTES = 64 << 20  # of a JSON; the index of a very large model's shards is far smaller
Names = Annotated[tuple[Literal["unet", "mask_vae", "image_vae", "scheduler", "conditioning"], ...], Length(1, 5)]
Texts = Annotated[tuple[str, ...], Length(1, 16)]
Size = Annotated[int, Range(1, 10_000_000)]


@dataclass(frozen=True)
class ModelIndex:
    """Lists what `model_index.json` may hold; which of these a folder needs depends on its components."""

    components: Names = ("mask_vae",)
    image_size: Pixels = 512
    num_inference_steps: Timesteps = 50
    self_condition: bool = True
    inpainting: bool = False
    noise: bool = True
    id_assignment: IdAssignment = "random"
    postprocess: PostprocessConfig = PostprocessConfig()  # noqa: RUF009 (frozen)


@dataclass(frozen=True)
class KLSettings:
    """Lists what of diffusers' AutoencoderKL configuration is read here."""

    in_channels: Width = 3
    out_channels: Width = 3
    down_block_types: Texts = ("DownEncoderBlock2D",)
    up_block_types: Texts = ("UpDecoderBlock2D",)
    block_out_channels: Widths = (64,)
    layers_per_block: Layers = 1
    latent_channels: Width = 4
    norm_num_groups: Width = 32
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    scaling_factor: Annotated[float, Range(0.000001, 1_000_000)] = 0.18215


@dataclass(frozen=True)
class ClipSettings:
    """Lists the sizes in transformers' configurations of CLIP."""

    hidden_size: Size = 512
    intermediate_size: Size = 2048
    projection_dim: Size = 512
    num_hidden_layers: Layers = 12
    num_attention_heads: Layers = 8
    vocab_size: Size = 49408
    max_position_embeddings: Size = 77
    num_channels: Width = 3
    image_size: Pixels = 224
    patch_size: Pixels = 32


def read_settings(path: Path) -> dict[str, Any]:
    """Reads a JSON that holds a mapping.

    Raises:
        CheckpointError: a file that is missing, no plain file, enormous, a pointer of Git LFS, or no mapping.
    """
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: no plain file; put the model's own {path.name} in its place")
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise CheckpointError(f"{path}: {path.stat().st_size >> 20} MiB of settings; a model's are far smaller")
    values = read_json(path)
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: a mapping of settings expected; save the model again")
    return values


def check_index(values: dict[str, Any], source: str) -> dict[str, Any]:
    """Returns what `model_index.json` holds, each value in its own type.

    Raises:
        CheckpointError: of another pipeline; a setting that is missing, that there is not, or out of range.
    """
    if values.get("_class_name", "LDMSegPipeline") != "LDMSegPipeline":
        raise CheckpointError(
            f"{source}: _class_name={shown(values['_class_name'])}: a model of another program; LDMSegPipeline is read"
        )
    names = [item.name for item in fields(ModelIndex)]
    for key in [key for key in values if key not in (*names, *HEAD) and not key.startswith("_")]:
        near = difflib.get_close_matches(key, names, n=1, cutoff=0.85)
        cure = f"did you mean {near[0]}?" if near else "remove it, or update ldmseg_fast"
        raise CheckpointError(f"{source}: unknown setting {key[:100]}; {cure}")
    found = checked(ModelIndex, values, source, ours=True)
    missing = [] if "components" in values else ["components"]
    missing += [f"postprocess.{name}" for name in THRESHOLDS if name not in values.get("postprocess", THRESHOLDS)]
    if missing:
        raise CheckpointError(f"{source}: damaged, no {', '.join(missing)} in it; copy it or save the model again")
    return found


def checked(kind: type, values: dict[str, Any], source: str, *, ours: bool = False) -> dict[str, Any]:
    """Returns `values` with those that `kind`, a dataclass, lists in their own types; the others stay as they are.

    Args:
        kind: a dataclass of settings.
        values: by name.
        source: names the file, for errors.
        ours: whether the format is ours, so that null is no value.

    Raises:
        CheckpointError: a value of the wrong type or out of range.
    """
    names = [item.name for item in fields(kind)]
    known = {key: values[key] for key in names if key in values and (ours or values[key] is not None)}
    try:
        found = asdict(from_dict(kind, known))
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from None
    plain = {key: list(found[key]) if isinstance(found[key], tuple) else found[key] for key in known}
    return values | plain


def check_component(name: str, config: Any, extra: dict[str, Any], source: str) -> dict[str, Any]:
    """Checks what the ranges of a component's settings cannot say, and returns `extra` with its values checked.

    Args:
        name: of the component.
        config: its dataclass.
        extra: entries of its config.json whose names start with "_".
        source: names that file, for errors.

    Raises:
        CheckpointError: values that no such network has.
    """
    for key, kind in (("_vae_config", KLSettings), ("_clip_config", ClipSettings)):
        if extra.get(key) is not None:
            if not isinstance(extra[key], dict):
                raise CheckpointError(f"{source}: {key}: a mapping of settings expected")
            extra = extra | {key: checked(kind, extra[key], f"{source}: {key}")}
    wrong = [text for holds, text in part_checks(config) if not holds]
    if name == "mask_vae":
        if config.scaling_factor == 0:
            wrong.append("scaling_factor=0: latents are divided by it, so it must be above 0")
    elif name == "image_vae":
        levels = len(config.widths) if config.kind == "conv" else 4
        if config.kind == "autoencoder_kl" and "_vae_config" in extra:
            vae = extra["_vae_config"]
            levels = len(vae.get("block_out_channels", [64]))
            if vae.get("latent_channels", 4) != config.latent_channels:
                wrong.append(f"latent_channels={config.latent_channels}, its _vae_config makes another number")
        reduction = config.downsampling * config.picture_scale
        if config.is_pyramid and config.has_convolutions and config.downsampling != 2 ** (len(config.widths) - 1):
            wrong.append(f"downsampling={config.downsampling}, its {len(config.widths)} widths make another number")
        if not config.is_pyramid and reduction != 2 ** (levels - 1):
            scaled = f" * picture_scale={config.picture_scale}" if config.picture_scale > 1 else ""
            wrong.append(f"downsampling={config.downsampling}{scaled}, its {levels} levels make {2 ** (levels - 1)}")
    elif name == "scheduler":
        if config.beta_end == 0:
            wrong.append("beta_end=0: no noise would be added, so it must be above 0")
        if config.rescale_zero_snr and config.prediction_type == "epsilon":
            wrong.append("rescale_zero_snr needs prediction_type v_prediction or sample: noise is no target at t = T")
    if wrong:
        raise CheckpointError(f"{source}: {'; '.join(wrong)}")
    return extra


def check_model(folder: Path, index: dict[str, Any], components: dict[str, Any]) -> None:
    """Checks that the components of a whole model fit each other.

    Args:
        folder: the model folder, for errors.
        index: of it, as `load_index` returns it.
        components: the dataclass of each component.

    Raises:
        CheckpointError: numbers of channels, sizes or steps that contradict each other.
    """
    try:
        validate(
            Config(
                mask_vae=components["mask_vae"],
                image_encoder=components["image_vae"],
                unet=components["unet"],
                scheduler=components["scheduler"],
                conditioning=components.get("conditioning", ConditioningConfig()),
                data=replace(DataConfig(), image_size=index["image_size"]),
                diffusion=DiffusionConfig(self_condition=1.0 if index["self_condition"] else 0.0),
                num_inference_steps=index["num_inference_steps"],
            )
        )
    except ConfigError as error:
        raise CheckpointError(f"{folder}: its components do not fit each other: {error}") from None
