"""Measures PQ of slices of a data set: the images of each value of a column, such as the weather."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ldmseg_fast.errors import ArgumentError, DataError
from ldmseg_fast.files import read_file, text_of
from ldmseg_fast.metrics.pq import PanopticQuality

KEYS = ("image_id", "id", "file_name")  # of a table: what tells images apart
MOST_VALUES = 1000


def slices_of(stat: PanopticQuality, column: str, table: str | Path | None, gt_path: Path) -> dict[str, Any]:
    """Computes PQ of the images of each value.

    Args:
        stat: over all images.
        column: its name.
        table: a CSV with a column `image_id` or `file_name`; None: the ground truth's `images` have the column.
        gt_path: the JSON of the ground truth.

    Returns:
        `column`, `rows` (value, images, pq, sq, rq and n categories of All, Things and Stuff; `None` last: images that
        have no value) and `values`, one for each image.

    Raises:
        DataError: a table that cannot be read, without the column, or with an image twice.
        ArgumentError: a column that no image has, or one of over `MOST_VALUES` values.
    """
    if table is None:
        found = _of_images(gt_path, column)
    else:
        found = _of_table(Path(table), column, _names(gt_path), {str(image_id) for image_id in stat.image_ids})
    values = [found.get(str(image_id)) for image_id in stat.image_ids]
    where = f"`images` of {gt_path}" if table is None else str(table)
    if not any(value is not None for value in values):
        raise ArgumentError(f"--by {column}: {where} gives it to none of the {len(values)} images")
    different = sorted({value for value in values if value is not None}, key=_order)
    if len(different) > MOST_VALUES:
        raise ArgumentError(
            f"--by {column}: {len(different)} values in {where}; a column of up to {MOST_VALUES} makes slices"
        )
    rows = []
    for value in [*different, *([None] if None in values else [])]:
        part = stat.part([place for place, each in enumerate(values) if each == value]).compute()
        rows.append({"value": value, "images": part["images"]} | {g: part[g] for g in ("All", "Things", "Stuff")})
    return {"column": column, "rows": rows, "values": values}


def _order(value: str) -> tuple[int, float, str]:
    try:
        return 0, float(value), value
    except ValueError:
        return 1, 0.0, value


def _images(gt_path: Path) -> list[Mapping[str, Any]]:
    if not gt_path.is_file():
        return []
    content = json.loads(text_of(read_file(gt_path)))  # which has been read before, and is a JSON
    images = content.get("images", []) if isinstance(content, dict) else []
    return [image for image in images if isinstance(image, dict) and "id" in image]


def _of_images(gt_path: Path, column: str) -> dict[str, str]:
    values = {str(image["id"]): image.get(column) for image in _images(gt_path)}
    for image_id, value in values.items():
        if isinstance(value, dict | list):
            raise ArgumentError(f"--by {column}: image {image_id} has {value!r:.80}, which is no text or number")
    return {image_id: str(value) for image_id, value in values.items() if value is not None}


def _names(gt_path: Path) -> dict[str, str]:
    """Returns image ids by file name, with and without its folder and ending."""
    names: dict[str, str] = {}
    for image in _images(gt_path):
        path = PurePosixPath(str(image.get("file_name", "")))
        for name in (str(path), path.name, path.stem):
            names.setdefault(name, str(image["id"]))
    return names


def _image_of(text: str, listed: Collection[str]) -> str:
    """Returns the image that a table means: its id as the ground truth has it, or as a spreadsheet writes 7: 7.0."""
    if text in listed:
        return text
    found = re.fullmatch(r"\s*([+-]?)0*(\d+)(?:\.0*)?\s*", text, re.ASCII)
    number = "" if found is None else found[1].replace("+", "") + found[2]
    return number if number in listed else text


def _of_table(table: Path, column: str, names: Mapping[str, str], listed: Collection[str]) -> dict[str, str]:
    try:
        reader = csv.DictReader(io.StringIO(text_of(read_file(table, DataError, "CSV file")), newline=""), strict=True)
        fields = list(reader.fieldnames or [])
        key = next((name for name in KEYS if name in fields), None)
        if key is None or column not in fields:
            wanted = f"a column {column}" if key is not None else f"one of the columns {', '.join(KEYS)}"
            raise DataError(f"{table}: needs {wanted}, has {', '.join(fields)[:200] or 'no header'}")
        values: dict[str, str] = {}
        unknown: list[str] = []
        seen: set[str] = set()
        for row in reader:
            image_id = row[key] or ""
            if key == "file_name":
                image_id = names.get(image_id, names.get(PurePosixPath(image_id).stem, image_id))
            else:
                image_id = _image_of(image_id, listed)
            if image_id not in listed:
                unknown.append(row[key] or "")
            if image_id in seen:
                raise DataError(f"{table}: line {reader.line_num}: image {row[key]} is there twice; keep one line")
            seen.add(image_id)
            if row[column] not in (None, ""):
                values[image_id] = row[column]
        if unknown and (absent := sorted(set(listed) - seen)):
            print(
                f"warning: {table}: {key} {unknown[0]!r:.80} of {len(unknown)} lines is none of the ground truth's, "
                f"and {len(absent)} of its images have no line, such as {absent[0]!r:.80}; do both mean the same?",
                file=sys.stderr,
            )
        return values
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: no CSV ({error})") from None
