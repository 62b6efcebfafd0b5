"""Goes through the pictures of a data set for a writer: names, progress, places of pictures, and what is left out."""

from __future__ import annotations

import errno
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ldmseg_fast.data.pictures import read_content
from ldmseg_fast.errors import DataError, UserError
from ldmseg_fast.files import real_path, replacing
from ldmseg_fast.formats.data_set import AnnotatedMap, DataSet
from ldmseg_fast.formats.options import Summary, WriteOptions
from ldmseg_fast.formats.places import Place, check_categories, check_split, plan


@dataclass(frozen=True)
class Item:
    """Holds one picture on its way out.

    Attributes:
        split: its name.
        place: names that no other picture of the split has.
        map: its map.
    """

    split: str
    place: Place
    map: AnnotatedMap

    @property
    def name(self) -> str:
        """Returns the picture's name in the split, with `/` between folders."""
        return self.place.name

    @property
    def stem(self) -> str:
        """Returns what a file that belongs to the map is called, without an ending, with `/` between folders."""
        return self.place.map.removesuffix(".png")

    def put_picture(self, path: Path, options: WriteOptions) -> None:
        """Puts the picture at `path`: a copy where `options` ask for one or it has no file, otherwise a link.

        A picture with several maps is put there once.

        Raises:
            DataError: a picture that is not there, or a file system without links.
            OSError: a file that cannot be written.
        """
        if path.is_symlink() or path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = self.place.entry.picture
        if not isinstance(picture, Path):
            with replacing(path) as temporary:
                temporary.write_bytes(self.place.content(read_content))
        elif not picture.is_file():
            raise DataError(f"{picture}: no such picture")
        elif options.copy:
            with replacing(path) as temporary:
                shutil.copyfile(picture, temporary)
        else:
            try:
                path.symlink_to(real_path(picture))
            except OSError as error:
                if error.errno in (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise DataError(f"{self.name}: the file system of OUT holds no links; use --copy") from None
                raise


class Walk:
    """Reads the maps of a data set one by one and keeps the counts of a `Summary`.

    Raises:
        DataError: at once where a name leads out of the folder, or two pictures have one name.
    """

    def __init__(self, data_set: DataSet, options: WriteOptions) -> None:
        self.options = options
        self.left_out: Counter[str] = Counter(data_set.left_out)
        self.first: dict[str, str] = {}
        self.pictures = self.segments = 0
        self._faults: list[str] = []
        check_categories(data_set.categories)
        for split in data_set.splits:
            check_split(split)
        self._places = {split: plan(split, entries) for split, entries in data_set.splits.items()}

    def items(self, what: str) -> Iterator[Item]:
        """Yields every picture of every split.

        Args:
            what: is written, for the line of progress.

        Raises:
            DataError: a map that cannot be read; with `skip_bad` it is left out.
        """
        total = sum(map(len, self._places.values()))
        with tqdm(total=total, desc=what, unit="picture", disable=None) as progress:
            for split, places in self._places.items():
                for place in places:
                    try:
                        annotated = place.entry.read()
                    except UserError as error:
                        if not self.options.skip_bad:
                            raise
                        self._faults.append(f"{place.name}: {error}")
                    else:
                        for reason, count in annotated.left_out.items():
                            self.leave_out(reason, count, place.name)
                        yield Item(split, place, annotated)
                        self.pictures += 1
                        self.segments += len(annotated.segments)
                    progress.update()

    def leave_out(self, reason: str, count: int, where: str) -> None:
        """Counts what the format does not hold, and remembers the picture where it was met first."""
        if count:
            self.left_out[reason] += count
            self.first.setdefault(reason, where)

    def summary(self, *files: Path) -> Summary:
        """Says what has been written.

        Raises:
            DataError: nothing, as no picture could be read.
        """
        if self._faults and not self.pictures:
            raise DataError(f"none of the {len(self._faults)} pictures can be read; first {self._faults[0]}")
        return Summary(self.pictures, self.segments, files, dict(self.left_out), dict(self.first), tuple(self._faults))
