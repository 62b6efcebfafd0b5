"""Overlays, coloured maps, grids and contact sheets."""

from pathlib import Path

import numpy as np
import pytest

from ldmseg_fast.data.scenes import generate_scene, write_scenes
from ldmseg_fast.reports.draw import (
    ERROR_COLORS,
    colorize,
    contact_sheet,
    enlarge,
    error_map,
    overlay,
    palette,
    picture_grid,
    segment_colors,
)


def test_palette_is_well_separated() -> None:
    colors = palette()
    assert colors.shape == (48, 3) and colors.dtype == np.uint8
    distance = np.linalg.norm(colors[:, None].astype(float) - colors[None], axis=-1)
    assert distance[~np.eye(48, dtype=bool)].min() > 20


def test_neighbours_differ_clearly() -> None:
    ids = np.random.default_rng(0).integers(1, 2**24, (12, 12))
    colors = colorize(ids.repeat(3, 0).repeat(3, 1)).astype(float)
    for axis in (0, 1):
        step = np.linalg.norm(np.diff(colors, axis=axis), axis=-1)
        assert step[step > 0].min() > 20


def test_colour_is_stable_by_id() -> None:
    alone = {i: colorize(np.full((4, 4), i))[0, 0].tolist() for i in (3, 40, 2**23 + 5)}
    together = np.zeros((9, 9), int)
    together[1, 1], together[4, 4], together[7, 7] = alone  # apart from each other in void
    ids, colors = segment_colors(together)
    assert {int(i): color.tolist() for i, color in zip(ids, colors) if i} == alone


def test_void_is_grey_and_only_void() -> None:
    segmentation = np.arange(200).reshape(10, 20)
    grey = np.ptp(colorize(segmentation).astype(int), axis=-1) < 12
    assert grey[0, 0] and grey.sum() == 1


def test_overlay() -> None:
    rgb, ids, _ = generate_scene(64, 0, 0, version=1)
    ids = np.where(np.arange(64) < 8, 0, ids)
    before = rgb.copy()
    out = overlay(rgb, ids)
    assert out.shape == rgb.shape and out.dtype == np.uint8
    assert np.array_equal(rgb, before), "the picture must not be changed"
    assert not np.array_equal(out, overlay(rgb, ids, edges=False))
    assert out[:, :7].mean() < rgb[:, :7].mean(), "void is dimmed"
    faint = overlay(rgb, ids, alpha=0.1, edges=False)[:, 8:].std()
    assert overlay(rgb, ids, alpha=1.0, edges=False)[:, 8:].std() != faint


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (37, 51)])
def test_overlay_of_odd_sizes(shape: tuple[int, int]) -> None:
    assert overlay(np.zeros((*shape, 3), np.uint8), np.ones(shape, np.int32)).shape == (*shape, 3)
    assert overlay(np.zeros((*shape, 3), np.uint8), np.zeros(shape, np.int32)).shape == (*shape, 3)


def test_overlay_of_different_sizes() -> None:
    with pytest.raises(ValueError, match=r"\[4, 5, 3\] and \[5, 4\]"):
        overlay(np.zeros((4, 5, 3), np.uint8), np.ones((5, 4), np.int32))


def test_enlarge_repeats_pixels() -> None:
    assert enlarge(np.arange(6).reshape(2, 3), 10).shape == (6, 9)
    assert enlarge(np.zeros((700, 20, 3)), 10).shape == (700, 20, 3)


def test_grid() -> None:
    small, large = np.full((10, 20, 3), 200, np.uint8), np.full((900, 450, 3), 90, np.uint8)
    grid = picture_grid([[small, large], [small]], ["picture", "truth"], cell=100, gap=4)
    array = np.asarray(grid)
    assert (array == 200).all(-1).sum() >= 2 * 50 * 100, "10x20 is shown as 50x100"
    shown = int((array == 90).all(-1).sum())
    assert 0 <= shown - 100 * 50 < 20, "900x450 is shown as 100x50; the titles have a few pixels of that grey"
    assert picture_grid([[small]], cell=100, gap=4).size == (108, 58)
    for nothing in ([], [[]]):
        with pytest.raises(ValueError, match="at least one picture"):
            picture_grid(nothing)


def test_contact_sheet(tmp_path: Path) -> None:
    root = write_scenes(tmp_path / "scenes", 5, 32, workers=1, version=1)
    sheet = contact_sheet(root, "train2017", rows=2, columns=3, cell=64)
    assert sheet.size == (6 + 3 * (128 + 6), 6 + 2 * (64 + 6))
    assert np.asarray(sheet).std() > 30


def test_error_map() -> None:
    gt = np.repeat([[0, 7, 7, 300, 300, 0]], 4, axis=0).repeat(10, 1)
    pred = np.repeat([[0, 9, 9, 9, 5, 5]], 4, axis=0).repeat(10, 1)
    image = np.full((*gt.shape, 3), 120, np.uint8)
    out = error_map(image, gt, pred, {7: 9}, {300}, {5})

    def near(column: int, name: str) -> bool:
        return np.abs(out[:, column].astype(int) - np.array(ERROR_COLORS[name])).max() < 70

    assert not out[:, :10].std(axis=-1).any(), "void"
    assert not out[:, 10:30].std(axis=-1).any(), "right"
    assert near(35, "missed"), "the missed segment, though a matched prediction lies on it"
    both = out[:, 40:50].reshape(-1, 3)
    assert len(np.unique(both, axis=0)) == 2, "striped"
    assert near(55, "false"), "a false segment on void is shown"
    boundary = error_map(image, gt, pred, {7: 9, 300: 5}, [], [])
    assert np.abs(boundary[:, 35].astype(int) - np.array(ERROR_COLORS["boundary"])).max() < 40


def test_overlay_in_given_colours() -> None:
    ids = np.ones((8, 8), np.int32)
    colors = np.full((8, 8, 3), (200, 30, 30), np.uint8)
    out = overlay(np.full((8, 8, 3), 128, np.uint8), ids, alpha=1.0, colors=colors)
    assert out[4, 4].tolist() == [200, 30, 30]
