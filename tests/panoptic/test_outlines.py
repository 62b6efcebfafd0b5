"""Outlines: pixel-exact, told apart from holes, and read back the same by our filling and by pycocotools'."""

import numpy as np
import pytest
from pycocotools import mask as coco

from ldmseg_fast.errors import PanopticFormatError
from ldmseg_fast.native import _C
from ldmseg_fast.panoptic import outlines as module
from ldmseg_fast.panoptic.format import read_panoptic_png
from ldmseg_fast.panoptic.outlines import Ring, fill, outlines, polygons_of, without_holes


def noise(seed: int, height: int = 0, width: int = 0) -> np.ndarray:
    """A map of noise or of blocks, with holes, touching corners and pieces of every kind; ids int32 [H, W]."""
    rng = np.random.default_rng(seed)
    height, width = height or int(rng.integers(1, 24)), width or int(rng.integers(1, 24))
    block = int(rng.integers(1, 4))
    ids = rng.integers(0, rng.integers(2, 5), (height, width)).astype(np.int32)
    return np.ascontiguousarray(ids.repeat(block, 0).repeat(block, 1)[:height, :width] * int(rng.integers(1, 70000)))


def signed_area(points: np.ndarray) -> float:
    x, y = points.T.astype(np.int64)
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum()) / 2


def check(ids: np.ndarray) -> None:
    found = outlines(ids)
    assert list(found) == [int(i) for i in np.unique(ids) if i != 0]
    for segment, rings in found.items():
        mask = ids == segment
        np.testing.assert_array_equal(fill(rings, *ids.shape), mask)
        assert sum(signed_area(ring.points) for ring in rings) == mask.sum()
        painted = np.zeros(ids.shape, int)
        for polygon in polygons_of(rings):
            assert [ring.hole for ring in polygon] == [False] + [True] * (len(polygon) - 1)
            opened = without_holes(polygon)
            np.testing.assert_array_equal(fill([opened], *ids.shape), fill(polygon, *ids.shape))
            encoded = coco.frPyObjects([opened.ravel().tolist()], *ids.shape)
            np.testing.assert_array_equal(coco.decode(encoded)[..., 0], fill(polygon, *ids.shape))
            painted += fill(polygon, *ids.shape)
        np.testing.assert_array_equal(painted, mask)  # no pixel in two pieces
        for ring in rings:
            assert (signed_area(ring.points) < 0) == ring.hole
            assert len(np.unique(ring.points, axis=0)) == len(ring.points)
            step = np.roll(ring.points, -1, axis=0) - ring.points
            assert ((step == 0).sum(1) == 1).all()
            assert ((step == 0) != (np.roll(step, 1, axis=0) == 0)).all()  # every corner turns


@pytest.mark.parametrize("seed", range(150))
def test_noise(seed):
    check(noise(seed))


@pytest.mark.parametrize("share", [0.6, 0.75, 0.9, 0.98])
def test_a_sieve(share):
    """A piece with hundreds of holes, many of them beside and above each other, becomes one ring by slits."""
    check((np.random.default_rng(0).uniform(size=(60, 80)) < share).astype(np.int32))


@pytest.mark.skipif(_C is None, reason="the extension is not built")
@pytest.mark.parametrize("seed", range(40))
def test_numpy_finds_the_same(seed, monkeypatch):
    ids = noise(seed)
    native = outlines(ids)
    monkeypatch.setattr(module, "_C", None)
    monkeypatch.setattr(module, "warn_slow", lambda: None)
    twin = outlines(ids)
    assert native.keys() == twin.keys()
    for segment, rings in native.items():
        for ring, other in zip(rings, twin[segment], strict=True):
            assert ring.hole == other.hole
            np.testing.assert_array_equal(ring.points, other.points)


def test_by_hand():
    """A frame whose hole touches the outside at a corner, and two pixels that touch each other at one."""
    ids = np.array(
        [
            [0, 5, 5, 5, 0],
            [5, 0, 0, 5, 0],
            [5, 5, 5, 5, 0],
            [0, 0, 0, 0, 7],
            [0, 0, 0, 7, 0],
        ]
    )
    found = outlines(ids)
    frame, islands = found[5], found[7]
    corners = [[1, 0], [4, 0], [4, 3], [0, 3], [0, 1], [1, 1]]
    assert len(frame) == 2 and len(islands) == 2
    assert frame[0].points.tolist() == corners and not frame[0].hole
    assert frame[1].points.tolist() == [[1, 2], [3, 2], [3, 1], [1, 1]] and frame[1].hole
    assert islands[0].points.tolist() == [[4, 3], [5, 3], [5, 4], [4, 4]]
    assert islands[1].points.tolist() == [[3, 4], [4, 4], [4, 5], [3, 5]]
    check(ids.astype(np.int32))


def test_photographs(shared):
    for path in sorted((shared / "data" / "coco_mini" / "panoptic_val2017").glob("*.png"))[:3]:
        check(read_panoptic_png(path))


def test_fill_of_slanted_lines_takes_pixels_whose_centre_lies_inside():
    triangle = np.array([[0, 0], [4, 0], [0, 4]], float)
    expected = np.add.outer(np.arange(5) + 0.5, np.arange(6) + 0.5) < 4
    np.testing.assert_array_equal(fill([triangle], 5, 6), expected)
    np.testing.assert_array_equal(fill([Ring(triangle[::-1])], 5, 6), expected)


def test_fill_outside_of_the_picture():
    square = np.array([[-5.0, -5.0], [2.5, -5.0], [2.5, 1.2], [-5.0, 1.2]])
    expected = np.zeros((3, 4), bool)
    expected[0, :2] = True
    np.testing.assert_array_equal(fill([square], 3, 4), expected)
    assert not fill([square + 100], 3, 4).any() and not fill([square - 100], 3, 4).any()
    assert not fill([], 3, 4).any()
    assert not fill([square[:2]], 3, 4).any()


@pytest.mark.parametrize(
    "ids",
    [np.zeros((0, 3), int), np.zeros((2, 2, 1), int), np.zeros((2, 2)), np.full((2, 2), -1), np.full((2, 2), 2**24)],
)
def test_no_map(ids):
    with pytest.raises(PanopticFormatError):
        outlines(ids)


def test_void_has_no_outline():
    assert outlines(np.zeros((4, 5), np.uint8)) == {}
