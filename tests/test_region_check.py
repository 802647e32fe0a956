"""Each fault of an audit set is found by its check, and a clean set passes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from region_scenes import CLEAN, SIDE, Scene, checked, clean, found, states
from scipy.stats import binomtest, mannwhitneyu
from typer.testing import CliRunner

from bias_audit.cli import app, main
from bias_audit.data.annotations import Misfit
from bias_audit.regions.check import check_regions
from bias_audit.regions.checked import Limits, State
from bias_audit.regions.region_set import Item, RegionSet, read_set, with_other
from bias_audit.regions.survey import Survey, survey


def test_a_clean_set_passes(tmp_path: Path) -> None:
    data = clean().write(tmp_path)
    result = CliRunner().invoke(app, ["regions", "check", str(data), "-o", str(tmp_path / "regions.html")])
    assert result.exit_code == 0, result.output
    assert states(checked(data)) == CLEAN
    for code in CLEAN:
        assert code in result.output
    assert (tmp_path / "regions.html").is_file()


def plant_size(scene: Scene) -> None:
    scene.sizes["0-03.png"] = (SIDE, SIDE + 8)


def plant_unannotated(scene: Scene) -> None:
    scene.boxes["0-03.png"] = {}


def plant_nowhere(scene: Scene) -> None:
    for regions in scene.boxes.values():
        del regions["hair"]


def plant_rare(scene: Scene) -> None:
    for file in list(scene.boxes)[19:]:
        del scene.boxes[file]["hair"]


def plant_empty(scene: Scene) -> None:
    # Between the centres of two pixels.
    scene.boxes["0-03.png"]["tie"] = (5, 20, 5, 30)


def plant_full(scene: Scene) -> None:
    scene.boxes["0-03.png"]["tie"] = (0, 0, SIDE, SIDE)
    del scene.boxes["0-03.png"]["hair"]


def plant_overlap(scene: Scene) -> None:
    scene.boxes["0-03.png"]["tie"] = (8, 2, 12, 6)


def plant_touch(scene: Scene) -> None:
    _, _, right, bottom = scene.boxes["0-03.png"]["hair"]
    scene.boxes["0-03.png"]["tie"] = (right - 1, bottom - 1, right + 8, bottom + 8)


def plant_large_hair(scene: Scene) -> None:
    for file, (label, _) in scene.labels.items():
        if label == "nurse":
            left, top, right, bottom = scene.boxes[file]["hair"]
            scene.boxes[file]["hair"] = (left, top, right + 8, bottom + 6)


def plant_large_female_hair(scene: Scene) -> None:
    for file, (_, gender) in scene.labels.items():
        if gender == "female":
            left, top, right, bottom = scene.boxes[file]["hair"]
            scene.boxes[file]["hair"] = (left, top, right + 8, bottom + 6)


def plant_thin(scene: Scene) -> None:
    for file in [f"0-{k:02d}.png" for k in range(7, 24)]:
        del scene.boxes[file]


PLANTED: list[tuple[Callable[[Scene], None], dict[str, str], int]] = [
    (plant_size, {"sizes": "violated"}, 1),
    (plant_unannotated, {"unannotated": "violated"}, 1),
    (plant_nowhere, {"coverage": "violated"}, 1),
    (plant_rare, {"coverage": "inconclusive"}, 3),
    (plant_empty, {"extent": "violated"}, 1),
    (plant_full, {"extent": "violated"}, 1),
    (plant_overlap, {"overlap": "violated"}, 1),
    (plant_touch, {"overlap": "warning"}, 0),
    (plant_large_hair, {"area-class": "warning"}, 0),
    (plant_large_female_hair, {"area-attribute": "warning"}, 0),
    (plant_thin, {"cells": "inconclusive"}, 3),
]


@pytest.mark.parametrize(("plant", "expected", "code"), PLANTED, ids=[p[0].__name__[6:] for p in PLANTED])
def test_a_planted_fault_is_found_by_its_check_alone(
    tmp_path: Path, plant: Callable[[Scene], None], expected: dict[str, str], code: int
) -> None:
    scene = clean()
    plant(scene)
    report = checked(scene.write(tmp_path))
    assert states(report) == CLEAN | expected
    assert report.exit_code == code
    for name in expected:
        named = [report.survey.of.items[flag.index].file for flag in found(report, name).flags]
        per_image = ("sizes", "unannotated", "extent", "overlap")
        assert named == (["0-03.png"] if name in per_image else [])


def test_the_command_prints_what_it_found_and_exits_as_the_gate_does(tmp_path: Path) -> None:
    scene = clean()
    for plant, words, code in (
        (plant_touch, ["warning", "overlap: 0-03.png: tie and hair: ", "check: held: Nothing must be mended"], 0),
        (plant_thin, ["inconclusive", "1 of 6 cells has fewer than 20 images", "check: inconclusive: cells: "], 3),
        (plant_size, ["violated", "sizes: 0-03.png: ", "check: violated: sizes: 1 image"], 1),
    ):
        plant(scene)
        result = CliRunner().invoke(app, ["regions", "check", str(scene.write(tmp_path))])
        assert result.exit_code == code
        assert [word for word in words if word not in " ".join(result.output.split())] == []


def test_the_policy_says_how_many_images_a_cell_needs(tmp_path: Path) -> None:
    scene = clean()
    plant_thin(scene)
    data = scene.write(tmp_path)
    policy = tmp_path / "policy.yaml"
    for least, code in ((7, 0), (8, 3)):
        policy.write_text(f"min_samples: {least}\n", encoding="utf-8")
        result = CliRunner().invoke(app, ["regions", "check", str(data), "--policy", str(policy)])
        assert result.exit_code == code


def test_cells_are_counted_and_their_intervals_are_wilsons(tmp_path: Path) -> None:
    scene = clean()
    plant_thin(scene)
    rows = found(checked(scene.write(tmp_path)), "cells").table.rows
    by_cell = {row[:2]: row[2:] for row in rows}
    assert by_cell["doctor", "gender = female"] == ("7", by_cell["doctor", "gender = female"][1], "7 (tie)", "13")
    assert by_cell["doctor", "–"][0] == "31" and by_cell["nurse", "gender = male"][0] == "24"
    for count, width, _, _ in by_cell.values():
        if int(count) % 2 == 0:
            peer = binomtest(int(count) // 2, int(count)).proportion_ci(method="wilson")
            assert width == f"±{(peer.high - peer.low) / 2:.2f}"


def test_a_cell_of_enough_images_of_which_few_show_a_region_is_told(tmp_path: Path) -> None:
    scene = clean()
    bare = [file for file, cell in scene.labels.items() if cell == ("nurse", "male")][3:]
    for file in bare:
        del scene.boxes[file]["hair"]
    report = checked(scene.write(tmp_path))
    cells = found(report, "cells")
    assert str(cells.state) == "warning" and "hair is on 3 images of nurse with gender = male" in cells.said
    assert {row[4] for row in cells.table.rows if row[:2] == ("nurse", "gender = male")} == {"3 (hair)"}
    # All that a warning decides is nothing.
    assert report.exit_code == 0


def test_areas_and_overlaps_are_those_of_the_boxes(tmp_path: Path) -> None:
    """The boxes have whole edges, so areas have a closed form."""
    scene = clean(6)
    scene.outlined = False
    for k, regions in enumerate(scene.boxes.values()):
        regions["tie"] = (k, k, k + 10, k + 12)
        if k % 5 == 0:
            del regions["hair"]
    measured = survey(read_set(scene.write(tmp_path)))
    assert measured.of.regions == (("tie", "object"), ("hair", "spurious"))
    for k, regions in enumerate(scene.boxes.values()):
        for column, name in enumerate(("tie", "hair")):
            assert (name in regions) == bool(measured.boxed[k, column])
            area = (
                (regions[name][2] - regions[name][0]) * (regions[name][3] - regions[name][1]) if name in regions else 0
            )
            expected = area / SIDE**2 if name in regions else np.nan
            np.testing.assert_allclose(measured.areas[k, column], expected)
        if "hair" in regions:
            (a, b, c, d), (e, f, g, h) = regions["tie"], regions["hair"]
            both = max(0, min(c, g) - max(a, e)) * max(0, min(d, h) - max(b, f))
            np.testing.assert_allclose(measured.overlaps[k, 0], both / min((c - a) * (d - b), (g - e) * (h - f)))
        else:
            assert np.isnan(measured.overlaps[k, 0])
    rows = found(check_regions(measured), "coverage").table.rows
    lacking = len(range(0, 24, 5))
    assert rows == (("tie", "object", "0", "24", "0"), ("hair", "spurious", "0", str(24 - lacking), str(lacking)))
    assert (
        f"hair: {24 - lacking} of 24 images, {24 - lacking} as boxes" in found(check_regions(measured), "coverage").said
    )


def test_a_limit_of_its_own_for_overlaps(tmp_path: Path) -> None:
    scene = clean()
    plant_overlap(scene)
    data = scene.write(tmp_path)
    result = CliRunner().invoke(app, ["regions", "check", str(data), "--most-overlap", "1"])
    assert result.exit_code == 0 and "warning" in result.output


def test_cutting_one_region_out_of_the_other_mends_an_overlap(tmp_path: Path) -> None:
    scene = clean()
    for regions in scene.boxes.values():
        regions["hair"] = (2, 1, 36, 38)
    roles = "object: [tie]\nspurious: [hair]\n"
    assert states(checked(scene.write(tmp_path, roles)))["overlap"] == "violated"
    assert states(checked(scene.write(tmp_path, roles + "minus: {hair: [tie]}\n"))) == CLEAN


def test_what_is_cut_away_as_a_whole_is_absent(tmp_path: Path) -> None:
    scene = clean()
    regions = scene.boxes["0-03.png"]
    regions["hair"] = regions["tie"]
    report = checked(scene.write(tmp_path, "object: [tie]\nspurious: [hair]\nminus: {hair: [tie]}\n"))
    assert states(report)["extent"] == "held"
    assert "hair: 95 of 96 images" in found(report, "coverage").said


def test_an_area_difference_is_told_with_its_numbers(tmp_path: Path) -> None:
    scene = clean()
    plant_large_hair(scene)
    outcome = found(checked(scene.write(tmp_path)), "area-class")
    mean: dict[str, float] = {}
    for label in ("doctor", "nurse"):
        boxes = [scene.boxes[file]["hair"] for file in scene.boxes if scene.labels[file][0] == label]
        mean[label] = float(np.mean([(r - l) * (b - t) / SIDE**2 for l, t, r, b in boxes]))  # noqa: E741
    assert f"{100 * mean['nurse']:.0f} % of the image where class = nurse" in outcome.said
    assert f"a difference of {mean['nurse'] - mean['doctor']:.3f} [" in outcome.said
    rows = {(row[0], row[1]): row[2:] for row in outcome.table.rows}
    told, n = rows["hair", "class = doctor"]
    assert n == "48" and told.startswith(f"{mean['doctor']:.3f} [")
    assert "enrichment" in outcome.said and "tie:" not in outcome.said


def measured_areas(areas: np.ndarray[Any, Any], attributes: np.ndarray[Any, Any]) -> Survey:
    """A survey of one region, of which no picture is needed; two classes in turn, attributes of 0 and 1."""
    names = tuple((f"a{k}", ("0", "1")) for k in range(attributes.shape[1]))

    def decode() -> Any:
        raise AssertionError("no picture is opened")

    items = tuple(
        Item(f"{i}.png", i % 2, tuple(map(str, row)), frozenset(), "", decode) for i, row in enumerate(attributes)
    )
    of = RegionSet("made", (("hair", "spurious"),), ("doctor", "nurse"), names, items)
    return Survey(of, areas[:, None], np.zeros((len(areas), 1), dtype=bool), (), np.zeros((len(areas), 0)), (), ())


def test_one_of_many_comparisons_differs_by_chance_and_is_not_told() -> None:
    rng = np.random.default_rng(0)
    areas, attributes = rng.random(100), rng.integers(0, 2, (100, 60))
    alone = [mannwhitneyu(areas[a == 0], areas[a == 1]).pvalue for a in attributes.T]
    assert min(alone) < 0.02
    outcome = found(check_regions(measured_areas(areas, attributes)), "area-attribute")
    assert outcome.state is State.HELD and "60 comparisons" in outcome.said
    # The same difference alone is one.
    told = found(check_regions(measured_areas(areas, attributes[:, [int(np.argmin(alone))]])), "area-attribute")
    assert told.state is State.WARNING


def test_areas_of_another_shape_but_of_the_same_mean_are_no_difference() -> None:
    """A share is compared with the mean area: only that must be equal."""
    rng = np.random.default_rng(0)
    areas = np.where(rng.random(200) < 0.8, 0.1, 0.6) + rng.random(200) / 100
    even = np.arange(200) % 2 == 0
    areas[even] = areas[~even].mean() + rng.random(100) / 100 - 0.005
    assert mannwhitneyu(areas[even], areas[~even]).pvalue < 1e-6
    report = check_regions(measured_areas(areas, np.zeros((200, 1), dtype=int)))
    assert found(report, "area-class").state is State.HELD


def test_only_spurious_regions_may_be_on_none_of_an_image(tmp_path: Path) -> None:
    """A cue that half of the images show is how a cue is tested."""
    scene = clean()
    for file in list(scene.boxes)[::2]:
        scene.boxes[file] = {}
    roles = "spurious: [hair]\n"
    report = checked(scene.write(tmp_path, roles))
    assert states(report)["unannotated"] == "warning" and report.exit_code == 0
    assert len(found(report, "unannotated").flags) == 48


def test_a_mask_of_another_size_is_told_and_counts_nowhere_else(tmp_path: Path) -> None:
    scene = clean(3)
    scene.write(tmp_path)
    for region in ("tie", "hair"):
        (tmp_path / "masks" / region).mkdir(parents=True)
        for file, regions in scene.boxes.items():
            mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
            left, top, right, bottom = regions[region]
            mask[top:bottom, left:right] = 255
            Image.fromarray(mask).save(tmp_path / "masks" / region / file)
    Image.new("L", (SIDE, SIDE - 1), 255).save(tmp_path / "masks" / "hair" / "1-01.png")
    text = "reader: folder\nmasks: masks\nimages: images\nlabels: labels.csv\nobject: [tie]\nspurious: [hair]\n"
    (tmp_path / "audit.yaml").write_text(text, encoding="utf-8")
    report = checked(tmp_path / "audit.yaml", limits=Limits(min_samples=3))
    assert states(report) == CLEAN | {"sizes": "violated"}
    (flag,) = found(report, "sizes").flags
    assert report.survey.of.items[flag.index].file == "1-01.png" and "39 x 40" in flag.said and "40 x 40" in flag.said
    assert np.isnan(report.survey.areas[flag.index]).all()
    assert found(report, "coverage").table.rows[0][2:] == ("11", "0", "0")


@pytest.mark.newest("rich 13 and 14 leave an empty line where a bar is not shown")
def test_all_that_does_not_decode_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, page = clean(3).write(tmp_path), tmp_path / "regions.html"
    for name in ("0-01.png", "2-02.png"):
        (tmp_path / "images" / name).write_bytes(b"no picture")
    monkeypatch.setattr(sys, "argv", ["bias-audit", "regions", "check", str(data), "-o", str(page)])
    with pytest.raises(SystemExit) as ended:
        main()
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 2 and not page.exists()
    for line, name in zip(lines, ("0-01.png", "2-02.png"), strict=True):
        assert f"{data}: image {name!r}: " in line and "replace the file" in line
    for name in ("0-00.png", "1-00.png"):
        (tmp_path / "images" / name).unlink()
    with pytest.raises(Misfit) as caught:
        read_set(tmp_path / "regions.json", tmp_path / "images")
    assert [repr(name) in line for name, line in zip(("0-00.png", "1-00.png"), caught.value.lines, strict=True)]


def test_what_is_given_wrongly_is_said(tmp_path: Path) -> None:
    data = clean(1).write(tmp_path)
    with pytest.raises(ValueError, match=r"regions\.json: .*--images"):
        read_set(tmp_path / "regions.json")
    with pytest.raises(ValueError, match=r"nowhere: is not there"):
        read_set(tmp_path / "regions.json", tmp_path / "nowhere")
    result = CliRunner().invoke(app, ["regions", "check", str(data), "--from", "coco"])
    assert result.exit_code == 2 and "--images" in result.output
    with pytest.raises(Misfit, match=r"audit\.yaml: the YAML of an audit set goes without --images"):
        read_set(data, tmp_path / "images")
    with pytest.raises(Misfit, match=r"beside another one only"):
        with_other(read_set(tmp_path / "regions.json", tmp_path / "images"), data, tmp_path / "images")
    # A page is never written over what was read.
    before = data.read_bytes()
    (tmp_path / "folder.html").mkdir()
    for page in (data, tmp_path / "regions.json", tmp_path / "folder.html"):
        result = CliRunner().invoke(app, ["regions", "check", str(data), "-o", str(page)])
        assert result.exit_code == 2 and "expected the name of a page" in " ".join(result.output.split())
    assert data.read_bytes() == before
    result = CliRunner().invoke(app, ["regions", "check", str(data), "-o", str(tmp_path / "nowhere/page.html")])
    assert "nowhere is not there: make it" in str(result.exception) and result.output == ""


def test_a_module_of_the_current_folder_declares_a_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = "def make():\n    return read_declared('audit.yaml')\n"
    (tmp_path / "own_set.py").write_text(f"from bias_audit.data.declared import read_declared\n{made}")
    clean().write(tmp_path)
    (tmp_path / "own.yaml").write_text("reader: own_set:make\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    assert states(checked(Path("own.yaml"))) == CLEAN


def test_annotations_without_any_region_and_sets_without_any(tmp_path: Path) -> None:
    scene = clean(1)
    data = scene.write(tmp_path, roles="")
    assert states(checked(data)) == dict.fromkeys(CLEAN, "skipped") | {"sizes": "held", "cells": "inconclusive"}
    nothing = replace(scene, boxes={file: {} for file in scene.boxes}).coco(tmp_path / "nothing.json")
    # Annotations are there to have something drawn in them.
    report = checked(nothing, tmp_path / "images")
    assert states(report) == dict.fromkeys(CLEAN, "skipped") | {"sizes": "held", "unannotated": "violated"}
    assert report.exit_code == 1


def test_the_folder_holds_more_than_the_annotations(tmp_path: Path) -> None:
    scene = clean(3)
    scene.write(tmp_path)
    some = replace(scene, boxes=dict(list(scene.boxes.items())[:5])).coco(tmp_path / "some.json")
    report = checked(some, tmp_path / "images")
    assert (
        report.exit_code == 0
        and "7 images in the folder are not in the annotations" in found(report, "unannotated").said
    )


def test_annotations_are_checked_without_torch(tmp_path: Path) -> None:
    scene = clean(3)
    scene.write(tmp_path)
    code = (
        "import sys; from bias_audit.cli import app; "
        f"app(['regions', 'check', {str(tmp_path / 'regions.json')!r}, '--images', {str(tmp_path / 'images')!r}, "
        f"'-o', {str(tmp_path / 'page.html')!r}], standalone_mode=False); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.html").stat().st_size > 10_000


def test_real_photographs(tmp_path: Path) -> None:
    people = Path(__file__).parents[2] / "shared" / "data" / "coco_people"
    if not people.is_dir():
        pytest.skip(f"no photographs at {people}")
    text = f"reader: coco\nannotations: {people}/instances.json\nimages: {people}/images\n"
    text += f"labels: {people}/labels_scene.csv\nspurious: [person]\nminus: {{things: [person]}}\n"
    (tmp_path / "audit.yaml").write_text(text + "object: {things: [sports, kitchen, furniture]}\n", encoding="utf-8")
    report = checked(tmp_path / "audit.yaml")
    # Things of the home fill more of a photograph than a ball does.
    assert states(report)["area-class"] == "warning" and "things: " in found(report, "area-class").said
    assert states(report)["overlap"] == "held" and states(report)["sizes"] == "held"
    assert states(report)["cells"] == "inconclusive"
