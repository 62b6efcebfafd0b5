"""Makes the table of six numbers that a newcomer wants, each beside its baseline and with its machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measuring.result_file import BenchmarkError
from benchmarks.reporting.rows import RESULTS, Row, load_rows
from benchmarks.reporting.tables import machine, table

HEADER = ["what", "ours", "beside it", "ratio", "measured on"]
CPU = {"model": "tiny", "threads": 1}


@dataclass(frozen=True)
class Headline:
    """Describes one line: a row of ours and the row beside it, out of one result file or two.

    Args:
        what: the line's first cell.
        suite: whose rows are looked through.
        name: the name of both rows.
        case: what both rows' cases must hold.
        variant: of our row.
        beside: variant of the baseline's row.
        beside_is: what the table calls it.
        own_case: what our row's case must hold as well.
    """

    what: str
    suite: str
    name: str
    case: Mapping[str, Any]
    variant: str
    beside: str
    beside_is: str
    own_case: Mapping[str, Any] | None = None


HEADLINE = (
    Headline(
        "PQ on 500 held-out scenes, one step",
        "quality", "PQ", {"data": "scenes20k", "split": "val2017", "images": 500, "mode": "class-agnostic"},
        "tiny", "felzenszwalb", "Felzenszwalb, tuned", {"steps": 1},
    ),
    Headline(
        "one 480x640 picture to its map, one step, one thread",
        "latency", "whole image", CPU | {"size": "480x640", "steps": 1, "batch": 1},
        "torch bfloat16", "diffusers", "plain diffusers",
    ),
    Headline(
        "480x640 files to files, one step",
        "throughput", "images per second", CPU | {"size": "480x640", "steps": 1},
        "torch bfloat16, batch 4, 1 readers", "diffusers, one at a time", "plain diffusers, one at a time",
    ),
    Headline(
        "`ldmseg pq`, from PNG files, an image of 480x640",
        "evaluation", "from files, per image", {"images": 500},
        "ours", "panopticapi's algorithm", "panopticapi's algorithm",
    ),
    Headline(
        "training input, a COCO image at 512x512",
        "data", "items on one core", {"data": "coco_mini", "size": 512},
        "ours", "plain", "Pillow and numpy",
    ),
    Headline(
        "a step of `tiny` under ONNX Runtime, one thread",
        "export", "one step, tiny model", {"batch": 1, "threads": 1},
        "onnxruntime", "torch eager", "eager PyTorch",
    ),
)  # fmt: skip


def headline(folder: Path = RESULTS, lines: Sequence[Headline] = HEADLINE) -> str:
    """Returns the table of `lines`.

    Raises:
        BenchmarkError: a line names a row that no current result file has.
    """
    return table(HEADER, [_cells(line, load_rows(line.suite, folder)) for line in lines])


def _cells(line: Headline, rows: Sequence[Row]) -> list[str]:
    ours = _find(line, rows, line.variant, {**line.case, **(line.own_case or {})})
    theirs = _find(line, rows, line.beside, line.case)
    (value, unit), (other, _) = _number(ours), _number(theirs)
    ratio = other / value if unit == "ms" else value / other
    cells = [f"{value:.3g} {unit}", f"{other:.3g} {unit} ({line.beside_is})", f"{ratio:.1f}x"]
    return [line.what, *cells, machine([ours, theirs])]


def _find(line: Headline, rows: Sequence[Row], variant: str, case: Mapping[str, Any]) -> Row:
    """The newest row of `variant` whose case holds `case`."""
    wanted = [
        row
        for row in rows
        if row["name"] == line.name and row["variant"] == variant and case.items() <= row["case"].items()
    ]
    if not wanted:
        raise BenchmarkError(
            f"headline {line.what!r}: the suite {line.suite!r} has no row {line.name!r} of {variant!r} with {case}; "
            f"measure it (python benchmarks/bench_{line.suite}.py) or change benchmarks/reporting/headline.py"
        )
    return wanted[-1]


def _number(row: Row) -> tuple[float, str]:
    return (row["value"], row["unit"]) if "value" in row else (row["p50"], "ms")
