"""Image -> panoptic map."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldmseg_fast.backends.backend import Backend
from ldmseg_fast.backends.load import load_backend
from ldmseg_fast.config import PostprocessConfig
from ldmseg_fast.diffusion.sampler import Callback
from ldmseg_fast.diffusion.solvers import Timesteps
from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.inference.sampling import MaskSampler
from ldmseg_fast.panoptic.postprocess import PanopticResult

if TYPE_CHECKING:
    from ldmseg_fast.inference.ensemble import EnsembleResult

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
        self.sampler = MaskSampler(backend)
        self.scheduler = self.sampler.scheduler

    @classmethod
    def from_pretrained(
        cls,
        model_dir: str | Path,
        backend: str = "torch",
        engine_dir: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        image_size: int | None = None,
        attention: str = "auto",
    ) -> LDMSegPipeline:
        """The model in a folder.

        Args:
            model_dir: a MODEL_DIR that training or `ldmseg convert` wrote.
            backend: "torch", "compile", "onnxruntime" or "tensorrt".
            engine_dir: exported graphs or engines, for the last two.
            device, dtype: of the torch backends; default the first GPU in bfloat16, or the CPU in float32.
            image_size: side in pixels of what the networks see; default the model's own. Pictures are resized to it,
                so a model does best at the size that it was trained at.
            attention: of the torch backends: "auto", "triton", "sdpa", "xformers", or "fp8", products of e4m3 numbers
                on GPUs of sm_89 and newer; see `models.attention.attention`.

        Raises:
            ArgumentError: an unknown `attention`.
            CheckpointError: no model folder, or a damaged one.
            BackendError: a backend or an `attention` that cannot run here, or a size that the model or its graphs do
                not take.
        """
        return cls(load_backend(model_dir, backend, engine_dir, device, dtype, image_size, attention))

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
        solver: str = "ddim",
        eta: float = 0.0,
        timesteps: Timesteps = None,
        cache_interval: int = 1,
        cache_branch: int = 0,
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
            solver, eta, timesteps: see `diffusion.solvers.sample`; the noise of eta > 0 comes from (seed, id) too.
            cache_interval: compute the deep part of the UNet each so many evaluations only (DeepCache); 1: each time.
                Of the torch backends.
            cache_branch: the skip connection, counted from the outermost, below which features are kept.

        Returns:
            "panoptic": a PanopticResult per image, at its own size. "logits": [B, Q, S, S] at the network's size.
            "latent": the sampler's output [B, C, h, w], still scaled.

        Raises:
            ArgumentError: an image that is none, an unknown output_type or solver, timesteps, latents or captions that
                do not fit.
        """
        # 1. Check the input
        if output_type not in OUTPUT_TYPES:
            raise ArgumentError(f"output_type={output_type!r}: one of {', '.join(OUTPUT_TYPES)} expected")
        arrays = [as_array(image, index) for index, image in enumerate(_as_list(images))]
        sampling = self.sampler.settings(
            num_inference_steps,
            solver=solver,
            eta=eta,
            timesteps=timesteps,
            seed=seed,
            callback=callback,
            cache_interval=cache_interval,
            cache_branch=cache_branch,
        )
        if captions is not None and (self.info.conditioning != "clip_text" or len(captions) != len(arrays)):
            raise ArgumentError(
                f"captions: {len(captions)} for {len(arrays)} images of a model with unet.conditioning="
                f"{self.info.conditioning}; clip_text takes one per image, the others none"
            )

        # 2. Initial noise, on the CPU, so that a seed means the same on every device
        ids = _image_ids(len(arrays), image_ids)
        noise = self._initial_noise(generator, latents, seed, ids)  # [B, C, h, w]

        outputs: list[Any] = []
        for start in range(0, len(arrays), batch_size):
            chunk = slice(start, start + batch_size)
            # 3. - 5. Picture, image latents, denoising
            mask_latents = self.sampler.latents(
                arrays[chunk], noise[chunk], ids[chunk], sampling, captions and captions[chunk]
            )  # [B, C, h, w]

            # 6. Decode
            if output_type == "latent":
                outputs.append(mask_latents)
            elif output_type == "logits":
                size = (self.info.image_size, self.info.image_size)
                outputs.append(self.backend.decode_mask(mask_latents, size, "logits"))
            else:
                outputs += self.sampler.decode(mask_latents, [array.shape[:2] for array in arrays[chunk]], thresholds)
        if output_type == "panoptic":
            return outputs
        return torch.cat(outputs) if outputs else torch.empty(0, *self.info.latent_shape)

    def ensemble(
        self, images: Any, num_samples: int = 8, *, seed: int = 0, batch_size: int = 16, **settings: Any
    ) -> list[EnsembleResult]:
        """Segment images `num_samples` times, from noise of the seeds seed, seed + 1, ..., and compare the results.

        Args:
            images: as in `__call__`.
            num_samples: k.
            seed, batch_size: as in `__call__`.
            settings: further arguments of `__call__`.

        Returns:
            An EnsembleResult per image: the sample that agrees best with the others, with a map of agreement.

        Raises:
            ArgumentError: fewer than 1 sample; what `__call__` refuses.
        """
        from ldmseg_fast.inference.ensemble import combine

        if num_samples < 1:
            raise ArgumentError(f"num_samples={num_samples}: at least 1")
        refused = settings.keys() & {"generator", "latents", "output_type"}
        if refused:
            raise ArgumentError(
                f"{', '.join(sorted(refused))}: an ensemble's noise comes from its seeds, its results are maps"
            )
        images = _as_list(images)
        per_image = {key: settings.pop(key, None) for key in ("image_ids", "captions")}
        per_image["image_ids"] = _image_ids(len(images), per_image["image_ids"])
        results: list[EnsembleResult] = []
        for start in range(0, len(images), batch_size):
            chunk = slice(start, start + batch_size)
            own = {key: values and values[chunk] for key, values in per_image.items()}
            samples: list[Any] = [
                self(images[chunk], seed=seed + sample, batch_size=batch_size, **own, **settings)
                for sample in range(num_samples)
            ]
            results += [combine(of_one_image) for of_one_image in zip(*samples)]
        return results

    @torch.inference_mode()
    def inpaint(
        self,
        images: Any,
        segmentations: Any,
        known_masks: Any,
        num_inference_steps: int | None = None,
        *,
        seed: int = 0,
        image_ids: Sequence[int | str] | None = None,
        thresholds: PostprocessConfig | None = None,
        batch_size: int = 16,
        solver: str = "ddim",
        eta: float = 0.0,
        timesteps: Timesteps = None,
        callback: Callback | None = None,
        method: str | None = None,
        draft_steps: int = 4,
    ) -> list[PanopticResult]:
        """Complete panoptic maps: given pixels stay exactly as they are, the model finds the rest.

        A given segment keeps its id and may grow into what was not given; new segments get unused ids. A given pixel
        of id 0 stays void.

        Args:
            images: as in `__call__`.
            segmentations: integer ids [H, W] of each image's size, 0..2^24-1, 0 = void; where nothing is given the
                value does not matter.
            known_masks: bool [H, W], True where the map is given.
            num_inference_steps, seed, image_ids, thresholds, batch_size, solver, eta, timesteps, callback: as in
                `__call__`.
            method: how the given pixels enter: "pixels" (`inpainting.KnownPixels`), or with whole latent cells held
                "estimate" or "renoise" (`diffusion.inpainting.KnownLatents`). Default "estimate" for models that were
                trained for it (diffusion.inpainting), "pixels" for the others.
            draft_steps: evaluations, at most `num_inference_steps`, of a draft that does not know the map: a given
                segment gets the slot that the draft has for it (`inpainting.follow_draft`). 0: no draft, slots by
                the scheme of the model's training, which cannot know of hidden segments.

        Returns:
            A PanopticResult per image, at its own size; its entries have "given" beside the usual ones.

        Raises:
            ArgumentError: an image that is none, a map or mask that does not fit it, an unknown method or solver.
        """
        from ldmseg_fast.inference import inpainting

        arrays = [as_array(image, index) for index, image in enumerate(_as_list(images))]
        maps, masks = (_as_list(values) for values in (segmentations, known_masks))
        inpainting.check_given([array.shape[:2] for array in arrays], maps, masks)
        sampling = self.sampler.settings(
            num_inference_steps, solver=solver, eta=eta, timesteps=timesteps, seed=seed, callback=callback
        )
        ids = _image_ids(len(arrays), image_ids)
        results: list[PanopticResult] = []
        for start in range(0, len(arrays), batch_size):
            chunk = slice(start, start + batch_size)
            batch = (arrays[chunk], maps[chunk], masks[chunk], ids[chunk])
            results += inpainting.inpaint(self.sampler, *batch, sampling, thresholds, method, draft_steps)
        return results

    def _initial_noise(
        self, generator: torch.Generator | None, latents: Tensor | None, seed: int, ids: Sequence[int | str]
    ) -> Tensor:
        shape = (len(ids), *self.info.latent_shape)
        if latents is not None:
            if tuple(latents.shape) != shape:
                raise ArgumentError(f"latents: shape {tuple(latents.shape)}, expected {shape}")
            return latents.float()
        if generator is not None:
            return torch.randn(shape, generator=generator, device=generator.device)
        return self.sampler.noise(seed, ids)


def _image_ids(count: int, image_ids: Sequence[int | str] | None) -> list[int | str]:
    ids: list[int | str] = [*range(count)] if image_ids is None else list(image_ids)
    if len(ids) != count:
        raise ArgumentError(f"image_ids: {len(ids)} ids for {count} images")
    return ids


def _as_list(images: Any) -> list[Any]:
    if isinstance(images, (Image.Image, np.ndarray)) and not (isinstance(images, np.ndarray) and images.ndim == 4):
        return [images]
    return list(images)


def as_array(image: Any, index: int = 0) -> np.ndarray:
    """A PIL image of any mode, or a uint8 array [H, W, 3], as uint8 [H, W, 3].

    Raises:
        ArgumentError: anything else; `index` names its place.
    """
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ArgumentError(
            f"images[{index}]: {array.dtype} of shape {array.shape}; give PIL images or uint8 arrays [H, W, 3]"
        )
    return array
