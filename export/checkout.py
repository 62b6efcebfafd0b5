"""Makes the checkout importable for a script of this folder; without it `sys.path[0]`, the folder itself, would hide
other packages."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
