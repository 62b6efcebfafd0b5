"""Gives the components of a model folder as objects of diffusers' own classes, with the folder's weights.

    unet = diffusers_component("runs/diffusion", "unet")
    latents = unet(sample, timestep, encoder_hidden_states=None).sample

`scheduler/` needs nothing of this: `DDIMScheduler.from_pretrained(MODEL_DIR, subfolder="scheduler")` reads it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ldmseg_fast.checkpoints.diffusers_folder import diffusers_scheduler, diffusers_unet
from ldmseg_fast.checkpoints.model_folder import load_component, load_component_config, load_index
from ldmseg_fast.checkpoints.shipped import resolve_model_dir
from ldmseg_fast.errors import ArgumentError, CheckpointError

PARTS = ("unet", "image_vae", "scheduler")


def diffusers_component(model_dir: str | Path, name: str) -> Any:
    """Loads a component of a model folder into diffusers' class of its kind, in evaluation mode and frozen.

    `unet` is a `UNet2DConditionModel`; without cross-attention its blocks lose `attn2` and `norm2`, and its
    `encoder_hidden_states` is None. `image_vae` is an `AutoencoderKL` or `AutoencoderTiny` that encodes and has no
    decoder, `scheduler` a `DDIMScheduler`.

    Args:
        model_dir: a model folder, or the name of one.
        name: of PARTS.

    Raises:
        ArgumentError: diffusers is not installed; a component that it has no class for.
        CheckpointError: missing or damaged files; a network that diffusers does not have.
    """
    try:
        import diffusers
    except ImportError as error:
        raise ArgumentError(f"diffusers is not installed ({error}): pip install diffusers") from None
    if name not in PARTS:
        raise ArgumentError(f"{name}: diffusers has no class for it; there are {', '.join(PARTS)}")
    folder = resolve_model_dir(model_dir)
    if name not in load_index(folder)["components"]:
        raise CheckpointError(f"{folder}: a model folder without {name}")
    config, _ = load_component_config(folder, name)
    if name == "scheduler":
        return diffusers.DDIMScheduler.from_config(diffusers_scheduler(config))
    source = str(folder / name)
    if name == "unet":
        values = diffusers_unet(config, source)
        theirs: Any = diffusers.UNet2DConditionModel.from_config(values)
        if not config.cross_attention_dim:
            _drop_cross_attention(theirs)
        theirs.load_state_dict(load_component(folder, name).state_dict())
        return theirs.eval().requires_grad_(False)
    if config.kind not in ("autoencoder_kl", "taesd"):
        raise CheckpointError(
            f"{source}: image_encoder.kind={config.kind} is no network of diffusers; it has autoencoder_kl and taesd"
        )
    ours = load_component(folder, name)
    state = ours.state_dict()
    if config.kind == "taesd":
        theirs = diffusers.AutoencoderTiny(latent_channels=config.latent_channels, scaling_factor=config.scaling_factor)
        state = {f"encoder.{key}": value for key, value in state.items()}
    else:
        theirs = diffusers.AutoencoderKL.from_config(ours.vae_config | {"scaling_factor": config.scaling_factor})
        theirs.post_quant_conv = None
    theirs.decoder = NoDecoder(source)
    theirs.load_state_dict(state)
    return theirs.eval().requires_grad_(False)


class NoDecoder(nn.Module):
    """Stands where an image VAE of diffusers has its decoder; a model folder keeps the encoder alone."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source

    def forward(self, *_: Any, **__: Any) -> Any:
        """Raises ArgumentError: nothing decodes."""
        raise ArgumentError(f"{self.source}: the encoder alone; decode with the image VAE that it was trained with")


def _drop_cross_attention(unet: nn.Module) -> None:
    """Takes attention over a context out of the blocks, which diffusers' class cannot be built without."""
    from diffusers.models.attention import BasicTransformerBlock

    blocks: Any = [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]
    for block in blocks:
        block.attn2 = block.norm2 = None
