"""Where torch.compile is applied. Modules are compiled in place, so parameter names stay what they are."""

from __future__ import annotations

from torch import nn

from ldmseg_fast.models.layers import ResnetBlock, SpatialTransformer

BLOCKS = (ResnetBlock, SpatialTransformer)


def compile_stage(stage: nn.Module, mode: str, backend: str) -> None:
    """`mode` "blocks": the repeated blocks, each kind compiled once per shape, in seconds; "model": whole networks, in
    minutes and a little faster; "none".

    The random draws and the loss's bookkeeping around the networks stay as they are.
    """
    if mode == "none":
        return
    for module in _blocks(stage) if mode == "blocks" else _networks(stage):
        module.compile(backend=backend)


def _blocks(stage: nn.Module) -> list[nn.Module]:
    return [module for module in stage.modules() if isinstance(module, BLOCKS)]


def _networks(stage: nn.Module) -> list[nn.Module]:
    """The UNet and the image encoder; of the mask auto-encoder, whose methods are called, its two halves."""
    networks = [getattr(stage, name) for name in ("unet", "image_vae") if hasattr(stage, name)]
    mask_vae = getattr(stage, "mask_vae", None)
    return networks + ([mask_vae.encoder, mask_vae.decoder] if mask_vae is not None else [])
