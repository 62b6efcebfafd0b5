"""Reads Stable Diffusion 1.x and 2.x from one safetensors file under the names of CompVis, which A1111 and others keep.

`model.diffusion_model.*` is the UNet and `first_stage_model.*` the image VAE, with the names of
https://github.com/CompVis/stable-diffusion. They become diffusers' names here. Text encoder and averages stay unread.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ldmseg_fast.checkpoints.tensors import load_weights, opened_weights
from ldmseg_fast.config import SchedulerConfig
from ldmseg_fast.diffusion.scheduler import make_betas
from ldmseg_fast.errors import CheckpointError
from ldmseg_fast.models import image_vae, unet

UNET, VAE = "model.diffusion_model.", "first_stage_model."
# what only files of another kind hold, and what they are called
OTHERS = {
    "a LoRA, which is no model but a change to one": (
        r"lora_(up|down|A|B|unet|te)|\.lora\.|\.hada_w|\.lokr_w|\.dora_scale|\.oft_"
    ),
    "a ControlNet": r"^control_model\.|^input_hint_block\.|^controlnet_cond_embedding\.|^control_net\.",
    "an embedding of words (textual inversion)": r"^emb_params$|^string_to_param",
    "Stable Diffusion XL": r"^conditioner\.embedders\.|^model\.diffusion_model\.label_emb\.",
    "a transformer, as Stable Diffusion 3 and FLUX have it": (
        r"^(model\.diffusion_model\.)?(joint_blocks|double_blocks|single_blocks|transformer_blocks)\."
    ),
    "a network of diffusers outside its folder": r"^down_blocks\.|^encoder\.down_blocks\.",
}
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_MID = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
_VAE_PARTS = (
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.proj_attn."),
    (r"\.mid\.attn_1\.q\.", ".mid_block.attentions.0.query."),
    (r"\.mid\.attn_1\.k\.", ".mid_block.attentions.0.key."),
    (r"\.mid\.attn_1\.v\.", ".mid_block.attentions.0.value."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
)
_PREDICTIONS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}


def unet_settings_of(path: Path, given_heads: tuple[int, ...] = (), given_groups: int = 32) -> dict[str, Any]:
    """Reads the `UNetConfig` fields of a file's UNet off its tensors, `in_channels` with them.

    Head counts and norm groups are not in the tensors. Where they are not given, they are those of Stable Diffusion: 32
    groups, and 8 heads in 1.x, heads of 64 channels in 2.x, which has linear projections.

    Args:
        path: of the safetensors file.
        given_heads: heads a level; (): Stable Diffusion's.
        given_groups: norm groups.

    Raises:
        CheckpointError: a file of another kind, or of a UNet that heads or groups do not divide; the message names it.
    """
    names = _shapes(path)
    state = _unet_names({key.removeprefix(UNET): value for key, value in names.items() if key.startswith(UNET)})
    if not state:
        raise CheckpointError(f"{path}: {_what_else(names)}; {_CURE}")
    try:
        found = unet.structure_from_state(state)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error} below {UNET}; {_CURE}") from None
    widths: tuple[int, ...] = found["block_out_channels"]
    heads = given_heads or tuple(width // 64 if found["linear_projection"] else 8 for width in widths)
    if len(heads) != len(widths) or any(not count or width % count for count, width in zip(heads, widths)):
        raise CheckpointError(
            f"{path}: heads are not in the file, and {list(heads)} do not divide its widths {list(widths)}; give the "
            f"model's own: unet.num_heads={','.join('N' for _ in widths)} unet.block_out_channels="
            f"{','.join(map(str, widths))} unet.attention={','.join(str(flag).lower() for flag in found['attention'])}"
        )
    if wrong := [width for width in widths if width % given_groups]:
        raise CheckpointError(
            f"{path}: norm groups are not in the file, and {given_groups} do not divide its width {wrong[0]}; give the "
            f"model's own with unet.norm_groups=N"
        )
    return found | {"num_heads": heads, "norm_groups": given_groups, "norm_eps": 1e-5}


def schedule_of(path: Path) -> dict[str, Any]:
    """Reads what a file says about its noise schedule, as `SchedulerConfig` fields; {} where it says nothing.

    The betas lie among the tensors of whole models. The prediction type stands in the metadata of files that follow
    https://github.com/Stability-AI/ModelSpec.

    Raises:
        CheckpointError: betas of no schedule that is known here.
    """
    with opened_weights(path) as file:
        said = str((file.metadata() or {}).get("modelspec.prediction_type", "")).lower()
        betas = file.get_tensor("betas").double() if "betas" in file.keys() else None  # noqa: SIM118 (no mapping)
    found: dict[str, Any] = {"prediction_type": _PREDICTIONS[said]} if said in _PREDICTIONS else {}
    if betas is None:
        return found
    if betas.ndim != 1 or len(betas) < 2:
        raise CheckpointError(f"{path}: betas of shape {list(betas.shape)}; a list of them expected; {_CURE}")
    start, end = (float(f"{float(value):.3g}") for value in (betas[0], betas[-1]))  # some files hold them as float16
    kinds: tuple[Literal["scaled_linear", "linear"], ...] = ("scaled_linear", "linear")
    for kind in kinds if 0 < start <= end < 1 else ():
        config = SchedulerConfig(len(betas), kind, start, end)
        if torch.allclose(make_betas(config).double(), betas, rtol=5e-3):
            names = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")
            return found | {name: getattr(config, name) for name in names}
    raise CheckpointError(
        f"{path}: its betas, {len(betas)} from {start} to {end}, are neither linear nor scaled_linear, so its noise "
        f"schedule is not known here; {_CURE}"
    )


def vae_settings_of(path: Path) -> dict[str, Any]:
    """Reads diffusers' configuration of a file's image VAE off its tensors; norm groups are Stable Diffusion's 32.

    Raises:
        CheckpointError: a file without one.
    """
    state = _vae_names(_shapes(path))
    if not state:
        raise CheckpointError(
            f"{path}: no image VAE ({VAE}encoder.*) in it; give one with image_encoder.path=FOLDER or FILE"
        )
    try:
        found = image_vae.structure_from_state(state)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return image_vae.kl_config(found)


def has_vae(path: Path) -> bool:
    """Tells whether a safetensors file holds Stable Diffusion's image VAE, alone or in a whole model."""
    return bool(_vae_names(_shapes(path)))


def unet_state(path: Path) -> dict[str, Tensor]:
    """Reads the UNet's tensors, any shape and dtype, under diffusers' names.

    Raises:
        CheckpointError: as `load_weights`.
    """
    return _unet_names(load_weights(path, UNET))


def vae_state(path: Path) -> dict[str, Tensor]:
    """Reads the image encoder's tensors, any shape and dtype, under diffusers' names.

    Raises:
        CheckpointError: as `load_weights`.
    """
    return _vae_names(load_weights(path, VAE) or load_weights(path))


def check_is_safetensors(path: Path) -> None:
    """Checks that a model in one file is a safetensors file, by its name.

    Raises:
        CheckpointError: a checkpoint of `torch.save`, or another file.
    """
    if path.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin", ".pkl"):
        raise CheckpointError(
            f"{path}: a pickle, which can run code when it is read, so it is not opened; take the same model's "
            f".safetensors file, or load it in diffusers (StableDiffusionPipeline.from_single_file) on a machine you "
            f"can lose, save_pretrained it, and give that folder"
        )
    if path.suffix.lower() != ".safetensors":
        raise CheckpointError(f"{path}: a file, and neither a model's folder nor a .safetensors file; {_CURE}")


_CURE = "give a Stable Diffusion 1.x or 2.x, as one .safetensors file or as a folder"


def _shapes(path: Path) -> dict[str, Tensor]:
    """A file's tensors on the meta device: the header alone is read."""
    with opened_weights(path) as file:
        return {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in file.keys()}  # noqa: SIM118


def _what_else(names: Iterable[str]) -> str:
    """Says what a file holds that has no UNet under CompVis' names."""
    names = list(names)
    for what, pattern in OTHERS.items():
        if any(re.search(pattern, name) for name in names):
            return what
    if _vae_names(dict.fromkeys(names, torch.empty(0))):
        return "an image VAE alone, which image_encoder.path takes"
    return f"no {UNET}* in it, its tensors are {', '.join(sorted(names)[:3]) or 'none'}"


def _unet_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames the tensors of a UNet; the levels follow from where the input gets smaller."""
    for what in ("Stable Diffusion XL", "a transformer, as Stable Diffusion 3 and FLUX have it"):
        if any(re.search(OTHERS[what], UNET + name) for name in state):
            return {}
    ends = sorted(int(name.split(".")[1]) for name in state if re.fullmatch(r"input_blocks\.\d+\.0\.op\.weight", name))
    inputs = {int(name.split(".")[1]) for name in state if re.match(r"input_blocks\.\d+\.", name)}
    period = ends[0] if ends else max(inputs, default=1)  # blocks of a level, the one that halves with them
    return {_unet_name(name, period): value for name, value in state.items()}


def _unet_name(name: str, period: int) -> str:
    for old, new in _ENDS.items():
        if name.startswith(f"{old}."):
            return new + name[len(old) :]
    if match := re.fullmatch(r"middle_block\.([012])\.(.+)", name):
        return f"mid_block.{_MID[match[1]]}.{_inner(match[2])}"
    match = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d)\.(.+)", name)
    if match is None:
        return name
    side, block, part, rest = match[1], int(match[2]), match[3], match[4]
    level, layer = divmod(block - (side == "input"), period)
    start = f"{'down' if side == 'input' else 'up'}_blocks.{level}"
    if rest.startswith(("op.", "conv.")):
        return f"{start}.{'down' if side == 'input' else 'up'}samplers.0.conv.{rest.partition('.')[2]}"
    return f"{start}.{'resnets' if part == '0' else 'attentions'}.{layer}.{_inner(rest)}"


def _inner(rest: str) -> str:
    """Names a layer inside a residual block; those of attention are called the same on both sides."""
    for old, new in _RESNET.items():
        if rest.startswith(f"{old}."):
            return new + rest[len(old) :]
    return rest


def _vae_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames the tensors of an image encoder, which stand alone or below `first_stage_model.`; {} without any."""
    prefix = VAE if any(name.startswith(f"{VAE}encoder.") for name in state) else ""
    found = {}
    for name, value in state.items():
        own = name.removeprefix(prefix)
        if not name.startswith(prefix) or not own.startswith(("encoder.", "quant_conv.")):
            continue
        for pattern, new in _VAE_PARTS:
            own = re.sub(pattern, new, own)
        found[own] = value
    if not any(name.startswith("encoder.down_blocks.") for name in found):
        return {}
    return image_vae.modern_attention_names(found)
