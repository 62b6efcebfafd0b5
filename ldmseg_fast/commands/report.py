"""`ldmseg report RUN_DIR` writes curves and pictures of one training run as an HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLES = ("ldmseg report runs/one_step",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--out", type=Path, help="default RUN_DIR/report.html")


def run(args: argparse.Namespace) -> int:
    from ldmseg_fast.outputs import check_outputs, report_stream
    from ldmseg_fast.reports.run_page import write_run_report

    run, out = args.run_dir, args.out or args.run_dir / "report.html"
    read = [path for path in run.rglob("*") if path.is_file() and path.suffix.lower() not in (".html", ".htm")]
    check_outputs({"--out": out}, inputs=read)
    print(f"report: {write_run_report(run, out)}", file=report_stream([out]))
    return 0
