"""Every name of TensorRT's Python API that is used exists, in TensorRT-RTX and in TensorRT 11; the double's too.

TensorRT itself installs its libraries from its vendor, so its Python layer alone is looked at, see `describe_bindings`.
"""

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from ldmseg_fast.backends.trt.api import RTX_TARGETS
from ldmseg_fast.backends.trt.settings import GRAPH_STRATEGIES, SPECIALIZATIONS

ROOT = Path(__file__).resolve().parents[2]
# what each variable of trt_api is, and what some calls return
KINDS = {
    "builder": "Builder", "network": "INetworkDefinition", "parser": "OnnxParser", "config": "IBuilderConfig",
    "profile": "IOptimizationProfile", "runtime": "Runtime", "engine": "ICudaEngine", "context": "IExecutionContext",
    "layer": "ILayer", "output": "ITensor", "cache": "ITimingCache", "refitter": "Refitter",
    "weights": "OnnxParserRefitter", "get_error": "ParserError", "run_config": "IRuntimeConfig",
    "compiled": "IRuntimeCache", "inspector": "EngineInspector",
}  # fmt: skip
# names that trt_api uses for one flavour only, behind a question for it
ONLY_RTX = {
    "IBuilderConfig.num_compute_capabilities", "IBuilderConfig.set_compute_capability", "ComputeCapability",
    "IExecutionContext.is_stream_capturable", "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
    "IRuntimeConfig.cuda_graph_strategy", "IRuntimeConfig.create_runtime_cache", "IRuntimeConfig.get_runtime_cache",
    "IRuntimeConfig.set_runtime_cache", "IRuntimeCache.deserialize", "IRuntimeCache.serialize", "CudaGraphStrategy",
    "DynamicShapesKernelSpecializationStrategy", "BuilderFlag.REQUIRE_USER_ALLOCATION",
}  # fmt: skip
ONLY_TENSORRT = {"NetworkDefinitionCreationFlag", "NetworkDefinitionCreationFlag.STRONGLY_TYPED"}
BY_STRING = {
    "BuilderFlag": {"STRIP_PLAN", "REFIT", "VERSION_COMPATIBLE", "REQUIRE_USER_ALLOCATION"},
    "CudaGraphStrategy": {strategy.upper() for strategy in GRAPH_STRATEGIES},
    "DynamicShapesKernelSpecializationStrategy": {strategy.upper() for strategy in SPECIALIZATIONS},
    "ComputeCapability": {"CURRENT", *(target.upper() for target in RTX_TARGETS)},
}
# of the documented removals in TensorRT 11, https://docs.nvidia.com/deeplearning/tensorrt: names this code could use
REMOVED_IN_11 = {
    "FP16", "INT8", "BF16", "FP8", "INT4", "FP4", "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS",
    "DIRECT_IO", "int8_calibrator", "set_calibration_profile", "set_quantization_flag", "device_memory_size",
    "get_device_memory_size_for_profile", "platform_has_fast_fp16", "platform_has_fast_int8", "set_output_type",
    "reset_precision", "EXPLICIT_BATCH", "execute_async", "execute_async_v2", "max_batch_size", "build_engine",
    "max_workspace_size", "get_binding_index", "num_bindings", "algorithm_selector",
}  # fmt: skip


@pytest.fixture(scope="module", params=["tensorrt_rtx", "tensorrt"])
def real(request) -> tuple[str, dict]:
    """(module, its classes and their members)"""
    name = found = request.param
    if name == "tensorrt" and importlib.util.find_spec(name) is None:
        found = "tensorrt_bindings"
    if importlib.util.find_spec(found) is None:
        pytest.skip(f"no {found}; pip install 'ldmseg_fast[dev]'")
    script = Path(__file__).with_name("describe_bindings.py")
    done = subprocess.run([sys.executable, str(script), found], stdout=subprocess.PIPE, text=True, check=True)
    return name, json.loads(done.stdout)["classes"]


def path_of(node: ast.expr) -> list[str]:
    """["IBuilderConfig", "set_flag"] of `config.set_flag`, ["MemoryPoolType", "WORKSPACE"] of a module's member."""
    if isinstance(node, ast.Attribute):
        if node.attr == "trt":  # self.trt
            return ["trt"]
        base = path_of(node.value)
        return [*base, node.attr] if base else []
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in KINDS:
        return ["trt", KINDS[node.func.attr]]
    if isinstance(node, ast.Name):
        return ["trt", KINDS[node.id]] if node.id in KINDS else ["trt"] if node.id == "trt" else []
    return []


@pytest.fixture(scope="module")
def source() -> ast.ClassDef:
    module = ast.parse((ROOT / "ldmseg_fast" / "backends" / "trt" / "api.py").read_text(encoding="utf-8"))
    return next(node for node in module.body if isinstance(node, ast.ClassDef) and node.name == "TrtApi")


@pytest.fixture(scope="module")
def used(source) -> set[str]:
    """Classes, and class.member, that trt/api.py reads."""
    paths = [path_of(node)[1:3] for node in ast.walk(source) if isinstance(node, ast.Attribute)]
    names = {".".join(path) for path in paths if path and path[0] != "__version__"}
    return names | {f"{kind}.{name}" for kind, members in BY_STRING.items() for name in members}


def test_every_name_that_is_used_exists(real, used, source):
    module, classes = real
    elsewhere = ONLY_RTX if module == "tensorrt" else ONLY_TENSORRT
    for name in used:
        kind, _, member = name.partition(".")
        if not {name, kind} & elsewhere:
            assert kind in classes, f"{module}.{kind} is not in the real bindings"
            assert not member or member in classes[kind], f"{module}.{name} is not in the real bindings"
    assert len(used) >= 60 and used >= ONLY_RTX | ONLY_TENSORRT
    assert not {name.rpartition(".")[2] for name in used} & REMOVED_IN_11
    constants = {node.value for node in ast.walk(source) if isinstance(node, ast.Constant)}
    assert constants >= BY_STRING["BuilderFlag"] | {"CURRENT"}


def test_every_call_fits_its_parameters(real, source):
    module, classes = real
    checked = 0
    for node in ast.walk(source):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        path, given = path_of(node.func)[1:], len(node.args)
        if path[1:] == ["__init__"]:
            given -= 1  # self
        kind, member = (*path, "__init__", "")[:2]
        accepted = classes.get(kind, {}).get(member)
        if accepted is not None:
            assert given <= len(accepted), f"{module}.{'.'.join(path)} takes {accepted}"
            assert {keyword.arg for keyword in node.keywords} <= set(accepted)
            checked += 1
    assert checked >= 25


def test_the_double_has_the_real_names_and_parameters(real, double):
    module, classes = real
    own = {"builds", "deserialized", "refits"}  # the double's counters
    checked = 0
    for kind in {*KINDS.values()} & vars(double).keys():
        for name, member in vars(getattr(double, kind)).items():
            if name[0] == "_" or name in own or (module == "tensorrt" and f"{kind}.{name}" in ONLY_RTX):
                continue
            assert name in classes[kind], f"{module}.{kind}.{name} is not in the real bindings"
            accepted = classes[kind][name]
            if accepted is not None and callable(member):
                ours = list(member.__code__.co_varnames[1 : member.__code__.co_argcount])
                assert ours == accepted[: len(ours)], f"{kind}.{name}{ours}, the real one has {accepted}"
                checked += 1
    assert checked >= 20
    for enum in ENUMS if module == "tensorrt" else (*ENUMS, *ONLY_RTX & vars(double).keys()):
        members = getattr(double, enum).__members__.keys()
        known = {name.removeprefix(f"{enum}.") for name in ONLY_RTX} if module == "tensorrt" else set()
        assert members <= classes[enum].keys() | known


def test_the_double_has_every_name_that_is_used(used, double):
    """Or what runs on it would not run on TensorRT."""
    known = vars(double)
    for name in used:
        kind, _, member = name.partition(".")
        if kind in known and member and not {name, kind} & (ONLY_RTX | ONLY_TENSORRT):
            instance = SETTINGS.get(kind, set())
            assert hasattr(known[kind], member) or member in instance, f"the double has no {name}"


ENUMS = (
    "BuilderFlag", "MemoryPoolType", "ProfilingVerbosity", "HardwareCompatibilityLevel", "LayerInformationFormat",
    "ExecutionContextAllocationStrategy",
)  # fmt: skip
SETTINGS = {
    "IBuilderConfig": {"builder_optimization_level", "profiling_verbosity", "hardware_compatibility_level"},
    "Runtime": {"engine_host_code_allowed"},
}  # of instances


def test_tensorrt_is_used_through_the_shim_alone():
    files = (ROOT / "ldmseg_fast").rglob("*.py")
    for path in [*files, *(ROOT / "export").glob("*.py")]:
        imports = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import | ast.ImportFrom)]
        names = {alias.name for n in imports for alias in n.names} | {getattr(n, "module", None) for n in imports}
        assert not names & {"tensorrt", "tensorrt_rtx"}, f"{path} uses TensorRT without the shim"
