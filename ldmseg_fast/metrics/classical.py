"""Segments without learning, each method at its best setting on a training split.

Felzenszwalb's graphs; SLIC; and SLIC's superpixels merged by colour over their adjacency graph.

A model that loses to these has learnt nothing worth its weights. scikit-image does the work (`pip install
'ldmseg_fast[dev]'`). Sources: Felzenszwalb and Huttenlocher, "Efficient graph-based image segmentation", IJCV 2004;
Achanta et al., "SLIC superpixels compared to state-of-the-art superpixel methods", TPAMI 2012; merging as in Haris et
al., "Hybrid image segmentation using watersheds and fast region merging", IEEE TIP 1998.
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
    "min_share": (0.0025, 0.005, 0.01, 0.02, 0.05, 0.1),
}
SLIC_GRID = {"n_segments": (5, 10, 15, 25, 40), "compactness": (1.0, 3.0, 10.0, 30.0), "sigma": (0.0, 1.0)}
MERGED_GRID = {
    "n_segments": (100, 200),
    "compactness": (10.0,),
    "threshold": (5.0, 8.0, 12.0, 16.0, 22.0, 30.0),
    "min_share": (0.0025, 0.01, 0.03, 0.1),
}

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


def merged_slic(
    image: np.ndarray, n_segments: int, compactness: float, threshold: float, min_share: float
) -> np.ndarray:
    """Merges SLIC's superpixels of a picture, uint8 [H, W, 3], into connected ids int32 [H, W] from 1 on.

    The two neighbours whose mean colours in CIELAB are nearest become one, again and again while these are under
    `threshold` apart; then regions under `min_share` of the picture join the neighbour that is nearest in colour
    (Haris et al. 1998, section V, by colour alone).
    """
    from skimage import color

    labels = slic(image, n_segments, compactness, 0.0) - 1
    _, labels = np.unique(labels, return_inverse=True)
    labels = labels.reshape(image.shape[:2])
    count = int(labels.max()) + 1
    lab = color.rgb2lab(image).reshape(-1, 3)
    areas = np.bincount(labels.ravel(), minlength=count).astype(float)
    sums = np.stack([np.bincount(labels.ravel(), lab[:, channel], count) for channel in range(3)], 1)  # [n, 3]
    touching = np.zeros((count, count), bool)
    for one, other in ((labels[:, :-1], labels[:, 1:]), (labels[:-1], labels[1:])):
        touching[one.ravel(), other.ravel()] = touching[other.ravel(), one.ravel()] = True
    np.fill_diagonal(touching, False)
    means = sums / areas[:, None]
    distances = np.where(touching, np.linalg.norm(means[:, None] - means[None], axis=2), np.inf)
    target = np.arange(count)
    least = min_share * labels.size

    def merge(kept: int, gone: int) -> None:
        sums[kept] += sums[gone]
        areas[kept] += areas[gone]
        areas[gone] = np.inf  # so that it is never the smallest
        target[target == gone] = kept
        touching[kept] |= touching[gone]
        touching[:, kept] = touching[kept]
        touching[gone], touching[:, gone] = False, False
        touching[kept, kept] = False
        means[kept] = sums[kept] / areas[kept]
        distances[gone], distances[:, gone] = np.inf, np.inf
        fresh = np.where(touching[kept], np.linalg.norm(means - means[kept], axis=1), np.inf)
        distances[kept], distances[:, kept] = fresh, fresh

    while distances.flat[nearest := int(np.argmin(distances))] < threshold:
        merge(*divmod(nearest, count))
    while areas[smallest := int(np.argmin(areas))] < least and touching[smallest].any():
        merge(int(np.argmin(distances[smallest])), smallest)
    _, ids = np.unique(target[labels], return_inverse=True)
    return ids.reshape(labels.shape).astype(np.int32) + 1


METHODS: dict[str, Callable[..., np.ndarray]] = {"felzenszwalb": felzenszwalb, "slic": slic, "merged slic": merged_slic}
GRIDS: dict[str, dict[str, tuple]] = {
    "felzenszwalb": FELZENSZWALB_GRID,
    "slic": SLIC_GRID,
    "merged slic": MERGED_GRID,
}


def score(
    segment: Callable[[np.ndarray], np.ndarray], items: Iterable[tuple[np.ndarray, Truth]], boundary: bool = False
) -> PanopticQuality:
    """Measures the class-agnostic panoptic quality of `segment`.

    A picture that comes several times in a row, as one object, is segmented once: it has several annotations.

    Args:
        segment: maps a picture, uint8 [H, W, 3], to ids int32 [H, W].
        items: pictures with their annotations, ids int32 [H, W] and `segments_info`.
        boundary: whether to count boundary PQ too.
    """
    stat = PanopticQuality(class_agnostic=True, boundary=boundary)
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
