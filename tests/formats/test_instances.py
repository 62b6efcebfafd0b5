"""Connected pieces become instances."""

import numpy as np
import pytest

from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.formats.data_set import AnnotatedMap, DataSet, Entry
from ldmseg_fast.formats.instances import split_pieces, with_options
from ldmseg_fast.formats.options import ReadOptions
from ldmseg_fast.panoptic.format import MAX_ID

CATEGORIES = [{"id": 1, "name": "car, auto", "isthing": 0}, {"id": 2, "name": "Sky", "isthing": 1}]


def pieces():
    ids = np.zeros((6, 9), np.int32)
    ids[:2, :2], ids[:3, 4:9], ids[5, 0], ids[2, 2] = (MAX_ID,) * 4  # the last touches the first at a corner alone
    ids[4:, 7:] = 1
    segments = [{"id": 1, "category_id": 2, "iscrowd": 0}, {"id": MAX_ID, "category_id": 1, "iscrowd": 0}]
    return AnnotatedMap(ids, segments, {"reason": 1})


def test_the_largest_piece_keeps_the_id_and_others_get_free_ones():
    found = split_pieces(pieces(), frozenset({1}))
    assert [segment["id"] for segment in found.segments] == [1, 2, 3, 4, MAX_ID] and found.left_out == {"reason": 1}
    assert [segment["category_id"] for segment in found.segments] == [2, 1, 1, 1, 1]
    assert (found.ids[:3, 4:9] == MAX_ID).all() and (found.ids[4:, 7:] == 1).all()
    assert np.array_equal(found.ids == 0, pieces().ids == 0)
    assert len({found.ids[0, 0], found.ids[2, 2], found.ids[5, 0]}) == 3


def test_other_categories_and_crowds_stay_whole():
    crowd = pieces()
    crowd.segments[1]["iscrowd"] = 1
    for annotated, categories in ((pieces(), {2}), (crowd, {1, 2})):
        found = split_pieces(annotated, frozenset(categories))
        assert np.array_equal(found.ids, annotated.ids) and found.segments == annotated.segments


def test_options_name_categories():
    data_set = DataSet(CATEGORIES, {"train": [Entry("a.png", b"", pieces)]})
    assert with_options(data_set, ReadOptions()) is data_set
    for name in ("car, auto", "CAR, AUTO", "1", "sky, 1"):
        changed = with_options(data_set, ReadOptions(connected=(name,)))
        assert [category["isthing"] for category in changed.categories] == [1, 1]
        assert len(changed.splits["train"]) == 1 and len(changed.splits["train"][0].read().segments) == 5
    changed = with_options(data_set, ReadOptions(things=("car, auto",)))
    assert [category["isthing"] for category in changed.categories] == [1, 0]
    with pytest.raises(ArgumentError, match="--things boat: no category of this data set; it has car, auto, Sky"):
        with_options(data_set, ReadOptions(things=("sky,boat",)))
