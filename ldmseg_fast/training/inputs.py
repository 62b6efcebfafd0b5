"""Opens the data of a run, as its settings say."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ldmseg_fast import distributed
from ldmseg_fast.checkpoints.categories_file import CATEGORIES, load_categories
from ldmseg_fast.checkpoints.hub import pinned
from ldmseg_fast.checkpoints.hub_names import DIFFUSERS, MODEL, PREFIX, VAE, HubName, hub_name
from ldmseg_fast.checkpoints.shipped import resolve_model_dir
from ldmseg_fast.config import Config
from ldmseg_fast.config.categories import CategoryTable
from ldmseg_fast.data.category_balance import category_weights
from ldmseg_fast.data.coco_panoptic import CocoPanoptic
from ldmseg_fast.data.folders import find_split
from ldmseg_fast.data.joined_sets import JoinedSets, SetPlace, set_places
from ldmseg_fast.data.loader import TrainingBatches
from ldmseg_fast.data.transforms import Augmentation
from ldmseg_fast.errors import CheckpointError, ConfigError, DataError
from ldmseg_fast.files import read_json
from ldmseg_fast.outputs import check_outputs
from ldmseg_fast.training.stages import Stage


def training_set(config: Config, num_slots: int) -> CocoPanoptic | JoinedSets:
    """Opens the training split of `data.root`, or those of all its roots.

    Raises:
        ConfigError: a list of roots or of weights that cannot be.
        DataError: a split that cannot be read.
    """
    places = set_places(config.data)
    if unknown := sorted(set(config.data.class_agnostic) - {place.name for place in places}):
        raise ConfigError(
            f"data.class_agnostic={','.join(config.data.class_agnostic)}: no set of data.root is named "
            f"{', '.join(unknown)}; there are {', '.join(place.name for place in places)}"
        )
    sets = [
        make_dataset(config, place, place.train_split, num_slots, train=True, number=number)
        for number, place in enumerate(places)
    ]
    if len(sets) == 1:
        return sets[0]
    return JoinedSets(sets, [place.name for place in places], config.data.weights)


def validation_sets(config: Config, num_slots: int) -> dict[str, CocoPanoptic]:
    """Opens the validation split of each root, by its name; a split that two roots share once.

    Raises:
        ConfigError, DataError: as `training_set`.
    """
    places = {(place.root, place.val_split): place for place in reversed(set_places(config.data)) if place.val_split}
    return {
        place.name: make_dataset(config, place, place.val_split, num_slots, train=False)
        for place in reversed(places.values())
    }


def sets_of(dataset: CocoPanoptic | JoinedSets) -> list[CocoPanoptic]:
    """Lists the sets that a training set is made of."""
    return dataset.sets if isinstance(dataset, JoinedSets) else [dataset]


def not_held_out(config: Config) -> list[str]:
    """Warns of validations whose numbers do not tell how good the model is on pictures that it has not seen.

    Training on a split whose name says test, choosing `best` by one, and validating on what is trained on are allowed,
    but not in silence.
    """
    warnings = []
    for place in set_places(config.data):
        train, val = place.train_split, place.val_split
        if _is_test(train):
            warnings.append(f"{place.name}: trains on the split {train}; no result on it is one of unseen pictures")
        if val == train:
            warnings.append(f"{place.name}: validates on {val}, the split that it trains on; name another after ROOT:")
        elif _is_test(val):
            cure = "validate on a part of the training data, and test once with `ldmseg evaluate`"
            warnings.append(f"{place.name}: {val} chooses `best`, which makes its numbers there too good; {cure}")
    return warnings


def _is_test(split: str) -> bool:
    return re.search(r"(?<![a-z])test", split.lower()) is not None


def make_dataset(
    config: Config, place: SetPlace, split: str, num_slots: int, train: bool, number: int = 0
) -> CocoPanoptic:
    """Opens a split. Training augments and uses `data.limit`; validation does neither, and uses `data.val_limit`.

    Args:
        config: the run's.
        place: of the set.
        split: of it.
        num_slots: of the model.
        train: whether it is for training.
        number: of the set in the run, so that sets differ in their random numbers.

    Raises:
        DataError: a split that cannot be read.
    """
    data = config.data
    dataset = CocoPanoptic(
        place.root,
        split,
        data.image_size,
        train=train,
        num_slots=num_slots,
        id_assignment=data.id_assignment,
        min_area=data.min_area,
        augmentation=Augmentation(data.flip, data.scale_min, data.color_jitter, data.aspect_jitter, data.paste),
        seed=config.train.seed + number,
        cache=data.cache,
        resize=data.resize if train else "pillow",
        limit=data.limit if train else data.val_limit,
        picture_size=data.image_size * config.image_encoder.picture_scale,
    )
    dataset.name, dataset.class_agnostic = place.name, place.name in data.class_agnostic
    return dataset


def use_categories(
    stage: Stage, train_sets: Sequence[CocoPanoptic], val_sets: Iterable[CocoPanoptic], resumed: Path | None
) -> None:
    """Makes all splits carry categories where the stage's model has them, and weighs them by `loss.category_balance`.

    A stage that starts without a table takes the training splits', joined by name, or the one that the run has had so
    far.

    Args:
        stage: gets the table.
        train_sets, val_sets: the splits.
        resumed: the folder of a run that goes on.

    Raises:
        ConfigError: another number of categories in the training split than in the settings, or settings that need
            categories of a model without.
        CheckpointError: a damaged table.
        DataError: a split whose categories do not fit the table.
    """
    expected = stage.mask_vae.config.num_categories
    if not expected and stage.config.train.best == "class_pq":
        raise ConfigError(
            "train.best=class_pq: the model has no categories (mask_vae.num_categories=0); set train.best=pq"
        )
    balance = stage.config.loss.category_balance
    if not expected and balance > 0:
        raise ConfigError(
            f"loss.category_balance={balance:g}: the model has no categories (mask_vae.num_categories=0); set "
            f"loss.category_balance=0"
        )
    if not expected:
        return
    if stage.categories is None and resumed is not None and (resumed / CATEGORIES).exists():
        stage.categories = load_categories(resumed, stage.mask_vae.config)
    if stage.categories is None:
        named = [dataset for dataset in train_sets if not dataset.class_agnostic]
        if not named:
            raise ConfigError(
                f"data.class_agnostic names every set, and mask_vae.num_categories={expected}: set it to 0, or leave a "
                f"set its categories"
            )
        sources = [str(dataset.folders.annotations) for dataset in named]
        found = list(zip([dataset.categories for dataset in named], sources))
        stage.categories = CategoryTable.of_data_sets(found)
        if len(stage.categories) != expected:
            source = f"{sources[0]} has" if len(sources) == 1 else f"{', '.join(sources)} together have"
            raise ConfigError(
                f"mask_vae.num_categories={expected}: {source} {len(stage.categories)} categories; set "
                f"mask_vae.num_categories={len(stage.categories)}, or 0 for segments without categories"
            )
    val_sets = list(val_sets)
    if stage.config.train.best == "class_pq" and all(dataset.class_agnostic for dataset in val_sets):
        raise ConfigError(
            "train.best=class_pq: no set with categories is validated on (data.class_agnostic); set train.best=pq"
        )
    for dataset in (*train_sets, *val_sets):
        try:
            dataset.use_categories(stage.categories)
        except DataError as error:
            raise DataError(f"{error}{_other_categories(stage.config, dataset.name)}") from None
    if balance > 0:
        weights = category_weights(train_sets, stage.categories, balance, stage.config.data.weights)
        stage.category_weights = torch.from_numpy(weights).to(next(stage.parameters()).device)


def _other_categories(config: Config, name: str) -> str:
    """Says how a run can start from a model of other categories than those of the set `name` all the same."""
    if not config.model.init_from:
        return ""
    exchange = ""
    if not config.few_step.new_autoencoder:
        exchange = (
            "go on from it in stage one_step with an auto-encoder that is trained on this data "
            "(model.mask_vae=MODEL_DIR few_step.new_autoencoder=true), or "
        )
    names = ",".join([*config.data.class_agnostic, name])
    return f". Or {exchange}leave this set's categories out (data.class_agnostic={names})"


# settings that may be names of the Hub, and the kinds of repositories that each takes
STARTS = (
    ("model", "init_from", (MODEL, DIFFUSERS)),
    ("model", "mask_vae", (MODEL,)),
    ("image_encoder", "path", (VAE,)),
)


def hub_names(config: Config) -> dict[str, HubName]:
    """Lists the models of the Hub that a run starts from, by the settings that name them."""
    words = {f"{group}.{key}": getattr(getattr(config, group), key) for group, key, _ in STARTS}
    found = {setting: hub_name(word) for setting, word in words.items() if word and not Path(word).exists()}
    return {setting: name for setting, name in found.items() if name is not None}


def pin_hub_names(config: Config, resumed: Path | None) -> Config:
    """Fetches the models of the Hub that a run starts from, and writes their commits in the place of their branches.

    So every rank, every later step and a resumed run see one commit, and the run's records name it.

    Args:
        config: the run's.
        resumed: the folder of a run that goes on, whose commits stay.

    Raises:
        CheckpointError, ArgumentError: as `resolve_model_dir`.
    """
    before: dict[str, Any] = {}
    names = hub_names(config)
    if resumed is not None and (resumed / "config.json").is_file():
        before = read_json(resumed / "config.json")
    for group, key, kinds in STARTS:
        word = getattr(getattr(config, group), key)
        name = names.get(f"{group}.{key}")
        if name is None:
            continue
        old = str(before.get(group, {}).get(key, ""))
        began = hub_name(old) if old.startswith(PREFIX) else None
        if not name.is_commit and began is not None and replace(began, revision=name.revision) == name:
            word = old

        def pin(word: str = word, kinds: Sequence[str] = kinds) -> str:
            return pinned(word, resolve_model_dir(word, kinds=kinds))

        value = distributed.from_main(pin)
        resolve_model_dir(value, kinds=kinds)  # on another machine it is still to be fetched
        config = replace(config, **{group: replace(getattr(config, group), **{key: value})})
    return config


def check_output_dir(config: Config) -> None:
    """Checks that a run writes to no folder that it reads from.

    Raises:
        ArgumentError: it would.
    """
    data, model = config.data, config.model
    read: list[Path] = []
    places = set_places(data)
    for place in places:
        for split in filter(None, (place.train_split, place.val_split)):
            with contextlib.suppress(DataError):  # the data set says so later
                read += vars(find_split(place.root, split)).values()
    data_roots = [place.root for place in places]
    roots: list[str | Path] = [
        *data_roots,
        config.image_encoder.path,
        *(path.parent for path in read if path.is_file()),
    ]
    for name in filter(None, (model.init_from, model.mask_vae)):
        with contextlib.suppress(CheckpointError):
            roots.append(resolve_model_dir(name, kinds=(MODEL, DIFFUSERS)))
    folder = Path(config.output_dir)
    outputs = {"output_dir": folder, "the best model's folder": folder / "best"}
    check_outputs({}, outputs, inputs=read, roots=filter(None, roots))


def check_batch(config: Config) -> None:
    """Checks that the batch can be shared among the ranks.

    Raises:
        ConfigError: it cannot; the message names one that can.
    """
    world = distributed.world_size()
    micro_batch = config.train.batch_size // config.train.accumulation
    if micro_batch % world:
        fitting = max(world, micro_batch - micro_batch % world) * config.train.accumulation
        raise ConfigError(
            f"train.batch_size / train.accumulation = {micro_batch} cannot be shared among {world} ranks; "
            f"train.batch_size={fitting} can"
        )


def make_batches(dataset: CocoPanoptic | JoinedSets, config: Config, first_item: int = 0) -> TrainingBatches:
    """Makes this rank's micro-batches, from what all ranks together have not seen yet."""
    world = distributed.world_size()
    return TrainingBatches(
        dataset,
        config.train.batch_size // config.train.accumulation // world,
        rank=distributed.rank(),
        world_size=world,
        seed=config.train.seed,
        first_item=first_item,
        num_workers=config.data.num_workers,
        timeout=config.data.timeout,
    )
