"""Finds model folders by name: weights that come with the package."""

from __future__ import annotations

import os
from pathlib import Path

from ldmseg_fast.config import ImageEncoderConfig
from ldmseg_fast.errors import CheckpointError, ConfigError

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


def resolve_model_dir(name_or_path: str | Path) -> Path:
    """Finds the model folder that a command or a setting means.

    What exists is a path, and so is what is written as one (`./tiny`, `runs/diffusion`); a bare word is the name of a
    shipped model, or of a release in the source checkout that the package runs from.

    Raises:
        CheckpointError: a word that is neither a folder nor the name of a model.
    """
    path = Path(name_or_path)
    word = str(name_or_path)
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
            f"image_vae/ and scheduler/"
        )
    return known[word]
