"""Combines several reports of one shape, one per noise seed: their mean, and how far they lie apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

Tree = Any  # dictionaries and lists of numbers, strings and None


def mean(trees: Sequence[Tree]) -> Tree:
    """Takes the mean of each number; counts that all agree stay whole."""
    return _combine(trees, lambda values: values[0] if len(set(values)) == 1 else math.fsum(values) / len(values))


def deviation(trees: Sequence[Tree]) -> Tree:
    """Takes the sample standard deviation of each number (over n - 1)."""
    return _combine(trees, _deviation)


def each(trees: Sequence[Tree]) -> Tree:
    """Lists each number's values."""
    return _combine(trees, list)


def _deviation(values: Sequence[float]) -> float:
    middle = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1))


def _combine(trees: Sequence[Tree], function: Callable[[Sequence[float]], Any]) -> Tree:
    """Keys that not all have (a category found with one seed only) are left out; what is no number is the first's."""
    first = trees[0]
    if isinstance(first, dict):
        shared = [key for key in first if all(key in tree for tree in trees)]
        return {key: _combine([tree[key] for tree in trees], function) for key in shared}
    if isinstance(first, list):
        return [_combine(entries, function) for entries in zip(*trees)]
    if isinstance(first, bool) or not isinstance(first, (int, float)):
        return first
    return function(trees)
