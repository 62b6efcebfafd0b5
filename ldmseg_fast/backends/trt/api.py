"""Wraps TensorRT (10.13 on, and 11) and TensorRT for RTX. Every use of their Python APIs is in this file."""

from __future__ import annotations

import importlib
import json
import mmap
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmseg_fast.backends.trt.machine import Machine, min_driver, this_machine
from ldmseg_fast.backends.trt.settings import BuildSettings, Built, RunSettings
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
RTX_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")


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
        if settings.detailed and self.machine.gpu:
            layers = self._inspect(engine, settings.version_compatible)
        return Built(memoryview(engine), bytes(cache.serialize()) if cache is not None else b"", layers)

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
        flags["REQUIRE_USER_ALLOCATION"] = settings.user_allocation
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

    def _describe(self, layer: Any) -> tuple[str, str, str]:
        outputs = [layer.get_output(index) for index in range(layer.num_outputs)]
        kinds = ", ".join(f"{output.dtype.name}{list(output.shape)}" for output in outputs)
        return layer.type.name, layer.name, kinds

    def _inspect(self, plan: Any, version_compatible: bool) -> list[tuple[str, str, str]]:
        """Lists the layers of a built engine; none where TensorRT does not load it."""
        trt = self.trt
        runtime = trt.Runtime(self.log)
        if version_compatible:
            runtime.engine_host_code_allowed = True
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            self.take_errors()
            return []
        inspector = engine.create_engine_inspector()
        text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
        found = []
        for entry in json.loads(text)["Layers"]:
            told: dict[str, Any] = (
                {"Name": entry} if isinstance(entry, str) else entry
            )  # a name alone, of what has no details
            outputs = [f"{each['Format/Datatype']}{each['Dimensions']}" for each in told.get("Outputs", ())]
            found.append((told.get("LayerType", "unknown"), told["Name"], ", ".join(outputs)))
        return found

    # running

    def deserialize(self, engine_file: Path, version_compatible: bool = False) -> Any:
        """Loads an engine. Its passport must have been checked before: a foreign file can do anything here.

        TensorRT reads the file where it lies, so that a large engine is not in memory beside its own copy.

        Raises:
            BackendError: an engine that TensorRT does not load.
        """
        runtime = self.trt.Runtime(self.log)
        if version_compatible:
            runtime.engine_host_code_allowed = True
        with engine_file.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            engine = runtime.deserialize_cuda_engine(plan)
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

    def runtime_config(self, engine: Any, settings: RunSettings, kernels: bytes = b"") -> Any:
        """Says how contexts of an engine run: in scratch memory that they are given, and as `settings` say.

        Args:
            engine: as `deserialize` returned it.
            settings: of TensorRT-RTX.
            kernels: what TensorRT-RTX compiled before, see `compiled_kernels`; what does not fit is not used.
        """
        trt = self.trt
        run_config = engine.create_runtime_config()
        run_config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self.flavour == "rtx":
            strategies = trt.DynamicShapesKernelSpecializationStrategy, trt.CudaGraphStrategy
            chosen = settings.kernel_specialization.upper(), settings.graph_strategy.upper()
            run_config.dynamic_shapes_kernel_specialization_strategy = getattr(strategies[0], chosen[0])
            run_config.cuda_graph_strategy = getattr(strategies[1], chosen[1])
            compiled = run_config.create_runtime_cache()
            if kernels and not compiled.deserialize(kernels):
                self.take_errors()  # of another version or GPU: it compiles them again
            run_config.set_runtime_cache(compiled)
        return run_config

    def compiled_kernels(self, run_config: Any) -> bytes:
        """Returns the kernels that TensorRT-RTX has compiled while engines ran, for the next start; else nothing."""
        if self.flavour != "rtx":
            return b""
        compiled = run_config.get_runtime_cache()
        return bytes(compiled.serialize()) if compiled is not None else b""

    def scratch_bytes(self, engine: Any) -> int:
        """Returns how much scratch memory a context of an engine needs, whatever its profile."""
        return int(engine.device_memory_size_v2)

    def create_context(self, engine: Any, profile: int, stream: int, run_config: Any, scratch: Tensor) -> Any:
        """Makes an execution context of one optimisation profile on a CUDA stream, given by its handle.

        Args:
            engine, run_config: of `deserialize` and `runtime_config`.
            profile: its place.
            stream: what runs on it shares `scratch`.
            scratch: uint8 [N], of `scratch_bytes` at least.

        Raises:
            BackendError: TensorRT makes none; most often the GPU's memory is full.
        """
        context = engine.create_execution_context(run_config)
        if context is not None and scratch.numel():
            context.set_device_memory(scratch.data_ptr(), scratch.numel())
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

    def can_be_captured(self, context: Any, stream: int) -> bool:
        """Tells whether a run on a stream, given by its handle, may become part of a CUDA graph.

        TensorRT-RTX says so of shapes that were set, see `bind`. TensorRT always tries.
        """
        return self.flavour != "rtx" or bool(context.is_stream_capturable(stream))

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
