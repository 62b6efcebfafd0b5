"""Segments one picture and writes its map and an overlay.

python examples/predict.py PICTURE OUT [MODEL_DIR]
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from ldmseg_fast import LDMSegPipeline
from ldmseg_fast.data.pictures import read_picture
from ldmseg_fast.panoptic.format import write_panoptic_png
from ldmseg_fast.reports.draw import overlay

picture, out = Path(sys.argv[1]), Path(sys.argv[2])
pipe = LDMSegPipeline.from_pretrained(sys.argv[3] if len(sys.argv) > 3 else "tiny")

image = np.asarray(read_picture(picture).pixels)  # uint8 [H, W, 3], turned as viewers show it
result = pipe(image)[0]

out.mkdir(parents=True, exist_ok=True)
write_panoptic_png(out / f"{picture.stem}.png", result.segmentation)  # int32 [H, W], 0 = void
Image.fromarray(overlay(image, result.segmentation)).save(out / f"{picture.stem}_overlay.png")
for segment in result.segments_info:
    print(f"segment {segment['id']}: {segment['area']} pixels, score {segment['score']:.2f}, box {segment['bbox']}")
