"""The extras: every one that a message or a document names exists, and what needs none of them runs without."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMED = re.compile(r"(?:ldmseg_fast|-e '\.|'\.)\[([^\]'{}]+)\]")
EXTRAS_ONLY = (
    "accelerate", "datasets", "deepspeed", "diffusers", "gradio", "huggingface_hub", "matplotlib", "onnx",
    "onnxruntime", "onnxscript", "prometheus_client", "pycocotools", "scipy", "skimage", "tensorboard", "tensorrt",
    "tensorrt_rtx", "tokenizers", "torchao", "transformers", "wandb", "xformers",
)  # fmt: skip
# an import of one of them fails as if it was not installed
BLOCKED = f"""
import sys
for name in {EXTRAS_ONLY!r}:
    sys.modules[name] = None
from ldmseg_fast.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def extras() -> dict[str, list[str]]:
    """EXTRAS of setup.py."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    return next(ast.literal_eval(node.value) for node in assigned if ast.unparse(node.targets[0]) == "EXTRAS")


def texts() -> dict[str, str]:
    """Everything that is told to users: code, documents, the Makefile, Docker."""
    folders = ("ldmseg_fast", "kernels", "export", "benchmarks", "docs", "examples", "docker", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md", "")]
    files += [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Makefile", "setup.py")]
    return {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
        for path in files
        if path.is_file() and "__pycache__" not in path.parts and path != Path(__file__)
    }


def test_every_extra_that_is_named_exists(extras):
    named = {
        (place, extra.strip())
        for place, text in texts().items()
        for names in NAMED.findall(text)
        for extra in names.split(",")
    }
    variables = {"$(EXTRA)", "$EXTRAS", "${EXTRAS}"}
    assert len(named) > 15
    assert {(place, extra) for place, extra in named if extra not in extras and extra not in variables} == set()


def test_what_is_promised_is_there(extras):
    assert {"train", "app", "onnx", "trt", "trt-cu12", "hub", "all", "dev"} <= extras.keys()
    together = extras["all"][0].partition("[")[2].rstrip("]").split(",")
    assert {"train", "app", "onnx", "hub"} <= set(together) <= extras.keys()


def test_libraries_of_results_have_extras_of_their_names(extras):
    """`conversions` makes the extra's name of the library's."""
    tree = ast.parse((ROOT / "ldmseg_fast" / "formats" / "conversions.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "_library"]
    names = {ast.literal_eval(call.args[0]) for call in calls}
    assert names and names <= extras.keys()


def blocked(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command where nothing that an extra installs can be imported."""
    command = [sys.executable, "-c", BLOCKED, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_predicting_and_scoring_need_no_extra(scenes, tmp_path):
    """The shipped model from pictures to panoptic quality."""
    pictures, truth = scenes / "val2017", scenes / "annotations" / "panoptic_val2017.json"
    done = blocked("predict", "tiny", pictures, "--out", "out", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["written"]) == 8
    done = blocked("evaluate", "tiny", "--data", scenes, "--out", "results", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    quality = json.loads(done.stdout)["class_agnostic"]["pq"]
    done = blocked("pq", truth, "results/panoptic.json", "--class-agnostic", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 100 * json.loads(done.stdout)["All"]["pq"] == pytest.approx(quality, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["report", "{run}"], "train"),
        (["demo", "--out", "{tmp}/demo"], "train"),
        (["data", "import", "hugging-face", "{scenes}", "{tmp}/out"], "data"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[:2]),
)
def test_a_command_that_needs_an_extra_names_it_in_one_line(arguments, extra, scenes, tmp_path):
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    (run / "logs" / "log.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    done = blocked(*(text.format(run=run, tmp=tmp_path, scenes=scenes) for text in arguments), cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and f"pip install 'ldmseg_fast[{extra}]'" in done.stderr


def test_parts_that_need_an_extra_name_it(monkeypatch):
    from ldmseg_fast.checkpoints.original_sizes import _decoder_tensors
    from ldmseg_fast.config import ConditioningConfig, Config, UNetConfig
    from ldmseg_fast.errors import CheckpointError, ConfigError
    from ldmseg_fast.models.conditioning import build_conditioning
    from ldmseg_fast.training.optimizer import DeepSpeedOptimizer

    for name in ("deepspeed", "diffusers", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    train = r"pip install 'ldmseg_fast\[train\]'"
    with pytest.raises(CheckpointError, match=train):
        _decoder_tensors({})
    with pytest.raises(ConfigError, match=train):
        build_conditioning(UNetConfig(conditioning="clip_text"), ConditioningConfig())
    with pytest.raises(ConfigError, match=train):
        DeepSpeedOptimizer(None, Config(), {})


def test_doctor_runs_without_extras(tmp_path):
    done = blocked("doctor", cwd=tmp_path)
    assert done.returncode == 0 and "what makes it fast here" in done.stdout, done.stderr
