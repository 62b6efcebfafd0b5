"""Finds the files of a COCO-panoptic folder."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldmseg_fast.errors import DataError
from ldmseg_fast.panoptic.near_files import NearFiles, missing_files

_PREFIX, _SUFFIX = "panoptic_", ".json"


@dataclass(frozen=True)
class SplitFolders:
    """Names the annotation file, the picture folder and the map folder of one split."""

    annotations: Path
    images: Path
    maps: Path

    def near_files(self) -> tuple[NearFiles, NearFiles]:
        """Returns what looks for the near spellings of pictures and of maps."""
        root = self.annotations.parent.parent
        return NearFiles(self.images, root, [self.maps]), NearFiles(self.maps, root, [self.images])

    def check_files(self, pictures: Sequence[str], maps: Sequence[str]) -> None:
        """Checks that the files which the JSON names are there.

        Raises:
            DataError: names the first that is missing, and what comes nearest to it.
        """
        for near, names, what in zip(self.near_files(), (pictures, maps), ("picture", "map")):
            if lost := missing_files(near.folder, names):
                raise DataError(
                    f"{len(lost)} of {len(names)} {what}s of {self.annotations} are not in {near.folder}, "
                    f"{near.explain(lost)}; `ldmseg data check {self.annotations.parent.parent}` lists all"
                )


def list_splits(root: str | os.PathLike) -> list[str]:
    """Lists NAME of all ROOT/annotations/panoptic_NAME.json in alphabetical order.

    Raises:
        DataError: ROOT is no folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"data root {str(root)!r} is not a folder: give one with annotations/panoptic_SPLIT.json")
    return sorted(
        path.name[len(_PREFIX) : -len(_SUFFIX)] for path in (root / "annotations").glob(f"{_PREFIX}*{_SUFFIX}")
    )


def check_split_name(split: str) -> None:
    """Checks the name of a new split, which becomes the name of a folder.

    Raises:
        DataError: empty, a path, or a name that starts with a dot.
    """
    if not split or split.startswith(".") or any(letter in split for letter in "/\\\0"):
        raise DataError(f"split {split!r}: a name for a folder expected, such as train2017")


def find_split(root: str | os.PathLike, split: str) -> SplitFolders:
    """Finds the files of a split.

    The annotations are ROOT/annotations/panoptic_SPLIT.json. Pictures lie in ROOT/SPLIT or ROOT/images/SPLIT, maps in
    ROOT/panoptic_SPLIT or ROOT/annotations/panoptic_SPLIT. A second annotation of a split (val2017_classes beside
    val2017) uses the folders of the name before its last underscore where it has none of its own.

    Raises:
        DataError: names the file or folder that is not there.
    """
    root, splits = Path(root), list_splits(root)
    annotations = root / "annotations" / f"{_PREFIX}{split}{_SUFFIX}"
    if split not in splits:
        found = ", ".join(splits) or "none"
        raise DataError(f"{annotations} does not exist; splits found in {root}: {found}")
    names = [split] if "_" not in split else [split, split.rsplit("_", 1)[0]]
    images = [root / parent / name for name in names for parent in ("", "images")]
    maps = [root / parent / f"{_PREFIX}{name}" for name in names for parent in ("", "annotations")]
    return SplitFolders(annotations, _first_folder(images, "pictures"), _first_folder(maps, "panoptic PNGs"))


def _first_folder(candidates: list[Path], contents: str) -> Path:
    for path in candidates:
        if path.is_dir():
            return path
    folders = (path for wanted in candidates if wanted.parent.is_dir() for path in wanted.parent.iterdir())
    names = {path.name.casefold() for path in candidates}
    near = next((path for path in folders if path.is_dir() and path.name.casefold() in names), None)
    cure = f"; {near} is there: upper and lower case differ, rename it" if near is not None else ""
    raise DataError(f"no folder with {contents}: expected {' or '.join(map(str, candidates[:2]))}{cure}")


def picture_folder(gt_json: Path) -> Path | None:
    """Finds the pictures of ROOT/annotations/panoptic_SPLIT.json; None where they are not there."""
    try:
        return find_split(gt_json.parent.parent, gt_json.stem.removeprefix("panoptic_")).images
    except DataError:
        return None
