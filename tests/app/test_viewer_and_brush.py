"""What the page's viewer and brush are given, and what they give back; without a browser."""

import base64
import zlib

import numpy as np
import pytest

pytest.importorskip("gradio", reason="the extra `app` brings gradio: pip install 'ldmseg_fast[app]'")

from ldmseg_fast.app.segments import Segments
from ldmseg_fast.app.tabs.brush import FORGET, KEEP, brushes_of, canvas_of, painted
from ldmseg_fast.app.tabs.viewer import SIDE, edit, labels, view_of
from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.panoptic.results import PanopticResult
from ldmseg_fast.panoptic.shapes import segment_shapes


def segments_of(ids: np.ndarray) -> Segments:
    info = [{"category_id": 1, "isthing": True, "iscrowd": 0} | shape for shape in segment_shapes(ids)]
    return Segments(PanopticResult(ids, info))


@pytest.fixture
def segments() -> Segments:
    ids = np.zeros((20, 30), np.int32)
    ids[:, 5:] = 9_000_001
    ids[10:, 5:] = 7
    ids[:5, 20:] = 12
    return segments_of(ids)


def test_the_viewer_gets_places_in_its_list(segments):
    value = view_of(segments, np.zeros((20, 30, 3), np.uint8))
    places = np.frombuffer(zlib.decompress(base64.b64decode(value["map"])), "<u2").reshape(20, 30)
    assert [each["id"] for each in value["segments"]] == [7, 9_000_001, 12]
    assert (places[:, :5] == 0).all() and places[15, 10] == 1 and places[2, 10] == 2 and places[2, 25] == 3
    assert (value["width"], value["height"], value["undo"]) == (30, 20, False)


def test_a_large_picture_is_scaled_down_for_the_viewer():
    value = view_of(segments_of(np.ones((3000, 1500), np.int32)), np.zeros((2048, 1024, 3), np.uint8))
    assert (value["width"], value["height"]) == (SIDE // 2, SIDE)
    assert value["picture"].startswith("data:image/jpeg")


def test_segments_of_one_name_are_told_apart_after_edits_too(segments):
    assert labels(segments) == {7: "object 1", 12: "object 2", 9_000_001: "object 3"}
    edit(segments, "merge", [7, 12])
    assert labels(segments) == {7: "object 1", 9_000_001: "object 3"}
    edit(segments, "rename", [7], "road")
    assert labels(segments) == {7: "road", 9_000_001: "object"}
    edit(segments, "hide", [7])
    assert segments[7].hidden
    edit(segments, "hide", [7])
    assert not segments[7].hidden
    edit(segments, "recolour", [7], color="#010203")
    assert segments[7].color == (1, 2, 3)
    for _ in range(4):
        edit(segments, "undo", [])
    assert labels(segments) == {7: "object 1", 9_000_001: "object 3"}
    with pytest.raises(ArgumentError, match="segment 99"):
        edit(segments, "hide", [99])
    with pytest.raises(ArgumentError, match="paint"):
        edit(segments, "paint", [7])


def test_brushes_differ_from_each_other_whatever_colours_a_visitor_chose(segments):
    for segment_id, color in ((7, "#000000"), (12, "#ff00ff"), (9_000_001, "#ff00fe")):
        segments.recolour(segment_id, color)
    brushes = brushes_of(segments)
    assert [brush.code for brush in brushes] == [FORGET, 1, 7, 9_000_001, 12]
    colors = np.array([brush.color for brush in brushes], int)
    far = np.linalg.norm(colors[:, None] - colors[None], axis=-1) + 1000 * np.eye(len(colors))
    assert far.min() >= 40


def test_strokes_are_read_as_ids_and_blends_are_forgotten(segments):
    brushes = brushes_of(segments)
    layer = np.zeros((200, 300, 4), np.uint8)  # ten times the map
    layer[:50, :100] = (*brushes[0].color, 255)
    layer[50:100, :100] = (*brushes[1].color, 255)
    layer[100:150, :100] = (*brushes[2].color, 100)  # hardly there
    layer[150:, :100] = (120, 20, 130, 255)  # of two brushes
    codes = painted([layer], brushes, 20, 30)
    assert (codes[:5, :10] == FORGET).all() and (codes[5:10, :10] == 1).all()
    assert (codes[10:15] == KEEP).all() and (codes[15:, :10] == FORGET).all() and (codes[:, 10:] == KEEP).all()
    assert (painted([], brushes, 20, 30) == KEEP).all()


def test_the_canvas_is_enlarged_by_a_whole_factor(segments):
    assert canvas_of(segments, np.zeros((20, 30, 3), np.uint8)).shape == (420, 630, 3)
