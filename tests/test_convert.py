"""Annotations from one format into another: what is lost is said, and what would lose too much is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from annotated_files import BOXES, FACE, NAMES, SIZE, drawn, lines, of, pictures, source
from scipy import ndimage
from typer.testing import CliRunner

from bias_audit.cli import app
from bias_audit.data.annotations import (
    Annotation,
    Annotations,
    Box,
    Misfit,
    Polygons,
    Runs,
)
from bias_audit.data.formats.known import read_annotations, write_annotations
from bias_audit.data.outlines import runs_of
from bias_audit.regions.convert import convert, losses


def test_a_writer_refuses_what_it_would_lose_and_writes_nothing(tmp_path: Path) -> None:
    images = pictures(tmp_path / "images", "a.png", "a.jpg")
    empty = of(Annotation("hair", runs_of(np.zeros(SIZE, dtype=bool))), Annotation("tie", Polygons(())))
    for to in ("labelme", "cvat", "labelstudio", "yolo", "voc", "boxes"):
        with pytest.raises(Misfit) as wrong:
            write_annotations(empty, tmp_path / NAMES.get(to, "out"), to, images)
        assert len(lines(wrong)) == 2 and "'hair': it covers no pixel" in lines(wrong)[0], to
    misfit = of(Annotation("hair", Runs((2, 2), (2, 2))))
    tie = Annotation("tie", Box(1, 1, 2, 2))
    twins = Annotations(tuple(of(tie, file=file).images[0] for file in ("a.png", "a.jpg")), ("tie",))
    for to in ("labelme", "yolo", "voc"):
        for wrong_one, said in ((misfit, "does not fit"), (twins, "differs in its suffix only")):
            with pytest.raises(Misfit, match=said):
                write_annotations(wrong_one, tmp_path / "out", to, images)
    unsized = of(Annotation("hair", runs_of(FACE)), size=None)
    with pytest.raises(Misfit, match=r"'a\.png': its size is not known: give the folder of the images"):
        write_annotations(unsized, tmp_path / "out", "labelme")
    with pytest.raises(Misfit, match="character that XML cannot"):
        write_annotations(of(Annotation("ti\x00e", Box(1, 1, 2, 2))), tmp_path / "out.xml", "cvat")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


@pytest.mark.parametrize("to", ["labelme", "cvat", "labelstudio", "yolo", "voc", "boxes"])
def test_boxes_without_an_area_are_refused_where_they_come_from(tmp_path: Path, to: str) -> None:
    """COCO may hold such; what is refused only when it is read again would be said of a file that is gone."""
    pictures(tmp_path, "a.png")
    write_annotations(of(Annotation("tie", Box(1, 1, 1, 4))), tmp_path / "thin.json", "coco")
    with pytest.raises(Misfit) as wrong:
        convert(tmp_path / "thin.json", to, tmp_path / "out", images=tmp_path)
    assert len(lines(wrong)) == 1
    assert lines(wrong)[0].startswith(f"{tmp_path / 'thin.json'}: image 'a.png': 'tie': a box has its left edge at 1")


def test_what_yolo_cannot_say_is_refused_where_it_comes_from(tmp_path: Path) -> None:
    images = pictures(tmp_path / "images", "a.png")
    for outline in (Box(200, 1, 210, 4), Polygons(((1, 1, 900, 1, 900, 900),))):
        write_annotations(of(Annotation("tie", outline)), tmp_path / "far.json", "coco")
        with pytest.raises(Misfit, match=r"far\.json: image 'a\.png': 'tie': has the places"):
            convert(tmp_path / "far.json", "yolo", tmp_path / "out", images=images)
    write_annotations(of(Annotation("tie", Box(1, 1, 2, 4)), file="gone.png"), tmp_path / "gone.json", "coco")
    for to in ("yolo", "masks"):
        with pytest.raises(Misfit, match=r"gone\.json: image 'gone\.png': no file .*images/gone\.png"):
            convert(tmp_path / "gone.json", to, tmp_path / "out", images=images)
    assert not (tmp_path / "out").exists()


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["regions", "convert", *map(str, arguments)])
    return result.exit_code, result.output or str(result.exception)


def test_convert_says_what_is_lost(tmp_path: Path) -> None:
    path, images = source(tmp_path)
    code, said = run(path, "--to", "yolo", "-o", tmp_path / "yolo", "--images", images)
    assert code == 0, said
    assert "coco to yolo: 3 things in 2 images" in said
    assert "lost: face: holes in 2 of 2 images are filled" in said
    iou = FACE.sum() / ndimage.binary_fill_holes(FACE).sum()
    assert (
        f"lost: face: areas in 2 of 2 images have changed, to an IoU of {np.floor(iou * 1000) / 1000:.3f} in a.png"
        in said
    )
    assert "lost: sources of 2 of 3 things are not held" in said and "tie" not in said
    code, said = run(path, "--to", "boxes", "-o", tmp_path / "boxes.csv")
    assert code == 0 and "lost: face: outlines in 2 of 2 images are boxes now" in said and "scores" not in said
    code, said = run(path, "--to", "cvat", "-o", tmp_path / "sub" / "annotations.xml")
    assert code == 0 and "lost: scores of 2 of 3 things are not held" in said and "areas" not in said
    code, said = run(tmp_path / "sub" / "annotations.xml", "--to", "coco", "-o", tmp_path / "back.json")
    assert code == 0 and "lost:" not in said
    after, before = drawn(read_annotations(tmp_path / "back.json")), drawn(read_annotations(path))
    assert after.keys() == before.keys() and all((after[key] == before[key]).all() for key in before)


def test_convert_tells_how_far_it_is(tmp_path: Path) -> None:
    path, _ = source(tmp_path)
    steps: list[tuple[int, int]] = []
    convert(path, "cvat", tmp_path / "annotations.xml", progress=lambda done, of: steps.append((done, of)))
    assert steps == [(0, 2), (1, 2), (2, 2)]


def test_convert_writes_nothing_where_it_refuses(tmp_path: Path) -> None:
    path, images = source(tmp_path)
    listed = sorted(tmp_path.iterdir())
    (tmp_path / "bad.csv").write_text(BOXES)
    for arguments, said in (
        ((path, "--to", "yolo", "-o", tmp_path / "out"), "give their folder with --images"),
        ((path, "--to", "voc", "-o", images), "is there already"),
        ((path, "--to", "vock", "-o", tmp_path / "out"), "unknown format 'vock'"),
        ((path, "--to", "voc", "-o", tmp_path / "out", "--from", "cvat"), "not valid XML"),
        ((tmp_path / "gone", "--to", "voc", "-o", tmp_path / "out"), "is not there"),
        ((tmp_path / "bad.csv", "--to", "coco", "-o", tmp_path / "out.json"), "line 11"),
    ):
        code, found = run(*arguments)
        assert code != 0 and said in found, found
    assert sorted(tmp_path.iterdir()) == sorted([*listed, tmp_path / "bad.csv"])


def test_convert_ends_with_2_and_a_line_for_each_fault_without_torch(tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text(BOXES)
    source(tmp_path)
    script = """
import sys
from bias_audit.cli import main
codes = []
for source, to, out in (("regions.json", "voc", "voc"), ("bad.csv", "coco", "out.json")):
    sys.argv = ["bias-audit", "regions", "convert", source, "--to", to, "-o", out]
    try:
        main()
    except SystemExit as end:
        codes.append(end.code)
assert codes == [0, 2], codes
assert "torch" not in sys.modules
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert len(ended.stderr.splitlines()) == 10 and "line 5: image 'b.png'" in ended.stderr
    assert (tmp_path / "voc" / "Annotations" / "a.xml").is_file() and not (tmp_path / "out.json").exists()


def test_a_lost_region_is_an_error_of_the_format(tmp_path: Path) -> None:
    before = of(Annotation("tie", Box(3, 2, 11, 9)), Annotation("hair", Box(1, 1, 2, 2)))
    after = of(Annotation("tie", Box(3, 2, 11, 9)))
    with pytest.raises(Misfit, match="'hair': this format loses it"):
        losses(before, after)
    assert losses(after, after) == ()
