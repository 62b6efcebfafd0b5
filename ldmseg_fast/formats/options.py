"""Holds what readers and writers of formats are told, and what a writer tells afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ldmseg_fast.errors import ArgumentError, DataError


@dataclass(frozen=True)
class ReadOptions:
    """Says what of a data set is read, and how.

    Attributes:
        splits: names of splits; none: all.
        connected: names or ids of categories whose 4-connected pieces are instances; several may stand in one text
            with commas between them.
        things: names or ids of the categories that are things, all others are stuff; as `connected`. None: as the
            format says.
        version: of the format, or its variant, where a source has several; "": the reader's choice.
    """

    splits: tuple[str, ...] = ()
    connected: tuple[str, ...] = ()
    things: tuple[str, ...] = ()
    version: str = ""

    def chosen(self, found: Iterable[str], source: Path) -> list[str]:
        """Returns the splits that are asked for, all of `found` where none is.

        Args:
            found: the splits of the source.
            source: for the error.

        Raises:
            DataError: names a split that the source does not have, and those that it has.
        """
        known = list(found)
        for split in self.splits:
            if split not in known:
                raise DataError(f"{source}: no split {split}; splits found: {', '.join(known) or 'none'}")
        return [split for split in known if not self.splits or split in self.splits]

    def one_version(self, known: Mapping[str, str] | tuple[str, ...], kind: str, default: str = "") -> str:
        """Returns the version, `default` where none is asked for.

        Args:
            known: the versions that the reader has.
            kind: the format, for the error.
            default: what "" means.

        Raises:
            ArgumentError: another version.
        """
        if self.version and self.version not in known:
            choices = f"known are {', '.join(known)}" if known else "it has no versions; leave it out"
            raise ArgumentError(f"--version {self.version}: no version of {kind}; {choices}")
        return self.version or default


@dataclass(frozen=True)
class WriteOptions:
    """Says how a data set is written.

    Attributes:
        copy: pictures are copied, otherwise they are links to the source's.
        shape: of a segment, where a format has the choice.
        skip_bad: entries that cannot be read are left out, otherwise nothing is written where there is one.
        origin: says what is imported, from where and how. An unfinished import goes on only where it is the same.
    """

    copy: bool = False
    shape: Literal["rle", "polygon"] = "rle"
    skip_bad: bool = False
    origin: str = ""


@dataclass(frozen=True)
class Summary:
    """Holds what a writer has done.

    Attributes:
        pictures: written.
        segments: written.
        files: what was written, files or folders.
        left_out: reason -> how many, such as {"pictures without annotation": 3}.
        first: reason -> where it was met first.
        faults: entries that could not be read, one line each; with `skip_bad` they were left out.
    """

    pictures: int
    segments: int
    files: tuple[Path, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)
    first: Mapping[str, str] = field(default_factory=dict)
    faults: tuple[str, ...] = ()

    def text(self, named: int = 10) -> str:
        """Formats counts, what was left out and why, and the first `named` faults, as lines."""
        lines = [f"{self.pictures} pictures with {self.segments} segments"]
        lines += [f"  {path}" for path in self.files]
        rows = [(count, reason) for reason, count in self.left_out.items() if count]
        if self.faults:
            rows.append((len(self.faults), "pictures that could not be read"))
        if rows:
            lines.append("left out:")
        for count, reason in rows:
            where = f", first in {self.first[reason]}" if reason in self.first else ""
            lines.append(f"  {count} {reason}{where}")
        return "\n".join([*lines, *faults_text(self.faults, named)])


def faults_text(faults: tuple[str, ...], named: int = 10) -> list[str]:
    """Lists the first `named` of the faults as lines, and says how many there are beside them."""
    more = [f"  ... and {len(faults) - named} more"] if len(faults) > named else []
    return [*(f"  - {fault}" for fault in faults[:named]), *more]
