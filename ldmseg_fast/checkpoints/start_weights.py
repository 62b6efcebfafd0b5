"""Loads the weights that `init_from.resolve_start` found into the networks of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ldmseg_fast.checkpoints import single_file
from ldmseg_fast.checkpoints.init_from import OTHER_FEATURES, Start
from ldmseg_fast.checkpoints.tensors import WEIGHTS, at_most, load_state, load_weights
from ldmseg_fast.checkpoints.weight_files import read_weights
from ldmseg_fast.errors import CheckpointError
from ldmseg_fast.files import inside
from ldmseg_fast.models.efficientnet_lite import efficientnet_lite_names
from ldmseg_fast.models.image_vae import TaesdEncoder, build_image_encoder, modern_attention_names
from ldmseg_fast.models.pyramids import PYRAMIDS, as_patches
from ldmseg_fast.models.unet import UNet, input_parts

# what reads or writes mask latents, where `conv_in` is not one convolution over everything
LATENT_CONVOLUTIONS = ("conv_out.", "conv_in.parts.0.", "conv_in.parts.2.")


@torch.no_grad()
def load_unet(unet: UNet, start: Start) -> None:
    """Loads the weights of `start.unet` into `unet`; without `start.unet` it keeps its own.

    Cross-attention is dropped or kept as `unet` has it, and the input is widened. The parts of `conv_in` are
    initialised as `model.init_noisy`, `init_image` and `init_condition` say, where the folder's model has no such part;
    its bias is copied. What reads or writes mask latents keeps its own weights under `few_step.new_autoencoder`. Parts
    that the folder's model does not have at all (cross-attention, a separate image encoder) keep their own
    initialisation, or take a copy of the down path. A `unet` on the meta device is checked alone: no weight is read.

    Raises:
        CheckpointError: weights that are missing, damaged, or do not fit.
    """
    if start.unet is None:
        return
    state = _unet_state(start)
    if next(unet.parameters()).is_meta:  # a rehearsal: names, shapes and types say what does not fit
        state = {key: value.to("meta") for key, value in state.items()}
    own = unet.state_dict()
    if not unet.config.cross_attention_dim:
        state = {key: value for key, value in state.items() if not is_cross_attention(key)}
    elif not any(map(is_cross_attention, state)):
        state |= {key: value for key, value in own.items() if is_cross_attention(key)}
    latents = unet.config.out_channels
    if start.config.few_step.new_autoencoder and "conv_out.weight" in state:
        latents = state["conv_out.weight"].shape[0]
        state |= {key: value for key, value in own.items() if key.startswith(LATENT_CONVOLUTIONS)}
    if "conv_in.weight" in state and "conv_in.bias" in state:
        state |= _input_convolutions(state.pop("conv_in.weight"), state.pop("conv_in.bias"), latents, unet, start)
    if unet.config.separate_image_encoder:
        copies = {f"image_{key}": value for key, value in state.items() if key.startswith("down_blocks.")}
        projections = {key: value for key, value in own.items() if key.startswith("image_projections.")}
        state = copies | projections | state
    load_state(unet, state, str(start.unet))


def is_cross_attention(key: str) -> bool:
    """Tells whether a tensor belongs to attention over the context and not over the picture."""
    return ".attn2." in key or ("transformer_blocks." in key and ".norm2." in key)


def _input_convolutions(weight: Tensor, bias: Tensor, latents: int, unet: UNet, start: Start) -> dict[str, Tensor]:
    """`unet`'s input convolutions from the folder's weight [O, I, 3, 3] for `latents` mask latents, and bias [O]."""
    model = start.config.model
    parts = input_parts(replace(unet.config, image_channels=start.config.image_encoder.latent_channels))
    noisy, image = parts[:2]
    kept: list[Tensor] = []
    known = [latents + image, 2 * latents + image] if start.ours else [noisy]
    if weight.ndim != 4 or weight.shape[1] not in known:
        raise CheckpointError(
            f"{start.unet}: conv_in.weight is {list(weight.shape)}, and in_channels={' or '.join(map(str, known))} "
            f"(the second number) is expected"
        )
    base = weight[:, :noisy]
    if start.ours:  # it has these parts itself
        kept = list(weight.split([latents, image] + ([latents] if weight.shape[1] > latents + image else []), dim=1))
    shapes = [(weight.shape[0], part, *weight.shape[2:]) for part in parts]
    fresh = [nn.init.kaiming_uniform_(weight.new_empty(shape), a=5**0.5) for shape in shapes]
    if start.config.few_step.new_autoencoder:
        kept = [fresh[0], kept[1], *fresh[2:]]
    modes = (model.init_noisy, model.init_image, model.init_condition)
    made = [
        kept[index] if index < len(kept) else initial(base, modes[index], fresh[index]) for index in range(len(parts))
    ]
    made_state: dict[str, Tensor] = {}
    if unet.config.separate_image_encoder:
        made_state |= {"image_conv_in.weight": initial(base, "copy", fresh[1]), "image_conv_in.bias": bias}
    if not unet.config.separate_conv_in:
        return made_state | {"conv_in.weight": torch.cat(made, dim=1), "conv_in.bias": bias}
    for index, part in enumerate(made):
        made_state[f"conv_in.parts.{index}.weight"] = part
        made_state[f"conv_in.parts.{index}.bias"] = bias if index == 0 else torch.zeros_like(bias)
    return made_state


def initial(base: Tensor, mode: str, fresh: Tensor) -> Tensor:
    """Makes weights like `fresh`, float [O, I, 3, 3], from the pre-trained `base`, float [O, J, 3, 3].

    `fresh` is of a new input part. "copy" repeats base's input channels, "half" is half of that, "mean" gives every
    channel base's mean over its input channels, "zero" is zero, and "random" is `fresh` itself.
    """
    count = fresh.shape[1]
    if mode == "random":
        return fresh.clone()
    if mode == "zero":
        return torch.zeros_like(fresh)
    if mode == "mean":
        return base.mean(dim=1, keepdim=True).expand_as(fresh).clone()
    repeated = base[:, torch.arange(count) % base.shape[1]]
    return 0.5 * repeated if mode == "half" else repeated


def load_image_encoder(encoder: nn.Module, start: Start) -> None:
    """Loads the weights of `start.image_vae` into `encoder`, or those of `start.features` into its network.

    Without either it keeps its own.

    Raises:
        CheckpointError: weights that are missing, damaged, or do not fit.
    """
    if start.features is not None:
        with _naming_the_features(start):
            load_state(encoder.get_submodule("network"), _features(start.features), str(start.features))
    if start.image_vae is not None:
        load_state(encoder, _image_vae_state(start, isinstance(encoder, TaesdEncoder)), str(start.image_vae))


def check_start(start: Start) -> None:
    """Checks that the weights have the sizes that their configurations say, before networks get memory of that size.

    Raises:
        CheckpointError: weights that are missing, damaged, or of other sizes.
    """
    config = start.config
    if start.unet is not None:
        _check_sizes(lambda: UNet(config.unet), _unet_state(start), start.unet, config.few_step.new_autoencoder)
    if start.image_vae is not None:
        encoder = config.image_encoder
        _check_sizes(
            lambda: build_image_encoder(encoder, start.vae_config),
            _image_vae_state(start, encoder.kind == "taesd"),
            start.image_vae,
        )
    if start.features is not None:
        pyramid = PYRAMIDS[config.image_encoder.kind]
        with _naming_the_features(start):
            _check_sizes(lambda: pyramid(config.image_encoder), _features(start.features), start.features)


def _check_sizes(
    build: Callable[[], nn.Module], state: dict[str, Tensor], source: Path, new_latents: bool = False
) -> None:
    with torch.device("meta"), at_most(state, str(source)):
        own = build().state_dict()
    # what a run adds of its own has no tensor there: cross-attention, another encoder, other input convolutions
    exchanged = ("conv_in.", "image_", "conv_out.") if new_latents else ("conv_in.", "image_")
    common = [name for name in own if name in state and not name.startswith(exchanged)]
    wrong = [name for name in common if own[name].shape != state[name].shape and not is_cross_attention(name)]
    if wrong or not common:
        shapes = [f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}" for name in wrong[:2]]
        what = f"{len(wrong)} of another shape: {', '.join(shapes)}" if wrong else "none of its tensors is there"
        raise CheckpointError(f"{source}: weights of another architecture; {what}")


def _unet_state(start: Start) -> dict[str, Tensor]:
    """The UNet's tensors as they lie in the folder; they are read when they are used."""
    assert start.unet is not None
    if start.unet.is_file():
        return single_file.unet_state(start.unet)
    return load_weights(inside(start.unet.parent, start.unet / WEIGHTS)) if start.ours else read_weights(start.unet)


def _image_vae_state(start: Start, taesd: bool) -> dict[str, Tensor]:
    """The image encoder's tensors under our names."""
    assert start.image_vae is not None
    if start.ours:
        state = load_weights(inside(start.image_vae.parent, start.image_vae / WEIGHTS))
        encoder = start.config.image_encoder
        return as_patches(state, encoder) if encoder.fine_features != "mean" else state
    if taesd:
        return {f"layers.{key}": value for key, value in load_weights(start.image_vae).items()}
    if start.image_vae.is_file():
        return single_file.vae_state(start.image_vae)
    state = modern_attention_names(read_weights(start.image_vae))
    return {key: value for key, value in state.items() if not key.startswith(("decoder.", "post_quant_conv."))}


@contextmanager
def _naming_the_features(start: Start) -> Iterator[None]:
    """Names the settings, and the cure, where a pyramid's weights do not fit inside."""
    encoder = start.config.image_encoder
    try:
        yield
    except CheckpointError as error:
        if not encoder.path:
            raise
        raise CheckpointError(
            f"image_encoder.kind={encoder.kind}, image_encoder.variant={encoder.variant}, image_encoder.path={error}; "
            f"{OTHER_FEATURES}"
        ) from None


def _features(path: Path) -> dict[str, Tensor]:
    """The tensors of a pyramid's network under our names."""
    return efficientnet_lite_names(load_weights(path))
