"""Latent diffusion for panoptic segmentation, optimised for speed."""

import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LDMSegPipeline", "__version__"]

_CHECKOUT = Path(__file__).resolve().parents[1]


class _CheckoutFinder:
    """Finds `ldmseg_fast.kernels` and `ldmseg_fast.export` beside this package, where they lie in a checkout."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        is_beside = name in ("ldmseg_fast.kernels", "ldmseg_fast.export")
        return PathFinder.find_spec(name, [str(_CHECKOUT)]) if is_beside else None


if (_CHECKOUT / "csrc").is_dir():  # an installed package holds both folders itself
    sys.meta_path.insert(
        0, _CheckoutFinder
    )  # before the finder of an editable install, which may be another checkout's

if TYPE_CHECKING:
    from ldmseg_fast.pipeline import LDMSegPipeline


def __getattr__(name: str) -> Any:
    """Imports `LDMSegPipeline` on first use, so that importing the package does not import the models."""
    if name == "LDMSegPipeline":
        from ldmseg_fast.pipeline import LDMSegPipeline

        return LDMSegPipeline
    raise AttributeError(f"module 'ldmseg_fast' has no attribute {name!r}")
