"""Exports take models of the Hub, and ONNX Runtime takes graphs from there."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldmseg_fast import LDMSegPipeline, cli
from ldmseg_fast.checkpoints.hub_names import GRAPHS
from ldmseg_fast.checkpoints.shipped import resolve_model_dir
from ldmseg_fast.errors import ArgumentError, CheckpointError
from ldmseg_fast.export import to_onnx, to_trt
from tests.checkpoints.conftest import cache, hub  # noqa: F401  (fixtures)
from tests.checkpoints.hub_server import HubServer, Repository
from tests.checkpoints.test_hub import content_of

pytestmark = pytest.mark.serial  # servers


@pytest.fixture
def repositories(hub: HubServer, model_dir: Path, graphs: Path) -> HubServer:  # noqa: F811
    """me/model, and me/graphs with code and an engine that nobody asked for."""
    hub.repositories = {"me/model": Repository(), "me/graphs": Repository()}
    hub.repositories["me/model"].commit(content_of(model_dir))
    hub.repositories["me/graphs"].commit(content_of(graphs) | {"denoiser.py": b"x", "denoiser.engine": b"x"})
    return hub


def test_graphs(repositories, scenes):
    picture = str(next((scenes / "val2017").glob("*.png")))
    run = ["predict", "me/model", picture, "--steps", "1", "--backend", "onnxruntime", "--engine-dir", "me/graphs"]
    assert cli.main([*run, "--out", "results"]) == 0
    fetched = repositories.downloads()
    assert "denoiser.onnx" in fetched and not {"denoiser.py", "denoiser.engine"} & set(fetched)
    pipe = LDMSegPipeline.from_pretrained("me/model", "onnxruntime", "me/graphs")
    assert len(pipe(picture, 1)) == 1
    with pytest.raises(CheckpointError, match="exported ONNX graphs"):
        resolve_model_dir("me/model", kinds=(GRAPHS,))


def test_engines_are_built_here(repositories, scenes):
    with pytest.raises(ArgumentError, match=r"me/graphs: .* engines are not taken from the Hub: build them here"):
        LDMSegPipeline.from_pretrained("me/model", "tensorrt", "me/graphs")


def test_scripts_take_names(repositories, monkeypatch, trt, capsys):
    asked = []
    monkeypatch.setattr("ldmseg_fast.export.model_export.export_model", lambda folder, *_: asked.append(folder))
    assert to_onnx.main(["me/model", "--out", "out"]) == 0
    assert asked[0].parent.name == "snapshots"
    assert to_trt.main(["me/graphs", "--out", "engines", "--max-batch", "4", "--max-side", "96"]) == 0
