"""Puts the targets on an H200 beside what a run of `gpu_suite.py` measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = Mapping[str, Any]
FAST = "coco-fast"
PEERS = ("torch", "diffusers", "plain", "xformers", "sdpa", "flash")  # variants that are not ours start like this


@dataclass(frozen=True)
class Target:
    """Describes one line of the table.

    name, case: which rows; the name is a prefix, the case a subset.
    preset: of the model, "coco" for all but "coco-fast".
    fp8: rows of `precision="fp8"`, or all others; None: of both.
    limit_ms: wanted milliseconds an image; rate: wanted images/s. ratio: wanted over the baseline.
    copy_share: wanted share of the measured copy bandwidth.
    """

    label: str
    name: str
    case: Mapping[str, Any] = field(default_factory=dict)
    limit_ms: float | None = None
    ratio: float | None = None
    copy_share: float | None = None
    divide_by_batch: bool = False
    preset: str = "coco"
    fp8: bool | None = None

    def is_about(self, row: Row) -> bool:
        """Whether a row, measured or red, is one of those."""
        case = row["case"]
        preset = FAST if FAST in case.get("model", "") else "coco"
        kind = self.fp8 in (None, row["variant"].endswith(", fp8"))
        return (
            row["name"].startswith(self.name) and self.case.items() <= case.items() and preset == self.preset and kind
        )


BF16 = {"dtype": "bfloat16"}
TARGETS = (
    Target("bit planes, encode", "mask_bits encode", {"batch": 16}, ratio=15, copy_share=0.85, divide_by_batch=True),
    Target("panoptic head, 480x640", "panoptic_head [16, 128", BF16, 0.03, 50, divide_by_batch=True),
    Target("attention 4096 x 40, forward", "attention forward [4, 4096, 8, 40]", BF16, 0.06, divide_by_batch=True),
    Target("GroupNorm + SiLU", "group_norm_silu forward [16, 320", {}, ratio=3, copy_share=0.8, divide_by_batch=True),
    Target("UNet step, batch 1", "one step", {"batch": 1}, 2.5, fp8=False),
    Target("UNet step, batch 16", "one step", {"batch": 16}, 1.75, fp8=False),
    Target("UNet step in fp8, batch 1", "one step", {"batch": 1}, 1.8, fp8=True),
    Target("UNet step in fp8, batch 16", "one step", {"batch": 16}, 1.1, fp8=True),
    Target("whole image, 50 steps", "whole image", {"steps": 50, "batch": 1}, 110, 5),
    Target("whole image, 4 steps", "whole image", {"steps": 4, "batch": 1}, 14, 5),
    Target("whole image, 1 step", "whole image", {"steps": 1, "batch": 1}, 7, 5),
    Target("coco-fast, whole image, batch 1", "whole image", {"steps": 1, "batch": 1}, 1.75, preset=FAST),
    Target("coco-fast, whole image, batch 16", "whole image", {"steps": 1, "batch": 16}, 1.667, preset=FAST),  # 600/s
    Target("training, per image", "training step", {}, 10.0, 2.3),
)


def best_row(target: Target, rows: Sequence[Row]) -> Row | None:
    """Returns the fastest of our rows that `target` is about."""
    ours = [
        row
        for row in rows
        if "p50" in row
        and target.is_about(row)
        and (row["variant"] != row["baseline"] and not row["variant"].startswith(PEERS[1:]))
        and row["variant"] not in ("torch", "torch.compile")
    ]
    return min(ours, key=lambda row: row["p50"], default=None)


def _why_not(target: Target, rows: Sequence[Row]) -> str:
    """Returns the reason of a red row that `target` is about; "not measured" without one."""
    reasons = [row["red"] for row in rows if "red" in row and target.is_about(row)]
    return f"red: {reasons[0]}" if reasons else "not measured"


def table_rows(rows: Sequence[Row]) -> list[list[str]]:
    """Returns label, target, measured, ratio to the baseline, share of the floor, and whether it is met, per target."""
    copy = next((row["value"] for row in rows if row["name"] == "copy bandwidth"), None)
    lines = []
    for target in TARGETS:
        wanted = [f"<= {target.limit_ms:g} ms"] if target.limit_ms else []
        wanted += [f">= {target.copy_share:.0%} of copy"] if target.copy_share else []
        wanted += [f">= {target.ratio:g}x"] if target.ratio else []
        row = best_row(target, rows)
        if row is None:
            lines.append([target.label, ", ".join(wanted), _why_not(target, rows), "", "", ""])
            continue
        milliseconds = row["p50"] / (row["case"].get("batch", 1) if target.divide_by_batch else 1)
        share = row["bytes"] / row["p50"] / 1e6 / copy if copy and row.get("bytes") else None
        met = (
            (target.limit_ms is None or milliseconds <= target.limit_ms)
            and (target.ratio is None or (row["ratio"] or 0) >= target.ratio)
            and (target.copy_share is None or (share or 0) >= target.copy_share)
        )
        measured = f"{milliseconds:.4g} ms ({row['variant']})" + (f", {share:.0%} of copy" if share else "")
        ratio = f"{row['ratio']:.2f}x" if row["ratio"] else ""
        floor = f"{row['floor_share']:.0%}" if row.get("floor_share") else ""
        lines.append([target.label, ", ".join(wanted), measured, ratio, floor, "yes" if met else "no"])
    return lines


HEADER = ["what", "target on an H200", "measured", "to the baseline", "of the floor", "met"]


def format_table(rows: Sequence[Row]) -> str:
    """Returns `table_rows` in columns, for a terminal."""
    lines = [HEADER, *table_rows(rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)
