"""Graphs exported for any picture size serve the pipeline at other sizes; graphs of one size say why they do not."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ldmseg_fast import LDMSegPipeline
from ldmseg_fast.cli import main
from ldmseg_fast.config import PostprocessConfig
from ldmseg_fast.errors import BackendError
from ldmseg_fast.export import to_onnx, to_trt

OPEN = PostprocessConfig(mask_threshold=0.0, count_threshold=0, overlap_threshold=0.0)


@pytest.fixture(scope="module")
def any_size(model_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("graphs") / "dynamic"
    assert to_onnx.main([str(model_dir), "--out", str(out), "--size", "dynamic", "--no-parity"]) == 0
    return out


@pytest.fixture(scope="module")
def pictures():
    return [np.random.default_rng(seed).integers(0, 256, (50, 60, 3), np.uint8) for seed in range(2)]


def compare(fast: LDMSegPipeline, plain: LDMSegPipeline, pictures: list[np.ndarray]) -> None:
    found, expected = (pipe(pictures, 2, output_type="latent") for pipe in (fast, plain))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    for ours, theirs in zip(*(pipe(pictures, 2, thresholds=OPEN) for pipe in (fast, plain))):
        assert (ours.segmentation == theirs.segmentation).mean() > 0.999


@pytest.mark.parametrize("image_size", [None, 32, 88])
def test_onnxruntime(model_dir, any_size, pictures, image_size):
    fast = LDMSegPipeline.from_pretrained(model_dir, "onnxruntime", any_size, "cpu", image_size=image_size)
    plain = LDMSegPipeline.from_pretrained(model_dir, device="cpu", image_size=image_size)
    assert fast.info.latent_shape == (4, (image_size or 64) // 4, (image_size or 64) // 4)
    compare(fast, plain, pictures)


def test_engines_take_what_they_were_built_for(model_dir, any_size, trt, pictures, tmp_path, capsys):
    arguments = [str(any_size), "--out", str(tmp_path / "e")]
    assert to_trt.main(arguments) == 2
    assert "exported for any picture size; give --image-sizes" in capsys.readouterr().err
    assert to_trt.main([*arguments, "--image-sizes", "64,64,96"]) == 0
    fast = LDMSegPipeline.from_pretrained(model_dir, "tensorrt", tmp_path / "e", image_size=96)
    compare(fast, LDMSegPipeline.from_pretrained(model_dir, device="cpu", image_size=96), pictures)
    with pytest.raises(BackendError, match=r"image_size=32: these engines take pictures of 64 to 96 pixels"):
        LDMSegPipeline.from_pretrained(model_dir, "tensorrt", tmp_path / "e", image_size=32)


def test_sizes_that_cannot_be(model_dir, graphs, any_size):
    def load(backend, folder, image_size):
        LDMSegPipeline.from_pretrained(model_dir, backend, folder, "cpu", image_size=image_size)

    with pytest.raises(BackendError, match=r"exported for pictures of 64 pixels, image_size=96 .*--size dynamic"):
        load("onnxruntime", graphs, 96)
    for backend, folder in (("onnxruntime", any_size), ("torch", None)):
        with pytest.raises(BackendError, match="image_size=60: this model takes multiples of 8 pixels"):
            load(backend, folder, 60)


def test_the_command_line_takes_a_size(model_dir, any_size, graphs, scenes, pictures, tmp_path, capsys):
    Image.fromarray(pictures[0]).save(tmp_path / "p.png")
    predict = ["predict", str(model_dir), str(tmp_path / "p.png"), "--steps", "1", "--out", str(tmp_path / "out")]
    assert main([*predict, "--size", "32"]) == 0 and Image.open(tmp_path / "out" / "p.png").size == (60, 50)
    evaluate = ["evaluate", str(model_dir), "--data", str(scenes), "--steps", "1", "--limit", "2", "--no-baselines"]
    evaluate += ["--mask-th", "0", "--count-th", "0", "--overlap-th", "0", "--json", str(tmp_path / "report.json")]
    engine = ["--backend", "onnxruntime", "--engine-dir", str(any_size)]
    assert main([*evaluate, "--size", "32", *engine]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["image_size"] == 32 and report["agreement"]["pixel_agreement"] > 0.999
    capsys.readouterr()
    for command in (predict, evaluate):
        assert main([*command, "--size", "60"]) == 2
        assert "image_size=60: this model takes multiples of 8 pixels" in capsys.readouterr().err
        assert main([*command, "--size", "96", "--backend", "onnxruntime", "--engine-dir", str(graphs)]) == 2
        assert "exported for pictures of 64 pixels, image_size=96 was asked for" in capsys.readouterr().err
