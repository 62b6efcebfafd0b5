"""Wraps what people use to score panoptic maps as functions to be timed, and times the floor under them."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

os.environ.setdefault("RAYON_NUM_THREADS", "1")  # hotcoco; read when it is first used

import numpy as np
import torch

from benchmarks.measuring.panoptic_maps import CATEGORIES, PanopticMaps
from benchmarks.measuring.timing import measure
from benchmarks.peers.plain_pq import evaluate_like_panopticapi
from ldmseg_fast.metrics.pq_files import evaluate_files


def file_scorers(data: PanopticMaps, boundary: bool) -> dict[str, Callable[[Path, Path], float]]:
    """Returns functions from ground truth and prediction JSON to PQ, one thread each, of what can be imported."""
    folders = data.folder / "gt", data.folder / "pred"

    def ours(gt: Path, pred: Path) -> float:
        return evaluate_files(gt, pred, *folders, num_threads=1, boundary=boundary, replicates=0)["All"]["pq"]

    def plain(gt: Path, pred: Path) -> float:
        return evaluate_like_panopticapi(gt, pred, *folders)["pq"]

    scorers: dict[str, Callable[[Path, Path], float]] = {"ours": ours, "panopticapi's algorithm": plain}
    if (hotcoco := _optional("hotcoco.panoptic")) is not None:

        def theirs(gt: Path, pred: Path) -> float:
            with redirect_stdout(StringIO()):
                return hotcoco.pq_compute(str(gt), str(pred), *map(str, folders))["All"]["pq"]

        scorers["hotcoco"] = theirs
    if (panopticapi := _optional("panopticapi.evaluation")) is not None:

        def one_core(gt: Path, pred: Path) -> float:
            gt_file, pred_file = json.loads(gt.read_text()), json.loads(pred.read_text())
            predicted = {entry["image_id"]: entry for entry in pred_file["annotations"]}
            pairs = [(entry, predicted[entry["image_id"]]) for entry in gt_file["annotations"]]
            categories = {entry["id"]: entry for entry in gt_file["categories"]}
            with redirect_stdout(StringIO()):
                stat = panopticapi.pq_compute_single_core(0, pairs, *map(str, folders), categories)
            return stat.pq_average(categories, isthing=None)[0]["pq"]

        scorers["panopticapi"] = one_core
    return scorers


def mask_scorers() -> dict[str, Callable[[Path, Path], float]]:
    """Returns functions from COCO instances and results with run lengths to PQ, one thread each."""

    def ours(gt: Path, pred: Path) -> float:
        return evaluate_files(gt, pred, num_threads=1, replicates=0)["All"]["pq"]

    scorers: dict[str, Callable[[Path, Path], float]] = {"ours": ours}
    if (hotcoco := _optional("hotcoco")) is not None and (panoptic := _optional("hotcoco.panoptic")) is not None:

        def theirs(gt: Path, pred: Path) -> float:
            with redirect_stdout(StringIO()):
                truth = hotcoco.COCO(str(gt))
                evaluation = panoptic.PanopticEval(truth, truth.load_res(str(pred)))
                evaluation.run()
                return evaluation.results()["All"]["pq"]

        scorers["hotcoco"] = theirs
    return scorers


def _optional(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def torchmetrics_update(gt: np.ndarray, _gt: Any, pred: np.ndarray, _pred: Any) -> Callable[[], Any] | None:
    """Returns its update on one pair, already as (category, instance) tensors; None where it is not installed.

    It knows no crowds, so it is only timed.
    """
    try:
        from torchmetrics.detection import PanopticQuality
    except ImportError:
        return None
    void = 100
    things = {entry["id"] for entry in CATEGORIES if entry["isthing"]}
    stuff = {entry["id"] for entry in CATEGORIES} - things | {void}
    metric = PanopticQuality(things, stuff, allow_unknown_preds_category=True)
    pair = [torch.from_numpy(np.stack([np.where(ids, ids % 10 + 1, void), ids], -1))[None] for ids in (pred, gt)]
    return lambda: metric.update(*pair)


def inflate_alone(data: PanopticMaps, images: int, rounds: int) -> float | None:
    """Returns the milliseconds that libdeflate takes to inflate a pair of maps; None where it is not installed."""
    try:
        import deflate
    except ImportError:
        return None
    streams = []
    for kind in ("gt", "pred"):
        for entry in data.entries[kind][:images]:
            content = (data.folder / kind / entry["file_name"]).read_bytes()
            width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
            streams.append((_image_data(content), height * (1 + 3 * width)))

    def inflate() -> None:
        for stream, size in streams:
            deflate.zlib_decompress(stream, size)

    return measure({"": inflate}, rounds=rounds)[""].median / (len(streams) / 2)


def _image_data(png: bytes) -> bytes:
    parts, at = [], 8
    while at < len(png):
        length = int.from_bytes(png[at : at + 4], "big")
        if png[at + 4 : at + 8] == b"IDAT":
            parts.append(png[at + 8 : at + 8 + length])
        at += 12 + length
    return b"".join(parts)
