"""Ids to slots, resizing, augmentation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldmseg_fast.data import transforms
from ldmseg_fast.data.transforms import (
    ID_SCHEMES,
    Augmentation,
    color_jitter,
    compact_ids,
    crop_box,
    dense_ids,
    make_remap_table,
    present_ids,
    resize_ids,
    resize_image,
)
from ldmseg_fast.errors import ArgumentError


@pytest.fixture(params=["as built", "numpy"])
def both(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test once with the C++ helpers, where they are built, and once without."""
    if request.param == "numpy":
        monkeypatch.setattr(transforms, "_C", None)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@settings(max_examples=150, deadline=None)
@given(
    num_slots=st.integers(2, 256),
    share=st.floats(0, 1),
    scheme=st.sampled_from(ID_SCHEMES),
    side=st.integers(1, 20),
    seed=st.integers(0, 2**16),
)
def test_table_is_an_injection_into_the_slots(num_slots: int, share: float, scheme: str, side: int, seed: int) -> None:
    num_segments = round(share * (num_slots - 1))
    segment_ids = rng(seed).integers(0, num_segments + 1, (side, side)).astype(np.uint8)
    table = make_remap_table(segment_ids, num_segments, num_slots, scheme, rng(seed))
    assert table.shape == (256,) and table.dtype == np.uint8
    assert table[0] == 0 and not table[num_segments + 1 :].any()
    slots = table[1 : num_segments + 1]
    assert len(set(slots.tolist())) == num_segments
    assert num_segments == 0 or (slots.min() >= 1 and slots.max() < num_slots)
    if scheme != "random":
        again = make_remap_table(segment_ids, num_segments, num_slots, scheme, rng(seed + 1))
        assert np.array_equal(table, again), "only `random` may depend on the generator"


def test_random_ids_reach_every_slot_evenly() -> None:
    counts = np.zeros(32, int)
    for seed in range(2000):
        counts[make_remap_table(np.zeros((1, 1), np.uint8), 8, 32, "random", rng(seed))[1:9]] += 1
    assert counts[0] == 0
    expected = 2000 * 8 / 31
    assert np.abs(counts[1:] - expected).max() < 0.2 * expected


def four_corners() -> np.ndarray:
    """Ids 1..4 at bottom right, top right, bottom left, top left; 4 is the largest, 1 the smallest."""
    ids = np.zeros((16, 16), np.uint8)
    ids[14:, 14:], ids[:3, 13:], ids[12:, :4], ids[:3, :7] = 1, 2, 3, 4
    return ids


@pytest.mark.parametrize(
    ("scheme", "slots"),
    [
        ("position", [4, 2, 3, 1]),
        ("position_spread", [28, 12, 20, 4]),
        ("position_cell", [20, 4, 16, 1]),  # 4 rows of 8 cells; the first cell is void
        ("area", [4, 3, 2, 1]),
    ],
)
def test_schemes(scheme: str, slots: list[int]) -> None:
    assert make_remap_table(four_corners(), 4, 32, scheme, rng())[1:5].tolist() == slots


def test_cell_of_a_segment_hardly_depends_on_the_others() -> None:
    ids = four_corners()
    all_four = make_remap_table(ids, 4, 32, "position_cell", rng())
    alone, _ = compact_ids(np.where(ids == 3, ids, 0), 31)
    assert make_remap_table(alone, 1, 32, "position_cell", rng())[1] == all_four[3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 4, "random"), "4 segments do not fit 3 slots"),
        ((1, 1, "random"), "num_slots=1"),
        ((1, 257, "random"), "num_slots=257"),
        ((1, 8, "sorted"), "id_assignment='sorted'"),
    ],
)
def test_bad_table_arguments(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_remap_table(np.zeros((2, 2), np.uint8), *arguments, rng())


@settings(max_examples=50, deadline=None)
@given(height=st.integers(1, 30), width=st.integers(1, 30), count=st.integers(1, 300), seed=st.integers(0, 999))
def test_dense_ids_number_by_place(height: int, width: int, count: int, seed: int) -> None:
    segment_ids = rng(seed).choice(np.arange(1, 2**24, 991), count, replace=False).tolist()
    expected = rng(seed).integers(0, count + 1, (height, width))
    ids = np.array([0, *segment_ids], np.int32)[expected]
    assert np.array_equal(dense_ids(ids, segment_ids), expected)
    assert present_ids(ids).tolist() == np.unique(ids).tolist()


def test_dense_ids_name_an_id_that_the_json_lacks() -> None:
    with pytest.raises(ValueError, match="segment id 77 is in the map"):
        dense_ids(np.array([[5, 77]], np.int32), [5])


def test_dense_ids_drop_crowds_and_crumbs() -> None:
    ids = np.repeat(np.array([0, 9, 8, 7, 9], np.int32), [2, 5, 10, 9, 5])[None]
    assert np.bincount(dense_ids(ids, [7, 8, 9], min_area=10)[0]).tolist() == [11, 0, 10, 10]
    assert np.bincount(dense_ids(ids, [7, 8, 9], crowd=[False, True, False])[0]).tolist() == [12, 9, 0, 10]
    assert dense_ids(np.zeros((3, 2), np.int32), []).tolist() == [[0, 0]] * 3


@pytest.mark.usefixtures("both")
def test_compact_keeps_the_largest() -> None:
    dense = np.repeat(np.arange(6), [10, 3, 5, 0, 4, 9]).reshape(1, -1)
    dense = dense.astype(np.uint8)
    ids, count = compact_ids(dense, 3)
    assert count == 3
    assert np.bincount(ids.ravel()).tolist() == [13, 5, 4, 9]
    ids, count = compact_ids(dense, 255)
    assert count == 4 and np.bincount(ids.ravel()).tolist() == [10, 3, 5, 4, 9]


def test_compact_numbers_are_the_same_in_cpp_and_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(60):
        highest = int(rng(seed).integers(1, 256))
        dense = rng(seed).choice(np.arange(highest + 1), rng(seed).integers(1, 40, 2)).astype(np.uint8)
        limit = int(rng(seed).integers(1, 256))
        ids, count = compact_ids(dense, limit)
        with monkeypatch.context() as patch:
            patch.setattr(transforms, "_C", None)
            expected, expected_count = compact_ids(dense, limit)
        assert count == expected_count and ids.dtype == np.uint8
        np.testing.assert_array_equal(ids, expected)


def test_resizing_is_pillows() -> None:
    rgb = rng().integers(0, 256, (48, 63, 3)).astype(np.uint8)
    ids = rng().integers(0, 1000, (48, 63)).astype(np.int32)
    assert np.array_equal(resize_image(rgb, 32), np.array(Image.fromarray(rgb).resize((32, 32), Image.BICUBIC)))
    assert np.array_equal(resize_ids(ids, 32), np.array(Image.fromarray(ids).resize((32, 32), Image.NEAREST)))
    assert set(np.unique(resize_ids(ids, 100)).tolist()) <= set(np.unique(ids).tolist())
    assert np.array_equal(resize_image(rgb[:32, :32], 32), rgb[:32, :32])
    assert np.array_equal(resize_ids(ids[:32, :32], 32), ids[:32, :32])


def test_picture_and_map_are_cropped_alike() -> None:
    """A map painted as a picture stays the map's picture, away from its edges."""
    for seed in range(20):
        box = crop_box(60, 80, 0.3, rng(seed))
        left, top, right, bottom = box
        assert 0 <= left < right <= 80 and 0 <= top < bottom <= 60
        assert (right - left) / 80 == pytest.approx((bottom - top) / 60, abs=0.02)
        ids = np.kron(np.arange(12, dtype=np.int32).reshape(3, 4) * 20, np.ones((20, 20), np.int32))
        rgb = np.repeat(ids[..., None], 3, 2).astype(np.uint8)
        assert np.median(np.abs(resize_image(rgb, 64, box)[..., 0] - resize_ids(ids, 64, box))) == 0


def test_color_jitter() -> None:
    rgb = rng().integers(0, 256, (8, 8, 3)).astype(np.uint8)
    assert np.array_equal(color_jitter(rgb, 0.3, rng(1)), color_jitter(rgb, 0.3, rng(1)))
    assert not np.array_equal(color_jitter(rgb, 0.3, rng(1)), color_jitter(rgb, 0.3, rng(2)))
    assert np.abs(color_jitter(rgb, 0.0, rng(1)).astype(int) - rgb).max() <= 1


@pytest.mark.parametrize("wrong", [{"flip": 1.5}, {"scale_min": 0.0}, {"color_jitter": -0.1}])
def test_bad_augmentation(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Augmentation(**wrong)


def test_crops_of_another_aspect():
    def boxes(jitter):
        rng = np.random.default_rng(0)
        return [crop_box(100, 200, 0.5, rng, jitter) for _ in range(300)]

    plain = boxes(0.0)
    rng = np.random.default_rng(0)
    assert plain == [crop_box(100, 200, 0.5, rng) for _ in range(300)]
    aspects = []
    for left, top, right, bottom in boxes(0.25):
        assert 0 <= left < right <= 200 and 0 <= top < bottom <= 100
        aspects.append((right - left) / (bottom - top) / 2)
    assert 0.72 < min(aspects) < 0.8 and 1.25 < max(aspects) < 1.38
    for left, top, right, bottom in plain:
        assert abs((right - left) - 2 * (bottom - top)) <= 1


def test_augmentation_says_what_it_is_given():
    assert not Augmentation().crops and Augmentation(aspect_jitter=0.1).crops
    with pytest.raises(ArgumentError, match=r"aspect_jitter=0\.95"):
        Augmentation(aspect_jitter=0.95)
