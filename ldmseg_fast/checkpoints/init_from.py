"""Finds the starting weights of the diffusion stage: `model.init_from`, a Stable Diffusion folder or a model folder."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ldmseg_fast.checkpoints.diffusers_folder import read_config, read_weights, scheduler_settings, unet_settings
from ldmseg_fast.checkpoints.model_folder import load_component_config, load_index
from ldmseg_fast.checkpoints.shipped import resolve_model_dir
from ldmseg_fast.checkpoints.tensors import WEIGHTS, load_state, load_weights
from ldmseg_fast.config import Config, ImageEncoderConfig, SchedulerConfig, UNetConfig, update, validate
from ldmseg_fast.errors import CheckpointError, ConfigError
from ldmseg_fast.files import inside, read_json
from ldmseg_fast.models.image_vae import TaesdEncoder, modern_attention_names
from ldmseg_fast.models.unet import UNet, input_parts

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
    "a Stable Diffusion 1.4, 1.5 or 2.1 folder in diffusers' layout; on a machine with network, `huggingface-cli "
    "download` fetches one with --local-dir FOLDER (of unet/, vae/ and scheduler/ the JSON and .safetensors files are "
    "enough)"
)


@dataclass(frozen=True)
class Start:
    """Says where weights come from, and what the folder says about them.

    Attributes:
        config: the run's, with the folder's values where the run left the defaults.
        unet, image_vae: weights to load, None: train from scratch. `image_vae` is a folder, or TAESD's file.
        vae_config: diffusers' configuration of the image VAE; None: Stable Diffusion's.
        ours: whether `unet` and `image_vae` lie in a model folder of ours.
    """

    config: Config
    unet: Path | None = None
    image_vae: Path | None = None
    vae_config: dict[str, Any] | None = None
    ours: bool = False


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
    folder = resolve_model_dir(config.model.init_from)
    if not folder.is_dir():
        raise CheckpointError(f"model.init_from={folder}: no such folder; give {HOW_TO_GET_ONE}, or a model folder")
    index = read_json(inside(folder, folder / "model_index.json")) if (folder / "model_index.json").is_file() else {}
    if "format_version" in index:
        start = _ours(config, folder)
    elif (folder / "unet" / "config.json").is_file():
        start = _stable_diffusion(config, folder)
    else:
        raise CheckpointError(f"model.init_from={folder}: no unet/config.json in it; give {HOW_TO_GET_ONE}")
    start = _with_image_vae(start)
    return replace(start, config=validate(start.config))


def _stable_diffusion(config: Config, folder: Path) -> Start:
    source = f"model.init_from={folder}"
    structure = unet_settings(read_config(folder / "unet", "unet"), f"{source}/unet/config.json")
    unet = _adopt(config.unet, UNetConfig(), structure, "unet.", source)
    scheduler = config.scheduler
    file = next((f for f in ("scheduler_config.json", "config.json") if (folder / "scheduler" / f).is_file()), None)
    if file is not None:
        path = inside(folder, folder / "scheduler" / file)
        scheduler = _adopt_defaults(scheduler, SchedulerConfig(), scheduler_settings(read_json(path), str(path)))
    return Start(replace(config, unet=unet, scheduler=scheduler), unet=folder / "unet")


def _ours(config: Config, folder: Path) -> Start:
    source = f"model.init_from={folder}"
    missing = {"unet", "mask_vae", "image_vae", "scheduler"} - set(load_index(folder).get("components", []))
    if missing:
        raise CheckpointError(
            f"{source}: a model folder without {', '.join(sorted(missing))}; use it as model.mask_vae"
        )
    found = {name: load_component_config(folder, name) for name in ("unet", "image_vae", "scheduler")}
    structure = {key: getattr(found["unet"][0], key) for key in UNET_STRUCTURE}
    image_encoder = replace(found["image_vae"][0], path="")
    config = replace(
        config,
        unet=_adopt(config.unet, UNetConfig(), structure, "unet.", source),
        image_encoder=_adopt(
            config.image_encoder, ImageEncoderConfig(), asdict(image_encoder), "image_encoder.", source
        ),
        scheduler=_adopt_defaults(config.scheduler, SchedulerConfig(), asdict(found["scheduler"][0])),
    )
    if not config.model.mask_vae:
        config = replace(config, model=replace(config.model, mask_vae=str(folder)))
    vae_config = found["image_vae"][1].get("_vae_config")
    return Start(config, folder / "unet", folder / "image_vae", vae_config, ours=True)


def _with_image_vae(start: Start) -> Start:
    """The image encoder's weights where `model.init_from` is no folder of ours."""
    encoder = start.config.image_encoder
    if start.image_vae is not None or encoder.kind == "conv":
        return start
    path = Path(encoder.path) if encoder.path else None
    if encoder.kind == "taesd":
        if path is None or not path.is_file():
            raise ConfigError(f"image_encoder.path={encoder.path}: TAESD's encoder as a .safetensors file expected")
        return replace(start, image_vae=path)
    folder = path or (start.unet.parent / "vae" if start.unet is not None else None)
    if folder is None:
        raise ConfigError(
            f"image_encoder.kind=autoencoder_kl needs weights: set model.init_from=FOLDER, {HOW_TO_GET_ONE}; or "
            f"image_encoder.path=FOLDER for the image VAE alone"
        )
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json in it; the image VAE comes from {HOW_TO_GET_ONE}")
    values = read_config(folder, "vae")
    found = {
        "latent_channels": values.get("latent_channels", 4),
        "downsampling": 2 ** (len(values.get("block_out_channels", [64])) - 1),
        "scaling_factor": values.get("scaling_factor", 0.18215),
    }
    encoder = _adopt(encoder, ImageEncoderConfig(), found, "image_encoder.", str(folder))
    return replace(start, config=replace(start.config, image_encoder=encoder), image_vae=folder, vae_config=values)


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


@torch.no_grad()
def load_unet(unet: UNet, start: Start) -> None:
    """Loads the weights of `start.unet` into `unet`; without `start.unet` it keeps its own.

    Cross-attention is dropped or kept as `unet` has it, and the input is widened. The parts of `conv_in` are
    initialised as `model.init_noisy`, `init_image` and `init_condition` say, where the folder's model has no such part;
    its bias is copied. Parts that it does not have at all (cross-attention, a separate image encoder) keep their own
    initialisation, or take a copy of the down path.

    Raises:
        CheckpointError: weights that are missing, damaged, or do not fit.
    """
    if start.unet is None:
        return
    state = load_weights(inside(start.unet.parent, start.unet / WEIGHTS)) if start.ours else read_weights(start.unet)
    own = unet.state_dict()
    if not unet.config.cross_attention_dim:
        state = {key: value for key, value in state.items() if not is_cross_attention(key)}
    elif not any(map(is_cross_attention, state)):
        state |= {key: value for key, value in own.items() if is_cross_attention(key)}
    if "conv_in.weight" in state:
        state |= _input_convolutions(state.pop("conv_in.weight"), state.pop("conv_in.bias"), unet, start)
    if unet.config.separate_image_encoder:
        copies = {f"image_{key}": value for key, value in state.items() if key.startswith("down_blocks.")}
        projections = {key: value for key, value in own.items() if key.startswith("image_projections.")}
        state = copies | projections | state
    load_state(unet, state, str(start.unet))


def is_cross_attention(key: str) -> bool:
    """Tells whether a tensor belongs to attention over the context and not over the picture."""
    return ".attn2." in key or ("transformer_blocks." in key and ".norm2." in key)


def _input_convolutions(weight: Tensor, bias: Tensor, unet: UNet, start: Start) -> dict[str, Tensor]:
    """`unet`'s input convolutions from the folder's weight [O, I, 3, 3] and bias [O]."""
    model = start.config.model
    parts = input_parts(replace(unet.config, image_channels=start.config.image_encoder.latent_channels))
    noisy, image = parts[:2]
    base = weight[:, :noisy]
    kept: list[Tensor] = []
    if start.ours:  # it has these parts itself
        kept = list(weight.split([noisy, image] + ([noisy] if weight.shape[1] > noisy + image else []), dim=1))
    shapes = [(weight.shape[0], part, *weight.shape[2:]) for part in parts]
    fresh = [nn.init.kaiming_uniform_(weight.new_empty(shape), a=5**0.5) for shape in shapes]
    modes = (model.init_noisy, model.init_image, model.init_condition)
    made = [
        kept[index] if index < len(kept) else initial(base, modes[index], fresh[index]) for index in range(len(parts))
    ]
    made_state: dict[str, Tensor] = {}
    if unet.config.separate_image_encoder:
        made_state |= {"image_conv_in.weight": initial(base, "copy", fresh[1]), "image_conv_in.bias": bias}
    if not unet.config.separate_conv_in:
        return made_state | {"conv_in.weight": torch.cat(made, dim=1), "conv_in.bias": bias}
    for index, part in enumerate(made):
        made_state[f"conv_in.parts.{index}.weight"] = part
        made_state[f"conv_in.parts.{index}.bias"] = bias if index == 0 else torch.zeros_like(bias)
    return made_state


def initial(base: Tensor, mode: str, fresh: Tensor) -> Tensor:
    """Makes weights like `fresh`, float [O, I, 3, 3], from the pre-trained `base`, float [O, J, 3, 3].

    `fresh` is of a new input part. "copy" repeats base's input channels, "half" is half of that, "mean" gives every
    channel base's mean over its input channels, "zero" is zero, and "random" is `fresh` itself.
    """
    count = fresh.shape[1]
    if mode == "random":
        return fresh.clone()
    if mode == "zero":
        return torch.zeros_like(fresh)
    if mode == "mean":
        return base.mean(dim=1, keepdim=True).expand_as(fresh).clone()
    repeated = base[:, torch.arange(count) % base.shape[1]]
    return 0.5 * repeated if mode == "half" else repeated


def load_image_encoder(encoder: nn.Module, start: Start) -> None:
    """Loads the weights of `start.image_vae` into `encoder`; without `start.image_vae` it keeps its own.

    Raises:
        CheckpointError: weights that are missing, damaged, or do not fit.
    """
    if start.image_vae is None:
        return
    if start.ours:
        state = load_weights(inside(start.image_vae.parent, start.image_vae / WEIGHTS))
    elif isinstance(encoder, TaesdEncoder):
        state = {f"layers.{key}": value for key, value in load_weights(start.image_vae).items()}
    else:
        state = modern_attention_names(read_weights(start.image_vae))
        state = {key: value for key, value in state.items() if not key.startswith(("decoder.", "post_quant_conv."))}
    load_state(encoder, state, str(start.image_vae))
