"""Errors of too little memory in a pipeline's methods name the side at which its networks ran."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from ldmseg_fast.errors import memory_at

T = TypeVar("T", bound=Callable[..., Any])


def says_size(method: T) -> T:
    """Wraps a method of a pipeline, which has `info`: its errors of too little memory get a note, see `memory_at`."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **named: Any) -> Any:
        with memory_at(self.info.image_size, self.info.folder):
            return method(self, *args, **named)

    return cast(T, call)
