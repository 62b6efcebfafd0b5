"""Holds what visitors send and get in one folder, and sees to it that nothing of it stays."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from ldmseg_fast.errors import ArgumentError
from ldmseg_fast.temporary import clear_leftovers, temporary_folder

AGE = 3600.0  # seconds after which a visitor's files are deleted
SWEEP = 60.0  # seconds between two looks at them


@contextlib.contextmanager
def visitors_folder() -> Iterator[Path]:
    """Makes the folder of all that visitors send and get, for this process and before gradio is imported.

    It is deleted at the end. What a process that was killed left behind is deleted by the next one.
    """
    root = Path(tempfile.gettempdir()) / f"ldmseg-app-{os.getuid() if hasattr(os, 'getuid') else 0}"
    root.mkdir(mode=0o700, exist_ok=True)
    if root.is_symlink() or (hasattr(os, "getuid") and root.stat().st_uid != os.getuid()):
        raise ArgumentError(f"{root}: belongs to another user; set TMPDIR to a folder of your own")
    clear_leftovers(root)
    before = tempfile.tempdir
    with temporary_folder(root) as folder:
        os.environ |= {
            "GRADIO_TEMP_DIR": str(folder),
            "GRADIO_ANALYTICS_ENABLED": "False",
            "GRADIO_ANALYTICS_MAX_EVENTS": "100",  # over all of them its queue makes a table after each request
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        tempfile.tempdir = str(folder)  # uploads are written there while they arrive
        try:
            yield folder
        finally:
            tempfile.tempdir = before


class Sweeper:
    """Deletes what visitors have left in the folder, by age; what is there when it starts (examples) stays."""

    def __init__(self, folder: Path, age: float = AGE, every: float = SWEEP) -> None:
        self.folder, self.age, self.every = folder, age, every
        self.kept = {path for path in folder.rglob("*") if path.is_file()}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def sweep(self) -> int:
        """Deletes files older than `age` and folders that are empty, and returns how many files."""
        deleted, limit = 0, time.time() - self.age
        for path in sorted(self.folder.rglob("*"), reverse=True):  # files before their folders
            with contextlib.suppress(OSError):
                if path.lstat().st_mtime > limit or path in self.kept:
                    continue
                if path.is_dir() and not path.is_symlink():
                    path.rmdir()
                else:
                    path.unlink()
                    deleted += 1
        return deleted

    def __enter__(self) -> Sweeper:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(self.every):
            self.sweep()
