"""Reads folders in diffusers' layout (Stable Diffusion 1.x, 2.x): their configurations as ours, and their weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldmseg_fast.checkpoints.schema import KLSettings, Texts, check_component, checked, read_settings
from ldmseg_fast.config import SchedulerConfig, UNetConfig, from_dict
from ldmseg_fast.config.settings import Width, Widths
from ldmseg_fast.config.values import shown
from ldmseg_fast.errors import CheckpointError
from ldmseg_fast.files import inside

# diffusers' UNet2DConditionModel: its defaults where the file says nothing, and what ours cannot differ in
UNET_DEFAULTS: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "num_attention_heads": None,
    "transformer_layers_per_block": 1,
    "use_linear_projection": False,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}


@dataclass(frozen=True)
class DiffusersUNet:
    """Gives the types of what is read of a UNet2DConditionModel's configuration."""

    in_channels: Width = 4
    out_channels: Width = 4
    block_out_channels: Widths = (320,)
    layers_per_block: Widths = (2,)
    transformer_layers_per_block: Widths = (1,)
    attention_head_dim: Widths = (8,)
    num_attention_heads: Widths = (8,)
    norm_num_groups: Width = 32
    norm_eps: float = 1e-5
    use_linear_projection: bool = False
    cross_attention_dim: Width = 1280
    down_block_types: Texts = ()
    up_block_types: Texts = ()


UNET_REQUIRED: dict[str, Any] = {
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "encoder_hid_dim": None,
    "dual_cross_attention": False,
    "class_embed_type": None,
    "addition_embed_type": None,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
}
DOWN_BLOCKS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
UP_BLOCKS = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
CLASSES = {
    "unet": ("UNet2DConditionModel", "FlaxUNet2DConditionModel"),
    "vae": ("AutoencoderKL", "FlaxAutoencoderKL"),
}
# diffusers' schedulers agree in these defaults
SCHEDULER_DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
}


def read_config(path: Path, part: str) -> dict[str, Any]:
    """Reads a diffusers `config.json`: the file itself, its folder, or a whole model with a folder called `part`.

    Raises:
        CheckpointError: a file that is missing, lies outside the folder, holds no settings or those of another network.
    """
    if path.is_dir():
        folder = path / part if (path / part).is_dir() else path
        path = inside(path, folder / "config.json")
    values = read_settings(path)
    kind, known = values.get("_class_name"), CLASSES[part]
    if kind is not None and kind not in known:
        raise CheckpointError(
            f"{path}: a {str(kind)[:100]}; {known[0]}, as Stable Diffusion 1.x and 2.x have it, is read"
        )
    return checked(KLSettings, values, str(path)) if part == "vae" else values


def unet_settings(values: dict[str, Any], source: str) -> dict[str, Any]:
    """Translates a UNet2DConditionModel's configuration into `UNetConfig` fields.

    `attention_head_dim` counts heads, as in diffusers. `source` names the file, for errors.

    Raises:
        CheckpointError: listing settings that the UNet of this package does not have.
    """
    per_block = ("layers_per_block", "transformer_layers_per_block", "attention_head_dim", "num_attention_heads")
    listed = {key: [values[key]] for key in per_block if isinstance(values.get(key), (int, float, str))}
    found = {key: value for key, value in checked(DiffusersUNet, values | listed, source).items() if value is not None}
    merged = UNET_DEFAULTS | found
    widths = merged["block_out_channels"]
    heads = merged["num_attention_heads"] or merged["attention_head_dim"]
    key = "num_attention_heads" if merged["num_attention_heads"] else "attention_head_dim"
    heads = heads if isinstance(heads, list) else [heads]
    heads = heads * len(widths) if key in listed or key not in found else heads
    down, up = merged["down_block_types"], merged["up_block_types"]
    wrong = [
        f"{key}={shown(values[key])} (only {value!r} is known)"
        for key, value in UNET_REQUIRED.items()
        if values.get(key, value) != value
    ]
    for key in ("layers_per_block", "transformer_layers_per_block"):
        numbers = set(merged[key]) if isinstance(merged[key], list) else {merged[key]}
        if len(numbers) != 1:
            wrong.append(f"{key}={shown(merged[key])} (one number for all blocks is known)")
        else:
            merged[key] = numbers.pop()
    if not set(down) <= set(DOWN_BLOCKS) or not set(up) <= set(UP_BLOCKS):
        wrong.append(
            f"down_block_types={shown(down)}, up_block_types={shown(up)} "
            f"(only Stable Diffusion's block types are known)"
        )
    elif [DOWN_BLOCKS[kind] for kind in down] != [UP_BLOCKS[kind] for kind in reversed(up)]:
        wrong.append(f"up_block_types={shown(up)} do not mirror down_block_types={shown(down)}")
    elif not len(widths) == len(down) == len(heads):
        wrong.append(f"{len(widths)} block_out_channels, {len(down)} down_block_types, {len(heads)} head counts")
    else:
        wrong += [
            f"{heads[level]} heads do not divide {width} channels"
            for level, width in enumerate(widths)
            if (DOWN_BLOCKS[down[level]] or level == len(widths) - 1) and width % heads[level]
        ]
    groups = merged["norm_num_groups"]
    wrong += [f"{groups} norm groups do not divide {width} channels" for width in widths if width % groups]
    if wrong:
        raise CheckpointError(f"{source}: {'; '.join(wrong)}")
    return {
        "block_out_channels": tuple(widths),
        "attention": tuple(DOWN_BLOCKS[kind] for kind in down),
        "layers_per_block": merged["layers_per_block"],
        "num_heads": tuple(heads),
        "transformer_layers": merged["transformer_layers_per_block"],
        "linear_projection": merged["use_linear_projection"],
        "norm_groups": groups,
        "norm_eps": merged["norm_eps"],
        "out_channels": merged["out_channels"],
        "mid_attention": True,
    }


def scheduler_settings(values: dict[str, Any], source: str) -> dict[str, Any]:
    """Translates a diffusers scheduler's configuration into `SchedulerConfig` fields.

    Raises:
        CheckpointError: betas that are listed one by one, a scheduler of another kind, values out of range.
    """
    if values.get("trained_betas") is not None:
        raise CheckpointError(f"{source}: trained_betas are not known; give beta_schedule, beta_start and beta_end")
    kind = str(values.get("_class_name", ""))[:100]
    if (kind and "beta_start" not in values) or values.get("use_flow_sigmas"):
        raise CheckpointError(f"{source}: a {kind} without betas; only noise schedules of the DDPM kind are known")
    found = SCHEDULER_DEFAULTS | {key: values[key] for key in SCHEDULER_DEFAULTS if values.get(key) is not None}
    found |= {"rescale_zero_snr": values.get("rescale_betas_zero_snr") or False}
    settings = checked(SchedulerConfig, found, source)
    check_component("scheduler", from_dict(SchedulerConfig, settings), {}, source)
    return settings


def diffusers_scheduler(config: SchedulerConfig) -> dict[str, Any]:
    """Writes a noise schedule as the `scheduler_config.json` of diffusers' `DDIMScheduler`, which steps as ours does.

    Before step 0 alpha is that of step 0, and x_0 is not clipped (arXiv 2401.10227).
    """
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": config.num_train_timesteps,
        "beta_schedule": config.beta_schedule,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "prediction_type": config.prediction_type,
        "rescale_betas_zero_snr": config.rescale_zero_snr,
        "timestep_spacing": config.timestep_spacing,
        "steps_offset": 0,
        "clip_sample": False,
        "set_alpha_to_one": False,
    }


def diffusers_unet(config: UNetConfig, source: str) -> dict[str, Any]:
    """Writes a UNet as the configuration of diffusers' `UNet2DConditionModel`; `unet_settings` is its inverse.

    Without cross-attention the class has to be built with some, of which the blocks are freed afterwards.

    Args:
        config: of the UNet.
        source: names the component, for errors.

    Raises:
        CheckpointError: parts that diffusers' class does not have.
    """
    foreign = {
        "unet.separate_conv_in": config.separate_conv_in,
        "unet.separate_image_encoder": config.separate_image_encoder,
        "unet.mid_attention=false": not config.mid_attention,
    }
    if wrong := [name for name, is_there in foreign.items() if is_there]:
        raise CheckpointError(f"{source}: diffusers' UNet2DConditionModel has no {', '.join(wrong)}")
    down = {known: kind for kind, known in DOWN_BLOCKS.items()}
    up = {known: kind for kind, known in UP_BLOCKS.items()}
    return {
        "sample_size": config.sample_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": list(config.block_out_channels),
        "layers_per_block": config.layers_per_block,
        "attention_head_dim": list(config.num_heads),  # this counts heads
        "transformer_layers_per_block": config.transformer_layers,
        "use_linear_projection": config.linear_projection,
        "norm_num_groups": config.norm_groups,
        "norm_eps": config.norm_eps,
        "cross_attention_dim": config.cross_attention_dim or 1,
        "down_block_types": [down[attends] for attends in config.attention],
        "up_block_types": [up[attends] for attends in reversed(config.attention)],
    }
