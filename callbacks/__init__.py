"""bias-audit in a training: the callback, and the places its results go.

Only here is W&B imported, and only here and in the demo Lightning.

The names below are loaded when they are first used: the processes beside the training do without Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bias_audit.lazily import loaded_lazily

if TYPE_CHECKING:
    from bias_audit.callbacks.background import Background
    from bias_audit.callbacks.lightning import BiasAuditCallback, BiasViolation
    from bias_audit.callbacks.page import ReportSink
    from bias_audit.callbacks.sinks import RunDirectorySink, Session, Sink
    from bias_audit.callbacks.wandb.sink import WandbSink

_HOMES = {
    "Background": "bias_audit.callbacks.background",
    "BiasAuditCallback": "bias_audit.callbacks.lightning",
    "BiasViolation": "bias_audit.callbacks.lightning",
    "ReportSink": "bias_audit.callbacks.page",
    "RunDirectorySink": "bias_audit.callbacks.sinks",
    "Session": "bias_audit.callbacks.sinks",
    "Sink": "bias_audit.callbacks.sinks",
    "WandbSink": "bias_audit.callbacks.wandb.sink",
}

__all__ = [
    "Background",
    "BiasAuditCallback",
    "BiasViolation",
    "ReportSink",
    "RunDirectorySink",
    "Session",
    "Sink",
    "WandbSink",
]

if not TYPE_CHECKING:
    # A type checker that saw these would take any name for one of the package's.
    __getattr__, __dir__ = loaded_lazily(__name__, _HOMES)
