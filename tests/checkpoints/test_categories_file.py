"""`categories.json` of a model folder."""

import json
import shutil

import pytest

from ldmseg_fast.backends.model_info import read_model_info
from ldmseg_fast.checkpoints.categories_file import load_categories, save_categories
from ldmseg_fast.checkpoints.model_folder import copy_model
from ldmseg_fast.config import MaskVAEConfig
from ldmseg_fast.config.categories import Category, CategoryTable
from ldmseg_fast.errors import CheckpointError

TABLE = CategoryTable((Category(7, "tree", True, (0, 255, 3)), Category(0, "sky", False, (9, 9, 9))))
TWO = MaskVAEConfig(num_categories=2)


def test_what_is_written_is_read(tmp_path):
    save_categories(tmp_path, TABLE)
    assert load_categories(tmp_path, TWO) == TABLE
    assert load_categories(tmp_path, MaskVAEConfig()) is None
    save_categories(tmp_path, None)
    assert not list(tmp_path.iterdir())


def edited(**change):
    return [TABLE.to_coco()[0] | change, TABLE.to_coco()[1]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "missing"),
        ({"id": 1}, "a list of categories"),
        ([TABLE.to_coco()[0], 3], "entry 1: an object"),
        (edited(id="7"), "entry 0: `id`"),
        (edited(id=2**31), "entry 0: `id`"),
        (edited(id=True), "entry 0: `id`"),
        (edited(id=0), "the id 0 appears twice"),
        (edited(name=""), "entry 0: `name`"),
        (edited(name="\ud800"), "entry 0: `name`"),
        (edited(name="sky"), "the name 'sky' appears twice"),
        (edited(isthing=None), "entry 0: `isthing`"),
        (edited(isthing=2), "entry 0: `isthing`"),
        (edited(color=[1, 2]), "entry 0: `color`"),
        (edited(color=[1, 2, 256]), "entry 0: `color`"),
        (TABLE.to_coco()[:1], "1 categories, and mask_vae.num_categories=2"),
    ],
)
def test_damaged_files_are_one_error(tmp_path, content, message):
    if content is not None:
        (tmp_path / "categories.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as raised:
        load_categories(tmp_path, TWO)
    assert message in str(raised.value) and "categories.json" in str(raised.value)


def test_table_is_part_of_the_model(category_model, tmp_path):
    copy_model(category_model, tmp_path / "copy")
    info = read_model_info(tmp_path / "copy")
    assert info.categories == read_model_info(category_model).categories
    assert info.categories is not None and len(info.categories) == 19
    broken = tmp_path / "broken"
    shutil.copytree(category_model, broken)
    (broken / "categories.json").unlink()
    with pytest.raises(CheckpointError, match="categories"):
        read_model_info(broken)
