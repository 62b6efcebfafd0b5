"""The page of a running `ldmseg app`, with the model in its own process, as users have it."""

import base64

import numpy as np
import pytest
from PIL import Image

from benchmarks.measuring.app_server import serving
from tests.app.browser.conftest import WAIT
from tests.app.browser.steps import press, segments_of, upload

NAME = "<img src=x onerror=alert(1)>.png"

# what a browser does when a file is dropped on, or pasted into, the page
GIVE = """([kind, name, content]) => {
  const bytes = Uint8Array.from(atob(content), (each) => each.charCodeAt(0));
  const data = new DataTransfer(), options = { bubbles: true, cancelable: true };
  data.items.add(new File([bytes], name, { type: "image/png" }));
  const target = document.querySelector("#segment-picture input[type=file]").closest("button");
  target.dispatchEvent(new DragEvent(kind, { dataTransfer: data, ...options }));
}"""


@pytest.fixture(scope="module")
def address(browser):
    with serving("--max-upload", "2") as server:
        yield server.url


@pytest.fixture
def page(browser, address):
    """A page that nothing may go wrong in: no fault of a script, no error on the console, no other host."""
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    context.set_default_timeout(WAIT)
    page, wrong = context.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    page.on("request", lambda request: _same_host(request.url, address) or wrong.append(request.url))
    page.goto(address)
    page.wait_for_selector("#segment-start")
    yield page
    context.close()
    assert not wrong, wrong


def _same_host(url, address):
    return url.startswith((address, "data:", "blob:"))


def picture(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    return path


def test_a_picture_with_a_hostile_name_is_segmented(page, tmp_path):
    upload(page, "segment", picture(tmp_path / NAME))
    press(page, "segment")
    assert segments_of(page).count()


def test_a_picture_is_dropped(page, tmp_path):
    content = base64.b64encode(picture(tmp_path / "dropped.png").read_bytes()).decode()
    page.evaluate(GIVE, ["drop", "dropped.png", content])
    page.wait_for_selector("#segment-picture img[src*=dropped]")


def test_a_picture_is_pasted(page, tmp_path):
    content = base64.b64encode(picture(tmp_path / "pasted.png").read_bytes()).decode()
    page.evaluate(
        """async (content) => {
          const blob = await (await fetch("data:image/png;base64," + content)).blob();
          await navigator.clipboard.write([new ClipboardItem({ "image/png": blob })]);
        }""",
        content,
    )
    page.get_by_role("button", name="clipboard").first.click()
    page.wait_for_selector("#segment-picture img")
    press(page, "segment")
    assert "64 x 64 pixels" in page.inner_text("#segment-facts")
