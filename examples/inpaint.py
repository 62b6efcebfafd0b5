"""Hides the middle of a panoptic map, lets a model complete it, and says how much of it came back.

python examples/inpaint.py PICTURE MAP OUT [MODEL_DIR]
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from ldmseg_fast import LDMSegPipeline
from ldmseg_fast.panoptic.format import read_panoptic_png, write_panoptic_png

picture, truth_file, out = map(Path, sys.argv[1:4])
pipe = LDMSegPipeline.from_pretrained(sys.argv[4] if len(sys.argv) > 4 else "tiny")

image = np.asarray(Image.open(picture).convert("RGB"))  # uint8 [H, W, 3]
truth = read_panoptic_png(truth_file)  # int32 [H, W]
height, width = truth.shape
known = np.ones((height, width), bool)
known[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = False

result = pipe.inpaint(image, np.where(known, truth, 0), known)[0]
assert (result.segmentation[known] == truth[known]).all()  # what was given stays

out.mkdir(parents=True, exist_ok=True)
write_panoptic_png(out / truth_file.name, result.segmentation)
new = sum(not segment["given"] for segment in result.segments_info)
right = (result.segmentation == truth)[~known].mean()
print(f"{100 * right:.0f} % of the hidden pixels have their id back; {new} new segments: {out / truth_file.name}")
