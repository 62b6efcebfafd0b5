"""Tells whether torch could not be imported, as where a variable of the environment has a value that it refuses."""

from __future__ import annotations

import os


def why_no_torch(error: BaseException) -> str | None:
    """Returns in a line why torch cannot be imported, with the variables that it quotes or may have read; else None."""
    trace = error.__traceback__ if isinstance(error, Exception) else None
    while trace is not None:
        frame = trace.tb_frame
        if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") == "torch":
            said = " ".join(str(error).split())[:300]
            read = {name: value for name, value in sorted(os.environ.items()) if name.startswith(_READ)}
            quoted = {name: value for name, value in read.items() if value and value in said}
            found = ", ".join(f"{name}={value}"[:200] for name, value in (quoted or read).items())
            cure = f"check {found} in the environment" if found else "install torch anew"
            return f"error: torch cannot be imported ({type(error).__name__}: {said}); {cure}"
        trace = trace.tb_next
    return None


_READ = ("TORCH", "PYTORCH")
