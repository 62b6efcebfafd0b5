"""Writes maps as GeoJSON (RFC 7946): a FeatureCollection a picture, whose coordinates are pixels.

RFC 7946 means degrees, so this is GeoJSON in form alone. x goes right and y down, from the upper left corner of the
picture. shapely and geopandas read it. QuPath reads it as annotations: `objectType` and `classification` are its names
(https://qupath.readthedocs.io/en/stable/docs/advanced/exporting_annotations.html).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ldmseg_fast.files import replacing
from ldmseg_fast.formats.data_set import DataSet
from ldmseg_fast.formats.options import Summary, WriteOptions
from ldmseg_fast.formats.walk import Walk
from ldmseg_fast.panoptic.outlines import Ring, outlines, polygons_of


def write(data_set: DataSet, out: Path, options: WriteOptions) -> Summary:
    """Writes OUT/SPLIT/NAME.geojson for each picture, with the exact outlines of its segments.

    Raises:
        DataError: a map that cannot be read, or names that would replace each other.
    """
    walk = Walk(data_set, options)
    for item in walk.items("geojson"):
        collection = feature_collection(item.map.ids, item.map.segments, data_set.categories, item.name)
        path = out / item.split / f"{item.stem}.geojson"
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(collection), encoding="utf-8")
    return walk.summary(out)


def feature_collection(
    ids: np.ndarray,
    segments: Iterable[Mapping[str, Any]],
    categories: Iterable[Mapping[str, Any]],
    picture: str = "",
) -> dict[str, Any]:
    """Describes a map as a FeatureCollection.

    Args:
        ids: integer [H, W], 0 void.
        segments: its segments, with `id` and `category_id`.
        categories: with `id`, `name` and `isthing`.
        picture: its name.

    Returns:
        One feature a segment: a MultiPolygon with a polygon for each 4-connected piece, whose first ring is the outer
        one and runs counter-clockwise in x and y, as RFC 7946 has it, and whose other rings are holes.
    """
    known = {category["id"]: category for category in categories}
    rings = outlines(ids)
    height, width = ids.shape
    features = []
    for segment in segments:
        category = known.get(segment["category_id"], {})
        properties: dict[str, Any] = {
            "objectType": "annotation",
            "classification": {"name": category.get("name", "object")},
            "category_id": segment["category_id"],
            "isthing": int(category.get("isthing", 1)),
            "iscrowd": int(segment.get("iscrowd", 0)),
            "area": int(np.count_nonzero(ids == segment["id"])),
        }
        if "color" in category:
            properties["classification"]["color"] = list(category["color"])
        if "score" in segment:
            properties["score"] = segment["score"]
        polygons = [[_closed(ring) for ring in polygon] for polygon in polygons_of(rings[segment["id"]])]
        geometry = {"type": "MultiPolygon", "coordinates": polygons}
        features.append({"type": "Feature", "id": segment["id"], "geometry": geometry, "properties": properties})
    picture_info = {"file_name": picture, "height": height, "width": width}
    return {"type": "FeatureCollection", "image": picture_info, "features": features}


def _closed(ring: Ring) -> list[list[int]]:
    return [*ring.points.tolist(), ring.points[0].tolist()]
