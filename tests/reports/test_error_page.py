"""The page of errors: what it shows, what it says, that it needs no network and stays light."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from ldmseg_fast.cli import main
from ldmseg_fast.evaluation import EvaluationOptions, evaluate
from ldmseg_fast.metrics.pq import PanopticQuality
from ldmseg_fast.reports.draw import ERROR_COLORS
from ldmseg_fast.reports.error_entry import PageEntry, image_quality, nearest
from ldmseg_fast.reports.error_page import render_entry, write_error_page


def entry(shape=(40, 60), **changes):
    """Left half found but for a column, upper right missed and falsely predicted, lower right void."""
    height, width = shape
    gt_ids = np.zeros(shape, np.int32)
    gt_ids[:, : width // 2] = 70000
    gt_ids[: height // 2, width // 2 :] = 8
    pred_ids = np.where(gt_ids == 70000, 3, 0).astype(np.int32)
    pred_ids[:, width // 2 - 1] = 0
    pred_ids[:4, width // 2 :] = 5
    gt_segments = [{"id": 70000, "category_id": 1}, {"id": 8, "category_id": 2}]
    pred_segments = [{"id": 3, "category_id": 1, "score": 0.75}, {"id": 5, "category_id": 2}]
    matches = PanopticQuality([{"id": 1, "isthing": 1}, {"id": 2, "isthing": 1}]).add(
        gt_ids, gt_segments, pred_ids, pred_segments, image_id=0
    )
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    values = {
        "name": "a <b>.jpg", "image": image, "gt_ids": gt_ids, "gt_segments": gt_segments, "pred_ids": pred_ids,
        "pred_segments": pred_segments, "matches": matches, "categories": {1: "person", 2: "</script> & co"},
    }  # fmt: skip
    return PageEntry(**(values | changes))


def pictures(text):
    found = re.findall(r'src="data:image/(png|jpeg);base64,([^"]+)"', text)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")) for _, data in found]


def test_an_image_in_four_pictures():
    text = render_entry(entry())
    image, truth, prediction, errors = pictures(text)
    assert image.shape == truth.shape == prediction.shape == errors.shape == (240, 360, 3)
    assert np.abs(truth[120, 60].astype(int) - prediction[120, 60]).max() < 12, "a match has one colour"

    def looks(name, y, x):
        return np.abs(errors[y : y + 4, x : x + 2].astype(int) - np.array(ERROR_COLORS[name])).mean() < 70

    assert looks("boundary", 150, 176) and looks("missed", 80, 250)
    assert np.ptp(errors[200, 20].astype(int)) < 25, "what is right is grey"
    assert "PQ 48.3" in text and "1 of 2 segments found, 1 missed, 1 false" in text


def test_what_is_told_about_segments():
    text = render_entry(entry())
    data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', text, re.S).group(1))
    assert data["truth"] == [
        "void",
        "person, 1200 px, found, IoU 0.97",
        "</script> & co, 600 px, missed, best IoU 0.20",
    ]
    assert data["prediction"][1:] == [
        "person, 1160 px, right, IoU 0.97, score 0.75", "</script> & co, 120 px, false, best IoU 0.20"
    ]  # fmt: skip
    assert "a &lt;b&gt;.jpg" in text and "&lt;/script&gt; &amp; co" in text and "<b>" not in text
    width, height = data["size"]
    values, lengths = data["runs"][::2], data["runs"][1::2]
    grid = np.repeat(values, lengths).reshape(height, width)
    pairs = np.array(data["pairs"])[grid]
    gt_ids = np.select([pairs[..., 0] == 1, pairs[..., 0] == 2], [70000, 8])
    np.testing.assert_array_equal(gt_ids, entry().gt_ids)
    pred_ids = np.select([pairs[..., 1] == 1, pairs[..., 1] == 2], [3, 5])
    np.testing.assert_array_equal(pred_ids, entry().pred_ids)


def test_class_agnostic_segments_and_crowds():
    one = entry(categories={})
    crowd = [{"id": 70000, "category_id": 1}, {"id": 8, "category_id": 2, "iscrowd": 1}]
    matches = PanopticQuality([], class_agnostic=True).add(
        one.gt_ids, crowd, one.pred_ids, one.pred_segments, image_id=0
    )
    text = render_entry(entry(categories={}, gt_segments=crowd, matches=matches))
    assert "segment 8, 600 px, crowd, not counted" in text
    assert "segment 5, 120 px, on void or a crowd, not counted" in text
    assert "1 of 1 segments found, 0 missed, 0 false" in text


def test_odd_images():
    for shape in ((1, 1), (3, 700), (500, 7)):
        zeros = np.zeros(shape, np.int32)
        nothing = PanopticQuality([], class_agnostic=True).add(zeros, [], zeros, [], image_id=0)
        assert np.isnan(image_quality(nothing))
        text = render_entry(PageEntry("empty", None, zeros, [], zeros, [], nothing))
        assert len(pictures(text)) == 4 and "PQ" not in text
    assert nearest(np.arange(12).reshape(3, 4), 3, 2).tolist() == [[1, 3], [5, 7], [9, 11]]
    with pytest.raises(ValueError, match=r"a <b>\.jpg: .* one size, not 3x2, 60x40"):
        render_entry(entry(image=np.zeros((2, 3, 3), np.uint8)))


def test_the_page_needs_nothing_else(tmp_path):
    path = tmp_path / "deep" / "page.html"
    write_error_page(path, {"The worst": [entry(), render_entry(entry())]}, "A & B", "a note")
    text = path.read_text()
    assert text.count("<article>") == 2 and "A &amp; B" in text and "<h2>The worst</h2>" in text
    assert not re.search(r'https?://|src="(?!data:)|<link|@import|url\(', text)
    assert all(meaning in text for meaning in ("missed:", "false:", "boundary:", "void"))


def test_it_stays_light(shared):
    """An image of 640x480 with many edges, under 200 kB."""
    root = shared / "data" / "coco_mini"
    sizes = []
    for picture in sorted((root / "val2017").iterdir())[2:4]:
        image = np.asarray(Image.open(picture).convert("RGB"))
        rows, columns = np.indices(image.shape[:2])
        ids = (rows // 40 * 20 + columns // 40 + 1).astype(np.int32)
        segments = [{"id": int(i), "category_id": 1} for i in np.unique(ids)]
        matches = PanopticQuality([], class_agnostic=True).add(ids, segments, ids, segments, image_id=0)
        sizes.append(len(render_entry(PageEntry(picture.name, image, ids, segments, ids, segments, matches))))
    assert max(sizes) < 200_000


def test_the_page_of_an_evaluation(model_dir, scenes, tmp_path):
    path = tmp_path / "page.html"
    options = EvaluationOptions(steps=1, page=str(path), worst=3, random=2, count_threshold=0, class_aware="GT")
    evaluate(model_dir, scenes, options)
    text = path.read_text()
    assert "The 3 worst images" in text and "2 random images" in text and text.count("<article>") == 5
    shown = [float(value) for value in re.findall(r"PQ ([\d.]+) ·", text)]
    assert shown[:3] == sorted(shown[:3]) and max(shown[:3]) <= min(shown[3:])


def test_the_page_of_result_files(scenes, tmp_path, capsys):
    truth = str(scenes / "annotations" / "panoptic_val2017.json")
    path = tmp_path / "page.html"
    arguments = ["pq", truth, truth, "--page", str(path), "--worst", "1", "--random", "2"]
    assert main(arguments) == 0
    assert f"page: {path}" in capsys.readouterr().out
    text = path.read_text()
    assert text.count("<article>") == 3 and "PQ 100.0 · " in text
    first = pictures(text)[0]
    assert first.std() > 10, "the split's own pictures are found"
    assert main([*arguments, "--images", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err
    assert main([*arguments, "--worst", "0", "--random", "0"]) == 2
