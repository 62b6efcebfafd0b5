"""The extension's own edges: instruction sets, threads, memory, arguments that must not crash the interpreter."""

import numpy as np
import pytest
import torch

from ldmseg_fast.kernels.panoptic_head import reference
from ldmseg_fast.native import _C

pytestmark = pytest.mark.skipif(_C is None, reason="the extension is not built")

PLAIN, AVX2, AVX512 = 0, 1, 2


def _logits(*shape, seed=0, scale=4.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _head(logits, network, target, count=3, threads=1, simd=AVX512, mask=0.3, overlap=0.2):
    outputs = _C.panoptic_head(logits.numpy(), network, target, mask, count, overlap, threads, simd)
    return [torch.from_numpy(output) for output in outputs]


@pytest.mark.parametrize("simd", [PLAIN, AVX2, AVX512])
@pytest.mark.parametrize(
    ("shape", "network", "target"),
    [
        ((2, 1, 1, 1), (1, 1), (1, 1)),
        ((1, 5, 1, 7), (3, 9), (13, 2)),
        ((2, 32, 8, 8), (64, 64), (64, 64)),
        ((1, 37, 33, 17), (63, 100), (31, 45)),  # the second resize shrinks
        ((1, 16, 40, 40), (20, 20), (64, 63)),  # the first resize shrinks: four taps that are no neighbours
        ((1, 33, 9, 9), (50, 50), (7, 5)),
        ((1, 128, 16, 16), (128, 128), (100, 123)),
    ],
    ids=str,
)
def test_head_equals_the_reference(shape, network, target, simd):
    logits = _logits(*shape)
    expected = reference.panoptic_head(logits, network, target, 0.3, 3, 0.2)
    found = _head(logits, network, target, simd=simd)
    for name, ours, theirs in zip(("segmentation", "probability", "area", "box", "score"), found, expected):
        assert ours.dtype == theirs.dtype
        tolerance = {"rtol": 0, "atol": 0} if not ours.is_floating_point() else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(ours, theirs, **tolerance, msg=name)


@pytest.mark.parametrize("threads", [2, 3, 64])
def test_head_does_not_depend_on_threads(threads):
    logits = _logits(2, 24, 12, 12)
    alone = _head(logits, (48, 48), (51, 40))
    for ours, theirs in zip(_head(logits, (48, 48), (51, 40), threads=threads), alone):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("mask", "overlap", "count"), [(0.0, 0.0, 0), (1.0, 1.0, 1), (1.5, 0.5, 1), (0.9, 0.9, 512), (-1.0, 0.5, 0)]
)
def test_head_at_extreme_thresholds(mask, overlap, count):
    logits = _logits(1, 9, 8, 8, scale=8.0)
    expected = reference.panoptic_head(logits, (32, 32), (40, 40), mask, count, overlap)
    found = _head(logits, (32, 32), (40, 40), count, mask=mask, overlap=overlap)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_head_takes_the_lowest_of_equal_slots():
    for simd in (PLAIN, AVX2, AVX512):
        _, probability, area, *_ = _head(torch.zeros(1, 40, 4, 4), (8, 8), (8, 8), simd=simd, mask=0.0, count=0)
        assert area.sum() == 0  # slot 0
        torch.testing.assert_close(probability, torch.full((1, 8, 8), 1 / 40))


def test_head_ignores_slots_that_are_masked_out():
    logits = _logits(1, 20, 6, 6)
    logits[0, 5:9] = -1e4
    expected = reference.panoptic_head(logits, (24, 24), (30, 30), 0.3, 3, 0.2)
    for lowest in (-1e4, -2e30, -1e38, torch.finfo(torch.float32).min):
        logits[0, 5:9] = lowest
        for head in (
            _head(logits, (24, 24), (30, 30)),
            reference.panoptic_head(logits, (24, 24), (30, 30), 0.3, 3, 0.2),
        ):
            for ours, theirs in zip(head, expected):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("simd", [PLAIN, AVX2, AVX512])
@pytest.mark.parametrize("slots", [1, 7, 15, 16, 17, 20, 31, 32, 33])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -2e30, 2e30, 3.4e38, -3.4e38])
def test_head_never_reads_past_its_tables(value, slots, simd):
    logits = torch.full((1, slots, 4, 4), value)
    segmentation, probability, area, box, score = _head(
        logits, (4, 4), (4, 4), count=0, mask=0.05, overlap=0, simd=simd
    )
    assert not segmentation.any() and not area.any() and not box.any() and not score.any()  # nothing, or slot 0
    assert (probability == (1 / slots if np.isfinite(value) else 0)).all()


def test_head_needs_little_memory(harness):
    logits = _logits(1, 128, 64, 64)

    def run():
        _head(logits, (512, 512), (427, 640))

    run()
    extra = harness.peak_memory(run)
    if extra is None:
        pytest.skip("this system does not tell peak memory")
    assert extra < 20e6  # full-size logits would be 140 MB


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.panoptic_head(np.zeros((1, 2, 3), np.float32), (4, 4), (4, 4), 0.5, 1, 0.5),
        lambda c: c.panoptic_head(np.zeros((1, 2, 3, 3), np.float32), (0, 4), (4, 4), 0.5, 1, 0.5),
        lambda c: c.panoptic_head(np.zeros((1, 2, 3, 3)), (4, 4), (4, 4), 0.5, 1, 0.5),
        lambda c: c.panoptic_head(np.zeros((1, 0, 3, 3), np.float32), (4, 4), (4, 4), 0.5, 1, 0.5),
        lambda c: c.match_segments(np.zeros((2, 2), np.int64), np.zeros((0, 4), int), np.zeros((2, 2), np.int32), 0),
        lambda c: c.match_segments(
            np.zeros((2, 2), np.int32), np.zeros((1, 3), int), np.zeros((2, 2), np.int32), np.zeros((0, 4), int)
        ),
        lambda c: c.match_segments(
            np.zeros((2, 2), np.int32), np.zeros((0, 4), int), np.zeros((2, 3), np.int32), np.zeros((0, 4), int)
        ),
        lambda c: c.joint_histogram(np.zeros((2, 2), np.int32), np.zeros((4,), np.int32)),
        lambda c: c.joint_histogram(np.zeros((0, 2), np.int32), np.zeros((0, 2), np.int32)),
        lambda c: c.joint_histogram(np.full((2, 2), -1, np.int32), np.zeros((2, 2), np.int32)),
        lambda c: c.read_png(b"", 2**26),
        lambda c: c.read_png(np.zeros((4, 4), np.int32), 2**26),
        lambda c: c.read_png_picture(b"", 2**26),
        lambda c: c.read_png_picture(np.zeros((4, 4), np.int32), 2**26),
        lambda c: c.match_files("none", np.zeros((0, 4), np.int64), "none", np.zeros((0, 4), np.int64), False, 2**26),
        lambda c: c.match_files(b"x\0y", np.zeros((0, 4), np.int64), b"", np.zeros((0, 4), np.int64), False, 2**26),
        lambda c: c.AnnotationIndex("none", False),
        lambda c: c.AnnotationIndex("/", False),
        lambda c: c.boundary_mask(np.zeros((2, 2), np.int32), 0),
        lambda c: c.segment_shapes(np.zeros((2, 2, 2), np.int32), True),
        lambda c: c.split_segments(np.zeros((0, 0), np.int32), 1),
        lambda c: c.outlines(np.zeros((2, 2), np.int64)),
        lambda c: c.outlines(np.zeros((0, 2), np.int32)),
    ],
)
def test_wrong_arguments_raise(call):
    with pytest.raises((TypeError, ValueError)):
        call(_C)


def test_joint_histogram_of_many_ids():
    rng = np.random.default_rng(0)
    gt, pred = rng.integers(0, 2**24, (2, 300, 70)).astype(np.int32)
    pairs, counts = np.unique(gt.astype(np.int64) << 24 | pred, return_counts=True)
    overlaps = _C.joint_histogram(_C.RunMap(gt), _C.RunMap(pred))
    np.testing.assert_array_equal(overlaps["gt_id"].astype(np.int64) << 24 | overlaps["pred_id"], pairs)
    np.testing.assert_array_equal(overlaps["pixels"], counts)
