"""The baseline is the same method as ours, and no number is recorded where the two disagree."""

import importlib.util
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch

from benchmarks import bench_latency, bench_throughput
from benchmarks.harness import BenchmarkError, validate
from benchmarks.measuring import first_picture
from benchmarks.measuring.gpu_plan import OURS_ON_A_GPU
from benchmarks.peers import candidates, plain_pipeline
from benchmarks.peers.candidates import OurPipeline, our_candidates, plain_candidates
from benchmarks.peers.plain_pipeline import PlainPipeline, plain_names, plain_postprocess
from ldmseg_fast import LDMSegPipeline
from ldmseg_fast.backends import torch_backend
from ldmseg_fast.backends.graphs.manifest import read_manifest
from ldmseg_fast.backends.model_info import read_model_info
from ldmseg_fast.backends.torch_backend import TorchBackend
from ldmseg_fast.config import PostprocessConfig
from ldmseg_fast.config.categories import CategoryTable
from ldmseg_fast.config.precision import has_units
from ldmseg_fast.diffusion.sampler import image_noise
from ldmseg_fast.kernels.panoptic_head import reference
from ldmseg_fast.models.layers import Attention
from ldmseg_fast.panoptic.postprocess import make_segments_info, with_categories


@pytest.fixture(scope="module")
def info(model_dir):
    return read_model_info(model_dir)


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)


@pytest.mark.parametrize("stand_in", [False, True])
@pytest.mark.parametrize("steps", [1, 4])
def test_the_plain_loop_is_ours(info, picture, monkeypatch, stand_in, steps):
    if stand_in:
        monkeypatch.setattr(plain_pipeline, "HAS_DIFFUSERS", False)
    plain = PlainPipeline(info, "cpu", torch.float32)
    ours = OurPipeline(TorchBackend(info, "cpu", torch.float32))
    noise = image_noise(0, [0], info.latent_shape)
    found, wanted = (p.sample(noise, p.encode(p.preprocess([picture])), steps) for p in (ours, plain))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    results = [pipeline.whole([picture], noise, steps)[0] for pipeline in (ours, plain)]
    assert (results[0].segmentation == results[1].segmentation).mean() > 0.999
    assert ours.finish(wanted, [picture.shape[:2]])[0].segmentation.shape == picture.shape[:2]


def test_plain_postprocessing_is_the_paper_s():
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, 12, 6, 8, generator=generator)
    logits = torch.nn.functional.interpolate(20 * coarse - 26, (96, 128), mode="bicubic")
    thresholds = PostprocessConfig(0.5, 60, 0.4)
    found = plain_postprocess(logits[0], thresholds)
    segmentation, _, area, box, score = reference.panoptic_head(logits, (96, 128), (96, 128), 0.5, 60, 0.4)
    assert np.array_equal(found.segmentation, segmentation[0].numpy())
    assert len(found.segments_info) > 3
    for one, other in zip(found.segments_info, make_segments_info(*(t[0].numpy() for t in (area, box, score)))):
        assert all(one[key] == other[key] for key in ("id", "area", "bbox"))
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)


def test_plain_names_are_ours():
    """Stuff of one category is one segment in both, or the baseline would do less than we do."""
    generator = torch.Generator().manual_seed(0)
    logits, categories = (4 * torch.randn(1, count, 12, 16, generator=generator) for count in (12, 4))
    kinds = [{"id": 7 + number, "name": f"{number}", "isthing": int(number == 0)} for number in range(3)]
    table = CategoryTable.of_data_set(kinds, "here")
    found = plain_postprocess(logits[0], PostprocessConfig(0.0, 1, 0.0))
    (ours,) = with_categories([plain_postprocess(logits[0], PostprocessConfig(0.0, 1, 0.0))], logits, categories, table)
    plain_names(found, logits[0], categories[0], table)
    assert len(ours.segments_info) > 3 and any(segment.get("was_fused") for segment in ours.segments_info)
    assert np.array_equal(found.segmentation, ours.segmentation)
    for one, other in zip(found.segments_info, ours.segments_info, strict=True):
        assert all(one[key] == other[key] for key in ("id", "area", "bbox", "category_id", "name", "isthing"))
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)


def test_candidates_have_names_for_the_report(info, tmp_path):
    names = [*plain_candidates(info, "cpu"), *our_candidates(info, "cpu", tmp_path)]
    assert {"diffusers", "diffusers, compile", "torch float32", "onnxruntime"} <= set(names)
    assert ("torch bfloat16" in names) == has_units("cpu", torch.bfloat16)  # where it is emulated, nobody runs it
    assert not any("compile" in name for name in our_candidates(info, "cpu", tmp_path, slow=False))


@pytest.mark.filterwarnings("ignore:.*bfloat16")
def test_every_variant_of_a_gpu_runs(info, picture, monkeypatch, tmp_path):
    """Each maker of the GPU's variants, with graphs and the compiler replaced by eager, on a CPU."""
    load = candidates.load_backend

    def load_on_cpu(folder, name, device, dtype, **options):
        precision = "fp8-emulated" if options.get("precision") else None
        backend = load(folder, name, device="cpu", dtype=dtype, fused=options.get("fused", False), precision=precision)
        for module in backend.unet.modules():
            if isinstance(module, Attention):
                module.backend = options.get("attention", "auto")
        return backend

    float8 = []
    quantization = SimpleNamespace(
        Float8DynamicActivationFloat8WeightConfig=lambda: "float8", quantize_=lambda *args: float8.append(args[1])
    )
    find = importlib.util.find_spec
    monkeypatch.setitem(sys.modules, "torchao.quantization", quantization)
    monkeypatch.setattr(candidates, "load_backend", load_on_cpu)
    monkeypatch.setattr(candidates, "why_not_fp8", lambda *_: "")
    monkeypatch.setattr(candidates, "has_units", lambda *_: True)
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    monkeypatch.setattr(torch_backend, "compile_network", lambda network, *_: network)
    plain = partial(PlainPipeline, info, "cpu", torch.float32)
    monkeypatch.setattr(candidates, "PlainPipeline", lambda info, device, dtype, *args, **more: plain(*args, **more))
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: name == "torchao" or find(name))
        makers = plain_candidates(info, "cuda") | our_candidates(info, "cuda", tmp_path)
    wanted = {"torch bfloat16", *OURS_ON_A_GPU, "compile bfloat16", "diffusers, compile", "diffusers, compile, float8"}
    assert wanted | {"onnxruntime"} <= makers.keys()
    noise = image_noise(0, [0], info.latent_shape)
    maps = {name: makers[name]().whole([picture], noise, 1)[0].segmentation for name in sorted(wanted)}
    assert all(found.shape == picture.shape[:2] for found in maps.values())
    assert float8 == ["float8"]


def test_the_rival_is_timed(model_dir, tmp_path):
    arguments = ["--variants", "none", "--sizes", "48x64", "--parts", "eomt"]
    assert run_quick(bench_latency.main, model_dir, tmp_path, *arguments) == 0
    record = json.loads(next(tmp_path.glob("latency-*.json")).read_text())
    rows = {row["name"]: row for row in record["results"]}
    assert rows["EoMT whole image"]["p50"] > rows["EoMT forward"]["p50"] > 0


def test_several_pictures_take_the_steps_that_are_asked_for(model_dir, tmp_path, monkeypatch):
    calls = []

    def note(bench, _, batch, steps, names):
        calls.append((batch, steps))
        bench.run.add_value("whole image", 1.0, "ms")

    monkeypatch.setattr(bench_latency, "bench_whole", note)
    arguments = ["--variants", "none", "--sizes", "48x64", "--parts", "whole", "--batch", "1", "2", "--steps", "4", "1"]
    assert run_quick(bench_latency.main, model_dir, tmp_path, *arguments) == 0
    assert calls == [(1, 4), (1, 1), (2, 1)]


@pytest.mark.parametrize("fault", ["", "a map", "an exit code"])
def test_the_first_picture_of_a_process(fault, model_dir, tmp_path, monkeypatch):
    """By doubles of the processes: the third finds what the second kept, and none finds what inductor kept."""
    processes = []
    run = subprocess.run

    def start(command, **settings):
        if "benchmarks.measuring.first_picture" not in command:
            return run(command, **settings)  # git's
        environment = settings["env"]
        kept = Path(environment["XDG_CACHE_HOME"]) / "packages"
        processes.append((command[command.index("--backend") + 1], kept.exists()))
        assert not list(Path(environment["TORCHINDUCTOR_CACHE_DIR"]).iterdir())
        if "compile" in command:
            kept.mkdir(exist_ok=True)
        found = np.full((48, 64), kept.exists() and fault == "a map")
        np.save(command[command.index("--out") + 1], found)
        milliseconds = "9000.0" if len(processes) == 2 else "3000.0"
        return subprocess.CompletedProcess(command, int(fault == "an exit code"), milliseconds, "it failed")

    monkeypatch.setattr(first_picture.subprocess, "run", start)
    arguments = ["--variants", "none", "--sizes", "48x64", "--parts", "first", "--device", "cpu"]
    assert run_quick(bench_latency.main, model_dir, tmp_path, *arguments) == int(bool(fault))
    rows = json.loads(next(tmp_path.glob("latency-*.json")).read_text())["results"]
    if fault:
        assert [row["red"] for row in rows] == [
            "maps differ: 0.00% of the pixels alike"
            if fault == "a map"
            else "BenchmarkError: first picture: torch float32: it failed"
        ]
        return
    assert processes == [("torch", False), ("compile", False), ("compile", True)]
    times = {row["variant"]: row["p50"] for row in rows}
    assert times == {
        "torch float32": 3000.0,
        "compile float32, nothing kept": 9000.0,
        "compile float32, packages kept": 3000.0,
    }


def test_first_pictures_are_a_processors(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(BenchmarkError, match="--parts first: packages are kept on a CPU"):
        bench_latency.main(["--parts", "first", "--device", "cuda"])


def test_what_a_process_times(model_dir):
    picture = np.zeros((48, 64, 3), np.uint8)
    milliseconds, found = first_picture.time_first(lambda: LDMSegPipeline.from_pretrained(model_dir), picture, 1)
    assert milliseconds > 0 and found.shape == (48, 64)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Exports of the narrow model by precision, of those that were written."""
    return tmp_path_factory.mktemp("written"), {}


@pytest.fixture
def written_once(written, monkeypatch):
    """Graphs of a precision are written for the first test that asks for them, and copied for the others."""
    root, made = written
    original = bench_latency.write_graphs

    def write_graphs(info, folder, options, settings):
        if settings.precision not in made:
            made[settings.precision] = root / settings.precision
            made[settings.precision].mkdir()
            original(info, made[settings.precision], options, settings)
        shutil.copytree(made[settings.precision], folder, dirs_exist_ok=True)
        return read_manifest(folder)

    monkeypatch.setattr(bench_latency, "write_graphs", write_graphs)


def test_a_runtime_that_is_not_there_is_a_red_row(model_dir, written_once, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    arguments = ["--variants", "none", "--sizes", "48x64", "--parts", "openvino"]
    assert run_quick(bench_latency.main, model_dir, tmp_path, *arguments) == 1
    rows = json.loads(next(tmp_path.glob("latency-*.json")).read_text())["results"]
    red = {row["variant"]: row["red"] for row in rows if "red" in row}
    assert red.keys() == {"openvino fp32", "openvino int8"} and all("openvino" in reason for reason in red.values())
    timed = {row["variant"]: row for row in rows if "red" not in row}
    assert timed.keys() == {"torch eager", "onnxruntime fp32", "onnxruntime int8"}


def test_openvino_is_a_row_where_it_computes_the_graph(model_dir, written_once, tmp_path, monkeypatch):
    """Through a double, whose results in int8 are wrong."""

    class Request:
        def __init__(self, graph):
            self.session, self.inputs = onnxruntime.InferenceSession(graph), {}
            self.error = 1 if "int8" in graph else 0

        def set_tensor(self, name, tensor):
            self.inputs[name] = tensor.data

        def infer(self):
            (self.output,) = self.session.run(["model_output"], self.inputs)

        def get_tensor(self, name):
            return SimpleNamespace(data=self.output + (self.error if name == "model_output" else 0))

    compiled = SimpleNamespace(
        compile_model=lambda graph, *_: SimpleNamespace(create_infer_request=lambda: Request(graph))
    )
    double = SimpleNamespace(Core=lambda: compiled, Tensor=lambda data: SimpleNamespace(data=data))
    monkeypatch.setitem(sys.modules, "openvino", double)
    arguments = ["--variants", "none", "--sizes", "48x64", "--parts", "openvino"]
    assert run_quick(bench_latency.main, model_dir, tmp_path, *arguments) == 1
    record = json.loads(next(tmp_path.glob("latency-*.json")).read_text())
    red = {row["variant"]: row["red"] for row in record["results"] if "red" in row}
    assert red.keys() == {"openvino int8"} and "differs from torch eager" in red["openvino int8"]
    timed = {row["variant"] for row in record["results"] if "red" not in row}
    assert timed == {"torch eager", "onnxruntime fp32", "onnxruntime int8", "openvino fp32"}
    assert any("openvino fp32 equals torch eager" in name for name in record["checks"])


def run_quick(main, model_dir, out, *arguments):
    threads = torch.get_num_threads()
    try:
        return main(["--quick", "--model", str(model_dir), "--out", str(out), *arguments])
    finally:
        torch.set_num_threads(threads)


def test_latency_is_recorded_stage_by_stage(model_dir, tmp_path):
    arguments = ["--variants", "torch float32", "--sizes", "48x64"]
    assert run_quick(bench_latency.main, model_dir, tmp_path, *arguments) == 0
    record = json.loads(next(tmp_path.glob("latency-*.json")).read_text())
    validate(record)
    names = {row["name"] for row in record["results"]}
    assert {"one step", "whole image", "file to file", "10 steps", "image encoder", "decoder and head"} <= names
    whole = {row["variant"]: row for row in record["results"] if row["name"] == "whole image"}
    assert whole["diffusers"]["ratio"] == 1.0 and whole["torch float32"]["target"] == 2.0
    assert whole["torch float32"]["quality"]["pixels_alike"] > 0.999
    assert all(record["checks"].values()) and len(record["checks"]) == 2


def test_a_wrong_result_is_a_red_row_and_the_others_stay(model_dir, tmp_path, monkeypatch, capsys):
    """Neither a backend that disagrees, nor one that cannot run here, nor one without memory costs the others' rows."""

    def refuse(*_):
        raise RuntimeError("no such device\nand more")

    def makers(info, device, scratch, *_, **__):
        makers = our_candidates(info, device, scratch, slow=False)
        small = makers["torch float32"]
        return makers | {"wrong": Wrong(small), "small": Small(small), "onnxruntime": refuse}

    monkeypatch.setattr(bench_latency, "our_candidates", makers)
    arguments = ["--sizes", "48x64", "--parts", "step", "--variants", "torch float32", "wrong", "small", "onnxruntime"]
    assert run_quick(bench_latency.main, model_dir, tmp_path, *arguments) == 1
    record = json.loads(next(tmp_path.glob("latency-*.json")).read_text())
    validate(record)
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]
    red = {row["variant"]: row["red"] for row in record["results"] if "red" in row}
    assert red["wrong"].startswith("differs from diffusers: latents 0.01 apart")
    assert red["onnxruntime"] == "RuntimeError: no such device" and red["small"] == "MemoryError: batch"
    assert {row["variant"] for row in record["results"] if "p50" in row} == {"diffusers", "torch float32"}
    assert "RED: RuntimeError: no such device" in capsys.readouterr().out


class Wrong:
    """Makes a pipeline that is one percent off."""

    def __init__(self, make):
        self.make = make

    def __call__(self):
        pipeline = self.make()
        right = pipeline.sample
        pipeline.sample = lambda *arguments: self.change(right, arguments)
        return pipeline

    def change(self, right, arguments):
        return 1.01 * right(*arguments)


class Small(Wrong):
    """Makes one that runs out of memory once it is timed."""

    calls = 0

    def change(self, right, arguments):
        self.calls += 1
        if self.calls > 1:
            raise MemoryError("batch")
        return right(*arguments)


def test_throughput_overlaps_and_stays_right(model_dir, tmp_path):
    arguments = ["--images", "4", "--batch", "3", "--steps", "2", "--size", "48x64", "--variants", "torch float32"]
    assert run_quick(bench_throughput.main, model_dir, tmp_path, *arguments) == 0
    record = json.loads(next(tmp_path.glob("throughput-*.json")).read_text())
    validate(record)
    variants = {row["variant"] for row in record["results"] if row["unit"] == "images/s"}
    assert variants == {
        "diffusers, one at a time", "torch float32, batch 3, 0 readers", "torch float32, batch 3, 1 readers",
    }  # fmt: skip
    (gain,) = (row for row in record["results"] if row["name"] == "gain of overlap")
    assert gain["variant"] == "torch float32, batch 3, 1 readers" and gain["value"] > 0
    rows = {row["variant"]: row for row in record["results"] if row["name"] == "file to file"}
    assert all(row["samples"] >= 3 for row in rows.values()) and rows["diffusers, one at a time"]["ratio"] == 1


def test_throughput_ends_in_time_and_names_what_it_left_out(model_dir, tmp_path, capsys):
    arguments = ["--images", "2", "--steps", "1", "--size", "48x64", "--minutes", "0.0001"]
    assert run_quick(bench_throughput.main, model_dir, tmp_path, *arguments) == 0
    variant = bench_throughput.DEFAULT_VARIANTS["cpu"][0]
    assert variant == ("torch bfloat16" if has_units("cpu", torch.bfloat16) else "torch float32")
    assert f"{variant}, batch 3, 1 readers: not measured (time budget)" in capsys.readouterr().out
    record = json.loads(next(tmp_path.glob("throughput-*.json")).read_text())
    assert [row["samples"] for row in record["results"] if row["name"] == "file to file"] == [3]


def test_an_error_in_a_thread_comes_out(info, tmp_path):
    pipeline = OurPipeline(TorchBackend(info, "cpu", torch.float32))
    with pytest.raises(ValueError, match=r"missing\.jpg"):
        bench_throughput.Overlapped(pipeline, 2, 1)([tmp_path / "missing.jpg"], tmp_path, 1)


@pytest.mark.serial
def test_processes_share_a_folder(model_dir, tmp_path):
    assert run_quick(bench_throughput.main, model_dir, tmp_path, "--processes", "1", "2", "--batch", "2") == 0
    record = json.loads(next(tmp_path.glob("throughput-*.json")).read_text())
    validate(record)
    assert record["checks"]["2 processes write the files of 1"]
    rows = {(row["name"], row["variant"]): row["value"] for row in record["results"]}
    assert {variant for _, variant in rows} == {"1 processes", "2 processes", "static", "dynamic"}
    assert all(value > 0 for value in rows.values())
