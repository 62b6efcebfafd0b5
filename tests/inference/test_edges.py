"""The guided filter over slots: against its definition in float64, and where the picture has an edge."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ldmseg_fast import LDMSegPipeline
from ldmseg_fast.cli import main
from ldmseg_fast.config import PostprocessConfig
from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.inference import sampling
from ldmseg_fast.inference.edges import EPSILON, FINER, SEEN, follow_edges, guided
from ldmseg_fast.inference.inpainting import with_given
from ldmseg_fast.panoptic.format import read_panoptic_png, write_panoptic_png


def windows(height, width, radius):
    for y in range(height):
        for x in range(width):
            near = np.s_[max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1]
            yield (y, x), near


def plain(values, colours, radius):
    """He, Sun and Tang 2013, equations 14 to 16, pixel by pixel; values [h, w], colours [3, h, w]."""
    height, width = values.shape
    slopes, offsets, found = np.zeros((3, height, width)), np.zeros((height, width)), np.zeros((height, width))
    for place, near in windows(height, width, radius):
        colour, value = colours[:, *near].reshape(3, -1), values[near].ravel()
        covariance = np.cov(colour, bias=True) + EPSILON * np.eye(3)
        joint = (colour * value).mean(1) - colour.mean(1) * value.mean()
        slope = np.linalg.solve(covariance, joint)
        slopes[:, *place], offsets[place] = slope, value.mean() - slope @ colour.mean(1)
    for place, near in windows(height, width, radius):
        slope, offset = slopes[:, *near].reshape(3, -1).mean(1), offsets[near].mean()
        found[place] = slope @ colours[:, *place] + offset
    return found


@pytest.mark.parametrize("radius", [1, 2])
def test_by_definition(radius):
    random = np.random.default_rng(0)
    values, colours = random.random((2, 6, 7)), random.random((3, 6, 7))
    found = guided(*(torch.from_numpy(each).float() for each in (values, colours, colours)), radius)
    expected = np.stack([plain(each, colours, radius) for each in values])
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-4)


def test_grey_windows_of_high_contrast():
    """Their covariance has rank 1, up to EPSILON."""
    random = np.random.default_rng(0)
    grey = random.integers(0, 2, (1, 8, 9)) * np.array([1.0, 0.98, 0.95])[:, None, None]
    values = random.random((1, 8, 9))
    found = guided(*(torch.from_numpy(each).float() for each in (values, grey, grey)), 2)
    np.testing.assert_allclose(found[0].numpy(), plain(values[0], grey, 2), atol=2e-3)


def slots_of(cells, sure=4.0):
    """Logits [1, 4, h, w] for a map of slots, int64 [h, w]."""
    return sure * F.one_hot(torch.as_tensor(cells), 4).permute(2, 0, 1)[None].float()


def test_an_edge_moves_to_that_of_the_picture():
    columns = torch.arange(64).expand(64, 64)
    picture = torch.where(columns < 30, 40, 200).to(torch.uint8).expand(1, 3, 64, 64)
    # the edge at 8 of 16, the picture's at 7.5
    slots = slots_of(torch.where(torch.arange(16) < 8, 1, 2).expand(16, 16))
    blurred = F.avg_pool2d(slots, 3, stride=1, padding=1, count_include_pad=False)
    before = F.interpolate(blurred, (32, 32), mode="bilinear").argmax(1)
    after = follow_edges(blurred, picture, 1).argmax(1)
    assert after.shape == (1, 32, 32)
    truth = torch.where(torch.arange(32) < 15, 1, 2).expand(1, 32, 32)
    assert (before != truth).any() and (after == truth).all()


def test_a_flat_picture_moves_nothing():
    slots = slots_of(torch.where(torch.arange(12) < 6, 1, 2).expand(12, 12))
    kept = follow_edges(slots, torch.full((1, 3, 48, 48), 99, dtype=torch.uint8), 2)
    finer = F.interpolate(slots, (12 * FINER, 12 * FINER), mode="bilinear", align_corners=False)
    assert (kept.argmax(1) == finer.argmax(1)).all()
    seen = finer.softmax(1).amax((0, 2, 3)) > SEEN
    torch.testing.assert_close(kept[:, ~seen], finer[:, ~seen])  # as they were, level and all


def test_where_no_slot_is_likely_nothing_moves():
    picture = torch.randint(0, 256, (1, 3, 24, 24), dtype=torch.uint8)
    torch.testing.assert_close(
        follow_edges(torch.full((1, 16, 6, 6), 2.0), picture, 2), torch.full((1, 16, 12, 12), 2.0)
    )


def test_an_ensemble_with_edges(monkeypatch):
    pipe = LDMSegPipeline.from_pretrained("tiny")
    pictures = list(np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3), np.uint8))
    settings = {"num_inference_steps": 1, "fusion": "mean", "thresholds": PostprocessConfig(0.0, 0, 0.0)}
    plain_maps, sharp = (pipe.ensemble(pictures, 1, **settings, edges=edges) for edges in (0, 3))
    for one, other in zip(plain_maps, sharp):
        assert other.segmentation.shape == (40, 50) and other.segments_info
        assert (one.segmentation != other.segmentation).any()
    seen = []
    for scales in ((1, 0.5), (0.5, 1)):  # the finest picture leads, whichever comes first
        monkeypatch.setattr(sampling, "follow_edges", lambda slots, picture, _: seen.append(picture.shape[-1]) or slots)
        pipe.ensemble(pictures[:1], 1, **settings, edges=3, flip=True, scales=scales)
    monkeypatch.undo()
    assert seen == [pipe.info.picture_size] * 2
    alone = pipe.ensemble(pictures[1:], 1, **(settings | {"fusion": None}), edges=3, image_ids=[1])
    np.testing.assert_array_equal(alone[0].segmentation, sharp[1].segmentation)


def test_with_given():
    """Cells given whole are certain, those given in part partly, the others as they were; levels stay."""
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 2, 3)
    given = np.zeros((2, 4, 6), np.uint8)  # cells of 2 x 2
    given[0, :2, :2] = 3
    given[0, 2, 2:4] = 1
    mixed = with_given(logits, list(given))
    before, after = logits.softmax(1), mixed.softmax(1)
    torch.testing.assert_close(mixed.logsumexp(1), logits.logsumexp(1))
    torch.testing.assert_close(after[0, :, 0, 0], torch.tensor([0.0, 0.0, 0.0, 1.0]), atol=1e-6, rtol=0)
    half = before[0, :, 1, 1] / 2 + torch.tensor([0.0, 0.5, 0.0, 0.0])
    torch.testing.assert_close(after[0, :, 1, 1], half)
    untouched = torch.ones(2, 2, 3, dtype=torch.bool)
    untouched[0, 0, 0] = untouched[0, 1, 1] = False
    torch.testing.assert_close(mixed.movedim(1, -1)[untouched], logits.movedim(1, -1)[untouched])


def test_completed_maps_follow_edges(tmp_path, capsys):
    """Given pixels stay, and a given segment ends where the picture does."""
    pipe = LDMSegPipeline.from_pretrained("tiny")
    columns = np.broadcast_to(np.arange(64), (64, 64))
    picture = np.where(columns < 37, 60, 190)[..., None].repeat(3, -1).astype(np.uint8)
    truth = np.where(columns < 37, 5, 9).astype(np.int32)
    known = np.abs(columns - 37) > 8
    plain_map, sharp = (pipe.inpaint(picture, truth, known, edges=edges)[0].segmentation for edges in (0, 4))
    for found in (plain_map, sharp):
        assert (found[known] == truth[known]).all()
    assert (sharp != truth).mean() <= (plain_map != truth).mean()
    assert (sharp == truth).mean() > 0.98
    Image.fromarray(picture).save(tmp_path / "a.png")
    write_panoptic_png(tmp_path / "map.png", np.where(known, truth, 0))
    command = ["inpaint", "tiny", "--image", str(tmp_path / "a.png"), "--map", str(tmp_path / "map.png")]
    command += ["--unknown-id", "0", "--out", str(tmp_path / "out")]
    assert main([*command, "--edges", "4"]) == 0
    np.testing.assert_array_equal(read_panoptic_png(tmp_path / "out" / "a.png"), sharp)
    assert main([*command, "--edges", "17"]) == 2
    assert "--edges 17: from 0 to 16 expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"edges": 1, "fusion": "medoid"}, "not by fusion=medoid: take mean"),
        ({"edges": 17, "fusion": "mean"}, "edges=17"),
        ({"edges": True, "fusion": "mean"}, "edges=True"),
    ],
)
def test_bad_settings(model_dir, settings, message):
    with pytest.raises(ArgumentError, match=message):
        LDMSegPipeline.from_pretrained(model_dir).ensemble(np.zeros((8, 8, 3), np.uint8), **settings)
