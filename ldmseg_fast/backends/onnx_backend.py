"""Runs exported graphs in ONNX Runtime, on the CPU or CUDA."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmseg_fast.backends.graphs.batching import Ranges
from ldmseg_fast.backends.graphs.graph_backend import GraphBackend
from ldmseg_fast.backends.graphs.loop import Runner, use_cuda_graph
from ldmseg_fast.backends.graphs.manifest import at_graphs_size, check_files, check_model, read_manifest
from ldmseg_fast.backends.graphs.specs import GraphSpec
from ldmseg_fast.backends.model_info import ModelInfo
from ldmseg_fast.errors import BackendError

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
ONNX_TYPES = {"float32": 1, "uint8": 2, "int32": 6, "int64": 7, "float16": 10, "bfloat16": 16}  # TensorProto.DataType


class OrtRunner:
    """Runs a session whose inputs and outputs are bound to torch tensors, on either device.

    Args:
        session: an `onnxruntime.InferenceSession`.
        spec: of its graph.
        graph_ids: numbers for ONNX Runtime's CUDA graphs; None: nothing is captured.
    """

    def __init__(self, session: Any, spec: GraphSpec, graph_ids: itertools.count | None = None) -> None:
        self.session = session
        self.spec = spec
        self._graph_ids = graph_ids

    def prepare(self, tensors: Mapping[str, Tensor], repeated: bool = False) -> Callable[[], None]:
        """See `Runner.prepare`."""
        from onnxruntime import RunOptions

        binding = self.session.io_binding()
        for specs, bind in ((self.spec.inputs, binding.bind_input), (self.spec.outputs, binding.bind_output)):
            for spec in specs:
                tensor = tensors[spec.name]
                index, kind = tensor.device.index or 0, ONNX_TYPES[spec.dtype]
                bind(spec.name, tensor.device.type, index, kind, list(tensor.shape), tensor.data_ptr())
        options = None  # else ONNX Runtime looks for the entry in each run, and its exception takes 50 us
        if self._graph_ids is not None:
            options = RunOptions()
            options.add_run_config_entry("gpu_graph_id", str(next(self._graph_ids)) if repeated else "-1")
        alive = tuple(tensors.values())  # the binding holds their addresses only

        def run() -> None:
            if any(tensor.is_cuda for tensor in alive):
                torch.cuda.current_stream().synchronize()  # ONNX Runtime works on a stream of its own
            self.session.run_with_iobinding(binding, options)

        return run


def _sums_saturate() -> bool:
    """Tells whether the CPU adds products of unsigned and signed bytes in 16 bits; of unsigned ones it uses 32."""
    found = torch.cpu.get_capabilities()
    return found.get("architecture") == "x86_64" and not (found.get("avx512_vnni") or found.get("avx_vnni"))


def load_onnx_backend(
    info: ModelInfo,
    engine_dir: str | Path,
    device: str | torch.device | None = None,
    lanes: int = 1,
    threads: int = 0,
    cuda_graph: bool | None = None,
    image_size: int | None = None,
    exact: bool = False,
) -> GraphBackend:
    """Loads the graphs that `to_onnx.py` wrote.

    Args:
        info: of MODEL_DIR.
        engine_dir: its exported graphs.
        device: default CUDA where torch and ONNX Runtime both have it and the graphs are not for a CPU, else the CPU.
        lanes: how many threads can be inside at a time.
        threads: of ONNX Runtime on the CPU; default torch's.
        cuda_graph: let ONNX Runtime capture each step of the sampling loop, on a GPU; None: do not.
        image_size: side in pixels of what the networks see; default the graphs' own, or the model's.
        exact: for comparing: keep a GPU from rounding float32 to TF32, and no memory from one run to the next.

    Raises:
        BackendError: no ONNX Runtime, a folder that is no export or not of this model, a provider that is not there, a
            CUDA graph on another device than a GPU, int8 for a CPU on another device.
        CheckpointError: a damaged model folder.
    """
    try:
        import onnxruntime as ort
    except ImportError:
        raise BackendError(
            "backend=onnxruntime: not installed; pip install 'ldmseg_fast[onnx]', or [onnx-gpu] on a machine with a GPU"
        ) from None
    folder = Path(engine_dir)
    manifest = read_manifest(folder)
    check_model(folder, manifest.model_hash, info, manifest.command)
    check_files(folder, manifest, tuple(manifest.graphs))
    info = at_graphs_size(info, folder, manifest, image_size)
    if manifest.precision == "bf16":
        raise BackendError(f"{folder}: exported in bf16, which ONNX Runtime does not run; export with --precision fp16")
    available = ort.get_available_providers()
    if device is None:
        has_gpu = torch.cuda.is_available() and PROVIDERS["cuda"] in available
        device = "cuda" if has_gpu and not manifest.is_for_cpu else "cpu"
    device = torch.device(device)
    if manifest.is_for_cpu and device.type != "cpu":
        raise BackendError(f"{folder}: int8 for a CPU, device={device} was asked for; export with --precision fp16")
    provider = PROVIDERS.get(device.type)
    if provider not in available:
        raise BackendError(
            f"device={device}: this onnxruntime has {', '.join(available)}; pip uninstall onnxruntime, then "
            f"pip install onnxruntime-gpu; or use device='cpu'"
        )
    capture = bool(cuda_graph) and use_cuda_graph(cuda_graph, device)

    def open_session(name: str) -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        # between calls its threads would go on spinning on the cores that torch's pre- and post-processing use
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if exact:  # which is for comparing: a run's memory goes back after it, at some cost in time
            options.enable_cpu_mem_arena = options.enable_mem_pattern = False
            # weights stay in the mapped file: neither packed nor laid out anew for this processor
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        saturates = manifest.is_for_cpu and manifest.rules < 2 and _sums_saturate()
        # moving TensorRT's quantisers past other nodes, it makes float8 inputs that those refuse, or mixes signed bytes
        # with unsigned ones
        for_tensorrt = manifest.precision in ("fp8", "int8") and not manifest.is_for_cpu
        if exact or for_tensorrt or (saturates and manifest.graphs[name].spec.kind == "sampler"):
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        elif saturates:  # unsigned weights instead, which it refuses to make of those that a sampler's steps share
            options.add_session_config_entry("session.x64quantprecision", "1")
        settings: dict[str, str] = {}
        if device.type == "cuda":
            settings = {"device_id": str(device.index or 0)}
            settings |= {"use_tf32": "0"} if exact else {}
            settings |= {"enable_cuda_graph": "1"} if capture and name == "denoiser" else {}
        path = folder / manifest.graphs[name].file
        try:
            session = ort.InferenceSession(str(path), options, providers=[(provider, settings)])
        except Exception as error:  # onnxruntime's own types, which are not exported
            raise BackendError(f"{path}: ONNX Runtime does not load it ({error}); export again") from None
        if session.get_providers()[0] != provider:
            raise BackendError(
                f"{path}: {provider} was asked for and {session.get_providers()[0]} would run; install the CUDA and "
                f"cuDNN that this onnxruntime-gpu needs, or use device='cpu'"
            )
        return session

    sessions = {name: open_session(name) for name in manifest.graphs}
    specs = {name: manifest.graphs[name].spec for name in manifest.graphs}
    graph_ids = itertools.count(1) if capture else None

    def make_runners(stream: torch.cuda.Stream | None) -> Mapping[str, Runner]:
        return {
            name: OrtRunner(session, specs[name], graph_ids if name == "denoiser" else None)
            for name, session in sessions.items()
        }

    fixed = manifest.options.batch
    batches: dict[str, Ranges] = dict.fromkeys(specs, ((fixed, fixed),)) if fixed else {}
    if not fixed and manifest.options.head != "logits":
        batches["mask_decoder"] = ((1, 1),)  # its head holds every slot at the map's size
    return GraphBackend(info, specs, make_runners, device, lanes, batches=batches, close=sessions.clear)
