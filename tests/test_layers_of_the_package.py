"""The house keeps its shape: import direction, module names, a quick import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# each module may import from its own row and the rows above; a name stands for the file or the folder
LAYERS = [
    {
        "errors",
        "files",
        "config",
        "config_checks",
        "config_values",
        "native",
        "panoptic_format",
        "distributed",
        "segments",
        "results",
    },
    {"kernels"},
    {"models", "diffusion", "losses", "slot_matching", "panoptic", "metrics"},
    {
        "data",
        "checkpoint",
        "convert",
        "draw",
        "model_card",
        "pretrained",
        "original_checkpoint",
        "original_sizes",
        "init_from",
        "safe_pickle",
        "diffusers_folder",
    },
    {
        "backends",
        "pipeline",
        "stages",
        "engine",
        "training",
        "optimizer",
        "resume",
        "report",
        "predict",
        "evaluation",
        "error_page",
        "agreement",
        "inpainting",
        "ensemble",
        "mask_sampling",
    },
    {
        "train",
        "cli",
        "ending",
        "evaluate_command",
        "inpaint_command",
        "pq_command",
        "demo",
        "doctor",
        "runs",
        "ship",
        "export",
        "benchmarks",
    },
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
THIRD_PARTY = {
    "accelerate", "datasets", "deepspeed", "diffusers", "evaluate", "hotcoco", "hypothesis", "kernels", "matplotlib",
    "modelopt",
    "numpy", "onnx", "onnxruntime", "onnxscript", "panopticapi", "PIL", "pycocotools", "pytest", "safetensors",
    "tensorboard", "tensorrt", "tensorrt_rtx", "torch", "tqdm", "transformers", "triton", "wandb", "xformers", "yaml",
}  # fmt: skip


def module_files() -> list[Path]:
    folders = ("ldmseg_fast", "kernels", "export", "benchmarks")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """First names below ldmseg_fast that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ldmseg_fast"):
            parts = node.module.split(".")[1:]
            names |= {parts[0]} if parts else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("ldmseg_fast.")}
    return names - {"__version__", "LDMSegPipeline", "_C"}


@pytest.mark.parametrize("path", module_files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_one_way(path):
    relative = path.relative_to(ROOT)
    name = relative.parts[1] if relative.parts[0] == "ldmseg_fast" else relative.parts[0]
    name = name.removesuffix(".py")
    if name == "__init__":
        return
    assert name in LEVEL, f"give {name} a row in LAYERS"
    for other in imported(path):
        assert other in LEVEL, f"{relative}: give {other} a row in LAYERS"
        assert LEVEL[other] <= LEVEL[name], f"{relative} imports {other}, which lies to its right"


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
        "import time, torch; start = time.perf_counter(); import ldmseg_fast; "
        "from ldmseg_fast import LDMSegPipeline; print(time.perf_counter() - start)"
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
