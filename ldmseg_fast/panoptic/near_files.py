"""Finds the file that a JSON means but does not name: in other case, separators, Unicode form, folder or format."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path, PurePosixPath

from ldmseg_fast.files import real_path

MOST_FILES = 1_000_000  # looked at per folder


def missing_files(folder: Path, names: Sequence[str]) -> list[str]:
    """Lists the names that are no file in a folder; one listing, not 118 000 questions to a file server."""
    present = {path.name for path in folder.iterdir()}
    return [name for name in names if name not in present and not is_file(folder / name)]


class NearFiles:
    """Looks for files whose names come near to one that is not there; lists the folders once, on first use.

    Args:
        folder: where the named files should lie.
        around: another folder to look in, with all below it.
        without: a folder below `around` whose files are something else.
    """

    def __init__(self, folder: Path, around: Path | None = None, without: Collection[Path] = ()) -> None:
        self.folder, self.around, self.without = folder, around, {real_path(path) for path in (folder, *without)}

    def nearest(self, name: str) -> str:
        """Describes the file that comes nearest to `name` and what to do; "" where there is none."""
        key = _key(name)
        base = key.rpartition("/")[2]
        if found := self._inside.get(key, ()):
            return f"{self.folder / found[0]} is there: {_difference(name, found[0])}; {_cure(found[0])}"
        if below := self._by_base.get(base, ()):
            more = f" (and {len(below) - 1} more of this name)" if len(below) > 1 else ""
            return f"{self.folder / below[0]}{more} is there, in another folder; {_cure(below[0])}"
        if elsewhere := self._elsewhere.get(base, ()):
            return f"{elsewhere[0]} is there, in another folder; move it to {self.folder}"
        if others := self._by_stem.get(PurePosixPath(base).stem, ()):
            return f"{self.folder / others[0]} is there, in another format; {_cure(others[0])}"
        return ""

    def explain(self, names: Sequence[str]) -> str:
        """Names the first of the missing files, and the file that comes nearest to it or to another of them."""
        for name in names:
            if near := self.nearest(name):
                return f"first {names[0]}: {near}" if name == names[0] else f"first {names[0]}; of {name}, {near}"
        return f"first {names[0]}: fetch them again"

    @cached_property
    def _inside(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for path in islice(_files_below(self.folder, set()), MOST_FILES):
            relative = path.relative_to(self.folder).as_posix()
            found.setdefault(_key(relative), []).append(relative)
        return found

    @cached_property
    def _by_base(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for key, paths in self._inside.items():
            found.setdefault(key.rpartition("/")[2], []).extend(paths)
        return found

    @cached_property
    def _by_stem(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for base, paths in self._by_base.items():
            found.setdefault(PurePosixPath(base).stem, []).extend(paths)
        return found

    @cached_property
    def _elsewhere(self) -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = {}
        if self.around is not None:
            for path in islice(_files_below(self.around, self.without), MOST_FILES):
                found.setdefault(_key(path.name), []).append(path)
        return found


def is_file(path: Path) -> bool:
    """Tells whether there is a file; no file has a name that the system cannot hold."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _files_below(folder: Path, without: Collection[Path]) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not without or real_path(Path(root) / name) not in without)
        for name in sorted(files):
            yield Path(root) / name


def _key(name: str) -> str:
    """Spells a name as all its near spellings would be."""
    spelled = unicodedata.normalize("NFKC", name).casefold().strip().replace("\\", "/")
    return "/".join(part for part in spelled.split("/") if part not in ("", "."))


_SPELLINGS = {
    "its separators are / and not the \\ of Windows": lambda name: name.replace("\\", "/"),
    "its Unicode form is another (NFC or NFD)": lambda name: unicodedata.normalize("NFC", name),
    "upper and lower case differ": str.casefold,
    "spaces around the name differ": str.strip,
}


def _difference(name: str, found: str) -> str:
    different = []
    for text, spell in _SPELLINGS.items():
        one, two = name, found
        for other in _SPELLINGS.values():
            if other is not spell:
                one, two = other(one), other(two)
        different += [text] if one != two else []
    return " and ".join(different) or "it is written in another way"


def _cure(found: str) -> str:
    return f"write its `file_name` as {found!r}, or rename the file"
