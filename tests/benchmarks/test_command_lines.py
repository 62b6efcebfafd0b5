"""A benchmark's command line is refused before any work where it could only fail, or mislead, after it."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.harness import BenchmarkError, Run
from benchmarks.measuring.options import RANGES
from benchmarks.measuring.training_parts import make_parts
from ldmseg_fast.checkpoints.model_folder import load_component_config
from ldmseg_fast.config.presets import TINY
from ldmseg_fast.distributed.ending import run_command

ROOT = Path(__file__).resolve().parents[2]
RECORDING = [
    "bench_app", "bench_data", "bench_evaluation", "bench_export", "bench_instructions", "bench_kernels",
    "bench_latency", "bench_quantised", "bench_scaling", "bench_throughput", "bench_training", "gpu_suite", "soak",
]  # fmt: skip


@pytest.fixture
def refused(monkeypatch, capsys):
    """Runs a script in this process, and returns its one line of error."""

    def run(name: str, *arguments: object) -> str:
        device = ["--device", "cpu"] if name == "gpu_suite" else []
        monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / f"{name}.py"), *device, *map(str, arguments)])
        assert run_command(importlib.import_module(f"benchmarks.{name}").main) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
        return said.err

    return run


@pytest.mark.parametrize("name", RECORDING)
def test_results_that_cannot_be_written(refused, tmp_path, name):
    (tmp_path / "file").write_text("kept")
    assert f"{tmp_path / 'file'}: Not a directory" in refused(name, "--out", tmp_path / "file")
    assert f"{tmp_path / 'file'}: Not a directory" in refused(name, "--out", tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "kept" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("name", "option", "values"),
    [
        ("bench_app", "--clients", ("0", "-1")),
        ("bench_app", "--requests", ("0",)),
        ("bench_data", "--size", ("0", "100000")),
        ("bench_evaluation", "--images", ("0", "-3")),
        ("bench_instructions", "--jobs", ("0",)),
        ("bench_instructions", "--sm", ("0", "9")),
        ("bench_kernels", "--minutes", ("nan", "inf", "-1", "0")),
        ("bench_latency", "--batch", ("0", "-1")),
        ("bench_latency", "--steps", ("0",)),
        ("bench_latency", "--threads", ("0",)),
        ("bench_quantised", "--rounds", ("0",)),
        ("bench_scaling", "--minutes", ("nan",)),
        ("bench_throughput", "--images", ("0",)),
        ("bench_throughput", "--processes", ("0", "-2")),
        ("bench_throughput", "--workers", ("-1",)),
        ("bench_training", "--batch", ("0",)),
        ("gpu_suite", "--minutes", ("nan", "-1")),
        ("profile_loop", "--batch", ("0",)),
        ("profile_loop", "--rows", ("-1",)),
        ("scaling", "--batch", ("0",)),
        ("scaling", "--cores", ("0",)),
        ("scaling", "--gpus", ("-8",)),
        ("scaling", "--micro-batch", ("0",)),
        ("scaling", "--share", ("0", "nan", "1.5")),
    ],
)
def test_numbers_out_of_range(refused, name, option, values):
    for value in values:
        said = refused(name, option, value)
        assert option in said and str(RANGES[option[2:].replace("-", "_")]) in said


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("bench_data", ["--data", "/nowhere"], "'/nowhere' is not a folder"),
        ("bench_export", ["--quick", "--parts", "unet"], "--quick measures the part tiny alone"),
        ("scaling", ["--gpus", "64"], "--gpus 64: does nothing, as the tables"),
        ("scaling", ["--image", "tiny", "--batch", "8"], "--batch 8: does nothing, as --image"),
    ],
)
def test_options_that_would_be_ignored(refused, name, arguments, message):
    assert message in refused(name, *arguments)


@pytest.mark.parametrize("name", ["bench_latency", "bench_throughput", "profile_loop"])
def test_a_device_that_is_not_there(refused, monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda: no CUDA device here; use --device cpu" in refused(name, "--device", "cuda")


def test_a_run_that_measured_nothing(tmp_path):
    with pytest.raises(BenchmarkError, match="trial: nothing was measured; give it more --minutes"):
        Run("trial", folder=tmp_path).save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_untrained_auto_encoder_can_be_trained_upon(tmp_path):
    model, _ = make_parts(tmp_path, TINY)
    assert load_component_config(model, "mask_vae")[0].scaling_factor == 1.0


@pytest.mark.parametrize("value", ["12", "0x5", "5x", "-1x4", "axb", "4x4x4", "1x100000"])
def test_sizes_of_pictures(value, capsys, monkeypatch):
    for name, option in (("bench_latency", "--sizes"), ("bench_throughput", "--size")):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", f"{option}={value}"])
        with pytest.raises(SystemExit):
            importlib.import_module(f"benchmarks.{name}").main()
        assert f"'{value}': HEIGHTxWIDTH expected" in capsys.readouterr().err


def test_counts_of_instructions_go_where_they_are_asked_for(monkeypatch, tmp_path):
    from benchmarks import bench_instructions

    run = subprocess.run

    def make(command, **settings):
        if "--json" not in command:
            return run(command, **settings)  # git's
        Path(command[command.index("--json") + 1]).write_text("[]", encoding="utf-8")
        return None

    monkeypatch.setattr(bench_instructions.subprocess, "run", make)
    monkeypatch.setattr(
        bench_instructions, "add_rows", lambda run, _, switch: run.add_value(switch, 7.0, "instructions")
    )
    assert bench_instructions.main(["--out", str(tmp_path / "results")]) == 0
    [path] = (tmp_path / "results").iterdir()
    assert path.suffix == ".json"
