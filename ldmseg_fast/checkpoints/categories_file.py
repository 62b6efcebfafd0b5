"""Reads and writes `categories.json` of a model folder: what the numbers of its category head stand for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from ldmseg_fast.checkpoints.schema import MAX_BYTES
from ldmseg_fast.config import MaskVAEConfig
from ldmseg_fast.config.categories import Category, CategoryTable
from ldmseg_fast.errors import CheckpointError
from ldmseg_fast.files import inside, read_json, write_json

CATEGORIES = "categories.json"
MAX_ID = 2**31 - 1


def save_categories(folder: Path, table: CategoryTable | None) -> None:
    """Writes the table of a model; one without categories has no such file.

    Raises:
        OSError: the folder cannot be written.
    """
    if table is None:
        (folder / CATEGORIES).unlink(missing_ok=True)
    else:
        write_json(folder / CATEGORIES, table.to_coco())


def load_categories(folder: str | Path, config: MaskVAEConfig) -> CategoryTable | None:
    """Reads the table of a model whose mask auto-encoder has `config`; None for a model without categories.

    Raises:
        CheckpointError: a file that is missing or damaged, or another number of categories than the model has.
    """
    if config.num_categories == 0:
        return None
    path = inside(Path(folder), Path(folder) / CATEGORIES)
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        raise CheckpointError(
            f"{path}: missing or no such file; the model has {config.num_categories} categories, and this file says "
            f"what they are: copy it from where the model was trained"
        )
    values = read_json(path)
    if not isinstance(values, list):
        raise CheckpointError(f"{path}: a list of categories expected; copy it from where the model was trained")
    table = CategoryTable(tuple(_category(value, place, path) for place, value in enumerate(values)))
    if len(table) != config.num_categories:
        raise CheckpointError(
            f"{path}: {len(table)} categories, and mask_vae.num_categories={config.num_categories}; the file is of "
            f"another model"
        )
    for what in ("id", "name"):
        found = [getattr(category, what) for category in table.categories]
        if twice := [value for value, count in Counter(found).items() if count > 1]:
            raise CheckpointError(f"{path}: the {what} {twice[0]!r} appears twice; keep one")
    return table


def _category(value: Any, place: int, path: Path) -> Category:
    """Checks one entry. Raises CheckpointError, which names it."""
    where = f"{path}: entry {place}"
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: an object with id, name, isthing and color expected, got {value!r:.80}")
    number, name, isthing, color = (value.get(key) for key in ("id", "name", "isthing", "color"))
    if type(number) is not int or not 0 <= number <= MAX_ID:
        raise CheckpointError(f"{where}: `id` must be a whole number in 0..{MAX_ID}, got {number!r:.80}")
    if not isinstance(name, str) or not name or any("\ud800" <= letter <= "\udfff" for letter in name):
        raise CheckpointError(f"{where}: `name` must be a text, got {name!r:.80}")
    if type(isthing) not in (int, bool) or isthing not in (0, 1):
        raise CheckpointError(f"{where}: `isthing` must be 0 or 1, got {isthing!r:.80}")
    if not (isinstance(color, list) and len(color) == 3 and all(type(v) is int and 0 <= v <= 255 for v in color)):
        raise CheckpointError(f"{where}: `color` must be three numbers in 0..255, got {color!r:.80}")
    return Category(number, name, bool(isthing), (color[0], color[1], color[2]))
