"""Two annotators of the same images: what they agree on, and who they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from region_scenes import CLEAN, Scene, checked, clean, found, moved, states

from bias_audit.regions.check import check_regions
from bias_audit.regions.checked import State
from bias_audit.regions.convert import convert
from bias_audit.regions.region_set import read_set, with_other
from bias_audit.regions.survey import survey


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
