"""What checks of regions say: how each came out, its sentence, its numbers and the images that it names.

Enters: what the functions in `check` found. Leaves: a `RegionReport`, which the terminal and the page print.

A check is `violated` where something must be mended before an audit means what it says, `inconclusive` where there are
too few images to tell, `held`, or `skipped` with the reason. A `warning` is for a person to judge and decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from bias_audit.regions.survey import Survey

# More than half of the smaller region claimed by both: what is looked at there is looked at in both.
MOST_OVERLAP = 0.5


class State(StrEnum):
    """How a check came out, the worst first."""

    VIOLATED = "violated"
    INCONCLUSIVE = "inconclusive"
    WARNING = "warning"
    HELD = "held"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Limits:
    """What is asked: images for each cell of label x attribute and for each region, and how far regions may overlap."""

    min_samples: int = 20
    most_overlap: float = MOST_OVERLAP


@dataclass(frozen=True)
class Flag:
    """An image that a check names, by its place in the set: what is said of it, and the region or "" for the image."""

    index: int
    region: str
    said: str


@dataclass(frozen=True)
class Table:
    """The numbers behind a check: the last `numbers` columns are numbers."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: int


@dataclass(frozen=True)
class Found:
    """What a check found: a sentence, its numbers, and the images it names, the worst first."""

    state: State
    said: str
    table: Table | None = None
    flags: tuple[Flag, ...] = ()


@dataclass(frozen=True)
class Check:
    """What is looked for: a name that stays, a title, and the function that looks."""

    code: str
    title: str
    look: Callable[[Survey, Limits], Found]


@dataclass(frozen=True)
class Result:
    """A check and what it found."""

    check: Check
    found: Found


@dataclass(frozen=True)
class RegionReport:
    """What all checks found, in their order."""

    survey: Survey
    limits: Limits
    results: tuple[Result, ...]

    @property
    def state(self) -> State:
        """`violated` if any check is, else `inconclusive` if any is, else `held`: warnings decide nothing."""
        found = {result.found.state for result in self.results}
        return next((state for state in (State.VIOLATED, State.INCONCLUSIVE) if state in found), State.HELD)

    @property
    def exit_code(self) -> int:
        """0 held, 1 violated, 3 inconclusive."""
        return {State.VIOLATED: 1, State.INCONCLUSIVE: 3}.get(self.state, 0)

    @property
    def worst_first(self) -> tuple[Result, ...]:
        """The results, those first that must be mended."""
        order = list(State)
        return tuple(sorted(self.results, key=lambda result: order.index(result.found.state)))

    @property
    def headline(self) -> str:
        """What came of it in a sentence."""
        states = [result.found.state for result in self.results]
        if self.state is State.HELD:
            ran, warned = sum(state is not State.SKIPPED for state in states), states.count(State.WARNING)
            more = f", {warned} of them with a warning" if warned else ""
            return f"Nothing must be mended: {ran} of {len(states)} checks had something to look at{more}."
        first, count = self.worst_first[0], states.count(self.state)
        more = f" (and {count - 1} more)" if count > 1 else ""
        return f"{first.check.code}{more}: {first.found.said}"
