"""What tests do with the page, in words of a visitor."""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any


def open_tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()
    page.wait_for_selector(f"#{name.lower()}-start")


def take_example(page: Any, tab: str, number: int = 0) -> None:
    """Chooses an example of a tab, and waits until its picture is in the input."""
    page.locator(f"#{tab}-examples button").nth(number).click()
    page.wait_for_selector(f"#{tab}-picture img")
    page.wait_for_function(
        "([tab, name]) => document.querySelector(`#${tab}-picture img`).src.includes(name)",
        arg=[tab, f"scene-{number + 1}.png"],
    )


def segment(page: Any, number: int = 0) -> None:
    """Segments an example in the tab Segment."""
    take_example(page, "segment", number)
    press(page, "segment")


def press(page: Any, tab: str, button: str = "start") -> None:
    """Presses a button of the tab and waits for another result in its viewer."""
    viewer = page.locator(f"#{tab}-view .viewer")
    before = viewer.get_attribute("data-result")
    page.click(f"#{tab}-{button}")
    page.wait_for_function(
        "([tab, before]) => { const now = document.querySelector(`#${tab}-view .viewer`).dataset.result;"
        " return now && now !== before; }",
        arg=[tab, before],
    )


def upload(page: Any, tab: str, path: Path) -> None:
    page.locator(f"#{tab}-picture input[type=file]").set_input_files(path)
    page.wait_for_selector(f"#{tab}-picture img", state="attached")


def error_of(page: Any) -> str:
    """Waits for an error on the page, closes it and returns its text."""
    text = page.get_by_test_id("toast-text").first.inner_text()
    page.get_by_test_id("toast-close").first.click()
    page.get_by_test_id("toast-body").first.wait_for(state="detached")
    return str(text)


def remove_picture(page: Any, tab: str) -> None:
    page.click(f"#{tab}-picture button[aria-label='Remove Image']")


def segments_of(page: Any, tab: str = "segment") -> Any:
    return page.locator(f"#{tab}-view .viewer-segments button")


def downloaded(page: Any, tab: str, folder: Path) -> zipfile.ZipFile:
    """Makes the tab's download and opens it."""
    page.click(f"#{tab}-make")
    link = page.locator(f"#{tab}-download a").first
    link.wait_for()
    with page.expect_download() as caught:
        link.click()
    path = folder / caught.value.suggested_filename
    caught.value.save_as(path)
    return zipfile.ZipFile(path)


def huge_png(path: Path, side: int = 40_000) -> Path:
    """Writes a PNG whose header promises side x side pixels, and holds none of them."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))
    path.write_bytes(content + chunk(b"IEND", b""))
    return path


def wait_for_text(page: Any, selector: str, text: str) -> None:
    page.wait_for_function(
        "([selector, text]) => document.querySelector(selector).innerText.includes(text)", arg=[selector, text]
    )
