"""Runs a model's exported graphs, whichever runtime holds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldmseg_fast.backends.backend import DdimBackend
from ldmseg_fast.backends.finite import all_finite, require_finite
from ldmseg_fast.backends.graphs import head
from ldmseg_fast.backends.graphs.batching import ANY, Ranges, run_in_parts
from ldmseg_fast.backends.graphs.lanes import Lane, LanePool
from ldmseg_fast.backends.graphs.loop import Runner
from ldmseg_fast.backends.graphs.specs import GraphSpec, sampler_name, schedule
from ldmseg_fast.backends.model_info import ModelInfo
from ldmseg_fast.checkpoints.model_folder import load_component
from ldmseg_fast.config import PostprocessConfig
from ldmseg_fast.errors import BackendError
from ldmseg_fast.kernels.backend import turn_off_on_old_gpus
from ldmseg_fast.panoptic.postprocess import PanopticResult, postprocess, resize_logits
from ldmseg_fast.panoptic.segment_categories import name_segments

LOGITS = "mask_decoder: slot logits"
CATEGORY_LOGITS = "mask_decoder: category logits"
MAX_HEAD_BYTES = 2 * 2**30  # of one tensor with every slot at the map's size; the head in the graph makes several


class GraphBackend(DdimBackend):
    """Runs exported graphs; a `Backend`. Batches that a graph does not take go through in parts.

    CLIP's encoders stay in PyTorch: their tokens are an input of the denoiser.

    Args:
        info: of the model folder, at the picture size to work at.
        specs: of the graphs `image_encoder`, `denoiser` and `mask_decoder`, and of any `sampler_N`.
        make_runners: the runners of one lane, on the given stream.
        device: where tensors are expected and returned.
        lanes: how many threads can be inside at a time; each lane has its own buffers.
        capture: run the sampling loop as one CUDA graph.
        batches: what each graph takes at once; a graph that is not in it takes any batch.
        close: called once by `close`, after the last lane is gone.

    Raises:
        ArgumentError: fewer than 1 lane.
        CheckpointError: a damaged model folder.
    """

    cache_branches = 0

    def __init__(
        self,
        info: ModelInfo,
        specs: Mapping[str, GraphSpec],
        make_runners: Callable[[torch.cuda.Stream | None], Mapping[str, Runner]],
        device: torch.device,
        lanes: int = 1,
        capture: bool = False,
        batches: Mapping[str, Ranges] | None = None,
        close: Callable[[], None] | None = None,
    ) -> None:
        takes_context = "context" in specs["denoiser"].tensors
        # trained queries are in the graph: for whoever calls it, such a model has no condition
        self.info = info if takes_context else replace(info, conditioning="none")
        self.specs = dict(specs)
        self.device = device
        turn_off_on_old_gpus(device)
        self.dtype = specs["image_encoder"].outputs[0].torch_dtype
        self.batches = dict(batches or {})
        self.conditioning = load_component(info.folder, "conditioning").to(device) if takes_context else None
        self._close = close

        def make_lane() -> Lane:
            stream = torch.cuda.Stream(device) if device.type == "cuda" else None
            return Lane(make_runners(stream), stream, capture)

        self.pool = LanePool(make_lane, lanes)

    def run_graph(self, graph: str, inputs: Mapping[str, Tensor], **output_sizes: int) -> dict[str, Tensor]:
        """Runs a graph once. See `Lane.run`.

        Raises:
            ArgumentError: an input that is missing or does not fit.
            BackendError: a size that the runtime does not take, or a backend that is closed.
        """
        with self.pool.lane() as lane:
            return lane.run(graph, inputs, output_sizes)

    def run_rows(
        self, graph: str, rows: Mapping[str, Tensor], fixed: Mapping[str, Tensor] | None = None, **output_sizes: int
    ) -> dict[str, Tensor]:
        """Runs a graph on any batch, in parts where it takes no such batch.

        Args:
            graph: its name.
            rows: inputs with a batch axis, [B, ...] of the spec's dtypes.
            fixed: inputs without one.
            output_sizes: axes that no input's shape tells.

        Returns:
            The outputs by name, [B, ...] of the spec's dtypes.

        Raises:
            ArgumentError, BackendError: see `run_graph`.
        """

        def run(part: dict[str, Tensor]) -> dict[str, Tensor]:
            return self.run_graph(graph, part | dict(fixed or {}), **output_sizes)

        return run_in_parts(run, rows, self.batches.get(graph, ANY))

    @cached_property
    def mask_vae(self) -> Any:
        """See `Backend.mask_vae`. The graphs hold its decoder only, so the model folder's is loaded on first use."""
        return load_component(self.info.folder, "mask_vae").to(self.device)

    @torch.inference_mode()
    def encode_image(self, images: Tensor) -> Tensor:
        """See `Backend.encode_image`."""
        return self.run_rows("image_encoder", {"images": images.to(self.device)})["image_latents"]

    @torch.inference_mode()
    def denoise(self, unet_input: Tensor, timesteps: Tensor, context: Tensor | None = None) -> Tensor:
        """See `Backend.denoise`."""
        channels = self.info.mask_vae.latent_channels
        noisy, image, condition = unet_input.split(
            [channels, self.info.image_latent_channels, channels * self.info.self_condition], dim=1
        )
        rows = {
            "noisy_latents": noisy.float(),
            "image_latents": image.to(self.dtype),
            "timesteps": timesteps.long(),
        }
        if self.info.self_condition:
            rows["condition"] = condition.float()
        if context is not None:
            rows["context"] = context.to(self.dtype)
        unused = torch.tensor([1.0, 0.0, 1.0, 0.0], device=self.device)  # of the step that follows in the graph
        return self.run_rows("denoiser", rows, {"coefficients": unused})["model_output"]

    def caching(self, interval: int, branch: int) -> Callable[..., Tensor]:
        """See `Backend.caching`. Raises BackendError: graphs keep no features."""
        raise BackendError(f"cache_interval={interval}: graphs keep no features; use backend=torch")

    def _own_loop(self, noise: Tensor, image_latents: Tensor, num_inference_steps: int) -> Tensor:
        rows = {"noise": noise.float(), "image_latents": image_latents.to(self.dtype)}
        whole = sampler_name(num_inference_steps)
        if whole in self.specs:
            times, coefficients = (table.to(self.device) for table in schedule(self.info, num_inference_steps))
            return self.run_rows(whole, rows, {"timesteps": times, "coefficients": coefficients})["mask_latents"]

        def loop(part: dict[str, Tensor]) -> dict[str, Tensor]:
            with self.pool.lane() as lane:
                latents = lane.sample(self.info, part["noise"], part["image_latents"], num_inference_steps)
            return {"mask_latents": latents}

        return run_in_parts(loop, rows, self.batches.get("denoiser", ANY))["mask_latents"]

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
        """See `Backend.decode_mask`. Maps that are too large for the head in the graph are made from its logits.

        Raises:
            BackendError: logits, or a map that needs them, from graphs that were exported without them.
        """
        spec = self.specs["mask_decoder"]
        thresholds = thresholds or self.info.postprocess
        needed = 4 * self.info.mask_vae.num_slots * size[0] * size[1]
        use_logits = output == "logits" or "label" not in spec.tensors or needed > MAX_HEAD_BYTES
        if use_logits and "mask_logits" not in spec.tensors:
            what = "output='logits'" if output == "logits" else f"a map of {size[1]}x{size[0]} pixels"
            raise BackendError(
                f"{what}: these graphs end in the panoptic head, which holds every slot at the map's size "
                f"({needed / 2**30:.1f} GiB here); export them with --head both, or use backend=torch"
            )
        factor = self.info.mask_vae.downsampling
        network_size = (latents.shape[2] * factor, latents.shape[3] * factor)
        fixed = {}
        if "size" in spec.tensors:
            fixed["size"] = torch.tensor((1, 1) if use_logits else size, dtype=torch.int64)
            fixed["mask_threshold"] = torch.tensor([thresholds.mask_threshold], device=self.device)
        rows = {"latents": latents.to(self.device).float()}
        height, width = fixed["size"].tolist() if fixed else size
        found = self.run_rows("mask_decoder", rows, fixed, height=height, width=width)
        if use_logits:
            require_finite(all_finite(found["mask_logits"]), LOGITS, self.info, self.dtype)
        if output == "logits":
            return resize_logits(found["mask_logits"], network_size, size)
        if not use_logits:
            outputs = [found[name].cpu().numpy() for name in ("label", "confidence", "sigmoid_area")]
            # the likeliest of at most 256 slots has a probability of 1/256 or more, unless it is NaN
            require_finite(bool(outputs[1].all()), LOGITS, self.info, self.dtype)
            results = head.finish(outputs[0], outputs[1], outputs[2], thresholds)
            if self.info.categories is None:
                return results
            named = found["category"].cpu().numpy(), found["category_score"].cpu().numpy()  # [B, Q]
            require_finite(bool(np.isfinite(named[1]).all()), CATEGORY_LOGITS, self.info, self.dtype)
            return [name_segments(*each, self.info.categories, fuse=fuse) for each in zip(results, *named)]
        category_logits = found.get("category_logits")
        if category_logits is not None:
            require_finite(all_finite(category_logits), CATEGORY_LOGITS, self.info, self.dtype)
        return postprocess(
            found["mask_logits"].float(),
            network_size,
            [size] * len(latents),
            thresholds,
            category_logits,
            self.info.categories,
            fuse=fuse,
        )

    def close(self) -> None:
        """See `Backend.close`. Calls after it raise BackendError."""
        self.pool.close()
        if self._close is not None:
            self._close()
            self._close = None

    def __enter__(self) -> GraphBackend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
