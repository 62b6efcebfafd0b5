"""The four pictures of an image on the page."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from ldmseg_fast.draw import colorize, enlarge, error_map, overlay
from ldmseg_fast.error_page.entry import PageEntry

SIDE = 400  # pixels of a picture's longer side
BYTES = 27_000  # of a picture, at most, as far as the lowest quality allows
QUALITIES = (82, 72, 60, 45, 30)


def pictures(entry: PageEntry) -> list[np.ndarray]:
    """Picture, truth, prediction and errors, uint8 [h, w, 3], at the size they are shown in."""
    image, gt_ids, pred_ids, pairs = entry.image, entry.gt_ids, entry.pred_ids, entry.pairs()
    if image is None:
        image = np.full((*gt_ids.shape, 3), 150, np.uint8)
    longest = max(gt_ids.shape)
    if longest > SIDE:
        height, width = (max(1, round(side * SIDE / longest)) for side in gt_ids.shape)
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))
        gt_ids, pred_ids = nearest(gt_ids, height, width), nearest(pred_ids, height, width)
    else:
        image, gt_ids, pred_ids = (enlarge(array, SIDE) for array in (image, gt_ids, pred_ids))
    colors, colors_of_prediction = colorize(gt_ids), colorize(pred_ids)
    for gt_id, pred_id in pairs.items():  # one colour in both maps
        seen = gt_ids == gt_id
        if seen.any():
            colors_of_prediction[pred_ids == pred_id] = colors[seen][0]
    return [
        image,
        overlay(image, gt_ids, alpha=0.6, colors=colors),
        overlay(image, pred_ids, alpha=0.6, colors=colors_of_prediction),
        error_map(image, gt_ids, pred_ids, pairs, entry.missed(), entry.false()),
    ]


def nearest(ids: np.ndarray, height: int, width: int) -> np.ndarray:
    """A map [H, W] at another size: the ids at the centres of its pixels."""
    rows, columns = ((np.arange(new) + 0.5) * old / new for new, old in zip((height, width), ids.shape))
    return ids[rows.astype(int)[:, None], columns.astype(int)[None, :]]


def embedded(picture: np.ndarray) -> str:
    """A data address: PNG where that is small (enlarged pixels), else a JPEG of at most about BYTES."""
    png = _encoded(picture, "PNG", compress_level=6)
    for quality in QUALITIES:
        jpeg = _encoded(picture, "JPEG", quality=quality)
        if len(jpeg) <= BYTES:
            break
    kind, content = ("png", png) if len(png) <= max(len(jpeg), BYTES // 2) else ("jpeg", jpeg)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _encoded(picture: np.ndarray, kind: str, **settings: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind, **settings)
    return buffer.getvalue()
