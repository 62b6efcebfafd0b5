"""Finds model folders by name: weights that come with the package, and models of the Hugging Face Hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ldmseg_fast.checkpoints.hub_names import GRAPHS, MODEL, PREFIX, RULE, VAE, hub_name
from ldmseg_fast.config import ImageEncoderConfig
from ldmseg_fast.errors import ArgumentError, CheckpointError, ConfigError

SHIPPED = Path(__file__).parents[1] / "weights"  # model folders made by `ldmseg ship`, and image encoders' features
RELEASES = Path(__file__).parents[2] / "releases"  # of a source checkout: models that are no part of the package
RELEASED = ("photographs",)
RANDOM = "random"  # in the place of a path: no weights


def shipped_models() -> dict[str, Path]:
    """Lists name and folder of the models that this installation brought along."""
    return {path.parent.name: path.parent for path in sorted(SHIPPED.glob("*/model_index.json"))}


def pretrained_weights(encoder: ImageEncoderConfig) -> Path:
    """Finds the weights of a pre-trained image encoder that come with the package.

    Raises:
        ConfigError: there are none of this one.
    """
    file = SHIPPED / f"{encoder.kind}{encoder.variant}" / "model.safetensors"
    if not file.is_file():
        raise ConfigError(
            f"image_encoder.path is missing: no weights of {encoder.kind} {encoder.variant} come with the package; "
            f"give their .safetensors file, or image_encoder.path={RANDOM} for an encoder that is not pre-trained"
        )
    return file


def resolve_model_dir(name_or_path: str | Path, revision: str | None = None, kinds: Sequence[str] = (MODEL,)) -> Path:
    """Finds the model folder that a command or a setting means, and fetches it where it is the Hub's.

    What exists is a path, and so is what is written as one (`./tiny`, `runs/diffusion`, a `Path` with a folder in it).
    A bare word is the name of a shipped model, or of a release in the source checkout that the package runs from;
    `owner/name` is that of a model of the Hub (see `hub_names.RULE`).

    Args:
        name_or_path: of the model; a name of the Hub may end in `@REVISION`.
        revision: branch, tag or commit of a model of the Hub; default its main branch.
        kinds: of repositories that the caller can use, of `hub_names`.

    Raises:
        CheckpointError: a word that is neither a folder nor a shipped model, or a repository without a model.
        HubError: see `hub.fetch`.
        ArgumentError: neither path nor text, a revision of something that has none, or no name behind `hf://`.
    """
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise ArgumentError(f"model {name_or_path!r:.200}: a folder or the name of a model expected")
    path = Path(name_or_path)
    word = str(name_or_path)
    found = None
    if not path.exists() and (word.startswith(PREFIX) or not isinstance(name_or_path, Path)):
        found = hub_name(word, revision)
    if found is not None:
        from ldmseg_fast.checkpoints.hub import fetch

        return fetch(found, kinds)
    if revision is not None:
        raise ArgumentError(f"{word}: revision={revision}, and it is no name of the Hub; leave it out: {RULE}")
    if path.exists() or os.sep in word or (os.altsep or os.sep) in word or word in ("", ".", ".."):
        return path
    known = shipped_models()
    if word not in known and (RELEASES / word / "model_index.json").is_file():
        return RELEASES / word
    if word in RELEASED and word not in known:
        raise CheckpointError(
            f"{word}: this release is no part of the package, and {RELEASES / word} is not there; get the source "
            f"checkout with releases/{word} and give that folder"
        )
    if word not in known:
        raise CheckpointError(
            f"{word}: no such model folder, and no shipped model of that name (shipped: {', '.join(known) or 'none'}); "
            f"a model folder is what training or `ldmseg convert` writes: model_index.json beside unet/, mask_vae/, "
            f"image_vae/ and scheduler/; {RULE}"
        )
    return known[word]


def resolve_image_vae(name_or_path: str | Path) -> Path:
    """Finds the folder or the file of an image VAE; what is no name of the Hub is a path.

    Raises:
        CheckpointError, HubError, ArgumentError: as `resolve_model_dir`.
    """
    path, word = Path(name_or_path), str(name_or_path)
    if path.exists() or isinstance(name_or_path, Path) or hub_name(word) is None:
        return path
    return resolve_model_dir(word, kinds=(VAE,))


def recorded(word: str, folder: Path) -> str:
    """Writes what a run's settings name the folder by that `word` was resolved to: a model of the Hub by its name."""
    return word if word.startswith(PREFIX) else str(folder)


def resolve_engine_dir(name_or_path: str | Path, backend: str) -> Path:
    """Finds the folder of exported graphs or engines that is meant; ONNX graphs may be the Hub's.

    Raises:
        ArgumentError: TensorRT engines by a name of the Hub. They fit one kind of GPU and are code that it runs.
        CheckpointError: as `resolve_model_dir`.
    """
    path, word = Path(name_or_path), str(name_or_path)
    if path.exists() or isinstance(name_or_path, Path) or hub_name(word) is None:
        return path
    if backend != "onnxruntime":
        raise ArgumentError(
            f"{word}: no such folder, and engines are not taken from the Hub: build them here, with `python "
            f"export/to_trt.py {word} --out DIR`"
        )
    return resolve_model_dir(word, kinds=(GRAPHS,))
