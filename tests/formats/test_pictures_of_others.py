"""A picture that is missing is not replaced by one that belongs to others."""

from __future__ import annotations

import json

import pytest

from ldmseg_fast.cli import main
from tests.formats import test_labelme as labelme
from tests.formats.test_coco_instances import HEIGHT, SQUARE, WIDTH, content
from tests.formats.test_cvat import XML


def images(*names: str) -> list[dict]:
    return [{"id": n, "file_name": name, "height": HEIGHT, "width": WIDTH} for n, name in enumerate(names, 1)]


def write(path, *names):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content({"segmentation": [SQUARE]}, images=images(*names))))


def fault(capsys, kind, root, out):
    assert main(["data", "import", kind, str(root), str(out)]) == 2
    assert not (out / "annotations").exists()
    return capsys.readouterr().err


def test_a_picture_of_another_split(tmp_path, picture_at, capsys):
    root = tmp_path / "roboflow"
    picture_at(root / "train/b.png")
    picture_at(root / "valid/a.png")
    write(root / "train/_annotations.coco.json", "a.png", "b.png")
    write(root / "valid/_annotations.coco.json", "a.png")
    assert str(root / "train/a.png") in fault(capsys, "roboflow", root, tmp_path / "out")


def test_a_picture_of_another_camera(tmp_path, picture_at, capsys):
    root = tmp_path / "coco"
    write(root / "annotations/instances_val.json", "left/1.png", "right/1.png")
    picture_at(root / "images/right/1.png")
    assert "left/1.png" in fault(capsys, "coco-instances", root, tmp_path / "out")
    picture_at(root / "images/right/1.png").rename(root / "images/1.png")
    assert "left/1.png and right/1.png would both be images/1.png" in fault(
        capsys, "coco-instances", root, tmp_path / "other"
    )


def test_a_picture_of_another_task_of_cvat(tmp_path, picture_at, capsys):
    for task in ("one", "two"):
        (tmp_path / "cvat" / task).mkdir(parents=True)
        text = XML.replace("{shapes}", "").replace("{subset}", f' subset="{task}"').replace("deep/a.png", "a.png")
        (tmp_path / "cvat" / task / "annotations.xml").write_text(text)
    picture_at(tmp_path / "cvat/two/images/a.png")
    assert str(tmp_path / "cvat/one/images/a.png") in fault(capsys, "cvat", tmp_path / "cvat", tmp_path / "out")


def test_two_tasks_of_a_project_with_one_name(tmp_path, picture_at, capsys):
    image = '<image id="{0}" name="a.png" task_id="{0}" width="32" height="24"/>'
    picture_at(tmp_path / "cvat/images/a.png")
    text = f"<annotations>{image.format(1)}{image.format(2)}</annotations>"
    (tmp_path / "cvat/annotations.xml").write_text(text)
    error = fault(capsys, "cvat", tmp_path / "cvat", tmp_path / "out")
    assert "a.png of task 1 and a.png of task 2 would both be images/a.png" in error


def test_a_picture_beside_another_json_of_labelme(tmp_path, picture_at, capsys):
    root = tmp_path / "labelme"
    picture_at(root / "val/a.png")
    (root / "train").mkdir()
    for split in ("train", "val"):
        (root / split / "a.json").write_text(json.dumps(labelme.content(labelme.shape(), imagePath="a.png")))
    assert "train/a.json: its picture a.png is not there" in fault(capsys, "labelme", root, tmp_path / "out")


@pytest.mark.parametrize("same", [True, False])
def test_two_exports_of_one_split(tmp_path, picture_at, capsys, same):
    root = tmp_path / "exports"
    for task in ("one", "two"):
        picture_at(root / task / "images/default/0.png")
        write(
            root / task / "annotations" / f"{'instances' if same or task == 'one' else 'stuff'}_default.json", "0.png"
        )
    assert "both are the split default" in fault(capsys, "coco-instances", root, tmp_path / "out")


def test_two_uploads_of_one_name(tmp_path, picture_at, capsys):
    root = tmp_path / "studio"
    picture_at(root / "images/a.png")
    tasks = [
        {"id": number, "data": {"image": f"/data/upload/1/{number:08x}-a.png"}, "annotations": [{"result": []}]}
        for number in (1, 2)
    ]
    box = {"x": 1, "y": 1, "width": 9, "height": 9, "rectanglelabels": ["dog"]}
    tasks[0]["annotations"][0]["result"].append({"id": "r", "type": "rectanglelabels", "value": box})
    (root / "export.json").write_text(json.dumps(tasks))
    assert "would both be images/a.png" in fault(capsys, "label-studio", root, tmp_path / "out")
    (root / "images/a.png").rename(root / "images/00000001-a.png")
    picture_at(root / "images/00000002-a.png")
    assert main(["data", "import", "label-studio", str(root), str(tmp_path / "out")]) == 0
