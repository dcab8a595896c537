"""A headless Chromium that shows a page from a file, and what it had to say about it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


@contextmanager
def chromium() -> Iterator:
    """The machine's own browser, under playwright. Fails, and does not skip, where there is none."""
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.fail("the page is looked at in a browser, and there is none: install chromium, as by `apt-get install chromium`")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=list(QUIET))
        yield browser
        browser.close()


class Seen:
    """The page ``view`` of a file in a window, and what came with it: errors on the console, and requests but for the file."""

    def __init__(self, browser, file: Path, width: int = 1280, scheme: str = "light"):
        self.context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
        self.view, self.errors, self.requests = self.context.new_page(), [], []
        self.view.on("console", lambda said: self.errors.append(said.text) if said.type in ("error", "warning") else None)
        self.view.on("pageerror", lambda error: self.errors.append(str(error)))
        address = file.resolve().as_uri()
        self.view.on("request", lambda asked: self.requests.append(asked.url) if asked.url != address else None)
        self.view.goto(address)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()
