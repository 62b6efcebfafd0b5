"""Encodes and decodes the run lengths of Label Studio's brush.

The picture of a brush is RGBA, row by row, packed as @thi.ng/rle-pack does (https://github.com/thi-ng/umbrella,
packages/rle-pack): 32 bits number of values, 5 bits word size - 1, four times 4 bits size - 1 of run lengths. Then
runs: one bit says whether one value repeats, two bits which size, the length - 1, and one value or that many. Label
Studio's own converter does this too, and needs pandas, nltk and OpenCV.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ldmseg_fast.errors import DataError

_SIZES = (3, 4, 8, 16)  # bits of a run length
OPAQUE = 128  # alpha from which a pixel is brushed


def encode(mask: np.ndarray) -> list[int]:
    """Encodes a mask, bool [H, W], as a picture of white and transparent black.

    Returns:
        Bytes, as `value.rle` of a region holds them.
    """
    flat = np.ascontiguousarray(mask).ravel()
    edges = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1, [flat.size]])
    bits = [f"{4 * flat.size:032b}{7:05b}", *(f"{size - 1:04b}" for size in _SIZES)]
    for begin, end in zip(edges[:-1].tolist(), edges[1:].tolist()):
        value, left = "11111111" if flat[begin] else "00000000", 4 * (end - begin)
        while left > 0:
            length = min(left, 1 << _SIZES[-1])
            place = next(place for place, size in enumerate(_SIZES) if length <= 1 << size)
            bits.append(f"1{place:02b}{length - 1:0{_SIZES[place]}b}{value}")
            left -= length
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return list(int(text, 2).to_bytes(len(text) // 8, "big"))


def decode(rle: Sequence[int] | Any, height: int, width: int, where: str) -> np.ndarray:
    """Decodes a brush's picture, bool [height, width]: what is at least half opaque.

    Args:
        rle: bytes, as `value.rle` of a region holds them.
        height, width: of the picture, in pixels.
        where: for the error.

    Raises:
        DataError: no such bytes, or a picture of another size.
    """
    if not isinstance(rle, list) or not all(type(byte) is int and 0 <= byte <= 255 for byte in rle):
        raise DataError(f"{where}: rle must be a list of bytes, got {rle!r:.80}")
    try:
        values = _unpack(bytes(rle), 4 * height * width)
    except ValueError as error:
        raise DataError(f"{where}: {error}; export it again") from None
    return values.reshape(height, width, 4)[..., 3] >= OPAQUE


def _unpack(packed: bytes, expected: int) -> np.ndarray:
    bits = np.unpackbits(np.frombuffer(packed, np.uint8))
    at = 0

    def number(size: int) -> int:
        nonlocal at
        if at + size > len(bits):
            raise ValueError("the rle ends early")
        first, at = at // 8, at + size
        last = (at + 7) // 8
        return int.from_bytes(packed[first:last], "big") >> (8 * last - at) & ((1 << size) - 1)

    count, word = number(32), number(5) + 1
    if count != expected:
        raise ValueError(f"the rle has {count} values, a picture of this size {expected}")
    if word != 8:
        raise ValueError(f"the rle has words of {word} bits, a brush of 8")
    sizes = [number(4) + 1 for _ in range(4)]
    values = np.empty(count, np.uint8)
    done = 0
    while done < count:
        repeats = number(1)
        end = done + 1 + number(sizes[number(2)])
        if end > count:
            raise ValueError("a run of the rle is too long")
        if repeats:
            values[done:end] = number(word)
        else:
            if at + 8 * (end - done) > len(bits):
                raise ValueError("the rle ends early")
            values[done:end] = np.packbits(bits[at : at + 8 * (end - done)])
            at += 8 * (end - done)
        done = end
    return values
