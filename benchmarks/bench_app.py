"""Measures `ldmseg app` under load: several clients use its HTTP API on 127.0.0.1 against a server of its own.

python benchmarks/bench_app.py [--clients 8] [--requests 200] [--out FOLDER] [--note TEXT] [--quick]

Each request uploads a picture of a generated scene, segments it and waits for the result, as curl would. Nothing is
recorded where a request is lost, a map differs from the one that the first request for this picture gave, or the
memory of server and model grows by more than GROWTH between the tenth part of the requests and the last.
"""

from __future__ import annotations

import argparse
import io
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    import checkout  # noqa: F401  (run as a script)

from PIL import Image

from benchmarks.harness import RESULTS, Run
from benchmarks.measuring.app_server import AppError, ServerProcess, Visitor, serving
from benchmarks.measuring.options import parse_options
from benchmarks.measuring.timing import Timing
from ldmseg_fast.data.scenes import generate_scene
from ldmseg_fast.distributed.ending import run_command

GROWTH = 0.05  # of the memory, as a part
PICTURES = 8  # different ones
SIDE = 64


@dataclass
class Load:
    """Holds what the clients met.

    Attributes:
        seconds: of each request, from its upload to its result.
        lost: what was said in the place of results.
        memory: (requests done, bytes) of server and model.
        segments: of each picture; a set of more than one means that results differ.
    """

    seconds: list[float] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    memory: list[tuple[int, int]] = field(default_factory=list)
    segments: dict[int, set[str]] = field(default_factory=dict)

    def growth(self) -> float:
        """Returns the growth of memory from the first tenth of the requests to the last, as a part."""
        count = self.memory[-1][0]
        early = max(size for done, size in self.memory if done <= max(self.memory[0][0], count // 10))
        late = max(size for done, size in self.memory if done >= count - count // 10)
        return late / early - 1


def scene_files(count: int = PICTURES) -> list[bytes]:
    """Draws pictures of scenes and encodes each as PNG."""
    files = []
    for index in range(count):
        buffer = io.BytesIO()
        Image.fromarray(generate_scene(SIDE, 0, index, "val2017", version=1)[0]).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return files


def put_load(server: ServerProcess, clients: int, requests: int) -> Load:
    """Lets `clients` threads make `requests` requests between them, and returns what they met."""
    load, pictures = Load(), scene_files()
    numbers, lock = iter(range(requests)), threading.Lock()

    def visit() -> None:
        with Visitor(server.url) as visitor:
            while (number := _next(numbers, lock)) is not None:
                place = number % len(pictures)
                start = time.perf_counter()
                try:
                    file = visitor.upload(f"scene-{place}.png", pictures[place])
                    found: Any = visitor.call("segment", file, {})[0]
                except (AppError, OSError, ValueError) as error:
                    with lock:
                        load.lost.append(repr(error))
                    continue
                with lock:
                    load.seconds.append(time.perf_counter() - start)
                    load.segments.setdefault(place, set()).add(repr(found["segments_info"]))
                    load.memory.append((len(load.seconds), server.memory()))

    with Visitor(server.url) as first:  # the first request of a process is slow: not what is measured
        first.call("segment", first.upload("first.png", pictures[0]), {})
    threads = [threading.Thread(target=visit) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return load


def _next(numbers: Any, lock: threading.Lock) -> int | None:
    with lock:
        return next(numbers, None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, help="default 200, with --quick 40")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--note", default="", help="said beside the numbers, such as what else the machine did")
    parser.add_argument("--quick", action="store_true", help="few requests")
    args = parse_options(parser)
    requests = args.requests or (40 if args.quick else 200)
    record = Run("app", quick=args.quick, folder=args.out)
    with serving() as server:
        start = time.perf_counter()
        load = put_load(server, args.clients, requests)
        seconds = time.perf_counter() - start
    record.check(
        f"{requests} requests of {args.clients} clients, none lost", not load.lost and len(load.seconds) == requests
    )
    record.check("the same picture gives the same segments", all(len(each) == 1 for each in load.segments.values()))
    record.check(f"memory grows by at most {GROWTH:.0%}", load.growth() <= GROWTH)
    case = {"clients": args.clients, "requests": requests, "pixels": f"{SIDE}x{SIDE}", "model": "tiny"}
    if args.note:
        case["note"] = args.note
    record.add("a request of the app's API", {"http": Timing(tuple(1000.0 * each for each in load.seconds))}, case=case)
    record.add_value("requests of the app's API", len(load.seconds) / seconds, "requests/s", case=case)
    record.add_value("memory of the app's server and model", max(size for _, size in load.memory), "bytes", case=case)
    record.add_value("growth of the app's memory under load", 100.0 * load.growth(), "%", case=case)
    record.save(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
