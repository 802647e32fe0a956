"""Which images are chosen to be annotated first: even over the cells, and where heatmaps lie in no region."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import CLASSES, CORNER, CORNERS, SIDE, Planted, biased, clean
from synthetic import make_run

from bias_audit import AuditDataset, AuditPlan, AuditSample, audit_model
from bias_audit.cli import main
from bias_audit.data.tables import Row
from bias_audit.records.runs import read_run
from bias_audit.regions.choose import BALANCE, choose
from bias_audit.regions.leads import Lead, unexplained

PLAN = AuditPlan(methods=("gradcam",), fitness_samples=0, intervention_samples=0)
PER_CLASS = 60


def table(*sizes: int) -> list[Row]:
    """Rows of cells of these sizes, mixed."""
    rows = [
        Row(
            where="",
            file=f"{cell}-{i}.jpg",
            label="doctor" if cell % 2 else "nurse",
            attributes={"ward": f"{cell:02d}"},
        )
        for cell, size in enumerate(sizes)
        for i in range(size)
    ]
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]


def level(had: list[int], left: list[int], count: int) -> list[int]:
    """What each cell gets at the highest whole level that `count` fills everywhere, poured like water."""
    height = 0
    while sum(min(n, max(0, height + 1 - h)) for h, n in zip(had, left, strict=True)) <= count and height < 500:
        height += 1
    return [min(n, max(0, height - h)) for h, n in zip(had, left, strict=True)]


@settings(max_examples=60, deadline=None)
@given(
    cells=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6),
    count=st.integers(1, 60),
)
def test_shares_are_as_even_as_the_cells_allow(cells: list[tuple[int, int]], count: int) -> None:
    cells = [(had, left) for had, left in cells if had + left] or [(0, 1)]
    rows = table(*(had + left for had, left in cells))
    done = {f"{cell}-{i}.jpg" for cell, (had, _) in enumerate(cells) for i in range(had)}
    if len(done) == len(rows):
        with pytest.raises(ValueError, match="none of"):
            choose(rows, count, annotated=done)
        return
    found = choose(rows, count, annotated=done)
    chosen = {cell.values[0]: cell.chosen for cell in found.cells}
    shares = [chosen[f"{i:02d}"] for i in range(len(cells))]
    floor = level([had for had, _ in cells], [left for _, left in cells], count)
    assert sum(shares) == len(found.picked) == min(count, len(rows) - len(done))
    assert all(low <= share <= low + 1 for low, share in zip(floor, shares, strict=True))
    files = [choice.row.file for choice in found.picked]
    assert len(set(files)) == len(files) and not set(files) & done


def test_every_beginning_of_the_list_is_even_too() -> None:
    rows = table(20, 20, 20, 3)
    picked = [choice.row.attributes["ward"] for choice in choose(rows, 40).picked]
    for n in range(1, 41):
        counts = Counter(picked[:n])
        growing = [counts[f"{cell:02d}"] for cell in range(3)]
        assert (
            max(growing) - min(growing) <= 1 and counts["03"] == min(3, counts["03"]) and counts["03"] <= max(growing)
        )
    assert Counter(picked)["03"] == 3


def test_with_fewer_images_than_cells_labels_take_turns() -> None:
    rows = table(*[3] * 60)
    for count in (2, 10, 30, 60):
        labels = [choice.row.label for choice in choose(rows, count).picked]
        assert labels.count("doctor") == labels.count("nurse") == count // 2
        # Nor are they the first values in the alphabet.
        wards = {choice.row.attributes["ward"] for choice in choose(rows, count).picked}
        assert len(wards) == count and (count > 30 or max(wards) > "30")


def test_the_draw_goes_by_names_alone() -> None:
    rows = table(30, 30)
    files = [choice.row.file for choice in choose(rows, 10).picked]
    assert [c.row.file for c in choose(rows[::-1], 10).picked] == files
    # The next call goes on where this one ended, and more rows take no place away from the others' order.
    after = [c.row.file for c in choose(rows, 10, annotated=files).picked]
    assert [c.row.file for c in choose(rows, 20).picked] == files + after
    more = [*rows, *(Row(where="", file=f"new-{i}.jpg", label="nurse", attributes={"ward": "00"}) for i in range(30))]
    of_cell = [c.row.file for c in choose(rows, 60).picked if c.row.file.startswith("0")]
    grown = [c.row.file for c in choose(more, 90).picked if c.row.file.startswith("0")]
    assert grown == of_cell
    assert [c.row.file for c in choose(rows, 10, seed=1).picked] != files


def test_the_draw_is_by_chance() -> None:
    """Each of 10 images is among the 3 drawn with 400 seeds about 120 times: within four standard deviations."""
    rows = table(10)
    counts = Counter(c.row.file for seed in range(400) for c in choose(rows, 3, seed=seed).picked)
    assert all(abs(counts[row.file] - 120) < 4 * (400 * 0.3 * 0.7) ** 0.5 for row in rows)


def test_half_of_a_cells_share_are_its_leads() -> None:
    rows = table(20, 20)
    drawn = [c.row.file for c in choose(rows, 40).picked if c.row.file.startswith("0")]
    # Of the first cell the last eight of the draw; of the second one; and one that is no row at all.
    leads = [
        Lead("gone.jpg", "cluster 9"),
        *(Lead(f, f"cluster {i}") for i, f in enumerate(drawn[:-9:-1])),
        Lead("1-4.jpg", "x"),
    ]
    found = choose(rows, 10, leads=leads)
    here = [(c.row.file, c.why) for c in found.picked if c.row.file.startswith("0")]
    assert here == [
        (drawn[-1], "cluster 0"),
        (drawn[0], BALANCE),
        (drawn[-2], "cluster 1"),
        (drawn[1], BALANCE),
        (drawn[-3], "cluster 2"),
    ]
    there = [c.why for c in found.picked if c.row.file.startswith("1")]
    assert there.count("x") <= 1 and there.count(BALANCE) >= 4 and [cell.chosen for cell in found.cells] == [5, 5]
    # A lead that is annotated already is none.
    assert all(c.why == BALANCE for c in choose(rows, 6, leads=leads[1:2], annotated=[drawn[-1]]).picked)


def audited(net: Planted, path: Path, regions: bool) -> Path:
    """A run on images of which every third leaf has the blue corner; the middle is annotated, or nothing is."""
    rng = np.random.default_rng(0)
    samples = []
    for label, (name, colour) in enumerate(CLASSES.items()):
        for n in range(PER_CLASS):
            picture = np.full((SIDE, SIDE, 3), 0.45) + rng.normal(0, 0.03, (SIDE, SIDE, 3))
            y, x = rng.integers(9, 13, 2)
            picture[y : y + 10, x : x + 10] = np.array(colour) * rng.uniform(0.8, 1)
            middle = torch.zeros(SIDE, SIDE, dtype=torch.bool)
            middle[y : y + 10, x : x + 10] = True
            if label == 0 and n % 3 == 0:
                picture[CORNER, CORNER] = np.array(CORNERS["blue"]) * rng.uniform(0.8, 1)
            image = torch.from_numpy((picture.clip(0, 1) * 255).astype(np.uint8)).permute(2, 0, 1).contiguous()
            ward = {"ward": ("north", "south")[n % 2]}
            samples.append(AuditSample(image, label, {"middle": middle} if regions else {}, ward, f"{name}-{n}.png"))
    audit_set = AuditDataset(samples, object=["middle"] if regions else [], classes=list(CLASSES))
    audit_model(net, audit_set, plan=PLAN, out=path)
    return path


MARKED = {f"leaf-{n}.png" for n in range(0, PER_CLASS, 3)}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the net that reads the corner, which no region covers."""
    return audited(biased(), tmp_path_factory.mktemp("choose") / "run", regions=True)


def test_a_planted_cue_without_a_region_leads_and_a_clean_net_does_not(run_dir: Path, tmp_path: Path) -> None:
    leads = unexplained(read_run(run_dir))
    assert {lead.file for lead in leads} == MARKED and len(leads) == len(MARKED)
    # The cluster and the remainder take turns.
    assert [lead.why.split()[0] for lead in leads[:6]] == ["cluster", "remainder"] * 3
    assert leads[0].why == "cluster 2 of leaf"
    assert unexplained(read_run(audited(clean(), tmp_path / "clean", regions=True))) == ()


def test_remainders_against_a_loop(run_dir: Path) -> None:
    run = read_run(run_dir)
    scores, share = run.scores(-1), {}
    masks = dict(zip(run.sheet().ids, run.sheet().masks, strict=True))
    for i, name in enumerate(scores.ids):
        heat = scores.maps[0, i].astype(float)
        share[name] = heat[~masks[name][0]].sum() / heat.sum()  # maps and thumbnails have the size of the images here
    usual = {name: np.median([v for f, v in share.items() if f.startswith(name)]) for name in CLASSES}
    beyond = {f for f, v in share.items() if v > min(1 - 100 / SIDE**2, usual[f.split("-")[0]] + 0.1)}
    led = [lead for lead in unexplained(run) if lead.why.startswith("remainder")]
    assert beyond == MARKED and {lead.file for lead in led} <= beyond
    assert all(lead.why == f"remainder has {100 * share[lead.file]:.0f} % of the heatmap" for lead in led)
    assert [share[lead.file] for lead in led] == sorted((share[lead.file] for lead in led), reverse=True)


def test_without_any_region_the_clusters_lead_each_from_its_centre(tmp_path: Path) -> None:
    leads = unexplained(read_run(audited(biased(), tmp_path / "run", regions=False)))
    names = list(dict.fromkeys(lead.why for lead in leads))
    assert [lead.why for lead in leads[: 2 * len(names)]] == names * 2
    corner = [lead.file for lead in leads if lead.why == "cluster 2 of leaf"]
    assert set(corner) == MARKED and not any("remainder" in name for name in names)


def write_labels(
    path: Path, rows: Sequence[tuple[str, ...]], header: tuple[str, ...] = ("file", "label", "ward")
) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    rows = [(f"{name}-{n}.png", name, ("north", "south")[n % 2]) for name in CLASSES for n in range(PER_CLASS)]
    return write_labels(tmp_path / "labels.csv", rows)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path | int) -> int:
    monkeypatch.setattr(sys, "argv", ["bias-audit", "regions", "sample", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        main()
    return int(str(exit.value.code))


def coco(path: Path, drawn: list[str], listed: list[str]) -> Path:
    """Annotations with a box in each of `drawn`, and images of which they say nothing."""
    images = [{"id": i, "file_name": f, "width": SIDE, "height": SIDE} for i, f in enumerate([*drawn, *listed])]
    boxes = [
        {"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 4, 4], "segmentation": [[1, 1, 5, 1, 5, 5, 1, 5]]}
        for i in range(len(drawn))
    ]
    path.write_text(json.dumps({"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "middle"}]}))
    return path


def test_the_command_writes_a_table_of_labels(
    labels: Path, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    north = [f"leaf-{n}.png" for n in range(0, 6, 2)]
    drawn = coco(tmp_path / "regions.json", north, listed=["petal-0.png"])
    out = tmp_path / "chosen.csv"
    assert command(monkeypatch, labels, "-n", 13, "--annotated", drawn, "--run", run_dir, "-o", out) == 0
    text = capsys.readouterr().out
    rows = list(csv.DictReader(out.open()))
    assert list(rows[0]) == ["file", "label", "ward", "why"] and len(rows) == 13
    assert Counter((r["label"], r["ward"]) for r in rows) == {
        ("leaf", "north"): 1, ("leaf", "south"): 4, ("petal", "north"): 4, ("petal", "south"): 4,
    }  # fmt: skip
    assert not {r["file"] for r in rows} & set(north)
    led = {r["file"] for r in rows if r["why"] != "balance"}
    assert led <= MARKED and len(led) == 3  # half of 4, and the one of the north
    assert "13 images to annotate, 3 of them" in text and text.strip().endswith(str(out))
    before = out.read_bytes()
    assert command(monkeypatch, labels, "-n", 1, "-o", out) == 2 and out.read_bytes() == before
    assert "give --force" in capsys.readouterr().err
    again = ("--annotated", drawn, "--from", "coco", "--run", run_dir, "-o", out, "--force")
    assert command(monkeypatch, labels, "-n", 13, *again) == 0
    assert out.read_bytes() == before
    assert command(monkeypatch, labels, "-n", 13, "--from", "coco", "-o", out, "--force") == 2
    assert "goes with --annotated" in capsys.readouterr().err and out.read_bytes() == before


def test_columns_to_balance_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [(f"{n}.png", "leaf", ("north", "south")[n >= 8], f"http://{n}") for n in range(10)]
    path = write_labels(tmp_path / "labels.csv", rows, ("file", "label", "ward", "url"))
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, path, "-n", 6, "--attribute", "ward") == 0
    found = list(csv.DictReader((tmp_path / "to_annotate.csv").open()))
    assert Counter(r["ward"] for r in found) == {"north": 4, "south": 2} and "url" not in found[0]
    assert "A cell in yellow has no image left." in capsys.readouterr().out


def test_a_column_that_names_images_is_nothing_to_balance_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [(f"{n}.png", "leaf", ("north", "south")[n % 2], f"patient {n % 30}") for n in range(100)]
    path = write_labels(tmp_path / "labels.csv", rows, ("file", "label", "ward", "patient"))
    out = tmp_path / "chosen.csv"
    assert command(monkeypatch, path, "-n", 6, "-o", out) == 2 and not out.exists()
    said = capsys.readouterr().err
    assert "line 1: column 'patient' has 30 values in 100 rows" in said and "--attribute" in said
    assert "'ward'" not in said
    assert command(monkeypatch, path, "-n", 6, "--attribute", "label", "-o", out) == 2
    assert "'label' is no attribute" in capsys.readouterr().err
    # Who asks for it gets it; of many cells some are printed.
    assert command(monkeypatch, path, "-n", 6, "--attribute", "patient", "--attribute", "ward", "-o", out) == 0
    assert "6 images" in capsys.readouterr().out
    more = [(f"{n}.png", "leaf", f"ward {n % 50}") for n in range(200)]
    assert command(monkeypatch, write_labels(path, more), "-n", 6, "-o", out, "--force") == 0
    text = capsys.readouterr().out
    assert "and 10 more cells" in text and text.count("│ leaf") == 40


def test_all_that_is_wrong_is_said_at_once_and_nothing_is_written(
    labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = write_labels(
        tmp_path / "bad.csv", [("a.png", "", "north"), ("b.png", "leaf", "south"), ("c.png", "leaf", "")]
    )
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, bad, "-n", 2, "--annotated", "nowhere.json", "--run", "no-run") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 4
    for place, line in zip(("line 2", "line 4", "nowhere.json", "no-run"), lines, strict=True):
        assert place in line
    done = coco(tmp_path / "done.json", [f"{c}-{n}.png" for c in CLASSES for n in range(PER_CLASS)], [])
    other = coco(tmp_path / "other.json", ["elsewhere/leaf-0.png"], [])
    synthetic = make_run(tmp_path / "other-run")
    why = write_labels(tmp_path / "why.csv", [("a.png", "leaf", "balance")], ("file", "label", "why"))
    for arguments, said in (
        ((labels, "-n", 5, "--annotated", done), "none of 120 images is left"),
        ((labels, "-n", 5, "--annotated", other), "has no image of"),
        ((labels, "-n", 5, "--run", synthetic), "audited no image of"),
        ((labels, "-n", 5, "--run", make_run(tmp_path / "empty", audits=0, ids=["leaf-0.png"])), "no audit"),
        ((labels, "-n", 5, "-o", labels), "is what is read"),
        ((labels, "-n", 5, "-o", tmp_path / "nowhere/chosen.csv"), "nowhere is not there: make it"),
        ((labels, "-n", 0), "-n"),
        ((why, "-n", 1), "remove it"),
        ((write_labels(tmp_path / "none.csv", []), "-n", 1), "no row below its header"),
        ((tmp_path / "gone.csv", "-n", 1), "gone.csv"),
    ):
        assert command(monkeypatch, *arguments) == 2, arguments
        assert said in capsys.readouterr().err
    assert not (tmp_path / "to_annotate.csv").exists() and len(labels.read_text().splitlines()) == 121


def test_choosing_takes_no_torch(labels: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['bias-audit', *sys.argv[1:]]; from bias_audit.cli import main\n"
        "try: main()\nexcept SystemExit as end: assert not end.code and 'torch' not in sys.modules, end.code"
    )
    out = tmp_path / "chosen.csv"
    subprocess.run([sys.executable, "-c", code, "regions", "sample", labels, "-n", "4", "-o", out], check=True)
    assert len(out.read_text().splitlines()) == 5
