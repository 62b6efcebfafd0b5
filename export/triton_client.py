"""Asks a Triton server for panoptic maps, by HTTP or gRPC, of one picture or of many.

python client.py PICTURE... [--grpc] [--url HOST:PORT] [--out FOLDER] [--seed N] [--together]

It needs `pip install 'tritonclient[all]' pillow`, and nothing of ldmseg_fast.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

MODEL = "ldmseg"
OUTPUTS = ("segmentation", "segments_info")
AT_A_TIME = 16  # requests under way; the server makes batches of them

Found = tuple[np.ndarray, list[dict]]  # a map, int32 [H, W] with a segment's id at each pixel, and its segments


class Client:
    """Sends pictures to a server, from one thread.

    Args:
        url: "host:port" of its HTTP or gRPC port.
        grpc: which of the two it is.
        timeout: seconds to wait for an answer.
    """

    def __init__(self, url: str, grpc: bool = False, timeout: float = 300.0) -> None:
        self.module = importlib.import_module("tritonclient.grpc" if grpc else "tritonclient.http")
        options: dict[str, Any] = {} if grpc else {"concurrency": AT_A_TIME, "network_timeout": timeout}
        self.server = self.module.InferenceServerClient(url, **options)
        self.grpc, self.timeout = grpc, timeout

    def segment(self, contents: Sequence[bytes], seed: int = 0) -> list[Found]:
        """Segments pictures of one size in one request.

        Args:
            contents: of the pictures' files.
            seed: of their noise.

        Returns:
            Of each its map, int32 [H, W] with a segment's id at each pixel, and its segments.

        Raises:
            tritonclient.utils.InferenceServerException: the server refuses a picture, or fails.
        """
        return self._start(contents, seed)()

    def segment_many(self, contents: Iterable[bytes], seed: int = 0) -> Iterator[Found]:
        """Segments pictures of any sizes, a request for each and several at a time.

        Yields in their order what `segment` returns of each: its map, int32 [H, W], and its segments.
        """
        under_way: deque[Callable[[], list[Found]]] = deque()
        for content in contents:
            under_way.append(self._start([content], seed))
            if len(under_way) == AT_A_TIME:
                yield under_way.popleft()()[0]
        while under_way:
            yield under_way.popleft()()[0]

    def _start(self, contents: Sequence[bytes], seed: int) -> Callable[[], list[Found]]:
        """Sends a request, and returns what waits for its answer."""
        values = {
            "image": ("BYTES", np.array([[content] for content in contents], object)),
            "seed": ("INT64", np.full((len(contents), 1), seed, np.int64)),
        }
        inputs = []
        for name, (kind, array) in values.items():
            tensor = self.module.InferInput(name, list(array.shape), kind)
            tensor.set_data_from_numpy(array)
            inputs.append(tensor)
        outputs = [self.module.InferRequestedOutput(name) for name in OUTPUTS]
        if self.grpc:
            future: Future = Future()

            def done(result: Any, error: Exception | None) -> None:
                future.set_result(result) if error is None else future.set_exception(error)

            self.server.async_infer(MODEL, inputs, done, outputs=outputs, client_timeout=self.timeout)
            wait = future.result
        else:
            wait = self.server.async_infer(MODEL, inputs, outputs=outputs).get_result
        return lambda: _found(wait())


def _found(answer: Any) -> list[Found]:
    maps, infos = (answer.as_numpy(name) for name in OUTPUTS)
    return [(each, json.loads(info)) for each, info in zip(maps, infos[:, 0])]


def main(argv: list[str] | None = None) -> int:
    """Segments the pictures of a command line; 0 done, 1 refused by the server, 2 wrong input."""
    parser = argparse.ArgumentParser(prog="client.py", description="Ask a Triton server for panoptic maps.")
    parser.add_argument("pictures", nargs="+", type=Path)
    parser.add_argument("--grpc", action="store_true", help="use gRPC, not HTTP")
    parser.add_argument("--url", help="default 127.0.0.1:8000, with --grpc 127.0.0.1:8001")
    parser.add_argument("--out", type=Path, help="folder for the maps, as PNGs of 16 bits called NAME_map.png")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--together", action="store_true", help="one request for all; they have one size")
    args = parser.parse_args(argv)
    names = [f"{path.stem}_map.png" for path in args.pictures]
    if args.out is not None and len(set(names)) < len(names):
        parser.error("two pictures of one name, whose maps would be one file; ask for them one after the other")
    client = Client(args.url or ("127.0.0.1:8001" if args.grpc else "127.0.0.1:8000"), args.grpc)
    refused = importlib.import_module("tritonclient.utils").InferenceServerException
    contents = (path.read_bytes() for path in args.pictures)
    try:
        found = client.segment(list(contents), args.seed) if args.together else client.segment_many(contents, args.seed)
        for path, name, (segmentation, segments) in zip(args.pictures, names, found):
            print(f"{path}: {segmentation.shape[1]}x{segmentation.shape[0]}, {len(segments)} segments")
            if args.out is not None:
                args.out.mkdir(parents=True, exist_ok=True)
                Image.fromarray(segmentation.astype(np.uint16)).save(args.out / name)
    except (refused, OSError) as error:
        print(f"client.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
