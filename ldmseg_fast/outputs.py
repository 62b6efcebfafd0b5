"""Refuses outputs that would replace what a command reads, or each other, or that cannot be written."""

from __future__ import annotations

import sys
import tempfile
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.files import is_standard_output, real_path

AnyPath = str | Path
REPORTS = (".json", ".jsonl", ".csv", ".html", ".htm", ".txt", ".md", ".log")  # what may lie beside pictures


def check_outputs(
    files: Mapping[str, AnyPath | None],
    folders: Mapping[str, AnyPath | None] | None = None,
    *,
    inputs: Iterable[AnyPath | None] = (),
    roots: Iterable[AnyPath | None] = (),
) -> None:
    """Checks that no output of a command replaces one of its inputs, or another output.

    Paths are compared by what they lead to: links, hard links, `..` and other spellings of one file are one file, and
    so are names in other letters where the file system takes them for one.

    Args:
        files: files to write, by the option that names them; None: not asked for.
        folders: folders to write into, alike.
        inputs: files and folders that the command reads. In such a folder only reports may be written (.json, .html
            and the like) that replace none of the files among `inputs`.
        roots: folders that hold inputs. They are no output folder, but one may lie in them.

    Raises:
        ArgumentError: names the option, the path and what it would replace.
    """
    read = [Path(path) for path in inputs if path is not None]
    outputs = [(option, Path(path), False) for option, path in files.items() if path is not None]
    outputs += [(option, Path(path), True) for option, path in (folders or {}).items() if path is not None]
    for option, path, is_folder in outputs:
        for source in read:
            if same_place(path, source):
                raise ArgumentError(f"{option} {path}: would replace {source}, which this command reads; {_CURE}")
            if not source.is_file() and is_inside(path, source) and (is_folder or _replaces(path)):
                raise ArgumentError(f"{option} {path}: lies in {source}, which this command reads; {_CURE}")
        for root in roots if is_folder else ():
            if root is not None and same_place(path, Path(root)):
                raise ArgumentError(f"{option} {path}: would be written among what this command reads; {_CURE}")
    for number, (option, path, _) in enumerate(outputs):
        for other, other_path, _ in outputs[:number]:
            printed = is_standard_output(path) and is_standard_output(other_path)
            if printed or (same_place(path, other_path) and not _is_device(path)):
                raise ArgumentError(f"{other} and {option} would both be written to {path}; {_CURE}")


_CURE = "choose another path"


def check_replaced(results: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Checks that no link among files to write leads to something that is read.

    Raises:
        ArgumentError: names the two.
    """
    read = {_identity(path): path for path in inputs if path.exists()}
    for result in results:
        if result.is_symlink() and result.exists() and (source := read.get(_identity(result))) is not None:
            raise ArgumentError(f"{result}: a link to {source}, which would be replaced; {_CURE}")


def check_writable(folder: Path) -> None:
    """Checks that files can be made in a folder, or that it can be made; nothing stays there.

    Raises:
        OSError: names the folder.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        error.filename = str(folder if existing == folder else f"{folder}: {existing}")
        raise


def _identity(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_dev, state.st_ino


def same_place(first: Path, second: Path) -> bool:
    """Tells whether two paths lead to one file or folder, which need not be there yet."""
    try:
        if first.exists() and second.exists():
            return first.samefile(second)
    except OSError:
        return False
    first, second = real_path(first), real_path(second)
    if first == second:
        return True
    if _folded(first.name) != _folded(second.name) or not same_place(first.parent, second.parent):
        return False
    return first.name == second.name or _ignores_case(first.parent)


def is_inside(path: Path, folder: Path) -> bool:
    """Tells whether a path lies in a folder, at any depth and after all links."""
    return any(same_place(parent, folder) for parent in real_path(path).parents)


def report_stream(paths: Iterable[AnyPath | None]) -> IO[str]:
    """Returns where a command prints its table: stderr where one of its outputs goes to stdout."""
    return sys.stderr if any(is_standard_output(path) for path in paths) else sys.stdout


def _replaces(path: Path) -> bool:
    """Whether a file that lies beside pictures may be one of them, or be taken for one later."""
    return path.suffix.lower() not in REPORTS and (path.exists() or path.suffix != "")


def _is_device(path: Path) -> bool:
    return path.exists() and not path.is_file() and not path.is_dir()


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _ignores_case(folder: Path) -> bool:
    """Whether the file system takes names in other letters for one name, as far as a folder's own name tells."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    for path in (existing, *existing.parents):
        other = path.with_name(path.name.swapcase()) if path.name else path
        if other.name != path.name:
            return other.exists() and other.samefile(path)
    return False
