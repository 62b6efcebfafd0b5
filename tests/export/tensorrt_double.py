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
BuilderFlag = enum.Enum("BuilderFlag", "STRIP_PLAN REFIT VERSION_COMPATIBLE")
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

    def create_execution_context(self):
        return IExecutionContext(self)


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
    def __init__(self, engine):
        self.engine, self.profile, self.shapes, self.addresses = engine, None, {}, {}

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
