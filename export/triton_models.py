"""Defines the Python models of a Triton repository: pre-processing, the sampling loop, the head's last part.

Each class is a `TritonPythonModel`. `execute` takes a list of requests, each a batch of its own, and answers every one.
"""

from __future__ import annotations

import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldmseg_fast.backends.graphs.head import finish
from ldmseg_fast.config import PostprocessConfig, SchedulerConfig, from_dict
from ldmseg_fast.config.categories import CategoryTable
from ldmseg_fast.data.pictures import decode_picture
from ldmseg_fast.data.transforms import resize_image
from ldmseg_fast.diffusion.sampler import image_noise
from ldmseg_fast.diffusion.scheduler import Scheduler
from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.kernels.ddim_step import make_ddim_table
from ldmseg_fast.panoptic.postprocess import PanopticResult
from ldmseg_fast.panoptic.segment_categories import name_segments


def server() -> Any:
    """Imports Triton's own module, which exists inside the server only."""
    return importlib.import_module("triton_python_backend_utils")


class _Model:
    facts: dict[str, Any]

    def initialize(self, args: dict[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        self.facts = json.loads(parameters["ldmseg"]["string_value"])


class _RequestByRequest(_Model, ABC):
    def execute(self, requests: Sequence[Any]) -> list[Any]:
        return answer(requests, self.run)

    @abstractmethod
    def run(self, request: Any) -> list[Any]:
        """Returns output tensors for one request."""


def answer(requests: Sequence[Any], run: Callable[[Any], list[Any]]) -> list[Any]:
    """Answers each request; an error stays with the request that caused it."""
    utils, responses = server(), []
    for request in requests:
        try:
            responses.append(utils.InferenceResponse(output_tensors=run(request)))
        except Exception as error:
            responses.append(utils.InferenceResponse(output_tensors=[], error=utils.TritonError(str(error))))
    return responses


def array(request: Any, name: str) -> np.ndarray:
    """Returns a request's input as an array, [B, ...] of the dtype that the model's configuration names."""
    return server().get_input_tensor_by_name(request, name).as_numpy()


def tensor(message: Any, name: str, get: Callable[[Any, str], Any] | None = None) -> Tensor:
    """Returns a request's input, or with `get` a response's output, where it lies: [B, ...] of its dtype there."""
    found = (get or server().get_input_tensor_by_name)(message, name)
    return torch.from_dlpack(found.to_dlpack())


def call(model: str, inputs: dict[str, Tensor], outputs: Sequence[str]) -> list[Tensor]:
    """Calls another model of the repository.

    Args:
        inputs: by name, of the shapes and dtypes of the graph's inputs, such as float32 [B, C, h, w].
        outputs: names of the outputs to return, in this order.

    Raises:
        RuntimeError: the model failed; the message is the server's.
    """
    utils = server()
    tensors = [utils.Tensor.from_dlpack(name, torch.utils.dlpack.to_dlpack(value)) for name, value in inputs.items()]
    request = utils.InferenceRequest(model_name=model, requested_output_names=list(outputs), inputs=tensors)
    response = request.exec()
    if response.has_error():
        raise RuntimeError(f"{model}: {response.error().message()}")
    return [tensor(response, name, utils.get_output_tensor_by_name) for name in outputs]


class Preprocess(_RequestByRequest):
    """Decodes pictures, turned as their EXIF orientation says.

    Encoded pictures [B, 1] (and seeds [B, 1]) -> images uint8 [B, 3, S, S], noise float32 [B, C, h, w] and size
    int64 [B, 2].
    """

    def run(self, request: Any) -> list[Any]:
        utils, side = server(), self.facts.get("picture_size", self.facts["image_size"])
        pictures = []
        for content in array(request, "image").reshape(-1):
            pictures.append(decode_picture(bytes(content), f"picture {len(pictures)} of the request"))
        given = utils.get_input_tensor_by_name(request, "seed")
        seeds = [0] * len(pictures) if given is None else given.as_numpy().reshape(-1).tolist()
        images = np.stack([resize_image(picture.pixels, side).transpose(2, 0, 1) for picture in pictures])
        noise = torch.cat([image_noise(seed, [0], self.facts["latent_shape"]) for seed in seeds])
        sizes = np.array([picture.size for picture in pictures], np.int64)
        found = {"images": np.ascontiguousarray(images), "noise": noise.numpy(), "size": sizes}
        return [utils.Tensor(name, value) for name, value in found.items()]


class Sampler(_Model):
    """Samples mask latents from noise and image latents: the requests of one call are one batch of the denoiser."""

    def initialize(self, args: dict[str, str]) -> None:
        super().initialize(args)
        scheduler = Scheduler(from_dict(SchedulerConfig, self.facts["scheduler"]))
        times, previous = scheduler.timesteps(self.facts["steps"])
        self.times = torch.tensor(times)
        self.table = make_ddim_table(scheduler.alphas_cumprod, self.times, torch.tensor(previous))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        utils = server()
        try:
            image_latents = [tensor(request, "image_latents") for request in requests]
            noise = [tensor(request, "noise") for request in requests]
            latents = self.sample(torch.cat(noise).to(image_latents[0].device), torch.cat(image_latents))
        except Exception as error:
            return [utils.InferenceResponse(output_tensors=[], error=utils.TritonError(str(error))) for _ in requests]
        parts = iter(latents.split([len(part) for part in noise]))
        return answer(
            requests,
            lambda _: [
                utils.Tensor.from_dlpack("mask_latents", torch.utils.dlpack.to_dlpack(next(parts).contiguous()))
            ],
        )

    def sample(self, noise: Tensor, image_latents: Tensor) -> Tensor:
        """Samples the last estimate of x_0, float32 [B, C, h, w], from noise, float32 [B, C, h, w].

        image_latents: float [B, C_image, h, w] on the device to sample on, as `noise`.
        """
        latents, estimate = noise, torch.zeros_like(noise)
        for time, coefficients in zip(self.times.to(noise.device), self.table.to(noise.device)):
            inputs = {"noisy_latents": latents, "image_latents": image_latents}
            inputs |= {"timesteps": time.repeat(len(noise)), "coefficients": coefficients.contiguous()}
            if self.facts["self_condition"]:
                inputs["condition"] = estimate
            latents, estimate = call("ldmseg_denoiser", inputs, ("prev_latents", "pred_original_sample"))
        return latents


class Head(_RequestByRequest):
    """Decodes maps.

    Mask latents [B, C, h, w] and size [B, 2] -> segmentation int32 [B, H, W] and segments_info (JSON) [B, 1].
    """

    def run(self, request: Any) -> list[Any]:
        utils, thresholds = server(), from_dict(PostprocessConfig, self.facts["postprocess"])
        latents, sizes = tensor(request, "mask_latents"), array(request, "size")
        listed = self.facts.get("categories")  # of repositories from before there were any: none
        table = None if listed is None else CategoryTable.of_data_set(listed, "categories")
        results: list[PanopticResult] = []
        for row, size in zip(latents.split(1), sizes):
            threshold = torch.tensor([thresholds.mask_threshold], device=latents.device)
            inputs = {"latents": row, "size": torch.tensor(size.tolist()), "mask_threshold": threshold}
            names = ("label", "confidence", "sigmoid_area", *(("category", "category_score") if table else ()))
            outputs = [output.cpu().numpy() for output in call("ldmseg_mask_decoder", inputs, names)]
            found = finish(outputs[0], outputs[1], outputs[2], thresholds)
            results += found if table is None else [name_segments(*each, table) for each in zip(found, *outputs[3:])]
        if len({result.segmentation.shape for result in results}) > 1:
            raise ArgumentError("pictures of several sizes in one request; send one request for each")
        infos = np.array([[json.dumps(result.segments_info)] for result in results], object)
        maps = np.stack([result.segmentation for result in results])
        return [utils.Tensor("segmentation", maps), utils.Tensor("segments_info", infos)]
