"""A policy in a file: what is wrong is named with its file, line and key, and each rule knows its line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bias_audit.located import MOST_BYTES
from bias_audit.policies.file import read_policy
from bias_audit.policies.policy import Policy, Rule
from bias_audit.terms import Verdict

YAML = """\
# What a merge must show.
min_samples: 30
tolerance:
  accuracy_gap: 0.05
rules:
  - metric: verdict
    region: spurious
    op: "!="
    threshold: [reliance, suspected]
  - {metric: enrichment, region: hair, op: "<=", threshold: 1.5, at: every}

  # The last one.
  - metric: accuracy
    class: each
    min: 0.8
    max_regression: 0.02
    name: accurate
"""
TOML = """\
[project]
name = "min_samples"

[tool.other]
min_samples = 3

[tool.bias_audit]
min_samples = 30
tolerance = {accuracy_gap = 0.05}

[[tool.bias_audit.rules]]
metric = "verdict"
region = "spurious"
op = "!="
threshold = ["reliance", "suspected"]

[[tool.bias_audit.rules]]  # with metric = in a comment
metric = "enrichment"
region = "hair"
op = "<="
threshold = 1.5
at = "every"

[[tool.bias_audit.rules]]
name = "accurate"
metric = "accuracy"
class = "each"
min = 0.8
max_regression = 0.02
"""
INLINE = """\
[tool.bias_audit]
min_samples = 30
tolerance.accuracy_gap = 0.05
rules = [
  {metric = "verdict", region = "spurious", forbid = ["reliance", "suspected"]},
  {metric = "enrichment", region = "hair", max = 1.5, at = "every"},
  {name = "accurate", metric = "accuracy", class = "each", min = 0.8, max_regression = 0.02},
]
"""
FILES = {"audit.yaml": (YAML, (6, 10, 13)), "audit.toml": (TOML, (12, 18, 25)), "inline.toml": (INLINE, (5, 6, 7))}


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", FILES)
def test_one_policy_in_three_spellings(name: str, tmp_path: Path) -> None:
    text, lines = FILES[name]
    found = read_policy(written(tmp_path, name, text))
    assert found.policy == Policy(
        min_samples=30,
        tolerance={"accuracy_gap": 0.05},
        rules=(
            Rule(metric="verdict", region="spurious", op="!=", threshold=(Verdict.RELIANCE, Verdict.SUSPECTED)),
            Rule(metric="enrichment", region="hair", op="<=", threshold=1.5, at="every"),
            Rule(metric="accuracy", class_name="each", op=">=", threshold=0.8, max_regression=0.02, name="accurate"),
        ),
    )
    assert found.path == tmp_path / name
    assert tuple(found.line_of(rule.title) for rule in found.policy.rules) == lines
    assert found.line_of("accurate") == lines[2] and found.line_of("nothing") is None
    assert [rule.title for rule in found.policy.rules] == [
        "verdict spurious != reliance or suspected",
        "enrichment hair <= 1.5 at every",
        "accurate",
    ]


def test_a_policy_that_is_in_no_file_has_no_lines() -> None:
    for source in (None, Policy(), {"min_samples": 20}):
        assert read_policy(source).path is None
        assert read_policy(source).line_of(Policy().rules[0].title) is None


def test_a_recorded_policy_reads_back_as_it_was(tmp_path: Path) -> None:
    policy = read_policy(written(tmp_path, "audit.yaml", YAML)).policy
    assert Policy.model_validate_json(policy.model_dump_json(by_alias=True)) == policy
    # As the first version recorded a rule, with every limit that it did not set.
    old = {"metric": "iou", "region": "hair", "class": None, "max": 0.5, "min": None, "forbid": []}
    assert Rule.model_validate(old) == Rule(metric="iou", region="hair", op="<=", threshold=0.5)


@pytest.mark.parametrize(
    ("name", "change", "line", "words"),
    [
        ("audit.yaml", ("min_samples", "min_sample"), 2, "min_sample: unknown key; did you mean `min_samples`?"),
        ("audit.yaml", ("accuracy_gap", "gap"), 4, "tolerance.gap: unknown key"),
        ("audit.yaml", ("region: spurious", "regoin: spurious"), 7, "rules.0.regoin: unknown key; did you mean `regi"),
        ("audit.yaml", ("suspected", "suspicious"), 9, "rules.0.threshold.1: Input should be 'reliance'"),
        ("audit.yaml", ("at: every", "at: always"), 10, "rules.1.at: Input should be 'last'"),
        ("audit.yaml", ("min: 0.8", "min: most"), 13, "rules.2: `min` takes a number, got 'most'"),
        ("audit.yaml", ("0.02", "-1"), 16, "rules.2.max_regression: Input should be greater"),
        ("audit.yaml", ('op: "!="', "op: !="), 8, 'an `op` such as ">=" or "!=" needs quotes'),
        ("audit.yaml", ('op: "!="', "op: >="), 8, 'an `op` such as ">=" or "!=" needs quotes'),
        ("audit.yaml", ("name: accurate", "metric: iou"), 17, "metric: stands twice"),
        ("audit.yaml", ("tolerance:", "  tolerance"), 4, "not valid yaml"),
        ("audit.toml", ("\nmin_samples = 30", "\nmin_sample = 30"), 8, "min_sample: unknown key"),
        ("audit.toml", ("accuracy_gap", "gap"), 9, "tolerance.gap: unknown key"),
        ("audit.toml", ('"suspected"', '"suspicious"'), 15, "rules.0.threshold.1"),
        ("audit.toml", ('at = "every"', 'att = "every"'), 22, "rules.1.att: unknown key; did you mean `at`?"),
        ("audit.toml", ("min = 0.8", "min = true"), 28, "rules.2.min: expected a number, got True"),
        ("inline.toml", ("max = 1.5", "maks = 1.5"), 6, "rules.1.maks: unknown key; did you mean `max`?"),
        ("inline.toml", ("0.02", "-1"), 7, "rules.2.max_regression"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(
    name: str, change: tuple[str, str], line: int, words: str, tmp_path: Path
) -> None:
    text = FILES[name][0]
    assert text.count(change[0]) == 1 or change[0] in ("min_samples", "accuracy_gap")
    path = written(tmp_path, name, text.replace(*change, 1))
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        read_policy(path)
    assert str(caught.value).startswith(f"policy {path}, line {line}: ") and "\n" not in str(caught.value)


def test_no_text_costs_more_than_it_is_worth(tmp_path: Path) -> None:
    laughs = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 40))
    bomb = f"a0: &a0 [x]\n{laughs}\nrules: *a39\n"
    many = "[tool.bias_audit]\n" + "x" * 20 + "\n".join(f'x{i} = "nope nope"' for i in range(20_000)) + "\nnope = 1\n"
    for name, text in (("bomb.yaml", bomb), ("many.toml", many), ("deep.yaml", "rules: " + "[" * 3000 + "]" * 3000)):
        with pytest.raises(ValueError, match="policy") as caught:
            read_policy(written(tmp_path, name, text))
        assert len(str(caught.value)) < 2000
    with pytest.raises(ValueError, match=f"has {MOST_BYTES + 1} bytes, expected at most"):
        read_policy(written(tmp_path, "long.yaml", "#" * (MOST_BYTES + 1)))


def test_words_that_yaml_takes_for_truth_values(tmp_path: Path) -> None:
    rules = ("{metric: accuracy, on: point, class: no, min: 0.5}", "{metric: accuracy, class: off, min: 1e-3}")
    text = "".join(("rules:\n", *(f"  - {rule}\n" for rule in rules)))
    first, second = read_policy(written(tmp_path, "audit.yaml", text)).policy.rules
    assert (first.on, first.class_name, second.class_name, second.threshold) == ("point", "no", "off", 0.001)
    with pytest.raises(ValueError, match="line 1: min_samples"):
        read_policy(written(tmp_path, "audit.yaml", "min_samples: yes\n"))


def test_links_and_merges_keep_their_lines(tmp_path: Path) -> None:
    text = "base: &b {metric: iou, region: hair}\nrules:\n  - <<: *b\n    max: 0.5\n  - {<<: *b, mox: 1}\n"
    with pytest.raises(ValueError, match=r"line 5: rules.1.mox: unknown key; did you mean `max`\?"):
        read_policy(written(tmp_path, "audit.yaml", text))
    text = "rules:\n  - &b {metric: iou, region: hair, max: 0.5}\n  - {<<: *b, max: 0.7, region: coat}\n"
    assert [r.title for r in read_policy(written(tmp_path, "a.yaml", text)).policy.rules] == [
        "iou hair <= 0.5",
        "iou coat <= 0.7",
    ]


scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8))
contents: Any = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["rules", "metric", "op", "threshold", "max", "forbid", "tolerance", "at", "region"]), inner
        )
    ),
    max_leaves=8,
)


@given(contents)
def test_whatever_stands_in_it_is_a_policy_or_a_value_error(content: Any) -> None:
    try:
        policy = read_policy(content if isinstance(content, dict) else {"rules": content}).policy
    except ValueError as error:
        if "\n" in str(error) or type(error) is not ValueError:
            raise
    else:
        assert policy.rules
