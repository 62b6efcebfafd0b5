"""The three calls over exported graphs, whichever runtime runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmseg_fast.backends import head
from ldmseg_fast.backends.base import BackendError, ModelInfo
from ldmseg_fast.backends.lanes import Lane, LanePool
from ldmseg_fast.backends.loop import Runner
from ldmseg_fast.backends.specs import GraphSpec, schedule
from ldmseg_fast.config import PostprocessConfig
from ldmseg_fast.diffusion.sampler import Callback, ddim
from ldmseg_fast.diffusion.scheduler import Scheduler
from ldmseg_fast.panoptic import PanopticResult, postprocess


class GraphBackend:
    """A backend whose networks are exported graphs.

    Args:
        info: of the model folder; `image_size` is the graphs' own.
        specs: of the graphs `image_encoder`, `denoiser` and `mask_decoder`, and of any `sampler_N`.
        make_runners: the runners of one lane, on the given stream.
        device: where tensors are expected and returned.
        lanes: how many threads can be inside at a time; each lane has its own buffers.
        capture: run the sampling loop as one CUDA graph.
        decode_batch: images that one call of the mask decoder takes; its head holds all slots at the maps' size.
        close: called once by `close`, after the last lane is gone.
    """

    def __init__(
        self,
        info: ModelInfo,
        specs: Mapping[str, GraphSpec],
        make_runners: Callable[[torch.cuda.Stream | None], Mapping[str, Runner]],
        device: torch.device,
        lanes: int = 1,
        capture: bool = False,
        decode_batch: int = 1,
        close: Callable[[], None] | None = None,
    ) -> None:
        self.info = info
        self.specs = dict(specs)
        self.device = device
        self.dtype = specs["image_encoder"].outputs[0].torch_dtype
        self.decode_batch = decode_batch
        self._close = close

        def make_lane() -> Lane:
            stream = torch.cuda.Stream(device) if device.type == "cuda" else None
            return Lane(make_runners(stream), stream, capture)

        self.pool = LanePool(make_lane, lanes)

    def run_graph(self, graph: str, inputs: Mapping[str, Tensor], **output_sizes: int) -> dict[str, Tensor]:
        """One call of a graph, with the inputs of its spec. `output_sizes`: axes that no input's shape tells."""
        with self.pool.lane() as lane:
            return lane.run(graph, inputs, output_sizes)

    @torch.inference_mode()
    def encode_image(self, images: Tensor) -> Tensor:
        return self.run_graph("image_encoder", {"images": images.to(self.device)})["image_latents"]

    @torch.inference_mode()
    def denoise(self, unet_input: Tensor, timesteps: Tensor) -> Tensor:
        channels = self.info.mask_vae.latent_channels
        noisy, image, condition = unet_input.split(
            [channels, self.info.image_latent_channels, channels * self.info.self_condition], dim=1
        )
        inputs = {
            "noisy_latents": noisy.float(),
            "image_latents": image.to(self.dtype),
            "timesteps": timesteps.long(),
            "coefficients": torch.tensor([1.0, 0.0, 1.0, 0.0], device=self.device),  # the step after it is not used
        }
        if self.info.self_condition:
            inputs["condition"] = condition.float()
        return self.run_graph("denoiser", inputs)["model_output"]

    @torch.inference_mode()
    def sample(
        self,
        noise: Tensor,
        image_latents: Tensor,
        scheduler: Scheduler,
        num_inference_steps: int,
        callback: Callback | None = None,
    ) -> Tensor:
        if callback is not None or scheduler.config != self.info.scheduler:
            self_condition = self.info.self_condition
            return ddim(self.denoise, noise, image_latents, scheduler, num_inference_steps, self_condition, callback)
        whole = f"sampler_{num_inference_steps}"
        if whole in self.specs:
            times, coefficients = (table.to(self.device) for table in schedule(self.info, num_inference_steps))
            inputs = {"noise": noise.float(), "image_latents": image_latents.to(self.dtype)}
            return self.run_graph(whole, inputs | {"timesteps": times, "coefficients": coefficients})["mask_latents"]
        with self.pool.lane() as lane:
            return lane.loop(self.info, image_latents, num_inference_steps)(noise, image_latents)

    @torch.inference_mode()
    def decode_mask(
        self,
        latents: Tensor,
        size: tuple[int, int],
        output: str = "panoptic",
        thresholds: PostprocessConfig | None = None,
    ) -> list[PanopticResult] | Tensor:
        """As `Backend.decode_mask`. Raises BackendError for logits from graphs that were exported without them."""
        spec = self.specs["mask_decoder"]
        thresholds = thresholds or self.info.postprocess
        if output == "logits" and "mask_logits" not in spec.tensors:
            raise BackendError(
                "output='logits': these graphs end in the panoptic head; export them with --head both or --head logits"
            )
        factor = self.info.mask_vae.downsampling
        network_size = (latents.shape[2] * factor, latents.shape[3] * factor)
        chunks = [
            self._decode(chunk, size, thresholds) for chunk in latents.to(self.device).float().split(self.decode_batch)
        ]
        found = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
        if output == "logits":
            logits = F.interpolate(found["mask_logits"].float(), network_size, mode="bilinear", align_corners=False)
            return F.interpolate(logits, size, mode="bilinear", align_corners=False) if size != network_size else logits
        if "label" in found:
            outputs = [found[name].cpu().numpy() for name in ("label", "confidence", "sigmoid_area")]
            return head.finish(outputs[0], outputs[1], outputs[2], thresholds)
        return postprocess(found["mask_logits"].float(), network_size, [size] * len(latents), thresholds)

    def _decode(self, latents: Tensor, size: tuple[int, int], thresholds: PostprocessConfig) -> dict[str, Tensor]:
        inputs = {"latents": latents}
        if "size" in self.specs["mask_decoder"].tensors:
            inputs["size"] = torch.tensor(size, dtype=torch.int64)
            inputs["mask_threshold"] = torch.tensor([thresholds.mask_threshold], device=self.device)
        return self.run_graph("mask_decoder", inputs, height=size[0], width=size[1])

    def close(self) -> None:
        """Wait for calls under way, then free contexts and engines. Calls after it raise BackendError."""
        self.pool.close()
        if self._close is not None:
            self._close()
            self._close = None

    def __enter__(self) -> GraphBackend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
