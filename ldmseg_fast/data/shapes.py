"""Describes the outlines of generated scenes as signed distances in pixels, negative inside.

u, v: pixels from a shape's centre, along its own axes; r: its radius in pixels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

__all__ = ["THINGS", "Shape", "around", "box", "coverage", "draw_shape", "ellipse", "normalised", "polygon"]

THINGS = ("ellipse", "box", "polygon", "blob", "bar", "ring", "star", "figure")

Array = np.ndarray


def coverage(distance: Array) -> Array:
    """Returns the share of each pixel inside an edge, float64 [h, w] in [0, 1].

    distance: float64 [h, w] to the edge in pixels, negative inside.
    """
    return np.clip(0.5 - distance, 0, 1)


def normalised(field: Array) -> Array:
    """Turns an implicit function, float64 [h, w] and negative inside, into an approximate distance [h, w] in pixels."""
    down, right = np.gradient(field)
    return field / np.maximum(np.hypot(down, right), 1e-6)


def ellipse(u: Array, v: Array, a: float, b: float) -> Array:
    """Returns the approximate distance, float64 [h, w] in pixels, to an ellipse with half-axes a and b."""
    near = np.hypot(u / a, v / b)
    return near * (near - 1) / np.maximum(np.hypot(u / a**2, v / b**2), 1e-9)


def box(u: Array, v: Array, a: float, b: float, corner: float) -> Array:
    """Returns the distance, float64 [h, w] in pixels, to a box with half-sides a and b and rounded corners."""
    du, dv = np.abs(u) - a + corner, np.abs(v) - b + corner
    return np.hypot(np.maximum(du, 0), np.maximum(dv, 0)) + np.minimum(np.maximum(du, dv), 0) - corner


def polygon(u: Array, v: Array, vertices: Array) -> Array:
    """Computes the exact distance, float64 [h, w] in pixels, to a simple polygon with vertices [n, 2].

    Crossing numbers tell inside from outside.
    """
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


def around(radii: Array, angles: Array) -> Array:
    """Returns vertices, float64 [n, 2], at radii [n] in pixels and angles [n]."""
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


@dataclass(frozen=True)
class Shape:
    """Describes a thing by its distance.

    Attributes:
        kind: one of `THINGS`.
        distance: maps u and v, float64 [h, w] each, to the distance [h, w] in pixels.
        reach: the radius in pixels that encloses the thing.
        part: like `distance`, for a part in a second colour.
    """

    kind: str
    distance: Callable[[Array, Array], Array]
    reach: float
    part: Callable[[Array, Array], Array] | None = None


def draw_shape(rng: np.random.Generator, kind: str, r: float) -> Shape:
    """Draws a random thing of about the area of a disc of radius `r` pixels (thin kinds: less)."""
    thin = max(0.95, r * rng.uniform(0.08, 0.22))  # under two pixels wide an object is lost between pixels
    if kind == "ellipse":
        stretch = rng.uniform(1.0, 1.7)
        return Shape(kind, lambda u, v: ellipse(u, v, r * stretch, r / stretch), r * stretch)
    if kind == "box":
        stretch = rng.uniform(1.0, 1.9)
        a, b = 0.89 * r * stretch, 0.89 * r / stretch
        corner = min(a, b) * rng.choice([0.0, 0.25, 0.6])
        return Shape(kind, lambda u, v: box(u, v, a, b, corner), math.hypot(a, b))
    if kind == "polygon":
        sides = int(rng.integers(3, 8))
        angles = (np.arange(sides) + rng.uniform(-0.3, 0.3, sides)) * 2 * np.pi / sides
        vertices = around(r * rng.uniform(0.95, 1.5, sides), angles)
        return Shape(kind, lambda u, v: polygon(u, v, vertices), 1.5 * r)
    if kind == "star":
        points = int(rng.integers(4, 8))
        radii = np.where(np.arange(2 * points) % 2, r * rng.uniform(0.55, 0.75), r * 1.5)
        vertices = around(radii, np.arange(2 * points) * np.pi / points)
        return Shape(kind, lambda u, v: polygon(u, v, vertices), 1.5 * r)
    if kind == "blob":
        waves = np.arange(2, 6)
        size, phase = rng.uniform(0, 0.55, 4) / waves, rng.uniform(0, 2 * np.pi, 4)

        def blob(u: Array, v: Array) -> Array:
            angle, rho = np.arctan2(v, u)[..., None] * waves + phase, np.hypot(u, v)
            slope = (size * waves * np.sin(angle)).sum(-1)
            return (rho - r * (1 + (size * np.cos(angle)).sum(-1))) / np.sqrt(1 + slope * slope)

        return Shape(kind, blob, r * (1 + size.sum()))
    if kind == "bar":
        length = r * rng.uniform(1.6, 2.6)
        corner = thin * rng.choice([0.0, 1.0])
        return Shape(kind, lambda u, v: box(u, v, length, thin, corner), math.hypot(length, thin))
    if kind == "ring":
        stretch, width = rng.uniform(1.0, 1.4), max(thin, r * rng.uniform(0.12, 0.3))
        a, b = 1.15 * r * stretch, 1.15 * r / stretch
        return Shape(kind, lambda u, v: np.abs(ellipse(u, v, a, b)) - width, a + width)
    # A figure stands on a box and carries a round head or crown: one thing, two colours.
    foot = r * rng.uniform(0.3, 0.7)
    head = max(r * rng.uniform(0.6, 1.0), foot * 0.8)

    def upper(u: Array, v: Array) -> Array:
        return ellipse(u, v + 0.6 * r, head, 0.9 * r)

    def figure(u: Array, v: Array) -> Array:
        return np.minimum(box(u, v - 0.6 * r, foot, 0.9 * r, 0.2 * foot), upper(u, v))

    return Shape("figure", figure, 1.6 * r, upper)
