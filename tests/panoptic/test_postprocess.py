"""Post-processing and result files."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from ldmseg_fast.config import PostprocessConfig
from ldmseg_fast.errors import DataError, PanopticFormatError
from ldmseg_fast.panoptic import shapes as segments
from ldmseg_fast.panoptic.format import load_panoptic_json, read_panoptic_png
from ldmseg_fast.panoptic.postprocess import PanopticResult, connected, postprocess
from ldmseg_fast.panoptic.results import ResultsWriter, instances_of, write_json_list
from ldmseg_fast.panoptic.shapes import segment_shapes, split_segments

THRESHOLDS = PostprocessConfig(mask_threshold=0.5, count_threshold=8, overlap_threshold=0.5)


def _logits(batch=2, slots=8, size=16, seed=0):
    """Smooth logits whose best slot is sure of itself over most of the image."""
    coarse = torch.randn(batch, slots, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(10 * coarse - 10, (size, size), mode="bicubic")


@pytest.mark.parametrize("case", ["post", "post_rules"])
def test_golden(shared, case):
    with safe_open(shared / "golden" / "reference.safetensors", "pt") as file:
        told = file.metadata()
        thresholds = PostprocessConfig(float(told["mask_th"]), int(told["count_th"]), float(told["overlap_th"]))
        logits = file.get_tensor(f"{case}_logits_half")[None]
        expected = file.get_tensor(f"{case}_segmentation").numpy()
        ids = file.get_tensor(f"{case}_segment_ids").tolist()
    (result,) = postprocess(logits, (128, 128), [(427, 640)], thresholds)
    assert (result.segmentation != expected).sum() <= 10
    assert [segment["id"] for segment in result.segments_info] == ids


def test_segments_info_describes_the_map():
    for result in postprocess(_logits(), (32, 32), [(40, 50), (40, 50)], THRESHOLDS):
        assert result.segmentation.dtype == np.int32
        assert result.segments_info
        shapes = segment_shapes(result.segmentation)
        assert [{key: segment[key] for key in ("id", "area", "bbox")} for segment in result.segments_info] == shapes
        for segment in result.segments_info:
            assert {"category_id", "isthing", "iscrowd", "label_id", "was_fused"} <= segment.keys()
            assert 0.5 <= segment["score"] <= 1
        json.dumps(result.segments_info)


def test_mixed_sizes_equal_one_by_one():
    logits, sizes = _logits(4), [(40, 50), (33, 20), (40, 50), (1, 1)]
    together = postprocess(logits, (32, 32), sizes, THRESHOLDS)
    for index, size in enumerate(sizes):
        (alone,) = postprocess(logits[index : index + 1], (32, 32), [size], THRESHOLDS)
        assert together[index].segmentation.shape == size
        np.testing.assert_array_equal(together[index].segmentation, alone.segmentation)
        for one, other in zip(together[index].segments_info, alone.segments_info, strict=True):
            assert one == {**other, "score": pytest.approx(other["score"], rel=1e-6)}


def test_wrong_arguments():
    with pytest.raises(ValueError, match="2 sizes"):
        postprocess(_logits(3), (32, 32), [(4, 4)] * 2, THRESHOLDS)
    with pytest.raises(ValueError, match=r"\[B, Q, h, w\]"):
        postprocess(_logits()[0], (32, 32), [(4, 4)], THRESHOLDS)


def test_connected_pieces_are_segments_of_their_own():
    ids = np.array([[7, 7, 0, 7], [0, 0, 0, 7], [3, 7, 7, 7]], np.int32)
    entries = [{"id": i, "category_id": 4, "area": 0, "bbox": [], "score": 0.5, "was_fused": i == 7} for i in (3, 7)]
    result = connected(PanopticResult(ids, entries), 2)
    np.testing.assert_array_equal(result.segmentation, [[1, 1, 0, 2], [0, 0, 0, 2], [0, 2, 2, 2]])
    known = {"category_id": 4, "score": 0.5, "was_fused": False}
    assert result.segments_info == [
        {"id": 1, "area": 2, "bbox": [0, 0, 2, 1], **known},
        {"id": 2, "area": 5, "bbox": [1, 0, 3, 3], **known},
    ]


def test_pieces_of_a_segment_that_nobody_lists_are_named():
    with pytest.raises(PanopticFormatError, match="ids in the map but not in segments_info: 3, 7"):
        connected(PanopticResult(np.array([[7, 3]], np.int32), []))


def test_diagonal_neighbours_are_not_connected():
    pieces, sources = split_segments(np.eye(3, dtype=np.int32) * 5)
    np.testing.assert_array_equal(pieces, np.diag([1, 2, 3]))
    np.testing.assert_array_equal(sources, [5, 5, 5])


@pytest.mark.parametrize("ids", [np.zeros((4, 5), np.int32), np.ones((2, 2), np.int32)])
def test_where_no_piece_is_large_enough_all_is_void(ids):
    pieces, sources = split_segments(ids, 5)
    assert not pieces.any() and not sources.size


def _random_map(rng):
    height, width = rng.integers(1, 30), rng.integers(1, 90)
    ids = np.kron(rng.integers(0, 5, (height // 3 + 1, width // 3 + 1)), np.ones((3, 3), int))[:height, :width]
    ids[rng.random(ids.shape) < 0.1] = 0
    ids[rng.random(ids.shape) < 0.05] = 3
    return ids.astype(np.int32)


def test_native_segments_equal_their_numpy_twins(monkeypatch):
    rng = np.random.default_rng(0)
    maps = [_random_map(rng) for _ in range(60)]
    least = [int(rng.integers(0, 9)) for _ in maps]
    native = [(segment_shapes(ids, rle=True), split_segments(ids, limit)) for ids, limit in zip(maps, least)]
    monkeypatch.setattr(segments, "_C", None)
    for ids, limit, (shapes, split) in zip(maps, least, native):
        assert segment_shapes(ids, rle=True) == shapes
        for one, other in zip(split_segments(ids, limit), split, strict=True):
            np.testing.assert_array_equal(one, other)
            assert one.dtype == other.dtype == np.int32


def test_run_lengths_are_pycocotools():
    mask = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(1)
    for ids in [_random_map(rng) for _ in range(30)] + [np.ones((3, 400), np.int32), np.full((700, 1), 9, np.int32)]:
        for shape in segment_shapes(ids, rle=True):
            expected = mask.encode(np.asfortranarray(ids == shape["id"]).view(np.uint8))
            assert shape["segmentation"] == {"size": list(ids.shape), "counts": expected["counts"].decode()}
            assert mask.area(shape["segmentation"]) == shape["area"]
            assert mask.toBbox(shape["segmentation"]).tolist() == shape["bbox"]


def test_a_map_that_goes_while_others_are_written_is_told(tmp_path):
    result = postprocess(_logits(1), (32, 32), [(40, 50)], THRESHOLDS)[0]
    with ResultsWriter(tmp_path, "val") as writer:
        for image_id in (1, 2):
            writer.add(image_id, result)
        writer.png_path(1).unlink()
        with pytest.raises(DataError, match=r"val: 1 maps have been removed while others were written \(image 1\)"):
            writer.finish()
    with ResultsWriter(tmp_path, "val") as writer:
        assert writer.written == {2} and not (tmp_path / "val.json").exists()
        writer.add(1, result)
        assert len(json.loads(writer.finish().read_text())["images"]) == 2


def test_results_files_are_read_back(tmp_path):
    results = postprocess(_logits(3), (32, 32), [(40, 50)] * 3, THRESHOLDS)
    with ResultsWriter(tmp_path, "panoptic_val") as writer:
        for image_id in (3, 1, 2):
            writer.add(image_id, results[image_id - 1], image_name=f"{image_id}.jpg")
        path = writer.finish()
    content = load_panoptic_json(path)
    assert [annotation["image_id"] for annotation in content["annotations"]] == [1, 2, 3]
    assert content["images"][0] == {"id": 1, "file_name": "1.jpg", "height": 40, "width": 50}
    for annotation, result in zip(content["annotations"], results):
        ids = read_panoptic_png(tmp_path / "panoptic_val" / annotation["file_name"])
        np.testing.assert_array_equal(ids, result.segmentation)
        assert [segment["score"] for segment in annotation["segments_info"]] == [
            segment["score"] for segment in result.segments_info
        ]


def test_an_interrupted_run_knows_what_is_written(tmp_path):
    result = postprocess(_logits(1), (32, 32), [(40, 50)], THRESHOLDS)[0]
    settings = {"steps": 10, "thresholds": (0.5, 8)}
    for rank in (0, 1):
        with ResultsWriter(tmp_path, "val", settings=settings, rank=rank) as writer:
            writer.add(10 + rank, result, f"{rank}.png")
    journal = tmp_path / ".val.1.jsonl"
    journal.write_text(journal.read_text() + '{"image": {"id": 12, "fi')
    with ResultsWriter(tmp_path, "val", settings=settings, rank=1) as writer:
        assert writer.written == {10, 11}
        with pytest.raises(ValueError, match="image 10 has this name already"):
            writer.add(12, result, "0.png")
        writer.add(12, result, "2.png")
        content = json.loads(writer.finish().read_text())
    assert [annotation["image_id"] for annotation in content["annotations"]] == [10, 11, 12]
    (tmp_path / "val" / "0.png").unlink()
    with ResultsWriter(tmp_path, "val", settings=settings) as writer:
        assert writer.written == {11, 12}
    with pytest.raises(ValueError, match="results of other settings"):
        ResultsWriter(tmp_path, "val", settings={"steps": 4})


@pytest.mark.parametrize(
    "line",
    [
        *(b"\0\0\0", b"5", b"null", b"[]", b"{}", b"\xff", b"", b"[" * 10_000, b'{"settings": 5}', b'{"image": 1}'),
        *(b'{"image": {"id": []}, "annotation": {}}', b'{"image": {"id": 1}, "annotation": {"file_name": 5}}'),
    ],
)
def test_a_damaged_journal_is_named(tmp_path, line):
    result = postprocess(_logits(1), (32, 32), [(40, 50)], THRESHOLDS)[0]
    with ResultsWriter(tmp_path, "val") as writer:
        writer.add(1, result)
    journal = tmp_path / ".val.0.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole + line + b"\n" + whole)
    with pytest.raises(PanopticFormatError, match=r"\.val\.0\.jsonl, line 3: damaged; delete this journal"):
        ResultsWriter(tmp_path, "val")
    journal.write_bytes(whole + line)
    with ResultsWriter(tmp_path, "val") as writer:  # half a line is none
        assert writer.written == {1}


def test_instances_json_is_read_by_pycocotools(tmp_path):
    coco = pytest.importorskip("pycocotools.coco")
    results = postprocess(_logits(2), (32, 32), [(40, 50)] * 2, THRESHOLDS)
    instances = (instance for image_id, result in enumerate(results, 1) for instance in instances_of(image_id, result))
    write_json_list(tmp_path / "instances.json", instances)
    truth = coco.COCO()
    truth.dataset = {
        "images": [{"id": i, "height": 40, "width": 50} for i in (1, 2)],
        "categories": [{"id": 1, "name": "object"}],
        "annotations": [],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        loaded = truth.loadRes(str(tmp_path / "instances.json"))
    for entry, segment in zip(loaded.imgToAnns[2], results[1].segments_info):
        assert entry["score"] == segment["score"]
        assert entry["area"] == segment["area"]
        np.testing.assert_array_equal(loaded.annToMask(entry), results[1].segmentation == segment["id"])
    write_json_list(tmp_path / "none.json", [])
    assert json.loads((tmp_path / "none.json").read_text()) == []


def test_instances_of_a_map_that_its_list_does_not_describe():
    with pytest.raises(PanopticFormatError, match="image 5: ids in the map but not in segments_info"):
        instances_of(5, PanopticResult(np.ones((2, 2), np.int32), []))
