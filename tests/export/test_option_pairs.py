"""Every pair of options of `to_onnx.py` and `to_trt.py` works, or is one error that names an option of the pair.

Nothing is exported or built: a pair works where the first graph, or engine, would be made.
"""

import argparse
import itertools
import sys

import pytest
import torch
from safetensors.torch import save_file

from ldmseg_fast.backends.trt import api as trt_api
from ldmseg_fast.backends.trt.machine import Machine
from ldmseg_fast.export import engine_build, engine_sources, model_export, to_onnx, to_trt
from tests.export.conftest import GPU, make_double_api

DATA, FILE, LORA = "DATA", "FILE", "LORA"  # stand for a data set, a file that can be written, and a LoRA

TO_ONNX = {
    "--precision": ["fp32", "fp16", "bf16", "int8"],
    "--opset": ["18", "22", "23"],
    "--batch": ["dynamic", "3"],
    "--size": ["model", "dynamic", "32"],
    "--head": ["panoptic", "logits", "both"],
    "--sampler-steps": ["1,4"],
    "--lora": [LORA],
    "--lora-scale": ["0.5"],
    "--data": [DATA],
    "--calibration": [DATA],
    "--split": ["val2017"],
    "--parity-images": ["2"],
    "--no-parity": [None],
}
TO_TRT = {
    "--flavour": ["tensorrt", "rtx"],
    "--target": ["current", "same", "portable", "sm80,sm89"],
    "--precision": ["fp32", "fp16", "bf16", "fp8", "int8"],
    "--min-batch": ["1"],
    "--opt-batch": ["2"],
    "--max-batch": ["4"],
    "--profile": ["1,2,4"],
    "--max-side": ["96"],
    "--image-sizes": ["32,64,64"],
    "--level": ["5"],
    "--workspace": ["1.5"],
    "--timing-cache": [FILE],
    "--strip": [None],
    "--version-compatible": [None],
    "--verbose": [None],
    "--head": ["panoptic", "logits"],
    "--sampler-steps": ["2"],
    "--lora": [LORA],
    "--lora-scale": ["0.5"],
    "--data": [DATA],
    "--calibration": [DATA],
    "--parity-images": ["2"],
    "--no-parity": [None],
}


class Reached(Exception):
    """The checks are through."""


def choices(options):
    return [(option, value) for option, values in options.items() for value in values]


def pairs(options):
    return [pair for pair in itertools.combinations(choices(options), 2) if pair[0][0] != pair[1][0]]


def helped(module, monkeypatch):
    """The options that a command has."""
    parsers = []
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self, _: sys.exit(parsers.append(self)))
    with pytest.raises(SystemExit):
        module.parse([])
    options = {option for action in parsers[0]._actions for option in action.option_strings}
    return options - {"-h", "--help", "--out"}


@pytest.mark.parametrize(("module", "options"), [(to_onnx, TO_ONNX), (to_trt, TO_TRT)], ids=["to_onnx", "to_trt"])
def test_every_option_of_the_help_is_in_the_matrix(module, options, monkeypatch):
    assert helped(module, monkeypatch) == options.keys()


def outcomes(module, options, source, scenes, tmp_path, capsys):
    """{pair of (option, value): "works", or the error}"""
    stand_for = {DATA: str(scenes), FILE: str(tmp_path / "timing.cache"), LORA: str(tmp_path / "lora.safetensors")}
    factors = {"unet.conv_in.lora_A.weight": torch.ones(1, 16, 3, 3), "unet.conv_in.lora_B.weight": torch.ones(16, 1)}
    save_file(factors, stand_for[LORA])
    found = {}
    for pair in pairs(options):
        words = [word for option, value in pair for word in (option, stand_for.get(value, value)) if word is not None]
        try:
            code = module.main([str(source), "--out", str(tmp_path / "out"), *words])
        except Reached:
            found[pair] = "works"
            continue
        error = capsys.readouterr().err.strip()
        assert code == 2 and error.count("\n") == 0, f"{words}: exit code {code}, {error}"
        assert any(option in error for option, _ in pair), f"{words}: {error} names neither"
        found[pair] = error
    return found


def refused(found):
    return {pair for pair, outcome in found.items() if outcome != "works"}


def having(options, ones, others=None):
    """The pairs with a choice of `ones`; where there are `others`, with one of those beside it."""
    return {
        (first, second)
        for first, second in pairs(options)
        if (first in ones and (others is None or second in others))
        or (second in ones and (others is None or first in others))
    }


def of(options, *names):
    return {choice for choice in choices(options) if choice[0] in names}


def unscaled(options):
    scale = of(options, "--lora-scale")
    return having(options, scale) - having(options, scale, of(options, "--lora"))


def uncalibrated(options):
    folder = of(options, "--calibration")
    return having(options, folder) - having(options, folder, {("--precision", "fp8"), ("--precision", "int8")})


def reach(*_, **__):
    raise Reached


def test_pairs_of_to_onnx(model_dir, scenes, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(model_export, "write_graphs", reach)
    found = outcomes(to_onnx, TO_ONNX, model_dir, scenes, tmp_path, capsys)
    split, nothing = {("--split", "val2017")}, {("--no-parity", None)}
    expected = having(TO_ONNX, split) - having(TO_ONNX, split, of(TO_ONNX, "--data"))
    expected |= having(TO_ONNX, nothing, of(TO_ONNX, "--data", "--parity-images"))
    expected |= having(TO_ONNX, {("--precision", "bf16"), ("--precision", "int8")}, {("--opset", "18")})
    expected |= uncalibrated(TO_ONNX)
    expected |= unscaled(TO_ONNX)
    assert refused(found) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]


MACHINES = {"gpu": GPU, "without": Machine()}


@pytest.fixture(params=[("tensorrt", "gpu"), ("rtx", "gpu"), ("rtx", "without")], ids="-".join)
def flavour(request, double, monkeypatch):
    """A flavour on a machine; builds and exports are where a pair is through."""

    def load_api(wanted):
        api = make_double_api(double, MACHINES[request.param[1]])
        api.flavour = wanted
        return api

    monkeypatch.setattr(trt_api, "load_api", load_api)
    monkeypatch.setattr(engine_sources, "export_model", reach)
    monkeypatch.setattr(engine_build, "_build_one", reach)
    return request.param


@pytest.fixture(params=["model", "graphs"])
def source(request):
    """What is built from, and its folder."""
    return request.param, request.getfixturevalue("model_dir" if request.param == "model" else "graphs")


def test_pairs_of_to_trt(flavour, source, scenes, tmp_path, capsys):
    """The other options beside `--flavour NAME`, from a model and from its graphs, which are float32's."""
    (name, machine), (kind, folder) = flavour, source
    options = {option: values for option, values in TO_TRT.items() if option != "--flavour"}

    class Fixed:
        @staticmethod
        def main(words):
            return to_trt.main([*words, "--flavour", name])

    found = outcomes(Fixed, options, folder, scenes, tmp_path, capsys)
    batches, nothing = of(options, "--min-batch", "--opt-batch", "--max-batch"), {("--no-parity", None)}
    expected = having(options, batches, of(options, "--profile"))
    expected |= having(options, {("--head", "logits")}, of(options, "--max-side"))
    expected |= having(options, nothing, of(options, "--parity-images"))
    expected |= having(options, nothing, of(options, "--data")) | unscaled(options) | uncalibrated(options)
    if name == "rtx":
        expected |= having(options, of(options, "--timing-cache", "--version-compatible", "--level"))
    else:
        expected |= having(options, {("--target", "sm80,sm89")})
    if machine == "without":
        here = {("--target", "current"), ("--target", "same")}
        expected |= having(options, here | of(options, "--strip"))
    if kind == "graphs":
        settled = of(options, "--head", "--sampler-steps", "--data", "--parity-images", "--no-parity", "--image-sizes")
        settled |= of(options, "--lora", "--lora-scale", "--calibration")
        other = of(options, "--precision") - {("--precision", "fp32")}
        expected |= having(options, settled) | having(options, other)
    assert refused(found) == expected


def test_a_quantised_model_is_calibrated_on_data_that_nothing_is_compared_on(model_dir, scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(engine_sources, "export_model", reach)
    options = ["--flavour", "rtx", "--precision", "int8", "--data", str(scenes), "--no-parity"]
    with pytest.raises(Reached):
        to_trt.main([str(model_dir), "--out", str(tmp_path / "e"), *options])
