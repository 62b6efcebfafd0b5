"""What hostile maps cost `pq`: files under 1 MB take less than 200 MB, or are refused by name."""

import json
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterable, Iterator
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest

from ldmseg_fast.native import _C
from ldmseg_fast.panoptic.format import MAX_PIXELS, MAX_SIDE

pytestmark = pytest.mark.skipif(_C is None, reason="the extension is not built")

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 200e6
MEASURE = """
import sys
from benchmarks.harness import peak_memory
from ldmseg_fast.errors import PanopticFormatError
from ldmseg_fast.metrics.pq_files import evaluate_files
from ldmseg_fast.panoptic.format import read_panoptic_png

def run(path):
    try:
        evaluate_files(f"{path}/gt.json", f"{path}/pred.json", num_threads=1, boundary=True, replicates=1)
        return "read"
    except PanopticFormatError as error:
        return f"refused: {error}"

folder, *names = sys.argv[1:]
run(f"{folder}/{names[0]}")
for name in names:
    outcome = []
    used = peak_memory(lambda: outcome.append(run(f"{folder}/{name}")))
    print(used, outcome[0])
print(peak_memory(lambda: read_panoptic_png(f"{folder}/noise/gt/x.png")))
"""


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def write_png(
    path: Path, width: int, height: int, rows: Iterable[bytes], interlace: int = 0, extra: bytes = b""
) -> None:
    stream = zlib.compressobj(4)
    body = b"".join(map(stream.compress, rows)) + stream.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, interlace)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    assert len(content) < 1e6
    path.write_bytes(content)


def columns(ids: np.ndarray, height: int) -> Iterator[bytes]:
    """Filtered rows that are all alike."""
    yield b"\0" + np.ascontiguousarray(ids.astype("<u4")).view(np.uint8).reshape(-1, 4)[:, :3].tobytes()
    yield from repeat(b"\2" + bytes(3 * len(ids)), height - 1)


def rows_of(ids: np.ndarray, width: int) -> Iterator[bytes]:
    """Filtered rows of one id each."""
    for each in ids.tolist():
        yield b"\1" + each.to_bytes(3, "little") + bytes(3 * width - 3)


def write_json(path: Path, ids: np.ndarray) -> None:
    content = {
        "images": [{"id": 1, "file_name": "x.jpg"}],
        "annotations": [
            {
                "image_id": 1,
                "file_name": "x.png",
                "segments_info": [{"id": each, "category_id": 1, "iscrowd": 0} for each in np.unique(ids).tolist()],
            }
        ],
        "categories": [{"id": 1, "name": "object", "isthing": 1}],
    }
    path.write_text(json.dumps(content))
    path.with_suffix("").mkdir()


def make(folder: Path, name: str) -> str:
    """Writes one case; returns what is expected of it."""
    folder.mkdir()
    width, height = {
        "tall": (1, MAX_SIDE),
        "wide": (MAX_SIDE, 1),
        "high": (1024, MAX_SIDE),
        "column": (1, MAX_PIXELS),
        "texts": (64, 64),
    }.get(name, (8192, 8192))
    ids, extra = np.ones(width, np.int64), b""
    if name == "noise":
        ids = np.arange(width) % 251 + 1
    elif name in ("stripes", "unlisted", "plaid"):  # nearly as many runs as are allowed
        ids = np.arange(width) // 17 + 1
    elif name == "texts":
        extra = b"".join(chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**24), 9)) for _ in range(4))
        extra += chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(2**25), 9))
    pred_ids = np.arange(height) + 1 if name == "plaid" else ids
    for kind, listed in (("gt", ids[:17] if name == "unlisted" else ids), ("pred", pred_ids)):
        write_json(folder / f"{kind}.json", listed)
    png = folder / "gt" / "x.png"
    if name == "column":
        write_png(png, width, height, [bytes(2**20)] * 256)
    else:
        write_png(png, width, height, columns(ids, height), int(name == "interlaced"), extra)
    shutil.copy(png, folder / "pred")
    if name == "plaid":  # each stripe of one map crosses each of the other
        write_png(folder / "pred" / "x.png", width, height, rows_of(pred_ids, width))
    return {
        "column": "header claims",
        "noise": "which is noise",
        "unlisted": "ids in the map but not in segments_info",
        "plaid": "pairs of segments overlap",
        "interlaced": "interlaced",
    }.get(name, "read")


CASES = ("tall", "wide", "high", "column", "noise", "stripes", "unlisted", "plaid", "interlaced", "texts")


def test_small_files_take_little_memory(tmp_path: Path) -> None:
    expected = {name: make(tmp_path / name, name) for name in CASES}
    command = [sys.executable, "-c", MEASURE, str(tmp_path), *CASES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *lines, reading = done.stdout.splitlines()
    if lines[0].startswith("None"):
        pytest.skip("this system does not tell peak memory")
    for name, line in zip(CASES, lines, strict=True):
        used, outcome = line.split(" ", 1)
        assert expected[name] in outcome, (name, outcome)
        assert int(used) < LIMIT, (name, used)
    assert int(reading) < 4 * 8192 * 8192 + 20e6  # the ids themselves, and some rows
