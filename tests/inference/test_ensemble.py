"""Ensembles: medoid and agreement by hand, and through the pipeline and the command."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ldmseg_fast import LDMSegPipeline
from ldmseg_fast.cli import main
from ldmseg_fast.config import PostprocessConfig
from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.inference.averaging import ViewLogits, average, match
from ldmseg_fast.inference.ensemble import combine, mirror
from ldmseg_fast.panoptic.postprocess import PanopticResult
from ldmseg_fast.panoptic.shapes import segment_shapes

ANYTHING_GOES = PostprocessConfig(mask_threshold=0.0, count_threshold=0, overlap_threshold=0.0)


def result(rows) -> PanopticResult:
    segmentation = np.array(rows, np.int32)
    info = [{**shape, "category_id": 1, "score": 0.5} for shape in segment_shapes(segmentation)]
    return PanopticResult(segmentation, info)


def test_by_hand():
    samples = [
        result([[1, 1, 2, 2, 0]]),
        result([[5, 5, 5, 9, 0]]),  # 5 has IoU 2/3 with 1, 9 has 1/2 with 2: no match
        result([[7, 7, 3, 3, 0]]),  # as the first, under other ids
    ]
    combined = combine(samples)
    assert combined.reference == 0
    assert (combined.segmentation == samples[0].segmentation).all()
    np.testing.assert_allclose(combined.agreement, [[1, 1, 2 / 3, 2 / 3, 1]])
    assert [segment["agreement"] for segment in combined.segments_info] == pytest.approx([(2 / 3 + 1) / 2, 0.5])


def test_one_sample_agrees_with_itself():
    combined = combine([result([[0, 3], [3, 3]])])
    assert (combined.agreement == 1).all() and combined.segments_info[0]["agreement"] == 1.0


def test_void_maps():
    combined = combine([result([[0, 0]]), result([[0, 0]]), result([[0, 4]])])
    assert combined.reference == 0 and combined.segments_info == []
    np.testing.assert_allclose(combined.agreement, [[1, 2 / 3]])


def plain_matches(one: np.ndarray, other: np.ndarray) -> dict[tuple[int, int], float]:
    """IoU of each pair of segments that overlap by more than half of their union."""
    pairs = {}
    for a in set(one.ravel().tolist()) - {0}:
        for b in set(other.ravel().tolist()) - {0}:
            iou = ((one == a) & (other == b)).sum() / ((one == a) | (other == b)).sum()
            if iou > 0.5:
                pairs[a, b] = iou
    return pairs


def test_against_plain_loops():
    rng = np.random.default_rng(0)
    base = np.kron(rng.integers(0, 6, (6, 6)), np.ones((8, 8), int))
    maps = []
    for _ in range(5):
        shifted = np.roll(base, rng.integers(-2, 3, 2), (0, 1))
        maps.append(rng.permutation(np.arange(1, 10))[shifted] * (shifted > 0))
    samples = [result(each) for each in maps]
    combined = combine(samples)
    agreement, means = np.ones((48, 48)), []
    for one in range(5):
        total = 0.0
        for other in set(range(5)) - {one}:
            matches = plain_matches(maps[one], maps[other])
            segments = len(samples[one].segments_info) + len(samples[other].segments_info)
            total += 2 * sum(matches.values()) / segments  # PQ
            if one == combined.reference:
                pairs = matches.keys() | {(0, 0)}
                agreement += [[pair in pairs for pair in zip(*rows)] for rows in zip(maps[one], maps[other])]
        means.append(total)
    assert combined.reference == int(np.argmax(means))
    np.testing.assert_allclose(combined.agreement, agreement / 5, rtol=1e-6)


def test_what_is_no_ensemble():
    with pytest.raises(ValueError, match="samples of one image"):
        combine([])
    with pytest.raises(ValueError, match=r"\[1, 2\], \[1, 3\]"):
        combine([result([[1, 1]]), result([[1, 1, 1]])])


@pytest.fixture(scope="module")
def pipe(model_dir):
    return LDMSegPipeline.from_pretrained(model_dir)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_through_the_pipeline(pipe):
    images = [picture(64, 64), picture(40, 70, 1), picture(20, 20, 2)]
    settings = {"num_inference_steps": 2, "thresholds": ANYTHING_GOES, "image_ids": list("abc")}
    results = pipe.ensemble(images, 3, seed=5, batch_size=2, **settings)
    for row, (image, combined) in enumerate(zip(images, results)):
        assert combined.agreement.shape == image.shape[:2] and combined.agreement.dtype == np.float32
        assert combined.agreement.min() > 0.33 and combined.agreement.max() <= 1
        alone = pipe(
            image, 2, seed=5 + combined.reference, thresholds=ANYTHING_GOES, image_ids=[settings["image_ids"][row]]
        )[0]
        assert (alone.segmentation == combined.segmentation).mean() > 0.99  # a batch may round otherwise
        assert all(0 <= segment["agreement"] <= 1 for segment in combined.segments_info)
    same = pipe.ensemble(images[0], 1, **{**settings, "image_ids": ["a"]})[0]
    assert (same.agreement == 1).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, "num_samples=0"),
        ({"output_type": "logits"}, "output_type"),
        ({"image_ids": [1, 2]}, "2 ids for 1"),
        ({"solver": "magic"}, "solver='magic'"),
    ],
)
def test_wrong_arguments_are_named(pipe, settings, message):
    with pytest.raises(ValueError, match=message):
        pipe.ensemble(picture(8, 8), **settings)


def test_the_command_writes_agreement(model_dir, tmp_path, capsys):
    Image.fromarray(picture(30, 50)).save(tmp_path / "street.png")
    command = ["predict", str(model_dir), str(tmp_path / "street.png"), "--out", str(tmp_path / "out"), "--steps", "2"]
    assert main([*command, "--samples", "3", "--eta", "0.5"]) == 0
    agreement = np.array(Image.open(tmp_path / "out" / "street_agreement.png"))
    assert agreement.shape == (30, 50) and agreement.dtype == np.uint8
    assert set(np.unique(agreement)) <= {85, 170, 255}
    record = json.loads((tmp_path / "out" / "street.json").read_text())
    assert record["agreement_file_name"] == "street_agreement.png"
    assert all("agreement" in segment for segment in record["segments_info"])
    assert main([*command, "--samples", "0"]) == 2
    assert "num_samples=0" in capsys.readouterr().err


def test_votes_by_hand():
    samples = [
        result([[1, 1, 1, 2, 2, 2, 0, 0]]),
        result([[5, 5, 6, 6, 6, 6, 0, 0]]),
        result([[7, 7, 8, 8, 8, 0, 0, 0]]),
    ]
    assert combine(samples).reference == 1
    combined = combine(samples, "vote")
    assert combined.segmentation.tolist() == [[5, 5, 6, 6, 6, 6, 0, 0]]
    np.testing.assert_allclose(combined.agreement, [[1, 1, 2 / 3, 1, 1, 2 / 3, 1, 1]])
    others = [result([[1, 1, 1, 1, 1, 2]]), result([[3, 3, 3, 3, 4, 4]]), result([[5, 5, 5, 5, 6, 6]])]
    voted = combine([others[0], *others[1:]], "vote")
    assert voted.segmentation.tolist() == [[3, 3, 3, 3, 4, 4]]
    assert [s["area"] for s in voted.segments_info] == [4, 2]


def test_votes_move_an_edge():
    samples = [result([[1] * (8 - k) + [2] * (2 + k)]) for k in (0, 2, 2)]
    reference = combine([samples[0]] * 2 + samples[1:], "vote")  # a tie: the medoid's own
    assert reference.segmentation.tolist() == samples[0].segmentation.tolist()
    moved = combine([samples[0], *samples[1:]], "vote")
    assert moved.segmentation.tolist() == samples[1].segmentation.tolist()
    assert moved.segments_info[1]["bbox"] == [6, 0, 4, 1]


def test_mirrored_results():
    back = mirror(result([[1, 1, 2, 0], [1, 2, 2, 0]]))
    assert back.segmentation.tolist() == [[0, 2, 1, 1], [0, 2, 2, 1]]
    for segment, shape in zip(back.segments_info, segment_shapes(back.segmentation)):
        assert segment["bbox"] == shape["bbox"] and segment["area"] == shape["area"]


@pytest.mark.parametrize("fusion", ["medoid", "vote", "mean"])
def test_views_of_a_picture(model_dir, fusion):
    pipe = LDMSegPipeline.from_pretrained(model_dir)
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    settings = {"num_inference_steps": 1, "thresholds": ANYTHING_GOES}
    (plain,) = pipe(picture, **settings)
    (alone,) = pipe.ensemble(picture, 1, fusion=fusion, **settings)
    assert (alone.segmentation == plain.segmentation).all()
    (both,) = pipe.ensemble(picture, 2, flip=True, scales=(1.0, 1.5), fusion=fusion, **settings)
    assert both.segmentation.shape == (40, 60) and pipe.info.image_size == 64
    shapes = {shape["id"]: shape for shape in segment_shapes(both.segmentation)}
    for segment in both.segments_info:
        assert segment["area"] == shapes[segment["id"]]["area"] and segment["bbox"] == shapes[segment["id"]]["bbox"]
    assert (both.agreement >= 0).all() and (both.agreement <= 1).all()
    assert fusion == "mean" or both.agreement.min() > 0  # a mean may be what no view alone says


def logits_of(labels, confidence: float, slots: int = 4) -> torch.Tensor:
    """Slot logits [1, Q, 1, w] whose likeliest slot has the given probability."""
    shares = torch.full((slots, len(labels)), (1 - confidence) / (slots - 1))
    shares[torch.tensor(labels), torch.arange(len(labels))] = confidence
    return shares.log()[None, :, None]


def test_a_mean_by_hand():
    sure, unsure = logits_of([1, 1, 2, 2, 0], 0.9), logits_of([3, 1, 1, 1, 0], 0.6)  # its 1 is the other's 2
    slots, categories, agreement = average([ViewLogits(sure, None), ViewLogits(unsure, None)])
    assert categories is None
    torch.testing.assert_close(slots.exp().sum(1), torch.ones(1, 1, 5))
    assert slots.argmax(1).tolist() == [[[1, 1, 2, 2, 0]]]
    assert agreement.tolist() == [[[1.0, 0.5, 1.0, 1.0, 1.0]]]
    other = 0.4 / 3
    torch.testing.assert_close(slots.exp()[0, 2, 0, 1], torch.tensor((0.1 / 3 + 0.6) / 2))
    torch.testing.assert_close(slots.exp()[0, 1, 0, 1], torch.tensor((0.9 + other) / 2))


def test_a_mean_keeps_the_level_of_its_views():
    """The overlap threshold asks how high logits stand, which softmax does not tell."""
    torch.manual_seed(0)
    views = [ViewLogits(20 * torch.randn(2, 5, 4, 4) + shift, None) for shift in (1.0, -2.0)]
    torch.testing.assert_close(average(views[:1])[0], views[0].slots)
    level = average(views)[0].logsumexp(1)
    torch.testing.assert_close(level, torch.stack([view.slots.logsumexp(1) for view in views]).mean(0))


def test_a_mean_of_one_view_is_the_view(model_dir):
    pipe = LDMSegPipeline.from_pretrained(model_dir)
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    thresholds = PostprocessConfig(mask_threshold=0.05, count_threshold=4, overlap_threshold=0.02)
    (plain,) = pipe(picture, 1, thresholds=thresholds)
    (mean,) = pipe.ensemble(picture, 1, num_inference_steps=1, thresholds=thresholds, fusion="mean")
    assert 1 < len(plain.segments_info) < 16  # the overlap decides
    np.testing.assert_array_equal(mean.segmentation, plain.segmentation)


def test_slots_of_views_are_matched():
    torch.manual_seed(0)
    first = (3 * torch.randn(8, 6, 7)).softmax(0)
    order = torch.cat([torch.zeros(1, dtype=torch.int64), torch.randperm(7) + 1])
    other = torch.empty_like(first)
    other[order] = first
    assert match(first, other).tolist() == order.tolist()


def test_a_mean_of_mirrored_views_is_mirrored(model_dir):
    pipe = LDMSegPipeline.from_pretrained(model_dir)
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    settings = {"num_inference_steps": 1, "thresholds": ANYTHING_GOES, "fusion": "mean", "flip": True}
    one, other = (pipe.ensemble(each, 1, **settings)[0] for each in (picture, picture[:, ::-1].copy()))
    assert (one.segmentation > 0).mean() > 0.5
    assert abs(one.agreement - other.agreement[:, ::-1]).max() < 0.26  # slots have other names, edges may tip
    for segment in one.segments_info:
        inside = one.agreement[one.segmentation == segment["id"]]
        assert segment["agreement"] == pytest.approx(inside.mean(), abs=1e-5)


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ({"scales": ()}, r"scales=\(\)"),
        ({"scales": (9.0,)}, r"scales=\(9\.0,\)"),
        ({"fusion": "sum"}, r"fusion='sum'"),
        ({"flip": 1}, "flip=1"),
    ],
)
def test_views_that_cannot_be(model_dir, views, message):
    with pytest.raises(ArgumentError, match=message):
        LDMSegPipeline.from_pretrained(model_dir).ensemble(np.zeros((8, 8, 3), np.uint8), 1, **views)


def test_the_commands_take_views(model_dir, scenes, tmp_path, capsys):
    picture = tmp_path / "a.png"
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(picture)
    views = ["--flip", "--scales", "1", "1.25", "--fusion", "vote", "--steps", "1"]
    assert main(["predict", str(model_dir), str(picture), "--out", str(tmp_path / "out"), *views]) == 0
    assert (tmp_path / "out" / "a_agreement.png").is_file()
    report = tmp_path / "report.json"
    command = ["evaluate", str(model_dir), "--data", str(scenes), "--limit", "2", "--samples", "2", *views]
    assert main([*command, "--json", str(report)]) == 0
    ensemble = json.loads(report.read_text())["ensemble"]
    assert ensemble == {"num_samples": 2, "flip": True, "scales": [1.0, 1.25], "fusion": "vote", "edges": 0}
    assert main([*command, "--inpainting"]) == 2
    assert "--inpainting completes one map per picture" in capsys.readouterr().err
