"""The README's tables, benchmarks/REPORT.md and an offline page with plots, all from the result files.

    python benchmarks/report.py              renews the README's tables, REPORT.md and, beside it, REPORT.html
    python benchmarks/report.py --html FILE  the page elsewhere
    python benchmarks/report.py --check      writes nothing; exit code 1 where README or REPORT.md is not current

The page is one file that asks nothing of the network. It needs matplotlib, and is made of the same files as REPORT.md,
so it is not kept in git.

In the README each table stands between `<!-- results:SUITE -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from pathlib import Path

if __package__ in (None, ""):
    import checkout  # noqa: F401  (run as a script)

from benchmarks.measuring.environment import ROOT
from benchmarks.reporting.gpu_targets import HEADER, table_rows
from benchmarks.reporting.tables import RESULTS, load_rows, machine, sources, suite_table, table
from benchmarks.scaling import scaling_section
from ldmseg_fast.distributed.ending import run_command

__all__ = ["load_rows", "main", "render", "report"]
PAGE = ROOT / "benchmarks" / "REPORT.html"
MARKERS = re.compile(r"(<!-- results:(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
SUITES = {
    "latency": "One picture, whole and stage by stage",
    "throughput": "Images a second from files to files",
    "training": "Training",
    "data": "Input pipeline",
    "evaluation": "Panoptic quality and post-processing on the CPU",
    "export": "Export and ONNX Runtime",
    "quality": "Quality of trained models",
    "soak": "Long tests",
}
INTRODUCTION = """# What was measured

Made by `python benchmarks/report.py` from the files in `benchmarks/results`; edit neither by hand. Times are medians of
interleaved runs; a ratio is taken against the baseline of the same run. Two result files are compared by
`python benchmarks/compare.py BEFORE AFTER`. Without a GPU only ratios mean anything.
"""


def render(text: str, folder: Path = RESULTS) -> str:
    """`text` with every table between markers made anew."""

    def fill(match: re.Match[str]) -> str:
        made = suite_table(match[2], folder)
        return f"{match[1]}\n{made}\n{match[3]}" if made else match[1] + match[3]

    return MARKERS.sub(fill, text)


def report(folder: Path = RESULTS) -> str:
    """REPORT.md."""
    parts = [INTRODUCTION, "## Targets on a GPU\n", gpu_section(folder)]
    for suite, title in SUITES.items():
        parts.append(f"## {title}\n")
        rows = load_rows(suite, folder)
        if not rows:
            parts.append(f"Not measured yet: `python benchmarks/{'' if suite == 'soak' else 'bench_'}{suite}.py`.\n")
            continue
        parts.append(suite_table(suite, folder))
        parts.append("\n".join(f"- {line}" for line in sources(rows)) + "\n")
    parts += ["## Scaling, on paper\n", scaling_section(folder)]
    return "\n".join(parts)


def gpu_section(folder: Path) -> str:
    """The targets beside what the newest run of `gpu_suite.py` measured."""
    rows = load_rows("gpu", folder)
    made = table(HEADER, table_rows(rows))
    if not rows:
        return f"{made}\nNo GPU has been measured yet: `python benchmarks/gpu_suite.py --minutes 9`.\n"
    return f"{made}\nMeasured on {machine(rows)}.\n\n" + "\n".join(f"- {line}" for line in sources(rows)) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a file is not current")
    parser.add_argument("--html", type=Path, metavar="FILE", default=PAGE, help="where the page with plots goes")
    args = parser.parse_args(argv)
    readme, whole = ROOT / "README.md", ROOT / "benchmarks" / "REPORT.md"
    old = {path: path.read_text(encoding="utf-8") if path.is_file() else "" for path in (readme, whole)}
    new = {readme: render(old[readme]), whole: report()}
    stale = [path for path in old if old[path] != new[path]]
    if args.check:
        for path in stale:
            print(f"{path.relative_to(ROOT)}: not current; run python benchmarks/report.py", file=sys.stderr)
        return int(bool(stale))
    for path in stale:
        path.write_text(new[path], encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        print(f"{args.html.name}: not written, the plots need matplotlib: pip install -e '.[demo]'", file=sys.stderr)
        return 0
    from benchmarks.reporting.page import write_page

    write_page(args.html)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
