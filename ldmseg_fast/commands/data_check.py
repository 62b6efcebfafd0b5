"""`ldmseg data check` finds what is wrong with a COCO-panoptic folder before a training does."""

import argparse
import io
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from ldmseg_fast.data.folders import SplitFolders, find_split, list_splits, read_image
from ldmseg_fast.data.transforms import present_ids
from ldmseg_fast.errors import DataError, PanopticFormatError
from ldmseg_fast.files import read_file
from ldmseg_fast.panoptic.format import MAX_ID, read_panoptic_png

__all__ = ["Problem", "Report", "check_folder"]

_MAP_KINDS = {"P": "palette map", "RGBA": "RGBA map", "L": "grey map", "LA": "grey map", "1": "grey map"}
_NAMED = 20  # problems that a table spells out


@dataclass(frozen=True)
class Problem:
    """Describes one problem.

    Attributes:
        kind: the row of the table it counts for.
        where: file or annotation.
        detail: the values.
    """

    kind: str
    where: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}" + (f" ({self.detail})" if self.detail else "")


@dataclass
class Report:
    """Holds the result of `check_folder`.

    Attributes:
        root: the folder.
        checked: maps looked at, by split.
        problems: what was found.
    """

    root: str
    checked: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Tells whether there is no problem."""
        return not self.problems

    def counts(self) -> dict[str, int]:
        """Counts the problems by kind, the most frequent first."""
        return dict(Counter(problem.kind for problem in self.problems).most_common())

    def table(self) -> str:
        """Formats maps by split, problems by kind, and the first twenty problems by name."""
        rows = [(f"maps in {split}", count) for split, count in self.checked.items()]
        rows += list(self.counts().items()) or [("problems", 0)]
        width = max(len(name) for name, _ in rows)
        lines = [self.root, *(f"  {name:<{width}}  {count:>8}" for name, count in rows)]
        lines += [f"  - {problem}" for problem in self.problems[:_NAMED]]
        if len(self.problems) > _NAMED:
            lines.append(f"  ... and {len(self.problems) - _NAMED} more")
        return "\n".join(lines)


def check_folder(root: str | os.PathLike, workers: int | None = None) -> Report:
    """Reads every picture and map of every ROOT/annotations/panoptic_*.json and compares them with the JSON.

    `workers` processes (default: one per core) decode; the report does not depend on their number. What is wrong is in
    the report.

    Raises:
        DataError: ROOT is no folder.
    """
    splits = list_splits(root)
    report = Report(str(root))
    if not splits:
        missing = Path(root) / "annotations" / "panoptic_*.json"
        report.problems.append(Problem("no annotations", str(missing), "a COCO-panoptic folder has one for each split"))
    for split in splits:
        try:
            folders = find_split(root, split)
        except DataError as error:
            report.problems.append(Problem("missing folder", split, str(error)))
            continue
        content, problems = _read_json(folders.annotations)
        report.problems += problems
        if content is not None:
            jobs, problems = _check_json(folders.annotations, content)
            report.problems += problems
            report.checked[split] = len(jobs)
            report.problems += _check_files(folders, split, jobs, workers or os.cpu_count() or 1)
    return report


@dataclass(frozen=True)
class _Job:
    """Describes one annotated map: file names, size by the JSON (None: not given), segment ids by the JSON."""

    picture: str | None
    map: str
    size: tuple[int, int] | None
    segment_ids: tuple[int, ...]


def _read_json(path: Path) -> tuple[dict | None, list[Problem]]:
    try:
        content = json.loads(read_file(path))
    except (OSError, ValueError) as error:
        return None, [Problem("unreadable JSON", str(path), str(error))]
    lists = ("images", "annotations", "categories")
    wrong = [
        key
        for key in lists
        if not isinstance(content, dict)
        or not isinstance(content.get(key), list)
        or not all(isinstance(entry, dict) for entry in content[key])
    ]
    if wrong:
        return None, [Problem("unreadable JSON", str(path), f"no list of objects under {', '.join(wrong)}")]
    if not content["annotations"]:
        return None, [Problem("empty split", str(path), "no annotations")]
    return content, []


def _check_json(path: Path, content: dict[str, Any]) -> tuple[list[_Job], list[Problem]]:
    """Checks what the JSON alone tells. Several annotations may share a picture's file name, but nothing else."""
    where = path.name
    problems = [
        *_repeated("duplicated image id", where, (image.get("id") for image in content["images"])),
        *_repeated("duplicated category id", where, (category.get("id") for category in content["categories"])),
        *_repeated("duplicated annotation", where, (entry.get("image_id") for entry in content["annotations"])),
        *_repeated("duplicated map name", where, (entry.get("file_name") for entry in content["annotations"])),
    ]
    images = {str(image.get("id")): image for image in content["images"]}
    categories = {str(category.get("id")) for category in content["categories"]}
    jobs = []
    for entry in content["annotations"]:
        image = images.get(str(entry.get("image_id")))
        here = f"{where}: image {entry.get('image_id')!r}"
        if image is None:
            problems.append(Problem("annotation without image", here))
        segments = entry.get("segments_info")
        name, picture = entry.get("file_name"), (image or {}).get("file_name")
        if not isinstance(name, str) or not name or not isinstance(segments, list):
            problems.append(Problem("incomplete annotation", here, "file_name and segments_info expected"))
            continue
        if image is not None and not isinstance(picture, str):
            problems.append(Problem("image without file name", here))
        segment_ids = [segment.get("id") if isinstance(segment, dict) else None for segment in segments]
        problems += [
            Problem("segment id outside 1..2^24-1", here, repr(segment_id))
            for segment_id in segment_ids
            if type(segment_id) is not int or not 1 <= segment_id <= MAX_ID
        ]
        problems += _repeated("duplicated segment id", here, segment_ids)
        problems += [
            Problem("unknown category id", here, repr(segment.get("category_id")))
            for segment in segments
            if isinstance(segment, dict) and str(segment.get("category_id")) not in categories
        ]
        size = ((image or {}).get("height"), (image or {}).get("width"))
        jobs.append(
            _Job(
                picture if isinstance(picture, str) else None,
                name,
                size if None not in size else None,  # type: ignore[arg-type]
                tuple(segment_id for segment_id in segment_ids if type(segment_id) is int),
            )
        )
    return jobs, problems


def _repeated(kind: str, where: str, values: Iterable) -> list[Problem]:
    return [Problem(kind, where, f"{value} x{n}") for value, n in Counter(map(repr, values)).items() if n > 1]


def _check_files(folders: SplitFolders, split: str, jobs: list[_Job], workers: int) -> list[Problem]:
    check = partial(_check_job, folders)
    progress = partial(tqdm, total=len(jobs), desc=f"check {split}", unit="map", disable=None)
    if workers <= 1 or len(jobs) < 200:  # for fewer, processes take longer to start than they save
        return [problem for found in progress(map(check, jobs)) for problem in found]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return [problem for found in progress(pool.map(check, jobs, chunksize=16)) for problem in found]


def _check_job(folders: SplitFolders, job: _Job) -> list[Problem]:
    problems, sizes = [], {"JSON": job.size}
    if job.picture is not None:
        path = folders.images / job.picture
        if path.is_file():
            try:
                sizes["picture"] = read_image(path).shape[:2]  # type: ignore[assignment]
            except DataError as error:
                problems.append(Problem("unreadable picture", str(path), str(error).removeprefix(f"{path}: ")))
        else:
            problems.append(Problem("missing picture", str(path)))
    path = folders.maps / job.map
    if not path.is_file():
        return [*problems, Problem("missing map", str(path))]
    try:
        ids = read_panoptic_png(path)
    except (PanopticFormatError, OSError) as error:
        return [*problems, Problem(_map_kind(path), str(path), str(error).removeprefix(f"{path}: "))]
    sizes["map"] = ids.shape  # type: ignore[assignment]
    known = {name: tuple(size) for name, size in sizes.items() if size is not None}
    if len(set(known.values())) > 1:
        detail = ", ".join(f"{name} {width}x{height}" for name, (height, width) in known.items())
        problems.append(Problem("sizes differ", str(path), detail))
    in_map, in_json = set(present_ids(ids).tolist()) - {0}, set(job.segment_ids)
    for kind, ids_only in (("id in map, not in JSON", in_map - in_json), ("id in JSON, not in map", in_json - in_map)):
        if ids_only:
            problems.append(Problem(kind, str(path), ", ".join(map(str, sorted(ids_only)[:5]))))
    return problems


def _map_kind(path: Path) -> str:
    """Tells why a map cannot be read, as far as its header says."""
    try:
        with Image.open(io.BytesIO(read_file(path))) as image:
            return _MAP_KINDS.get(image.mode, "unreadable map")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return "unreadable map"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("root")


def run(args: argparse.Namespace) -> int:
    """Prints the report and returns 1 where something is wrong with the folder."""
    report = check_folder(args.root)
    print(report.table())
    return 0 if report.ok else 1
