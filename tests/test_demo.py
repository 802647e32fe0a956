"""The demo as a person runs it: the planted bias is found and refused, and the same network on balanced data passes."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
from action import run_action
from typer.testing import CliRunner

from bias_audit import demo, read_run, run_gate
from bias_audit.cli import app
from bias_audit.terms import Outcome, Verdict

COMMAND = str(Path(sys.executable).with_name("bias-audit"))


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.mark.usefixtures("without_page")
def test_two_short_trainings_are_audited_and_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the command does, on few scenes; what it shows takes minutes, and is among the slow tests."""
    for name, number in (("PER_CLASS", 40), ("EPOCHS", 1), ("AUDITED_PER_CELL", 4)):
        monkeypatch.setattr(demo, name, number)
    done = CliRunner().invoke(app, ["demo", "--out", str(tmp_path), "--seed", "1"], catch_exceptions=False)
    assert done.exit_code == 0
    runs = {name: read_run(tmp_path / name) for name in ("biased", "balanced")}
    assert len({run.manifest.fingerprint for run in runs.values()}) == 1
    assert [[a.trigger for a in run.audits] for run in runs.values()] == [["reference", "epoch"]] * 2
    # Each was trained on what is said: 31 and 9 men and women among 40 doctors, 3 and 37 among the nurses. Cramér's V
    # of 2 x 2 cells, corrected by 1 / (n - 1).
    squared = (31 * 37 - 9 * 3) ** 2 / (40 * 40 * 34 * 46)
    told = [run.audits[-1].estimate("cramers_v", group="gender").value for run in runs.values()]
    assert told == [pytest.approx(math.sqrt((squared - 1 / 79) / (1 - 1 / 79))), 0]
    # The closing table is of the last audits, and of what the gate says of them: 16 images are too few.
    rows = [line for line in done.stdout.splitlines() if line.startswith("│")]
    for title, metric in (("energy share on face", "energy_share"), ("enrichment on face", "enrichment")):
        (row,) = (line for line in rows if title in line)
        for run in runs.values():
            e = run.audits[-1].estimate(metric, region="face", method="gradcam")
            assert f"{e.value:.2f} [{e.low:.2f}, {e.high:.2f}]" in row
    assert [run_gate(run).outcome for run in runs.values()] == [Outcome.INCONCLUSIVE] * 2
    assert rows[-1].count("inconclusive (exit code 3)") == 2


@pytest.mark.slow
def test_the_biased_training_is_refused_and_the_balanced_one_passes(tmp_path: Path) -> None:
    done = run("demo", "--out", tmp_path, "--seed", 1)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "violated (exit code 1)" in done.stdout
    assert "held (exit code 0)" in done.stdout

    refused, passed = run("gate", tmp_path / "biased"), run("gate", tmp_path / "balanced")
    assert refused.returncode == 1
    assert "gate: violated: verdict on region face: reliance" in " ".join(refused.stdout.split())
    assert passed.returncode == 0
    assert "gate: passed" in passed.stdout
    # And as the steps of the GitHub action.
    for name, outcome in (("biased", "violated"), ("balanced", "held")):
        ran = run_action(tmp_path, source=tmp_path / name)
        assert (ran.outputs["outcome"], ran.code) == (outcome, int(outcome == "violated")), ran.log

    biased, balanced = (read_run(tmp_path / name) for name in ("biased", "balanced"))
    assert biased.manifest.fingerprint == balanced.manifest.fingerprint
    for of_biased, of_balanced in zip(
        biased.audits[-1].judgement.findings, balanced.audits[-1].judgement.findings, strict=True
    ):
        assert of_biased.verdict is Verdict.RELIANCE
        # Chance may leave open whether accuracy differs at all, but not whether the regions decide.
        assert Verdict.RELIANCE not in of_balanced.possible
        assert of_balanced.kind == "attribute" or of_balanced.verdict in (Verdict.CLEARED, Verdict.SUSPECTED)
    # What the verdicts rest on: the same regions get more of the heatmap, and men among nurses are misread.
    for region in ("face", "hair"):
        shares = [
            r.audits[-1].estimate("energy_share", region=region, method="gradcam").value for r in (biased, balanced)
        ]
        assert shares[0] > 1.2 * shares[1]
    gaps = [r.audits[-1].estimate("accuracy_gap", class_name="nurse", group="gender").value for r in (biased, balanced)]
    assert gaps[0] > 0.15 > gaps[1]
    for name in ("biased", "balanced"):
        assert run("report", tmp_path / name).stdout.strip() == str(tmp_path / name / "report.html")
