"""Keeps what an import has made of a split until all of it is there."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldmseg_fast.errors import DataError
from ldmseg_fast.files import real_path, replacing, sync_folder
from ldmseg_fast.formats.options import WriteOptions
from ldmseg_fast.formats.places import Place

_JOURNAL = "journal.jsonl"


class SplitJournal:
    """Holds an import of one split: OUT/.import-SPLIT/ with pictures/, maps/ and journal.jsonl.

        journal.check()
        with journal.opened():
            for place in places:
                if not journal.has(place, made_from):
                    journal.add(place, made_from, made)
        journal.finish()

    An entry is in the journal once its files are on disk. `finish` moves the folders to their places and writes the
    JSON last. An import that was killed in between goes on in the folders' places.

    Args:
        out: the COCO-panoptic folder.
        split: its name.
        categories: COCO entries.
        options: an unfinished import of another `origin` or another `copy` does not go on.
    """

    def __init__(self, out: Path, split: str, categories: Sequence[Mapping[str, Any]], options: WriteOptions) -> None:
        self.split, self.folder = split, out / f".import-{split}"
        self._json = out / "annotations" / f"panoptic_{split}.json"
        self._moves = {self.folder / "pictures": out / split, self.folder / "maps": out / f"panoptic_{split}"}
        self._pictures, self._maps = self._moves
        self._path = self.folder / _JOURNAL
        self._categories = [dict(category) for category in categories]
        total = hashlib.sha256(json.dumps(self._categories, sort_keys=True).encode()).hexdigest()[:32]
        self._settings = {"origin": options.origin, "copy": options.copy, "categories": total}
        self._records: dict[str, str] = {}  # as text, which is a tenth of the size of the dictionaries
        self.segments = 0
        self._file: Any = None

    def __len__(self) -> int:
        return len(self._records)

    def check(self) -> None:
        """Checks that the split's places are free or this import's own.

        Raises:
            DataError: names what is there already.
        """
        if self._path.is_file():
            settings = next((record for record, _ in _records(self._path)), {})
            if settings != self._settings:
                origin = settings.get("origin")
                raise DataError(
                    f"{self.folder}: an unfinished import of another source or with other options"
                    + (f" ({origin})" if origin and origin != self._settings["origin"] else "")
                    + "; finish it by its own command, or delete that folder to start anew"
                )
        for inner, final in self._moves.items():
            if os.path.lexists(final) and not (self._path.is_file() and not inner.exists()):
                raise DataError(f"{final} is there already; choose another folder, or remove this split from it")
        is_own = self._path.is_file() and not all(inner.exists() for inner in self._moves)
        if os.path.lexists(self._json) and not is_own:
            raise DataError(f"{self._json} is there already; choose another folder, or remove this split from it")

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Opens the journal, with what an earlier import has left."""
        if not self._path.is_file() and self.folder.exists():
            shutil.rmtree(self.folder)  # a kill came while it was made or removed
        if not self._path.is_file():
            for inner in self._moves:
                inner.mkdir(parents=True)
        self._pictures, self._maps = (inner if inner.is_dir() else final for inner, final in self._moves.items())
        if self._path.is_file():
            self._records = {record["map"]: text for record, text in _records(self._path) if "map" in record}
        else:
            with replacing(self._path) as temporary:
                temporary.write_text(json.dumps(self._settings) + "\n", encoding="utf-8")
        with self._path.open("a", encoding="utf-8") as self._file:
            self._file.write("\n")  # ends a line that a kill has torn
            yield

    def map_path(self, place: Place) -> Path:
        """Returns where an entry's map is written, in a folder that is there."""
        path = self._maps / place.map
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def put_picture(self, place: Place, content: bytes, copy: bool) -> None:
        """Links an entry's picture, or writes its content: a copy, or of one that lies in no file.

        Raises:
            DataError: a file system without links.
            OSError: it cannot be written.
        """
        path, picture = self._pictures / place.name, place.entry.picture
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(picture, Path) and not copy:
            target = real_path(picture)
            if path.is_symlink() and path.readlink() != target:
                path.unlink()
            try:
                path.symlink_to(target)
            except FileExistsError:
                pass  # of another map of this picture
            except OSError as error:
                if error.errno in (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise DataError(f"{path}: this file system holds no links; use --copy") from None
                raise
            return
        with replacing(path) as temporary:
            temporary.write_bytes(content)

    def has(self, place: Place, made_from: str) -> bool:
        """Tells whether an entry was made, of the same sources, and its files are still as they were made."""
        text = self._records.get(place.map)
        if text is None or not made_from:
            return False
        record = json.loads(text)
        image = record.get("image", {})
        return (
            record.get("made_from") == made_from
            and (image.get("id"), image.get("file_name")) == (place.image_id, place.name)
            and record.get("state") == _state(self._maps / place.map)
            and (self._pictures / place.name).is_file()
        )

    def add(self, place: Place, made_from: str, made: Mapping[str, Any]) -> None:
        """Notes an entry whose files are there.

        Raises:
            OSError: a full disk; it names the journal.
        """
        state = _state(self._maps / place.map)
        text = json.dumps({"map": place.map, "made_from": made_from, "state": state, **made})
        try:
            self._file.write(text + "\n")
            self._file.flush()
        except OSError as error:
            error.filename = str(self._path)
            raise
        self._records[place.map] = text

    def drop(self, place: Place) -> None:
        """Forgets an entry that can no longer be read."""
        self._records.pop(place.map, None)

    def keep(self, maps: Iterable[str]) -> None:
        """Forgets entries that are no longer in the source, and brings the others into its order."""
        self._records = {name: self._records[name] for name in maps if name in self._records}
        self.segments = sum(len(record["annotation"]["segments_info"]) for record in self._each())

    def left_out(self) -> Iterator[tuple[str, dict[str, int]]]:
        """Gives the name of each picture of which something was left out, and reason -> how many."""
        for record in self._each():
            if record["left_out"]:
                yield record["image"]["file_name"], record["left_out"]

    def clear_empty(self) -> bool:
        """Removes the folder where nothing is in it; tells whether it stays."""
        if not self._records:
            shutil.rmtree(self.folder, ignore_errors=True)
        return bool(self._records)

    def finish(self) -> list[Path]:
        """Moves the folders to their places, writes the JSON, and removes the journal.

        Returns:
            The three paths.
        """
        _clear(self._pictures, {record["image"]["file_name"] for record in self._each()})
        _clear(self._maps, set(self._records))
        for inner, final in self._moves.items():
            if inner.is_dir():
                inner.rename(final)
        self._json.parent.mkdir(exist_ok=True)
        with replacing(self._json) as temporary, temporary.open("w", encoding="utf-8") as file:
            for key, end in (("image", '{"images": [\n'), ("annotation", '\n], "annotations": [\n')):
                file.write(end)
                for number, record in enumerate(self._each()):
                    file.write(",\n" * (number > 0) + json.dumps(record[key]))
            file.write(f'\n], "categories": {json.dumps(self._categories)}}}\n')
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self._json.parent)
        self._path.unlink()
        shutil.rmtree(self.folder)
        return [*self._moves.values(), self._json]

    def _each(self) -> Iterator[dict[str, Any]]:
        return map(json.loads, self._records.values())


def _records(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Gives the journal's lines, decoded and as they stand; half a line, which a kill may leave, is none."""
    with path.open("rb") as file:
        for line in file:
            with contextlib.suppress(ValueError, RecursionError):
                text = line.decode("utf-8").strip()
                record = json.loads(text)
                if isinstance(record, dict):
                    yield record, text


def _clear(folder: Path, names: set[str]) -> None:
    """Removes what was made of entries that are no longer there, and folders that it leaves empty."""
    for path in sorted(folder.rglob("*"), reverse=True):  # what lies in a folder before the folder
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):
                path.rmdir()
        elif path.relative_to(folder).as_posix() not in names:
            path.unlink()


def _state(path: Path) -> list[int] | None:
    try:
        state = path.stat()
    except OSError:
        return None
    return [state.st_size, state.st_mtime_ns]
