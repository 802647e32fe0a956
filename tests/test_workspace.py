"""The saved workspace: its specification names what the sink logs, and a run that was never sent is sent in order."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import wandb
from synthetic import make_run
from test_wandb import history, inspected, summary
from typer.testing import CliRunner

from bias_audit import read_run
from bias_audit.callbacks.wandb.workspace import push, send_run
from bias_audit.cli import app, main
from bias_audit.records.errors import RecordError

SECTIONS = ["What is found", "Where it looks", "Does it rely on it", "For whom", "Overlays", "Samples"]


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_ENTITY", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    yield
    wandb.teardown()


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], str]:
    """A run directory that nobody logged, sent to an offline run."""
    path = tmp_path_factory.mktemp("sent")
    run = make_run(path / "run", audits=3, reference=True, removal={"hair": 0.4}, shows=["hair"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_DIR", str(path))
        run_id = send_run(read_run(run), entity=None, project="faces")
        wandb.teardown()
    return run, inspected(path), run_id


def panels(spec: str) -> dict[str, list[dict[str, Any]]]:
    sections = json.loads(spec)["spec"]["section"]["panelBankConfig"]["sections"]
    return {section["name"]: section["panels"] for section in sections}


def keys_of(panel: dict[str, Any]) -> set[str]:
    """The logged keys that a panel shows."""
    config = panel["config"]
    found = {*config.get("metrics", ()), *config.get("mediaKeys", ())}
    if panel["viewType"] == "Weave":
        found.add(config["panel2Config"]["exp"]["fromOp"]["inputs"]["key"]["val"])
    if panel["viewType"] == "Vega2":
        (run_sets,) = config["userQuery"]["queryFields"]
        (table,) = (field for field in run_sets["fields"] if field["name"] == "summaryTable")
        found.add(table["args"][0]["value"])
    return found


def test_the_specification_answers_the_questions_in_order(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", removal={"hair": 0.4})
    done = CliRunner().invoke(app, ["dashboard", "push", str(run), "--project", "faces", "--dry-run"])
    assert done.exit_code == 0, done.output
    found = panels(done.output)
    assert list(found) == SECTIONS
    titles = {p["config"].get("chartTitle") for section in found.values() for p in section}
    # The policy's limits are said where a role or an attribute stands for several.
    assert "enrichment on hair (gradcam); policy: at most 1.5" in titles
    assert "enrichment on coat (hirescam); policy: at least 1" in titles
    assert "worst group accuracy by gender; policy: at least 0.5" in titles
    assert "accuracy" in titles
    (removal,) = (p for p in found["Does it rely on it"] if p["config"]["chartTitle"] == "removal flips on hair")
    assert removal["config"]["metrics"] == [
        "bias_audit_3_does_it_rely/removal_flips_hair",
        "bias_audit_7_intervals/removal_flips_hair_low",
        "bias_audit_7_intervals/removal_flips_hair_high",
        "bias_audit_3_does_it_rely/control_flips_hair",
    ]
    assert {p["config"]["mode"] for p in found["Overlays"]} == {"gallery"}
    # Nothing is drawn anew each time: it can be kept beside the run and compared.
    assert push(run, project="faces", dry_run=True) + "\n" == done.output


def test_every_panel_shows_what_the_sink_logs(sent: tuple[Path, list[dict[str, Any]], str]) -> None:
    run, records, run_id = sent
    spec = push(run, project="faces", dry_run=True)
    logged = {key for row in history(records) for key in row}
    logged |= {key.rpartition(".")[0] for key in logged}
    wanted = {key for section in panels(spec).values() for panel in section for key in keys_of(panel)}
    assert len(wanted) > 40
    # No page was drawn of this run.
    assert wanted - logged == {"bias_audit_1_verdict/page"}
    (runs,) = json.loads(spec)["spec"]["section"]["runSets"]
    assert [(f["key"]["name"], f["value"]) for f in runs["filters"]["filters"]] == [("name", run_id)]


def test_a_run_that_was_not_sent_is_sent_in_order(sent: tuple[Path, list[dict[str, Any]], str]) -> None:
    path, records, run_id = sent
    run, rows = read_run(path), history(records)
    assert [row["trainer/global_step"] for row in rows] == [a.step for a in run.audits] == [0, 100, 200, 300]
    for row, audit in zip(rows, run.audits, strict=True):
        expected = audit.estimate("energy_share", region="hair", method="gradcam").value
        assert row["bias_audit/energy_share/hair"] == pytest.approx(expected)
        assert len(row["bias_audit_5_pictures/panel.filenames"]) == 8
    assert summary(records)["bias_audit/outcome"] == "violated"
    # What was violated then is no news now.
    assert not [r for r in records if r["type"] == "alert"]
    assert records[-1]["exit"]["exit_code"] == 0
    where = json.loads((path / "wandb.json").read_bytes())
    assert where == {"entity": "", "project": "faces", "id": run_id, "offline": True, "name": "bias_audit", "audits": 4}


def test_without_interventions_the_workspace_says_unknown(tmp_path: Path) -> None:
    found = panels(push(make_run(tmp_path / "run"), project="faces", dry_run=True))
    (note,) = found["Does it rely on it"]
    assert note["config"]["value"].startswith("**Unknown.** No audit of this run has measured an intervention")


def test_many_classes_and_names_stay_bounded(tmp_path: Path) -> None:
    regions = [(f"<script>{i}", "spurious") for i in range(40)]
    classes = [f"class {i}" for i in range(30)]
    run = make_run(tmp_path / "run", audits=1, samples=30, regions=regions, classes=classes, image_size=(32, 32))
    found = panels(push(run, project="faces", dry_run=True))
    assert max(map(len, found.values())) <= 26
    assert {"value": "No confusion matrix is drawn of more than 20 classes."} in [
        p["config"] for p in found["For whom"]
    ]
    assert "enrichment on <script>3 (gradcam); policy: at most 1.5" in [
        p["config"].get("chartTitle") for p in found["Where it looks"]
    ]


def test_what_cannot_be_pushed_says_what_to_do(
    sent: tuple[Path, list[dict[str, Any]], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(ValueError, match="was not sent to W&B, so its project is not known: give --project"):
        push(run)
    with pytest.raises(ValueError, match=r"there is no W&B account \(No API key.*run `wandb login`, or give --dry-run"):
        push(run, project="faces")
    empty = make_run(tmp_path / "empty", audits=0)
    with pytest.raises(ValueError, match="holds no audit yet"):
        push(empty, project="faces", dry_run=True)
    (run / "wandb.json").write_text("{")
    with pytest.raises(RecordError, match=r"wandb\.json: cannot be read"):
        push(run, project="faces", dry_run=True)
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(ValueError, match="WANDB_MODE is offline: a workspace cannot be saved"):
        push(sent[0])
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(ValueError, match=r"pip install 'bias-audit\[wandb-workspaces\]'"):
        push(sent[0], dry_run=True)


def test_elsewhere_is_another_run(sent: tuple[Path, list[dict[str, Any]], str], tmp_path: Path) -> None:
    run = shutil.copytree(sent[0], tmp_path / "run")
    spec = json.loads(push(run, project="other", entity="team", dry_run=True))
    assert (spec["entity"], spec["project"]) == ("team", "other")
    assert spec["spec"]["section"]["runSets"][0]["filters"]["filters"] == []


def test_the_command_exits_with_2_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["bias-audit", "dashboard", "push", str(run), "--project", "faces"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("bias-audit: there is no W&B account")
