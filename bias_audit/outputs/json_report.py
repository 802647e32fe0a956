"""The gate's result for programs: JSON of a fixed form.

Enters: a `GateResult`. Leaves: JSON, and its JSON Schema; both follow from the models below.

A key is never removed or given another meaning without a new `schema_version`; keys may be added.
"""

from __future__ import annotations

import json
import math
from importlib.metadata import version
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from bias_audit.gate.result import GateResult
from bias_audit.gate.rows import Row, advice, rows
from bias_audit.terms import Outcome, Verdict
from bias_audit.verdicts.findings import Finding

SCHEMA_VERSION: Literal[1] = 1


class _Report(BaseModel):
    model_config = ConfigDict(frozen=True, populate_by_name=True, allow_inf_nan=False)


class ReportedCheck(_Report):
    """One rule applied to one number or verdict of one audit."""

    rule: Annotated[str, Field(description="The rule's name, or one made of its parts.")]
    subject: Annotated[str, Field(description="What it was applied to.")]
    outcome: Outcome
    severity: Literal["error", "warn"]
    counts: Annotated[bool, Field(description="Whether the gate's outcome hangs on this check.")]
    reason: Annotated[str, Field(description="Why it came out so.")]
    metric: str
    region: str | None
    class_name: Annotated[str | None, Field(alias="class")]
    group: Annotated[str | None, Field(description="`attribute=value`, or an attribute whose values are compared.")]
    method: Annotated[str | None, Field(description="The explanation method.")]
    value: Annotated[float | None, Field(description="What was measured; null where nothing was, and for a verdict.")]
    low: Annotated[float | None, Field(description="Lower bound of the 95 % interval.")]
    high: Annotated[float | None, Field(description="Upper bound of the 95 % interval.")]
    n: Annotated[int | None, Field(ge=0, description="Images behind the number; null for a verdict.")]
    age: Annotated[int | None, Field(ge=0, description="How many audits ago it was measured.")]
    verdict: Annotated[Verdict | None, Field(description="For a rule on a verdict: which it is.")]
    baseline: Annotated[float | None, Field(description="For a rule with `max_regression`: the baseline's value.")]
    worse_by: Annotated[float | None, Field(description="By how much the value is worse than the baseline's.")]
    worse_by_low: Annotated[float | None, Field(description="Lower bound of its 95 % interval.")]
    worse_by_high: Annotated[float | None, Field(description="Upper bound of its 95 % interval.")]
    limit: Annotated[str, Field(description="What must hold, such as `<= 1.5`.")]
    threshold: Annotated[float | None, Field(description="The number that `value`, or `worse_by`, was compared with.")]
    step: Annotated[int | None, Field(description="The training step of the audit.")]
    since_step: Annotated[int | None, Field(description="From which step on it has been violated without a break.")]
    worst_images: Annotated[tuple[str, ...], Field(description="Ids of the images that weigh most in it.")]
    policy_line: Annotated[int | None, Field(ge=1, description="Where the rule is in the policy's file.")]


class ReportedFinding(_Report):
    """What the last audit says of one region or attribute."""

    kind: Literal["region", "attribute"]
    name: str
    verdict: Verdict
    sentence: str
    samples_to_settle: Annotated[int | None, Field(description="About how many images would settle it.")]


class GateReport(_Report):
    """What `bias-audit gate --format json` writes."""

    schema_version: Literal[1] = SCHEMA_VERSION
    tool: str
    source: Annotated[str, Field(description="What was judged.")]
    run_id: str | None
    outcome: Annotated[Outcome, Field(description="Of all checks that count.")]
    exit_code: Annotated[int, Field(ge=0, le=3, description="0 passed, 1 violated, 3 inconclusive.")]
    fail_on: Literal["error", "warn"]
    on_inconclusive: Literal["fail", "warn", "pass"]
    exit_zero: bool
    advice: Annotated[str, Field(description="What to do about it; empty where all is well.")]
    policy_path: Annotated[str | None, Field(description="Null for a policy that is no file, such as the run's own.")]
    step: Annotated[int | None, Field(description="The training step of the last audit; null without one.")]
    epoch: int | None
    weights: str | None
    audited: Annotated[str | None, Field(description="When the last audit was made, ISO 8601.")]
    doubts: Annotated[tuple[str, ...], Field(description="Why the evidence may not be whole.")]
    caveats: Annotated[tuple[str, ...], Field(description="Which regions some images lack, or have as boxes.")]
    findings: tuple[ReportedFinding, ...]
    checks: Annotated[tuple[ReportedCheck, ...], Field(description="Violated ones first.")]


def render_json(result: GateResult) -> str:
    """The result as JSON, in ASCII."""
    content = report(result).model_dump(mode="json", by_alias=True)
    text = json.dumps(content, indent=2, allow_nan=False)
    # What is printed in a CI job is read for commands: these begin with ##[ wherever they stand.
    return text.replace("##[", "#\\u0023[") + "\n"


def report(result: GateResult) -> GateReport:
    """The result as its model.

    Example:
        >>> report(run_gate(read_run("runs/today"))).exit_code  # doctest: +SKIP
        1
    """
    audit, findings = result.audit, result.judgement.findings if result.judgement is not None else ()
    return GateReport(
        tool=f"bias-audit {version('bias-audit')}",
        source=result.source,
        run_id=result.run_id,
        outcome=result.outcome,
        exit_code=result.exit_code,
        fail_on=result.fail_on,
        on_inconclusive=result.on_inconclusive,
        exit_zero=result.exit_zero,
        advice=advice(result),
        policy_path=None if result.policy.path is None else str(result.policy.path),
        step=None if audit is None else audit.step,
        epoch=None if audit is None else audit.epoch,
        weights=None if audit is None else audit.weights,
        audited=None if audit is None else audit.created,
        doubts=result.doubts,
        caveats=result.caveats,
        findings=tuple(_finding(finding) for finding in findings),
        checks=tuple(_check(row) for row in rows(result)),
    )


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of what `render_json` writes."""
    named = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return named | GateReport.model_json_schema(mode="serialization", by_alias=True)


def schema_text() -> str:
    """The schema as the text of `schemas/gate.schema.json`."""
    return json.dumps(schema(), indent=2) + "\n"


def _check(row: Row) -> ReportedCheck:
    check, change = row.check, row.change
    # Of a verdict the estimate is that of its evidence which says most, about some class or group.
    e = check.estimate if row.finding is None else None
    region, group = (None, None) if e is None else (e.region, e.group)
    if row.finding is not None:
        region, group = (row.finding.name, None) if row.finding.kind == "region" else (None, row.finding.name)
    return ReportedCheck(
        rule=check.rule,
        subject=check.subject,
        outcome=check.outcome,
        severity=check.severity,
        counts=row.counts,
        reason=row.reason,
        metric=row.metric,
        region=region,
        class_name=None if e is None else e.class_name,
        group=group,
        method=None if e is None else e.method,
        value=None if e is None else _finite(e.value),
        low=None if e is None else _finite(e.low),
        high=None if e is None else _finite(e.high),
        n=None if e is None else e.n,
        age=None if e is None else e.age,
        verdict=row.verdict,
        baseline=None if row.baseline is None else _finite(row.baseline.value),
        worse_by=None if change is None else _finite(change.value),
        worse_by_low=None if change is None else _finite(change.low),
        worse_by_high=None if change is None else _finite(change.high),
        limit=row.limit,
        threshold=check.limit,
        step=check.step,
        since_step=row.since,
        worst_images=row.worst,
        policy_line=row.line,
    )


def _finding(finding: Finding) -> ReportedFinding:
    return ReportedFinding(
        kind=finding.kind,
        name=finding.name,
        verdict=finding.verdict,
        sentence=finding.sentence,
        samples_to_settle=finding.samples_to_settle,
    )


def _finite(number: float | None) -> float | None:
    # JSON has no NaN.
    return number if number is not None and math.isfinite(number) else None
