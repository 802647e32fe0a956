"""Judge measured estimates: what a model relies on, and whether a policy's rules hold.

Enters: `Estimate`s (numbers with their interval and count), the `Subjects` they are about, and a `Policy`.
Leaves: `Finding`s, one per spurious region and per attribute, and a `Judgement` with one `Check` per rule and estimate.

Standard library and pydantic only: the gate imports this module and must start in a blink.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

REMAINDER = "remainder"
Role = Literal["object", "spurious", "context"]
ROLES: tuple[Role, ...] = ("object", "spurious", "context")

REGION_METRICS = (
    "energy_share",
    "enrichment",
    "energy_share_gain",
    "pointing_game",
    "iou",
    "relevance_rank_accuracy",
    "coverage",
)
GROUP_METRICS = ("accuracy", "worst_group_accuracy", "accuracy_gap")
Metric = Literal[
    "energy_share",
    "enrichment",
    "energy_share_gain",
    "pointing_game",
    "iou",
    "relevance_rank_accuracy",
    "coverage",
    "accuracy",
    "worst_group_accuracy",
    "accuracy_gap",
    "verdict",
]


class Verdict(StrEnum):
    """What the evidence says of one region or attribute."""

    RELIANCE = "reliance"
    SUSPECTED = "suspected"
    CLEARED = "cleared"
    INCONCLUSIVE = "inconclusive"


class Outcome(StrEnum):
    """What became of a rule, or of a whole policy."""

    HELD = "held"
    VIOLATED = "violated"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True)
class Estimate:
    """A measured number: its value, its interval at the policy's confidence level, and the images behind it.

    `region`, `class_name`, `group` and `method` say what it was measured on; None means "over all". `group` is
    `"attribute=value"`, or `"attribute"` for metrics that compare an attribute's values (`accuracy_gap`,
    `worst_group_accuracy`). `value`, `low` and `high` are None where nothing could be measured; `reason` says why.
    """

    metric: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    region: str | None = None
    class_name: str | None = None
    group: str | None = None
    method: str | None = None
    reason: str = ""

    @property
    def measured(self) -> bool:
        """Whether value and interval are finite numbers."""
        return all(x is not None and math.isfinite(x) for x in (self.value, self.low, self.high))

    @property
    def subject(self) -> str:
        """The estimate's name as a person reads it."""
        parts = [self.metric]
        if self.region:
            parts.append(f"on {self.region}")
        if self.class_name:
            parts.append(f"for class {self.class_name}")
        if self.group:
            parts.append(f"by {self.group}" if "=" not in self.group else f"where {self.group}")
        if self.method:
            parts.append(f"({self.method})")
        return " ".join(parts)

    def __str__(self) -> str:
        if not self.measured:
            return f"{self.subject}: not measured ({self.reason or 'no valid image'})"
        return f"{self.subject}: {self.value:.3f} [{self.low:.3f}, {self.high:.3f}], n = {self.n}"


@dataclass(frozen=True)
class Subjects:
    """The names that estimates and rules may use.

    `regions` are `(name, role)` pairs, `attributes` are `(name, values)` pairs, `classes` the class names in order of
    their index.
    """

    regions: tuple[tuple[str, Role], ...]
    attributes: tuple[tuple[str, tuple[str, ...]], ...]
    classes: tuple[str, ...]

    def regions_with(self, role: Role) -> tuple[str, ...]:
        """Names of the regions in `role`."""
        return tuple(name for name, its_role in self.regions if its_role == role)

    def values_of(self, attribute: str) -> tuple[str, ...]:
        """The values that `attribute` takes in the audit set."""
        return dict(self.attributes)[attribute]


@dataclass(frozen=True)
class Finding:
    """The verdict on one spurious region or one attribute, with the sentence a person needs and its evidence.

    `possible` are the verdicts that the evidence does not rule out: one, or several where something is unknown. An
    unknown need not matter: a region that may or may not be looked at is not relied on if accuracy does not differ.
    """

    kind: Literal["region", "attribute"]
    name: str
    verdict: Verdict
    sentence: str
    evidence: tuple[Estimate, ...]
    possible: tuple[Verdict, ...]
    samples_to_settle: int | None = None


@dataclass(frozen=True)
class Check:
    """One rule applied to one estimate or finding."""

    rule: str
    subject: str
    outcome: Outcome
    severity: Literal["error", "warn"]
    message: str
    estimate: Estimate | None = None
    limit: float | None = None


@dataclass(frozen=True)
class Judgement:
    """Findings and checks of one audit under one policy; `outcome` is what the gate returns."""

    findings: tuple[Finding, ...]
    checks: tuple[Check, ...]

    @property
    def outcome(self) -> Outcome:
        """Violated if any rule of severity `error` is; else inconclusive if any such rule is; else held."""
        outcomes = {check.outcome for check in self.checks if check.severity == "error"}
        if Outcome.VIOLATED in outcomes:
            return Outcome.VIOLATED
        # A policy whose rules matched nothing has shown nothing.
        return Outcome.HELD if outcomes == {Outcome.HELD} else Outcome.INCONCLUSIVE

    @property
    def violations(self) -> tuple[Check, ...]:
        """The violated checks of severity `error`."""
        return tuple(c for c in self.checks if c.severity == "error" and c.outcome is Outcome.VIOLATED)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)


class Rule(_Strict):
    """One line of a policy.

    `region` names a region, or a role (`spurious`, `object`, `context`) for each region in it. `class` names a class,
    or `each`; without it the rule is about all classes together. `group` is `attribute=value`, or an attribute for
    each of its values; `accuracy_gap` and `worst_group_accuracy` take the attribute itself. Without `method` a rule
    must hold for each explanation method.

    A limit is violated only if the whole interval lies beyond it, and held only if the whole interval lies within.
    """

    metric: Metric
    name: str | None = None
    region: str | None = None
    class_name: Annotated[str | None, Field(alias="class")] = None
    group: str | None = None
    method: str | None = None
    max: float | None = None
    min: float | None = None
    forbid: tuple[Verdict, ...] = ()
    severity: Literal["error", "warn"] = "error"
    min_samples: Annotated[int | None, Field(ge=1)] = None

    @model_validator(mode="after")
    def _complete(self) -> Rule:
        if self.metric == "verdict":
            if self.max is not None or self.min is not None:
                raise ValueError("a rule on `verdict` takes `forbid: [reliance]`, not `max` or `min`")
            if not self.forbid:
                raise ValueError("a rule on `verdict` needs `forbid`, such as `forbid: [reliance]`")
            if (self.region is None) == (self.group is None):
                raise ValueError("a rule on `verdict` needs either `region` or `group` (an attribute)")
            if self.class_name or self.method:
                raise ValueError("a rule on `verdict` takes neither `class` nor `method`: a verdict weighs all of them")
            return self
        if self.forbid:
            raise ValueError(f"`forbid` belongs to rules on `verdict`; a rule on `{self.metric}` takes `max` or `min`")
        if self.max is None and self.min is None:
            raise ValueError(f"a rule on `{self.metric}` needs `max` or `min`")
        if self.max is not None and self.min is not None and self.min > self.max:
            raise ValueError(f"`min` ({self.min}) is above `max` ({self.max})")
        if self.metric in REGION_METRICS and self.region is None:
            raise ValueError(
                f"a rule on `{self.metric}` needs `region`: a region's name or a role ({', '.join(ROLES)})"
            )
        if self.metric in GROUP_METRICS and self.region is not None:
            raise ValueError(f"`{self.metric}` is not measured on a region: remove `region`")
        if self.metric in ("accuracy_gap", "worst_group_accuracy") and self.group is None:
            raise ValueError(f"a rule on `{self.metric}` needs `group`: the attribute whose values are compared")
        if self.metric == "worst_group_accuracy" and self.class_name is not None:
            raise ValueError("`worst_group_accuracy` is over all classes: remove `class`")
        return self

    @property
    def title(self) -> str:
        """The rule's name, or one made of its parts."""
        if self.name:
            return self.name
        where = " ".join(x for x in (self.region, self.class_name, self.group, self.method) if x)
        limits = [f"<= {self.max:g}"] if self.max is not None else []
        limits += [f">= {self.min:g}"] if self.min is not None else []
        limits += [f"not {' or '.join(self.forbid)}"] if self.forbid else []
        return f"{self.metric} {where} {' and '.join(limits)}".replace("  ", " ")


class Tolerance(_Strict):
    """What still counts as unbiased, when findings are judged.

    `enrichment`: a spurious region is looked at if its share of the heatmap, over the share of area, lies above this
    (1 = what area alone gives). `accuracy_gap`: accuracy of the best minus the worst group within a class.
    """

    enrichment: Annotated[float, Field(gt=0)] = 1.0
    accuracy_gap: Annotated[float, Field(ge=0, lt=1)] = 0.1


_DEFAULT_RULES = (
    Rule(metric="verdict", region="spurious", forbid=(Verdict.RELIANCE,)),
    Rule(metric="verdict", region="spurious", forbid=(Verdict.SUSPECTED,), severity="warn"),
)


class Policy(_Strict):
    """What an audit must show: the rules, and the tolerances by which findings are judged.

    Without rules of its own a policy forbids the verdict `reliance` on every spurious region and warns of `suspected`.

    Example:
        >>> policy = Policy.model_validate({"rules": [{"metric": "enrichment", "region": "hair", "max": 1.5}]})
        >>> policy.rules[0].title
        'enrichment hair <= 1.5'
    """

    rules: Annotated[tuple[Rule, ...], Field(min_length=1)] = _DEFAULT_RULES
    tolerance: Tolerance = Tolerance()
    min_samples: Annotated[int, Field(ge=1)] = 20

    @model_validator(mode="after")
    def _distinct(self) -> Policy:
        titles = [rule.title for rule in self.rules]
        twice = next((title for title in titles if titles.count(title) > 1), None)
        if twice is not None:
            raise ValueError(f"two rules are called {twice!r}: give one of them another `name`, or remove it")
        return self

    @classmethod
    def load(cls, source: Policy | str | Path | Mapping[str, Any] | None) -> Policy:
        """Policy from a YAML file, a TOML file (`[tool.bias_audit]`), a mapping, or None for the default.

        Raises:
            ValueError: the file cannot be read, is not YAML or TOML, or has a key or value that no policy has; the
                message names the file and the key.
        """
        if source is None:
            return cls()
        if isinstance(source, Policy):
            return source
        if isinstance(source, Mapping):
            return cls._parse(source, "policy")
        path = Path(source)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"policy {path}: cannot be read ({error}): give the path of a YAML or TOML file"
            ) from error
        try:
            content = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
        except (ValueError, yaml.YAMLError, RecursionError) as error:
            detail = " ".join(str(error).split())
            raise ValueError(f"policy {path}: not valid {path.suffix.lstrip('.') or 'YAML'}: {detail}") from error
        if path.suffix == ".toml":
            tools = content.get("tool")
            content = tools.get("bias_audit") if isinstance(tools, dict) else None
            if content is None:
                raise ValueError(f"policy {path}: has no table [tool.bias_audit]: add it, or name another file")
        if not isinstance(content, Mapping):
            kind = "nothing" if content is None else type(content).__name__
            raise ValueError(f"policy {path}: expected a mapping with the key `rules`, got {kind}")
        return cls._parse(content, f"policy {path}")

    @classmethod
    def _parse(cls, content: Mapping[str, Any], where: str) -> Policy:
        try:
            return cls.model_validate(dict(content))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or "(top level)"
            what = first["msg"].removeprefix("Value error, ")
            if first["type"] == "extra_forbidden":
                owners: dict[str, type[BaseModel]] = {"rules": Rule, "tolerance": Tolerance}
                owner = owners.get(str(first["loc"][0]), cls) if len(first["loc"]) > 1 else cls
                known = ", ".join(field.alias or name for name, field in owner.model_fields.items())
                what = f"unknown key; known are: {known}"
            raise ValueError(f"{where}: {key}: {what}") from error

    def check_names(self, subjects: Subjects) -> None:
        """Raise if a rule names a region, class or attribute that the audit set does not have.

        Raises:
            ValueError: says which rule, which name, and which names there are.
        """
        regions = {name for name, _ in subjects.regions} | {REMAINDER}
        attributes = dict(subjects.attributes)
        for rule in self.rules:
            where = f"policy rule {rule.title!r}"
            if rule.region is not None and rule.region not in regions and rule.region not in ROLES:
                raise ValueError(
                    f"{where}: unknown region {rule.region!r}; the audit set has {_list(regions)}, "
                    f"the roles are {', '.join(ROLES)}"
                )
            if rule.class_name not in (None, "each", *subjects.classes):
                raise ValueError(
                    f"{where}: unknown class {rule.class_name!r}; the audit set has {_list(subjects.classes)}"
                )
            if rule.group is not None:
                attribute, _, value = rule.group.partition("=")
                if attribute not in attributes:
                    raise ValueError(
                        f"{where}: unknown attribute {attribute!r}; the audit set has {_list(attributes)}: "
                        f"correct `group`, or give the attribute to the audit set"
                    )
                if value and value not in attributes[attribute]:
                    raise ValueError(
                        f"{where}: attribute {attribute!r} has no value {value!r}; "
                        f"it has {_list(attributes[attribute])}"
                    )


def judge(estimates: Sequence[Estimate], subjects: Subjects, policy: Policy) -> Judgement:
    """Findings and rule outcomes for one audit's estimates.

    Raises:
        ValueError: a rule names a region, class or attribute that the audit set does not have.
    """
    policy.check_names(subjects)
    findings = tuple(_find(estimates, subjects, policy))
    checks = tuple(check for rule in policy.rules for check in _apply(rule, estimates, findings, subjects, policy))
    return Judgement(findings, checks)


def _find(estimates: Sequence[Estimate], subjects: Subjects, policy: Policy) -> Iterable[Finding]:
    regions = subjects.regions_with("spurious")
    looks = {region: _attention(estimates, region, policy) for region in regions}
    gaps = {attribute: _performance(estimates, attribute, policy) for attribute, _ in subjects.attributes}
    gap = _strongest(gaps.values())
    for region in regions:
        yield _region_finding(region, looks[region], gap)
    look = _strongest(looks.values())
    for attribute, _ in subjects.attributes:
        yield _attribute_finding(attribute, gaps[attribute], look)


@dataclass(frozen=True)
class _Answer:
    """Whether one kind of evidence is there: yes, no, or unknown (None), and the estimate that says so.

    `annotated` is False where the audit set has nothing that could answer.
    """

    there: bool | None
    estimate: Estimate | None
    reason: str = ""
    settle: int | None = None
    annotated: bool = True


def _attention(estimates: Sequence[Estimate], region: str, policy: Policy) -> _Answer:
    mine = [e for e in estimates if e.metric == "enrichment" and e.region == region and e.group is None]
    return _exceeds(mine, policy.tolerance.enrichment, policy.min_samples, f"attention to {region}")


def _performance(estimates: Sequence[Estimate], attribute: str, policy: Policy) -> _Answer:
    mine = [e for e in estimates if e.metric == "accuracy_gap" and e.group == attribute and e.class_name is not None]
    return _exceeds(mine, policy.tolerance.accuracy_gap, policy.min_samples, f"accuracy by {attribute}")


def _exceeds(estimates: list[Estimate], limit: float, min_samples: int, what: str) -> _Answer:
    """Yes if any interval lies above the limit, no if all lie within it, else unknown."""
    usable = [e for e in estimates if e.measured and e.n >= min_samples]
    above = [e for e in usable if e.low is not None and e.low > limit]
    if above:
        return _Answer(True, max(above, key=_by_value))
    thin = [e for e in estimates if e not in usable]
    undecided = [e for e in usable if e.high is not None and e.high > limit]
    if not estimates:
        return _Answer(None, None, f"{what} was not measured")
    if thin:
        short = min(thin, key=lambda e: (e.n, *_by_value(e)))
        because = short.reason or f"{short.n} valid images, {min_samples} needed"
        return _Answer(None, short, f"{_readable(short)}: {because}", max(min_samples, short.n))
    if undecided:
        widest = max(undecided, key=_by_value)
        return _Answer(
            None,
            widest,
            f"{_readable(widest)} is {_interval(widest)}, which leaves open whether it exceeds {limit:g}",
            _samples_to_settle(widest, limit),
        )
    return _Answer(False, max(usable, key=_by_value))


def _samples_to_settle(estimate: Estimate, limit: float) -> int | None:
    """Images at which the interval would no longer reach the limit, its width shrinking with the square root of n."""
    assert estimate.value is not None and estimate.low is not None and estimate.high is not None
    distance = abs(estimate.value - limit)
    side = estimate.high - estimate.value if estimate.value < limit else estimate.value - estimate.low
    if distance <= side / 1000:
        # A million times the images: nobody gathers them.
        return None
    return math.ceil(estimate.n * (side / distance) ** 2)


def _strongest(answers: Iterable[_Answer]) -> _Answer:
    """Of several answers the one that counts: any yes, else any unknown, else a no."""
    ranked = sorted(answers, key=lambda a: {True: 0, None: 1, False: 2}[a.there])
    if not ranked:
        return _Answer(None, None, "no attribute is annotated, so no groups can be compared", annotated=False)
    return ranked[0]


def _region_verdict(look: bool, gap: bool) -> Verdict:
    if look:
        return Verdict.RELIANCE if gap else Verdict.SUSPECTED
    # Accuracy differs, and by what is not shown: the heatmaps may miss this region.
    return Verdict.INCONCLUSIVE if gap else Verdict.CLEARED


def _attribute_verdict(look: bool, gap: bool) -> Verdict:
    if gap:
        return Verdict.RELIANCE if look else Verdict.SUSPECTED
    return Verdict.CLEARED


def _possible(table: Callable[[bool, bool], Verdict], look: _Answer, gap: _Answer) -> tuple[Verdict, ...]:
    """What the table gives for each way in which what is unknown may turn out."""
    ways = [(True, False) if answer.there is None else (answer.there,) for answer in (look, gap)]
    found = {table(one, other) for one in ways[0] for other in ways[1]}
    return tuple(verdict for verdict in Verdict if verdict in found)


def _region_finding(region: str, look: _Answer, gap: _Answer) -> Finding:
    seen, differs = _say_attention(region, look), _say_performance(gap)
    possible = _possible(_region_verdict, look, gap)
    verdict = possible[0] if len(possible) == 1 else Verdict.INCONCLUSIVE
    if look.there and not gap.annotated:
        verdict, sentence = Verdict.SUSPECTED, f"{seen}; whether it decides anything is unknown: {gap.reason}."
    elif len(possible) > 1:
        ruled_out = "" if Verdict.RELIANCE in possible else f" Reliance is ruled out: {differs}."
        sentence = _open_question(look, gap) + (ruled_out if gap.there is False else "")
    elif verdict is Verdict.SUSPECTED:
        sentence = f"{seen}, but {differs}: looking there is not shown to decide anything."
    elif verdict is Verdict.INCONCLUSIVE:
        sentence = f"{seen}, yet {differs}: the heatmaps do not show what the accuracy shows."
    else:
        sentence = f"{seen}, and {differs}."
    return _finding("region", region, verdict, sentence, possible, look, gap)


def _attribute_finding(attribute: str, gap: _Answer, look: _Answer) -> Finding:
    differs = _say_performance(gap)
    region = look.estimate.region if look.estimate else None
    seen = _say_attention(region or "a spurious region", look)
    if gap.there and look.there:
        verdict, sentence = Verdict.RELIANCE, f"{_capital(differs)}; {_uncapital(seen)}."
    elif gap.there:
        verdict = Verdict.SUSPECTED
        sentence = f"{_capital(differs)}; no annotated spurious region is shown to draw the heatmaps."
    elif gap.there is False:
        verdict, sentence = Verdict.CLEARED, f"{_capital(differs)}."
    else:
        verdict, sentence = Verdict.INCONCLUSIVE, f"{_capital(gap.reason)}."
    return _finding("attribute", attribute, verdict, sentence, _possible(_attribute_verdict, look, gap), gap, look)


def _finding(
    kind: Literal["region", "attribute"],
    name: str,
    verdict: Verdict,
    sentence: str,
    possible: tuple[Verdict, ...],
    *answers: _Answer,
) -> Finding:
    settle = [a.settle for a in answers if a.there is None and a.settle is not None]
    return Finding(
        kind,
        name,
        verdict,
        sentence,
        tuple(a.estimate for a in answers if a.estimate is not None),
        possible,
        max(settle) if settle and verdict is Verdict.INCONCLUSIVE else None,
    )


def _open_question(look: _Answer, gap: _Answer) -> str:
    reasons = [a.reason for a in (look, gap) if a.there is None]
    return f"{_capital('; '.join(reasons))}."


def _say_attention(region: str, look: _Answer) -> str:
    if look.estimate is None or not look.estimate.measured:
        return f"Attention to {region} was not measured"
    for_class = f"For class {look.estimate.class_name} the" if look.estimate.class_name else "The"
    times = f"{_interval(look.estimate)} times the share its area would ({look.estimate.method})"
    return f"{for_class} heatmaps give {region} {'' if look.there else 'at most '}{times}"


def _say_performance(gap: _Answer) -> str:
    if gap.estimate is None or not gap.estimate.measured:
        return "accuracy by group was not measured"
    e = gap.estimate
    where = f"within class {e.class_name} " if e.class_name else ""
    size = "" if gap.there else "at most "
    return f"{where}accuracy differs by {e.group} by {size}{_interval(e)}"


def _readable(e: Estimate) -> str:
    return e.subject.replace("_", " ")


def _interval(e: Estimate) -> str:
    return f"{e.value:.2f} [{e.low:.2f}, {e.high:.2f}]"


def _by_value(e: Estimate) -> tuple[float, str, int]:
    """By value, and where values are equal in an order that does not depend on that of the estimates."""
    return -math.inf if e.value is None else e.value, e.subject, e.n


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _uncapital(text: str) -> str:
    return text[:1].lower() + text[1:]


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _apply(
    rule: Rule, estimates: Sequence[Estimate], findings: Sequence[Finding], subjects: Subjects, policy: Policy
) -> list[Check]:
    regions = subjects.regions_with(rule.region) if rule.region in ROLES else (rule.region,)
    if rule.metric == "verdict":
        kind, names = ("region", regions) if rule.region is not None else ("attribute", (rule.group,))
        checks = [_check_verdict(rule, f) for f in findings if f.kind == kind and f.name in names]
    else:
        wanted = _Wanted(rule, regions, subjects)
        min_samples = rule.min_samples or policy.min_samples
        checks = [_check_limit(rule, e, min_samples) for e in estimates if wanted.matches(e)]
    if checks:
        return checks
    message = f"{rule.title}: no estimate of this kind was recorded, so nothing is shown"
    return [Check(rule.title, rule.title, Outcome.INCONCLUSIVE, rule.severity, message)]


class _Wanted:
    """Which estimates a rule is about."""

    def __init__(self, rule: Rule, regions: Iterable[str | None], subjects: Subjects) -> None:
        self.rule, self.regions = rule, set(regions)
        self.groups: set[str | None] = {rule.group}
        each_value = rule.metric not in ("accuracy_gap", "worst_group_accuracy")
        if rule.group is not None and "=" not in rule.group and each_value:
            self.groups = {f"{rule.group}={value}" for value in subjects.values_of(rule.group)}

    def matches(self, e: Estimate) -> bool:
        class_fits = (
            e.class_name is not None if self.rule.class_name == "each" else e.class_name == self.rule.class_name
        )
        return (
            e.metric == self.rule.metric
            and e.region in self.regions
            and e.group in self.groups
            and class_fits
            and self.rule.method in (None, e.method)
        )


def _check_limit(rule: Rule, e: Estimate, min_samples: int) -> Check:
    def check(outcome: Outcome, why: str, limit: float | None = None) -> Check:
        return Check(rule.title, e.subject, outcome, rule.severity, f"{e}; {why}", e, limit)

    if not e.measured:
        return check(Outcome.INCONCLUSIVE, "nothing to compare")
    assert e.low is not None and e.high is not None
    if e.n < min_samples:
        return check(Outcome.INCONCLUSIVE, f"fewer images than min_samples = {min_samples}")
    if rule.max is not None and e.low > rule.max:
        return check(Outcome.VIOLATED, f"above the maximum {rule.max:g}", rule.max)
    if rule.min is not None and e.high < rule.min:
        return check(Outcome.VIOLATED, f"below the minimum {rule.min:g}", rule.min)
    if rule.max is not None and e.high > rule.max:
        return check(Outcome.INCONCLUSIVE, f"the interval reaches beyond the maximum {rule.max:g}", rule.max)
    if rule.min is not None and e.low < rule.min:
        return check(Outcome.INCONCLUSIVE, f"the interval reaches below the minimum {rule.min:g}", rule.min)
    return check(Outcome.HELD, "within the limit", rule.max if rule.max is not None else rule.min)


def _check_verdict(rule: Rule, finding: Finding) -> Check:
    if finding.verdict in rule.forbid:
        outcome = Outcome.VIOLATED
    elif {*rule.forbid, Verdict.INCONCLUSIVE} & set(finding.possible):
        outcome = Outcome.INCONCLUSIVE
    else:
        outcome = Outcome.HELD
    subject = f"verdict on {finding.kind} {finding.name}"
    message = f"{subject}: {finding.verdict}. {finding.sentence}"
    return Check(
        rule.title, subject, outcome, rule.severity, message, finding.evidence[0] if finding.evidence else None
    )
