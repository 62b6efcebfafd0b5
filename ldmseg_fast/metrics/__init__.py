"""Measures panoptic quality, mIoU and inpainting, and segments without a model for comparison.

Names are loaded on first use; `import ldmseg_fast.metrics` needs numpy and the extension alone.
"""

import importlib
from typing import Any

_HOMES = {
    "PanopticQuality": "pq",
    "bootstrap_interval": "resampling",
    "compare": "resampling",
    "evaluate_files": "pq_files",
    "match_segments": "matching",
    "MeanIoU": "miou",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"ldmseg_fast.metrics.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'ldmseg_fast.metrics' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
