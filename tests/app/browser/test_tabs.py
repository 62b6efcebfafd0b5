"""The other tabs in a browser: Complete with the mouse, Compare, Batch and Score."""

import json
import zipfile

import numpy as np
from PIL import Image

from ldmseg_fast.app.tabs.examples import write_examples
from ldmseg_fast.panoptic.format import read_panoptic_png
from tests.app.browser.steps import (
    downloaded,
    error_of,
    open_tab,
    press,
    segment,
    segments_of,
    take_example,
    wait_for_text,
)


def stroke(page, start: tuple[float, float], end: tuple[float, float]) -> float:
    """Paints a line with the mouse, in fractions of the picture; returns the picture's side on the screen."""
    canvas = page.locator("#complete-editor canvas").first
    wait_for_text(page, "#complete-editor", "72%")  # at which 640 pixels fit the editor: the map is loaded
    canvas.scroll_into_view_if_needed()
    page.wait_for_timeout(1000)
    box, side = canvas.bounding_box(), 640 * 0.72
    left, top = box["x"] + (box["width"] - side) / 2, box["y"] + (box["height"] - side) / 2
    points = [(left + side * x, top + side * y) for x, y in np.linspace(start, end, 5).tolist()]
    page.mouse.move(*points[0])
    page.mouse.down()
    for point in points[1:]:
        page.mouse.move(*point)
    page.mouse.up()
    page.wait_for_timeout(500)
    return side


def map_of(page, folder) -> np.ndarray:
    with downloaded(page, "complete", folder) as zipped:
        (folder / "map.png").write_bytes(zipped.read(next(n for n in zipped.namelist() if n.endswith("-2.png"))))
    return read_panoptic_png(folder / "map.png")


def test_a_brushed_map_is_completed_and_given_pixels_stay(visitor, tmp_path):
    truth = read_panoptic_png(write_examples(tmp_path)[1].truth)
    page = visitor()
    open_tab(page, "Complete")
    page.click("#complete-start")
    assert "no map" in error_of(page)
    take_example(page, "complete", 1)
    page.click("#complete-load")
    page.wait_for_selector("#complete-view .viewer[data-result]")
    page.wait_for_selector("#complete-editor canvas")
    page.click("#complete-start")
    assert "brush away" in error_of(page)  # nothing is brushed yet
    stroke(page, (0.2, 0.5), (0.8, 0.5))
    press(page, "complete")
    said = page.inner_text("#complete-said")
    share = float(said.split("%")[0].split()[-1])
    assert 1 < share < 25, said
    completed = map_of(page, tmp_path)
    far = np.ones((64, 64), bool)
    far[25:40, 8:57] = False  # around the stroke
    assert (completed[far] == truth[far]).all()
    assert (completed != 0).mean() > 0.9

    page.locator("#complete-editor button[aria-label='Color']").click()
    page.locator("#complete-editor button.color").nth(1).click()  # a new segment
    stroke(page, (0.3, 0.2), (0.5, 0.2))
    press(page, "complete")
    assert "The strokes are in the map" in page.inner_text("#complete-said")
    painted = map_of(page, tmp_path)
    fresh = set(np.unique(painted)) - set(np.unique(completed))
    assert len(fresh) == 1 and painted[12, 25] in fresh
    assert (painted == completed)[~np.isin(painted, list(fresh))].all()

    press(page, "complete", "undo")
    assert (map_of(page, tmp_path) == completed).all()
    press(page, "complete", "undo")
    assert (map_of(page, tmp_path) == truth).all()
    press(page, "complete", "undo")
    assert "no completion to take back" in page.inner_text("#complete-said")


def test_a_result_is_taken_over_and_a_segment_forgotten_by_its_name(visitor):
    page = visitor(device_scale_factor=0.5)
    open_tab(page, "Complete")
    page.click("#complete-take")
    assert "no result yet" in error_of(page)
    open_tab(page, "Segment")
    segment(page, 2)
    open_tab(page, "Complete")
    page.click("#complete-take")
    page.wait_for_selector("#complete-view .viewer[data-result]")
    assert segments_of(page, "complete").count() == segments_of(page, "segment").count()
    page.click("#complete-forget input")
    page.get_by_role("option").first.click()
    page.keyboard.press("Escape")
    press(page, "complete")
    assert "% of the pixels were completed" in page.inner_text("#complete-said")


def test_two_settings_are_compared(visitor):
    page = visitor()
    open_tab(page, "Compare")
    take_example(page, "compare", 3)
    page.click("#compare-start")
    wait_for_text(page, "#compare-said", "The maps agree on")
    assert "seed 0" in page.inner_text("#compare-said") and "seed 1" in page.inner_text("#compare-said")
    page.wait_for_selector("#compare-agreement img")
    assert page.locator("#compare-slider img").count() == 2
    place = "() => document.querySelector('#compare-slider .outer').getBoundingClientRect().left"
    before = page.evaluate(place)
    page.locator("#compare-divider input[type=range]").focus()
    page.keyboard.press("End")
    page.wait_for_function(f"before => ({place})() > before + 50", arg=before)


def pictures(folder, count: int):
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        paths.append(folder / f"picture-{number}.png")
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(paths[-1])
    return paths


def test_a_batch_of_files_and_a_zip_is_downloaded(visitor, tmp_path):
    page = visitor()
    open_tab(page, "Batch")
    page.click("#batch-start")
    assert "pictures first" in error_of(page)
    *files, last = pictures(tmp_path, 3)
    (tmp_path / "broken.jpg").write_bytes(b"nothing")
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as zipped:
        zipped.write(last, "deep/picture-9.png")
        zipped.writestr("notes.txt", "no picture")
    page.locator("#batch-files input[type=file]").set_input_files(
        [*files, tmp_path / "broken.jpg", tmp_path / "more.zip"]
    )
    page.wait_for_function("document.querySelector('#batch-files').innerText.includes('more')")
    page.click("#batch-start")
    wait_for_text(page, "#batch-said", "3 pictures")
    said = page.inner_text("#batch-said")
    assert "broken.jpg" in said and "notes.txt" in said and "/tmp" not in said
    with downloaded(page, "batch", tmp_path) as zipped:
        names = zipped.namelist()
        assert {"picture-0.png", "picture-1.json", "picture-9_overlay.png", "left-out.txt"} <= set(names)
        assert json.loads(zipped.read("picture-0.json"))["height"] == 64


def test_a_batch_is_stopped_and_keeps_what_is_done(visitor, tmp_path):
    page = visitor()
    open_tab(page, "Batch")
    page.locator("#batch-files input[type=file]").set_input_files(pictures(tmp_path, 40))
    page.wait_for_function("document.querySelector('#batch-files').innerText.includes('picture-39')")
    page.get_by_role("button", name="Settings").locator("visible=true").click()
    page.locator("#batch-steps input[type=number]").fill("30")
    page.locator("#batch-steps input[type=number]").press("Tab")
    page.click("#batch-start")
    page.wait_for_function(r"/[1-9]\d*\/40/.test(document.querySelector('#batch-said').innerText)")
    page.click("#batch-stop")
    wait_for_text(page, "#batch-said", "stopped before the last")
    with downloaded(page, "batch", tmp_path) as zipped:
        done = [name for name in zipped.namelist() if name.endswith(".json")]
        assert 1 <= len(done) < 40


def test_a_map_is_scored(visitor, tmp_path):
    example = write_examples(tmp_path)[2]
    page = visitor()
    open_tab(page, "Score")
    page.locator("#score-examples button").nth(2).click()
    page.wait_for_selector("#score-picture img")
    page.click("#score-start")
    wait_for_text(page, "#score-said", "PQ ")
    assert page.locator("#score-errors img").get_attribute("src")
    page.get_by_label("A map that I upload").check()
    page.locator("#score-map input[type=file]").set_input_files(example.truth)
    page.wait_for_function("document.querySelector('#score-map').innerText.includes('truth')")
    page.click("#score-start")
    wait_for_text(page, "#score-said", "PQ 100.0%")
    page.get_by_label("The last result of the tab Segment").check()
    page.click("#score-start")
    assert "no result yet" in error_of(page)
    page.get_by_label("A map that I upload").check()
    Image.fromarray(np.ones((32, 32), np.uint8)).save(tmp_path / "small.png")
    page.click("#score-map button[aria-label='Clear']")
    page.locator("#score-map input[type=file]").set_input_files(tmp_path / "small.png")
    page.wait_for_function("document.querySelector('#score-map').innerText.includes('small')")
    page.click("#score-start")
    assert "32 x 32" in error_of(page)
