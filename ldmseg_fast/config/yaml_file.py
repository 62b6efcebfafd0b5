"""Reads YAML that somebody else may have written: what it holds is counted before it is built."""

from __future__ import annotations

from typing import Any

from ldmseg_fast.errors import ConfigError

MAX_CHARACTERS = 1 << 16
MAX_VALUES = 10_000  # with every alias written out; a run has about two hundred settings


def parse_yaml(text: str, source: str) -> Any:
    """Reads one YAML (or JSON) document of plain values.

    Args:
        text: of the file.
        source: names the file, for errors.

    Raises:
        ConfigError: no YAML, several documents, a key twice, tags of Python, or aliases that make millions of values
            of a few lines.
    """
    import yaml

    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"{source}: {len(text) >> 10} KiB of settings; a run's are a few")
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        if _count(root, {}, source) > MAX_VALUES:
            raise ConfigError(f"{source}: its aliases (*NAME) make over {MAX_VALUES} values; write them out")
        return _construct(loader, root, source)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{source}: not readable as YAML or JSON ({reason})") from None
    except RecursionError:
        raise ConfigError(f"{source}: lists in lists without end; settings are two levels deep") from None


def _construct(loader: Any, root: Any, source: str) -> Any:
    """Builds the values. PyYAML's own constructors raise such errors for a tag that a value does not fit (!!int '')."""
    try:
        return loader.construct_document(root)
    except (LookupError, AttributeError, TypeError) as error:
        raise ConfigError(f"{source}: a value does not fit its tag (!!int, !!bool, ...); leave the tag out") from error


def _count(node: Any, known: dict[int, int], source: str) -> int:
    """How many values a node makes.

    Raises:
        ConfigError: a key that is there twice, or a node inside itself.
    """
    if id(node) in known:
        if known[id(node)] == 0:
            raise ConfigError(f"{source}: an alias inside the value that it names")
        return known[id(node)]
    known[id(node)] = 0
    total = 1
    if isinstance(node.value, list):
        pairs = [part if isinstance(part, tuple) else (part,) for part in node.value]
        keys: set[tuple[str, str]] = set()
        for pair in pairs:
            key = (pair[0].tag, str(pair[0].value)) if len(pair) == 2 else None
            if key in keys and not isinstance(pair[0].value, list):
                line = pair[0].start_mark.line + 1
                raise ConfigError(
                    f"{source}, line {line}: {str(pair[0].value)[:100]} is there twice; leave one of them"
                )
            if key is not None:
                keys.add(key)
            total += sum(_count(part, known, source) for part in pair)
    known[id(node)] = total
    return total
