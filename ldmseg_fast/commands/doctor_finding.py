"""Holds the lines of `ldmseg doctor`."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """Holds one line of the table. `cure` says what to do where `ok` is false."""

    subject: str
    ok: bool
    value: str
    cure: str = ""


def version_of(distribution: str) -> str | None:
    """Returns the version of an installed distribution; None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def format_table(findings: list[Finding]) -> str:
    """Formats one line a finding, with the cure below each that is not ok."""
    width = max(len(finding.subject) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{'ok ' if finding.ok else '-- '} {finding.subject:<{width}}  {finding.value}")
        if not finding.ok:
            lines.append(f"    {'':<{width}}  -> {finding.cure}")
    return "\n".join(lines)
