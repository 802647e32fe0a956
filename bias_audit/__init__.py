"""bias-audit: whether a vision model looks at the right thing for the right reason, watched while it trains.

The names below are loaded when they are first used, so that `bias-audit gate` starts without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bias_audit.attribution.explain import Heatmaps, explain
    from bias_audit.attribution.penalty import attention_penalty
    from bias_audit.audit import Auditor, audit_model
    from bias_audit.data.metadata import Metadata
    from bias_audit.data.samples import AuditBatch, AuditDataset, AuditSample
    from bias_audit.findings import Finding
    from bias_audit.gate.gate import GateResult, run_gate
    from bias_audit.plan import AuditPlan
    from bias_audit.policies.policy import Policy, Rule
    from bias_audit.rebalancing import rebalancing_plan
    from bias_audit.records.results import AuditResult
    from bias_audit.records.runs import Run, read_run
    from bias_audit.report import write_report
    from bias_audit.terms import Estimate, Verdict

_HOMES = {
    "AuditBatch": "bias_audit.data.samples",
    "AuditDataset": "bias_audit.data.samples",
    "AuditPlan": "bias_audit.plan",
    "AuditResult": "bias_audit.records.results",
    "AuditSample": "bias_audit.data.samples",
    "Auditor": "bias_audit.audit",
    "Estimate": "bias_audit.terms",
    "Finding": "bias_audit.findings",
    "GateResult": "bias_audit.gate.gate",
    "Heatmaps": "bias_audit.attribution.explain",
    "Metadata": "bias_audit.data.metadata",
    "Policy": "bias_audit.policies.policy",
    "Rule": "bias_audit.policies.policy",
    "Run": "bias_audit.records.runs",
    "Verdict": "bias_audit.terms",
    "attention_penalty": "bias_audit.attribution.penalty",
    "audit_model": "bias_audit.audit",
    "explain": "bias_audit.attribution.explain",
    "read_run": "bias_audit.records.runs",
    "rebalancing_plan": "bias_audit.rebalancing",
    "run_gate": "bias_audit.gate.gate",
    "write_report": "bias_audit.report",
}

__all__ = [
    "AuditBatch",
    "AuditDataset",
    "AuditPlan",
    "AuditResult",
    "AuditSample",
    "Auditor",
    "Estimate",
    "Finding",
    "GateResult",
    "Heatmaps",
    "Metadata",
    "Policy",
    "Rule",
    "Run",
    "Verdict",
    "attention_penalty",
    "audit_model",
    "explain",
    "read_run",
    "rebalancing_plan",
    "run_gate",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
