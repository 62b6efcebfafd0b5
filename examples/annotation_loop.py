"""Goes once through the loop of annotators: predict, correct in a tool, import, complete what is not drawn, train.

python examples/annotation_loop.py OUT [PICTURES] [key=value ...]

Generated scenes stand for pictures, and `annotate` for the person who works in Label Studio. Settings behind the number
of pictures go to the training. docs/annotation.md tells the same with commands.
"""

from __future__ import annotations

import json
import shutil
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

    # 2. A person corrects them. The project's export, as JSON, lies beside the pictures, and beside the list of
    #    categories, which says what is stuff.
    (out / "export").mkdir()
    (out / "export" / "pictures").symlink_to(pictures.resolve())
    predicted = out / "predicted" / "label-studio"
    shutil.copy(predicted / "categories.json", out / "export")
    tasks = json.loads((predicted / "predicted.json").read_text(encoding="utf-8"))
    true_maps = coco_panoptic_reader.read(scenes, ReadOptions())
    for number, task in enumerate(tasks, 1):
        annotate(task, number, true_maps)
    (out / "export" / "train2017.json").write_text(json.dumps(tasks), encoding="utf-8")

    # 3. Import what was drawn. What nobody drew is void.
    run("data", "import", "label-studio", out / "export", out / "drawn")

    # 4. Complete the maps: what was drawn stays exactly as it is.
    drawn = coco_panoptic_reader.read(out / "drawn", ReadOptions())
    names = {each["id"]: each["name"] for each in true_maps.categories}
    pipe = LDMSegPipeline.from_pretrained("tiny")
    categories = pipe.info.categories.to_coco()
    numbers = {each["name"]: each["id"] for each in categories}
    renamed = {number: numbers[name] for number, name in names.items()}
    splits = {
        "train2017": complete(pipe, drawn.splits["train2017"]),
        "val2017": [replace(entry, read=partial(renumbered, entry, renamed)) for entry in true_maps.splits["val2017"]],
    }
    coco_panoptic_writer.write(DataSet(categories, splits), out / "data")
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


def annotate(task: dict[str, Any], number: int, true_maps: DataSet) -> None:
    """Does what a person does with a pre-annotation: mends outlines that are nearly right and deletes the others.

    Mended segments get their true label too. Objects that no prediction has found are left for later.
    """
    names = {each["id"]: each["name"] for each in true_maps.categories}
    name = Path(task["data"]["image"]).name
    true_map = next(entry for entry in true_maps.splits["train2017"] if Path(entry.picture).name == name).read()
    truth = true_map.ids
    labels = {segment["id"]: names[segment["category_id"]] for segment in true_map.segments}
    kept: dict[int, dict[str, Any]] = {}
    for region in [region for prediction in task.pop("predictions") for region in prediction["result"]]:
        mask = decode(region["value"]["rle"], *truth.shape, name)
        inside, areas = np.unique(truth[mask], return_counts=True)
        best = int(inside[areas.argmax()])
        overlap = (mask & (truth == best)).sum() / (mask | (truth == best)).sum()
        if best != 0 and overlap > 0.5:
            region["value"]["rle"] = encode(truth == best)
            region["value"]["brushlabels"] = [labels[best]]
            kept[best] = region
    task["id"] = number
    task["annotations"] = [{"id": number, "was_cancelled": False, "result": list(kept.values())}]


def complete(pipe: LDMSegPipeline, entries: Sequence[Entry]) -> list[Entry]:
    """Completes maps of which a part is drawn; pictures in which nothing is drawn are left out.

    What is drawn stays as it is, with its category; what the model adds has the category that it finds.
    """
    maps = [(entry, entry.read()) for entry in entries]
    maps = [(entry, each) for entry, each in maps if each.ids.any()]
    pictures = [np.asarray(Image.open(entry.picture).convert("RGB")) for entry, _ in maps]
    ids = [each.ids for _, each in maps]
    completed = []
    given = [each.segments for _, each in maps]
    results = pipe.inpaint(pictures, ids, [each != 0 for each in ids], segments_info=given)
    for (entry, each), result in zip(maps, results):
        assert (result.segmentation == each.ids)[each.ids != 0].all()
        segments = [
            {"id": segment["id"], "category_id": segment["category_id"], "iscrowd": 0}
            for segment in result.segments_info
        ]
        whole = AnnotatedMap(result.segmentation, sorted(segments, key=lambda segment: segment["id"]))
        completed.append(replace(entry, read=partial(lambda whole: whole, whole), sources=()))
    share = 100 * np.mean([(each != 0).mean() for each in ids])
    print(f"{len(completed)} of {len(entries)} maps have something drawn, {share:.0f} % of their pixels; completed")
    return completed


def renumbered(entry: Entry, numbers: dict[int, int]) -> AnnotatedMap:
    """Reads a map and gives its categories the numbers that another list has for them."""
    each = entry.read()
    segments = [{**segment, "category_id": numbers[segment["category_id"]]} for segment in each.segments]
    return replace(each, segments=segments)


if __name__ == "__main__":
    numbers = [word for word in sys.argv[2:] if word.isdecimal()]
    main(Path(sys.argv[1]), int(numbers[0]) if numbers else 48, [word for word in sys.argv[2:] if "=" in word])
