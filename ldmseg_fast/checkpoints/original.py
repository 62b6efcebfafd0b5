"""Reads checkpoints of the original LDMSeg code as the parts of a model folder.

An auto-encoder's is {"vae": tensors, "p": settings}, a whole model's {"unet", "vae_semseg", "vae_image", "p"}. Other
top-level entries (step, epoch, opt, ema, scaler) are not used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ldmseg_fast.checkpoints.diffusers_folder import read_config, unet_settings
from ldmseg_fast.checkpoints.model_folder import postprocess_settings
from ldmseg_fast.checkpoints.original_sizes import image_vae_config, mask_vae_config, scheduler_config, unet_config
from ldmseg_fast.checkpoints.safe_pickle import check_tensors
from ldmseg_fast.checkpoints.shipped import resolve_image_vae
from ldmseg_fast.checkpoints.tensors import plain_names
from ldmseg_fast.checkpoints.weight_files import read_weights
from ldmseg_fast.config import PostprocessConfig
from ldmseg_fast.config.values import shown
from ldmseg_fast.errors import ArgumentError, CheckpointError

LATENT_SIDE = 64  # where nothing says otherwise


@dataclass(frozen=True)
class Part:
    """Holds one component of a model folder: its configuration, its tensors, and what else its config.json has."""

    name: str
    config: Any
    state: dict[str, Tensor] | None = None
    extra: dict[str, Any] | None = None


def read_parts(
    values: dict[str, Any], source: str, unet_path: Path | None = None, image_vae: str | Path | None = None
) -> tuple[list[Part], dict[str, Any]]:
    """Reads the components, and the settings of `model_index.json`.

    Args:
        values: the checkpoint.
        source: its name, for errors.
        unet_path, image_vae: diffusers' configurations, see `convert.convert_checkpoint`.

    Raises:
        ArgumentError: configurations of networks that the checkpoint does not have.
        CheckpointError: not a checkpoint of this kind, or one that does not fit the configurations.
    """
    encoding = _settings(values, "train_kwargs").get("encoding_mode", "bits")
    if encoding != "bits":
        raise CheckpointError(f"{source}: ids encoded as {encoding!r}; only bit planes ('bits') are converted")
    if "unet" in values:
        return _model(values, source, unet_path, None if image_vae is None else resolve_image_vae(image_vae))
    if "vae" in values:
        given = [("--unet-config", unet_path), ("--image-vae", image_vae)]
        if useless := [f"{option} {value}" for option, value in given if value is not None]:
            raise ArgumentError(
                f"{source}: an auto-encoder ('vae'), without UNet and image VAE, so that {' and '.join(useless)} would "
                f"change nothing; leave {'it' if len(useless) == 1 else 'them'} out"
            )
        return _auto_encoder(values, source)
    raise CheckpointError(
        f"{source}: neither a model ('unet', 'vae_semseg', 'vae_image') nor an auto-encoder ('vae') of the original "
        f"code; it holds {', '.join(sorted(map(str, values))[:12]) or 'nothing'}"
    )


def _auto_encoder(values: dict[str, Any], source: str) -> tuple[list[Part], dict[str, Any]]:
    state = _tensors(values, "vae", source)
    config = mask_vae_config(state, _settings(values, "vae_model_kwargs"), f"{source}['vae']")
    side = _image_side(values, None, config.downsampling, config.downsampling, source)
    settings = {"image_size": side, "id_assignment": "random"} | postprocess_settings(PostprocessConfig())
    return [Part("mask_vae", config, state)], settings


def _model(
    values: dict[str, Any], source: str, unet_path: Path | None, vae_path: Path | None
) -> tuple[list[Part], dict[str, Any]]:
    missing = [name for name in ("vae_semseg", "vae_image") if name not in values]
    if missing == ["vae_image"] and vae_path is not None and vae_path.is_dir():
        values = values | {"vae_image": read_weights(vae_path / "vae" if (vae_path / "vae").is_dir() else vae_path)}
    elif missing:
        raise CheckpointError(f"{source}: 'unet' without {' and '.join(map(repr, missing))}, so no whole model")

    mask_state = _tensors(values, "vae_semseg", source)
    mask = mask_vae_config(mask_state, _settings(values, "vae_model_kwargs"), f"{source}['vae_semseg']")

    vae_values = read_config(vae_path, "vae") if vae_path else None
    scale = _settings(values).get("image_scaling_factor", (vae_values or {}).get("scaling_factor", 0.18215))
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < 1e6:
        raise CheckpointError(f"{source}: image_scaling_factor={shown(scale)}: a positive number expected")
    image, vae_config, image_state = image_vae_config(
        _tensors(values, "vae_image", source), vae_values, float(scale), f"{source}['vae_image']"
    )

    unet_values = read_config(unet_path, "unet") if unet_path else {}
    unet, unet_state = unet_config(
        _tensors(values, "unet", source),
        unet_settings(unet_values, str(unet_path)) if unet_path else None,
        _settings(values, "model_kwargs"),
        f"{source}['unet']",
    )
    latents = mask.latent_channels
    condition = unet.in_channels - latents - image.latent_channels
    if condition not in (0, latents) or unet.out_channels != latents or image.downsampling != mask.downsampling:
        raise CheckpointError(
            f"{source}: the networks do not fit each other: conv_in takes {unet.in_channels} channels, conv_out gives "
            f"{unet.out_channels}, mask latents have {latents} at 1/{mask.downsampling} of the size and image latents "
            f"{image.latent_channels} at 1/{image.downsampling}"
        )

    multiple = mask.downsampling * 2 ** (len(unet.block_out_channels) - 1)
    side = _image_side(values, unet_values.get("sample_size"), mask.downsampling, multiple, source)
    unet = replace(unet, sample_size=side // mask.downsampling, image_channels=image.latent_channels)
    settings = {
        "image_size": side,
        "num_inference_steps": 50,
        "self_condition": condition > 0,
    }
    parts = [
        Part("unet", unet, unet_state),
        Part("mask_vae", mask, mask_state),
        Part("image_vae", image, image_state, {"_vae_config": vae_config}),
        Part("scheduler", scheduler_config(_settings(values, "noise_scheduler_kwargs"), source)),
    ]
    return parts, settings | postprocess_settings(PostprocessConfig())


def _tensors(values: dict[str, Any], name: str, source: str) -> dict[str, Tensor]:
    """Tensors of one network, without what data parallelism and torch.compile put into their names."""
    where = f"{source}[{name!r}]"
    return plain_names(check_tensors(values[name], where), where)


def _settings(values: dict[str, Any], *path: str) -> dict[str, Any]:
    """A group of `p`, empty where it is missing."""
    found: Any = values.get("p")
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def _image_side(values: dict[str, Any], latent_side: Any, downsampling: int, multiple: int, source: str) -> int:
    """Side of the square image that the networks see, in pixels: `p.transformation_kwargs.size`, or the latents'."""
    given = _settings(values, "transformation_kwargs").get("size")
    side, factor = (given, 1) if given is not None else (latent_side or LATENT_SIDE, downsampling)
    if isinstance(side, (list, tuple)) and len(set(side)) == 1:
        side = side[0]
    if isinstance(side, bool) or not isinstance(side, int) or side <= 0 or side * factor % multiple:
        raise CheckpointError(f"{source}: image size {factor} x {side!r}: a multiple of {multiple} pixels expected")
    return side * factor
