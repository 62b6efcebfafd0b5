"""A red or crashed kernel costs the others nothing; tuning writes its table as it goes."""

import argparse
import json
import time
from functools import partial

import pytest
import torch

from benchmarks import bench_kernels
from benchmarks.harness import Run, Timing, environment
from benchmarks.measuring import kernel_tuning
from ldmseg_fast.kernels import configs
from ldmseg_fast.kernels.case import Case
from ldmseg_fast.kernels.convolution import cases as convolution
from ldmseg_fast.kernels.convolution import reference

CPU = torch.device("cpu")
WAYS = [{}, {"bias": True, "residual": True}, {"added": True, "stride": 2}, {"bias": True, "upsample": True}]


def make_case(name, triton, plain=torch.exp, kernel="mask_bits", headline=True):
    return Case(
        kernel, name, torch.float32, 1, lambda device: (torch.ones(3),), triton, plain, bytes_moved=24,
        headline=headline,
    )  # fmt: skip


def crash(x):
    raise RuntimeError("an illegal memory access\nand more")


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Everything that needs one is eager here."""
    run = partial(Run, environment=environment())
    monkeypatch.setattr(bench_kernels, "Run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(bench_kernels, "captured", lambda function: function)
    monkeypatch.setattr(kernel_tuning, "captured", lambda function: function)
    monkeypatch.setattr(bench_kernels, "measure_ceilings", lambda run: None)
    plain = bench_kernels.measure
    monkeypatch.setattr(bench_kernels, "measure", lambda *a, **k: plain(*a, **k | {"device": "cpu", "rounds": 3}))
    with configs.architecture(90):
        yield


@pytest.mark.parametrize("what", WAYS, ids=str)
def test_the_convolutions_peer_computes_the_same(what):
    arguments = convolution.make((2, 3, 4, 5), 7, what, CPU)
    wide = [each.float() if isinstance(each, torch.Tensor) else each for each in arguments[:-1]]
    case = make_case("small", None, kernel="convolution")
    peers = dict(bench_kernels.variants(case, tuple(wide), False))
    assert list(peers) == ["triton", "torch", "cudnn"]
    expected, _ = reference.convolution(*wide, torch.float32)
    torch.testing.assert_close(peers["cudnn"]()(), expected)


def test_a_red_case_is_a_row_and_the_others_are_measured(on_a_gpu, tmp_path):
    cases = [make_case("wrong", torch.sin), make_case("crashes", crash), make_case("right", torch.exp)]
    options = argparse.Namespace(minutes=1.0, quick=True, no_tests=True, out=tmp_path)
    assert bench_kernels.benchmark(cases, options) == 1
    [path] = tmp_path.iterdir()
    results = json.loads(path.read_text())["results"]
    red = {row["name"]: row["red"] for row in results if "red" in row}
    assert red == {
        "mask_bits wrong": "differs from torch",
        "mask_bits crashes": "RuntimeError: an illegal memory access",
    }
    assert {row["name"] for row in results if "p50" in row} == {"mask_bits right"}


def test_a_case_without_time_is_a_row_too(on_a_gpu, tmp_path):
    options = argparse.Namespace(minutes=0.0, quick=True, no_tests=True, out=tmp_path)
    assert bench_kernels.benchmark([make_case("right", torch.exp)], options) == 1
    [path] = tmp_path.iterdir()
    [row] = json.loads(path.read_text())["results"]
    assert (row["name"], row["red"]) == ("mask_bits right", "not measured (time budget)")


def test_the_tests_take_no_time_from_the_cases(on_a_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_kernels, "run_tests", lambda kernels: time.sleep(7))
    options = argparse.Namespace(minutes=0.1, quick=True, no_tests=False, out=tmp_path)
    assert bench_kernels.benchmark([make_case("right", torch.exp)], options) == 0


def launching(kernel, shape_class, launched):
    """A kernel that looks its configuration up, notes it, and refuses some."""

    def run(x):
        config = configs.find_config(kernel, shape_class)
        launched.append(config)
        if config.num_warps == 8 and config.constants["BLOCK"] > 2048:
            raise RuntimeError("out of resource: shared memory")
        return torch.exp(x)

    return run


def test_tuning_writes_the_best_after_each_entry(on_a_gpu, monkeypatch, tmp_path):
    launched = []
    cases = [
        make_case("planes", launching("encode_mask_bits", "planes", launched)),
        make_case("decode", launching("decode_mask_bits", "all", launched), headline=False),
    ]
    before = configs.dump_configs(configs.all_configs())
    times = iter(range(1000, 0, -1))

    def measure(functions, **_):
        functions[""]()
        return {"": Timing((float(next(times)),) * 3)}  # each candidate is faster than the one before

    monkeypatch.setattr(kernel_tuning, "measure", measure)
    path = tmp_path / "tuned.json"
    kernel_tuning.tune(cases, path, time.monotonic() + 60, CPU)
    table = configs.load_configs(path)
    assert table.keys() == {"encode_mask_bits", "decode_mask_bits"}
    tried = kernel_tuning.candidates_of("encode_mask_bits", "planes")
    fitting = [c for c in tried if not (c.num_warps == 8 and c.constants["BLOCK"] > 2048)]
    assert table["encode_mask_bits"][90]["planes"] == fitting[-1] and len(tried) == len(set(map(repr, tried)))
    assert configs.dump_configs(configs.all_configs()) == before

    written = []
    monkeypatch.setattr(kernel_tuning, "write_json", lambda path, value: written.append(sorted(value)))
    kernel_tuning.tune(cases, path, time.monotonic() + 60, CPU)
    assert written == [["encode_mask_bits"], ["decode_mask_bits", "encode_mask_bits"]]
    kernel_tuning.tune(cases, path, time.monotonic() - 1, CPU)
    assert len(written) == 2  # no time, no table


def test_no_entry_has_more_candidates_than_tuning_has_time_for():
    """The shipped configuration counts where it is none of the others; each switch is still tried."""
    lengths = set()
    for kernel, table in configs.all_configs().items():
        for sm, classes in table.items():
            for shape_class, shipped in classes.items():
                with configs.architecture(sm):
                    tried = kernel_tuning.candidates_of(kernel, shape_class)
                lengths.add(len(tried))
                assert tried[0] == shipped and len(tried) <= kernel_tuning.MOST, (kernel, sm, shape_class)
                if kernel in ("attention_forward", "attention_forward_few"):
                    for switch in ("PADDED", "DELAYED", "DESCRIBED"):
                        assert {config.constants[switch] for config in tried} == {0, 1}, (kernel, sm, shape_class)
    assert kernel_tuning.MOST in lengths


def test_the_shares_compile_every_candidate_once(on_a_gpu):
    launched = []
    cases = [make_case("planes", launching("encode_mask_bits", "planes", launched))]
    count = sum(kernel_tuning.compile_candidates(cases, share, 3, CPU) for share in range(3))
    tried = kernel_tuning.candidates_of("encode_mask_bits", "planes")
    assert count == len(tried) and set(map(repr, tried)) <= set(map(repr, launched))
