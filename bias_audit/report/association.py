"""Whether labels and attributes go together in the data, as a heat table.

Enters: a `Run`. Leaves: for each attribute a `HeatTable` of the training data and one of the audited images: of each
class and value the normalised pointwise mutual information with its interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bias_audit.records.runs import Run
from bias_audit.report.numbers import interval, signed
from bias_audit.terms import Estimate

# A table that a reader can take in; classes and values that lean most are kept, the rest is counted.
MOST_TABLES, MOST_CLASSES, MOST_VALUES = 6, 12, 8
# The strongest background, in percent of the hue: text on it stays legible in either theme.
_STRONGEST = 50


@dataclass(frozen=True)
class HeatCell:
    """One class and value: what is written, and the background, `weight` percent of the hue of `side`."""

    value: str
    interval: str
    note: str
    side: str
    weight: int


@dataclass(frozen=True)
class HeatTable:
    """Classes x values of one attribute in one set of data; `rows` are the class names with their cells."""

    title: str
    captions: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[HeatCell, ...]], ...]


def association_tables(run: Run) -> tuple[HeatTable, ...]:
    """Of the last audit, attribute by attribute: the training data first, then the audited images.

    Raises:
        RecordError: the sample sheet cannot be read.

    Example:
        >>> from bias_audit.records.runs import read_run
        >>> association_tables(read_run("runs/today"))[0].title  # doctest: +SKIP
        'gender in the training data'
    """
    if not run.audits:
        return ()
    estimates = [e for e in run.audits[-1].estimates if e.metric in _METRICS]
    if not estimates:
        return ()
    found = []
    for attribute, values in run.manifest.subjects.attributes:
        for prefix, whose in (("", "the training data"), ("audit_", "the audited images")):
            mine = [e for e in estimates if (e.group or "").partition("=")[0] == attribute]
            v = next((e for e in mine if e.metric == f"{prefix}cramers_v"), None)
            if v is None:
                continue
            npmi = {(e.class_name, e.group): e for e in mine if e.metric == f"{prefix}npmi"}
            amplified = None if prefix else next((e for e in mine if e.metric == "bias_amplification"), None)
            counts = _counts(run) if prefix else {}
            table = _table(run, attribute, values, npmi, counts)
            captions = (_strength(v), *_amplification(amplified), *_left_out(run, values, table))
            found.append(HeatTable(f"{attribute} in {whose}", captions, *table))
    return tuple(found[:MOST_TABLES])


_METRICS = ("cramers_v", "audit_cramers_v", "npmi", "audit_npmi", "bias_amplification")
_Table = tuple[tuple[str, ...], tuple[tuple[str, tuple[HeatCell, ...]], ...]]


def _table(
    run: Run,
    attribute: str,
    values: Sequence[str],
    npmi: dict[tuple[str | None, str | None], Estimate],
    counts: dict[tuple[str, str], int],
) -> _Table:
    if not npmi:
        return (), ()
    classes = run.manifest.subjects.classes
    lean = {
        (c, v): abs(e.value) if e is not None and e.value is not None else 0.0
        for c in classes
        for v in values
        for e in [npmi.get((c, f"{attribute}={v}"))]
    }
    kept_values = _most(values, {v: max(lean[c, v] for c in classes) for v in values}, MOST_VALUES)
    kept = _most(classes, {c: max(lean[c, v] for v in values) for c in classes}, MOST_CLASSES)
    rows = tuple(
        (c, tuple(_cell(npmi.get((c, f"{attribute}={v}")), counts.get((c, f"{attribute}={v}"))) for v in kept_values))
        for c in kept
    )
    return tuple(kept_values), rows


def _most(names: Sequence[str], weight: dict[str, float], most: int) -> list[str]:
    """Of many names those with the largest weight, in their own order."""
    kept = set(sorted(names, key=lambda name: -weight[name])[:most])
    return [name for name in names if name in kept]


def _cell(e: Estimate | None, count: int | None) -> HeatCell:
    note = "" if count is None else f"{count} image{'' if count == 1 else 's'}"
    if e is None or not e.measured or e.value is None:
        return HeatCell("unknown", "", (e.reason if e is not None else "") or note, "unknown", 0)
    side = "together" if e.value > 0 else "apart"
    value, _, ends = signed(e).partition(" ")
    return HeatCell(value, ends, note, side, round(_STRONGEST * min(1.0, abs(e.value))))


def _counts(run: Run) -> dict[tuple[str, str], int]:
    """How many audited images there are of each class and `attribute=value`."""
    table, subjects = run.sample_table(), run.manifest.subjects
    return {
        (name, f"{attribute}={value}"): int(
            np.count_nonzero((table.labels == c) & (table.attributes[:, column] == value))
        )
        for column, (attribute, values) in enumerate(subjects.attributes)
        for value in values
        for c, name in enumerate(subjects.classes)
    }


def _strength(v: Estimate) -> str:
    if not v.measured:
        return f"Cramér’s V is unknown: {v.reason or 'it was not measured'}."
    return f"Cramér’s V {interval(v, 2)}, n = {v.n:,} (0: independent, 1: one tells the other)."


def _amplification(e: Estimate | None) -> list[str]:
    if e is None or not e.measured:
        return []
    return [f"The predictions lean further than the labels by {signed(e)} (bias amplification)."]


def _left_out(run: Run, values: Sequence[str], table: _Table) -> list[str]:
    columns, rows = table
    classes = len(run.manifest.subjects.classes)
    said = [f"{len(rows)} of {classes} classes"] if 0 < len(rows) < classes else []
    said += [f"{len(columns)} of {len(values)} values"] if 0 < len(columns) < len(values) else []
    return [f"{' and '.join(said)}, those that lean most."] if said else []
