"""Weights & Biases offline, read back with its own inspector: every kind of thing that is logged is found."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from PIL import Image
from pytorch_lightning.loggers import WandbLogger
from synthetic import make_run
from training import audit_set, fit, loader, trainer

from bias_audit import read_run
from bias_audit.callbacks import BiasAuditCallback, Session, WandbSink
from bias_audit.callbacks.wandb.keys import Keys
from bias_audit.callbacks.wandb.writer import WandbWriter
from bias_audit.gate.gate import run_gate
from bias_audit.records.panels import fixed_panel, worst
from bias_audit.records.results import AuditResult
from bias_audit.records.runs import Run
from bias_audit.records.samples import SampleScores
from bias_audit.report.page import write_report
from bias_audit.terms import Outcome, Subjects

# One of the two, whatever the model is.
VIOLATED = {"rules": [{"metric": "accuracy", "min": 1.0}, {"metric": "accuracy", "max": 0.0}], "min_samples": 1}


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


def test_scalars_get_no_panel_each_and_what_is_looked_at_does(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    records = trained[1]
    logged = {key for row in history(records) for key in row if key.startswith("bias_audit/")}
    metrics = [record["metric"] for record in records if record["type"] == "metric"]
    hidden = {metric["name"] for metric in metrics if metric.get("options", {}).get("hidden")}
    assert hidden == logged and len(hidden) > 50
    assert not any(name.startswith("bias_audit_") for name in hidden)


def test_overlays_with_masks_to_switch(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    path, records = trained
    rows = [h for h in history(records) if "bias_audit_5_pictures/panel._type" in h]
    assert [row["trainer/global_step"] for row in rows] == [0, 4, 8]
    captions = [row["bias_audit_5_pictures/panel.captions"] for row in rows]
    assert [[c.split(":")[0] for c in cs] for cs in captions] == [[c.split(":")[0] for c in captions[0]]] * 3
    for row in rows:
        for key in ("panel", "worst"):
            names, masks = (row[f"bias_audit_5_pictures/{key}.{part}"] for part in ("filenames", "all_masks"))
            # Of the worst, what has no score is left out.
            assert len(names) == len(masks) == 8 or (key == "worst" and 0 < len(names) == len(masks) < 8)
            assert all({"object", "spurious"} <= set(m) for m in masks)
    picture = next(path.glob("**/media/images/bias_audit_5_pictures/panel_*.jpg"))
    assert Image.open(picture).size == (256, 256)
    labels = json.dumps([r["config"] for r in records if r["type"] == "config"])
    assert all(f'"{region}"' in labels for region in ("coat", "stethoscope", "face", "hair"))


def test_table_alert_summary_and_artifact(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    path, records = trained
    tables = sorted(path.glob("**/media/table/bias_audit_6_samples/samples_*.table.json"))
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
    ours = next(a for a in artifacts if a["type"] == "bias-audit" and "final" in a["aliases"])
    contents = {c["path"] for c in ours["manifest"]["contents"]}
    assert {"manifest.json", "audits.jsonl", "samples.npz", "report.html", "audits/000002.npz"} <= contents
    assert any("bias_audit_1_verdict/page._type" in h for h in history(records))


def _close(table: dict[str, Any], column: int, scores: SampleScores) -> bool:
    values = np.array([np.nan if row[column] is None else row[column] for row in table["data"]], dtype=np.float32)
    return np.allclose(values, scores.of("energy_share", "gradcam", "hair"), equal_nan=True)


def test_a_run_of_its_own(tmp_path: Path) -> None:
    # A run that is already there stays out of the artifact.
    make_run(tmp_path / "run")
    callback = BiasAuditCallback(audit_set(1), dirpath=tmp_path / "run", wandb={"project": "own", "dir": tmp_path})
    fit(trainer(tmp_path, callback, max_epochs=1))
    wandb.teardown()
    records = inspected(tmp_path)
    rows = [h for h in history(records) if "bias_audit/energy_share/hair" in h]
    assert [row["trainer/global_step"] for row in rows] == [0, 4]
    assert records[-1]["exit"]["exit_code"] == 0
    artifacts = [r["artifact"] for r in records if r["type"] == "artifact" and r["artifact"]["type"] == "bias-audit"]
    assert len(artifacts) == 3
    assert not [c["path"] for a in artifacts for c in a["manifest"]["contents"] if "previous" in c["path"]]
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


def results(run: Run) -> list[AuditResult]:
    return [AuditResult(**vars(audit), scores=run.scores(i)) for i, audit in enumerate(run.audits)]


@contextmanager
def offline_run(path: Path) -> Iterator[wandb.Run]:
    """A run whose records lie below `path` when this is left."""
    run = wandb.init(project="own", dir=path, mode="offline", reinit="create_new")
    yield run
    run.finish()
    wandb.teardown()


def logged(
    path: Path, run: Run, audits: Sequence[AuditResult], *, error: str = "", failed: str = "", **options: Any
) -> list[dict[str, Any]]:
    """What a sink of its own makes of so many results, read back."""
    session = Session("bias_audit", run.path, run.manifest, run.sheet())
    path.mkdir(exist_ok=True)
    with offline_run(path) as own:
        sink = WandbWriter(own, own=True, **options)
        sink.start(session)
        for audit in audits:
            sink.write(audit)
        if failed:
            sink.fail(audits[-1].step + 1, failed)
        sink.end(error)
    return inspected(path)


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for record in records:
        found |= record["summary"].get("update", {}) if record["type"] == "summary" else {}
    return found


def tables(path: Path, records: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """The tables that were logged under a key, in order."""
    names = [row[f"{key}.path"] for row in history(records) if f"{key}.path" in row]
    return [json.loads(next(path.glob(f"**/files/{name}")).read_text()) for name in names]


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run, list[AuditResult], list[dict[str, Any]]]:
    """Four audits, of which only the last has effects of removals; one number of it is carried, one not measured."""
    path = tmp_path_factory.mktemp("synthetic")
    # The hair's ellipse and the face's overlap.
    run = read_run(make_run(path / "run", audits=3, reference=True, removal={"hair": 0.4}, seed=3))
    write_report(run.path)
    audits = results(run)
    estimates = [
        replace(e, age=1)
        if (e.metric, e.group) == ("accuracy_gap", "gender") and e.class_name is None
        else replace(e, value=None, low=None, high=None, reason="nothing to measure")
        if (e.metric, e.region, e.method) == ("enrichment", "coat", "gradcam")
        else e
        for e in audits[-1].estimates
    ]
    audits[-1] = replace(audits[-1], estimates=tuple(estimates))
    return path, run, audits, logged(path / "logs", run, audits)


def test_sections_follow_the_questions(synthetic: Any) -> None:
    _, _, audits, records = synthetic
    rows = history(records)[: len(audits)]
    assert [row["trainer/global_step"] for row in rows] == [a.step for a in audits] == [0, 100, 200, 300]
    # One slash: the same section whether W&B groups by the first or by the last.
    sections = {key.split("/")[0] for row in rows for key in row if key.startswith("bias_audit_")}
    questions = ("1_verdict", "2_where_it_looks", "3_does_it_rely", "4_for_whom", "5_pictures", "6_samples")
    assert sections == {f"bias_audit_{name}" for name in (*questions, "7_intervals")}
    expected = {
        "2_where_it_looks/enrichment_hair": {"metric": "enrichment", "region": "hair", "method": "gradcam"},
        "2_where_it_looks/energy_share_face_by_hirescam": {
            "metric": "energy_share",
            "region": "face",
            "method": "hirescam",
        },
        "3_does_it_rely/removal_flips_hair": {"metric": "removal_flips", "region": "hair"},
        "4_for_whom/worst_group_accuracy_gender": {"metric": "worst_group_accuracy", "group": "gender"},
        "4_for_whom/accuracy_gender_male": {"metric": "accuracy", "group": "gender=male"},
        "4_for_whom/accuracy_class_nurse": {"metric": "accuracy", "class_name": "nurse"},
    }
    for row, audit in list(zip(rows, audits, strict=True))[1:]:
        for key, named in expected.items():
            e = audit.estimate(**named)
            item = key.split("/")[1]
            ends = [row[f"bias_audit_7_intervals/{item}_{end}"] for end in ("low", "high")]
            assert [row[f"bias_audit_{key}"], *ends] == pytest.approx([e.value, e.low, e.high])
        levels = {"cleared": 0, "inconclusive": 1, "suspected": 2, "reliance": 3}
        for finding in audit.judgement.findings:
            assert row[f"bias_audit_1_verdict/verdict_{finding.name}"] == levels[finding.verdict]
        assert row["bias_audit_1_verdict/violated_rules"] == len(audit.judgement.violations)


def test_only_what_was_measured_is_a_point(synthetic: Any) -> None:
    rows = history(synthetic[3])
    for key in ("bias_audit_4_for_whom/accuracy_gap_gender", "bias_audit_2_where_it_looks/enrichment_coat"):
        assert [key in row for row in rows[:4]] == [True, True, True, False]
    assert not any("removal_flips" in key for key in rows[0])


def test_every_line_is_drawn_over_the_training_step(synthetic: Any) -> None:
    records = synthetic[3]
    defined = {r["metric"].get("name"): r["metric"].get("step_metric") for r in records if r["type"] == "metric"}
    drawn = [k for k in history(records)[1] if k.startswith("bias_audit_4_for_whom/accuracy") or k.endswith("_low")]
    assert drawn and all(defined[key] == "trainer/global_step" for key in drawn)
    shown = {
        r["metric"].get("name") for r in records if r["type"] == "metric" and not r["metric"]["options"].get("hidden")
    }
    assert shown >= set(drawn) and not any(name.startswith("bias_audit/") for name in shown)
    assert not any("*" in (name or "*") for name in defined)


def test_masks_are_the_regions_and_hide_none(synthetic: Any) -> None:
    path, run, _, records = synthetic
    sheet, row = run.sheet(), history(records)[0]
    order = [name for name, _ in run.manifest.subjects.regions]
    for index, layers in zip(fixed_panel(sheet, 8), row["bias_audit_5_pictures/panel.all_masks"], strict=True):
        drawn = {k: np.asarray(Image.open(next(path.glob(f"**/files/{v['path']}")))) for k, v in layers.items()}
        for role, regions in (("object", ("coat",)), ("spurious", ("hair", "face"))):
            for number, region in enumerate(regions, 1):
                shown = np.any([layer == number for name, layer in drawn.items() if name.startswith(role)], axis=0)
                mask = Image.fromarray(sheet.masks[index][order.index(region)])
                assert (shown == np.asarray(mask.resize(shown.shape[::-1], Image.Resampling.NEAREST))).all()
    overlap = np.stack([masks[order.index("hair")] & masks[order.index("face")] for masks in sheet.masks])
    assert overlap.any(axis=(1, 2)).all()


def test_confusion_by_group_and_share_by_region(synthetic: Any) -> None:
    path, run, audits, records = synthetic
    sheet = run.sheet()
    for name, chosen in (("all", np.ones(24, bool)), ("gender_female", sheet.attributes[:, 0] == "female")):
        key = f"Custom Chart Tables/bias_audit_4_for_whom/confusion_{name}_table"
        for table, audit in zip(tables(path, records, key), audits, strict=True):
            s = audit.scores
            pairs = list(zip(s.labels[chosen], s.predictions[chosen], strict=True))
            classes = ("doctor", "nurse")
            counted = [
                [a, b, sum(p == (i, j) for p in pairs)] for i, a in enumerate(classes) for j, b in enumerate(classes)
            ]
            assert table["data"] == counted
    bars = tables(path, records, "Custom Chart Tables/bias_audit_2_where_it_looks/share_of_heat_by_region_table")
    hair = audits[-1].estimate("energy_share", region="hair", method="gradcam").value
    assert ["hair (spurious)", pytest.approx(hair)] in bars[-1]["data"]
    assert [row[0] for row in bars[-1]["data"]] == [
        "coat (object)",
        "hair (spurious)",
        "face (spurious)",
        "remainder (no region)",
    ]


def test_one_table_of_samples_with_scores_predictions_and_effects(synthetic: Any) -> None:
    path, run, audits, records = synthetic
    found = tables(path, records, "bias_audit_6_samples/samples")
    assert not any("removal" in column for column in found[2]["columns"])
    columns, scores = found[3]["columns"], audits[3].scores
    cells = dict(zip(columns, zip(*found[3]["data"], strict=True), strict=True))
    assert cells["id"] == run.sheet().ids
    assert cells["predicted"] == tuple(("doctor", "nurse")[p] for p in scores.predictions)
    assert cells["correct"] == tuple((scores.predictions == scores.labels).tolist())
    assert cells["gender"] == tuple(run.sheet().attributes[:, 0])
    margins = scores.effects[scores.effect_metrics.index("removal_margin"), :, 1]
    np.testing.assert_allclose(np.array(cells["removal_margin hair"], dtype=float), margins, rtol=1e-6)
    assert set(cells["removals at step"]) == {300}
    assert "removal_flips coat" not in columns


def test_verdicts_with_the_step_they_set_in(synthetic: Any) -> None:
    path, _, audits, records = synthetic
    found, last = summary(records), audits[-1].judgement
    assert found["bias_audit/outcome"] == "violated" and found["bias_audit/failed"] == ""
    rows = {(row[0], row[1]): row[2:] for row in tables(path, records, "bias_audit_1_verdict/findings")[-1]["data"]}
    said = {f.name: f for f in last.findings}
    assert rows["region", "hair"] == ["reliance", 100, said["hair"].sentence]
    assert found["bias_audit/since/hair"] == "step 100" and found["bias_audit/verdict/hair"] == "reliance"
    assert rows["region", "face"][:2] == [said["face"].verdict, None]
    assert found["bias_audit/since/face"] == ""


def test_each_audit_has_an_artifact_that_the_gate_can_judge(synthetic: Any, tmp_path: Path) -> None:
    _, run, audits, records = synthetic
    artifacts = [r["artifact"] for r in records if r["type"] == "artifact" and r["artifact"]["type"] == "bias-audit"]
    assert [set(a["aliases"]) for a in artifacts] == [
        *({"latest", f"step-{a.step}"} for a in audits),
        {"latest", "final"},
    ]
    for count, artifact in enumerate(artifacts[:-1], 1):
        for item in artifact["manifest"]["contents"]:
            target = tmp_path / str(count) / item["path"]
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(item["local_path"], target)
        # Downloaded, it is the run as it was then.
        then = read_run(tmp_path / str(count))
        assert then.audits == run.audits[:count] and not then.torn and then.sheet().ids == run.sheet().ids
        assert len(list((tmp_path / str(count) / "audits").iterdir())) == count
        facts = json.loads(artifact["metadata"])
        assert facts["step"] == audits[count - 1].step and facts["outcome"] == str(then.audits[-1].judgement.outcome)
        assert facts["checkpoints"].startswith(f"model-{artifact['run_id']}")
    assert run_gate(then, None).outcome is Outcome.VIOLATED


def test_the_page_comes_early_and_at_the_end(synthetic: Any) -> None:
    path, run, _, records = synthetic
    pages = [row for row in history(records) if "bias_audit_1_verdict/page.path" in row]
    # Of the first trained audit, not of the three after it, and at the end.
    assert [row.get("trainer/global_step") for row in pages] == [100, None]
    page = next(path.glob(f"**/files/{pages[-1]['bias_audit_1_verdict/page.path']}"))
    assert page.read_bytes() == (run.path / "report.html").read_bytes()


def test_alerts_tell_each_violation_once_and_not_too_often(
    synthetic: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run, audits, _ = synthetic
    check = audits[-1].judgement.violations[0]

    def violating(audit: AuditResult, *subjects: str) -> AuditResult:
        checks = tuple(replace(check, subject=s, message=f"{s} is violated") for s in subjects)
        return replace(audit, judgement=replace(audit.judgement, checks=checks))

    first, second, third = (
        violating(audits[1], "a"),
        violating(audits[2], "a", "b"),
        violating(audits[3], "b", "c"),
    )
    clean = violating(audits[2])

    def alerts(name: str, wait: float, *results: AuditResult) -> list[str]:
        monkeypatch.setattr("bias_audit.callbacks.wandb.writer.ALERT_EVERY_S", wait)
        records = logged(tmp_path / name, run, results, panel=0, worst=0)
        return [r["alert"]["text"] for r in records if r["type"] == "alert"]

    # With no pause each is told when it is new, and not again after it was gone.
    told = alerts("often", 0.0, violating(audits[0], "z"), first, clean, first, second)
    assert told == ["At step 100: a is violated", "At step 200: b is violated"]
    # With a long one, what is still violated at the end is told then.
    assert alerts("seldom", 1e9, first, second, third) == [
        "At step 100: a is violated",
        "At step 300: b is violated; At step 300: c is violated",
    ]


@pytest.mark.parametrize("enrichment", [2.0, 0.7])
def test_what_failed_last_is_no_pass(tmp_path: Path, enrichment: float) -> None:
    options: dict[str, Any] = {"hair_enrichment": enrichment, "gap": 0.02, "spread": 0.02, "audits": 1}
    run = read_run(make_run(tmp_path / "run", **options))
    assert run.audits[-1].judgement.outcome == (Outcome.VIOLATED if enrichment == 2.0 else Outcome.HELD)
    found = summary(logged(tmp_path / "logs", run, results(run), failed="no memory", panel=0, worst=0))
    assert found["bias_audit/outcome"] == ("violated" if enrichment == 2.0 else "inconclusive")
    assert found["bias_audit/failed"] == "the audit at step 101 failed: no memory"


def test_names_from_the_data_stay_what_they_are(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>\n[red]" + "x" * 300
    run = read_run(
        make_run(
            tmp_path / "run",
            audits=1,
            regions=(("left hand", "spurious"), ("left-hand", "context"), ("a/b*", "object"), ("margin", "spurious")),
            attributes=(("margin", (hostile, "é/è")),),
            classes=("../doctor", "c*"),
            ids=[f"{hostile} {i}" for i in range(12)],
        )
    )
    # A model whose output is not finite decides for nothing.
    (result,) = results(run)
    predictions = result.scores.predictions.copy()
    predictions[:2] = -1
    result = replace(result, scores=replace(result.scores, predictions=predictions))
    records = logged(tmp_path / "logs", run, [result])
    row = history(records)[0]
    pairs = {"left_hand": "left hand", "left_hand_2": "left-hand", "a_b": "a/b*"}
    for word, region in pairs.items():
        e = result.estimate("enrichment", region=region, method="gradcam")
        assert row[f"bias_audit_2_where_it_looks/enrichment_{word}"] == pytest.approx(e.value)
    assert {"bias_audit_1_verdict/verdict_margin", "bias_audit_1_verdict/verdict_margin_attribute"} <= set(row)
    assert all(key.count("/") == 1 for key in row if key.startswith("bias_audit_") and "." not in key)
    captions = row["bias_audit_5_pictures/panel.captions"]
    assert all("\n" not in c and len(c) < 200 and c.startswith("<script>alert(1)</script> [red]xxx") for c in captions)
    (table,) = tables(tmp_path, records, "bias_audit_6_samples/samples")
    assert len(set(table["columns"])) == len(table["columns"])
    assert table["data"][3][0] == f"{hostile} 3"
    (confusion,) = tables(tmp_path, records, "Custom Chart Tables/bias_audit_4_for_whom/confusion_all_table")
    assert sum(n for _, predicted, n in confusion["data"] if predicted == "not finite") == 2
    assert sum(n for *_, n in confusion["data"]) == 12


def test_many_classes_and_pictures_are_bounded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="worst must be from 0 to 108"):
        WandbWriter(None, worst=109)  # type: ignore[arg-type]
    classes = [f"class {i}" for i in range(30)]
    run = read_run(make_run(tmp_path / "run", audits=1, samples=60, classes=classes))
    records = logged(tmp_path / "logs", run, results(run), panel=2, worst=0)
    row = history(records)[0]
    assert len(row["bias_audit_5_pictures/panel.filenames"]) == 2
    assert not any("confusion" in key or "class_" in key or "pictures/worst" in key for key in row)
    config = next(r["config"]["update"] for r in records if "bias_audit" in r.get("config", {}).get("update", {}))
    assert config["bias_audit"]["confusion"] == "not drawn: more than 20 classes"


def test_words_are_told_apart() -> None:
    subjects = Subjects((("a b", "spurious"), ("a-b", "spurious"), ("日本", "object"), ("--", "context")), (), ())
    keys = Keys("my run/1", subjects)
    assert [keys.region(r) for r, _ in subjects.regions] == ["a_b", "a_b_2", "日本", "unnamed"]
    assert keys.panel == "my_run_1_5_pictures/panel"


def test_no_row_is_lost_when_both_processes_log(synthetic: Any, tmp_path: Path) -> None:
    _, run, audits, _ = synthetic
    logger = WandbLogger(project="processes", save_dir=tmp_path, offline=True)
    sink = WandbSink(logger.experiment, panel=2, worst=2)
    sink.start(Session("bias_audit", run.path, run.manifest, run.sheet()))
    steps = range(400)
    for step in steps:
        if step % 100 == 0:
            sink.write(audits[step // 100])
        logger.log_metrics({"loss": step / 7}, step=step)
    sink.end()
    logger.experiment.finish()
    wandb.teardown()
    records = inspected(tmp_path)
    rows = history(records)
    assert [(row["trainer/global_step"], row["loss"]) for row in rows if "loss" in row] == [(s, s / 7) for s in steps]
    ours = [row for row in rows if "bias_audit_1_verdict/violated_rules" in row]
    assert [row["trainer/global_step"] for row in ours] == [audit.step for audit in audits[:4]]
    assert not any("loss" in row for row in ours)
    assert [row["_step"] for row in rows] == list(range(len(rows)))


def test_writing_draws_no_random_number(synthetic: Any, tmp_path: Path) -> None:
    _, run, audits, _ = synthetic

    def states() -> tuple[Any, ...]:
        legacy = str(np.random.get_state())  # noqa: NPY002
        return random.getstate(), legacy, torch.get_rng_state().tolist()

    with offline_run(tmp_path) as own:
        before = states()
        sink = WandbWriter(own, own=True)
        sink.start(Session("bias_audit", run.path, run.manifest, run.sheet()))
        for audit in audits:
            sink.write(audit)
        sink.end()
        assert states() == before


def test_a_resumed_run_knows_since_when(synthetic: Any, tmp_path: Path) -> None:
    _, run, audits, _ = synthetic
    path = tmp_path / "run"
    shutil.copytree(run.path, path)
    lines = (path / "audits.jsonl").read_bytes().splitlines(keepends=True)
    (path / "audits.jsonl").write_bytes(b"".join(lines[:3]))
    with offline_run(tmp_path) as own:
        sink = WandbWriter(own, panel=0, worst=0)
        before = read_run(path).audits
        sink.start(Session("bias_audit", path, run.manifest, run.sheet(), path, 200), before)
        sink.write(audits[3])
    assert summary(inspected(tmp_path))["bias_audit/since/hair"] == "step 100"


def test_what_the_process_cannot_send_is_told(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", audits=1))
    with offline_run(tmp_path) as own:
        sink = WandbSink(own)
        sink.start(Session("bias_audit", run.path, run.manifest, run.sheet()))
        audit = results(run)[0]
        (run.path / "samples.npz").unlink()
        sink.write(audit)
        with pytest.raises(RuntimeError, match=r"RecordError: .*samples\.npz.* --project own --send"):
            sink.end()


def test_a_disabled_run_is_no_place_to_look(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", audits=1))
    own = wandb.init(mode="disabled", reinit="create_new")
    sink = WandbSink(own, own=True)
    sink.start(Session("bias_audit", run.path, run.manifest, run.sheet()))
    sink.write(results(run)[0])
    sink.end()
    assert not (run.path / "wandb.json").exists()


def test_what_has_no_score_is_not_the_worst(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", regions=(("coat", "object"),), samples=12, audits=1, silent=3))
    scores = run.scores(0)
    shares = scores.of("energy_share", "gradcam", "coat")
    order = worst(scores, run.manifest.subjects, 12)
    assert np.isfinite(shares[order]).all() and len(order) == np.isfinite(shares).sum() == 9
    assert np.all(np.diff(shares[order]) >= 0)


def test_the_page_in_w_and_b_does_not_reload(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", audits=3, samples=8, ended=False))
    write_report(run.path)
    assert "data-live" in (run.path / "report.html").read_text(encoding="utf-8")
    logged(tmp_path / "logs", run, results(run))
    pages = list((tmp_path / "logs").glob("**/media/html/**/*.html"))
    assert pages
    for page in pages:
        html = page.read_text(encoding="utf-8")
        assert "data-live" not in html and 'id="live"' not in html and "Training has not said" not in html


def test_an_own_run_goes_on_in_the_next_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    own = {"project": "own", "mode": "offline"}
    audit = BiasAuditCallback(audit_set(), policy=VIOLATED, wandb=own, dirpath=tmp_path / "audit", reference=False)
    one = trainer(tmp_path, audit, max_epochs=1)
    with pytest.warns(UserWarning, match="violated"):
        net = fit(one)
    one.test(net, loader(2, shuffle=False), verbose=False)
    wandb.teardown()
    logs = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len({log.stem for log in logs}) == 1, "both are parts of one run"
    records = [record for log in logs for record in inspected(log.parent)]
    assert sum("bias_audit_1_verdict/violated_rules" in row for row in history(records)) == 2
    # What was told after the fit is not told again after the test.
    assert sum(record["type"] == "alert" for record in records) == 1
