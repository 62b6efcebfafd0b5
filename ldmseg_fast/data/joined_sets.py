"""Joins several COCO-panoptic folders into one training set, which draws from each as often as its weight says."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from ldmseg_fast.config import DataConfig
from ldmseg_fast.config.roots import entries_of
from ldmseg_fast.data.coco_panoptic import CocoPanoptic
from ldmseg_fast.data.sampler import EpochSampler, permutation
from ldmseg_fast.errors import ConfigError

BLOCK = 1000  # draws within which the shares of the sets hold exactly


@dataclass(frozen=True)
class SetPlace:
    """Says where one set of a run lies.

    Attributes:
        root: the COCO-panoptic folder.
        train_split, val_split: of it; no `val_split`: it is not validated on.
        name: for logs; no two sets of a run share one.
    """

    root: str
    train_split: str
    val_split: str
    name: str


def set_places(data: DataConfig) -> list[SetPlace]:
    """Reads `data.root`: one folder, or several with commas between, each ROOT, ROOT:TRAIN or ROOT:TRAIN:VAL.

    TRAIN and VAL are the set's own splits in the place of `data.train_split` and `data.val_split`; with nothing after
    the second colon the set is not validated on. A folder whose own name has such characters is taken as it is.

    Raises:
        ConfigError: an empty entry, no set to validate on, or `data.weights` of another number.
    """
    entries = entries_of(data.root)
    if len(entries) > 1 and not all(entries):
        raise ConfigError(f"data.root={data.root}: an entry of the list is empty; write ROOT,ROOT,...")
    places: list[SetPlace] = []
    for entry in entries:
        place = _place(entry, data)
        names = {other.name for other in places}
        numbered = (f"{place.name}-{number}" for number in range(2, len(entries) + 2))
        name = place.name if place.name not in names else next(name for name in numbered if name not in names)
        places.append(replace(place, name=name))
    if not any(place.val_split for place in places):
        raise ConfigError(f"data.root={data.root}: no set to validate on; name a split after one's second colon")
    if data.weights and len(data.weights) != len(places):
        raise ConfigError(
            f"data.weights={','.join(map(str, data.weights))}: {len(data.weights)} for {len(places)} of data.root; one "
            f"each expected"
        )
    return places


def _place(entry: str, data: DataConfig) -> SetPlace:
    root, splits = entry, [data.train_split, data.val_split]
    for colons in (1, 2) if not os.path.exists(entry) else ():  # noqa: PTH110 (False where the name is too long)
        parts = entry.rsplit(":", colons)
        if len(parts) == colons + 1 and os.path.isdir(parts[0]):  # noqa: PTH112
            root, splits = parts[0], [*parts[1:], *splits[colons:]]
            if not parts[1]:
                raise ConfigError(f"data.root: {entry}: no training split after the colon; write ROOT:TRAIN:VAL")
    name = Path(os.path.abspath(root)).name.replace("/", "_")  # noqa: PTH100 (no links followed: the name as given)
    return SetPlace(root, splits[0], splits[1], name)


class JoinedSets(Dataset):
    """Gives the items of several sets by one index; a (epoch, index) pair counts the set's own epochs.

    Attributes:
        sets: the data sets, in the order of `data.root`.
        names: of them.
        weights: how often each is drawn from, relative to the others; empty: as often as it has items.
    """

    def __init__(self, sets: Sequence[CocoPanoptic], names: Sequence[str], weights: Sequence[float] = ()) -> None:
        self.sets, self.names, self.weights = list(sets), list(names), tuple(weights)
        self.ends = np.cumsum([len(each) for each in sets])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def place(self, index: int) -> tuple[int, int]:
        """Tells the set that holds an item, and the item's index there."""
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        number = int(np.searchsorted(self.ends, index, side="right"))
        return number, index - int(self.ends[number] - len(self.sets[number]))

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        number, own = self.place(index)
        item = self.sets[number][epoch, own]
        return item | {"image_id": f"{self.names[number]}/{item['image_id']}"}

    def paths(self, index: int) -> tuple[Path, Path]:
        """Returns the files of an item's picture and of its map."""
        number, own = self.place(index)
        return self.sets[number].paths(own)

    def sampler(
        self, batch_size: int, rank: int, world_size: int, seed: int, first_item: int
    ) -> EpochSampler | WeightedSampler:
        """Makes the sampler of a rank's batches; arguments as `EpochSampler` has them."""
        if not self.weights:
            return EpochSampler(len(self), batch_size, rank, world_size, seed, first_item=first_item)
        sizes = [len(each) for each in self.sets]
        return WeightedSampler(sizes, self.weights, batch_size, rank, world_size, seed, first_item)


class WeightedSampler(Sampler[list[tuple[int, int]]]):
    """Gives endless batches of (epoch, index) pairs over sets that lie one after the other, by their weights.

    All draws form one endless line, cut into blocks of `BLOCK`. In each block every set has its share, rounded to whole
    draws, in an order drawn from (seed, block). The draws of one set are its own epochs, each a permutation: so no item
    comes twice before all others of its set have come. What stands at a place of the line depends on (seed, place)
    alone, so that batches are the same for any number of ranks and after any resume.

    Args:
        sizes: items of each set.
        weights: of each set, not all 0.
        batch_size: of one rank.
        first_item: how many items all ranks together have seen already.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        first_item: int = 0,
    ) -> None:
        self.sizes, self.counts = tuple(sizes), shares_of_block(weights)
        self.starts = np.cumsum([0, *sizes[:-1]])
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.seed, self.first_item = seed, first_item

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step = 0
        while True:
            yield self.batch(step)
            step += 1

    def batch(self, step: int) -> list[tuple[int, int]]:
        """Returns this rank's (epoch, index) pairs of one step."""
        first = self.first_item + (step * self.world_size + self.rank) * self.batch_size
        return [self._draw(place) for place in range(first, first + self.batch_size)]

    def _draw(self, place: int) -> tuple[int, int]:
        block, at = divmod(place, BLOCK)
        numbers, before = _block(self.counts, self.seed, block)
        number = int(numbers[at])
        draw = block * self.counts[number] + int(before[at])  # of this set
        epoch, own = divmod(draw, self.sizes[number])
        index = permutation(self.sizes[number], self.seed + number, epoch)[own]
        return epoch, int(self.starts[number] + index)


def shares_of_block(weights: Sequence[float]) -> tuple[int, ...]:
    """Shares `BLOCK` draws among the sets by largest remainders; a weight above 0 gets one at least.

    Raises:
        ConfigError: weights that sum to 0, or more sets than draws.
    """
    total = float(sum(weights))
    if total <= 0 or len(weights) > BLOCK:
        raise ConfigError(
            f"data.weights={','.join(map(str, weights))}: a sum above 0, of at most {BLOCK} sets, expected"
        )
    exact = np.array(weights, np.float64) / total * BLOCK
    counts = np.where(exact > 0, np.maximum(np.floor(exact), 1), 0).astype(int)
    while (rest := BLOCK - int(counts.sum())) != 0:
        remainder = (
            np.where(counts > 1, exact - counts, np.inf) if rest < 0 else np.where(exact > 0, exact - counts, -1.0)
        )
        counts[np.argmin(remainder) if rest < 0 else np.argmax(remainder)] += np.sign(rest)
    return tuple(counts.tolist())


@lru_cache(maxsize=4)
def _block(counts: tuple[int, ...], seed: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the set at each place of a block, int [BLOCK], and how many draws of it the block has before, int."""
    rng = np.random.Generator(np.random.PCG64([seed, block, len(counts)]))
    numbers = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    before = np.zeros(BLOCK, int)
    for number in range(len(counts)):
        before[numbers == number] = np.arange(counts[number])
    return numbers, before
