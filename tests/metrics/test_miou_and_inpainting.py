"""Mean IoU of segments; the inpainting protocol."""

import numpy as np
import pytest

from ldmseg_fast.errors import PanopticFormatError
from ldmseg_fast.metrics import matching
from ldmseg_fast.metrics.inpainting import BLOCKS, PROBABILITIES, InpaintingStat, drop_blocks, keep_given
from ldmseg_fast.metrics.miou import MeanIoU


def _maps(count=6, shape=(20, 30)):
    rng = np.random.default_rng(0)
    return [tuple(rng.integers(0, 5, (2, *shape)).astype(np.int32)) for _ in range(count)]


def _plain(maps):
    ious = []
    for gt, pred in maps:
        for value in np.unique(gt[gt > 0]):
            a, b = gt == value, (pred == value) & (gt > 0)
            ious.append((a & b).sum() / (a | b).sum())
    return np.mean(ious), len(ious)


@pytest.mark.parametrize("native", [True, False])
def test_mean_iou(monkeypatch, native):
    if not native:
        monkeypatch.setattr(matching, "_C", None)
    maps = _maps()
    metric = MeanIoU()
    for gt, pred in maps:
        metric.add(gt, pred)
    expected, count = _plain(maps)
    assert metric.result()["miou"] == pytest.approx(expected, abs=1e-12)
    assert metric.result()["n"] == count


def test_mean_iou_merges_to_the_last_digit():
    parts, whole = [MeanIoU() for _ in range(3)], MeanIoU()
    for index, (gt, pred) in enumerate(_maps()):
        parts[index % 3].add(gt, pred)
        whole.add(gt, pred)
    assert parts[2].merge(parts[0]).merge(parts[1]).result() == whole.result()


def test_mean_iou_of_nothing_and_of_other_sizes():
    assert MeanIoU().result() == {"miou": 0.0, "n": 0}
    with pytest.raises(PanopticFormatError, match="sizes must be equal"):
        MeanIoU().add(np.ones((2, 2), int), np.ones((2, 3), int))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("probability", PROBABILITIES)
def test_dropped_blocks(block, probability):
    dropped = drop_blocks(257, 300, block, probability, seed=3, image_id=17)
    assert dropped.shape == (257, 300)
    assert dropped.mean() == pytest.approx(probability, abs=0.15)
    cells = dropped[:256, :288].reshape(256 // block, block, 288 // block, block)
    assert (cells == cells[:, :1, :, :1]).all()
    np.testing.assert_array_equal(dropped, drop_blocks(257, 300, block, probability, seed=3, image_id=17))
    if 0 < probability < 1:
        assert (dropped != drop_blocks(257, 300, block, probability, seed=4, image_id=17)).any()
        assert (dropped != drop_blocks(257, 300, block, probability, seed=3, image_id="x")).any()


@pytest.mark.parametrize(("block", "probability"), [(0, 0.5), (8, -0.1), (8, 1.1)])
def test_impossible_blocks(block, probability):
    with pytest.raises(ValueError, match="dropped with probability"):
        drop_blocks(8, 8, block, probability)


def test_given_pixels_are_kept():
    given = np.array([[1, 1, 0, 2]])
    dropped = np.array([[False, True, False, False]])
    assert keep_given(np.array([[9, 9, 9, 9]]), given, dropped).tolist() == [[1, 9, 9, 2]]


def test_sparsities_and_ranks():
    gt = np.kron(np.arange(1, 5).reshape(2, 2), np.ones((16, 16), int))
    segments = [{"id": i, "category_id": 1} for i in range(1, 5)]
    whole, parts = InpaintingStat(), [InpaintingStat(), InpaintingStat()]
    for image_id in range(4):
        for probability in PROBABILITIES:
            filled = np.where(drop_blocks(32, 32, 16, probability, image_id=image_id), 1, gt)
            listed = [segment for segment in segments if (filled == segment["id"]).any()]
            for stat in (whole, parts[image_id % 2]):
                stat.add(16, probability, gt, segments, filled, listed, image_id)
    result = whole.result()
    assert parts[1].merge(parts[0]).result() == result
    qualities = [row["pq"] for row in result["sparsities"]]
    assert qualities[0] == 1.0 > qualities[-1]
    assert result["mean_pq"]["16"] == pytest.approx(np.mean(qualities))
    assert result["paper_mean_pq"] == pytest.approx(np.mean(qualities[1:-1]))
    del whole.stats[16, 0.5]
    assert whole.result()["paper_mean_pq"] is None
