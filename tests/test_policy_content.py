"""Every way in which a policy can be wrong, and what is said of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from estimates import (
    GAPS,
    LOOKS,
    SUBJECTS,
)
from pydantic import ValidationError

from bias_audit.policies.file import read_policy
from bias_audit.policies.policy import Policy, Rule, Tolerance
from bias_audit.terms import Outcome, Verdict
from bias_audit.verdicts.judgement import judge

RELIANCE, SUSPECTED, CLEARED, INCONCLUSIVE = Verdict
HELD, VIOLATED, UNKNOWN = Outcome
RANK = {VIOLATED: 0, UNKNOWN: 1, HELD: 2}


CONTENT = {
    "rules": [
        {"metric": "enrichment", "region": "spurious", "class": "each", "max": 1.5, "severity": "warn"},
        {"metric": "verdict", "group": "gender", "forbid": ["reliance", "suspected"]},
    ],
    "tolerance": {"enrichment": 1.25, "accuracy_gap": 0.05},
    "min_samples": 7,
}
YAML = """\
# What the merge must show.
min_samples: 7
tolerance: {enrichment: 1.25, accuracy_gap: 0.05}
rules:
  - {metric: enrichment, region: spurious, class: each, max: 1.5, severity: warn}
  - metric: verdict
    group: gender
    forbid: [reliance, suspected]
"""
TOML = """\
[tool.other]
rules = 3
[tool.bias_audit]
min_samples = 7
[tool.bias_audit.tolerance]
enrichment = 1.25
accuracy_gap = 0.05
[[tool.bias_audit.rules]]
metric = "enrichment"
region = "spurious"
class = "each"
max = 1.5
severity = "warn"
[[tool.bias_audit.rules]]
metric = "verdict"
group = "gender"
forbid = ["reliance", "suspected"]
"""


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_load(tmp_path: Path) -> None:
    expected = Policy(
        rules=(
            Rule(metric="enrichment", region="spurious", class_name="each", max=1.5, severity="warn"),
            Rule(metric="verdict", group="gender", forbid=(RELIANCE, SUSPECTED)),
        ),
        tolerance=Tolerance(enrichment=1.25, accuracy_gap=0.05),
        min_samples=7,
    )
    for source in (
        CONTENT,
        written(tmp_path, "audit.yaml", YAML),
        str(written(tmp_path, "audit.yml", YAML)),
        written(tmp_path, "pyproject.toml", TOML),
        expected,
    ):
        assert read_policy(source).policy == expected
    assert Policy.model_validate_json(expected.model_dump_json(by_alias=True)) == expected


def test_the_default_policy_forbids_reliance() -> None:
    default = read_policy(None).policy
    assert default == Policy() and [(r.title, r.severity) for r in default.rules] == [
        ("verdict spurious != reliance", "error"),
        ("verdict each != reliance", "error"),
        ("verdict spurious != suspected", "warn"),
        ("verdict each != suspected", "warn"),
    ]
    assert judge((*LOOKS["yes"], *GAPS["yes"]), SUBJECTS, default).outcome is VIOLATED
    assert judge((*LOOKS["no"], *GAPS["no"]), SUBJECTS, default).outcome is HELD
    suspected = judge((*LOOKS["yes"], *GAPS["no"]), SUBJECTS, default)
    assert suspected.outcome is HELD
    assert {(c.subject, c.severity) for c in suspected.checks if c.outcome is VIOLATED} == {
        ("verdict on region hair", "warn")
    }


def rule(**fields: Any) -> dict[str, Any]:
    return {"rules": [{"metric": "energy_share", "region": "hair", "max": 1, **fields}]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (rule(maxx=2), ("rules.0.maxx", "unknown key", "did you mean `max`? known are: metric, name, region")),
        (
            {"rules": [*CONTENT["rules"], {"metric": "iou", "region": "hair", "regoin": "hair", "max": 1}]},
            ("rules.2.regoin", "unknown key"),
        ),
        ({**CONTENT, "min_sample": 3}, ("min_sample:", "unknown key", "rules, tolerance, min_samples")),
        (
            {"tolerance": {"enrichmnt": 2}},
            ("tolerance.enrichmnt", "known are: enrichment, accuracy_gap"),
        ),
        (rule(metric="energy_shore"), ("rules.0.metric", "did you mean `energy_share`?")),
        (rule(metric="zzz"), ("rules.0.metric", "unknown metric 'zzz'", "enrichment", "verdict")),
        ({"rules": [{"region": "hair", "max": 1}]}, ("rules.0.metric", "required")),
        ({"rules": [{"metric": "iou", "region": "hair"}]}, ("rules.0", "needs `op` and `threshold`")),
        ({"rules": [{"metric": "iou", "max": 1}]}, ("rules.0", "needs `region`", "object, spurious, context")),
        (rule(min=2), ("rules.0", "got max and min: a rule has one limit")),
        (rule(max=math.nan), ("rules.0.max", "finite")),
        (rule(max=math.inf), ("rules.0.max", "finite")),
        (rule(max=None, min=-math.inf), ("rules.0.min", "finite")),
        (rule(max="wide"), ("rules.0", "`max` takes a number, got 'wide'")),
        (rule(max=None, op="<=", threshold="wide"), ("rules.0", "`threshold` takes a number, got 'wide'")),
        (rule(max=5), ("rules.0", "lies within -1 and 1, got `threshold` 5: write 0.05 for 5 %")),
        (rule(min_samples=True), ("rules.0.min_samples", "expected a number, got True")),
        ({"rules": [{"metric": "accuracy", "method": "gradcam", "min": 0.5}]}, ("rules.0", "remove `method`")),
        (
            {"rules": [{"metric": "verdict", "region": "hair", "forbid": ["reliance"], "min_samples": 9}]},
            ("rules.0", "none of `max_regression`, `on: point` and `min_samples`"),
        ),
        ({"rules": [{"metrik": "iou", "region": "hair", "max": 1}]}, ("rules.0.metrik", "did you mean `metric`?")),
        (rule(max=True), ("rules.0.max", "expected a number, got True")),
        (rule(op="<="), ("rules.0", "got max and op: a rule has one limit")),
        (rule(max=None, op="=<", threshold=1), ("rules.0.op", "'<=', '>'")),
        (rule(max=None, op="==", threshold=1), ("rules.0", "takes <, <=, > or >=")),
        (rule(max=None, op="<="), ("rules.0", "needs `threshold`, or `max_regression`")),
        (rule(max=None, max_regression=0.1), ("rules.0", "needs `op`")),
        (rule(max_regression=-0.1), ("rules.0.max_regression", "greater than or equal to 0")),
        (rule(at="first"), ("rules.0.at", "'last', 'best', 'every'")),
        (rule(on="line"), ("rules.0.on", "'interval' or 'point'")),
        (rule(max=None, forbid=["reliance"]), ("rules.0", "is for verdicts; a rule on `energy_share`")),
        (rule(max=None, forbid=0.5), ("rules.0", "`forbid` takes verdicts")),
        (rule(max=None, op="<=", threshold="reliance"), ("rules.0", "`threshold` takes a number, got 'reliance'")),
        (rule(max=None, op="<=", threshold=["reliance"]), ("rules.0", "`threshold` of `energy_share` is a number")),
        (rule(severity="fatal"), ("rules.0.severity", "error", "warn")),
        (rule(min_samples=0), ("rules.0.min_samples", "greater than or equal to 1")),
        (rule(metric="accuracy"), ("rules.0", "not measured on a region")),
        (
            rule(metric="pointing_game", group="gender=female"),
            ("rules.0", "`pointing_game` is not broken down to groups"),
        ),
        (rule(metric="cramers_v", group="gender"), ("rules.0", "`cramers_v` is not measured on a region")),
        ({"rules": [{"metric": "removal_effect", "max": 1}]}, ("rules.0", "`removal_effect` needs `region`")),
        ({"rules": [{"metric": "control_flips", "max": 1}]}, ("rules.0", "`control_flips` needs `region`")),
        ({"rules": [{"metric": "swap_gap", "max": 1}]}, ("rules.0", "`swap_gap` needs `group`: the attribute")),
        ({"rules": [{"metric": "accuracy_gap", "group": "a=b", "max": 1}]}, ("rules.0", "needs `group`: the attr")),
        ({"rules": [{"metric": "accuracy_gap", "max": 1}]}, ("rules.0", "needs `group`")),
        (rule(metric="insertion_auc"), ("rules.0", "measured on an explanation method: remove `region`")),
        ({"rules": [{"metric": "deletion_gain", "class": "nurse", "min": 0}]}, ("rules.0", "remove `region`, `class`")),
        ({"tolerance": {"randomisation_similarity": 1}}, ("tolerance.randomisation_similarity", "less than 1")),
        (
            {"rules": [{"metric": "worst_group_accuracy", "group": "gender", "class": "nurse", "min": 1}]},
            ("rules.0", "over all classes"),
        ),
        (rule(metric="verdict"), ("rules.0", 'takes `op` "!=" or "==" and verdicts')),
        (
            {"rules": [{"metric": "verdict", "region": "hair", "min": 1}]},
            ("rules.0", 'takes `op` "!=" or "==" and verdicts'),
        ),
        ({"rules": [{"metric": "verdict", "region": "hair"}]}, ("rules.0", "`threshold: reliance`")),
        ({"rules": [{"metric": "verdict", "forbid": ["reliance"]}]}, ("rules.0", "either `region` or `group`")),
        (
            {"rules": [{"metric": "verdict", "region": "hair", "group": "gender", "forbid": ["reliance"]}]},
            ("rules.0", "either `region` or `group`"),
        ),
        (
            {"rules": [{"metric": "verdict", "region": "hair", "method": "gradcam", "forbid": ["reliance"]}]},
            ("rules.0", "neither `class` nor `method`"),
        ),
        ({"rules": [{"metric": "verdict", "region": "hair", "forbid": ["guilt"]}]}, ("rules.0.forbid.0", "reliance")),
        (
            {"rules": [{"metric": "verdict", "region": "hair", "op": "!=", "threshold": "guilt"}]},
            ("rules.0.threshold.0", "reliance"),
        ),
        (
            {"rules": [{"metric": "verdict", "region": "hair", "op": "==", "threshold": ["cleared", "inconclusive"]}]},
            ("rules.0", "`inconclusive` cannot be asked for"),
        ),
        (
            {"rules": [{"metric": "verdict", "group": "gender=female", "forbid": ["reliance"]}]},
            ("rules.0", "write gender"),
        ),
        (
            {"rules": [{"metric": "verdict", "group": "each", "forbid": ["reliance"], "max_regression": 0.1}]},
            ("rules.0", "it has no number"),
        ),
        ({"rules": []}, ("rules", "at least 1")),
        ({"rules": {"metric": "iou"}}, ("rules",)),
        ({"rules": ["iou <= 1"]}, ("rules.0",)),
        ({"rules": CONTENT["rules"] * 2}, ("two rules are called 'enrichment spurious each <= 1.5'", "`name`")),
        ({"tolerance": {"enrichment": 0}}, ("tolerance.enrichment", "greater than 0")),
        ({"tolerance": {"accuracy_gap": math.nan}}, ("tolerance.accuracy_gap",)),
        ({"tolerance": {"accuracy_gap": 1}}, ("tolerance.accuracy_gap", "less than 1")),
        ({"min_samples": 0}, ("min_samples", "greater than or equal to 1")),
        ({1: 2}, ("1",)),
    ],
)
def test_bad_content(content: dict[Any, Any], words: tuple[str, ...], tmp_path: Path) -> None:
    import yaml

    path = written(tmp_path, "audit.yaml", yaml.safe_dump(content))
    for source, name in ((path, str(path)), (content, "policy: ")):
        with pytest.raises(ValueError, match="policy") as caught:
            read_policy(source)
        message = str(caught.value)
        assert not isinstance(caught.value, ValidationError) and "\n" not in message
        assert all(word in message for word in (name, *words)), message


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.yaml", "", "got nothing"),
        ("a.yaml", "# rules:\n", "got nothing"),
        ("a.yaml", "- metric: iou\n", "expected a mapping with the key `rules`, got list"),
        ("a.yaml", "rules", "got str"),
        ("a.yaml", "rules: [", "not valid yaml"),
        ("a.yaml", "rules:\n\t- x", "not valid yaml"),
        ("a.yaml", "!!python/object/apply:os.system ['touch {mark}']", "not valid yaml"),
        ("a.yaml", "rules: !!python/name:os.system", "not valid yaml"),
        ("a.yaml", "min_samples: !!python/object/new:os.system ['touch {mark}']", "not valid yaml"),
        ("a.yaml", "min_samples: 2020-13-45", "not valid yaml"),
        ("a.yaml", "rules: " + "[" * 5000, "not valid yaml"),
        ("a.yaml", "rules: &x [*x]", "rules"),
        ("a.yaml", "rules: [{metric: iou, region: hair, max: .nan}]", "rules.0.max"),
        ("a.yaml", "rules: [{metric: iou, region: hair, max: .inf}]", "rules.0.max"),
        ("audit", "rules: [", "not valid YAML"),
        ("a.toml", "", "has no table [tool.bias_audit]"),
        ("a.toml", "[tool.bias-audit]\nmin_samples = 3", "has no table [tool.bias_audit]"),
        ("a.toml", "tool = 3", "has no table [tool.bias_audit]"),
        ("a.toml", "[tool]\nbias_audit = 3", "got int"),
        ("a.toml", "[tool.bias_audit", "not valid toml"),
        ("a.toml", "[tool.bias_audit]\nmin_sample = 3", "min_sample: unknown key"),
        ("a.toml", "[tool.bias_audit]\n[[tool.bias_audit.rules]]\nmetric='iou'\nregion='x'\nmax=nan", "rules.0.max"),
    ],
)
def test_bad_files(name: str, text: str, words: str, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    path = written(tmp_path, name, text.replace("{mark}", str(mark)))
    with pytest.raises(ValueError, match="policy") as caught:
        read_policy(path)
    assert str(path) in str(caught.value) and words in str(caught.value) and "\n" not in str(caught.value)
    assert not mark.exists()


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"rules: \xff")
    for path in (tmp_path / "absent.yaml", tmp_path, tmp_path / "latin.yaml"):
        with pytest.raises(ValueError, match="cannot be read") as caught:
            read_policy(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"region": "hare"}, ("unknown region 'hare'", "coat, hair, remainder, wall", "object, spurious, context")),
        ({"region": "hair", "class": "doktor"}, ("unknown class 'doktor'", "doctor, nurse")),
        ({"region": "hair", "group": "gendr"}, ("unknown attribute 'gendr'", "the audit set has gender")),
        ({"region": "hair", "group": "gendr=male"}, ("unknown attribute 'gendr'",)),
        ({"region": "hair", "group": "gender=mal"}, ("no value 'mal'", "female, male")),
    ],
)
def test_unknown_names(fields: dict[str, str], words: tuple[str, ...]) -> None:
    policy = Policy.model_validate({"rules": [{"metric": "enrichment", "max": 1, **fields}]})
    for check in (lambda: policy.check_names(SUBJECTS), lambda: judge([], SUBJECTS, policy)):
        with pytest.raises(ValueError, match="policy rule 'enrichment ") as caught:
            check()
        assert all(word in str(caught.value) for word in words)


def test_known_names_pass() -> None:
    for fields in (
        {"region": "hair", "class": "each", "group": "gender=male"},
        {"region": "remainder", "class": "nurse"},
        {"region": "context", "group": "gender"},
    ):
        Policy.model_validate({"rules": [{"metric": "enrichment", "max": 1, **fields}]}).check_names(SUBJECTS)
