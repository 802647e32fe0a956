"""`bias-audit regions check`: each planted fault is found by the check that is for it, and a clean set passes."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page
from scipy.stats import binomtest, mannwhitneyu
from typer.testing import CliRunner

from bias_audit.cli import app, main
from bias_audit.data.annotations import Misfit
from bias_audit.regions.check import Limits, RegionReport, State, check_regions
from bias_audit.regions.convert import convert
from bias_audit.regions.survey import Item, RegionSet, Survey, read_set, survey, with_other
from bias_audit.report.regions import render_regions, write_regions

HOSTILE = "<script>alert(1)</script>"
SIDE = 40
Box = tuple[int, int, int, int]
COLUMNS = [{"id": 1, "name": "tie"}, {"id": 2, "name": "hair"}]


@dataclass
class Scene:
    """A made-up set: boxes `(left, top, right, bottom)` of each image, label, gender, and its size."""

    boxes: dict[str, dict[str, Box]]
    labels: dict[str, tuple[str, str]]
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    outlined: bool = True
    source: dict[str, str] = field(default_factory=dict)

    def coco(self, path: Path) -> Path:
        images, drawn = [], []
        for number, (file, regions) in enumerate(self.boxes.items(), 1):
            height, width = self.sizes.get(file, (SIDE, SIDE))
            images.append({"id": number, "file_name": file, "height": height, "width": width})
            for region, box in regions.items():
                name, _, who = region.partition("@")
                drawn.append(self._drawn(number, 1 if name == "tie" else 2, box) | ({"source": who} if who else {}))
        content = {"images": images, "annotations": drawn, "categories": COLUMNS}
        path.write_text(json.dumps(content), encoding="utf-8")
        return path

    def _drawn(self, image: int, category: int, box: Box) -> dict[str, Any]:
        left, top, right, bottom = box
        found: dict[str, Any] = {"image_id": image, "category_id": category}
        found["bbox"] = [left, top, right - left, bottom - top]
        ring = [left, top, right, top, right, bottom, left, bottom]
        return found | ({"segmentation": [ring]} if self.outlined else {"segmentation": []})

    def write(self, folder: Path, roles: str = "object: [tie]\nspurious: [hair]\n") -> Path:
        (folder / "images").mkdir(exist_ok=True)
        rng = np.random.default_rng(0)
        for file in self.boxes:
            if not (folder / "images" / file).exists():
                pixels = rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "images" / file)
        self.coco(folder / "regions.json")
        with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file_:
            rows = csv.writer(file_)
            rows.writerow(["file", "label", "gender"])
            rows.writerows([file, *self.labels[file]] for file in self.boxes)
        text = "reader: coco\nannotations: regions.json\nimages: images\nlabels: labels.csv\n"
        (folder / "audit.yaml").write_text(text + roles, encoding="utf-8")
        return folder / "audit.yaml"


def clean(count: int = 24) -> Scene:
    """`count` images in each of four cells; ties and hair lie apart, their areas go with nothing."""
    rng = np.random.default_rng(1)
    boxes, labels = {}, {}
    for cell in range(4):
        for k in range(count):
            file = f"{cell}-{k:02d}.png"
            wide, high = (int(x) for x in rng.integers(4, 12, 2))
            boxes[file] = {"tie": (4, 22, 4 + wide, 36), "hair": (8, 2, 30, 2 + high)}
            labels[file] = ("nurse" if cell % 2 else "doctor", "female" if cell < 2 else "male")
    return Scene(boxes, labels)


def checked(data: Path, images: Path | None = None, limits: Limits | None = None) -> RegionReport:
    return check_regions(survey(read_set(data, images)), limits)


def states(report: RegionReport) -> dict[str, str]:
    return {result.check.code: str(result.found.state) for result in report.results}


def found(report: RegionReport, code: str) -> Any:
    return next(result.found for result in report.results if result.check.code == code)


CLEAN = dict.fromkeys(
    ("sizes", "unannotated", "coverage", "extent", "overlap", "area-class", "area-attribute", "cells"), "held"
) | {"agreement": "skipped"}


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
    assert by_cell["doctor", "gender = female"] == ("7", by_cell["doctor", "gender = female"][1], "13")
    assert by_cell["doctor", "–"][0] == "31" and by_cell["nurse", "gender = male"][0] == "24"
    for count, width, _ in by_cell.values():
        if int(count) % 2 == 0:
            peer = binomtest(int(count) // 2, int(count)).proportion_ci(method="wilson")
            assert width == f"±{(peer.high - peer.low) / 2:.2f}"


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


def moved(scene: Scene, by: int, files: list[str]) -> Scene:
    boxes = {file: dict(regions) for file, regions in scene.boxes.items()}
    for file in files:
        left, top, right, bottom = boxes[file]["hair"]
        boxes[file]["hair"] = (left + by, top, right + by, bottom)
    return replace(scene, boxes=boxes)


def test_two_annotators_who_agree_and_who_do_not(tmp_path: Path) -> None:
    scene = clean()
    data = scene.write(tmp_path)
    files = list(scene.boxes)

    def outcome(other: Scene) -> Any:
        path = other.coco(tmp_path / "other.json")
        return found(check_regions(survey(with_other(read_set(data), path))), "agreement")

    assert outcome(scene).state is State.HELD
    # Hair is 22 wide: moved by 2 its IoU is 20 / 24, by 10 it is 12 / 32.
    near_by = outcome(moved(scene, 2, files))
    assert near_by.state is State.HELD and f"hair {20 / 24:.3f} [{20 / 24:.3f}, {20 / 24:.3f}]" in near_by.said
    far = outcome(moved(scene, 10, files))
    assert far.state is State.VIOLATED and f"hair {12 / 32:.3f}" in far.said and "tie" not in far.said
    one_off = moved(moved(scene, 10, files[5:6]), 9, files[9:10])
    del one_off.boxes[files[7]]["tie"]
    del one_off.boxes[files[50]]
    few = outcome(one_off)
    assert few.state is State.WARNING
    assert [(files[flag.index], flag.said) for flag in few.flags] == [
        (files[7], f"tie: only {data} drew it"),
        (files[5], f"hair: IoU {12 / 32:.2f}"),
        (files[9], f"hair: IoU {13 / 31:.2f}"),
        (files[50], f"annotated by {data} only"),
    ]
    assert "1 image only one of them annotated" in few.said
    # What one left out counts as nothing of it.
    ious = [12 / 32, 13 / 31] + [1.0] * 93
    assert f"hair {np.mean(ious):.3f} [" in few.said and f"tie {94 / 95:.3f} [" in few.said
    half = moved(scene, 0, files)
    for file in files[::2]:
        del half.boxes[file]["hair"]
    doubt = outcome(half)
    assert doubt.state is State.INCONCLUSIVE and "hair 0.500 [" in doubt.said and "tie" not in doubt.said
    shared = replace(scene, boxes={file: scene.boxes[file] for file in files[:19]})
    thin = outcome(shared)
    assert thin.state is State.INCONCLUSIVE and "of 19 images" in thin.said and "77 images only one" in thin.said


def test_annotators_of_one_file_are_told_by_their_names(tmp_path: Path) -> None:
    scene = clean()
    scene.write(tmp_path)
    boxes = {
        file: {"tie@ann": regions["tie"], "hair@ann": regions["hair"], "hair@bob": regions["hair"]}
        for file, regions in scene.boxes.items()
    }
    path = replace(scene, boxes=boxes).coco(tmp_path / "both.json")
    report = checked(path, tmp_path / "images")
    skipped = dict.fromkeys(("overlap", "area-class", "area-attribute", "cells"), "skipped")
    assert states(report) == CLEAN | skipped | {"agreement": "held"}
    assert [one.name for one in report.survey.of.annotators] == ["ann", "bob"]
    assert {one.region for one in report.survey.agreements} == {"hair"}
    assert "not known" in found(report, "cells").said and "roles" in found(report, "overlap").said
    # A detector of its own for each region is no second annotator.
    apart = {file: {"tie@ann": regions["tie"], "hair@bob": regions["hair"]} for file, regions in scene.boxes.items()}
    other = replace(scene, boxes=apart).coco(tmp_path / "apart.json")
    assert states(checked(other, tmp_path / "images"))["agreement"] == "skipped"
    # Nor are two who drew the same on other images, nor what CVAT calls the ways to draw.
    halves = {
        file: {f"hair@{'ann' if k % 2 else 'bob'}": regions["hair"]}
        for k, (file, regions) in enumerate(scene.boxes.items())
    }
    cvat = {
        file: {"hair@auto": regions["tie"], "hair@manual": regions["hair"]} for file, regions in scene.boxes.items()
    }
    for boxes in (halves, cvat):
        other = replace(scene, boxes=boxes).coco(tmp_path / "apart.json")
        assert found(checked(other, tmp_path / "images"), "agreement").said.startswith(
            "No image has a second annotator"
        )


def test_what_a_declaration_cuts_out_is_no_disagreement(tmp_path: Path) -> None:
    scene = clean()
    for regions in scene.boxes.values():
        regions["hair"] = (2, 1, 36, 38)
    data = scene.write(tmp_path, "object: [tie]\nspurious: [hair]\nminus: {hair: [tie]}\n")
    with pytest.raises(ValueError, match=r"regions\.json: .* cuts others out of hair .*give a YAML"):
        with_other(read_set(data), tmp_path / "regions.json")
    report = check_regions(survey(with_other(read_set(data), data)))
    assert states(report) == CLEAN | {"agreement": "held"}


def test_a_second_annotator_may_have_a_format_that_needs_the_images(tmp_path: Path) -> None:
    scene = clean()
    scene.outlined = False
    data = scene.write(tmp_path)
    convert(tmp_path / "regions.json", "yolo", tmp_path / "yolo", images=tmp_path / "images")
    outcome = found(check_regions(survey(with_other(read_set(data), tmp_path / "yolo"))), "agreement")
    assert outcome.state is State.HELD and "hair 1.000" in outcome.said


def test_a_second_annotator_of_something_else_is_refused(tmp_path: Path) -> None:
    scene = clean(2)
    data = scene.write(tmp_path)
    renamed = replace(scene, boxes={f"x{file}": regions for file, regions in scene.boxes.items()})
    with pytest.raises(ValueError, match=r"none of the images.*'0-00\.png'"):
        with_other(read_set(data), renamed.coco(tmp_path / "other.json"))
    nothing = replace(scene, boxes={file: {} for file in scene.boxes})
    with pytest.raises(ValueError, match=r"none of the regions.*hair, tie"):
        with_other(read_set(data), nothing.coco(tmp_path / "other.json"))


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
    assert page.locator(".outline path.object").count() and page.locator(".outline path.second").count()


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


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_light_and_dark_fit_the_screen(
    faulty: tuple[Path, RegionReport], open_page: Callable[..., Page], width: int, scheme: str
) -> None:
    page = open_page(faulty[0], viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    assert dark == (scheme == "dark")


def made(count: int, names: Callable[[int], str], rough: bool = False) -> RegionSet:
    """A set that lies nowhere on disk: its pictures are noise, and `rough` masks as well, which takes most room."""
    height, width = 150, 200
    rows, columns = np.mgrid[:height, :width]

    def item(k: int) -> Item:
        def decode() -> tuple[Image.Image, dict[str, np.ndarray[Any, Any]]]:
            rng = np.random.default_rng(k)
            mask = rng.random((height, width)) > 0.5 if rough else np.hypot(rows - 70, columns - 90) < 50
            # As rough as a photograph: noise of five pixels.
            small = rng.integers(0, 255, (height // 5, width // 5, 3), dtype=np.uint8)
            return Image.fromarray(small).resize((width, height)), {"hair": mask, HOSTILE: ~mask}

        return Item(names(k), k % 2, (HOSTILE,), frozenset(), names(k), decode)

    attributes = ((HOSTILE, (HOSTILE,)),)
    items = tuple(item(k) for k in range(count))
    return RegionSet(HOSTILE, ((HOSTILE, "object"), ("hair", "spurious")), (HOSTILE, "b"), attributes, items)


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
