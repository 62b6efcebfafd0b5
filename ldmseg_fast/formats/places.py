"""Gives every entry of a split its files, and refuses names that would meet."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ldmseg_fast.errors import DataError
from ldmseg_fast.formats.data_set import Entry
from ldmseg_fast.panoptic.annotations import MAX_NUMBER, has_surrogates

_OTHERS = ("annotations", "images", "latents")  # what else lies in a COCO-panoptic folder


@dataclass(frozen=True)
class Place:
    """Describes where an entry is written.

    Attributes:
        entry: what is written.
        image_id: unique in its split.
        name: of the picture, below OUT/SPLIT.
        map: below OUT/panoptic_SPLIT.
    """

    entry: Entry
    image_id: int | str
    name: str
    map: str

    def made_from(self, states: dict[Path, str]) -> str:
        """Returns a sum of the sources' paths, sizes and times; "" where the entry names no source.

        `states` holds what is known of sources that several entries have.

        Raises:
            OSError: a source that is not there.
        """
        own = (self.entry.picture,) if isinstance(self.entry.picture, Path) else ()
        if not self.entry.sources:
            return ""
        paths = (*own, *self.entry.sources)
        for path in paths:
            if path not in states:
                state = path.stat()
                states[path] = f"{path} {state.st_size} {state.st_mtime_ns}"
        text = "\n".join(states[path] for path in paths)
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:32]

    def content(self, read: Callable[[Path], bytes]) -> bytes:
        """Returns the bytes of the picture; `read` reads a file."""
        picture = self.entry.picture
        if isinstance(picture, Path):
            return read(picture)
        return picture if isinstance(picture, bytes) else picture()


def check_split(split: str) -> None:
    """Checks that a split can be a folder of its own beside annotations and maps.

    Raises:
        DataError: names the split.
    """
    plain = PurePosixPath(split).name == split != "" and split.isprintable() and "\\" not in split
    if not plain or split in _OTHERS or split.startswith((".", "panoptic_")):
        raise DataError(f"split {split!r}: no name for a folder of pictures; rename the source's folder")


def check_categories(categories: Sequence[Mapping[str, Any]]) -> None:
    """Checks that every command will read the categories.

    Raises:
        DataError: names the first that has no usable id or name, or one that another has.
    """
    if not categories:
        raise DataError("the data set has no categories; is this the right folder?")
    seen: set[int] = set()
    for category in categories:
        number, name = category.get("id"), category.get("name")
        if type(number) is not int or not 0 <= number <= MAX_NUMBER:
            raise DataError(f"category {name!r}: id {number!r}: a whole number in 0..{MAX_NUMBER} expected")
        if number in seen:
            raise DataError(f"category id {number} is there twice; give each category its own")
        if not _is_text(name):
            raise DataError(f"category {number}: name {name!r}: a text expected")
        isthing = category.get("isthing", 1)
        if type(isthing) not in (int, bool) or isthing not in (0, 1):
            raise DataError(f"category {number}: isthing {isthing!r:.80}: 0 or 1 expected")
        try:
            json.dumps(category, allow_nan=False)
        except ValueError:
            raise DataError(f"category {number}: NaN or infinity in it; write a number, or leave it out") from None
        seen.add(number)


def plan(split: str, entries: Sequence[Entry]) -> list[Place]:
    """Gives each entry an image id and names for its picture and map.

    A map is called after its picture. Where two would be called alike it keeps the picture's ending, and where a
    picture has several maps they are numbered.

    Raises:
        DataError: no entries, a name that leaves the folder or is no text, two pictures of one name, a name that is
            another's folder, or two entries of one id.
    """
    if not entries:
        raise DataError(f"split {split}: no pictures; is this the right folder?")
    first: dict[str, Entry] = {}
    for entry in entries:
        _check_name(entry.name)
        other = first.setdefault(entry.name, entry)
        if other.picture != entry.picture:
            paths = [str(each.picture) for each in (other, entry) if isinstance(each.picture, Path)]
            both = f": {' and '.join(paths)}" if paths else ""
            raise DataError(f"split {split}: two pictures would be called {entry.name}{both}; rename one of them")
    used = Counter(str(PurePosixPath(name).with_suffix("")) for name in first)
    times = Counter(entry.name for entry in entries)
    given = {entry.image_id for entry in entries}
    number, met, ids, maps, places = 0, Counter[str](), set(), dict[str, str](), []
    for entry in entries:
        stem = str(PurePosixPath(entry.name).with_suffix(""))
        base = stem if used[stem] == 1 else entry.name
        name = f"{base}_{met[entry.name]}.png" if times[entry.name] > 1 else f"{base}.png"
        met[entry.name] += 1
        if name in maps:
            raise DataError(f"split {split}: {maps[name]} and {entry.name} would have one map, {name}; rename one")
        maps[name] = entry.name
        image_id = entry.image_id
        if image_id is None:
            number = next(free for free in range(number + 1, number + len(given) + 2) if free not in given)
            image_id = number
        if not (type(image_id) is int and -(2**63) <= image_id < 2**63) and not _is_text(image_id):
            raise DataError(f"split {split}: image id {image_id!r:.80}: a whole number of 64 bits or a text expected")
        if image_id in ids:
            raise DataError(f"split {split}: image id {image_id!r} is there twice; give each picture its own")
        ids.add(image_id)
        places.append(Place(entry, image_id, entry.name, name))
    for names in (set(first), set(maps)):
        folders = {str(folder) for each in names for folder in PurePosixPath(each).parents}
        if clash := folders.intersection(names):
            raise DataError(f"split {split}: {min(clash)} would be a file and a folder; rename one of them")
    return places


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != "" and not has_surrogates(value)


def _check_name(name: str) -> None:
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or str(path) != name or not path.name or "\0" in name:
        raise DataError(f"picture {name!r}: it has no name, or one that leads out of the folder; rename it")
    if has_surrogates(name):
        raise DataError(f"picture {name!r}: its name is no UTF-8, which JSON cannot hold; rename it")
