"""An audit as the numbers that loggers and monitors get, and as one line.

Enters: an `AuditResult`. Leaves: scalars by name, or words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bias_audit.callbacks.sinks import Session
from bias_audit.headlines import is_headline
from bias_audit.records.results import AuditResult, AuditSummary
from bias_audit.terms import Estimate, Verdict

MOST_CLASSES = 20


class LoggerSink:
    """The scalars in one of the Trainer's loggers; `name` is the logger's class."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self.name = type(logger).__name__

    def start(self, session: Session) -> None:
        """Remember the metrics' prefix."""
        self._prefix = session.name

    def write(self, result: AuditResult) -> None:
        """Log the scalars at the audit's step."""
        self._logger.log_metrics(scalars(result, self._prefix), step=result.step)

    def fail(self, step: int, reason: str) -> None:
        """Nothing: there is no number to log."""

    def end(self, error: str = "") -> None:
        """Nothing: the logger is the Trainer's."""


def scalars(result: AuditResult, name: str) -> dict[str, float]:
    """The numbers that loggers and monitors get: `name/metric/region or attribute[/class or value][/method]`.

    Grad-CAM's need no method in their name. NaN where a number could not be measured: a monitor that waits for a name
    must find it. With more than MOST_CLASSES classes, those of single classes are in the records only.
    """
    found: dict[str, float] = {}
    by_class = len({e.class_name for e in result.estimates}) <= MOST_CLASSES + 1
    for e in result.estimates:
        if e.class_name is not None and not by_class:
            continue
        if e.region is not None and e.group is not None:
            continue
        if e.region is not None and e.class_name is not None and e.metric not in ("energy_share", "enrichment"):
            continue
        found[_key(e, name)] = float("nan") if e.value is None else e.value
    found[f"{name}/violations"] = float(len(result.judgement.violations))
    return found


def monitored(result: AuditResult, name: str, asked: Sequence[str]) -> dict[str, float]:
    """Of `scalars` those that monitors get: headlines, regions' shares, and whatever one of the texts `asked` names.

    Lightning takes a third of a millisecond for each, and there are hundreds.
    """
    kept = {f"{name}/violations"}
    for e in result.estimates:
        if is_headline(e) or (e.metric == "energy_share" and e.class_name is None and e.group is None):
            kept.add(_key(e, name))
    every = scalars(result, name)
    return {key: value for key, value in every.items() if key in kept or any(key in text for text in asked)}


def _key(e: Estimate, name: str) -> str:
    parts = [name, e.metric, e.region, e.class_name, e.group, e.method if e.method != "gradcam" else None]
    return "/".join(part for part in parts if part)


def in_words(result: AuditSummary) -> str:
    """How things stand, on one line: the outcome, and what reliance was found or suspected on.

    Example:
        >>> in_words(result)  # doctest: +SKIP
        'step 400: violated; reliance on hair; suspected on face, gender'
    """
    if result.trigger == "reference":
        return f"step {result.step}: before training, nothing follows"
    parts = [str(result.judgement.outcome)]
    for verdict in (Verdict.RELIANCE, Verdict.SUSPECTED):
        names = [_short(f.name) for f in result.judgement.findings if f.verdict is verdict]
        if names:
            parts.append(f"{verdict} on {', '.join(names)}")
    return f"step {result.step}: {'; '.join(parts)}"


def _short(name: str) -> str:
    return name if len(name) <= 40 else f"{name[:37]}..."
