"""Makes the checkout importable for a script of this folder; without it `sys.path[0]`, the folder itself, would hide
other packages. Ctrl-C during its imports is one line."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from ldmseg_fast.stopping import tell_interrupts  # noqa: E402

tell_interrupts()
