"""Real photographs, end to end: the example trains on them with the callback, and says what can honestly be said."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from bias_audit import run_gate
from bias_audit.terms import Outcome, Verdict

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"

pytestmark = pytest.mark.skipif(not (DATA / "coco_people").is_dir(), reason="needs ../shared/data/coco_people")


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("coco_people", ROOT / "examples" / "coco_people.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "classes", "attribute", "roles"),
    [
        ("scene", ("domestic", "sports"), "gender", {"things": "object", "person": "spurious"}),
        ("gender", ("man", "woman"), "scene", {"person": "object", "things": "spurious"}),
    ],
)
def test_training_on_photographs(
    example: ModuleType,
    tmp_path: Path,
    task: str,
    classes: tuple[str, ...],
    attribute: str,
    roles: dict[str, str],
) -> None:
    run = example.train_and_audit(task, DATA, tmp_path / task, epochs=2)
    subjects = run.manifest.subjects
    assert (subjects.classes, subjects.attributes[0][0], dict(subjects.regions)) == (classes, attribute, roles)
    assert [a.trigger for a in run.audits] == ["reference", "epoch"]
    rows = (DATA / "coco_people" / f"labels_{task}.csv").read_text().splitlines()[1:]
    assert run.manifest.samples_audited == len(rows) - len(rows) // 2
    labels = {row.split(",")[0]: row.split(",")[1] for row in rows}
    scores = run.scores(1)
    assert all(classes[label] == labels[name] for name, label in zip(scores.ids, scores.labels, strict=True))
    # Things are cut clear of people, so the regions and the remainder share out the whole of each heatmap.
    for method in scores.methods:
        parts = np.stack([scores.of("energy_share", method, region) for region in scores.regions])
        audible = np.isfinite(parts).any(axis=0)
        assert audible.mean() > 0.5
        np.testing.assert_allclose(np.nansum(parts[:, audible], axis=0), 1, atol=1e-5)
    # Some cells hold a single photograph: whatever the network does, nobody can clear it.
    assert all(f.verdict is not Verdict.CLEARED for f in run.audits[-1].judgement.findings)
    assert run_gate(run).outcome is not Outcome.HELD
    assert (run.path / "report.html").stat().st_size > 100_000
