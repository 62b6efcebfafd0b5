"""The house keeps its shape: import direction, no circles, module names, a quick import."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# from top to bottom: a file imports only from its own row's own folder and from lower rows
LAYERS = (
    ("benchmarks",),
    ("cli",),
    ("commands",),
    ("app",),
    ("export",),
    ("train", "evaluation"),
    ("training", "pipeline"),
    ("inference", "reports"),
    ("formats",),
    ("backends", "data", "metrics"),
    ("checkpoints", "panoptic"),
    ("models", "diffusion", "distributed"),
    ("kernels",),
    ("outputs",),
    ("config",),
    ("files",),
    ("temporary",),
    ("locks",),
    ("stopping",),
    ("errors", "imports", "native", "threads", "allocator", "streams"),
)
LEVEL = {name: level for level, names in enumerate(reversed(LAYERS)) for name in names}
# imports inside a function that point upwards on purpose: a name on first use, what an export checks itself with, and
# the parser of all commands, which is written out as a script
LATE = {
    ("ldmseg_fast", "ldmseg_fast.pipeline"),
    ("ldmseg_fast.commands.completion", "ldmseg_fast.cli"),
    ("ldmseg_fast.panoptic.results", "ldmseg_fast.formats.conversions"),
}
THIRD_PARTY = {
    "accelerate", "datasets", "deepspeed", "diffusers", "evaluate", "fastapi", "fiftyone", "gradio",
    "gradio_client", "hotcoco", "huggingface_hub", "hypothesis", "kernels", "matplotlib", "mlflow", "numpy",
    "onnx", "onnx_ir", "onnxruntime", "onnxscript", "panopticapi", "PIL", "pycocotools", "pytest", "ray", "safetensors",
    "shtab", "supervision", "tensorboard", "tensorrt", "tensorrt_rtx", "torch", "torchao", "tqdm", "trackio",
    "transformers", "triton", "wandb", "xformers", "yaml",
}  # fmt: skip


def module_files() -> dict[str, Path]:
    """Module name -> file, of everything below the four folders that hold code."""
    modules = {}
    for folder in ("ldmseg_fast", "kernels", "export", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            parts = ["ldmseg_fast", *parts] if parts[0] in ("kernels", "export") else parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


MODULES = module_files()


def imported(name: str) -> set[str]:
    """The modules of ours that a module imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {other for other in found & MODULES.keys() if (name, other) not in LATE} - {name}


GRAPH = {name: imported(name) for name in MODULES}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of more than one module that reach each other (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            place = stack.index(name)
            if len(stack) - place > 1:
                found.append(sorted(stack[place:]))
            del stack[place:]

    for name in sorted(graph):
        if name not in index:
            visit(name)
    return found


def room(name: str) -> str:
    """What a module counts as in LAYERS: the file or the folder below `ldmseg_fast`."""
    parts = name.split(".")
    return parts[1] if parts[0] == "ldmseg_fast" and len(parts) > 1 else parts[0]


@pytest.mark.parametrize("name", [name for name in MODULES if name != "ldmseg_fast"])
def test_imports_point_downwards(name):
    assert room(name) in LEVEL, f"give {room(name)} a row in LAYERS"
    for other in GRAPH[name]:
        if other == "ldmseg_fast" or room(other) == room(name):
            continue
        assert room(other) in LEVEL, f"give {room(other)} a row in LAYERS"
        assert LEVEL[room(other)] < LEVEL[room(name)], f"{name} imports {other}, which does not lie lower"


def test_no_circles():
    assert circles(GRAPH) == []


def test_a_circle_would_be_seen():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_no_module_hides_an_import():
    scripts = [
        "ldmseg_fast",
        "export",
        "benchmarks",
        "tests",
        *(f"kernels/{p.name}" for p in (ROOT / "kernels").iterdir()),
    ]
    for folder in scripts:
        if not (ROOT / folder).is_dir():
            continue
        names = {
            path.stem for path in (ROOT / folder).iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
        }
        hidden = names & (sys.stdlib_module_names | THIRD_PARTY)
        assert not hidden, f"{folder}: {hidden} hide other modules from scripts in this folder"


def test_kernels_stays_a_namespace():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_import_is_quick():
    code = (
        "import time, torch; start = time.process_time(); import ldmseg_fast; "  # whatever else the machine does
        "from ldmseg_fast import LDMSegPipeline; print(time.process_time() - start)"
    )
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(times) < 1.0


def test_heavy_packages_stay_out_of_the_import():
    code = "import sys, ldmseg_fast; from ldmseg_fast import LDMSegPipeline; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    heavy = {"deepspeed", "diffusers", "transformers", "tensorrt", "onnxruntime", "xformers", "matplotlib", "gradio"}
    assert not loaded & heavy


def test_a_prediction_and_a_dry_run_import_no_compiler(model_dir, scenes, tmp_path):
    """torch._dynamo takes more than a second, which a command on a CPU that compiles nothing should not pay."""
    train = ["autoencoder", "--config", "tiny", f"data.root={scenes}", f"output_dir={tmp_path / 'run'}", "--dry-run"]
    predict = ["predict", str(model_dir), str(scenes / "val2017"), "--out", str(tmp_path / "maps")]
    code = (
        "import sys; from ldmseg_fast import cli, train; "
        f"print(train.main({train!r}), cli.main({predict!r}), 'torch._dynamo' in sys.modules)"
    )
    cpu = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=cpu, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "0 0 False"
