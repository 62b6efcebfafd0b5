"""Finds the starting weights of the diffusion stage: `model.init_from`, a Stable Diffusion or a model folder of ours.

Stable Diffusion may be a folder in diffusers' layout or a single file (see `single_file`).
"""

from __future__ import annotations

import os
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ldmseg_fast.checkpoints import single_file
from ldmseg_fast.checkpoints.diffusers_folder import read_config, scheduler_settings, unet_settings
from ldmseg_fast.checkpoints.hub_names import DIFFUSERS, MODEL
from ldmseg_fast.checkpoints.model_folder import load_component_config, load_index
from ldmseg_fast.checkpoints.schema import read_settings
from ldmseg_fast.checkpoints.shipped import RANDOM, pretrained_weights, recorded, resolve_image_vae, resolve_model_dir
from ldmseg_fast.config import Config, ImageEncoderConfig, SchedulerConfig, UNetConfig, update, validate
from ldmseg_fast.config.settings import FINE_FEATURES
from ldmseg_fast.errors import CheckpointError, ConfigError
from ldmseg_fast.files import inside

# what weights fix; the rest of a UNet's configuration is the run's own choice
UNET_STRUCTURE = (
    "block_out_channels",
    "attention",
    "layers_per_block",
    "num_heads",
    "transformer_layers",
    "linear_projection",
    "norm_groups",
    "norm_eps",
    "mid_attention",
    "out_channels",
)
HOW_TO_GET_ONE = (
    "a Stable Diffusion 1.4, 1.5 or 2.1: a folder in diffusers' layout (of unet/, vae/ and scheduler/ the JSON and "
    ".safetensors files are enough), its name on the Hub, such as CompVis/stable-diffusion-v1-4, or one .safetensors "
    "file of the whole model"
)
OTHER_FEATURES = (
    "leave image_encoder.path out for the weights of Lite0 (image_encoder.variant=0) that the package brings, or give "
    "the .safetensors file of the variant that image_encoder.variant names"
)


@dataclass(frozen=True)
class Start:
    """Says where weights come from, and what the folder says about them.

    Attributes:
        config: the run's, with the folder's values where the run left the defaults.
        unet, image_vae: weights to load, None: train from scratch. Both are folders, or a single file of Stable
            Diffusion; `image_vae` may be TAESD's file.
        vae_config: diffusers' configuration of the image VAE; None: Stable Diffusion's.
        ours: whether `unet` and `image_vae` lie in a model folder of ours.
        features: the file of a pyramid's pre-trained network, where it is not in `image_vae`.
    """

    config: Config
    unet: Path | None = None
    image_vae: Path | None = None
    vae_config: dict[str, Any] | None = None
    ours: bool = False
    features: Path | None = None


def resolve_start(config: Config) -> Start:
    """Reads the configurations of `model.init_from` and `image_encoder.path`; weights are not read yet.

    A structural setting that the run left at its default takes the folder's value; one that the run set must be the
    folder's. Of the noise schedule, what the run set stays.

    Raises:
        ConfigError: settings that contradict the folder, all of them named; weights that are needed and not given.
        CheckpointError: no such folder, or one that is neither Stable Diffusion's nor ours.
    """
    if not config.model.init_from:
        return _with_image_vae(Start(config))
    folder = resolve_model_dir(config.model.init_from, kinds=(MODEL, DIFFUSERS))
    if folder.is_file():
        start = _with_image_vae(_single_file(config, folder))
        return replace(start, config=validate(start.config))
    if not folder.is_dir():
        raise CheckpointError(f"model.init_from={folder}: no such folder; give {HOW_TO_GET_ONE}, or a model folder")
    path = folder / "model_index.json"
    index = read_settings(inside(folder, path)) if path.exists() else {}
    if "format_version" in index:
        start = _ours(config, folder)
    elif (folder / "unet" / "config.json").is_file():
        start = _stable_diffusion(config, folder)
    elif (folder / "transformer").is_dir():
        raise CheckpointError(
            f"model.init_from={folder}: a transformer in the place of a UNet, as Stable Diffusion 3 and FLUX have it; "
            f"give {HOW_TO_GET_ONE}"
        )
    else:
        files = sorted(folder.glob("*.safetensors"))
        hint = f", but {files[0].name}; is it the whole model, then name the file itself" if files else ""
        raise CheckpointError(f"model.init_from={folder}: no unet/config.json in it{hint}; give {HOW_TO_GET_ONE}")
    start = _with_image_vae(start)
    return replace(start, config=validate(start.config))


def _stable_diffusion(config: Config, folder: Path) -> Start:
    source = f"model.init_from={folder}"
    values = read_config(folder / "unet", "unet")
    structure = unet_settings(values, f"{source}/unet/config.json")
    _check_input(int(values.get("in_channels") or 4), structure["out_channels"], config, f"{source}/unet/config.json")
    unet = _adopt(config.unet, UNetConfig(), structure, "unet.", source)
    scheduler = config.scheduler
    files = [folder / "scheduler" / name for name in ("scheduler_config.json", "config.json")]
    file = next((file for file in files if os.path.lexists(file)), None)
    if file is not None:
        path = inside(folder, file)
        scheduler = _adopt_defaults(scheduler, SchedulerConfig(), scheduler_settings(read_settings(path), str(path)))
    else:
        warnings.warn(
            f"{source}: no scheduler/scheduler_config.json in it, so scheduler.prediction_type="
            f"{scheduler.prediction_type} and scheduler.beta_schedule={scheduler.beta_schedule} are taken; Stable "
            f"Diffusion 2.x at 768 pixels was trained with v_prediction",
            stacklevel=2,
        )
    return Start(replace(config, unet=unet, scheduler=scheduler), unet=folder / "unet")


def _single_file(config: Config, path: Path) -> Start:
    source = f"model.init_from={path}"
    single_file.check_is_safetensors(path)
    own = config.unet
    heads = () if own.num_heads == UNetConfig().num_heads else own.num_heads
    found = single_file.unet_settings_of(path, heads, own.norm_groups)
    structure = {key: found[key] for key in UNET_STRUCTURE}
    _check_input(found["in_channels"], found["out_channels"], config, source)
    unet = _adopt(own, UNetConfig(), structure, "unet.", source)
    schedule = single_file.schedule_of(path)
    scheduler = _adopt_defaults(config.scheduler, SchedulerConfig(), schedule)
    if found["linear_projection"] and "prediction_type" not in schedule:
        warnings.warn(
            f"{source}: what a Stable Diffusion 2.x predicts is not in the file, so scheduler.prediction_type="
            f"{scheduler.prediction_type} is taken; models of 768 pixels were trained with v_prediction",
            stacklevel=2,
        )
    return Start(replace(config, unet=unet, scheduler=scheduler), unet=path)


def _check_input(in_channels: int, out_channels: int, config: Config, source: str) -> None:
    """Raises CheckpointError where a UNet sees more than noisy latents, or latents of another kind than the masks'.

    Of a wider input it is not known which channels are the noisy ones: they come first in inpainting models (9) and
    InstructPix2Pix (8), and last in Marigold (8).
    """
    kinds = {3: "pixels", 5: "depth maps", 7: "upscaling", 8: "pictures to edit or to measure", 9: "inpainting"}
    if in_channels != out_channels:
        what = f", a model for {kinds[in_channels]}" if in_channels in kinds else ""
        raise CheckpointError(
            f"{source}: in_channels={in_channels}{what}; expected {out_channels}, as many as its out_channels: a UNet "
            f"that sees noisy latents alone. Give {HOW_TO_GET_ONE}"
        )
    if out_channels != config.mask_vae.latent_channels:
        raise CheckpointError(
            f"{source}: in_channels={in_channels} and out_channels={out_channels}, but mask_vae.latent_channels="
            f"{config.mask_vae.latent_channels} are what the UNet denoises"
        )


def started_encoder(config: Config, found: ImageEncoderConfig) -> ImageEncoderConfig:
    """Returns the image encoder of a run that starts from a folder of ours, which has the encoder `found`.

    A pre-trained one of the run takes the place of one that is not. No weight depends on the pictures' size, which
    `few_step.resize` leaves to the run. One that averages fine features goes on with patches or convolutions where the
    run asks for them.
    """
    if config.image_encoder.is_pyramid and not found.is_pyramid:
        return config.image_encoder
    resized = config.few_step.resize and found.is_pyramid
    own = config.image_encoder
    found = replace(found, path="", picture_scale=(own if resized else found).picture_scale)
    if found.is_pyramid and FINE_FEATURES.index(own.fine_features) > FINE_FEATURES.index(found.fine_features):
        found = replace(found, fine_features=own.fine_features)
        if own.has_convolutions:
            found = replace(found, widths=own.widths, blocks=own.blocks, norm_groups=own.norm_groups)
    return found


def _ours(config: Config, folder: Path) -> Start:
    source = f"model.init_from={folder}"
    missing = {"unet", "mask_vae", "image_vae", "scheduler"} - set(load_index(folder)["components"])
    if missing:
        raise CheckpointError(
            f"{source}: a model folder without {', '.join(sorted(missing))}; use it as model.mask_vae"
        )
    found = {name: load_component_config(folder, name) for name in ("unet", "image_vae", "scheduler")}
    structure = {key: getattr(found["unet"][0], key) for key in UNET_STRUCTURE}
    if config.few_step.new_autoencoder:
        del structure["out_channels"]
    image_encoder = started_encoder(config, found["image_vae"][0])
    own_encoder = image_encoder is config.image_encoder
    # where sampling starts is the stage's own matter
    schedule = asdict(found["scheduler"][0]) | {"init_noise_sigma": config.scheduler.init_noise_sigma}
    config = replace(
        config,
        unet=_adopt(config.unet, UNetConfig(), structure, "unet.", source),
        image_encoder=_adopt(
            replace(config.image_encoder, path=image_encoder.path),
            ImageEncoderConfig(),
            asdict(image_encoder),
            "image_encoder.",
            source,
        ),
        scheduler=_adopt_defaults(config.scheduler, SchedulerConfig(), schedule),
    )
    if not config.model.mask_vae:
        config = replace(config, model=replace(config.model, mask_vae=recorded(config.model.init_from, folder)))
    if own_encoder:
        return Start(config, folder / "unet", ours=True)
    vae_config = found["image_vae"][1].get("_vae_config")
    return Start(config, folder / "unet", folder / "image_vae", vae_config, ours=True)


def _with_image_vae(start: Start) -> Start:
    """The image encoder's weights where `model.init_from` is no folder of ours."""
    encoder = start.config.image_encoder
    if start.image_vae is not None or encoder.kind == "conv":
        return start
    if encoder.is_pyramid:
        if encoder.path == RANDOM:
            return start
        if encoder.path and not Path(encoder.path).exists():
            raise CheckpointError(f"image_encoder.path={encoder.path}: no such file; {OTHER_FEATURES}")
        return replace(start, features=Path(encoder.path) if encoder.path else pretrained_weights(encoder))
    path = _image_vae_path(encoder) if encoder.path else None
    if encoder.kind == "taesd":
        if path is None or not path.is_file():
            raise ConfigError(f"image_encoder.path={encoder.path}: TAESD's encoder as a .safetensors file expected")
        return replace(start, image_vae=path)
    folder = path
    if folder is None and start.unet is not None:
        folder = start.unet if start.unet.is_file() else start.unet.parent / "vae"
    if folder is None:
        raise ConfigError(
            f"image_encoder.kind=autoencoder_kl needs weights: set model.init_from=FOLDER, {HOW_TO_GET_ONE}; or "
            f"image_encoder.path=FOLDER for the image VAE alone"
        )
    if folder.is_file():
        single_file.check_is_safetensors(folder)
        values = single_file.vae_settings_of(folder)
    else:
        folder = folder / "vae" if (folder / "vae").is_dir() else folder
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder}: no config.json in it; the image VAE comes from {HOW_TO_GET_ONE}")
        values = read_config(folder, "vae")
    found = {
        "latent_channels": values.get("latent_channels", 4),
        "downsampling": 2 ** (len(values.get("block_out_channels", [64])) - 1),
        "scaling_factor": values.get("scaling_factor") or 0.18215,
    }
    encoder = _adopt(encoder, ImageEncoderConfig(), found, "image_encoder.", str(folder))
    return replace(start, config=replace(start.config, image_encoder=encoder), image_vae=folder, vae_config=values)


def _image_vae_path(encoder: ImageEncoderConfig) -> Path:
    """`image_encoder.path`; an AutoencoderKL may be the Hub's."""
    return Path(encoder.path) if encoder.kind == "taesd" else resolve_image_vae(encoder.path)


T = TypeVar("T")


def _adopt(given: T, default: T, found: dict[str, Any], prefix: str, source: str) -> T:
    """`given` with the values `found`. Raises ConfigError where the run asks for something else than the folder has."""
    differing = [
        f"{prefix}{key} is {_text(getattr(given, key))} and {_text(value)} there"
        for key, value in found.items()
        if getattr(given, key) not in (getattr(default, key), value)
    ]
    if differing:
        raise ConfigError(
            f"{source} does not fit the settings: {'; '.join(differing)}. Leave these settings out, or set the folder's"
        )
    return update(given, found, prefix)


def _adopt_defaults(given: T, default: T, found: dict[str, Any]) -> T:
    """`given` with the values `found` where it has the default."""
    kept = {key: value for key, value in found.items() if getattr(given, key) == getattr(default, key)}
    return update(given, kept, "scheduler.")


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
