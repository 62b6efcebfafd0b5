"""Several trainings of one recipe, which differ by their seed: quality as their mean and deviation.

The seeds of a sampler's noise say nothing about how far two trainings lie apart.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from statistics import stdev
from typing import Any

from benchmarks.peers.annotators import MEANS, SUMS, means

Row = dict[str, Any]
TIMES = ("cpu_minutes", "cpu_minutes_in_all")  # of models whose training left a log


def mean_over_trainings(rows: Sequence[Row]) -> list[Row]:
    """Joins rows of one variant and case whose `weights` differ, in the order in which they first come.

    A joined row's case says how many `trainings` there were, and `by_training` has their values; its `deviation` is
    that of a sample. Of rows that differ in nothing the first stays. The `weights` of a run at one of several times
    (`training_steps`) are left out: those of another time would supersede them.
    """
    groups: dict[str, dict[str, Row]] = {}
    for row in rows:
        where = json.dumps([row["variant"], row["case"]], sort_keys=True)
        groups.setdefault(where, {}).setdefault(row.get("weights", ""), row)
    joined = (_joined(list(group.values())) for group in groups.values())
    return [
        {key: value for key, value in row.items() if key != "weights" or "training_steps" not in row["case"]}
        for row in joined
    ]


def _joined(group: list[Row]) -> Row:
    if len(group) == 1:
        return group[0]
    values = [row["value"] for row in group]
    kept = {key: value for key, value in group[0].items() if key not in ("weights", "by_annotator", *TIMES)}
    row = kept | means(group, (*MEANS, *SUMS, *TIMES)) | {"case": kept["case"] | {"trainings": len(group)}}
    return row | {"deviation": stdev(values), "by_training": values}
