"""Keeps pictures and maps of visitors, where the one who runs the app asks for it."""

from __future__ import annotations

import json
import shutil
import time
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from ldmseg_fast.app.exports import safe_name
from ldmseg_fast.app.work import Segmented
from ldmseg_fast.files import replacing_folder
from ldmseg_fast.panoptic.format import write_panoptic_png


class Keeper:
    """Writes each result into a folder of its own below DIR: the picture, map.png and result.json.

    Args:
        folder: DIR, which is there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, work: str, picture: Any, done: Segmented) -> None:
        """Keeps one result.

        Args:
            work: "segment" or "complete".
            picture: the path of the upload, or what has none and is kept as it was shown.
            done: the result.

        Raises:
            OSError: names the file that cannot be written.
        """
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{work}-{uuid.uuid4().hex[:8]}"
        with replacing_folder(self.folder / name) as out:
            if isinstance(picture, str | Path):
                kept = safe_name(Path(picture).name)
                kept = f"picture-{kept}" if kept in ("map.png", "result.json") else kept
                shutil.copyfile(picture, out / kept)
            else:
                kept = "picture.png"
                Image.fromarray(done.view).save(out / kept)
            write_panoptic_png(out / "map.png", done.result.segmentation)
            record = {"picture": kept, "seconds": done.seconds, "settings": asdict(done.settings)}
            text = json.dumps(record | {"segments_info": done.result.segments_info}, indent=2)
            (out / "result.json").write_text(text + "\n", encoding="utf-8")
