"""Builds one HTML page that needs no other file: headings, tables, pictures, details."""

from __future__ import annotations

import base64
import html
from dataclasses import dataclass, field
from pathlib import Path

from ldmseg_fast.files import replacing

STYLE = """
:root { color-scheme: light dark; --dim: #666; }
@media (prefers-color-scheme: dark) { :root { --dim: #9a9a9a; } }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 62rem; margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.4rem; }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem; text-align: right; border-bottom: 1px solid #8884; } th:first-child, td:first-child
{ text-align: left; } tr.strong td { font-weight: 650; }
img { max-width: 100%; height: auto; border-radius: 4px; } figure { margin: 1rem 0; }
h1, h3, td:first-child { overflow-wrap: anywhere; }
figcaption, .note { color: var(--dim); font-size: .9rem; } pre { overflow-x: auto; font-size: .8rem; }
@media (max-width: 46rem) { body { margin: 1rem auto; } h1 { font-size: 1.35rem; } th, td { padding: .3rem .4rem; } }
"""


@dataclass
class Page:
    """Collects the parts of the page in order."""

    title: str
    parts: list[str] = field(default_factory=list)
    style: str = ""  # CSS after the common one

    def heading(self, text: str) -> None:
        """Adds a heading."""
        self.parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str, kind: str = "") -> None:
        """Adds a paragraph; `kind` is its CSS class."""
        self.parts.append(f'<p class="{kind}">{html.escape(text)}</p>')

    def table(self, header: list[str], rows: list[list[str]], strong: int | None = None) -> None:
        """Adds a table; the row `strong` is set in bold."""
        lines = ["<table><tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in header) + "</tr>"]
        for number, row in enumerate(rows):
            lines.append(f'<tr class="{"strong" if number == strong else ""}">')
            lines.append("".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>")
        self.parts.append("".join(lines) + "</table>")

    def picture(self, png: bytes, caption: str) -> None:
        """Adds a picture with its caption."""
        data = base64.b64encode(png).decode()
        text = html.escape(caption)
        self.parts.append(
            f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'
        )

    def markup(self, text: str) -> None:
        """Adds HTML as it is."""
        self.parts.append(text)

    def details(self, summary: str, text: str) -> None:
        """Adds text that opens on a click on `summary`."""
        self.parts.append(f"<details><summary>{html.escape(summary)}</summary><pre>{html.escape(text)}</pre></details>")

    def write(self, path: Path) -> None:
        """Writes the whole page atomically and makes its folder."""
        title = html.escape(self.title)
        head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
        body = f"<h1>{title}</h1>" + "\n".join(self.parts)
        head += f"<style>{STYLE}{self.style}</style>"
        page = f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
