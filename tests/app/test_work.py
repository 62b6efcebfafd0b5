"""What visitors ask for, without a page."""

import threading

import numpy as np
import pytest
from PIL import Image

from ldmseg_fast import LDMSegPipeline
from ldmseg_fast.app.scoring import read_truth
from ldmseg_fast.app.work import Settings, Worker, left_out, view_of
from ldmseg_fast.data.pictures import Picture
from ldmseg_fast.errors import ArgumentError, BackendError, ConfigError, DataError
from ldmseg_fast.panoptic.format import write_panoptic_png


class Cancelled(Exception):
    pass


def test_segment_gives_what_the_pipeline_gives(worker, scene):
    picture, _ = scene
    done = worker.segment(picture)
    expected = LDMSegPipeline.from_pretrained("tiny")(picture)[0]
    np.testing.assert_array_equal(done.result.segmentation, expected.segmentation)
    assert done.result.segments_info == expected.segments_info
    assert done.seconds > 0 and done.view.shape == (64, 64, 3) and done.orientation == 1
    filled = done.settings
    assert (filled.steps, filled.size, filled.backend, filled.count_threshold) == (1, 64, "torch", 8)


def test_settings_reach_the_model(worker, scene):
    picture, _ = scene
    plain = worker.segment(picture)
    strict = worker.segment(picture, Settings(count_threshold=10**6))
    assert len(plain.result.segments_info) > 0 and strict.result.segments_info == []
    calls = []
    more = worker.segment(picture, Settings(steps=3, seed=5), stop=lambda: calls.append(1))
    assert len(calls) == 3 + 2 and more.settings.steps == 3
    large = worker.segment(picture, Settings(size=128))
    assert large.result.segmentation.shape == (64, 64) and large.settings.size == 128
    again = worker.segment(picture)
    np.testing.assert_array_equal(again.result.segmentation, plain.result.segmentation)


@pytest.mark.parametrize(
    ("settings", "error", "word"),
    [
        (Settings(steps=0), ArgumentError, "num_inference_steps=0"),
        (Settings(steps=10**5), ArgumentError, "100000"),
        (Settings(steps="3"), ArgumentError, "num_inference_steps='3'"),
        (Settings(seed=-1), ArgumentError, "seed=-1"),
        (Settings(size=63), BackendError, "image_size=63"),
        (Settings(size=0), BackendError, "image_size=0"),
        (Settings(size="64"), ArgumentError, "size='64'"),
        (Settings(solver="euler"), ArgumentError, "euler"),
        (Settings(mask_threshold=2.0), ConfigError, "mask_threshold"),
        (Settings(overlap_threshold=float("nan")), ConfigError, "overlap_threshold"),
        (Settings(backend="onnxruntime"), ArgumentError, "this app has torch"),
    ],
    ids=lambda value: None,
)
def test_a_setting_out_of_range_is_named(worker, scene, settings, error, word):
    with pytest.raises(error, match=word):
        worker.segment(scene[0], settings)


def test_settings_of_json():
    assert Settings.of({"steps": 2, "size": None}) == Settings(steps=2)
    with pytest.raises(ArgumentError, match="'stepz': no such setting; there are steps, size"):
        Settings.of({"stepz": 2})


def test_a_turned_picture_is_segmented_as_it_is_shown(worker, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.jpg"
    image.save(path, exif=exif)
    done = worker.segment(path)
    assert done.result.segmentation.shape == (60, 40) == done.view.shape[:2] and done.orientation == 6


def test_broken_and_huge_pictures_are_named(worker, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nno")
    with pytest.raises(DataError, match=r"broken\.png"):
        worker.segment(broken)
    with pytest.raises(DataError, match="picture: 40000x40000 is over"):
        worker.segment(Image.new("1", (40000, 40000)))
    with pytest.raises(ArgumentError, match="uint8"):
        worker.segment(np.zeros((4, 4, 3), np.float32))
    with pytest.raises(ArgumentError, match="NoneType"):
        worker.segment(None)


def test_what_stop_raises_ends_the_work_between_steps(worker, scene):
    steps = []

    def stop():
        steps.append(1)
        if len(steps) == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        worker.segment(scene[0], Settings(steps=50), stop)
    assert len(steps) == 3
    assert worker.segment(scene[0]).result.segments_info  # the pipeline is free again


def test_a_waiting_visitor_can_leave(worker, scene):
    started, free = threading.Event(), threading.Event()

    def hold():
        started.set()
        free.wait(30)

    other = threading.Thread(target=worker.segment, args=(scene[0], None, hold))
    other.start()
    started.wait(30)

    def leave():
        raise Cancelled

    with pytest.raises(Cancelled):
        worker.segment(scene[0], None, leave)
    free.set()
    other.join(30)


def test_given_pixels_of_a_completed_map_stay_exact(worker, scene):
    picture, truth = scene
    known = np.zeros(truth.shape, bool)
    known[:, :40] = True
    done = worker.complete(picture, truth, known)
    np.testing.assert_array_equal(done.result.segmentation[known], truth[known])
    given = {segment["id"] for segment in done.result.segments_info if segment["given"]}
    assert given == set(np.unique(truth[known]).tolist()) - {0}


def test_maps_that_do_not_fit_are_refused(worker, scene):
    picture, truth = scene
    known = np.ones(truth.shape, bool)
    with pytest.raises(ArgumentError, match="brush away"):
        worker.complete(picture, truth, known)
    with pytest.raises(ArgumentError, match="nothing of the map"):
        worker.complete(picture, truth, ~known)
    with pytest.raises(ArgumentError, match="the mask has 63 x 64 pixels, the picture 64 x 64"):
        worker.complete(picture, truth, known[:, 1:])
    with pytest.raises(ArgumentError, match="the map has 64 x 63 pixels"):
        worker.complete(picture, truth[1:], known)


def test_compare_tells_where_maps_agree(worker, scene):
    same = worker.compare(scene[0], None, None)
    assert same.share == 1.0 and same.quality == 1.0 and same.agreement.all()
    other = worker.compare(scene[0], Settings(), Settings(count_threshold=10**6))
    assert 0 <= other.share < 1 and other.agreement.shape == (64, 64) and other.quality == 0.0
    np.testing.assert_array_equal(other.agreement, other.first.result.segmentation == 0)


def test_score_counts_as_the_metric_does(worker, scene, tmp_path):
    picture, truth = scene
    perfect = worker.score(truth, truth)
    segments = len(np.unique(truth)) - (0 in truth)
    assert perfect.numbers() == {"pq": 1.0, "sq": 1.0, "rq": 1.0, "found": segments, "missed": 0, "false": 0}
    done = worker.segment(picture)
    write_panoptic_png(tmp_path / "truth.png", truth)
    score = worker.score(done.result, tmp_path / "truth.png", done.view)
    assert 0 < score.pq < 1 and score.found + score.missed == segments
    assert score.errors.dtype == np.uint8 and score.errors.shape == score.truth.shape == score.prediction.shape
    assert len(score.segments[0]) == segments and "IoU" in score.segments[0][0]
    nothing = worker.score(np.zeros_like(truth), np.zeros_like(truth))
    assert nothing.numbers()["pq"] is None
    with pytest.raises(ArgumentError, match="the truth has 63 x 64 pixels, the map 64 x 64"):
        worker.score(truth, truth[:, 1:])


def test_truth_may_be_grey_or_palette(tmp_path):
    ids = np.arange(12, dtype=np.uint8).reshape(3, 4)
    Image.fromarray(ids).save(tmp_path / "grey.png")
    palette = Image.fromarray(ids).convert("P")
    palette.putdata(ids.ravel().tolist())
    palette.save(tmp_path / "palette.png")
    for name in ("grey.png", "palette.png"):
        np.testing.assert_array_equal(read_truth(tmp_path / name), ids)
    Image.new("RGB", (4, 3)).save(tmp_path / "photo.jpg")
    with pytest.raises(DataError, match=r"photo\.jpg"):
        read_truth(tmp_path / "photo.jpg")
    with pytest.raises(DataError, match=r"grey\.png: 4x3 is over 10"):
        read_truth(tmp_path / "grey.png", max_pixels=10)


def test_views_are_scaled_down():
    picture = Picture(np.zeros((3000, 10, 3), np.uint8), (3000, 10))
    assert view_of(picture).shape == (2048, 7, 3)


def test_a_worker_refuses_unknown_backends_at_once():
    with pytest.raises(BackendError, match="backend='cuda'"):
        Worker(backends=("cuda",))
    with pytest.raises(BackendError, match="engine_dir"):
        Worker(backends=("onnxruntime",))


def test_options_that_graphs_do_without_are_named():
    usual = {"cuda_graph": None, "fused": False, "precision": None, "attention": "auto"}
    given = usual | {"fused": True, "precision": "fp8", "attention": "sdpa"}
    for backend, fused, option in (("onnxruntime", True, "--fused"), ("tensorrt", "epilogues", "--fused-epilogues")):
        lines = left_out(backend, given | {"fused": fused})
        assert [line.split(":")[0] for line in lines] == ["--precision fp8", option, "--attention sdpa"]
        assert all(f"backend={backend} runs graphs" in line for line in lines)
        assert not left_out(backend, usual)
    assert not left_out("torch", given) and not left_out("compile", given)


def test_a_model_with_categories(category_model, scene):
    worker = Worker(category_model)
    done = worker.segment(scene[0], Settings(count_threshold=1, mask_threshold=0.0))
    assert len(worker.categories) > 1
    names = {category["name"] for category in worker.categories}
    assert all(segment["name"] in names for segment in done.result.segments_info)
    worker.close()


def test_a_photograph_in_the_place_of_a_map_is_refused(worker, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (100, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    for read in (worker.read_map, read_truth):
        with pytest.raises(DataError, match=r"photo.png: \d+ segments, this app takes 5000"):
            read(tmp_path / "photo.png")
