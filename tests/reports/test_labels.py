"""Names on overlays, and the legend."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from ldmseg_fast.cli import main
from ldmseg_fast.config.categories import Category, CategoryTable
from ldmseg_fast.panoptic.shapes import segment_shapes
from ldmseg_fast.reports import labels
from ldmseg_fast.reports.labels import hue_turned, named_overlay

TABLE = CategoryTable((Category(30, "sky", False, (90, 160, 250)), Category(10, "zebra", True, (250, 200, 40))))


def scene(height=480, width=640):
    ids = np.ones((height, width), np.int32)
    ids[height // 4 : height // 2, width // 4 : width // 2] = 2
    ids[-3:, -3:] = 3
    ids[:, :8] = 0
    segments = [s | {"category_id": 30 if s["id"] == 1 else 10} for s in segment_shapes(ids)]
    return np.full((height, width, 3), 90, np.uint8), ids, segments


@pytest.fixture
def written(monkeypatch):
    """The names that are written, with their font's size."""
    found = []
    text = labels.ImageDraw.ImageDraw.text

    def record(self, xy, name, *args, **kwargs):
        found.append((name, kwargs["font"].size, xy))
        return text(self, xy, name, *args, **kwargs)

    monkeypatch.setattr(labels.ImageDraw.ImageDraw, "text", record)
    return found


def test_names_are_legible_where_there_is_room_and_all_are_in_the_legend(written):
    image, ids, segments = scene()
    out = named_overlay(image, ids, segments, TABLE)
    assert out.dtype == np.uint8 and out.shape[1:] == (640, 3) and out.shape[0] > 480
    on_picture = [entry for entry in written if entry[2][1] < 480]
    assert [name for name, _, _ in on_picture] == ["sky", "zebra"], "the speck has no room for a name"
    assert min(size for _, size, _ in written) >= 14
    x, y = on_picture[1][2]
    assert ids[int(y), int(x)] == 2
    assert [name for name, _, xy in written if xy[1] > 480] == ["sky", "zebra (2)"]
    for category in TABLE.categories:
        assert (out[480:] == category.color).all(-1).any(), "the legend shows the colour"


def test_tiny_pictures_void_and_unknown_categories():
    image, ids, segments = scene(40, 30)
    assert named_overlay(image, ids, segments, TABLE).shape[1] == 30
    empty = np.zeros((40, 30), np.int32)
    assert named_overlay(image, empty, [], TABLE).shape == (40, 30, 3)
    segments = [segment | {"category_id": 0} for segment in segments]
    assert named_overlay(image, ids, segments, TABLE).shape == (40, 30, 3)


@pytest.mark.parametrize("name", ["a\nb", "\t", "x" * 400, "\N{SNOWMAN}"], ids=["lines", "blank", "long", "symbol"])
def test_any_name_can_be_drawn(name):
    image, ids, segments = scene()
    table = CategoryTable((Category(30, name, False, (1, 2, 3)), TABLE.categories[1]))
    assert named_overlay(image, ids, segments, table).shape[1] == 640


def test_innermost_pixel_is_inside():
    mask = np.zeros((20, 30), bool)
    mask[2:18, 3:6], mask[2:6, 3:20] = True, True
    row, column, depth = labels._innermost(mask)
    assert mask[row, column] and depth >= 2
    assert labels._innermost(np.zeros((3, 3), bool)) is None


def test_predict_writes_names(category_model, category_scenes, tmp_path):
    picture = sorted((category_scenes / "val2017").iterdir())[0]
    assert main(["predict", str(category_model), str(picture), "--out", str(tmp_path), "--steps", "1"]) == 0
    assert ImageFont.load_default(14) is not None
    with Image.open(tmp_path / f"{picture.stem}_overlay.png") as overlay:
        assert overlay.width == 512


def test_things_of_one_category_are_told_apart_by_hue():
    assert hue_turned((220, 20, 60), 0) == (220, 20, 60)
    for color in ((220, 20, 60), (128, 128, 128), (0, 0, 0), (255, 255, 255)):
        shown = np.array([hue_turned(color, step) for step in range(6)], int)
        apart = np.abs(shown[:, None] - shown[None]).sum(-1) + 999 * np.eye(6, dtype=int)
        assert apart.min() > 20, color
