"""`to_trt.py`: real TensorRT-RTX builds without a GPU; cache, lock and refusals through the double."""

import fcntl
import json
import multiprocessing
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from ldmseg_fast.backends.graphs.manifest import read_manifest
from ldmseg_fast.backends.graphs.seal import sealed
from ldmseg_fast.backends.load import load_backend
from ldmseg_fast.backends.trt import api as trt_api
from ldmseg_fast.backends.trt.api import load_api
from ldmseg_fast.backends.trt.machine import Machine
from ldmseg_fast.backends.trt.passport import read_passport
from ldmseg_fast.backends.trt.settings import BuildSettings, Built
from ldmseg_fast.checkpoints.shipped import resolve_model_dir
from ldmseg_fast.errors import BackendError
from ldmseg_fast.export import engine_build, engine_sources, model_export, output_folder, to_trt
from ldmseg_fast.export.parity_report import ParityReport, Row


@pytest.fixture(scope="module")
def rtx():
    pytest.importorskip("tensorrt_rtx", reason="pip install 'ldmseg_fast[rtx]'")
    return load_api("rtx")


@pytest.fixture(scope="module")
def half(half_graphs, rtx, tmp_path_factory):
    """Real engines of the narrow model in float16."""
    out = tmp_path_factory.mktemp("engines") / "fp16"
    arguments = [str(half_graphs), "--out", str(out), "--flavour", "rtx", "--target", "sm89", "--verbose"]
    assert to_trt.main(arguments) == 0
    return out


def test_a_model_builds_in_half_without_a_gpu(half):
    assert read_manifest(half).precision == "fp16"
    for name in ("image_encoder", "denoiser", "mask_decoder"):
        passport = read_passport(half, name)
        engine = (half / f"{name}.engine").read_bytes()
        assert len(engine) == passport.engine_bytes > 100_000
        assert (passport.flavour, passport.targets, passport.precision) == ("rtx", ("sm89",), "fp16")
        assert (half / f"{name}.layers.txt").read_text().count("\n") > 10
    assert "HALF" in (half / "denoiser.layers.txt").read_text()


def test_what_is_there_is_not_built_again(half, half_graphs):
    before = (half / "denoiser.engine").stat().st_mtime_ns
    arguments = [str(half_graphs), "--out", str(half), "--flavour", "rtx", "--target", "sm89", "--verbose"]
    assert to_trt.main(arguments) == 0
    assert (half / "denoiser.engine").stat().st_mtime_ns == before


def test_float32_and_several_targets(graphs, rtx, tmp_path):
    """One small graph is enough: what differs is the builder's configuration."""
    manifest = read_manifest(graphs)
    graph = manifest.graphs["image_encoder"]
    profile = {"batch": (1, 2, 4)}
    for targets in (("portable",), ("sm80", "sm120")):
        settings = BuildSettings(targets, level=1, workspace_gib=1.0, detailed=True, user_allocation=True)
        shapes = engine_build.shapes_of(graph.spec, profile)
        built = rtx.build(graphs / graph.file, [shapes], settings)
        assert len(built.engine) > 10_000 and any(kind == "CONVOLUTION" for kind, _, _ in built.layers)


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_a_quantised_model_builds(model_dir, rtx, scenes, tmp_path, precision):
    out = tmp_path / precision
    arguments = ["--flavour", "rtx", "--target", "sm89", "--precision", precision, "--data", str(scenes)]
    assert to_trt.main([str(model_dir), "--out", str(out), *arguments, "--parity-images", "1"]) == 0
    import onnx

    nodes = {node.op_type for node in onnx.load(out / "onnx" / "denoiser.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= nodes
    assert read_passport(out, "denoiser").precision == precision
    worst = min(value for what, value in read_passport(out, "denoiser").parity.items() if "cosine" in what)
    assert worst >= 0.98


def test_a_damaged_graph_is_refused_by_the_parser(rtx, tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"no graph at all")
    with pytest.raises(BackendError, match=r"bad\.onnx: TensorRT-RTX .* does not take it"):
        rtx.build(tmp_path / "bad.onnx", [], BuildSettings(("portable",)))


def test_tensorrt_10_is_told_to_type_strongly(double):
    from ldmseg_fast.backends.trt.api import TrtApi

    flag = SimpleNamespace(STRONGLY_TYPED=1)
    module = SimpleNamespace(ILogger=double.ILogger, __version__="10.13.2.6", NetworkDefinitionCreationFlag=flag)
    assert TrtApi(module, "tensorrt")._network_flags() == 2
    module.__version__ = "11.4.0.1"
    assert TrtApi(module, "tensorrt")._network_flags() == 0


# through the double


def test_passports_say_what_was_built(engines, graphs):
    manifest, passport = read_manifest(graphs), read_passport(engines, "denoiser")
    assert passport.gpu == "NVIDIA H100 80GB HBM3" and passport.driver == "580.65.06"
    assert passport.model_hash == manifest.model_hash and passport.onnx_sha256 == manifest.graphs["denoiser"].sha256
    assert passport.profiles == ({"batch": (1, 1, 4)},)
    assert read_passport(engines, "mask_decoder").profiles[0]["height"] == (1, 64, 96)
    assert passport.parity["maps: pixel agreement"] >= 0.999 and "--max-batch 4" in passport.command
    assert (engines / "timing.cache").read_bytes() == b"timings"


def test_equal_settings_build_once(graphs, trt, double, tmp_path):
    arguments = [str(graphs), "--out", str(tmp_path / "e")]
    assert to_trt.main(arguments) == 0 and double.Builder.builds == 4
    assert to_trt.main(arguments) == 0 and double.Builder.builds == 4
    assert to_trt.main([*arguments, "--max-batch", "2"]) == 0 and double.Builder.builds == 7  # all but the decoder
    (tmp_path / "e" / "denoiser.engine").write_bytes(b"damaged")
    assert to_trt.main([*arguments, "--max-batch", "2"]) == 0 and double.Builder.builds == 8


def test_a_model_is_exported_once(model_dir, trt, tmp_path, capsys):
    arguments = [str(model_dir), "--out", str(tmp_path / "e"), "--precision", "fp32", "--no-parity"]
    assert to_trt.main(arguments) == 0
    before = (tmp_path / "e" / "onnx" / "denoiser.onnx").stat().st_mtime_ns
    capsys.readouterr()
    assert to_trt.main([*arguments, "--max-batch", "2"]) == 0
    assert "onnx, unchanged" in capsys.readouterr().out
    assert (tmp_path / "e" / "onnx" / "denoiser.onnx").stat().st_mtime_ns == before
    settings = model_export.ExportSettings("fp32", parity=False)
    assert model_export.is_current(model_dir, tmp_path / "e" / "onnx", settings)
    for change in ({"precision": "fp16"}, {"head": "both"}, {"parity": True}, {"size": "32"}, {"sampler_steps": "2"}):
        assert not model_export.is_current(model_dir, tmp_path / "e" / "onnx", replace(settings, **change))


def test_a_comparison_that_was_asked_for_is_made(tmp_path):
    """What was compared on other pictures, or on fewer, is not taken for it."""
    settings = model_export.ExportSettings("fp32")
    assert not model_export._is_compared(tmp_path, settings)
    report = ParityReport("fp32", 2, "generated scenes", [Row("maps", 1.0)], {})
    (tmp_path / model_export.PARITY).write_text(json.dumps(report.to_dict()))
    assert model_export._is_compared(tmp_path, settings)
    assert model_export._is_compared(tmp_path, replace(settings, parity_images=2))
    for change in ({"parity_images": 3}, {"data": "scenes"}):
        assert not model_export._is_compared(tmp_path, replace(settings, **change))
    (tmp_path / model_export.PARITY).write_text(json.dumps(replace(report, source="scenes/val2017").to_dict()))
    assert model_export._is_compared(tmp_path, replace(settings, data="/of/scenes"))
    (tmp_path / model_export.PARITY).write_text("[" * 9999)
    assert not model_export._is_compared(tmp_path, settings)


def test_what_a_killed_build_left_is_removed(graphs, trt, tmp_path):
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / ".denoiser.engine.ldmseg-new-123").write_bytes(b"half an engine")
    (tmp_path / "e" / ".denoiser.passport.json.123").write_bytes(b"half a passport")
    (tmp_path / "e" / ".mine.new-abc").write_bytes(b"not ours")
    assert to_trt.main([str(graphs), "--out", str(tmp_path / "e")]) == 0
    assert [path.name for path in (tmp_path / "e").glob(".*")] == [".mine.new-abc"]


def test_graphs_stay_until_their_engines_are_built(model_dir, graphs, trt, tmp_path, monkeypatch):
    """A second command would put the graphs of its own model there."""

    def build(*_):
        with (tmp_path / ".export.lock").open("a") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        raise BackendError("locked")

    monkeypatch.setattr("ldmseg_fast.export.engine_sources.export_model", lambda *_: None)
    monkeypatch.setattr("ldmseg_fast.export.engine_build.build_engines", build)
    with pytest.raises(BackendError, match="locked"):
        to_trt.run(to_trt.parse([str(model_dir), "--out", str(tmp_path)]), "")


def test_a_waiting_builder_says_so(tmp_path):
    said = []
    with (tmp_path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        timer = threading.Timer(0.2, lambda: fcntl.flock(file, fcntl.LOCK_UN))
        timer.start()
        with output_folder.exclusive(tmp_path / "lock", lambda: said.append("waiting")):
            pass
        timer.join()
    assert said == ["waiting"]


def _build_in_a_process(graphs: str, out: str, log: str) -> None:
    """A builder that takes its time, so that a second one must wait for it."""

    def build(self, onnx_file, shapes, settings, timing_cache=b""):
        with Path(log).open("a") as file:
            file.write(f"{onnx_file.name}\n")
        time.sleep(0.2)
        return Built(b"engine", b"", [])

    module = SimpleNamespace(ILogger=object, __version__="11.4.0.1")
    api = type(
        "Slow",
        (trt_api.TrtApi,),
        {"build": build, "machine": Machine("G", "9.0", "580.1"), "_make_log": lambda _: None},
    )
    trt_api.load_api = lambda flavour: api(module, flavour)
    raise SystemExit(to_trt.main([graphs, "--out", out]))


def test_two_builders_make_one_build(graphs, tmp_path):
    context = multiprocessing.get_context("fork")
    arguments = (str(graphs), str(tmp_path / "e"), str(tmp_path / "log"))
    workers = [context.Process(target=_build_in_a_process, args=arguments) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    built = (tmp_path / "log").read_text().split()
    assert sorted(built) == sorted(set(built)) and len(built) == 4


def test_a_killed_build_is_not_loaded_and_goes_on(model_dir, graphs, trt, double, tmp_path):
    out = tmp_path / "e"
    arguments = (str(graphs), str(out), str(tmp_path / "log"))
    worker = multiprocessing.get_context("fork").Process(target=_build_in_a_process, args=arguments)
    worker.start()
    deadline = time.monotonic() + 60
    while not (out / "image_encoder.passport.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    worker.kill()
    worker.join(30)
    assert (out / "image_encoder.engine").exists() and (out / ".lock").exists()
    with pytest.raises(BackendError, match=r"no export\.json in it; make it with `python export/to_trt\.py"):
        load_backend(model_dir, "tensorrt", out)
    assert to_trt.main([str(graphs), "--out", str(out), "--max-batch", "2"]) == 0
    load_backend(model_dir, "tensorrt", out)
    assert not list(out.glob(".*"))


def test_files_of_others_are_not_replaced(model_dir, graphs, trt, tmp_path, capsys):
    for name in ("export.json", "parity.json"):
        out = tmp_path / name.partition(".")[0]
        out.mkdir()
        (out / name).write_text("mine")
        for source in (graphs, model_dir):  # a model before its export, which takes minutes
            assert to_trt.main([str(source), "--out", str(out)]) == 2
            said = capsys.readouterr()
            assert f"{name}: belongs to no export, and would be replaced" in said.err and not said.out
        assert [path.read_text() for path in out.iterdir()] == ["mine"]
    (tmp_path / "free").mkdir()
    (tmp_path / "free" / "thesis.tex").write_text("all of it")
    assert to_trt.main([str(graphs), "--out", str(tmp_path / "free")]) == 0
    assert (tmp_path / "free" / "thesis.tex").read_text() == "all of it"
    assert "image_encoder: 0." in capsys.readouterr().out
    assert to_trt.main([str(graphs), "--out", str(tmp_path / "free")]) == 0
    assert capsys.readouterr().out.count("MiB, unchanged") == 4


def test_a_shipped_model_goes_by_its_name(trt, double, tmp_path, capsys, monkeypatch):
    asked = []

    def export(model_dir, out, settings):
        asked.append(Path(model_dir))
        raise BackendError("enough")

    monkeypatch.setattr(engine_sources, "export_model", export)
    assert to_trt.main(["tiny", "--out", str(tmp_path / "e")]) == 2
    assert asked == [resolve_model_dir("tiny")]


def test_a_full_disk_leaves_no_half_engine(graphs, trt, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(engine_build.shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    assert to_trt.main([str(graphs), "--out", str(tmp_path / "e")]) == 2
    assert "free some space" in capsys.readouterr().err
    monkeypatch.undo()
    assert not (tmp_path / "e").exists()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trt_api, "load_api", lambda flavour: trt)
    monkeypatch.setattr(engine_build.os, "fsync", full)
    assert to_trt.main([str(graphs), "--out", str(tmp_path / "e")]) == 2
    assert "the disk is full" in capsys.readouterr().err
    assert not (tmp_path / "e").exists()


def test_an_interrupted_rebuild_is_not_loaded(graphs, trt, double, tmp_path, monkeypatch, capsys):
    out = tmp_path / "e"
    assert to_trt.main([str(graphs), "--out", str(out)]) == 0
    monkeypatch.setattr(double.Builder, "build_serialized_network", lambda *_: None)
    assert to_trt.main([str(graphs), "--out", str(out), "--level", "5"]) == 2
    assert "does not build it" in capsys.readouterr().err
    assert read_passport(out, "denoiser").key  # the old engine and its passport still belong together


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision", "fp16"], "exported in fp32, --precision fp16 was asked for"),
        (["--target", "sm80"], "TensorRT builds for the GPU it runs on, sm90"),
        (["--target", "portable,sm80"], "portable, same and current stand alone"),
        (["--target", ","], "--target ',': names nothing; current, same, portable, or sm80"),
        (["--max-batch", "0"], "--max-batch 0: from 1 on, in this order"),
        (["--opt-batch", "9"], "--opt-batch 9, --max-batch 8"),
        (["--profile", "1,2"], "--profile 1,2: three numbers expected"),
        (["--profile", "4,2,8"], "--profile 4,2,8: least, best and largest"),
        (["--max-side", "0"], "--max-side 0"),
        (["--head", "both", "--no-parity"], "already exported, so --head, --no-parity can change nothing"),
        (["--timing-cache", "/nowhere/cache"], "--timing-cache /nowhere/cache: no folder /nowhere"),
        (["--timing-cache", "cache", "--flavour", "rtx"], "--timing-cache: TensorRT-RTX tries no kernels out"),
        (["--max-batch", "4", "--profile", "1,2,4"], "--max-batch beside --profile: a profile says all three"),
        (["--image-sizes", "64,64,64"], "was exported for pictures of 64 pixels, so it can change nothing"),
        (["--parity-images", "4"], "already exported, so --parity-images can change nothing"),
    ],
)
def test_wrong_options(graphs, trt, tmp_path, capsys, options, message):
    assert to_trt.main([str(graphs), "--out", str(tmp_path / "e"), *options]) == 2
    assert message in capsys.readouterr().err


def test_wrong_sources(model_dir, graphs, trt, tmp_path, capsys):
    assert to_trt.main([str(tmp_path), "--out", str(tmp_path / "e")]) == 2
    assert "neither a model folder (model_index.json) nor exported graphs" in capsys.readouterr().err
    for source in (graphs, model_dir):  # a model's folder that holds an export is no model's any more
        assert to_trt.main([str(source), "--out", str(model_dir)]) == 2
        assert "a model's folder; choose another one, or one inside it" in capsys.readouterr().err
    (tmp_path / "e" / "timing.cache").mkdir(parents=True)
    assert to_trt.main([str(graphs), "--out", str(tmp_path / "e")]) == 2
    assert "timing.cache: a folder, in the place of the timing cache" in capsys.readouterr().err
    (tmp_path / "e" / "timing.cache").rmdir()
    shutil.copytree(graphs, tmp_path / "new")
    path = tmp_path / "new" / "export.json"
    path.write_text(json.dumps(sealed(json.loads(path.read_text()) | {"opset": 26})))
    assert to_trt.main([str(tmp_path / "new"), "--out", str(tmp_path / "e")]) == 2
    assert "opset 26; TensorRT 11.4.0.1 takes up to 25" in capsys.readouterr().err
    (tmp_path / "new" / "denoiser.onnx").unlink()
    assert to_trt.main([str(tmp_path / "new"), "--out", str(tmp_path / "e")]) == 2
    assert "denoiser.onnx: missing" in capsys.readouterr().err


def test_without_a_gpu(graphs, double, tmp_path, capsys, monkeypatch):
    api = type("None", (trt_api.TrtApi,), {"machine": Machine()})(double, "tensorrt")
    monkeypatch.setattr(trt_api, "load_api", lambda flavour: api)
    assert to_trt.main([str(graphs), "--out", str(tmp_path / "e")]) == 2
    assert "none answers to nvidia-smi" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "sm90"], "--target sm90: TensorRT-RTX builds for sm75, sm80"),
        (["--version-compatible"], "TensorRT-RTX engines belong to one version"),
        (["--strip"], "--strip: TensorRT-RTX needs a GPU for it"),
        (["--target", "current"], "none answers to nvidia-smi"),
    ],
)
def test_what_rtx_cannot_build(graphs, rtx, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.setattr(trt_api, "this_machine", lambda _: Machine())
    assert to_trt.main([str(graphs), "--out", str(tmp_path / "e"), "--flavour", "rtx", *options]) == 2
    assert message in capsys.readouterr().err


def test_engines_without_weights(model_dir, graphs, trt, double, tmp_path):
    out = tmp_path / "e"
    assert to_trt.main([str(graphs), "--out", str(out), "--strip", "--version-compatible"]) == 0
    assert read_passport(out, "denoiser").stripped and read_passport(out, "denoiser").version_compatible
    with pytest.raises(BackendError, match=r"was built without weights; put the exported graphs into"):
        load_backend(model_dir, "tensorrt", out)
    shutil.copytree(graphs, out / "onnx")
    double.Refitter.refits = 0
    load_backend(model_dir, "tensorrt", out)
    assert double.Refitter.refits == 4


def test_pictures_of_any_size(graphs):
    from ldmseg_fast.backends.graphs.specs import GraphSpec, TensorSpec

    spec = GraphSpec(
        "image_encoder", "image_encoder", (TensorSpec("images", "uint8", ("batch", 3, "latent_height*4", 64)),), ()
    )
    manifest = read_manifest(graphs)
    ranges = engine_build.Ranges(sides=(32, 64, 128))
    found = engine_build.axis_ranges(spec, manifest, (1, 2, 3), ranges)
    assert found == {"batch": (1, 2, 3), "latent_height": (8, 16, 32)}
    assert engine_build.shapes_of(spec, found)[0] == {"images": ((1, 3, 32, 64), (2, 3, 64, 64), (3, 3, 128, 64))}
    with pytest.raises(BackendError, match="give --image-sizes"):
        engine_build.axis_ranges(spec, manifest, (1, 2, 3), engine_build.Ranges())
    with pytest.raises(BackendError, match="multiples of 8 pixels"):
        engine_build.axis_ranges(spec, manifest, (1, 2, 3), engine_build.Ranges(sides=(32, 60, 64)))


@pytest.mark.parametrize("content", [b"", b"[]", b'{"rows": 3}', b'{"rows": [{}]}', b"\xff\xfe", b"[" * 9999])
def test_a_damaged_parity_report(tmp_path, content):
    (tmp_path / model_export.PARITY).write_bytes(content)
    with pytest.raises(BackendError, match=rf"{model_export.PARITY}: damaged parity report .*; export again"):
        engine_build.parity_summary(tmp_path)
