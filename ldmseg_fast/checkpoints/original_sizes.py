"""Configurations of the three networks from the tensors of an original LDMSeg checkpoint and its settings `p`.

Every function builds the network it found without memory for its weights and compares it with the tensors, so that
what it returns fits them exactly.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import torch
from torch import Tensor, nn

from ldmseg_fast.checkpoints.tensors import check_state
from ldmseg_fast.config import ImageEncoderConfig, MaskVAEConfig, SchedulerConfig, UNetConfig, from_dict
from ldmseg_fast.errors import CheckpointError, ConfigError
from ldmseg_fast.models.image_vae import KL_DEFAULTS, SD_VAE_CONFIG, KLEncoder, modern_attention_names
from ldmseg_fast.models.mask_vae import MaskVAE
from ldmseg_fast.models.unet import UNet

State = dict[str, Tensor]


def mask_vae_config(state: State, p: dict[str, Any], source: str) -> MaskVAEConfig:
    """Every size of a mask auto-encoder from its tensors; norm groups, scale and bottleneck from `p.vae_model_kwargs`.

    Raises:
        CheckpointError: tensors that are missing, too many, or make no auto-encoder of this kind.
    """
    encoder, decoder = _convolutions(state, "encoder."), _convolutions(state, "decoder.")
    if len(encoder) < 3 or len(encoder) % 2 == 0 or len(decoder) < 2:
        raise CheckpointError(
            f"{source}: no mask auto-encoder: {len(encoder)} convolutions in encoder.*, {len(decoder)} in decoder.*, "
            f"instead of 3, 5, 7, ... and at least 2"
        )
    upscalers = decoder[1:-1]
    moments, latents = encoder[-1].shape[0], decoder[0].shape[1]
    found = "gaussian" if moments == 2 * latents else "auto"
    parametrization = str(p.get("parametrization", found))
    if parametrization != found or moments not in (latents, 2 * latents):
        raise CheckpointError(
            f"{source}: the encoder ends in {moments} channels and the decoder takes {latents}, which is no "
            f"{parametrization} bottleneck; only gaussian (twice as many) and auto (as many) are converted"
        )
    config = MaskVAEConfig(
        num_bits=encoder[0].shape[1],
        num_slots=decoder[-1].shape[0],
        latent_channels=latents,
        widths=tuple(weight.shape[0] for weight in encoder[0:-2:2]),
        middle_width=encoder[-2].shape[0],
        decoder_width=decoder[0].shape[0],
        upscale_width=upscalers[0].shape[1] if upscalers else 0,
        num_upscalers=len(upscalers),
        num_mid_blocks=len({key.split(".")[1] for key in state if re.match(r"encoder\.\d+\.resnets\.", key)}),
        norm_groups=_number(p, "norm_num_groups", 32),
        parametrization="gaussian" if found == "gaussian" else "auto",
        scaling_factor=_number(p, "scaling_factor", 0.18215),
    )
    if 2**config.num_bits < config.num_slots or 2**config.num_upscalers > config.downsampling:
        raise CheckpointError(
            f"{source}: {config.num_bits} bit planes, {config.num_slots} slots, {config.num_upscalers} upscalers after "
            f"a factor of {config.downsampling}: no model of this kind"
        )
    _check(MaskVAE, config, state, source, f"norm groups {config.norm_groups}")
    return config


def unet_config(state: State, given: dict[str, Any] | None, p: dict[str, Any], source: str) -> tuple[UNetConfig, State]:
    """Structure of the UNet from its tensors, head count and norm groups from `given`, and its tensors under our names.

    Args:
        state: without prefixes; the input convolution may be there twice, as `conv_in` and `new_conv`.
        given: `UNetConfig` fields of the configuration that the UNet was made from; None: what `p` says, or Stable
            Diffusion 1.4's where the widths are its own.
        p: `p.model_kwargs`.

    Raises:
        CheckpointError: tensors that are missing, too many, or do not fit `given`; all of them listed.
    """
    state = _one_conv_in(state, source)
    widths = _levels(state, r"down_blocks\.(\d+)\.resnets\.0\.conv1\.weight")
    required = ("conv_in.weight", "conv_out.weight")
    if not widths or any(key not in state or state[key].ndim != 4 for key in required):
        raise CheckpointError(f"{source}: no UNet: conv_in.weight, conv_out.weight and down_blocks.* expected")
    if any(".attn2." in key for key in state):
        raise CheckpointError(
            f"{source}: the UNet keeps its cross-attention (attn2); only models without image descriptors or captions "
            f"are converted"
        )
    projections = [value for key, value in state.items() if key.endswith("proj_in.weight")]
    found: dict[str, Any] = {
        "block_out_channels": tuple(widths),
        "attention": tuple(f"down_blocks.{level}.attentions.0.norm.weight" in state for level in range(len(widths))),
        "layers_per_block": len(_levels(state, r"down_blocks\.0\.resnets\.(\d+)\.conv1\.weight")),
        "transformer_layers": len(
            {key.split("transformer_blocks.")[1].split(".")[0] for key in state if "transformer_blocks." in key}
        )
        or 1,
        "linear_projection": bool(projections) and projections[0].ndim == 2,
        "mid_attention": any(key.startswith("mid_block.attentions.") for key in state),
        "out_channels": state["conv_out.weight"].shape[0],
    }
    if given is None:
        given = _unet_hints(p, len(widths))
        if "num_heads" not in given and found["block_out_channels"] != UNetConfig().block_out_channels:
            raise CheckpointError(
                f"{source}: widths {widths} are not Stable Diffusion 1.4's, and head counts are not in the tensors; "
                f"give the diffusers configuration that the UNet was made from with --unet-config"
            )
    differing = [
        f"{key} {value} in the tensors, {given[key]} in the configuration"
        for key, value in found.items()
        if key in given and given[key] != value
    ]
    if differing:
        raise CheckpointError(f"{source}: does not fit --unet-config: {'; '.join(differing)}")
    config = UNetConfig(**{**given, **found, "in_channels": state["conv_in.weight"].shape[1]})
    wrong = [f"{heads} heads for {width} channels" for heads, width in zip(config.num_heads, widths) if width % heads]
    if wrong or len(config.num_heads) != len(widths):
        raise CheckpointError(f"{source}: head counts {config.num_heads} for widths {widths} do not fit: {wrong}")
    _check(UNet, config, state, source, f"norm groups {config.norm_groups}, heads {config.num_heads}")
    return config, state


def image_vae_config(
    state: State, given: dict[str, Any] | None, scaling_factor: float, source: str
) -> tuple[ImageEncoderConfig, dict[str, Any], State]:
    """Our configuration, diffusers' configuration, and the encoder's tensors, of an AutoencoderKL.

    The decoder may be left out whole; `post_quant_conv` belongs to it and is checked, but not kept.

    Raises:
        CheckpointError: other tensors missing or too many, or shapes that do not fit `given`.
    """
    state = modern_attention_names(state)
    widths = _levels(state, r"encoder\.down_blocks\.(\d+)\.resnets\.0\.conv1\.weight")
    moments = state.get("encoder.conv_out.weight")
    if not widths or moments is None:
        raise CheckpointError(f"{source}: no AutoencoderKL: encoder.down_blocks.* and encoder.conv_out.weight expected")
    found: dict[str, Any] = {
        "block_out_channels": list(widths),
        "layers_per_block": len(_levels(state, r"encoder\.down_blocks\.0\.resnets\.(\d+)\.conv1\.weight")),
        "latent_channels": moments.shape[0] // 2,
    }
    merged = KL_DEFAULTS | (SD_VAE_CONFIG | found if given is None else given)
    differing = [
        f"{key} {value} in the tensors, {merged[key]} given" for key, value in found.items() if merged[key] != value
    ]
    if differing:
        raise CheckpointError(f"{source}: does not fit --image-vae: {'; '.join(differing)}")
    levels = len(widths)
    types = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    vae_config: dict[str, Any] = SD_VAE_CONFIG | found | types if given is None else dict(given)
    config = ImageEncoderConfig(
        kind="autoencoder_kl",
        latent_channels=found["latent_channels"],
        downsampling=2 ** (levels - 1),
        scaling_factor=scaling_factor,
    )
    try:
        with torch.device("meta"):
            expected = KLEncoder(config, vae_config).state_dict()
            post_quant = nn.Conv2d(config.latent_channels, config.latent_channels, 1).state_dict()
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from None
    rest = {f"post_quant_conv.{key}": value for key, value in post_quant.items()}
    if any(key.startswith("decoder.") for key in state):
        rest |= _decoder_tensors(vae_config)
    check_state(expected | rest, state, source)
    return config, vae_config, {key: state[key] for key in expected}


def scheduler_config(p: dict[str, Any], source: str) -> SchedulerConfig:
    """Noise schedule and loss weights of `p.noise_scheduler_kwargs`; METHOD's where it says nothing."""
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


def _number(p: dict[str, Any], key: str, default: Any) -> Any:
    value = p.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e6:
        raise CheckpointError(f"p: {key}={value!r}: a positive number expected")
    return type(default)(value)


def _levels(state: State, pattern: str) -> list[int]:
    """Output channels of the tensors 0, 1, 2, ... that `pattern` numbers, until one is missing."""
    numbered = {int(match[1]): value for key, value in state.items() if (match := re.fullmatch(pattern, key))}
    consecutive = itertools.takewhile(numbered.__contains__, itertools.count())
    return [numbered[index].shape[0] for index in consecutive if numbered[index].ndim]


def _convolutions(state: State, prefix: str) -> list[Tensor]:
    """Weights [_, _, k, k] right under `prefix`, in the order of their position."""
    found = {
        int(match[1]): value
        for key, value in state.items()
        if (match := re.fullmatch(re.escape(prefix) + r"(\d+)\.weight", key)) and value.ndim == 4
    }
    return [found[index] for index in sorted(found)]


def _unet_hints(p: dict[str, Any], levels: int) -> dict[str, Any]:
    """What the tensors do not show, as far as `p` says it; `attention_head_dim` counts heads, as in diffusers."""
    hints: dict[str, Any] = {}
    heads = p.get("num_attention_heads") or p.get("attention_head_dim")
    if heads is not None:
        counts = heads if isinstance(heads, (list, tuple)) else [heads] * levels
        hints["num_heads"] = tuple(_number({"heads": count}, "heads", 8) for count in counts)
    if p.get("norm_num_groups") is not None:
        hints["norm_groups"] = _number(p, "norm_num_groups", 32)
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
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        state = AutoencoderKL.from_config(vae_config).state_dict()
    return {key: value for key, value in state.items() if key.startswith("decoder.")}


def _check(kind: type[nn.Module], config: Any, state: State, source: str, what: str) -> None:
    """Raises CheckpointError where a network of `config` has other tensors than `state`."""
    try:
        with torch.device("meta"):
            expected = kind(config).state_dict()
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{source}: no such network can be built with {what}: {error}") from None
    check_state(expected, state, source)
