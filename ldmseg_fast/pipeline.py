"""Image -> panoptic map."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldmseg_fast.backends import Backend, load_backend
from ldmseg_fast.config import PostprocessConfig
from ldmseg_fast.data.transforms import resize_image
from ldmseg_fast.diffusion.sampler import Callback, ddim, image_noise
from ldmseg_fast.diffusion.scheduler import Scheduler
from ldmseg_fast.panoptic import PanopticResult

OUTPUT_TYPES = ("panoptic", "logits", "latent")


class LDMSegPipeline:
    """Latent-diffusion panoptic segmentation (arXiv 2401.10227) of whole images.

    >>> pipe = LDMSegPipeline.from_pretrained("runs/diffusion")
    >>> result = pipe(Image.open("street.jpg"))[0]
    >>> result.segmentation.shape, len(result.segments_info)
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.info = backend.info
        self.scheduler = Scheduler(self.info.scheduler).to(backend.device)

    @classmethod
    def from_pretrained(
        cls,
        model_dir: str | Path,
        backend: str = "torch",
        engine_dir: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> LDMSegPipeline:
        """The model in a folder.

        Args:
            model_dir: a MODEL_DIR that training or `ldmseg convert` wrote.
            backend: "torch", "compile", "onnxruntime" or "tensorrt".
            engine_dir: exported graphs or engines, for the last two.
            device, dtype: of the torch backends; default the first GPU in bfloat16, or the CPU in float32.

        Raises:
            CheckpointError: no model folder, or a damaged one.
            BackendError: a backend that cannot run here.
        """
        return cls(load_backend(model_dir, backend, engine_dir, device, dtype))

    def save_pretrained(self, folder: str | Path) -> None:
        """A copy of the model folder, bit for bit. Raises FileExistsError where `folder` already holds something."""
        import shutil

        target = Path(folder)
        if target.exists() and any(target.iterdir()):
            raise FileExistsError(f"{target}: not empty; choose another folder, or remove it first")
        target.mkdir(parents=True, exist_ok=True)
        for name in ("model_index.json", "README.md"):
            if (self.info.folder / name).is_file():
                shutil.copy2(self.info.folder / name, target)
        for name in self.info.index["components"]:
            shutil.copytree(self.info.folder / name, target / name)

    @torch.inference_mode()
    def __call__(
        self,
        images: Any,
        num_inference_steps: int | None = None,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        output_type: str = "panoptic",
        *,
        seed: int = 0,
        image_ids: Sequence[int | str] | None = None,
        thresholds: PostprocessConfig | None = None,
        batch_size: int = 16,
        captions: Sequence[str] | None = None,
        callback: Callback | None = None,
    ) -> list[PanopticResult] | Tensor:
        """Segment images.

        Args:
            images: PIL images or uint8 arrays [H, W, 3] of any sizes; one, or a sequence.
            num_inference_steps: UNet evaluations; default the model's own.
            generator: draws the initial noise, in the order of the images.
            latents: the initial noise itself, [B, C, h, w].
            output_type: "panoptic", "logits" or "latent".
            seed, image_ids: without `generator` and `latents` each image's noise comes from (seed, id), so that a
                result does not depend on the batch; the ids default to 0, 1, 2, ...
            thresholds: of the post-processing; default the model's own.
            batch_size: how many images go through the networks at once.
            captions: one per image, of models with unet.conditioning=clip_text.
            callback: see `diffusion.sampler.Callback`.

        Returns:
            "panoptic": a PanopticResult per image, at its own size. "logits": [B, Q, S, S] at the network's size.
            "latent": the sampler's output [B, C, h, w], still scaled.

        Raises:
            ValueError: an image that is none, an unknown output_type, latents or captions that do not fit.
        """
        # 1. Check the input
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r}: one of {', '.join(OUTPUT_TYPES)} expected")
        arrays = [as_array(image, index) for index, image in enumerate(_as_list(images))]
        steps = self.info.num_inference_steps if num_inference_steps is None else num_inference_steps
        self.scheduler.timesteps(steps)  # a number of steps that cannot be is refused before any work

        if captions is not None and (self.info.conditioning != "clip_text" or len(captions) != len(arrays)):
            raise ValueError(
                f"captions: {len(captions)} for {len(arrays)} images of a model with unet.conditioning="
                f"{self.info.conditioning}; clip_text takes one per image, the others none"
            )

        # 2. Initial noise, on the CPU, so that a seed means the same on every device
        shape = self.info.latent_shape
        noise = self._initial_noise(len(arrays), shape, generator, latents, seed, image_ids)  # [B, C, h, w]

        outputs: list[Any] = []
        for start in range(0, len(arrays), batch_size):
            chunk = arrays[start : start + batch_size]
            # 3. Pictures at the network's size
            pixels = np.stack([resize_image(array, self.info.image_size) for array in chunk])  # [B, S, S, 3]
            inputs = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self.backend.device)  # [B, 3, S, S]

            # 4. Image latents
            image_latents = self.backend.encode_image(inputs)  # [B, C_image, h, w]

            # 5. Denoise
            chunk_noise = noise[start : start + batch_size].to(self.backend.device)
            if self.info.conditioning == "none":
                mask_latents = self.backend.sample(chunk_noise, image_latents, self.scheduler, steps, callback)
            else:
                backend: Any = self.backend  # PyTorch's: `load_backend` gives no other for such a model
                denoise = backend.conditioned(inputs, captions and captions[start : start + batch_size])
                self_condition = self.info.self_condition
                mask_latents = ddim(
                    denoise, chunk_noise, image_latents, self.scheduler, steps, self_condition, callback
                )  # [B, C, h, w]

            # 6. Decode
            if output_type == "latent":
                outputs.append(mask_latents)
            elif output_type == "logits":
                size = (self.info.image_size, self.info.image_size)
                outputs.append(self.backend.decode_mask(mask_latents, size, "logits"))
            else:
                outputs += self._decode(mask_latents, [array.shape[:2] for array in chunk], thresholds)
        if output_type == "panoptic":
            return outputs
        return torch.cat(outputs) if outputs else torch.empty(0, *shape)

    def _initial_noise(
        self,
        count: int,
        shape: tuple[int, int, int],
        generator: torch.Generator | None,
        latents: Tensor | None,
        seed: int,
        image_ids: Sequence[int | str] | None,
    ) -> Tensor:
        if latents is not None:
            if tuple(latents.shape) != (count, *shape):
                raise ValueError(f"latents: shape {tuple(latents.shape)}, expected {(count, *shape)}")
            return latents.float()
        if generator is not None:
            return torch.randn(count, *shape, generator=generator, device=generator.device)
        ids = list(range(count)) if image_ids is None else list(image_ids)
        if len(ids) != count:
            raise ValueError(f"image_ids: {len(ids)} ids for {count} images")
        return image_noise(seed, ids, shape)

    def _decode(
        self, mask_latents: Tensor, sizes: list[tuple[int, int]], thresholds: PostprocessConfig | None
    ) -> list[PanopticResult]:
        """Maps at each image's own size; images of one size are decoded together."""
        results: dict[int, PanopticResult] = {}
        for size in dict.fromkeys(sizes):
            rows = [row for row, other in enumerate(sizes) if other == size]
            decoded = self.backend.decode_mask(mask_latents[rows], size, "panoptic", thresholds)
            results.update(zip(rows, decoded))
        return [results[row] for row in range(len(sizes))]


def _as_list(images: Any) -> list[Any]:
    if isinstance(images, (Image.Image, np.ndarray)) and not (isinstance(images, np.ndarray) and images.ndim == 4):
        return [images]
    return list(images)


def as_array(image: Any, index: int = 0) -> np.ndarray:
    """A PIL image of any mode, or a uint8 array [H, W, 3], as uint8 [H, W, 3]. Raises ValueError naming its place."""
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ValueError(
            f"images[{index}]: {array.dtype} of shape {array.shape}; give PIL images or uint8 arrays [H, W, 3]"
        )
    return array
