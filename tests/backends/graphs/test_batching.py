"""Batches go through in as few calls as a graph allows, and come back whole."""

import pytest
import torch

from ldmseg_fast.backends.graphs.batching import ANY, parts, run_in_parts


@pytest.mark.parametrize(
    ("count", "ranges", "expected"),
    [
        (16, ((1, 8),), [(8, 8), (8, 8)]),
        (11, ((1, 4),), [(4, 4), (4, 4), (3, 3)]),
        (5, ((4, 4),), [(4, 4), (1, 4)]),
        (9, ((1, 1), (4, 8)), [(8, 8), (1, 1)]),
        (10, ((1, 1), (4, 8)), [(8, 8), (2, 4)]),
        (3, ANY, [(3, 3)]),
    ],
)
def test_parts(count, ranges, expected):
    assert parts(count, ranges) == expected


@pytest.mark.parametrize("ranges", [((1, 2),), ((4, 4),), ((3, 5),), ANY])
def test_rows_come_back_in_order(ranges):
    sizes = []

    def run(part):
        sizes.append(len(part["a"]))
        return {"sum": part["a"] + part["b"][:, 0]}

    rows = {"a": torch.arange(7.0), "b": torch.arange(14.0).view(7, 2)}
    assert torch.equal(run_in_parts(run, rows, ranges)["sum"], rows["a"] + rows["b"][:, 0])
    assert all(any(low <= size <= high for low, high in ranges) for size in sizes)


def test_an_empty_batch_is_an_error():
    with pytest.raises(ValueError, match="an empty batch"):
        run_in_parts(dict, {"a": torch.zeros(0, 3)}, ANY)
