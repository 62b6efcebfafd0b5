"""Runs a model's networks in PyTorch, eager or compiled."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldmseg_fast.backends.backend import DdimBackend
from ldmseg_fast.backends.finite import all_finite, require_finite
from ldmseg_fast.backends.graphs.lanes import Lane, LanePool
from ldmseg_fast.backends.graphs.loop import UNetSteps, use_cuda_graph
from ldmseg_fast.backends.model_info import ModelInfo
from ldmseg_fast.backends.packed_weights import can_pack, compile_frozen, pack_weights
from ldmseg_fast.checkpoints.model_folder import load_component
from ldmseg_fast.checkpoints.tensors import check_finite
from ldmseg_fast.config import PostprocessConfig
from ldmseg_fast.config.precision import warn_if_emulated
from ldmseg_fast.models.attention import check_backend
from ldmseg_fast.models.pyramids import fold_norms
from ldmseg_fast.models.unet import FeatureCache
from ldmseg_fast.panoptic.postprocess import PanopticResult, postprocess, resize_logits


class TorchBackend(DdimBackend):
    """Runs the model folder's networks in PyTorch; a `Backend`.

    Args:
        info: from `read_model_info`.
        device: default the first GPU, or the CPU.
        dtype: default bfloat16 on a GPU and float32 on a CPU. One that the device emulates is slower than float32 and
            gives a warning that says how much.
        compile_networks: `torch.compile` for the denoiser and the encoder; the first call takes a minute or more.
        attention: of the UNet, see `models.attention.attention`.
        cuda_graph: run the sampling loop as one CUDA graph per batch size and number of steps; None: on a GPU. A loop
            that cannot be captured runs without, with a warning.

    Raises:
        ArgumentError: an unknown `attention`.
        BackendError: an `attention` that cannot run on the device, or a CUDA graph on another device than a GPU.
        CheckpointError: a damaged model folder.
    """

    def __init__(
        self,
        info: ModelInfo,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        compile_networks: bool = False,
        attention: str = "auto",
        cuda_graph: bool | None = None,
    ) -> None:
        self.info = info
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        warn_if_emulated(self.device, self.dtype)
        check_backend(attention, self.device, self.dtype)
        self.cuda_graph = use_cuda_graph(cuda_graph, self.device)
        self.unet = self._load("unet", attention)
        self.cache_branches: int = self.unet.num_skips
        self.mask_vae = self._load("mask_vae")
        self.image_vae = self._load("image_vae")
        self.conditioning = None if info.conditioning == "none" else self._load("conditioning")
        self.unet.fuse_qkv()
        self.unet.fuse_time()
        self._denoise, self._encode = self.unet, self.image_vae
        self._compiles = compile_networks
        if compile_networks:
            compiler: Any = compile_frozen if self.device.type == "cpu" else torch.compile
            self._denoise, self._encode = compiler(self.unet), compiler(self.image_vae)
        if can_pack(self.device, self.dtype):
            for network in (self.mask_vae,) if compile_networks else (self.unet, self.image_vae, self.mask_vae):
                pack_weights(network)
        self._lanes = LanePool(self._make_lane, 1)

    def _make_lane(self) -> Lane:
        denoise = torch.compile(self.unet.denoise) if self._compiles else self.unet.denoise
        make_steps = partial(UNetSteps, self.unet, denoise)
        return Lane({}, torch.cuda.Stream(self.device), capture=True, make_steps=make_steps)

    def _load(self, name: str, attention: str = "auto") -> Any:
        module = load_component(self.info.folder, name, attention)
        if self.dtype == torch.float16:
            check_finite(module.state_dict(), str(self.info.folder / name), self.dtype)
        module = fold_norms(module)
        return module.to(device=self.device, dtype=self.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.inference_mode()
    def encode_image(self, images: Tensor) -> Tensor:
        """See `Backend.encode_image`."""
        images = images.to(self.device).contiguous(memory_format=torch.channels_last)
        return self._encode(images).to(self.dtype)

    @torch.inference_mode()
    def denoise(self, unet_input: Tensor, timesteps: Tensor, context: Tensor | None = None) -> Tensor:
        """See `Backend.denoise`."""
        return self._denoise(unet_input.to(self.dtype), timesteps, context)

    def caching(self, interval: int, branch: int) -> Callable[..., Tensor]:
        """See `Backend.caching`. It is eager where the backend compiles."""
        cache, calls = FeatureCache(branch), itertools.count()

        @torch.inference_mode()
        def denoise(unet_input: Tensor, timesteps: Tensor, context: Tensor | None = None) -> Tensor:
            if next(calls) % interval == 0:
                cache.features = None
            return self.unet(unet_input.to(self.dtype), timesteps, context, cache)

        return denoise

    def _own_loop(self, noise: Tensor, image_latents: Tensor, num_inference_steps: int) -> Tensor | None:
        if not self.cuda_graph or self.conditioning is not None:
            return None
        with self._lanes.lane() as lane:
            return lane.sample(self.info, noise, image_latents, num_inference_steps)

    @torch.inference_mode()
    def decode_mask(
        self,
        latents: Tensor,
        size: tuple[int, int],
        output: str = "panoptic",
        thresholds: PostprocessConfig | None = None,
        *,
        fuse: bool = True,
    ) -> list[PanopticResult] | Tensor:
        """See `Backend.decode_mask`."""
        # [B, Q, h 2^u, w 2^u], and [B, categories + 1, h 2^u, w 2^u] or None
        logits, categories = self.mask_vae.decode_latents_both(latents.to(self.device, self.dtype))
        finite = (
            all_finite(logits) if categories is None else all_finite(logits) & all_finite(categories)
        )  # read below, after what waits for the device anyway
        network_size = (self.info.image_size, self.info.image_size)
        results: list[PanopticResult] | Tensor
        if output == "logits":
            results = resize_logits(logits, network_size, size)
        else:
            logits = logits.float() if self.device.type == "cpu" else logits
            thresholds = thresholds or self.info.postprocess
            sizes = [size] * len(latents)
            table = self.info.categories
            results = postprocess(logits, network_size, sizes, thresholds, categories, table, fuse=fuse)
        require_finite(
            finite,
            "mask_vae: slot logits" if categories is None else "mask_vae: slot or category logits",
            self.info,
            self.dtype,
        )
        return results

    def close(self) -> None:
        """See `Backend.close`."""
        self._lanes.close()
