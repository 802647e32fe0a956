"""A real Chromium, and pages of run directories opened in it; trainings without a page; a folder to work in."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Dialog, Page, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory, whose modules can be imported and are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        module = sys.modules[name]
        # A package without `__init__.py` has a path and no file.
        places = [getattr(module, "__file__", None) or "", *map(str, getattr(module, "__path__", ()))]
        if any(place.startswith(str(tmp_path)) for place in places):
            del sys.modules[name]


@pytest.fixture
def without_page() -> Iterator[None]:
    """Trainings have no page drawn: it takes two seconds of another process, most of the time of so short a one."""
    from benchmarks.soak.pages import drawing

    with drawing(page=False):
        yield


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        message = "no Chromium found: install `chromium` to test the page itself"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        instance = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield instance
        instance.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens a page from disk; on leaving, whatever it complained of or asked the network for fails the test."""
    opened: list[tuple[Page, Path, list[str], list[str]]] = []

    def open_one(run: Path, clock: bool = False, **options: Any) -> Page:
        page = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options).new_page()
        complaints: list[str] = []
        requests: list[str] = []

        def dismiss(dialog: Dialog) -> None:
            complaints.append(f"dialog: {dialog.message}")
            dialog.dismiss()

        # Warnings are about these tests' own reading of pixels.
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", dismiss)
        page.on("request", lambda request: requests.append(request.url))
        if clock:
            page.clock.install()
        opened.append((page, run, complaints, requests))
        page.goto((run / "report.html").as_uri())
        page.wait_for_selector("body[data-ready]")
        return page

    yield open_one
    for page, run, complaints, requests in opened:
        page.context.close()
        assert complaints == []
        own = (run / "report.html").as_uri()
        assert {url.partition("#")[0] for url in requests if not url.startswith("data:")} == {own}
