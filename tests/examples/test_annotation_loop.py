"""The loop of annotators runs through, small."""

from __future__ import annotations

import json
import sys

import numpy as np

from ldmseg_fast.panoptic.format import read_panoptic_png
from tests.examples.test_examples import EXAMPLES, SHORT, run


def test_annotation_loop(tmp_path):
    out = tmp_path / "loop"
    short = [setting for setting in SHORT if not setting.startswith("train.batch_size")]
    text = run(sys.executable, EXAMPLES / "annotation_loop.py", out, 6, *short, "train.batch_size=2")
    assert text.count("class-aware on data/val2017") == 2 and "model folder:" in text
    predicted = json.loads((out / "predicted" / "label-studio" / "predicted.json").read_text())
    corrected = json.loads((out / "export" / "train2017.json").read_text())
    assert len(predicted) == len(corrected) == 6
    for before, after in zip(predicted, corrected):
        assert len(after["annotations"][0]["result"]) <= len(before["predictions"][0]["result"])
    whole = 0
    for path in (out / "data" / "panoptic_train2017").iterdir():
        drawn, completed = (
            read_panoptic_png(out / name / "panoptic_train2017" / path.name) for name in ("drawn", "data")
        )
        truth = read_panoptic_png(out / "scenes" / "panoptic_train2017" / path.name)
        assert (completed == drawn)[drawn != 0].all()
        for number in np.unique(drawn[drawn != 0]):  # what was drawn is right to the pixel
            (name,) = np.unique(truth[drawn == number])
            assert ((truth == name) == (drawn == number)).all()
        whole += (completed != 0).sum() > (drawn != 0).sum()
    assert whole > 0
