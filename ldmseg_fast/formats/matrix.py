"""Makes the table of formats in docs/formats.md from `kinds`; `python -m ldmseg_fast.formats.matrix` renews it."""

from __future__ import annotations

from pathlib import Path

from ldmseg_fast.files import replacing
from ldmseg_fast.formats.kinds import ALL, KINDS, Kind

PAGE = Path(__file__).resolve().parents[2] / "docs" / "formats.md"
START, END = "<!-- kinds: python -m ldmseg_fast.formats.matrix -->", "<!-- end -->"


def table() -> str:
    """Returns the table of kinds as Markdown: import, export, what comes back of it, and what it is written for."""
    rows = [
        "| kind | what it is | import | export | round trip | written for |",
        "|---|---|---|---|---|---|",
    ]
    rows += [
        f"| `{name}` | {kind.title} | {'yes' if kind.reads else ''} | {'yes' if kind.writes else ''} | "
        f"{round_trip(name, kind)} | {kind.used_by} |"
        for name, kind in KINDS.items()
    ]
    return "\n".join(rows)


def round_trip(name: str, kind: Kind) -> str:
    """Says what of a map is there again after an export and an import."""
    if not kind.writes:
        return ""
    if not kind.back:
        held = lost(kind)
        return f"no import; the files hold every pixel{f', no {held}' if held else ''}"
    if kind.back != name:
        return f"categories of every pixel, by `{kind.back}`"
    return f"every pixel{f', no {lost(kind)}' if lost(kind) else ', crowds and scores'}"


def lost(kind: Kind) -> str:
    """Lists what the files do not hold."""
    return " or ".join(each for each in ALL if each not in kind.keeps)


def renewed(text: str) -> str:
    """Returns the page with the table of now between its markers.

    Raises:
        ValueError: the page has no markers.
    """
    before, rest = text.split(START + "\n", 1)
    _, after = rest.split(END, 1)
    return f"{before}{START}\n\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    content = renewed(PAGE.read_text(encoding="utf-8"))
    with replacing(PAGE) as temporary:
        temporary.write_text(content, encoding="utf-8")
