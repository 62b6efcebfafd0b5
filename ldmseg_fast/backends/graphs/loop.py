"""Runs the sampling loop on fixed buffers, for every backend; on a GPU the loop can become one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from ldmseg_fast.backends.graphs.captured import Captured, on_stream
from ldmseg_fast.backends.graphs.specs import GraphSpec, schedule
from ldmseg_fast.backends.model_info import ModelInfo
from ldmseg_fast.diffusion.sampler import Denoise, ddim_steps
from ldmseg_fast.errors import BackendError
from ldmseg_fast.models.fused_unet import FusedUNet
from ldmseg_fast.models.unet import UNet


class Runner(Protocol):
    """Runs one graph on tensors that the caller owns.

    Attributes:
        spec: of the graph.
    """

    spec: GraphSpec

    def prepare(self, tensors: Mapping[str, Tensor], repeated: bool = False) -> Callable[[], None]:
        """Returns a call that reads the inputs from, and writes the outputs to, exactly these tensors, each time anew.

        Args:
            tensors: by name, contiguous and of the spec's dtypes and shapes, [B, ...].
            repeated: whether the call will be made many times, so that a runtime may record it.
        """
        ...


def use_cuda_graph(cuda_graph: bool | None, device: torch.device) -> bool:
    """Decides whether a sampling loop becomes a CUDA graph. None: on a GPU it does, elsewhere it does not.

    Raises:
        BackendError: a CUDA graph is asked for where there is no GPU.
    """
    if cuda_graph and device.type != "cuda":
        raise BackendError(f"cuda_graph=True: device={device} has no CUDA graphs; leave cuda_graph out, or use a GPU")
    return device.type == "cuda" if cuda_graph is None else cuda_graph


class Steps(Protocol):
    """Does the steps of one sampling loop on buffers of its own.

    Attributes:
        result: the last estimate of x_0, float32 [B, C, h, w], once `run` has been called.
    """

    result: Tensor

    def fill(self, noise: Tensor, image_latents: Tensor) -> None:
        """Copies x_T float [B, C, h, w] and the image latents [B, C_image, h, w] into the buffers."""
        ...

    def run(self) -> None:
        """Does all steps. What it reads and writes lies where it lay in the call before, so that it can be recorded."""
        ...


class RunnerSteps:
    """Does N steps of a graph: a step's outputs are the next step's inputs, nothing is copied between.

    Args:
        runner: of the `denoiser` graph.
        info: latent channels and schedule.
        image_latents: their shape [B, C, h, w] and dtype are the loop's.
        num_inference_steps: N.
    """

    def __init__(self, runner: Runner, info: ModelInfo, image_latents: Tensor, num_inference_steps: int) -> None:
        device, (batch, _, height, width) = image_latents.device, image_latents.shape
        shape = (batch, info.mask_vae.latent_channels, height, width)
        self.image_latents = torch.empty_like(image_latents, memory_format=torch.contiguous_format)
        self.latents = [torch.empty(shape, device=device) for _ in range(2)]
        self.estimates = [torch.empty(shape, device=device) for _ in range(2)]
        self.model_output = torch.empty(shape, dtype=runner.spec.tensors["model_output"].torch_dtype, device=device)
        times, coefficients = schedule(info, num_inference_steps)
        self.times = times[:, None].repeat(1, batch).to(device)  # [N, B]
        self.coefficients = coefficients.to(device)  # [N, 4]
        self.result = self.latents[num_inference_steps % 2]
        self._steps = [runner.prepare(self._tensors(step), repeated=True) for step in range(num_inference_steps)]

    def _tensors(self, step: int) -> dict[str, Tensor]:
        here, there = step % 2, (step + 1) % 2
        return {
            "noisy_latents": self.latents[here],
            "image_latents": self.image_latents,
            "timesteps": self.times[step],
            "coefficients": self.coefficients[step],
            "condition": self.estimates[here],
            "model_output": self.model_output,
            "prev_latents": self.latents[there],
            "pred_original_sample": self.estimates[there],
        }

    def fill(self, noise: Tensor, image_latents: Tensor) -> None:
        """See `Steps.fill`."""
        self.latents[0].copy_(noise)
        self.image_latents.copy_(image_latents)
        self.estimates[0].zero_()

    def run(self) -> None:
        """See `Steps.run`."""
        for step in self._steps:
            step()


class UNetSteps:
    """Does N steps of a UNet in PyTorch. What depends on the time alone is computed once, when the loop is made.

    Args:
        unet: whose `embed_time` makes the table of times.
        denoise: its `denoise`, as it is or compiled.
        info: of the model.
        image_latents: their shape [B, C, h, w], dtype and layout are the loop's.
        num_inference_steps: N.
    """

    result: Tensor

    @torch.no_grad()
    def __init__(
        self, unet: UNet | FusedUNet, denoise: Denoise, info: ModelInfo, image_latents: Tensor, num_inference_steps: int
    ) -> None:
        self.denoise = denoise
        self.info = info
        device, (batch, _, height, width) = image_latents.device, image_latents.shape
        self.noise = torch.empty((batch, info.mask_vae.latent_channels, height, width), device=device)
        self.image_latents = torch.empty_like(image_latents)
        times, table = schedule(info, num_inference_steps)
        self.times = unet.embed_time(times.to(device), image_latents.dtype)  # [N, E]
        self.table = table.to(device)  # [N, 4]

    def fill(self, noise: Tensor, image_latents: Tensor) -> None:
        """See `Steps.fill`."""
        self.noise.copy_(noise)
        self.image_latents.copy_(image_latents)

    def run(self) -> None:
        """See `Steps.run`."""
        prediction_type = self.info.scheduler.prediction_type
        for latents, _ in ddim_steps(
            self.denoise,
            self.noise,
            self.image_latents,
            self.times,
            self.table,
            prediction_type,
            self.info.self_condition,
        ):
            self.result = latents


class SampleLoop:
    """Runs a sampling loop for one batch size.

    Args:
        steps: what it runs.
        stream: where the loop runs; None on a CPU.
        capture: make the whole loop one CUDA graph, see `Captured`.
    """

    def __init__(self, steps: Steps, stream: torch.cuda.Stream | None = None, capture: bool = False) -> None:
        self.steps = steps
        self.stream = stream
        self._run = Captured(steps.run, stream, capture)

    @torch.inference_mode()
    def __call__(self, noise: Tensor, image_latents: Tensor) -> Tensor:
        """Samples.

        Args:
            noise: x_T, [B, C, h, w].
            image_latents: [B, C_image, h, w].

        Returns:
            The last estimate of x_0, a new float32 tensor [B, C, h, w].

        Raises:
            CaptureError: the loop cannot be captured.
        """
        result = torch.empty(noise.shape, device=image_latents.device)
        with on_stream(self.stream):
            self.steps.fill(noise, image_latents)
            self._run()
            result.copy_(self.steps.result)
        return result
