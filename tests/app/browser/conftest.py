"""A server of the app and a browser for its tests: Debian's Chromium through Playwright, and no other network."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
sync_api = pytest.importorskip("playwright.sync_api", reason="the extra `dev` brings playwright: make setup")
pytest.importorskip("gradio", reason="the extra `app` brings gradio: pip install 'ldmseg_fast[app]'")

NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    "--no-sandbox",  # root in a container has none
    "--disable-gpu",  # the editor's WebGL is drawn by the processor
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
]
WAIT = 60_000  # milliseconds
# the processor draws the editor's WebGL: at 60 pictures a second it does nothing else
FEW_FRAMES = """
window.requestAnimationFrame = (draw) => setTimeout(() => draw(performance.now()), 80);
window.cancelAnimationFrame = clearTimeout;
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.serial)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed; `make browser` installs Debian's chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def url(worker: Any, browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of the whole app; uploads have at most 2 MB."""
    import uvicorn

    from ldmseg_fast.app import page, server
    from ldmseg_fast.app.limits import Limits
    from ldmseg_fast.app.visitors import visitors_folder

    tmp_path_factory.getbasetemp()  # before the server has a folder of its own for temporary files
    bound = server.listen("127.0.0.1", 0)
    with bound, visitors_folder() as folder:
        app = server.make_app(worker, Limits(max_upload=2 * 2**20), folder, None, page.build)
        running = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        running.should_exit = True
        thread.join(10)


@pytest.fixture
def visitor(browser: Any, url: str) -> Iterator[Any]:
    """Makes visitors, each in a context of its own. A fault of the page's scripts fails the test."""
    contexts, faults = [], []

    def visit(**settings: Any) -> Any:
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | settings))
        context.set_default_timeout(WAIT)
        context.add_init_script(FEW_FRAMES)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.asked = []
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(url)
        page.wait_for_selector("#segment-start")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not faults, faults
