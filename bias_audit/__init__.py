"""bias-audit: whether a vision model looks at the right thing for the right reason, watched while it trains.

The names below are loaded when they are first used, so that `bias-audit gate` starts without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bias_audit.lazily import loaded_lazily

if TYPE_CHECKING:
    from bias_audit.attribution.explain import Heatmaps, explain
    from bias_audit.attribution.penalty import attention_penalty
    from bias_audit.audit import Auditor, audit_model
    from bias_audit.data.dataset import AuditDataset
    from bias_audit.data.metadata import Metadata
    from bias_audit.data.samples import AuditBatch, AuditSample
    from bias_audit.gate.gate import run_gate
    from bias_audit.gate.result import GateResult
    from bias_audit.plan import AuditPlan
    from bias_audit.policies.policy import Policy, Rule
    from bias_audit.rebalancing import rebalancing_plan
    from bias_audit.records.results import AuditResult
    from bias_audit.records.runs import Run, read_run
    from bias_audit.report.page import write_report
    from bias_audit.terms import Estimate, Verdict
    from bias_audit.verdicts.findings import Finding

_HOMES = {
    "AuditBatch": "bias_audit.data.samples",
    "AuditDataset": "bias_audit.data.dataset",
    "AuditPlan": "bias_audit.plan",
    "AuditResult": "bias_audit.records.results",
    "AuditSample": "bias_audit.data.samples",
    "Auditor": "bias_audit.audit",
    "Estimate": "bias_audit.terms",
    "Finding": "bias_audit.verdicts.findings",
    "GateResult": "bias_audit.gate.result",
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
    "write_report": "bias_audit.report.page",
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

if not TYPE_CHECKING:
    # A type checker that saw these would take any name for one of the package's.
    __getattr__, __dir__ = loaded_lazily(__name__, _HOMES)
