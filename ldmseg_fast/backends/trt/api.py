"""Wraps TensorRT (10.13 on, and 11) and TensorRT for RTX. Every use of their Python APIs is in this file."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ldmseg_fast.errors import BackendError

Shapes = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]  # least, best, largest per input


@dataclass(frozen=True)
class Flavour:
    """Describes one of NVIDIA's two runtimes: its Python module, the least version, how to install it."""

    module: str
    minimum: tuple[int, int]
    install: str
    builds_without_gpu: bool


FLAVOURS = {
    "tensorrt": Flavour("tensorrt", (10, 13), "pip install 'ldmseg_fast[trt]' on a machine with an NVIDIA GPU", False),
    "rtx": Flavour("tensorrt_rtx", (1, 2), "pip install 'ldmseg_fast[rtx]'", True),
}
MIN_DRIVERS = {12: 535, 13: 580}  # NVIDIA's driver, by the CUDA that TensorRT was built for
MIN_DRIVER = MIN_DRIVERS[13]  # where no package tells
RTX_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")


@dataclass(frozen=True)
class BuildSettings:
    """Says what a builder may do.

    Attributes:
        targets: compute capabilities ("sm89"), or ("current",) for the GPU at hand, ("same",) for others of its compute
            capability too, ("portable",) for Ampere and later.
        level: builder optimisation level, 0 to 5.
        workspace_gib: scratch memory; 0: no limit.
        strip: leave weights out of the engine; they are put in when it is loaded.
        version_compatible: loadable by later TensorRT versions of the same major.
        detailed: keep layer details in the engine.
    """

    targets: tuple[str, ...] = ("current",)
    level: int = 3
    workspace_gib: float = 0.0
    strip: bool = False
    version_compatible: bool = False
    detailed: bool = False


@dataclass(frozen=True)
class Built:
    """Holds a serialised engine, the timing cache to keep, and one line per layer."""

    engine: bytes
    timing_cache: bytes
    layers: list[str]


@dataclass(frozen=True)
class Machine:
    """Names a GPU and its driver; empty where there is none."""

    gpu: str = ""
    compute_capability: str = ""
    driver: str = ""


def this_machine(device: torch.device | None = None) -> Machine:
    """Finds the GPU behind a torch device (default the current one); nvidia-smi's first where torch has no CUDA."""
    machine = _ask_nvidia_smi()
    if not (machine.driver and torch.cuda.is_available()):
        return machine
    index = torch.cuda.current_device() if device is None or device.index is None else device.index
    major, minor = torch.cuda.get_device_capability(index)
    return Machine(torch.cuda.get_device_name(index), f"{major}.{minor}", machine.driver)


@lru_cache(maxsize=1)
def _ask_nvidia_smi() -> Machine:
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader", "--id=0"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return Machine()
    parts = [part.strip() for part in output.partition("\n")[0].split(",")]
    return Machine(*parts) if len(parts) == 3 else Machine()


def driver_major(driver: str) -> int:
    """Reads 580 from "580.65.06"; 0 where it is unknown."""
    number = driver.partition(".")[0]
    return int(number) if number.isdigit() else 0


class TrtApi:
    """Calls one imported flavour.

    Args:
        module: `tensorrt` or `tensorrt_rtx`.
        flavour: one of FLAVOURS.

    Attributes:
        device: where its engines are built and run.
    """

    device = torch.device("cuda")

    def __init__(self, module: Any, flavour: str) -> None:
        self.trt = module
        self.flavour = flavour
        self.version = str(module.__version__)
        self.numbers = tuple(int(part) for part in re.findall(r"\d+", self.version)[:2])
        self.log = self._make_log()

    @property
    def machine(self) -> Machine:
        """The GPU behind `device`, and its driver."""
        return this_machine(self.device)

    @property
    def min_driver(self) -> int:
        """The driver that this TensorRT needs at least, as its major number."""
        return min_driver(FLAVOURS[self.flavour].module)

    @property
    def max_opset(self) -> int:
        """The newest opset of ONNX that the parser reads.

        https://docs.nvidia.com/deeplearning/tensorrt/latest/reference/onnx-opset-guide.html; TensorRT-RTX 1.7 builds
        graphs of the same opset.
        """
        return 22 if self.flavour == "tensorrt" and self.numbers < (11, 0) else 25

    def _make_log(self) -> Any:
        trt = self.trt

        class Log(trt.ILogger):  # type: ignore[name-defined, misc]
            """Keeps errors for the exception that follows them."""

            def __init__(self) -> None:
                trt.ILogger.__init__(self)
                self.errors: list[str] = []

            def log(self, severity: Any, message: str) -> None:
                if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                    self.errors.append(message)

        return Log()

    def take_errors(self) -> str:
        """Returns what was logged as an error since the last call."""
        text = "; ".join(self.log.errors[-3:])
        self.log.errors.clear()
        return text or "no message"

    # building

    def build(
        self,
        onnx_file: Path,
        shapes: Sequence[tuple[Shapes, Shapes]],
        settings: BuildSettings,
        timing_cache: bytes = b"",
    ) -> Built:
        """Parses a graph and builds its engine.

        Args:
            onnx_file: the graph.
            shapes: per profile, ranges of the inputs' shapes and of the shape inputs' values.
            settings: what the builder may do.
            timing_cache: of earlier builds.

        Raises:
            BackendError: an ONNX file that TensorRT does not take, or a build that fails; with TensorRT's own message.
        """
        trt = self.trt
        builder = trt.Builder(self.log)
        network = builder.create_network(self._network_flags())
        parser = trt.OnnxParser(network, self.log)
        if not parser.parse_from_file(str(onnx_file)):
            errors = "; ".join(str(parser.get_error(index).desc()) for index in range(parser.num_errors))
            raise BackendError(f"{onnx_file}: {self.name} does not take it ({errors}); export with --opset 21")
        config = builder.create_builder_config()
        for ranges, values in shapes:
            profile = builder.create_optimization_profile()
            for name, (least, best, largest) in ranges.items():
                profile.set_shape(name, least, best, largest)
            for name, (least, best, largest) in values.items():
                profile.set_shape_input(name, least, best, largest)
            config.add_optimization_profile(profile)
        self._configure(config, settings)
        cache = None
        if self.flavour == "tensorrt":
            cache = config.create_timing_cache(timing_cache)
            if cache is None:
                raise BackendError(
                    f"the timing cache is damaged ({self.take_errors()}); remove it, or name another one"
                )
            config.set_timing_cache(cache, True)
        layers = [self._describe(network.get_layer(index)) for index in range(network.num_layers)]
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            raise BackendError(f"{onnx_file}: {self.name} does not build it ({self.take_errors()})")
        return Built(bytes(engine), bytes(cache.serialize()) if cache is not None else b"", layers)

    def _network_flags(self) -> int:
        """TensorRT 11 and RTX have strong typing always; 10 must be told."""
        if self.flavour == "rtx" or self.numbers[0] >= 11:
            return 0
        return 1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)

    def _configure(self, config: Any, settings: BuildSettings) -> None:
        trt = self.trt
        config.builder_optimization_level = settings.level
        if settings.workspace_gib:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(settings.workspace_gib * 2**30))
        flags = {"STRIP_PLAN": settings.strip, "REFIT": settings.strip}
        flags["VERSION_COMPATIBLE"] = settings.version_compatible
        for name, wanted in flags.items():
            if wanted:
                config.set_flag(getattr(trt.BuilderFlag, name))
        if settings.detailed:
            config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if self.flavour == "rtx":
            names = {"portable": [], "current": ["CURRENT"], "same": ["CURRENT"]}.get(
                settings.targets[0], [t.upper() for t in settings.targets]
            )
            config.num_compute_capabilities = len(names)
            for index, name in enumerate(names):
                config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
        elif settings.targets == ("portable",):
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        elif settings.targets != ("current",):
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY

    def _describe(self, layer: Any) -> str:
        outputs = [layer.get_output(index) for index in range(layer.num_outputs)]
        kinds = ", ".join(f"{output.dtype.name}{list(output.shape)}" for output in outputs)
        return f"{layer.type.name}  {layer.name}  {kinds}"

    # running

    def deserialize(self, engine_file: Path, version_compatible: bool = False) -> Any:
        """Loads an engine. Its passport must have been checked before: a foreign file can do anything here.

        Raises:
            BackendError: an engine that TensorRT does not load.
        """
        runtime = self.trt.Runtime(self.log)
        if version_compatible:
            runtime.engine_host_code_allowed = True
        engine = runtime.deserialize_cuda_engine(engine_file.read_bytes())
        if engine is None:
            raise BackendError(f"{engine_file}: {self.name} does not load it ({self.take_errors()}); build it again")
        return engine

    def refit(self, engine: Any, onnx_file: Path) -> None:
        """Puts the weights of a graph into an engine that was built without them.

        Raises:
            BackendError: weights that do not fit.
        """
        refitter = self.trt.Refitter(engine, self.log)
        weights = self.trt.OnnxParserRefitter(refitter, self.log)
        if not (weights.refit_from_file(str(onnx_file)) and refitter.refit_cuda_engine()):
            raise BackendError(f"{onnx_file}: its weights do not fit the engine ({self.take_errors()}); build it again")

    def create_context(self, engine: Any, profile: int, stream: int) -> Any:
        """Makes an execution context of one optimisation profile on a CUDA stream, given by its handle.

        Raises:
            BackendError: TensorRT makes none; most often the GPU's memory is full.
        """
        context = engine.create_execution_context()
        if context is None or not context.set_optimization_profile_async(profile, stream):
            raise BackendError(
                f"{self.name} makes no execution context ({self.take_errors()}); is the GPU's memory full?"
            )
        return context

    def bind(self, context: Any, inputs: Mapping[str, tuple[tuple[int, ...], int]], outputs: Mapping[str, int]) -> None:
        """Sets shapes and addresses of the inputs, and addresses of the outputs.

        Raises:
            BackendError: a shape or an address that TensorRT refuses.
        """
        for name, (shape, address) in inputs.items():
            if not (context.set_input_shape(name, shape) and context.set_tensor_address(name, address)):
                raise BackendError(f"{self.name} refuses {name} of shape {shape} ({self.take_errors()})")
        for name, address in outputs.items():
            if not context.set_tensor_address(name, address):
                raise BackendError(f"{self.name} refuses the memory for {name} ({self.take_errors()})")

    def execute(self, context: Any, stream: int) -> None:
        """Queues one run on a stream, given by its handle. Raises BackendError where TensorRT refuses."""
        if not context.execute_async_v3(stream):
            raise BackendError(f"{self.name} failed to run ({self.take_errors()})")

    @property
    def name(self) -> str:
        """The flavour and its version, for messages."""
        return f"{'TensorRT-RTX' if self.flavour == 'rtx' else 'TensorRT'} {self.version}"


def load_api(flavour: str) -> TrtApi:
    """Imports a flavour.

    Raises:
        BackendError: not installed, or too old; with the cure.
    """
    if flavour not in FLAVOURS:
        raise BackendError(f"flavour={flavour!r}: one of {', '.join(FLAVOURS)} expected")
    known = FLAVOURS[flavour]
    try:
        module = importlib.import_module(known.module)
    except ImportError as error:
        raise BackendError(f"{known.module}: not installed ({error}); {known.install}") from None
    api = TrtApi(module, flavour)
    if api.numbers < known.minimum:
        least = ".".join(map(str, known.minimum))
        raise BackendError(f"{known.module} {api.version}: {least} or later is needed; {known.install}")
    return api


def min_driver(module: str) -> int:
    """Returns the least major of NVIDIA's driver for an installed flavour's `module`, by the CUDA of its package."""
    for major, driver in MIN_DRIVERS.items():
        for name in (f"{module}_cu{major}", f"{module}_cu{major}_bindings"):
            try:
                importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
            return driver
    return MIN_DRIVER


def check_driver(machine: Machine, least: int = MIN_DRIVER) -> None:
    """Checks the GPU and its driver. Raises BackendError where none answers, or its major is below `least`."""
    if not machine.gpu:
        raise BackendError(
            "TensorRT runs on NVIDIA GPUs and none answers to nvidia-smi; use backend=onnxruntime or torch here"
        )
    if driver_major(machine.driver) < least:
        raise BackendError(f"NVIDIA driver {machine.driver}: TensorRT needs {least} or later; update the driver")
