"""Latent diffusion for panoptic segmentation, optimised for speed."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LDMSegPipeline", "__version__"]

# `kernels/` and `export/` lie inside this package once installed, and beside it in a checkout.
_CHECKOUT = Path(__file__).resolve().parents[1]
if (_CHECKOUT / "csrc").is_dir():
    __path__.append(str(_CHECKOUT))

if TYPE_CHECKING:
    from ldmseg_fast.pipeline import LDMSegPipeline


def __getattr__(name: str) -> Any:
    """Imports `LDMSegPipeline` on first use, so that importing the package does not import the models."""
    if name == "LDMSegPipeline":
        from ldmseg_fast.pipeline import LDMSegPipeline

        return LDMSegPipeline
    raise AttributeError(f"module 'ldmseg_fast' has no attribute {name!r}")
