"""Documents tell the truth: links lead somewhere, command lines parse, settings and options exist."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from ldmseg_fast import train
from ldmseg_fast.cli import build_parser
from ldmseg_fast.config import Config
from ldmseg_fast.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")]
)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
GROUPS = {item.name for item in fields(Config)}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def fences(path: Path, *languages: str) -> list[str]:
    """Gathers the code blocks of these languages ("" is a block without one)."""
    return [code for language, code in FENCE.findall(path.read_text(encoding="utf-8")) if language in languages]


def anchors(path: Path) -> set[str]:
    """Gathers what `#...` may name in a Markdown file, as GitHub and mkdocs make it of a heading."""
    plain = FENCE.sub("", path.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ +(.+)$", plain, re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


def command_lines() -> Iterator[tuple[str, list[str]]]:
    """Yields the words of each command in the shell blocks, with the document that has it."""
    for path in DOCUMENTS:
        for block in fences(path, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith(("#", "if ", "RESUME=", "export MASTER=", "OUT=")):
                    continue
                with contextlib.suppress(ValueError):
                    words = shlex.split(line.partition(" > ")[0], comments=True)
                    if words:
                        yield name_of(path), [word for word in words if not word.startswith("$")]


COMMANDS = list(command_lines())


def check_command(words: list[str]) -> None:
    """Raises where a command line of ours could not be run: an unknown command, option, setting, script or target."""
    scripts = [place for place, word in enumerate(words) if word.endswith("ldmseg_fast/train.py")]
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= set(targets), f"targets of the Makefile: {targets}"
    elif scripts:
        train.parse(words[scripts[0] + 1 :])
    elif words[0] == "ldmseg":
        build_parser().parse_args(words[1:])
    elif "ldmseg_fast.cli" in words:
        build_parser().parse_args(words[words.index("ldmseg_fast.cli") + 1 :])
    elif words[0] == "python" and words[1].startswith("export/"):
        importlib.import_module(f"ldmseg_fast.export.{Path(words[1]).stem}").parse(words[2:])
    elif words[0] == "python" and words[1] != "-m":
        check_options(ROOT / words[1], words[2:])
    elif words[:2] == ["python", "-m"] and words[2].startswith("ldmseg_fast.kernels."):
        check_options(ROOT / "kernels" / f"{words[2].rpartition('.')[2]}.py", words[3:])


def check_options(script: Path, words: list[str]) -> None:
    source = script.read_text(encoding="utf-8")
    for option in (word for word in words if word.startswith("--")):
        assert f'"{option}"' in source, f"{script.name} has no {option}"


def test_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert len(text.encode()) <= 9000


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path):
    for link in LINK.findall(FENCE.sub("", path.read_text(encoding="utf-8"))):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.is_file(), f"{link}: no such file"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


def test_there_are_command_lines():
    assert len(COMMANDS) > 60


@pytest.mark.parametrize(
    ("document", "words"), COMMANDS, ids=[f"{name}: {' '.join(words)}" for name, words in COMMANDS]
)
def test_command_lines_parse(document, words):
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            check_command(words)
    except (SystemExit, ConfigError) as error:
        pytest.fail(f"{document}: {' '.join(words)}\n{said.getvalue()}{error}")


def test_a_wrong_command_line_is_seen():
    for wrong in (
        ["ldmseg", "predict", "tiny", "picture.jpg", "--out", "results", "--nonsense"],
        ["ldmseg", "nonsense"],
        ["python", "export/to_onnx.py", "tiny"],
        ["python", "ldmseg_fast/train.py", "diffusion", "train.step=5"],
    ):
        with pytest.raises((SystemExit, ConfigError)), contextlib.redirect_stderr(io.StringIO()):
            check_command(wrong)
    for wrong in (["make", "nonsense"], ["python", "benchmarks/report.py", "--nonsense"]):
        with pytest.raises(AssertionError):
            check_command(wrong)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_settings_exist(path):
    """Of `group.name=value` in all code, and of `group.name` alone in backticks, where the group is one of ours."""
    text = path.read_text(encoding="utf-8")
    inline, blocks = INLINE.findall(FENCE.sub("", text)), fences(path, "bash", "")
    named = [key for code in (*inline, *blocks) for key in re.findall(r"(?<![\w./:=-])([a-z_]+)\.([a-z_]+)=", code)]
    named += [tuple(code.split(".")) for code in inline if re.fullmatch(r"[a-z_]+\.(?!py$)[a-z_]+", code)]
    for group, name in named:
        if group in GROUPS:
            settings = getattr(Config(), group)
            known = {item.name for item in fields(settings)} if is_dataclass(settings) else set()
            assert name in known, f"{group}.{name}: no such setting"


def test_options_in_the_text_exist():
    folders = ("ldmseg_fast/commands", "export", "benchmarks", "kernels")
    files = [ROOT / "ldmseg_fast" / "train.py", *(file for folder in folders for file in (ROOT / folder).glob("*.py"))]
    known = set(re.findall(r'"(--[\w-]+)"', "\n".join(file.read_text(encoding="utf-8") for file in files)))
    launchers = {"--node_rank", "--nproc_per_node"}
    others = {"--check", "--help"}  # of ruff format; of every command
    for path in DOCUMENTS:
        for code in INLINE.findall(FENCE.sub("", path.read_text(encoding="utf-8"))):
            unknown = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code)) - known - launchers - others
            assert not unknown, f"{name_of(path)}: no command has {', '.join(sorted(unknown))}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_python_blocks_are_python(path):
    for code in fences(path, "python"):
        tree = ast.parse(code)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ldmseg_fast"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


def test_every_page_is_on_the_site():
    listed = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert pages <= listed
