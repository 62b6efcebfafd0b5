"""Reads what a model folder says of itself, as the backends need it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ldmseg_fast.checkpoints.categories_file import load_categories
from ldmseg_fast.checkpoints.model_folder import load_component_config, load_index
from ldmseg_fast.checkpoints.schema import check_model
from ldmseg_fast.checkpoints.shipped import resolve_model_dir
from ldmseg_fast.config import MaskVAEConfig, PostprocessConfig, SchedulerConfig, UNetConfig, from_dict
from ldmseg_fast.config.categories import CategoryTable
from ldmseg_fast.errors import BackendError, CheckpointError

MAX_IMAGE_SIZE = 16384  # pixels, as of `config.settings.Pixels`


@dataclass(frozen=True)
class ModelInfo:
    """Holds what a pipeline needs to know of a model folder, apart from the weights.

    Attributes:
        folder: MODEL_DIR.
        image_size: S, the side in pixels of what the networks see.
        num_inference_steps: the model's own.
        self_condition: whether the UNet's input ends in the last estimate of x_0.
        image_latent_channels: C_image.
        picture_scale: side of the pictures that the image encoder sees, as a multiple of S.
        picture_stride: what that side must be a multiple of, in pixels.
        unet_levels: of the UNet; each but the last halves the sides.
        conditioning: "none", "learned", "clip_image" or "clip_text".
        mask_vae, scheduler, postprocess: the components' own settings.
        categories: of models with categories.
        context_shape: [M, D] of the tokens that each picture or caption brings; None where it brings none.
        index: the whole of model_index.json.
    """

    folder: Path
    image_size: int
    num_inference_steps: int
    self_condition: bool
    image_latent_channels: int
    unet_levels: int
    conditioning: str
    mask_vae: MaskVAEConfig
    scheduler: SchedulerConfig
    postprocess: PostprocessConfig
    picture_scale: int = 1
    picture_stride: int = 1
    categories: CategoryTable | None = None
    context_shape: tuple[int, int] | None = None
    index: dict[str, Any] = field(repr=False, default_factory=dict)

    @property
    def size_multiple(self) -> int:
        """What S must be a multiple of, for both auto-encoders and every level of the UNet, in pixels."""
        levels = self.mask_vae.downsampling * 2 ** (self.unet_levels - 1)
        return math.lcm(levels, self.picture_stride // math.gcd(self.picture_stride, self.picture_scale))

    @property
    def picture_size(self) -> int:
        """The side in pixels of the pictures that the image encoder sees."""
        return self.image_size * self.picture_scale

    def at_size(self, image_size: int) -> ModelInfo:
        """Describes the same model for pictures of another size.

        Raises:
            BackendError: a size that its networks cannot divide.
        """
        if not 1 <= image_size <= MAX_IMAGE_SIZE or image_size % self.size_multiple:
            raise BackendError(
                f"image_size={image_size!r:.40}: this model takes multiples of {self.size_multiple} pixels, at most "
                f"{MAX_IMAGE_SIZE}; pictures are resized to it"
            )
        return replace(self, image_size=image_size)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one picture's mask latents."""
        side = self.image_size // self.mask_vae.downsampling
        return self.mask_vae.latent_channels, side, side


def read_model_info(model_dir: str | Path) -> ModelInfo:
    """Reads a model folder's configuration.

    Args:
        model_dir: MODEL_DIR, or the name of a model that comes with the package or of the Hub.

    Raises:
        CheckpointError: a folder that is no model, that is damaged, or that holds a mask auto-encoder only.
    """
    folder = resolve_model_dir(model_dir)
    index = load_index(folder)
    missing = sorted({"unet", "mask_vae", "image_vae", "scheduler"} - set(index["components"]))
    if missing:
        raise CheckpointError(
            f"{folder}: no {', '.join(missing)} in this model folder"
            + ("; it is a mask auto-encoder: train the diffusion stage with model.mask_vae=" + str(folder))
        )
    for key in ("image_size", "num_inference_steps", "self_condition", "postprocess"):
        if index.get(key) is None:
            raise CheckpointError(f"{folder / 'model_index.json'}: no {key} in it; save the model again")
    loaded = {name: load_component_config(folder, name) for name in index["components"]}
    components = {name: config for name, (config, _) in loaded.items()}
    unet = components["unet"]
    if unet.conditioning != "none" and "conditioning" not in components:
        raise CheckpointError(
            f"{folder}: unet.conditioning={unet.conditioning} and no conditioning among its components"
        )
    check_model(folder, index, components)
    return ModelInfo(
        folder=folder,
        image_size=index["image_size"],
        num_inference_steps=index["num_inference_steps"],
        self_condition=index["self_condition"],
        image_latent_channels=components["image_vae"].latent_channels,
        picture_scale=components["image_vae"].picture_scale,
        picture_stride=components["image_vae"].stride,
        unet_levels=len(unet.block_out_channels),
        conditioning=unet.conditioning,
        mask_vae=components["mask_vae"],
        scheduler=components["scheduler"],
        postprocess=from_dict(PostprocessConfig, index["postprocess"], "postprocess."),
        categories=load_categories(folder, components["mask_vae"]),
        context_shape=_context_shape(folder, unet, loaded["conditioning"][1] if "conditioning" in loaded else {}),
        index=index,
    )


def _context_shape(folder: Path, unet: UNetConfig, extra: Mapping[str, Any]) -> tuple[int, int] | None:
    if unet.conditioning not in ("clip_image", "clip_text"):
        return None
    clip = extra.get("_clip_config") or {}
    needed = ("max_position_embeddings",) if unet.conditioning == "clip_text" else ("image_size", "patch_size")
    missing = [key for key in needed if key not in clip]
    if missing:
        path = folder / "conditioning" / "config.json"
        raise CheckpointError(f"{path}: no {', '.join(missing)} in its _clip_config; save the model again")
    if unet.conditioning == "clip_text":
        return clip["max_position_embeddings"], unet.cross_attention_dim
    return (clip["image_size"] // clip["patch_size"]) ** 2 + 1, unet.cross_attention_dim  # patches and the class token
