"""The names under which Weights & Biases shows an audit.

Enters: the callback's name, the `Subjects`, and the estimates of an audit. Leaves: keys of the form `section/item`.

W&B makes a panel section of what stands before a slash, before the first or the last one as the workspace is set; a key
with one slash lies in the same section either way. Sections are numbered because W&B sorts them by name. W&B can sort
and filter by names of letters, digits and underscores only, so names from the data are reduced to these, and told apart
where that makes two of them alike.

Neither wandb nor torch is imported here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from bias_audit.terms import COMPARING_METRICS, OWN, REMAINDER, Estimate, Subjects

# The key by which Lightning's WandbLogger orders what it logs; W&B's own step is left to it.
STEP = "trainer/global_step"
LONGEST = 48
# More lines than these nobody reads in a section; the rest is in the records and in the table of all scalars.
MOST_SERIES = 60
MOST_CLASSES = 20

Question = Literal["where", "rely", "whom"]
_WHERE = ("energy_share", "enrichment")
_RELY = (
    "removal_flips",
    "control_flips",
    "removal_effect",
    "control_effect",
    "removal_contrast",
    "swap_gap",
    "swap_flips",
    "swap_follows",
)
_WHOM = (
    "accuracy",
    "worst_group_accuracy",
    "accuracy_gap",
    "alignment_gap",
    "equalized_odds_difference",
)


@dataclass(frozen=True)
class Series:
    """One line over the audits: its keys, and the estimate that gives its value and interval."""

    question: Question
    key: str
    low: str
    high: str
    estimate: Estimate


class Keys:
    """The keys of one callback's results.

    Example:
        >>> keys = Keys("bias_audit", Subjects((("left hand", "spurious"), ("left-hand", "context")), (), ()))
        >>> keys.panel, keys.region("left hand"), keys.region("left-hand")
        ('bias_audit_5_pictures/panel', 'left_hand', 'left_hand_2')
    """

    def __init__(self, name: str, subjects: Subjects) -> None:
        self.word = word = _plain(name)
        self._regions = _words([*(region for region, _ in subjects.regions), REMAINDER])
        self._classes = _words(subjects.classes)
        self._attributes = _words([attribute for attribute, _ in subjects.attributes])
        self._values = _words([f"{attribute}={value}" for attribute, values in subjects.attributes for value in values])
        self.where, self.rely = f"{word}_2_where_it_looks", f"{word}_3_does_it_rely"
        self.whom, self.pictures = f"{word}_4_for_whom", f"{word}_5_pictures"
        self._verdicts, self._intervals = f"{word}_1_verdict", f"{word}_7_intervals"
        self.violations = f"{self._verdicts}/violated_rules"
        self.findings = f"{self._verdicts}/findings"
        self.page = f"{self._verdicts}/page"
        self.shares = f"{self.where}/share_of_heat_by_region"
        self.panel, self.worst = f"{self.pictures}/panel", f"{self.pictures}/worst"
        self.samples = f"{word}_6_samples/samples"

    def region(self, name: str) -> str:
        """The word for a region."""
        return self._regions[name]

    def verdict(self, kind: str, name: str) -> str:
        """The key of how grave a verdict is; a region and an attribute may have the same name."""
        return f"{self._verdicts}/verdict_{self.subject(kind, name)}"

    def subject(self, kind: str, name: str) -> str:
        """The word for what a finding is about."""
        if kind == "region":
            return self._regions[name]
        word = self._attributes[name]
        return f"{word}_attribute" if word in self._regions.values() else word

    def confusion(self, attribute: str = "", value: str = "") -> str:
        """The key of the confusion matrix over all images, or over those of one group."""
        return f"{self.whom}/confusion_{self._values[f'{attribute}={value}'] if attribute else 'all'}"

    def series(self, estimates: Iterable[Estimate], first_method: str) -> tuple[Series, ...]:
        """The lines that a person looks at, in the order of the estimates, at most MOST_SERIES a question.

        Those of single classes only with few classes; region metrics by another method than `first_method` say which.
        """
        found: list[Series] = []
        for e in estimates:
            question = self._question(e)
            if question is None or sum(s.question == question for s in found) >= MOST_SERIES:
                continue
            section = {"where": self.where, "rely": self.rely, "whom": self.whom}[question]
            item = self._item(e, first_method)
            low, high = (f"{self._intervals}/{item}_{end}" for end in ("low", "high"))
            found.append(Series(question, f"{section}/{item}", low, high, e))
        return tuple(found)

    def _question(self, e: Estimate) -> Question | None:
        one_group = e.group is not None and e.metric not in COMPARING_METRICS
        own = e.metric.startswith(OWN)
        if (own or e.metric in _WHERE) and e.region is not None and e.class_name is None and e.group is None:
            return "where"
        if e.metric in _RELY and e.class_name is None and not one_group:
            return "rely"
        few = e.class_name is None or len(self._classes) <= MOST_CLASSES
        if (own or e.metric in _WHOM) and e.region is None and few and not (one_group and e.class_name is not None):
            return "whom"
        return None

    def _item(self, e: Estimate, first_method: str) -> str:
        parts = [_plain(e.metric)]
        if e.region is not None:
            parts.append(self._regions.get(e.region, _plain(e.region)))
        if e.class_name is not None:
            parts.append(f"class_{self._classes.get(e.class_name, _plain(e.class_name))}")
        if e.group is not None:
            parts.append(self._attributes.get(e.group) or self._values.get(e.group) or _plain(e.group))
        if e.method is not None and e.method != first_method:
            parts.append(f"by_{_plain(e.method)}")
        return "_".join(parts)


def _plain(text: str) -> str:
    # Letters of any alphabet stay: a name that one cannot read is worse than one that cannot be sorted by.
    return re.sub(r"\W+", "_", text).strip("_")[:LONGEST] or "unnamed"


def _words(names: Sequence[str]) -> dict[str, str]:
    """A word for each name, no two alike."""
    words: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        word, count = _plain(name), 1
        while (numbered := word if count == 1 else f"{word}_{count}") in taken:
            count += 1
        words[name] = numbered
        taken.add(numbered)
    return words
