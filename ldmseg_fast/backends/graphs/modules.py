"""Holds what each exported graph computes, as modules: inputs and outputs are those of `specs`, in the same order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldmseg_fast.backends.graphs.specs import GraphSpec
from ldmseg_fast.backends.model_info import ModelInfo
from ldmseg_fast.diffusion.sampler import unet_input
from ldmseg_fast.kernels.ddim_step import ddim_step
from ldmseg_fast.panoptic.postprocess import resize_logits
from ldmseg_fast.panoptic.segment_categories import slot_categories


class ImageEncoderGraph(nn.Module):
    """Computes the graph `specs.image_encoder`."""

    def __init__(self, image_vae: nn.Module) -> None:
        super().__init__()
        self.image_vae = image_vae

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> image latents [B, C_image, h, w]."""
        return self.image_vae(images)


class DenoiserGraph(nn.Module):
    """Computes the graph `specs.denoiser`: one evaluation of the UNet and the DDIM step after it.

    Args:
        unet: [B, C_in, h, w], timesteps [B], context -> model output [B, C, h, w]; a module or a compiled one.
        prediction_type: what its output stands for.
    """

    def __init__(self, unet: Any, prediction_type: str) -> None:
        super().__init__()
        self.unet = unet
        self.prediction_type = prediction_type
        self.register_buffer("row", torch.zeros(1, dtype=torch.int64), persistent=False)

    def forward(
        self,
        noisy_latents: Tensor,
        image_latents: Tensor,
        timesteps: Tensor,
        coefficients: Tensor,
        condition: Tensor | None = None,
        context: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Does one step (Song et al. 2021, equation 12); latents stay in float32, the network runs in its own dtype.

        Args:
            noisy_latents: x_t, float32 [B, C, h, w].
            image_latents: [B, C_image, h, w] in the network's dtype.
            timesteps: int64 [B].
            coefficients: float32 [4], a row of `make_ddim_table`.
            condition: the last estimate of x_0, float32 [B, C, h, w], of models with self-conditioning.
            context: tokens [B, M, D] in the network's dtype, of models with CLIP.

        Returns:
            Model output [B, C, h, w] in the network's dtype; float32 [B, C, h, w]: x at the next time, and x_0.
        """
        dtype = image_latents.dtype
        model_output = self.unet(unet_input(noisy_latents, image_latents, condition), timesteps, context)
        prev_latents, pred_original_sample, _ = ddim_step(
            model_output,
            noisy_latents,
            image_latents,
            self.row,
            coefficients[None],
            self.prediction_type,
            condition is not None,
            dtype,
        )
        return model_output, prev_latents, pred_original_sample


class WithQueries(nn.Module):
    """Joins a UNet with the trained queries that are its context for every picture."""

    queries: Tensor  # [1, M, D]

    def __init__(self, unet: nn.Module, queries: Tensor) -> None:
        super().__init__()
        self.unet = unet
        self.register_buffer("queries", queries.detach()[None])

    def forward(self, sample: Tensor, timesteps: Tensor, context: None = None) -> Tensor:
        """Computes the model output, float [B, C, h, w], of float [B, C_in, h, w] and timesteps int64 [B]."""
        return self.unet(sample, timesteps, self.queries.expand(sample.shape[0], -1, -1))


class SamplerGraph(nn.Module):
    """Computes the graph `specs.sampler`: the whole loop, unrolled; every step shares the weights."""

    def __init__(self, denoiser: DenoiserGraph, steps: int, self_condition: bool) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.steps = steps
        self.self_condition = self_condition

    def forward(self, noise: Tensor, image_latents: Tensor, timesteps: Tensor, coefficients: Tensor) -> Tensor:
        """x_T float32 [B, C, h, w], image latents, timesteps int64 [N], coefficients float32 [N, 4] -> x_0 float32."""
        latents = noise
        condition = torch.zeros_like(noise) if self.self_condition else None
        for step in range(self.steps):
            time = timesteps[step].expand(noise.shape[0])
            _, latents, estimate = self.denoiser(latents, image_latents, time, coefficients[step], condition)
            condition = estimate if self.self_condition else None
        return latents


class MaskDecoderGraph(nn.Module):
    """Computes the graph `specs.mask_decoder`: decoder and panoptic head.

    The filter by area needs the whole map's counts; it follows outside, in `head`.

    Args:
        mask_vae: the mask auto-encoder.
        head: one of `specs.HEADS`.
    """

    def __init__(self, mask_vae: Any, head: str) -> None:
        super().__init__()
        self.mask_vae = mask_vae
        self.head = head

    def forward(
        self, latents: Tensor, size: Tensor | None = None, mask_threshold: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Decodes scaled mask latents float32 [B, C, h, w].

        Args:
            latents: the mask latents.
            size: (H, W) of the maps, int64 [2]; None: logits only.
            mask_threshold: float32 [1].

        Returns:
            label and confidence uint8 [B, H, W], sigmoid_area int32 [B, Q], of models with categories category int32
            [B, Q] and category_score float32 [B, Q]; with the head "both" the slot logits [B, Q, h 2^u, w 2^u] too, and
            the category logits [B, C + 1, h, w]. Without a size the logits alone.
        """
        factor = self.mask_vae.config.downsampling
        mask_logits, category_logits = self.mask_vae.decode_latents_both(latents)
        all_logits = (mask_logits,) if category_logits is None else (mask_logits, category_logits)
        if size is None or mask_threshold is None:
            return all_logits
        network_size = (latents.shape[2] * factor, latents.shape[3] * factor)
        height, width = size.tolist()
        torch._check(height > 0)
        torch._check(width > 0)
        logits = resize_logits(mask_logits, network_size, (height, width))  # float32 [B, Q, H, W]
        top, label = logits.max(dim=1)  # [B, H, W]
        probability = torch.exp(top - torch.logsumexp(logits, dim=1))
        sigmoid_area = (logits.sigmoid() >= mask_threshold).sum(dim=(2, 3), dtype=torch.int32)  # [B, Q]
        label = torch.where(probability >= mask_threshold, label, 0).to(torch.uint8)
        confidence = (probability * 255.0).round().to(torch.uint8)
        outputs: tuple[Tensor, ...] = (label, confidence, sigmoid_area)
        if category_logits is not None:
            factor = 2**self.mask_vae.config.num_upscalers  # of the shapes it would be a symbol
            category, category_score = slot_categories(mask_logits, category_logits, factor=factor)  # [B, Q]
            outputs = (*outputs, category.to(torch.int32), category_score)
        return (*outputs, *all_logits) if self.head == "both" else outputs


def build_graph(spec: GraphSpec, info: ModelInfo, networks: dict[str, Any], head: str = "panoptic") -> nn.Module:
    """Builds the module behind a spec.

    Args:
        spec: of the graph.
        info: of the model.
        networks: the components that the graph needs, by name; with trained queries `conditioning` too.
        head: of the mask decoder, one of `specs.HEADS`.
    """
    if spec.kind == "image_encoder":
        module: nn.Module = ImageEncoderGraph(networks["image_vae"])
    elif spec.kind == "mask_decoder":
        module = MaskDecoderGraph(networks["mask_vae"], head)
    else:
        unet = networks["unet"]
        if info.conditioning == "learned":
            unet = WithQueries(unet, networks["conditioning"].queries)
        module = DenoiserGraph(unet, info.scheduler.prediction_type)
        if spec.kind == "sampler":
            module = SamplerGraph(module, int(spec.tensors["timesteps"].shape[0]), info.self_condition)
    return module.eval()
