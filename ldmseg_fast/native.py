"""The C++ helpers, or `None` where they are not built."""

try:
    from ldmseg_fast import _C  # type: ignore[attr-defined]
except ImportError:
    _C = None

__all__ = ["_C"]
