"""Settings as plain values and back: type checks, unknown keys, `key=value` lines.

Works on any frozen dataclass; which settings there are stands in `config`.
"""

from __future__ import annotations

import difflib
import json
import typing
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from ldmseg_fast.errors import ConfigError

T = TypeVar("T")


def _convert(value: Any, annotation: Any, key: str) -> Any:
    """`value` (a string of the command line, or YAML/JSON) as `annotation`; raises ConfigError naming `key`."""
    origin = typing.get_origin(annotation)
    if is_dataclass(annotation):
        if not isinstance(value, dict):
            raise ConfigError(f"{key}: a group of settings, not {value!r}")
        return from_dict(typing.cast(type, annotation), value, key + ".")
    if origin is Literal:
        allowed = typing.get_args(annotation)
        if value not in allowed:
            raise ConfigError(f"{key}={value!r}: one of {', '.join(map(str, allowed))} expected")
        return value
    if origin is tuple:
        items = json.loads(f"[{value.strip('()[]')}]") if isinstance(value, str) and '"' in value else value
        if isinstance(items, str):
            items = [part.strip() for part in items.strip("()[]").split(",") if part.strip()]
        if not isinstance(items, (list, tuple)):
            raise ConfigError(f"{key}={value!r}: a list expected, such as 32,64,128")
        args = typing.get_args(annotation)
        kinds = [args[0]] * len(items) if args[-1] is Ellipsis else args
        if len(kinds) != len(items):
            raise ConfigError(f"{key}={value!r}: {len(kinds)} values expected")
        return tuple(_convert(item, kind, key) for item, kind in zip(items, kinds))
    if annotation is bool:
        known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if isinstance(value, bool):
            return value
        if str(value).lower() in known:
            return known[str(value).lower()]
        raise ConfigError(f"{key}={value!r}: true or false expected")
    if annotation is str:
        if isinstance(value, (str, Path)):
            return str(value)
        raise ConfigError(f"{key}={value!r}: text expected")
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
        if annotation is int:
            if number != int(number):
                raise ValueError
            return int(value) if isinstance(value, int) else int(number)
        return number
    except (TypeError, ValueError, OverflowError):
        kind = "a whole number" if annotation is int else "a number"
        raise ConfigError(f"{key}={value!r}: {kind} expected") from None


def from_dict(cls: type[T], values: dict[str, Any], prefix: str = "") -> T:
    """A config dataclass from plain values. Raises ConfigError on an unknown key or a wrong type."""
    return update(cls(), values, prefix)


def update(config: T, values: dict[str, Any], prefix: str = "") -> T:
    """`config` with `values` (nested dictionaries) put in. Raises ConfigError on an unknown key or a wrong type."""
    hints = typing.get_type_hints(type(config))
    changed: dict[str, Any] = {}
    for name, value in values.items():
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known: {', '.join(sorted(hints))}"
            raise ConfigError(f"unknown setting {prefix}{name}{hint}")
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
