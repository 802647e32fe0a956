"""The power study: its pictures, the truth, the rules, the table. Nothing depends on what the audit should say."""

from __future__ import annotations

import dataclasses
from itertools import product
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import benchmarks.trained
import benchmarks.verdicts
from benchmarks.families import AGREEMENT, CUE, FAMILIES, KINDS, OBJECT, PARTS, Family, Kind, Part, Problem, digits_of
from benchmarks.power import main, tasks_of
from benchmarks.power_report import Study, count, figure, markdown, of_use, targets
from benchmarks.trained import NOT_USED, USED, Truth, fingerprint, measure, train, trained
from benchmarks.verdicts import RULES, Judged, audited, by_gap, by_share, judged, read, record_path
from bias_audit.terms import Estimate, Verdict

DRAWN: tuple[Kind, ...] = ("used", "independent", "ignored")
EVERY = list(product(FAMILIES, KINDS))
# Families whose easy object has a colour of its class; that of the others stands out from the noise.
BY_COLOUR = ("colour patches", "doctor/nurse")


def small(name: str, training: int = 100, epochs: int = 1) -> Family:
    return dataclasses.replace(FAMILIES[name], training=training, epochs=epochs)


def tiny(kind: Kind = "used", seed: int = 0, training: int = 100, epochs: int = 1) -> Problem:
    return dataclasses.replace(Problem.of("crosses", kind, seed), family=small("crosses", training, epochs))


# Pictures


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_another_value_changes_the_cue_and_nothing_else(name: str, kind: Kind) -> None:
    problem = Problem.of(name, kind, 0)
    classes = len(problem.family.classes)
    for number in range(6):
        label = number % classes
        first, second = (problem.picture("audit", number, label, v % classes) for v in (number, number + 1))
        where = (first.image != second.image).any(axis=0)
        if kind == "none":
            assert not where.any()
            assert np.array_equal(first.object, second.object)
            continue
        assert where.any()
        places = first.cue | second.cue
        # A person's edges mix what lies on both sides of them, and hair covers shoulders.
        beyond = (where & ~places).sum() / where.sum()
        assert beyond <= (0.25 if name == "doctor/nurse" else 0)
        if name != "doctor/nurse":
            assert np.array_equal(first.object, second.object)


@pytest.mark.parametrize("name", FAMILIES)
def test_object_and_cue_are_there_and_apart_and_pictures_are_as_announced(name: str) -> None:
    for kind in KINDS:
        problem = Problem.of(name, kind, 1)
        for number in range(len(problem.family.classes)):
            drawn = problem.picture("training", number, number, number)
            side = problem.family.size
            assert drawn.image.shape == (3, side, side) and drawn.image.dtype == np.uint8
            assert drawn.object.any() and drawn.cue.any()
            assert not (drawn.object & drawn.cue).any()


@pytest.mark.parametrize("name", FAMILIES)
def test_only_the_easy_object_stands_out_and_the_cue_is_as_salient_whether_used_or_not(name: str) -> None:
    def contrast(kind: Kind, where: str) -> float:
        """How far a region's mean colour is from that of the rest, in standard deviations of the rest."""
        problem, found = Problem.of(name, kind, 0, strength=0.8), []
        for number in range(30):
            label = number % len(problem.family.classes)
            drawn = problem.picture("training", number, label, label)
            inside, rest = getattr(drawn, where), ~(drawn.object | drawn.cue)
            colour = drawn.image[:, inside].mean(axis=1) - drawn.image[:, rest].mean(axis=1)
            found.append(np.linalg.norm(colour) / drawn.image[:, rest].std())
        return float(np.mean(found))

    if name not in BY_COLOUR:
        assert contrast("ignored", "object") > 1.5 * contrast("used", "object")
    assert contrast("independent", "cue") == pytest.approx(contrast("used", "cue"), rel=0.25)
    assert contrast("none", "cue") < 0.5 * contrast("used", "cue")


@pytest.mark.parametrize("name", BY_COLOUR)
def test_the_colour_of_an_easy_object_tells_its_class_and_that_of_a_hard_one_does_not(name: str) -> None:
    def told(kind: Kind) -> float:
        """How often a picture's nearest neighbour, by the colour of its object, is of its class."""
        problem = Problem.of(name, kind, 0)
        labels = np.arange(80) % len(problem.family.classes)
        drawn = [problem.picture("training", i, label, 0) for i, label in enumerate(labels.tolist())]
        colours = np.stack([picture.image[:, picture.object].mean(axis=1) for picture in drawn])
        apart = np.linalg.norm(colours[:, None] - colours[None], axis=2) + np.diag(np.full(80, np.inf))
        return float((labels[apart.argmin(axis=1)] == labels).mean())

    assert told("ignored") > 0.95
    assert told("used") < 0.8


def test_no_digit_is_in_two_parts() -> None:
    seen = [{digit.tobytes() for of_class in digits_of(part) for digit in of_class} for part in PARTS]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]
    assert all(len(of_class) >= 20 for part in PARTS for of_class in digits_of(part))


@pytest.mark.parametrize("part", PARTS)
def test_a_part_draws_its_own_digits(part: Part) -> None:
    def strokes(of: Part) -> set[bytes]:
        """The strokes of a part's digits of class 3, as they are drawn."""
        resized = (cv2.resize(digit, (18, 18), interpolation=cv2.INTER_LINEAR) for digit in digits_of(of)[3])
        return {(ink > 0.25).tobytes() for ink in resized}

    problem, seen = Problem.of("decoy digits", "ignored", 0), 0
    for number in range(20):
        drawn = problem.picture(part, number, 3, 0).object
        crops = {drawn[y : y + 18, x : x + 18].tobytes() for y in range(6, 9) for x in range(6, 9)}
        # A block that covers a stroke's end leaves no whole digit.
        matches = [of for of in PARTS if crops & strokes(of)]
        assert matches in ([], [part])
        seen += bool(matches)
    assert seen > 10


@pytest.mark.parametrize("name", FAMILIES)
def test_parts_and_seeds_have_pictures_of_their_own_and_the_truth_is_shared(name: str) -> None:
    one, two = (Problem.of(name, "used", seed, strength=1.0) for seed in (0, 1))

    def image(problem: Problem, part: str) -> bytes:
        return problem.picture(part, 0, 0, 0).image.tobytes()  # type: ignore[arg-type]

    drawn = [image(p, part) for p in (one, two) for part in ("training", "audit")]
    assert len({*drawn, image(one, "truth")}) == 5
    assert image(one, "truth") == image(two, "truth")
    assert image(one, "audit") == image(Problem.of(name, "used", 0, strength=1.0), "audit")


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_training_columns_agree_as_often_as_announced(name: str, kind: Kind) -> None:
    problem = Problem.of(name, kind, 2)
    labels, values = problem.columns()
    classes = len(problem.family.classes)
    assert np.ptp(np.bincount(labels, minlength=classes)) <= 1
    assert set(values) == set(range(classes))
    agreed, n = float((labels == values).mean()), len(labels)
    assert abs(agreed - problem.agreement) < 4 * np.sqrt(problem.agreement * (1 - problem.agreement) / n) + 1e-9
    if kind == "independent":
        assert problem.agreement == pytest.approx(1 / classes)
    else:
        low, high = AGREEMENT[kind]
        assert low <= problem.agreement <= high
    assert problem.family.strength[0] <= problem.strength <= problem.family.strength[1]


def test_the_audit_set_has_every_label_with_every_value_equally_often() -> None:
    problem = Problem.of("colour patches", "used", 0)
    audit_set = problem.audit_set(32)
    pairs = [(label, row[0]) for label, row in zip(audit_set.labels, audit_set.attribute_table, strict=True)]
    assert sorted(set(pairs)) == sorted(product(range(4), problem.family.values))
    assert all(pairs.count(pair) == 2 for pair in pairs)
    assert audit_set.subjects.regions == ((OBJECT, "object"), (CUE, "spurious"))
    sample = audit_set.samples[5]
    own = str(sample.attributes[CUE])
    other = next(value for value in problem.family.values if value != own)
    image, regions = sample.decode()
    assert torch.equal(problem.swap(sample, own), image)  # type: ignore[arg-type]
    changed = (problem.swap(sample, other) != image).any(dim=0)
    assert changed.any() and not (changed & ~regions[CUE]).any()


# Networks and the truth


class Reader(nn.Module):
    """Tells one cross from two, or left from right, by a rule: what a network would do that uses only the one."""

    def __init__(self, cue: bool) -> None:
        super().__init__()
        self.cue = cue

    def forward(self, images: Tensor) -> Tensor:
        bright = (images.mean(dim=1) > 0.62).float()
        left, middle, right = (
            bright[:, :, :9].sum((1, 2)),
            bright[:, :, 9:31].sum((1, 2)),
            bright[:, :, 31:].sum((1, 2)),
        )
        score = right - left if self.cue else middle - 60
        return torch.stack([-score, score], dim=1)


def test_the_truth_tells_who_reads_the_cue_from_who_reads_the_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks.trained, "TESTED", 200)
    problem = Problem.of("crosses", "ignored", 0, strength=0.987)
    by_cue, by_object = measure(Reader(cue=True), problem), measure(Reader(cue=False), problem)
    assert (by_cue.aligned, by_cue.flipped, by_cue.use) == (1.0, 0.0, "used")
    assert by_object.aligned > 0.9
    assert (by_object.drop, by_object.use) == (pytest.approx(0, abs=0.02), "not used")


def test_the_truth_counts_what_a_loop_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks.trained, "TESTED", 60)
    problem = Problem.of("colour patches", "used", 0, strength=0.911)
    torch.manual_seed(0)
    network = problem.family.network().eval()
    truth = measure(network, problem)
    hits = []
    for number in range(60):
        label = number % 4
        picture = torch.from_numpy(problem.picture("truth", number, label, label).image)[None].float() / 255
        with torch.no_grad():
            hits.append(int(network(picture).argmax()) == label)
    assert truth.aligned == pytest.approx(np.mean(hits))
    assert truth.n == 60


@pytest.mark.parametrize(
    ("drop", "use"), [(USED, "used"), (USED - 1e-3, "between"), (NOT_USED + 1e-3, "between"), (NOT_USED, "not used")]
)
def test_between_used_and_not_used_lies_neither(drop: float, use: str) -> None:
    assert Truth(drop, 0.0, 10).use == use
    assert Truth(0.5, 0.6, 10).use == "not used"


def test_training_is_repeatable_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, two = train(tiny()), train(tiny())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert not one.training
    other = train(tiny(seed=1))
    assert not torch.equal(next(one.parameters()), next(other.parameters()))


def test_a_cue_is_learned_where_the_object_is_hard_and_not_where_it_is_easy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks.trained, "TESTED", 300)
    hard, easy = (measure(train(problem), problem) for problem in (tiny(k, 0, 600, 5) for k in ("used", "ignored")))
    assert hard.aligned > 0.9 and hard.drop > 0.3
    assert easy.aligned > 0.9 and abs(easy.drop) < 0.1


def test_a_network_is_trained_once_and_again_when_its_problem_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmarks.trained, "TESTED", 40)
    first = trained(tiny(), tmp_path)
    (path,) = tmp_path.iterdir()
    written = path.stat().st_mtime_ns
    again = trained(tiny(), tmp_path)
    assert path.stat().st_mtime_ns == written
    assert again.truth == first.truth
    pictures = tiny().images("audit", np.zeros(3, dtype=np.int64), np.ones(3, dtype=np.int64)).float() / 255
    with torch.no_grad():
        assert torch.equal(first.network(pictures), again.network(pictures))
    changed = dataclasses.replace(tiny(), strength=0.5)
    assert fingerprint(changed) != fingerprint(tiny())
    trained(changed, tmp_path)
    assert path.stat().st_mtime_ns > written
    assert [p.suffix for p in tmp_path.iterdir()] == [".pt"]


# Rules


def share(value: float | None) -> Estimate:
    return Estimate("energy_share", value, value, value, 9, CUE, method="gradcam")


@pytest.mark.parametrize(
    ("value", "verdict"), [(0.51, Verdict.RELIANCE), (0.5, Verdict.CLEARED), (None, Verdict.INCONCLUSIVE)]
)
def test_the_naive_rule(value: float | None, verdict: Verdict) -> None:
    assert by_share(share(value)) is verdict


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.11, 0.3, Verdict.RELIANCE),
        (0.1, 0.3, Verdict.INCONCLUSIVE),
        (-0.1, 0.11, Verdict.INCONCLUSIVE),
        (-0.1, 0.1, Verdict.CLEARED),
        (None, None, Verdict.INCONCLUSIVE),
    ],
)
def test_the_rule_of_the_gap(low: float | None, high: float | None, verdict: Verdict) -> None:
    assert by_gap(Estimate("alignment_gap", 0.0, low, high, 9), 0.1) is verdict


def model(drop: float, verdict: Verdict, number: int = 0, naive: Verdict = Verdict.CLEARED) -> Judged:
    gap = Estimate("alignment_gap", 0.0, -0.1, 0.1, 9, group=CUE)
    kind: Kind = "used" if drop > 0.1 else "ignored"
    truth = Truth(0.9, 0.9 - drop, 2000)
    others = verdict, verdict, verdict, naive, Verdict.CLEARED
    return Judged("crosses", kind, number, 0.95, 0.8, truth, 1.0, *others, "Says so.", share(0.2), gap)


def a_study(found: int = 19, accused: int = 1, suspected: int = 2) -> Study:
    """Twenty models that use the cue, twenty that do not, and one between."""
    used = [model(0.5, Verdict.RELIANCE if i < found else Verdict.CLEARED, i) for i in range(20)]
    said = [Verdict.RELIANCE] * accused + [Verdict.SUSPECTED] * suspected
    others = [model(0.0, v, i) for i, v in enumerate(said + [Verdict.CLEARED] * (20 - len(said)))]
    return Study("2026-01-01", "2.15", (*used, *others, model(0.12, Verdict.RELIANCE, 99)))


@pytest.mark.parametrize(
    ("numbers", "outcomes"),
    [
        ((19, 1, 2), ["met", "met", "met"]),
        ((18, 1, 2), ["missed", "met", "met"]),
        ((19, 2, 2), ["met", "missed", "met"]),
        ((19, 1, 3), ["met", "met", "missed"]),
    ],
)
def test_targets_are_shares_of_models_by_their_truth(numbers: tuple[int, int, int], outcomes: list[str]) -> None:
    found = targets(a_study(*numbers))
    assert [target.outcome for target in found] == outcomes
    assert [(target.count, target.n) for target in found] == [(n, 20) for n in numbers]


def test_a_study_without_used_cues_meets_no_target_on_them() -> None:
    study = Study("2026-01-01", "2.15", tuple(of_use(a_study().models, "not used")))
    assert [target.outcome for target in targets(study)] == ["no such model", "met", "met"]


def test_every_model_is_counted_once_in_the_table() -> None:
    study = a_study()
    for rule in RULES:
        assert sum(count(study.models, rule, verdict) for verdict in Verdict) == len(study.models)
    page = markdown(study, "power.png")
    rows = [line for line in page.splitlines() if line.startswith("| crosses | used | used |")]
    assert rows[0] == "| crosses | used | used | 20 | 19 | 0 | 0 | 1 |"
    assert "| **all** |  | between | 1 |" in page
    # One missed, one accused, two suspected; what is between is neither right nor wrong.
    assert page.count("Says so.") == 4
    assert "seed 99" not in page


def test_a_study_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    study = a_study()
    study.write(tmp_path / "deep" / "power.json")
    assert Study.read(tmp_path / "deep" / "power.json") == study


def test_the_figure_is_a_picture() -> None:
    assert figure(a_study()).startswith(b"\x89PNG\r\n")


def test_tasks_are_every_model_once() -> None:
    tasks = tasks_of(FAMILIES, KINDS, 7)
    assert len(set(tasks)) == len(tasks) == 7 * 16
    assert {(task.family, task.kind) for task in tasks[: 5 * 16]} == set(EVERY)


# All of it


def test_a_study_runs_goes_on_where_it_was_and_is_judged_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "crosses", small("crosses", training=200, epochs=2))
    monkeypatch.setattr(benchmarks.trained, "TESTED", 41)
    monkeypatch.setattr(benchmarks.verdicts, "AUDITED", 40)
    cache, out = tmp_path / "cache", tmp_path / "out"
    arguments = ["--cache", str(cache), "--models", "1", "--jobs", "1", "--families", "crosses", "--out", str(out)]

    with pytest.raises(SystemExit, match="holds no record"):
        main([*arguments, "--rejudge"])
    study = main([*arguments, "--kinds", "used", "none"])
    assert [m.kind for m in study.models] == ["used", "none"]
    assert {p.name for p in out.iterdir()} == {"power.json", "power.md", "power.png"}
    assert Study.read(out / "power.json") == study
    assert study.models[1].truth.drop == 0

    record = read(record_path(Problem.of("crosses", "used", 0), cache))
    assert {e.metric for e in record.estimates} >= {"enrichment", "accuracy_gap", "removal_flips", "swap_flips"}
    swapped = [e for e in record.estimates if e.metric == "swap_flips"]
    assert swapped and all(e.region is None for e in swapped)
    assert judged(record) == study.models[0]

    before = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert main([*arguments, "--kinds", "used", "none"]).models == study.models
    assert main([*arguments, "--rejudge"]).models == study.models
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == before
    again = audited(Problem.of("crosses", "used", 0), cache, anew=True)
    assert again.estimates == record.estimates
    monkeypatch.setitem(FAMILIES, "crosses", small("crosses", training=150, epochs=2))
    with pytest.raises(ValueError, match="other pictures"):
        main([*arguments, "--rejudge"])
