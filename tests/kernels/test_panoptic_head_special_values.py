"""Logits that are no ordinary numbers: C++, Triton, the reference and ONNX agree on what is void and on every id."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ldmseg_fast.kernels.panoptic_head import host, panoptic_head, reference
from ldmseg_fast.native import _C

THRESHOLDS = (0.2, 0, 0.0)  # no filter of whole segments: each pixel stands for itself
SPECIAL = [np.nan, np.inf, -np.inf, -2e30, 2e30, 3.4e38, -3.4e38, 1e-45, -0.0, 65504.0]
# (B, Q, h, w), network size, target size
SHAPES = [
    ((1, 7, 5, 6), (10, 12), (13, 9)),
    ((2, 16, 4, 4), (8, 8), (8, 8)),
    ((1, 17, 6, 4), (6, 4), (6, 4)),
    ((1, 20, 8, 8), (16, 16), (21, 30)),
    ((1, 33, 7, 9), (5, 6), (11, 11)),  # the network's size is smaller
    ((1, 3, 1, 5), (2, 10), (7, 7)),
]


def special_logits(rng, shape):
    """Ordinary logits in which cells, slots, rows or everything hold a special value."""
    logits = torch.from_numpy(rng.normal(0, 6, shape).astype(np.float32))
    for _ in range(int(rng.integers(1, 4))):
        value = SPECIAL[int(rng.integers(len(SPECIAL)))]
        image, slot, y, x = (int(rng.integers(side)) for side in shape)
        where = [(image, slot, y, x), (image, slot), (image, slice(None), y), (image, slice(None), y, x), (image,)]
        logits[where[rng.choice(5, p=[0.5, 0.2, 0.1, 0.18, 0.02])]] = value
    return logits


def resize(planes, network_size, target_size):
    for size in (network_size, target_size):
        planes = F.interpolate(planes, size, mode="bilinear", align_corners=False)
    return planes


def expect(logits, network_size, target_size):
    """Void pixels [B, H, W], and where rounding does not decide on the label, in float64."""
    unsound = (~logits.isfinite()).any(1, keepdim=True)
    exact = torch.where(unsound, 0.0, logits.double().clamp(-reference.LARGEST, reference.LARGEST))
    void = resize(unsound.double(), network_size, target_size)[:, 0] > reference.UNSOUND_WEIGHT
    value = resize(exact, network_size, target_size)
    error = 1e-5 * resize(exact.abs(), network_size, target_size) + 1e-5
    best = (value - error).amax(1, keepdim=True)
    clear = (value + error >= best).sum(1) == 1  # one candidate alone
    probability = value.softmax(1).amax(1)
    return void, void | (clear & ((probability - THRESHOLDS[0]).abs() > 1e-3))


def agrees(result, logits, network_size, target_size):
    """Asserts that a head's map and probabilities are right wherever rounding leaves no choice; counts void pixels."""
    segmentation, probability, area, box, _ = result
    void, decided = expect(logits, network_size, target_size)
    expected = reference.panoptic_head(logits, network_size, target_size, *THRESHOLDS)
    assert torch.equal(probability == 0, void)
    assert not segmentation[void].any()
    assert torch.equal(segmentation[decided], expected[0][decided])
    assert int(segmentation.min()) >= 0 and int(segmentation.max()) <= logits.shape[1]
    assert torch.equal(area.sum(1), (segmentation > 0).sum((1, 2)))
    assert probability.isfinite().all() and result[4].isfinite().all() and (box >= 0).all()
    return int(void.sum())


def heads(logits, network_size, target_size):
    """C++ at each instruction set where it is built; through the op otherwise."""
    arguments = (network_size, target_size, *THRESHOLDS)
    yield panoptic_head(logits, *arguments)
    if _C is not None:
        for simd in range(3):
            yield [torch.from_numpy(each) for each in _C.panoptic_head(logits.numpy(), *arguments, 1, simd)]


class Head(torch.nn.Module):
    def __init__(self, network_size, target_size):
        super().__init__()
        self.sizes = network_size, target_size

    def forward(self, logits):
        return panoptic_head(logits, *self.sizes, *THRESHOLDS)


def onnx_session(folder, case):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    shape, *sizes = case
    path = folder / "head.onnx"
    torch.onnx.export(Head(*sizes).eval(), (torch.zeros(shape),), path, dynamo=True, verbose=False)
    return runtime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run_onnx(session, logits):
    return [torch.from_numpy(each) for each in session.run(None, {session.get_inputs()[0].name: logits.numpy()})]


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_heads_agree(case):
    shape, *sizes = case
    rng, void = np.random.default_rng(0), 0
    for _ in range(12):
        logits = special_logits(rng, shape)
        for result in heads(logits, *sizes):
            void += agrees(result, logits, *sizes)
    assert void


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of numpy, on which the interpreter runs
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_triton_agrees(case, device, poison):
    shape, *sizes = case
    rng = np.random.default_rng(1)
    for _ in range(2):
        logits = special_logits(rng, shape)
        result = host.panoptic_head(logits.to(device), *sizes, *THRESHOLDS)
        agrees([each.cpu() for each in result], logits, *sizes)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.4e38, -3.4e38])
def test_triton_where_nothing_is_finite(value, device, poison):
    for slots in (16, 20):
        result = host.panoptic_head(torch.full((1, slots, 4, 4), value, device=device), (4, 4), (4, 4), *THRESHOLDS)
        assert not result[0].any() and not result[2].any()
        assert (result[1] == (1 / slots if np.isfinite(value) else 0)).all()


def test_onnx_agrees(tmp_path):
    case, rng, void = SHAPES[3], np.random.default_rng(2), 0
    session = onnx_session(tmp_path, case)
    for _ in range(30):
        logits = special_logits(rng, case[0])
        void += agrees(run_onnx(session, logits), logits, *case[1:])
    assert void


def test_what_a_cell_that_is_not_finite_makes_void():
    """Exactly the pixels that the resizing mixes it into; all others are as if nothing was there."""
    logits = torch.randn(1, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = panoptic_head(logits, (8, 8), (8, 8), 0.0, 0, 0.0)
    for value in (float("nan"), float("inf"), -float("inf")):
        logits[0, 2, 1, 1] = value
        segmentation, probability, area, *_ = panoptic_head(logits, (8, 8), (8, 8), 0.0, 0, 0.0)
        void = torch.zeros(1, 8, 8, dtype=torch.bool)
        void[:, 1:5, 1:5] = True
        assert torch.equal(probability == 0, void) and not segmentation[void].any()
        assert torch.equal(segmentation[~void], expected[0][~void])
        assert torch.equal(probability[~void], expected[1][~void])
        assert area.sum() == (segmentation > 0).sum()


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_many_heads(tmp_path, record_property, device):
    """5,000 heads; Triton's interpreter, which is slow, takes one in twenty."""
    rng, counts, void = np.random.default_rng(3), dict.fromkeys(("cpp", "reference", "onnx", "triton"), 0), 0
    sessions = [onnx_session(tmp_path, case) for case in SHAPES]
    for trial, (case, session) in zip(range(5000), itertools.cycle(zip(SHAPES, sessions))):
        shape, *sizes = case
        logits = special_logits(rng, shape)
        for result in heads(logits, *sizes):
            void += agrees(result, logits, *sizes)
        counts["cpp"] += _C is not None
        agrees(reference.panoptic_head(logits, *sizes, *THRESHOLDS), logits, *sizes)
        counts["reference"] += 1
        agrees(run_onnx(session, logits), logits, *sizes)
        counts["onnx"] += 1
        if trial % 20 < 2:
            result = host.panoptic_head(logits.to(device), *sizes, *THRESHOLDS)
            agrees([each.cpu() for each in result], logits, *sizes)
            counts["triton"] += 1
    assert void
    for name, count in counts.items():
        record_property(f"{name} heads", count)
