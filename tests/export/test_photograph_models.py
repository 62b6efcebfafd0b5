"""A model whose image encoder is a pyramid and sees larger pictures: its graphs, engines and server."""

import re

import numpy as np
import pytest

from ldmseg_fast import LDMSegPipeline
from ldmseg_fast.config import PostprocessConfig
from ldmseg_fast.export import to_onnx, to_triton, to_trt
from tests.conftest import make_model

OPEN = PostprocessConfig(mask_threshold=0.0, count_threshold=0, overlap_threshold=0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    settings = ("image_encoder.kind=efficientnet_lite", "image_encoder.picture_scale=2")
    return make_model(tmp_path_factory.mktemp("models") / "pyramid", settings)


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("graphs") / "pyramid"
    assert to_onnx.main([str(model), "--out", str(out), "--parity-images", "2"]) == 0
    return out


def test_graphs_and_engines_give_torchs_maps(model, exported, trt, tmp_path):
    pictures = [np.random.default_rng(seed).integers(0, 256, (50, 60, 3), np.uint8) for seed in range(2)]
    assert to_trt.main([str(exported), "--out", str(tmp_path / "engines"), "--max-batch", "2"]) == 0
    expected = LDMSegPipeline.from_pretrained(model, device="cpu")(pictures, 2, thresholds=OPEN)
    for backend, folder in (("onnxruntime", exported), ("tensorrt", tmp_path / "engines")):
        pipe = LDMSegPipeline.from_pretrained(model, backend, folder, "cpu")
        assert pipe.info.picture_size == 128
        for ours, theirs in zip(pipe(pictures, 2, thresholds=OPEN), expected):
            assert (ours.segmentation == theirs.segmentation).mean() > 0.999


def test_a_server_resizes_to_what_the_encoder_sees(exported, tmp_path):
    assert to_triton.main([str(exported), "--out", str(tmp_path / "repository")]) == 0
    text = (tmp_path / "repository" / "ldmseg_preprocess" / "config.pbtxt").read_text()
    for name, side in (("image_size", 64), ("picture_size", 128)):
        assert re.search(rf'{name}\\*": {side}\b', text)
