"""Segments without learning, by Felzenszwalb's graphs and by SLIC, each at its best setting on a training split.

A model that loses to these has learnt nothing worth its weights. scikit-image does the work (`pip install
'ldmseg_fast[dev]'`). Sources: Felzenszwalb and Huttenlocher, "Efficient graph-based image segmentation", IJCV 2004;
Achanta et al., "SLIC superpixels compared to state-of-the-art superpixel methods", TPAMI 2012.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.metrics.baselines import segments_of
from ldmseg_fast.metrics.pq import PanopticQuality

# what is tried: sizes in shares of the picture's area or side, so that one grid serves every size of picture
FELZENSZWALB_GRID = {
    "scale": (100.0, 200.0, 400.0, 800.0, 1600.0, 3200.0),
    "sigma": (0.0, 0.5, 0.8),
    "min_share": (0.0025, 0.005, 0.01, 0.02),
}
SLIC_GRID = {"n_segments": (5, 10, 15, 25, 40), "compactness": (1.0, 3.0, 10.0, 30.0), "sigma": (0.0, 1.0)}

SIDE = 256  # larger pictures are segmented at this length of their longer side, and the map is enlarged
BICUBIC, NEAREST = Image.Resampling.BICUBIC, Image.Resampling.NEAREST

Truth = tuple[np.ndarray, list[dict]]  # ids [H, W] and segments_info


@dataclass(frozen=True)
class Classical:
    """Holds a method and its parameters. Called with a picture it returns a map."""

    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Segments a picture, uint8 [H, W, 3], into ids int32 [H, W], 1..n without void.

        Pictures longer than `SIDE` pixels are segmented at that size, and the map is enlarged by the nearest pixel.
        """
        height, width = image.shape[:2]
        shrink = min(1.0, SIDE / max(height, width))
        if shrink == 1.0:
            return METHODS[self.method](image, **self.parameters)
        size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
        labels = METHODS[self.method](np.asarray(Image.fromarray(image).resize(size, BICUBIC)), **self.parameters)
        return np.asarray(Image.fromarray(labels).resize((width, height), NEAREST))

    def __str__(self) -> str:
        return f"{self.method} " + ", ".join(f"{key} {value:g}" for key, value in self.parameters.items())


def felzenszwalb(image: np.ndarray, scale: float, sigma: float, min_share: float) -> np.ndarray:
    """Segments a picture, uint8 [H, W, 3], into ids int32 [H, W] from 1 on (Felzenszwalb and Huttenlocher 2004).

    Components under `min_share` of the picture are merged into a neighbour.
    """
    from skimage import segmentation

    least = max(1, round(min_share * image.shape[0] * image.shape[1]))
    labels = segmentation.felzenszwalb(image, scale=scale, sigma=sigma, min_size=least)
    return labels.astype(np.int32) + 1


def slic(image: np.ndarray, n_segments: int, compactness: float, sigma: float) -> np.ndarray:
    """Segments a picture, uint8 [H, W, 3], into connected ids int32 [H, W] from 1 on (Achanta et al. 2012).

    Colours are compared in CIELAB.
    """
    from skimage import segmentation

    return segmentation.slic(
        image, n_segments=n_segments, compactness=compactness, sigma=sigma, start_label=1, channel_axis=-1
    ).astype(np.int32)


METHODS: dict[str, Callable[..., np.ndarray]] = {"felzenszwalb": felzenszwalb, "slic": slic}
GRIDS: dict[str, dict[str, tuple]] = {"felzenszwalb": FELZENSZWALB_GRID, "slic": SLIC_GRID}


def score(segment: Callable[[np.ndarray], np.ndarray], items: Iterable[tuple[np.ndarray, Truth]]) -> PanopticQuality:
    """Measures the class-agnostic panoptic quality of `segment`.

    A picture that comes several times in a row, as one object, is segmented once: it has several annotations.

    Args:
        segment: maps a picture, uint8 [H, W, 3], to ids int32 [H, W].
        items: pictures with their annotations, ids int32 [H, W] and `segments_info`.
    """
    stat = PanopticQuality([{"id": 1, "name": "object", "isthing": 1}], class_agnostic=True)
    before, guess = None, np.empty(0)
    for index, (image, (ids, segments)) in enumerate(items):
        if image is not before:
            before, guess = image, segment(image)
        stat.add(ids, segments, guess, segments_of(guess), image_id=index)
    return stat


def load_items(dataset: Any) -> Iterator[tuple[np.ndarray, Truth]]:
    """Yields the pictures, uint8 [H, W, 3], and annotations, int32 [H, W] with `segments_info`, of a `CocoPanoptic`.

    All have their own size. Annotations of one picture share its array.
    """
    before, image = None, np.empty(0)
    for index in range(len(dataset)):
        path = dataset.paths(index)[0]
        if path != before:
            before, image = path, dataset.load_image(index)
        yield image, dataset.ground_truth(index)


def tune(method: str, items: list[tuple[np.ndarray, Truth]]) -> tuple[Classical, float]:
    """Finds the setting of a method's grid with the highest PQ on `items`, and that PQ in percent.

    items: pictures, uint8 [H, W, 3], with ids int32 [H, W] and `segments_info`; take training pictures.
    """
    grid = GRIDS[method]
    candidates = [Classical(method, dict(zip(grid, values))) for values in itertools.product(*grid.values())]
    scores = [100.0 * score(candidate, items).compute()["All"]["pq"] for candidate in candidates]
    best = int(np.argmax(scores))
    return candidates[best], scores[best]


def require_skimage() -> None:
    """Raises ArgumentError where scikit-image is not installed."""
    try:
        import skimage  # noqa: F401
    except ImportError:
        raise ArgumentError("Felzenszwalb and SLIC need scikit-image: pip install 'ldmseg_fast[dev]'") from None
