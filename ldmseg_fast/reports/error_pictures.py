"""Draws the four pictures of an image on the page of errors."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from ldmseg_fast.reports.draw import ERROR_COLORS, colorize, enlarge, error_map, overlay
from ldmseg_fast.reports.error_entry import PageEntry, nearest

SIDE = 400  # pixels of a picture's longer side
BYTES = 27_000  # largest picture, as far as the lowest quality allows
QUALITIES = (82, 72, 60, 45, 30)


def pictures(entry: PageEntry) -> list[np.ndarray]:
    """Draws picture, truth, prediction and errors, uint8 [h, w, 3] each, at the size they are shown in."""
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


def embedded(picture: np.ndarray) -> str:
    """Encodes a picture, uint8 [h, w, 3], as a data address.

    It is a PNG where that is small (enlarged pixels), else a JPEG of at most about `BYTES`.
    """
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


STYLE = """
body { max-width: 90rem; } .note { max-width: 60rem; }
.key { display: flex; flex-wrap: wrap; gap: .4rem 1.4rem; margin: 1rem 0; font-size: .9rem; }
.key i { display: inline-block; width: 1em; height: 1em; border-radius: 3px; margin-right: .4em;
vertical-align: -.1em; box-shadow: 0 0 0 1px #8888; }
article { margin: 1.6rem 0 2.4rem; } article h3 { font-size: 1rem; margin: 0 0 .5rem; font-weight: 600; }
article h3 span { font-weight: 400; color: var(--dim); margin-left: .6em; }
.four { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: .5rem; }
.four figure { margin: 0; } .view { position: relative; line-height: 0; cursor: crosshair; }
.view img { width: 100%; } .view canvas { position: absolute; inset: 0; width: 100%; height: 100%; pointer-events: none;
border-radius: 4px; } .four figcaption { text-align: center; font-size: .8rem; }
output { display: block; min-height: 3.2em; font-size: .85rem; line-height: 1.6; margin-top: .4rem; }
summary { cursor: pointer; font-size: .85rem; color: var(--dim); } details table { font-size: .85rem; }
td:first-child { overflow-wrap: normal; } td:nth-child(2) { text-align: left; overflow-wrap: anywhere; }
@media (max-width: 46rem) { .four { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
"""


# Each <article> carries a grid of pairs (truth, prediction) as run lengths, and a line of text per segment.
SCRIPT = """
for (const article of document.querySelectorAll("article")) {
  const { size, runs, pairs, truth, prediction } = JSON.parse(article.querySelector("script").textContent);
  const [width, height] = size;
  const grid = new Uint16Array(width * height), views = [...article.querySelectorAll(".view")];
  for (let i = 0, at = 0; i < runs.length; i += 2) grid.fill(runs[i], at, at += runs[i + 1]);
  const canvases = views.map(view => view.appendChild(document.createElement("canvas")));
  for (const canvas of canvases) Object.assign(canvas, { width, height });
  const output = article.querySelector("output"), hint = output.textContent;
  let shown = -1;
  const show = cell => {
    if (cell === shown) return;
    shown = cell;
    output.textContent = cell < 0 ? hint : "truth: " + truth[pairs[cell][0]];
    if (cell >= 0) output.append(document.createElement("br"), "prediction: " + prediction[pairs[cell][1]]);
    canvases.forEach((canvas, view) => {
      const context = canvas.getContext("2d"), veil = context.createImageData(width, height);
      if (cell >= 0) for (let i = 0; i < grid.length; i++) {
        const [one, other] = pairs[grid[i]], inTruth = one === pairs[cell][0], inPrediction = other === pairs[cell][1];
        const lit = view === 1 ? inTruth : view === 2 ? inPrediction : inTruth || inPrediction;
        veil.data[4 * i + 3] = lit ? 0 : 150;
      }
      context.putImageData(veil, 0, 0);
    });
  };
  const point = event => {
    const view = event.target.closest(".view");
    if (!view) return show(-1);
    const box = view.getBoundingClientRect();
    const cell = (at, side, cells) => Math.min(Math.max(Math.floor(at / side * cells), 0), cells - 1);
    const x = cell(event.clientX - box.left, box.width, width), y = cell(event.clientY - box.top, box.height, height);
    show(grid[y * width + x]);
  };
  article.addEventListener("pointermove", point);
  article.addEventListener("pointerdown", point);
  // a finger leaves whenever it is lifted; what it tapped stays until the next tap
  article.addEventListener("pointerleave", event => event.pointerType === "touch" || show(-1));
}
"""


def color_key() -> str:
    """Explains the colours of an error map as HTML."""
    missed, false, boundary = (f"rgb{ERROR_COLORS[name]}" for name in ("missed", "false", "boundary"))
    meanings = {
        "missed: a segment of the truth without a match": missed,
        "false: a predicted segment without a match": false,
        "both missed and false": f"repeating-linear-gradient(135deg, {missed} 0 3px, {false} 3px 6px)",
        "boundary: wrong pixels of matched segments": boundary,
        "void": "repeating-linear-gradient(135deg, #222 0 4px, #555 4px 5px)",
    }
    items = [f'<span><i style="background: {color}"></i>{text}</span>' for text, color in meanings.items()]
    return f'<div class="key">{"".join(items)}</div>'
