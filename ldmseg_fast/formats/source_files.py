"""Finds pictures and their annotations in the folders of a data set, and reads its lists."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ldmseg_fast.data.picture_folders import picture_suffixes
from ldmseg_fast.errors import DataError
from ldmseg_fast.files import read_file, read_text, text_of, without_repeats

WITHOUT = "pictures without annotation"


def no_listing(error: OSError) -> None:
    """Raises the error of a folder whose files cannot be listed, for `os.walk`, which would pass over it.

    Raises:
        DataError: names the folder.
    """
    raise DataError(f"{error.filename}: {error.strerror or error}: its files cannot be listed; allow it") from None


def files_below(folder: Path, suffixes: Iterable[str]) -> list[Path]:
    """Lists the files below a folder that have one of the endings, in the order of their paths; hidden ones are none.

    Args:
        folder: links to folders in it are followed.
        suffixes: such as ".png", in lower case.

    Raises:
        DataError: no such folder, or one that may not be listed.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    endings = tuple(suffixes)
    found: list[Path] = []
    seen: set[str] = set()  # a link may lead to a folder above it
    for root, folders, names in os.walk(folder, onerror=no_listing, followlinks=True):
        real = os.path.realpath(root)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        names = [] if real in seen else names
        seen.add(real)
        found += [Path(root) / name for name in names if name.lower().endswith(endings) and not name.startswith(".")]
    return sorted(found)


def pictures_below(folder: Path) -> list[Path]:
    """Lists the pictures below a folder, see `files_below`."""
    return files_below(folder, picture_suffixes())


def by_stem(paths: Iterable[Path], folder: Path, cut: Callable[[str], str] = lambda stem: stem) -> dict[str, Path]:
    """Finds files by their path below `folder` without ending; `cut` makes of that what pictures and maps share.

    Raises:
        DataError: two files of one name.
    """
    found: dict[str, Path] = {}
    for path in paths:
        stem = cut(path.relative_to(folder).with_suffix("").as_posix())
        if stem in found:
            raise DataError(f"{found[stem]} and {path}: two files of one name; remove one of them")
        found[stem] = path
    return found


def paired(
    pictures: dict[str, Path], annotations: dict[str, Path], where: Path
) -> tuple[list[tuple[str, Path, Path]], int]:
    """Pairs pictures with annotations by name.

    Returns:
        (name, picture, annotation) in the order of names, and how many pictures have no annotation.

    Raises:
        DataError: annotations without picture, or no pair at all.
    """
    lost = sorted(annotations.keys() - pictures.keys())
    if lost:
        raise DataError(
            f"{len(lost)} of {len(annotations)} annotations have no picture in {where}, first "
            f"{annotations[lost[0]]}; fetch the pictures, or remove the annotations"
        )
    if not annotations:
        raise DataError(f"{where}: no annotations for its pictures; is this the right folder?")
    pairs = [(name, pictures[name], annotations[name]) for name in sorted(annotations)]
    return pairs, len(pictures) - len(pairs)


def check_folder(source: Path) -> None:
    """Checks that a source is a folder.

    Raises:
        DataError: it is none.
    """
    if not source.is_dir():
        raise DataError(f"{source}: {'no folder; unpack it first' if source.exists() else 'no such folder'}")


def first_folder(source: Path, names: Sequence[str], what: str) -> Path:
    """Returns the first of some folders below `source` that is there.

    Raises:
        DataError: none is; it names them.
    """
    check_folder(source)
    for name in names:
        if (source / name).is_dir():
            return source / name
    raise DataError(f"{source}: no folder with {what}: {' or '.join(names)} expected")


def read_list(path: Path, *, empty: bool = False) -> list[str]:
    """Reads the lines of a text file that are not empty; with `empty` these too, but for the last ones.

    Raises:
        DataError: names the file that is missing or no UTF-8.
    """
    try:
        return [line.strip() for line in read_text(path).rstrip().splitlines() if empty or line.strip()]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a text in UTF-8 ({error}); save it as UTF-8") from None


def read_object(path: Path, keys: Sequence[str] = (), *, latin: bool = False) -> dict[str, Any]:
    """Reads a JSON that is an object with these keys.

    Args:
        path: of the file.
        keys: that it must have.
        latin: what is no UTF-8 is Latin-1.

    Raises:
        DataError: names the file that is missing, no JSON, or lacks a key.
    """
    content = read_any_json(path, latin=latin)
    missing = [key for key in keys if key not in content] if isinstance(content, dict) else list(keys) or ["keys"]
    if missing:
        raise DataError(f"{path}: an object with {', '.join(keys) or 'keys'} expected; {missing[0]} is missing")
    return content


def read_any_json(path: Path, *, latin: bool = False) -> Any:
    """Reads a JSON; with `latin` what is no UTF-8 is Latin-1.

    Raises:
        DataError: names the file that is missing or no JSON.
    """
    try:
        content = read_file(path, DataError, "JSON file")
        try:
            text = text_of(content)
        except UnicodeDecodeError:
            if not latin:
                raise
            text = content.decode("latin-1")
        return json.loads(text, object_pairs_hook=without_repeats)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:  # no text, no JSON, a number of thousands of digits, deep lists
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not a JSON file ({error}); save or fetch it again") from None
