"""Settings as plain values and back: types and ranges, unknown keys, `key=value` lines.

Works on any frozen dataclass; which settings there are stands in `settings`.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import reprlib
import typing
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from ldmseg_fast.errors import ConfigError

T = TypeVar("T")

_SHORT = reprlib.Repr()
_SHORT.maxstring, _SHORT.maxother, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict = 200, 200, 20, 20, 20


def shown(value: Any) -> str:
    """Writes a value of someone's file for an error, cut where it is long."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # a whole number of thousands of digits, which Python does not write
        return f"a {type(value).__name__} too long to write"


def _convert(value: Any, annotation: Any, key: str) -> Any:
    """`value` (a string of the command line, or YAML/JSON) as `annotation`; raises ConfigError naming `key`."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        kind, *limits = typing.get_args(annotation)
        value = _convert(value, kind, key)
        for limit in limits:
            if not limit.admits(value):
                raise ConfigError(f"{key}={shown(value)}: {limit} expected")
        return value
    if is_dataclass(annotation):
        raise ConfigError(f"{key}: a group of settings, not {shown(value)}")
    if origin is Literal:
        allowed = typing.get_args(annotation)
        if not isinstance(value, (str, int)) or value not in allowed:
            raise ConfigError(f"{key}={shown(value)}: one of {', '.join(map(str, allowed))} expected")
        return value
    if origin is tuple:
        items = _split(value) if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            raise ConfigError(f"{key}={shown(value)}: a list expected, such as 32,64,128")
        args = typing.get_args(annotation)
        kinds = [args[0]] * len(items) if args[-1] is Ellipsis else args
        if len(kinds) != len(items):
            raise ConfigError(f"{key}={shown(value)}: {len(kinds)} values expected")
        return tuple(_convert(item, kind, key) for item, kind in zip(items, kinds))
    if annotation is bool:
        known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if isinstance(value, bool):
            return value
        if str(value).lower() in known:
            return known[str(value).lower()]
        raise ConfigError(f"{key}={shown(value)}: true or false expected")
    if annotation is str:
        if isinstance(value, (str, Path)):
            return str(value)
        if callable(getattr(value, "save_pretrained", None)):  # a pipeline or a model of diffusers or transformers
            kind = type(value).__name__
            raise ConfigError(f"{key} is a {kind} and a folder is expected: its save_pretrained(FOLDER) writes one")
        raise ConfigError(f"{key}={shown(value)}: text expected")
    return _number(value, annotation, key)


def _split(text: str) -> Any:
    """The items of a list that the command line wrote: 32,64 or (32, 64) or ["conv_in", "time_embedding"]."""
    inner = text.strip("()[]")
    if '"' in text:
        with contextlib.suppress(json.JSONDecodeError):
            return json.loads(f"[{inner}]")
    return [part.strip() for part in inner.split(",") if part.strip()]


def _number(value: Any, kind: type, key: str) -> int | float:
    try:
        if isinstance(value, bool):
            raise ValueError
        if kind is float:
            return float(value)
        with contextlib.suppress(ValueError):  # 1e3 and 1000.0 are whole numbers too
            if isinstance(value, (int, str)):
                return int(value)  # exact, where a float would round
        if float(value) != int(float(value)):
            raise ValueError
        return int(float(value))
    except (TypeError, ValueError, OverflowError):
        name = "a whole number" if kind is int else "a number"
        raise ConfigError(f"{key}={shown(value)}: {name} expected") from None


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def from_dict(cls: type[T], values: dict[str, Any], prefix: str = "") -> T:
    """A config dataclass from plain values; raises what `update` raises."""
    return update(cls(), values, prefix)


def update(config: T, values: dict[str, Any], prefix: str = "") -> T:
    """`config` with `values` (nested dictionaries) put in.

    Raises:
        ConfigError: an unknown key, a value of the wrong type or out of range.
    """
    hints = _hints(type(config))  # type: ignore[arg-type]  # a class is hashable
    changed: dict[str, Any] = {}
    for name, value in values.items():
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known: {', '.join(sorted(hints))}"
            raise ConfigError(f"unknown setting {prefix}{str(name)[:200]}{hint}")
        old = getattr(config, name)
        if is_dataclass(old) and isinstance(value, dict):
            changed[name] = update(old, value, f"{prefix}{name}.")
        else:
            changed[name] = _convert(value, hints[name], prefix + name)
    return replace(typing.cast(Any, config), **changed)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values that `from_dict` and JSON take."""
    return json.loads(json.dumps(asdict(config)))


def describe(config: Any, prefix: str = "") -> list[str]:
    """`key=value` lines, one a setting."""
    lines = []
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            lines += describe(value, f"{prefix}{item.name}.")
        else:
            lines.append(f"{prefix}{item.name}={value}")
    return lines
