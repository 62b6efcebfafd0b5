"""Says which pictures a rank sees in a step: resumable, and the same global batches for any number of ranks."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from torch.utils.data import Sampler

from ldmseg_fast.errors import ArgumentError

__all__ = ["EpochSampler", "permutation"]


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Gives endless batches of (epoch, index) pairs for `DataLoader(batch_sampler=...)` over a `CocoPanoptic`.

    The epochs, each a permutation drawn from (seed, epoch), form one endless line. Global batch g is its next
    `batch_size_per_rank * world_size` items, of which a rank takes its consecutive share. So no item is dropped, no
    batch is short, and a data set smaller than a batch works. A run that goes on at `start_step`, on any number of
    ranks with the same global batch, sees what it would have seen.

    `first_item` moves the start of the line: a run that has seen that many items goes on there, with any batch size.
    The epoch travels with the index because worker processes that read ahead could not be told otherwise.

    Raises:
        ArgumentError: a number that is out of range.
    """

    def __init__(
        self,
        num_items: int,
        batch_size_per_rank: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        start_step: int = 0,
        first_item: int = 0,
    ) -> None:
        if num_items < 1 or batch_size_per_rank < 1:
            raise ArgumentError(f"num_items={num_items} and batch_size_per_rank={batch_size_per_rank} must be positive")
        if not 0 <= rank < world_size:
            raise ArgumentError(f"rank={rank} is not one of {world_size} ranks")
        if start_step < 0 or seed < 0 or first_item < 0:
            raise ArgumentError(f"start_step={start_step}, seed={seed}, first_item={first_item} must not be negative")
        self.num_items, self.batch_size, self.rank, self.world_size = num_items, batch_size_per_rank, rank, world_size
        self.seed, self.start_step, self.first_item = seed, start_step, first_item

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step = self.start_step
        while True:
            yield self.batch(step)
            step += 1

    def batch(self, step: int) -> list[tuple[int, int]]:
        """Returns this rank's (epoch, index) pairs of one step."""
        first = self.first_item + (step * self.world_size + self.rank) * self.batch_size
        places = (divmod(place, self.num_items) for place in range(first, first + self.batch_size))
        return [(epoch, int(permutation(self.num_items, self.seed, epoch)[place])) for epoch, place in places]


@lru_cache(maxsize=64)  # a batch may straddle epochs, and several sets have their own
def permutation(num_items: int, seed: int, epoch: int) -> np.ndarray:
    """Draws the order of an epoch, int64 [num_items]."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_items)
