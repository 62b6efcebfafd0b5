"""The face of a backend, and how one is found by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ldmseg_fast.checkpoint import CheckpointError, load_component_config, load_index
from ldmseg_fast.config import ConfigError, MaskVAEConfig, PostprocessConfig, SchedulerConfig, from_dict
from ldmseg_fast.diffusion.sampler import Callback
from ldmseg_fast.diffusion.scheduler import Scheduler
from ldmseg_fast.panoptic import PanopticResult

BACKENDS = ("torch", "compile", "onnxruntime", "tensorrt")


class BackendError(RuntimeError):
    """A backend that cannot run here; the message says why and what to do."""


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
    index: dict[str, Any] = field(repr=False, default_factory=dict)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.image_size // self.mask_vae.downsampling
        return self.mask_vae.latent_channels, side, side


def read_model_info(model_dir: str | Path) -> ModelInfo:
    """Raises CheckpointError where the folder is no model, or holds a mask auto-encoder only."""
    folder = Path(model_dir)
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
            index=index,
        )
    except (KeyError, ConfigError) as error:
        raise CheckpointError(f"{folder / 'model_index.json'}: {error} is missing or wrong") from None


class Backend(Protocol):
    """Runs the three networks of a model; `sample` is the loop over `denoise`.

    Attributes:
        info: the model's configuration.
        device: where tensors are expected and returned.
        dtype: of image latents and of the UNet's input.
    """

    info: ModelInfo
    device: torch.device
    dtype: torch.dtype

    def encode_image(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> image latents [B, C_image, h, w]."""
        ...

    def denoise(self, unet_input: Tensor, timesteps: Tensor) -> Tensor:
        """Network input [B, C_in, h, w] and timesteps [B] -> model output [B, C, h, w]."""
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
) -> Backend:
    """The backend called `name` for a model folder.

    Raises:
        BackendError: an unknown name, a missing package, or an `engine_dir` that is missing or not meant for it.
        CheckpointError: a folder that is no model.
    """
    if name not in BACKENDS:
        raise BackendError(f"backend={name!r}: one of {', '.join(BACKENDS)} expected")
    info = read_model_info(model_dir)
    if name in ("torch", "compile"):
        if engine_dir is not None:
            raise BackendError(f"engine_dir={engine_dir}: backend={name} runs MODEL_DIR itself; leave engine_dir out")
        from ldmseg_fast.backends.torch_backend import TorchBackend

        return TorchBackend(info, device, dtype, compile_networks=name == "compile")
    if engine_dir is None:
        script = "to_onnx.py" if name == "onnxruntime" else "to_trt.py"
        raise BackendError(
            f"backend={name} needs engine_dir; make it with `python export/{script} {model_dir} --out DIR`"
        )
    if info.conditioning != "none":
        raise BackendError(
            f"{model_dir}: unet.conditioning={info.conditioning}; graphs take no context, use backend=torch"
        )
    if dtype is not None:
        raise BackendError(f"dtype={dtype}: fixed when the graphs were exported; export again with --precision")
    if name == "onnxruntime":
        from ldmseg_fast.backends.onnx_backend import load_onnx_backend

        return load_onnx_backend(info, engine_dir, device)
    from ldmseg_fast.backends.trt_backend import load_trt_backend

    return load_trt_backend(info, engine_dir, device)
