"""Paints one generated scene: stuff regions, things upon them, light, shadows and sensor noise.

Every layer is a signed distance in pixels: its antialiased edge (coverage), its id (coverage of at least a half) and
its soft shadow come from the same numbers, so the picture and the map cannot disagree. A layer that would leave
itself or any earlier segment too small is not painted but drawn again.

Arithmetic is float64 throughout, so that last-bit differences between processors do not reach the 8-bit result.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

__all__ = ["STUFF", "THINGS", "Painter", "minimum_area"]

THINGS = ("ellipse", "box", "polygon", "blob", "bar", "ring", "star", "figure")
STUFF = ("sky", "ground", "stripes", "clouds", "grass", "tiles")

Array = np.ndarray
Box = tuple[slice, slice]


def minimum_area(size: int) -> int:
    """Pixels that every segment of a `size` x `size` scene has at least: 16 at 64, 64 at 256."""
    return size // 4


# A field is [h, w]: x to the right, y down, in units of the picture's side.


@lru_cache(maxsize=64)
def _interpolation(size: int, cells: int) -> Array:
    """[S, cells + 1] weights of smoothstep interpolation between random grid values."""
    position = (np.arange(size) + 0.5) / size * cells
    low = np.minimum(position.astype(np.int64), cells - 1)
    fraction = position - low
    fraction = fraction * fraction * (3 - 2 * fraction)
    weights = np.zeros((size, cells + 1))
    weights[np.arange(size), low] = 1 - fraction
    weights[np.arange(size), low + 1] = fraction
    return weights


def _noise(rng: np.random.Generator, size: int, rows: int, columns: int, octaves: int = 1) -> Array:
    """Value noise [S, S] of about unit amplitude: a random grid of rows x columns cells, then finer ones on top."""
    field = np.zeros((size, size))
    for octave in range(octaves):
        r, c = min(rows << octave, size), min(columns << octave, size)
        grid = rng.uniform(-1, 1, (r + 1, c + 1)) * 0.6**octave
        field += _interpolation(size, r) @ grid @ _interpolation(size, c).T
    return field


def _colour(rng: np.random.Generator, value: tuple[float, float]) -> Array:
    """A random colour, RGB in [0, 1]: any hue, every saturation, brightness within `value`."""
    hue, saturation, brightness = rng.random() * 6, rng.random() ** 0.7, rng.uniform(*value)
    ramp = np.clip(np.abs((hue + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1, 0, 1)
    return brightness * (1 - saturation + saturation * ramp)


def _blend(amount: Array, first: Array, second: Array) -> Array:
    """[h, w, 3] between two colours; amount [h, w] is clipped to [0, 1]."""
    return first + np.clip(amount, 0, 1)[..., None] * (second - first)


def _coverage(distance: Array) -> Array:
    """Share of a pixel inside an edge `distance` pixels away (negative inside)."""
    return np.clip(0.5 - distance, 0, 1)


def _normalised(field: Array) -> Array:
    """Turn an implicit function (negative inside) into an approximate distance in pixels."""
    down, right = np.gradient(field)
    return field / np.maximum(np.hypot(down, right), 1e-6)


# Distances of shapes: u, v in pixels from the shape's centre, along its own axes; r its radius in pixels.


def _ellipse(u: Array, v: Array, a: float, b: float) -> Array:
    near = np.hypot(u / a, v / b)
    return near * (near - 1) / np.maximum(np.hypot(u / a**2, v / b**2), 1e-9)


def _box(u: Array, v: Array, a: float, b: float, corner: float) -> Array:
    du, dv = np.abs(u) - a + corner, np.abs(v) - b + corner
    return np.hypot(np.maximum(du, 0), np.maximum(dv, 0)) + np.minimum(np.maximum(du, dv), 0) - corner


def _polygon(u: Array, v: Array, vertices: Array) -> Array:
    """Exact distance to a simple polygon, vertices [n, 2]; inside by crossing number."""
    nearest = np.full(u.shape, np.inf)
    inside = np.zeros(u.shape, bool)
    for (au, av), (bu, bv) in zip(vertices, np.roll(vertices, -1, axis=0)):
        eu, ev = bu - au, bv - av
        pu, pv = u - au, v - av
        along = np.clip((pu * eu + pv * ev) / max(eu * eu + ev * ev, 1e-9), 0, 1)
        nearest = np.minimum(nearest, (pu - along * eu) ** 2 + (pv - along * ev) ** 2)
        if av != bv:
            inside ^= ((av > v) != (bv > v)) & (pu < pv * eu / ev)
    return np.where(inside, -1, 1) * np.sqrt(nearest)


def _around(radii: Array, angles: Array) -> Array:
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


@dataclass(frozen=True)
class _Shape:
    """distance(u, v) in pixels, the radius that encloses it, and the distance of a part in a second colour."""

    kind: str
    distance: Callable[[Array, Array], Array]
    reach: float
    part: Callable[[Array, Array], Array] | None = None


def _draw_shape(rng: np.random.Generator, kind: str, r: float) -> _Shape:
    """A random thing of about the area of a disc of radius `r` pixels (thin kinds: less)."""
    thin = max(0.95, r * rng.uniform(0.08, 0.22))  # under two pixels wide an object is lost between pixels
    if kind == "ellipse":
        stretch = rng.uniform(1.0, 1.7)
        return _Shape(kind, lambda u, v: _ellipse(u, v, r * stretch, r / stretch), r * stretch)
    if kind == "box":
        stretch = rng.uniform(1.0, 1.9)
        a, b = 0.89 * r * stretch, 0.89 * r / stretch
        corner = min(a, b) * rng.choice([0.0, 0.25, 0.6])
        return _Shape(kind, lambda u, v: _box(u, v, a, b, corner), math.hypot(a, b))
    if kind == "polygon":
        sides = int(rng.integers(3, 8))
        angles = (np.arange(sides) + rng.uniform(-0.3, 0.3, sides)) * 2 * np.pi / sides
        vertices = _around(r * rng.uniform(0.95, 1.5, sides), angles)
        return _Shape(kind, lambda u, v: _polygon(u, v, vertices), 1.5 * r)
    if kind == "star":
        points = int(rng.integers(4, 8))
        radii = np.where(np.arange(2 * points) % 2, r * rng.uniform(0.55, 0.75), r * 1.5)
        vertices = _around(radii, np.arange(2 * points) * np.pi / points)
        return _Shape(kind, lambda u, v: _polygon(u, v, vertices), 1.5 * r)
    if kind == "blob":
        waves = np.arange(2, 6)
        size, phase = rng.uniform(0, 0.55, 4) / waves, rng.uniform(0, 2 * np.pi, 4)

        def blob(u: Array, v: Array) -> Array:
            angle, rho = np.arctan2(v, u)[..., None] * waves + phase, np.hypot(u, v)
            slope = (size * waves * np.sin(angle)).sum(-1)
            return (rho - r * (1 + (size * np.cos(angle)).sum(-1))) / np.sqrt(1 + slope * slope)

        return _Shape(kind, blob, r * (1 + size.sum()))
    if kind == "bar":
        length = r * rng.uniform(1.6, 2.6)
        corner = thin * rng.choice([0.0, 1.0])
        return _Shape(kind, lambda u, v: _box(u, v, length, thin, corner), math.hypot(length, thin))
    if kind == "ring":
        stretch, width = rng.uniform(1.0, 1.4), max(thin, r * rng.uniform(0.12, 0.3))
        a, b = 1.15 * r * stretch, 1.15 * r / stretch
        return _Shape(kind, lambda u, v: np.abs(_ellipse(u, v, a, b)) - width, a + width)
    # A figure stands on a box and carries a round head or crown: one thing, two colours.
    foot = r * rng.uniform(0.3, 0.7)
    head = max(r * rng.uniform(0.6, 1.0), foot * 0.8)

    def upper(u: Array, v: Array) -> Array:
        return _ellipse(u, v + 0.6 * r, head, 0.9 * r)

    def figure(u: Array, v: Array) -> Array:
        return np.minimum(_box(u, v - 0.6 * r, foot, 0.9 * r, 0.2 * foot), upper(u, v))

    return _Shape("figure", figure, 1.6 * r, upper)


class Painter:
    """Paints one `size` x `size` scene from what `rng` draws.

    canvas: [S, S, 3] in [0, 1]. segments: [S, S], 1..n. kinds, area: what each segment is, and its visible pixels.
    """

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
        """The finished picture, uint8 [S, S, 3]; `segments`, `kinds` and `area` then describe it."""
        self.add_stuff()
        self.add_things()
        return self.photograph()

    def accept(self, box: Box, inside: Array, kind: str, floor: int, keep: float) -> bool:
        """Claim the pixels `inside` for a new segment, unless it or a segment below falls under its floor.

        The new segment's own floor is the larger of `floor` and `keep` of the area that it has now.
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
        """2-5 regions of different kinds (a kind of stuff is one segment of an image), each cut out of the last."""
        rng, size = self.rng, self.size
        kinds = rng.permutation(STUFF)[: rng.choice([2, 3, 4, 5], p=[0.35, 0.35, 0.2, 0.1])]
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
                self.canvas += _coverage(distance)[..., None] * (texture - self.canvas)
        self.floor = [max(minimum_area(size), area // 4) for area in self.area]

    def region(self) -> Array:
        """Distance [S, S] to a random boundary: a skyline, a wall or a lake; smooth or irregular."""
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
            field = field + rng.uniform(0.03, 0.1) * _noise(rng, size, cells, cells, 3 if rough else 1)
        return _normalised(field)

    def stuff_texture(self, kind: str, beneath: Array | None) -> Array:
        """[S, S, 3] of one kind of stuff, its colour away from the mean colour `beneath`."""
        rng, size, x, y = self.rng, self.size, self.x, self.y
        first = self.contrasting(beneath, 0.3, (0.3, 1.0))
        second = np.clip(first * rng.uniform(0.5, 0.85) + rng.uniform(-0.08, 0.08, 3), 0, 1)
        fine = max(4, size // 6)
        if kind == "sky":
            texture = _blend(y * rng.uniform(0.6, 1.1) + 0.08 * _noise(rng, size, 3, 3, 2), first, second)
        elif kind == "ground":
            texture = _blend(0.5 + 0.35 * _noise(rng, size, 5, 5, 4), first, second)
        elif kind == "clouds":
            texture = _blend(0.5 + 0.7 * _noise(rng, size, 3, 4, 3), first, second)
        elif kind == "grass":
            texture = _blend(0.5 + 0.6 * _noise(rng, size, fine // 3 + 1, fine * 2, 2), first, second)
        elif kind == "stripes":
            angle, periods = rng.uniform(0, np.pi), rng.uniform(4, 11)
            warp = 0.03 * _noise(rng, size, 3, 3)
            wave = np.sin((x * math.cos(angle) + y * math.sin(angle) + warp) * 2 * np.pi * periods)
            texture = _blend(0.5 + wave * rng.uniform(0.5, 1.5), first, second)
        else:
            rows, columns = int(rng.integers(5, 10)), int(rng.integers(3, 7))
            row = np.floor(y * rows)
            across = (x * columns + 0.5 * (row % 2)) % 1
            joint = np.minimum(
                np.minimum(across, 1 - across) * size / columns,
                np.minimum(y * rows % 1, 1 - y * rows % 1) * size / rows,
            )
            texture = _blend(1.3 - joint / max(1.0, size / 90), first, second)
        return texture * (1 + 0.06 * _noise(rng, size, 4, 4, 3))[..., None]

    def contrasting(self, beneath: Array | None, least: float, value: tuple[float, float] = (0.15, 1.0)) -> Array:
        """A colour at least `least` away (RGB distance) from `beneath`, or the farthest of eight."""
        colours = [_colour(self.rng, value) for _ in range(8)]
        if beneath is None:
            return colours[0]
        away = [float(np.sqrt(((colour - beneath) ** 2).sum())) for colour in colours]
        return next((c for c, far in zip(colours, away) if far >= least), colours[int(np.argmax(away))])

    def add_things(self) -> None:
        """2-15 things, larger ones mostly further back."""
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
        """Draw one thing at a random place; False where there is no room for it."""
        rng, size = self.rng, self.size
        kind = str(rng.choice(THINGS))
        shape = _draw_shape(rng, kind, radius)
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
            colour = colour + _coverage(shape.part(u, v))[..., None] * (second - colour)
        lit = np.clip(self.shading(dx, dy, distance, radius)[..., None] * colour, 0, 1)
        self.canvas[box] += _coverage(distance)[..., None] * (lit - self.canvas[box])
        return True

    def cast_shadow(self, box: Box, distance: Array, fall: float) -> None:
        """Darken what lies behind: the shape moved away from the light, its edge softened."""
        soft = np.clip(0.5 - distance / (1.5 + fall), 0, 1)
        down, right = round(fall * math.sin(self.light)), round(fall * math.cos(self.light))
        moved = np.zeros_like(soft)
        height, width = soft.shape
        to = (slice(max(0, down), height + min(0, down)), slice(max(0, right), width + min(0, right)))
        of = (slice(max(0, -down), height - max(0, down)), slice(max(0, -right), width - max(0, right)))
        moved[to] = soft[of]
        self.canvas[box] *= (1 - 0.45 * moved)[..., None]

    def shading(self, dx: Array, dy: Array, distance: Array, radius: float) -> Array:
        """Brightness factor [h, w]: flat, a gradient away from the light, or round with a highlight."""
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
        """[h, w, 3] or [3]: plain, stripes, dots, rings, or noise, in the colour `first` and one related to it."""
        rng = self.rng
        style = rng.random()
        second = np.clip(first + rng.choice([-1, 1]) * rng.uniform(0.15, 0.35) + rng.uniform(-0.1, 0.1, 3), 0, 1)
        period = max(4.0, radius * rng.uniform(0.35, 0.8))  # under four pixels a pattern turns into noise
        if style < 0.4 or radius < 4:
            return first
        if style < 0.58:
            return _blend(0.5 + 1.2 * np.sin(u * 2 * np.pi / period), first, second)
        if style < 0.72:
            return _blend(1.5 * np.cos(u * 2 * np.pi / period) * np.cos(v * 2 * np.pi / period), first, second)
        if style < 0.82:
            return _blend(0.5 - np.sin(distance * 2 * np.pi / period), first, second)
        return _blend(0.5 + 0.2 * rng.standard_normal(u.shape), first, second)

    def photograph(self) -> np.ndarray:
        """uint8 [S, S, 3]: uneven light, a tint, and noise that grows with brightness."""
        rng, size = self.rng, self.size
        uneven = (
            1
            + 0.12 * ((self.x - 0.5) * math.cos(self.light) + (self.y - 0.5) * math.sin(self.light)) * -2
            + 0.04 * _noise(rng, size, 2, 2)
        )
        picture = self.canvas * uneven[..., None] * rng.uniform(0.92, 1.05, 3)
        picture = np.clip(picture, 0, 1) ** 0.85
        noise = rng.standard_normal(picture.shape) * rng.uniform(0.004, 0.03)
        picture = picture + noise * (0.5 + np.sqrt(picture))
        return np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)
