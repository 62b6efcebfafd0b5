"""The tab Segment in a browser: from a picture to a changed and downloaded result."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from ldmseg_fast.app.exports import CITYSCAPES, EXPORTS
from tests.app.browser.steps import downloaded, error_of, huge_png, remove_picture, segment, segments_of, upload

FACTS = "#segment-facts"


def click_segment(page, place: int) -> str:
    """Clicks a segment of the list in the picture, at a pixel that is its own, and returns its name."""
    stage = page.locator("#segment-view .viewer-stage")
    stage.scroll_into_view_if_needed()
    box, wanted = stage.bounding_box(), segments_of(page).nth(place).get_attribute("data-id")
    for row in range(2, 64, 3):
        for column in range(2, 64, 3):
            x, y = box["x"] + box["width"] * column / 64, box["y"] + box["height"] * row / 64
            page.mouse.move(x, y)
            under = page.locator("#segment-view .viewer-segments button.is-under")
            if under.count() and under.get_attribute("data-id") == wanted:
                name = page.locator("#segment-view .viewer-tip").inner_text()
                page.mouse.click(x, y)
                return name
    raise AssertionError(f"segment {place} of the list is nowhere in the picture")


def tool(page, action: str) -> None:
    page.click(f"#segment-view [data-action={action}]")


def test_a_result_is_changed_by_clicks_and_downloaded(visitor, tmp_path):
    page = visitor()
    segment(page)
    count = segments_of(page).count()
    assert count >= 3
    text = page.inner_text(FACTS)
    assert re.match(rf"{count} segments in \d+\.\d\d s", text) and "64 x 64" in text

    name = click_segment(page, 0)  # the name is told on hover
    assert segments_of(page).nth(0).inner_text().startswith(name)
    assert segments_of(page).nth(0).get_attribute("aria-pressed") == "true"
    page.fill("#segment-view .viewer-name", "sky & <b>sea</b>")
    tool(page, "rename")
    page.wait_for_function("document.querySelector('#segment-view .viewer-segments').innerText.includes('<b>sea</b>')")

    page.evaluate(
        "() => { const input = document.querySelector('#segment-view .viewer-color'); input.value = '#123456'; }"
    )
    tool(page, "recolour")
    page.wait_for_function(
        "() => document.querySelector('#segment-view .viewer-swatch').style.background.includes('18, 52, 86')"
    )

    click_segment(page, 1)
    tool(page, "merge")
    page.wait_for_function(
        "count => document.querySelectorAll('#segment-view .viewer-segments li').length === count", arg=count - 1
    )
    tool(page, "clear")
    segments_of(page).nth(1).click()
    tool(page, "hide")
    page.wait_for_selector("#segment-view .viewer-segments button.is-hidden")

    with downloaded(page, "segment", tmp_path) as zipped:
        record = json.loads(zipped.read("scene-1.json"))
        assert len(record["segments_info"]) == count - 2
        assert "sky & <b>sea</b>" in [each.get("name") for each in record["segments_info"]]
        rgb = np.asarray(Image.open(zipped.open("scene-1.png")), np.int64)
        ids = rgb @ [1, 256, 65536]
        assert set(np.unique(ids)) - {0} == {each["id"] for each in record["segments_info"]}

    for _ in range(4):
        tool(page, "undo")
        page.wait_for_timeout(300)
    page.wait_for_selector("#segment-view [data-action=undo]:disabled")
    assert segments_of(page).count() == count
    assert "sea" not in page.inner_text("#segment-view .viewer-segments")


def test_opacity_and_outlines_are_drawn_at_once(visitor):
    page = visitor()
    segment(page, 1)
    page.locator("#segment-view .viewer-opacity").fill("20")
    assert page.locator("#segment-view .viewer-tint").evaluate("canvas => canvas.style.opacity") == "0.2"
    lines = "canvas => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.some(v => v > 0)"
    assert page.locator("#segment-view .viewer-lines").evaluate(lines)
    page.uncheck("#segment-view .viewer-outlines")
    assert not page.locator("#segment-view .viewer-lines").evaluate(lines)


def test_settings_are_used_and_every_format_is_offered(visitor):
    page = visitor()
    page.get_by_role("button", name=re.compile("^Settings")).first.click()
    page.locator("#segment-steps input[type=number]").wait_for()
    page.wait_for_timeout(500)  # the controls take their values once more when they appear
    page.locator("#segment-steps input[type=number]").fill("2")
    page.locator("#segment-steps input[type=number]").press("Tab")
    page.locator("#segment-seed input").fill("7")
    page.locator("#segment-seed input").press("Tab")
    segment(page)
    assert "2 steps" in page.inner_text(FACTS) and "seed 7" in page.inner_text(FACTS)
    page.click("#segment-format input")
    assert page.get_by_role("option").count() == len((*EXPORTS, CITYSCAPES))


def test_bad_uploads_are_one_line_and_the_app_goes_on(visitor, tmp_path):
    page = visitor()
    page.click("#segment-start")
    assert "picture first" in error_of(page)
    whole, huge = tmp_path / "whole.png", huge_png(tmp_path / "huge.png")
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(whole)
    (tmp_path / "broken.png").write_bytes(whole.read_bytes()[:60])
    (tmp_path / "text.jpg").write_bytes(b"no picture at all")
    for path in (tmp_path / "broken.png", tmp_path / "text.jpg", huge):
        upload(page, "segment", path)
        page.click("#segment-start")
        error = error_of(page)
        assert path.name in error and "\n" not in error.strip() and "Traceback" not in error and "/tmp" not in error
        if path == huge:
            assert "pixels" in error
        remove_picture(page, "segment")
    (tmp_path / "large.png").write_bytes(whole.read_bytes() + bytes(3 * 2**20))
    page.locator("#segment-picture input[type=file]").set_input_files(tmp_path / "large.png")
    assert "2" in error_of(page)  # of more bytes than the app takes
    segment(page)
    assert segments_of(page).count()


def test_a_turned_photograph_stands_upright(visitor, tmp_path):
    page = visitor()
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((48, 96, 3), np.uint8)
    pixels[:, :48] = (250, 200, 30)
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif)
    upload(page, "segment", tmp_path / "turned.jpg")
    page.click("#segment-start")
    page.wait_for_selector("#segment-view .viewer[data-result]")
    assert "48 x 96 pixels" in page.inner_text(FACTS) and "turned" in page.inner_text(FACTS)
    box = page.locator("#segment-view .viewer-stage").bounding_box()
    assert box["height"] == pytest.approx(2 * box["width"], rel=0.02)


def test_a_fault_of_the_app_shows_no_traceback(visitor, worker, monkeypatch):
    page = visitor()

    def broken(*_, **__):
        raise KeyError("secret of the code")

    with monkeypatch.context() as patch:
        patch.setattr(worker, "segment", broken)
        page.locator("#segment-examples button").first.click()
        page.wait_for_selector("#segment-picture img")
        page.click("#segment-start")
        error = error_of(page)
    assert "fault of its own" in error and "secret" not in error
    segment(page)
    assert segments_of(page).count()


def test_two_visitors_do_not_see_each_other(visitor):
    one, other = visitor(), visitor()
    for page, number in ((one, 0), (other, 3)):
        page.locator("#segment-examples button").nth(number).click()
        page.wait_for_selector("#segment-picture img")
    for page in (one, other):
        page.click("#segment-start")
    for page in (one, other):
        page.wait_for_selector("#segment-view .viewer[data-result]")
    before = other.inner_text("#segment-view .viewer-segments")
    segments_of(one).nth(0).click()
    one.fill("#segment-view .viewer-name", "mine alone")
    tool(one, "rename")
    one.wait_for_function("document.querySelector('#segment-view .viewer-segments').innerText.includes('mine alone')")
    segments_of(other).nth(0).click()
    tool(other, "hide")
    other.wait_for_selector("#segment-view .viewer-segments button.is-hidden")
    assert "mine alone" not in other.inner_text("#segment-view .viewer-segments")
    assert segments_of(other).count() == len(before.splitlines()) // 2 or "hidden" in other.inner_text("#segment-view")
    assert not one.locator("#segment-view .viewer-segments button.is-hidden").count()
