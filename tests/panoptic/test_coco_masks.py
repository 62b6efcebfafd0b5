"""COCO's run lengths and polygons: pycocotools' bits, in C++ and numpy; every malformed one is one clear error."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as pycocotools

from ldmseg_fast.errors import PanopticFormatError
from ldmseg_fast.native import _C
from ldmseg_fast.panoptic import coco_masks
from ldmseg_fast.panoptic.coco_masks import mask_of_polygons, mask_of_rle, rle_of_mask

TWINS = [None] if _C is None else [_C, None]


def twins(function):
    """What C++ and numpy make of it, which must be alike."""
    results = []
    for extension in TWINS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(coco_masks, "_C", extension)
            results.append(function())
    assert all(result.dtype == results[0].dtype and (result == results[0]).all() for result in results)
    return results[0]


def refusals(function):
    messages = set()
    for extension in TWINS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(coco_masks, "_C", extension)
            with pytest.raises(PanopticFormatError) as caught:
                function()
            messages.add(str(caught.value))
    assert len(messages) == 1
    return messages.pop()


masks = st.tuples(
    st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32), st.sampled_from([0, 0.02, 0.5, 1])
).map(
    lambda given: np.kron(np.random.default_rng(given[2]).random(given[:2]) < given[3], np.ones((2, 3), bool)).astype(
        bool
    )
)


@settings(max_examples=200, deadline=None)
@given(masks)
def test_run_lengths_are_pycocotools(mask):
    theirs = pycocotools.encode(np.asfortranarray(mask, np.uint8))
    assert rle_of_mask(mask) == {"size": list(mask.shape), "counts": theirs["counts"].decode()}
    flat = np.concatenate([[False], mask.T.ravel()])
    counts = np.diff(np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]), [mask.size]])).tolist()
    for form in (theirs["counts"], theirs["counts"].decode(), counts, [float(count) for count in counts]):
        assert (twins(lambda form=form: mask_of_rle({"size": list(mask.shape), "counts": form}, "x")) == mask).all()


def test_empty_runs_are_legal():
    rle = {"size": [2, 3], "counts": [0, 2, 0, 1, 3, 0, 0]}
    expected = pycocotools.decode(pycocotools.frPyObjects(rle, 2, 3))
    assert (twins(lambda: mask_of_rle(rle, "x")) == expected).all()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 2000))
def test_compressed_runs_of_any_length(counts, last):
    height = sum(counts) + last
    rle = pycocotools.frPyObjects({"size": [height, 1], "counts": [*counts, last]}, height, 1)
    assert (twins(lambda: mask_of_rle(rle, "x")) == pycocotools.decode(rle)).all()


coordinates = st.one_of(
    st.integers(-20, 60).map(float),
    st.floats(-30, 80),
    st.integers(-200, 400).map(lambda fifths: fifths / 10),
    st.floats(-3000, 3000),
)
polygons = st.lists(st.lists(st.tuples(coordinates, coordinates), min_size=3, max_size=12), min_size=1, max_size=3)


@settings(max_examples=500, deadline=None)
@given(polygons, st.integers(1, 50), st.integers(1, 50))
def test_polygons_are_pycocotools(polygons, height, width):
    flat = [[value for point in polygon for value in point] for polygon in polygons]
    theirs = pycocotools.decode(pycocotools.merge(pycocotools.frPyObjects(flat, height, width)))
    assert (twins(lambda: mask_of_polygons(flat, height, width, "x")) == theirs).all()
    assert (mask_of_polygons([np.array(polygon) for polygon in polygons], height, width, "x") == theirs).all()


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        (None, "need `size` and `counts`"),
        ({"counts": "1"}, "need `size` and `counts`"),
        ({"size": [2, 2]}, "need `size` and `counts`"),
        ({"size": [2], "counts": "1"}, "`size` must be"),
        ({"size": ["2", 2], "counts": "1"}, "`size` must be"),
        ({"size": [True, 2], "counts": "1"}, "`size` must be"),
        ({"size": [0, 2], "counts": ""}, "`size` must be"),
        ({"size": [2.5, 2], "counts": "1"}, "`size` must be"),
        ({"size": [float("nan"), 2], "counts": "1"}, "`size` must be"),
        ({"size": [2**31, 2**31], "counts": [2**62]}, "`size` must be"),
        ({"size": [2**16, 2**16], "counts": [2**32]}, "`size` must be"),
        ({"size": [2, 2], "counts": [1, 2]}, "covers 3 of the 4 pixels"),
        ({"size": [2, 2], "counts": []}, "covers 0 of the 4 pixels"),
        ({"size": [2, 2], "counts": ""}, "covers 0 of the 4 pixels"),
        ({"size": [2, 2], "counts": [1, 2**40]}, "covers more than the 4 pixels"),
        ({"size": [2, 2], "counts": [5, -1]}, "run length -1"),
        ({"size": [2, 2], "counts": [1.5, 2.5]}, "list of whole numbers"),
        ({"size": [2, 2], "counts": [float("nan"), 4]}, "list of whole numbers"),
        ({"size": [2, 2], "counts": ["4"]}, "list of whole numbers"),
        ({"size": [2, 2], "counts": [[4]]}, "list of whole numbers"),
        ({"size": [2, 2], "counts": [[4], 1]}, "list of whole numbers"),
        ({"size": [2, 2], "counts": 4}, "list of whole numbers"),
        ({"size": [2, 2], "counts": [10**400]}, "list of whole numbers"),
        ({"size": [2, 2], "counts": "1 2"}, "a character that run lengths do not have, at place 1"),
        ({"size": [2, 2], "counts": "1\x80"}, "a character that run lengths do not have"),
        ({"size": [2, 2], "counts": b"1\xff"}, "a character that run lengths do not have, at place 1"),
        ({"size": [2, 2], "counts": "1P"}, "ends inside a number"),
        ({"size": [2, 2], "counts": "P" * 40}, "a number of over 7 characters"),
        ({"size": [2, 2], "counts": "O"}, "run length -1"),
        ({"size": [2, 2], "counts": "ooooo?"}, "covers more than"),
    ],
)
def test_malformed_run_lengths(rle, message):
    error = refusals(lambda: mask_of_rle(rle, "a.json: annotation 7"))
    assert error.startswith("a.json: annotation 7: ") and message in error


@pytest.mark.parametrize(
    ("outline", "message"),
    [
        ([], "no polygon"),
        ("12", "list of polygons"),
        (None, "list of polygons"),
        ([[]], "polygon 0 has 0 values"),
        ([[0, 0, 1, 1]], "polygon 0 has 4 values"),
        ([[0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2, 3]], "polygon 1 has 7 values"),
        ([[0, 0, 1, 1, 2, float("nan")]], "no finite number"),
        ([[0, 0, 1, 1, 2, float("inf")]], "no finite number"),
        ([[0, 0, 1, 1, 2, 1e300]], "far outside every picture"),
        ([[0, 0, 1, 1, 2, "2"]], "must be a list of numbers"),
        ([[0, 0, 1, 1, 2, None]], "must be a list of numbers"),
        ([[0, 0, 1, 1, 2, [2]]], "must be a list of numbers"),
        ([0, 0, 1, 1, 2, 2], "polygon 0 must be a list of numbers"),
        ({"size": 1}, "list of polygons"),
    ],
)
def test_malformed_polygons(outline, message):
    error = refusals(lambda: mask_of_polygons(outline, 10, 10, "a.json: annotation 7"))
    assert error.startswith("a.json: annotation 7: ") and message in error


def test_sizes_beyond_reason_are_refused():
    for size in ((2**31, 2**31), (0, 5), (2**16, 2**16)):
        assert "`size` must be" in refusals(lambda size=size: mask_of_polygons([[0, 0, 1, 1, 2, 0]], *size, "x"))


def test_masks_of_other_kinds_are_refused():
    for mask in (np.zeros((2, 2), np.uint8), np.zeros(4, bool), np.zeros((0, 3), bool)):
        with pytest.raises(PanopticFormatError, match=r"expected a mask bool \[H, W\]"):
            rle_of_mask(mask)


@pytest.mark.skipif(_C is None, reason="the extension is not built")
def test_endless_outlines_are_refused():
    zigzag = np.tile([[0.0, 0.0], [6e4, 1.0]], (2000, 1))
    with pytest.raises(PanopticFormatError, match="it is no outline"):
        mask_of_polygons([zigzag], 10, 2**16, "x")
    far = np.tile([[-1e8, -1e8], [1e8, 1e8]], (100_000, 1))  # long lines cost what lies in the picture
    assert mask_of_polygons([far], 10, 10, "x").shape == (10, 10)
