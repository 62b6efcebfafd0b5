"""Describes inputs and outputs of every exported graph in one place: names, dtypes, axes, and a sample input.

An axis is a number, or text: the name of a dynamic axis, or `name*8` for eight times that axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ldmseg_fast.backends.model_info import ModelInfo
from ldmseg_fast.diffusion.scheduler import Scheduler
from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.kernels.ddim_step import make_ddim_table

Axis = int | str
KINDS = ("image_encoder", "denoiser", "sampler", "mask_decoder")
HEADS = ("panoptic", "logits", "both")
MAX_SLOTS = 256  # a label is one byte


@dataclass(frozen=True)
class TensorSpec:
    """Describes one input or output.

    Attributes:
        name: of the tensor in the graph.
        dtype: one of DTYPES.
        shape: its axes; see the module.
        is_shape: whether its values are sizes, which a runtime reads on the host.
    """

    name: str
    dtype: str
    shape: tuple[Axis, ...]
    is_shape: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch names it."""
        return getattr(torch, self.dtype)

    def resolve(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Puts the dynamic axes' sizes into the shape. Raises KeyError for an axis that `sizes` lacks."""
        return tuple(axis if isinstance(axis, int) else _resolve(axis, sizes) for axis in self.shape)


@dataclass(frozen=True)
class GraphSpec:
    """Describes one graph.

    Attributes:
        name: of the graph in its export.
        kind: one of KINDS. An export has one graph of each kind but "sampler", of which it has any number.
        inputs, outputs: its tensors, in the graph's order.
    """

    name: str
    kind: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        """Inputs and outputs by name."""
        return {tensor.name: tensor for tensor in (*self.inputs, *self.outputs)}

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of the inputs' dynamic axes, each once."""
        names = [axis.partition("*")[0] for t in self.inputs for axis in t.shape if isinstance(axis, str)]
        return tuple(dict.fromkeys(names))

    def sizes(self, inputs: Mapping[str, Tensor]) -> dict[str, int]:
        """Reads the dynamic axes' sizes from `inputs`, tensors by name, such as uint8 [B, 3, S, S].

        Raises:
            ArgumentError: an input that is missing, or whose shape or dtype does not fit.
        """
        found: dict[str, int] = {}
        for tensor in self.inputs:
            if tensor.name not in inputs:
                raise ArgumentError(
                    f"{self.name}: no {tensor.name} given; inputs: {', '.join(t.name for t in self.inputs)}"
                )
            value = inputs[tensor.name]
            if value.dtype != tensor.torch_dtype:
                raise ArgumentError(f"{self.name}.{tensor.name}: {value.dtype} given, this graph takes {tensor.dtype}")
            fits = value.ndim == len(tensor.shape) and all(
                _matches(axis, size, found) for axis, size in zip(tensor.shape, value.shape)
            )
            if not fits:
                raise ArgumentError(
                    f"{self.name}.{tensor.name}: shape {tuple(value.shape)}, this graph takes {list(tensor.shape)}"
                )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Returns what `from_dict` reads, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GraphSpec:
        """Reads what `to_dict` wrote. Raises KeyError for a value that is missing."""

        def tensors(items: Sequence[Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
            return tuple(TensorSpec(i["name"], i["dtype"], tuple(i["shape"]), i["is_shape"]) for i in items)

        name = values["name"]
        kind = values.get("kind") or ("sampler" if name.startswith("sampler_") else name)  # older exports name it only
        return cls(name, kind, tensors(values["inputs"]), tensors(values["outputs"]))


def _resolve(axis: str, sizes: Mapping[str, int]) -> int:
    name, _, factor = axis.partition("*")
    return sizes[name] * int(factor or 1)


def _matches(axis: Axis, size: int, found: dict[str, int]) -> bool:
    if isinstance(axis, int):
        return axis == size
    name, _, factor = axis.partition("*")
    base, rest = divmod(size, int(factor or 1))
    return rest == 0 and found.setdefault(name, base) == base


@dataclass(frozen=True)
class GraphOptions:
    """Holds what an export fixes.

    Attributes:
        dtype: "float32", "float16" or "bfloat16", of weights, image latents and the UNet.
        batch: a fixed batch, or 0: any.
        image_size: side of the pictures in pixels, or 0: any multiple of what the networks divide by.
        head: what the mask decoder returns: "panoptic", "logits" or "both".
        sampler_steps: also one graph of the whole sampler for each of these numbers of steps.
    """

    dtype: str = "float32"
    batch: int = 0
    image_size: int = 0
    head: str = "panoptic"
    sampler_steps: tuple[int, ...] = ()

    @property
    def decoder_dtype(self) -> str:
        """The mask decoder's dtype: TensorRT has no transposed convolution in bfloat16, and the decoder is small."""
        return "float32" if self.dtype == "bfloat16" else self.dtype


def graph_specs(info: ModelInfo, options: GraphOptions) -> dict[str, GraphSpec]:
    """Describes the graphs of an export, by name. Raises ArgumentError for more slots than the head can label."""
    specs = [image_encoder(info, options), denoiser(info, options), mask_decoder(info, options)]
    specs += [sampler(info, options, steps) for steps in options.sampler_steps]
    return {spec.name: spec for spec in specs}


def image_encoder(info: ModelInfo, options: GraphOptions) -> GraphSpec:
    """Describes the graph uint8 [B, 3, H, W] pictures -> image latents [B, C_image, h, w]."""
    batch, height, width = _axes(info, options)
    factor = info.mask_vae.downsampling * info.picture_scale
    pixels = (batch, 3, _times(height, factor), _times(width, factor))
    latents = (batch, info.image_latent_channels, height, width)
    return GraphSpec(
        name="image_encoder",
        kind="image_encoder",
        inputs=(TensorSpec("images", "uint8", pixels),),
        outputs=(TensorSpec("image_latents", options.dtype, latents),),
    )


def denoiser(info: ModelInfo, options: GraphOptions) -> GraphSpec:
    """Describes the graph of one DDIM step with the network inside.

    The step's coefficients are inputs, so one graph serves every schedule: `coefficients` is a row of
    `make_ddim_table`. Latents stay in float32 whatever the network's precision. Trained queries are part of the graph;
    CLIP's tokens are the input `context`.
    """
    batch, height, width = _axes(info, options)
    latents = (batch, info.mask_vae.latent_channels, height, width)
    condition = (TensorSpec("condition", "float32", latents),) if info.self_condition else ()
    context = (TensorSpec("context", options.dtype, (batch, *info.context_shape)),) if info.context_shape else ()
    inputs = (
        TensorSpec("noisy_latents", "float32", latents),
        TensorSpec("image_latents", options.dtype, (batch, info.image_latent_channels, height, width)),
        TensorSpec("timesteps", "int64", (batch,)),
        TensorSpec("coefficients", "float32", (4,)),
        *condition,
        *context,
    )
    outputs = (
        TensorSpec("model_output", options.dtype, latents),
        TensorSpec("prev_latents", "float32", latents),
        TensorSpec("pred_original_sample", "float32", latents),
    )
    return GraphSpec(name="denoiser", kind="denoiser", inputs=inputs, outputs=outputs)


def sampler(info: ModelInfo, options: GraphOptions, steps: int) -> GraphSpec:
    """Describes the graph of `steps` DDIM steps; the schedule is still an input."""
    batch, height, width = _axes(info, options)
    latents = (batch, info.mask_vae.latent_channels, height, width)
    inputs = (
        TensorSpec("noise", "float32", latents),
        TensorSpec("image_latents", options.dtype, (batch, info.image_latent_channels, height, width)),
        TensorSpec("timesteps", "int64", (steps,)),
        TensorSpec("coefficients", "float32", (steps, 4)),
    )
    outputs = (TensorSpec("mask_latents", "float32", latents),)
    return GraphSpec(name=sampler_name(steps), kind="sampler", inputs=inputs, outputs=outputs)


def sampler_name(steps: int) -> str:
    """Names the graph of a whole sampler of `steps` steps."""
    return f"sampler_{steps}"


def mask_decoder(info: ModelInfo, options: GraphOptions) -> GraphSpec:
    """Describes the graph scaled mask latents -> the panoptic head's maps at `size` (height, width), or slot logits.

    `label`: the argmax slot where its softmax probability reaches `mask_threshold`, else 0. `confidence`: 255 times
    that probability. `sigmoid_area`: per slot, pixels whose sigmoid reaches the threshold. `mask_logits`: before both
    bilinear resizings. Of models with categories also `category` and `category_score`: per slot, the number of its
    category in 1..C and the mean probability that its pixels give it; and `category_logits` beside `mask_logits`,
    of the latents' size.

    Raises:
        ArgumentError: more slots than the head can label.
    """
    if info.mask_vae.num_slots > MAX_SLOTS:
        raise ArgumentError(
            f"mask_vae.num_slots={info.mask_vae.num_slots}: the exported head labels {MAX_SLOTS} slots at most"
        )
    batch, height, width = _axes(info, options)
    slots, scale = info.mask_vae.num_slots, 2**info.mask_vae.num_upscalers
    inputs = [TensorSpec("latents", "float32", (batch, info.mask_vae.latent_channels, height, width))]
    outputs = []
    if options.head != "logits":
        inputs += [TensorSpec("size", "int64", (2,), is_shape=True), TensorSpec("mask_threshold", "float32", (1,))]
        outputs += [
            TensorSpec("label", "uint8", (batch, "height", "width")),
            TensorSpec("confidence", "uint8", (batch, "height", "width")),
            TensorSpec("sigmoid_area", "int32", (batch, slots)),
        ]
    if options.head != "logits" and info.mask_vae.num_categories:
        outputs += [
            TensorSpec("category", "int32", (batch, slots)),
            TensorSpec("category_score", "float32", (batch, slots)),
        ]
    if options.head != "panoptic":
        logits = (batch, slots, _times(height, scale), _times(width, scale))
        outputs.append(TensorSpec("mask_logits", options.decoder_dtype, logits))
        if info.mask_vae.num_categories:
            classes = (batch, info.mask_vae.num_categories + 1, height, width)
            outputs.append(TensorSpec("category_logits", options.decoder_dtype, classes))
    return GraphSpec(name="mask_decoder", kind="mask_decoder", inputs=tuple(inputs), outputs=tuple(outputs))


def _axes(info: ModelInfo, options: GraphOptions) -> tuple[Axis, Axis, Axis]:
    batch: Axis = options.batch or "batch"
    if not options.image_size:
        return batch, "latent_height", "latent_width"
    side = options.image_size // info.mask_vae.downsampling
    return batch, side, side


def _times(axis: Axis, factor: int) -> Axis:
    if factor == 1:
        return axis
    return axis * factor if isinstance(axis, int) else f"{axis}*{factor}"


def schedule(info: ModelInfo, num_inference_steps: int) -> tuple[Tensor, Tensor]:
    """Makes the denoiser's inputs over a whole loop of N steps: timesteps int64 [N] and coefficients float32 [N, 4].

    Raises:
        ArgumentError: a number of steps that the model's schedule does not have.
    """
    scheduler = Scheduler(info.scheduler)
    times, previous = scheduler.timesteps(num_inference_steps)
    table = make_ddim_table(scheduler.alphas_cumprod, torch.tensor(times), torch.tensor(previous))
    return torch.tensor(times), table


def sample_inputs(spec: GraphSpec, info: ModelInfo, sizes: Mapping[str, int], seed: int = 0) -> dict[str, Tensor]:
    """Makes one input for each of a graph's: random pictures and latents, the schedule's times, thresholds and sizes.

    Args:
        spec: of the graph.
        info: of the model.
        sizes: of the dynamic axes; `height` and `width` are the decoder's output size, default the network's.
        seed: of the random values.

    Returns:
        By name, of the spec's dtypes, with `sizes` in the place of dynamic axes, such as uint8 [B, 3, S, S].
    """
    generator = torch.Generator().manual_seed(seed)
    is_whole_loop = spec.kind == "sampler"
    steps = spec.tensors["timesteps"].shape[0] if is_whole_loop else info.num_inference_steps
    times, table = schedule(info, int(steps))
    values: dict[str, Tensor] = {}
    for tensor in spec.inputs:
        shape = tensor.resolve(sizes)
        if tensor.name == "size":
            side = info.image_size
            value = torch.tensor([sizes.get("height", side), sizes.get("width", side)])
        elif tensor.name == "images":
            value = torch.randint(0, 256, shape, generator=generator)
        elif tensor.name == "mask_threshold":
            value = torch.tensor([info.postprocess.mask_threshold])
        elif tensor.name in ("timesteps", "coefficients"):
            rows = times if tensor.name == "timesteps" else table
            value = rows if is_whole_loop else rows[len(rows) // 2].expand(shape)
        else:
            value = torch.randn(shape, generator=generator)
        values[tensor.name] = value.to(tensor.torch_dtype).contiguous()
    return values
