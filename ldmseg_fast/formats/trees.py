"""Reads the files of a data set from a folder or from a zip alike. Nothing of a zip is unpacked to disk."""

from __future__ import annotations

import json
import os
import posixpath
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any

from ldmseg_fast.errors import DataError
from ldmseg_fast.files import MAX_BYTES, read_file, text_of, without_repeats
from ldmseg_fast.formats.source_files import no_listing
from ldmseg_fast.panoptic.near_files import MOST_FILES

_RATIO = 300  # of a file in a zip to its packed bytes, above which it is taken for a bomb; text packs to a tenth
_SMALL = 2**24  # bytes that any file in a zip may have
_SYMLINK = 0o120000


class Tree:
    """Holds the files below a folder or in a zip, by their names with `/` between folders.

    Hidden files are not seen, nor what macOS packs beside files.

    Args:
        source: a folder, a `.zip`, or another file, which stands for the folder that it lies in.

    Raises:
        DataError: nothing is there, a zip that is damaged, or one with a name that leads out of it.
    """

    def __init__(self, source: Path) -> None:
        self.source = source
        self.only = ""  # the name of the file that was given
        self._zip: zipfile.ZipFile | None = None
        if source.is_dir():
            self.root, self.names = source, _files_below(source)
        elif source.suffix.lower() == ".zip" and source.is_file():
            self.root, self._zip = source, _opened(source)
            self._infos = _infos_of(source, self._zip)
            self.names = sorted(self._infos)
        elif source.is_file():
            self.root, self.only = source.parent, source.name
            self.names = _files_below(source.parent)
        else:
            raise DataError(f"{source}: no such file or folder")

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def where(self, name: str) -> str:
        """Returns what an error calls a file."""
        return f"{self.root}: {name}" if self._zip else str(self.root / name)

    def sources(self, *names: str) -> tuple[Path, ...]:
        """Returns the files on disk that hold these."""
        return (self.root,) if self._zip else tuple(self.root / name for name in names)

    def read(self, name: str, what: str = "file") -> bytes:
        """Reads a file whole.

        Raises:
            DataError: it is missing, damaged, too large, or no regular file.
        """
        if self._zip is None:
            try:
                return read_file(self.root / name, DataError, what)
            except FileNotFoundError:
                raise DataError(f"{self.root / name}: no such {what}") from None
        if name not in self._known:
            raise DataError(f"{self.root}: no {what} {name} in this zip")
        info = self._infos[name]
        if info.file_size > MAX_BYTES or info.file_size > max(_SMALL, _RATIO * info.compress_size):
            raise DataError(
                f"{self.where(name)}: {info.compress_size} bytes that would become {info.file_size}: is this zip what "
                "it should be? Unpack it yourself and name the folder"
            )
        try:
            with closing(self._zip.open(info)) as file:
                return file.read()
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
            raise DataError(f"{self.where(name)}: damaged or locked ({error}); export it again") from None

    def text(self, name: str) -> str:
        """Reads a text file in UTF-8, with or without a byte order mark.

        Raises:
            DataError: see `read`; another encoding.
        """
        try:
            return text_of(self.read(name))
        except UnicodeDecodeError as error:
            raise DataError(f"{self.where(name)}: no UTF-8 text ({error}); save it as UTF-8") from None

    def json(self, name: str) -> Any:
        """Reads a JSON.

        Raises:
            DataError: see `text`; no JSON, or a key that an object has twice.
        """
        text = self.text(name)
        try:
            return json.loads(text, object_pairs_hook=without_repeats)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.where(name)}: damaged, no JSON ({error}); export it again") from None

    def picture(self, name: str) -> Path | Callable[[], bytes]:
        """Returns what an `Entry` holds as its picture."""
        return partial(self.read, name, "picture") if self._zip else self.root / name

    def below(self, folder: str = "", suffixes: Iterable[str] = ()) -> list[str]:
        """Lists the files in a folder and below it, those of some endings where such are given, in order."""
        start = f"{folder}/" if folder else ""
        endings = tuple(suffixes)
        return [
            name for name in self.names if name.startswith(start) and (not endings or name.lower().endswith(endings))
        ]

    def find(self, name: str, folders: Sequence[str], others: Sequence[str] = ()) -> str | None:
        """Finds a file that another names.

        Args:
            name: as it is written there; `\\` between folders counts as `/`, and of a path from another machine, or
                one that leads out of the folder, its last part.
            folders: to look in, one after the other.
            others: folders whose files belong to others.

        Returns:
            Its name in the tree, None where there is none. A name that only one file below all folders has is found
            wherever that file lies, but not in `others`, nor in another folder than the one that is written before it.
        """
        spelled = name.replace("\\", "/")
        plain = posixpath.normpath(spelled) if spelled else ""
        base = PurePosixPath(plain).name
        foreign = spelled.startswith("/") or re.match(r"[A-Za-z]:", spelled) is not None
        for folder in folders:
            path = posixpath.normpath(posixpath.join(folder, spelled))
            if not foreign and path in self._known:
                return path
        for folder in folders:
            if (path := posixpath.normpath(posixpath.join(folder, base))) in self._known:
                return path
        found = self._by_base.get(base, [])
        if len(found) != 1 or found[0].startswith(tuple(f"{folder}/" for folder in others)):
            return None
        written, real = (PurePosixPath(path).parent.name for path in (plain, found[0]))
        return None if written not in ("", "..", real) and not foreign else found[0]

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.names)

    @cached_property
    def _by_base(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in self.names:
            found.setdefault(PurePosixPath(name).name, []).append(name)
        return found


def check_one_name(met: dict[str, str], file: str, name: str, where: str) -> None:
    """Checks that a file is not the picture of two names.

    Args:
        met: file -> the name that it was found by; the pair is added.
        file, name: of the picture.
        where: for the error.

    Raises:
        DataError: it was found by another name before.
    """
    other = met.setdefault(file, name)
    if other != name:
        raise DataError(f"{where}: {other} and {name} would both be {file}; put the pictures where these names say")


def plain_name(name: str) -> str:
    """Returns a picture's name below its split's folder: its path where that stays in it, else its last part."""
    spelled = name.replace("\\", "/")
    path = posixpath.normpath(spelled)
    leaves = spelled.startswith("/") or re.match(r"[A-Za-z]:", spelled) or path.split("/")[0] == ".."
    return PurePosixPath(path).name if leaves else path


def _visible(name: str) -> bool:
    return not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _files_below(root: Path) -> list[str]:
    names: list[str] = []
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, onerror=no_listing, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        below = Path(folder).relative_to(root).as_posix()
        folders[:] = [name for name in folders if _visible(name)]
        names += [name if below == "." else f"{below}/{name}" for name in files if _visible(name)]
        if len(names) > MOST_FILES:
            raise DataError(f"{root}: over {MOST_FILES} files: is this the right folder?")
    return sorted(names)


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise DataError(f"{path}: damaged, no zip ({error}); export it again") from None


def _infos_of(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    infos: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename.replace("\\", "/")  # as some packers on Windows write
        if name.startswith("/") or re.match(r"[A-Za-z]:", name) or ".." in name.split("/"):
            raise DataError(f"{path}: holds {info.filename!r:.100}, which leads out of the zip; do not trust this file")
        is_link = (info.external_attr >> 16) & 0o170000 == _SYMLINK
        if name.endswith("/") or is_link or not _visible(name):
            continue
        if name in infos:
            raise DataError(f"{path}: holds {name!r:.100} twice; export it again")
        infos[name] = info
    return infos
