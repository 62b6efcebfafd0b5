"""Paints scenes of version 2: every class has a shape and a surface of its own, and any colour.

Version 1 draws a thing's surface and a stuff's contrast freely, so that several of its kinds look alike. Here what a
segment is can be seen from outline and pattern, at 64 pixels too, and never from its colour.
"""

import math

import numpy as np

from ldmseg_fast.data.painter import Painter, minimum_area
from ldmseg_fast.data.shapes import Array, Shape, around, box, coverage, ellipse, polygon
from ldmseg_fast.data.textures import blend, value_noise

__all__ = ["STUFF", "THINGS", "ClassPainter"]

THINGS = (
    "ball", "target", "beetle", "crate", "board", "pole", "ring", "star", "triangle", "cross", "moon", "tree", "shell",
)  # fmt: skip
STUFF = ("sky", "sand", "clouds", "grass", "stripes", "tiles")
UPRIGHT = ("tree", "crate")
SMALLEST = 0.075  # radius of the smallest thing as a share of the side: below it patterns are lost between pixels


def class_shape(rng: np.random.Generator, kind: str, r: float) -> Shape:
    """Draws the outline of a thing of class `kind` and radius `r` pixels."""
    if kind in ("ball", "target"):
        return Shape(kind, lambda u, v: ellipse(u, v, r, r), r)
    if kind == "beetle":
        long, short = r * rng.uniform(1.2, 1.4), r * rng.uniform(0.75, 0.85)
        return Shape(kind, lambda u, v: ellipse(u, v, long, short), long)
    if kind in ("crate", "board"):
        a, b = r * rng.uniform(0.85, 1.05), r * rng.uniform(0.85, 1.05)
        return Shape(kind, lambda u, v: box(u, v, a, b, 0.0), math.hypot(a, b))
    if kind == "pole":
        length, width = r * rng.uniform(1.8, 2.3), max(1.7, 0.26 * r)
        return Shape(kind, lambda u, v: box(u, v, length, width, 0.0), math.hypot(length, width))
    if kind == "ring":
        width = max(1.2, 0.24 * r)
        return Shape(kind, lambda u, v: np.abs(ellipse(u, v, 1.05 * r, 1.05 * r)) - width, 1.05 * r + width)
    if kind == "star":
        radii = np.where(np.arange(10) % 2, 0.55 * r, 1.5 * r)
        vertices = around(radii, np.arange(10) * np.pi / 5)
        return Shape(kind, lambda u, v: polygon(u, v, vertices), 1.5 * r)
    if kind == "triangle":
        radii = r * rng.uniform(1.3, 1.5, 3)
        vertices = around(radii, np.arange(3) * 2 * np.pi / 3)
        return Shape(kind, lambda u, v: polygon(u, v, vertices), 1.5 * r)
    if kind == "cross":
        a, b = 1.3 * r, max(1.3, 0.38 * r)
        return Shape(kind, lambda u, v: np.minimum(box(u, v, a, b, 0.0), box(u, v, b, a, 0.0)), math.hypot(a, b))
    if kind == "moon":
        shift = rng.uniform(0.6, 0.75) * r
        whole, bite = 1.25 * r, 1.05 * r
        return Shape(
            kind, lambda u, v: np.maximum(ellipse(u, v, whole, whole), -ellipse(u - shift, v, bite, bite)), whole
        )
    if kind == "tree":
        trunk, crown = max(1.0, 0.22 * r), r * rng.uniform(0.9, 1.1)

        def upper(u: Array, v: Array) -> Array:
            return polygon(u, v, around(np.full(3, 1.3 * crown), np.pi * np.array([-1 / 2, 1 / 6, 5 / 6])))

        def tree(u: Array, v: Array) -> Array:
            return np.minimum(box(u, v - 1.1 * r, trunk, 0.5 * r, 0.0), upper(u, v))

        return Shape(kind, tree, 1.7 * r, upper)
    waves, phase = int(rng.integers(3, 5)), rng.uniform(0, 2 * np.pi)  # a shell is lobed

    def shell(u: Array, v: Array) -> Array:
        angle, rho = np.arctan2(v, u) * waves + phase, np.hypot(u, v)
        return (rho - r * (1.1 + 0.25 * np.cos(angle))) / np.sqrt(1 + (0.25 * waves * np.sin(angle)) ** 2)

    return Shape(kind, shell, 1.4 * r)


class ClassPainter(Painter):
    """Paints one `size` x `size` scene of version 2; arguments and attributes are `Painter`'s."""

    stuff_kinds = STUFF

    def stuff_texture(self, kind: str, beneath: Array | None) -> Array:
        """Colours one class of stuff, float64 [S, S, 3], away from the mean colour `beneath`, float64 [3].

        sky is smooth, sand has a fine grain, clouds are blots, grass is upright blades, stripes are broad and straight,
        tiles have joints.
        """
        rng, size, x, y = self.rng, self.size, self.x, self.y
        first = self.contrasting(beneath, 0.3, (0.35, 1.0))
        second = np.clip(first * rng.uniform(0.45, 0.65), 0, 1)
        if kind == "sky":
            return blend(y * rng.uniform(0.6, 1.0), first, first * 0.75)
        if kind == "sand":
            return blend(0.5 + 0.35 * rng.standard_normal((size, size)), first, second)
        if kind == "clouds":
            return blend(0.5 + 1.6 * value_noise(rng, size, 4, 4, 2), first, second)
        if kind == "grass":
            blades = max(8, size // 4)
            return blend(0.5 + 0.9 * value_noise(rng, size, max(2, blades // 6), blades, 2), first, second)
        if kind == "stripes":
            angle, periods = rng.uniform(0, np.pi), rng.uniform(5, 8)
            wave = np.sin((x * math.cos(angle) + y * math.sin(angle)) * 2 * np.pi * periods)
            return blend(0.5 + 2.0 * wave, first, second)
        rows, columns = int(rng.integers(6, 9)), int(rng.integers(4, 6))
        across, down = (x * columns + 0.5 * (np.floor(y * rows) % 2)) % 1, y * rows % 1
        joint = np.minimum(np.minimum(across, 1 - across) * size / columns, np.minimum(down, 1 - down) * size / rows)
        return blend(1.3 - joint / max(1.0, size / 90), first, second * 0.6)

    def add_things(self) -> None:
        """Paints 2-10 things; larger ones lie mostly further back."""
        rng, size = self.rng, self.size
        wanted = 2 + int(rng.binomial(8, rng.uniform(0.2, 0.8)))
        radii = np.exp(rng.uniform(math.log(SMALLEST * size), math.log(0.2 * size), wanted))
        radii = radii[np.argsort(-radii * rng.uniform(0.6, 1.6, wanted))]
        stuff = len(self.kinds)
        for radius in radii:
            any(self.add_thing(radius) for _ in range(6))
        while len(self.kinds) < stuff + 2:
            self.add_thing(SMALLEST * size * rng.uniform(1, 2))

    def add_thing(self, radius: float) -> bool:
        """Paints one thing at a random place. Returns False where there is no room for it."""
        rng, size = self.rng, self.size
        kind = THINGS[int(rng.integers(len(THINGS)))]
        shape = class_shape(rng, kind, radius)
        turn = rng.normal(0, 0.1) if kind in UPRIGHT else rng.uniform(0, 2 * np.pi)
        cx, cy = rng.uniform(0.04, 0.96, 2) * size
        fall = min(0.35 * radius, 0.06 * size) + 1
        margin = shape.reach + fall + 3
        top, left = max(0, int(cy - margin)), max(0, int(cx - margin))
        area = (slice(top, min(size, int(cy + margin) + 1)), slice(left, min(size, int(cx + margin) + 1)))
        dx, dy = self.x[area] * size - cx, self.y[area] * size - cy
        cos, sin = math.cos(turn), math.sin(turn)
        u, v = dx * cos + dy * sin, dy * cos - dx * sin
        distance = shape.distance(u, v)
        inside = distance <= 0
        # more than half of a thing stays in sight: what is hidden cannot be named
        if not self.accept(area, inside, kind, max(minimum_area(size), int(1.2 * radius * radius)), 0.6):
            return False
        beneath = self.canvas[area][inside].mean(0)
        if rng.random() < 0.7:
            self.cast_shadow(area, distance, fall)
        first = self.contrasting(beneath, 0.35)
        second = self.contrasting(first, 0.6)
        colour = self.surface(kind, shape, (u, v, distance), radius, (first, second))
        if kind == "ball":
            colour = self.roundness(dx, dy, radius)[..., None] * colour
        self.canvas[area] += coverage(distance)[..., None] * (np.clip(colour, 0, 1) - self.canvas[area])
        return True

    def surface(
        self, kind: str, shape: Shape, place: tuple[Array, Array, Array], radius: float, colours: tuple[Array, Array]
    ) -> Array:
        """Returns the colours, float64 [h, w, 3] or [3], of a thing of class `kind`.

        Args:
            kind: of THINGS.
            shape: its outline; `part` is in the second colour.
            place: float64 [h, w] each, pixels from its centre along its own axes, and to its edge.
            radius: its radius in pixels.
            colours: float64 [3] each.
        """
        (u, v, distance), (first, second) = place, colours
        period = max(4.0, 0.75 * radius)  # under four pixels a pattern turns into noise
        if kind == "target":
            return blend(0.5 - 2 * np.sin((distance + 0.25 * period) * 2 * np.pi / period), first, second)
        if kind == "beetle":
            return blend(4 * np.cos(u * 2 * np.pi / period) * np.cos(v * 2 * np.pi / period) - 1, first, second)
        if kind == "crate":
            frame = coverage(-distance - max(1.2, 0.22 * radius))[..., None]
            return first + frame * (second - first)
        if kind == "board":
            return blend(
                0.5 + 4 * np.sin(u * np.pi / (0.5 * period)) * np.sin(v * np.pi / (0.5 * period)), first, second
            )
        if kind == "pole":
            return blend(0.5 + 2 * np.sin(u * 2 * np.pi / period), first, second)
        if kind == "shell":
            return blend(0.5 + 2 * np.sin(u * 2 * np.pi / period), first, second)
        if shape.part is not None:
            return first + coverage(shape.part(u, v))[..., None] * (second - first)
        return first

    def roundness(self, dx: Array, dy: Array, radius: float) -> Array:
        """Returns the brightness, float64 [h, w], of a lit ball; dx, dy are pixels from its centre, [h, w]."""
        toward = (dx / radius + 0.35 * math.cos(self.light)) ** 2 + (dy / radius + 0.35 * math.sin(self.light)) ** 2
        return 0.55 + 0.75 * np.exp(-2.5 * toward)
