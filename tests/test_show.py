"""`bias-audit show`: what a terminal shows of a run, on a real terminal and in a log file."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from synthetic import make_run

from bias_audit.headlines import headlines
from bias_audit.overlays import overlay
from bias_audit.records.panels import most_looked
from bias_audit.records.results import AuditResult
from bias_audit.records.runs import Run, read_run
from bias_audit.records.writing import RunDirectory
from bias_audit.terminal.pictures import PICTURE
from bias_audit.terminal.run import MOST_BARS, sparkline

COMMAND = str(Path(sys.executable).with_name("bias-audit"))
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "TERM")}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = tmp_path_factory.mktemp("runs") / "run"
    return read_run(make_run(path, audits=5, removal={"hair": 0.6, "face": 0.01}, fitness={"gradcam": 0.2}))


def show(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, "show", *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        env=ENVIRONMENT | environment,
        check=False,
    )


def row(text: str, what: str) -> list[str]:
    """The cells behind the name `what` in the table of courses."""
    rows = [[part.strip() for part in line.strip("│").split("│")] for line in text.splitlines()]
    (found,) = (cells[1:] for cells in rows if cells[0] == what and len(cells) == 5)
    return found


def test_verdicts_courses_and_onsets(run: Run) -> None:
    done = show(run.path)
    assert (done.returncode, done.stderr) == (0, "")
    words = " ".join(done.stdout.replace("│", " ").split())
    assert "region hair reliance" in words and "region face cleared" in words
    assert "Over time: step 100 to 500" in words and "Audit at step 500, epoch 4, raw weights." in words
    assert "Region hair: reliance since step" in words and "Region face: reliance" not in words
    assert words.endswith("bias-audit show: policy violated") and "\x1b" not in done.stdout
    for e in headlines(run.audits[-1].estimates):
        bars, first, last, n = row(done.stdout, e.subject.replace("_", " "))
        values = [
            audit.estimate(e.metric, region=e.region, group=e.group, method=e.method).value for audit in run.audits
        ]
        assert (
            len(bars) == 5 and first == f"{values[0]:z.2f}" and last.startswith(f"{e.value:z.2f} [") and n == str(e.n)
        )
    # What grows rises, and beside it what does not stays down, on the same scale.
    hair, face = (row(done.stdout, f"removal flips on {region}")[0] for region in ("hair", "face"))
    assert list(hair) == sorted(hair) and hair[-1] == "█" and face == "▁" * 5


def test_an_estimate_that_is_carried_on_is_no_new_bar(tmp_path: Path, run: Run) -> None:
    directory = RunDirectory.create(tmp_path / "run", run.manifest, run.sheet())
    for i, audit in enumerate(run.audits[:3]):
        older = tuple(replace(e, age=1) if i == 1 and e.metric == "removal_flips" else e for e in audit.estimates)
        older = tuple(replace(e, age=2) if i == 2 and e.metric == "removal_flips" else e for e in older)
        directory.append(AuditResult(**vars(audit) | {"estimates": older}, scores=run.scores(i)))
    bars, _, last, _ = row(show(tmp_path / "run").stdout, "removal flips on hair")
    assert bars[0] != "·" and bars[1:] == "··" and last.endswith("2 audits ago")


def test_an_earlier_audit(run: Run) -> None:
    words = " ".join(show(run.path, "--audit", "0").stdout.split())
    assert "Audit at step 100, epoch 0, raw weights." in words and "4 later audits are not in this." in words
    assert "since step" not in words
    assert show(run.path, "--audit", "-1").stdout == show(run.path).stdout


@pytest.mark.parametrize(
    ("options", "arguments", "words"),
    [
        ({}, ["--audit", "7"], "there is no audit 7; there are 0 to 0, or -1 for the last"),
        ({"audits": 0}, [], "there is no audit -1; there are none: the run recorded no audit"),
        ({}, ["--samples", "-1"], "--samples"),
    ],
)
def test_wrong_usage(tmp_path: Path, options: dict[str, Any], arguments: list[str], words: str) -> None:
    done = show(make_run(tmp_path / "run", **{"audits": 1} | options), *arguments)
    assert done.returncode == 2 and done.stdout == "" and words in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ended": False}, "Inconclusive: training has not finished, or was killed: the model it ends with was not"),
        ({"failed": "no disk"}, "Inconclusive: the audit at step 200 failed: no disk."),
        ({"torn": True}, "Inconclusive: the last record was cut off while it was written."),
        ({"audits": 0, "reference": True}, "bias-audit show: before training: nothing follows"),
    ],
)
def test_what_is_not_final_is_said(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    done = show(make_run(tmp_path / "run", **{"audits": 1} | options))
    assert done.returncode == 0 and words in " ".join(done.stdout.split())


def test_many_audits_and_hostile_names(tmp_path: Path) -> None:
    path = make_run(
        tmp_path / "run",
        audits=MOST_BARS + 2,
        samples=8,
        regions=(("[red]", "spurious"), ("\x1b[31mhair\x07", "spurious"), ("y" * 300, "object")),
        attributes=(("[/]", ("x", "y")),),
        ids=["[bold]", "a\nb", *map(str, range(6))],
    )
    assert "\x1b" not in show(path).stdout and "\x07" not in show(path).stdout
    done = show(path, "--samples", "8")
    plain = re.sub(r"\x1b\[[\d;]*m", "", done.stdout)
    assert done.returncode == 0
    assert "region [red]" in plain and "attribute [/]" in plain and "y" * 40 in plain
    assert f"the last {MOST_BARS} of {MOST_BARS + 2} audits" in plain
    assert len(row(plain, "accuracy")[0]) == MOST_BARS
    assert max(map(len, plain.splitlines())) <= 140
    assert re.search(r"\d\. \[bold\]: 0\.\d\d on ", plain) and re.search(r"\d\. a b: 0\.\d\d on ", plain)


def test_showing_needs_no_torch(run: Run) -> None:
    script = (
        "import sys\nfrom bias_audit.cli import main\ntry: main()\nexcept SystemExit as e: assert e.code == 0, e\n"
        "heavy = {'torch', 'lightning', 'pytorch_lightning', 'wandb', 'matplotlib', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    arguments = ["show", str(run.path), "--samples", "1"]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_sparkline_scale() -> None:
    assert sparkline([0.0, 0.5, 1.0, None, -1.0, 2.0], 0.0, 1.0) == "▁▅█·▁█"
    assert sparkline([], 0.0, 1.0) == ""


# Pictures


def test_no_pictures_in_a_log_file_unless_asked(run: Run) -> None:
    assert "▀" not in show(run.path).stdout
    asked = show(run.path, "--samples", "3").stdout
    lines = [line for line in asked.splitlines() if "▀" in line]
    assert len(lines) == PICTURE // 2 and all(line.count("▀") == 3 * (PICTURE + 2) - 2 for line in lines)
    # Without colour half cells say nothing; the words do.
    bare = show(run.path, "--samples", "3", NO_COLOR="1").stdout
    assert "▀" not in bare and "1. portrait-" in bare


def test_the_pictures_are_those_that_are_looked_at_worst(run: Run) -> None:
    asked = show(run.path, "--samples", "2").stdout
    scores = run.scores(4)
    shares = np.nan_to_num(np.stack([scores.of("energy_share", "gradcam", r) for r in ("hair", "face")]))
    order = np.argsort(-shares.max(0), kind="stable")[:2]
    assert [looked.row for looked in most_looked(scores, ("hair", "face"), 2)] == order.tolist()
    for k, i in enumerate(order, 1):
        region = ("hair", "face")[int(shares[:, i].argmax())]
        assert f"{k}. {scores.ids[i]}: {shares[:, i].max():.2f} on {region}; " in asked
    # Of each half cell the colour: upper and lower pixels of the first picture, put together again.
    pattern = r"38;2;(\d+);(\d+);(\d+);48;2;(\d+);(\d+);(\d+)m▀"
    lines = [re.findall(pattern, line)[:PICTURE] for line in asked.splitlines() if "▀" in line]
    got = np.array(lines, dtype=float).reshape(-1, PICTURE, 2, 3).swapaxes(1, 2).reshape(PICTURE, PICTURE, 3)
    picture = Image.open(io.BytesIO(run.sheet().thumbnails[order[0]])).convert("RGB")
    wanted = overlay(picture, scores.maps[0, order[0]].astype(np.float32)).resize((PICTURE, PICTURE))
    # The last columns border on the gap to the next picture.
    off = np.abs(got - np.asarray(wanted, dtype=float))[:, :-3]
    assert off.mean() < 1.5 and off.max() < 40


def test_nothing_looks_at_a_silent_map(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", audits=1, samples=4, silent=4)
    assert "No sample has a heatmap on a spurious region." in show(path, "--samples", "2").stdout


def on_terminal(answers: Callable[[bytes], bytes], *command: str, size: tuple[int, int, int, int]) -> bytes:
    """What a command writes to a terminal that answers its questions."""
    pid, terminal = pty.fork()
    if pid == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", *size))
        os.execve(command[0], command, ENVIRONMENT | {"TERM": "xterm-256color", "COLORTERM": "truecolor"})
    written = b""
    try:
        while select.select([terminal], [], [], 60)[0]:
            got = os.read(terminal, 1 << 16)
            if not got:
                break
            written += got
            if answer := answers(got):
                os.write(terminal, answer)
    except OSError:
        # Linux says that the other end is closed by an error.
        pass
    finally:
        os.close(terminal)
        _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, written.decode(errors="replace")[-2000:]
    return written


def test_a_terminal_that_draws_pixels_gets_pixels(run: Run) -> None:
    def sixel(asked: bytes) -> bytes:
        return b"\x1b[?62;4;6c" if b"\x1b[c" in asked else b""

    written = on_terminal(sixel, COMMAND, "show", str(run.path), size=(40, 120, 960, 640))
    assert b"\x1bP" in written and "▀".encode() not in written
    assert b"4. portrait-" in written.split(b"\x1b\\")[-1] and b"5. portrait-" not in written


@pytest.mark.parametrize("size", [(40, 120, 960, 640), (40, 120, 0, 0), (0, 0, 0, 0)])
def test_any_other_terminal_gets_half_cells(size: tuple[int, int, int, int], run: Run) -> None:
    def nothing(asked: bytes) -> bytes:
        return b"\x1b[?62c" if b"\x1b[c" in asked else b""

    written = on_terminal(nothing, COMMAND, "show", str(run.path), size=size)
    assert written.count("▀".encode()) > 1000 and b"\x1bP" not in written and b"4. portrait-" in written


def test_a_model_with_more_outputs_than_the_audit_set_has_classes(tmp_path: Path) -> None:
    """It decides for classes that have no name."""
    runs = [make_run(tmp_path / name, samples=40, audits=1, seed=seed) for seed, name in enumerate("ab")]
    for path in runs:
        run = read_run(path)
        scores = run.scores(0)
        strange = replace(scores, predictions=np.where(np.arange(40) % 2, scores.predictions, 4))
        directory = RunDirectory.create(path, run.manifest, run.sheet())
        directory.append(AuditResult(**vars(run.audits[0]), scores=strange))
        directory.end()
    assert "decided class 4" in show(runs[0], "--samples", "20").stdout
    page = tmp_path / "compare.html"
    command = [COMMAND, "compare", str(runs[0]), str(runs[1]), "--out", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "class 4" in page.read_text(encoding="utf-8")
