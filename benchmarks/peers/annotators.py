"""Data sets with several annotated maps per image, such as BSDS500: quality by annotator, and its mean.

Pooled over annotators, one who draws many segments would count for more than one who draws few.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

from ldmseg_fast.data.folders import find_split

Row = dict[str, Any]
MEANS = (
    "value",
    "sq",
    "rq",
    "boundary_pq",
    "pq_crowd_correct",
    "ms_per_image",
    "unknown_pq",
    "deviation",
    "miou",
    "category_accuracy",
    "pixels",
)
SUMS = ("tp", "fp", "fn")


@contextmanager
def annotator_roots(data: str | Path, split: str) -> Iterator[list[Path]]:
    """Yields a data root for each "annotator" that the split's images name, of links to the real files.

    Where the images name none, it is the root itself.
    """
    folders = find_split(data, split)
    content = json.loads(folders.annotations.read_text(encoding="utf-8"))
    annotators = sorted({image["annotator"] for image in content["images"] if "annotator" in image})
    if len(annotators) < 2:
        yield [Path(data)]
        return
    with tempfile.TemporaryDirectory() as scratch:
        roots = []
        for annotator in annotators:
            root = Path(scratch, str(annotator), Path(data).resolve().name)
            (root / "annotations").mkdir(parents=True)
            (root / split).symlink_to(folders.images.resolve())
            (root / f"panoptic_{split}").symlink_to(folders.maps.resolve())
            images = [image for image in content["images"] if image.get("annotator") == annotator]
            kept = {image["id"] for image in images}
            maps = [each for each in content["annotations"] if each["image_id"] in kept]
            own = content | {"images": images, "annotations": maps}
            (root / "annotations" / folders.annotations.name).write_text(json.dumps(own), encoding="utf-8")
            roots.append(root)
        yield roots


def mean_over_annotators(data: str | Path, split: str, measure: Callable[[str], list[Row]]) -> list[Row]:
    """Returns the rows of `measure(root)`, each the mean over the annotators' roots; counts are summed."""
    with annotator_roots(data, split) as roots:
        return mean_rows([measure(str(root)) for root in roots])


def mean_rows(parts: Sequence[list[Row]]) -> list[Row]:
    """Joins rows of the same variants, measured once per annotator; `by_annotator` has the values."""
    if len(parts) == 1:
        return parts[0]
    rows = []
    for same in zip(*parts, strict=True):
        row = dict(same[0])
        images = sum(each["case"]["images"] for each in same)
        row["case"] = row["case"] | {"images": images, "annotators": len(same)}
        row |= means(same, MEANS) | {key: sum(each[key] for each in same) for key in SUMS if key in row}
        rows.append(row | {"by_annotator": [each["value"] for each in same]})
    return rows


def means(rows: Sequence[Row], keys: Sequence[str]) -> Row:
    """Returns means over rows of those keys that all of them have, and of what they have by share of dropped blocks."""
    found: Row = {key: mean(row[key] for row in rows) for key in keys if all(key in row for row in rows)}
    if "by_probability" in rows[0]:
        shares = [row["by_probability"] for row in rows]
        found["by_probability"] = {key: mean(share[key] for share in shares) for key in shares[0]}
    return found
