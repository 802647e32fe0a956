"""bias-audit in a training: the callback, and the places its results go. Only here are Lightning and W&B imported.

The names below are loaded when they are first used: the processes beside the training do without Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bias_audit.callbacks.background import Background
    from bias_audit.callbacks.lightning import BiasAuditCallback, BiasViolation
    from bias_audit.callbacks.page import ReportSink
    from bias_audit.callbacks.sinks import RunDirectorySink, Session, Sink
    from bias_audit.callbacks.wandb_aside import WandbSink

_HOMES = {
    "Background": "bias_audit.callbacks.background",
    "BiasAuditCallback": "bias_audit.callbacks.lightning",
    "BiasViolation": "bias_audit.callbacks.lightning",
    "ReportSink": "bias_audit.callbacks.page",
    "RunDirectorySink": "bias_audit.callbacks.sinks",
    "Session": "bias_audit.callbacks.sinks",
    "Sink": "bias_audit.callbacks.sinks",
    "WandbSink": "bias_audit.callbacks.wandb_aside",
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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
