"""bias-audit in a training: the callback, and the places its results go. Only here are Lightning and W&B imported."""

from bias_audit.callbacks.background import Background
from bias_audit.callbacks.lightning import BiasAuditCallback, BiasViolation
from bias_audit.callbacks.page import ReportSink
from bias_audit.callbacks.sinks import RunDirectorySink, Session, Sink
from bias_audit.callbacks.wandb import WandbSink

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
