"""The order of items: the same for any number of ranks, and where a run is taken up again."""

from collections import Counter
from itertools import chain, islice

import pytest

from ldmseg_fast.data.sampler import EpochSampler


def global_batches(world_size: int, count: int, start_step: int = 0, num_items: int = 37) -> list[list]:
    ranks = [
        islice(EpochSampler(num_items, 12 // world_size, rank, world_size, 5, start_step), count)
        for rank in range(world_size)
    ]
    return [list(chain(*parts)) for parts in zip(*ranks)]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_global_batches_do_not_depend_on_the_ranks(world_size: int) -> None:
    assert global_batches(world_size, 20) == global_batches(1, 20)


def test_resumes_in_the_middle_of_an_epoch() -> None:
    assert global_batches(2, 6, start_step=7) == global_batches(1, 13)[7:]


def test_every_epoch_has_every_item_once() -> None:
    items = Counter(item for batch in global_batches(1, 37) for item in batch)  # 37 batches of 12: 12 epochs
    assert items == Counter((epoch, index) for epoch in range(12) for index in range(37))
    orders = [[i for batch in global_batches(1, 37) for e, i in batch if e == epoch] for epoch in range(3)]
    assert orders[0] != orders[1] != orders[2]


def test_fewer_items_than_a_batch() -> None:
    batch = global_batches(1, 1, num_items=5)[0]
    assert len(batch) == 12
    assert [epoch for epoch, _ in batch] == [0] * 5 + [1] * 5 + [2] * 2


def test_seed_changes_the_order() -> None:
    assert EpochSampler(100, 8, seed=1).batch(0) != EpochSampler(100, 8, seed=2).batch(0)


@pytest.mark.parametrize(
    "arguments", [(0, 1), (1, 0), (1, 1, 1, 1), (1, 1, -1, 2), (1, 1, 0, 1, -1), (1, 1, 0, 1, 0, -1)]
)
def test_bad_arguments(arguments: tuple) -> None:
    with pytest.raises(ValueError):
        EpochSampler(*arguments)
