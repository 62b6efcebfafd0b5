"""Checks that what a run starts from agrees with its settings, and with each other, on the categories."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

from ldmseg_fast.checkpoints.categories_file import load_categories
from ldmseg_fast.checkpoints.model_folder import load_component_config
from ldmseg_fast.config.categories import CategoryTable
from ldmseg_fast.errors import ConfigError


def check_categories(given: int, folders: Mapping[str, Path]) -> None:
    """Checks the categories of the model folders that a run starts from.

    Args:
        given: `mask_vae.num_categories` of the settings; 0: whatever the folders have.
        folders: of models with a mask auto-encoder, by the settings that name them.

    Raises:
        ConfigError: a folder of another number of categories than the settings, or two folders of other categories.
        CheckpointError: a folder without a mask auto-encoder, or a damaged table.
    """
    tables: dict[str, CategoryTable] = {}
    for setting, folder in folders.items():
        config = load_component_config(folder, "mask_vae")[0]
        if given not in (0, config.num_categories):
            raise ConfigError(
                f"mask_vae.num_categories={given}: {setting}={folder} has {config.num_categories or 'no'} categories; "
                f"leave mask_vae.num_categories out, or train a mask auto-encoder with {given}"
            )
        table = load_categories(folder, config)
        if table is not None:
            tables[f"{setting}={folder}"] = table
    for (one, first), (other, second) in itertools.pairwise(tables.items()):
        listed, expected = ([(c.name, c.isthing) for c in table.categories] for table in (first, second))
        if listed != expected:
            number = next(n for n, pair in enumerate(itertools.zip_longest(listed, expected), 1) if pair[0] != pair[1])
            raise ConfigError(
                f"{one} and {other} have other categories: number {number} is {_shown(first, number)} in the one and "
                f"{_shown(second, number)} in the other; start from models of the same categories"
            )


def _shown(table: CategoryTable, number: int) -> str:
    if number > len(table):
        return "missing"
    return f"{table[number].name!r} ({'thing' if table[number].isthing else 'stuff'})"
