"""Model folders (diffusers' layout, safetensors only) and training checkpoints.

MODEL_DIR/  model_index.json   unet/  mask_vae/  image_vae/  scheduler/     each with config.json (+ model.safetensors)
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ldmseg_fast import __version__
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
from ldmseg_fast.files import inside, read_json, replace_folder, write_json

FORMAT_VERSION = 1
WEIGHTS = "model.safetensors"
COMPONENTS = {
    "unet": UNetConfig,
    "mask_vae": MaskVAEConfig,
    "image_vae": ImageEncoderConfig,
    "scheduler": SchedulerConfig,
    "conditioning": ConditioningConfig,
}


DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save_weights(state: dict[str, Tensor], path: Path) -> None:
    """A safetensors file, on disk when this returns; tensors are copied to the CPU one at a time."""
    header: dict[str, Any] = {}
    end = 0
    # widest elements first, so that every tensor starts at a multiple of its element's size
    names = sorted(state, key=lambda name: (-state[name].element_size(), name))
    for name in names:
        tensor = state[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            if state[name].numel():
                data = state[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                file.write(data.numpy().data)
        file.flush()
        os.fsync(file.fileno())


def load_weights(path: Path) -> dict[str, Tensor]:
    """Raises CheckpointError where the file is missing or damaged."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; model folders hold their weights in {WEIGHTS}")
    try:
        return expand_int8(load_file(path))
    except Exception as error:  # safetensors raises its own type, which is not exported
        raise CheckpointError(f"{path}: damaged safetensors file ({error}); copy or save it again") from None


INT8_SCALE = ".int8_scale"  # after a tensor's name: its scales


def expand_int8(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors stored as int8 [O, ...] beside scales [O] (see `ship.to_int8`) as float32; the others as they are."""
    scales = {name.removesuffix(INT8_SCALE): state[name] for name in state if name.endswith(INT8_SCALE)}
    expanded = {name: value for name, value in state.items() if not name.endswith(INT8_SCALE)}
    for name, scale in scales.items():
        expanded[name] = state[name].float() * scale.float().view(-1, *[1] * (state[name].ndim - 1))
    return expanded


def load_state(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """`load_state_dict` with one error that lists what is missing, extra, or of another shape.

    A module on the meta device takes the tensors themselves, in float32, instead of copying them.
    """
    check_state(module.state_dict(), state, source)
    if any(parameter.is_meta for parameter in module.parameters()):
        state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
        module.load_state_dict(state, assign=True)
    else:
        module.load_state_dict(state)


def check_state(own: dict[str, Tensor], state: dict[str, Tensor], source: str) -> None:
    """Raises CheckpointError listing what `state` lacks, has too much, or has in another shape than `own`."""
    missing = sorted(own.keys() - state.keys())
    extra = sorted(state.keys() - own.keys())
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in sorted(own.keys() & state.keys())
        if own[key].shape != state[key].shape
    ]
    problems = [
        f"{len(items)} {kind}: {', '.join(items[:5])}{', ...' if len(items) > 5 else ''}"
        for kind, items in (("missing", missing), ("unexpected", extra), ("of another shape", shapes))
        if items
    ]
    if problems:
        raise CheckpointError(f"{source}: weights of another architecture; " + "; ".join(problems))


def save_component(
    folder: Path,
    name: str,
    config: Any,
    state: dict[str, Tensor] | None,
    extra: dict | None = None,
    write_files: Callable[[Path], object] | None = None,
) -> None:
    """One component of a model folder, written beside the old one and then put in its place.

    `extra`: more entries of config.json, their names starting with "_". `write_files(folder)` adds files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{name}.new.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        if state is not None:
            save_weights(state, temporary / WEIGHTS)
        if write_files is not None:
            write_files(temporary)
        write_json(temporary / "config.json", to_dict(config) | (extra or {}))
        replace_folder(temporary, folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # what a full disk has left of it


def save_index(folder: Path, components: list[str], settings: dict[str, Any]) -> None:
    """`model_index.json`: the format's version, the components, and how the model is meant to be sampled."""
    index = {"_class_name": "LDMSegPipeline", "format_version": FORMAT_VERSION, "ldmseg_fast": __version__}
    write_json(folder / "model_index.json", index | {"components": sorted(components)} | settings)


def load_index(folder: str | Path) -> dict[str, Any]:
    """`model_index.json` of a model folder.

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
    """The component's config dataclass, and what else its config.json holds."""
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
    """`unet`, `mask_vae`, `image_vae` or `conditioning` of a model folder, in evaluation mode, with its weights.

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
    return {"postprocess": asdict(config)}
