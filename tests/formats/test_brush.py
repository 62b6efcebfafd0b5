"""Run lengths of Label Studio's brush, of their own converter and of their editor."""

from __future__ import annotations

import numpy as np
import pytest

from ldmseg_fast.errors import DataError
from ldmseg_fast.formats.brush import decode, encode

# label_studio_sdk 2.1.2, converter.brush.mask2rle of uint8 [[0, 255, 255], [255, 0, 0]]
THEIRS = [0, 0, 0, 24, 57, 27, 252, 96, 22, 255, 231, 0, 0]


def bits(*parts: tuple[int, int]) -> list[int]:
    """Packs (value, bits) pairs as the format does."""
    text = "".join(f"{value:0{size}b}" for value, size in parts)
    text += "0" * (-len(text) % 8)
    return [int(text[place : place + 8], 2) for place in range(0, len(text), 8)]


HEAD = [(7, 5), (2, 4), (3, 4), (7, 4), (15, 4)]


def test_theirs_are_read_and_written():
    mask = np.array([[False, True, True], [True, False, False]])
    np.testing.assert_array_equal(decode(THEIRS, 2, 3, "x"), mask)
    assert encode(mask) == THEIRS[: len(encode(mask))]


def test_colours_of_the_editor():
    """The editor packs RGBA in runs of single values; what is less than half opaque is not brushed."""
    pixels = [0, 0, 0, 0, 200, 30, 40, 255, 200, 30, 40, 90, 200, 30, 40, 128]
    single = [(0, 1), (1, 2), (15, 4), *((value, 8) for value in pixels)]
    assert decode(bits((16, 32), *HEAD, *single), 1, 4, "x").tolist() == [[False, True, False, True]]
    mixed = [(1, 1), (0, 2), (3, 3), (0, 8), (0, 1), (2, 2), (11, 8), *((value, 8) for value in pixels[4:])]
    assert decode(bits((16, 32), *HEAD, *mixed), 2, 2, "x").tolist() == [[False, True], [False, True]]


@pytest.mark.parametrize("seed", range(12))
def test_round_trip(seed):
    rng = np.random.default_rng(seed)
    mask = rng.uniform(size=rng.integers(1, 60, 2)) < rng.uniform()
    np.testing.assert_array_equal(decode(encode(mask), *mask.shape, "x"), mask)


@pytest.mark.parametrize("value", [False, True])
def test_runs_longer_than_a_length_can_say(value):
    mask = np.full((300, 400), value)
    mask[17, 3] = not value
    np.testing.assert_array_equal(decode(encode(mask), 300, 400, "x"), mask)


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        ("AAAA", "list of bytes"),
        ([1.5], "list of bytes"),
        ([300], "list of bytes"),
        ([True], "list of bytes"),
        ([], "ends early"),
        (THEIRS[:9], "ends early"),
        (bits((23, 32), *HEAD), "has 23 values, a picture of this size 24"),
        (bits((2**32 - 1, 32), *HEAD), "has 4294967295 values"),
        (bits((24, 32), (15, 5), *HEAD[1:]), "words of 16 bits"),
        (bits((24, 32), *HEAD, (1, 1), (3, 2), (99, 16), (0, 8)), "too long"),
        (bits((24, 32), *HEAD, (0, 1), (3, 2), (23, 16), (0, 8)), "ends early"),
    ],
    ids=range(11),
)
def test_damage(rle, message):
    with pytest.raises(DataError, match=f"region 1: .*{message}"):
        decode(rle, 2, 3, "region 1")
