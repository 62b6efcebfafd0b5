"""Finds the pictures in files and folders that a user names, and counts what is left out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageFile

from ldmseg_fast.data.pictures import Picture, read_picture
from ldmseg_fast.errors import DataError
from ldmseg_fast.files import real_path, require_file

OWN = ".ldmseg"  # how our own folders and files begin, of a start at work
_NO_PICTURES = ("IPTC", "MPEG")  # formats that Pillow recognises and cannot decode


@dataclass(frozen=True)
class FoundPicture:
    """Names a picture and the folder that its results belong into.

    Attributes:
        file: the picture.
        folder: relative to the folder of all results; "." but for pictures of sub-folders.
    """

    file: Path
    folder: Path = Path()

    def read(self, *, exif: bool = True, max_pixels: int) -> Picture:
        """Reads the picture, as `data.pictures.read_picture` does.

        Raises:
            DataError: a file that is missing or no readable picture; it is named.
        """
        return read_picture(self.file, exif=exif, max_pixels=max_pixels)

    def source(self) -> Path:
        """Returns the file on disk that holds the picture."""
        return self.file


@dataclass
class FoundPictures:
    """Holds pictures and what was left out.

    Attributes:
        pictures: in the order of the paths, those of a folder by name.
        left_out: what was left out, as a message says it, and how many.
        from_folders: whether a folder was among the paths.
        broken: a line for each part of a tar file that cannot be read.
    """

    pictures: list[FoundPicture] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    from_folders: bool = False
    broken: list[str] = field(default_factory=list)


@lru_cache(maxsize=1)
def picture_suffixes() -> frozenset[str]:
    """Returns the endings, such as ".png", of all formats that Pillow decodes."""
    Image.init()
    decoded = {
        name
        for name, (factory, _) in Image.OPEN.items()
        if name not in _NO_PICTURES and not (isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile))
    }
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in decoded)


def find_pictures(paths: Sequence[str | Path], *, recursive: bool = False, out: Path | None = None) -> FoundPictures:
    """Lists files as they are and folders as the pictures in them, each once.

    Of folders, hidden files and files of other endings than `picture_suffixes` are left out.

    Args:
        paths: of files and folders.
        recursive: take the pictures of sub-folders too; links to folders are not followed.
        out: folder of results, which is left out.

    Raises:
        FileNotFoundError: a path that is not there.
        DataError: a folder without pictures, or a pipe, socket or device.
    """
    found = FoundPictures()
    for path in map(Path, paths):
        if path.is_dir():
            before = len(found.pictures)
            _search(path, Path(), recursive, out and real_path(out), found)
            found.from_folders = True
            if len(found.pictures) == before:
                left_out = "; left out: " + described(found.left_out) if found.left_out else ""
                raise DataError(f"{path}: no pictures in this folder{left_out}")
        else:
            try:
                require_file(path, DataError, "picture")
            except FileNotFoundError:
                raise FileNotFoundError(f"{path}: no such file or folder") from None
            found.pictures.append(FoundPicture(path))
    found.pictures = once(found.pictures)
    return found


def once(pictures: Sequence[FoundPicture]) -> list[FoundPicture]:
    """Leaves out pictures that are there already."""
    found = {os.path.abspath(picture.file): picture for picture in reversed(pictures)}  # noqa: PTH100 (keeps links)
    return list(reversed(found.values()))


def described(left_out: Counter[str]) -> str:
    """Describes what was left out in one line."""
    return ", ".join(f"{count} {what}" for what, count in sorted(left_out.items()))


def _search(folder: Path, below: Path, recursive: bool, out: Path | None, found: FoundPictures) -> None:
    for path in sorted(folder.iterdir()):
        if path.name.startswith(OWN):
            continue
        if path.name.startswith("."):
            found.left_out["hidden"] += 1
        elif path.is_dir():
            if not recursive:
                found.left_out["sub-folders (--recursive takes them)"] += 1
            elif path.is_symlink():
                found.left_out["links to folders"] += 1
            elif real_path(path) == out:
                found.left_out["folders of results"] += 1
            else:
                _search(path, below / path.name, recursive, out, found)
        elif path.suffix.lower() in picture_suffixes():
            found.pictures.append(FoundPicture(path, below))
        else:
            found.left_out["with other endings than pictures"] += 1
