"""Boxes alone are enough, from a table of them to the gate, and whoever reads the outcome is told that they are boxes.

Enters: pictures with a planted cue, and boxes around what is in them, some left out. Leaves: nothing.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted import SIDE, biased, clean, write_planted
from synthetic import make_run
from torchvision import tv_tensors
from torchvision.transforms import v2
from typer.testing import CliRunner

from bias_audit import AuditDataset, AuditSample, Policy, audit_model, cli, read_run
from bias_audit.data.annotations import AnnotatedImage, Annotation, Annotations, Box, Misfit
from bias_audit.data.declared import read_declared
from bias_audit.data.formats.known import FORMATS, recognised, write_annotations
from bias_audit.data.sheet import describe
from bias_audit.gate.compare import compare_runs
from bias_audit.gate.gate import run_gate
from bias_audit.records.manifest import RegionCount
from bias_audit.report.facts import facts
from bias_audit.report.page import render
from bias_audit.terms import Verdict

# Boxes as people draw them: with some of what lies around.
BOXES = {"middle": "9,9,21,20.5", "corner": "0.5,1,11,10"}
DECLARED = """\
reader: boxes
annotations: boxes.csv
images: images
labels: labels.csv
object: [middle]
spurious: [corner]
"""


@pytest.fixture(scope="module")
def boxed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted pictures with a table of boxes; one corner in eight is not annotated."""
    root = write_planted(tmp_path_factory.mktemp("boxed"))
    rows = ["file,region,left,top,right,bottom"]
    for number, row in enumerate(csv.DictReader((root / "labels.csv").open())):
        rows.append(f"{row['file']},middle,{BOXES['middle']}")
        rows += [f"{row['file']},corner,{BOXES['corner']}"] if number % 8 else []
    (root / "boxes.csv").write_text("\n".join(rows) + "\n")
    (root / "boxes.yaml").write_text(DECLARED)
    return root


def naive_box(edges: str, side: int = SIDE) -> torch.Tensor:
    left, top, right, bottom = map(float, edges.split(","))
    mask = torch.zeros(side, side, dtype=torch.bool)
    for row, column in product(range(side), range(side)):
        mask[row, column] = left <= column + 0.5 < right and top <= row + 0.5 < bottom
    return mask


@pytest.mark.parametrize(
    ("net", "verdict", "code"), [(biased, Verdict.RELIANCE, 1), (clean, Verdict.CLEARED, 0)], ids=["planted", "clean"]
)
def test_boxes_alone_lead_to_the_gate(boxed: Path, tmp_path: Path, net: Any, verdict: Verdict, code: int) -> None:
    audit_set = read_declared(boxed / "boxes.yaml")
    masks = audit_set.batch([0, 1]).masks
    assert torch.equal(masks[1], torch.stack([naive_box(BOXES["middle"]), naive_box(BOXES["corner"])]))
    assert not masks[0, 1].any()
    result = audit_model(net().eval(), audit_set, training=boxed / "training.csv", out=tmp_path)
    assert {(f.name, f.verdict) for f in result.judgement.findings} == {("corner", verdict), ("colour", verdict)}
    # What is not annotated is not guessed: nothing was removed or measured there.
    assert result.estimate("enrichment", region="corner", method="gradcam").n == 140
    assert np.isnan(result.scores.areas[::8, 1]).all() and not np.isnan(result.scores.areas[1::8, 1]).any()
    run = read_run(tmp_path)
    assert run.manifest.annotated == (RegionCount("middle", 0, 160, 0), RegionCount("corner", 0, 140, 20))

    ran = CliRunner().invoke(cli.app, ["gate", str(tmp_path)])
    assert ran.exit_code == code, ran.output
    said = "corner is on 140 of 160 images, on all of them as a box, which holds some of what lies around."
    assert said in " ".join(ran.output.split()) and run_gate(run).caveats[1] == said
    assert f"In A and B {said}" in compare_runs(run, run).notes
    shown = CliRunner().invoke(cli.app, ["show", str(tmp_path)])
    assert said in shown.output and "middle is on 160 of 160 images" in shown.output
    if not code:
        return
    page = render(run)
    cards = dict(
        zip(["corner", "colour"], re.findall(r'<article class="finding.*?</article>', page, re.DOTALL), strict=True)
    )
    assert said in cards["corner"] and "as a box" not in cards["colour"]
    regions = re.search(r"<dt>Regions</dt><dd>(.*?)</dd>", page)[1]  # type: ignore[index]
    assert regions == (
        "middle is on 160 of 160 images, on all of them as a box; "
        "corner is on 140 of 160 images, on all of them as a box"
    )


def test_a_whole_annotation_by_outlines_is_said_to_be_that(boxed: Path, tmp_path: Path) -> None:
    audit_model(clean().eval(), read_declared(boxed / "audit.yaml").subset(8, seed=0), out=tmp_path)
    run = read_run(tmp_path)
    assert run.manifest.annotated == (RegionCount("middle", 8, 0, 0), RegionCount("corner", 8, 0, 0))
    assert dict(facts(run))["Regions"] == "each on every image, as an outline"
    assert "as a box" not in CliRunner().invoke(cli.app, ["show", str(tmp_path)]).output


def test_a_run_of_a_version_that_did_not_count_is_read(tmp_path: Path) -> None:
    make_run(tmp_path, audits=1)
    path = tmp_path / "manifest.json"
    body = json.loads(path.read_text())["body"]
    del body["annotated"]
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    path.write_text(json.dumps({"body": body, "sha256": hashlib.sha256(canonical).hexdigest()}))
    run = read_run(tmp_path)
    assert run.manifest.annotated == () and "Regions" not in dict(facts(run))
    assert CliRunner().invoke(cli.app, ["show", str(tmp_path)]).exit_code == 0


# ---------------------------------------------------------------------------------------------- what counts as a box


def coco_set(folder: Path, annotations: list[dict[str, Any]], **roles: Any) -> AuditDataset:
    write_planted(folder, per_cell=1)
    names = [row["file"] for row in csv.DictReader((folder / "labels.csv").open())]
    content = {
        "images": [{"id": i, "file_name": name, "height": SIDE, "width": SIDE} for i, name in enumerate(names)],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "tie"}, {"id": 2, "name": "hair"}],
    }
    (folder / "instances.json").write_text(json.dumps(content))
    return AuditDataset.from_coco(
        folder / "instances.json", folder / "images", labels=folder / "labels.csv", **{"object": ["tie"], **roles}
    )


RING = [[2.0, 2, 8, 2, 8, 8, 2, 8]]


def test_of_coco_the_box_is_taken_where_nothing_else_is_drawn(tmp_path: Path) -> None:
    drawn = [
        {"image_id": 0, "category_id": 1, "segmentation": [], "bbox": [3, 4, 5.5, 6]},
        {"image_id": 1, "category_id": 1, "segmentation": RING, "bbox": [0, 0, 24, 24]},
        {"image_id": 2, "category_id": 1, "segmentation": RING},
        {"image_id": 2, "category_id": 1, "bbox": [12, 12, 4, 4]},
    ]
    audit_set = coco_set(tmp_path, drawn)
    masks = audit_set.batch([0, 1, 2, 3]).masks[:, 0]
    assert torch.equal(masks[0], naive_box("3,4,8.5,10"))
    assert torch.equal(masks[1], naive_box("2,2,8,8"))
    assert torch.equal(masks[2], naive_box("2,2,8,8") | naive_box("12,12,16,16"))
    assert [sample.boxed for sample in audit_set.samples] == [{"tie"}, set(), {"tie"}, set()]
    assert describe(audit_set).annotated == (RegionCount("tie", 1, 2, 1),)


def test_a_box_that_is_cut_out_makes_a_region_one_of_boxes(tmp_path: Path) -> None:
    drawn = [
        {"image_id": image, "category_id": category, **outline}
        for image, category, outline in (
            (0, 1, {"segmentation": RING}),
            (0, 2, {"bbox": [4, 4, 20, 20]}),
            (1, 1, {"segmentation": RING}),
            (1, 2, {"segmentation": [[4.0, 4, 24, 4, 24, 24, 4, 24]]}),
            # There is nothing that it could be cut out of.
            (2, 2, {"bbox": [4, 4, 20, 20]}),
        )
    ]
    audit_set = coco_set(tmp_path, drawn, minus={"tie": ["hair"]})
    masks = audit_set.batch([0, 1]).masks[:, 0]
    assert torch.equal(masks[0], naive_box("2,2,8,8") & ~naive_box("4,4,24,24")) and torch.equal(masks[1], masks[0])
    assert [sample.boxed for sample in audit_set.samples] == [{"tie"}, set(), set(), set()]
    assert describe(audit_set).annotated == (RegionCount("tie", 1, 1, 2),)


def test_boxes_of_a_dataset_are_boxes_and_masks_are_not() -> None:
    image = torch.zeros(3, SIDE, SIDE, dtype=torch.uint8)
    box = tv_tensors.BoundingBoxes([[0, 0, 5, 5], [9, 9, 9, 9]], format="XYXY", canvas_size=(SIDE, SIDE))
    mask = tv_tensors.Mask(torch.stack([naive_box("0,0,5,5"), naive_box("3,3,9,9")]))
    items: Any = [
        (image, {"label": 0, "a": box}),
        (image, {"label": 1, "m": mask}),
        (image, {"label": 0, "b": box, "m": mask}),
    ]
    audit_set = AuditDataset.from_dataset(items, regions=["tie", "hair"], object=["tie"], spurious=["hair"])
    assert [sample.boxed for sample in audit_set.samples] == [{"tie"}, set(), set()]
    assert describe(audit_set).annotated == (RegionCount("tie", 2, 1, 0), RegionCount("hair", 2, 0, 1))


def test_what_the_transform_cuts_off_is_absent() -> None:
    image = torch.zeros(3, SIDE, SIDE, dtype=torch.uint8)
    corner, middle = naive_box("0,0,3,3"), naive_box("9,9,15,15")
    samples = [
        AuditSample(image, 0, {"tie": middle | corner}, {}, "both", frozenset({"tie"})),
        AuditSample(image, 0, {"tie": corner}, {}, "cut", frozenset({"tie"})),
        AuditSample(image, 1, {"tie": middle}, {}, "outlined"),
    ]
    audit_set = AuditDataset(samples, object=["tie"], transform=v2.CenterCrop(12))
    assert describe(audit_set).annotated == (RegionCount("tie", 1, 1, 1),)
    assert describe(audit_set.select([0, 2])).annotated == (RegionCount("tie", 1, 1, 0),)


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "masks"])
def test_the_same_boxes_in_any_format_are_the_same_audit_set(boxed: Path, tmp_path: Path, format: str) -> None:
    wanted = read_declared(boxed / "boxes.yaml").select(range(12))
    (tmp_path / "labels.csv").write_text("".join((boxed / "labels.csv").open().readlines()[:13]))
    found = []
    for number, file in enumerate(wanted.ids):
        boxes = {
            name: Box(*map(float, edges.split(","))) for name, edges in BOXES.items() if name == "middle" or number % 8
        }
        things = tuple(Annotation(name, box) for name, box in boxes.items())
        found.append(AnnotatedImage(file, (SIDE, SIDE), things, "made up"))
    path = tmp_path / {"coco": "a.json", "boxes": "a.csv", "cvat": "a.xml", "labelstudio": "a.json"}.get(
        format, "folder"
    )
    write_annotations(Annotations(tuple(found), ("middle", "corner")), path, format, boxed / "images")
    assert recognised(path) == format
    (tmp_path / "audit.yaml").write_text(
        DECLARED.replace("boxes.csv", path.name)
        .replace("reader: boxes", f"reader: {format}")
        .replace("images: images", f"images: {boxed / 'images'}")
    )
    for audit_set in (
        read_declared(tmp_path / "audit.yaml"),
        AuditDataset.from_annotations(
            path, boxed / "images", labels=tmp_path / "labels.csv", object=["middle"], spurious=["corner"]
        ),
    ):
        assert torch.equal(audit_set.batch(range(12)).masks, wanted.batch(range(12)).masks)
        assert describe(audit_set).annotated == (RegionCount("middle", 0, 12, 0), RegionCount("corner", 0, 10, 2))


@pytest.mark.parametrize("format", [name for name in FORMATS if name not in ("masks", "coco")])
def test_no_name_in_any_format_leaves_its_folder(boxed: Path, tmp_path: Path, format: str) -> None:
    """A file of the format, with the name of an image made one elsewhere, as its editor would never write it."""
    image = AnnotatedImage("inside.png", (SIDE, SIDE), (Annotation("middle", Box(2, 2, 9, 9)),), "made up")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "inside.png").write_bytes(next((boxed / "images").iterdir()).read_bytes())
    (tmp_path / "outside.png").write_bytes(next((boxed / "images").iterdir()).read_bytes())
    path = tmp_path / {"boxes": "a.csv", "cvat": "a.xml", "labelstudio": "a.json"}.get(format, "folder")
    write_annotations(Annotations((image,), ("middle",)), path, format, tmp_path / "images")
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    changed = 0
    for one in files:
        text = one.read_text()
        changed += text.count("inside.png")
        one.write_text(text.replace("inside.png", "../outside.png"))
    (tmp_path / "labels.csv").write_text("file,label\n../outside.png,x\n")
    with pytest.raises(Misfit) as caught:
        AuditDataset.from_annotations(
            path, tmp_path / "images", labels=tmp_path / "labels.csv", format=format, object=["middle"]
        )
    said = "\n".join(caught.value.lines)
    # Those of LabelMe and YOLO say where the image was when it was annotated: of that the name alone counts.
    assert re.search(r"labels\.csv, line 2: .*leaves the folder", said), said
    assert not changed or format in ("yolo", "labelme") or len(caught.value.lines) > 1, said


# ------------------------------------------------------------------------------------- all that is wrong, on the screen


def ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["bias-audit", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    said = capsys.readouterr()
    return int(str(left.value.code)), said.out, said.err


def damaged(boxed: Path, root: Path) -> Path:
    """An audit set with four faults in three files."""
    (root / "images").symlink_to(boxed / "images")
    rows = (boxed / "labels.csv").read_text().splitlines()
    (root / "labels.csv").write_text(
        "\n".join([*rows[:3], "gone.png,leaf,red", "a.png,leaf,", "x\x1b[31m.png,leaf,red", *rows[6:]]) + "\n"
    )
    (root / "boxes.csv").write_text((boxed / "boxes.csv").read_text().replace(BOXES["middle"], "9,x,21,20", 1))
    (root / "audit.yaml").write_text(DECLARED)
    return root


def test_each_fault_has_a_line_of_its_own(
    boxed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = damaged(boxed, tmp_path)
    monkeypatch.syspath_prepend(Path(__file__).parent)
    monkeypatch.setenv("MY_TOKEN", "gone.png!!"[:8])
    code, out, err = ends(
        monkeypatch, capsys, "run", "--model", "planted:clean", "--data", root / "audit.yaml", "--out", root / "out"
    )
    lines = err.replace(f"{root}/", "").splitlines()
    assert (code, out) == (2, "") and not (root / "out").exists()
    assert [line.split(": ")[0] for line in lines] == ["bias-audit"] * 4
    assert re.match(r"bias-audit: audit\.yaml, line 2: annotations: boxes\.csv, line 2: image .*'x'", lines[0])
    assert re.match(
        r"bias-audit: audit\.yaml, line 4: labels: labels\.csv, line 5: no value in column 'colour'", lines[1]
    )
    # What could be a secret is not said.
    assert lines[2].startswith("bias-audit: audit.yaml, line 4: labels: labels.csv, line 4: no file images/***")
    assert lines[3].endswith("no file images/x\ufffd[31m.png: check the folder, or remove it here")


def test_of_many_faults_the_first_are_said_and_how_many_more_there_are(
    boxed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "labels.csv").write_text("file,label\n" + "".join(f"::error::{i}.png,x\n" for i in range(73)))
    (tmp_path / "audit.yaml").write_text(DECLARED.replace("images: images", f"images: {boxed / 'images'}"))
    (tmp_path / "boxes.csv").write_text((boxed / "boxes.csv").read_text())
    monkeypatch.syspath_prepend(Path(__file__).parent)
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    code, out, err = ends(
        monkeypatch,
        capsys,
        "run",
        "--model",
        "planted:clean",
        "--data",
        tmp_path / "audit.yaml",
        "--out",
        tmp_path / "o",
    )
    lines = err.splitlines()
    assert (code, out, len(lines)) == (2, "", cli.MOST_LINES + 1)
    assert lines[-1] == f"bias-audit: and {73 - cli.MOST_LINES} more"
    assert [f"line {i + 2}: " in line for i, line in enumerate(lines[:-1])] == [True] * cli.MOST_LINES


def test_all_pictures_that_do_not_decode_are_said_at_once(
    boxed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_planted(tmp_path / "p", per_cell=2)
    broken = sorted((root / "images").iterdir())[::3]
    for path in broken:
        path.write_bytes(path.read_bytes()[:60])
    monkeypatch.syspath_prepend(Path(__file__).parent)
    given = ("--model", "planted:clean", "--data", root / "audit.yaml", "--out", tmp_path / "out")
    code, _, err = ends(monkeypatch, capsys, "run", *given)
    assert code == 2 and not (tmp_path / "out").exists()
    assert sorted(re.findall(r"^bias-audit: sample '(.*?)': does not decode", err, re.MULTILINE)) == [
        path.name for path in broken
    ]
    with pytest.raises(Misfit) as caught:
        audit_model(clean().eval(), read_declared(root / "audit.yaml"), policy=Policy(), out=tmp_path / "out")
    assert len(caught.value.lines) == len(broken) == 3 and not (tmp_path / "out").exists()


def test_all_that_is_wrong_with_a_declaration_is_said_at_once(boxed: Path, tmp_path: Path) -> None:
    (tmp_path / "audit.yaml").write_text(
        "reader: yolo\nannotation: boxes\nimages: 3\nlabels: l.csv\nobject: {tie: x}\ntransform:\n"
        "  - resize: big\n  - normalize: {mean: [0.5], std: [1, 1, 0]}\n"
    )
    with pytest.raises(Misfit) as caught:
        read_declared(tmp_path / "audit.yaml")
    said = [line.removeprefix(f"{tmp_path / 'audit.yaml'}").split(": ")[:2] for line in caught.value.lines]
    assert said == [
        ["", "annotations"],
        [", line 3", "images"],
        [", line 7", "transform.0.resize"],
        [", line 8", "transform.1.normalize.mean"],
        [", line 8", "transform.1.normalize.std.2"],
        [", line 5", "object.tie"],
        [", line 2", "annotation"],
    ]
    (tmp_path / "audit.yaml").write_text(
        "reader: labelme\nannotations: nowhere\nimages: audit.yaml\nlabels: .\ntransform: [no.module:f, os:getpid]\n"
    )
    with pytest.raises(Misfit) as caught:
        read_declared(tmp_path / "audit.yaml")
    said = [line.removeprefix(f"{tmp_path / 'audit.yaml'}").split(": ")[:2] for line in caught.value.lines]
    assert said == [
        [", line 5", "transform.0"],
        [", line 5", "transform.1"],
        [", line 2", "annotations"],
        [", line 3", "images"],
        [", line 4", "labels"],
    ]
    # What a reader of one's own complains of keeps its lines.
    (tmp_path / "complaining.py").write_text(
        "from bias_audit.data.annotations import Misfit\n"
        "def read():\n    raise Misfit(['a.txt, line 1: x', 'b.txt: y'])\n"
    )
    sys.path.insert(0, os.fspath(tmp_path))
    try:
        (tmp_path / "audit.yaml").write_text("reader: complaining:read\n")
        with pytest.raises(Misfit) as caught:
            read_declared(tmp_path / "audit.yaml")
    finally:
        sys.path.remove(os.fspath(tmp_path))
    assert [line.split("'complaining:read': ")[1] for line in caught.value.lines] == ["a.txt, line 1: x", "b.txt: y"]


def test_counts_are_kept_as_they_are() -> None:
    count = RegionCount("hair", 272, 40, 88)
    assert RegionCount(**json.loads(json.dumps(asdict(count)))) == count and count.present == 312
    told = [str(RegionCount("hair", *counts)) for counts in ((3, 0, 0), (3, 0, 2), (0, 3, 2), (1, 2, 0))]
    assert told == [
        "hair is on 3 of 3 images",
        "hair is on 3 of 5 images",
        "hair is on 3 of 5 images, on all of them as a box",
        "hair is on 3 of 3 images, on 2 of them as a box",
    ]
