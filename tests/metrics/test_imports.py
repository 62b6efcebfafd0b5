"""What measuring PQ needs: numpy and the extension, and nothing that takes a second to import."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ldmseg_fast.panoptic.format import write_panoptic_png
from ldmseg_fast.panoptic.shapes import segment_shapes

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = {"numpy", "ldmseg_fast", "cython_runtime"}  # the last is of numpy.random
# modules of other packages, but for those that the interpreter itself loads at its start
CODE = """
import sys
before = set(sys.modules)
{body}
loaded = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(*sorted(loaded - set(sys.stdlib_module_names)), file=sys.stderr)
"""


def loaded(body: str, *arguments: object) -> set[str]:
    command = [sys.executable, "-c", CODE.format(body=body), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {name for name in done.stderr.split() if not name.startswith("_cython_")}


def test_the_package_of_metrics_needs_numpy_alone():
    assert loaded("import ldmseg_fast.metrics") <= ALLOWED
    assert loaded("from ldmseg_fast.metrics import PanopticQuality, compare, evaluate_files") <= ALLOWED


def test_every_name_is_there():
    from ldmseg_fast import metrics

    for name in metrics.__all__:
        assert getattr(metrics, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Pq'"):
        metrics.Pq  # noqa: B018


@pytest.fixture
def files(tmp_path):
    """The same segments as PNG and JSON, and as RLE."""
    ids = np.repeat(np.arange(1, 5), 8)[None].repeat(20, 0).astype(np.int32)
    (tmp_path / "gt").mkdir()
    write_panoptic_png(tmp_path / "gt" / "1.png", ids)
    segments = [{"id": k, "category_id": 1, "iscrowd": 0, "area": 160} for k in range(1, 5)]
    shared = {
        "images": [{"id": 1, "file_name": "1.jpg", "height": 20, "width": 32}],
        "categories": [{"id": 1, "name": "x", "isthing": 1}],
    }
    entry = {"image_id": 1, "file_name": "1.png", "segments_info": segments}
    (tmp_path / "gt.json").write_text(json.dumps(shared | {"annotations": [entry]}))
    masks = [
        {"id": shape["id"], "image_id": 1, "category_id": 1, "segmentation": shape["segmentation"]}
        for shape in segment_shapes(ids, rle=True)
    ]
    (tmp_path / "rle.json").write_text(json.dumps(shared | {"annotations": masks}))
    return tmp_path


@pytest.mark.parametrize("pred", ["gt.json", "rle.json"])
def test_a_run_of_pq_needs_numpy_alone(files, pred):
    body = (
        "from ldmseg_fast.cli import main\n"
        "assert main(['pq', *sys.argv[1:], '--boundary', '--json', '/dev/null', '--per-image', '/dev/null']) == 0"
    )
    assert loaded(body, files / "gt.json", files / pred, "--against", files / "rle.json") <= ALLOWED


def test_it_starts_quickly():
    """CPU seconds above a bare `import numpy`, whatever else the machine does."""

    def seconds(imports: str) -> float:
        code = f"import time\n{imports}\nprint(time.process_time())"
        command = [sys.executable, "-c", code]
        return float(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)

    body = "from ldmseg_fast.cli import build_parser\nimport ldmseg_fast.metrics.pq_files\nbuild_parser()"
    above = min(seconds(body) for _ in range(5)) - min(seconds("import numpy") for _ in range(5))
    assert above < 0.25
