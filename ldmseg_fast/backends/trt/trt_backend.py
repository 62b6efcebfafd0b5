"""Runs TensorRT engines. What is special to TensorRT is `TrtRunner`; the rest is shared."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmseg_fast.backends.graphs.graph_backend import GraphBackend
from ldmseg_fast.backends.graphs.loop import Runner, use_cuda_graph
from ldmseg_fast.backends.graphs.manifest import GraphFile, at_graphs_size, hash_files, model_hash, read_manifest
from ldmseg_fast.backends.graphs.specs import GraphSpec
from ldmseg_fast.backends.model_info import ModelInfo
from ldmseg_fast.backends.trt import api as trt_api
from ldmseg_fast.backends.trt.passport import Passport, check_passport, engine_file, read_passport
from ldmseg_fast.errors import BackendError

OPTIONS = {
    "batch": "--max-batch {}, or split the batch",
    "height": "--max-side {}",
    "width": "--max-side {}",
}


class TrtRunner:
    """Runs one engine on one stream, in torch's own memory.

    Calls share one context per optimisation profile. What is repeated may be captured in a CUDA graph, which keeps the
    addresses of its context's scratch memory: such a loop gets a context that no other shape changes.

    Args:
        api: the imported TensorRT.
        engine: as `api.deserialize` returned it.
        spec: of the graph that the engine was built from.
        passport: of the engine.
        stream: handle of the CUDA stream.
        profiles: places of the passport's profiles that may run.
    """

    def __init__(
        self, api: trt_api.TrtApi, engine: Any, spec: GraphSpec, passport: Passport, stream: int, profiles: range
    ) -> None:
        self.api, self.engine, self.spec, self.passport, self.stream = api, engine, spec, passport, stream
        self.profiles = profiles
        self._contexts: dict[int, Any] = {}
        self._loops: list[tuple[weakref.ref[Tensor], Any]] = []

    def prepare(self, tensors: Mapping[str, Tensor], repeated: bool = False) -> Callable[[], None]:
        """See `Runner.prepare`. Raises BackendError for shapes that the engine was not built for."""
        context = self._context(self._profile(tensors), tensors, repeated)
        inputs = {t.name: (tuple(tensors[t.name].shape), tensors[t.name].data_ptr()) for t in self.spec.inputs}
        outputs = {t.name: tensors[t.name].data_ptr() for t in self.spec.outputs}

        def run(alive: tuple[Tensor, ...] = tuple(tensors.values())) -> None:  # the context holds addresses only
            self.api.bind(context, inputs, outputs)
            self.api.execute(context, self.stream)

        return run

    def _context(self, profile: int, tensors: Mapping[str, Tensor], repeated: bool) -> Any:
        """Finds or makes the context of a single call, or that of a loop, which its steps share."""
        if not repeated:
            if profile not in self._contexts:
                self._contexts[profile] = self.api.create_context(self.engine, profile, self.stream)
            return self._contexts[profile]
        fixed = tensors["image_latents"]  # the one buffer that all steps of a loop have, and no other loop
        self._loops = [(buffer, context) for buffer, context in self._loops if buffer() is not None]
        for buffer, context in self._loops:
            if buffer() is fixed:
                return context
        context = self.api.create_context(self.engine, profile, self.stream)
        self._loops.append((weakref.ref(fixed), context))
        return context

    def _profile(self, tensors: Mapping[str, Tensor]) -> int:
        """Finds the narrowest profile for these shapes. Raises BackendError naming the option that widens it."""
        sizes = self.spec.sizes({tensor.name: tensors[tensor.name] for tensor in self.spec.inputs})
        if "size" in self.spec.tensors:
            sizes |= dict(zip(("height", "width"), tensors["size"].tolist()))
        profiles = self.passport.profiles
        fitting = [
            index
            for index, profile in enumerate(profiles)
            if index in self.profiles
            and all(profile[axis][0] <= size <= profile[axis][2] for axis, size in sizes.items())
        ]
        if fitting:
            return min(fitting, key=lambda index: sum(span[2] for span in profiles[index].values()))
        for axis, size in sizes.items():
            largest = max(profile[axis][2] for profile in profiles)
            if size > largest:
                cure = OPTIONS.get(axis, "--image-sizes for it").format(size)
                here = f"{self.spec.name}: {axis} {size} is over this engine's {largest}"
                raise BackendError(f"{here}; rebuild with {cure}")
        raise BackendError(f"{self.spec.name}: no profile of this engine takes {sizes}; {self.passport.rebuild}")


def load_trt_backend(
    info: ModelInfo,
    engine_dir: str | Path,
    device: str | torch.device | None = None,
    lanes: int = 1,
    cuda_graph: bool | None = None,
    image_size: int | None = None,
    profile: int | None = None,
) -> GraphBackend:
    """Loads the engines that `to_trt.py` built.

    Args:
        info: of MODEL_DIR.
        engine_dir: its engines.
        device: of the GPU; default the first.
        lanes: how many threads can be inside at a time; each has its own contexts and buffers.
        cuda_graph: run the sampling loop as one CUDA graph; None: on a GPU. A loop that cannot be captured runs
            without, with a warning.
        image_size: side in pixels of what the networks see; default the engines' own, or the model's.
        profile: the place of the optimisation profile to run; default the narrowest that fits. A graph with a single
            profile, as the mask decoder's, keeps it.

    Raises:
        BackendError: no TensorRT, no GPU, or an engine that was not built for this model, machine, version or size.
        CheckpointError: a damaged model folder.
    """
    folder = Path(engine_dir)
    manifest = read_manifest(folder, "to_trt.py")
    passports = {name: read_passport(folder, name) for name in manifest.graphs}
    api = trt_api.load_api(passports["denoiser"].flavour)
    device = torch.device(device) if device is not None else api.device
    if device.type != api.device.type:
        raise BackendError(f"device={device}: TensorRT engines run on {api.device}; use backend=onnxruntime or torch")
    api.device = device
    trt_api.check_driver(api.machine, api.min_driver)
    digest = model_hash(info.folder)
    for passport in passports.values():
        check_passport(passport, folder, manifest, digest, api.flavour, api.version, api.machine, api.min_driver)
    info = at_graphs_size(info, folder, manifest, image_size)
    chosen = {name: _chosen(passport, profile) for name, passport in passports.items()}
    _check_sides(info, passports["denoiser"], manifest.downsampling)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        engines = {
            name: api.deserialize(engine_file(folder, name), passport.version_compatible)
            for name, passport in passports.items()
        }
        for name, passport in passports.items():
            if passport.stripped:
                api.refit(engines[name], weights_of(folder, manifest.graphs[name]))
    specs = {name: graph.spec for name, graph in manifest.graphs.items()}

    def make_runners(stream: torch.cuda.Stream | None) -> Mapping[str, Runner]:
        handle = stream.cuda_stream if stream is not None else 0
        return {
            name: TrtRunner(api, engines[name], specs[name], passports[name], handle, chosen[name]) for name in engines
        }

    batch = manifest.options.batch
    fixed = {"batch": (batch, batch, batch)}
    batches = {
        name: tuple((fixed | passports[name].profiles[index])["batch"][::2] for index in indices)
        for name, indices in chosen.items()
    }
    return GraphBackend(
        info, specs, make_runners, device, lanes, use_cuda_graph(cuda_graph, device), batches, engines.clear
    )


def _chosen(passport: Passport, profile: int | None) -> range:
    """Lists the profiles that may run. Raises BackendError for one that the engine does not have."""
    count = len(passport.profiles)
    if profile is None or count == 1:
        return range(count)
    if profile >= count:
        raise BackendError(f"profile={profile}: {passport.graph} has {count} profiles, 0 to {count - 1}")
    return range(profile, profile + 1)


def _check_sides(info: ModelInfo, passport: Passport, downsampling: int) -> None:
    """Checks the picture size. Raises BackendError where engines for several sizes were not built for this one."""
    sides = [profile.get("latent_height", (0, 0, 2**31)) for profile in passport.profiles]
    cells = info.image_size // downsampling
    if not any(least <= cells <= largest for least, _, largest in sides):
        built = ", ".join(f"{least * downsampling} to {largest * downsampling}" for least, _, largest in sides)
        raise BackendError(
            f"image_size={info.image_size}: these engines take pictures of {built} pixels; choose one of them, or "
            f"rebuild with --image-sizes LEAST,BEST,LARGEST"
        )


def weights_of(folder: Path, graph: GraphFile) -> Path:
    """Finds the graph whose weights a stripped engine takes. Raises BackendError where it is missing or another one."""
    path = folder / "onnx" / graph.file
    if not path.is_file() or hash_files(path.parent, graph.file, graph.weights) != graph.sha256:
        raise BackendError(
            f"{path}: missing or changed, and {engine_file(folder, graph.spec.name).name} was built without weights; "
            f"put the exported graphs into {path.parent}"
        )
    return path
