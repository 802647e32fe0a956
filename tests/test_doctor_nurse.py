"""The examples on the doctor/nurse case: their arithmetic, and a run of each that is too small to learn anything."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from bias_audit.data.scenes import balanced_scenes, swap_gender
from bias_audit.demo import TRANSFORM
from bias_audit.terms import Verdict

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def study() -> ModuleType:
    return load("doctor_nurse")


@pytest.fixture(scope="module")
def reasons() -> ModuleType:
    return load("right_reasons")


class KnowsGender:
    """Decides by the gender alone: it has seen every scene in both."""

    def __init__(self, samples: tuple[object, ...]) -> None:
        self.seen = {
            TRANSFORM(swap_gender(sample, gender)).numpy().tobytes(): gender
            for sample in samples
            for gender in ("female", "male")
        }

    def __call__(self, images: Tensor) -> Tensor:
        male = torch.tensor([self.seen[image.numpy().tobytes()] == "male" for image in images])
        return torch.stack([male, ~male], dim=1).float()


def test_a_network_that_knows_gender_alone_follows_the_redrawing(study: ModuleType) -> None:
    test = balanced_scenes(5, seed=3, size=32)
    found = study.measured(KnowsGender(test.samples), test)
    assert found == {
        "accuracy": 0.5,
        "female_doctors": 0,
        "male_doctors": 1,
        "female_nurses": 1,
        "male_nurses": 0,
        "usual": 1,
        "unusual": 0,
        "redrawn": 1,
    }


def test_a_network_that_sees_nothing_does_not(study: ModuleType) -> None:
    found = study.measured(lambda images: torch.tensor([[1.0, 0.0]]).expand(len(images), 2), balanced_scenes(3, seed=3))
    assert (found["accuracy"], found["usual"], found["unusual"], found["redrawn"]) == (0.5, 0.5, 0.5, 0)
    assert (found["female_doctors"], found["male_doctors"]) == (1, 1)
    assert (found["female_nurses"], found["male_nurses"]) == (0, 0)


def test_the_interval_is_students(study: ModuleType) -> None:
    values = [0.71, 0.74, 0.69, 0.8, 0.77, 0.72]
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert study.interval(values) == pytest.approx((np.mean(values), expected.low, expected.high))
    assert study.interval([0.5, 0.7])[0] == pytest.approx(0.6) and np.isnan(study.interval([0.5, 0.7])[1])


def test_the_columns_of_the_training_set_have_the_papers_shares(study: ModuleType) -> None:
    biased, balanced = (study.metadata(training, 200) for training in ("biased", "balanced"))
    for data, shares in ((biased, (0.78, 0.93)), (balanced, (0.5, 0.5))):
        genders = data.column("gender")
        assert len(genders) == 400 and (data.labels == 0).sum() == 200
        assert (genders[data.labels == 0] == "male").mean() == shares[0]
        assert (genders[data.labels == 1] == "female").mean() == shares[1]


def rows_of(study: ModuleType, count: int) -> list[object]:
    """Biased networks are 80 % right and relied on in all but one, balanced ones 90 % and cleared."""
    rates = ("female_doctors", "male_doctors", "female_nurses", "male_nurses", "usual", "unusual", "redrawn")
    return [
        study.Tested(
            training,
            seed,
            accuracy + 0.002 * seed,
            *(0.5 for _ in rates),
            verdicts=(("attribute gender", "reliance" if training == "biased" and seed else "cleared"),),
        )
        for seed in range(count)
        for training, accuracy in (("biased", 0.8), ("balanced", 0.9))
    ]


def test_the_tables_say_what_the_rows_say(study: ModuleType) -> None:
    text = study.as_markdown(rows_of(study, 6))
    half = scipy.stats.t.ppf(0.975, 5) * np.std([0.2 * i for i in range(6)], ddof=1) / np.sqrt(6)
    low, high = 80.5 - half, 80.5 + half
    assert f"| accuracy | 80.5 % [{low:.1f}, {high:.1f}] |" in text
    assert "| 10.0 % [10.0, 10.0] |" in text
    assert "| reliance | attribute gender | 5 of 6 | 0 of 6 |" in text
    assert "| cleared | attribute gender | 1 of 6 | 6 of 6 |" in text
    assert "suspected" not in text


def test_writing_replaces_what_is_between_the_marks(study: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "doctor_nurse.md"
    page.write_text(f"# Title\n\n{study.BEGIN}\nold\n{study.END}\n\nThe end.\n")
    rows = rows_of(study, 5)
    for _ in range(2):
        study.write(rows, study.SMALL, tmp_path)
    text = page.read_text()
    assert text.startswith("# Title\n\n") and text.endswith("\n\nThe end.\n")
    assert text.count("| accuracy |") == 1 and "old" not in text
    record = json.loads((tmp_path / "doctor_nurse.json").read_text())
    assert len(record["networks"]) == 10 and record["settings"]["per_class"] == study.SMALL.per_class
    assert (tmp_path / "doctor_nurse.svg").read_text().startswith("<svg")


@pytest.mark.slow
def test_a_study_is_taken_up_where_it_was_left(study: ModuleType, tmp_path: Path) -> None:
    tiny = study.Settings(size=32, per_class=40, epochs=1, per_cell=6)
    rows = study.study(tiny, seeds=1, jobs=1, cache=tmp_path, again=False)
    assert [(row.training, row.seed) for row in rows] == [("biased", 0), ("balanced", 0)]
    assert all(0 <= row.accuracy <= 1 and len(row.verdicts) == 3 for row in rows)
    assert {verdict for row in rows for _, verdict in row.verdicts} <= set(Verdict)
    weights = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")}
    assert set(weights) == {"biased-00.pt", "balanced-00.pt"}
    # Audited anew, from the same weights: the same is found.
    (tmp_path / "biased-00.json").unlink()
    assert study.study(tiny, seeds=1, jobs=1, cache=tmp_path, again=False) == rows
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")} == weights


def test_training_in_each_way(reasons: ModuleType) -> None:
    tiny = reasons.Settings(size=32, per_class=100, epochs=1, audited_per_cell=6)
    data = reasons.training_set(tiny, seed=0)
    assert data.masks.shape == (200, 32, 32) and 0.02 < data.masks.float().mean() < 0.3
    trained = {title: reasons.train(data, way, tiny, seed=0) for title, way in reasons.WAYS.items()}
    weights = {title: net.head.weight.detach() for title, (net, _) in trained.items()}
    titles = list(weights)
    assert not any(torch.equal(weights[a], weights[b]) for i, a in enumerate(titles) for b in titles[:i])
    # Drawn by the plan's weights, gender says little of the occupation; else as much as in the paper's data.
    shares = {}
    for title, (_, shown) in trained.items():
        genders = shown.column("gender")
        shares[title] = [(genders[shown.labels == label] == "male").mean() for label in (0, 1)]
    assert shares["as it is"] == shares["penalty"] == pytest.approx([0.78, 0.07])
    assert abs(shares["rebalanced"][0] - shares["rebalanced"][1]) < 0.25
    found = reasons.audit(*trained["penalty"], tiny, seed=0)
    table = reasons.closing_table({title: [found] for title in trained})
    assert len(table.columns) == 5 and table.row_count == 13
