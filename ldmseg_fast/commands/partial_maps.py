"""Finds and reads the maps of which a part is given, and completes them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldmseg_fast.commands.picture_results import image_id, preview_of, write_result
from ldmseg_fast.commands.shared_job import Outcome
from ldmseg_fast.data.masks import read_mask
from ldmseg_fast.data.picture_folders import FoundPicture
from ldmseg_fast.data.pictures import MAX_PIXELS, Picture
from ldmseg_fast.data.shards import Member, ShardPicture
from ldmseg_fast.errors import ArgumentError, DataError, PanopticFormatError
from ldmseg_fast.files import read_text, without_repeats
from ldmseg_fast.inference.inputs import given_categories, scaled_picture
from ldmseg_fast.panoptic.format import read_panoptic_png
from ldmseg_fast.pipeline import LDMSegPipeline

MAP, KNOWN, SEGMENTS = "map.png", "known.png", "segments.json"  # kinds of a key's members in a tar
Place = Path | Member


@dataclass(frozen=True)
class PartialMaps:
    """Says where the maps of pictures are, and which part of them is given.

    Attributes:
        map: a panoptic PNG, or a folder with NAME.png of each picture; None: in the tar.
        known: a mask, or a folder with NAME.png of each; None: `unknown_id` tells, or in the tar.
        unknown_id: the map is given where it does not have it.
        segments: a JSON, or a folder with NAME.json of each.
        exif: whether pictures and masks are turned as their EXIF orientation says.
        max_pixels: of a picture, map or mask that is read.
        out: folder of the results.
        batch_size: how many maps are completed at once.
    """

    map: Path | None
    known: Path | None
    unknown_id: int | None
    segments: Path | None
    exif: bool
    max_pixels: int
    out: Path
    batch_size: int

    def check(self, pictures: Sequence[FoundPicture]) -> None:
        """Checks that each picture has its own map.

        Raises:
            ArgumentError: an option that is missing, or names one file for several pictures.
        """
        shards = all(isinstance(picture, ShardPicture) for picture in pictures)
        if self.map is None and not shards:
            raise ArgumentError(
                "--map: name the panoptic PNG of the picture, or a folder with NAME.png of each picture"
            )
        if self.known is None and self.unknown_id is None and not shards:
            raise ArgumentError("--known or --unknown-id: say which part of the map is given")
        for option, path in (("--map", self.map), ("--known", self.known), ("--segments", self.segments)):
            if path is not None and len(pictures) > 1 and not path.is_dir():
                raise ArgumentError(
                    f"{option} {path}: one file for {len(pictures)} pictures; name a folder with one each"
                )

    def files(self, picture: FoundPicture) -> list[Path]:
        """Lists the files on disk that a picture's result depends on beside it."""
        return [place for place in self._places(picture) if isinstance(place, Path)]

    def _places(self, picture: FoundPicture) -> tuple[Place | None, Place | None, Place | None]:
        """Map, mask and JSON of a picture; None: not given."""
        kinds = {kind.lower(): member for kind, member in getattr(picture, "members", ())}

        def place(path: Path | None, kind: str, ending: str) -> Place | None:
            if path is None:
                return kinds.get(kind)
            return path / picture.folder / (picture.file.stem + ending) if path.is_dir() else path

        known = None if self.unknown_id is not None else place(self.known, KNOWN, ".png")
        return place(self.map, MAP, ".png"), known, place(self.segments, SEGMENTS, ".json")

    def complete(self, pipe: LDMSegPipeline, pictures: Sequence[FoundPicture], **sampling: Any) -> Outcome:
        """Completes the maps of pictures and writes the results; those that cannot be read are left out.

        `sampling` goes to the pipeline.

        Raises:
            OSError: names the file that cannot be written.
        """
        done = Outcome()
        batch: list[tuple[FoundPicture, Picture, np.ndarray, np.ndarray, np.ndarray, Any]] = []
        pixels = 0
        for found in pictures:
            try:
                picture, segmentation, known, segments = self._read(found)
            except (DataError, PanopticFormatError) as error:
                done.bad.append(str(error))
                continue
            try:
                given_categories(None if segments is None else [segments], 1, pipe.info.categories)
            except ArgumentError as error:
                done.bad.append(f"{_name(self._places(found)[2])}: {error}")
                continue
            done.turned += picture.turned
            done.frames += picture.frames
            if batch and pixels + known.size > MAX_PIXELS:
                self._write(pipe, batch, done, sampling)
                batch, pixels = [], 0
            pixels += known.size
            scaled = scaled_picture(picture, 0, pipe.info.picture_size, exif=self.exif, max_pixels=self.max_pixels)
            batch.append((found, scaled, preview_of(picture), segmentation, known, segments))
        if batch:
            self._write(pipe, batch, done, sampling)
        return done

    def _write(self, pipe: LDMSegPipeline, batch: Sequence[Any], done: Outcome, sampling: dict[str, Any]) -> None:
        pictures, images, previews, segmentations, masks, segments = zip(*batch)
        results = pipe.inpaint(
            list(images),
            list(segmentations),
            list(masks),
            image_ids=[image_id(found.file) for found in pictures],
            batch_size=len(batch),
            segments_info=[each or [] for each in segments] if any(each is not None for each in segments) else None,
            **sampling,
        )
        for found, preview, known, result in zip(pictures, previews, masks, results):
            write_result(self.out, found, preview, result, pipe.info.categories)
            done.add(self.out, found)
            done.new += sum(not segment["given"] for segment in result.segments_info)
            done.share += 100.0 * (1.0 - float(known.mean()))

    def _read(self, found: FoundPicture) -> tuple[Picture, np.ndarray, np.ndarray, list[dict[str, Any]] | None]:
        """Reads picture, map int32 [H, W], mask bool [H, W] and what is known of the segments."""
        map_place, known_place, segments_place = self._places(found)
        if map_place is None:
            raise DataError(
                f"{found.file}: no map: the tar has no {found.file.stem}.{MAP}; add it, or name --map FOLDER"
            )
        segments = None
        if segments_place is not None:
            with _on_disk(segments_place) as path:
                segments = read_segments(path)
        picture = found.read(exif=self.exif, max_pixels=self.max_pixels)
        with _on_disk(map_place) as path:
            segmentation = read_panoptic_png(path, max_pixels=self.max_pixels)
        names = _name(map_place), _name(known_place)
        if self.unknown_id is not None:
            known = segmentation != self.unknown_id
            if known.all():
                raise DataError(
                    f"{names[0]}: no pixel has the id {self.unknown_id} (--unknown-id): nothing to complete"
                )
            if not known.any():
                raise DataError(
                    f"{names[0]}: every pixel has the id {self.unknown_id} (--unknown-id): nothing is given"
                )
        elif known_place is None:
            raise DataError(
                f"{found.file}: no {found.file.stem}.{KNOWN} in the tar; add it, or give --known FOLDER or --unknown-id"
            )
        else:
            with _on_disk(known_place) as path:
                known = read_mask(path, exif=self.exif, max_pixels=self.max_pixels)
        for name, size in zip(names, (segmentation.shape, known.shape)):
            if size != picture.size:
                turned = ", turned by its EXIF orientation (--keep-orientation keeps the stored pixels)"
                raise DataError(
                    f"{name}: {size[1]}x{size[0]} pixels, the picture {found.file} has "
                    f"{picture.size[1]}x{picture.size[0]}{turned if picture.turned else ''}"
                )
        if self.unknown_id is None and not segmentation[known].any():
            raise DataError(
                f"{names[1]}: the map {names[0]} is void wherever this mask gives it: is the mask inverted? White says "
                f"where the map is given"
            )
        return picture, segmentation, known, segments


def read_segments(path: Path) -> list[dict[str, Any]]:
    """Reads the `segments_info` of a result's JSON.

    Raises:
        DataError: another kind of file.
    """
    try:
        content = json.loads(read_text(path, DataError), object_pairs_hook=without_repeats)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON ({error}); give what `ldmseg predict` wrote") from None
    segments = content.get("segments_info") if isinstance(content, dict) else None
    if not isinstance(segments, list) or not all(isinstance(entry, dict) for entry in segments):
        raise DataError(f"{path}: no list segments_info in it; give the JSON that `ldmseg predict` wrote for the map")
    # category 0 may be one of the model's; what no draft had a category for has it with a score of 0
    unnamed = {"category_id": 0, "category_score": 0}
    return [entry for entry in segments if "category_id" in entry and not unnamed.items() <= entry.items()]


def _name(place: Place | None) -> Path:
    return place.path if isinstance(place, Member) else place or Path()


@contextmanager
def _on_disk(place: Place) -> Iterator[Path]:
    """Gives a file as a path; a tar's member for a while in a file of its own. Errors name what was asked for.

    Raises:
        DataError: it is not there.
    """
    if isinstance(place, Path):
        try:
            yield place
        except FileNotFoundError:
            raise DataError(f"{place}: no such file; each picture needs one") from None
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"member{Path(place.name).suffix}"
        path.write_bytes(place.content())
        try:
            yield path
        except (DataError, PanopticFormatError) as error:
            raise type(error)(str(error).replace(str(path), str(place.path))) from None
