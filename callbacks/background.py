"""A sink that works while training goes on.

Enters: any `Sink`. Leaves: the same sink, its calls made in order on a thread of its own.
"""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Callable

from bias_audit.callbacks.sinks import Session, Sink, name_of
from bias_audit.records.results import AuditResult

# A network that hangs must not keep a training that is over from ending.
PATIENCE_S = 120.0


class Background:
    """Runs `sink` on a thread of its own, so that the training thread does not wait for it.

    `start` is made on the training thread, which thus learns at once of what cannot work. `end` waits until all is
    done, for two minutes at most. An exception of the sink is raised by the next call.

    The sink must leave alone what the training thread uses meanwhile: the model, and the global random generators.

    Args:
        sink: what is to run in the background.
        most: how many audits may wait; of more the oldest is left out, and `end` says how many were.

    Raises:
        ValueError: `most` is not positive.

    Example:
        >>> from bias_audit.callbacks import ReportSink
        >>> slow = Background(ReportSink(), most=2)  # one of BiasAuditCallback(audit_set, sinks=[...])
        >>> slow.name
        'ReportSink'
    """

    def __init__(self, sink: Sink, *, most: int = 8) -> None:
        if most < 1:
            raise ValueError(f"most must be at least 1, got {most}")
        self.sink, self._most = sink, most
        # Each with whether it may be left out.
        self._waiting: deque[tuple[Callable[[], None], bool]] = deque()
        self._more = threading.Condition()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._given = self._left_out = self._done = 0
        self._ending = False

    @property
    def name(self) -> str:
        """The sink's."""
        return name_of(self.sink)

    def start(self, session: Session) -> None:
        """Start the sink, here and now."""
        self.sink.start(session)

    def write(self, result: AuditResult) -> None:
        """Hand the result over."""
        self._given += 1
        self._put(lambda: self._write(result), may_go=True)

    def fail(self, step: int, reason: str) -> None:
        """Hand the failure over."""
        self._put(lambda: self.sink.fail(step, reason))

    def end(self, error: str = "") -> None:
        """Wait for what is under way, and end the sink."""
        self._put(lambda: self.sink.end(error), last=True)
        assert self._thread is not None
        self._thread.join(PATIENCE_S)
        if self._thread.is_alive():
            self._warn(
                f"is not done {PATIENCE_S:.0f} seconds after training and is not waited for any longer: it has "
                f"{self._done} of {self._given} audits; the run directory has all"
            )
        elif self._left_out:
            self._warn(f"is slower than the audits: {self._left_out} of them are not in it; the run directory has all")
        self._raise()

    def _write(self, result: AuditResult) -> None:
        self.sink.write(result)
        self._done += 1

    def _put(self, call: Callable[[], None], *, may_go: bool = False, last: bool = False) -> None:
        self._raise()
        with self._more:
            droppable = [item for item in self._waiting if item[1]]
            if may_go and len(droppable) >= self._most:
                self._waiting.remove(droppable[0])
                self._left_out += 1
            self._waiting.append((call, may_go))
            self._ending = last
            self._more.notify()
        if self._thread is None or not self._thread.is_alive():
            # A daemon: who kills a training does not wait for its pictures.
            self._thread = threading.Thread(target=self._work, name=f"bias-audit: {self.name}", daemon=True)
            self._thread.start()

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            self._thread = None
            raise error

    def _warn(self, what: str) -> None:
        warnings.warn(f"bias-audit: {self.name} {what}", RuntimeWarning, stacklevel=3)

    def _work(self) -> None:
        while True:
            with self._more:
                self._more.wait_for(lambda: self._waiting or self._ending)
                if not self._waiting:
                    return
                call, _ = self._waiting.popleft()
            try:
                call()
            except Exception as error:
                with self._more:
                    self._waiting.clear()
                self._error = error
                return
