"""`ldmseg data check` finds what is wrong with a COCO-panoptic folder before a training does."""

import argparse
import multiprocessing
import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ldmseg_fast.commands.options import add_json_argument, print_json
from ldmseg_fast.config.categories import name_of
from ldmseg_fast.data.folders import SplitFolders, find_split, list_splits
from ldmseg_fast.data.pictures import open_checked, read_content, read_picture
from ldmseg_fast.errors import DataError, PanopticFormatError, printable
from ldmseg_fast.panoptic.annotations import check_panoptic_json
from ldmseg_fast.panoptic.format import MAX_PIXELS, read_panoptic_png
from ldmseg_fast.panoptic.near_files import is_file
from ldmseg_fast.panoptic.shapes import segment_shapes

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
        categories: that its JSON lists, by split.
        problems: what was found.
        notes: what is no problem yet.
    """

    root: str
    checked: dict[str, int] = field(default_factory=dict)
    categories: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

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
        rows += [(f"categories of {split}", count) for split, count in self.categories.items()]
        rows += list(self.counts().items()) or [("problems", 0)]
        width = max(len(name) for name, _ in rows)
        lines = [self.root, *(f"  {name:<{width}}  {count:>8}" for name, count in rows)]
        lines += [printable(f"  - {problem}") for problem in self.problems[:_NAMED]]
        if len(self.problems) > _NAMED:
            lines.append(f"  ... and {len(self.problems) - _NAMED} more")
        lines += [printable(f"  note: {note}") for note in self.notes]
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
        jobs, categories, problems = _check_json(folders.annotations)
        report.problems += problems
        if len(categories) > 1:
            report.categories[split] = len(categories)
            report.notes += _without_isthing(folders.annotations.name, categories)
        if jobs:
            report.checked[split] = len(jobs)
            report.problems += _check_files(folders, split, jobs, workers or os.cpu_count() or 1)
    return report


@dataclass(frozen=True)
class _Job:
    """Describes one annotated map: file names, size by the JSON (None: not given), areas of the segment ids by it."""

    picture: str | None
    map: str
    size: tuple[int, int] | None
    areas: dict[int, int | None]  # None: not given


def _check_json(path: Path) -> tuple[list[_Job], list[dict[str, Any]], list[Problem]]:
    """Checks what the JSON alone tells, as every command that reads it does.

    Returns:
        The maps to look at, the categories, and what is wrong.
    """
    where = path.name
    try:
        content, faults = check_panoptic_json(path)
    except (OSError, PanopticFormatError) as error:
        return [], [], [Problem("unreadable JSON", where, str(error))]
    problems = [Problem(fault.kind, where, fault.message) for fault in faults]
    if any(problem.kind == "unreadable JSON" for problem in problems):
        return [], [], problems
    categories = [category for category in content["categories"] if isinstance(category, dict) and "id" in category]
    called = Counter(name for entry in categories if isinstance(name := name_of(entry), str))
    problems += [
        Problem("duplicated category name", where, f"{n!r:.80} x{count}") for n, count in called.items() if count > 1
    ]
    names = Counter(name for entry in content["annotations"] if isinstance(name := entry.get("file_name"), str))
    repeated = ((name, count) for name, count in names.items() if count > 1)
    problems += [Problem("duplicated map name", where, f"{name!r} x{count}") for name, count in repeated]
    images = {image["id"]: image for image in content["images"] if isinstance(image.get("id"), int | str)}
    jobs = []
    for entry in content["annotations"]:
        name, segments, image_id = entry.get("file_name"), entry.get("segments_info"), entry.get("image_id")
        if not isinstance(name, str) or not name or not isinstance(segments, list):
            continue
        image = images.get(image_id, {}) if isinstance(image_id, int | str) else {}
        picture = image.get("file_name")
        height, width = (_whole(image.get(key)) for key in ("height", "width"))
        jobs.append(
            _Job(
                picture if isinstance(picture, str) and picture else None,
                name,
                None if height is None or width is None else (height, width),
                {s["id"]: _whole(s.get("area")) for s in segments if isinstance(s, dict) and type(s.get("id")) is int},
            )
        )
    return jobs, categories, problems


def _without_isthing(where: str, categories: list[dict[str, Any]]) -> list[str]:
    """Notes categories without `isthing`: things, to what counts segments, and an error to a model with categories."""
    lacking = [f"{name_of(category)!s:.60}" for category in categories if "isthing" not in category]
    what = f"{where}: {len(lacking)} of {len(categories)} categories have no isthing ({', '.join(lacking[:5])})"
    return [f"{what}; a model with categories needs it"] if lacking else []


def _whole(value: Any) -> int | None:
    return int(value) if type(value) is int or (type(value) is float and value.is_integer()) else None


def _check_files(folders: SplitFolders, split: str, jobs: list[_Job], workers: int) -> list[Problem]:
    check = partial(_check_job, folders)
    progress = partial(tqdm, total=len(jobs), desc=f"check {split}", unit="map", disable=None)
    if workers <= 1 or len(jobs) < 200:  # for fewer, processes take longer to start than they save
        problems = [problem for found in progress(map(check, jobs)) for problem in found]
    else:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            problems = [problem for found in progress(pool.map(check, jobs, chunksize=16)) for problem in found]
    near = dict(zip(("missing picture", "missing map"), folders.near_files()))
    return [
        replace(problem, detail=near[problem.kind].nearest(problem.detail)) if problem.kind in near else problem
        for problem in problems
    ]


def _check_job(folders: SplitFolders, job: _Job) -> list[Problem]:
    """Looks at one picture and map. The detail of a missing file's problem is its name by the JSON."""
    problems, sizes = [], {"JSON": job.size}
    if job.picture is not None:
        path = folders.images / job.picture
        if is_file(path):
            try:
                picture = read_picture(path)
                sizes["picture"] = picture.stored_size
                problems += _orientation_problems(path, picture.orientation)
            except DataError as error:
                problems.append(Problem("unreadable picture", str(path), str(error).removeprefix(f"{path}: ")))
        else:
            problems.append(Problem("missing picture", str(path), job.picture))
    path = folders.maps / job.map
    if not is_file(path):
        return [*problems, Problem("missing map", str(path), job.map)]
    try:
        ids = read_panoptic_png(path)
    except (PanopticFormatError, OSError) as error:
        return [*problems, Problem(_map_kind(path), str(path), str(error).removeprefix(f"{path}: "))]
    sizes["map"] = ids.shape  # type: ignore[assignment]
    known = {name: tuple(size) for name, size in sizes.items() if size is not None}
    fits = len(set(known.values())) == 1  # else the areas differ, too
    if not fits:
        detail = ", ".join(f"{name} {width}x{height}" for name, (height, width) in known.items())
        problems.append(Problem("sizes differ", str(path), detail))
    in_map = {shape["id"]: shape["area"] for shape in segment_shapes(ids)}
    for kind, ids_only in (
        ("id in map, not in JSON", in_map.keys() - job.areas.keys()),
        ("id in JSON, not in map", job.areas.keys() - in_map.keys()),
    ):
        if ids_only:
            problems.append(Problem(kind, str(path), _counted(sorted(ids_only), "ids")))
    wrong = [
        f"segment {segment_id}: {area} pixels by the JSON, {in_map[segment_id]} in the map"
        for segment_id, area in job.areas.items()
        if fits and area is not None and in_map.get(segment_id, area) != area
    ]
    if wrong:
        problems.append(Problem("area differs from the map's", str(path), _counted(wrong, "segments")))
    return problems


def _counted(values: list[Any], what: str, named: int = 5) -> str:
    """Lists the first values, and says how many there are where there are several."""
    listed = ", ".join(map(str, values[:named])) + (", ..." if len(values) > named else "")
    return listed if len(values) == 1 else f"{len(values)} {what}: {listed}"


def _orientation_problems(path: Path, orientation: int) -> list[Problem]:
    """Reports an EXIF orientation: viewers turn such a picture, and maps follow the stored pixels."""
    if orientation == 1:
        return []
    detail = f"{orientation}, and maps follow the stored pixels: was the map drawn on the picture as viewers turn it?"
    return [Problem("EXIF orientation that is not 1", str(path), detail)]


def _map_kind(path: Path) -> str:
    """Tells why a map cannot be read, as far as its header says."""
    try:
        with open_checked(path, read_content(path), MAX_PIXELS) as image:
            return _MAP_KINDS.get(image.mode, "unreadable map")
    except DataError:
        return "unreadable map"


EXAMPLES = (
    "ldmseg data check scenes",
    "ldmseg data check COCO --json > problems.json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("root", help="COCO-panoptic folder")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the report and returns 1 where something is wrong with the folder."""
    report = check_folder(args.root)
    if args.json:
        print_json(asdict(report) | {"ok": report.ok, "counts": report.counts()})
    else:
        print(report.table())
    return 0 if report.ok else 1
