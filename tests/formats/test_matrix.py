"""The table of formats in docs/formats.md says what is so."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldmseg_fast.formats.data_set import AnnotatedMap
from ldmseg_fast.formats.export import export
from ldmseg_fast.formats.kinds import ALL, KINDS
from ldmseg_fast.formats.matrix import PAGE, renewed, table
from ldmseg_fast.formats.options import ReadOptions, WriteOptions
from tests.formats.drawing import CATEGORIES, annotated, coco_maps, data_set, noise

WRITTEN = [kind for kind, each in KINDS.items() if each.writes]
BACK = [kind for kind in WRITTEN if KINDS[kind].back == kind]


def test_the_page_has_the_table_of_now():
    """`python -m ldmseg_fast.formats.matrix` renews it."""
    page = PAGE.read_text(encoding="utf-8")
    assert renewed(page) == page
    assert table().count("\n") == len(KINDS) + 1


@pytest.mark.parametrize("kind", WRITTEN)
def test_what_is_written(kind):
    each = KINDS[kind]
    module = importlib.import_module(f"ldmseg_fast.formats.{each.module}")
    assert callable(module.write) and each.used_by and set(each.keeps) <= set(ALL)
    assert not each.back or KINDS[each.back].reads
    assert each.reads == hasattr(module, "read")


def regions(each: AnnotatedMap, categories: list[dict], keys: tuple[str, ...]) -> dict[bytes, tuple]:
    """Pixels of each segment -> name of its category and the values of `keys`."""
    names = {category["id"]: category["name"] for category in categories}
    return {
        (each.ids == segment["id"]).tobytes(): (names[segment["category_id"]], *(segment.get(key) for key in keys))
        for segment in each.segments
    }


def read_back(kind: str, out: Path, version: str = "") -> tuple[list[dict], dict[str, AnnotatedMap]]:
    """Categories and maps of a folder that was exported; Label Studio's predictions are another version."""
    module = importlib.import_module(f"ldmseg_fast.formats.{KINDS[KINDS[kind].back].module}")
    back = module.read(out, ReadOptions(version=version))
    (entries,) = back.splits.values()
    return back.categories, {entry.name: entry.read() for entry in entries}


@pytest.mark.parametrize("kind", BACK)
def test_what_comes_back(tmp_path, kind):
    """Every pixel, and of crowds and scores exactly what the table says."""
    maps = {f"{seed}.png": annotated(noise(seed, 20 + seed, 31 - seed), seed, True, True) for seed in range(6)}
    assert any(segment["iscrowd"] for each in maps.values() for segment in each.segments)
    source = data_set(tmp_path / "pictures", maps)
    summary = export(source, kind, tmp_path / "out", WriteOptions())
    categories, found = read_back(kind, tmp_path / "out", "predictions" if kind == "label-studio" else "")
    kept = {key for key, name in (("iscrowd", "crowds"), ("score", "scores")) if name in KINDS[kind].keeps}
    for name, each in maps.items():
        keys = tuple(sorted(kept))
        assert regions(found[name], categories, keys) == regions(each, CATEGORIES, keys)
        for key in {"iscrowd", "score"} - kept:
            assert not any(segment.get(key) for segment in found[name].segments)
    for key, word in (("iscrowd", "crowd"), ("score", "scores")):
        assert any(word in reason for reason in summary.left_out) == (key not in kept), summary.left_out


@pytest.mark.parametrize("kind", BACK)
def test_photographs(tmp_path, shared, kind):
    maps, categories = coco_maps(shared, "panoptic_val2017")
    export(data_set(tmp_path / "pictures", maps, categories=categories), kind, tmp_path / "out", WriteOptions())
    others, found = read_back(kind, tmp_path / "out")
    assert len(found) == 18
    for name, each in maps.items():
        assert regions(found[name], others, ()) == regions(each, categories, ())
        assert np.array_equal(found[name].ids > 0, each.ids > 0)


def test_categories_come_back_from_palettes(tmp_path):
    maps = {"a.png": annotated(noise(1, 20, 30), 1)}
    export(data_set(tmp_path / "pictures", maps), "palette", tmp_path / "out", WriteOptions())
    categories, found = read_back("palette", tmp_path / "out")
    painted = [np.zeros((20, 30), int) for _ in range(2)]
    for pixels, each in zip(painted, (found["a.png"], maps["a.png"])):
        for segment in each.segments:
            pixels[each.ids == segment["id"]] = segment["category_id"]
    np.testing.assert_array_equal(*painted)
    with Image.open(tmp_path / "out" / "val" / "images" / "a.png") as picture:
        assert picture.size == (30, 20) and len(categories) == 3
