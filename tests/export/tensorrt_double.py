"""A stand-in for the `tensorrt` module on machines without a GPU.

An engine is its ONNX graph, run by ONNX Runtime on exactly the addresses that the context was given. Names and
parameters are those of the real bindings; a test compares them.
"""

from __future__ import annotations

import ctypes
import enum
import json
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime

__version__ = "11.4.0.1"


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1
    INT32 = 3
    UINT8 = 5
    INT64 = 7


NUMPY = {1: np.float32, 2: np.uint8, 6: np.int32, 7: np.int64, 10: np.float16}
BuilderFlag = enum.Enum("BuilderFlag", "STRIP_PLAN REFIT VERSION_COMPATIBLE REQUIRE_USER_ALLOCATION")
LayerInformationFormat = enum.Enum("LayerInformationFormat", "ONELINE JSON")
ExecutionContextAllocationStrategy = enum.Enum("ExecutionContextAllocationStrategy", "STATIC USER_MANAGED")
DynamicShapesKernelSpecializationStrategy = enum.Enum("DynamicShapesKernelSpecializationStrategy", "LAZY EAGER NONE")
CudaGraphStrategy = enum.Enum("CudaGraphStrategy", "DISABLED WHOLE_GRAPH_CAPTURE")
SCRATCH = 512  # bytes that every engine asks for
MemoryPoolType = enum.Enum("MemoryPoolType", "WORKSPACE")
ProfilingVerbosity = enum.Enum("ProfilingVerbosity", "LAYER_NAMES_ONLY DETAILED")
HardwareCompatibilityLevel = enum.Enum("HardwareCompatibilityLevel", "NONE AMPERE_PLUS SAME_COMPUTE_CAPABILITY")


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self):
        pass


class ITimingCache:
    def __init__(self, serialized_timing_cache):
        self.content = bytes(serialized_timing_cache)

    def serialize(self):
        return self.content or b"timings"


class IOptimizationProfile:
    def __init__(self):
        self.shapes, self.values = {}, {}

    def set_shape(self, input, min, opt, max):
        self.shapes[input] = [list(min), list(opt), list(max)]

    def set_shape_input(self, input, min, opt, max):
        self.values[input] = [list(min), list(opt), list(max)]


class IBuilderConfig:
    def __init__(self):
        self.profiles, self.flags = [], set()
        self.builder_optimization_level = 3
        self.profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
        self.hardware_compatibility_level = HardwareCompatibilityLevel.NONE

    def add_optimization_profile(self, profile):
        self.profiles.append({"shapes": profile.shapes, "values": profile.values})
        return len(self.profiles) - 1

    def set_flag(self, flag):
        self.flags.add(flag)

    def set_memory_pool_limit(self, pool, pool_size):
        self.workspace = pool_size

    def create_timing_cache(self, serialized_timing_cache):
        return ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache, ignore_mismatch):
        return True


class INetworkDefinition:
    def __init__(self):
        self.model = None

    @property
    def num_layers(self):
        return len(self.model.graph.node)

    def get_layer(self, index):
        node = self.model.graph.node[index]
        return SimpleNamespace(name=node.name, type=SimpleNamespace(name=node.op_type.upper()), num_outputs=0)


class OnnxParser:
    def __init__(self, network, logger):
        self.network, self.errors = network, []

    def parse_from_file(self, model):
        try:
            self.network.model = onnx.load(model)
        except Exception as error:
            self.errors.append(error)
        return not self.errors

    @property
    def num_errors(self):
        return len(self.errors)

    def get_error(self, index):
        return SimpleNamespace(desc=lambda: str(self.errors[index]))


class Builder:
    builds = 0  # over all instances: tests count how often something is really built

    def __init__(self, logger):
        self.logger = logger

    def create_network(self, flags=0):
        return INetworkDefinition()

    def create_builder_config(self):
        return IBuilderConfig()

    def create_optimization_profile(self):
        return IOptimizationProfile()

    def build_serialized_network(self, network, config):
        type(self).builds += 1
        return json.dumps(config.profiles).encode() + b"\0" + network.model.SerializeToString()


class Runtime:
    deserialized = 0  # over all instances

    def __init__(self, logger):
        self.logger = logger
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, serialized_engine):
        type(self).deserialized += 1
        return ICudaEngine(bytes(serialized_engine), self.logger)


class ICudaEngine:
    def __init__(self, content, logger):
        profiles, _, graph = content.partition(b"\0")
        self.profiles, self.logger = json.loads(profiles), logger
        self.session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        self.kinds = {v.name: NUMPY[v.type.tensor_type.elem_type] for v in onnx.load_from_string(graph).graph.input}

    @property
    def device_memory_size_v2(self):
        return SCRATCH

    def create_runtime_config(self):
        return IRuntimeConfig()

    def create_execution_context(self, strategy):
        return IExecutionContext(self, strategy)

    def create_engine_inspector(self):
        return EngineInspector(self)


class EngineInspector:
    def __init__(self, engine):
        self.engine = engine

    def get_engine_information(self, format):
        output = {"Name": "y", "Dimensions": [1, 2], "Format/Datatype": "Half"}
        return json.dumps({"Layers": [{"Name": "fused", "LayerType": "gemm", "Outputs": [output]}, "reformat"]})


class IRuntimeCache:
    def __init__(self):
        self.content = b""

    def deserialize(self, blob):
        self.content = bytes(blob) if bytes(blob).startswith(b"kernels") else b""
        return bool(self.content)

    def serialize(self):
        return self.content


run_configs = []  # of TensorRT-RTX


class IRuntimeConfig:
    def __init__(self):
        self.allocation = ExecutionContextAllocationStrategy.STATIC
        self.dynamic_shapes_kernel_specialization_strategy = self.cuda_graph_strategy = self.cache = None

    def set_execution_context_allocation_strategy(self, strategy):
        self.allocation = strategy

    def create_runtime_cache(self):
        run_configs.append(self)
        return IRuntimeCache()

    def set_runtime_cache(self, cache):
        self.cache = cache
        return True

    def get_runtime_cache(self):
        return self.cache


class Refitter:
    refits = 0  # over all instances

    def __init__(self, engine, logger):
        self.engine = engine

    def refit_cuda_engine(self):
        type(self).refits += 1
        return True


class OnnxParserRefitter:
    def __init__(self, refitter, logger):
        self.refitter = refitter

    def refit_from_file(self, model):
        onnx.load(model)
        return True


class IExecutionContext:
    def __init__(self, engine, run_config):
        self.engine, self.profile, self.shapes, self.addresses = engine, None, {}, {}
        self.run_config, self.scratch = run_config, None

    def set_device_memory(self, memory, size):
        assert size >= SCRATCH
        self.scratch = memory

    def is_stream_capturable(self, stream):
        return True

    def set_optimization_profile_async(self, profile_index, stream_handle):
        self.profile = self.engine.profiles[profile_index]
        return True

    def set_input_shape(self, name, shape):
        ends = self.profile["shapes"].get(name)
        if ends and not all(low <= size <= high for low, size, high in zip(ends[0], shape, ends[2])):
            self.engine.logger.log(ILogger.ERROR, f"{name}: {shape} is outside the profile")
            return False
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name, memory):
        self.addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle):
        assert self.scratch or self.run_config.allocation is not ExecutionContextAllocationStrategy.USER_MANAGED
        if self.run_config.cache is not None:
            self.run_config.cache.content = b"kernels of " + self.engine.session.get_inputs()[0].name.encode()
        feed = {}
        for name, kind in self.engine.kinds.items():
            shape, size = self.shapes[name], np.dtype(kind).itemsize
            count = int(np.prod(shape))
            buffer = (ctypes.c_byte * (count * size)).from_address(self.addresses[name])
            feed[name] = np.frombuffer(buffer, kind).reshape(shape)
        names = [output.name for output in self.engine.session.get_outputs()]
        for name, value in zip(names, self.engine.session.run(names, feed)):
            ctypes.memmove(self.addresses[name], np.ascontiguousarray(value).ctypes.data, value.nbytes)
        return True
