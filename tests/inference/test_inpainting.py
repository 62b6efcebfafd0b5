"""Inpainting: what is given stays, ids keep their meaning, slots fit what the model would predict."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ldmseg_fast import LDMSegPipeline
from ldmseg_fast.cli import main
from ldmseg_fast.config import PostprocessConfig
from ldmseg_fast.data.transforms import make_remap_table
from ldmseg_fast.diffusion.inpainting import KnownLatents
from ldmseg_fast.inference import inpainting
from ldmseg_fast.inference.given_maps import Given, complete, follow_draft, prepare
from ldmseg_fast.inference.inpainting import METHODS, KnownPixels
from ldmseg_fast.kernels.mask_bits import decode_mask_bits
from ldmseg_fast.panoptic.format import read_panoptic_png, write_panoptic_png
from ldmseg_fast.panoptic.postprocess import PanopticResult
from ldmseg_fast.panoptic.shapes import segment_shapes

ANYTHING_GOES = PostprocessConfig(mask_threshold=0.0, count_threshold=0, overlap_threshold=0.0)
LARGEST = 2**24 - 1


@pytest.fixture(scope="module")
def pipe(model_dir):
    return LDMSegPipeline.from_pretrained(model_dir)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def quarters(height: int, width: int, ids=(7, 70000, LARGEST, 0)) -> np.ndarray:
    """A map of four rectangles; the last is void."""
    row, column = np.indices((height, width))
    return np.array(ids, np.int32)[2 * (row >= height // 2) + (column >= width // 2)]


def check_consistent(result: PanopticResult) -> None:
    shapes = {shape["id"]: shape for shape in segment_shapes(result.segmentation)}
    assert [segment["id"] for segment in result.segments_info] == sorted(shapes)
    for segment in result.segments_info:
        assert {key: segment[key] for key in ("area", "bbox")} == {
            key: shapes[segment["id"]][key] for key in ("area", "bbox")
        }
        assert 0.0 <= segment["score"] <= 1.0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [(64, 64), (37, 101), (200, 90)])
def test_given_pixels_stay_and_new_ids_are_unused(pipe, method, size):
    given, image = quarters(*size), picture(*size)
    known = np.random.default_rng(1).random(size) < 0.6
    result = pipe.inpaint(image, given, known, 2, thresholds=ANYTHING_GOES, method=method)[0]
    assert result.segmentation.shape == size and result.segmentation.dtype == np.int32
    assert (result.segmentation[known] == given[known]).all()
    check_consistent(result)
    assert {s["id"] for s in result.segments_info if s["given"]} == {7, 70000, LARGEST}
    new = {s["id"] for s in result.segments_info if not s["given"]}
    assert not new & {7, 70000, LARGEST} and not (np.isin(result.segmentation, list(new)) & known).any()


def test_all_given_and_nothing_given(pipe):
    given, image = quarters(64, 64), picture(64, 64)
    everything, nothing = np.ones((64, 64), bool), np.zeros((64, 64), bool)
    same, free = pipe.inpaint([image, image], [given, given], [everything, nothing], 2, thresholds=ANYTHING_GOES)
    assert (same.segmentation == given).all()
    assert not any(segment["given"] for segment in free.segments_info)
    plain = pipe([image], 2, thresholds=ANYTHING_GOES, image_ids=[1])[0]
    assert len(free.segments_info) == len(plain.segments_info)
    pairs = np.unique(np.stack([free.segmentation.ravel(), plain.segmentation.ravel()]), axis=1)
    assert pairs.shape[1] == len(plain.segments_info) + (plain.segmentation == 0).any()  # one id for one id


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "heun"])
@pytest.mark.parametrize("method", METHODS)
def test_results_do_not_depend_on_the_batch(pipe, method, solver):
    images = [picture(40, 50, seed) for seed in range(3)]
    maps = [quarters(40, 50)] * 3
    known = [np.random.default_rng(seed).random((40, 50)) < 0.5 for seed in range(3)]
    settings = {"thresholds": ANYTHING_GOES, "method": method, "solver": solver}
    together = pipe.inpaint(images, maps, known, 3, image_ids=list("abc"), **settings)
    for row, name in enumerate("abc"):
        alone = pipe.inpaint(images[row], maps[row], known[row], 3, image_ids=[name], **settings)[0]
        assert (alone.segmentation == together[row].segmentation).mean() > 0.99  # a batch may round otherwise


@pytest.mark.parametrize("draft_steps", [0, 1, 9])
def test_with_and_without_a_draft(pipe, draft_steps):
    given, known = quarters(64, 64), np.eye(64, dtype=bool)
    result = pipe.inpaint(picture(64, 64), given, known, 2, thresholds=ANYTHING_GOES, draft_steps=draft_steps)[0]
    assert (result.segmentation[known] == given[known]).all()


@pytest.mark.parametrize("trained", [False, True])
def test_models_trained_to_inpaint_get_what_they_were_trained_with(pipe, monkeypatch, trained):
    monkeypatch.setitem(pipe.info.index, "inpainting", trained)
    given, known = quarters(64, 64), np.indices((64, 64))[1] < 32
    seen = []
    original = inpainting.make_constraint
    monkeypatch.setattr(inpainting, "make_constraint", lambda *args: seen.append(original(*args)) or seen[-1])
    pipe.inpaint(picture(64, 64), given, known, 2)
    pipe.inpaint(picture(64, 64), given, known, 2, method="estimate")
    assert isinstance(seen[0], KnownLatents if trained else KnownPixels)
    columns = seen[1].cells[0, 0].any(0)  # 16 cells, 8 of them known
    assert columns.tolist() == [True] * (8 if trained else 7) + [False] * (8 if trained else 9)


def test_eta_and_callback(pipe):
    seen: list[int] = []
    arguments = (picture(64, 64), quarters(64, 64), np.eye(64, dtype=bool), 4)
    one = pipe.inpaint(*arguments, eta=1.0, callback=lambda step, *_: seen.append(step))[0]
    assert seen == [0, 1, 2, 3]
    assert (one.segmentation == pipe.inpaint(*arguments, eta=1.0)[0].segmentation).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segmentations": [quarters(8, 9)]}, r"segmentations?.*\[8, 9\]"),
        ({"segmentations": [quarters(8, 8).astype(np.float32)]}, r"segmentations\[0\].*float32"),
        ({"segmentations": [-quarters(8, 8)]}, r"segmentations\[0\].*-16777215"),
        ({"known_masks": [np.ones((8, 8), np.uint8)]}, r"known_masks\[0\]: uint8"),
        ({"known_masks": []}, "0 known_masks"),
        ({"method": "magic"}, "method='magic'"),
        ({"solver": "magic"}, "solver='magic'"),
    ],
)
def test_wrong_arguments_are_named(pipe, change, message):
    arguments = {"images": [picture(8, 8)], "segmentations": [quarters(8, 8)], "known_masks": [np.ones((8, 8), bool)]}
    with pytest.raises(ValueError, match=message):
        pipe.inpaint(**(arguments | {"num_inference_steps": 1} | change))


@pytest.mark.parametrize("scheme", ["position", "position_cell", "area", "random"])
def test_slots_by_the_scheme(scheme):
    given = quarters(64, 64)
    known = np.ones((64, 64), bool)
    known[:, 60:] = False
    prepared = prepare(given, known, 64, 32, scheme, np.random.default_rng(3))
    numbered = np.where(known, quarters(64, 64, (1, 2, 3, 0)), 0).astype(np.uint8)
    table = make_remap_table(numbered, 3, 32, scheme, np.random.default_rng(3))
    assert (prepared.slots == table[numbered]).all()
    assert prepared.ids == {int(table[1]): 7, int(table[2]): 70000, int(table[3]): LARGEST}


def test_more_segments_than_slots():
    given = np.repeat(np.arange(1, 41, dtype=np.int32), 64 * 64 // 40 + 1)[: 64 * 64].reshape(64, 64)
    given[0, 0] = 500
    with pytest.warns(UserWarning, match="image x: 41 given segments, the model has 31 slots; the 10 smallest"):
        prepared = prepare(given, np.ones((64, 64), bool), 64, 32, "area", np.random.default_rng(0), "image x")
    assert len(prepared.ids) == 31 and 500 not in prepared.ids.values()
    kept = np.isin(given, list(prepared.ids.values()))
    assert (prepared.slots[kept] > 0).all() and (prepared.slots[~kept] == 0).all()


def test_the_draft_names_the_segments():
    """Whatever part is given, each segment gets the slot that the draft has for it."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        numbered = quarters(64, 64, rng.permutation(4) + 1).astype(np.uint8)
        slots = rng.permutation(31)[:5] + 1
        draft = np.array([0, *slots[:4]])[numbered]
        table = follow_draft(np.where(rng.random((64, 64)) < 0.3, numbered, 0), 4, draft, 32)
        assert table[:5].tolist() == [0, *slots[:4]]


def test_what_the_draft_lacks_gets_slots_that_it_does_not_use():
    numbered = quarters(64, 64, (1, 2, 3, 4)).astype(np.uint8)
    table = follow_draft(numbered, 4, np.full((64, 64), 9), 32)  # all in one segment
    assert sorted(table[1:5])[-1] == 9 and len(set(table[1:5])) == 4 and 0 not in table[1:5]
    assert sorted(follow_draft(numbered, 4, numbered + 0, 5)[1:5]) == [1, 2, 3, 4]
    assert sorted(follow_draft(numbered, 4, np.zeros((64, 64), int), 5)[1:5]) == [1, 2, 3, 4]


def predicted(slots: np.ndarray) -> PanopticResult:
    segmentation = np.where(slots > 0, slots + 1, 0).astype(np.int32)
    return PanopticResult(segmentation, [shape | {"score": 0.5} for shape in segment_shapes(segmentation)])


def test_ids_of_the_final_map():
    """Row by row: slot 1 is given as 70; slot 2 lies on the given 80, which has slot 3; slots 4 and 5 are new."""
    given = np.array([[70, 70, 0, 0, 0], [80, 80, 80, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]], np.int32)
    slots = np.array([[4, 4, 1, 1, 1], [2, 2, 2, 2, 2], [4, 4, 4, 4, 4], [5, 0, 0, 0, 0]])
    known = given > 0
    result = complete(predicted(slots), Given(given, known, known, given, {1: 70, 3: 80}), min_area=2)
    # slot 4 covers what is given as 70, so it is 70 too; slot 5 has too few pixels left
    expected = [[70] * 5, [80] * 5, [70] * 5, [0] * 5]
    assert result.segmentation.tolist() == expected
    assert [(s["id"], s["area"], s["given"]) for s in result.segments_info] == [(70, 10, True), (80, 5, True)]

    known[0] = False
    given[0] = 0
    result = complete(predicted(slots), Given(given, known, known, given, {1: 70, 3: 80}), min_area=2)
    assert result.segmentation.tolist() == [[1, 1, 70, 70, 70], [80] * 5, [1] * 5, [0] * 5]
    check_consistent(result)


def test_void_that_is_given_stays_void():
    given, known = np.zeros((4, 4), np.int32), np.zeros((4, 4), bool)
    known[0] = True
    result = complete(predicted(np.ones((4, 4), int)), Given(given, known, known, given, {}), min_area=0)
    assert result.segmentation.tolist() == [[0] * 4] + [[1] * 4] * 3
    assert [(segment["id"], segment["area"]) for segment in result.segments_info] == [(1, 12)]


class BitsAsLatents:
    """An auto-encoder without loss: its latents are the bit planes, its cells single pixels."""

    config = SimpleNamespace(downsampling=1, num_bits=5, num_categories=0, category_bits=0, scaling_factor=1.0)

    def parameters(self):
        return iter([torch.zeros(1)])

    def encode_latents(self, bits):
        return bits

    def decode_latents_both(self, latents):
        return torch.nn.functional.one_hot(decode_mask_bits(latents).long(), 32).permute(0, 3, 1, 2).float(), None


def test_known_pixels_enter_the_estimate():
    slots = torch.randint(0, 32, (2, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    constraint = KnownPixels(BitsAsLatents(), slots)
    estimate = torch.randn(2, 5, 8, 8, generator=torch.Generator().manual_seed(1))
    result = constraint.estimate(estimate)
    given = slots > 0
    assert (decode_mask_bits(result)[given] == slots[given]).all()
    assert torch.equal(result.movedim(1, -1)[~given], estimate.movedim(1, -1)[~given])


@pytest.fixture
def files(tmp_path):
    Image.fromarray(picture(48, 80)).save(tmp_path / "street.png")
    write_panoptic_png(tmp_path / "map.png", quarters(48, 80))
    known = np.zeros((48, 80), np.uint8)
    known[:, :50] = 255
    Image.fromarray(known).save(tmp_path / "known.png")
    return tmp_path


@pytest.mark.parametrize("how", [["--known", "{files}/known.png"], ["--unknown-id", "0"]])
def test_the_command(model_dir, files, how, capsys):
    command = [
        "inpaint",
        "{model}",
        "--image",
        "{files}/street.png",
        "--map",
        "{files}/map.png",
        "--out",
        "{files}/out",
    ]
    command = [part.format(model=model_dir, files=files) for part in [*command, *how, "--steps", "2"]]
    assert main(command) == 0
    assert "% of the map completed" in capsys.readouterr().out
    result, given = read_panoptic_png(files / "out" / "street.png"), quarters(48, 80)
    known = given != 0 if "--unknown-id" in how else np.indices((48, 80))[1] < 50
    assert (result[known] == given[known]).all()
    record = json.loads((files / "out" / "street.json").read_text())
    assert {s["id"] for s in record["segments_info"] if s["given"]} == {7, 70000, LARGEST}
    assert (files / "out" / "street_overlay.png").is_file()


def test_files_of_other_sizes_are_named(model_dir, files, capsys):
    write_panoptic_png(files / "small.png", quarters(20, 20))
    command = ["inpaint", str(model_dir), "--image", f"{files}/street.png", "--map", f"{files}/small.png"]
    assert main([*command, "--unknown-id", "0", "--out", str(files / "out")]) == 2
    assert "small.png: 20x20 pixels" in capsys.readouterr().err


def test_nothing_that_was_given_is_replaced(model_dir, files, capsys):
    given = (files / "map.png").rename(files / "street_overlay.png")
    before = given.read_bytes()
    command = ["inpaint", str(model_dir), "--image", f"{files}/street.png", "--map", str(given), "--unknown-id", "0"]
    for out in (files, files / "." / "out" / ".."):
        (files / "out").mkdir(exist_ok=True)
        assert main([*command, "--out", str(out)]) == 2
        assert "choose another --out" in capsys.readouterr().err
    assert given.read_bytes() == before


def test_an_unknown_id_that_occurs_nowhere(model_dir, files, capsys):
    command = ["inpaint", str(model_dir), "--image", f"{files}/street.png", "--map", f"{files}/map.png"]
    assert main([*command, "--unknown-id", "5", "--out", str(files / "out")]) == 2
    assert "no pixel has the id 5" in capsys.readouterr().err
