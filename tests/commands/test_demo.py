"""`make demo` with next to no training: the whole path under DeepSpeed, and a second run that finds nothing to do."""

import json
import re

from ldmseg_fast import cli


def test_the_whole_path_and_its_report(tmp_path, capsys):
    arguments = ["--out", str(tmp_path), "--scenes", "16", "--images", "4", "--ranks", "2"]
    arguments += ["--autoencoder-steps", "2", "--diffusion-steps", "2"]
    assert cli.main(["demo", *arguments]) == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5  # the shipped model's, and curves and pictures of both trainings
    assert "one segment" in page and "halves" in page and "grid 3x3" in page
    assert not re.search(r"(?:src|href)=\"http", page)
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert report["images"] == 4
    assert json.loads((tmp_path / "shipped.json").read_text())["class_agnostic"]["pq"] > 20
    assert len(list((tmp_path / "pictures").glob("*_overlay.png"))) == 8

    capsys.readouterr()
    assert cli.main(["demo", *arguments]) == 0
    assert capsys.readouterr().out.count("done before") == 5  # every part of it
