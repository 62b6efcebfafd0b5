"""Renews every generated table from the result files, and writes an offline page with plots.

    python benchmarks/report.py              the documents below, REPORT.md and, beside it, REPORT.html
    python benchmarks/report.py --html FILE  the page elsewhere
    python benchmarks/report.py --check      writes nothing; exit code 1 where a file is not current, or a result file
                                             holds nothing that is

In README.md, docs/results.md and docs/kernels.md a table stands between `<!-- results:NAME -->` and `<!-- end -->`;
NAME is a suite or `headline`, six rows of several suites. REPORT.md has all suites. The page is one file that asks
nothing of the network; it needs matplotlib and is not kept in git.
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
from benchmarks.measuring.result_file import BenchmarkError
from benchmarks.reporting.gpu_targets import HEADER, table_rows
from benchmarks.reporting.headline import headline
from benchmarks.reporting.rows import RESULTS, load_rows, superseded_files
from benchmarks.reporting.scaling_tables import scaling_section
from benchmarks.reporting.tables import machine, sources, suite_table, table
from ldmseg_fast.distributed.ending import run_command

__all__ = ["load_rows", "main", "render", "report"]
PAGE = ROOT / "benchmarks" / "REPORT.html"
WITH_MARKERS = ("README.md", "docs/results.md", "docs/kernels.md")
MARKERS = re.compile(r"(<!-- results:(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
SUITES = {
    "latency": "One picture, whole and stage by stage",
    "throughput": "Images a second from files to files",
    "training": "Training",
    "data": "Input pipeline",
    "evaluation": "Panoptic quality and post-processing on the CPU",
    "export": "Export and ONNX Runtime",
    "quantised": "Quantised graphs: time, size and PQ",
    "quality": "Quality of trained models",
    "instructions": "What kernels are compiled to",
    "soak": "Long tests",
}
INTRODUCTION = """# What was measured

`python benchmarks/report.py` makes this file from those in `benchmarks/results`; edit neither by hand. Times are
medians of interleaved runs. A ratio is taken against the baseline of the same run. Only what no newer run replaces is
shown ([the rule](README.md#which-rows-are-shown)). `python benchmarks/compare.py BEFORE AFTER` compares two result
files. Without a GPU only ratios mean anything.
"""


def render(text: str, folder: Path = RESULTS) -> str:
    """Returns `text` with every table between markers made anew.

    Raises:
        BenchmarkError: a marker names no suite, or `headline` a row that is not there.
    """

    def fill(match: re.Match[str]) -> str:
        name = match[2]
        if name != "headline" and name not in SUITES:
            raise BenchmarkError(f"<!-- results:{name} -->: no such suite; use headline or {', '.join(SUITES)}")
        made = headline(folder) if name == "headline" else suite_table(name, folder)
        return f"{match[1]}\n{made}\n{match[3]}" if made else match[1] + match[3]

    return MARKERS.sub(fill, text)


def report(folder: Path = RESULTS) -> str:
    """Returns the text of REPORT.md."""
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
    """Returns the targets beside what the newest run of `gpu_suite.py` measured."""
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
    whole = ROOT / "benchmarks" / "REPORT.md"
    old = {path: path.read_text(encoding="utf-8") for name in WITH_MARKERS if (path := ROOT / name).is_file()}
    new = {path: render(text) for path, text in old.items()} | {whole: report()}
    old[whole] = whole.read_text(encoding="utf-8") if whole.is_file() else ""
    stale = [path for path in new if old[path] != new[path]]
    superseded = superseded_files()
    for path in superseded:
        print(f"{path.name}: a quick run, or replaced whole by newer ones; git rm it", file=sys.stderr)
    if args.check:
        for path in stale:
            print(f"{path.relative_to(ROOT)}: not current; run python benchmarks/report.py", file=sys.stderr)
        return int(bool(stale or superseded))
    for path in stale:
        path.write_text(new[path], encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        print(f"{args.html.name}: not written, the plots need matplotlib: pip install -e '.[train]'", file=sys.stderr)
        return 0
    from benchmarks.reporting.page import write_page

    write_page(args.html)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
