"""Two runs side by side: a change that was planted is found, one that was not is not, and the page is safe to open."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser
from synthetic import made_once

from bias_audit.cli import main
from bias_audit.evidence.proportions import paired_difference
from bias_audit.gate.compare import Comparison, Difference, compare_runs
from bias_audit.overlays import overlay
from bias_audit.policies.policy import Policy
from bias_audit.records.results import AuditResult
from bias_audit.records.runs import Run, read_run
from bias_audit.records.writing import RunDirectory
from bias_audit.report.compare import MOST_IMAGES, render_comparison

HOSTILE = "<script>alert(1)</script>"
CLEAN: dict[str, Any] = {"hair_enrichment": 0.75, "gap": 0.02, "spread": 0.02, "run_id": "clean"}
COMMAND = str(Path(sys.executable).with_name("bias-audit"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    return made_once(tmp_path_factory.mktemp)


def of(found: Comparison, metric: str, **names: str | None) -> Difference:
    wanted = {"region": None, "class_name": None, "group": None, "method": None} | names
    (one,) = (
        d
        for d in found.differences
        if d.before.metric == metric and all(getattr(d.before, name) == value for name, value in wanted.items())
    )
    return one


def test_a_planted_change_is_found_and_nothing_else(run: Callable[..., Run]) -> None:
    found = compare_runs(run(removal={"hair": 0.6, "face": 0.0}), run(removal={"hair": 0.0, "face": 0.0}, **CLEAN))
    said = {v.name: (v.before and v.before.verdict, v.after and v.after.verdict, v.changed) for v in found.verdicts}
    assert said["hair"] == ("reliance", "cleared", True) and said["face"] == ("cleared", "cleared", False)
    hair = of(found, "enrichment", region="hair", method="gradcam")
    assert hair.state == "changed" and hair.change.direction == "down" and hair.pairs == 59
    flips = of(found, "removal_flips", region="hair")
    assert flips.state == "changed" and flips.pairs == 60
    assert of(found, "accuracy_gap", group="gender").state == "changed"
    assert of(found, "accuracy").state == "open"
    assert "Both runs audited the same 60 images." in found.notes
    assert str(found).startswith(f"Of {found.tested} differences {len(found.of('changed'))} stand after Holm's")


def test_nothing_changes_from_a_run_to_itself(run: Callable[..., Run]) -> None:
    found = compare_runs(run(), run())
    assert not any(v.changed for v in found.verdicts) and not found.of("changed") and not found.of("uncertain")
    assert all(d.change.value == 0 for d in found.differences)
    assert "none stands" in str(found)
    # That no image changed sides does not make it certain that none ever would.
    accuracy = of(found, "accuracy").change
    assert accuracy.low is not None and accuracy.high is not None and accuracy.low < -0.01 < 0.01 < accuracy.high


@pytest.mark.parametrize("class_name", [None, "nurse"])
@pytest.mark.parametrize("group", [None, "gender=female"])
def test_paired_differences_recomputed(class_name: str | None, group: str | None, run: Callable[..., Run]) -> None:
    a, b = run(), run(**CLEAN)
    found = of(compare_runs(a, b), "enrichment", region="hair", class_name=class_name, group=group, method="hirescam")
    first, second, sheet = a.scores(0), b.scores(0), a.sheet()
    classes = [("doctor", "nurse")[label] for label in sheet.labels]
    groups = [f"gender={value}" for value in sheet.attributes[:, 0]]
    members = [i for i in range(60) if class_name in (None, classes[i]) and group in (None, groups[i])]
    share = [s.of("energy_share", "hirescam", "hair").astype(float) for s in (first, second)]
    valid = [i for i in members if np.isfinite(share[0][i] + share[1][i])]
    area = first.areas[:, first.regions.index("hair")].astype(float)
    rise, area = (share[1] - share[0])[valid], area[valid]
    assert found.pairs == len(valid) and found.change.value == pytest.approx(rise.sum() / area.sum(), abs=1e-6)
    kinds = [f"{sheet.labels[i]}{sheet.attributes[i, 0] if group else ''}" for i in valid]
    rng, strata = np.random.default_rng(1), [np.flatnonzero(np.array(kinds) == kind) for kind in set(kinds)]
    draws = []
    for _ in range(2000):
        drawn = np.concatenate([rng.choice(stratum, len(stratum)) for stratum in strata])
        draws.append(rise[drawn].sum() / area[drawn].sum())
    low, high = np.percentile(draws, [2.5, 97.5])
    assert found.change.low is not None and found.change.high is not None
    # The audit's intervals are expanded for few images, so never much narrower than the plain percentile's.
    width = found.change.high - found.change.low
    assert 0.97 < width / (high - low) < 1.3
    assert abs(found.change.low + found.change.high - low - high) / 2 < 0.15 * width


def test_pairing_narrows_what_all_images_share(run: Callable[..., Run]) -> None:
    """Two runs whose scores differ by a constant for each class, on images that differ a lot."""
    a = run(silent=0)
    scores = a.scores(0)
    values = scores.values.copy()
    values[scores.metrics.index("energy_share")] += np.where(scores.labels == 1, 0.03, 0.01)[:, None]
    b = recorded(a, run(run_id="shifted"), scores=replace(scores, values=values))
    found = of(compare_runs(a, b), "energy_share", region="face", method="gradcam")
    assert found.change.value == pytest.approx(0.02, abs=1e-6) and found.state == "changed"
    # Resampling keeps how many there are of each class, so that what is constant within a class does not vary.
    assert found.change.low == pytest.approx(0.02, abs=1e-6) == found.change.high
    elsewhere = compare_runs(a, run(seed=3, differing={"fingerprint": "other"}))
    other = of(elsewhere, "energy_share", region="face", method="gradcam")
    assert other.pairs is None and other.state == "open"


def recorded(like: Run, into: Run, **changes: Any) -> Run:
    """`like` recorded anew beside `into`, its last audit with changes."""
    path = into.path.with_name("recorded")
    directory = RunDirectory.create(path, like.manifest, like.sheet())
    for i, audit in enumerate(like.audits):
        last = i == len(like.audits) - 1
        directory.append(AuditResult(**vars(audit) | {"scores": like.scores(i)} | (changes if last else {})))
    directory.end()
    return read_run(path)


def test_an_intervention_is_paired_where_it_was_measured(run: Callable[..., Run], tmp_path: Path) -> None:
    """The last audit of B rests on the interventions of the one before."""
    a, b = run(removal={"hair": 0.6}), run(removal={"hair": 0.2}, run_id="b", audits=2)
    directory = RunDirectory.create(tmp_path / "b", b.manifest, b.sheet())
    for i, audit in enumerate(b.audits):
        directory.append(AuditResult(**vars(audit), scores=b.scores(i)))
    older = tuple(replace(e, age=1) if e.metric.startswith("removal") else e for e in b.audits[-1].estimates)
    bare = replace(b.scores(1), effect_metrics=(), effects=np.empty((0, 0, 0), np.float32))
    directory.append(AuditResult(**vars(b.audits[-1]) | {"estimates": older}, scores=bare))
    flips = of(compare_runs(a, read_run(tmp_path / "b")), "removal_flips", region="hair")
    hair = a.scores(0).regions.index("hair")
    rows = [s.effects[s.effect_metrics.index("removal_flips"), :, hair] for s in (a.scores(0), b.scores(1))]
    assert flips.pairs == 60 and flips.change.value == pytest.approx(float(rows[1].mean() - rows[0].mean()))


def test_accuracy_counts_the_images_that_changed_sides(run: Callable[..., Run]) -> None:
    a, b = run(), run(seed=4)  # other predictions on the same labels
    found = of(compare_runs(a, b), "accuracy", class_name="nurse").change
    right = [r.scores(0).correct[r.sheet().labels == 1] for r in (a, b)]
    gained, lost = int((right[1] & ~right[0]).sum()), int((right[0] & ~right[1]).sum())
    assert gained and lost
    assert (found.value, found.low, found.high) == paired_difference(gained, lost, 30)


def test_the_paired_interval_covers_what_it_promises() -> None:
    rng, covered = np.random.default_rng(0), []
    for n, up, down in ((20, 0.1, 0.05), (60, 0.3, 0.1), (200, 0.02, 0.02), (100, 0.0, 0.0)):
        drawn = rng.multinomial(n, [up, down, 1 - up - down], size=1500)
        found = np.array([paired_difference(int(g), int(x), n) for g, x, _ in drawn])
        assert (found[:, 1] <= found[:, 0]).all() and (found[:, 0] <= found[:, 2]).all()
        assert (found[:, 1] >= -1).all() and (found[:, 2] <= 1).all()
        covered.append(float(((found[:, 1] <= up - down) & (up - down <= found[:, 2])).mean()))
    assert min(covered) > 0.94


@pytest.mark.parametrize(
    ("options", "shared", "paired"),
    [
        ({"ids": [f"portrait-{i:03d}" if i < 40 else f"new-{i}" for i in range(60)]}, 40, True),
        # Too few of the images are the same for the comparison to rest on them.
        ({"ids": [f"portrait-{i:03d}" if i < 20 else f"new-{i}" for i in range(60)]}, 20, False),
        # The same names, other pictures.
        ({"seed": 9}, 0, False),
        ({"classes": ("nurse", "doctor")}, 0, False),
        # Outlines are the same whatever is within them.
        ({"differing": {"fingerprint": "other", "thumbnails": False}}, 0, False),
    ],
)
def test_which_images_are_the_same(options: dict[str, Any], shared: int, paired: bool, run: Callable[..., Run]) -> None:
    found = compare_runs(run(), run(**{"differing": {"fingerprint": "other"}} | options))
    assert len(found.shared) == shared
    # One heatmap is silent, which may be one of those that are shared.
    d = of(found, "energy_share", region="hair", method="gradcam")
    assert (d.pairs is not None and shared - 2 <= d.pairs <= shared) if paired else d.pairs is None
    none = "no image is the same in both" if "differing" not in options else "which images are the same is not known"
    told = f"{shared} images are the same in both" if shared else none
    assert told in " ".join(found.notes)
    if not paired:
        # Root of the sum of squares of the two intervals' sides.
        assert d.change.value is not None and d.change.low is not None
        assert d.before.value is not None and d.before.high is not None and d.after.value is not None
        assert d.after.low is not None
        assert d.change.value == pytest.approx(d.after.value - d.before.value)
        side = np.hypot(d.after.value - d.after.low, d.before.high - d.before.value)
        assert d.change.value - d.change.low == pytest.approx(side)


@pytest.mark.parametrize("field", ["layer", "target", "sign"])
def test_maps_that_explain_something_else_are_not_compared(field: str, run: Callable[..., Run]) -> None:
    found = compare_runs(run(), run(differing={field: "other"}))
    assert {d.before.metric for d in found.differences} == {"accuracy", "accuracy_gap", "worst_group_accuracy"}
    assert any(n.startswith(f"The {field} differs: ") and n.endswith("Heatmaps are not compared.") for n in found.notes)
    page = render_comparison(found)
    assert "do not explain the same thing" in page and "Heatmap of A" not in page


def test_what_only_one_run_has_is_said(run: Callable[..., Run]) -> None:
    a = run(association=0.5, regions=(("coat", "object"), ("hair", "spurious"), ("[hat]", "spurious")))
    regions = (("coat", "object"), ("hair", "context"))
    b = run(regions=regions, differing={"model": "Other"}, policy=Policy(), failed="no disk")
    notes = " ".join(compare_runs(a, b).notes)
    for words in (
        "Only A has the region hair (spurious), [hat] (spurious).",
        "Only B has the region hair (context).",
        "The model differs: ResNet-18 on portraits in A, Other in B.",
        "The policies differ",
        "B: the audit at step 200 failed: no disk.",
        "estimates are in A only, and not compared: enrichment, energy share",
    ):
        assert words in notes
    (hat,) = (v for v in compare_runs(a, b).verdicts if v.name == "[hat]")
    assert hat.after is None and hat.before is not None and not hat.changed


def test_what_was_not_measured_is_said_to_be_unknown(run: Callable[..., Run]) -> None:
    options: dict[str, Any] = {"samples": 3, "classes": ("a", "b", "c", "d"), "silent": 0}
    found = compare_runs(run(**options), run(**options))
    unknown = found.of("unknown")
    assert unknown and all(d.change.value is None and "no such image" in d.change.reason for d in unknown)
    page = re.sub(r"\s+", " ", render_comparison(found))
    assert "A: accuracy for class d: not measured (no such image)" in page


def test_few_images_never_count_as_changed(run: Callable[..., Run]) -> None:
    demanding = Policy(min_samples=1000)
    found = compare_runs(run(), run(policy=demanding, **CLEAN))
    assert found.tested == 0 and not found.of("changed") and not found.of("uncertain")
    assert sum(d.change.direction in ("up", "down") for d in found.of("open")) > 10
    assert str(found).startswith("No difference rests on as many images")


@pytest.mark.parametrize("options", [{"audits": 0}, {"audits": 0, "reference": True}])
def test_a_run_without_an_audit_is_refused(options: dict[str, Any], run: Callable[..., Run]) -> None:
    with pytest.raises(ValueError, match="no audit of a trained model was recorded"):
        compare_runs(run(), run(**options))


def test_the_model_before_training_is_not_what_is_compared(run: Callable[..., Run]) -> None:
    found = compare_runs(run(reference=True), run())
    assert found.a.index == 1 and of(found, "energy_share", region="hair", method="gradcam").pairs is not None


def test_the_command_says_what_changed(run: Callable[..., Run], tmp_path: Path) -> None:
    removal = {"hair": 0.0, "face": 0.0}
    a, b = run(removal=removal | {"hair": 0.6}).path, run(removal=removal, **CLEAN).path
    out = tmp_path / "compare.html"
    done = subprocess.run(
        [COMMAND, "compare", str(a), str(b), "--out", str(out)], capture_output=True, encoding="utf-8", check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    words = " ".join(done.stdout.replace("│", " ").split())
    assert "region hair reliance → cleared" in words and "region face cleared cleared" in words
    rows = [line for line in done.stdout.splitlines() if "enrichment on hair (gradcam)" in line]
    assert len(rows) == 1 and "changed" in rows[0] and " 59 " in rows[0]
    # What changed comes first, of the verdicts and of the numbers.
    assert words.index("attribute gender reliance → ") < words.index("region face cleared cleared")
    states = re.findall(r"(changed|uncertain|open|unknown) +│$", done.stdout, re.MULTILINE)
    ranks = [("changed", "uncertain", "open", "unknown").index(state) for state in states]
    assert ranks == sorted(ranks) and len(set(ranks)) > 1
    assert done.stdout.rstrip().endswith(str(out)) and out.read_text().startswith("<!doctype html>")
    # Beside run B, unless another place is named; worse is no error, for this is no gate.
    again = subprocess.run([COMMAND, "compare", str(b), str(a)], capture_output=True, encoding="utf-8", check=False)
    assert again.returncode == 0 and "region hair cleared → reliance" in " ".join(
        again.stdout.replace("│", " ").split()
    )
    assert (a / "compare.html").exists()
    missing = subprocess.run([COMMAND, "compare", str(a), str(tmp_path)], capture_output=True, text=True, check=False)
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1 and str(tmp_path) in missing.stderr


def test_comparing_needs_no_torch(run: Callable[..., Run], tmp_path: Path) -> None:
    script = (
        "import random, sys, numpy\nfrom bias_audit.cli import main\n"
        "before = random.getstate(), str(numpy.random.get_state())\n"
        "try: main()\nexcept SystemExit as e: assert e.code == 0, e\n"
        "heavy = {'torch', 'lightning', 'pytorch_lightning', 'wandb', 'matplotlib', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert before == (random.getstate(), str(numpy.random.get_state())), 'global generators were drawn from'"
    )
    arguments = ["compare", str(run().path), str(run().path), "--out", str(tmp_path / "compare.html")]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_names_are_printed_as_they_are(
    run: Callable[..., Run], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = run(
        regions=(("[red]", "spurious"), ("\x1b[31mhair\x07", "spurious"), ("a\nb", "object")),
        attributes=(("[/]", ("x", "y")),),
        differing={"model": "[bold]\x1b]0;title\x07"},
    )
    monkeypatch.setattr(sys, "argv", ["bias-audit", "compare", *[str(hostile.path)] * 2, "--out", str(tmp_path / "c")])
    with pytest.raises(SystemExit) as exit_:
        main()
    printed = capsys.readouterr().out
    assert exit_.value.code == 0 and "\x1b" not in printed and "\x07" not in printed
    assert "region [red]" in printed and "attribute [/]" in printed and "enrichment on a b (gradcam)" in printed
    assert "[bold]" in printed


# The page


def test_the_page_shows_what_changed(run: Callable[..., Run], browser: Browser, tmp_path: Path) -> None:
    long = "x" * 300
    options: dict[str, Any] = {
        "ids": [HOSTILE, f'"><img src=x onerror=alert(1)>{long}', *(f"portrait-{i:03d}" for i in range(58))],
        "regions": (("coat", "object"), ("hair", "spurious"), (HOSTILE + long, "spurious")),
        "classes": (HOSTILE, "nurse"),
        "removal": {"hair": 0.4, HOSTILE + long: 0.0},
        "association": 0.6,
        "fitness": {"gradcam": 0.2},
        "attributes": (("gender", ("<b>female</b>", "male")),),
    }
    found = compare_runs(
        run(**options, differing={"model": HOSTILE}),
        run(**options | CLEAN | {"removal": {"hair": 0.0, HOSTILE + long: 0.0}}),
    )
    (tmp_path / "compare.html").write_text(render_comparison(found), encoding="utf-8")
    assert (tmp_path / "compare.html").stat().st_size < 1_500_000
    for width, scheme in ((1280, "light"), (390, "dark")):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page = context.new_page()
        complaints: list[str] = []
        requests: list[str] = []
        page.on("console", lambda message, to=complaints: to.append(message.text))
        page.on("dialog", lambda dialog, to=complaints: (to.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request, to=requests: to.append(request.url))
        page.goto((tmp_path / "compare.html").as_uri())
        assert complaints == [] and [url for url in requests if not url.startswith("data:")] == [page.url]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("script, [onerror], img:not([src^='data:'])").count() == 0
        if width == 1280:
            check_content(page.inner_text("main"), page, found)
        context.close()


def check_content(text: str, page: Any, found: Comparison) -> None:
    assert str(found) in text and HOSTILE in text
    rows = page.locator(".verdicts tbody tr").all_inner_texts()
    assert "hair" in rows[0] and "Reliance" in rows[0] and "Cleared" in rows[0] and "→" in rows[0]
    # Of each leading number one line with two marks and their intervals, the same in text beside it.
    figures = page.locator(".question")
    assert figures.count() == 4
    listed = figures.nth(0).locator("tbody tr")
    assert listed.count() == 6
    assert (
        page.evaluate("document.querySelector('.question svg').querySelectorAll('path[fill-opacity], path').length")
        >= 12
    )
    words = " ".join(figures.nth(0).locator("text").all_text_contents())
    assert "hair (gradcam)" in words and "enrichment (× share of area)" in words
    for name, box in page.evaluate(
        """() => [...document.querySelectorAll(".question svg text")].map(t => {
            const [own, whole] = [t.getBoundingClientRect(), t.ownerSVGElement.getBoundingClientRect()];
            return [t.textContent, own.left >= whole.left - 1 && own.right <= whole.right + 1];
        })"""
    ):
        assert box, f"{name} is cut off"
    pairs = page.locator(".pair")
    assert pairs.count() == MOST_IMAGES
    moved = [
        abs(float(match[1].replace("−", "-")))
        for words in pairs.all_inner_texts()
        if (match := re.search(r"([+−]\d\.\d\d) on", words))
    ]
    assert len(moved) == MOST_IMAGES and moved == sorted(moved, reverse=True)
    assert page.locator(".pair img").count() == 2 * MOST_IMAGES


def test_the_pictures_are_of_the_image_that_moved_most(run: Callable[..., Run]) -> None:
    a, b = run(), run(**CLEAN)
    page = render_comparison(compare_runs(a, b))
    shares = [
        np.stack([r.scores(0).of("energy_share", "gradcam", region) for region in ("hair", "face")])
        for r in (a, b)
    ]  # fmt: skip
    moved = np.nan_to_num(np.abs(shares[1] - shares[0])).max(axis=0)
    first = int(moved.argmax())
    assert re.search(r'<b title="([^"]*)"', page)[1] == a.sheet().ids[first]  # type: ignore[index]
    shown = [base64.b64decode(text) for text in re.findall(r"data:image/jpeg;base64,([^\"]+)", page)[:2]]
    for content, r in zip(shown, (a, b), strict=True):
        picture = Image.open(io.BytesIO(r.sheet().thumbnails[first])).convert("RGB")
        wanted = overlay(picture, r.scores(0).maps[0, first].astype(np.float32))
        got = np.asarray(Image.open(io.BytesIO(content)), dtype=float)
        wanted.thumbnail(got.shape[1::-1])
        assert np.abs(got - np.asarray(wanted, dtype=float)).mean() < 4
    both = [np.asarray(Image.open(io.BytesIO(content)), dtype=float) for content in shown]
    assert np.abs(both[0] - both[1]).mean() > 6


def test_runs_that_share_no_image_have_none_side_by_side(run: Callable[..., Run]) -> None:
    page = render_comparison(compare_runs(run(), run(seed=9, differing={"fingerprint": "other"})))
    assert "No image is known to be the same in both runs." in page and "<img" not in page
