"""A baseline: what is worse than it is found, what is not is not, and a file that is not as written is refused."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import made_once, make_run

from bias_audit.evidence.performance import performance
from bias_audit.evidence.proportions import largest_difference, minus, paired_difference
from bias_audit.gate import pairing
from bias_audit.gate.baseline import Baseline
from bias_audit.gate.baseline_file import read_baseline, write_baseline
from bias_audit.gate.columns import SampleColumns
from bias_audit.gate.compare import compare_runs
from bias_audit.gate.gate import run_gate
from bias_audit.gate.regressions import Regression, beside
from bias_audit.policies.policy import Policy, Rule
from bias_audit.records.arrays import npz_bytes
from bias_audit.records.errors import RecordError
from bias_audit.records.history import Change
from bias_audit.records.results import AuditResult
from bias_audit.records.runs import Run, read_run
from bias_audit.records.writing import RunDirectory
from bias_audit.stats import wilson
from bias_audit.terms import Estimate, Outcome

CLEAN: dict[str, Any] = {"hair_enrichment": 0.7, "gap": 0.02, "spread": 0.02, "run_id": "clean"}
WORSE = """\
min_samples: 5
rules:
  - metric: enrichment
    region: hair
    op: "<="
    max_regression: 0.1
"""
COMMAND = str(Path(sys.executable).with_name("bias-audit"))
PRINT = "3f9a1c77d2e84b06" * 4
HOSTILE = ("[red]", "\x1b[31mhair\x07", "a\nb", "<script>", "%0A::error::", "x" * 3000)


def bias_audit(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=False)


def rules(*contents: dict[str, Any], **policy: Any) -> Policy:
    return Policy.model_validate({"min_samples": 5, "rules": list(contents)} | policy)


def worse(metric: str, most: float = 0.1, op: str = "<=", **names: Any) -> dict[str, Any]:
    return {"metric": metric, "op": op, "max_regression": most, **names}


def regressions(now: Run, before: Baseline, *contents: dict[str, Any], **policy: Any) -> list[Regression]:
    asked = rules(*contents, **policy)
    pair = beside(before, now, asked)
    return [found for rule in asked.rules for found in pair.regressions(rule, -1)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    return made_once(tmp_path_factory.mktemp)


@pytest.fixture(scope="module")
def file(run: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clean run's baseline as a file; not to be written to."""
    path = tmp_path_factory.mktemp("baseline") / "main.jsonl"
    write_baseline(Baseline.of_run(run(**CLEAN)), path)
    return path


def recorded(like: Run, path: Path, **changes: Any) -> Run:
    """`like` recorded anew at `path`, its last audit with changes."""
    directory = RunDirectory.create(path, like.manifest, like.sheet())
    for i, audit in enumerate(like.audits):
        last = i == len(like.audits) - 1
        directory.append(AuditResult(**vars(audit) | {"scores": like.scores(i)} | (changes if last else {})))
    directory.end()
    return read_run(path)


# The command and the gate


def test_a_planted_regression_is_violated_and_none_is_held(run: Callable[..., Run], tmp_path: Path) -> None:
    path, policy = tmp_path / "main.jsonl", tmp_path / "audit.yaml"
    policy.write_text(WORSE)
    done = bias_audit("baseline", "update", run(**CLEAN).path, "-o", path)
    assert (done.returncode, done.stderr) == (0, "")
    words = re.sub(r"\s+", " ", done.stdout)
    assert (
        f"{path}: step 100 of run clean, " in words and " estimates, 60 images, " in words and "replaces" not in words
    )
    # A run directory serves as well as the file made of it.
    said = {}
    for now, baseline, code in ((run(), path, 1), (run(), run(**CLEAN).path, 1), (run(**CLEAN), path, 0)):
        gate = bias_audit("gate", now.path, "--policy", policy, "--baseline", baseline, "--format", "json")
        assert (gate.returncode, gate.stderr) == (code, "")
        said[baseline == path, code] = gate.stdout
    assert said[True, 1] == said[False, 1] != said[True, 0]
    # The rule itself allows any value: only what is worse than before violates it.
    assert run_gate(run(), policy, baseline=read_baseline(run().path)).exit_code == 0
    assert run_gate(run(), policy).exit_code == 3


def test_update_replaces_a_baseline_and_nothing_else(run: Callable[..., Run], tmp_path: Path) -> None:
    path = tmp_path / "audit.yaml"
    path.write_text(WORSE)
    done = bias_audit("baseline", "update", run(**CLEAN).path, "-o", path)
    assert done.returncode == 2 and path.read_text() == WORSE
    assert (
        done.stderr == f"bias-audit: {path}: is another file, no baseline: it is not written over: name another one\n"
    )
    path = tmp_path / "main.jsonl"
    write_baseline(Baseline.of_run(run(**CLEAN)), path)
    path.write_bytes(path.read_bytes()[:-100])  # damaged, and still ours to replace
    assert bias_audit("baseline", "update", run(**CLEAN).path, "-o", path).returncode == 0
    done = bias_audit("baseline", "update", run().path, "-o", path)
    said = re.sub(r"\s+", " ", done.stdout)
    assert "It replaces step 100 of run clean. By its own policy this run is violated, and so is now" in said
    assert read_baseline(path).about.run_id == "synthetic-0"
    assert bias_audit("baseline", "update", run().path, "-o", tmp_path / "none" / "x.jsonl").returncode == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"torn": True, "ended": False}, "the last record was cut off"),
        ({"torn": True}, "the last record was cut off"),
        ({"ended": False}, "training has not finished, or was killed"),
        ({"failed": "no disk"}, "the audit at step 200 failed: no disk"),
        ({"audits": 0}, "no audit of a trained model"),
        ({"audits": 0, "reference": True}, "no audit of a trained model"),
    ],
)
def test_doubtful_evidence_makes_no_baseline(
    options: dict[str, Any], words: str, run: Callable[..., Run], tmp_path: Path
) -> None:
    source = run(**CLEAN | {"samples": 8} | options)
    with pytest.raises(RecordError, match=rf"cannot be a baseline: .*{words}"):
        Baseline.of_run(source)
    # As a run directory it serves no better.
    with pytest.raises(RecordError, match=words):
        read_baseline(source.path)
    if "failed" in options:
        done = bias_audit("baseline", "update", source.path, "-o", tmp_path / "x")
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (tmp_path / "x").exists()


def test_a_partial_audit_makes_no_baseline(run: Callable[..., Run], tmp_path: Path) -> None:
    source = run(**CLEAN)
    partial = replace(source, manifest=source.manifest.model_copy(update={"samples_audited": 90}))
    with pytest.raises(RecordError, match="is partial: it holds 60 of 90 samples"):
        Baseline.of_run(partial)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"differing": {"layer": "layer3"}}, "its layer: layer4.1, this run's: layer3"),
        ({"differing": {"methods": ("gradcam",)}}, "its methods: gradcam, hirescam, this run's: gradcam"),
        ({"differing": {"target": "margin"}}, "its target: label logit, this run's: margin"),
        ({"differing": {"sign": "absolute"}}, "its sign: positive, this run's: absolute"),
        ({"differing": {"fingerprint": "f" * 64}}, f"its fingerprint of the data: {PRINT}, this run's: ffff"),
        (
            {"regions": (("coat", "object"), ("hair", "object"), ("face", "spurious"))},
            "its regions: coat (object), hair (spurious), face (spurious), this run's: coat (object), hair (object)",
        ),
        ({"classes": ("nurse", "doctor")}, "its classes: doctor, nurse, this run's: nurse, doctor"),
        (
            {"attributes": (("gender", ("male", "female")),)},
            "its attributes: gender (female, male), this run's: gender (male, female)",
        ),
    ],
)  # fmt: skip
def test_a_baseline_of_another_audit_is_refused(
    options: dict[str, Any], words: str, run: Callable[..., Run], file: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as raised:
        beside(read_baseline(file), run(samples=8, **options), rules(worse("accuracy")))
    assert str(raised.value).startswith(f"baseline {file}: is of another audit than ")


def test_the_gate_says_every_difference_in_one_line(run: Callable[..., Run], file: Path, tmp_path: Path) -> None:
    other = run(samples=8, differing={"layer": "layer3", "sign": "absolute"}).path
    (tmp_path / "audit.yaml").write_text(WORSE)
    done = bias_audit("gate", other, "--policy", tmp_path / "audit.yaml", "--baseline", file)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "its layer: layer4.1, this run's: layer3; its sign: positive, this run's: absolute" in done.stderr


def test_averaged_weights_are_not_compared_with_raw_ones(run: Callable[..., Run], file: Path) -> None:
    now = run(**CLEAN, seed=1)
    averaged = replace(now, audits=tuple(replace(audit, weights="ema") for audit in now.audits))
    policy = rules(worse("accuracy", op=">="), worse("enrichment", region="hair", most=3.0))
    (like,) = {check.check.outcome for check in run_gate(now, policy, baseline=read_baseline(file)).checks}
    result = run_gate(averaged, policy, baseline=read_baseline(file))
    assert (like, result.outcome) == (Outcome.HELD, Outcome.INCONCLUSIVE)
    for found in result.checks:
        assert found.check.outcome is Outcome.INCONCLUSIVE
        assert "the baseline is of raw weights and this audit of ema weights" in found.check.message


def test_methods_in_another_order_are_the_same(run: Callable[..., Run], file: Path) -> None:
    turned = replace(run(), manifest=run().manifest.model_copy(update={"methods": ("hirescam", "gradcam")}))
    assert len(regressions(turned, read_baseline(file), worse("enrichment", region="hair"))) == 2


# What is compared


def test_image_by_image_as_two_runs_are_compared(run: Callable[..., Run], file: Path) -> None:
    a, b = run(removal={"hair": 0.2}, **CLEAN), run(removal={"hair": 0.6})
    found = {(d.before.subject): d for d in compare_runs(a, b).differences}
    asked = [
        worse("enrichment", region="spurious", **{"class": "each"}),
        worse("energy_share", region="remainder", group="gender"),
        worse("accuracy", op=">="),
        worse("removal_flips", region="hair"),
        worse("removal_effect", region="hair"),
        worse("cramers_v", group="gender"),
    ]
    made = regressions(b, Baseline.of_run(a), *asked)
    assert len(made) == 8 + 4 + 1 + 1 + 1 + 1
    for one in made[:-1]:
        assert one.now is not None and one.before is not None
        d = found[one.now.subject]
        sign = -1 if one.rule.op == ">=" else 1
        wanted = [d.change.value, *sorted([d.change.low, d.change.high], key=lambda x: sign * x)]
        assert (one.now, one.before, one.pairs) == (d.after, d.before, d.pairs)
        assert [one.worse.value, one.worse.low, one.worse.high] == pytest.approx([sign * x for x in wanted], abs=1e-6)
    assert made[0].pairs == 29 and made[-4].pairs == made[-3].pairs == 60 and made[-2].pairs is None
    assert made[-1].worse.reason == "this audit and the baseline have no such estimate"


def test_a_file_says_what_its_run_says(run: Callable[..., Run], tmp_path: Path) -> None:
    """The last audit of the baseline rests on the interventions of the one before."""
    source = run(removal={"hair": 0.6}, audits=2)
    older = tuple(replace(e, age=1) if e.metric.startswith("removal") else e for e in source.audits[-1].estimates)
    directory = RunDirectory.create(tmp_path / "aged", source.manifest, source.sheet())
    for i, audit in enumerate(source.audits):
        directory.append(AuditResult(**vars(audit), scores=source.scores(i)))
    bare = replace(source.scores(1), effect_metrics=(), effects=np.empty((0, 0, 0), np.float32))
    directory.append(AuditResult(**vars(source.audits[-1]) | {"estimates": older, "step": 300}, scores=bare))
    directory.end()
    size = write_baseline(Baseline.of_run(read_run(tmp_path / "aged")), tmp_path / "aged.jsonl")
    both = [read_baseline(tmp_path / name) for name in ("aged", "aged.jsonl")]
    asked = [worse("removal_flips", region="hair"), worse("energy_share", region="coat", op=">=", group="gender")]
    now = run(removal={"hair": 0.2}, run_id="now")
    one, other = (regressions(now, baseline, *asked) for baseline in both)
    assert one == other and one[0].pairs == 60 and one[0].before is not None and one[0].before.age == 1
    hair = source.scores(1).regions.index("hair")
    flips = [
        s.effects[s.effect_metrics.index("removal_flips"), :, hair].mean() for s in (source.scores(1), now.scores(0))
    ]
    assert one[0].worse.value == pytest.approx(float(flips[1] - flips[0]), abs=1e-6) and one[0].worse.value < 0
    assert both[1].about.step == 300 and both[0].estimates == both[1].estimates and size < 150_000


def test_only_what_both_measured_is_judged(run: Callable[..., Run], tmp_path: Path) -> None:
    now = run()
    estimates = now.audits[0].estimates
    bare = tuple(e for e in estimates if (e.metric, e.region) != ("iou", "hair"))
    bare = tuple(
        replace(e, value=None, low=None, high=None, reason="no such image") if e.metric == "accuracy" else e
        for e in bare
    )
    lacking = Baseline.of_run(recorded(now, tmp_path / "lacking", estimates=bare))
    found = regressions(now, lacking, worse("iou", region="hair", method="gradcam"), worse("accuracy", op=">="))
    assert [one.worse.reason for one in found] == ["the baseline has no such estimate", "nothing to compare"]
    assert {one.check(1).outcome for one in found} == {Outcome.INCONCLUSIVE}
    assert "in the baseline not measured (no such image)" in found[1].check(1).message
    # The other way round: what is no longer measured is not passed over.
    found = regressions(read_run(tmp_path / "lacking"), Baseline.of_run(now), worse("iou", region="spurious"))
    assert len(found) == 4 and [one.worse.reason != "" for one in found] == [False, False, True, True]
    assert (
        found[3].check(1).message.startswith("iou on hair (hirescam): not recorded in this audit; in the baseline 0.")
    )


@pytest.mark.parametrize("where", ["now", "before"])
def test_a_method_that_is_unfit_says_nothing(where: str, run: Callable[..., Run]) -> None:
    fit, unfit = {"gradcam": 0.1, "hirescam": 0.1}, {"gradcam": 0.1, "hirescam": 0.95}
    now = run(fitness=unfit if where == "now" else fit)
    before = Baseline.of_run(run(fitness=fit if where == "now" else unfit, **CLEAN))
    found = regressions(now, before, worse("enrichment", region="hair"))
    assert [one.now.method for one in found if one.now] == ["gradcam"] and found[0].check(5).outcome is Outcome.VIOLATED
    (asked,) = regressions(now, before, worse("enrichment", region="hair", method="hirescam"))
    said = "the hirescam maps are unfit" if where == "now" else "in the baseline the hirescam maps are unfit"
    assert asked.check(5).outcome is Outcome.INCONCLUSIVE and asked.worse.reason.startswith(said)
    open_ = Baseline.of_run(run(fitness={"gradcam": 0.7, "hirescam": 0.1}, **CLEAN))
    outcomes = [one.check(5).outcome for one in regressions(run(), open_, worse("enrichment", region="hair"))]
    assert outcomes == [Outcome.INCONCLUSIVE, Outcome.VIOLATED]


@pytest.mark.parametrize(
    ("op", "on", "most", "numbers", "outcome"),
    [
        ("<=", "interval", 0.1, (0.2, 0.11, 0.3), "violated"),
        ("<=", "interval", 0.1, (0.2, 0.1, 0.3), "inconclusive"),
        ("<=", "interval", 0.1, (0.05, 0.0, 0.11), "inconclusive"),
        ("<=", "interval", 0.1, (0.05, 0.0, 0.1), "held"),
        ("<=", "interval", 0.0, (0.0, 0.0, 0.0), "held"),
        ("<=", "point", 0.1, (0.2, 0.0, 0.3), "violated"),
        ("<=", "point", 0.1, (0.1, -1.0, 3.0), "held"),
        (">", "interval", 0.1, (-0.3, -0.4, -0.2), "held"),
        ("<=", "interval", 0.1, (None, None, None), "inconclusive"),
    ],
)
def test_outcomes(op: str, on: str, most: float, numbers: tuple[float, ...], outcome: str) -> None:
    e = Estimate("accuracy", 0.5, 0.4, 0.6, 50)
    rule = Rule.model_validate(worse("accuracy", most, op, on=on, severity="warn"))
    one = Regression(rule, e, e, Change(*numbers, reason="unfit"), 40)
    check = one.check(20)
    assert (check.outcome, check.severity, check.limit, check.rule) == (outcome, "warn", most, rule.title)
    assert check.subject == "accuracy, change from the baseline" and check.estimate is e
    assert one.check(41).outcome is Outcome.INCONCLUSIVE
    if numbers[0] is not None:
        assert one.check(40).outcome == outcome
        assert one.check(41).message.endswith("fewer images than min_samples = 41")
        assert replace(one, pairs=None).check(50).outcome == outcome


def test_worse_is_what_the_rule_calls_worse(run: Callable[..., Run], file: Path) -> None:
    better = Baseline.of_run(run())
    for op, now, before, outcome in (
        ("<=", run(), read_baseline(file), Outcome.VIOLATED),
        (">=", run(), read_baseline(file), Outcome.HELD),
        ("<=", run(**CLEAN), better, Outcome.HELD),
        (">=", run(**CLEAN), better, Outcome.VIOLATED),
    ):
        found = regressions(now, before, worse("enrichment", op=op, region="hair"))
        assert [one.check(5).outcome for one in found] == [outcome] * 2, op
        assert ("better by" in found[0].check(5).message) == (outcome is Outcome.HELD)


# Groups


def test_a_gap_compared_with_itself_is_certain_within_little(run: Callable[..., Run], tmp_path: Path) -> None:
    """Synthetic estimates are drawn; here they are those that its decisions give."""
    runs = []
    for seed in (0, 1):
        source = run(seed=seed, samples=200, gap=0.4)
        scores, sheet = source.scores(0), source.sheet()
        everyone = np.ones(200, dtype=bool)
        subjects = source.manifest.subjects
        estimates = performance(scores.correct, scores.labels, sheet.attributes, subjects, everyone)
        runs.append(recorded(source, tmp_path / str(seed), estimates=estimates))
    asked = [worse("accuracy_gap", group="gender"), worse("worst_group_accuracy", op=">=", group="gender")]
    for one in regressions(runs[0], Baseline.of_run(runs[0]), *asked):
        width = (one.now.high - one.now.low) if one.now else 0  # type: ignore[operator]
        assert one.worse.value == 0 and one.pairs is not None and one.pairs >= 45
        assert one.worse.low is not None and one.worse.high is not None
        assert one.worse.low < -0.01 and one.worse.high > 0.01 and one.worse.high - one.worse.low < 0.6 * width
    # Models that decide otherwise: the two intervals say as much.
    for one in regressions(runs[1], Baseline.of_run(runs[0]), *asked):
        assert one.pairs is None and one.now is not None and one.before is not None
        assert one.worse.value == pytest.approx((one.now.value - one.before.value) * (-1 if one.rule.op == ">=" else 1))  # type: ignore[operator]


def drawn(rng: np.random.Generator, cases: list[tuple[float, float, float]], n: int) -> list[Any]:
    groups = []
    for before, after, kept in cases:
        both = min(before, after) * kept
        chances = [both, before - both, after - both, 1 - before - after + both]
        both_, lost, gained, _ = rng.multinomial(n, chances).tolist()
        groups.append(pairing._Group(both_, lost, gained, n))
    return groups


def from_two_intervals(groups: list[Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    counts = [[group.counts[side] for group in groups] for side in (0, 1)]
    gaps = [largest_difference(combinations(its, 2)) for its in counts]
    worst = [tuple(min(bound) for bound in zip(*(wilson(*c) for c in its), strict=True)) for its in counts]
    return minus(gaps[1], gaps[0]), minus(worst[1], worst[0])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "cases",
    [
        [(0.9, 0.9, 0.97), (0.9, 0.9, 0.97)],
        [(0.9, 0.9, 0.97), (0.7, 0.7, 0.97)],
        [(0.95, 0.9, 0.95), (0.6, 0.88, 0.95)],
        [(0.9, 0.95, 0.95), (0.88, 0.6, 0.95)],
        [(0.9, 0.9, 0.97), (0.7, 0.7, 0.97), (0.8, 0.6, 0.9)],
    ],
)
def test_changes_of_groups_cover_what_they_promise(cases: list[tuple[float, float, float]]) -> None:
    rng, repeats = np.random.default_rng(0), 400
    (first, second), covered, narrower = [[case[side] for case in cases] for side in (0, 1)], np.zeros((2, 2)), 0
    truth = (max(second) - min(second)) - (max(first) - min(first)), min(second) - min(first)
    for _ in range(repeats):
        groups = drawn(rng, cases, 120)
        plain = from_two_intervals(groups)
        for i, change in enumerate((pairing._gap_change(groups), pairing._worst_change(groups))):
            assert change.value == pytest.approx(plain[i][0], abs=1e-9)
            assert change.low - 1e-9 <= change.value <= change.high + 1e-9  # type: ignore[operator]
            chosen = min(((change.low, change.high), plain[i][1:]), key=lambda b: b[1] - b[0])
            covered[i] += [low - 1e-9 <= truth[i] <= high + 1e-9 for low, high in ((change.low, change.high), chosen)]
            narrower += chosen != plain[i][1:]
    assert covered.min() / repeats > 0.94
    # Of models that mostly decide alike it is the narrower one.
    assert cases[0] != cases[-1] or narrower > repeats


def test_an_amount_moves_as_its_number_does() -> None:
    rng = np.random.default_rng(0)
    for _ in range(2000):
        before, after = rng.uniform(-1, 1, 2)
        bounds = [tuple(sorted(x + rng.uniform(-0.4, 0.4) * np.array([0, 1]))) for x in (before, after, after - before)]
        low, high = pairing._amount(*bounds)
        assert low - 1e-12 <= abs(after) - abs(before) <= high + 1e-12


def test_many_images_are_not_resampled(run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    def intervals() -> list[Change]:
        asked = [
            worse("enrichment", region="hair", **{"class": "each"}),
            worse("energy_share", region="face", group="gender"),
        ]
        return [one.worse for one in regressions(run(), Baseline.of_run(run(**CLEAN)), *asked)]

    resampled = intervals()
    monkeypatch.setattr(pairing, "MOST_RESAMPLED", 10)
    for one, other in zip(intervals(), resampled, strict=True):
        assert one.value == pytest.approx(other.value) and one != other
        ends = [other.low, other.high]
        assert [one.low, one.high] == pytest.approx(ends, abs=0.2 * (other.high - other.low))  # type: ignore[operator]


# The file


def test_the_file_has_the_same_bytes_for_the_same_run(run: Callable[..., Run], file: Path, tmp_path: Path) -> None:
    source = run(**CLEAN)
    recorded(source, tmp_path / "elsewhere")
    for name, baseline in (("a", read_baseline(tmp_path / "elsewhere")), ("b", read_baseline(file))):
        write_baseline(baseline, tmp_path / name)
        assert (tmp_path / name).read_bytes() == file.read_bytes(), name
    lines = file.read_text().splitlines()
    assert len(lines) == len(source.audits[0].estimates) + 3 and str(source.path) not in file.read_text()
    assert [json.loads(line)["metric"] for line in lines[2:-1]] == [e.metric for e in source.audits[0].estimates]
    columns, scores = read_baseline(file).samples.columns, source.scores(0)
    assert (
        columns.ids == scores.ids
        and (columns.values[np.isfinite(columns.values)] == scores.values[np.isfinite(scores.values)]).all()
    )
    assert columns.correct.tolist() == scores.correct.tolist()


def rewritten(path: Path, change: Callable[[list[bytes]], list[bytes]]) -> bytes:
    """The file with other lines, and a checksum that fits them."""
    rest = b"".join(line + b"\n" for line in change(path.read_bytes().splitlines()[1:]))
    head = {"bias_audit_baseline": 1, "sha256": hashlib.sha256(rest).hexdigest()}
    return json.dumps(head).encode() + b"\n" + rest


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda c: c.replace(b'"metric":"enrichment"', b'"metric":"iou"', 1), "the checksum does not match"),
        (lambda c: c[:-200], "the checksum does not match"),
        (lambda c: c + b"{}\n", "the checksum does not match"),
        (lambda c: c.replace(b'baseline":1', b'baseline":2', 1), "has version 2, this tool reads 1"),
        (lambda c: b"", "is no baseline"),
        (lambda c: b"rules: []\n", "is no baseline"),
        (lambda c: b"[1]\n", "is no baseline"),
        (lambda c: b"[" * 100_000, "is no baseline"),
        (lambda c: b"\xff\xfe" + c, "is no baseline"),
        (lambda c: b"<<<<<<< HEAD\n" + c, "is no baseline"),
    ],
)
def test_an_edited_file_is_refused(edit: Callable[[bytes], bytes], words: str, file: Path, tmp_path: Path) -> None:
    path = tmp_path / "edited.jsonl"
    path.write_bytes(edit(file.read_bytes()))
    with pytest.raises(RecordError, match=words) as raised:
        read_baseline(path)
    assert str(path) in str(raised.value) and "baseline update" in str(raised.value)


def test_line_ends_that_git_changed_are_no_edit(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "crlf.jsonl"
    path.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert read_baseline(path).estimates == read_baseline(file).estimates
    assert read_baseline(path).samples.columns.ids == read_baseline(file).samples.columns.ids


def samples_line(**changes: Any) -> Callable[[list[bytes]], list[bytes]]:
    def change(lines: list[bytes]) -> list[bytes]:
        import io

        with np.load(io.BytesIO(base64.b64decode(json.loads(lines[-1])["samples"]))) as archive:
            arrays = dict(archive) | changes
        content = npz_bytes({name: value for name, value in arrays.items() if value is not None})
        return [*lines[:-1], json.dumps({"samples": base64.b64encode(content).decode()}).encode()]

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[:1],
        lambda lines: [],
        lambda lines: lines[1:],
        lambda lines: [*lines, b"{}"],
        lambda lines: [*lines[:-1], b'{"samples": "%%%"}'],
        lambda lines: [*lines[:-1], b'{"samples": 3}'],
        lambda lines: [*lines[:-1], b"[[" * 50_000],
        lambda lines: [lines[0], b'{"metric": 3}', *lines[1:]],
        lambda lines: [lines[0].replace(b'"seed":0', b'"seed":"x"'), *lines[1:]],
        lambda lines: [lines[0].replace(b'"seed":0', b'"sead":0'), *lines[1:]],
        lambda lines: [*lines[:-1], json.dumps({"samples": base64.b64encode(b"PK").decode()}).encode()],
        samples_line(correct=np.zeros(3, bool)),
        samples_line(values=np.zeros(3, np.float32)),
        samples_line(areas=np.zeros((60, 2), np.float32)),
        samples_line(labels=None),
        samples_line(attributes=np.array("x")),
    ],
)
def test_a_forged_file_is_an_error_and_no_traceback(
    change: Callable[[list[bytes]], list[bytes]], file: Path, tmp_path: Path, run: Callable[..., Run]
) -> None:
    path = tmp_path / "forged.jsonl"
    path.write_bytes(rewritten(file, change))
    with pytest.raises(RecordError, match=re.escape(str(path))):
        regressions(run(), read_baseline(path), worse("enrichment", region="hair"))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_damage_is_found_or_changes_nothing(file: Path, data: st.DataObject) -> None:
    whole = file.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "twice", "swap"]))
    if kind == "flip":
        content = whole[:at] + bytes([whole[at] ^ (1 << data.draw(st.integers(0, 7)))]) + whole[at + 1 :]
    elif kind == "cut":
        content = whole[:at]
    elif kind == "twice":
        content = whole[:at] + whole[max(0, at - 50) :]
    else:
        lines = whole.splitlines(keepends=True)
        i, j = at % len(lines), data.draw(st.integers(0, len(lines) - 1))
        lines[i], lines[j] = lines[j], lines[i]
        content = b"".join(lines)
    path = file.with_name("damaged.jsonl")
    path.write_bytes(content)
    try:
        found = read_baseline(path)
    except RecordError:
        return
    wanted = read_baseline(file)
    assert (found.about, found.estimates) == (wanted.about, wanted.estimates)
    assert (found.samples.columns.values == wanted.samples.columns.values).sum() > 0


def test_hostile_names_stay_names(tmp_path: Path) -> None:
    regions = tuple((name, "spurious") for name in HOSTILE)
    options: dict[str, Any] = {"regions": regions, "classes": HOSTILE[:2], "attributes": (("[/]", HOSTILE[2:4]),)}
    path = make_run(tmp_path / "run", audits=1, ids=[f"{name}-{i}" for i in range(8) for name in HOSTILE], **options)
    done = bias_audit("baseline", "update", path, "-o", tmp_path / "b.jsonl")
    assert done.returncode == 0 and "\x1b" not in done.stdout
    found = regressions(read_run(path), read_baseline(tmp_path / "b.jsonl"), worse("enrichment", region="spurious"))
    assert len(found) == 12 and all(one.pairs is not None and one.pairs > 40 for one in found)


def test_reading_a_baseline_needs_no_arrays(file: Path) -> None:
    script = (
        "import sys\nfrom bias_audit.gate.baseline_file import read_baseline\n"
        f"assert len(read_baseline({str(file)!r}).estimates) > 100\n"
        "heavy = {'numpy', 'scipy', 'torch', 'wandb', 'pytorch_lightning'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("kept", "paired"), [(40, True), (20, False)])
def test_only_images_of_both_are_compared(kept: int, paired: bool, run: Callable[..., Run]) -> None:
    now = run(ids=[f"portrait-{i:03d}" if i < kept else f"new-{i}" for i in range(60)])
    (one,) = regressions(now, Baseline.of_run(run(**CLEAN)), worse("accuracy", op=">="))
    (gap,) = regressions(now, Baseline.of_run(run(**CLEAN)), worse("accuracy_gap", group="gender"))
    assert one.pairs == (kept if paired else None) and one.n == (kept if paired else 60) and gap.pairs is None


def test_images_are_matched_by_their_ids(run: Callable[..., Run], tmp_path: Path) -> None:
    """The same images in another order."""
    a, b = run(**CLEAN), run()
    order = np.random.default_rng(0).permutation(60)
    scores = b.scores(0)
    ids = tuple(scores.ids[i] for i in order)
    turned = replace(
        scores,
        ids=ids,
        labels=scores.labels[order],
        predictions=scores.predictions[order],
        margin=scores.margin[order],
        areas=scores.areas[order],
        values=scores.values[:, :, order],
        maps=scores.maps[:, order],
        magnitude=scores.magnitude[:, order],
    )
    directory = RunDirectory.create(tmp_path / "turned", b.manifest, b.sheet())
    directory.append(AuditResult(**vars(b.audits[0]), scores=turned))
    directory.end()
    asked = [worse("enrichment", region="hair"), worse("accuracy", op=">=", **{"class": "each"})]
    straight = regressions(b, Baseline.of_run(a), *asked)
    other = regressions(read_run(tmp_path / "turned"), Baseline.of_run(a), *asked)
    for one, two in zip(straight, other, strict=True):
        assert one.pairs == two.pairs and one.worse == two.worse
    # As a baseline too: labels and attributes are those of the images, in whatever order.
    samples = Baseline.of_run(read_run(tmp_path / "turned")).samples
    assert samples.columns.ids == ids and samples.labels.tolist() == scores.labels[order].tolist()
    assert isinstance(samples.columns, SampleColumns)
    gained, lost = (
        int((x & ~y).sum()) for x, y in ((scores.correct, a.scores(0).correct), (a.scores(0).correct, scores.correct))
    )
    (overall,) = regressions(b, Baseline.of_run(a), worse("accuracy", op=">="))
    assert overall.worse.value == pytest.approx(-paired_difference(gained, lost, 60)[0])
