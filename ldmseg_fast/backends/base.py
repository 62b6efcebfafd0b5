"""The face of a backend, and how one is found by name."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ldmseg_fast.checkpoints.model_folder import load_component_config, load_index
from ldmseg_fast.checkpoints.shipped import resolve_model_dir
from ldmseg_fast.config import MaskVAEConfig, PostprocessConfig, SchedulerConfig, UNetConfig, from_dict
from ldmseg_fast.diffusion.sampler import Callback
from ldmseg_fast.diffusion.scheduler import Scheduler
from ldmseg_fast.errors import BackendError, CheckpointError, ConfigError
from ldmseg_fast.panoptic.postprocess import PanopticResult

BACKENDS = ("torch", "compile", "onnxruntime", "tensorrt")


@dataclass(frozen=True)
class ModelInfo:
    """What a pipeline needs to know of a model folder, apart from the weights."""

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
    context_shape: tuple[int, int] | None = None  # [M, D] of the tokens that each picture or caption brings
    index: dict[str, Any] = field(repr=False, default_factory=dict)

    @property
    def size_multiple(self) -> int:
        """Pictures' sides must be multiples of this, for both auto-encoders and every level of the UNet."""
        return self.mask_vae.downsampling * 2 ** (self.unet_levels - 1)

    def at_size(self, image_size: int) -> ModelInfo:
        """The same model for pictures of another size. Raises BackendError where its networks cannot divide it."""
        if image_size < 1 or image_size % self.size_multiple:
            raise BackendError(
                f"image_size={image_size}: this model takes multiples of {self.size_multiple} pixels; pictures are "
                f"resized to it"
            )
        return replace(self, image_size=image_size)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.image_size // self.mask_vae.downsampling
        return self.mask_vae.latent_channels, side, side


def read_model_info(model_dir: str | Path) -> ModelInfo:
    """Raises CheckpointError where the folder is no model, or holds a mask auto-encoder only."""
    folder = resolve_model_dir(model_dir)
    index = load_index(folder)
    missing = sorted({"unet", "mask_vae", "image_vae", "scheduler"} - set(index.get("components", [])))
    if missing:
        raise CheckpointError(
            f"{folder}: no {', '.join(missing)} in this model folder"
            + ("; it is a mask auto-encoder: train the diffusion stage with model.mask_vae=" + str(folder))
        )
    try:
        postprocess = from_dict(PostprocessConfig, index.get("postprocess", {}), "postprocess.")
        unet = load_component_config(folder, "unet")[0]
        return ModelInfo(
            folder=folder,
            image_size=int(index["image_size"]),
            num_inference_steps=int(index["num_inference_steps"]),
            self_condition=bool(index["self_condition"]),
            image_latent_channels=load_component_config(folder, "image_vae")[0].latent_channels,
            unet_levels=len(unet.block_out_channels),
            conditioning=unet.conditioning,
            mask_vae=load_component_config(folder, "mask_vae")[0],
            scheduler=load_component_config(folder, "scheduler")[0],
            postprocess=postprocess,
            context_shape=_context_shape(folder, unet),
            index=index,
        )
    except (KeyError, ConfigError) as error:
        raise CheckpointError(f"{folder / 'model_index.json'}: {error} is missing or wrong") from None


def _context_shape(folder: Path, unet: UNetConfig) -> tuple[int, int] | None:
    if unet.conditioning not in ("clip_image", "clip_text"):
        return None
    clip = load_component_config(folder, "conditioning")[1]["_clip_config"]
    if unet.conditioning == "clip_text":
        return clip["max_position_embeddings"], unet.cross_attention_dim
    return (clip["image_size"] // clip["patch_size"]) ** 2 + 1, unet.cross_attention_dim  # patches and the class token


class Backend(Protocol):
    """Runs the three networks of a model; `sample` is the loop over `denoise`.

    Attributes:
        info: the model's configuration.
        device: where tensors are expected and returned.
        dtype: of image latents and of the UNet's input.
        conditioning: what makes the context that `denoise` takes, see `models.conditioning`; None where it takes none.
    """

    info: ModelInfo
    device: torch.device
    dtype: torch.dtype
    conditioning: Any

    def encode_image(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> image latents [B, C_image, h, w]."""
        ...

    def denoise(self, unet_input: Tensor, timesteps: Tensor, context: Tensor | None = None) -> Tensor:
        """Network input [B, C_in, h, w], timesteps [B] (, context [B, M, D]) -> model output [B, C, h, w]."""
        ...

    def sample(
        self,
        noise: Tensor,
        image_latents: Tensor,
        scheduler: Scheduler,
        num_inference_steps: int,
        callback: Callback | None = None,
    ) -> Tensor:
        """`diffusion.sampler.ddim` over `denoise`, in this backend's fastest form: noise [B, C, h, w] -> x_0."""
        ...

    def decode_mask(
        self,
        latents: Tensor,
        size: tuple[int, int],
        output: str = "panoptic",
        thresholds: PostprocessConfig | None = None,
    ) -> list[PanopticResult] | Tensor:
        """Scaled mask latents [B, C, h, w] -> panoptic maps at `size` (H, W), or with output="logits" the slot logits
        [B, Q, H, W], both bilinear resizings done."""
        ...


def load_backend(
    model_dir: str | Path,
    name: str = "torch",
    engine_dir: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    image_size: int | None = None,
) -> Backend:
    """The backend called `name` for a model folder.

    Args:
        model_dir, name: which model, and one of BACKENDS.
        engine_dir: exported graphs or engines, for the last two.
        device, dtype: default the first GPU in bfloat16, or the CPU in float32; graphs have a dtype of their own.
        image_size: side in pixels of what the networks see; default the model's own. Graphs must have been exported
            for it, or for any size.

    Raises:
        BackendError: an unknown name, a missing package, an `engine_dir` that is missing or not meant for it, or a
            size that the model or its graphs do not take.
        CheckpointError: a folder that is no model.
    """
    if name not in BACKENDS:
        raise BackendError(f"backend={name!r}: one of {', '.join(BACKENDS)} expected")
    info = read_model_info(model_dir)
    if name in ("torch", "compile"):
        if engine_dir is not None:
            raise BackendError(f"engine_dir={engine_dir}: backend={name} runs MODEL_DIR itself; leave engine_dir out")
        from ldmseg_fast.backends.torch_backend import TorchBackend

        info = info if image_size is None else info.at_size(image_size)
        return TorchBackend(info, device, dtype, compile_networks=name == "compile")
    if engine_dir is None:
        script = "to_onnx.py" if name == "onnxruntime" else "to_trt.py"
        raise BackendError(
            f"backend={name} needs engine_dir; make it with `python export/{script} {model_dir} --out DIR`"
        )
    if dtype is not None:
        raise BackendError(f"dtype={dtype}: fixed when the graphs were exported; export again with --precision")
    if name == "onnxruntime":
        from ldmseg_fast.backends.onnx_backend import load_onnx_backend

        return load_onnx_backend(info, engine_dir, device, image_size=image_size)
    from ldmseg_fast.backends.trt_backend import load_trt_backend

    return load_trt_backend(info, engine_dir, device, image_size=image_size)
