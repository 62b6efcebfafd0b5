"""Runs a model's networks in PyTorch, eager or compiled."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldmseg_fast.backends.backend import DdimBackend
from ldmseg_fast.backends.compiled import compile_network
from ldmseg_fast.backends.finite import all_finite, require_finite, require_sampled
from ldmseg_fast.backends.graphs.lanes import Lane, LanePool
from ldmseg_fast.backends.graphs.loop import UNetSteps, use_cuda_graph
from ldmseg_fast.backends.graphs.whole import WholePicture
from ldmseg_fast.backends.model_info import ModelInfo
from ldmseg_fast.backends.packed_weights import can_pack, pack_weights
from ldmseg_fast.backends.precision import choose_attention, choose_precision
from ldmseg_fast.backends.process_settings import gpu_settings
from ldmseg_fast.checkpoints.model_folder import load_component
from ldmseg_fast.checkpoints.tensors import check_finite
from ldmseg_fast.config import PostprocessConfig
from ldmseg_fast.config.precision import warn_if_emulated
from ldmseg_fast.kernels.backend import turn_off_on_old_gpus
from ldmseg_fast.models.epilogue_unet import EpilogueUNet
from ldmseg_fast.models.fp8_layers import use_fp8
from ldmseg_fast.models.fused_unet import FusedUNet, why_not_fused
from ldmseg_fast.models.pyramids import fold_norms
from ldmseg_fast.models.unet import FeatureCache, UNet
from ldmseg_fast.panoptic.postprocess import PanopticResult, postprocess, read_maps, resize_logits, with_categories

WHOLE_STEPS = 4  # more steps take so long that a graph of their own does as well
CAPTURED_BATCH = 4  # pictures; encoder and decoder of more are busy, and their graphs would keep gigabytes

_DECODED = ("mask_vae: slot logits", "mask_vae: slot or category logits")  # without and with categories


class TorchBackend(DdimBackend):
    """Runs the model folder's networks in PyTorch; a `Backend`.

    Args:
        info: from `read_model_info`.
        device: default the first GPU, or the CPU.
        dtype: default bfloat16 on a GPU and float32 on a CPU. One that the device emulates is slower than float32 and
            gives a warning that says how much.
        compile_networks: `torch.compile` for the denoiser and the encoder, see `compiled.compile_network`; the first
            call with a batch or size takes a minute or more, and says on stderr how long it took.
        attention: of the UNet, see `models.attention.attention`; "fp8" where the device has no such products is "auto",
            with a warning.
        cuda_graph: run the sampling loop as one CUDA graph per batch size and number of steps, and encoder and decoder
            of a few pictures as one each; few steps of pictures of one size, from pixels to maps, become one graph
            when the size is repeated. None: on a GPU. What cannot be captured runs without, with a warning.
        fused: run the UNet with few launches, see `models.fused_unet`, or for "epilogues" `models.epilogue_unet`. A
            network that is compiled, or has what the fused one has not, runs as it is, with a warning.
        precision: in the place of `dtype`, one of `backends.precision.PRECISIONS`.

    Raises:
        ArgumentError: an unknown `attention` or `precision`, or both `precision` and `dtype`.
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
        fused: bool | str = False,
        precision: str | None = None,
    ) -> None:
        self.info = info
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype, fp8, self.tf32 = choose_precision(precision, dtype, self.device)
        warn_if_emulated(self.device, self.dtype)
        turn_off_on_old_gpus(self.device)
        attention = choose_attention(attention, self.device, self.dtype)
        self.cuda_graph = use_cuda_graph(cuda_graph, self.device)
        self.unet = self._load("unet", attention)
        self.cache_branches: int = self.unet.num_skips
        self.mask_vae = self._load("mask_vae")
        self.image_vae = self._load("image_vae")
        self.conditioning = None if info.conditioning == "none" else self._load("conditioning")
        self.unet.fuse_qkv()
        self.unet.fuse_time()
        if fp8:
            use_fp8(self.unet)
        self._network: UNet | FusedUNet = self._fuse(fused, compile_networks, fp8) if fused else self.unet
        self._denoise: Callable[..., Tensor] = self._network
        self._encode: Callable[..., Tensor] = self.image_vae
        self._compiles = compile_networks
        if compile_networks:
            self._denoise = compile_network(self.unet, "unet", self.device)
            self._encode = compile_network(self.image_vae, "image_vae", self.device)
        if can_pack(self.device, self.dtype):
            for network in (self.mask_vae,) if compile_networks else (self.unet, self.image_vae, self.mask_vae):
                pack_weights(network)
        self._lanes = LanePool(self._make_lane, 1)

    def _fuse(self, fused: bool | str, compiles: bool, fp8: bool) -> UNet | FusedUNet:
        reason = "backend=compile makes its own kernels" if compiles else why_not_fused(self.unet.config)
        reason = "precision=fp8 has layers of its own" if fp8 else reason
        if reason:
            warnings.warn(f"fused: {reason}; the plain network runs instead, with the same results", stacklevel=4)
            return self.unet
        if self.device.type == "cpu":
            text = "fused: device=cpu has no launches to spare; its plain form runs, with the same results, no faster"
            warnings.warn(text, stacklevel=4)
        return EpilogueUNet(self.unet) if fused == "epilogues" else FusedUNet(self.unet)

    def _make_lane(self) -> Lane:
        denoise: Any = self._network.denoise
        if self._compiles:
            denoise = compile_network(denoise, "unet", self.device)
        make_steps = partial(UNetSteps, self._network, denoise)
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
        return self._call("image_vae", self._encode_images, images)[0]

    def _encode_images(self, images: Tensor) -> tuple[Tensor]:
        return (self._encode(images).to(self.dtype),)

    def _decode_latents(self, latents: Tensor) -> tuple[Tensor, ...]:
        logits, categories = self.mask_vae.decode_latents_both(latents)
        return (logits,) if categories is None else (logits, categories)

    def _call(self, name: str, function: Callable[[Tensor], tuple[Tensor, ...]], value: Tensor) -> tuple[Tensor, ...]:
        """Calls a network of `value` [B, ...]; as a CUDA graph where launches are what takes the time."""
        with gpu_settings(self.device, self.tf32):
            if not self.cuda_graph or not 0 < len(value) <= CAPTURED_BATCH:
                return function(value)
            with self._lanes.lane() as lane:
                return lane.call(name, function, value)

    @torch.inference_mode()
    def denoise(self, unet_input: Tensor, timesteps: Tensor, context: Tensor | None = None) -> Tensor:
        """See `Backend.denoise`."""
        with gpu_settings(self.device, self.tf32):
            return self._denoise(unet_input.to(self.dtype), timesteps, context)

    def caching(self, interval: int, branch: int) -> Callable[..., Tensor]:
        """See `Backend.caching`. It is eager where the backend compiles."""
        cache, calls = FeatureCache(branch), itertools.count()

        @torch.inference_mode()
        def denoise(unet_input: Tensor, timesteps: Tensor, context: Tensor | None = None) -> Tensor:
            if next(calls) % interval == 0:
                cache.features = None
            with gpu_settings(self.device, self.tf32):
                return self.unet(unet_input.to(self.dtype), timesteps, context, cache)

        return denoise

    def _own_loop(self, noise: Tensor, image_latents: Tensor, num_inference_steps: int) -> Tensor | None:
        if not self.cuda_graph or self.conditioning is not None:
            return None
        with self._lanes.lane() as lane, gpu_settings(self.device, self.tf32):
            return lane.sample(self.info, noise, image_latents, num_inference_steps)

    @torch.inference_mode()
    def segment(
        self,
        images: Tensor,
        noise: Tensor,
        num_inference_steps: int,
        size: tuple[int, int],
        thresholds: PostprocessConfig | None = None,
    ) -> list[PanopticResult] | None:
        """See `Backend.segment`: for pictures like those of the call before."""
        is_small = 0 < len(images) <= CAPTURED_BATCH and num_inference_steps <= WHOLE_STEPS
        if not self.cuda_graph or self.conditioning is not None or not is_small:
            return None
        images = images.to(self.device).contiguous(memory_format=torch.channels_last)
        info, network_size = self.info, (self.info.image_size, self.info.image_size)
        chosen = thresholds or info.postprocess
        limits = (chosen.mask_threshold, chosen.count_threshold, chosen.overlap_threshold)
        settings = (num_inference_steps, network_size, size, limits)
        with self._lanes.lane() as lane, gpu_settings(self.device, self.tf32):
            if not lane.is_repeated("a whole picture", images, noise, settings=settings):
                return None
            make_steps = lane.make_steps
            whole = WholePicture(
                lambda pictures: self._encode_images(pictures)[0],
                lambda latents: make_steps(info, latents, num_inference_steps),
                self._decode_latents,
                network_size,
                size,
                limits,
            )
            found = lane.call("a whole picture", whole, images, noise, settings=settings)
        finite, segmentation, area, box, score, *logits = found
        results = read_maps(segmentation, area, box, score)
        encoded, given, sampled, decoded = finite.tolist()
        require_sampled(sampled, lambda: encoded, lambda: given, info, self.dtype)
        require_finite(decoded, _DECODED[bool(logits)], info, self.dtype)
        if info.categories is None:
            return results
        mask_logits, category_logits = logits
        return with_categories(results, mask_logits, category_logits, info.categories)

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
        logits, *rest = self._call("mask_vae", self._decode_latents, latents.to(self.device))
        categories = rest[0] if rest else None
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
        require_finite(finite, _DECODED[categories is not None], self.info, self.dtype)
        return results

    def close(self) -> None:
        """See `Backend.close`."""
        self._lanes.close()
