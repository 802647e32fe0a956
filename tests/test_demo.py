"""The demo as a person runs it: the planted bias is found and refused, and the same network on balanced data passes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from action import run_action

from bias_audit import read_run
from bias_audit.terms import Verdict

COMMAND = str(Path(sys.executable).with_name("bias-audit"))


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False)


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
