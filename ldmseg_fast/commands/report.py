"""`ldmseg report RUN_DIR` writes curves and pictures of one training run as an HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--out", type=Path, help="default RUN_DIR/report.html")


def run(args: argparse.Namespace) -> int:
    from ldmseg_fast.reports.run_page import write_run_report

    print(f"report: {write_run_report(args.run_dir, args.out or args.run_dir / 'report.html')}")
    return 0
