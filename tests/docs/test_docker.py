"""The Dockerfiles keep what they promise, and their context holds what the package is built of, and no more."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_image_runs_as_a_user_and_says_whether_it_answers(path):
    final = path.read_text(encoding="utf-8").rpartition("\nFROM ")[2]
    user, made = re.search(r"^USER (\d+)$", final, re.MULTILINE), re.search(r"useradd .*--uid (\d+)", final)
    assert user and made and user[1] == made[1] != "0"
    port = re.search(r"^EXPOSE (\d+)$", final, re.MULTILINE)[1]
    assert re.search(rf"HEALTHCHECK [^\n]*\\\n +CMD .*http://127\.0\.0\.1:{port}/health", final)
    assert f'"--port", "{port}"' in final
    assert "COPY . " not in final, "only what is installed gets into the image"


def test_the_context_is_what_the_package_is_made_of():
    rules = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = {rule[1:] for rule in rules if rule.startswith("!")}
    assert "*" in rules and all((ROOT / name).exists() for name in kept)
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    folders = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PACKAGE_DIR"
    )
    needed = {
        *folders.values(),
        "csrc",
        "setup.py",
        "pyproject.toml",
        "constraints.txt",
        "README.md",
        "LICENSE",
        "NOTICE",
    }
    assert kept == needed
