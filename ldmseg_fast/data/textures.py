"""Colours generated scenes: noise, colours, blends.

Positions run in units of the picture's side, x to the right and y down.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

__all__ = ["blend", "colour_of", "value_noise"]

Array = np.ndarray


@lru_cache(maxsize=64)
def _interpolation(size: int, cells: int) -> Array:
    """Computes the weights [S, cells + 1] of smoothstep interpolation between random grid values."""
    position = (np.arange(size) + 0.5) / size * cells
    low = np.minimum(position.astype(np.int64), cells - 1)
    fraction = position - low
    fraction = fraction * fraction * (3 - 2 * fraction)
    weights = np.zeros((size, cells + 1))
    weights[np.arange(size), low] = 1 - fraction
    weights[np.arange(size), low + 1] = fraction
    return weights


def value_noise(rng: np.random.Generator, size: int, rows: int, columns: int, octaves: int = 1) -> Array:
    """Draws value noise, float64 [S, S] of about unit amplitude.

    It starts from a random grid of rows x columns cells. Each further octave adds one of twice the cells and 0.6 of the
    amplitude.
    """
    field = np.zeros((size, size))
    for octave in range(octaves):
        r, c = min(rows << octave, size), min(columns << octave, size)
        grid = rng.uniform(-1, 1, (r + 1, c + 1)) * 0.6**octave
        field += _interpolation(size, r) @ grid @ _interpolation(size, c).T
    return field


def colour_of(numbers: Sequence[float], value: tuple[float, float]) -> tuple[float, float, float]:
    """Turns three random numbers in [0, 1) into RGB in [0, 1]: any hue, every saturation, brightness within `value`.

    Plain floats: on three numbers an array costs ten times its arithmetic.
    """
    hue, saturation, brightness = numbers[0] * 6, numbers[1] ** 0.7, value[0] + (value[1] - value[0]) * numbers[2]
    ramp = (min(max(abs((hue + shift) % 6 - 3) - 1, 0.0), 1.0) for shift in (0.0, 4.0, 2.0))
    red, green, blue = (brightness * (1 - saturation + saturation * share) for share in ramp)
    return red, green, blue


def blend(amount: Array, first: Array, second: Array) -> Array:
    """Returns colours, float64 [h, w, 3], between two colours [3]; `amount` [h, w] is clipped to [0, 1]."""
    return first + np.clip(amount, 0, 1)[..., None] * (second - first)
