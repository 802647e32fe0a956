"""The report page in a real browser: what it shows, that it reaches for nothing, that it is whole at any moment."""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
import shutil
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page
from synthetic import make_run

from bias_audit.policies.policy import Policy
from bias_audit.records.runs import Run, read_run
from bias_audit.report import samples
from bias_audit.report.marks import MOST_ROWS
from bias_audit.report.page import render, write_report
from bias_audit.report.samples import outline
from bias_audit.report.series import thin

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def violated(tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = make_run(tmp_path_factory.mktemp("violated") / "run")
    write_report(path)
    return read_run(path)


def viewer_content(html: str) -> dict[str, Any]:
    """What the page gives its viewer, its places replaced by the bytes that are there."""
    content = gzip.decompress(base64.b64decode(re.search(r'id="data">(.*?)</script>', html)[1]))  # type: ignore[index]
    start = 4 + struct.unpack("<I", content[:4])[0]
    header: dict[str, Any] = json.loads(content[4:start])

    def part(place: list[int] | None) -> bytes | None:
        return place and content[start + place[0] : start + sum(place)]

    for frame in header["frames"]:
        frame["maps"] = [part(place) for place in frame["maps"]]
        frame |= {name: part(frame[name]) for name in ("shares", "magnitude", "margin", "predicted", "effects")}
    for shown in (*header["samples"], *header["changed"]):
        shown["image"] = part(shown["image"])
    return header


def shorts(content: bytes) -> np.ndarray[Any, Any]:
    high, low = np.frombuffer(content, dtype=np.uint8).reshape(2, -1).astype("<u4")
    return ((high << 24) | (low << 16)).view("<f4")


def shown_ids(page: Page) -> list[str]:
    ids: list[str] = page.eval_on_selector_all(".tile", "tiles => tiles.map(t => t.dataset.id)")
    return ids


def pixels(page: Page, sample: str) -> np.ndarray[Any, Any]:
    """What is painted over one sample: RGBA."""
    flat, side = page.evaluate(
        """id => {
            const tile = [...document.querySelectorAll(".tile")].find(t => t.dataset.id === id);
            const canvas = tile.querySelector("canvas");
            return [[...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data], canvas.width];
        }""",
        sample,
    )
    return np.array(flat).reshape(side, side, 4)


def bilinear(heatmap: np.ndarray[Any, Any], side: int) -> np.ndarray[Any, Any]:
    """Upsampled as the tool does it (align_corners=False), written out anew."""
    for axis in (0, 1):
        cells = heatmap.shape[axis]
        place = np.clip((np.arange(side) + 0.5) * cells / side - 0.5, 0, cells - 1)
        low = np.floor(place).astype(int)
        part = np.expand_dims(place - low, 1 - axis)
        high = np.minimum(low + 1, cells - 1)
        heatmap = np.take(heatmap, low, axis) * (1 - part) + np.take(heatmap, high, axis) * part
    return heatmap


def test_a_violated_run_says_so_first(violated: Run, open_page: Callable[..., Page]) -> None:
    page = open_page(violated.path)
    judgement = violated.audits[-1].judgement
    banner = page.locator(".banner")
    assert "Violated" in banner.inner_text()
    first = judgement.violations[0].message
    assert first[1:] in banner.inner_text()
    assert banner.locator("use").get_attribute("href") == "#icon-violated"
    words = page.locator(".finding").all_inner_texts()
    assert len(words) == len(judgement.findings) == 3
    for finding in judgement.findings:
        assert any(finding.sentence in text and str(finding.verdict) in text.lower() for text in words)
    assert page.locator(".finding").first.get_attribute("class") == "finding is-reliance"
    page.locator("#held").click()
    assert page.locator("#checks-title ~ * tbody tr").count() == len(judgement.checks)


def test_a_run_that_goes_on_under_another_policy_still_has_a_page(tmp_path: Path) -> None:
    """Its last audit was judged by rules that the manifest no longer names."""
    run = read_run(make_run(tmp_path / "run", audits=1))
    other = Policy.model_validate({"rules": [{"metric": "accuracy", "min": 0.1}]})
    assert {check.rule for check in run.audits[-1].judgement.checks}.isdisjoint(r.title for r in other.rules)
    page = render(replace(run, manifest=run.manifest.model_copy(update={"policy": other})))
    assert "enrichment spurious &lt;= 1.5" in page


def test_heatmaps_are_those_of_the_records(violated: Run, open_page: Callable[..., Page]) -> None:
    page = open_page(violated.path)
    page.select_option("#method", label="HiResCAM")
    page.locator("#audit").focus()
    page.keyboard.press("Home")
    scores = violated.scores(0)
    for sample in shown_ids(page)[:5]:
        painted = pixels(page, sample)
        levels = np.rint(scores.maps[1, scores.ids.index(sample)].astype(float) * 63) / 63
        codes = 255 * bilinear(levels, len(painted))
        assert np.abs(painted[..., 3] - np.minimum(255, 1.5 * codes)).max() <= 2


def test_numbers_travel_to_three_digits(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", samples=12, removal={"hair": 0.3}))
    shown = viewer_content(render(run))
    last, frame = run.scores(2), shown["frames"][2]
    rows = [last.ids.index(sample["id"]) for sample in shown["samples"]]
    expected = {
        "shares": last.values[0][:, rows],
        "magnitude": last.magnitude[:, rows],
        "margin": last.margin[rows],
        "effects": last.effects[2, rows],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(shorts(frame[name]), values.ravel(), rtol=2**-8)
    assert np.isnan(shorts(frame["shares"])).any() and np.isnan(shorts(frame["effects"])).any()
    assert np.frombuffer(frame["predicted"], "<i2").tolist() == last.predictions[rows].tolist()
    assert shown["frames"][1]["effects"] is None


def test_slider_and_play_replay_training(violated: Run, open_page: Callable[..., Page]) -> None:
    page = open_page(violated.path, clock=True)
    sample = shown_ids(page)[0]
    at_end = pixels(page, sample)
    assert "step 300" in page.locator("#audit-text").inner_text()
    page.locator("#audit").focus()
    page.keyboard.press("ArrowLeft")
    assert "step 200" in page.locator("#audit-text").inner_text()
    assert page.locator("#audit").get_attribute("aria-valuetext") == page.locator("#audit-text").inner_text()
    before = pixels(page, sample)
    assert not np.array_equal(before, at_end)
    page.keyboard.press("Home")
    page.locator("#play").focus()
    page.keyboard.press("Enter")
    assert page.locator("#play").get_attribute("aria-pressed") == "true"
    page.clock.run_for(5000)
    assert page.locator("#play").get_attribute("aria-pressed") == "false"
    np.testing.assert_array_equal(pixels(page, sample), at_end)


def test_order_and_filters_agree_with_the_records(violated: Run, open_page: Callable[..., Page]) -> None:
    page = open_page(violated.path)
    first, last = violated.scores(0), violated.scores(2)

    def share(scores: Any, region: str) -> dict[str, float]:
        return dict(zip(scores.ids, scores.of("energy_share", "gradcam", region).tolist(), strict=True))

    hair, face = share(last, "hair"), share(last, "face")
    ids = shown_ids(page)
    assert sorted(ids) == sorted(last.ids)
    # The silent sample has no share, and stands last.
    known = [hair[i] + face[i] for i in ids]
    assert np.isnan(known[-1]) and not np.isnan(known[:-1]).any()
    assert np.all(np.diff(known[:-1]) <= 1e-4)

    page.select_option("#region", label="hair (spurious)")
    page.select_option("#sort", "change")
    rise = {i: hair[i] - share(first, "hair")[i] for i in ids}
    risen = [rise[i] for i in shown_ids(page) if not np.isnan(rise[i])]
    assert np.all(np.diff(risen) <= 1e-4)

    page.select_option("#sort", "id")
    assert shown_ids(page) == sorted(last.ids)

    page.select_option("#class", label="nurse")
    page.select_option("#group", label="gender = male")
    sheet = violated.sheet()
    expected = {
        i for i, y, (g,) in zip(sheet.ids, sheet.labels, sheet.attributes, strict=True) if (y, g) == (1, "male")
    }
    assert set(shown_ids(page)) == expected != set()
    page.select_option("#class", "")
    page.select_option("#group", "")
    page.select_option("#correct", "no")
    assert set(shown_ids(page)) == {i for i, right in zip(last.ids, last.correct, strict=True) if not right}
    assert page.locator(".told.wrong").count() == len(shown_ids(page))


def test_a_silent_map_is_not_a_score(violated: Run, open_page: Callable[..., Page]) -> None:
    page = open_page(violated.path)
    last = violated.scores(2)
    silent = last.ids[int(np.flatnonzero(last.magnitude[0] == 0)[0])]
    tile = page.locator(f'.tile[data-id="{silent}"]')
    assert "– · silent" in tile.inner_text()
    assert tile.locator(".silent").count() == 1
    assert pixels(page, silent)[..., 3].max() == 0
    assert "NaN" not in page.locator("main").inner_text()


def test_keyboard_opens_and_closes_a_sample(violated: Run, open_page: Callable[..., Page]) -> None:
    page = open_page(violated.path)
    tile = page.locator(".tile").nth(1)
    tile.focus()
    page.keyboard.press("Enter")
    assert page.locator("dialog").evaluate("d => d.open")
    assert page.locator("#detail-title").inner_text() == shown_ids(page)[1]
    rows = page.locator("#detail-table tbody tr")
    assert rows.count() == 3
    assert [row.split("\t")[0] for row in rows.all_inner_texts()] == ["100", "200", "300"]
    last = violated.scores(2)
    i = last.ids.index(shown_ids(page)[1])
    assert f"{100 * last.of('energy_share', 'gradcam', 'hair')[i]:.0f} %" in rows.last.inner_text()
    assert page.locator("#detail-maps canvas").count() == 2
    page.locator("#detail-audit").focus()
    page.keyboard.press("Home")
    assert rows.first.get_attribute("aria-current") == "true"
    page.keyboard.press("Escape")
    assert not page.locator("dialog").evaluate("d => d.open")
    assert page.evaluate("document.activeElement.dataset.id") == shown_ids(page)[1]


@pytest.fixture(scope="module")
def intervened(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose last audit removed hair and face, in which some samples lack a face."""
    path = make_run(tmp_path_factory.mktemp("intervened") / "run", removal={"hair": 0.3, "face": 0.05}, samples=20)
    write_report(path)
    return read_run(path)


def test_samples_are_sorted_by_what_an_intervention_does(intervened: Run, open_page: Callable[..., Page]) -> None:
    page = open_page(intervened.path)
    last = intervened.scores(2)
    falls = last.effects[last.effect_metrics.index("removal_margin")]
    page.select_option("#sort", "effect")
    # Of all spurious regions it is the one that matters most.
    most = dict(zip(last.ids, np.nanmax(falls[:, 1:], axis=1).tolist(), strict=True))
    assert np.all(np.diff([most[i] for i in shown_ids(page)]) <= 0.01)
    page.select_option("#region", label="face (spurious)")
    of_face = dict(zip(last.ids, falls[:, 2].tolist(), strict=True))
    first = shown_ids(page)[0]
    assert of_face[first] == max(of_face.values())
    assert f"margin −{of_face[first]:.2f} without" in page.locator(".tile").first.inner_text()
    page.select_option("#region", label="coat (object)")
    assert "not removed" in page.locator(".tile").first.inner_text()


def test_without_interventions_nothing_is_sorted_by_them(violated: Run, open_page: Callable[..., Page]) -> None:
    page = open_page(violated.path)
    assert page.locator("#sort option").evaluate_all("options => options.map(o => o.value)") == [
        "share",
        "change",
        "id",
    ]


def test_a_sample_shows_what_interventions_made_of_it(intervened: Run, open_page: Callable[..., Page]) -> None:
    page = open_page(intervened.path)
    changed = intervened.changed()
    assert changed is not None
    page.locator(f'.tile[data-id="{changed.ids[0]}"]').click()
    figures = page.locator("#detail-changed figure")
    texts = figures.all_inner_texts()
    assert [text.split("\n")[0] for text in texts] == ["As it is", "Without hair", "Without face", "As gender = male"]
    classes = intervened.manifest.subjects.classes
    assert f"decided: {classes[changed.decisions[0]]}" in texts[1]
    assert f"the label’s margin −{changed.falls[0]:.2f}" in texts[1]
    assert "the label’s margin +0.50" in texts[3]
    shown = figures.locator("img").evaluate_all("images => images.map(i => [i.src, i.naturalWidth])")
    assert len({src for src, _ in shown}) == 4 and all(width > 0 for _, width in shown)
    assert base64.b64decode(shown[1][0].partition(",")[2]) == changed.pictures[0]
    # Of samples that no picture was kept of there is none.
    page.locator("#close").click()
    other = next(i for i in intervened.sheet().ids if i not in changed.ids)
    page.locator(f'.tile[data-id="{other}"]').click()
    assert not page.locator("#detail-changes").is_visible()


def test_the_next_and_the_previous_sample_are_a_key_away(intervened: Run, open_page: Callable[..., Page]) -> None:
    page = open_page(intervened.path)
    ids = shown_ids(page)
    page.locator(".tile").first.press("Enter")
    assert page.locator("#previous").is_disabled()
    page.locator("#next").press("Enter")
    assert page.locator("#detail-title").inner_text() == ids[1]
    page.locator("#previous").press("Enter")
    assert page.locator("#detail-title").inner_text() == ids[0]


def test_the_course_of_a_sample_is_that_of_the_records(intervened: Run, open_page: Callable[..., Page]) -> None:
    page = open_page(intervened.path)
    sample = shown_ids(page)[0]
    page.locator(".tile").first.click()
    hair = page.locator("#detail-course path.spurious").first.get_attribute("d") or ""
    drawn = [tuple(map(float, point.split())) for point in re.split("[ML]", hair)[1:]]
    recorded = [s.of("energy_share", "gradcam", "hair")[s.ids.index(sample)] for s in map(intervened.scores, range(3))]
    np.testing.assert_allclose(drawn, [(50 * k, 40 * (1 - v)) for k, v in enumerate(recorded)], atol=0.2)
    assert page.locator("#course-title").inner_text().endswith("from step 100 to 300")


def test_only_samples_that_show_a_region_are_kept(tmp_path: Path, open_page: Callable[..., Page]) -> None:
    path = make_run(tmp_path / "run", samples=8, image_size=(24, 24), lacking=("face", 3))
    write_report(path)
    page = open_page(path)
    assert len(shown_ids(page)) == 8
    page.select_option("#shows", label="face")
    areas = read_run(path).scores(2).areas[:, 2]
    assert len(shown_ids(page)) == 5 == np.isfinite(areas).sum()


def test_a_finding_leads_to_its_images(violated: Run, open_page: Callable[..., Page]) -> None:
    page = open_page(violated.path)
    page.locator('a[data-region="face"]').click()
    face = violated.scores(2).of("energy_share", "gradcam", "face")
    assert shown_ids(page)[0] == violated.scores(2).ids[int(np.nanargmax(face))]
    assert page.evaluate("scrollY") > 0


def test_opacity_and_outlines(violated: Run, open_page: Callable[..., Page]) -> None:
    page = open_page(violated.path)
    heat, drawing = page.locator(".tile canvas").first, page.locator(".tile .outline").first
    assert heat.evaluate("c => getComputedStyle(c).opacity") == "0.7"
    page.locator("#opacity").focus()
    page.keyboard.press("Home")
    assert heat.evaluate("c => getComputedStyle(c).opacity") == "0"
    dashes = "paths => Object.fromEntries(paths.map(p => [p.classList[0], getComputedStyle(p).strokeDasharray]))"
    styles = drawing.locator("path:not(.casing)").evaluate_all(dashes)
    assert styles["object"] == "none" and styles["spurious"] != "none"
    page.locator("#outlines").uncheck()
    assert not drawing.is_visible()


@pytest.mark.parametrize("width", [1280, 390])
def test_light_and_dark_fit_the_screen(violated: Run, open_page: Callable[..., Page], width: int) -> None:
    papers = []
    for scheme in ("light", "dark"):
        page = open_page(violated.path, viewport={"width": width, "height": 844}, color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        page.locator(".tile").first.click()
        assert page.evaluate("document.querySelector('dialog').scrollWidth") <= width
        colors = "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        paper, ink = ([int(c) for c in re.findall(r"\d+", text)] for text in page.evaluate(colors))
        assert abs(sum(paper) - sum(ink)) > 500
        papers.append(paper)
        # Charts follow the theme: what they draw with is the page's own colour.
        plot = page.locator(".plot text").first
        assert plot.evaluate("t => getComputedStyle(t).fill") != "rgb(0, 0, 0)"
    assert sum(papers[0]) > 600 > 200 > sum(papers[1])


def test_hostile_names_stay_text(tmp_path: Path, open_page: Callable[..., Page]) -> None:
    closing = '</script><img src=x onerror="alert(2)">'
    policy = Policy.model_validate(
        {"rules": [{"metric": "enrichment", "region": "spurious", "max": 1.5, "name": HOSTILE}]}
    )
    path = make_run(
        tmp_path / "run",
        ids=(HOSTILE, closing, *(f"{{{{ {i} }}}} & 'x' \" \u2028" for i in range(10))),
        regions=((closing, "object"), (HOSTILE, "spurious"), ("url(#clip0)", "spurious")),
        attributes=(("a<b>", (HOSTILE, closing)),),
        classes=(HOSTILE, closing),
        policy=policy,
        failed=HOSTILE,
        run_id=f'"{HOSTILE}',
    )
    write_report(path)
    page = open_page(path)
    assert set(shown_ids(page)) >= {HOSTILE, closing}
    assert page.locator("script").count() == 2
    assert page.locator("img[src=x]").count() == 0
    page.locator(f".tile[title='{HOSTILE}']").press("Enter")
    assert page.locator("#detail-title").inner_text() == HOSTILE
    assert HOSTILE in page.locator("#detail-table").inner_text()
    page.keyboard.press("Escape")
    page.select_option("#group", label=f"a<b> = {closing}")
    assert 0 < len(shown_ids(page)) < 12
    assert HOSTILE in page.locator("figure th").all_text_contents()
    assert "<script>" in (page.locator(".plot").first.text_content() or "")


def test_a_long_run_fits_one_page(tmp_path: Path, open_page: Callable[..., Page]) -> None:
    path = make_run(tmp_path / "run", samples=500, audits=50, map_size=(7, 7))
    target = write_report(path)
    assert target.stat().st_size <= 5_000_000
    run = read_run(path)
    page = open_page(path)
    data = viewer_content(target.read_text(encoding="utf-8"))
    assert len(data["frames"]) == 50
    assert {sample["id"] for sample in data["samples"]} == set(run.sheet().ids)
    assert "All 500 samples" in page.locator("#samples").inner_text()
    assert len(shown_ids(page)) == 48
    page.locator("#more").click()
    assert len(shown_ids(page)) == 96
    assert page.locator("#table-1-1 tbody tr").count() == min(50, MOST_ROWS)


def test_a_page_that_is_too_small_for_all_shows_the_worst_and_some_of_every_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bias_audit.report.samples.BUDGET", 300_000)
    run = read_run(make_run(tmp_path / "run", samples=160, audits=10, removal={"hair": 0.3}))
    html = render(run)
    kept = viewer_content(html)["samples"]
    assert 40 < len(kept) < 120
    assert f"{len(kept)} of 160 samples are in this page" in html
    assert len(base64.b64decode(re.search(r'id="data">(.*?)</script>', html)[1])) < 330_000  # type: ignore[index]
    scores = run.scores(9)
    shares = np.nan_to_num(scores.values[0, 0][:, [1, 2]]).max(1)
    effects = np.nan_to_num(scores.effects[2]).max(1)
    ids = {sample["id"] for sample in kept}
    for told in (shares, effects):
        assert {scores.ids[i] for i in np.argsort(-told)[: len(kept) // 4]} <= ids
    # Beside the worst, every label x group is there.
    assert len(Counter((s["label"], *s["attributes"]) for s in kept)) == 4


def test_the_page_is_filled_whatever_the_heatmaps_compress_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flat maps take a hundredth of what noise does: all samples fit, which by the usual measure would not."""
    run = read_run(make_run(tmp_path / "noise", samples=120, audits=12, image_size=(32, 32)))
    flat = read_run(make_run(tmp_path / "flat", samples=120, audits=12, image_size=(32, 32), silent=120))
    monkeypatch.setattr("bias_audit.report.samples.BUDGET", 160_000)
    assert f"All {120} samples" in render(flat)
    noisy = render(run)
    assert re.search(r"\b\d+ of 120 samples", noisy)
    taken = len(base64.b64decode(re.search(r'id="data">(.*?)</script>', noisy)[1]))  # type: ignore[index]
    assert 0.8 * 160_000 < taken <= 160_000


def test_smaller_pictures_keep_their_outlines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = read_run(make_run(tmp_path / "run", samples=4, image_size=(90, 60)))
    as_they_are = viewer_content(render(run))["samples"]
    monkeypatch.setattr("bias_audit.report.samples.THUMBNAIL_BYTES", 1)
    monkeypatch.setattr("bias_audit.report.samples.SMALL_SIDE", 45)
    smaller = viewer_content(render(run))["samples"]
    for before, after in zip(as_they_are, smaller, strict=True):
        assert (before["outlines"], before["size"]) == (after["outlines"], after["size"]) and before["size"] == [60, 90]
        assert [Image.open(io.BytesIO(s["image"])).size for s in (before, after)] == [(60, 90), (30, 45)]


def test_large_maps_and_many_audits_are_thinned_and_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bias_audit.report.samples.BUDGET", 60_000)
    html = render(read_run(make_run(tmp_path / "run", samples=30, audits=9, map_size=(40, 24))))
    data = viewer_content(html)
    steps = [frame["step"] for frame in data["frames"]]
    assert 2 < len(steps) < 9 and (steps[0], steps[-1]) == (100, 900)
    assert data["frames"][0]["size"] == [16, 16]
    assert f"{len(steps)} of 9 audits" in html and "averaged down" in html
    assert data["frames"][0]["maps"][0] is not None and len(data["frames"][0]["maps"][0]) == 256 * len(data["samples"])


def test_without_thumbnails_no_picture_is_disclosed(tmp_path: Path, open_page: Callable[..., Page]) -> None:
    violated = read_run(make_run(tmp_path / "changed", removal={"hair": 0.3}))
    (tmp_path / "report.html").write_text(render(violated, thumbnails=False), encoding="utf-8")
    page = open_page(tmp_path)
    assert page.locator("img").count() == 0
    assert page.locator(".tile .outline path").count() > 24
    assert pixels(page, shown_ids(page)[0])[..., 3].max() == 255
    shown = viewer_content((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert all(sample["image"] is None for sample in shown["samples"]) and shown["changed"] == []


@pytest.mark.parametrize(
    ("options", "outcome", "words"),
    [
        ({"audits": 0, "samples": 0}, "Inconclusive", "No audit has been recorded yet"),
        ({"audits": 0}, "Inconclusive", "No audit has been recorded yet"),
        ({"torn": True}, "Violated", "last record was cut off"),
        ({"hair_enrichment": 0.7, "gap": 0.02, "spread": 0.02}, "Held", "binding checks hold"),
        ({"spread": 3.0}, "Inconclusive", "leaves open whether"),
        ({"audits": 0, "reference": True}, "Inconclusive", "Only the model before training"),
        (
            {"hair_enrichment": 0.7, "gap": 0.02, "spread": 0.02, "failed": "out of memory"},
            "Inconclusive",
            "the audit at step 400 failed: out of memory",
        ),
        ({"audits": 1, "attributes": (), "regions": (("coat", "object"),)}, "Inconclusive", "no estimate of this kind"),
        ({"audits": 1, "samples": 2}, "Inconclusive", "All 2 samples"),
    ],
)
def test_every_kind_of_run_has_a_page(
    tmp_path: Path, open_page: Callable[..., Page], options: dict[str, Any], outcome: str, words: str
) -> None:
    path = make_run(tmp_path / "run", **options)
    assert write_report(tmp_path) == path / "report.html"
    page = open_page(path)
    assert page.locator(".banner strong").inner_text() == outcome
    assert words in page.locator("main").inner_text()
    assert page.locator("#live").count() == 0


def test_a_running_page_reloads_and_keeps_its_state(tmp_path: Path, open_page: Callable[..., Page]) -> None:
    path = make_run(tmp_path / "run", ended=False, audits=2)
    write_report(path)
    page = open_page(path, clock=True)
    assert page.locator("#live").is_visible()
    page.select_option("#method", label="HiResCAM")
    page.select_option("#class", label="nurse")
    page.locator("#table-1-1 summary").click()
    page.evaluate("scrollTo(0, 700)")
    shown = shown_ids(page)
    shutil.rmtree(path)
    make_run(path, ended=False, audits=4)
    write_report(path)

    page.locator(".tile").first.click()
    page.clock.run_for(30_000)
    assert "of 2)" in page.locator("#audit-text").inner_text(), "no reload while a sample is open"
    page.locator("#close").click()
    scroll = page.evaluate("scrollY")
    with page.expect_navigation():
        page.clock.run_for(10_000)
    # The newest audit is followed; what the reader chose is kept.
    assert (
        "step 400" in page.locator("#audit-text").inner_text()
        and "(4 of 4)" in page.locator("#audit-text").inner_text()
    )
    assert page.locator("#method option:checked").inner_text() == "HiResCAM"
    assert set(shown_ids(page)) == set(shown)
    assert page.locator("#table-1-1").evaluate("d => d.open")
    assert page.evaluate("scrollY") == scroll > 0


def test_a_report_is_whole_or_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_run(tmp_path / "run")
    target = write_report(path)
    before = target.read_bytes()
    assert before.rstrip().endswith(b"</html>")

    def broken(run: Run, **_: bool) -> str:
        raise RuntimeError("out of paper")

    monkeypatch.setattr("bias_audit.report.page.render", broken)
    with pytest.raises(RuntimeError, match="out of paper"):
        write_report(path)

    class Full(str):
        def encode(self, *_: str) -> bytes:
            return b"half a page"

    monkeypatch.setattr("bias_audit.report.page.render", lambda run, **_: Full())
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(path)
    assert target.read_bytes() == before
    assert sorted(p.name for p in path.iterdir()) == [
        "audits",
        "audits.jsonl",
        "manifest.json",
        "report.html",
        "samples.npz",
    ]


def test_charts_can_stand_in_one_page_and_name_the_limits(violated: Run) -> None:
    html = render(violated)
    assert html == (violated.path / "report.html").read_text(encoding="utf-8"), "equal records give equal bytes"
    ids = re.findall(r'\sid="([^"]+)"', html)
    assert [name for name, count in Counter(ids).items() if count > 1] == []
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(ids)
    plots = re.findall(r'<svg class="plot".*?</svg>', html, flags=re.DOTALL)
    assert len(plots) == 14
    assert not any(re.search(r'(fill|stroke)="(#|rgb|black)', plot) for plot in plots), (
        "a colour the theme cannot change"
    )
    assert "≤ 1.5 spurious" in plots[0] and "tolerance" in plots[0]
    hair = violated.audits[-1].estimate("enrichment", region="hair", method="gradcam")
    assert f'<td class="number">{hair.value:.2f} [{hair.low:.2f}, {hair.high:.2f}], n = 24</td>' in html


def test_masks_of_padded_thumbnails_are_cut_to_their_picture(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", samples=4, audits=1, image_size=(60, 96)))
    sheet = run.sheet()
    narrow = io.BytesIO()
    Image.open(io.BytesIO(sheet.thumbnails[0])).crop((0, 0, 40, 50)).save(narrow, "JPEG")
    pages = {}
    for name, thumbnails in (("own", sheet.thumbnails), ("cut", (narrow.getvalue(), *sheet.thumbnails[1:]))):
        changed = type(sheet)(sheet.ids, sheet.labels, sheet.attributes, thumbnails, sheet.masks)
        sample = samples._sample(changed, 0, np.ones(4, dtype=np.float32))
        pages[name] = sample
    assert pages["own"]["size"] == [96, 60] and pages["cut"]["size"] == [40, 50]
    assert pages["cut"]["outlines"] == [outline(mask[:50, :40]) for mask in sheet.masks[0]]


@pytest.mark.parametrize("seed", range(5))
def test_outlines_enclose_exactly_the_mask(seed: int) -> None:
    mask = np.random.default_rng(seed).random((9, 13)) < 0.5
    filled = np.zeros_like(mask)
    x = y = 0
    # Each upright edge flips all that lies to its right: what is flipped an odd number of times is inside.
    for command, first, second in re.findall(r"([MHVZ])(\d*) ?(\d*)", outline(mask)):
        if command == "M":
            x, y = start = int(first), int(second)
        elif command == "H":
            x = int(first)
        else:
            to = int(first) if command == "V" else start[1]
            filled[min(y, to) : max(y, to), x:] ^= True
            y = to
    np.testing.assert_array_equal(filled, mask)
    assert outline(np.zeros((3, 3), dtype=bool)) == ""


@pytest.mark.parametrize(("count", "most"), [(3, 5), (5, 5), (51, 50), (1000, 7)])
def test_thinning_keeps_both_ends(count: int, most: int) -> None:
    kept = thin(count, most)
    assert kept[0] == 0 and kept[-1] == count - 1
    assert len(kept) == min(count, most) == len(set(kept))


def test_the_page_says_which_explanations_are_fit(tmp_path: Path, open_page: Callable[..., Page]) -> None:
    path = make_run(tmp_path / "run", fitness={"gradcam": 0.1, "hirescam": 0.9}, reference=True)
    write_report(path)
    section = open_page(path).locator("section", has_text="Are the explanations fit?")
    rows = [row.split("\t") for row in section.locator("tbody").inner_text().strip().split("\n")]
    # Measured at the first audit after training began, two audits ago.
    assert [[cell.strip() for cell in (*row[:3], row[-1])] for row in rows] == [
        ["Grad-CAM", "Fit", "0.100 [0.050, 0.150]", "100"],
        ["HiResCAM", "Unfit", "0.900 [0.850, 0.950]", "100"],
    ]
    assert "beyond a similarity of 0.7" in section.inner_text()
    # What the unfit method says of the other region is not in the findings.
    assert "hirescam" not in "".join(f.sentence for f in read_run(path).audits[-1].judgement.findings)
    open_ = render(read_run(make_run(tmp_path / "open", fitness={"gradcam": 0.7})))
    assert "Unknown" in open_ and "is open: their rank correlation with maps of random weights is 0.70" in open_
    assert "Are the explanations fit?" not in render(read_run(make_run(tmp_path / "untested")))


def test_a_report_says_what_was_removed(tmp_path: Path) -> None:
    options: dict[str, Any] = {"removal": {"hair": 0.5, "face": 0.0}, "association": 0.6, "reference": True}
    run = read_run(make_run(tmp_path / "run", **options))
    hair, face, gender = run.audits[-1].judgement.findings
    # Before training nothing is removed.
    assert [len([e for e in a.estimates if e.metric == "removal_flips"]) for a in run.audits] == [0, 6, 6, 6]
    page = unescape(render(run))
    for finding in (hair, face, gender):
        assert finding.sentence in page
    assert "removing hair changes 50 % [47, 53] of the decisions beyond the 1 % that a control region changes" in (
        hair.sentence.lower()
    )
    assert "hair" in gender.sentence and "Cramér's V 0.60 [0.58, 0.62]" in gender.sentence
    assert "removing face changes at most 0 % [-3, 3]" in face.sentence and str(face.verdict) == "cleared"
    # Of a region that shows an attribute, what it says of it.
    shown = read_run(make_run(tmp_path / "shown", **options, shows=("hair",)))
    hair, face, gender = shown.audits[-1].judgement.findings
    page = unescape(render(shown))
    for finding in (hair, face, gender):
        assert finding.sentence in page and "what hair says of gender carries 50 % [47, 53]" in (hair.sentence)
    assert "and lowers the score by 2.50 [2.30, 2.70]" in hair.sentence


def test_a_report_needs_no_torch() -> None:
    code = "import sys, bias_audit.report.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
