"""Starts `ldmseg app` as a process of its own, and talks to its HTTP API as curl does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.measuring.environment import ROOT

START = 180.0  # seconds that a server may take to start
END = 30.0  # seconds that it may take to end


class ServerProcess:
    """Holds a running server.

    Attributes:
        url: where it listens.
        process: of the server; its model has another one.
        lines: of standard output and error so far.
    """

    def __init__(self, *options: str, environment: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "ldmseg_fast.cli", "app", "--port", "0", *options]
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **(environment or {})}
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = self._wait_for_url()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ends the server by a signal, and returns its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            code = self.process.wait(END)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        self._reader.join(END)
        return code

    def memory(self) -> int:
        """Returns the resident bytes of the server and its model's process."""
        pages = 0
        for pid in (self.process.pid, *self.children()):
            try:
                pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            except (FileNotFoundError, ProcessLookupError, IndexError):
                continue
        return pages * os.sysconf("SC_PAGE_SIZE")

    def children(self) -> list[int]:
        """Lists the processes that the server has started."""
        path = Path(f"/proc/{self.process.pid}/task")
        found: list[int] = []
        for task in path.iterdir() if path.is_dir() else ():
            try:
                found += map(int, (task / "children").read_text().split())
            except (FileNotFoundError, ProcessLookupError):
                continue
        return sorted(found)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def _wait_for_url(self) -> str:
        end = time.monotonic() + START
        while time.monotonic() < end and self.process.poll() is None:
            for line in self.lines:
                if " at http" in line:
                    return line.split(" at ", 1)[1].split()[0]
            time.sleep(0.05)
        self.process.kill()
        self.process.wait()
        self._reader.join(END)
        raise RuntimeError("the app did not start:\n" + "\n".join(self.lines))


@contextmanager
def serving(*options: str, environment: dict[str, str] | None = None) -> Iterator[ServerProcess]:
    """Runs a server inside a `with` block; it has always ended afterwards."""
    server = ServerProcess(*options, environment=environment)
    try:
        yield server
    finally:
        server.stop()


class AppError(Exception):
    """Reports what the API answered in the place of a result."""


class Visitor:
    """Uses the HTTP API over one connection.

    Args:
        url: of the server.
        auth: (user, password).
        timeout: seconds that an answer may take.
    """

    def __init__(self, url: str, auth: tuple[str, str] | None = None, timeout: float = 120.0) -> None:
        import httpx

        self.client = httpx.Client(base_url=url, auth=auth, timeout=timeout)

    def __enter__(self) -> Visitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def upload(self, path: Path | str, content: bytes | None = None) -> dict[str, Any]:
        """Uploads a file, and returns it as the functions take it."""
        content = Path(path).read_bytes() if content is None else content
        answer = self.client.post("/gradio_api/upload", files={"files": (Path(path).name, content)})
        if answer.status_code != 200:
            raise AppError(f"{answer.status_code}: {answer.text}")
        return {"path": answer.json()[0], "meta": {"_type": "gradio.FileData"}}

    def start(self, name: str, *data: Any) -> str:
        """Calls a function of the API, and returns the request's id.

        Raises:
            AppError: it was turned away.
        """
        answer = self.client.post(f"/gradio_api/call/{name}", json={"data": list(data)})
        if answer.status_code != 200:
            raise AppError(f"{answer.status_code}: {answer.text}")
        return answer.json()["event_id"]

    def result(self, name: str, event: str) -> list[Any]:
        """Waits for a request's result.

        Raises:
            AppError: what the app says in its place.
        """
        kind = ""
        with self.client.stream("GET", f"/gradio_api/call/{name}/{event}") as answer:
            for line in answer.iter_lines():
                if line.startswith("event: "):
                    kind = line.removeprefix("event: ")
                elif line.startswith("data: ") and kind in ("complete", "error"):
                    value = json.loads(line.removeprefix("data: "))
                    if kind == "complete":
                        return value
                    raise AppError(value.get("error", "") if isinstance(value, dict) else str(value))
        raise AppError("the connection closed without a result")

    def call(self, name: str, *data: Any) -> list[Any]:
        """Calls a function and waits for its result."""
        return self.result(name, self.start(name, *data))
