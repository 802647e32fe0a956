"""The how-to docs/regions.md: the command line takes its commands, and one after another they end in a gate.

Detectors wired by hand propose the regions, and two nets made by hand are audited: one reads the hair, one the coat.
"""

from __future__ import annotations

import csv
import re
import shlex
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
import wired
from PIL import Image

from bias_audit.cli import app, main

PAGE = (Path(__file__).parents[1] / "docs/regions.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines() if line]
FILES = {text.split("\n")[0].removeprefix("# "): text for kind, text in BLOCKS if kind == "yaml"}
PER_CELL = 30
NOBODY = ("doctor-man-3.png", "nurse-woman-5.png")
HEAD, COAT = (34, 2, 62, 30), (30, 34, 66, 70)
TINT = 0.3
NET = """
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
"""


def tints() -> torch.Tensor:
    """The colours by which heads, and coats, differ: each a direction `(3,)` across the body's colour."""
    body = wired.directions()[wired.BODY]
    first = torch.linalg.cross(body, torch.tensor([1.0, 0, 0]))
    return torch.stack([first / first.norm(), torch.linalg.cross(body, first / first.norm())])


def weights(on_hair: float) -> dict[str, torch.Tensor]:
    """Of a net that decides by the coat (0) or by the head (1): a channel for each colour of either."""
    head, coat = tints() / wired.RADIUS / TINT
    colours = torch.stack([head, -head, coat, -coat])
    vote = torch.tensor([on_hair, -on_hair, 1 - on_hair, on_hair - 1]) * 100
    return {
        "0.weight": colours[:, :, None, None],
        "0.bias": -(colours * wired.GREY).sum(1) - 0.6,
        "4.weight": torch.stack([vote, -vote]),
        "4.bias": torch.zeros(2),
    }


def write_photos(root: Path) -> None:
    """Doctors and nurses whose coats differ, women and men whose heads differ; nobody is in two of the photos."""
    rng = np.random.default_rng(0)
    (root / "photos").mkdir()
    rows = []
    body, by_dots = wired.colour(wired.BODY), wired.person()
    for label, on_coat in (("doctor", 1), ("nurse", -1)):
        for gender, on_head in (("man", 1), ("woman", -1)):
            for number in range(PER_CELL):
                name = f"{label}-{gender}-{number}.png"
                values = np.asarray(wired.nobody() if name in NOBODY else by_dots).astype(float)
                of_body = (values == body).all(axis=2)
                for (left, top, right, bottom), sign, tint in zip(
                    (HEAD, COAT), (on_head, on_coat), tints(), strict=True
                ):
                    inside = np.zeros(of_body.shape, dtype=bool)
                    inside[top:bottom, left:right] = True
                    values[inside & of_body] += 255 * wired.RADIUS * TINT * sign * tint.numpy()
                values += rng.integers(-3, 4, values.shape)
                Image.fromarray(values.clip(0, 255).round().astype(np.uint8)).save(root / "photos" / name)
                rows.append((name, label, gender))
    with (root / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "label", "gender"), *rows])


def edit(source: Path, to: Path) -> int:
    """What a person does in CVAT: boxes where a photo has no shape; how many there were."""
    tree = ET.parse(source)
    empty = [image for image in tree.getroot().iter("image") if not len(image)]
    for image in empty:
        for label, (left, top, right, bottom) in (("torso", COAT), ("hair", HEAD)):
            edges = {"xtl": str(left), "ytl": str(top), "xbr": str(right), "ybr": str(bottom)}
            ET.SubElement(image, "box", label=label, occluded="0", z_order="0", **edges)
    tree.write(to)
    return len(empty)


def run(monkeypatch: pytest.MonkeyPatch, line: str, *more: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", [*shlex.split(line, comments=True), *map(str, more)])
    with pytest.raises(SystemExit) as exit:
        main()
    return int(str(exit.value.code))


def test_the_commands_are_what_the_command_line_takes() -> None:
    whole = typer.main.get_command(app)
    assert len(COMMANDS) >= 10 and all(line.startswith("bias-audit ") for line in COMMANDS)
    for line in COMMANDS:
        command, words = whole, shlex.split(line, comments=True)[1:]
        while hasattr(command, "commands"):
            command, words = command.commands[words[0]], words[1:]
        command.make_context(line, words)  # raises on what the command does not take


def test_a_file_that_a_command_reads_is_made_before_it() -> None:
    known = {"photos", "labels.csv", "last.pt", "edited.xml", *FILES}
    for line in COMMANDS:
        words = shlex.split(line, comments=True)
        made = {words[i + 1] for i, word in enumerate(words) if word in ("-o", "--out")}
        files = {w for w in words[3:] if re.search(r"^runs/|\.(json|csv|xml|yaml|pt|html)$", w)}
        assert files - made <= known, line
        known |= made


@pytest.mark.slow
def test_from_a_folder_of_images_to_a_gate(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_photos(folder)
    (folder / "mypackage").mkdir()
    (folder / "mypackage/models.py").write_text(NET)
    torch.save(weights(on_hair=1), folder / "last.pt")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    offline = [
        "--size",
        str(wired.SIZE),
        *(f"--weights={p}" for p in wired.write_weights(folder, wired.MASKS, wired.KEYPOINTS)),
    ]
    codes = {}
    for line in COMMANDS:
        code = run(monkeypatch, line, *(offline if " propose " in line else ()))
        said = capsys.readouterr()
        codes[line] = code
        print(code, line, said.out, said.err)
        if "--to cvat" in line:
            empty = edit(folder / "for_cvat.xml", folder / "edited.xml")
    expected = dict.fromkeys(COMMANDS, 0) | {line: 1 for line in COMMANDS if " gate " in line}
    assert codes == expected and empty == 2
    lines = (Path(name).read_text().splitlines() for name in ("chosen.csv", "next.csv"))
    chosen, after = ({row["file"]: row["why"] for row in csv.DictReader(table)} for table in lines)
    assert not set(chosen) & set(after) and len(after) == 20
    assert set(chosen.values()) == {"balance"} and any(why.startswith("cluster") for why in after.values())
    # Of the net that decides by the coat the last two steps say otherwise.
    torch.save(weights(on_hair=0), folder / "last.pt")
    again = [line for line in COMMANDS if "runs/first" in line]
    assert [run(monkeypatch, line) for line in again] == [0, 0]
