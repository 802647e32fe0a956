"""The page while a training writes it: a real process trains, a real browser looks."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page

from bias_audit import read_run

EXAMPLE = Path(__file__).parents[1] / "examples" / "live.py"
RELOAD_MS = 10_000


@pytest.mark.slow
def test_the_page_follows_the_training_and_stops_with_it(tmp_path: Path, open_page: Callable[..., Page]) -> None:
    out = tmp_path / "live"
    options = ["--epochs", "2", "--per-class", "96", "--audited", "6", "--out", str(out)]
    training = subprocess.Popen(
        [sys.executable, str(EXAMPLE), *options],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        until = time.monotonic() + 300
        drawn = next_page(out, training, 0, until)
        training.send_signal(signal.SIGSTOP)
        page = open_page(out, clock=True)
        assert page.locator("#live").is_visible()
        seen = []
        while page.locator("#live").count():
            seen.append(audits_on(page))
            drawn = next_page(out, training, drawn, until, in_steps=len(set(seen)) < 3)
            # The page's clock is set forward; it finds what the training has written since by itself.
            with page.expect_navigation():
                page.clock.run_for(RELOAD_MS)
            page.wait_for_selector("body[data-ready]")
        training.send_signal(signal.SIGCONT)
        said, _ = training.communicate(timeout=60)
    finally:
        training.kill()
    assert training.returncode == 0, said
    recorded = len(read_run(out).audits)
    assert seen == sorted(seen) and len(set(seen)) >= 3
    assert audits_on(page) == recorded > seen[0]
    assert f"file://{out}/report.html" in said


def next_page(out: Path, training: subprocess.Popen[str], last: int, until: float, in_steps: bool = False) -> int:
    """Wait for a page that was not there before.

    A training that is let go `in_steps`, and held between them, does not run ahead of the process that draws, nor of
    the browser, however busy the machine is.
    """
    page = out / "report.html"
    while not page.exists() or page.stat().st_mtime_ns == last:
        assert time.monotonic() < until
        assert training.poll() is None or page.exists()
        training.send_signal(signal.SIGCONT)
        time.sleep(0.05)
        if in_steps:
            training.send_signal(signal.SIGSTOP)
            time.sleep(0.2)
    return page.stat().st_mtime_ns


def audits_on(page: Page) -> int:
    found = re.search(r"\((\d+) audits?\)", page.locator("main").inner_text())
    assert found is not None
    return int(found[1])
