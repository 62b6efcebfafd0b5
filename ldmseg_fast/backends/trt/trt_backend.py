"""Runs TensorRT engines. What is special to TensorRT is `TrtRunner`; the rest is shared."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
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
from ldmseg_fast.backends.trt.kernel_files import keep_kernels, read_kernels
from ldmseg_fast.backends.trt.machine import check_driver
from ldmseg_fast.backends.trt.passport import Passport, check_passport, engine_file, read_passport
from ldmseg_fast.backends.trt.settings import GRAPH_STRATEGIES, SPECIALIZATIONS, RunSettings
from ldmseg_fast.errors import BackendError

OPTIONS = {
    "batch": "--max-batch {}, or split the batch",
    "height": "--max-side {}",
    "width": "--max-side {}",
}


@dataclass(frozen=True)
class LoadedEngine:
    """Holds an engine, and its runtime configuration; see `TrtApi.deserialize` and `TrtApi.runtime_config`."""

    engine: Any
    config: Any


class TrtRunner:
    """Runs one engine on one stream, in torch's own memory.

    Calls share one context per optimisation profile. What is repeated may be captured in a CUDA graph, which keeps the
    state of its context: such a loop gets a context that no other shape changes.

    Args:
        api: the imported TensorRT.
        engine: the engine.
        spec: of the graph that the engine was built from.
        passport: of the engine.
        stream: handle of the CUDA stream.
        profiles: places of the passport's profiles that may run.
        scratch: uint8 [N], the scratch memory of all engines that run on the stream, one after the other.
    """

    def __init__(
        self,
        api: trt_api.TrtApi,
        engine: LoadedEngine,
        spec: GraphSpec,
        passport: Passport,
        stream: int,
        profiles: range,
        scratch: Tensor,
    ) -> None:
        self.api, self.engine, self.spec, self.passport, self.stream = api, engine, spec, passport, stream
        self.profiles, self.scratch = profiles, scratch
        self._contexts: dict[int, Any] = {}
        self._loops: list[tuple[weakref.ref[Tensor], Any]] = []

    def prepare(self, tensors: Mapping[str, Tensor], repeated: bool = False) -> Callable[[], None]:
        """See `Runner.prepare`. Raises BackendError for shapes that the engine was not built for."""
        context = self._context(self._profile(tensors), tensors, repeated)
        inputs = {t.name: (tuple(tensors[t.name].shape), tensors[t.name].data_ptr()) for t in self.spec.inputs}
        outputs = {t.name: tensors[t.name].data_ptr() for t in self.spec.outputs}

        def run(alive: tuple[Tensor, ...] = tuple(tensors.values())) -> None:  # the context holds addresses only
            self.api.bind(context, inputs, outputs)
            captures = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
            if captures and not self.api.can_be_captured(context, self.stream):
                raise RuntimeError(f"{self.api.name} cannot capture {self.spec.name}")  # the lane goes on without
            self.api.execute(context, self.stream)

        return run

    def _context(self, profile: int, tensors: Mapping[str, Tensor], repeated: bool) -> Any:
        """Finds or makes the context of a single call, or that of a loop, which its steps share."""
        if not repeated:
            if profile not in self._contexts:
                self._contexts[profile] = self._make_context(profile)
            return self._contexts[profile]
        fixed = tensors["image_latents"]  # the one buffer that all steps of a loop have, and no other loop
        self._loops = [(buffer, context) for buffer, context in self._loops if buffer() is not None]
        for buffer, context in self._loops:
            if buffer() is fixed:
                return context
        context = self._make_context(profile)
        self._loops.append((weakref.ref(fixed), context))
        return context

    def _make_context(self, profile: int) -> Any:
        engine, config = self.engine.engine, self.engine.config
        return self.api.create_context(engine, profile, self.stream, config, self.scratch)

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
    kernel_specialization: str | None = None,
    graph_strategy: str | None = None,
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
        kernel_specialization, graph_strategy: of TensorRT-RTX, see `RunSettings`. Where it captures graphs itself, the
            sampling loop is none. What it compiles is kept, see `kernel_files`.

    Raises:
        BackendError: no TensorRT, no GPU, or an engine that was not built for this model, machine, version or size.
        CheckpointError: a damaged model folder.
    """
    folder = Path(engine_dir)
    manifest = read_manifest(folder, "to_trt.py")
    passports = {name: read_passport(folder, name) for name in manifest.graphs}
    api = trt_api.load_api(passports["denoiser"].flavour)
    if graph_strategy not in (None, "disabled"):
        if cuda_graph:
            raise BackendError(f"graph_strategy={graph_strategy} beside cuda_graph=True: only one may capture; choose")
        cuda_graph = False
    device = torch.device(device) if device is not None else api.device
    capture = use_cuda_graph(cuda_graph, device)
    settings = _run_settings(api, kernel_specialization, graph_strategy, capture)
    if device.type != api.device.type:
        raise BackendError(f"device={device}: TensorRT engines run on {api.device}; use backend=onnxruntime or torch")
    api.device = device
    check_driver(api.machine, api.min_driver)
    digest = model_hash(info.folder)
    for passport in passports.values():
        check_passport(passport, folder, manifest, digest, api.flavour, api.version, api.machine, api.min_driver)
    info = at_graphs_size(info, folder, manifest, image_size)
    most = max(len(passport.profiles) for passport in passports.values())
    if profile is not None and profile >= most:
        raise BackendError(f"profile={profile}: {folder} has {most}, counted from 0; leave it out, or build another")
    chosen = {name: _chosen(passport, profile) for name, passport in passports.items()}
    _check_sides(info, passports["denoiser"], manifest.downsampling)
    engines: dict[str, LoadedEngine] = {}
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for name, passport in passports.items():
            engine = api.deserialize(engine_file(folder, name), passport.version_compatible)
            if passport.stripped:
                api.refit(engine, weights_of(folder, manifest.graphs[name]))
            config = api.runtime_config(engine, settings, read_kernels(folder, passport))
            engines[name] = LoadedEngine(engine, config)
    scratch_bytes = max(api.scratch_bytes(loaded.engine) for loaded in engines.values())
    specs = {name: graph.spec for name, graph in manifest.graphs.items()}

    def make_runners(stream: torch.cuda.Stream | None) -> Mapping[str, Runner]:
        handle = stream.cuda_stream if stream is not None else 0
        scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=device)
        return {
            name: TrtRunner(api, loaded, specs[name], passports[name], handle, chosen[name], scratch)
            for name, loaded in engines.items()
        }

    batch = manifest.options.batch
    fixed = {"batch": (batch, batch, batch)}
    batches = {
        name: tuple((fixed | passports[name].profiles[index])["batch"][::2] for index in indices)
        for name, indices in chosen.items()
    }

    def close() -> None:
        keep()
        engines.clear()

    backend = GraphBackend(info, specs, make_runners, device, lanes, capture, batches, close)
    configs = {name: loaded.config for name, loaded in engines.items()}
    keep = weakref.finalize(backend, keep_kernels, api, folder, passports, configs)  # of what is never closed too
    return backend


def _run_settings(api: trt_api.TrtApi, specialization: str | None, strategy: str | None, capture: bool) -> RunSettings:
    """Checks how TensorRT-RTX is to run. Raises BackendError for what it does not know, and for TensorRT.

    capture: the sampling loop becomes a CUDA graph, which keeps the kernels that are there when it is captured.
    """
    given = (
        ("kernel_specialization", specialization, SPECIALIZATIONS),
        ("graph_strategy", strategy, GRAPH_STRATEGIES),
    )
    for name, value, known in given:
        if value is not None and api.flavour != "rtx":
            raise BackendError(f"{name}={value}: of TensorRT-RTX alone, and these engines are {api.name}'s")
        if value is not None and value not in known:
            raise BackendError(f"{name}={value!r}: one of {', '.join(known)} expected")
    return RunSettings(specialization or ("eager" if capture else "lazy"), strategy or "disabled")


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
