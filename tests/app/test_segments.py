"""A result that a visitor edits, and its way into files."""

import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from ldmseg_fast.app.exports import CITYSCAPES, EXPORTS, MAPS, Exported, different_names, safe_name, write_zip
from ldmseg_fast.app.segments import MAX_UNDO, Segments, color_of
from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.formats.conversions import check
from ldmseg_fast.panoptic.results import PanopticResult
from ldmseg_fast.panoptic.shapes import segment_shapes

IDS = np.zeros((6, 8), np.int32)
IDS[:3, :4], IDS[:3, 4:], IDS[3:5] = 1, 2, 7


def result(ids=IDS):
    scores = {1: 0.5, 2: 0.9, 7: 0.25}
    info = [
        {"category_id": 1, "label_id": 1, "isthing": True, "iscrowd": 0, "was_fused": False, **shape}
        | {"score": scores[shape["id"]]}
        for shape in segment_shapes(ids)
    ]
    return PanopticResult(ids, info)


@pytest.fixture
def segments():
    return Segments(result())


def test_what_is_listed(segments):
    assert [(each.id, each.area, each.score) for each in segments.listed()] == [
        (7, 16, 0.25),
        (1, 12, 0.5),
        (2, 12, 0.9),
    ]
    assert len(segments) == 3 and segments[1].bbox == (0, 0, 4, 3) and segments[1].name == "object"
    assert segments[7].share == 16 / 48 and segments[7].hex.startswith("#") and segments.size == (6, 8)
    with pytest.raises(ArgumentError, match="segment 3: no such segment"):
        segments[3]


def test_the_segment_at_a_pixel(segments):
    assert [segments.at(*place) for place in ((0, 0), (7.9, 2.9), (3, 4), (3, 5), (8, 0), (-1, 0))] == [
        1,
        2,
        7,
        0,
        0,
        0,
    ]


def test_an_unedited_result_comes_back_as_it_was(segments):
    back = segments.result()
    np.testing.assert_array_equal(back.segmentation, IDS)
    assert back.segments_info == segments.original.segments_info


def test_merge_and_undo(segments):
    assert segments.merge([1, 7]) == 7
    assert segments.at(0, 0) == 7 and len(segments) == 2 and segments[7].area == 28
    assert segments[7].score == pytest.approx((12 * 0.5 + 16 * 0.25) / 28) and segments[7].bbox == (0, 0, 8, 5)
    assert segments.merge([7], into=2) == 2 and segments.at(3, 4) == segments.at(0, 0) == 2
    back = segments.result()
    assert set(np.unique(back.segmentation)) == {0, 2} and back.segments_info[0]["area"] == 40
    check(back)
    for segment in (1, 7):
        with pytest.raises(ArgumentError, match="no such segment"):
            segments.hide(segment)
    assert segments.edits == 2 and segments.undo() and segments.at(0, 0) == 7
    assert segments.undo() and not segments.undo()
    np.testing.assert_array_equal(segments.ids, IDS)
    with pytest.raises(ArgumentError, match="two segments"):
        segments.merge([1])


def test_hidden_segments_are_void_in_results_and_untinted(segments):
    view = np.random.default_rng(0).integers(0, 255, (6, 8, 3), np.uint8)
    segments.hide(7)
    assert segments[7].hidden and segments.edits == 1
    drawn = segments.overlay(view)
    np.testing.assert_array_equal(drawn[3:5], view[3:5])
    assert (drawn[:3] != view[:3]).any()
    assert {each["id"] for each in segments.result().segments_info} == {1, 2}
    assert 7 not in segments.result().segmentation and 7 in segments.result(hidden=True).segmentation
    segments.hide(7)  # changes nothing, so there is nothing more to undo
    assert segments.edits == 1
    segments.hide([7, 1], hidden=False)
    assert not segments[7].hidden


def test_colours_and_opacity(segments):
    view = np.full((6, 8, 3), 128, np.uint8)
    segments.recolour(1, "#ff0000")
    plain = segments.overlay(view, 1.0, outlines=False)
    assert plain[0, 0].tolist() == [255, 0, 0]
    assert (segments.overlay(view, 0.0, outlines=False)[:5] == 128).all()
    assert (segments.overlay(view, 1.0) != plain).any()
    assert segments.overlay(np.full((60, 80, 3), 128, np.uint8), names=True).shape == (60, 80, 3)
    assert segments.result().segments_info[0]["color"] == [255, 0, 0]
    for opacity in (-0.1, 1.1, float("nan"), "1", None):
        with pytest.raises(ArgumentError, match="opacity"):
            segments.overlay(view, opacity)


def test_colours_are_read_as_pages_write_them():
    assert color_of("#0A0b0C") == color_of("rgb(10, 11, 12)") == color_of("rgba(10.2,11,12.0,1)") == (10, 11, 12)
    assert color_of((10, 11, 12)) == (10, 11, 12)
    for bad in (
        "red",
        "#fff",
        "rgb(1,2)",
        "rgba(300, 0, 0, 1)",
        (1, 2),
        (1, 2, 256),
        (1, 2, 3.5),
        None,
        "rgb(1.1.1, 2, 3)",
    ):
        with pytest.raises(ArgumentError, match="color"):
            color_of(bad)


def test_names_make_categories(segments):
    segments.rename(1, "  a \n cat\x00 ")
    segments.rename(2, "a cat")
    segments.rename(7, "object")
    assert segments[1].name == "a cat"
    assert segments.categories() == [
        {"id": 1, "name": "object", "isthing": 1},
        {"id": 2, "name": "a cat", "isthing": 1},
    ]
    info = {each["id"]: each for each in segments.result().segments_info}
    assert [info[key]["category_id"] for key in (1, 2, 7)] == [2, 2, 1] and info[1]["name"] == "a cat"
    segments.rename(1, "")
    assert segments[1].name == "object"
    with pytest.raises(ArgumentError, match="at most 80"):
        segments.rename(1, "x" * 81)
    with pytest.raises(ArgumentError, match="a text"):
        segments.rename(1, 3)


def test_a_name_of_the_models_is_its_category():
    table = [{"id": 5, "name": "sky", "isthing": 0}, {"id": 9, "name": "bird", "isthing": 1}]
    info = [{**segment, "category_id": 9, "name": "bird"} for segment in result().segments_info]
    segments = Segments(PanopticResult(IDS, info), table)
    segments.rename(1, "sky")
    assert segments.categories() == table
    changed = segments.result().segments_info[0]
    assert (changed["category_id"], changed["label_id"], changed["isthing"]) == (5, 5, False)


def test_only_so_many_edits_are_kept(segments):
    for number in range(MAX_UNDO + 20):
        segments.rename(1, str(number))
    assert segments.edits == MAX_UNDO
    while segments.undo():
        pass
    assert segments[1].name == "19"


@pytest.mark.parametrize("kind", EXPORTS)
def test_every_format_takes_an_edited_result(segments, kind, tmp_path):
    segments.rename(1, "cat")
    segments.recolour(2, "#123456")
    segments.hide(7)
    view = np.full((6, 8, 3), 128, np.uint8)
    Image.fromarray(view).save(tmp_path / "picture.png")
    item = Exported.of("my picture.png", tmp_path / "picture.png", segments, view)
    path = write_zip([item], kind, segments.categories(), tmp_path / "out.zip")
    with zipfile.ZipFile(path) as zipped:
        assert zipped.testzip() is None and zipped.namelist()
        if kind == MAPS:
            assert set(zipped.namelist()) == {f"my picture{end}" for end in (".png", ".json", "_overlay.png")}
            record = json.loads(zipped.read("my picture.json"))
            assert [each["id"] for each in record["segments_info"]] == [1, 2]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out.zip", "picture.png"]


def test_formats_and_empty_downloads_are_refused(segments, tmp_path):
    with pytest.raises(ArgumentError, match="format='svg': one of maps, coco-instances"):
        write_zip([], "svg", segments.categories(), tmp_path / "out.zip")
    with pytest.raises(ArgumentError, match="no results"):
        write_zip([], MAPS, segments.categories(), tmp_path / "out.zip")
    assert CITYSCAPES not in EXPORTS and list(tmp_path.iterdir()) == []


def test_a_turned_picture_is_exported_as_it_is_stored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 8)).save(tmp_path / "turned.jpg", exif=exif)  # shown: 8 wide, 6 high
    item = Exported("turned.jpg", tmp_path / "turned.jpg", result(), 6)
    path = write_zip([item], "coco-panoptic", Segments(result()).categories(), tmp_path / "out.zip")
    with zipfile.ZipFile(path) as zipped:
        name = next(each for each in zipped.namelist() if each.endswith(".png"))
        with zipped.open(name) as file:
            assert Image.open(file).size == (6, 8)


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("a/b.png", "b.png"),
        ("..\\..\\evil.png", "evil.png"),
        ("..", "picture"),
        (".hidden", "picture.hidden"),
        ("a\x00b\n.jpg", "a_b_.jpg"),
        ("con.png", "_con.png"),
        ("", "picture"),
        ("été 1.jpeg", "été 1.jpeg"),
        ("x" * 300 + ".png", "x" * 100 + ".png"),
        ("<script>.png", "_script_.png"),
        ("weird.tar gz", "weird.tar gz"),
        ("\u6f22" * 90 + ".png", "\u6f22" * 60 + ".png"),  # 3 bytes each; a file system takes 255
    ],
    ids=lambda value: None,
)
def test_safe_names(name, safe):
    assert safe_name(name) == safe


def test_names_that_repeat():
    assert different_names(["a/x.png", "b/X.jpg", "x.png", "x-2.png"]) == ["x.png", "X-2.jpg", "x-3.png", "x-2-2.png"]


@pytest.mark.parametrize("names", [["a.png", "a_overlay.png"], ["A_overlay.png", "a.jpg"]], ids=["after", "before"])
def test_no_name_is_that_of_anothers_overlay(names):
    stems = [each.rpartition(".")[0].casefold() for each in different_names(names)]
    assert len({*stems, *(f"{stem}_overlay" for stem in stems)}) == 4
