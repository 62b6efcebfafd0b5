"""Makes what the UNet's cross-attention sees: nothing, learned queries, CLIP's image tokens, or a caption."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmseg_fast.config import ConditioningConfig, UNetConfig
from ldmseg_fast.errors import ArgumentError, ConfigError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of RGB in [0, 1] (Radford et al. 2021)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

NOT_SAVED = (
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_name_or_path",
)  # of CLIP's configuration

ContextDenoise = Callable[[Tensor, Tensor, Tensor], Tensor]  # (unet_input, timesteps [B], context) -> model_output


class LearnedQueries(nn.Module):
    """Gives the same trained tokens for every image.

    Args:
        config: `num_queries` is M.
        width: D, of the UNet's cross-attention.
    """

    def __init__(self, config: ConditioningConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.queries = nn.Parameter(torch.randn(config.num_queries, width) * 0.02)

    def forward(self, images: Tensor, captions: Sequence[str] | None = None) -> Tensor:
        """Gives tokens float [B, M, D], an option of LDMSeg (arXiv 2401.10227).

        images: [B, 3, H, W], any dtype; they are only counted.
        """
        return self.queries.expand(len(images), -1, -1)


class ClipImageTokens(nn.Module):
    """Gives the patch tokens of a frozen CLIP vision model (Radford et al. 2021), projected to the UNet's width.

    Args:
        config: of the conditioning.
        width: D, of the UNet's cross-attention.
        encoder: transformers' CLIPVisionModel.
    """

    def __init__(self, config: ConditioningConfig, width: int, encoder: Any) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder.eval().requires_grad_(False)
        self.projection = _projection(self.encoder.config.hidden_size, width)

    def forward(self, images: Tensor, captions: Sequence[str] | None = None) -> Tensor:
        """Encodes images uint8 [B, 3, H, W] as tokens float [B, M, D]."""
        side = self.encoder.config.image_size
        pixels = F.interpolate(images.float() / 255.0, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        dtype = next(self.encoder.parameters()).dtype
        with torch.no_grad():
            tokens = self.encoder(pixel_values=((pixels - mean) / std).to(dtype)).last_hidden_state
        return self.projection(tokens)


class ClipTextTokens(nn.Module):
    """Gives the token states of a frozen CLIP text model (Radford et al. 2021); no caption counts as the empty one.

    Args:
        config: of the conditioning.
        width: D, of the UNet's cross-attention.
        encoder, tokenizer: transformers' CLIPTextModel and CLIPTokenizer.
    """

    def __init__(self, config: ConditioningConfig, width: int, encoder: Any, tokenizer: Any) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.projection = _projection(self.encoder.config.hidden_size, width)

    def forward(self, images: Tensor, captions: Sequence[str] | None = None) -> Tensor:
        """Encodes captions as tokens float [B, M, D].

        Args:
            images: [B, 3, H, W], any dtype; they are only counted.
            captions: B of them, or None.

        Raises:
            ArgumentError: their numbers differ.
        """
        captions = [""] * len(images) if captions is None else list(captions)
        if len(captions) != len(images):
            raise ArgumentError(f"captions: {len(captions)} for {len(images)} images")
        encoded = self.tokenizer(
            captions,
            padding="max_length",
            max_length=self.encoder.config.max_position_embeddings,
            truncation=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            tokens = self.encoder(input_ids=encoded["input_ids"].to(images.device)).last_hidden_state
        return self.projection(tokens)


def _projection(in_width: int, width: int) -> nn.Module:
    return nn.Identity() if in_width == width else nn.Linear(in_width, width)


def build_conditioning(
    unet: UNetConfig,
    config: ConditioningConfig,
    clip_config: dict[str, Any] | None = None,
    tokenizer_folder: Path | None = None,
) -> Any:
    """Builds the module whose forward(images, captions) gives the UNet's context; None where it has none.

    Args:
        unet: `conditioning` names the kind, `cross_attention_dim` is D.
        config: `path` holds CLIP's weights where `clip_config` is None.
        clip_config, tokenizer_folder: of a saved component, whose weights are loaded by the caller.

    Raises:
        ConfigError: no CLIP folder where one is needed, or no transformers.
    """
    if unet.conditioning == "none":
        return None
    if unet.conditioning == "learned":
        return LearnedQueries(config, unet.cross_attention_dim)
    try:
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModel
    except ImportError as error:
        raise ConfigError(
            f"unet.conditioning={unet.conditioning} needs transformers ({error}): pip install 'ldmseg_fast[train]'"
        ) from None

    is_text = unet.conditioning == "clip_text"
    model_kind: Any = CLIPTextModel if is_text else CLIPVisionModel
    if clip_config is not None:
        encoder = model_kind((CLIPTextConfig if is_text else CLIPVisionConfig)(**clip_config))
    else:
        folder = Path(config.path)
        if not config.path or not folder.is_dir():
            raise ConfigError(
                f"conditioning.path={config.path}: unet.conditioning={unet.conditioning} needs a CLIP folder as "
                f"transformers saves it, or a Stable Diffusion folder with text_encoder/ and tokenizer/"
            )
        weights = _subfolder(folder, "text_encoder" if is_text else "image_encoder")
        encoder = model_kind.from_pretrained(weights, local_files_only=True, use_safetensors=True)
        tokenizer_folder = _subfolder(folder, "tokenizer")
    if not is_text:
        return ClipImageTokens(config, unet.cross_attention_dim, encoder)
    tokenizer = CLIPTokenizer.from_pretrained(str(tokenizer_folder), local_files_only=True)
    return ClipTextTokens(config, unet.cross_attention_dim, encoder, tokenizer)


def saved_conditioning(
    module: Any,
) -> tuple[ConditioningConfig, dict[str, Tensor], dict[str, Any] | None, Callable[[Path], object] | None]:
    """Lists what a model folder keeps of a conditioning, as `save_component` takes it after the name.

    Returns:
        Settings, weights of any shape and dtype (CLIP's too), CLIP's own configuration as transformers has it, and a
        writer of further files; None for what there is not.
    """
    config = replace(module.config, path="")
    if isinstance(module, LearnedQueries):
        return config, module.state_dict(), None, None
    clip = {key: value for key, value in module.encoder.config.to_dict().items() if key not in NOT_SAVED}
    writer = None
    if isinstance(module, ClipTextTokens):

        def writer(folder: Path) -> object:
            return module.tokenizer.save_pretrained(folder / "tokenizer")

    return config, module.state_dict(), {"_clip_config": clip}, writer


def _subfolder(folder: Path, name: str) -> Path:
    return folder / name if (folder / name).is_dir() else folder


def drop_captions(captions: Sequence[str] | None, share: float, generator: torch.Generator) -> list[str] | None:
    """Empties about `share` of the captions, so that guidance has a model without one (Ho & Salimans 2022)."""
    if captions is None:
        return None
    keep = (torch.rand(len(captions), generator=generator) >= share).tolist()
    return [caption if kept else "" for caption, kept in zip(captions, keep)]


def with_context(
    denoise: ContextDenoise,
    conditioning: Any,
    images: Tensor,
    captions: Sequence[str] | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Fixes the context of `denoise`, as a sampler calls it; with guidance where there are captions.

    With captions and a guidance scale s other than 1, each call evaluates 2 B inputs and returns
    e(none) + s (e(caption) - e(none)) (Ho & Salimans 2022, equation 6 with s = 1 + w).

    Args:
        denoise: the UNet, which takes a context float [B, M, D].
        conditioning: what `build_conditioning` made.
        images: uint8 [B, 3, H, W].
        captions: B of them, or None.

    Raises:
        ArgumentError: as many captions as images are needed.
    """
    context = conditioning(images, captions)
    scale = conditioning.config.guidance_scale
    if not isinstance(conditioning, ClipTextTokens) or captions is None or scale == 1.0:
        return lambda x, timesteps: denoise(x, timesteps, context)
    both = torch.cat([conditioning(images), context])

    def guided(x: Tensor, timesteps: Tensor) -> Tensor:
        plain, captioned = denoise(torch.cat([x, x]), torch.cat([timesteps, timesteps]), both).chunk(2)
        return plain + scale * (captioned - plain)

    return guided
