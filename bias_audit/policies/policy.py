"""What an audit must show, written down by a person.

Enters: a mapping. Leaves: a `Policy` of `Rule`s, checked against the names that the audit set has.

Standard library and pydantic only: the gate imports this module and must start in a blink.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from bias_audit.terms import (
    ASSOCIATION_METRICS,
    BY_GROUP_METRICS,
    COMPARING_METRICS,
    EXPLAINER_METRICS,
    GROUP_METRICS,
    OWN,
    OWN_NAME,
    REGION_METRICS,
    REMAINDER,
    ROLES,
    UNBOUNDED_METRICS,
    AssociationMetric,
    ExplainerMetric,
    GroupMetric,
    InterventionMetric,
    RegionMetric,
    Subjects,
    Verdict,
    is_of_maps,
)

_Known = Literal[RegionMetric, GroupMetric, ExplainerMetric, InterventionMetric, AssociationMetric, "verdict"]
METRICS: tuple[str, ...] = get_args(_Known)
Op = Literal["<", "<=", ">", ">=", "==", "!="]

# What is measured by removing a region, and so needs one.
_OF_REMOVAL = ("removal_", "control_", "fill_", "region_")
SHORTHANDS: dict[str, Op] = {"max": "<=", "min": ">=", "forbid": "!="}
EACH = "each"


class _Strict(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False
    )


def _kind_of_threshold(value: object) -> str:
    if isinstance(value, str):
        # YAML takes 1e-3 for text.
        with suppress(ValueError):
            value = float(value)
    return "number" if isinstance(value, int | float) else "verdicts"


def _number(value: object) -> object:
    # YAML takes `yes` for a truth value, and that would be a 1.
    if isinstance(value, bool):
        raise ValueError(f"expected a number, got {value}")
    return value


def _kind_of_metric(value: object) -> str:
    return "own" if isinstance(value, str) and value.startswith(OWN) else "known"


Metric = Annotated[
    Annotated[_Known, Tag("known")] | Annotated[str, Field(pattern=OWN_NAME), Tag("own")],
    Discriminator(_kind_of_metric),
]


def _listed(value: object) -> object:
    return (value,) if isinstance(value, str) else value


Threshold = Annotated[
    Annotated[float, BeforeValidator(_number), Tag("number")]
    | Annotated[tuple[Verdict, ...], BeforeValidator(_listed), Tag("verdicts")],
    Discriminator(_kind_of_threshold),
]


class Rule(_Strict):
    """One line of a policy.

    `op` and `threshold` say what must hold: `op: "<="`, `threshold: 1.5`; of a verdict `op: "!="`, `threshold:
    reliance`, or several. `max: 1.5`, `min: 0.4` and `forbid: [reliance]` are short for `<=`, `>=` and `!=`.

    `region` names a region, or a role (`spurious`, `object`, `context`) for each region in it. `class` names a class,
    or `each`; without it the rule is about all classes together. `group` is `attribute=value`, or an attribute for
    each of its values; metrics that compare the values, such as `accuracy_gap`, `swap_gap` and `cramers_v`, take the
    attribute itself, and rules on `verdict` an attribute or `each`. Without `method` a rule must hold for each
    explanation method that is fit. Metrics of the methods themselves, such as `occlusion_correlation`, take `method`
    only, and their small sample is enough unless `min_samples` says otherwise. `own.name` is a metric of the user's;
    its `group` is taken as the audit gave it.

    A threshold is violated only if the whole interval lies beyond it, and held only if the whole interval lies within;
    with `on: point` the measured value alone decides.

    `max_regression` is by how much the metric may be worse than in the baseline that the gate is given, where `op`
    tells which direction is worse; such a rule needs no `threshold`.

    `at` is the audit that the gate judges: the `last`, that of the `best` checkpoint, that of the `checkpoint` the gate
    is given, or `every` one of the trained model. While training runs, each audit is judged as it comes.

    Example:
        >>> Rule.model_validate({"metric": "accuracy", "class": "each", "min": 0.8}).title
        'accuracy each >= 0.8'
    """

    metric: Metric
    name: str | None = None
    region: str | None = None
    class_name: Annotated[str | None, Field(alias="class")] = None
    group: str | None = None
    method: str | None = None
    op: Op | None = None
    threshold: Threshold | None = None
    max_regression: Annotated[float | None, Field(ge=0), BeforeValidator(_number)] = None
    on: Literal["interval", "point"] = "interval"
    at: Literal["last", "best", "every", "checkpoint"] = "last"
    severity: Literal["error", "warn"] = "error"
    min_samples: Annotated[int | None, Field(ge=1), BeforeValidator(_number)] = None

    @model_validator(mode="before")
    @classmethod
    def _written_out(cls, content: object) -> object:
        """`max`, `min` and `forbid` as `op` and `threshold`."""
        if not isinstance(content, Mapping):
            return content
        # As an earlier version recorded a limit that was not set.
        given = [key for key in SHORTHANDS if content.get(key) not in (None, [], ())]
        if not given:
            limit, metric = content.get("threshold"), content.get("metric")
            if isinstance(limit, str) and metric != "verdict" and _kind_of_threshold(limit) != "number":
                raise ValueError(f"`threshold` takes a number, got {reprlib.repr(limit)}")
            return {key: value for key, value in content.items() if key not in SHORTHANDS}
        also = [key for key in ("op", "threshold") if content.get(key) is not None]
        if len(given) + len(also) > 1:
            raise ValueError(f"got {' and '.join((*given, *also))}: a rule has one limit; write two rules for two")
        (key,) = given
        if (key == "forbid") is (_kind_of_threshold(content[key]) == "number"):
            takes = "verdicts" if key == "forbid" else "a number"
            # An alias may stand for more than fits into memory.
            raise ValueError(f"`{key}` takes {takes}, got {reprlib.repr(content[key])}")
        written = {name: value for name, value in content.items() if name not in SHORTHANDS}
        return written | {"op": SHORTHANDS[key], "threshold": content[key]}

    @model_validator(mode="after")
    def _complete(self) -> Rule:
        if self.op is None and self.max_regression is not None:
            raise ValueError('`max_regression` needs `op`: "<=" where more is worse, ">=" where less is worse')
        if self.op is None:
            raise ValueError(
                f"a rule on `{self.metric}` needs `op` and `threshold`, such as "
                + ('`op: "!="`, `threshold: reliance`' if self.metric == "verdict" else '`op: "<="`, `threshold: 0.5`')
            )
        return self._complete_verdict() if self.metric == "verdict" else self._complete_number()

    def _complete_verdict(self) -> Rule:
        if self.op not in ("!=", "==") or not isinstance(self.threshold, tuple) or not self.threshold:
            raise ValueError('a rule on `verdict` takes `op` "!=" or "==" and verdicts as `threshold`')
        if self.op == "==" and Verdict.INCONCLUSIVE in self.threshold:
            raise ValueError("`inconclusive` cannot be asked for: nothing is shown by it")
        if (self.region is None) == (self.group is None):
            raise ValueError("a rule on `verdict` needs either `region` or `group` (an attribute, or `each`)")
        if self.group is not None and "=" in self.group:
            raise ValueError(
                f"a verdict is on an attribute, not on one of its values: write {self.group.split('=')[0]}"
            )
        if self.class_name or self.method:
            raise ValueError("a rule on `verdict` takes neither `class` nor `method`: a verdict weighs all of them")
        if self.max_regression is not None or self.on == "point" or self.min_samples is not None:
            raise ValueError(
                "a rule on `verdict` takes none of `max_regression`, `on: point` and `min_samples`: it has no number; "
                "verdicts are judged by the policy's `min_samples`"
            )
        return self

    def _complete_number(self) -> Rule:
        if self.op in ("==", "!="):
            raise ValueError(f'`op: "{self.op}"` is for verdicts; a rule on `{self.metric}` takes <, <=, > or >=')
        if isinstance(self.threshold, tuple):
            raise ValueError(f"the `threshold` of `{self.metric}` is a number, got {', '.join(self.threshold)}")
        if self.threshold is None and self.max_regression is None:
            raise ValueError(f"a rule on `{self.metric}` needs `threshold`, or `max_regression` for a baseline")
        for key, limit in (("threshold", self.threshold), ("max_regression", self.max_regression)):
            bounded = self.metric not in UNBOUNDED_METRICS and not self.metric.startswith(OWN)
            if limit is not None and abs(limit) > 1 and bounded:
                raise ValueError(f"`{self.metric}` lies within -1 and 1, got `{key}` {limit:g}: write 0.05 for 5 %")
        if self.method is not None and not (is_of_maps(self.metric) or self.metric in EXPLAINER_METRICS):
            raise ValueError(f"`{self.metric}` is not measured by an explanation method: remove `method`")
        if (self.metric in REGION_METRICS or self.metric.startswith(_OF_REMOVAL)) and self.region is None:
            raise ValueError(
                f"a rule on `{self.metric}` needs `region`: a region's name or a role ({', '.join(ROLES)})"
            )
        if self.metric in REGION_METRICS and self.metric not in BY_GROUP_METRICS and self.group is not None:
            raise ValueError(
                f"`{self.metric}` is not broken down to groups, as {' and '.join(BY_GROUP_METRICS)} are: remove `group`"
            )
        if self.metric in (*GROUP_METRICS, *ASSOCIATION_METRICS) and self.region is not None:
            raise ValueError(f"`{self.metric}` is not measured on a region: remove `region`")
        if self.metric in EXPLAINER_METRICS and (self.region or self.class_name or self.group):
            raise ValueError(
                f"`{self.metric}` is measured on an explanation method: remove `region`, `class` and `group`"
            )
        if self.metric in COMPARING_METRICS and (self.group is None or "=" in self.group):
            raise ValueError(f"a rule on `{self.metric}` needs `group`: the attribute whose values are compared")
        if self.metric == "worst_group_accuracy" and self.class_name is not None:
            raise ValueError("`worst_group_accuracy` is over all classes: remove `class`")
        return self

    @property
    def upper(self) -> float | None:
        """What the metric must not exceed, if that is what the rule asks."""
        return self.threshold if self.op in ("<", "<=") and isinstance(self.threshold, float) else None

    @property
    def lower(self) -> float | None:
        """What the metric must not fall below, if that is what the rule asks."""
        return self.threshold if self.op in (">", ">=") and isinstance(self.threshold, float) else None

    @property
    def forbidden(self) -> tuple[Verdict, ...]:
        """The verdicts that violate the rule, `reliance` where `suspected` does; () for a rule on numbers."""
        if not isinstance(self.threshold, tuple):
            return ()
        if self.op == "!=":
            # What is worse than suspicion is not allowed where suspicion is not.
            worse = (Verdict.RELIANCE,) if Verdict.SUSPECTED in self.threshold else ()
            return tuple(dict.fromkeys((*self.threshold, *worse)))
        return tuple(v for v in Verdict if v not in (*self.threshold, Verdict.INCONCLUSIVE))

    @property
    def limit(self) -> str:
        """What must hold, such as `<= 1.5`, `!= reliance or suspected` or `decrease <= 0.02`."""
        limits = []
        if self.threshold is not None:
            threshold = " or ".join(self.threshold) if isinstance(self.threshold, tuple) else f"{self.threshold:g}"
            limits.append(f"{self.op} {threshold}")
        if self.max_regression is not None:
            limits.append(f"{'increase' if self.op in ('<', '<=') else 'decrease'} <= {self.max_regression:g}")
        return " and ".join(limits)

    @property
    def title(self) -> str:
        """The rule's name, or one made of its parts."""
        if self.name:
            return self.name
        parts = [self.metric, self.region, self.class_name, self.group, self.method, self.limit]
        parts += [f"at {self.at}" if self.at != "last" else "", "(point)" if self.on == "point" else ""]
        return " ".join(part for part in parts if part)


class Tolerance(_Strict):
    """What still counts as unbiased, when findings are judged.

    `enrichment`: a spurious region is looked at if its share of the heatmap, over the share of area, lies above this
    (1 = what area alone gives). `accuracy_gap`: accuracy of the best minus the worst group within a class.
    `randomisation_similarity`: an explanation method is unfit if its maps, by the ranks of their places, correlate by
    more than this with its maps of the same model with random weights (arXiv 1810.03292). At 0.7, the root of one
    half, half of what a map shows is there without anything that the model has learned. `removal_flips`: share of
    decisions that change when a region is removed. `removal_contrast`: the part of the margin that hangs on what a
    region says of an attribute. `swap_gap`: accuracy with the cue that goes with the class minus accuracy, of the same
    images, with another. `association`: Cramér's V of attribute and label in the training data. `region_probe_gain`:
    how much better than chance an attribute can be read from a region's pixels, for the region to show it.
    """

    enrichment: Annotated[float, Field(gt=0), BeforeValidator(_number)] = 1.0
    accuracy_gap: Annotated[float, Field(ge=0, lt=1), BeforeValidator(_number)] = 0.1
    randomisation_similarity: Annotated[float, Field(gt=0, lt=1), BeforeValidator(_number)] = 0.7
    removal_flips: Annotated[float, Field(gt=0, lt=1), BeforeValidator(_number)] = 0.05
    removal_contrast: Annotated[float, Field(gt=0), BeforeValidator(_number)] = 0.1
    swap_gap: Annotated[float, Field(ge=0, lt=1), BeforeValidator(_number)] = 0.1
    association: Annotated[float, Field(ge=0, lt=1), BeforeValidator(_number)] = 0.1
    region_probe_gain: Annotated[float, Field(ge=0, lt=1), BeforeValidator(_number)] = 0.1


_FORBIDDEN: tuple[tuple[Verdict, Literal["error", "warn"]], ...] = (
    (Verdict.RELIANCE, "error"),
    (Verdict.SUSPECTED, "warn"),
)
_DEFAULT_RULES = tuple(
    Rule(metric="verdict", region=region, group=group, op="!=", threshold=(verdict,), severity=severity)
    for verdict, severity in _FORBIDDEN
    for region, group in (("spurious", None), (None, EACH))
)


class Policy(_Strict):
    """What an audit must show: the rules, and the tolerances by which findings are judged.

    Without rules of its own a policy forbids the verdict `reliance` on every spurious region and every attribute, and
    warns of `suspected`.

    Example:
        >>> rule = {"metric": "enrichment", "region": "hair", "op": "<=", "threshold": 1.5}
        >>> Policy.model_validate({"rules": [rule]}).rules[0].title
        'enrichment hair <= 1.5'
    """

    rules: Annotated[tuple[Rule, ...], Field(min_length=1)] = _DEFAULT_RULES
    tolerance: Tolerance = Tolerance()
    min_samples: Annotated[int, Field(ge=1), BeforeValidator(_number)] = 20

    @model_validator(mode="after")
    def _distinct(self) -> Policy:
        titles = [rule.title for rule in self.rules]
        twice = next((title for title in titles if titles.count(title) > 1), None)
        if twice is not None:
            raise ValueError(f"two rules are called {twice!r}: give one of them another `name`, or remove it")
        return self

    def check_names(self, subjects: Subjects, methods: Sequence[str] | None = None) -> None:
        """Raise if a rule names a region, class, attribute or method that the audit does not have.

        Args:
            subjects: of the audit set.
            methods: the explanation methods of the audit, where they are known.

        Raises:
            ValueError: says which rule, which name, and which names there are.
        """
        for rule in self.rules:
            wrong = wrong_name(rule, subjects, methods)
            if wrong:
                raise ValueError(f"policy rule {rule.title!r}: {wrong}")


def wrong_name(rule: Rule, subjects: Subjects, methods: Sequence[str] | None = None) -> str:
    """What a rule names that the audit does not have, and which names there are; "" if all is well.

    Example:
        >>> rule = Rule.model_validate({"metric": "accuracy", "class": "nurze", "min": 0.8})
        >>> wrong_name(rule, Subjects((), (), ("doctor", "nurse")))
        "unknown class 'nurze'; the audit set has doctor, nurse"
    """
    regions = {name for name, _ in subjects.regions} | {REMAINDER}
    attributes = dict(subjects.attributes)
    if rule.region is not None and rule.region not in regions and rule.region not in ROLES:
        return f"unknown region {rule.region!r}; the audit set has {_list(regions)}, the roles are {', '.join(ROLES)}"
    role = dict(subjects.regions).get(rule.region or "", rule.region)
    if rule.metric == "verdict" and role not in (None, "spurious"):
        return f"region {rule.region!r}: verdicts are on spurious regions and on attributes"
    if rule.class_name not in (None, EACH, *subjects.classes):
        return f"unknown class {rule.class_name!r}; the audit set has {_list(subjects.classes)}"
    if methods is not None and rule.method not in (None, *methods):
        return f"unknown method {rule.method!r}; the audit uses {_list(methods)}"
    if rule.group is not None and not (rule.group == EACH and rule.metric == "verdict"):
        attribute, _, value = rule.group.partition("=")
        if attribute not in attributes:
            return (
                f"unknown attribute {attribute!r}; the audit set has {_list(attributes)}: correct `group`, or give the "
                "attribute to the audit set"
            )
        if value and value not in attributes[attribute]:
            return f"attribute {attribute!r} has no value {value!r}; it has {_list(attributes[attribute])}"
    return ""


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
