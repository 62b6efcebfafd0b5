"""Draws panoptic maps for the eye: overlays, coloured maps, error maps, picture grids, contact sheets."""

import os
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ldmseg_fast.errors import ArgumentError

__all__ = [
    "ERROR_COLORS",
    "colorize",
    "contact_sheet",
    "enlarge",
    "error_map",
    "overlay",
    "palette",
    "picture_grid",
    "segment_colors",
]

# told apart with any kind of colour vision: M. Okabe and K. Ito, "Color universal design", 2008
ERROR_COLORS = {"missed": (230, 97, 0), "false": (64, 150, 230), "boundary": (240, 228, 66)}

_VOID = np.array([58, 60, 66], np.uint8)
_ENOUGH = 0.17  # OKLab distance at which two neighbouring segments are told apart at a glance


def _oklab_to_rgb(lab: np.ndarray) -> np.ndarray:
    """Converts OKLab [N, 3] to sRGB [N, 3], outside [0, 1] where the screen cannot show it.

    Source: B. Ottosson, "A perceptual color space for image processing", 2020.
    """
    to_lms = np.array(
        [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]]
    )
    to_linear = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = (lab @ to_lms.T) ** 3 @ to_linear.T
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 0) ** (1 / 2.4) - 0.055)


@lru_cache(maxsize=1)
def _palette() -> tuple[np.ndarray, np.ndarray]:
    """Chooses 48 colours, RGB uint8 and OKLab, each the farthest from all before it among bright, saturated ones."""
    lightness, a, b = np.meshgrid(np.linspace(0.55, 0.88, 8), *[np.linspace(-0.26, 0.26, 27)] * 2, indexing="ij")
    candidates = np.stack([lightness, a, b], axis=-1).reshape(-1, 3)
    rgb = _oklab_to_rgb(candidates)
    chroma = np.hypot(candidates[:, 1], candidates[:, 2])
    shown = ((rgb >= 0) & (rgb <= 1)).all(1) & (chroma > 0.08) & (chroma < 0.2)  # neither grey nor glaring
    candidates, rgb = candidates[shown], rgb[shown]
    chosen = [int(np.argmin(np.abs(candidates - [0.68, -0.06, -0.14]).sum(1)))]  # a calm blue first
    distance = np.full(len(candidates), np.inf)
    while len(chosen) < 48:
        distance = np.minimum(distance, np.linalg.norm(candidates - candidates[chosen[-1]], axis=1))
        chosen.append(int(np.argmax(distance)))
    return np.round(rgb[chosen] * 255).astype(np.uint8), candidates[chosen]


def palette() -> np.ndarray:
    """Returns the 48 colours of segments, uint8 [48, 3], well apart from each other."""
    return _palette()[0].copy()


def segment_colors(segmentation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sorted ids [N] of a map, integer [H, W], and a colour for each, uint8 [N, 3]; void (0) is dark grey.

    An id has the same colour in every map, unless a neighbour of lower id looks too much like it there.
    """
    ids, flat = np.unique(segmentation, return_inverse=True)
    index = flat.reshape(segmentation.shape)
    rgb, lab = _palette()
    neighbours: list[set[int]] = [set() for _ in ids]
    for first, second in ((index[1:], index[:-1]), (index[:, 1:], index[:, :-1])):
        border = first != second
        for one, other in np.unique(np.stack([first[border], second[border]]), axis=1).T.tolist():
            neighbours[one].add(other)
            neighbours[other].add(one)
    colors = np.empty((len(ids), 3), np.uint8)
    place = np.zeros(len(ids), int)
    for n, segment_id in enumerate(ids.tolist()):
        if segment_id == 0:
            colors[n] = _VOID
            continue
        start = segment_id if segment_id <= 256 else (segment_id * 2654435761 >> 7)  # Knuth's multiplicative hash
        order = (start - 1 + np.arange(len(rgb))) % len(rgb)
        around = [place[m] for m in neighbours[n] if m < n and ids[m] != 0]
        apart = np.linalg.norm(lab[order, None] - lab[None, around], axis=2).min(1) if around else np.ones(len(rgb))
        place[n] = order[np.argmax(np.minimum(apart, _ENOUGH))]  # the first that is far enough, else the farthest
        colors[n] = rgb[place[n]]
    return ids, colors


def colorize(segmentation: np.ndarray) -> np.ndarray:
    """Colours a map, integer [H, W]: uint8 [H, W, 3]; void is dark grey."""
    ids, colors = segment_colors(segmentation)
    return colors[np.searchsorted(ids, segmentation)]


def overlay(
    image: np.ndarray,
    segmentation: np.ndarray,
    alpha: float = 0.65,
    edges: bool = True,
    colors: np.ndarray | None = None,
) -> np.ndarray:
    """Tints a picture, uint8 [H, W, 3], by its map, integer [H, W], and returns a new one, uint8 [H, W, 3].

    Edges are a light line inside one segment and a dark one inside its neighbour. Void is dimmed and hatched. Small
    pictures should be enlarged first (`enlarge`), or their edges hide them.

    Args:
        alpha: the share of the tint, 0 to 1.
        edges: whether to draw the edges.
        colors: uint8 [H, W, 3] in the place of `colorize`'s.

    Raises:
        ArgumentError: another dtype, or sizes that differ.
    """
    if image.shape != (*segmentation.shape, 3) or image.dtype != np.uint8:
        raise ArgumentError(
            f"an RGB picture uint8 [H, W, 3] and a map [H, W] of one size expected, not {image.dtype} "
            f"{list(image.shape)} and {list(segmentation.shape)}"
        )
    height, width = segmentation.shape
    picture = image.astype(np.float32)
    grey = picture.mean(-1, keepdims=True)
    # Light and shade of the picture stay, most of its own colour goes, or it would mix with the segment's.
    muted = grey + 0.3 * (picture - grey)
    relief = 1 + 0.22 * np.clip((grey - grey.mean()) / max(float(grey.std()), 1.0), -2, 1)
    out = muted + alpha * ((colorize(segmentation) if colors is None else colors) * relief - muted)
    void = segmentation == 0
    hatch = (np.add.outer(np.arange(height), np.arange(width)) % 8 < 1)[..., None]
    out = np.where(void[..., None], 0.45 * grey + 0.1 * picture + 22 * hatch, out)
    if edges:
        light, dark = np.zeros((2, height, width), bool)
        down, right = segmentation[1:] != segmentation[:-1], segmentation[:, 1:] != segmentation[:, :-1]
        light[:-1] |= down
        light[:, :-1] |= right
        dark[1:] |= down
        dark[:, 1:] |= right
        out[dark] *= 0.45
        out[light] = 0.1 * out[light] + 0.9 * 255
    return np.clip(np.rint(out), 0, 255).astype(np.uint8)


def error_map(
    image: np.ndarray,
    gt_ids: np.ndarray,
    pred_ids: np.ndarray,
    pairs: Mapping[int, int],
    missed: Collection[int],
    false: Collection[int],
) -> np.ndarray:
    """Shows where a prediction is wrong, over a dim grey picture: uint8 [H, W, 3].

    Boundary pixels lie in a matched segment but not in its partner, void aside. A pixel that is both missed and false
    is striped. Void of the ground truth is hatched.

    Args:
        image: uint8 [H, W, 3].
        gt_ids, pred_ids: integer [H, W], 0 void.
        pairs: the predicted id of each matched ground-truth id.
        missed: ground-truth ids without a match.
        false: predicted ids without a match.
    """
    height, width = gt_ids.shape
    grey = image.astype(np.float32).mean(-1, keepdims=True)
    out = np.repeat(0.55 * grey + 30, 3, axis=-1)
    place = np.add.outer(np.arange(height), np.arange(width))
    void = gt_ids == 0
    out = np.where(void[..., None], 0.25 * grey + 24 + 26 * (place % 8 < 1)[..., None], out)
    known, partners = np.array(sorted(pairs) or [0]), list(pairs.values())
    partner = np.array([pairs[key] for key in sorted(pairs)] or [0])
    slot = np.clip(np.searchsorted(known, gt_ids), 0, len(known) - 1)
    in_pair = (known[slot] == gt_ids) & ~void
    right = in_pair & (partner[slot] == pred_ids)
    boundary = (in_pair | np.isin(pred_ids, partners)) & ~right & ~void
    lost, extra = np.isin(gt_ids, list(missed)), np.isin(pred_ids, list(false))
    stripe = place // max(2, max(height, width) // 50) % 2 == 0
    for mask, name, shine in (
        (boundary & ~lost & ~extra, "boundary", 0.1),
        (lost, "missed", 0.3),
        (extra & (stripe | ~lost), "false", 0.3),
    ):
        out[mask] = shine * out[mask] + (1 - shine) * np.array(ERROR_COLORS[name], np.float32)
    return np.clip(np.rint(out), 0, 255).astype(np.uint8)


def enlarge(array: np.ndarray, side: int) -> np.ndarray:
    """Repeats the pixels of [H, W] or [H, W, 3], any dtype, by a whole factor.

    It is the largest at which the longer side has at most `side` pixels, and at least 1.
    """
    factor = max(1, side // max(array.shape[:2]))
    return array.repeat(factor, 0).repeat(factor, 1)


def picture_grid(
    rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str] = (), cell: int = 256, gap: int = 8
) -> Image.Image:
    """Lays pictures, uint8 [H, W, 3], out in rows under one title a column, for example picture | truth | prediction.

    Small pictures are enlarged by a whole factor, large ones scaled down to fit cells of `cell` x `cell` pixels.

    Raises:
        ArgumentError: no picture at all.
    """
    if not rows or not any(len(row) for row in rows):
        raise ArgumentError("a grid needs at least one picture")
    cells = [[_fit(picture, cell) for picture in row] for row in rows]
    columns = max(len(row) for row in cells)
    widths = [max((row[c].width for row in cells if c < len(row)), default=0) for c in range(columns)]
    heights = [max((picture.height for picture in row), default=0) for row in cells]
    font_size = max(11, cell // 14)
    top = font_size + 2 * gap if titles else gap
    sheet = Image.new("RGB", (gap + sum(w + gap for w in widths), top + sum(h + gap for h in heights)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(font_size)
    lefts = [gap + sum(w + gap for w in widths[:c]) for c in range(columns)]
    for left, width, title in zip(lefts, widths, titles):
        draw.text((left + width // 2, top // 2), title, fill=(40, 40, 40), font=font, anchor="mm")
    for row, height in zip(cells, heights):
        for left, width, picture in zip(lefts, widths, row):
            sheet.paste(picture, (left + (width - picture.width) // 2, top + (height - picture.height) // 2))
        top += height + gap
    return sheet


def _fit(picture: np.ndarray, cell: int) -> Image.Image:
    image = Image.fromarray(enlarge(picture, cell))
    if max(image.size) > cell:
        image.thumbnail((cell, cell), Image.Resampling.LANCZOS)
    return image


def contact_sheet(
    root: str | os.PathLike, split: str, rows: int = 10, columns: int = 10, cell: int | None = None
) -> Image.Image:
    """Lays out the first rows x columns pictures of a COCO-panoptic split, each beside its overlay.

    cell: pixels of a picture's longer side; by default the sheet is about 2560 pixels wide.

    Raises:
        DataError: a split that cannot be read.
    """
    from ldmseg_fast.data.coco_panoptic import CocoPanoptic

    cell = cell or max(64, 1280 // columns)
    dataset = CocoPanoptic(root, split, cell, limit=rows * columns)
    pairs = []
    for index in range(len(dataset)):
        image, (ids, _) = dataset.load_image(index), dataset.ground_truth(index)
        image, ids = enlarge(image, cell), enlarge(ids, cell)
        pairs.append(np.concatenate([image, overlay(image, ids)], axis=1))
    return picture_grid([pairs[r : r + columns] for r in range(0, len(pairs), columns)], cell=2 * cell, gap=6)
