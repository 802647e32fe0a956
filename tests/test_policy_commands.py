"""`bias-audit policy`: what a run may be asked, what a policy asks of a run, and its schema for editors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from pydantic import ValidationError
from synthetic import make_run

from bias_audit.gate.baseline import Baseline
from bias_audit.gate.gate import run_gate
from bias_audit.gate.policy_check import check_policy, in_words
from bias_audit.gate.policy_draft import draft_policy
from bias_audit.policies.file import read_policy
from bias_audit.policies.policy import Policy, Rule
from bias_audit.policies.schema import policy_schema
from bias_audit.records.errors import RecordError
from bias_audit.records.runs import Run, read_run
from bias_audit.terms import Outcome

CLEAN: dict[str, Any] = {"hair_enrichment": 0.7, "gap": 0.02, "spread": 0.02}
COMMAND = str(Path(sys.executable).with_name("bias-audit"))
# What would end a comment, a value or a rule in YAML, or be something else than text.
HOSTILE = (
    "[red]", "\x1b[31mhair\x07", "a\n- metric: accuracy\n  min: 0", "<script>", "no", "1e5", "~", "x: y # z", '"', "'",
    "- ", "{}", "*a", "&a", "%", "|", "å\u2028b", "😀", "b" * 3000,
)  # fmt: skip
VALIDATOR = Draft202012Validator(json.loads(policy_schema()))


def bias_audit(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", cwd=cwd, check=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """A run directory of one audit, made once for the same arguments; not to be written to."""
    made: dict[str, Run] = {}

    def of(**options: Any) -> Run:
        known = repr(sorted(options.items(), key=lambda item: item[0]))
        if known not in made:
            path = tmp_path_factory.mktemp("runs") / "run"
            made[known] = read_run(make_run(path, **{"audits": 1} | options))
        return made[known]

    return of


# init

FULL: dict[str, Any] = {
    "removal": {"hair": 0.6, "face": 0.0},
    "shows": ["hair"],
    "association": 0.5,
    "fitness": {"gradcam": 0.2, "hirescam": 0.1},
}
KINDS: dict[str, dict[str, Any]] = {
    "biased": {},
    "clean": CLEAN,
    "full": FULL,
    "full and clean": FULL | CLEAN | {"removal": {"hair": 0.0, "face": 0.0}, "association": 0.02},
    "wide": {"spread": 3.0},
    "unfit": {"fitness": {"gradcam": 0.95, "hirescam": 0.1}},
    "no attributes": {"attributes": ()},
    "no spurious region": {"regions": (("coat", "object"),)},
    "nothing": {"regions": (("sky", "context"),), "attributes": ()},
    "unmeasured": {"regions": (("hair", "spurious"),), "samples": 3, "classes": ("a", "b", "c", "d"), "silent": 0},
    "hostile": {
        "regions": tuple((name, "spurious") for name in HOSTILE),
        "attributes": (("gender", ("f", "m")), *((name, ("x", "y")) for name in (*HOSTILE[:4], "a=b"))),
        "classes": HOSTILE[:3],
        "differing": {"model": "\n- x", "run_id": "\nrules: []"},
    },
    "other tolerances": {
        "policy": Policy.model_validate({"min_samples": 9, "tolerance": {"enrichment": 3.5, "association": 1e-5}})
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_reads_back_and_judges_its_run(kind: str, run: Callable[..., Run], tmp_path: Path) -> None:
    source = run(**KINDS[kind])
    path = tmp_path / "audit.yaml"
    path.write_text(draft_policy(source), encoding="utf-8")
    file = read_policy(path)
    VALIDATOR.validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    result = run_gate(source, file)
    assert result.checks and not any("no estimate of this kind" in c.check.message for c in result.checks)
    # What stands is decided, but for verdicts.
    of_verdicts = {rule.title for rule in file.policy.rules if rule.metric == "verdict"}
    undecided = {c.check.rule for c in result.checks if c.check.outcome is Outcome.INCONCLUSIVE}
    violated = {c.check.rule for c in result.checks if c.check.outcome is Outcome.VIOLATED}
    assert undecided - violated <= of_verdicts
    if kind != "nothing":
        asked = {rule.threshold for rule in file.policy.rules if rule.metric == "verdict"}
        assert asked == {("reliance",), ("suspected",)}
    if kind in ("biased", "full"):
        assert result.exit_code == 1
    if kind in ("clean", "full and clean"):
        assert result.exit_code == 0
    recorded = source.manifest.policy
    assert (file.policy.tolerance, file.policy.min_samples) == (recorded.tolerance, recorded.min_samples)


def switched_on(text: str) -> str:
    """The draft with its commented rules as rules."""
    lines, on = [], False
    for line in text.splitlines():
        on = line.startswith("  # Off, because ") or (on and line.startswith("  # "))
        lines.append(f"  {line[4:]}" if on and not line.startswith("  # Off") else line)
    return "\n".join(lines)


def test_a_draft_says_what_was_measured_and_what_is_off(run: Callable[..., Run]) -> None:
    source = run(**FULL | {"fitness": {"gradcam": 0.95, "hirescam": 0.1}, "removal": {"hair": 0.07}})
    text = draft_policy(source)
    e = source.audits[0].estimate("enrichment", region="hair", method="hirescam")
    assert f"# Violated: {e}\n" in text and f"# {source.audits[0].estimate('accuracy')}\n" in text
    assert "# Regions: coat (object), hair (spurious), face (spurious)\n" in text
    # The interval of 0.07 reaches both sides of 0.05.
    (off,) = re.findall(r"  # Off, because (.*):\n  # - metric: removal_flips\n  #   region: hair\n", text)
    assert re.fullmatch(r"the interval reaches beyond the maximum 0.05; about \d+ images would settle it", off)
    every = Policy.model_validate(yaml.safe_load(switched_on(text)))
    few = Policy.model_validate(yaml.safe_load(text))
    assert set(few.rules) < set(every.rules) and all(r.max_regression is None for r in few.rules)
    assert [r.metric for r in every.rules if r.max_regression is not None] == ["accuracy", "enrichment", "enrichment"]
    # All of what was off is undecided, and would be so without a baseline.
    result = run_gate(source, every, baseline=None)
    added = {r.title for r in every.rules} - {r.title for r in few.rules}
    outcomes = {c.check.rule: set() for c in result.checks}  # type: ignore[var-annotated]
    for c in result.checks:
        outcomes[c.check.rule].add(c.check.outcome)
    assert all(Outcome.INCONCLUSIVE in outcomes[title] and Outcome.VIOLATED not in outcomes[title] for title in added)
    assert {"removal_flips hair <= 0.05"} < added


def test_names_cannot_leave_their_place_in_a_draft(run: Callable[..., Run]) -> None:
    text = draft_policy(run(**KINDS["hostile"]))
    policy = Policy.model_validate(yaml.safe_load(text))
    named = {rule.region for rule in policy.rules if rule.metric == "enrichment"}
    assert named == set(HOSTILE)
    assert {rule.metric for rule in policy.rules if rule.min_samples} == set()
    assert all(line.isprintable() for line in text.splitlines()) and "\x1b" not in text
    comments = [line for line in text.splitlines() if line.lstrip().startswith("#")]
    assert max(len(line) for line in comments if not line.startswith("  #   ")) < 210
    # An attribute with a `=` in its name cannot be written in a rule, and is left out.
    assert not any(rule.group and rule.group.startswith("a=") for rule in policy.rules)
    Policy.model_validate(yaml.safe_load(switched_on(text)))


def test_init_writes_over_nothing(run: Callable[..., Run], tmp_path: Path) -> None:
    done = bias_audit("policy", "init", run().path, cwd=tmp_path)
    path = tmp_path / "audit.yaml"
    assert (done.returncode, done.stdout, done.stderr) == (0, "audit.yaml\n", "")
    assert path.read_text() == draft_policy(run())
    path.write_text("mine")
    again = bias_audit("policy", "init", run().path, "-o", path)
    assert again.returncode == 2 and again.stderr.count("\n") == 1 and "--force" in again.stderr
    assert path.read_text() == "mine"
    assert bias_audit("policy", "init", run().path, "-o", path, "--force").returncode == 0
    assert path.read_text() == draft_policy(run())


@pytest.mark.parametrize("options", [{"audits": 0}, {"audits": 0, "reference": True}])
def test_no_draft_without_an_audit(options: dict[str, Any], run: Callable[..., Run]) -> None:
    with pytest.raises(RecordError, match="no audit of a trained model was recorded"):
        draft_policy(run(**options))


# check


def written(path: Path, *rules: str) -> Path:
    path.write_text("min_samples: 5\nrules:\n" + "".join(f"  - {{{rule}}}\n" for rule in rules), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        ({"metric": "verdict", "region": "spurious", "forbid": ["reliance", "suspected"]},
         "the verdict on each spurious region must not be reliance or suspected"),
        ({"metric": "verdict", "group": "each", "op": "==", "threshold": "cleared"},
         "the verdict on each attribute must be cleared"),
        ({"metric": "verdict", "group": "gender", "forbid": "reliance"},
         "the verdict on attribute gender must not be reliance"),
        ({"metric": "enrichment", "region": "hair", "class": "each", "group": "gender", "op": "<", "threshold": 1.5},
         "enrichment on hair of each class for each value of gender, by each explanation method that is fit, must be "
         "below 1.5"),
        ({"metric": "energy_share", "region": "object", "group": "gender=male", "method": "gradcam", "min": 0.2},
         "energy share on each object region where gender is male, by gradcam, must be at least 0.2"),
        ({"metric": "cramers_v", "group": "gender", "max": 0.1, "on": "point", "min_samples": 30},
         "Cramér's V by gender must be at most 0.1, by the measured value alone, whatever its interval, on at least 30 "
         "images"),
        ({"metric": "accuracy", "class": "nurse", "op": ">", "max_regression": 0.02, "at": "best"},
         "accuracy of class nurse must be no more than 0.02 lower than in the baseline, in the audit of the best "
         "checkpoint"),
        ({"metric": "removal_flips", "region": "hair", "max": 0.1, "max_regression": 0, "at": "checkpoint"},
         "removal flips on hair must be at most 0.1, and no more than 0 higher than in the baseline, in the audit of "
         "the checkpoint that the gate is given"),
        ({"metric": "insertion_gain", "op": ">=", "threshold": 0.1, "at": "every"},
         "insertion gain must be at least 0.1, in every audit of the trained model"),
    ],
)  # fmt: skip
def test_rules_in_words(rule: dict[str, Any], sentence: str) -> None:
    assert in_words(Rule.model_validate(rule)) == sentence


def test_check_says_what_each_rule_finds(run: Callable[..., Run], tmp_path: Path) -> None:
    path = written(
        tmp_path / "audit.yaml",
        "metric: enrichment, region: hair, max: 1.5, name: '[red]looks'",
        "metric: accuracy, class: each, min: 0.1, on: point",
        "metric: enrichment, region: face, min: 5, severity: warn, at: every",
    )
    done = bias_audit("policy", "check", path, run().path)
    words = re.sub(r"\s+", " ", done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{path}: 3 rules on run synthetic-0, step 100" in words
    assert (
        "1. [red]looks (line 3, error) Asks: enrichment on hair, by each explanation method that is fit, must" in words
    )
    for e in run().audits[0].estimates:
        if (e.metric, e.region, e.class_name, e.group) == ("enrichment", "hair", None, None):
            assert f"violated: {e}; above the maximum 1.5" in words
        if e.metric == "accuracy" and e.group is None:
            assert (f"held: {e}; within the limit" in words) == (e.class_name is not None)
    assert "3. enrichment face >= 5 at every (line 5, warn)" in words and "violated at step 100: enrichment on" in words
    assert words.rstrip().endswith("bias-audit policy check: of 3 rules 1 held, 2 violated")
    # Without a run it says what is asked, and no more.
    alone = bias_audit("policy", "check", path)
    assert alone.returncode == 0 and "must be at most 1.5" in alone.stdout and "violated:" not in alone.stdout


@pytest.mark.parametrize(
    ("rule", "kind", "why"),
    [
        ("metric: enrichment, region: context, max: 1", "biased", "the audit set has no context region"),
        ("metric: enrichment, region: hair, group: gender=male, class: each, min: 0, method: gradcam", "full", ""),
        (
            "metric: cramers_v, group: gender, max: 1",
            "biased",
            "cramers_v was not measured at all: give the callback the",
        ),
        ("metric: removal_flips, region: hair, max: 1", "biased", "nothing was removed: no region is spurious, or"),
        ("metric: swap_flips, group: gender, max: 1", "biased", "no image was swapped: give the plan `swaps`"),
        ("metric: insertion_auc, min: 0", "biased", "the explanation methods were not tested: `fitness_samples` is 0"),
        ("metric: alignment_gap, group: gender, max: 1", "biased", "which value goes with which class is not known"),
        ("metric: probe_gain, group: gender, max: 1", "biased", "probe_gain was not measured at all: give the audit"),
        ("metric: wrong_reason_rate, max: 1", "biased", "wrong_reason_rate was not measured at all."),
        (
            "metric: removal_flips, region: hair, group: gender, max: 1",
            "full",
            "removal_flips was recorded for other things: on hair, on hair for class doctor, on hair for class nurse, "
            "on face, on face for class doctor and 1 more",
        ),
    ],
)
def test_check_says_why_a_rule_matches_nothing(
    rule: str, kind: str, why: str, run: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bias_audit.terminal.policies import print_policy
    from bias_audit.terminal.text import console

    report = check_policy(read_policy(written(tmp_path / "audit.yaml", rule)), run(**KINDS[kind]))
    print_policy(console(), report)
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert ("Matches nothing: " in said) == bool(why) and why in said
    assert report.exit_code == (3 if why else 0)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("metric: enrichment, region: hiar, max: 1", "line 3: rules.0.region: unknown region 'hiar'"),
        ("metric: enrichment, region: hair, method: gradkam, max: 1",
         "line 3: rules.0.method: unknown method 'gradkam'; the audit uses gradcam, hirescam"),
        ("metric: accuracy, class: nurze, min: 0", "line 3: rules.0.class: unknown class 'nurze'"),
        ("metric: accuracy, group: gendre, min: 0", "line 3: rules.0.group: unknown attribute 'gendre'"),
        ("metric: accuracy, group: gender=mail, min: 0", "line 3: rules.0.group: attribute 'gender' has no value"),
        ("metric: accuracy, mim: 0", "line 3: rules.0.mim: unknown key"),
    ],
)  # fmt: skip
def test_check_finds_what_is_misspelt(rule: str, words: str, run: Callable[..., Run], tmp_path: Path) -> None:
    path = written(tmp_path / "audit.yaml", rule)
    with pytest.raises(ValueError, match=re.escape(words)) as raised:
        check_policy(read_policy(path), run())
    assert str(raised.value).startswith(f"policy {path}, line 3")
    if "gradkam" in rule:
        done = bias_audit("policy", "check", path, run().path)
        assert done.returncode == 2 and done.stdout == "" and done.stderr == f"bias-audit: {raised.value}\n"


def test_check_exits_as_its_report_says(run: Callable[..., Run], tmp_path: Path) -> None:
    path = written(tmp_path / "audit.yaml", "metric: accuracy, op: '>=', max_regression: 0.5")
    without = bias_audit("policy", "check", path, run(**CLEAN).path)
    assert without.returncode == 3 and "the gate was given no baseline" in without.stdout
    done = bias_audit("policy", "check", path, run(**CLEAN).path, "--baseline", run(**CLEAN).path)
    assert done.returncode == 0 and "worse by 0.000 [" in done.stdout and "held" in done.stdout
    (tmp_path / "empty").mkdir()
    missing = bias_audit("policy", "check", path, tmp_path / "empty")
    assert missing.returncode == 3 and "Inconclusive: " in missing.stdout and "Asks: accuracy must" in missing.stdout
    unpaired = bias_audit("policy", "check", path, "--baseline", run(**CLEAN).path)
    assert unpaired.returncode == 2 and "name the run as well" in unpaired.stderr


def test_check_never_passes_a_run_in_doubt(run: Callable[..., Run]) -> None:
    policy = read_policy({"rules": [{"metric": "accuracy", "min": 0.1}], "min_samples": 5})
    assert check_policy(policy, run(**CLEAN)).exit_code == 0
    assert check_policy(policy, run(**CLEAN | {"ended": False})).exit_code == 3
    assert check_policy(policy, run(**CLEAN | {"audits": 0})).exit_code == 3
    assert check_policy(policy, run(**CLEAN | {"samples": 4})).exit_code == 3


def test_check_says_what_the_gate_says(run: Callable[..., Run]) -> None:
    source, baseline = run(**FULL), Baseline.of_run(run(**CLEAN))
    policy = read_policy(yaml.safe_load(switched_on(draft_policy(source))))
    report, result = check_policy(policy, source, baseline), run_gate(source, policy, baseline=baseline)
    told = [check for one in report.rules for check in one.checks]
    assert sorted(map(str, told)) == sorted(str(c.check) for c in result.checks) and len(told) > 20
    assert all(check.rule == one.rule.title for one in report.rules for check in one.checks)
    violated = {c.check.rule for c in result.checks if c.check.outcome is Outcome.VIOLATED}
    assert {one.rule.title for one in report.rules if one.outcome is Outcome.VIOLATED} == violated


# schema


@pytest.mark.newest("pydantic wrote numbers otherwise before")
def test_the_published_schema_is_what_the_code_makes() -> None:
    published = files("bias_audit.schemas").joinpath("policy.schema.json").read_text(encoding="utf-8")
    assert published == policy_schema(), "run: bias-audit policy schema > bias_audit/schemas/policy.schema.json"
    done = bias_audit("policy", "schema")
    assert (done.returncode, done.stdout) == (0, published)
    Draft202012Validator.check_schema(json.loads(published))
    assert json.loads(published)["$schema"] == "https://json-schema.org/draft/2020-12/schema"


@pytest.mark.parametrize(
    ("rule", "valid"),
    [
        ({"metric": "accuracy", "max": 0.1}, True),
        ({"metric": "accuracy", "op": "<=", "threshold": 1}, True),
        ({"metric": "accuracy", "op": "<=", "max_regression": 1}, True),
        ({"metric": "accuracy", "max": 1, "max_regression": 0.1}, True),
        ({"metric": "accuracy", "class": "each", "max": 1, "at": "best", "on": "point", "min_samples": 3}, True),
        ({"metric": "verdict", "region": "a", "op": "!=", "threshold": "reliance"}, True),
        ({"metric": "verdict", "region": "a", "op": "==", "threshold": ["cleared"], "severity": "warn"}, True),
        ({"metric": "verdict", "group": "each", "forbid": ["reliance", "suspected"], "name": "x"}, True),
        ({"metric": "verdict", "region": "a", "forbid": "reliance"}, True),
        ({"metric": "accuracy"}, False),
        ({"max": 1}, False),
        ({"metric": "accuracy", "op": "<="}, False),
        ({"metric": "accuracy", "threshold": 1}, False),
        ({"metric": "accuracy", "max_regression": 1}, False),
        ({"metric": "accuracy", "op": "<=", "max_regression": -1}, False),
        ({"metric": "accuracy", "max": 1, "min": 0}, False),
        ({"metric": "accuracy", "max": 1, "op": "<="}, False),
        ({"metric": "accuracy", "max": True}, False),
        ({"metric": "accuracy", "maks": 1}, False),
        ({"metric": "acuracy", "max": 1}, False),
        ({"metric": "accuracy", "max": 1, "at": "lst"}, False),
        ({"metric": "accuracy", "max": 1, "severity": "fatal"}, False),
        ({"metric": "accuracy", "max": 1, "min_samples": 0}, False),
        ({"metric": "accuracy", "op": "!=", "threshold": 1}, False),
        ({"metric": "accuracy", "op": "<=", "threshold": "reliance"}, False),
        ({"metric": "accuracy", "forbid": "reliance"}, False),
        ({"metric": "verdict", "region": "a", "forbid": "relianse"}, False),
        ({"metric": "verdict", "region": "a", "forbid": []}, False),
        ({"metric": "verdict", "region": "a", "max": 1}, False),
        ({"metric": "verdict", "region": "a", "op": "<", "threshold": 1}, False),
        ({"metric": "verdict", "region": "a", "op": "!=", "threshold": 1}, False),
        ({"metric": "verdict", "region": "a", "method": "gradcam", "forbid": "reliance"}, False),
        ({"metric": "verdict", "region": "a", "op": "!=", "threshold": "reliance", "max_regression": 1}, False),
    ],
)
def test_the_schema_agrees_with_the_code(rule: dict[str, Any], valid: bool) -> None:
    content = {"rules": [rule]}
    assert VALIDATOR.is_valid(content) == valid
    if valid:
        Policy.model_validate(content)
    else:
        with pytest.raises(ValidationError):
            Policy.model_validate(content)


def test_policies_in_the_docs_are_valid() -> None:
    root = Path(__file__).parents[1]
    blocks = [
        block
        for path in (root / "README.md", *sorted((root / "docs").glob("*.md")))
        for block in re.findall(r"```yaml\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
        if re.search(r"^rules:", block, re.MULTILINE)
    ]
    assert blocks
    for block in blocks:
        VALIDATOR.validate(yaml.safe_load(block))
        Policy.model_validate(yaml.safe_load(block))
    for content in ({"ruls": []}, {"rules": []}, {"tolerance": {"enrichmnt": 1}}, {"min_samples": 0}, []):
        assert not VALIDATOR.is_valid(content)
    assert VALIDATOR.is_valid({"tolerance": {"enrichment": 1.2}, "min_samples": 3})


def test_the_commands_need_neither_torch_nor_arrays(run: Callable[..., Run]) -> None:
    script = (
        "import sys\nimport bias_audit.cli\nfrom bias_audit.gate.policy_check import check_policy\n"
        "from bias_audit.policies.file import read_policy\nfrom bias_audit.gate.policy_draft import draft_policy\n"
        "from bias_audit.policies.schema import policy_schema\nfrom bias_audit.records.runs import read_run\n"
        f"run = read_run({str(run(**CLEAN).path)!r})\n"
        "assert draft_policy(run) and policy_schema() and check_policy(read_policy(None), run).rules\n"
        "heavy = {'numpy', 'scipy', 'torch', 'wandb', 'pytorch_lightning', 'lightning'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
