"""Segments many pictures for one visitor: a zip or several files in, results on disk, one zip out."""

from __future__ import annotations

import io
import stat
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from ldmseg_fast.app.exports import MAPS, Exported, check_kind, different_names, write_maps, zip_data_set, zip_folder
from ldmseg_fast.app.limits import Cancelled, Limits, TimeOver
from ldmseg_fast.app.segments import Segments
from ldmseg_fast.app.work import Settings, Worker
from ldmseg_fast.data.picture_folders import FoundPicture, picture_suffixes
from ldmseg_fast.errors import ArgumentError, DataError, PanopticFormatError
from ldmseg_fast.formats.coco_panoptic_reader import read_predictions

MAX_DIRECTORY = 8 * 2**20  # bytes of a zip's list of members
_END = struct.Struct("<4s4H2LH")  # end of central directory, APPNOTE.TXT 4.3.16
_CHUNK = 2**20  # bytes

Progress = Callable[[int, int, str], None]  # (pictures done, of all, the next one's name)


@dataclass(frozen=True)
class Members:
    """Holds the pictures of a batch, unpacked.

    Attributes:
        pictures: files whose names are safe and whose stems differ.
        left_out: a line for each member that is no picture or cannot be read.
    """

    pictures: tuple[Path, ...]
    left_out: tuple[str, ...] = ()


@dataclass
class BatchResult:
    """Holds the results of a batch in a folder.

    Attributes:
        folder: that has NAME.png, NAME.json and NAME_overlay.png of each picture.
        pictures: that were segmented.
        left_out: a line for each that was not.
        segments: that were found, in all pictures together.
        cancelled: whether the visitor ended it before the last picture.
        seconds: that the work took.
    """

    folder: Path
    pictures: list[Path] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    segments: int = 0
    cancelled: bool = False
    seconds: float = 0.0

    def report(self) -> str:
        """Writes what was left out, a line each; "" where nothing was."""
        return "".join(f"{line}\n" for line in self.left_out)

    def write(self, kind: str, path: str | Path) -> Path:
        """Writes the results as one zip in any format of `exports.EXPORTS`; left-out.txt is in it where needed.

        Raises:
            ArgumentError: no such format, or no results.
            DataError: results that the format cannot hold.
            OSError: a file that cannot be written.
        """
        check_kind(kind, cityscapes=True)
        if not self.pictures:
            raise ArgumentError("no results to download: none of the pictures was segmented")
        if kind == MAPS:
            return zip_folder(self.folder, path, self.report())
        found = read_predictions(self.folder, [FoundPicture(each) for each in self.pictures])
        return zip_data_set(found, kind, path, self.report())


def unpack(sources: Sequence[str | Path], folder: Path, limits: Limits) -> Members:
    """Copies the pictures of uploads into a folder: of zips all that are pictures, other files as they are.

    Nothing is decoded. Members that are damaged or no pictures are left out, and so are hidden ones.

    Args:
        sources: zips and pictures.
        folder: an empty one.
        limits: `batch`, `unpacked` and `max_upload` are used.

    Raises:
        ArgumentError: too many pictures, too many bytes, or nothing that is a picture.
        DataError: a zip that cannot be read, that is encrypted, or whose members' names lead out of it.
        OSError: a file that cannot be written.
    """
    if not sources:
        raise ArgumentError("give pictures, or a zip of pictures")
    names: list[str] = []
    opened: list[Callable[[], Any]] = []
    left_out: list[str] = []
    zips = []
    try:
        for source in map(Path, sources):
            if zipfile.is_zipfile(source) and source.suffix.lower() not in picture_suffixes():
                zipped = _open_zip(source)
                zips.append(zipped)
                for info in _pictures_of(zipped, source.name, left_out):
                    names.append(info.filename)
                    opened.append(partial(zipped.open, info))
            elif source.suffix.lower() == ".zip":
                raise DataError(f"{source.name}: no zip that can be read: pack the pictures again")
            elif source.suffix.lower() in picture_suffixes():
                names.append(source.name)
                opened.append(partial(source.open, "rb"))
            else:
                left_out.append(f"{source.name}: no picture by its ending")
        if len(names) > limits.batch:
            raise ArgumentError(f"{len(names)} pictures: this app takes {limits.batch} at once; give fewer")
        if not names:
            reasons = f" ({left_out[0]})" if left_out else ""
            raise ArgumentError(f"no pictures in what was given{reasons}")
        pictures, total = [], 0
        for name, original, opener in zip(different_names(names), names, opened):
            path = folder / name
            try:
                total += _copy(opener, path, min(limits.max_upload, limits.unpacked - total), limits)
            except (zipfile.BadZipFile, NotImplementedError, EOFError, zlib.error, DataError) as error:
                path.unlink(missing_ok=True)
                if isinstance(error, _Bomb):
                    raise ArgumentError(str(error)) from None
                left_out.append(f"{original}: damaged in the zip, left out")
                continue
            pictures.append(path)
    finally:
        for zipped in zips:
            zipped.close()
    return Members(tuple(pictures), tuple(left_out))


def run_batch(
    worker: Worker,
    members: Members,
    folder: Path,
    settings: Settings | None = None,
    stop: Any = None,
    progress: Progress | None = None,
) -> BatchResult:
    """Segments every picture and writes its result at once; pictures that cannot be read are left out.

    Args:
        worker: of all visitors; between two pictures others have their turn.
        members: of `unpack`.
        folder: for the results, an empty one.
        settings: as in `Worker.segment`.
        stop: of `Limits.work`; its time counts for each picture. Where it ends the work, what is there is kept.
        progress: is told before every picture, and after the last.

    Raises:
        ArgumentError, ConfigError, BackendError: a setting that is out of range.
        OSError: a file that cannot be written.
    """
    settings = worker.filled(settings)
    result = BatchResult(folder, left_out=list(members.left_out))
    start = time.perf_counter()
    for number, path in enumerate(members.pictures):
        if progress is not None:
            progress(number, len(members.pictures), path.name)
        try:
            if stop is not None:
                restart = getattr(stop, "restart", None)
                if restart is not None:
                    restart()
                stop()
            done = worker.segment(path, settings, stop)
        except (Cancelled, TimeOver) as error:
            result.cancelled = isinstance(error, Cancelled)
            result.left_out += [f"{each.name}: {error}" for each in members.pictures[number:]]
            break
        except (DataError, PanopticFormatError) as error:
            result.left_out.append(str(error).replace(str(path), path.name))
            continue
        segments = Segments(done.result, worker.categories)
        item = Exported.of(path.name, path, segments, done.view, done.orientation)
        write_maps(folder, path.name, item)
        result.pictures.append(path)
        result.segments += len(segments)
    if progress is not None:
        progress(len(result.pictures), len(members.pictures), "")
    result.seconds = time.perf_counter() - start
    return result


class _Bomb(DataError):
    """Reports more bytes than a batch may have."""


def _copy(source: Callable[[], Any], path: Path, most: int, limits: Limits) -> int:
    """Copies at most so many bytes, whatever the zip says of the member's size."""
    written = 0
    with source() as file, path.open("wb") as out:
        while chunk := file.read(_CHUNK):
            written += len(chunk)
            if written > most:
                raise _Bomb(
                    f"{path.name}: the pictures unpack to too much: this app takes {limits.max_upload} bytes a picture "
                    f"and {limits.unpacked} in all"
                )
            out.write(chunk)
    return written


def _open_zip(path: Path) -> zipfile.ZipFile:
    """Opens a zip after a look at the size of its list of members, which Python would read whole."""
    with path.open("rb") as file:
        file.seek(0, io.SEEK_END)
        length = file.tell()
        file.seek(max(0, length - _END.size - 65535 - 20))
        tail = file.read()
    place = tail.rfind(b"PK\5\6")
    if place < 0 or place + _END.size > len(tail):
        raise DataError(f"{path.name}: no zip that can be read: pack the pictures again")
    size = _END.unpack_from(tail, place)[5]
    if size > MAX_DIRECTORY or tail[max(0, place - 20) : place].startswith(b"PK\6\7"):
        raise DataError(f"{path.name}: too many members, or of the kind zip64: give a smaller zip")
    with suppress(zipfile.BadZipFile, ValueError, OverflowError, struct.error, NotImplementedError):
        return zipfile.ZipFile(path)
    raise DataError(f"{path.name}: a damaged zip: pack the pictures again")


def _pictures_of(zipped: zipfile.ZipFile, name: str, left_out: list[str]) -> list[zipfile.ZipInfo]:
    """Lists the members that are pictures by their endings.

    Raises:
        DataError: encrypted members, links, and names that lead out of the zip.
    """
    found = []
    for info in zipped.infolist():
        path = PurePosixPath(info.filename.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or (path.parts and path.parts[0].endswith(":")):
            raise DataError(f"{name}: the member {info.filename!r:.80} leads out of the zip, which is refused")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise DataError(f"{name}: the member {info.filename!r:.80} is a link, which is refused")
        if info.is_dir() or any(part.startswith((".", "__MACOSX")) for part in path.parts):
            continue
        if info.flag_bits & 0x1:
            raise DataError(
                f"{name}: the member {info.filename!r:.80} is encrypted: pack the pictures without a password"
            )
        if path.suffix.lower() not in picture_suffixes():
            left_out.append(f"{info.filename}: no picture by its ending")
            continue
        found.append(info)
    return found
