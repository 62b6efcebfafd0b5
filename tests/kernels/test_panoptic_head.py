import math

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ldmseg_fast.kernels.backend import backend
from ldmseg_fast.kernels.configs import all_configs
from ldmseg_fast.kernels.panoptic_head import host, panoptic_head, reference
from ldmseg_fast.kernels.panoptic_head.op import panoptic_head_op

CUDA = torch.cuda.is_available()
THRESHOLDS = (0.5, 10, 0.5)
# (B, Q, h, w), network size, target size
CASES = [
    ((1, 128, 16, 16), (32, 32), (40, 50)),
    ((2, 16, 9, 13), (18, 26), (33, 65)),
    ((1, 20, 8, 8), (8, 8), (8, 8)),
    ((1, 17, 32, 32), (64, 64), (20, 30)),  # smaller than the logits
    ((1, 40, 16, 24), (10, 12), (31, 33)),  # a network size below the logits': four rows far apart
    ((1, 256, 8, 8), (16, 16), (16, 16)),
    ((1, 1, 4, 4), (8, 8), (5, 7)),
    *([((4, 128, 256, 256), (512, 512), (480, 640)), ((2, 100, 63, 100), (500, 500), (427, 1023))] if CUDA else []),
]


@pytest.fixture(params=["by rank", "by equality"])
def argmax(request, monkeypatch):
    """The two ways to the label; the second is off until a GPU has timed it."""
    for classes in all_configs()["panoptic_head"].values():
        for config in classes.values():
            monkeypatch.setitem(config.constants, "BY_EQUALITY", int(request.param == "by equality"))


def make_logits(shape, device, dtype=torch.float32, memory_format=torch.contiguous_format, gap=9.0):
    """One slot stands out by `gap` in each of nine regions of an image"""
    batch, slots, height, width = shape
    regions = torch.randint(0, slots, (batch, 1, 3, 3)).float()
    regions = torch.nn.functional.interpolate(regions, (height, width)).long()
    logits = torch.randn(shape) - 3 + gap * torch.zeros(shape).scatter(1, regions, 1.0)
    return logits.to(device, dtype).contiguous(memory_format=memory_format)


def compare(actual, logits, network_size, target_size, thresholds):
    """Equal to the reference; where a probability lies within rounding of the threshold, either decision will do."""
    expected = reference.panoptic_head(logits.float(), network_size, target_size, *thresholds)
    torch.testing.assert_close(actual[1], expected[1], rtol=2e-5, atol=2e-6)
    undecided = (expected[1] - thresholds[0]).abs() < 1e-5
    assert torch.equal(actual[0][~undecided], expected[0][~undecided])
    if not undecided.any():
        assert torch.equal(actual[2], expected[2])
        assert torch.equal(actual[3], expected[3])
    torch.testing.assert_close(actual[4], expected[4], rtol=1e-4, atol=1e-4)
    assert [each.dtype for each in actual] == [each.dtype for each in expected]
    return expected


@pytest.mark.parametrize(("shape", "network_size", "target_size"), CASES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_kernel_equals_reference(shape, network_size, target_size, memory_format, device, poison):
    logits = make_logits(shape, device, torch.float16, memory_format)
    actual = host.panoptic_head(logits, network_size, target_size, *THRESHOLDS)
    expected = compare(actual, logits, network_size, target_size, THRESHOLDS)
    assert shape[1] == 1 or (expected[2] > 0).any(), "the case is meant to keep something"


@pytest.mark.parametrize("thresholds", [(0.9, 64, 0.9), (0.5, 0, 0.0), (0.0, 1, 0.5), (1.0, 1, 0.5)])
def test_thresholds(thresholds, device, argmax, poison):
    logits = make_logits((1, 20, 8, 8), device, gap=6.0)
    actual = host.panoptic_head(logits, (16, 16), (20, 24), *thresholds)
    compare(actual, logits, (16, 16), (20, 24), thresholds)


@pytest.mark.parametrize("slots", [1, 3, 20])
def test_a_threshold_of_zero_is_reached_by_all_slots_that_exist(slots, device, argmax, poison):
    logits = make_logits((2, slots, 8, 8), device)
    actual = host.panoptic_head(logits, (16, 16), (20, 24), 0.0, 1, 0.0)
    expected = reference.panoptic_head(logits, (16, 16), (20, 24), 0.0, 1, 0.0)
    for ours, theirs in zip(actual, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_noise_with_every_label_in_a_tile(device, argmax, poison):
    """Many labels per tile, most of them dropped"""
    logits = 30 * torch.randn(1, 64, 12, 16, device=device)
    actual = host.panoptic_head(logits, (12, 16), (12, 16), 0.5, 2, 0.1)
    compare(actual, logits, (12, 16), (12, 16), (0.5, 2, 0.1))


def test_equal_logits_go_to_the_lowest_slot(device, argmax):
    logits = torch.full((1, 16, 4, 4), -9.0, device=device)
    logits[:, 5:8] = 9.0
    for function in (host.panoptic_head, panoptic_head):
        segmentation, probability, area, *_ = function(logits, (8, 8), (8, 8), 0.3, 1, 0.5)
        assert (segmentation == 6).all() and area[0].tolist() == [0] * 5 + [64] + [0] * 10
        torch.testing.assert_close(probability, torch.full_like(probability, 1 / 3), rtol=1e-5, atol=1e-5)


def test_slot_zero_small_and_overlapping_segments_are_dropped(device, argmax):
    """Slot 0 is void; slot 1 has 8 pixels; slot 2 wins in half of the area that its sigmoid claims."""
    logits = torch.full((1, 16, 8, 8), -20.0, device=device)
    logits[0, 0, :, :2] = 9.0
    logits[0, 1, :, 2:3] = 9.0
    logits[0, 2, :, 3:5] = 9.0
    logits[0, 2, :, 5:7] = 5.0
    logits[0, 3, :, 5:] = 12.0
    for function in (host.panoptic_head, panoptic_head):
        for count, overlap, kept in (
            (1, 0.5, [1, 2, 3]),
            (9, 0.5, [2, 3]),
            (9, 0.51, [3]),
            (17, 0.1, [3]),
            (25, 0.0, []),
        ):
            segmentation, _, area, box, score = function(logits, (8, 8), (8, 8), 0.5, count, overlap)
            assert area[0].nonzero().flatten().tolist() == kept
            assert segmentation.unique().tolist() == [0, *(slot + 1 for slot in kept)]
            assert not box[area == 0].any() and not score[area == 0].any()
            if 2 in kept:
                assert box[0, 2].tolist() == [3, 0, 2, 8]
            if 3 in kept:
                assert box[0, 3].tolist() == [5, 0, 3, 8] and score[0, 3] > 0.9


def test_an_empty_sigmoid_area_keeps_the_label(device):
    """A slot can win the softmax while no logit reaches the sigmoid's threshold."""
    logits = torch.full((1, 16, 4, 4), -9.0, device=device)
    logits[:, 4] = -3.0
    for function in (host.panoptic_head, panoptic_head):
        segmentation, *_ = function(logits, (4, 4), (4, 4), 0.5, 1, 0.9)
        assert (segmentation == 5).all()


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.7, 0.9, 0.999])
def test_least_logit(threshold):
    logit = torch.tensor(host.least_logit(threshold))
    assert logit.sigmoid() >= threshold
    assert torch.nextafter(logit, torch.tensor(-100.0)).sigmoid() < threshold


def test_least_logit_without_one():
    assert host.least_logit(0.0) == float("-inf")
    assert host.least_logit(1.1) == float("inf")


def test_golden_values(shared, device):
    safetensors = pytest.importorskip("safetensors.torch")
    golden = safetensors.load_file(shared / "golden" / "reference.safetensors", device=str(device))
    for name in ("post", "post_rules"):
        logits, expected = golden[f"{name}_logits_half"][None], golden[f"{name}_segmentation"]
        args = (logits, (128, 128), tuple(expected.shape), 0.5, 512, 0.5)
        functions = [reference.panoptic_head, panoptic_head, *([host.panoptic_head] if CUDA else [])]
        for function in functions:
            assert torch.equal(function(*args)[0][0], expected)


def test_the_rules_of_the_golden_case(shared, device):
    """A corner of it, small enough for the interpreter"""
    safetensors = pytest.importorskip("safetensors.torch")
    golden = safetensors.load_file(shared / "golden" / "reference.safetensors", device=str(device))
    logits = golden["post_rules_logits_half"][None, :, 20:44, 10:34].contiguous(memory_format=torch.channels_last)
    actual = host.panoptic_head(logits, (48, 48), (61, 70), 0.5, 40, 0.5)
    compare(actual, logits, (48, 48), (61, 70), (0.5, 40, 0.5))


def test_shrinking_far_falls_back_to_the_reference(device):
    logits = make_logits((1, 8, 4, 512), device)
    args = (logits, (8, 1024), (8, 16), *THRESHOLDS)
    for one, other in zip(host.panoptic_head(*args), reference.panoptic_head(*args)):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [(0, 16, 4, 4), (3, 16, 4, 4)], ids=str)
def test_public_function_on_any_batch(shape, device):
    logits = make_logits(shape, device)
    results = panoptic_head(logits, (8, 8), (10, 12), *THRESHOLDS)
    assert results[0].shape == (shape[0], 10, 12) and results[3].shape == (shape[0], 16, 4)


def test_backends_agree(device):
    logits = make_logits((2, 16, 9, 13), device)
    args = (logits, (18, 26), (40, 65), *THRESHOLDS)
    usual = panoptic_head(*args)
    with backend("panoptic_head", "torch"):
        plain = panoptic_head(*args)
    assert torch.equal(usual[0], plain[0])
    for one, other in zip(usual, plain):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_op(device, check_op):
    logits = make_logits((2, 16, 6, 6), device)
    check_op(panoptic_head_op, (logits, [12, 12], [9, 15], 0.5, 4, 0.5))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracers_and_transforms_see_an_operator(device):
    """What runs at once on a CPU would be a constant of the trace, or find no memory behind the tensor."""

    def run(logits):
        return panoptic_head(logits, (12, 16), (9, 7), 0.0, 1, 0.0)[0]

    one, other = torch.randn(2, 1, 8, 6, 6, device=device) * 5
    expected = run(other)
    assert not torch.equal(run(one), expected)
    assert torch.equal(torch.jit.trace(run, one, check_trace=False)(other), expected)
    assert torch.equal(make_fx(run)(one)(other), expected)
    assert torch.equal(torch.vmap(run)(torch.stack([one, other]))[1], expected)


def test_bad_input(device, refuses):
    logits = torch.zeros(1, 4, 4, 4, device=device)
    op, more = panoptic_head_op, (0.5, 1, 0.5)
    refuses("mask_logits", panoptic_head, op, (logits[0], [8, 8], [8, 8], *more))
    refuses("mask_logits", panoptic_head, op, (logits.long(), [8, 8], [8, 8], *more))
    refuses("mask_logits", panoptic_head, op, (logits[:, :0], [8, 8], [8, 8], *more))
    refuses("network_size", panoptic_head, op, (logits, [8], [8, 8], *more))
    refuses("target_size", panoptic_head, op, (logits, [8, 8], [8, 0], *more))
    refuses("mask_threshold", panoptic_head, op, (logits, [8, 8], [8, 8], math.nan, 1, 0.5))
    refuses("overlap_threshold", panoptic_head, op, (logits, [8, 8], [8, 8], 0.5, 1, math.nan))
