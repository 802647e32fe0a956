"""Proposals for a folder: written, gone on with after any interruption, and what is refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import wired
from drawn_people import people
from PIL import Image
from typer.testing import CliRunner

from bias_audit.cli import app
from bias_audit.data.annotations import Annotation, Box, Misfit
from bias_audit.data.formats.known import read_annotations
from bias_audit.data.outlines import runs_of
from bias_audit.regions.people import REGIONS
from bias_audit.regions.pictures import Picture, image_files
from bias_audit.regions.propose import Found, Options, partial_of, propose, write_proposals


@dataclass
class Bright:
    """Finds what is red as a mask, and a box around it; `asked` are the sizes of the batches it was given."""

    regions: tuple[str, ...] = ("bright", "around")
    source: str = "red above 200"
    asked: list[int] = field(default_factory=list)
    last: int = 10**9

    def alike(self, size: tuple[int, int]) -> Hashable:
        return size

    def __call__(self, pictures: Sequence[Picture]) -> list[tuple[Annotation, ...]]:
        if len(self.asked) == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        self.asked.append(len(pictures))
        return [self._one(picture) for picture in pictures]

    def _one(self, picture: Picture) -> tuple[Annotation, ...]:
        red = np.asarray(picture.image)[..., 0] > 200
        if not red.any():
            return ()
        rows, columns = np.nonzero(red)
        box = picture.box(columns.min() - 0.25, rows.min(), columns.max() + 1, rows.max() + 1)
        assert box is not None
        return (
            Annotation("bright", picture.runs(red), float(red.mean()), self.source, 0),
            Annotation("around", box, 0.1 + 0.2, self.source),
        )


def draw(folder: Path, count: int = 7) -> Path:
    folder.mkdir(exist_ok=True)
    for index in range(count):
        image = np.zeros((8 + index % 2, 10, 3), dtype=np.uint8)
        image[2:5, index % 5 : 9] = 255 if index != 3 else 0
        Image.fromarray(image).save(folder / f"{index}.png")
    return folder


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    found = write_proposals(draw(tmp_path / "images"), tmp_path / "a.json", [Bright()], 3, device="cpu")
    assert found == (Found("bright", 6, 6, 0), Found("around", 6, 6, 6))
    annotations = read_annotations(tmp_path / "a.json")
    assert [len(image.annotations) for image in annotations.images] == [2, 2, 2, 0, 2, 2, 2]
    red = np.zeros((9, 10), dtype=bool)
    red[2:5, 1:9] = True
    assert annotations.images[1].annotations == (
        Annotation("bright", runs_of(red), 24 / 90, "red above 200", 0),
        Annotation("around", Box(0.75, 2, 9, 5), 0.1 + 0.2, "red above 200"),
    )
    assert image_files(tmp_path / "images") == tuple(image.file for image in annotations.images)


def test_gone_on_with_after_any_byte(tmp_path: Path) -> None:
    images, out = draw(tmp_path / "images"), tmp_path / "a.json"
    bad = images / "z.png"
    bad.write_bytes(b"no picture")
    with pytest.raises(Misfit, match=r"z\.png"):
        write_proposals(images, out, [Bright()], 2, device="cpu")
    bad.unlink()
    kept = partial_of(out).read_bytes()
    assert not out.exists() and len(kept.splitlines()) == 1 + 7
    write_proposals(images, tmp_path / "whole.json", [Bright()], 2, device="cpu")
    whole = (tmp_path / "whole.json").read_bytes()
    asked = set()
    for cut in {0, 1, 2000, *(at + step for at, byte in enumerate(kept) if byte == 10 for step in (0, 1, 99))}:
        partial_of(out).write_bytes(kept[:cut])
        bright = Bright()
        write_proposals(images, out, [bright], 2, device="cpu")
        assert out.read_bytes() == whole and not partial_of(out).exists()
        out.unlink()
        # Batches are those of an unbroken call: what depends on a batch depends on the same.
        assert bright.asked in [[2, 2, 2, 1][begun:] for begun in range(5)] + [[2, 1], [2, 2, 1]]
        asked.add(len(bright.asked))
    assert asked == {0, 1, 2, 3, 4}
    # Not a torn line, but one that something else has damaged: it and what follows are looked at again.
    lines = kept.splitlines(keepends=True)
    partial_of(out).write_bytes(b"".join([*lines[:3], b"\0" * len(lines[3]), *lines[4:]]))
    write_proposals(images, out, [Bright()], 2, device="cpu")
    assert out.read_bytes() == whole


def killed(images: Path, out: Path, calls: int) -> None:
    process = multiprocessing.get_context("fork").Process(
        target=write_proposals, args=(images, out, [Bright(last=calls)], 1), kwargs={"device": "cpu"}
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_killed_at_any_batch(tmp_path: Path) -> None:
    images = draw(tmp_path / "images")
    write_proposals(images, tmp_path / "whole.json", [Bright()], 1, device="cpu")
    for calls in range(7):
        out = tmp_path / f"{calls}.json"
        killed(images, out, calls)
        assert not out.exists() and len(partial_of(out).read_bytes().splitlines()) == 1 + calls
        bright = Bright()
        write_proposals(images, out, [bright], 1, device="cpu")
        assert out.read_bytes() == (tmp_path / "whole.json").read_bytes() and len(bright.asked) == 7 - calls


def test_a_torn_line_is_cut_off(tmp_path: Path) -> None:
    images, out = draw(tmp_path / "images"), tmp_path / "a.json"
    killed(images, out, 3)
    partial_of(out).write_bytes(partial_of(out).read_bytes()[:-20])
    killed(images, out, 2)
    # The third is found again, and no line stands behind what was left of it.
    lines = [json.loads(line) for line in partial_of(out).read_bytes().splitlines()]
    assert [line.get("file") for line in lines[1:]] == sorted(line["file"] for line in lines[1:]) and len(lines) == 5


@pytest.mark.slow
def test_the_command_killed_and_gone_on_with(tmp_path: Path) -> None:
    files = wired.write_weights(tmp_path, wired.MASKS, wired.KEYPOINTS)
    (tmp_path / "images").mkdir()
    for index in range(12):
        wired.person(1 + index % 3, size=(96, 96 + 8 * (index % 5))).save(tmp_path / "images" / f"{index:02}.png")

    def command(name: str) -> list[str]:
        options = [option for file in files for option in ("--weights", str(file))]
        told = [str(tmp_path / "images"), "--using", ",".join(REGIONS), "-o", str(tmp_path / name), *options]
        return [
            sys.executable,
            "-m",
            "bias_audit.cli",
            "regions",
            "propose",
            *told,
            "--size",
            "96",
            "--batch-size",
            "2",
        ]

    subprocess.run(command("whole.json"), check=True)
    partial = partial_of(tmp_path / "a.json")
    for lines in (1, 5, 9):
        with subprocess.Popen(command("a.json")) as process:
            while process.poll() is None and (not partial.exists() or partial.read_bytes().count(b"\n") < lines):
                time.sleep(0.01)
            process.kill()
        assert process.returncode == -signal.SIGKILL and not (tmp_path / "a.json").exists()
    subprocess.run(command("a.json"), check=True)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "whole.json").read_bytes() and not partial.exists()


def test_an_image_that_changed_is_looked_at_again(tmp_path: Path) -> None:
    images, out = draw(tmp_path / "images"), tmp_path / "a.json"
    killed(images, out, 5)
    # As long as before, and of another day.
    shutil.copy(images / "1.png", images / "0.png")
    os.utime(images / "0.png", (1, 1))
    (images / "2.png").unlink()
    Image.new("RGB", (9, 9), "red").save(images / "new.png")
    bright = Bright()
    write_proposals(images, out, [bright], 1, device="cpu")
    assert len(bright.asked) == 1 + 1 + 2
    annotations = read_annotations(out)
    assert [image.file for image in annotations.images] == [*(f"{i}.png" for i in (0, 1, 3, 4, 5, 6)), "new.png"]
    assert annotations.images[0].annotations == annotations.images[1].annotations


def test_other_settings_do_not_go_on(tmp_path: Path) -> None:
    images, out = draw(tmp_path / "images"), tmp_path / "a.json"
    killed(images, out, 2)
    before = partial_of(out).read_bytes()
    with pytest.raises(
        ValueError, match=r"made_by was \['red above 200'\], is \['red above 100'\]; batch_size was 1, is 2"
    ):
        write_proposals(images, out, [Bright(source="red above 100")], 2, device="cpu")
    with pytest.raises(ValueError, match="device was 'cpu', is 'cuda'"):
        write_proposals(images, out, [Bright()], 1, device="cuda")
    assert partial_of(out).read_bytes() == before
    partial_of(out).write_text('{"notes": 1}\n')
    with pytest.raises(ValueError, match="is not what this writes: move it away"):
        write_proposals(images, out, [Bright()], 1, device="cpu")
    assert partial_of(out).read_text() == '{"notes": 1}\n'


def test_all_images_that_do_not_decode_are_named(tmp_path: Path) -> None:
    images, out = draw(tmp_path / "images"), tmp_path / "a.json"
    (images / "ward").mkdir()
    (images / "ward" / "text.jpg").write_text("no picture")
    Image.new("RGB", (400, 300), "red").save(images / "torn.jpg")
    (images / "torn.jpg").write_bytes((images / "torn.jpg").read_bytes()[:700])
    Image.fromarray(np.zeros((5, 5), dtype=np.uint16)).save(images / "deep.png")
    (images / "0a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(Misfit) as caught:
        write_proposals(images, out, [Bright()], 4, device="cpu")
    assert [line.split(":")[0] for line in caught.value.lines] == [
        str(images / name) for name in ("0a.png", "deep.png", "torn.jpg", "ward/text.jpg")
    ]
    assert all("\n" not in line for line in caught.value.lines) and not out.exists()
    for name in ("0a.png", "deep.png", "torn.jpg", "ward/text.jpg"):
        (images / name).unlink()
    bright = Bright()
    write_proposals(images, out, [bright], 4, device="cpu")
    assert bright.asked == [] and len(read_annotations(out).images) == 7


def test_images_too_narrow_to_look_at_are_named(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    wired.person().save(images / "a.png")
    for name, size in {"wide.png": (3000, 2), "high.png": (1, 1400)}.items():
        Image.new("RGB", size).save(images / name)
    with pytest.raises(Misfit) as caught:
        write_proposals(images, tmp_path / "a.json", [people(["person"])], 4, device="cpu")
    assert [line.split(":")[0] for line in caught.value.lines] == [
        str(images / name) for name in ("high.png", "wide.png")
    ]
    assert "too narrow to find people in: crop it" in str(caught.value)
    assert len(partial_of(tmp_path / "a.json").read_text().splitlines()) == 2


def test_folders_and_outputs_that_cannot_be_used(tmp_path: Path) -> None:
    images = draw(tmp_path / "images", 1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".hidden.png").write_bytes(b"")
    cases = {
        "absent: is no folder": (tmp_path / "absent", "a.json"),
        "has no image": (tmp_path / "empty", "a.json"),
        "the folder .*nowhere is not there": (images, "nowhere/a.json"),
        "there.json: is there already: name another file, or give --force": (images, "there.json"),
    }
    (tmp_path / "there.json").write_text("by hand")
    for match, (folder, out) in cases.items():
        with pytest.raises(ValueError, match=match):
            write_proposals(folder, tmp_path / out, [Bright()], 1, device="cpu")
    assert (tmp_path / "there.json").read_text() == "by hand"
    assert not list(tmp_path.rglob("*.jsonl"))
    write_proposals(images, tmp_path / "there.json", [Bright()], 1, device="cpu", force=True)
    assert len(read_annotations(tmp_path / "there.json").images) == 1
    name = os.fsdecode(b"caf\xe9.png")
    shutil.copy(images / "0.png", images / name)
    with pytest.raises(Misfit, match="is not UTF-8: rename it"):
        image_files(images)


def test_only_the_images_of_a_table_are_looked_at(tmp_path: Path) -> None:
    images, out = draw(tmp_path / "images"), tmp_path / "a.json"
    (images / "6.png").write_bytes(b"no picture")
    only = tmp_path / "chosen.csv"
    only.write_text("file,label,why\n4.png,x,balance\n0.png,y,balance\n")
    write_proposals(images, out, [Bright()], 3, device="cpu", only=only)
    assert [image.file for image in read_annotations(out).images] == ["0.png", "4.png"]
    (images / "note.txt").touch()
    only.write_text("file,label\n../0.png,x\n0.png,\n0.png,y\nnote.txt,y\n8.png,y\n")
    with pytest.raises(Misfit) as wrong:
        propose(Options(images, tmp_path / "b.json", ("person",), only=only))
    said = (("line 3", "no value"), ("line 2", "leaves"), ("line 5", "does not end in"), ("line 6", "no file"))
    assert len(wrong.value.lines) == len(said)
    for line, (place, what) in zip(wrong.value.lines, said, strict=True):
        assert place in line and what in line
    only.write_text("file,label\n")
    with pytest.raises(Misfit, match="no row below its header"):
        write_proposals(images, tmp_path / "b.json", [Bright()], 3, device="cpu", only=only)


def test_options_that_cannot_be(tmp_path: Path) -> None:
    images = draw(tmp_path / "images", 1)

    def said(**options: object) -> str:
        with pytest.raises(ValueError, match=r".") as caught:
            propose(Options(images, tmp_path / "a.json", **{"using": ("person",)} | options))  # type: ignore[arg-type]
        return str(caught.value)

    wrong = said(using=("persn,face,prompt:", "hair,,face"))
    assert "unknown region 'persn': did you mean 'person'?; for anything else write prompt:WORDS" in wrong
    assert "region 'face' is named twice" in wrong and "prompt: has no words" in wrong and "a name is empty" in wrong
    assert len(wrong.splitlines()) == 4
    assert "region 'face' is named twice" in said(using=("face,prompt:face",))
    assert "expected --prompt-model together with" in said(using=("prompt:tie",))
    assert "expected --prompt-model together with" in said(prompt_model="x")
    assert "--weights are for person" in said(using=("prompt:tie",), prompt_model="x", weights=(tmp_path,))
    assert "expected scores from 0 to below 1" in said(min_score=1.0)
    assert "expected scores from 0 to below 1" in said(prompt_score=-0.1)
    assert "expected --batch-size and --size" in said(batch_size=0)
    assert "--device warp: cannot be used" in said(device="warp")
    assert not list(tmp_path.glob("*.json*"))


def test_nothing_found(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    wired.nobody().save(tmp_path / "images" / "a.png")
    files = wired.write_weights(tmp_path, wired.MASKS)
    out = tmp_path / "a.json"
    command = ["regions", "propose", str(tmp_path / "images"), "--using", "person,background", "-o", str(out)]
    command += ["--weights", str(files[0]), "--size", "96"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 3 and "found in no image: person, background; nothing is written" in done.stderr
    assert not out.exists() and not partial_of(out).exists() and str(out) not in done.stdout
