"""Engines that run here are compared with the model, and their passports carry what they measured themselves."""

import onnx
import pytest
from onnx import numpy_helper

from ldmseg_fast.backends.trt import api as trt_api
from ldmseg_fast.backends.trt.machine import Machine
from ldmseg_fast.backends.trt.passport import read_passport
from ldmseg_fast.export import engine_parity, to_trt
from tests.export.conftest import make_double_api

GRAPHS = ("image_encoder", "denoiser", "mask_decoder")


@pytest.fixture
def compared(monkeypatch):
    """How many images each comparison of engines had."""
    images, measure = [], engine_parity.measure_parity
    monkeypatch.setattr(
        engine_parity, "measure_parity", lambda *args, **rest: images.append(rest["images"]) or measure(*args, **rest)
    )
    return images


def without_weights(model: onnx.ModelProto) -> None:
    """Plants a fault in a graph: the largest tensor of the denoiser's becomes zeros."""
    if model.graph.input[0].name == "noisy_latents":
        tensor = max(model.graph.initializer, key=lambda each: numpy_helper.to_array(each).size)
        tensor.CopyFrom(numpy_helper.from_array(0 * numpy_helper.to_array(tensor), tensor.name))


def test_passports_carry_the_engines_own_numbers(model_dir, trt, double, compared, tmp_path, capsys, monkeypatch):
    out = tmp_path / "engines"
    arguments = [str(model_dir), "--out", str(out), "--precision", "fp32"]
    assert to_trt.main([*arguments, "--parity-images", "1"]) == 0
    assert compared == [1] and "tensorrt" in capsys.readouterr().out
    for name in GRAPHS:
        passport = read_passport(out, name)
        assert passport.compared == "engine" and "maps: PQ of engine" in passport.parity
        assert passport.parity == read_passport(out, "denoiser").parity
    assert to_trt.main(arguments) == 0 and compared == [1]  # it was compared already
    assert to_trt.main([*arguments, "--no-parity"]) == 0 and compared == [1]
    build = double.Builder.build_serialized_network
    monkeypatch.setattr(
        double.Builder,
        "build_serialized_network",
        lambda self, network, config: without_weights(network.model) or build(self, network, config),
    )
    assert to_trt.main([*arguments, "--level", "5", "--parity-images", "1"]) == 1 and compared == [1, 1]
    assert "a tolerance is missed by the engines, see above; their passports say so" in capsys.readouterr().err
    assert {read_passport(out, name).compared for name in GRAPHS} == {"missed"}


def test_engines_of_another_machine_keep_the_graphs_numbers(model_dir, double, compared, tmp_path, monkeypatch):
    api = make_double_api(double, Machine())
    api.flavour = "rtx"
    monkeypatch.setattr(trt_api, "load_api", lambda flavour: api)
    out = tmp_path / "engines"
    arguments = ["--out", str(out), "--precision", "fp32", "--flavour", "rtx", "--parity-images", "1"]
    assert to_trt.main([str(model_dir), *arguments]) == 0 and compared == []
    passport = read_passport(out, "denoiser")
    assert passport.compared == "graphs" and "maps: PQ of graphs" in passport.parity
