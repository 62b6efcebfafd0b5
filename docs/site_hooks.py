"""Puts what docs/ links to in the rest of the repository into the site, below `repository/`.

So one link, `../benchmarks/REPORT.md`, works where the Markdown lies and on the site, and a dead one fails the build.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(\]\()((?:\.\./)*[^)#:\s]+)(#[^)\s]*)?(\))")
PLACE = "repository/"


def targets(path: Path) -> set[Path]:
    """Finds the files outside docs/ that a Markdown file of the repository links to."""
    found = {(path.parent / link[2]).resolve() for link in LINK.finditer(path.read_text(encoding="utf-8"))}
    return {target for target in found if target.is_file() and ROOT in target.parents and not _in_docs(target)}


def on_files(files: Files, config: Any) -> Files:
    """Adds every file that docs/ links to, and what these files link to in turn."""
    waiting = {target for file in files.documentation_pages() for target in targets(ROOT / "docs" / file.src_uri)}
    waiting.add(ROOT / "CONTRIBUTING.md")
    done: set[Path] = set()
    while waiting:
        path = waiting.pop()
        done.add(path)
        files.append(File.generated(config, PLACE + path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
        if path.suffix == ".md":
            waiting |= targets(path) - done
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Points links between docs/ and the rest of the repository at their places on the site."""
    inside = page.file.src_uri.removeprefix(PLACE)
    folder = (ROOT / inside if page.file.src_uri.startswith(PLACE) else ROOT / "docs" / inside).parent
    depth = page.file.src_uri.count("/")

    def turn(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        if not target.is_file() or ROOT not in target.parents:
            return link[0]  # mkdocs says what is wrong with it
        relative = target.relative_to(ROOT).as_posix()
        place = relative.removeprefix("docs/") if _in_docs(target) else PLACE + relative
        return f"{link[1]}{'../' * depth}{place}{link[3] or ''}{link[4]}"

    return LINK.sub(turn, markdown)


def _in_docs(path: Path) -> bool:
    return ROOT / "docs" in path.parents
