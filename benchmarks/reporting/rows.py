"""Finds the rows of the result files that are current, and the files of which none is.

A row is current until a newer full run of its suite measures its subject again; then all older rows of that subject
go, whatever their variants and cases. The subject of a row is

- its name up to the first comma or bracket, whatever the numbers in it: what one function of a benchmark measures
  ("growth, peak memory" is of "growth", and "10 steps" is of "4 steps"), of one model where the case names it, and
  on CPUs with VNNI or on those without where it says so;
- in the suite "quality" a model, or a baseline, on the same images in the same way, whatever the steps, thresholds and
  number of trainings;
- in the suite "instructions" a function as one version of Triton compiles it;
- in the suite "soak" a test; a whole campaign, which has the row "tests", replaces all rows.

A release that a better one has replaced has no rows (`WITHDRAWN`).

A model has one set of weights: where a newer run measured the same name with other weights, the older rows of that name
go on all data.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"

Row = dict[str, Any]
# what a run of one subject may vary, beside what it is: steps, thresholds, and of how many annotators or trainings it
# is the mean
VARIED = ("steps", "annotators", "trainings", "mask_threshold", "overlap_threshold")
# what makes equal names of other suites two subjects, where the case has it
APART = ("model", "vnni")

WITHDRAWN = {"tiny-photographs"}  # variants of the suite "quality"
WHOLE = "tests"  # the row of a whole campaign of long tests


def subject(suite: str, row: Row) -> str:
    """Returns what a row, with its run's `environment`, measures: rows of one subject are replaced together."""
    if suite == "soak":
        return str(row["name"])
    if suite == "instructions":
        return json.dumps([row["name"], triton_version(row)])
    if suite != "quality":
        name = re.sub(r"\d+", "#", re.split(r"[,\[]", row["name"])[0].strip())
        apart = [row["case"][key] for key in APART if key in row["case"]]
        return json.dumps([name, *apart])
    case = {key: value for key, value in row["case"].items() if key not in VARIED}
    return json.dumps([row["name"], row["variant"], case, row.get("unit")], sort_keys=True)


def triton_version(row: Row) -> str:
    """Returns the version of Triton that a row's run had; "?" where it does not say."""
    return str(row["environment"]["packages"].get("triton", "?"))


def load_rows(suite: str, folder: Path = RESULTS) -> list[Row]:
    """Returns the current rows of a suite, oldest first.

    Runs with `--quick` are no results. A red row holds no number: it ends what older runs say of its subject. Each row
    also has its run's `environment` and the name of its `file`.
    """
    rows: list[Row] = []
    for path in sorted(folder.glob(f"{suite}-*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["quick"]:
            continue
        new = [row | {"environment": record["environment"], "file": path.name} for row in record["results"]]
        renewed = {subject(suite, row) for row in new}
        if suite == "soak" and WHOLE in renewed:
            rows = []
        weights = {row["variant"]: row["weights"] for row in new if "weights" in row}
        new = [row for row in new if row.get("variant") not in WITHDRAWN]
        kept = [row for row in rows if subject(suite, row) not in renewed and not _other_weights(row, weights)]
        rows = kept + [row for row in new if "red" not in row]
    return rows


def _other_weights(row: Row, weights: dict[str, str]) -> bool:
    """Whether `weights`, by the names of models, has the row's model with weights that the row does not name."""
    name = row["variant"]
    return name in weights and row.get("weights") != weights[name]


def superseded_files(folder: Path = RESULTS) -> list[Path]:
    """Returns the result files that no current row comes from; quick runs are among them."""
    files = sorted(folder.glob("*-*.json"))
    suites = {path.name.rpartition("-")[0] for path in files}
    current = {row["file"] for suite in suites for row in load_rows(suite, folder)}
    return [path for path in files if path.name not in current]
