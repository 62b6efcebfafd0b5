"""`ldmseg pq` on RLE, polygons and folders of PNGs: the numbers of PNGs, and one clear error for every bad input."""

import json
import re
from functools import partial

import numpy as np
import pytest

from ldmseg_fast.cli import main
from ldmseg_fast.errors import PanopticFormatError
from ldmseg_fast.metrics import mask_files
from ldmseg_fast.metrics.mask_files import StreamedMasks, load_mask_file, open_mask_file
from ldmseg_fast.metrics.pq_files import evaluate_files
from ldmseg_fast.native import _C
from ldmseg_fast.panoptic.coco_masks import mask_of_polygons, rle_of_mask

TOLD = ("seconds", "threads")


def _edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _pq(*arguments):
    return main(["pq", *map(str, arguments)])


def score(gt, pred, **options):
    result = evaluate_files(gt, pred, replicates=20, boundary=True, **options)
    return {key: value for key, value in result.items() if key not in TOLD}


def test_masks_give_the_numbers_of_pngs(files, monkeypatch):
    expected = score(files / "gt.json", files / "pred.json")
    assert 0 < expected["All"]["pq"] < 1
    pairs = [("gt", "pred_masks"), ("gt_masks", "pred"), ("gt_masks", "pred_masks"), ("gt_masks", "pred_list")]
    for gt, pred in pairs:
        for threads in (1, 3):
            assert score(files / f"{gt}.json", files / f"{pred}.json", num_threads=threads) == expected
    monkeypatch.setattr(mask_files, "_C", None)
    for gt, pred in pairs:
        assert score(files / f"{gt}.json", files / f"{pred}.json") == expected


@pytest.mark.skipif(_C is None, reason="the extension is not built")
def test_python_and_the_index_read_alike(files):
    for name in ("gt_masks", "pred_masks", "pred_list"):
        predictions = name != "gt_masks"
        streamed = open_mask_file(files / f"{name}.json", predictions=predictions)
        whole = load_mask_file(files / f"{name}.json", predictions=predictions)
        assert isinstance(streamed, StreamedMasks)
        for key in ("image_ids", "categories", "used_categories", "lists_images"):
            assert getattr(streamed, key) == getattr(whole, key)
        for k in range(len(whole.image_ids)):
            assert streamed.size(k) == whole.size(k)
            one, two = streamed.read(k, None, {1}), whole.read(k, None, {1})
            assert (one[1] == two[1]).all() and (one[0].ids() == two[0].ids()).all()
            assert streamed.details(k) == whole.details(k)


def test_polygons(files):
    outline = [[3.2, 4.1, 40.0, 5.0, 33.3, 30.7, 6.0, 28.0], [50, 30, 60, 30, 60, 44]]
    mask = mask_of_polygons(outline, 45, 66, "x")

    def polygons(content):
        content["annotations"] = [
            {"image_id": 3, "category_id": 1, "segmentation": outline},
            {"image_id": 4, "category_id": 2, "segmentation": rle_of_mask(mask)},
        ]

    for name in ("gt_masks", "pred_masks"):
        _edit(files / f"{name}.json", polygons)
    (files / "list.json").write_text(json.dumps(json.loads((files / "gt_masks.json").read_text())["annotations"]))
    for pred in ("pred_masks.json", "list.json"):  # a list of polygons has the ground truth's size
        result = evaluate_files(files / "gt_masks.json", files / pred, replicates=0)
        assert result["All"] == {"pq": 1.0, "sq": 1.0, "rq": 1.0, "n": 2}
    _edit(files / "gt_masks.json", lambda c: [image.pop("height") and image.pop("width") for image in c["images"]])
    with pytest.raises(PanopticFormatError, match="nothing tells the size of image 1: give it `height`"):
        evaluate_files(files / "gt_masks.json", files / "list.json")


def test_overlaps_are_told(files, capsys):
    whole = rle_of_mask(np.ones((45, 66), bool))
    _edit(
        files / "pred_list.json",
        lambda c: c.extend({"image_id": 1, "category_id": 1, "segmentation": whole} for _ in "ab"),
    )
    assert _pq(files / "gt.json", files / "pred_list.json") == 0
    told = capsys.readouterr().out
    assert "prediction, pixels under another mask:" in told
    assert re.search(r"prediction, annotations without a pixel left: \d", told)


def test_folders_of_pngs(files, capsys):
    expected = score(files / "gt.json", files / "pred.json", class_agnostic=True)["class_agnostic"]
    found = score(files / "gt.json", files / "pred", class_agnostic=True)
    assert found["class_agnostic"] == expected
    no_crowds = score(files / "gt", files / "pred", class_agnostic=True)
    assert no_crowds["images"] == 8
    assert _pq(files / "gt", files / "pred.json") == 2
    assert f"has no categories; give {files / 'gt.json'}, or" in capsys.readouterr().err
    (files / "pred" / "000003.png").rename(files / "pred" / "other.png")
    assert _pq(files / "gt.json", files / "pred", "--class-agnostic") == 2
    assert "no prediction for 1 of 8 images" in capsys.readouterr().err
    (files / "empty").mkdir()
    assert _pq(files / "gt.json", files / "empty", "--class-agnostic") == 2
    assert "no PNG in this folder" in capsys.readouterr().err


def outcome(source, predictions):
    try:
        masks = source(predictions=predictions)
        if masks is None:
            return "none"
        read = [masks.read(k, (45, 66), {1}) for k in range(len(masks.image_ids))]
        return masks.image_ids, masks.categories, [(one.ids().tobytes(), table.tolist()) for one, table in read]
    except PanopticFormatError as error:
        return str(error)


@pytest.mark.skipif(_C is None, reason="the extension is not built")
def test_changed_files_are_read_alike(files):
    """Bytes changed at random: C++ reads what Python reads, or leaves it to Python."""
    rng = np.random.default_rng(0)
    path = files / "changed.json"
    pieces = [
        b"",
        b'"',
        b"\\",
        b"\\\\",
        b",",
        b"0",
        b"-",
        b"9e9",
        b"[",
        b"}",
        b"null",
        b"1.5",
        b"NaN",
        b"\xff",
        b"o",
        b" ",
    ]
    read = 0
    for name in ("gt_masks", "pred_list"):
        content = json.loads((files / f"{name}.json").read_text())
        listed = content if isinstance(content, list) else content["annotations"]
        listed[:] = listed[:6]
        listed[1]["segmentation"] = [[3.25, 4, 40.0, 5e0, -33.3, 30.7]]
        original = json.dumps(content).encode()
        for _ in range(400):
            changed = bytearray(original)
            for _ in range(rng.integers(1, 4)):
                place = int(rng.integers(len(changed)))
                changed[place : place + int(rng.integers(0, 3))] = pieces[rng.integers(len(pieces))]
            path.write_bytes(changed)
            predictions = name == "pred_list"
            found = [outcome(partial(opened, path), predictions) for opened in (open_mask_file, load_mask_file)]
            assert found[0] == found[1], bytes(changed)
            read += not isinstance(found[0], str)
    assert 20 < read < 780


def _first(content):
    return (content if isinstance(content, list) else content["annotations"])[0]


BAD = [
    (lambda c: _first(c)["segmentation"].update(counts="1"), r"annotations\[0\]: `counts` covers 1 of"),
    (lambda c: _first(c)["segmentation"].update(counts="\u00e9"), r"annotations\[0\]: `counts` has a character"),
    (lambda c: _first(c)["segmentation"].update(size=[2**31, 2**31]), r"annotations\[0\]: `size` must be"),
    (
        lambda c: _first(c)["segmentation"].update(size=[9, 9], counts=[81]),
        "the mask is 9x9, the image 66x45|beside one of 9x9|a mask of",
    ),
    (lambda c: _first(c)["segmentation"].pop("size"), "need `size` and `counts`"),
    (lambda c: _first(c).update(segmentation=[[0, 0, 1, 1]]), "polygon 0 has 4 values"),
    (lambda c: _first(c).update(segmentation=[[0, 0, 1, 1, 2, "3"]]), "must be a list of numbers"),
    (lambda c: _first(c).update(segmentation=[]), "there is no polygon"),
    (lambda c: _first(c).update(segmentation=None), r"annotations\[0\] has no `segmentation`"),
    (lambda c: _first(c).update(category_id=9), r"9(\]|; give)"),
    (lambda c: _first(c).update(category_id="1"), "unknown category_id '1'"),
    (lambda c: _first(c).update(iscrowd=3), "`iscrowd` must be 0 or 1, got 3"),
    (lambda c: _first(c).update(score=float("nan")), "NaN is no JSON value"),
    (lambda c: _first(c).update(score="high"), "`score` must be a number"),
    (lambda c: _first(c).update(image_id=[1]), "no usable `image_id`"),
    (lambda c: _first(c).pop("image_id"), "no usable `image_id`"),
]


@pytest.mark.parametrize("name", ["pred_masks", "pred_list"])
@pytest.mark.parametrize("place", range(len(BAD)))
@pytest.mark.parametrize("threads", [1, 2])
def test_malformed_annotations(files, capsys, name, place, threads):
    change, message = BAD[place]
    path = files / f"{name}.json"
    _edit(path, change)
    assert _pq(files / "gt.json", path, "--threads", threads) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert str(path) in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("images"), "`images` is missing"),
        (lambda c: c.pop("categories"), "`categories` is missing"),
        (lambda c: c["images"].pop(0), "belongs to image 1, which `images` does not list"),
        (lambda c: c["images"].append(c["images"][0]), r"images\[8\]: `id` 1 appears twice"),
        (lambda c: c["images"][0].update(height="45"), "`height` and `width` must be whole numbers"),
        (lambda c: c["images"][0].update(height=2**31, width=2**31), "`height` and `width` must be whole numbers"),
        (lambda c: c["images"][0].update(height=2**16, width=2**16), "is over"),
        (lambda c: c["images"][0].update(height=44), "the mask is 66x45, the image 66x44"),
        (lambda c: c["categories"][0].update(id="x"), "has no usable `id`"),
    ],
)
def test_malformed_ground_truth(files, capsys, change, message):
    _edit(files / "gt_masks.json", change)
    assert _pq(files / "gt_masks.json", files / "pred_list.json") == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert str(files / "gt_masks.json") in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"image_id": 1, "image_id": 2, "category_id": 1, "segmentation": []}]', "image_id is there twice"),
        ('[{"segmentation": ' + "[" * 100_000, "not a JSON file"),
        (
            '[{"image_id": 1, "category_id": 1, "segmentation": {"size": [2, 2], "counts": [1' + "0" * 5000 + "]}}]",
            "not a JSON file",
        ),
        ('[{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}]', "boxes are no masks"),
        ('[{"image_id": 1, "category_id": 1, "segmentation"', "not a JSON file"),
    ],
    ids=["twice", "deep", "digits", "boxes", "cut"],
)
def test_hostile_files(files, capsys, text, message):
    path = files / "bad.json"
    path.write_text(text)
    assert _pq(files / "gt.json", path) == 2
    error = capsys.readouterr().err
    assert message in error and str(path) in error


def test_ids_of_another_split_are_told(files, capsys):
    _edit(files / "pred_list.json", lambda c: [entry.update(image_id=str(entry["image_id"])) for entry in c])
    assert _pq(files / "gt.json", files / "pred_list.json") == 2
    assert "there it is the text '1', in the ground truth the number 1" in capsys.readouterr().err
    _edit(files / "pred_list.json", lambda c: c.__delitem__(slice(0, None)))
    assert _pq(files / "gt.json", files / "pred_list.json") == 2, "a list without results tells nothing"


def test_an_image_without_results_is_empty(files):
    """A list of results names images with a segment alone."""
    everything = evaluate_files(files / "gt.json", files / "pred_list.json", replicates=0)
    _edit(files / "pred_list.json", lambda c: c.__setitem__(slice(None), [e for e in c if e["image_id"] != 2]))
    fewer = evaluate_files(files / "gt.json", files / "pred_list.json", replicates=0)
    assert fewer["missing"] == [] and fewer["images"] == 8
    assert fewer["All"]["pq"] < everything["All"]["pq"]


def test_methods_are_compared(files, tmp_path, capsys):
    worse = json.loads((files / "pred_list.json").read_text())
    (files / "worse.json").write_text(json.dumps([entry for k, entry in enumerate(worse) if k % 3]))
    out, page = tmp_path / "report.json", tmp_path / "page.html"
    arguments = [files / "gt.json", files / "pred.json", "--against", files / "worse.json", "--json", out]
    assert _pq(*arguments, "--page", page, "--worst", 2) == 0
    told = capsys.readouterr().out
    assert "paired permutation test" in told and "images that changed most:" in told
    against = json.loads(out.read_text())["against"]
    assert against["difference"] == against["pq"][1] - against["pq"][0] > 0
    low, high = against["interval"]
    assert low <= against["difference"] <= high and 0 < against["p_value"] < 0.2
    html = page.read_text()
    assert "images that gained most" in html and html.count("<article") == 4 and "worse.json" in html
    assert _pq(*arguments[:3], files / "pred_masks.json", "--json", out) == 0
    same = json.loads(out.read_text())["against"]
    assert same["difference"] == 0 and same["p_value"] == 1.0 and same["interval"] == [0, 0]


def test_options_that_need_others(files, capsys):
    pair = files / "gt.json", files / "pred.json"
    for options, message in (
        (("--table", pair[0]), "--table needs --by"),
        (("--against-folder", files), "--against-folder needs --against"),
        (("--images", files), "--images needs --page"),
        (("--by", "height_of_sun"), "gives it to none of the 8 images"),
    ):
        assert _pq(*pair, *options) == 2
        assert message in capsys.readouterr().err


def test_the_page_shows_masks(files, tmp_path):
    page = tmp_path / "page.html"
    assert _pq(files / "gt_masks.json", files / "pred_list.json", "--page", page, "--worst", 1, "--random", 1) == 0
    assert "score 0.50" in page.read_text()


def test_an_empty_list_is_refused_by_name(files, capsys):
    (files / "none.json").write_text("[]")
    assert main(["pq", str(files / "gt_masks.json"), str(files / "none.json")]) == 2
    assert "none.json: the list has no annotations" in capsys.readouterr().err
