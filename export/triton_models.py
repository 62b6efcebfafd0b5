"""Defines the Python models of a Triton repository: pre-processing, the sampling loop, the head's last part.

Each class is a `TritonPythonModel`. `execute` takes a list of requests, each a batch of its own, and answers every one.
"""

from __future__ import annotations

import ctypes
import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldmseg_fast.backends.finite import all_finite
from ldmseg_fast.backends.graphs.head import finish
from ldmseg_fast.config import PostprocessConfig, SchedulerConfig, from_dict
from ldmseg_fast.config.categories import CategoryTable
from ldmseg_fast.data.pictures import decode_picture, open_checked
from ldmseg_fast.data.transforms import resize_image
from ldmseg_fast.diffusion.sampler import image_noise
from ldmseg_fast.diffusion.scheduler import Scheduler
from ldmseg_fast.errors import ArgumentError, BackendError, NonFiniteError
from ldmseg_fast.kernels.ddim_step import make_ddim_table
from ldmseg_fast.panoptic.format import MAX_PIXELS
from ldmseg_fast.panoptic.postprocess import PanopticResult, postprocess
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
    found = server().get_input_tensor_by_name(request, name)
    return found.as_numpy() if found.is_cpu() else tensor(request, name).cpu().numpy()


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
    # the tensors themselves: of a capsule the server would not know which stream still writes it
    tensors = [utils.Tensor.from_dlpack(name, value) for name, value in inputs.items()]
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
        limits = Limits.of_facts(self.facts)
        contents = [bytes(content) for content in array(request, "image").reshape(-1)]
        names = [f"picture {index} of the request" for index in range(len(contents))]
        for name, content in zip(names, contents):  # all of them before the first is decoded
            with open_checked(name, content, limits.max_pixels) as header:
                limits.check(name, header.size)
        pictures = [decode_picture(*each, max_pixels=limits.max_pixels) for each in zip(contents, names)]
        if len({picture.size for picture in pictures}) > 1:
            raise ArgumentError("pictures of several sizes in one request; send one request for each")
        limits.check(names[0], pictures[0].size[::-1])  # a few formats have another size than their header says
        given = utils.get_input_tensor_by_name(request, "seed")
        seeds = [0] * len(pictures) if given is None else array(request, "seed").reshape(-1).tolist()
        images = np.stack([resize_image(picture.pixels, side).transpose(2, 0, 1) for picture in pictures])
        deviation = self.facts["scheduler"].get("init_noise_sigma", 1.0)
        noise = torch.cat([image_noise(seed, [0], self.facts["latent_shape"], deviation) for seed in seeds])
        sizes = np.array([picture.size for picture in pictures], np.int64)
        found = {"images": np.ascontiguousarray(images), "noise": noise.numpy(), "size": sizes}
        return [utils.Tensor(name, value) for name, value in found.items()]


@dataclass(frozen=True)
class Limits:
    """Holds what sizes of pictures the repository takes.

    Attributes:
        max_pixels: of a picture that is decoded.
        head_pixels: of a map that the head in the graph makes.
        head_side: of such a map, its longer side; 0: any.
        logits: whether the graph gives logits too, of which larger maps are made.
    """

    max_pixels: int = MAX_PIXELS
    head_pixels: int = 2**62
    head_side: int = 0
    logits: bool = False

    @classmethod
    def of_facts(cls, facts: dict[str, Any]) -> Limits:
        """Reads a model's facts; repositories from before there were limits have none."""
        return cls(**facts.get("limits", {}))

    def fit_head(self, height: int, width: int) -> bool:
        """Tells whether the head in the graph makes a map of this size."""
        return height * width <= self.head_pixels and (not self.head_side or max(height, width) <= self.head_side)

    def check(self, name: str, size: tuple[int, int]) -> None:
        """Checks a picture of `size` (W, H) pixels, turned or not. Raises ArgumentError for one that is too large."""
        if not self.logits and not self.fit_head(*size):
            side = f" with sides of up to {self.head_side}" if self.head_side else ""
            raise ArgumentError(
                f"{name}: {size[0]}x{size[1]} is too large for the server's graphs: they make maps of up to "
                f"{self.head_pixels} pixels{side}; scale it down, or export them with --head both"
            )


class Sampler(_Model):
    """Samples mask latents from noise and image latents: the requests of one call are one batch of the denoiser."""

    def initialize(self, args: dict[str, str]) -> None:
        super().initialize(args)
        check_tensorrt(self.facts.get("tensorrt", ""), self.facts.get("version_compatible", False))
        scheduler = Scheduler(from_dict(SchedulerConfig, self.facts["scheduler"]))
        times, previous = scheduler.timesteps(self.facts["steps"])
        self.times = torch.tensor(times)
        self.table = make_ddim_table(scheduler.alphas_cumprod, self.times, torch.tensor(previous))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        utils = server()
        try:
            image_latents = [tensor(request, "image_latents") for request in requests]
            noise = [tensor(request, "noise") for request in requests]
            # the server says of each tensor by itself where it lies
            device = next((each.device for each in image_latents if each.is_cuda), torch.device("cpu"))
            latents = self.sample(*(torch.cat([each.to(device) for each in side]) for side in (noise, image_latents)))
        except Exception as error:
            return [utils.InferenceResponse(output_tensors=[], error=utils.TritonError(str(error))) for _ in requests]
        parts = iter(latents.split([len(part) for part in noise]))
        return answer(
            requests,
            lambda _: [utils.Tensor.from_dlpack("mask_latents", next(parts).contiguous())],
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
        limits, results = Limits.of_facts(self.facts), list[PanopticResult]()
        for row, (height, width) in zip(latents.split(1), sizes.tolist()):
            make = self._of_head if limits.fit_head(height, width) else self._of_logits
            results += make(row, (height, width), thresholds, table)
        if len({result.segmentation.shape for result in results}) > 1:
            raise ArgumentError("pictures of several sizes in one request; send one request for each")
        infos = np.array([[json.dumps(result.segments_info)] for result in results], object)
        maps = np.stack([result.segmentation for result in results])
        return [utils.Tensor("segmentation", maps), utils.Tensor("segments_info", infos)]

    def _of_head(
        self, row: Tensor, size: tuple[int, int], thresholds: PostprocessConfig, table: CategoryTable | None
    ) -> list[PanopticResult]:
        """Makes the map of latents [1, C, h, w] by the head in the graph."""
        inputs = {"latents": row, "size": torch.tensor(size), "mask_threshold": _threshold(row, thresholds)}
        names = ("label", "confidence", "sigmoid_area", *(("category", "category_score") if table else ()))
        outputs = [output.cpu().numpy() for output in call("ldmseg_mask_decoder", inputs, names)]
        # the likeliest of at most 256 slots has a probability of 1/256 or more, unless it is NaN
        _require_finite(bool(outputs[1].all()) and all(np.isfinite(each).all() for each in outputs[4:]))
        found = finish(outputs[0], outputs[1], outputs[2], thresholds)
        return found if table is None else [name_segments(*each, table) for each in zip(found, *outputs[3:])]

    def _of_logits(
        self, row: Tensor, size: tuple[int, int], thresholds: PostprocessConfig, table: CategoryTable | None
    ) -> list[PanopticResult]:
        """Makes the map of latents [1, C, h, w] of the graph's logits: the head holds every slot at the map's size."""
        inputs = {"latents": row, "size": torch.tensor([1, 1]), "mask_threshold": _threshold(row, thresholds)}
        names = ("mask_logits", *(("category_logits",) if table else ()))
        found = call("ldmseg_mask_decoder", inputs, names)
        _require_finite(all(bool(all_finite(each)) for each in found))
        side = int(self.facts["image_size"])
        return postprocess(found[0].float(), (side, side), [size], thresholds, *found[1:], categories=table)


def _threshold(row: Tensor, thresholds: PostprocessConfig) -> Tensor:
    return torch.tensor([thresholds.mask_threshold], device=row.device)


def _require_finite(finite: bool) -> None:
    if not finite:
        raise NonFiniteError(
            "the mask decoder's logits are not finite (NaN or infinity); export the graphs in a wider precision (bf16, "
            "fp32), or take another checkpoint"
        )


def check_tensorrt(needed: str, compatible: bool) -> None:
    """Checks that the server's TensorRT loads engines.

    Args:
        needed: the version that built them, as "11.4.0.1"; empty: there are none.
        compatible: whether later versions of the same major load them too.

    Raises:
        BackendError: names both versions.
    """
    if not needed:
        return
    wanted = tuple(int(part) for part in needed.split(".")[:3])
    cure = "take a container with it (README.md beside the models), or build the engines in this one"
    try:
        library = ctypes.CDLL(f"libnvinfer.so.{wanted[0]}")
    except OSError:
        raise BackendError(
            f"the engines need TensorRT {needed}, and this server has no libnvinfer.so.{wanted[0]}; {cure}"
        ) from None
    number = int(library.getInferLibVersion())  # 101302 for 10.13.2
    there = (number // 10000, number // 100 % 100, number % 100)
    if there != wanted and not (compatible and there[0] == wanted[0] and there > wanted):
        raise BackendError(
            f"the engines need TensorRT {needed}, and this server has {'.'.join(map(str, there))}; {cure}"
        )
