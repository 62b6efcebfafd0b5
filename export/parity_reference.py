"""Runs a model in PyTorch as its exported graphs must compute it, and one network after the other of either runtime."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from ldmseg_fast.backends.graphs.graph_backend import GraphBackend
from ldmseg_fast.backends.graphs.modules import MaskDecoderGraph
from ldmseg_fast.backends.graphs.specs import GraphOptions
from ldmseg_fast.backends.model_info import ModelInfo
from ldmseg_fast.backends.torch_backend import TorchBackend
from ldmseg_fast.checkpoints.model_folder import load_component_config
from ldmseg_fast.diffusion.sampler import Denoise, ddim, image_noise, unet_input
from ldmseg_fast.diffusion.scheduler import Scheduler
from ldmseg_fast.export.calibration import LayerScales, Scale, fake_quantize, to_eight_bits
from ldmseg_fast.export.networks import load_network
from ldmseg_fast.kernels.mask_bits import encode_mask_bits
from ldmseg_fast.models.conditioning import with_context
from ldmseg_fast.models.unet import UNet

NETWORKS = ("image_encoder", "denoiser", "mask_decoder")
TIMES = 5  # of the schedule that single evaluations are spread over
Values = dict[str, Tensor]


@dataclass(frozen=True)
class Quantised:
    """Says how the reference's UNet is quantised: scales by layer, and whether what flows is quantised too."""

    precision: str
    layers: Mapping[str, LayerScales]
    flows: bool


class ReferenceBackend(TorchBackend):
    """Runs the networks in float32, with weights rounded as an export rounds them: a `TorchBackend`.

    Args:
        info: of the model, at the picture size to work at.
        options: of the graphs; None rounds nothing.
        quantised: of the UNet, where it is.
        device: where it runs.
        rounds_scale: attention's scale is rounded too, as a graph of `options` without the operator Attention does.
        only: the one of NETWORKS that will run; None: all. Without the denoiser the UNet's weights are not loaded.
    """

    def __init__(
        self,
        info: ModelInfo,
        options: GraphOptions | None = None,
        quantised: Quantised | None = None,
        device: str | torch.device = "cpu",
        rounds_scale: bool = True,
        only: str | None = None,
    ) -> None:
        self._dtypes = {}
        self._attention = _GraphAttention()
        self._loads_unet = only in (None, "denoiser")
        self._rounds_scale = rounds_scale
        if options is not None:
            half, decoder = (getattr(torch, name) for name in (options.dtype, options.decoder_dtype))
            self._dtypes = {"unet": half, "image_vae": half, "mask_vae": decoder}
            self._dtypes |= {"conditioning": half} if info.conditioning == "learned" else {}
        self._quantised = quantised
        super().__init__(info, device, torch.float32, cuda_graph=False)
        if quantised is not None or only is not None:
            self.unet.unfuse()  # products of fused weights pass the quantised layers by, and are float32's

    def encode_image(self, images: Tensor) -> Tensor:
        """See `Backend.encode_image`."""
        with self._attention_of("image_vae"):
            return super().encode_image(images)

    def denoise(self, unet_input: Tensor, timesteps: Tensor, context: Tensor | None = None) -> Tensor:
        """See `Backend.denoise`."""
        with self._attention_of("unet"):
            return super().denoise(unet_input, timesteps, context)

    def _attention_of(self, network: str) -> _GraphAttention:
        self._attention.dtype = self._dtypes.get(network, torch.float32) if self._rounds_scale else torch.float32
        return self._attention

    @torch.no_grad()
    def _load(self, name: str, attention: str = "auto") -> Any:
        if name == "unet" and not self._loads_unet:
            with torch.device("meta"):
                return UNet(load_component_config(self.info.folder, "unet")[0])
        network = load_network(self.info, name, torch.float32)  # without the pages of its file, which count as memory
        module = network.to(device=self.device, memory_format=torch.channels_last)
        if (dtype := self._dtypes.get(name, torch.float32)) != torch.float32:
            for values in module.state_dict().values():
                if values.is_floating_point():
                    values.copy_(values.to(dtype))
        if name == "unet" and self._quantised is not None:
            _quantise(module, self._quantised, self._attention, self.device)
        return module


class InFloat64(TorchFunctionMode):
    """Computes in float64 inside a `with` block, where a network's weights and what they made come in.

    Weights stay float32 in memory; each is converted when it is used.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = args, kwargs or {}
        tensors = [each for each in tree_leaves(given) if isinstance(each, Tensor)]
        if any(each.dtype == torch.float64 or isinstance(each, nn.Parameter) for each in tensors):
            args, kwargs = tree_map(_widened, given)
            func = Tensor.double if func is Tensor.float else func
        return func(*args, **(kwargs or {}))


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.dtype == torch.float32 else value
    return torch.float64 if value is torch.float32 else value


class _GraphAttention(TorchFunctionMode):
    """Computes attention as its graph does.

    Attributes:
        dtype: of a constant, the root of 1 / sqrt(D), by which queries and keys are multiplied each.
        softmax: rounds what the values are multiplied by; None does not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dtype = torch.float32
        self.softmax: Callable[[Tensor], Tensor] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args[:3]
        root = torch.tensor(q.shape[-1] ** -0.25).to(self.dtype).item()
        if self.softmax is not None:
            return self.softmax((q * root @ (k * root).mT).softmax(-1)) @ v
        scale = {} if self.dtype == torch.float32 else {"scale": root * root}
        return func(*args, **{**(kwargs or {}), **scale})


def _quantise(unet: nn.Module, quantised: Quantised, attention: _GraphAttention, device: torch.device) -> None:
    precision = quantised.precision

    def rounds(scale: Scale) -> Callable[[Tensor], Tensor]:
        return partial(fake_quantize, scale=scale, precision=precision)

    def hook(layer: nn.Module, scales: LayerScales, whole: nn.Module) -> None:
        inputs = rounds(scales.inputs)
        layer.register_forward_pre_hook(lambda _, args: (inputs(args[0]), *args[1:]))
        if scales.outputs is not None:
            outputs = rounds(scales.outputs)
            layer.register_forward_hook(lambda _, args, output: outputs(output))
        if scales.softmax is not None:
            softmax = rounds(scales.softmax)
            whole.register_forward_pre_hook(lambda *_: setattr(attention, "softmax", softmax))
            whole.register_forward_hook(lambda *_: setattr(attention, "softmax", None))

    for name, scales in quantised.layers.items():
        layer: Any = unet.get_submodule(name)
        steps = scales.weight.to(device)
        layer.weight.copy_(to_eight_bits(layer.weight, steps, precision).float() * steps)
        if quantised.flows:
            hook(layer, scales, unet.get_submodule(name.rpartition(".")[0]))


@contextmanager
def exact_products() -> Iterator[None]:
    """Keeps a GPU from rounding float32 to TF32 inside a `with` block."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@torch.inference_mode()
def make_inputs(reference: TorchBackend, dataset: Any, index: int) -> Values:
    """Makes what both runtimes get for one image of a data set.

    Returns:
        `image` uint8 [1, 3, S, S], `mask_latents` and `noise` float32 [1, C, h, w], `image_latents` [1, C_image, h, w],
        `unet_input` [1, C_in, h, w] of the mask's latents noised to a time of the schedule, and that `time`, int64 [1].
    """
    info, item = reference.info, dataset[index]
    config, ids = info.mask_vae, item["segment_ids"][None]
    categories = None
    if config.num_categories:  # which ones does not matter, and the data need not have the model's
        categories = torch.where(ids > 0, (ids.int() - 1) % config.num_categories + 1, 0)
    bits = encode_mask_bits(
        ids, config.num_bits, item["table"][None], category_ids=categories, category_bits=config.category_bits
    )
    mask_latents = reference.mask_vae.encode_latents(bits.to(reference.device)).float().cpu()
    noise = image_noise(0, [index], tuple(mask_latents.shape[1:]))
    scheduler, total = Scheduler(info.scheduler), info.scheduler.num_train_timesteps
    time = torch.tensor([min((index % TIMES + 1) * total // (TIMES + 1), total - 1)])
    image = item["image"][None]
    image_latents = reference.encode_image(image).float().cpu()
    noisy = scheduler.add_noise(mask_latents, noise, time)
    condition = mask_latents if info.self_condition else None
    start = noise * info.scheduler.init_noise_sigma
    found = {"image": image, "mask_latents": mask_latents, "noise": start, "image_latents": image_latents}
    return found | {"unet_input": unet_input(noisy, image_latents, condition), "time": time}


def network_outputs(backend: Any, inputs: Values, networks: Sequence[str] = NETWORKS) -> Values:
    """Evaluates each network once, in one call, on `inputs` of a batch of any size: float32 and integers, [B, ...].

    The mask decoder's outputs have the names of its graph.
    """
    image, given, found = inputs["image"], inputs["unet_input"].to(backend.device), {}
    if "image_encoder" in networks:
        found["image_latents"] = backend.encode_image(image)
    if "denoiser" in networks:
        found["model_output"] = denoiser(backend, image)(given.to(backend.dtype), inputs["time"].to(backend.device))
    if "mask_decoder" in networks:
        found |= _decode(backend, inputs["mask_latents"].to(backend.device))
    return {name: value.cpu().float() if value.is_floating_point() else value.cpu() for name, value in found.items()}


@torch.inference_mode()
def _decode(backend: Any, latents: Tensor) -> Values:
    info = backend.info
    size = torch.tensor([info.image_size, info.image_size])
    threshold = torch.tensor([info.postprocess.mask_threshold], device=backend.device)
    if isinstance(backend, GraphBackend):
        spec = backend.specs["mask_decoder"]
        fixed = {"size": size, "mask_threshold": threshold} if "size" in spec.tensors else {}
        return backend.run_rows("mask_decoder", {"latents": latents}, fixed, height=int(size[0]), width=int(size[1]))
    outputs = MaskDecoderGraph(backend.mask_vae, "both")(latents, size, threshold)
    names = ["label", "confidence", "sigmoid_area", "category", "category_score", "mask_logits", "category_logits"]
    if len(outputs) == 4:
        names = [*names[:3], "mask_logits"]
    return dict(zip(names, outputs, strict=True))


def whole_runs(backend: Any, inputs: Values, steps: tuple[int, ...], done: Callable[[int], Any]) -> Values:
    """Samples one image's latents with each number of steps, and decodes the last ones.

    Args:
        backend: of either runtime.
        inputs: of `make_inputs`.
        steps: numbers of steps, in rising order.
        done: is told how many evaluations of the denoiser have been made.

    Returns:
        `latents_N` float32 [1, C, h, w]; `map` int32 [S, S], with thresholds at zero, or random weights would leave
        only void to compare; `segments`, uint8 [n]: its segments as JSON.
    """
    info, found = backend.info, {}
    for count in steps:
        found[f"latents_{count}"] = sample(backend, inputs["image"], inputs["noise"], count)
        done(count)
    everything = replace(info.postprocess, mask_threshold=0.0, count_threshold=0, overlap_threshold=0.0)
    side = (info.image_size, info.image_size)
    (result,) = backend.decode_mask(found[f"latents_{steps[-1]}"], side, "panoptic", everything)
    found["map"] = torch.from_numpy(result.segmentation)
    found["segments"] = torch.frombuffer(bytearray(json.dumps(result.segments_info).encode()), dtype=torch.uint8)
    return {name: value.cpu() for name, value in found.items()}


def sample(backend: Any, image: Tensor, noise: Tensor, steps: int) -> Tensor:
    """Samples mask latents float32 [B, C, h, w] for pictures uint8 [B, 3, S, S] and noise of the latents' shape."""
    image_latents, scheduler = backend.encode_image(image), Scheduler(backend.info.scheduler)
    noise = noise.to(backend.device)
    if backend.info.conditioning == "none":
        return backend.sample(noise, image_latents, scheduler, steps).float()
    return ddim(denoiser(backend, image), noise, image_latents, scheduler, steps, backend.info.self_condition).float()


def denoiser(backend: Any, pictures: Tensor) -> Denoise:
    """Returns a backend's network, with the context of `pictures`, uint8 [B, 3, S, S], where it takes one."""
    if backend.info.conditioning == "none":
        return backend.denoise
    return with_context(backend.denoise, backend.conditioning, pictures.to(backend.device))


def step_time(backend: Any, inputs: Values, rounds: int) -> float:
    """Times one evaluation of the denoiser in milliseconds: the best of `rounds`, on inputs float32 [1, C, h, w]."""
    network = denoiser(backend, inputs["image"])
    given, times = inputs["unet_input"].to(backend.device, backend.dtype), inputs["time"].to(backend.device)
    (best,) = best_times(lambda: network(given, times), rounds=rounds)
    return best


def best_times(*calls: Callable[[], Any], rounds: int = 30, seconds: float = 5.0) -> list[float]:
    """Times each call in milliseconds: the best of interleaved rounds, so that a busy machine slows all alike.

    Rounds end early once `seconds` have passed, but not before the second.
    """
    best = [float("inf")] * len(calls)
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= 2 and time.perf_counter() - begin > seconds:
            break
        for index, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[index] = min(best[index], 1000 * (time.perf_counter() - start))
    return best
