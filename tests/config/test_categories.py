"""What the numbers of a model stand for, and which data sets fit it."""

import pytest

from ldmseg_fast.config import MaskVAEConfig
from ldmseg_fast.config.categories import CategoryTable
from ldmseg_fast.errors import DataError

CAT = {"id": 17, "name": "cat", "isthing": 1, "color": [1, 2, 3]}
SKY = {"id": 5, "name": "sky", "isthing": 0}
DOG = {"id": 18, "name": "dog", "isthing": 1}


@pytest.fixture
def table():
    return CategoryTable.of_data_set([CAT, SKY, DOG], "a.json")


def test_table_of_a_data_set(table):
    assert [category.id for category in table.categories] == [17, 5, 18]
    assert table[1].color == (1, 2, 3) and table[2].name == "sky" and not table[2].isthing
    assert len({category.color for category in table.categories}) == 3
    assert CategoryTable.of_data_set(table.to_coco(), "again") == table
    for number in (0, 4, -1):
        with pytest.raises(IndexError):
            table[number]


def test_another_order_other_ids_and_a_subset_fit(table):
    assert table.numbers_of([DOG, CAT, SKY], "b.json") == {18: 3, 17: 1, 5: 2}
    assert table.numbers_of([SKY | {"id": 0}], "b.json") == {0: 2}
    assert table.numbers_of([], "b.json") == {}


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ([CAT, {"id": 3, "name": "horse", "isthing": 1}], "b.json: the model has no category 'horse'; it has 'cat'"),
        ([CAT | {"isthing": 0}], "category 'cat' is a stuff here and thing in the model"),
        ([{"id": 5, "name": "sky"}], "category 'sky' has no isthing"),
        ([SKY, CAT | {"name": "sky"}], "categories 5 and 17 are both called 'sky'"),
        ([{"id": 9, "isthing": 1}], "no category 'category 9'"),
    ],
)
def test_other_categories_are_refused_by_name(table, categories, message):
    with pytest.raises(DataError) as raised:
        table.numbers_of(categories, "b.json")
    assert message in str(raised.value)


def test_what_makes_no_table():
    with pytest.raises(DataError, match="0 categories"):
        CategoryTable.of_data_set([], "a.json")
    many = [{"id": number, "isthing": 1} for number in range(4096)]
    assert len(CategoryTable.of_data_set(many[:4095], "a.json")) == 4095
    with pytest.raises(DataError, match="4096 categories"):
        CategoryTable.of_data_set(many, "a.json")
    with pytest.raises(DataError, match="no isthing"):
        CategoryTable.of_data_set([{"id": 1, "name": "sky"}], "a.json")


@pytest.mark.parametrize(
    ("categories", "bits"), [(0, 0), (1, 1), (2, 2), (3, 2), (4, 3), (133, 8), (255, 8), (256, 9), (4095, 12)]
)
def test_planes_name_every_category_and_void(categories, bits):
    assert MaskVAEConfig(num_categories=categories).category_bits == bits
