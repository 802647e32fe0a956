"""Pictures of a run's page for the README, as a browser shows it.

make screenshots

Enters: a run directory with its `report.html`. Leaves: `docs/page.png`, the first screen, and `docs/replay.jpg`,
some of the samples with their heatmaps in the middle of the training.
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

DOCS = Path(__file__).parent
WIDTH = 1280
# The first screen with the beginning of the findings; the controls with two rows of samples.
PAGE_HEIGHT, REPLAY_HEIGHT = 760, 890


def main() -> None:
    """Open the page, and take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--audit", type=int, help="which audit the replay shows, from 0; by default the middle one")
    parser.add_argument("--out", type=Path, default=DOCS)
    options = parser.parse_args()
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": PAGE_HEIGHT}, color_scheme="light")
        page.goto((options.run_dir / "report.html").resolve().as_uri())
        page.wait_for_selector("body[data-ready]")
        save(page.screenshot(), options.out / "page.png")
        steps = page.locator("#audit").evaluate(
            "(slider, audit) => { const last = Number(slider.max); slider.value = audit ?? Math.round(last / 2); "
            "slider.dispatchEvent(new Event('input')); return last; }",
            options.audit,
        )
        page.set_viewport_size({"width": WIDTH, "height": REPLAY_HEIGHT})
        page.locator("#samples").scroll_into_view_if_needed()
        page.locator("#samples").evaluate("section => section.scrollIntoView()")
        save(page.screenshot(), options.out / "replay.jpg")
        print(f"{options.out / 'page.png'} and replay.jpg, of {steps + 1} audits")
        browser.close()


def save(png: bytes, path: Path) -> None:
    """For text a palette is enough; heatmaps would show its steps."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    if path.suffix == ".png":
        picture.quantize(64).save(path, optimize=True)
    else:
        picture.save(path, quality=85)


if __name__ == "__main__":
    main()
