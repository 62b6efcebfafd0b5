"""What one command refuses of a JSON all refuse, and `ldmseg data check` reports it: over changed JSONs."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldmseg_fast.commands.data_check import check_folder
from ldmseg_fast.commands.data_merge import merge_splits
from ldmseg_fast.data.coco_panoptic import CocoPanoptic
from ldmseg_fast.data.latent_cache import picture_files
from ldmseg_fast.errors import UserError
from ldmseg_fast.evaluation.categories import category_source
from ldmseg_fast.evaluation.scores import SegmentationScores
from ldmseg_fast.metrics.annotation_index import index_annotations
from ldmseg_fast.metrics.pq_files import evaluate_files
from ldmseg_fast.panoptic.annotations import check_panoptic_json, load_panoptic_json, stream_panoptic_json
from ldmseg_fast.panoptic.results import PanopticResult
from tests.commands.mutations import mutated


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory):
    """Two sound pictures of 8x12 with four segments each, one of them a crowd, and two categories."""
    from tests.data.conftest import Folder

    folder = Folder(tmp_path_factory.mktemp("one_reader") / "coco")
    folder.content["categories"] = [{"id": 1, "name": "cup", "isthing": 1}, {"id": 5, "name": "desk", "isthing": 0}]
    ids = np.kron(np.array([[70_001, 5], [16_777_215, 900]], np.int32), np.ones((4, 6), np.int32))
    for _ in range(2):
        folder.add(np.zeros((8, 12, 3), np.uint8), ids, "png", crowd=(900,))
    for annotation in folder.content["annotations"]:
        annotation["segments_info"][0]["category_id"] = 5
    folder.save()
    return folder


def outcome(work: Callable[[], Any]) -> str:
    """The message of a refusal, "" where the work was done; any other exception is a fault of ours."""
    try:
        work()
    except UserError as error:
        return str(error) or "refused without a word"
    return ""


def train(root: Path) -> CocoPanoptic:
    dataset = CocoPanoptic(root, "val", 8, train=True, num_slots=8, min_area=0)
    for index in range(len(dataset)):
        dataset[index]
    return dataset


def evaluate_truth(root: Path) -> None:
    """Scores the truth against itself, as `ldmseg evaluate --class-aware GT` does with a model's maps."""
    dataset = CocoPanoptic(root, "val", 8)
    scores = SegmentationScores(category_source("GT", dataset), mean_iou=True, baselines=False)
    for index in range(len(dataset)):
        ids, segments = dataset.ground_truth(index)
        scores.add(index, dataset.describe(index), (ids, segments), PanopticResult(ids, segments))
    scores.report()


def hold_together(folder: Any, raw: bytes) -> str:
    """Tries one JSON with every command; returns "taken", "refused" or "refused, files"."""
    folder.json.write_bytes(raw)
    merged = folder.root.parent / "merged"
    shutil.rmtree(merged, ignore_errors=True)
    _, faults = check_panoptic_json(folder.json)
    kinds = {fault.kind for fault in faults}
    report = check_folder(folder.root, workers=1)
    refusals = {
        "load": outcome(lambda: load_panoptic_json(folder.json)),
        "index": outcome(lambda: index_annotations(folder.json)),
        "data set": outcome(lambda: CocoPanoptic(folder.root, "val", 8)),
        "train": outcome(lambda: train(folder.root)),
        "cache": outcome(lambda: picture_files(CocoPanoptic(folder.root, "val", 8, train=True))),
        "merge": outcome(lambda: merge_splits(merged, [f"{folder.root}:val"], "val")),
        "evaluate": outcome(lambda: evaluate_truth(folder.root)),
        "pq": outcome(lambda: evaluate_files(folder.json, folder.json, num_threads=1)),
    }
    if stream_panoptic_json(folder.json) is not None:
        assert not kinds, "C++ takes what Python refuses"
    assert bool(kinds) == bool(refusals["load"]), "the reader and its list of faults disagree"
    if kinds:
        assert all(refusals.values()), refusals
        assert all(folder.json.name in message for message in refusals.values()), "the file is named"
        assert kinds <= report.counts().keys(), "check reports what is refused"
        return "refused"
    assert refusals["load"] == refusals["index"] == ""
    if report.ok:
        assert not any(refusals.values()), refusals
        assert check_folder(merged, workers=1).ok, "what is merged of a sound folder is sound"
        return "taken"
    assert bool(refusals["data set"]) == bool(refusals["merge"]) == bool(refusals["cache"]), "the same files are missed"
    return "problems"


def test_the_folder_itself_is_taken(pair) -> None:
    assert hold_together(pair, json.dumps(pair.content).encode()) == "taken"


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.randoms(use_true_random=False))
def test_every_command_reads_alike(pair, random: Random) -> None:
    hold_together(pair, mutated(pair.content, random))


@pytest.mark.soak
def test_twenty_thousand_changed_jsons(pair, record_property: Callable[[str, object], None]) -> None:
    counts: Counter[str] = Counter()
    for seed in range(20_000):
        raw = mutated(pair.content, Random(seed))
        try:
            counts[hold_together(pair, raw)] += 1
        except Exception as error:
            pytest.fail(f"seed {seed}: {type(error).__name__}: {error}")
    for name in ("taken", "refused", "problems"):
        record_property(f"jsons_{name}", counts[name])
    record_property("silent_differences", 0)
    assert min(counts[name] for name in ("taken", "refused", "problems")) > 100, counts
