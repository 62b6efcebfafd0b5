"""Finds the configurations of the three networks in an original LDMSeg checkpoint: its tensors and its settings `p`.

What the tensors show is read by `structure_from_state` beside each network; the rest comes from `p` or from diffusers'
configurations. Every function then builds the network without memory for its weights and compares it with the tensors,
so that what it returns fits them exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ldmseg_fast.checkpoints.tensors import check_state
from ldmseg_fast.config import ImageEncoderConfig, MaskVAEConfig, SchedulerConfig, UNetConfig, from_dict
from ldmseg_fast.config.values import shown
from ldmseg_fast.errors import CheckpointError, ConfigError
from ldmseg_fast.models import image_vae, mask_vae, unet
from ldmseg_fast.models.image_vae import KL_DEFAULTS, SD_VAE_CONFIG, modern_attention_names

State = dict[str, Tensor]


def mask_vae_config(state: State, p: dict[str, Any], source: str) -> MaskVAEConfig:
    """Configures the mask auto-encoder: sizes from its tensors, norm groups and scale from `p`.

    Args:
        state: tensors of any shape and dtype, without prefixes.
        p: `p.vae_model_kwargs`.
        source: the checkpoint's name, for errors.

    Raises:
        CheckpointError: tensors that are missing, too many, or make no auto-encoder of this kind.
    """
    found = _structure(mask_vae.structure_from_state, state, source)
    parametrization = str(p.get("parametrization", found["parametrization"]))
    if parametrization != found["parametrization"]:
        raise CheckpointError(
            f"{source}: the tensors make a bottleneck of the kind {found['parametrization']}, and p says "
            f"{parametrization}; only gaussian and auto are converted"
        )
    config = MaskVAEConfig(
        **found,
        norm_groups=_number(p, "norm_num_groups", 32, source),
        scaling_factor=_number(p, "scaling_factor", 0.18215, source),
    )
    if 2**config.num_bits < config.num_slots or 2**config.num_upscalers > config.downsampling:
        raise CheckpointError(
            f"{source}: {config.num_bits} bit planes, {config.num_slots} slots, {config.num_upscalers} upscalers after "
            f"a factor of {config.downsampling}: no model of this kind"
        )
    _check(mask_vae.MaskVAE, config, state, source, f"norm groups {config.norm_groups}")
    return config


def unet_config(state: State, given: dict[str, Any] | None, p: dict[str, Any], source: str) -> tuple[UNetConfig, State]:
    """Configures the UNet: structure from its tensors, head counts and norm groups from `given`.

    Args:
        state: tensors of any shape and dtype, without prefixes; the input convolution may be there twice, as `conv_in`
            and
            `new_conv`.
        given: `UNetConfig` fields of the configuration that the UNet was made from; None: what `p` says, or Stable
            Diffusion 1.4's where the widths are its own.
        p: `p.model_kwargs`.
        source: the checkpoint's name, for errors.

    Returns:
        The configuration, and the tensors under our names.

    Raises:
        CheckpointError: tensors that are missing, too many, or do not fit `given`; all of them listed.
    """
    state = _one_conv_in(state, source)
    found = _structure(unet.structure_from_state, state, source)
    widths = found["block_out_channels"]
    if any(".attn2." in key for key in state):
        raise CheckpointError(
            f"{source}: the UNet keeps its cross-attention (attn2); only models without image descriptors or captions "
            f"are converted"
        )
    if given is None:
        given = _unet_hints(p, len(widths), source)
        if "num_heads" not in given and widths != UNetConfig().block_out_channels:
            raise CheckpointError(
                f"{source}: widths {list(widths)} are not Stable Diffusion 1.4's, and head counts are not in the "
                f"tensors; give the diffusers configuration that the UNet was made from with --unet-config"
            )
    differing = [
        f"{key} {value} in the tensors, {given[key]} in the configuration"
        for key, value in found.items()
        if key in given and given[key] != value
    ]
    if differing:
        raise CheckpointError(f"{source}: does not fit --unet-config: {'; '.join(differing)}")
    config = UNetConfig(**{**given, **found})
    wrong = [f"{heads} heads for {width} channels" for heads, width in zip(config.num_heads, widths) if width % heads]
    if wrong or len(config.num_heads) != len(widths):
        raise CheckpointError(f"{source}: head counts {config.num_heads} for widths {list(widths)} do not fit: {wrong}")
    _check(unet.UNet, config, state, source, f"norm groups {config.norm_groups}, heads {config.num_heads}")
    return config, state


def image_vae_config(
    state: State, given: dict[str, Any] | None, scaling_factor: float, source: str
) -> tuple[ImageEncoderConfig, dict[str, Any], State]:
    """Configures the image encoder of an AutoencoderKL.

    The decoder may be left out whole; `post_quant_conv` belongs to it and is checked, but not kept.

    Args:
        state: tensors of any shape and dtype, without prefixes.
        given: diffusers' configuration; None: Stable Diffusion's, but for what the tensors show.
        scaling_factor: of the latents.
        source: the checkpoint's name, for errors.

    Returns:
        Our configuration, diffusers' configuration, and the encoder's tensors.

    Raises:
        CheckpointError: other tensors missing or too many, or shapes that do not fit `given`.
    """
    state = modern_attention_names(state)
    found = _structure(image_vae.structure_from_state, state, source)
    merged = KL_DEFAULTS | (SD_VAE_CONFIG | found if given is None else given)
    differing = [
        f"{key} {value} in the tensors, {merged[key]} given" for key, value in found.items() if merged[key] != value
    ]
    if differing:
        raise CheckpointError(f"{source}: does not fit --image-vae: {'; '.join(differing)}")
    levels = len(found["block_out_channels"])
    vae_config: dict[str, Any] = image_vae.kl_config(found) if given is None else dict(given)
    config = ImageEncoderConfig(
        kind="autoencoder_kl",
        latent_channels=found["latent_channels"],
        downsampling=2 ** (levels - 1),
        scaling_factor=scaling_factor,
    )
    try:
        with torch.device("meta"):
            expected = image_vae.KLEncoder(config, vae_config).state_dict()
            post_quant = nn.Conv2d(config.latent_channels, config.latent_channels, 1).state_dict()
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from None
    rest = {f"post_quant_conv.{key}": value for key, value in post_quant.items()}
    if any(key.startswith("decoder.") for key in state):
        rest |= _decoder_tensors(vae_config)
    check_state(expected | rest, state, source)
    return config, vae_config, {key: state[key] for key in expected}


def scheduler_config(p: dict[str, Any], source: str) -> SchedulerConfig:
    """Configures noise schedule and loss weights from `p.noise_scheduler_kwargs`; our defaults where it says nothing.

    Raises:
        CheckpointError: a schedule that this version does not know.
    """
    if p.get("clip_sample") or p.get("thresholding") or p.get("trained_betas") is not None:
        raise CheckpointError(
            f"{source}: clip_sample, thresholding and trained_betas of the noise schedule are not known"
        )
    names = {
        "num_train_timesteps": "num_train_timesteps",
        "beta_schedule": "beta_schedule",
        "beta_start": "beta_start",
        "beta_end": "beta_end",
        "prediction_type": "prediction_type",
        "rescale_betas_zero_snr": "rescale_zero_snr",
        "weight": "loss_weighting",
        "max_snr": "max_snr",
    }
    values = {ours: p[theirs] for theirs, ours in names.items() if p.get(theirs) is not None}
    try:
        return from_dict(SchedulerConfig, values, "noise_scheduler_kwargs.")
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from None


def _number(p: dict[str, Any], key: str, default: Any, source: str) -> Any:
    """Reads a number of `p` of the kind of `default`. Raises CheckpointError, which names `source`."""
    value = p.get(key)
    if value is None:
        return default
    whole, most = isinstance(default, int), 10**6
    if type(value) not in (int, float) or not 0 < value < most or (whole and value != int(value)):
        kind = "whole number" if whole else "number"
        raise CheckpointError(f"{source}: `p` has {key}={shown(value)}: a positive {kind} below {most} expected")
    return type(default)(value)


def _structure(read: Callable[[State], dict[str, Any]], state: State, source: str) -> dict[str, Any]:
    """What `read` finds in the tensors; its error names the checkpoint."""
    try:
        return read(state)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None


def _unet_hints(p: dict[str, Any], levels: int, source: str) -> dict[str, Any]:
    """What the tensors do not show, as far as `p` says it; `attention_head_dim` counts heads, as in diffusers."""
    hints: dict[str, Any] = {}
    heads = p.get("num_attention_heads") or p.get("attention_head_dim")
    if heads is not None:
        counts = heads if isinstance(heads, (list, tuple)) else [heads] * levels
        hints["num_heads"] = tuple(_number({"heads": count}, "heads", 8, source) for count in counts)
    if p.get("norm_num_groups") is not None:
        hints["norm_groups"] = _number(p, "norm_num_groups", 32, source)
    return hints


def _one_conv_in(state: State, source: str) -> State:
    state = dict(state)
    for name in ("weight", "bias"):
        twin = state.pop(f"new_conv.{name}", None)
        if twin is None:
            continue
        own = state.setdefault(f"conv_in.{name}", twin)
        if not torch.equal(own, twin):
            raise CheckpointError(f"{source}: conv_in.{name} and new_conv.{name} differ, though they are one tensor")
    return state


def _decoder_tensors(vae_config: dict[str, Any]) -> State:
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise CheckpointError(
            f"an image VAE is converted with diffusers ({error}): pip install 'ldmseg_fast[train]'"
        ) from None

    with torch.device("meta"):
        state = AutoencoderKL.from_config(vae_config).state_dict()
    return {key: value for key, value in state.items() if key.startswith("decoder.")}


def _check(kind: type[nn.Module], config: Any, state: State, source: str, what: str) -> None:
    """Raises CheckpointError where a network of `config` has other tensors than `state`; `what` is not in these."""
    try:
        with torch.device("meta"):
            expected = kind(config).state_dict()
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{source}: no such network can be built with {what}: {error}") from None
    check_state(expected, state, source)
