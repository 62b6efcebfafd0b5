"""Paints one generated scene: stuff regions, things upon them, light, shadows and sensor noise.

Every layer is a signed distance in pixels. Its antialiased edge (coverage), its id (coverage of at least a half) and
its soft shadow come from the same numbers, so the picture and the map cannot disagree. A layer that would leave itself
or any earlier segment too small is not painted but drawn again.

Arithmetic is float64 throughout, so that last-bit differences between processors do not reach the 8-bit result.
"""

import math

import numpy as np

from ldmseg_fast.data.shapes import THINGS, coverage, draw_shape, normalised
from ldmseg_fast.data.textures import blend, colour_of, value_noise

__all__ = ["STUFF", "THINGS", "Painter", "minimum_area"]

STUFF = ("sky", "ground", "stripes", "clouds", "grass", "tiles")

Array = np.ndarray
Box = tuple[slice, slice]


def minimum_area(size: int) -> int:
    """Returns the pixels that every segment of a `size` x `size` scene has at least: 16 at 64, 64 at 256."""
    return size // 4


class Painter:
    """Paints one `size` x `size` scene from what `rng` draws.

    Attributes:
        canvas: float64 [S, S, 3] in [0, 1].
        segments: int64 [S, S], the segments are 1..n and none is void.
        kinds: what each segment is.
        area: the visible pixels of each segment.
    """

    stuff_kinds: tuple[str, ...] = STUFF

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        self.size, self.rng = size, rng
        self.y, self.x = np.meshgrid(*[(np.arange(size) + 0.5) / size] * 2, indexing="ij")
        self.canvas = np.zeros((size, size, 3))
        self.segments = np.zeros((size, size), np.int64)
        self.kinds: list[str] = []
        self.area: list[int] = []  # visible pixels of each segment now
        self.floor: list[int] = []  # and the fewest it may be left with
        self.light = rng.uniform(0, 2 * np.pi)

    def paint(self) -> np.ndarray:
        """Paints the scene and returns its picture, uint8 [S, S, 3], which the attributes then describe."""
        self.add_stuff()
        self.add_things()
        return self.photograph()

    def accept(self, box: Box, inside: Array, kind: str, floor: int, keep: float) -> bool:
        """Claims pixels for a new segment, unless it or a segment below falls under its floor.

        Args:
            box: the part of the scene that `inside` covers.
            inside: bool [h, w], the pixels to claim.
            kind: what the new segment is.
            floor: its fewest visible pixels.
            keep: the share of its present area that later segments must leave, if that is more than `floor`.

        Returns:
            Whether the pixels were claimed; `segments`, `kinds`, `area` and `floor` are then changed in place.
        """
        own = int(np.count_nonzero(inside))
        if own < floor:
            return False
        covered = np.bincount(self.segments[box][inside], minlength=len(self.kinds) + 1)[1:]
        if any(area - lost < least for area, lost, least in zip(self.area, covered, self.floor) if lost):
            return False
        self.area = [area - int(lost) for area, lost in zip(self.area, covered)] + [own]
        self.floor.append(max(floor, int(keep * own)))
        self.kinds.append(kind)
        self.segments[box][inside] = len(self.kinds)
        return True

    def add_stuff(self) -> None:
        """Paints 2-5 regions, each cut out of the last.

        Their kinds differ, because a kind of stuff is one segment of an image.
        """
        rng, size = self.rng, self.size
        kinds = rng.permutation(self.stuff_kinds)[: rng.choice([2, 3, 4, 5], p=[0.35, 0.35, 0.2, 0.1])]
        everything: Box = (slice(0, size), slice(0, size))
        self.accept(everything, np.ones((size, size), bool), kinds[0], 0, 0.0)
        self.floor[0] = size * size // 10
        self.canvas[:] = self.stuff_texture(kinds[0], None)
        tries = 0
        while len(self.kinds) < 2 or (len(self.kinds) < len(kinds) and tries < 20):
            tries += 1
            distance = self.region()
            if self.accept(everything, distance < 0, kinds[len(self.kinds)], size * size // 10, 0.5):
                beneath = self.canvas[distance < 0].mean(0)
                texture = self.stuff_texture(self.kinds[-1], beneath)
                self.canvas += coverage(distance)[..., None] * (texture - self.canvas)
        self.floor = [max(minimum_area(size), area // 4) for area in self.area]

    def region(self) -> Array:
        """Returns the distance, float64 [S, S] in pixels, to a random boundary: a skyline, a wall or a lake."""
        rng, size = self.rng, self.size
        style = rng.random()
        if style < 0.75:
            angle = rng.normal(0, 0.25) if style < 0.5 else rng.uniform(0, 2 * np.pi)
            offset = rng.uniform(-0.3, 0.3)
            field = -(self.x - 0.5) * math.sin(angle) - (self.y - 0.5) * math.cos(angle) + offset
        else:
            cx, cy, a, b = rng.uniform(0.1, 0.9, 2).tolist() + rng.uniform(0.25, 0.5, 2).tolist()
            field = np.hypot((self.x - cx) / a, (self.y - cy) / b) * 0.35 - 0.35
        if rng.random() < 0.8:
            rough = rng.random() < 0.4
            cells = int(rng.integers(4, 8)) if rough else int(rng.integers(2, 4))
            field = field + rng.uniform(0.03, 0.1) * value_noise(rng, size, cells, cells, 3 if rough else 1)
        return normalised(field)

    def stuff_texture(self, kind: str, beneath: Array | None) -> Array:
        """Colours one kind of stuff, float64 [S, S, 3], away from the mean colour `beneath`, float64 [3]."""
        rng, size, x, y = self.rng, self.size, self.x, self.y
        first = self.contrasting(beneath, 0.3, (0.3, 1.0))
        second = np.clip(first * rng.uniform(0.5, 0.85) + rng.uniform(-0.08, 0.08, 3), 0, 1)
        fine = max(4, size // 6)
        if kind == "sky":
            texture = blend(y * rng.uniform(0.6, 1.1) + 0.08 * value_noise(rng, size, 3, 3, 2), first, second)
        elif kind == "ground":
            texture = blend(0.5 + 0.35 * value_noise(rng, size, 5, 5, 4), first, second)
        elif kind == "clouds":
            texture = blend(0.5 + 0.7 * value_noise(rng, size, 3, 4, 3), first, second)
        elif kind == "grass":
            texture = blend(0.5 + 0.6 * value_noise(rng, size, fine // 3 + 1, fine * 2, 2), first, second)
        elif kind == "stripes":
            angle, periods = rng.uniform(0, np.pi), rng.uniform(4, 11)
            warp = 0.03 * value_noise(rng, size, 3, 3)
            wave = np.sin((x * math.cos(angle) + y * math.sin(angle) + warp) * 2 * np.pi * periods)
            texture = blend(0.5 + wave * rng.uniform(0.5, 1.5), first, second)
        else:
            rows, columns = int(rng.integers(5, 10)), int(rng.integers(3, 7))
            row = np.floor(y * rows)
            across = (x * columns + 0.5 * (row % 2)) % 1
            joint = np.minimum(
                np.minimum(across, 1 - across) * size / columns,
                np.minimum(y * rows % 1, 1 - y * rows % 1) * size / rows,
            )
            texture = blend(1.3 - joint / max(1.0, size / 90), first, second)
        return texture * (1 + 0.06 * value_noise(rng, size, 4, 4, 3))[..., None]

    def contrasting(self, beneath: Array | None, least: float, value: tuple[float, float] = (0.15, 1.0)) -> Array:
        """Draws a colour, float64 [3], at least `least` (RGB distance) from `beneath` [3], or the farthest of eight."""
        drawn = self.rng.random((8, 3)).tolist()  # all eight, whichever is taken: the stream goes on behind them
        best, farthest = colour_of(drawn[0], value), -1.0
        if beneath is None:
            return np.array(best)
        red, green, blue = beneath.tolist()
        for numbers in drawn:
            colour = colour_of(numbers, value)
            away = math.sqrt((colour[0] - red) ** 2 + (colour[1] - green) ** 2 + (colour[2] - blue) ** 2)
            if away > farthest:
                best, farthest = colour, away
            if away >= least:
                break
        return np.array(best)

    def add_things(self) -> None:
        """Paints 2-15 things; larger ones lie mostly further back."""
        rng, size = self.rng, self.size
        smallest = 1.2 * math.sqrt(minimum_area(size) / np.pi)
        wanted = 2 + int(rng.binomial(13, rng.uniform(0.1, 0.8)))
        radii = np.exp(rng.uniform(math.log(smallest), math.log(0.24 * size), wanted))
        radii = radii[np.argsort(-radii * rng.uniform(0.6, 1.6, wanted))]
        stuff, placed = len(self.kinds), 0
        for radius in radii:
            placed += any(self.add_thing(radius) for _ in range(6))
        while len(self.kinds) < stuff + 2:
            self.add_thing(smallest * rng.uniform(1, 2))

    def add_thing(self, radius: float) -> bool:
        """Paints one thing at a random place. Returns False where there is no room for it."""
        rng, size = self.rng, self.size
        kind = THINGS[int(rng.integers(len(THINGS)))]
        shape = draw_shape(rng, kind, radius)
        # A figure stands upright, the rest lies as it likes; a third of a thing may be outside the picture.
        turn = rng.normal(0, 0.1) if kind == "figure" else rng.uniform(0, 2 * np.pi)
        cx, cy = rng.uniform(-0.02, 1.02, 2) * size
        fall = min(0.35 * radius, 0.06 * size) + 1
        margin = shape.reach + fall + 3
        top, left = max(0, int(cy - margin)), max(0, int(cx - margin))
        box = (slice(top, min(size, int(cy + margin) + 1)), slice(left, min(size, int(cx + margin) + 1)))
        dx, dy = self.x[box] * size - cx, self.y[box] * size - cy
        cos, sin = math.cos(turn), math.sin(turn)
        u, v = dx * cos + dy * sin, dy * cos - dx * sin
        distance = shape.distance(u, v)
        inside = distance <= 0
        if not self.accept(box, inside, kind, minimum_area(size), 0.4):
            return False
        beneath = self.canvas[box][inside].mean(0)
        if rng.random() < 0.7:
            self.cast_shadow(box, distance, fall)
        colour = self.thing_texture(u, v, distance, radius, self.contrasting(beneath, 0.35))
        if shape.part is not None:
            second = self.thing_texture(u, v, distance, radius, self.contrasting(beneath, 0.35))
            colour = colour + coverage(shape.part(u, v))[..., None] * (second - colour)
        lit = np.clip(self.shading(dx, dy, distance, radius)[..., None] * colour, 0, 1)
        self.canvas[box] += coverage(distance)[..., None] * (lit - self.canvas[box])
        return True

    def cast_shadow(self, box: Box, distance: Array, fall: float) -> None:
        """Darkens the canvas behind a shape in place: the shape moved away from the light, its edge softened.

        Args:
            box: the part of the scene that `distance` covers.
            distance: float64 [h, w] to the shape's edge in pixels.
            fall: how far the shadow falls, in pixels.
        """
        soft = np.clip(0.5 - distance / (1.5 + fall), 0, 1)
        down, right = round(fall * math.sin(self.light)), round(fall * math.cos(self.light))
        moved = np.zeros_like(soft)
        height, width = soft.shape
        to = (slice(max(0, down), height + min(0, down)), slice(max(0, right), width + min(0, right)))
        of = (slice(max(0, -down), height - max(0, down)), slice(max(0, -right), width - max(0, right)))
        moved[to] = soft[of]
        self.canvas[box] *= (1 - 0.45 * moved)[..., None]

    def shading(self, dx: Array, dy: Array, distance: Array, radius: float) -> Array:
        """Returns a brightness factor, float64 [h, w]: flat, a gradient away from the light, or round with a highlight.

        Args:
            dx, dy: float64 [h, w], pixels from the thing's centre.
            distance: float64 [h, w] to its edge in pixels.
            radius: its radius in pixels.
        """
        style = self.rng.random()
        if style < 0.2:
            return np.ones_like(distance)
        facing = -(dx * math.cos(self.light) + dy * math.sin(self.light)) / radius
        if style < 0.6:
            return 1 + 0.3 * np.clip(facing, -1, 1)
        rim = np.clip(-distance / (0.6 * radius), 0, 1)
        glow = np.exp(
            -4 * ((dx / radius + 0.35 * math.cos(self.light)) ** 2 + (dy / radius + 0.35 * math.sin(self.light)) ** 2)
        )
        return 0.6 + 0.4 * rim + 0.15 * np.clip(facing, -1, 1) + 0.5 * glow

    def thing_texture(self, u: Array, v: Array, distance: Array, radius: float, first: Array) -> Array:
        """Returns colours, float64 [h, w, 3] or [3]: plain, stripes, dots, rings or noise.

        Args:
            u, v: float64 [h, w], pixels from the thing's centre along its own axes.
            distance: float64 [h, w] to its edge in pixels.
            radius: its radius in pixels.
            first: float64 [3], its colour; the second one is related to it.
        """
        rng = self.rng
        style = rng.random()
        second = np.clip(first + rng.choice([-1, 1]) * rng.uniform(0.15, 0.35) + rng.uniform(-0.1, 0.1, 3), 0, 1)
        period = max(4.0, radius * rng.uniform(0.35, 0.8))  # under four pixels a pattern turns into noise
        if style < 0.4 or radius < 4:
            return first
        if style < 0.58:
            return blend(0.5 + 1.2 * np.sin(u * 2 * np.pi / period), first, second)
        if style < 0.72:
            return blend(1.5 * np.cos(u * 2 * np.pi / period) * np.cos(v * 2 * np.pi / period), first, second)
        if style < 0.82:
            return blend(0.5 - np.sin(distance * 2 * np.pi / period), first, second)
        return blend(0.5 + 0.2 * rng.standard_normal(u.shape), first, second)

    def photograph(self) -> np.ndarray:
        """Turns the canvas into a picture, uint8 [S, S, 3].

        It adds uneven light, a tint, and noise that grows with brightness.
        """
        rng, size = self.rng, self.size
        uneven = (
            1
            + 0.12 * ((self.x - 0.5) * math.cos(self.light) + (self.y - 0.5) * math.sin(self.light)) * -2
            + 0.04 * value_noise(rng, size, 2, 2)
        )
        picture = self.canvas * uneven[..., None] * rng.uniform(0.92, 1.05, 3)
        picture = np.clip(picture, 0, 1) ** 0.85
        noise = rng.standard_normal(picture.shape) * rng.uniform(0.004, 0.03)
        picture = picture + noise * (0.5 + np.sqrt(picture))
        return np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)
