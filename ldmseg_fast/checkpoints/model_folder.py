"""Reads and writes model folders: diffusers' layout, safetensors only.

MODEL_DIR/  model_index.json   unet/  mask_vae/  image_vae/  scheduler/     each with config.json (+ model.safetensors)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmseg_fast import __version__
from ldmseg_fast.checkpoints.tensors import WEIGHTS, load_state, load_weights, save_weights
from ldmseg_fast.config import (
    ConditioningConfig,
    ImageEncoderConfig,
    MaskVAEConfig,
    PostprocessConfig,
    SchedulerConfig,
    UNetConfig,
    from_dict,
    to_dict,
)
from ldmseg_fast.errors import CheckpointError, ConfigError
from ldmseg_fast.files import inside, read_json, replacing_folder, write_json

FORMAT_VERSION = 1
COMPONENTS = {
    "unet": UNetConfig,
    "mask_vae": MaskVAEConfig,
    "image_vae": ImageEncoderConfig,
    "scheduler": SchedulerConfig,
    "conditioning": ConditioningConfig,
}


def save_component(
    folder: Path,
    name: str,
    config: Any,
    state: dict[str, Tensor] | None,
    extra: dict | None = None,
    write_files: Callable[[Path], object] | None = None,
) -> None:
    """Writes one component of a model folder beside the old one, and then puts it in its place.

    Args:
        folder: the model folder.
        name: of the component.
        config: its dataclass.
        state: its tensors, any shape and dtype; None: it has none.
        extra: more entries of config.json, their names starting with "_".
        write_files: adds files to the component's folder, which it is given.

    Raises:
        OSError: the folder cannot be written; the old component stays.
    """
    with replacing_folder(folder / name) as temporary:
        if state is not None:
            save_weights(state, temporary / WEIGHTS)
        if write_files is not None:
            write_files(temporary)
        write_json(temporary / "config.json", to_dict(config) | (extra or {}))


def save_index(folder: Path, components: list[str], settings: dict[str, Any]) -> None:
    """Writes `model_index.json`: the format's version, the components, and how the model is meant to be sampled."""
    index = {"_class_name": "LDMSegPipeline", "format_version": FORMAT_VERSION, "ldmseg_fast": __version__}
    write_json(folder / "model_index.json", index | {"components": sorted(components)} | settings)


def load_index(folder: str | Path) -> dict[str, Any]:
    """Reads `model_index.json` of a model folder.

    Raises:
        CheckpointError: no such folder, no model folder, or a format this version does not read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such model folder")
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(
            f"{folder}: no model_index.json in it, so it is no model folder; train or convert one first"
        )
    index = read_json(inside(folder, folder / "model_index.json"))
    version = index.get("format_version") if isinstance(index, dict) else None
    if version != FORMAT_VERSION:
        known = "newer" if isinstance(version, int) and version > FORMAT_VERSION else "foreign or older"
        cure = "update ldmseg_fast" if known == "newer" else "convert it again with `ldmseg convert`"
        raise CheckpointError(
            f"{folder}: {known} model format {version!r}, this version reads {FORMAT_VERSION}; {cure}"
        )
    return index


def load_component_config(folder: str | Path, name: str) -> tuple[Any, dict[str, Any]]:
    """Reads a component's config dataclass, and what else its config.json holds.

    Raises:
        CheckpointError: a file that is missing, or holds other settings than there are.
    """
    path = inside(Path(folder), Path(folder) / name / "config.json")
    values = read_json(path)
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: a mapping of settings expected; save the model again")
    extra = {key: values.pop(key) for key in list(values) if key.startswith("_")}
    try:
        return from_dict(COMPONENTS[name], values), extra
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


def load_component(folder: str | Path, name: str, attention: str = "auto") -> Any:
    """Loads `unet`, `mask_vae`, `image_vae` or `conditioning` with its weights, in evaluation mode and frozen.

    Args:
        folder: the model folder.
        name: of the component.
        attention: backend of a UNet's attention.

    Raises:
        CheckpointError: missing or damaged files, or weights that do not fit the configuration.
    """
    from ldmseg_fast.models.conditioning import build_conditioning
    from ldmseg_fast.models.image_vae import build_image_encoder
    from ldmseg_fast.models.mask_vae import MaskVAE
    from ldmseg_fast.models.unet import UNet

    config, extra = load_component_config(folder, name)
    path = inside(Path(folder), Path(folder) / name / WEIGHTS)
    module: Any
    if name == "conditioning":  # transformers' models have buffers that no file holds
        tokenizer = path.parent / "tokenizer"
        module = build_conditioning(
            load_component_config(folder, "unet")[0], config, extra.get("_clip_config"), tokenizer
        )
    else:
        with torch.device("meta"):  # no random numbers for weights that are read anyway
            if name == "unet":
                module = UNet(config, attention)
            elif name == "mask_vae":
                module = MaskVAE(config)
            else:
                module = build_image_encoder(config, extra.get("_vae_config"))
    load_state(module, load_weights(path), str(path))
    return module.eval().requires_grad_(False)


def postprocess_settings(config: PostprocessConfig) -> dict[str, Any]:
    """Gives the entry of `model_index.json` for the thresholds of the post-processing."""
    return {"postprocess": asdict(config)}
