"""Reads and writes model folders: diffusers' layout, safetensors only.

MODEL_DIR/  model_index.json   unet/  mask_vae/  image_vae/  scheduler/     each with config.json (+ model.safetensors)
            categories.json    of models with categories
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmseg_fast import __version__
from ldmseg_fast.checkpoints.categories_file import CATEGORIES
from ldmseg_fast.checkpoints.hub_names import RULE
from ldmseg_fast.checkpoints.schema import COMPONENTS, REQUIRED, check_component, check_index, read_settings
from ldmseg_fast.checkpoints.tensors import WEIGHTS, at_most, check_state, load_state, load_weights, save_weights
from ldmseg_fast.config import PostprocessConfig, from_dict, to_dict
from ldmseg_fast.config.values import shown
from ldmseg_fast.errors import CheckpointError, ConfigError
from ldmseg_fast.files import behind_links, inside, replacing_folder, write_json
from ldmseg_fast.temporary import named_as, temporary_folder

FORMAT_VERSION = 1


def save_component(
    folder: Path,
    name: str,
    config: Any,
    state: dict[str, Tensor] | None,
    extra: dict | None = None,
    write_files: Callable[[Path], object] | None = None,
) -> None:
    """Writes one component of a model folder beside the old one, and then puts it in its place.

    Files that others have put into the old one come along.

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
        _keep_others(behind_links(folder / name), temporary)


def _keep_others(old: Path, new: Path) -> None:
    """Copies what only `old` has."""
    for path in sorted(old.iterdir()) if old.is_dir() else ():
        copy = new / path.name
        if path.name == WEIGHTS or copy.exists():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, copy, symlinks=True)
        else:
            shutil.copy2(path, copy, follow_symlinks=False)


def copy_model(folder: Path, target: Path) -> None:
    """Copies a model folder, bit for bit: index, card, licence, and the components that the index lists.

    What else lies there is no part of the model: a run's checkpoints and logs, files of the user's. The index comes
    last, so that a copy that was interrupted is no model folder.

    Args:
        folder: the model folder.
        target: must not exist, or be an empty folder.

    Raises:
        FileExistsError: `target` holds something.
        CheckpointError: a link out of `folder`.
        OSError: a full disk; `target` is empty then.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        kind = "not empty" if target.is_dir() else "a file"
        raise FileExistsError(f"{target}: {kind}; choose another folder, or remove it first")
    known = known_files(folder)
    target.mkdir(parents=True, exist_ok=True)
    with named_as(target), temporary_folder(target) as temporary:
        for path in known:
            copy = temporary / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(inside(folder, path), copy)
        for path in sorted(temporary.iterdir()):
            path.rename(target / path.name)
        shutil.copy2(inside(folder, folder / "model_index.json"), target)


def known_files(folder: Path) -> list[Path]:
    """Lists what belongs to a model, its index apart: cards, licence, and the components that the index lists.

    Raises:
        CheckpointError: no model folder.
    """
    index = load_index(folder)
    known = [folder / name for name in (*CARDS, CATEGORIES) if (folder / name).is_file()]
    if "id_assignment" not in index and (folder / "config.json").is_file():
        known.append(folder / "config.json")  # of the run, which says it
    return known + [
        path for name in index["components"] for path in sorted((folder / name).rglob("*")) if not path.is_dir()
    ]


CARDS = ("README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")


def save_index(folder: Path, components: list[str], settings: dict[str, Any]) -> None:
    """Writes `model_index.json`: the format's version, the components, and how the model is meant to be sampled."""
    index = {"_class_name": "LDMSegPipeline", "format_version": FORMAT_VERSION, "ldmseg_fast": __version__}
    write_json(folder / "model_index.json", index | {"components": sorted(components)} | settings)


def load_index(folder: str | Path) -> dict[str, Any]:
    """Reads `model_index.json` of a model folder.

    Raises:
        CheckpointError: no such folder, no model folder, a format this version does not read, or values that cannot be.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such model folder; {RULE}")
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(
            f"{folder}: no model_index.json in it, so it is no model folder; train or convert one first"
        )
    path = inside(folder, folder / "model_index.json")
    index = read_settings(path)
    version = index.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        known = "newer" if isinstance(version, int) and version > FORMAT_VERSION else "foreign or older"
        cure = "update ldmseg_fast" if known == "newer" else "convert it again with `ldmseg convert`"
        raise CheckpointError(
            f"{folder}: {known} model format {shown(version)}, this version reads {FORMAT_VERSION}; {cure}"
        )
    return check_index(index, str(path))


def load_component_config(folder: str | Path, name: str) -> tuple[Any, dict[str, Any]]:
    """Reads a component's config dataclass, and what else its config.json holds.

    Raises:
        CheckpointError: a file that is missing, or holds other settings than there are.
    """
    path = inside(Path(folder), Path(folder) / name / "config.json")
    values = read_settings(path)
    extra = {key: values.pop(key) for key in list(values) if key.startswith("_")}
    missing = [key for key in REQUIRED[name] if key not in values]
    if missing:
        raise CheckpointError(f"{path}: damaged, no {', '.join(missing)} in it; copy it or save the model again")
    try:
        config: Any = from_dict(COMPONENTS[name], values)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return config, check_component(name, config, extra, str(path))


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
    state = load_weights(path)

    def build() -> Any:
        if name == "unet":
            return UNet(config, attention)
        if name == "mask_vae":
            return MaskVAE(config)
        if name == "image_vae":
            return build_image_encoder(config, extra.get("_vae_config"))
        unet, tokenizer = load_component_config(folder, "unet")[0], path.parent / "tokenizer"
        return build_conditioning(unet, config, extra.get("_clip_config"), tokenizer)

    with torch.device("meta"), at_most(state, str(path)):  # no random numbers for weights that are read anyway
        module = build()
    if name == "conditioning":  # transformers' models have buffers that no file holds
        check_state(module.state_dict(), state, str(path))
        module = build()
    load_state(module, state, str(path))
    return module.eval().requires_grad_(False)


def postprocess_settings(config: PostprocessConfig) -> dict[str, Any]:
    """Gives the entry of `model_index.json` for the thresholds of the post-processing."""
    return {"postprocess": asdict(config)}
