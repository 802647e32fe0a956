"""Trainings that have no page drawn."""

from __future__ import annotations

from typing import Any
from unittest import mock

from bias_audit.callbacks.page import ReportSink


class NoPage:
    """In the page's place: drawing it takes two seconds of another process at the end of each training."""

    def start(self, session: Any) -> None:
        """Nothing."""

    def write(self, result: Any) -> None:
        """Nothing."""

    def fail(self, step: int, reason: str) -> None:
        """Nothing."""

    def end(self, error: str = "") -> None:
        """Nothing."""


def drawing(page: bool) -> Any:
    """A context in which trainings have their page drawn, or not."""
    return mock.patch("bias_audit.callbacks.loggers.ReportSink", ReportSink if page else NoPage)
