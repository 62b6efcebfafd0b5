"""Colours generated scenes: noise, colours, blends.

Positions run in units of the picture's side, x to the right and y down.
"""

from functools import lru_cache

import numpy as np

__all__ = ["blend", "random_colour", "value_noise"]

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


def random_colour(rng: np.random.Generator, value: tuple[float, float]) -> Array:
    """Draws a colour, float64 [3], RGB in [0, 1]: any hue, every saturation, brightness within `value`."""
    hue, saturation, brightness = rng.random() * 6, rng.random() ** 0.7, rng.uniform(*value)
    ramp = np.clip(np.abs((hue + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1, 0, 1)
    return brightness * (1 - saturation + saturation * ramp)


def blend(amount: Array, first: Array, second: Array) -> Array:
    """Returns colours, float64 [h, w, 3], between two colours [3]; `amount` [h, w] is clipped to [0, 1]."""
    return first + np.clip(amount, 0, 1)[..., None] * (second - first)
