"""Training on several sets: which is drawn from when, categories joined by name, and lists that cannot be."""

import itertools
import json
from collections import Counter

import pytest

from ldmseg_fast.config import load_config
from ldmseg_fast.config.categories import CategoryTable
from ldmseg_fast.data.joined_sets import BLOCK, WeightedSampler, set_places, shares_of_block
from ldmseg_fast.data.scenes import write_scenes
from ldmseg_fast.errors import ConfigError, DataError
from ldmseg_fast.training.inputs import make_batches, training_set, use_categories, validation_sets

SIZES = (5, 30, 200)


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Two folders of scenes with the categories of version 2."""
    folder = tmp_path_factory.mktemp("sets")
    return [write_scenes(folder / name, images, 32, 0, workers=1) for name, images in (("few", 4), ("many", 12))]


def config(roots, *settings):
    return load_config("tiny", [f"data.root={','.join(map(str, roots))}", "data.image_size=32", *settings])


def edited(root, folder, change):
    """A copy of a folder of scenes whose JSONs `change` has gone over."""
    folder.mkdir()
    for path in root.iterdir():
        if path.name != "annotations":
            (folder / path.name).symlink_to(path)
    (folder / "annotations").mkdir()
    for path in (root / "annotations").iterdir():
        if path.is_dir():
            (folder / "annotations" / path.name).symlink_to(path)
            continue
        content = json.loads(path.read_text())
        change(content)
        (folder / "annotations" / path.name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.5, 3, 1), (1, 0, 2), (1e-9, 1, 1)])
def test_each_set_has_its_share_in_every_block(weights):
    counts = shares_of_block(weights)
    assert sum(counts) == BLOCK
    for count, weight in zip(counts, weights):
        assert (count > 0) == (weight > 0)
        assert abs(count - weight / sum(weights) * BLOCK) <= 2
    sampler = WeightedSampler(SIZES, weights, BLOCK)
    for step in range(2):
        drawn = Counter(0 if index < 5 else 1 if index < 35 else 2 for _, index in sampler.batch(step))
        assert tuple(drawn[number] for number in range(3)) == counts


def test_a_set_gives_all_its_items_before_one_comes_again():
    sampler = WeightedSampler(SIZES, (1, 1, 1), 50)
    line = [pair for step in range(40) for pair in sampler.batch(step)]
    for first, size in ((0, 5), (5, 30), (35, 200)):
        own = [(epoch, index - first) for epoch, index in line if first <= index < first + size]
        for epoch in range(len(own) // size):
            part = own[epoch * size : (epoch + 1) * size]
            assert {e for e, _ in part} == {epoch} and sorted(index for _, index in part) == list(range(size))
    assert len(set(line)) == len(line)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("first", [0, 8, 2000])
def test_batches_do_not_hang_on_ranks_or_resumes(ranks, first):
    whole = WeightedSampler(SIZES, (2, 1, 1), 8, seed=3)
    line = [pair for step in range(260) for pair in whole.batch(step)]
    parts = [WeightedSampler(SIZES, (2, 1, 1), 8 // ranks, rank, ranks, 3, first) for rank in range(ranks)]
    for step in range(5):
        found = list(itertools.chain.from_iterable(part.batch(step) for part in parts))
        assert found == line[first + 8 * step : first + 8 * (step + 1)]
    assert WeightedSampler(SIZES, (2, 1, 1), 8, seed=4).batch(0) != whole.batch(0)


def test_splits_of_their_own(roots, tmp_path):
    few, many = roots
    places = set_places(config([few, f"{many}:a", f"{many}:b:c", f"{few}:d:"]).data)
    assert [(p.train_split, p.val_split) for p in places] == [
        ("train2017", "val2017"),
        ("a", "val2017"),
        ("b", "c"),
        ("d", ""),
    ]
    assert [p.name for p in places] == ["few", "many", "many-2", "few-2"]
    odd = tmp_path / "a,b"
    odd.mkdir()
    assert [p.root for p in set_places(config([odd]).data)] == [str(odd)]


def test_one_root_is_the_plain_data_set(roots):
    alone = training_set(config(roots[:1]), 32)
    assert type(alone).__name__ == "CocoPanoptic"
    batches = make_batches(alone, config(roots[:1], "train.batch_size=2"))
    from ldmseg_fast.data.sampler import EpochSampler

    assert batches.order(3) == EpochSampler(4, 2).batch(3)
    batches.close()


@pytest.mark.parametrize("weights", ["", "3,1"])
def test_batches_of_both(roots, weights):
    settings = config(roots, "train.batch_size=8", *([f"data.weights={weights}"] if weights else []))
    joined = training_set(settings, 32)
    assert len(joined) == 16
    batches = make_batches(joined, settings)
    names = Counter(image_id.split("/")[0] for _ in range(10) for image_id in next(batches)["image_id"])
    assert names == Counter(few=20, many=60) if not weights else names["few"] > 45
    assert joined.paths(5) == joined.sets[1].paths(1)
    batches.close()


def test_a_split_that_two_roots_share_is_validated_once(roots):
    settings = config([f"{roots[0]}:train2017:val2017", f"{roots[0]}:val2017:val2017", f"{roots[1]}:train2017:"])
    assert list(validation_sets(settings, 32)) == ["few"]


def test_categories_are_joined_by_name():
    first = [{"id": 1, "name": "cow", "isthing": 1}, {"id": 2, "name": "sky", "isthing": 0}]
    second = [{"id": 1, "name": "sky", "isthing": 0}, {"id": 2, "name": "car", "isthing": 1}]
    table = CategoryTable.of_data_sets([(first, "a.json"), (second, "b.json")])
    assert [(c.id, c.name) for c in table.categories] == [(1, "cow"), (2, "sky"), (3, "car")]
    assert table.numbers_of(second, "b.json") == {1: 2, 2: 3}
    assert CategoryTable.of_data_sets([(first, "a.json")]) == CategoryTable.of_data_set(first, "a.json")
    second[0]["isthing"] = 1
    with pytest.raises(DataError, match=r"b\.json: category 'sky' is a thing here and stuff in a\.json"):
        CategoryTable.of_data_sets([(first, "a.json"), (second, "b.json")])


class _Stage:
    categories = None

    def __init__(self, settings):
        self.config = settings
        self.mask_vae = type("Vae", (), {"config": settings.mask_vae})


def test_sets_with_other_categories(roots, tmp_path):
    def rename(content):
        content["categories"][0]["name"] = "something else"

    other = edited(roots[1], tmp_path / "renamed", rename)
    count = len(json.loads((roots[0] / "annotations" / "panoptic_train2017.json").read_text())["categories"])
    for number, wrong in ((count + 1, False), (count, True)):
        settings = config([roots[0], other], f"mask_vae.num_categories={number}")
        sets = training_set(settings, 32).sets
        if wrong:
            with pytest.raises(
                ConfigError, match=f"together have {count + 1} categories; set mask_vae.num_categories="
            ):
                use_categories(_Stage(settings), sets, [], None)
            continue
        stage = _Stage(settings)
        use_categories(stage, sets, [], None)
        assert len(stage.categories) == count + 1 and all("category_ids" in each[0] for each in sets)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.weights=0,0"], r"data\.weights=0,0 sum to 0"),
        (["data.weights=1,2,3"], r"3 for 2 of data\.root"),
        (["data.weights=1,-1"], r"data\.weights=-1.0: from 0 to"),
        (["data.weights=1,nan"], r"data\.weights=nan"),
    ],
)
def test_weights_that_cannot_be(roots, settings, message):
    with pytest.raises(ConfigError, match=message):
        training_set(config(roots, *settings), 32)


def test_lists_that_cannot_be(roots, tmp_path):
    with pytest.raises(ConfigError, match="an entry of the list is empty"):
        set_places(config([roots[0], ""]).data)
    with pytest.raises(ConfigError, match="no training split after the colon"):
        set_places(config([f"{roots[0]}:"]).data)
    with pytest.raises(ConfigError, match="no set to validate on"):
        set_places(config([f"{roots[0]}:train2017:"]).data)
    with pytest.raises(DataError, match=r"panoptic_nothing\.json does not exist; splits found"):
        training_set(config([roots[0], f"{roots[1]}:nothing"]), 32)
    with pytest.raises(DataError, match=r"data root .*missing"):
        training_set(config([roots[0], tmp_path / "missing"]), 32)
    empty = edited(roots[1], tmp_path / "empty", lambda content: content["annotations"].clear())
    with pytest.raises(DataError, match=r"empty.annotations.panoptic_train2017\.json"):
        training_set(config([roots[0], empty]), 32)
