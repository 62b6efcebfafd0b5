"""Segments images: the method's ten steps in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldmseg_fast.backends.backend import Backend
from ldmseg_fast.backends.load import load_backend
from ldmseg_fast.checkpoints.model_folder import copy_model
from ldmseg_fast.checkpoints.shipped import resolve_model_dir
from ldmseg_fast.config import PostprocessConfig
from ldmseg_fast.data.pictures import MAX_PIXELS, Picture
from ldmseg_fast.diffusion.sampler import Callback
from ldmseg_fast.diffusion.solvers import Timesteps
from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.inference.edges import MAX_RADIUS
from ldmseg_fast.inference.inputs import (
    MAX_SEED,
    as_array,
    as_list,
    batches_of,
    check_count,
    check_given,
    check_images,
    check_sizes,
    check_thresholds,
    given_categories,
    image_ids_of,
    scaled_picture,
)
from ldmseg_fast.inference.memory import says_size
from ldmseg_fast.inference.sampling import MAX_STEPS, MaskSampler
from ldmseg_fast.panoptic.postprocess import PanopticResult
from ldmseg_fast.panoptic.postprocess import connected as in_pieces

if TYPE_CHECKING:
    from ldmseg_fast.inference.ensemble import EnsembleResult

OUTPUT_TYPES = ("panoptic", "logits", "latent")
MAX_SAMPLES = 1000  # of an ensemble
MAX_SIZE = 16384  # pixels of the networks' side


class LDMSegPipeline:
    """Segments whole images by latent diffusion (LDMSeg, arXiv 2401.10227).

    Attributes:
        max_pixels: of a file or PIL image; more are refused before they are decoded.

    Examples:
        >>> pipe = LDMSegPipeline.from_pretrained("runs/diffusion")
        >>> result = pipe(Image.open("street.jpg"))[0]
        >>> result.segmentation.shape, len(result.segments_info)
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.info = backend.info
        self.sampler = MaskSampler(backend)
        self.scheduler = self.sampler.scheduler
        self.max_pixels = MAX_PIXELS

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
        *,
        cuda_graph: bool | None = None,
        fused: bool | str = False,
        class_agnostic: bool = False,
        precision: str | None = None,
        lanes: int = 1,
        threads: int | None = None,
        profile: int | None = None,
        kernel_specialization: str | None = None,
        graph_strategy: str | None = None,
        revision: str | None = None,
    ) -> LDMSegPipeline:
        """Loads the model in a folder, or of the Hugging Face Hub.

        Args:
            model_dir: a MODEL_DIR that training or `ldmseg convert` wrote, the name of a shipped model ("tiny"), or
                "owner/name" or "owner/name@revision" of a model of the Hub. A folder that is there goes first.
            backend: "torch", "compile", "onnxruntime" or "tensorrt".
            engine_dir: exported graphs or engines, for the last two.
            device, dtype: of the torch backends; default the first GPU in bfloat16, or the CPU in float32.
            image_size: side in pixels of what the networks see; default the model's own. Pictures are resized to it,
                so a model does best at the size that it was trained at.
            attention: of the torch backends: "auto", "triton", "sdpa", "xformers", or "fp8", products of e4m3 numbers
                on GPUs of sm_89 and newer, elsewhere left out with a warning; see `models.attention.attention`.
            cuda_graph: run the sampling loop as one CUDA graph. None: on a GPU, but not with onnxruntime. A loop that
                cannot be captured runs without, with a warning.
            fused: of the torch backend: run the UNet with few launches, for a GPU. The results are the same within
                rounding. "epilogues" takes still fewer: our own kernels multiply and convolve, and what makes features
                also makes the moments of their normalisation. No GPU has timed either yet, so it is off by default. A
                network without such a form runs as it is, with a warning.
            class_agnostic: leave the categories of a model that has them out: segments are objects, and two of stuff
                stay two.
            precision: of the torch backends, in the place of `dtype`: "fp32", "tf32" (float32 whose products a GPU
                rounds to TF32 in our calls; with "fp32" it does what the process says), "bf16", "fp16", or "fp8", with
                which the UNet multiplies e4m3 numbers on GPUs of sm_89 and newer. Elsewhere these are left out, with a
                warning;
                "fp8-emulated" computes its numbers on any device, to see what they cost in quality.
            lanes: how many threads can be inside the graphs or engines at a time, each with its own buffers.
            threads: of ONNX Runtime on a CPU; default torch's.
            profile: which of the engines' optimisation profiles to run, by its place; default the narrowest that fits.
            kernel_specialization: of engines of TensorRT-RTX: kernels for the shapes at hand are compiled beside the
                first runs ("lazy"), before them ("eager"), or not at all ("none"). Default "eager" where the sampling
                loop is a CUDA graph, which keeps the kernels that it was captured with; otherwise "lazy".
            graph_strategy: of the same: "whole_graph_capture" leaves CUDA graphs to TensorRT-RTX; default "disabled".
            revision: branch, tag or commit of a model of the Hub; default its main branch.

        Raises:
            ArgumentError: an unknown `attention` or `precision`, or both `precision` and `dtype`, an image_size out of
                range, a revision of a local folder.
            CheckpointError: no model folder, or a damaged one.
            HubError: a wrong name, no access, or no connection and nothing in the cache.
            BackendError: a backend or an `attention` that cannot run here, an option that the backend cannot use, a
                size that the model or its graphs do not take, cuda_graph=True without a GPU, or `fused` or `precision`
                for exported graphs.
        """
        if image_size is not None:
            check_count("image_size", image_size, 1, MAX_SIZE)
        folder = resolve_model_dir(model_dir, revision)
        speed: dict[str, Any] = {"cuda_graph": cuda_graph, "fused": fused, "precision": precision}
        speed |= {"lanes": lanes, "threads": threads, "profile": profile}
        speed |= {"kernel_specialization": kernel_specialization, "graph_strategy": graph_strategy}
        loaded = load_backend(folder, backend, engine_dir, device, dtype, image_size, attention, **speed)
        if class_agnostic:
            loaded.info = replace(loaded.info, categories=None)
        return cls(loaded)

    def save_pretrained(self, folder: str | Path) -> None:
        """Copies the model itself, bit for bit; see `checkpoints.model_folder.copy_model`.

        Raises:
            FileExistsError: `folder` already holds something.
        """
        copy_model(self.info.folder, Path(folder))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str = "main",
        message: str | None = None,
        create_pr: bool = False,
        license: str | None = None,
    ) -> str:
        """Sends the model to the Hugging Face Hub, with a model card; see `checkpoints.hub_push.push`.

        Args:
            repo_id: "owner/name"; it is made where it is missing.
            private: whether a repository that is made now is private; None: as the account has it.
            revision: the branch; one that is missing is made from main.
            message: of the commit; None: composed.
            create_pr: open a pull request against main instead.
            license: identifier of the weights' licence, for the card; None: what the model's card says.

        Returns:
            The address of the commit or the pull request.

        Raises:
            ArgumentError: a name or a branch that cannot be.
            CheckpointError: a damaged folder.
            HubError: no token, no access, or no connection.
        """
        from ldmseg_fast.checkpoints.hub_card import CardFacts
        from ldmseg_fast.checkpoints.hub_push import PushSettings, push

        facts = CardFacts(license=license)
        settings = PushSettings(private, revision, message, create_pr, facts=facts)
        return push(self.info.folder, repo_id, settings)

    @torch.inference_mode()
    @says_size
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
        exif: bool = True,
        connected: int = 0,
    ) -> list[PanopticResult] | Tensor:
        """Segments images.

        Shapes in the comments: N images, B in a batch, H W an image's own size, S the network's side, h w latent cells,
        C and C_image channels of mask and image latents, M context tokens of width D, Q slots.

        Args:
            images: PIL images, paths of files, or arrays or tensors [H, W, 3] of uint8, uint16 (scaled to 8 bits) or
                bool, of any sizes; one, or a sequence. Alpha is dropped, and of several frames a file's first or the
                PIL image's present one is taken. Floats have no defined range and are refused.
            num_inference_steps: UNet evaluations, at most as many as the schedule has; default the model's own.
            generator: draws the initial noise, in the order of the images.
            latents: the initial noise itself, float [N, C, h, w].
            output_type: "panoptic", "logits" or "latent".
            seed, image_ids: without `generator` and `latents` each image's noise comes from (seed, id), so that a
                result does not depend on the batch; the ids default to 0, 1, 2, ... Seeds are 0 to 2^63 - 1.
            thresholds: of the post-processing; default the model's own.
            batch_size: how many images go through the networks at once, at most 4096.
            captions: one per image, of models with unet.conditioning=clip_text.
            callback: see `diffusion.sampler.Callback`.
            solver, eta, timesteps: see `diffusion.solvers.sample`; the noise of eta > 0 comes from (seed, id) too.
            cache_interval: compute the deep part of the UNet each so many evaluations only (DeepCache); 1: each time.
                Of the torch backends.
            cache_branch: the skip connection, counted from the outermost, below which features are kept.
            exif: turn files and PIL images as their EXIF orientation says, so that a map has the size that viewers
                show; False keeps the stored pixels, as COCO's maps do.
            connected: above 0, each connected piece of a segment is a segment of its own, and pieces of fewer pixels
                are void; see `panoptic.postprocess.connected`.

        Returns:
            "panoptic": a PanopticResult per image, at its own size. "logits": float32 [N, Q, S, S] at the network's
            size. "latent": the sampler's output, float32 [N, C, h, w], still scaled.

        Raises:
            ArgumentError: an image that is none or has no defined range, a path without a file, an unknown output_type
                or solver, timesteps, latents or captions that do not fit, a number out of range.
            ConfigError: a threshold out of range.
            DataError: a file that is no readable picture, or one that is too large; it is named.
        """
        # 1. Check the input, before any work
        if output_type not in OUTPUT_TYPES:
            raise ArgumentError(f"output_type={output_type!r}: one of {', '.join(OUTPUT_TYPES)} expected")
        inputs = check_images(images)  # N, not decoded yet
        ids = image_ids_of(len(inputs), image_ids)
        thresholds = check_thresholds(thresholds)
        check_count("connected", connected, 0, MAX_PIXELS)
        self._check_captions(captions, len(inputs))
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

        # 2. Draw the initial noise, on the CPU, so that a seed means the same on every device
        noise = self._initial_noise(generator, latents, seed, ids)  # float32 [N, C, h, w]

        outputs: list[Any] = []
        for batch in batches_of(len(inputs), batch_size):
            # 3. Decode the pictures and resize them to the network's size, and move them to the device
            pictures = self._pictures(inputs, batch, exif)  # B times uint8 [S, S, 3]
            sizes = [picture.size for picture in pictures]  # B times (H, W)
            pixels = self.sampler.resize([picture.pixels for picture in pictures])  # uint8 [B, 3, S, S]

            # On a GPU, steps 4 to 9 of few steps and of pictures like those before are one launch
            if output_type == "panoptic":
                at_once = self.sampler.segment(pixels, noise[batch], sizes, sampling, thresholds)
                if at_once is not None:
                    outputs += at_once
                    continue

            # 4. Encode them to image latents
            image_latents = self.backend.encode_image(pixels)  # backend.dtype [B, C_image, h, w]

            # 5. Give the network its context [B, M, D]: none, trained queries, CLIP's tokens of picture or caption
            network = self.sampler.network(pixels, sampling, captions and captions[batch])

            # 6. Denoise: the solver's loop over the network
            mask_latents = self.sampler.denoise(  # float32 [B, C, h, w], scaled
                network, noise[batch], image_latents, ids[batch], sampling
            )
            if output_type == "latent":
                outputs.append(mask_latents)
                continue

            # Steps 7 to 9 are one call, as backends fuse them: a Triton kernel or C++ does 8 and 9 at once, an exported
            # graph all three. Pictures of one size go through together.
            # 7. Undo the latent scale, decode to slot logits        # float [B, Q, h 2^u, w 2^u]
            # 8. Resize these bilinearly to the network's size,      # float32 [B, Q, S, S]
            #    then to the picture's own                           # float32 [B, Q, H, W]
            # 9. Take the argmax over the slots, apply thresholds    # int32 [B, H, W]
            if output_type == "logits":
                network_size = (self.info.image_size, self.info.image_size)
                outputs.append(self.backend.decode_mask(mask_latents, network_size, "logits"))  # float32 [B, Q, S, S]
            else:
                outputs += self.sampler.decode(mask_latents, sizes, thresholds)  # B times int32 [H, W]

        # 10. Return a result per picture, at its own size, or one tensor
        if output_type == "panoptic":
            return [in_pieces(output, connected) for output in outputs] if connected else outputs
        return torch.cat(outputs) if outputs else torch.empty(0, *self.info.latent_shape)

    @torch.inference_mode()
    @says_size
    def ensemble(
        self,
        images: Any,
        num_samples: int | None = None,
        *,
        num_inference_steps: int | None = None,
        seed: int = 0,
        image_ids: Sequence[int | str] | None = None,
        thresholds: PostprocessConfig | None = None,
        batch_size: int = 16,
        captions: Sequence[str] | None = None,
        exif: bool = True,
        flip: bool = False,
        scales: Sequence[float] = (1.0,),
        fusion: str | None = None,
        edges: int = 0,
        connected: int = 0,
        **settings: Any,
    ) -> list[EnsembleResult]:
        """Segments images `num_samples` times, from noise of the seeds seed, seed + 1, ..., and compares the results.

        With `flip` or several `scales` each view of a picture has `num_samples` of its own.

        Args:
            images: as in `__call__`.
            num_samples: k, 1 to 1000; default 8, or 1 of a model that starts from no noise, whose samples are equal.
            num_inference_steps, seed, image_ids, thresholds, batch_size, captions, exif: as in `__call__`.
            flip, scales, fusion, edges: what samples see and how they are joined; see `inference.ensemble.Views`.
            connected: as in `__call__`, of the joined map.
            settings: `solver`, `eta`, `timesteps`, `callback`, `cache_interval` and `cache_branch` of `__call__`.

        Returns:
            An EnsembleResult per image: the sample that agrees best with the others, or what they vote for, with a map
            of agreement.

        Raises:
            ArgumentError: a num_samples out of range; what `__call__` refuses.
            ConfigError, DataError: as in `__call__`.
        """
        from ldmseg_fast.inference.ensemble import Views, as_scales, sample_ensemble

        views = Views(flip, as_scales(scales), fusion, edges)
        noisy = self.info.scheduler.init_noise_sigma > 0
        num_samples = (8 if noisy else 1) if num_samples is None else num_samples
        check_count("num_samples", num_samples, 1, MAX_SAMPLES)
        if num_samples > 1 and not noisy and not settings.get("eta"):
            raise ArgumentError(
                f"num_samples={num_samples}: this model starts from no noise, so that its samples are equal; give 1, "
                f"and flip or several scales"
            )
        refused = settings.keys() & {"generator", "latents", "output_type"}
        if refused:
            raise ArgumentError(
                f"{', '.join(sorted(refused))}: an ensemble's noise comes from its seeds, its results are maps"
            )
        inputs = check_images(images)
        ids = image_ids_of(len(inputs), image_ids)
        thresholds = check_thresholds(thresholds)
        check_count("connected", connected, 0, MAX_PIXELS)
        self._check_captions(captions, len(inputs))
        sampling = self.sampler.settings(num_inference_steps, seed=seed, **settings)
        check_count("seed + num_samples", seed + num_samples, 1, MAX_SEED)
        results: list[EnsembleResult] = []
        for batch in batches_of(len(inputs), batch_size):
            results += sample_ensemble(
                self.sampler,
                self._pictures(inputs, batch, exif, views.largest),
                ids[batch],
                sampling,
                num_samples=num_samples,
                thresholds=thresholds,
                captions=captions and captions[batch],
                views=views,
            )
        return [in_pieces(result, connected) for result in results] if connected else results

    @torch.inference_mode()
    @says_size
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
        exif: bool = True,
        segments_info: Sequence[Sequence[Mapping[str, Any]]] | None = None,
        edges: int = 0,
    ) -> list[PanopticResult]:
        """Completes panoptic maps: given pixels stay exactly as they are, the model finds the rest.

        A given segment keeps its id and may grow into what was not given; new segments get unused ids. A given pixel
        of id 0 stays void.

        Args:
            images: as in `__call__`.
            segmentations: integer ids [H, W] of each image's size (turned as its EXIF orientation says), 0..2^24-1,
                0 = void; where nothing is given the value does not matter.
            known_masks: bool [H, W], True where the map is given.
            num_inference_steps, seed, image_ids, thresholds, batch_size, solver, eta, timesteps, callback, exif: as in
                `__call__`.
            method: how the given pixels enter: "pixels" (`inpainting.KnownPixels`), or with whole latent cells held
                "estimate" or "renoise" (`diffusion.inpainting.KnownLatents`). Default "estimate" for models that were
                trained for it (diffusion.inpainting), "pixels" for the others.
            draft_steps: evaluations, at most `num_inference_steps`, of a draft that does not know the map: a given
                segment gets the slot that the draft has for it (`given_maps.follow_draft`). 0: no draft, slots by
                the scheme of the model's training, which cannot know of hidden segments.
            segments_info: of models with categories, for each image what given segments are: entries with `id` and
                `category_id`, as results have them. A given segment keeps its category; one that is not listed gets
                what the model finds.
            edges: edges of segments follow edges of the picture and of what is given, by windows of this radius in
                cells of the decoder's grid (see `inference.edges`); it decodes in PyTorch whatever the backend. 0: off.

        Returns:
            A PanopticResult per image, at its own size; its entries have "given" beside the usual ones.

        Raises:
            ArgumentError: a map or mask that does not fit its image, an unknown method or category, and what `__call__`
                refuses.
            ConfigError, DataError: as in `__call__`.
        """
        from ldmseg_fast.inference import inpainting

        inputs = check_images(images)
        maps = [
            as_array(each, f"segmentations[{at}]") for at, each in enumerate(as_list(segmentations, "segmentations"))
        ]
        masks = [as_array(each, f"known_masks[{at}]") for at, each in enumerate(as_list(known_masks, "known_masks"))]
        check_given(len(inputs), maps, masks)
        numbers = given_categories(segments_info, len(inputs), self.info.categories)
        check_count("draft_steps", draft_steps, 0, MAX_STEPS)
        check_count("edges", edges, 0, MAX_RADIUS)
        thresholds = check_thresholds(thresholds)
        sampling = self.sampler.settings(
            num_inference_steps, solver=solver, eta=eta, timesteps=timesteps, seed=seed, callback=callback
        )
        ids = image_ids_of(len(inputs), image_ids)
        results: list[PanopticResult] = []
        for batch in batches_of(len(inputs), batch_size):
            pictures = self._pictures(inputs, batch, exif)
            check_sizes(pictures, maps[batch], first=batch.start)
            results += inpainting.inpaint(
                self.sampler,
                pictures=pictures,
                maps=maps[batch],
                masks=masks[batch],
                image_ids=ids[batch],
                sampling=sampling,
                thresholds=thresholds,
                method=method,
                draft_steps=draft_steps,
                numbers=numbers[batch],
                edges=edges,
            )
        return results

    def _pictures(self, inputs: Sequence[Any], batch: slice, exif: bool, scale: float = 1.0) -> list[Picture]:
        """Decodes and resizes a batch, one picture after the other, so that one alone is in memory at its own size."""
        if not isinstance(exif, bool):
            raise ArgumentError(f"exif={exif!r}: True or False expected")
        places = range(len(inputs))[batch]
        size, bound = round(self.info.picture_size * scale), self.max_pixels
        return [scaled_picture(inputs[place], place, size, exif=exif, max_pixels=bound) for place in places]

    def _check_captions(self, captions: Sequence[str] | None, count: int) -> None:
        if captions is None:
            return
        if not isinstance(captions, (list, tuple)) or not all(isinstance(caption, str) for caption in captions):
            raise ArgumentError(f"captions={captions!r:.200}: a list of texts expected, one an image")
        if self.info.conditioning != "clip_text" or len(captions) != count:
            raise ArgumentError(
                f"captions: {len(captions)} for {count} images of a model with unet.conditioning="
                f"{self.info.conditioning}; clip_text takes one per image, the others none"
            )

    def _initial_noise(
        self, generator: torch.Generator | None, latents: Tensor | None, seed: int, ids: Sequence[int | str]
    ) -> Tensor:
        shape = (len(ids), *self.info.latent_shape)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ArgumentError(f"generator={generator!r:.200}: a torch.Generator expected")
        if latents is not None:
            if not isinstance(latents, Tensor):
                raise ArgumentError(f"latents: {type(latents).__name__}; a tensor expected, float {list(shape)}")
            if tuple(latents.shape) != shape:
                raise ArgumentError(f"latents: shape {tuple(latents.shape)}, expected {shape}")
            if latents.is_complex() or latents.is_meta:
                raise ArgumentError(f"latents: {latents.dtype} on {latents.device}; real numbers expected")
            return latents.float()
        if generator is not None:
            deviation = self.info.scheduler.init_noise_sigma
            return torch.randn(shape, generator=generator, device=generator.device) * deviation
        return self.sampler.noise(seed, ids)
