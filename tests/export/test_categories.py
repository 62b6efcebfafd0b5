"""Exported graphs of models with categories name segments as torch does."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime")

from ldmseg_fast import LDMSegPipeline
from ldmseg_fast.backends.graphs.manifest import read_manifest
from ldmseg_fast.config import PostprocessConfig
from ldmseg_fast.data.scenes import CATEGORIES, generate_scene
from ldmseg_fast.errors import NonFiniteError
from ldmseg_fast.export import to_trt
from ldmseg_fast.export.to_onnx import main

OPEN = PostprocessConfig(mask_threshold=0.0, count_threshold=1, overlap_threshold=0.0)


def test_engines_name_segments_as_torch_does(category_model, trt, tmp_path):
    graphs, engines = tmp_path / "graphs", tmp_path / "engines"
    assert main([str(category_model), "--out", str(graphs), "--head", "both", "--no-parity"]) == 0
    assert to_trt.main([str(graphs), "--out", str(engines), "--max-batch", "2"]) == 0
    pictures = [generate_scene(64, 0, index)[0][: 64 - 9 * index] for index in range(2)]
    fast = LDMSegPipeline.from_pretrained(category_model, "tensorrt", engines)
    plain = LDMSegPipeline.from_pretrained(category_model, device="cpu", dtype=torch.float32)
    for one, other in zip(*(pipe(pictures, 2, thresholds=OPEN) for pipe in (fast, plain))):
        keys = ("id", "name", "category_id", "isthing", "was_fused")
        assert [[s[k] for k in keys] for s in one.segments_info] == [[s[k] for k in keys] for s in other.segments_info]
        assert one.segments_info and np.mean(one.segmentation == other.segmentation) > 0.999


@pytest.mark.parametrize("head", ["panoptic", "logits"])
def test_graphs_name_segments_as_torch_does(category_model, tmp_path, head):
    assert main([str(category_model), "--out", str(tmp_path / "graphs"), "--head", head, "--no-parity"]) in (0, None)
    manifest = read_manifest(tmp_path / "graphs")
    assert [c["name"] for c in manifest.model["categories"]] == [c["name"] for c in CATEGORIES[2]]
    assert json.loads((tmp_path / "graphs" / "export.json").read_text())
    pictures = [generate_scene(64, 0, index)[0][: 64 - 9 * index] for index in range(3)]
    ours = LDMSegPipeline.from_pretrained(category_model, "onnxruntime", tmp_path / "graphs")
    theirs = LDMSegPipeline.from_pretrained(category_model, device="cpu", dtype=torch.float32)
    for one, other in zip(*(pipe(pictures, 2, thresholds=OPEN) for pipe in (ours, theirs))):
        assert np.mean(one.segmentation == other.segmentation) > 0.999
        assert one.segments_info and len(one.segments_info) == len(other.segments_info)
        for a, b in zip(one.segments_info, other.segments_info):
            assert (a["id"], a["name"], a["category_id"], a["isthing"]) == (
                b["id"], b["name"], b["category_id"], b["isthing"],
            )  # fmt: skip
            assert a["category_score"] == pytest.approx(b["category_score"], abs=1e-4)
    run = ours.backend.run_rows

    def spoilt(*args, **kwargs):
        found = run(*args, **kwargs)
        return found | {n: v * float("nan") for n, v in found.items() if n in ("category_score", "category_logits")}

    ours.backend.run_rows = spoilt
    with pytest.raises(NonFiniteError, match="mask_decoder: category logits are not finite"):
        ours(pictures[0], 2)
