"""Applies torch.compile. Modules are compiled in place, so parameter names stay what they are."""

from __future__ import annotations

from torch import nn

from ldmseg_fast.errors import ConfigError
from ldmseg_fast.models.layers import ResnetBlock, SpatialTransformer

BLOCKS = (ResnetBlock, SpatialTransformer)
VARIANTS = 128  # dynamo's default, 8, would leave most blocks uncompiled without a word


def compile_stage(stage: nn.Module, mode: str, backend: str) -> None:
    """Compiles a stage's networks.

    The random draws and the loss's bookkeeping around the networks stay as they are.

    Args:
        stage: its networks are changed in place.
        mode: "blocks" compiles the repeated blocks, each kind once per shape, in seconds; "model" compiles whole
            networks,
            in minutes, and they run a little faster; "none" does nothing.
        backend: of torch.compile.

    Raises:
        ConfigError: as `check_backend`.
    """
    if mode == "none":
        return
    check_backend(backend)
    from torch._dynamo import config as dynamo  # an import of seconds, which a dry run does not need

    # every width and resolution is a variant of the same few functions, and shapes do not change during a run
    dynamo.recompile_limit = max(dynamo.recompile_limit, VARIANTS)
    for module in _blocks(stage) if mode == "blocks" else _networks(stage):
        module.compile(backend=backend, dynamic=False)


def check_backend(backend: str) -> None:
    """Checks that torch.compile knows a backend.

    Raises:
        ConfigError: it does not.
    """
    if backend == "inductor":  # no import of seconds for the default
        return
    from torch._dynamo import list_backends

    known = list_backends(exclude_tags=())
    if backend not in known:
        raise ConfigError(f"train.compile_backend={backend}: one of {', '.join(known)} expected")


def _blocks(stage: nn.Module) -> list[nn.Module]:
    return [module for module in stage.modules() if isinstance(module, BLOCKS)]


def _networks(stage: nn.Module) -> list[nn.Module]:
    """The UNet and the image encoder; of the mask auto-encoder, whose methods are called, its two halves."""
    networks = [getattr(stage, name) for name in ("unet", "image_vae") if hasattr(stage, name)]
    mask_vae = getattr(stage, "mask_vae", None)
    return networks + ([mask_vae.encoder, mask_vae.decoder] if mask_vae is not None else [])
