"""A data set becomes a COCO-panoptic folder whole, or waits for the same command."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from ldmseg_fast.errors import DataError, InUseError
from ldmseg_fast.formats import coco_panoptic_writer
from ldmseg_fast.formats.coco_panoptic_writer import EMPTY, TURNED, write
from ldmseg_fast.formats.data_set import AnnotatedMap, DataSet, Entry
from ldmseg_fast.formats.options import WriteOptions
from ldmseg_fast.locks import only_writer
from tests.data.test_orientation import picture as stored_picture
from tests.data.test_orientation import save as save_turned

CATEGORIES = [{"id": 3, "name": "thing", "isthing": 1, "color": [1, 2, 3]}, {"id": 9, "name": "stuff", "isthing": 0}]


def halves(height=24, width=32):
    ids = np.full((height, width), 70_000, np.int32)
    ids[: height // 2] = 5
    ids[0, 0] = 0
    return AnnotatedMap(ids, [{"id": 5, "category_id": 3}, {"id": 70_000, "category_id": 9, "iscrowd": 1}])


@pytest.fixture
def entries(tmp_path, picture_at):
    """Makes entries with one source file each; `entries.reads` counts how often each map was read."""

    class Entries(list):
        def __init__(self):
            self.reads = []

        def new(self, name, read=halves, **more):
            picture = picture_at(tmp_path / "source" / name, seed=len(self))
            source = picture.with_name(picture.name + ".txt")
            source.write_text("annotation")

            def counted():
                self.reads.append(name)
                return read()

            self.append(Entry(name, picture, counted, sources=(source,), **more))
            return source

        def data_set(self, split="train"):
            return DataSet(CATEGORIES, {split: list(self)}, {"things of the reader": 2})

    return Entries()


def broken():
    raise DataError("broken annotation")


def visible(folder: Path):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def hidden(folder: Path):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@pytest.mark.parametrize("copy", [False, True])
def test_pictures_maps_and_json(entries, tmp_path, imported, copy):
    entries.new("a.png")
    entries.new("b/c.png", lambda: AnnotatedMap(np.zeros((24, 32), np.int32), []))
    out = tmp_path / "out"
    summary = write(entries.data_set(), out, WriteOptions(copy=copy))
    assert (summary.pictures, summary.segments) == (2, 2)
    assert summary.left_out == {"things of the reader": 2, EMPTY: 1} and summary.first == {EMPTY: "b/c.png"}
    assert "1 pictures without a segment" in summary.text() and "first in b/c.png" in summary.text()
    maps = imported(out, "train")
    assert np.array_equal(maps["a.png"]["ids"], halves().ids) and maps["categories"] == CATEGORIES
    assert maps["a.png"]["segments"][1] == {
        "id": 70_000, "category_id": 9, "iscrowd": 1, "area": 384, "bbox": [0, 12, 32, 12]
    }  # fmt: skip
    assert [maps[name]["image"]["id"] for name in ("a.png", "b/c.png")] == [1, 2] and not maps["b/c.png"]["segments"]
    picture = out / "train" / "b" / "c.png"
    assert picture.is_symlink() != copy and picture.read_bytes() == entries[1].picture.read_bytes()
    assert visible(out) == ["annotations", "panoptic_train", "train"] and hidden(out) == []
    with pytest.raises(DataError, match=r"train is there already"):
        write(entries.data_set(), out)
    write(entries.data_set("val"), out)
    assert imported(out, "val").keys() == maps.keys()


def test_pictures_of_bytes_ids_and_several_maps_of_one(entries, tmp_path, imported, picture_at):
    picture = picture_at(tmp_path / "p.png")
    content = picture.read_bytes()
    whole = AnnotatedMap(np.ones((24, 32), np.int32), [{"id": 1, "category_id": 3}])
    data_set = DataSet(
        CATEGORIES,
        {
            "train": [
                Entry("x.png", content, halves, image_id="seven"),
                Entry("y.png", lambda: content, halves, image_id=1),
                Entry("z.png", picture, halves),
                Entry("z.png", picture, lambda: whole),
                Entry("q.jpg", picture, halves),
                Entry("q.png", picture, halves),
            ]
        },
    )  # fmt: skip
    write(data_set, tmp_path / "out")
    maps = imported(tmp_path / "out", "train")
    assert list(maps) == ["x.png", "y.png", "z_0.png", "z_1.png", "q.jpg.png", "q.png.png", "categories"]
    assert [maps[name]["image"]["id"] for name in list(maps)[:-1]] == ["seven", 1, 2, 3, 4, 5]
    assert maps["z_0.png"]["image"]["file_name"] == maps["z_1.png"]["image"]["file_name"] == "z.png"
    assert (tmp_path / "out" / "train" / "y.png").read_bytes() == content


def test_a_fault_keeps_all_splits_away_and_the_same_command_goes_on(entries, tmp_path, imported):
    entries.new("a.png")
    entries.new("b.png", broken)
    entries.new("c.png")
    out, options = tmp_path / "out", WriteOptions(origin="here")
    with pytest.raises(DataError, match=r"^1 of 3 pictures cannot be imported, so nothing is: mend") as error:
        write(entries.data_set(), out, options)
    assert "b.png: broken annotation" in str(error.value) and visible(out) == []
    assert hidden(out) == [".import-train"] and sorted(entries.reads) == ["a.png", "b.png", "c.png"]
    entries[2].sources[0].write_text("changed annotation")
    entries[1] = Entry("b.png", entries[1].picture, halves, sources=entries[1].sources)
    write(entries.data_set(), out, options)
    assert entries.reads[3:] == ["c.png"]  # what has not changed is not read again
    assert list(imported(out, "train")) == ["a.png", "b.png", "c.png", "categories"] and hidden(out) == []


def test_skip_bad_leaves_out_what_cannot_be_read(entries, tmp_path, imported):
    entries.new("a.png", broken)
    with pytest.raises(DataError, match="none is left of split train"):
        write(entries.data_set(), tmp_path / "out", WriteOptions(skip_bad=True))
    assert not (tmp_path / "out").exists()
    entries.new("b.png")
    summary = write(entries.data_set(), tmp_path / "out", WriteOptions(skip_bad=True))
    assert summary.faults == ("a.png: broken annotation",) and summary.pictures == 1
    assert "1 pictures that could not be read" in summary.text() and "  - a.png: broken annotation" in summary.text()
    assert list(imported(tmp_path / "out", "train")) == ["b.png", "categories"]
    assert visible(tmp_path / "out" / "train") == ["b.png"]


def test_an_entry_that_breaks_later_is_not_taken_from_before(entries, tmp_path, imported):
    entries.new("a.png")
    entries.new("b.png")
    entries.new("c.png", broken)
    out = tmp_path / "out"
    with pytest.raises(DataError):
        write(entries.data_set(), out)
    entries[0].sources[0].write_text("changed")
    entries[0] = Entry("a.png", entries[0].picture, broken, sources=entries[0].sources)
    entries[1].sources[0].unlink()
    del entries[2]
    with pytest.raises(DataError, match=r"2 of 2 .* none is left of split train"):
        write(entries.data_set(), out, WriteOptions(skip_bad=True))
    assert list(out.iterdir()) == []


def test_another_import_does_not_go_on(entries, tmp_path):
    entries.new("a.png")
    entries.new("b.png", broken)
    out = tmp_path / "out"
    with pytest.raises(DataError):
        write(entries.data_set(), out, WriteOptions(origin="one"))
    for options in (WriteOptions(origin="two"), WriteOptions(origin="one", copy=True)):
        with pytest.raises(DataError, match=r"\.import-train: an unfinished import of another source or with other"):
            write(entries.data_set(), out, options)


@pytest.mark.parametrize("moved", ["pictures", "maps", "json"])
def test_a_kill_while_the_folders_get_their_places(entries, tmp_path, imported, monkeypatch, moved):
    entries.new("a.png")
    out = tmp_path / "out"
    steps = iter(["pictures", "maps", "json"])

    def step():
        if next(steps) == moved:
            raise KeyboardInterrupt

    rename, sync = Path.rename, coco_panoptic_writer.SplitJournal.finish.__globals__["sync_folder"]
    monkeypatch.setattr(Path, "rename", lambda path, target: (rename(path, target), step())[0])
    monkeypatch.setitem(coco_panoptic_writer.SplitJournal.finish.__globals__, "sync_folder", lambda _: step())
    with pytest.raises(KeyboardInterrupt):
        write(entries.data_set(), out)
    monkeypatch.undo()
    assert sync is coco_panoptic_writer.SplitJournal.finish.__globals__["sync_folder"]
    write(entries.data_set(), out)
    assert entries.reads == ["a.png"] and hidden(out) == []
    assert list(imported(out, "train")) == ["a.png", "categories"]


def test_a_torn_journal_and_changed_files(entries, tmp_path, imported):
    for name in ("a.png", "b.png", "c.png", "d.png"):
        entries.new(name)
    entries.new("e.png", broken)
    out = tmp_path / "out"
    with pytest.raises(DataError):
        write(entries.data_set(), out)
    journal = out / ".import-train" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-40])  # d's line
    (out / ".import-train" / "maps" / "a.png").write_bytes(b"")
    (out / ".import-train" / "pictures" / "b.png").unlink()
    del entries[4], entries[2]
    entries.reads.clear()
    write(entries.data_set(), out)
    assert sorted(entries.reads) == ["a.png", "b.png", "d.png"]
    assert list(imported(out, "train")) == ["a.png", "b.png", "d.png", "categories"]
    assert visible(out / "train") == visible(out / "panoptic_train") == ["a.png", "b.png", "d.png"]


def test_faults_of_ours_and_of_the_disk_end_the_import(entries, tmp_path, monkeypatch):
    entries.new("a.png", lambda: AnnotatedMap(np.ones((24, 32), np.int32), [{"id": 2, "category_id": 3}]))
    with pytest.raises(ValueError, match="segments are not those of its map"):
        write(entries.data_set(), tmp_path / "out", WriteOptions(skip_bad=True))
    entries[0] = Entry("a.png", entries[0].picture, halves, sources=entries[0].sources)

    def full(*_):
        raise OSError(28, "No space left on device", "map")

    monkeypatch.setattr(coco_panoptic_writer, "write_panoptic_png", full)
    with pytest.raises(OSError, match="No space left"):
        write(entries.data_set(), tmp_path / "out", WriteOptions(skip_bad=True))
    assert visible(tmp_path / "out") == []


def test_a_file_system_without_links(entries, tmp_path, monkeypatch):
    entries.new("a.png")

    def refuse(path, target):
        raise OSError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with pytest.raises(DataError, match="holds no links; use --copy"):
        write(entries.data_set(), tmp_path / "out")
    assert write(entries.data_set(), tmp_path / "other", WriteOptions(copy=True)).pictures == 1


def test_sizes_and_pictures_that_cannot_be_read(entries, tmp_path, imported):
    entries.new("small.png", lambda: halves(10, 32))
    entries.new("turned.png", lambda: halves(32, 24))
    entries.new("cut.png")
    entries.new("none.png")
    entries.new("text.png")
    cut = entries[2].picture
    cut.write_bytes(cut.read_bytes()[:500])
    entries[3].picture.unlink()
    entries[4].picture.write_text("no picture")
    with pytest.raises(DataError) as error:
        write(entries.data_set(), tmp_path / "out")
    text = str(error.value)
    assert "small.png: the map is 32x10, its picture 32x24" in text
    assert "turned.png: the map is 24x32, its picture 32x24: was one of them rotated?" in text
    for name in ("cut.png", "none.png", "text.png"):
        assert f"{tmp_path / 'source' / name}: " in text
    assert not (tmp_path / "out").exists()


def test_a_score_that_json_cannot_hold(entries, tmp_path):
    segments = [{"id": 5, "category_id": 3, "score": 0.5}, {"id": 70_000, "category_id": 9, "score": float("nan")}]
    entries.new("a.png", lambda: AnnotatedMap(halves().ids, segments))
    with pytest.raises(DataError, match=r"a.png: a score is NaN or infinite"):
        write(entries.data_set(), tmp_path / "out")


def test_exif_turns_nothing(entries, tmp_path):
    width, height = stored_picture().size
    entries.new("a.jpg", lambda: halves(height, width))
    save_turned(entries[0].picture, 6)
    assert write(entries.data_set(), tmp_path / "out").first == {TURNED: "a.jpg"}
    image = json.loads((tmp_path / "out" / "annotations" / "panoptic_train.json").read_text())["images"][0]
    assert (image["width"], image["height"]) == (width, height) and width != height


@pytest.mark.parametrize(
    ("name", "message"),
    [("/a.png", "leads out"), ("../a.png", "leads out"), ("a\udc80.png", "no UTF-8"), ("", "leads")],
)
def test_names_that_cannot_be(tmp_path, name, message):
    with pytest.raises(DataError, match=message):
        write(DataSet(CATEGORIES, {"train": [Entry(name, b"", halves)]}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("split", ["annotations", "panoptic_train", "a/b", "..", "", ".import-train", "a\nb"])
def test_splits_that_cannot_be(tmp_path, split):
    with pytest.raises(DataError, match="no name for a folder"):
        write(DataSet(CATEGORIES, {split: [Entry("a.png", b"", halves)]}), tmp_path / "out")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "no pictures"),
        ([Entry("a.png", b"1", halves), Entry("a.png", b"2", halves)], "two pictures would be called a.png"),
        ([Entry("a.png", b"1", halves, 4), Entry("b.png", b"2", halves, 4)], "image id 4 is there twice"),
        ([Entry("a.png", b"1", halves, 2**63)], "a whole number of 64 bits"),
        ([Entry("a.png", b"1", halves, "")], "or a text expected"),
        (
            [Entry("a.png", b"", halves), Entry("a.png", b"", halves), Entry("a_0.jpg", b"", halves)],
            "a.png and a_0.jpg would have one map",
        ),
    ],
    ids=["none", "name", "id", "number", "text", "map"],
)
def test_entries_that_meet(tmp_path, entries, message):
    with pytest.raises(DataError, match=message):
        write(DataSet(CATEGORIES, {"train": entries}), tmp_path / "out")


@pytest.mark.parametrize(
    "categories",
    [
        [],
        [{"id": -1, "name": "a"}],
        [{"id": "1", "name": "a"}],
        [{"id": 1, "name": ""}],
        [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}],
        [{"id": 1, "name": "a", "isthing": "yes"}],
        [{"id": 1, "name": "a", "color": [1, float("nan"), 2]}],
    ],
    ids=["none", "negative", "text", "nameless", "twice", "isthing", "nan"],
)
def test_categories_that_no_command_would_read(tmp_path, categories):
    with pytest.raises(DataError, match="categor"):
        write(DataSet(categories, {"train": [Entry("a.png", b"", halves)]}), tmp_path / "out")


def test_one_import_at_a_time(entries, tmp_path):
    entries.new("a.png")
    with only_writer(tmp_path / "out", "an import", "wait"), pytest.raises(InUseError, match="an import"):
        write(entries.data_set(), tmp_path / "out")


def test_maps_are_read_by_threads_and_written_in_order(tmp_path, picture_at, imported, monkeypatch):
    monkeypatch.setattr(coco_panoptic_writer, "cores", lambda: 3)
    together = threading.Barrier(3, timeout=10)
    picture = picture_at(tmp_path / "p.png")

    def read():
        together.wait()
        return halves()

    entries = [Entry(f"{9 - number}.png", picture, read) for number in range(6)]
    write(DataSet(CATEGORIES, {"train": entries}), tmp_path / "out")
    assert list(imported(tmp_path / "out", "train")) == [*(f"{9 - number}.png" for number in range(6)), "categories"]
