"""Weights & Biases offline, read back with its own inspector: every kind of thing that is logged is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from PIL import Image
from pytorch_lightning.loggers import WandbLogger
from training import audit_set, fit, trainer

from bias_audit import read_run
from bias_audit.callbacks import BiasAuditCallback
from bias_audit.callbacks.wandb import fixed_panel, worst
from bias_audit.records import SampleScores

VIOLATED = {"rules": [{"metric": "accuracy", "min": 1.0, "max": 1.0, "min_samples": 1}], "min_samples": 1}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    yield
    wandb.teardown()


def inspected(path: Path) -> list[dict[str, Any]]:
    """The records of the one offline run below `path`."""
    logs = sorted(path.glob("**/*.wandb"))
    assert len(logs) == 1, logs
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(logs[0])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "HOME": str(path)})
    return [json.loads(line) for line in done.stdout.splitlines()]


def history(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record["history"]["item"] for record in records if record["type"] == "history"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A training with the Trainer's WandbLogger and a rule that every audit violates."""
    path = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        logger = WandbLogger(project="doctors", save_dir=path)
        with pytest.warns(UserWarning, match="violated"):
            fit(trainer(path, BiasAuditCallback(audit_set(), policy=VIOLATED), logger=logger, max_epochs=2))
        logger.experiment.finish()
        wandb.teardown()
    return path, inspected(path)


def test_scalars_are_the_recorded_numbers_at_their_steps(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    path, records = trained
    rows = [h for h in history(records) if "bias_audit/energy_share/hair" in h]
    audits = read_run(path).audits
    assert [row["trainer/global_step"] for row in rows] == [a.step for a in audits] == [0, 4, 8]
    for row, audit in zip(rows, audits, strict=True):
        for method, suffix in (("gradcam", ""), ("hirescam", "/hirescam")):
            expected = audit.estimate("energy_share", region="hair", method=method).value
            assert row[f"bias_audit/energy_share/hair{suffix}"] == pytest.approx(expected)
        assert row["bias_audit/accuracy"] == audit.estimate("accuracy").value


def test_overlays_with_masks_to_switch(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    path, records = trained
    rows = [h for h in history(records) if "bias_audit/overlays/panel._type" in h]
    assert [row["trainer/global_step"] for row in rows] == [0, 4, 8]
    captions = [row["bias_audit/overlays/panel.captions"] for row in rows]
    assert [[c.split(":")[0] for c in cs] for cs in captions] == [[c.split(":")[0] for c in captions[0]]] * 3
    for row in rows:
        for key in ("panel", "worst"):
            names, masks = (row[f"bias_audit/overlays/{key}.{part}"] for part in ("filenames", "all_masks"))
            assert len(names) == len(masks) == 8
            assert all(set(m) == {"object", "spurious"} for m in masks)
    picture = next(path.glob("**/media/images/bias_audit/overlays/panel_*.jpg"))
    assert Image.open(picture).size == (256, 256)
    labels = json.dumps([r["config"] for r in records if r["type"] == "config"])
    assert all(f'"{region}"' in labels for region in ("coat", "stethoscope", "face", "hair"))


def test_mask_pictures_are_the_regions(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    path, records = trained
    row = next(h for h in history(records) if "bias_audit/overlays/panel._type" in h)
    run = read_run(path)
    sheet, index = run.sheet(), fixed_panel(run.sheet(), 8)[0]
    for role, regions in (("object", ("coat", "stethoscope")), ("spurious", ("face", "hair"))):
        name = row["bias_audit/overlays/panel.all_masks"][0][role]["path"]
        drawn = np.asarray(Image.open(next(path.glob(f"**/{name}"))))
        order = [n for n, _ in run.manifest.subjects.regions]
        for number, region in enumerate(regions, 1):
            mask = Image.fromarray(sheet.masks[index, order.index(region)]).resize((256, 256), Image.Resampling.NEAREST)
            assert ((drawn == number) == np.asarray(mask)).all()


def test_table_alert_summary_and_artifact(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    path, records = trained
    tables = sorted(path.glob("**/media/table/bias_audit/samples_*.table.json"))
    assert len(tables) == 3
    run = read_run(path)
    table = json.loads(tables[-1].read_text())
    assert [row[0] for row in table["data"]] == list(run.sheet().ids)
    column = table["columns"].index("energy_share hair")
    scores = run.scores(int(np.argmax([a.step for a in run.audits])))
    last = next(t for t in map(json.loads, (t.read_text() for t in tables)) if _close(t, column, scores))
    assert last["columns"][:6] == ["id", "label", "predicted", "correct", "margin", "gender"]
    # One alert, though two audits violate the same rule.
    alerts = [r["alert"] for r in records if r["type"] == "alert"]
    assert len(alerts) == 1
    assert "At step 4: accuracy" in alerts[0]["text"]
    summary: dict[str, Any] = {}
    for record in records:
        if record["type"] == "summary":
            summary |= record["summary"].get("update", {})
    assert summary["bias_audit/outcome"] == "violated"
    assert summary["bias_audit/verdict/hair"] == run.audits[-1].judgement.findings[1].verdict
    artifacts = [r["artifact"] for r in records if r["type"] == "artifact"]
    ours = next(a for a in artifacts if a["type"] == "bias-audit")
    contents = {c["path"] for c in ours["manifest"]["contents"]}
    assert {"manifest.json", "audits.jsonl", "samples.npz", "report.html", "audits/000002.npz"} <= contents
    assert any("bias_audit/report._type" in h for h in history(records))


def _close(table: dict[str, Any], column: int, scores: SampleScores) -> bool:
    values = np.array([np.nan if row[column] is None else row[column] for row in table["data"]], dtype=np.float32)
    return np.allclose(values, scores.of("energy_share", "gradcam", "hair"), equal_nan=True)


def test_a_run_of_its_own(tmp_path: Path) -> None:
    # A run that is already there stays out of the artifact.
    for _ in range(2):
        callback = BiasAuditCallback(audit_set(1), dirpath=tmp_path / "run", wandb={"project": "own", "dir": tmp_path})
        fit(trainer(tmp_path, callback, max_epochs=1))
        wandb.teardown()
    logs = sorted(tmp_path.glob("**/*.wandb"), key=lambda p: p.stat().st_mtime)
    assert len(logs) == 2
    records = inspected(logs[-1].parent)
    rows = [h for h in history(records) if "bias_audit/energy_share/hair" in h]
    assert [row["trainer/global_step"] for row in rows] == [0, 4]
    assert records[-1]["exit"]["exit_code"] == 0
    artifact = next(r["artifact"] for r in records if r["type"] == "artifact" and r["artifact"]["type"] == "bias-audit")
    assert not [c["path"] for c in artifact["manifest"]["contents"] if "previous" in c["path"]]
    assert (tmp_path / "run" / "previous").exists()


def test_the_worst_and_the_panel(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    run = read_run(trained[0])
    sheet, scores, subjects = run.sheet(), run.scores(0), run.manifest.subjects
    panel = fixed_panel(sheet, 4)
    assert {(int(sheet.labels[i]), str(sheet.attributes[i, 0])) for i in panel} == {
        (label, gender) for label in (0, 1) for gender in ("female", "male")
    }
    spurious = np.nansum([scores.of("energy_share", "gradcam", r) for r in ("face", "hair")], axis=0)
    chosen = worst(scores, subjects, 3)
    assert min(spurious[chosen]) >= max(np.delete(spurious, chosen))
