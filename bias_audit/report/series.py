"""What a chart draws and how its parts are told apart, by hue, dash and shape at once.

Enters: estimates of a run's audits. Leaves: `Series` of `Reading`s, `Line`s and `Event`s, and the styles of regions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bias_audit.terms import REMAINDER, Estimate, Role, Subjects

METHOD_NAMES = {"gradcam": "Grad-CAM", "hirescam": "HiResCAM"}
_HUES_OF_ROLE: dict[Role, tuple[str, ...]] = {
    "object": ("green", "blue", "sky"),
    "spurious": ("vermillion", "purple", "orange"),
    "context": ("sky", "orange", "blue"),
}
HUES = ("blue", "vermillion", "green", "purple", "orange", "sky")
DASHES = ((1, 0), (6, 3), (2, 2), (8, 3, 2, 3), (4, 2), (1, 3))
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")


@dataclass(frozen=True)
class Style:
    """How a series is told from the others: by hue, dash and point shape at once."""

    hue: str
    dash: tuple[int, ...]
    shape: str


@dataclass(frozen=True)
class Reading:
    """An estimate of the audit at `step`; `measured_at` is the step at which it was measured."""

    step: int
    measured_at: int
    estimate: Estimate

    @property
    def carried(self) -> bool:
        """Whether it is an earlier measurement that still stands."""
        return self.estimate.age > 0


@dataclass(frozen=True)
class Series:
    """A named line: for each audit its reading, None where the audit has no such estimate."""

    name: str
    style: Style
    readings: tuple[Reading | None, ...]

    @property
    def last(self) -> float | None:
        """The value measured last."""
        return last_value(self.readings)


@dataclass(frozen=True)
class Line:
    """A horizontal reference, such as a limit of the policy."""

    at: float
    label: str


@dataclass(frozen=True)
class Event:
    """A step at which something set in."""

    step: int
    label: str


def thin(count: int, most: int) -> list[int]:
    """At most `most` of the indices `0 .. count - 1`, evenly spaced, the first and the last among them.

    Example:
        >>> thin(7, 4)
        [0, 2, 4, 6]
    """
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def region_styles(subjects: Subjects) -> dict[str, Style]:
    """A style for each region and the remainder: solid for objects, dashed for spurious ones, dotted for the rest."""
    styles: dict[str, Style] = {}
    used: dict[Role, int] = {}
    for name, role in subjects.regions:
        rank = used[role] = used.get(role, -1) + 1
        hues = _HUES_OF_ROLE[role]
        dash = {"object": DASHES[0], "spurious": DASHES[(1, 3, 4)[rank % 3]], "context": DASHES[2]}[role]
        styles[name] = Style(hues[rank % len(hues)], dash, SHAPES[len(styles) % len(SHAPES)])
    styles[REMAINDER] = Style("grey", DASHES[5], "circle")
    return styles


def named(items: Iterable[tuple[str, tuple[Reading | None, ...]]]) -> list[Series]:
    """Series that have no style of their own, each told from the others."""
    return [
        Series(name, Style(HUES[i % len(HUES)], DASHES[i % len(DASHES)], SHAPES[i % len(SHAPES)]), readings)
        for i, (name, readings) in enumerate(items)
    ]


def method_name(method: str) -> str:
    """The explanation method as papers write it."""
    return METHOD_NAMES.get(method, method)


def last_value(readings: Sequence[Reading | None]) -> float | None:
    """The value measured last, None where none was."""
    return next((r.estimate.value for r in reversed(readings) if r is not None and r.estimate.measured), None)
