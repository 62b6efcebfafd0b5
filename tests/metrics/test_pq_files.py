"""`ldmseg pq` on files: equal to peers, streaming, and one clear error for every bad input."""

import codecs
import json
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ldmseg_fast.cli import main
from ldmseg_fast.errors import ArgumentError, PanopticFormatError
from ldmseg_fast.metrics import file_pair, matching
from ldmseg_fast.metrics.pq_files import evaluate_files, png_folder
from ldmseg_fast.metrics.pq_report import format_table
from ldmseg_fast.panoptic import annotations
from ldmseg_fast.panoptic import format as panoptic_format
from ldmseg_fast.panoptic.format import write_panoptic_png

CATEGORIES = [{"id": i, "name": f"c{i}", "isthing": int(i < 4)} for i in range(1, 7)]


def _segments(rng, ids, crowd_share, category_of):
    values, areas = np.unique(ids[ids != 0], return_counts=True)
    return [
        {
            "id": int(i),
            "category_id": category_of.setdefault(int(i), int(rng.integers(1, 7))),
            "iscrowd": int(rng.random() < crowd_share),
            "area": int(area),
        }
        for i, area in zip(values, areas)
    ]


@pytest.fixture
def dataset(tmp_path):
    """Twelve generated images, ROOT/annotations/panoptic_val.json beside ROOT/panoptic_val, and predictions in PRED."""
    rng = np.random.default_rng(0)
    root, out = tmp_path / "root", tmp_path / "pred"
    (root / "annotations").mkdir(parents=True)
    (root / "panoptic_val").mkdir()
    (out / "predictions").mkdir(parents=True)
    content = {"gt": [], "pred": []}
    images = []
    for image_id in range(1, 13):
        height, width = (int(side) for side in rng.integers(20, 90, 2))
        palette = rng.choice(2**24, 9, replace=False)
        palette[0] = 0
        gt = np.kron(rng.integers(0, 9, (height // 9 + 1, width // 9 + 1)), np.ones((9, 9), int))[:height, :width]
        pred = np.where(rng.random(gt.shape) < 0.1, rng.integers(0, 9, gt.shape), np.roll(gt, 1, axis=0))
        category_of = {}
        name = f"{image_id:012d}.png"
        gt_ids, pred_ids = palette[gt], palette[pred]
        write_panoptic_png(root / "panoptic_val" / name, gt_ids)
        write_panoptic_png(out / "predictions" / name, pred_ids)
        for kind, ids, crowds in (("gt", gt_ids, 0.2), ("pred", pred_ids, 0.0)):
            segments = _segments(rng, ids, crowds, category_of)
            content[kind].append({"image_id": image_id, "file_name": name, "segments_info": segments})
        images.append({"id": image_id, "file_name": f"{image_id:012d}.jpg", "height": height, "width": width})
    gt_json, pred_json = root / "annotations" / "panoptic_val.json", out / "predictions.json"
    gt_json.write_text(json.dumps({"images": images, "annotations": content["gt"], "categories": CATEGORIES}))
    pred_json.write_text(json.dumps({"annotations": content["pred"]}))
    return gt_json, pred_json


def _edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _run(*arguments):
    return main(["pq", *map(str, arguments)])


def test_golden_from_files(shared, tmp_path):
    golden = shared / "golden" / "pq"
    expected = json.loads((golden / "expected.json").read_text())
    out = tmp_path / "report.json"
    assert _run(golden / "gt.json", golden / "pred.json", "--json", out) == 0
    report = json.loads(out.read_text())
    for group in ("All", "Things", "Stuff"):
        for name, value in expected[group].items():
            assert report[group][name] == pytest.approx(value, abs=1e-9)
    for key, entry in expected["per_category"].items():
        for name, value in entry.items():
            assert report["per_category"][key][name] == pytest.approx(value, abs=1e-9)
    assert report["seconds"] > 0
    assert _run(golden / "gt.json", golden / "pred.json", "--class-agnostic", "--json", out) == 0
    report = json.loads(out.read_text())
    assert report["class_agnostic"]["pq"] == pytest.approx(expected["class_agnostic"]["pq"], abs=1e-9)
    assert report["pq_crowd_correct"] == pytest.approx(0.5862819720502551, abs=1e-9)


def test_equals_hotcoco_and_the_plain_algorithm(dataset, plain_pq, capsys):
    panoptic = pytest.importorskip("hotcoco.panoptic")
    gt_json, pred_json = dataset
    gt_folder, pred_folder = png_folder(gt_json), png_folder(pred_json)
    ours = evaluate_files(gt_json, pred_json)
    theirs = panoptic.pq_compute(str(gt_json), str(pred_json), str(gt_folder), str(pred_folder))
    plain = plain_pq.evaluate_like_panopticapi(gt_json, pred_json, gt_folder, pred_folder)
    for name in ("pq", "sq", "rq", "n"):
        for group in ("All", "Things", "Stuff"):
            assert ours[group][name] == pytest.approx(theirs[group][name], abs=1e-12)
        assert ours["All"][name] == pytest.approx(plain[name], abs=1e-12)
    capsys.readouterr()


def test_the_table_is_panopticapis(dataset):
    gt_json, pred_json = dataset
    lines = format_table(evaluate_files(gt_json, pred_json)).splitlines()
    assert lines[0] == "          |    PQ     SQ     RQ     N"
    assert lines[1] == "-" * 38
    assert [line[:11] for line in lines[2:5]] == ["All       |", "Things    |", "Stuff     |"]
    assert format_table(evaluate_files(gt_json, pred_json, boundary=True)).splitlines()[0].endswith("BPQ")


def test_threads_and_reports(dataset, tmp_path, capsys):
    gt_json, pred_json = dataset
    reports = []
    for threads in (1, 2, 5):
        out, table = tmp_path / "report.json", tmp_path / "table.csv"
        assert _run(gt_json, pred_json, "--boundary", "--threads", threads, "--json", out, "--csv", table) == 0
        report = json.loads(out.read_text())
        assert report.pop("seconds") > 0
        assert report.pop("threads") == threads
        reports.append(report)
    assert reports[0] == reports[1] == reports[2]
    assert len(report["per_image"]) == 12
    worst = [image["pq"] for image in report["worst_images"]]
    assert worst == sorted(image["pq"] for image in report["per_image"])[:10]
    header, *lines = table.read_text().splitlines()
    assert header == "category_id,name,isthing,tp,fp,fn,iou,pq,sq,rq,boundary_pq"
    assert len(lines) == report["All"]["n"]
    assert "12 images in" in capsys.readouterr().out


def test_without_the_extension_the_same_numbers(dataset, monkeypatch):
    gt_json, pred_json = dataset
    fast = evaluate_files(gt_json, pred_json, boundary=True, num_threads=2)
    for module in (annotations, matching, panoptic_format, file_pair):
        monkeypatch.setattr(module, "_C", None)
    slow = evaluate_files(gt_json, pred_json, boundary=True, num_threads=2)
    assert fast.pop("seconds") > 0 and slow.pop("seconds") > 0
    assert fast == slow


def test_missing_predictions_are_listed_or_count_as_empty(dataset, capsys):
    gt_json, pred_json = dataset
    full = evaluate_files(gt_json, pred_json)
    _edit(pred_json, lambda content: content["annotations"].__delitem__(slice(2, 4)))
    assert _run(gt_json, pred_json) == 2
    error = capsys.readouterr().err
    assert "no prediction for 2 of 12 images" in error
    assert "3, 4" in error
    assert _run(gt_json, pred_json, "--allow-missing") == 0
    assert "2 images without prediction count as empty" in capsys.readouterr().out
    partial = evaluate_files(gt_json, pred_json, allow_missing=True)
    assert partial["missing"] == [3, 4]
    assert sum(entry["fn"] for entry in partial["per_category"].values()) > sum(
        entry["fn"] for entry in full["per_category"].values()
    )


def test_predictions_of_unknown_images_are_left_out_and_told(dataset):
    gt_json, pred_json = dataset
    full = evaluate_files(gt_json, pred_json)["All"]
    _edit(gt_json, lambda content: (content["annotations"].pop(), content["images"].pop()))
    result = evaluate_files(gt_json, pred_json)
    assert result["ignored"] == [12]
    assert result["All"] != full
    assert "1 predicted images that the ground truth does not list" in format_table(result)


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (str, "there it is the text '1', in the ground truth the number 1: write `image_id` as the ground truth does"),
        (
            lambda image_id: f"{image_id:012d}.jpg",
            "there it is the text '000000000001.jpg', in the ground truth the number",
        ),
        (lambda image_id: image_id + 100, "it has none of the ground truth's, but 101, 102, 103, 104, 105"),
    ],
)
@pytest.mark.parametrize("options", [(), ("--allow-missing",)])
def test_predictions_of_other_ids(dataset, capsys, rename, message, options):
    gt_json, pred_json = dataset
    _edit(pred_json, lambda content: [a.update(image_id=rename(a["image_id"])) for a in content["annotations"]])
    assert _run(gt_json, pred_json, *options) == 2
    error = capsys.readouterr().err
    assert "no prediction for 12 of 12 images" in error and message in error
    _edit(pred_json, lambda content: content.update(annotations=[]))
    assert _run(gt_json, pred_json, "--allow-missing") == 0, "no prediction at all"


def test_a_point_in_an_id_is_no_ending(dataset, capsys):
    """Frames of videos: frame.0002 and frame.0003 are two images."""
    gt_json, pred_json = dataset

    def rename(content):
        for key, entries in (("id", content.get("images", [])), ("image_id", content["annotations"])):
            for entry in entries:
                entry[key] = f"frame.{entry[key]:04d}"

    _edit(gt_json, rename)
    _edit(pred_json, lambda content: (rename(content), content["annotations"][-1].update(image_id="frame.9999")))
    assert _run(gt_json, pred_json, "--allow-missing") == 0
    assert _run(gt_json, pred_json) == 2
    assert "count them as empty with --allow-missing" in capsys.readouterr().err


def test_files_with_a_byte_order_mark(dataset):
    gt_json, pred_json = dataset
    before = evaluate_files(gt_json, pred_json)["All"]
    for path in dataset:
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    assert evaluate_files(gt_json, pred_json)["All"] == before


def _png(width, height, depth, colour, rows):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def _spoil_first(name, annotation):
    """How to break the first prediction's PNG, by name."""
    size = Image.open(name).size
    blank = Image.new("RGB", size)
    if annotation == "palette":
        blank.convert("P").save(name)
    elif annotation == "rgba":
        blank.convert("RGBA").save(name)
    elif annotation == "16-bit":
        Image.fromarray(np.zeros(size[::-1], np.uint16)).save(name)
    elif annotation == "truncated":
        name.write_bytes(name.read_bytes()[:-40])
    elif annotation == "huge":
        name.write_bytes(_png(40000, 40000, 8, 2, b"\0" * 20000))
    elif annotation == "smaller":
        Image.new("RGB", (5, 4)).save(name)
    elif annotation == "jpeg":
        blank.save(name, format="JPEG")
    elif annotation == "short data":
        name.write_bytes(_png(*size, 8, 2, b"\0" * 20))
    elif annotation == "absent":
        name.unlink()
    elif annotation == "unlisted ids":
        write_panoptic_png(name, np.full(size[::-1], 4711))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("palette", "palette PNG"),
        ("rgba", "RGBA PNG"),
        ("16-bit", "16-bit greyscale PNG"),
        ("truncated", "damaged or truncated PNG"),
        ("huge", "header claims 40000x40000"),
        ("smaller", "prediction is 5x4; sizes must be equal"),
        ("jpeg", "not a PNG file"),
        ("short data", "damaged or truncated PNG"),
        ("absent", "there is no such file"),
        ("unlisted ids", "ids in the map but not in segments_info: 4711"),
    ],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_bad_pngs(dataset, capsys, fault, message, threads):
    gt_json, pred_json = dataset
    name = pred_json.parent / "predictions" / "000000000001.png"
    _spoil_first(name, fault)
    assert _run(gt_json, pred_json, "--processes", threads) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(name) in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"].append(c["annotations"][0]), "`image_id` 1 appears twice"),
        (lambda c: c["annotations"][0]["segments_info"][0].update(id=2**24), "integer in 1..16777215, got 16777216"),
        (lambda c: c["annotations"][0]["segments_info"][0].update(id=-3), "integer in 1..16777215, got -3"),
        (lambda c: c["annotations"][0]["segments_info"][0].update(id=0), "integer in 1..16777215, got 0"),
        (
            lambda c: c["annotations"][0]["segments_info"].append(c["annotations"][0]["segments_info"][0]),
            "appears twice in segments_info",
        ),
        (lambda c: c["annotations"][0]["segments_info"][0].update(category_id=99), r"category ids [99] are not among"),
        (lambda c: c["annotations"][0]["segments_info"][0].pop("category_id"), "unknown category_id None"),
        (
            lambda c: c["annotations"][0]["segments_info"].append({"id": 5, "category_id": 1}),
            "ids in segments_info but not in the map: 5",
        ),
        (lambda c: c.pop("annotations"), "`annotations` is missing"),
        (lambda c: c.update(annotations={}), "`annotations` must be a list"),
        (lambda c: c["annotations"][0].pop("file_name"), "`file_name` must name a PNG"),
    ],
)
def test_bad_json(dataset, capsys, change, message):
    gt_json, pred_json = dataset
    _edit(pred_json, change)
    assert _run(gt_json, pred_json) == 2
    error = capsys.readouterr().err
    assert message in error
    assert pred_json.stem in error


def test_duplicate_images_and_unknown_images_in_the_ground_truth(dataset):
    gt_json, pred_json = dataset
    _edit(gt_json, lambda content: content["images"].append(content["images"][0]))
    with pytest.raises(PanopticFormatError, match=r"images\[12\]: `id` 1 appears twice"):
        evaluate_files(gt_json, pred_json)
    _edit(gt_json, lambda content: content.update(images=content["images"][1:-1]))
    with pytest.raises(PanopticFormatError, match="annotations of images that `images` does not list: 1"):
        evaluate_files(gt_json, pred_json)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff"])
def test_broken_json_files(dataset, capsys, text):
    gt_json, pred_json = dataset
    pred_json.write_bytes(text.encode("latin1"))
    assert _run(gt_json, pred_json) == 2
    assert str(pred_json) in capsys.readouterr().err


def test_wrong_paths(dataset, tmp_path, capsys):
    gt_json, pred_json = dataset
    assert _run(gt_json, tmp_path / "none.json") == 2
    assert "none.json" in capsys.readouterr().err
    assert _run(gt_json, pred_json, "--pred-folder", tmp_path / "nowhere") == 2
    assert "nowhere" in capsys.readouterr().err
    assert _run(gt_json, pred_json, "--json", tmp_path) == 2
    assert f"{tmp_path} is a folder" in capsys.readouterr().err
    assert _run(gt_json, pred_json, "--csv", gt_json / "x.csv") == 2, "before any work"
    assert str(gt_json) in capsys.readouterr().err
    assert _run(gt_json, pred_json, "--json", tmp_path / "new" / "x.json") == 0
    shutil.rmtree(pred_json.parent / "predictions")
    assert _run(gt_json, pred_json) == 2
    assert "no folder of PNGs" in capsys.readouterr().err


def test_nothing_is_written_beside_the_data(dataset):
    gt_json, pred_json = dataset
    before = sorted((path, path.stat().st_mtime_ns) for path in gt_json.parents[2].rglob("*"))
    evaluate_files(gt_json, pred_json, class_agnostic=True)
    assert sorted((path, path.stat().st_mtime_ns) for path in gt_json.parents[2].rglob("*")) == before


def test_a_folder_without_a_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["pq", ".", "."]) == 2
    assert capsys.readouterr().err.startswith("error: .: no PNG in this folder")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replicates": -1}, "replicates=-1: a whole number"),
        ({"replicates": 1.5}, "replicates=1.5: a whole number"),
        ({"seed": -1}, "seed=-1: a whole number"),
        ({"seed": "x"}, "seed='x': a whole number"),
        ({"table": "none.csv"}, "table=none.csv: needs `by`"),
    ],
    ids=str,
)
def test_arguments_of_the_api(dataset, options, message):
    with pytest.raises(ArgumentError, match=message):
        evaluate_files(*dataset, **options)
