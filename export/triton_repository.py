"""Writes a Triton model repository: an ensemble of pre-processing, encoder, sampler and head, and how to start it.

The encoder, the denoiser and the mask decoder are the engines themselves. Pre-processing, the loop over the denoiser
and the head's last part are Python models (`triton_models`), so the server's Python needs ldmseg_fast.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ldmseg_fast.backends.graphs.manifest import GRAPHS, Manifest, check_files, read_manifest
from ldmseg_fast.backends.trt.passport import Passport, engine_file, file_differences, passport_file, read_passport
from ldmseg_fast.errors import BackendError
from ldmseg_fast.export.output_folder import new_folder
from ldmseg_fast.export.triton_configs import ENSEMBLE, PYTHON_MODELS, SIZE_FILE, Serving, model_configs, to_text
from ldmseg_fast.export.triton_texts import DOCKERFILE, README, dockerfile_text, readme_text
from ldmseg_fast.files import real_path

CLIENT = "client.py"
IMAGE = re.compile(r"[\w./:@-]+", re.ASCII)  # what Docker's names of images are made of


@dataclass(frozen=True)
class RepositorySettings:
    """Holds the settings as the command line of `to_triton.py` has them."""

    steps: int | None = None
    max_batch: int | None = None
    queue_delay: int = 2000
    instances: int = 1
    device: str = "gpu"
    cuda_graphs: bool = True
    max_pixels: int = 2**25
    image: str = "nvcr.io/nvidia/tritonserver:26.08-py3"


def write_repository(source: Path, out: Path, settings: RepositorySettings) -> list[str]:
    """Writes the repository, complete or not at all; large files are linked where the disk allows it.

    Returns:
        The models' names, the ensemble first.

    Raises:
        BackendError: a folder that holds no graphs, graphs without a head, or settings that do not fit.
    """
    manifest = read_manifest(source)
    serving, passports = _serving(source, manifest, settings)
    configs = model_configs(serving)
    with new_folder(out, lambda folder: written_names(folder, configs)) as folder:
        for name, config in configs.items():
            version = folder.path / name / "1"
            version.mkdir(parents=True)
            (folder.path / name / "config.pbtxt").write_text(to_text(config), encoding="utf-8")
            graph = name.removeprefix("ldmseg_")
            if name in PYTHON_MODELS:
                kind = PYTHON_MODELS[name]
                line = f"from ldmseg_fast.export.triton_models import {kind} as TritonPythonModel  # noqa: F401\n"
                (version / "model.py").write_text(line, encoding="utf-8")
            elif graph in manifest.graphs:
                _place(source, manifest, graph, version, serving.is_engine)
            else:
                (version / ".keep").touch()  # an ensemble has no files, but its version must exist
        warmup = folder.path / "ldmseg_mask_decoder" / "warmup"
        warmup.mkdir()
        side = min(manifest.image_size, serving.head_side or manifest.image_size)
        (warmup / SIZE_FILE).write_bytes(np.array([side, side], "<i8").tobytes())
        engine = passports.get("denoiser")
        texts = {README: readme_text(serving, settings.image, engine), DOCKERFILE: dockerfile_text(settings.image)}
        for name, text in texts.items():
            (folder.path / name).write_text(text, encoding="utf-8")
        shutil.copyfile(Path(__file__).with_name("triton_client.py"), folder.path / CLIENT)
    return list(configs)


def written_names(folder: Path, models: Iterable[str]) -> list[str]:
    """Lists the names in a folder that belong to a repository of these models; none where it holds no repository."""
    if not (folder / ENSEMBLE / "config.pbtxt").is_file():
        return []
    return [*models, README, DOCKERFILE, CLIENT]


def _serving(source: Path, manifest: Manifest, settings: RepositorySettings) -> tuple[Serving, Mapping[str, Passport]]:
    """Checks that graphs or engines can be served as the settings say. Raises BackendError where not."""
    if manifest.options.head == "logits":
        raise BackendError(f"{source}: exported with --head logits; the server needs --head panoptic or both")
    if "context" in manifest.graphs["denoiser"].spec.tensors:
        raise BackendError(f"{source}: the server's sampler has no CLIP encoder; serve a model without one")
    if manifest.image_size == 0 or manifest.options.batch:
        raise BackendError(
            f"{source}: the server needs graphs of a fixed picture size and a dynamic batch; export again"
        )
    if not manifest.model:
        raise BackendError(f"{source}: {source / 'export.json'} names no model; export the model's folder")
    if settings.instances < 1 or settings.queue_delay < 0:
        raise BackendError("--instances: from 1 on; --queue-delay: from 0 on")
    if not IMAGE.fullmatch(settings.image):
        raise BackendError(f"--image {settings.image!r}: no name of a container; {RepositorySettings.image} is one")
    passports: dict[str, Passport] = {}
    if passport_file(source, "denoiser").is_file():
        passports = _engines(source, settings)
    elif not settings.cuda_graphs:
        raise BackendError(f"--no-cuda-graph: of engines only, and {source} holds ONNX graphs; leave it out")
    elif manifest.precision == "bf16":
        raise BackendError(f"{source}: exported in bf16, which ONNX Runtime does not run; export with --precision fp16")
    elif manifest.is_for_cpu and settings.device != "cpu":
        raise BackendError(f"{source}: int8 for a CPU; add --device cpu, or export with --precision fp16")
    else:
        check_files(source, manifest)
    decoder = passports["mask_decoder"].profiles if passports else ()
    serving = Serving(
        manifest=manifest,
        steps=settings.steps or int(manifest.model["num_inference_steps"]),
        batch=_max_batch(source, passports, settings.max_batch),
        queue_delay=settings.queue_delay,
        instances=settings.instances,
        on_gpu=settings.device == "gpu",
        cuda_graphs=settings.cuda_graphs and bool(passports),
        max_pixels=settings.max_pixels,
        profiles={name: len(passport.profiles) for name, passport in passports.items()},
        head_side=max(
            (min(p["height"][2], p["width"][2]) for p in decoder if {"height", "width"} <= set(p)), default=0
        ),
        tensorrt=passports["denoiser"].version if passports else "",
        version_compatible=all(passport.version_compatible for passport in passports.values()),
    )
    return serving, passports


def _engines(source: Path, settings: RepositorySettings) -> dict[str, Passport]:
    """Reads the engines' passports. Raises BackendError for engines that the server cannot run."""
    if settings.device != "gpu":
        raise BackendError(f"--device {settings.device}: {source} holds TensorRT engines, which run on GPUs")
    passports = {graph: read_passport(source, graph) for graph in GRAPHS}
    for graph, passport in passports.items():
        if passport.flavour != "tensorrt" or passport.stripped:
            kind = "TensorRT-RTX" if passport.flavour == "rtx" else "without weights"
            raise BackendError(f"{engine_file(source, graph)}: {kind}; the server takes whole TensorRT engines")
        if differences := file_differences(passport, engine_file(source, graph)):
            raise BackendError(f"{engine_file(source, graph)} does not fit: {differences[0]}; {passport.rebuild}")
    versions = sorted({passport.version for passport in passports.values()})
    if len(versions) > 1:
        raise BackendError(f"{source}: engines of TensorRT {' and '.join(versions)}; build all of them by one version")
    return passports


def _max_batch(source: Path, passports: Mapping[str, Passport], asked: int | None) -> int:
    """Returns the largest batch, all smaller ones being possible too. Raises BackendError where they are not."""
    if asked is not None and asked < 1:
        raise BackendError(f"--max-batch {asked}: from 1 on")
    if not passports:
        return asked or 8
    ranges = {}
    for graph in ("image_encoder", "denoiser"):
        if any("batch" not in profile for profile in passports[graph].profiles):
            raise BackendError(f"{passport_file(source, graph)}: a profile without its batch; build the engine again")
        ranges[graph] = [(profile["batch"][0], profile["batch"][2]) for profile in passports[graph].profiles]
    largest = min(max(most for _, most in each) for each in ranges.values())
    if asked is not None and asked > largest:
        raise BackendError(f"--max-batch {asked}: {source} was built for batches of up to {largest}")
    batch = asked or largest
    for graph, each in ranges.items():
        missing = [size for size in range(1, batch + 1) if not any(least <= size <= most for least, most in each)]
        if missing:
            raise BackendError(
                f"{engine_file(source, graph)}: no profile takes {missing[0]} of the {batch} pictures that a batch may "
                f"have; build the engines again with --min-batch 1, or with a --profile for it"
            )
    return batch


def _place(source: Path, manifest: Manifest, graph: str, version: Path, is_engine: bool) -> None:
    if is_engine:
        _link(engine_file(source, graph), version / "model.plan")
        return
    files = manifest.graphs[graph]
    _link(source / files.file, version / "model.onnx")
    if files.weights:
        _link(source / files.weights, version / files.weights)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(real_path(source), target)  # a link itself would lead elsewhere from there
    except OSError:
        shutil.copy2(source, target)
