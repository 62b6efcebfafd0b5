"""Finds pictures in tar files as webdataset writes them: members of one key, such as 0001.jpg and 0001.json.

The key of a member is its path up to the first dot of the file's name; what follows is its kind. The format is
github.com/webdataset/webdataset#the-webdataset-format.
"""

from __future__ import annotations

import itertools
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ldmseg_fast.data.picture_folders import OWN, FoundPicture, FoundPictures, find_pictures, once, picture_suffixes
from ldmseg_fast.data.pictures import Picture, decode_picture
from ldmseg_fast.errors import ArgumentError, DataError
from ldmseg_fast.files import MAX_BYTES, open_file

MAX_SHARDS = 10**6  # that one name with braces may stand for
LONGEST_NAME, LONGEST_KEY = 255, 2048  # bytes; results have longer names, and lie in a folder
_RANGE = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass(frozen=True)
class Member:
    """Says where a file lies in a tar.

    Attributes:
        tar: the file.
        name: of the member.
        offset: of its first byte in the tar.
        size: in bytes.
    """

    tar: Path
    name: str
    offset: int
    size: int

    @property
    def path(self) -> Path:
        """Returns what messages call it."""
        return self.tar / self.name

    def content(self) -> bytes:
        """Reads it.

        Raises:
            DataError: the tar is gone or shorter than it was.
        """
        if self.size > MAX_BYTES:
            raise DataError(f"{self.path}: {self.size} bytes, over {MAX_BYTES} bytes: is this the right file?")
        try:
            with open_file(self.tar, DataError, "tar file") as file:
                content = os.pread(file.fileno(), self.size, self.offset)
        except OSError as error:
            raise DataError(f"{self.path}: not readable ({error})") from error
        if len(content) < self.size:
            raise DataError(f"{self.path}: the tar file ends in the middle of it")
        return content


@dataclass(frozen=True)
class ShardPicture(FoundPicture):
    """Names a picture in a tar; `file` is the tar's path with the member's name behind it.

    Attributes:
        members: of its key, by kind, such as "jpg" and "map.png"; the picture's own first.
    """

    members: tuple[tuple[str, Member], ...] = ()

    def read(self, *, exif: bool = True, max_pixels: int) -> Picture:
        """See `FoundPicture.read`."""
        return decode_picture(self.members[0][1].content(), self.file, exif=exif, max_pixels=max_pixels)

    def source(self) -> Path:
        """See `FoundPicture.source`."""
        return self.members[0][1].tar


def find_inputs(paths: Sequence[str | Path], *, recursive: bool = False, out: Path | None = None) -> FoundPictures:
    """Lists pictures of files and folders as `find_pictures` does, and those in tar files.

    A name such as "shards-{000000..000099}.tar" stands for all of its numbers. Of a folder without pictures its tar
    files are taken. What is broken in a tar is listed, and the rest of it taken.

    Args:
        paths: of pictures, folders and tar files.
        recursive, out: as in `find_pictures`.

    Raises:
        FileNotFoundError: a path that is not there.
        DataError: a folder without pictures, or a pipe, socket or device.
        ArgumentError: braces that stand for too many files.
    """
    found = FoundPictures()
    for path in itertools.chain.from_iterable(map(expand_braces, paths)):
        if path.name.lower().endswith(_COMPRESSED):
            raise DataError(f"{path}: compressed tar files cannot be read at any place; decompress it first")
        tars = _tars_of(path)
        if tars is None:
            part = find_pictures([path], recursive=recursive, out=out)
            found.pictures += part.pictures
            found.left_out += part.left_out
            found.from_folders |= part.from_folders
            continue
        found.from_folders |= path.is_dir()
        for tar in tars:
            _read_tar(tar, found)
    found.pictures = once(found.pictures)
    return found


def _tars_of(path: Path) -> list[Path] | None:
    """The tar files that a path stands for; None where it stands for pictures."""
    if not path.is_dir():
        return [path] if path.suffix.lower() == ".tar" and (path.exists() or not path.is_symlink()) else None
    files = [file for file in sorted(path.iterdir()) if not file.name.startswith(".") and file.is_file()]
    if any(file.suffix.lower() in picture_suffixes() for file in files):
        return None
    return [file for file in files if file.suffix.lower() == ".tar"] or None


def expand_braces(path: str | Path) -> list[Path]:
    """Lists what {first..last} in a name stands for, as bash does; a file of just this name is itself.

    Raises:
        ArgumentError: it stands for more than MAX_SHARDS files.
    """
    text = os.fspath(path)
    ranges = _RANGE.findall(text)
    if not ranges or os.path.lexists(text):
        return [Path(path)]
    count = 1
    for first, last in ranges:
        count *= abs(int(last) - int(first)) + 1
    if count > MAX_SHARDS:
        raise ArgumentError(f"{text}: stands for {count} files, over {MAX_SHARDS}")
    literals = _RANGE.split(text)[::3]
    numbers = itertools.product(*(list(_numbers(*each)) for each in ranges))
    return [
        Path("".join(part for pair in itertools.zip_longest(literals, each, fillvalue="") for part in pair))
        for each in numbers
    ]


def _numbers(first: str, last: str) -> Iterator[str]:
    padded = any(len(text) > 1 and text.startswith("0") for text in (first, last))
    width = max(len(first), len(last)) if padded else 0
    step = 1 if int(first) <= int(last) else -1
    return (str(number).zfill(width) for number in range(int(first), int(last) + step, step))


def _read_tar(tar: Path, found: FoundPictures) -> None:
    """Adds the pictures of a tar, in the order of their keys' first members, and lines for what is broken in it."""
    keys: dict[str, list[tuple[str, Member]]] = {}
    try:
        for info in _members(tar):
            key, kind = _key_of(info.name)
            if info.isdir():
                continue
            if not key:
                found.left_out["members without a key"] += 1
            elif not info.isreg() or info.issparse():
                found.broken.append(f"{tar / info.name}: a link or no regular file; store the file itself")
            elif (why := _unsafe(key)) is not None:
                found.broken.append(f"{tar}: {info.name!r:.200}: {why}; rename the member")
            else:
                keys.setdefault(key, []).append((kind, Member(tar, info.name, info.offset_data, info.size)))
    except DataError as error:
        found.broken.append(str(error))
    before, without = len(found.pictures), 0
    for key, members in keys.items():
        pictures = [(kind, member) for kind, member in members if f".{kind}".lower() in picture_suffixes()]
        if len(pictures) > 1:
            names = ", ".join(member.name for _, member in pictures)
            found.broken.append(
                f"{tar}: {names}: {len(pictures)} pictures of one key; name what is no picture KEY.x.png"
            )
        elif pictures:
            place = PurePosixPath(key)
            ordered = (pictures[0], *(each for each in members if each[1] is not pictures[0][1]))
            kind = pictures[0][0]
            found.pictures.append(ShardPicture(tar / f"{key}.{kind}", Path(place.parent), members=ordered))
        else:
            without += 1
    if len(found.pictures) == before and not any(line.startswith(str(tar)) for line in found.broken[-1:]):
        found.broken.append(f"{tar}: no pictures in this tar file")
    elif without:
        found.left_out["keys without a picture"] += without


def _members(tar: Path) -> Iterator[tarfile.TarInfo]:
    """Yields the members that are whole.

    Raises:
        DataError: no tar file, or one that is cut or damaged behind what was yielded.
        FileNotFoundError: nothing is there.
    """
    count = end = 0
    with open_file(tar, DataError, "tar file") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                while (info := archive.next()) is not None:
                    archive.members = []  # type: ignore[attr-defined]  # or all would stay in memory
                    if info.size < 0 or archive.offset <= end:  # a header that leads back would be read for ever
                        raise tarfile.ReadError("a damaged header")
                    end = archive.offset
                    if info.isreg() and info.offset_data + info.size > size:
                        raise tarfile.ReadError(f"it ends in the middle of {info.name}")
                    count += 1
                    yield info
                mark = os.pread(file.fileno(), tarfile.BLOCKSIZE, archive.offset)
                if mark != bytes(tarfile.BLOCKSIZE):  # which tarfile takes for the end too
                    raise tarfile.ReadError("a damaged header" if mark else "its end mark is missing: is it cut off?")
        except (tarfile.TarError, EOFError, ValueError, OverflowError, OSError) as error:
            after = f" after {count} members" if count else ""
            raise DataError(f"{tar}: not readable as a tar file{after} ({error}); write it again") from error


def _key_of(name: str) -> tuple[str, str]:
    """Splits a member's name into key and kind; no key where the file's name begins with a dot or has none."""
    name = name.removeprefix("./")
    stem, _, kind = name.rpartition("/")[2].partition(".")
    return (name.removesuffix(f".{kind}"), kind) if stem and kind else ("", "")


def _unsafe(key: str) -> str | None:
    """Why results cannot be called like a key; None where they can."""
    if key.startswith("/") or ".." in key.split("/"):
        return "leads out of the folder of results"
    if any(ord(character) < 32 for character in key) or "\\" in key:
        return "has control characters or backslashes"
    if any(part.startswith(OWN) for part in key.split("/")):
        return f"has a folder of a name that begins with {OWN}, as ours do"
    if len(os.fsencode(key)) > LONGEST_KEY or any(len(os.fsencode(part)) > LONGEST_NAME for part in key.split("/")):
        return "has a name that file systems do not take"
    return None
