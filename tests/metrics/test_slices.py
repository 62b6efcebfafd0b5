"""`ldmseg pq --by`: PQ by a property of the images, from the ground truth or from a table."""

import re

import pytest

from ldmseg_fast.cli import main
from ldmseg_fast.metrics.pq_files import evaluate_files


def _pq(*arguments):
    return main(["pq", *map(str, arguments)])


def test_slices_and_tables(files, tmp_path, capsys):
    out = tmp_path / "images.csv"
    assert _pq(files / "gt.json", files / "pred_list.json", "--by", "weather", "--per-image", out) == 0
    told = capsys.readouterr().out
    assert re.search(r"rain +\| +\d", told) and re.search(r"sun +\| +\d", told)
    header, *lines = out.read_text().splitlines()
    assert header == "image_id,pq,tp,fp,fn,iou,weather"
    assert len(lines) == 8 and lines[2].endswith(",sun") and lines[0].startswith("1,0.")
    result = evaluate_files(files / "gt.json", files / "pred.json", by="weather", replicates=0)
    sizes = {row["value"]: row["images"] for row in result["slices"]["rows"]}
    assert sizes == {"rain": 6, "sun": 2}
    sun = [image for image in result["per_image"] if image["weather"] == "sun"]
    assert sum(image["tp"] for image in sun) < sum(image["tp"] for image in result["per_image"])
    table = tmp_path / "table.csv"
    table.write_text("file_name,speed\n000001.jpg,10\n000002.jpg,9\n")
    assert _pq(files / "gt.json", files / "pred.json", "--by", "speed", "--table", table) == 0
    told = capsys.readouterr().out
    assert re.findall(r"^(9|10|\(none\)) *\|", told, re.MULTILINE) == ["9", "10", "(none)"]


@pytest.mark.parametrize("spelled", ["{}.0", " {} ", "{:012d}", "+{}", "{}.00"])
def test_ids_of_a_table_as_spreadsheets_write_them(files, tmp_path, capsys, spelled):
    table = tmp_path / "table.csv"
    table.write_text("image_id,speed\n" + "".join(f"{spelled.format(n)},{n % 2}\n" for n in range(1, 9)))
    result = evaluate_files(files / "gt.json", files / "pred.json", by="speed", table=table, replicates=0)
    assert [(row["value"], row["images"]) for row in result["slices"]["rows"]] == [("0", 4), ("1", 4)]
    assert not capsys.readouterr().err


def test_lines_that_name_no_image_are_told_where_images_have_no_line(files, tmp_path, capsys):
    table = tmp_path / "table.csv"
    table.write_text("image_id,speed\n1.5,1\n2,1\n3,0\n")
    assert _pq(files / "gt.json", files / "pred.json", "--by", "speed", "--table", table) == 0
    told = capsys.readouterr().err
    assert "image_id '1.5' of 1 lines is none of the ground truth's, and 6 of its images have no line" in told
    table.write_text("image_id,speed\n" + "".join(f"{n},{n % 2}\n" for n in range(30)))  # of a larger set
    assert _pq(files / "gt.json", files / "pred.json", "--by", "speed", "--table", table) == 0
    assert not capsys.readouterr().err
    table.write_text("image_id,speed\n1,\n1,3\n")
    assert _pq(files / "gt.json", files / "pred.json", "--by", "speed", "--table", table) == 2
    assert "line 3: image 1 is there twice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image_id,x\n1,2\n", "needs a column weather, has image_id, x"),
        ("name,weather\n1,2\n", "needs one of the columns image_id, id, file_name"),
        ("image_id,weather\n1,2\n1,3\n", "line 3: image 1 is there twice"),
        ("image_id,weather\n100,2\n", "gives it to none of the 8 images"),
        ("", "has no header"),
    ],
)
def test_bad_tables(files, tmp_path, capsys, content, message):
    table = tmp_path / "table.csv"
    table.write_text(content)
    assert _pq(files / "gt.json", files / "pred.json", "--by", "weather", "--table", table) == 2
    error = capsys.readouterr().err
    assert message in error and str(table) in error
