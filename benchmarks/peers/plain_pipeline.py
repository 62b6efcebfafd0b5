"""Runs the loop that a user would write with diffusers' own parts: the baseline of every latency and throughput row.

diffusers' UNet2DConditionModel (cross-attention taken out), DDIMScheduler, its AutoencoderKL where the model has one,
float32 logits of every slot at the picture's size, Pillow and torch in the obvious way. Same weights as ours. Where
diffusers is not installed, the same network and loop in plain torch stand in, and the rows are called "plain torch".
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ldmseg_fast.backends.model_info import ModelInfo
from ldmseg_fast.checkpoints.model_folder import load_component, load_component_config
from ldmseg_fast.config import PostprocessConfig, UNetConfig
from ldmseg_fast.config.categories import CategoryTable
from ldmseg_fast.diffusion.scheduler import Scheduler
from ldmseg_fast.kernels.backend import KERNELS, backend
from ldmseg_fast.panoptic.postprocess import PanopticResult

HAS_DIFFUSERS = importlib.util.find_spec("diffusers") is not None


def diffusers_unet(config: UNetConfig) -> Any:
    """Returns diffusers' UNet of this configuration in evaluation mode, without cross-attention as the method has it.

    Raises:
        ValueError: a configuration that diffusers does not have.
    """
    from diffusers import UNet2DConditionModel

    if config.cross_attention_dim or config.separate_conv_in or config.separate_image_encoder:
        raise ValueError("the plain loop knows UNets without conditioning and with one input convolution only")
    names = ["CrossAttn" if attended else "" for attended in config.attention]
    unet: Any = UNet2DConditionModel(
        sample_size=config.sample_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=config.block_out_channels,
        down_block_types=tuple(f"{name}DownBlock2D" for name in names),
        mid_block_type="UNetMidBlock2DCrossAttn" if config.mid_attention else "UNetMidBlock2D",
        up_block_types=tuple(f"{name}UpBlock2D" for name in reversed(names)),
        layers_per_block=config.layers_per_block,
        attention_head_dim=config.num_heads,
        norm_num_groups=config.norm_groups,
        norm_eps=config.norm_eps,
        cross_attention_dim=8,  # of layers that go at once
        use_linear_projection=config.linear_projection,
        transformer_layers_per_block=config.transformer_layers,
    )
    for module in unet.modules():
        if hasattr(module, "attn2"):
            module.attn2, module.norm2 = None, None
    return unet.eval().requires_grad_(False)


def diffusers_scheduler(info: ModelInfo) -> Any:
    """Returns a DDIMScheduler with the model's schedule.

    It takes the same times as ours where the steps divide the schedule's length.
    """
    from diffusers import DDIMScheduler

    config = info.scheduler
    return DDIMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.beta_schedule,
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type=config.prediction_type,
        timestep_spacing=config.timestep_spacing,
        rescale_betas_zero_snr=config.rescale_zero_snr,
    )


class TorchUNet(nn.Module):
    """Wraps our network in plain torch as diffusers' is called."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, time: Tensor, encoder_hidden_states: None = None) -> SimpleNamespace:
        with plain_kernels():
            return SimpleNamespace(sample=self.unet(sample, time.expand(len(sample))))


class TorchScheduler:
    """Steps by DDIM with eta 0 (Song et al. 2021, equation 12), called as diffusers' DDIMScheduler is."""

    def __init__(self, info: ModelInfo) -> None:
        self.ours = Scheduler(info.scheduler)

    def set_timesteps(self, steps: int, device: torch.device) -> None:
        times, previous = self.ours.timesteps(steps)
        self.timesteps = torch.tensor(times, device=device)
        self.previous = dict(zip(times, previous))
        self.ours.to(device)

    def step(self, model_output: Tensor, time: Tensor, latents: Tensor) -> SimpleNamespace:
        alphas = self.ours.alphas_cumprod
        estimate = self.ours.pred_original_sample(model_output, latents, time.expand(len(latents)))
        noise = (latents - alphas[time].sqrt() * estimate) / (1 - alphas[time]).sqrt()
        alpha = alphas[max(self.previous[int(time)], 0)]
        prev_sample = alpha.sqrt() * estimate + (1 - alpha).sqrt() * noise
        return SimpleNamespace(prev_sample=prev_sample, pred_original_sample=estimate)


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Runs what the baseline shares with us in plain torch within the block."""
    with ExitStack() as stack:
        for kernel in KERNELS:
            stack.enter_context(backend(kernel, "torch"))
        yield


class PlainPipeline:
    """Holds the stages of a picture's way, each in the obvious form.

    Args:
        info: of the model folder.
        device, dtype: of the networks.
        attention: "sdpa" or "xformers".
        compiled: torch.compile of the UNet, on a GPU with mode="max-autotune", as diffusers' documentation has it.
        float8: the UNet's linear layers in e4m3 with dynamic scales, by torchao.
    """

    def __init__(
        self,
        info: ModelInfo,
        device: str,
        dtype: torch.dtype,
        attention: str = "sdpa",
        compiled: bool = False,
        float8: bool = False,
    ) -> None:
        self.info, self.device, self.dtype = info, torch.device(device), dtype
        unet = self._unet().to(self.device, dtype)
        if attention == "xformers":
            unet.enable_xformers_memory_efficient_attention()
        if float8:
            from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, quantize_

            quantize_(unet, Float8DynamicActivationFloat8WeightConfig())
        mode = "max-autotune" if self.device.type == "cuda" else None
        self.unet = torch.compile(unet, mode=mode) if compiled else unet
        self.scheduler = diffusers_scheduler(info) if HAS_DIFFUSERS else TorchScheduler(info)
        self.encoder: Any = self._encoder().to(self.device, dtype)
        self.image_scale = load_component_config(info.folder, "image_vae")[0].scaling_factor
        self.mask_vae: Any = load_component(info.folder, "mask_vae").to(self.device, dtype)

    def _unet(self) -> Any:
        ours = load_component(self.info.folder, "unet", "sdpa")
        if not HAS_DIFFUSERS:
            return TorchUNet(ours)
        theirs = diffusers_unet(load_component_config(self.info.folder, "unet")[0])
        theirs.load_state_dict(ours.state_dict())
        return theirs

    def _encoder(self) -> nn.Module:
        ours = load_component(self.info.folder, "image_vae")
        if not (HAS_DIFFUSERS and hasattr(ours, "vae_config")):
            return ours
        from diffusers import AutoencoderKL

        theirs = AutoencoderKL.from_config(ours.vae_config)
        theirs.load_state_dict(ours.state_dict(), strict=False)
        theirs.decoder = None
        return theirs.eval().requires_grad_(False)

    def decode_file(self, path: Path) -> np.ndarray:
        return np.array(Image.open(path).convert("RGB"))

    def preprocess(self, images: list[np.ndarray]) -> Tensor:
        """uint8 [H, W, 3] each -> float [B, 3, S, S] in [0, 255] on the device."""
        side = (self.info.picture_size,) * 2
        pixels = [np.array(Image.fromarray(image).resize(side, Image.Resampling.BICUBIC)) for image in images]
        return torch.stack([torch.from_numpy(each).permute(2, 0, 1).float() for each in pixels]).to(self.device)

    @torch.inference_mode()
    def encode(self, inputs: Tensor) -> Tensor:
        if hasattr(self.encoder, "encode"):  # AutoencoderKL
            return self.encoder.encode((inputs / 127.5 - 1.0).to(self.dtype)).latent_dist.mode() * self.image_scale
        with plain_kernels():
            return self.encoder(inputs)

    @torch.inference_mode()
    def sample(self, noise: Tensor, image_latents: Tensor, steps: int) -> Tensor:
        """The last estimate of x_0, [B, C, h, w]."""
        self.scheduler.set_timesteps(steps, device=self.device)
        latents = noise.to(self.device)
        estimate = torch.zeros_like(latents)
        for time in self.scheduler.timesteps:
            parts = [latents, image_latents] + ([estimate] if self.info.self_condition else [])
            sample = torch.cat([part.to(self.dtype) for part in parts], dim=1)
            model_output = self.unet(sample, time, encoder_hidden_states=None).sample
            step = self.scheduler.step(model_output.float(), time, latents)
            latents, estimate = step.prev_sample, step.pred_original_sample
        return estimate

    @torch.inference_mode()
    def finish(self, latents: Tensor, sizes: list[tuple[int, int]]) -> list[PanopticResult]:
        with plain_kernels():
            decoded, named = self.mask_vae.decode_both((latents / self.info.mask_vae.scaling_factor).to(self.dtype))
        logits = F.interpolate(decoded.float(), (self.info.image_size,) * 2, mode="bilinear", align_corners=False)
        results = []
        for image, (one, size) in enumerate(zip(logits, sizes)):
            full = F.interpolate(one[None], size, mode="bilinear", align_corners=False)[0]  # [Q, H, W]
            results.append(plain_postprocess(full, self.info.postprocess))
            if named is not None and self.info.categories is not None:
                plain_names(results[-1], decoded[image].float(), named[image].float(), self.info.categories)
        return results

    def write(self, result: PanopticResult, path: Path) -> None:
        ids = result.segmentation
        rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
        Image.fromarray(rgb).save(path)
        path.with_suffix(".json").write_text(json.dumps(result.segments_info), encoding="utf-8")

    def whole(self, images: list[np.ndarray], noise: Tensor, steps: int) -> list[PanopticResult]:
        latents = self.sample(noise, self.encode(self.preprocess(images)), steps)
        return self.finish(latents, [image.shape[:2] for image in images])


def plain_postprocess(logits: Tensor, thresholds: PostprocessConfig) -> PanopticResult:
    """Turns logits [Q, H, W] at the picture's size into map and segments, by the paper's formulas, slot by slot."""
    probability, label = logits.softmax(dim=0).max(dim=0)
    confident = probability >= thresholds.mask_threshold
    segmentation = torch.zeros_like(label, dtype=torch.int32)
    segments_info: list[dict[str, Any]] = []
    for slot in label.unique().tolist():
        mask = (label == slot) & confident
        area = mask.sum().item()
        whole = (logits[slot].sigmoid() >= thresholds.mask_threshold).sum().item()
        if slot == 0 or area == 0 or area < thresholds.count_threshold:
            continue
        if whole and area / whole < thresholds.overlap_threshold:
            continue
        segmentation[mask] = slot + 1
        y, x = torch.where(mask)
        box = [x.min().item(), y.min().item()]
        box += [x.max().item() - box[0] + 1, y.max().item() - box[1] + 1]
        score = probability[mask].mean().item()
        segments_info.append(
            {"id": slot + 1, "category_id": 1, "isthing": True, "iscrowd": 0, "area": area, "bbox": box, "score": score}
        )
    return PanopticResult(segmentation.cpu().numpy(), segments_info)


def plain_names(result: PanopticResult, logits: Tensor, category_logits: Tensor, table: CategoryTable) -> None:
    """Names segments slot by slot, and makes one of all stuff of a category, in place.

    Logits are those of the decoder, float [Q, h, w] and [C + 1, h / f, w / f].
    """
    slots = logits.softmax(dim=0)
    categories = F.interpolate(category_logits[None], slots.shape[-2:], mode="nearest")[0].softmax(dim=0)
    first: dict[int, dict[str, Any]] = {}
    for segment in list(result.segments_info):
        number = (slots[segment["id"] - 1] * categories).sum(dim=(1, 2))[1:].argmax().item() + 1
        segment |= {"category_id": table[number].id, "name": table[number].name, "isthing": table[number].isthing}
        other = segment if segment["isthing"] else first.setdefault(number, segment)
        if other is not segment:
            result.segmentation[result.segmentation == segment["id"]] = other["id"]
            result.segments_info.remove(segment)
            y, x = np.nonzero(result.segmentation == other["id"])
            left, top = int(x.min()), int(y.min())
            other["bbox"] = [left, top, int(x.max()) - left + 1, int(y.max()) - top + 1]
            area = other["area"] + segment["area"]
            other["score"] = (other["score"] * other["area"] + segment["score"] * segment["area"]) / area
            other["area"] = area
