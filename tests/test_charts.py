"""The page's charts, heat tables and clusters: what is drawn is what was recorded, and no more of it than fits."""

from __future__ import annotations

import base64
import io
import math
import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Page
from scipy.ndimage import gaussian_filter
from synthetic import make_run
from threadpoolctl import threadpool_info, threadpool_limits

from bias_audit.data.metadata import Metadata
from bias_audit.evidence.association import association
from bias_audit.evidence.clusters import FEWEST
from bias_audit.records.history import onsets
from bias_audit.records.results import AuditResult, AuditSummary
from bias_audit.records.runs import Run, read_run
from bias_audit.records.samples import SampleScores
from bias_audit.records.writing import RunDirectory
from bias_audit.report import clusters, groups
from bias_audit.report.association import association_tables
from bias_audit.report.charts import draw
from bias_audit.report.facts import facts, glance
from bias_audit.report.groups import FEWEST_IMAGES, grouped
from bias_audit.report.marks import HEIGHT, MOST_CELLS, MOST_COLUMNS, WIDTH, Chart, Question
from bias_audit.report.page import render, write_report
from bias_audit.report.series import method_name
from bias_audit.report.whom import MOST_PANELS
from bias_audit.terms import Estimate, Verdict
from bias_audit.verdicts.judgement import judge

CLEAN: dict[str, Any] = {"hair_enrichment": 0.7, "gap": 0.02, "spread": 0.02}
HOSTILE = "<script>alert(1)</script>"
Estimates = tuple[Estimate, ...]


def rewritten(
    source: Path,
    target: Path,
    change: Callable[[AuditSummary, int, Run], Estimates],
    scores: Callable[[SampleScores], SampleScores] = lambda scores: scores,
) -> Run:
    """The run with other estimates, judged anew, and other scores."""
    run = read_run(source)
    directory = RunDirectory.create(target, run.manifest, run.sheet())
    for i, audit in enumerate(run.audits):
        estimates = change(audit, i, run)
        judgement = judge(estimates, run.manifest.subjects, run.manifest.policy)
        changed = replace(audit, estimates=estimates, judgement=judgement)
        directory.append(AuditResult(**vars(changed), scores=scores(run.scores(i))))
    directory.end()
    return read_run(target)


@cache
def questions(run: Run) -> tuple[Question, ...]:
    return draw(run)


def question(run: Run, title: str) -> Question:
    return next(q for q in questions(run) if q.title == title)


def chart(run: Run, question_title: str, title: str) -> Chart:
    return next(c for c in question(run, question_title).charts if c.title == title)


def points(chart: Chart, hue: str) -> list[tuple[float, float]]:
    """The places of a series' points in the plot, in its own pixels."""
    found = re.findall(r'<path transform="translate\(([\d.-]+),([\d.-]+)\)"[^>]*fill="var\(--(\w+)\)"', chart.svg)
    return [(float(x), float(y)) for x, y, its in found if its == hue]


def carry(every: int) -> Callable[[AuditSummary, int, Run], Estimates]:
    """Interventions at each `every`-th audit of the trained model only, carried on in between."""

    def change(audit: AuditSummary, i: int, run: Run) -> Estimates:
        age = i % every
        then = {(e.metric, e.region, e.class_name, e.group): e for e in run.audits[i - age].estimates}
        return tuple(
            replace(then[e.metric, e.region, e.class_name, e.group], age=age)
            if e.metric.startswith(("removal_", "control_", "region_"))
            else e
            for e in audit.estimates
        )

    return change


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Reliance on hair sets in during training; interventions are made at every fourth audit."""
    root = tmp_path_factory.mktemp("biased")
    options: dict[str, Any] = {"removal": {"hair": 0.5, "face": 0.0}, "shows": ("hair",), "association": 0.6}
    source = make_run(root / "source", audits=10, fitness={"gradcam": 0.1, "hirescam": 0.9}, **options)
    return rewritten(source, root / "run", carry(4))


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Run:
    options: dict[str, Any] = {"removal": {"hair": 0.0, "face": 0.0}, "shows": (), "association": 0.0}
    return read_run(make_run(tmp_path_factory.mktemp("clean") / "run", audits=6, **CLEAN, **options))


def test_points_are_measurements_and_carried_estimates_are_not(biased: Run) -> None:
    drawn = chart(biased, "Does the decision hang on it?", "Decisions that change without a region")
    steps = [audit.step for audit in biased.audits]
    measured = [steps[k] for k in (0, 4, 8)]
    places = points(drawn, "vermillion")
    assert [x for x, _ in places] == pytest.approx(
        [WIDTH * (step - steps[0]) / (steps[-1] - steps[0]) for step in measured], abs=0.1
    )
    values = [a.estimate("removal_flips", region="hair").value for a in biased.audits if a.step in measured]
    heights = [HEIGHT - y for _, y in places]
    scale = (heights[2] - heights[0]) / (values[2] - values[0])
    # One straight scale from 0 puts every measurement where it is.
    assert heights == pytest.approx([scale * v for v in values], abs=0.2)
    table = dict(zip(drawn.columns, zip(*drawn.rows, strict=True), strict=True))
    assert table["step"] == tuple(map(str, steps))
    assert table["hair"][9] == "as at step 900" and table["hair"][8].startswith(f"{values[2]:.2f} [")


def test_the_line_leads_from_one_measurement_to_the_next(biased: Run) -> None:
    drawn = chart(biased, "Does the decision hang on it?", "Decisions that change without a region")
    line = re.search(r'<path d="([^"]*)" stroke="var\(--vermillion\)"[^>]*stroke-width="1.75"', drawn.svg)
    assert line is not None and len(re.findall(r"[ML]", line[1])) == 3 and line[1].count("M") == 1


def test_what_was_never_measured_leaves_a_gap(tmp_path: Path) -> None:
    def change(audit: AuditSummary, i: int, run: Run) -> Estimates:
        return tuple(
            replace(e, value=None, low=None, high=None, reason="nothing removed")
            if i == 2 and e.metric == "removal_flips"
            else e
            for e in audit.estimates
        )

    run = rewritten(make_run(tmp_path / "a", audits=5, removal={"hair": 0.5}), tmp_path / "b", change)
    drawn = chart(run, "Does the decision hang on it?", "Decisions that change without a region")
    line = re.search(r'<path d="([^"]*)" stroke="var\(--vermillion\)"[^>]*stroke-width="1.75"', drawn.svg)
    assert line is not None and line[1].count("M") == 2
    assert drawn.rows[2][1] == "–"


def test_the_onset_is_marked_at_its_step(biased: Run, clean: Run) -> None:
    hair = next(onset for onset in onsets(biased.audits) if onset.name == "hair")
    assert hair.since is not None and biased.audits[0].step < hair.since < biased.audits[-1].step
    first, last = biased.audits[0].step, biased.audits[-1].step
    for title, name in (
        ("Where does the model look, and since when?", "Grad-CAM"),
        ("Does the decision hang on it?", "Decisions that change without a region"),
    ):
        drawing = chart(biased, title, name).svg
        assert f">reliance on hair since {hair.since}</text>" in drawing
        rule = re.search(r'<line transform="translate\(([\d.]+),-[\d.]+\)"[^>]*stroke="var\(--ink\)"', drawing)
        assert rule is not None
        assert float(rule[1]) == pytest.approx(WIDTH * (hair.since - first) / (last - first), abs=0.1)
    gaps = chart(biased, "Does it matter?", "Accuracy gap by gender, within each class").svg
    assert ">reliance on gender since" in gaps and "hair" not in gaps
    assert not any(word in render(clean) for word in ("reliance on hair since", 'stroke="var(--ink)"'))


def test_plots_side_by_side_stand_level(biased: Run) -> None:
    # Some of these are marked, others are not.
    frames = {re.search(r'viewBox="([^"]*)"', c.svg)[1] for c in question(biased, "Does it matter?").charts}  # type: ignore[index]
    marked = [">reliance on gender since" in c.svg for c in question(biased, "Does it matter?").charts]
    assert len(frames) == 1 and any(marked) and not all(marked)


def test_every_tolerance_is_a_line(biased: Run) -> None:
    for title, name in (
        ("Does the decision hang on it?", "Decisions that change without a region"),
        ("Does the decision hang on it?", "What regions say of gender"),
        ("Does it matter?", "Accuracy gap by gender, within each class"),
        ("Does it matter?", "Gaps by gender, over all classes"),
    ):
        assert ">tolerance</text>" in chart(biased, title, name).svg
    assert ">≥ 0.5 gender</text>" in chart(biased, "Does it matter?", "Accuracy of the worst group").svg


def test_swaps_and_gaps_over_all_classes_are_drawn(tmp_path: Path) -> None:
    def change(audit: AuditSummary, i: int, run: Run) -> Estimates:
        def put(metric: str, value: float, region: str | None = None) -> Estimate:
            return Estimate(metric, value, value - 0.04, value + 0.04, 24, region, None, "gender")

        return (
            *audit.estimates,
            put("swap_flips", 0.9, "hair"),
            *((put("swap_gap", 0.1 * i, "hair"), put("alignment_gap", 0.1 * i)) if i else ()),
            put("equalized_odds_difference", 0.12),
        )

    source = make_run(tmp_path / "a", audits=4)
    run = rewritten(source, tmp_path / "b", change)
    swapped = chart(run, "Does the decision hang on it?", "Accuracy lost when gender is swapped")
    assert swapped.columns == ("step", "hair")
    assert [row[1] for row in swapped.rows] == [
        "–",
        "0.10 [0.06, 0.14], n = 24",
        "0.20 [0.16, 0.24], n = 24",
        "0.30 [0.26, 0.34], n = 24",
    ]
    gaps = chart(run, "Does it matter?", "Gaps by gender, over all classes")
    assert gaps.columns == ("step", "agree − disagree", "equalized odds", "best − worst")
    assert gaps.rows[3][1:3] == ("0.30 [0.26, 0.34], n = 24", "0.12 [0.08, 0.16], n = 24")

    def only_flips(audit: AuditSummary, i: int, run: Run) -> Estimates:
        return tuple(e for e in change(audit, i, run) if e.metric != "swap_gap")

    # Where no value is known to go with a class, decisions that change are all there is.
    known = rewritten(source, tmp_path / "c", only_flips)
    assert chart(known, "Does the decision hang on it?", "Decisions that change when gender is swapped").rows
    # A run without interventions is not asked.
    assert "Does the decision hang on it?" not in [q.title for q in draw(read_run(source))]


def heights(panel: str) -> dict[str, float]:
    """Where each line of a small chart ends, by hue."""
    lines = re.findall(r'<path d="([^"]*)" stroke="var\(--(\w+)\)"[^>]*stroke-width="1.75"', panel)
    return {hue: float(d.split(",")[-1]) for d, hue in lines}


def test_small_multiples_share_one_scale_and_show_for_whom(tmp_path: Path) -> None:
    def only_nurses(audit: AuditSummary, i: int, run: Run) -> Estimates:
        """Hair is looked at in one class, and in no other."""
        return tuple(
            replace(e, value=v, low=v - 0.1, high=v + 0.1) if e.metric == "enrichment" and e.region == "hair" else e
            for e in audit.estimates
            for v in [1 + (0.5 * i if e.class_name == "nurse" else 0.0)]
        )

    run = rewritten(make_run(tmp_path / "a", audits=5), tmp_path / "b", only_nurses)
    panels = question(run, "For whom?").panels
    assert question(replace(run, audits=run.audits[:1]), "For whom?").panels is None, "one audit is no time"
    assert panels is not None and [p.title for p in panels.panels] == ["doctor", "nurse", "female", "male"]
    ends = {p.title: heights(p.svg)["vermillion"] for p in panels.panels}
    assert ends["doctor"] == ends["female"] == ends["male"]
    # Pixels per unit are those of any panel: from 1 to 3.
    ticks = re.findall(r'translate\(-\d+,([\d.]+)\)"[^>]*>(\d)<', panels.panels[0].svg)
    per_unit = (float(ticks[0][0]) - float(ticks[1][0])) / (int(ticks[1][1]) - int(ticks[0][1]))
    assert ends["doctor"] - ends["nurse"] == pytest.approx(2 * per_unit, abs=3)
    axes = {re.sub(r'id="[^"]*"', "", "".join(re.findall(r"<text.*?</text>", p.svg))) for p in panels.panels}
    assert len(axes) == 1
    last = dict(zip(panels.columns, panels.rows[-1], strict=True))
    assert last["nurse, hair"] == "3.00 [2.90, 3.10], n = 12" and last["doctor, hair"].startswith("1.00 [")


def test_of_many_classes_those_with_most_are_drawn_and_the_rest_is_counted(tmp_path: Path) -> None:
    classes = tuple(f"class {i:02d}" for i in range(26))
    regions: Any = (("coat", "object"), ("hair", "spurious"))
    run = read_run(make_run(tmp_path / "a", audits=26, samples=52, classes=classes, regions=regions))
    panels = question(run, "For whom?").panels
    last = {
        (e.class_name or e.group or "").rpartition("=")[2]: e.value or 0.0
        for e in run.audits[-1].estimates
        if (e.metric, e.region, e.method) == ("enrichment", "hair", "gradcam") and bool(e.class_name) != bool(e.group)
    }
    assert len(last) == 28
    most = sorted(last, key=lambda name: -last[name])[:MOST_PANELS]
    assert panels is not None and [p.title for p in panels.panels] == [name for name in last if name in most]
    assert f"{MOST_PANELS} of 28 classes and groups" in panels.caption and len(panels.columns) == 1 + MOST_PANELS
    gaps = chart(run, "Does it matter?", "Accuracy gap by gender, within each class")
    assert len(gaps.columns) == 1 + MOST_COLUMNS and len(gaps.rows) == MOST_CELLS // MOST_COLUMNS == 25
    assert gaps.caption == (
        "6 of 26 series drawn. The table has 25 of 26 audits and 24 of 26 series; the records have all."
    )
    largest = max(run.audits[-1].estimate("accuracy_gap", class_name=c, group="gender").value for c in classes)
    assert gaps.rows[-1][1].startswith(f"{largest:.2f} [")


@pytest.mark.parametrize(("count", "expected"), [(3, [0, WIDTH / 2, WIDTH]), (1, [0.35 * WIDTH, 0.45 * WIDTH])])
def test_steps_far_from_0_fill_the_axis(tmp_path: Path, count: int, expected: list[float]) -> None:
    run = read_run(make_run(tmp_path / "a", audits=count))
    far = tuple(replace(audit, step=audit.step + 100_000) for audit in run.audits)
    drawn = chart(replace(run, audits=far), "Where does the model look, and since when?", "Grad-CAM")
    found = {x for x, _ in points(drawn, "vermillion") + points(drawn, "purple")}
    assert sorted(found) == pytest.approx(expected, abs=0.1)
    assert ">100.1k</text>" in drawn.svg and ">training step</text>" in drawn.svg


def test_the_maps_of_an_unfit_method_are_not_those_of_the_panels(biased: Run, tmp_path: Path) -> None:
    other = read_run(make_run(tmp_path / "run", audits=2, fitness={"gradcam": 0.9, "hirescam": 0.1}))
    titles = [question(run, "For whom?").panels.title for run in (biased, other)]  # type: ignore[union-attr]
    assert "(Grad-CAM)" in titles[0] and "(HiResCAM)" in titles[1]


def test_the_first_lines_answer_where_since_when_for_whom_and_whether_it_matters(biased: Run) -> None:
    said = dict(glance(biased))
    last = biased.audits[-1]
    assert said["Where"] == "Reliance on region hair, attribute gender"
    hair, gender = (next(o for o in onsets(biased.audits) if o.name == name) for name in ("hair", "gender"))
    assert (
        f"air since step {hair.since}" in said["Since when"]
        and f"ender since step {gender.since}" in (said["Since when"])
    )
    # A group that is right as often as others may be wrong where it matters: classes are told apart.
    groups = [e for e in last.estimates if e.metric == "accuracy" and e.group is not None]
    low = min(groups, key=lambda e: e.value)  # type: ignore[arg-type, return-value]
    assert low.class_name is not None and low.group == "gender=female" and len(groups) == 6
    assert said["For whom"].startswith(
        f"Accuracy is lowest for class {low.class_name} where gender=female: "
        f"{low.value:.2f} [{low.low:.2f}, {low.high:.2f}], {last.estimate('accuracy').value:.2f} over all; "
    )
    looked = max(
        (e for e in last.estimates if (e.metric, e.region, e.method) == ("enrichment", "hair", "gradcam")),
        key=lambda e: (e.class_name is not None and e.group is None, e.value),
    )
    assert f"hair is looked at most in class {looked.class_name}: {looked.value:.2f}" in said["For whom"]
    contrast = biased.audits[8].estimate("removal_contrast", region="hair", group="gender")
    assert f"What hair says of gender is {100 * contrast.value:.0f} % [" in said["Does it matter"]
    assert "(as at step 900)" in said["Does it matter"] and "ccuracy differs by gender by" in said["Does it matter"]


def test_what_is_unknown_is_said_as_unknown(clean: Run, tmp_path: Path) -> None:
    said = dict(glance(clean))
    assert {f.verdict for f in clean.audits[-1].judgement.findings} == {Verdict.CLEARED}
    assert said["Where"].startswith("No reliance is shown; cleared: region hair") and said["Since when"] == "–"
    assert said["Does it matter"] == "No reliance is shown to matter"
    bare = read_run(make_run(tmp_path / "bare", audits=1, attributes=(), hair_enrichment=4.0, spread=0.05))
    said = dict(glance(bare))
    assert said["Where"] == "Suspicion of region hair"
    assert said["Since when"] == "Unknown: step 100 is the only audit in training"
    assert said["For whom"].startswith("No accuracy by group was measured; hair is looked at most in class")
    assert said["Does it matter"].startswith("Unknown")
    assert glance(read_run(make_run(tmp_path / "reference", audits=0, reference=True))) == ()
    assert glance(read_run(make_run(tmp_path / "empty", audits=0))) == ()


def test_facts_say_whether_maps_are_fit_and_how_old_interventions_are(biased: Run, tmp_path: Path) -> None:
    known = dict(facts(biased))
    assert known["Explanations"] == "Grad-CAM fit, HiResCAM unfit (step 100)"
    assert known["Interventions"] == "of step 900, 1 audit ago"
    last = biased.audits[-1]
    swapped = replace(last, estimates=(*last.estimates, Estimate("swap_flips", 0.1, 0.0, 0.2, 9, None, None, "gender")))
    assert dict(facts(replace(biased, audits=(swapped,))))["Interventions"] == "made at this audit"
    fresh = dict(facts(read_run(make_run(tmp_path / "fresh", audits=2, removal={"hair": 0.1}))))
    assert fresh["Interventions"] == "made at this audit" and fresh["Explanations"] == "fitness not tested"
    assert dict(facts(read_run(make_run(tmp_path / "none", audits=2))))["Interventions"] == "none made"


def with_association(root: Path, share: Sequence[float], **options: Any) -> Run:
    """A run whose training data hold that share of women in each class, as the tool itself measures it."""
    labels = np.repeat([0, 1], 100)
    women = np.concatenate([np.arange(100) < 100 * s for s in share])
    training = Metadata.of(labels.tolist(), {"gender": np.where(women, "female", "male").tolist()})

    def change(audit: AuditSummary, i: int, run: Run) -> Estimates:
        sheet, subjects = run.sheet(), run.manifest.subjects
        names = tuple(name for name, _ in subjects.attributes)
        audited = Metadata(sheet.labels, sheet.attributes, names)
        return (
            *audit.estimates,
            *association(training, subjects, seed=0),
            *association(audited, subjects, seed=0, audited=True),
            Estimate("bias_amplification", -0.04, -0.1, 0.02, 24, group="gender"),
        )

    return rewritten(make_run(root / "a", audits=1, **options), root / "b", change)


def test_heat_tables_hold_the_association_of_class_and_value(tmp_path: Path) -> None:
    run = with_association(tmp_path / "tied", (0.2, 0.9))
    training, audited = association_tables(run)
    assert (training.title, audited.title) == ("gender in the training data", "gender in the audited images")
    assert training.columns == ("female", "male") and [name for name, _ in training.rows] == ["doctor", "nurse"]
    share = {"doctor": {"female": 0.1, "male": 0.4}, "nurse": {"female": 0.45, "male": 0.05}}
    of_value = {value: sum(share[c][value] for c in share) for value in ("female", "male")}
    for name, cells in training.rows:
        for value, cell in zip(training.columns, cells, strict=True):
            both = share[name][value]
            npmi = math.log(both / (0.5 * of_value[value])) / -math.log(both)
            assert cell.value == f"{npmi:+.2f}".replace("-", "−")
            assert cell.side == ("together" if npmi > 0 else "apart") and cell.weight == round(50 * abs(npmi))
            assert cell.interval.startswith("[") and cell.note == ""
    v = run.audits[-1].estimate("cramers_v", group="gender")
    assert f"Cramér’s V {v.value:.2f} [{v.low:.2f}, {v.high:.2f}], n = 200" in training.captions[0]
    assert training.captions[1:] == (
        "The predictions lean further than the labels by −0.04 [−0.10, +0.02] (bias amplification).",
    )
    # The audited images are as many of each kind, and hold no association.
    sheet = run.sheet()
    for c, (_, cells) in enumerate(audited.rows):
        for value, cell in zip(audited.columns, cells, strict=True):
            count = int(((sheet.labels == c) & (sheet.attributes[:, 0] == value)).sum())
            assert cell.note == f"{count} images" and cell.weight <= 3
    assert association_tables(read_run(make_run(tmp_path / "never"))) == ()


def test_an_unknown_association_gives_its_reason(tmp_path: Path) -> None:
    training, _ = association_tables(with_association(tmp_path / "one", (1.0, 1.0)))
    assert training.captions[:1] == ("Cramér’s V is unknown: gender has one value only in the training data.",)
    cells = dict(training.rows)["doctor"]
    assert cells[1].value == "unknown" and "no sample where gender=male" in cells[1].note


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_on_the_strongest_background_is_legible(
    tmp_path: Path, open_page: Callable[..., Page], scheme: str
) -> None:
    run = with_association(tmp_path, (0.0, 1.0))
    write_report(run.path)
    page = open_page(run.path, color_scheme=scheme)
    cells = page.locator(".heat td.together, .heat td.apart")
    assert cells.count() >= 4
    contrasts = cells.evaluate_all(
        """cells => cells.map(cell => {
            const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
            const light = color => {
                canvas.fillStyle = color;
                canvas.fillRect(0, 0, 1, 1);
                const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3)
                    .map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            const style = getComputedStyle(cell);
            const [a, b] = [light(style.color), light(style.backgroundColor)].sort((x, y) => y - x);
            return (a + 0.05) / (b + 0.05);
        })"""
    )
    assert min(contrasts) >= 4.5
    backgrounds = cells.evaluate_all("cells => [...new Set(cells.map(c => getComputedStyle(c).backgroundColor))]")
    assert len(backgrounds) > 1


def watermarked(scores: SampleScores) -> SampleScores:
    """A third of class 0 is looked at in a corner only, and always wrong."""
    maps = scores.maps.copy()
    marked = (scores.labels == 0) & (np.arange(len(scores.labels)) % 6 == 0)
    maps[:, marked] *= 0.1
    maps[:, marked, :2, :2] = 1
    return replace(scores, maps=maps, predictions=np.where(marked, 1, scores.labels))


@pytest.fixture(scope="module")
def clustered(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("clustered")
    source = make_run(root / "a", audits=1, samples=120, silent=0)
    return rewritten(source, root / "b", lambda audit, i, run: audit.estimates, watermarked)


def test_a_watermark_stands_apart_and_a_clean_class_does_not(clustered: Run) -> None:
    found = grouped(clustered)
    assert found is not None and (found.method, found.step) == ("Grad-CAM", 100)
    doctor, nurse = found.classes
    assert (doctor.name, nurse.name) == ("doctor", "nurse")
    assert [c.size for c in doctor.clusters] == [40, 20] and [c.size for c in nurse.clusters] == [60]
    assert "one cluster: no group of them stands apart" in nurse.about
    rest, marked = doctor.clusters
    assert marked.departure.startswith("correct 0 % here, 100 % elsewhere") and marked.accuracy.startswith("0.00 [")
    places = [len(re.findall(rf'translate[^>]*fill="var\(--{c.hue}\)"', doctor.points)) for c in doctor.clusters]
    assert places == [40, 20]
    picture = Image.open(io.BytesIO(base64.b64decode(marked.mean_map.partition(",")[2]))).convert("L")
    levels = np.asarray(picture, dtype=float)
    assert levels.shape == (8, 8) and levels[:2, :2].min() > 200 > 3 * levels[3:, 3:].max()
    # The marked images' smoothed maps, and which of them lie nearest to their mean.
    maps = clustered.scores(0).maps[0, ::6].astype(float)
    smooth = gaussian_filter(maps / maps.sum((1, 2), keepdims=True), (0, 8 / 14, 8 / 14), mode="nearest").reshape(
        20, -1
    )
    smooth /= np.linalg.norm(smooth, axis=1, keepdims=True)
    order = np.argsort(np.linalg.norm(smooth - smooth.mean(0), axis=1))
    assert [name for name, _ in marked.nearest] == [f"portrait-{6 * i:03d}" for i in order[:3]]
    for _, picture in (*marked.nearest, *rest.nearest):
        assert max(Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))).size) <= 72


def test_without_thumbnails_clusters_disclose_no_picture(clustered: Run, tmp_path: Path) -> None:
    found = grouped(clustered, thumbnails=False)
    assert found is not None
    assert {picture for card in found.classes for c in card.clusters for _, picture in c.nearest} == {""}
    page = render(clustered, thumbnails=False)
    assert not re.search(r"image/jpeg;base64,[\w/]", page) and page.count("data:image/png;base64,") == 3
    assert len(re.findall(r"image/jpeg;base64,[\w/]", render(clustered))) == 9


def test_clusters_are_bounded_and_say_so(
    clustered: Run, biased: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert FEWEST_IMAGES == FEWEST
    few = grouped(biased)
    assert few is not None and few.classes == () and few.notes == ("Not clustered: no class has 40 images.",)
    monkeypatch.setattr(groups, "MOST_SAMPLES", 100)
    many = grouped(clustered)
    assert many is not None and many.classes == () and "120 images are more than the 100" in many.notes[0]
    monkeypatch.undo()
    monkeypatch.setattr(groups, "MOST_CLUSTERS", 1)
    cut = grouped(clustered)
    assert cut is not None and [len(card.clusters) for card in cut.classes] == [1]
    assert "2 clusters, 1 of them shown" in cut.classes[0].about and cut.notes[0].startswith("1 more class")
    monkeypatch.undo()
    signed = rewritten(
        clustered.path,
        tmp_path / "signed",
        lambda audit, i, run: audit.estimates,
        lambda scores: replace(scores, maps=-scores.maps),
    )
    refused = grouped(signed)
    assert refused is not None and refused.classes == () and "use another sign" in refused.notes[0]
    assert grouped(read_run(make_run(tmp_path / "empty", audits=0))) is None


def generators() -> tuple[object, ...]:
    state = np.random.get_state()  # noqa: NPY002
    return random.getstate(), state[1].tolist(), state[2], torch.get_rng_state().tolist()


def test_pages_are_drawn_on_other_threads_without_touching_what_training_uses(clustered: Run, biased: Run) -> None:
    alone = {run.path: render(run) for run in (clustered, biased)}
    before = generators()
    found: dict[Path, list[str]] = {run.path: [] for run in (clustered, biased)}
    threads = [
        threading.Thread(target=lambda run=run: found[run.path].extend(render(run) for _ in range(2)))
        for run in (clustered, biased)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {path: set(pages) for path, pages in found.items()} == {path: {page} for path, page in alone.items()}
    assert generators() == before


def test_clusters_take_one_core_and_leave_other_threads_theirs(clustered: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def cores() -> set[int]:
        return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "openmp"}

    inside, go_on = threading.Event(), threading.Event()
    seen: list[set[int]] = []

    def watched(run: Run) -> clusters.RunClusters:
        seen.append(cores())
        inside.set()
        go_on.wait(30)
        return run_clusters(run)

    run_clusters = clusters.run_clusters
    monkeypatch.setattr(clusters, "run_clusters", watched)

    def work() -> None:
        with threadpool_limits(3, user_api="openmp"):
            grouped(clustered)
            seen.append(cores())

    with threadpool_limits(2, user_api="openmp"):
        thread = threading.Thread(target=work)
        thread.start()
        inside.wait(30)
        assert cores() == {2}
        go_on.set()
        thread.join()
    assert seen == [{1}, {3}]


def test_a_page_with_clusters_needs_no_torch_and_one_without_no_sklearn(clustered: Run, biased: Run) -> None:
    code = (
        "import sys\nfrom bias_audit.report.page import render\nfrom bias_audit.records.runs import read_run\n"
        "page = render(read_run(sys.argv[1]))\nprint('torch' in sys.modules, 'sklearn' in sys.modules)"
    )
    runs = {clustered.path: "False True", biased.path: "False False"}
    for path, expected in runs.items():
        done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected


def test_hostile_and_long_names_stay_text_and_fit(tmp_path: Path, open_page: Callable[..., Page]) -> None:
    long, lines = "long " + "x" * 295, "two\nlines, [red]{0} 'q' \""
    regions: Any = ((lines, "object"), (HOSTILE, "spurious"), (long, "spurious"))
    subjects: dict[str, Any] = {
        "regions": regions,
        "attributes": ((HOSTILE, (long, lines)),),
        "classes": (long, HOSTILE),
    }
    removal = {HOSTILE: 0.5, long: 0.4}
    enrichment = {HOSTILE: 3.0, long: 2.5}
    options: dict[str, Any] = {"samples": 96, "audits": 6, "removal": removal, "enrichment": enrichment}
    source = make_run(tmp_path / "a", **options, shows=(HOSTILE,), **subjects)

    def change(audit: AuditSummary, i: int, run: Run) -> Estimates:
        sheet = run.sheet()
        return (
            *audit.estimates,
            *association(Metadata(sheet.labels, sheet.attributes, (HOSTILE,)), run.manifest.subjects, seed=0),
        )

    run = rewritten(source, tmp_path / "b", change)
    write_report(run.path)
    page = open_page(run.path)
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator("script").count() == 2 and page.locator(".clustered").count() == 2
    assert f"region {HOSTILE}" in page.locator(".glance").inner_text()
    assert page.locator(".heat thead th").all_text_contents()[1] == long
    assert set(page.locator(".panels li p").all_text_contents()) == {long, HOSTILE, lines}
    marks = page.locator(".plot text").all_text_contents()
    assert any(text.startswith(f"reliance on {HOSTILE}") for text in marks)


def test_a_page_shows_every_part_at_either_width_and_theme(
    clustered: Run, tmp_path: Path, open_page: Callable[..., Page]
) -> None:
    run = with_association(tmp_path, (0.2, 0.9), samples=96, removal={"hair": 0.4})
    write_report(run.path)
    page = open_page(run.path)
    headings = page.locator("h2, h3").all_text_contents()
    for title in ("Does the decision hang on it?", "Do attributes and labels go together in the data?"):
        assert title in headings
    assert "Are there cues that nobody annotated?" in headings
    # The first screen answers.
    box = page.locator(".glance").bounding_box()
    assert box is not None and box["y"] + box["height"] < 900
    assert page.locator(".clustered img").evaluate_all("all => all.every(i => i.complete && i.naturalWidth > 0)")


def test_charts_and_tables_of_a_long_run_stay_small(tmp_path: Path) -> None:
    options: dict[str, Any] = {"fitness": {"gradcam": 0.1}, "removal": {"hair": 0.4, "face": 0.0}, "shows": ("hair",)}
    run = read_run(make_run(tmp_path / "run", audits=50, samples=24, association=0.6, **options))
    page = render(run)
    section = re.search(r'<section aria-labelledby="time-title">.*?</section>', page, re.DOTALL)
    assert section is not None and len(section[0].encode()) < 700_000
    assert unescape(section[0]).count('class="plot"') == 2 + 3 + 4 + 2 + 4 + 2
    assert method_name("gradcam") in section[0]
