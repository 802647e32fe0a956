"""The page of a check of regions, in a browser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import Page
from region_scenes import HOSTILE, checked, clean, found, made, moved

from bias_audit.regions.check import check_regions
from bias_audit.regions.checked import RegionReport
from bias_audit.regions.region_set import read_set, with_other
from bias_audit.regions.survey import survey
from bias_audit.report.regions import render_regions, write_regions


def shown(page: Page) -> list[str]:
    ids: list[str] = page.eval_on_selector_all(".tile", "tiles => tiles.map(t => t.dataset.id)")
    return ids


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RegionReport]:
    """A set with an overlap, an empty region, and a second annotator who draws one image otherwise."""
    folder = tmp_path_factory.mktemp("faulty")
    scene = clean()
    second = moved(scene, 10, ["1-05.png"])
    scene.boxes["0-03.png"]["tie"] = (8, 2, 12, 6)
    scene.boxes["2-04.png"]["tie"] = (5, 20, 5, 30)
    data = scene.write(folder)
    report = check_regions(survey(with_other(read_set(data), second.coco(folder / "other.json"))))
    write_regions(folder / "report.html", report)
    return folder, report


def test_the_page_says_what_is_wrong_first(faulty: tuple[Path, RegionReport], open_page: Callable[..., Page]) -> None:
    folder, report = faulty
    page = open_page(folder)
    assert "Violated" in page.locator(".banner").inner_text()
    cards = page.locator(".finding")
    assert cards.count() == len(report.results) == 9
    assert [word.split()[0].lower() for word in cards.locator(".state").all_inner_texts()] == [
        str(result.found.state) for result in report.worst_first
    ]
    for card, result in zip(cards.all_inner_texts(), report.worst_first, strict=True):
        assert result.check.code in card and result.found.said in card
    # Those that a check names come first, one of each in turn.
    assert shown(page)[:3] == ["2-04.png", "0-03.png", "1-05.png"]
    assert page.locator(".outline path.object").count() and page.locator(".outline path.another").count()


def test_images_are_filtered_by_check_region_class_and_group(
    faulty: tuple[Path, RegionReport], open_page: Callable[..., Page]
) -> None:
    folder, report = faulty
    page = open_page(folder)
    page.locator("[data-check=overlap]").click()
    assert shown(page) == ["0-03.png"] and page.locator(".told.wrong").count() == 1
    page.select_option("#check", label="agreement (3)")
    files = [report.survey.of.items[flag.index].file for flag in found(report, "agreement").flags]
    assert shown(page) == list(dict.fromkeys(files))
    page.select_option("#check", label="any check, or none")
    page.select_option("#class", label="nurse")
    page.select_option("#group", label="gender = male")
    while page.locator("#more").is_visible():
        page.locator("#more").click()
    assert sorted(shown(page)) == [f"3-{k:02d}.png" for k in range(24)]
    assert page.locator("#count").inner_text() == "24 of 96 images"


def test_an_image_opens_with_both_annotators_and_its_areas(
    faulty: tuple[Path, RegionReport], open_page: Callable[..., Page]
) -> None:
    folder, report = faulty
    page = open_page(folder)
    page.select_option("#check", label="agreement (3)")
    page.locator("[data-id='1-05.png']").click()
    dialog = page.locator("#detail")
    assert "agreement: hair: IoU 0.38" in dialog.inner_text()
    assert dialog.locator("figure").count() == 2
    index = [item.file for item in report.survey.of.items].index("1-05.png")
    cells = dialog.locator("tbody tr").all_inner_texts()
    for cell, area in zip(cells, report.survey.areas[index], strict=True):
        assert cell.endswith(" %") and abs(float(cell.split()[-2]) - 100 * area) <= (0.051 if area < 0.0995 else 0.51)
    page.locator("#close").click()
    assert not dialog.is_visible()


def test_every_annotator_of_an_image_is_drawn(tmp_path: Path, open_page: Callable[..., Page]) -> None:
    scene = clean(2)
    scene.write(tmp_path)
    who = {file: ("ann", "bob", "cyd") if k % 2 else ("bob", "cyd") for k, file in enumerate(scene.boxes)}
    boxes = {file: {f"hair@{name}": scene.boxes[file]["hair"] for name in names} for file, names in sorted(who.items())}
    both = replace(scene, boxes=boxes).coco(tmp_path / "three.json")
    report = checked(both, tmp_path / "images")
    names = [one.name for one in report.survey.of.annotators]
    assert sorted(names) == ["ann", "bob", "cyd"]
    write_regions(tmp_path / "report.html", report)
    page = open_page(tmp_path)
    for file, drew in list(who.items())[:2]:
        page.locator(f"[data-id='{file}']").click()
        figures = page.locator("#detail figure")
        assert figures.locator("figcaption").all_inner_texts() == [name for name in names if name in drew]
        for figure in figures.all():
            drawn = figure.locator(".outline path").evaluate_all("all => all.map(path => path.getAttribute('d'))")
            assert any(drawn), "what each drew is in a picture of its own"
        page.locator("#close").click()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_light_and_dark_fit_the_screen(
    faulty: tuple[Path, RegionReport], open_page: Callable[..., Page], width: int, scheme: str
) -> None:
    page = open_page(faulty[0], viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    assert dark == (scheme == "dark")


def test_hostile_names_stay_text(tmp_path: Path, open_page: Callable[..., Page]) -> None:
    hostile = made(3, lambda k: f"{k}{HOSTILE}")
    write_regions(tmp_path / "report.html", check_regions(survey(hostile)))
    page = open_page(tmp_path)
    assert page.locator("h1").inner_text() == HOSTILE
    page.locator(".tile").first.click()
    assert page.locator("#detail-title").inner_text() == f"0{HOSTILE}"
    assert HOSTILE in page.locator("#detail-table").inner_text()


def test_a_page_of_500_images_is_below_5_mb() -> None:
    page = render_regions(check_regions(survey(made(502, lambda k: f"ward-{k:05d}.jpg"))))
    assert "500 of 502 images are in this page" in page and 2_000_000 < len(page.encode()) < 5_000_000


def test_a_page_that_is_full_says_how_many_images_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bias_audit.report.regions.BUDGET", 200_000)
    page = render_regions(check_regions(survey(made(60, lambda k: f"ward-{k:05d}.jpg", rough=True))))
    counted = int(page.split(" of 60 images are in this page")[0].rsplit(maxsplit=1)[-1])
    assert 1 < counted < 60 and len(page.encode()) < 500_000
