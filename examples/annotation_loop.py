"""Goes once through the loop of annotators: predict, correct in a tool, import, complete what is not drawn, train.

python examples/annotation_loop.py OUT [PICTURES] [key=value ...]

Generated scenes stand for pictures, and `annotate` for the person who works in Label Studio. Settings behind the number
of pictures go to the training. docs/annotation.md tells the same with commands.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldmseg_fast import LDMSegPipeline, cli, train
from ldmseg_fast.data.scenes import write_scenes
from ldmseg_fast.formats import coco_panoptic_reader, coco_panoptic_writer
from ldmseg_fast.formats.brush import decode, encode
from ldmseg_fast.formats.data_set import AnnotatedMap, DataSet, Entry
from ldmseg_fast.formats.options import ReadOptions
from ldmseg_fast.panoptic.format import read_panoptic_png

# seconds of training, gentle enough to keep what the model knows; leave them out for a real one
SHORT = [
    "train.steps=20",
    "train.batch_size=8",
    "train.learning_rate=0.00005",
    "train.warmup=5",
    "train.compile=none",
    "postprocess.mask_threshold=0.1",
]


def main(out: Path, count: int, settings: list[str]) -> None:
    scenes = write_scenes(out / "scenes", count, 64, 0)

    # 1. Predict, and write the maps as pre-annotations: predicted/label-studio/predicted.json has the tasks of a
    #    project, labels.xml its labelling interface.
    pictures = scenes / "train2017"
    run("predict", "tiny", pictures, "--out", out / "predicted", "--format", "label-studio")

    # 2. A person corrects them. The project's export, as JSON, lies beside the pictures.
    (out / "export").mkdir()
    (out / "export" / "pictures").symlink_to(pictures.resolve())
    tasks = json.loads((out / "predicted" / "label-studio" / "predicted.json").read_text(encoding="utf-8"))
    for number, task in enumerate(tasks, 1):
        annotate(task, number, scenes)
    (out / "export" / "train2017.json").write_text(json.dumps(tasks), encoding="utf-8")

    # 3. Import what was drawn. What nobody drew is void.
    run("data", "import", "label-studio", out / "export", out / "drawn")

    # 4. Complete the maps: what was drawn stays exactly as it is.
    drawn = coco_panoptic_reader.read(out / "drawn", ReadOptions())
    truth = coco_panoptic_reader.read(scenes, ReadOptions(splits=("val2017",)))
    first = drawn.categories[0]["id"]
    splits = {
        "train2017": complete(drawn.splits["train2017"], first),
        "val2017": [replace(entry, read=partial(alike, entry, first)) for entry in truth.splits["val2017"]],
    }
    coco_panoptic_writer.write(DataSet(drawn.categories, splits), out / "data")
    run("data", "check", out / "data")

    # 5. Train on, and measure on scenes that the model has not seen.
    where = [f"data.root={out / 'data'}", f"output_dir={out / 'model'}", "model.init_from=tiny"]
    if code := train.main(["one_step", "--config", "tiny", *where, *SHORT, *settings]):
        sys.exit(code)
    for model in ("tiny", out / "model"):
        run("evaluate", model, "--data", out / "data")


def run(*words: object) -> None:
    """Runs a command of `ldmseg` in this process."""
    print("\n$ ldmseg", *words, flush=True)
    if code := cli.main([str(word) for word in words]):
        sys.exit(code)


def annotate(task: dict[str, Any], number: int, scenes: Path) -> None:
    """Does what a person does with a pre-annotation: mends outlines that are nearly right and deletes the others.

    Objects that no prediction has found are left for later.
    """
    name = Path(task["data"]["image"]).name
    truth = read_panoptic_png(scenes / "panoptic_train2017" / name)
    kept: dict[int, dict[str, Any]] = {}
    for region in [region for prediction in task.pop("predictions") for region in prediction["result"]]:
        mask = decode(region["value"]["rle"], *truth.shape, name)
        inside, areas = np.unique(truth[mask], return_counts=True)
        best = int(inside[areas.argmax()])
        overlap = (mask & (truth == best)).sum() / (mask | (truth == best)).sum()
        if best != 0 and overlap > 0.5:
            region["value"]["rle"] = encode(truth == best)
            kept[best] = region
    task["id"] = number
    task["annotations"] = [{"id": number, "was_cancelled": False, "result": list(kept.values())}]


def complete(entries: Sequence[Entry], category_id: int) -> list[Entry]:
    """Completes maps of which a part is drawn; pictures in which nothing is drawn are left out.

    What is drawn stays as it is, with its category; what the model adds is of the category `category_id`.
    """
    pipe = LDMSegPipeline.from_pretrained("tiny")
    maps = [(entry, entry.read()) for entry in entries]
    maps = [(entry, each) for entry, each in maps if each.ids.any()]
    pictures = [np.asarray(Image.open(entry.picture).convert("RGB")) for entry, _ in maps]
    ids = [each.ids for _, each in maps]
    completed = []
    for (entry, each), result in zip(maps, pipe.inpaint(pictures, ids, [each != 0 for each in ids])):
        assert (result.segmentation == each.ids)[each.ids != 0].all()
        categories = {segment["id"]: segment["category_id"] for segment in each.segments}
        segments = [
            {"id": segment["id"], "category_id": categories.get(segment["id"], category_id), "iscrowd": 0}
            for segment in result.segments_info
        ]
        whole = AnnotatedMap(result.segmentation, sorted(segments, key=lambda segment: segment["id"]))
        completed.append(replace(entry, read=partial(lambda whole: whole, whole), sources=()))
    share = 100 * np.mean([(each != 0).mean() for each in ids])
    print(f"{len(completed)} of {len(entries)} maps have something drawn, {share:.0f} % of their pixels; completed")
    return completed


def alike(entry: Entry, category_id: int) -> AnnotatedMap:
    """Reads a map and gives all its segments one category, as the model does."""
    each = entry.read()
    return replace(each, segments=[{**segment, "category_id": category_id} for segment in each.segments])


if __name__ == "__main__":
    numbers = [word for word in sys.argv[2:] if word.isdecimal()]
    main(Path(sys.argv[1]), int(numbers[0]) if numbers else 48, [word for word in sys.argv[2:] if "=" in word])
