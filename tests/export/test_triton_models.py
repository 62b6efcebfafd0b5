"""The Python models of a Triton repository give the pipeline's maps, and refuse what they cannot take."""

import json
import shutil
import struct
import time
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ldmseg_fast import LDMSegPipeline
from ldmseg_fast.data.scenes import generate_scene
from ldmseg_fast.errors import BackendError
from ldmseg_fast.export import to_onnx, to_triton, triton_models
from tests.export.triton_double import as_png, ask, request, stand_in, start


def test_requests_give_the_pipelines_maps(model_dir, repository, model_config, triton):
    pixels = [generate_scene(64, 0, index, version=1)[0][: 64 - 8 * index] for index in range(3)]
    pipe = LDMSegPipeline.from_pretrained(model_dir, device="cpu")
    for index, (found, picture) in enumerate(zip(ask(repository, model_config, triton, pixels), pixels)):
        expected = pipe([picture], 3, seed=index, image_ids=[0])[0]
        assert found["segmentation"].shape == (1, *picture.shape[:2])
        assert (found["segmentation"][0] == expected.segmentation).mean() > 0.999
        assert len(json.loads(found["segments_info"][0, 0])) == len(expected.segments_info)


def test_requests_get_categories(category_model, model_config, tmp_path, monkeypatch):
    graphs, repository = tmp_path / "graphs", tmp_path / "repository"
    category_model = shutil.copytree(category_model, tmp_path / "model")
    index = json.loads((category_model / "model_index.json").read_text())
    index["postprocess"] = {"mask_threshold": 0.0, "count_threshold": 1, "overlap_threshold": 0.0}  # random weights
    (category_model / "model_index.json").write_text(json.dumps(index))
    assert to_onnx.main([str(category_model), "--out", str(graphs), "--no-parity"]) == 0
    assert to_triton.main([str(graphs), "--out", str(repository), "--steps", "2", "--device", "cpu"]) == 0
    pixels = [generate_scene(64, 0, index)[0][: 64 - 8 * index] for index in range(2)]
    server = stand_in(category_model, graphs, monkeypatch)
    pipe = LDMSegPipeline.from_pretrained(category_model, device="cpu")
    for index, (found, picture) in enumerate(zip(ask(repository, model_config, server, pixels), pixels)):
        expected = pipe([picture], 2, seed=index, image_ids=[0])[0]
        assert (found["segmentation"][0] == expected.segmentation).mean() > 0.999
        segments = json.loads(found["segments_info"][0, 0])
        keys = ("id", "name", "category_id", "isthing", "was_fused")
        assert segments and [[s[k] for k in keys] for s in segments] == [
            [s[k] for k in keys] for s in expected.segments_info
        ]


def test_a_bad_request_fails_alone(repository, model_config, triton):
    preprocess = start(repository, model_config, "ldmseg_preprocess")
    good = request(image=np.array([[as_png(np.zeros((8, 8, 3), np.uint8))]], object))
    bad = request(image=np.array([[b"no picture"]], object))
    first, second = preprocess.execute([bad, good])
    assert "cannot identify image file" in first.error and second.error is None
    assert triton_models.array(SimpleNamespace(tensors=second.tensors), "size").tolist() == [[8, 8]]


def test_large_pictures_go_through_the_logits(model_dir, repository, model_config, triton, monkeypatch):
    """Beyond what the head in the graph holds, as `GraphBackend` does."""
    pixels = np.asarray(Image.fromarray(generate_scene(64, 0, 1, version=1)[0]).resize((160, 96)))
    pipe = LDMSegPipeline.from_pretrained(model_dir, device="cpu")
    expected = pipe([pixels], 3, seed=0, image_ids=[0])[0]
    names = []
    call = triton_models.call
    monkeypatch.setattr(triton_models, "call", lambda model, *rest: names.append(rest[1]) or call(model, *rest))
    monkeypatch.setattr(triton_models.Limits, "fit_head", lambda self, height, width: height * width <= 4096)
    found = ask(repository, model_config, triton, [pixels])[0]
    assert ("mask_logits",) in names
    assert (found["segmentation"][0] == expected.segmentation).mean() > 0.999
    assert len(json.loads(found["segments_info"][0, 0])) == len(expected.segments_info)


def bomb(width, height):
    """A small PNG that claims to be large: it is grey, and its rows compress to nothing."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compressobj(9)
    content = b"".join(rows.compress(bytes(width + 1)) for _ in range(height)) + rows.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def test_pictures_that_are_too_large_are_refused_by_their_header(graphs, repository, model_config, triton, tmp_path):
    preprocess = start(repository, model_config, "ldmseg_preprocess")
    large = bomb(12000, 9000)  # 108 million pixels
    assert len(large) < 315_000
    images = np.array([[as_png(np.zeros((8, 8, 3), np.uint8))], [large]], object)
    before = time.process_time()
    error = preprocess.execute([request(image=images)])[0].error
    assert "picture 1 of the request" in error and "12000x9000 is over 33554432 pixels" in error
    assert time.process_time() - before < 0.2  # to decode it takes longer
    two = np.array([[as_png(np.zeros((8, side, 3), np.uint8))] for side in (8, 9)], object)
    assert "several sizes in one request" in preprocess.execute([request(image=two)])[0].error
    preprocess.facts["limits"] = {"max_pixels": 10**6, "head_pixels": 100, "head_side": 9, "logits": False}
    error = preprocess.execute([request(image=two[1:])])[0].error
    assert error is None
    wide = np.array([[as_png(np.zeros((8, 10, 3), np.uint8))]], object)
    error = preprocess.execute([request(image=wide)])[0].error
    assert "10x8 is too large for the server's graphs" in error and "sides of up to 9" in error


def test_the_servers_tensorrt_is_checked(monkeypatch):
    def has(version):
        def load(name):
            if name != f"libnvinfer.so.{version // 10000}":
                raise OSError(name)
            return SimpleNamespace(getInferLibVersion=lambda: version)

        monkeypatch.setattr(triton_models.ctypes, "CDLL", load)

    has(101302)
    triton_models.check_tensorrt("10.13.2.6", False)
    triton_models.check_tensorrt("", False)
    with pytest.raises(BackendError, match=r"need TensorRT 11\.4\.0\.1, and this server has no libnvinfer\.so\.11"):
        triton_models.check_tensorrt("11.4.0.1", True)
    with pytest.raises(BackendError, match=r"need TensorRT 10\.12\.0\.3, and this server has 10\.13\.2"):
        triton_models.check_tensorrt("10.12.0.3", False)
    triton_models.check_tensorrt("10.12.0.3", True)
    with pytest.raises(BackendError, match=r"this server has 10\.13\.2"):
        triton_models.check_tensorrt("10.14.0.3", True)
