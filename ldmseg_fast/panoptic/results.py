"""Holds one image's result, and writes result files: COCO panoptic (JSON + PNGs) and COCO instances (run lengths)."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldmseg_fast import distributed
from ldmseg_fast.errors import ArgumentError, DataError, PanopticFormatError
from ldmseg_fast.files import replacing
from ldmseg_fast.panoptic.format import read_panoptic_png, write_panoptic_png
from ldmseg_fast.panoptic.shapes import segment_shapes
from ldmseg_fast.temporary import clear_once

_IN_NO_NAME = re.compile(r"[\x00-\x1f\x7f/\\]")  # separators and control characters
COCO_KEYS = ("id", "category_id", "iscrowd", "area", "bbox", "score")


@dataclass(frozen=True)
class PanopticResult:
    """Holds one image's panoptic segmentation.

    Attributes:
        segmentation: int32 [H, W], 0 void, otherwise slot + 1 (or the given map's ids, where there was one).
        segments_info: one entry per segment in ascending id, with `id`, `category_id`, `isthing`, `iscrowd`, `area`
            (pixels), `bbox` ([x, y, width, height], pixels) and `score` (mean softmax probability over the segment's
            pixels), as in COCO, and `label_id` and `was_fused` as in transformers'
            `post_process_panoptic_segmentation`.
    """

    segmentation: np.ndarray
    segments_info: list[dict[str, Any]]

    def to_coco(self, image_id: int | str, file_name: str) -> dict[str, Any]:
        """See `ldmseg_fast.formats.conversions.to_coco`: an annotation of a COCO panoptic JSON."""
        return _conversions().to_coco(self, image_id, file_name)

    def to_coco_instances(self, image_id: int | str) -> list[dict[str, Any]]:
        """See `ldmseg_fast.formats.conversions.to_coco_instances`: COCO instance results with run lengths."""
        return _conversions().to_coco_instances(self, image_id)

    def to_transformers(self, names: Mapping[int, str] | None = None) -> list[dict[str, Any]]:
        """See `ldmseg_fast.formats.conversions.to_transformers`: `score`, `label`, `mask` as a pipeline gives them."""
        return _conversions().to_transformers(self, names)

    def to_supervision(self, names: Mapping[int, str] | None = None) -> Any:
        """See `ldmseg_fast.formats.conversions.to_supervision`: `supervision.Detections`."""
        return _conversions().to_supervision(self, names)

    def to_fiftyone(self, names: Mapping[int, str] | None = None) -> Any:
        """See `ldmseg_fast.formats.conversions.to_fiftyone`: `fiftyone.Detections` with masks."""
        return _conversions().to_fiftyone(self, names)

    def to_labelme(self, picture: str, names: Mapping[int, str] | None = None, shape: str = "rle") -> dict[str, Any]:
        """See `ldmseg_fast.formats.conversions.to_labelme`: the content of LabelMe's JSON."""
        return _conversions().to_labelme(self, picture, names, shape)

    def to_label_studio(self, url: str, names: Mapping[int, str] | None = None, shape: str = "rle") -> dict[str, Any]:
        """See `ldmseg_fast.formats.conversions.to_label_studio`: a task with a pre-annotation."""
        return _conversions().to_label_studio(self, url, names, shape)

    def to_geojson(self, picture: str = "", names: Mapping[int, str] | None = None) -> dict[str, Any]:
        """See `ldmseg_fast.formats.conversions.to_geojson`: a FeatureCollection in pixels."""
        return _conversions().to_geojson(self, picture, names)


def _conversions() -> Any:
    """Imports what a result is turned into by, on first use: it lies in a higher row and needs Pillow and more."""
    from ldmseg_fast.formats import conversions

    return conversions


class ResultsWriter:
    """Writes FOLDER/NAME.json and FOLDER/NAME/*.png, which panopticapi, detectron2 and hotcoco read.

        with ResultsWriter(folder, "panoptic_val2017", categories) as writer:
            for image in images:
                if image.id not in writer.written:
                    writer.add(image.id, predict(image))
            # where there are ranks: a barrier, then on the main one
            writer.finish()

    Every image is on disk once `add` returns: its PNG, then a line of the journal FOLDER/.NAME.RANK.jsonl, from which
    `finish` makes the JSON. A new writer on the same folder knows what all ranks have written (`written`).

    settings: whatever the results depend on (JSON values).

    Raises:
        ArgumentError: the folder holds results of other settings.
        PanopticFormatError: a journal is damaged; the message names it and the line.
    """

    def __init__(
        self,
        folder: str | Path,
        name: str,
        categories: Sequence[Mapping[str, Any]] = ({"id": 1, "name": "object", "isthing": 1},),
        settings: Mapping[str, Any] | None = None,
        rank: int | None = None,
    ):
        self.folder, self.name = Path(folder), name
        self.png_folder = self.folder / name
        self.categories = [dict(category) for category in categories]
        self.settings = json.loads(json.dumps(settings or {}))  # as it will be read back
        self.png_folder.mkdir(parents=True, exist_ok=True)
        clear_once(self.png_folder)
        journal = self.folder / f".{name}.{distributed.rank() if rank is None else rank}.jsonl"
        _drop_torn_line(journal)
        entries = self._entries()
        self.written = {entry["image"]["id"] for entry in entries}
        self.made_from = {entry["image"]["id"]: entry.get("made_from", "") for entry in entries}
        self._versions = {entry["image"]["id"]: entry.get("version", 0) for entry in entries}
        self._image_of_png = {entry["annotation"]["file_name"]: entry["image"]["id"] for entry in entries}
        # as text, which is a tenth of the size of the dictionaries
        self._annotations = {entry["image"]["id"]: json.dumps(entry["annotation"]) for entry in entries}
        self._journal_path = journal
        self._journal = journal.open("a", encoding="utf-8")
        if journal.stat().st_size == 0:
            self._write({"settings": self.settings})

    def add(
        self,
        image_id: int | str,
        result: PanopticResult,
        png_name: str | None = None,
        image_name: str | None = None,
        made_from: str = "",
    ) -> None:
        """Writes one image, also in the place of an earlier result of it.

        Args:
            png_name: the map's file in FOLDER/NAME; by default the image id.
            image_name: the photograph's file; by default `png_name`.
            made_from: recognises what the result was made from; `made_from` of a later writer has it by image id.

        Raises:
            ArgumentError: another image has this PNG.
            OSError: a file that cannot be written.
        """
        png_name = png_name or self.png_path(image_id).name
        if (owner := self._image_of_png.get(png_name, image_id)) != image_id:
            raise ArgumentError(f"{png_name}: image {owner} has this name already; give {image_id} its own")
        write_panoptic_png(self.png_folder / png_name, result.segmentation)
        height, width = result.segmentation.shape
        segments = [{key: segment[key] for key in COCO_KEYS if key in segment} for segment in result.segments_info]
        image = {"id": image_id, "file_name": image_name or png_name, "height": height, "width": width}
        annotation = {"image_id": image_id, "file_name": png_name, "segments_info": segments}
        version = self._versions.get(image_id, -1) + 1
        self._write({"image": image, "annotation": annotation, "made_from": made_from, "version": version})
        self.written.add(image_id)
        self.made_from[image_id], self._versions[image_id] = made_from, version
        self._image_of_png[png_name] = image_id
        self._annotations[image_id] = json.dumps(annotation)

    def read(self, image_id: int | str) -> PanopticResult:
        """Reads an image of `written` from disk.

        Raises:
            PanopticFormatError: its PNG is damaged.
        """
        annotation = json.loads(self._annotations[image_id])
        return PanopticResult(read_panoptic_png(self.png_folder / annotation["file_name"]), annotation["segments_info"])

    def png_path(self, image_id: int | str) -> Path:
        """Returns where an image's map goes unless `add` is told another name: always a file in the folder."""
        name = f"{image_id:012d}" if isinstance(image_id, int) else _IN_NO_NAME.sub(_escaped, image_id)
        return self.png_folder / f"{name}.png"

    def finish(self) -> Path:
        """Writes the JSON over what all ranks have written so far, in ascending image id, and returns its path.

        Raises:
            DataError: maps of this writer have been removed meanwhile.
        """
        entries = sorted(self._entries(), key=lambda entry: _order(entry["image"]["id"]))
        if lost := self.written - {entry["image"]["id"] for entry in entries}:
            raise DataError(
                f"{self.png_folder}: {len(lost)} maps have been removed while others were written (image "
                f"{min(lost, key=str)}); run it again, which makes what is missing"
            )
        path = self.folder / f"{self.name}.json"
        content = {
            "images": [entry["image"] for entry in entries],
            "annotations": [entry["annotation"] for entry in entries],
            "categories": self.categories,
        }
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")
        return path

    def close(self) -> None:
        """Ends the journal. What `add` wrote stays, and a later writer on the same folder goes on from there."""
        self._journal.close()

    def __enter__(self) -> "ResultsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, entry: Mapping[str, Any]) -> None:
        try:
            self._journal.write(json.dumps(entry) + "\n")
            self._journal.flush()
        except OSError as error:
            error.filename = str(self._journal_path)  # a full disk gives none
            raise

    def _entries(self) -> list[dict[str, Any]]:
        """Lists what the journals of all ranks list and whose PNG is there: of each image the last version."""
        entries: dict[int | str, dict[str, Any]] = {}
        for journal in sorted(self.folder.glob(f".{self.name}.*.jsonl")):
            *lines, _ = journal.read_bytes().split(b"\n")  # the last is torn, or being written by another rank
            for number, line in enumerate(lines, 1):
                entry = _parsed(line, f"{journal}, line {number}")
                if "settings" not in entry:
                    image_id = entry["image"]["id"]
                    if entry.get("version", 0) >= entries.get(image_id, {}).get("version", 0):
                        entries[image_id] = entry
                elif entry["settings"] != self.settings:
                    old, new = _flat(entry["settings"]), _flat(self.settings)
                    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
                    listed = "; ".join(f"{key} {old.get(key)}, now {new.get(key)}" for key in changed)
                    raise ArgumentError(
                        f"{journal}: holds results of other settings ({listed}); "
                        "choose another folder, or delete this one to start again"
                    )
        return [entry for entry in entries.values() if (self.png_folder / entry["annotation"]["file_name"]).is_file()]


def instances_of(image_id: int | str, result: PanopticResult) -> list[dict[str, Any]]:
    """Turns a map's segments into COCO instance results: image_id, category_id, score, segmentation (RLE).

    pycocotools' `COCO.loadRes` reads a list of them (`write_json_list`). There is no `bbox`: pycocotools would take the
    area from it, but finds both in the run lengths itself.

    Raises:
        PanopticFormatError: an id of the map that `segments_info` lacks.
    """
    segments = {segment["id"]: segment for segment in result.segments_info}
    shapes = segment_shapes(result.segmentation, rle=True)
    if unlisted := [shape["id"] for shape in shapes if shape["id"] not in segments]:
        raise PanopticFormatError(f"image {image_id}: ids in the map but not in segments_info: {unlisted[:20]}")
    return [
        {
            "image_id": image_id,
            "category_id": segments[shape["id"]]["category_id"],
            "score": segments[shape["id"]].get("score", 1.0),
            "segmentation": shape["segmentation"],
        }
        for shape in shapes
    ]


def write_json_list(path: str | Path, values: Iterable[Any]) -> None:
    """Writes a JSON list with one value a line and keeps none of them in memory."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        separator = "["
        for value in values:
            file.write(separator + json.dumps(value))
            separator = ",\n"
        file.write("]\n" if separator != "[" else "[]\n")


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    """Reads a line of a journal: `settings`, or an image's entry as `ResultsWriter.add` writes it.

    Raises:
        PanopticFormatError: a damaged line; the message names `where`.
    """
    try:
        entry = json.loads(line.decode("utf-8"))
        if isinstance(entry.get("settings"), dict):
            return entry
        image, annotation = entry["image"], entry["annotation"]
        whole = (
            isinstance(image["id"], int | str)
            and isinstance(annotation["image_id"], int | str)
            and isinstance(annotation["file_name"], str)
            and isinstance(annotation["segments_info"], list)
            and isinstance(entry.get("version", 0), int)
            and isinstance(entry.get("made_from", ""), str)
            and "settings" not in entry
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise PanopticFormatError(f"{where}: damaged; delete this journal to make its results again")
    return entry


def _escaped(character: re.Match[str]) -> str:
    return f"%{ord(character[0]):02X}"


def _order(image_id: int | str) -> tuple[bool, int | str]:
    return isinstance(image_id, str), image_id


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Names the settings in groups as "group.name"."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= {f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _drop_torn_line(journal: Path) -> None:
    """Cuts off what follows the last line end, so that the next line starts on its own."""
    if journal.is_file():
        content = journal.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with journal.open("r+b") as file:
                file.truncate(len(whole))
