"""Writes a data set as a COCO-panoptic folder (cocodataset.org/#format-data; `docs/formats.md` has the layout).

A split is built in OUT/.import-SPLIT/ and gets its places in OUT when all of it is there. What a killed import leaves
there is taken over by the next one from the same source.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ldmseg_fast.data.pictures import decode_picture, read_content
from ldmseg_fast.errors import DataError, UserError
from ldmseg_fast.formats.data_set import AnnotatedMap, DataSet
from ldmseg_fast.formats.options import Summary, WriteOptions, faults_text
from ldmseg_fast.formats.places import Place, check_categories, check_split, plan
from ldmseg_fast.formats.split_journal import SplitJournal
from ldmseg_fast.locks import only_writer
from ldmseg_fast.panoptic.format import MAX_SIDE, write_panoptic_png
from ldmseg_fast.panoptic.shapes import segment_shapes
from ldmseg_fast.threads import cores

EMPTY = "pictures without a segment, which stay with an empty map"
TURNED = "EXIF orientations, which do not turn: maps follow the stored pixels"
_AHEAD = 4  # entries in work for each thread


class _Unreadable(Exception):
    """Marks an entry whose source cannot be read; other errors end the import."""


def write(data_set: DataSet, out: str | Path, options: WriteOptions | None = None) -> Summary:
    """Writes every split of a data set: OUT/SPLIT, OUT/panoptic_SPLIT and OUT/annotations/panoptic_SPLIT.json.

    Args:
        data_set: its maps are read by as many threads as there are cores, and its pictures are decoded, as a training
            will do.
        out: may hold other splits.
        options: `copy`, `skip_bad` and `origin` are used.

    Returns:
        What was written and left out.

    Raises:
        DataError: entries that cannot be read, with `skip_bad` only where no other is left; a split that is there
            already; two pictures of one name; an unfinished import of something else. OUT then has no new split. What
            could be read waits for the same command.
        InUseError: another import writes into OUT.
        OSError: a file that cannot be written.
    """
    out, options = Path(out), options or WriteOptions()
    if not data_set.splits:
        raise DataError("the data set has no splits; is this the right folder?")
    check_categories(data_set.categories)
    plans = {}
    for split, entries in data_set.splits.items():
        check_split(split)
        plans[split] = plan(split, entries)
    with only_writer(out, "an import", "or choose another folder"):
        journals = [SplitJournal(out, split, data_set.categories, options) for split in plans]
        for journal in journals:  # all of them before the first is touched
            journal.check()
        return _write(journals, list(plans.values()), data_set, options)


def _write(journals: list[SplitJournal], plans: list[list[Place]], data_set: DataSet, options: WriteOptions) -> Summary:
    faults: list[str] = []
    category_ids = {category["id"] for category in data_set.categories}
    for journal, places in zip(journals, plans):
        with journal.opened():
            faults += _fill(journal, places, category_ids, options)
            journal.keep(place.map for place in places)
    total = sum(map(len, plans))
    empty = next((journal.split for journal in journals if not len(journal)), None)
    if (faults and not options.skip_bad) or empty is not None:
        kept = [str(journal.folder) for journal in journals if journal.clear_empty()]
        cure = f"none is left of split {empty}" if options.skip_bad else "mend them, or leave them out with --skip-bad"
        cure += f"; the same command goes on with what is in {', '.join(kept)}" if kept else ""
        listed = "\n".join(faults_text(tuple(faults)))
        raise DataError(f"{len(faults)} of {total} pictures cannot be imported, so nothing is: {cure}\n{listed}")
    left_out, first = Counter(data_set.left_out), {}
    for journal in journals:
        for name, reasons in journal.left_out():
            left_out.update(reasons)
            first.update({reason: name for reason in reasons if reason not in first})
    files = [path for journal in journals for path in journal.finish()]
    return Summary(
        sum(map(len, journals)),
        sum(journal.segments for journal in journals),
        tuple(files),
        dict(left_out),
        first,
        tuple(faults),
    )


def _fill(journal: SplitJournal, places: Sequence[Place], category_ids: set[int], options: WriteOptions) -> list[str]:
    """Makes the entries that the journal lacks, and returns why some of them could not be made."""
    faults = []
    todo: list[tuple[Place, str]] = []
    states: dict[Path, str] = {}
    for place in places:
        try:
            made_from = place.made_from(states)
        except OSError as error:
            faults.append(_reason(error, place.name))
            journal.drop(place)
            continue
        if not journal.has(place, made_from):
            todo.append((place, made_from))
    jobs = (partial(_made, place, journal, category_ids, options.copy) for place, _ in todo)
    bar = {"total": len(places), "initial": len(places) - len(todo), "desc": f"import {journal.split}"}
    with tqdm(**bar, unit="picture", disable=None) as progress, _in_order(jobs) as results:
        for (place, made_from), result in zip(todo, results):
            try:
                journal.add(place, made_from, result())
            except _Unreadable as error:
                faults.append(str(error))
                journal.drop(place)
            progress.update()
    return faults


@contextmanager
def _in_order(jobs: Iterator[Callable[[], Any]]) -> Iterator[Iterator[Callable[[], Any]]]:
    """Runs jobs in threads, a few ahead, and gives in their order what returns or raises their results."""
    pending: deque[Future] = deque()

    def results() -> Iterator[Callable[[], Any]]:
        for job in jobs:
            pending.append(pool.submit(job))
            if len(pending) >= _AHEAD * threads:
                yield pending.popleft().result
        while pending:
            yield pending.popleft().result

    threads = cores()
    with ThreadPoolExecutor(threads) as pool:
        try:
            yield results()
        finally:
            for future in pending:
                future.cancel()


def _made(place: Place, journal: SplitJournal, category_ids: set[int], copy: bool) -> dict[str, Any]:
    """Makes an entry's files and returns its image, annotation and what was left out.

    Raises:
        _Unreadable: the entry's source.
        OSError: a file that cannot be written.
    """
    entry = place.entry
    try:
        named = entry.picture if isinstance(entry.picture, Path) else place.name
        content = place.content(read_content)
        picture = decode_picture(content, named)
        annotated = entry.read()
        height, width = picture.stored_size
        _check_size(annotated, (height, width))
        if not all(math.isfinite(segment.get("score") or 0) for segment in annotated.segments):
            raise DataError("a score is NaN or infinite; write a number, or leave it out")
    except (UserError, OSError) as error:
        raise _Unreadable(_reason(error, place.name)) from error
    segments = _segments_info(annotated, category_ids, place.name)
    left_out = {reason: count for reason, count in annotated.left_out.items() if count}
    left_out |= {EMPTY: 1} if not segments else {}
    left_out |= {TURNED: 1} if picture.orientation != 1 else {}
    write_panoptic_png(journal.map_path(place), annotated.ids)
    journal.put_picture(place, content, copy)
    return {
        "image": {"id": place.image_id, "file_name": place.name, "height": height, "width": width},
        "annotation": {"image_id": place.image_id, "file_name": place.map, "segments_info": segments},
        "left_out": left_out,
    }


def _check_size(annotated: AnnotatedMap, size: tuple[int, int]) -> None:
    found = annotated.ids.shape
    if found != size:
        cure = "were they made for each other?"
        if found == size[::-1]:
            cure = "was one of them rotated? Maps follow the stored pixels, not the EXIF orientation"
        raise DataError(f"the map is {found[1]}x{found[0]}, its picture {size[1]}x{size[0]}: {cure}")
    if max(size) > MAX_SIDE:
        raise DataError(f"{size[1]}x{size[0]}: sides of at most {MAX_SIDE} pixels are read; cut it into parts")


def _segments_info(annotated: AnnotatedMap, category_ids: set[int], name: str) -> list[dict[str, Any]]:
    """Completes segments with area and box.

    Raises:
        ValueError: the reader has made a map and a list that contradict each other.
    """
    shapes = {shape["id"]: shape for shape in segment_shapes(annotated.ids)}
    if [segment["id"] for segment in annotated.segments] != sorted(shapes):
        raise ValueError(f"{name}: the reader's segments are not those of its map")
    infos = []
    for segment in annotated.segments:
        if segment["category_id"] not in category_ids:
            raise ValueError(f"{name}: the reader's segment {segment['id']} has none of its categories")
        infos.append({**segment, "iscrowd": int(bool(segment.get("iscrowd", 0))), **shapes[segment["id"]]})
    return infos


def _reason(error: Exception, name: str) -> str:
    """Describes why an entry cannot be read, in one line that has its picture's name in it."""
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror or error}"
    return text if name in text else f"{name}: {text}"
