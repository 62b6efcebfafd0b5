"""What grows with the number of images: little beside the JSON files, and nothing beside the pixels."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ldmseg_fast.metrics.annotation_index import index_annotations
from ldmseg_fast.native import _C
from ldmseg_fast.panoptic.format import write_panoptic_png

pytestmark = pytest.mark.skipif(_C is None, reason="the extension is not built")

IMAGES, SEGMENTS = 4000, 20
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A JSON whose images all have the same map, beside that map."""
    folder = tmp_path_factory.mktemp("many")
    (folder / "x").mkdir()
    write_panoptic_png(folder / "x" / "same.png", np.repeat(np.arange(1, SEGMENTS + 1), 6)[None].repeat(50, 0))
    segments = [{"id": k, "category_id": k % 3, "iscrowd": 0, "area": 300} for k in range(1, SEGMENTS + 1)]
    content = {
        "images": [{"id": k, "file_name": f"{k}.jpg", "height": 50, "width": 120} for k in range(IMAGES)],
        "annotations": [{"image_id": k, "file_name": "same.png", "segments_info": segments} for k in range(IMAGES)],
        "categories": [{"id": k, "name": f"c{k}", "isthing": 1} for k in range(3)],
    }
    (folder / "x.json").write_text(json.dumps(content))
    return folder / "x.json"


def test_an_index_is_small_beside_its_file(many, harness):
    assert len(index_annotations(many).image_ids) == IMAGES
    used = harness.peak_memory(lambda: index_annotations(many))
    if used is None:
        pytest.skip("this system does not tell peak memory")
    assert many.stat().st_size > 5e6
    assert used < 2e6  # parsed whole it takes about 25 MB


MEASURE = """
import sys
from benchmarks.harness import peak_memory
from ldmseg_fast.metrics.pq_files import evaluate_files

def run():
    assert evaluate_files(sys.argv[1], sys.argv[1], num_threads=int(sys.argv[2]), replicates=10)["All"]["pq"] == 1.0

run()
print(peak_memory(run))
"""


@pytest.mark.parametrize("threads", [1, 3])
def test_an_evaluation_keeps_tens_of_bytes_a_segment(many, threads):
    """In a process of its own, as `ldmseg pq` has it: what other code has made malloc's habits would count here."""
    command = [sys.executable, "-c", MEASURE, str(many), str(threads)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    if done.stdout.strip() == "None":
        pytest.skip("this system does not tell peak memory")
    assert int(done.stdout) < 160 * IMAGES * SEGMENTS
