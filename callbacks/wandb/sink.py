"""Results in Weights & Biases, sent by a process of its own while training goes on.

Enters: an open W&B run, and word that an audit has been recorded. Leaves: in that run, what `WandbWriter` makes of the
run directory's audits, one after the other. The process attaches to the run by the W&B service that both share.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from bias_audit.callbacks.aside import PATIENCE_S, Aside
from bias_audit.callbacks.sinks import Session
from bias_audit.callbacks.wandb.writer import WandbWriter
from bias_audit.records.files import WANDB
from bias_audit.records.panels import PANEL, WORST
from bias_audit.records.results import AuditResult
from bias_audit.records.runs import read_run
from bias_audit.redaction import described

if TYPE_CHECKING:
    import wandb


class WandbSink:
    """Sends what the run directory records to `run`; see `WandbWriter` for what that is.

    What cannot be recorded is not sent: only the scalars, which the Trainer's logger sends, do without. An audit waits
    in the run directory until it is sent, so none is lost where W&B is slow. What has not been sent `PATIENCE_S`
    seconds after training stays there: the exception says how to send it.

    Args:
        run: an open W&B run, on line or off.
        own: the run is the sink's: it sends the monitors' scalars too, and finishes the run at the end.
        panel: how many samples the fixed panel shows, the same at every audit.
        worst: how many of the worst samples are shown.

    Raises:
        ValueError: `panel` or `worst` is more than W&B shows of one key.

    Example:
        >>> run = own_run({"project": "doctors"})  # doctest: +SKIP
        >>> BiasAuditCallback(audit_set, sinks=[WandbSink(run, own=True)])  # doctest: +SKIP
    """

    name = "W&B"

    def __init__(self, run: wandb.Run, *, own: bool = False, panel: int = PANEL, worst: int = WORST) -> None:
        WandbWriter(run, panel=panel, worst=worst)  # What it cannot show is said here and now.
        self._run, self._own, self._counts = run, own, {"panel": panel, "worst": worst}
        self._aside: Aside | None = None
        self._place = 0
        self._finished = False

    def start(self, session: Session) -> None:
        """Remember where; a disabled run is sent nothing."""
        self._session = session
        # Of a run that is gone on with, the audits that its records hold already were sent by whoever made them.
        self._place = 0 if session.resumed_from is None else len(read_run(session.path).audits)
        self._begin()

    def write(self, result: AuditResult) -> None:
        """Have the audit sent, by its place in the records."""
        self._place += 1
        self._tell("write", self._place, result.step)

    def fail(self, step: int, reason: str) -> None:
        """Have it said that an audit could not be made."""
        self._tell("fail", self._place, step, reason)

    def end(self, error: str = "") -> None:
        """Wait for what is under way; then finish a run of the sink's own.

        Raises:
            RuntimeError: not all was sent.
        """
        problems: list[str] = []
        try:
            if self._aside is not None:
                self._aside.end("end", self._place, error)
        except (OSError, RuntimeError) as problem:
            problems.append(str(problem))
        if self._own:
            self._finished = True
            try:
                self._run.finish(exit_code=1 if error else 0)
            except Exception as problem:
                problems.append(f"the run was not finished ({described(problem)})")
        if problems:
            raise RuntimeError("; ".join([*problems, self._rest()]))

    def _tell(self, *message: Any) -> None:
        if self._finished:
            self._reopen()
        if self._aside is None:
            return
        try:
            # Where the pipe is full the message is lost, but not the audit: a later one sends both, at last the end's.
            self._aside.tell(*message)
        except (OSError, RuntimeError) as problem:
            raise RuntimeError(f"{problem}; {self._rest()}") from None

    def _rest(self) -> str:
        """How much W&B was given, and how it gets the rest."""
        path, project = self._session.path, ""
        try:
            given = int(json.loads((path / WANDB).read_bytes())["audits"])
        except (OSError, ValueError, KeyError):
            # Nor is it known there where to.
            given, project = 0, f" --project {self._run.project}"
        return (
            f"W&B was given {given} of {self._place} audits; the run directory has them, and "
            f"`bias-audit dashboard push {path}{project} --send` makes a W&B run of them"
        )

    def _begin(self) -> None:
        if self._run.disabled:
            return
        session = self._session
        resumed = session.resumed_step if session.resumed_from is not None else None
        place = {"root": str(self._run.settings.root_dir), "files": str(self._run.dir)}
        options = {
            "run": self._run.id,
            "name": session.name,
            "own": self._own,
            "resumed": resumed,
            "keep": session.keep,
        }
        self._aside = Aside(
            "bias_audit.callbacks.wandb.follow", str(session.path), json.dumps(options | place | self._counts)
        )

    def _reopen(self) -> None:
        """Go on with a run of the sink's own that was finished: the same Trainer fits, and then it tests."""
        before = self._run
        mode: Literal["offline", "online"] = "offline" if before.offline else "online"
        self._run = own_run(
            {
                "id": before.id,
                "entity": before.entity or None,
                "project": before.project,
                "dir": before.settings.root_dir,
                "mode": mode,
                "resume": "allow",
            }
        )
        self._finished = False
        self._begin()


def own_run(options: Mapping[str, Any]) -> wandb.Run:
    """`wandb.init(**options)`, but the run's end does not wait for ever where the network hangs.

    W&B waits for the network without end, at the end of a run and of the process. Here it gives up after `PATIENCE_S`
    seconds, keeps what was not sent and raises TimeoutError, unless `settings` or `WANDB_FINISH_TIMEOUT` say otherwise.

    Raises:
        wandb.Error: there is no account, or no answer within W&B's `init_timeout`, 90 seconds by default.

    Example:
        >>> own_run({"project": "doctors", "mode": "offline"}).finish()  # doctest: +SKIP
    """
    import wandb

    given = options.get("settings") or {}
    chosen = (
        dict(given) if isinstance(given, Mapping) else {name: getattr(given, name) for name in given.model_fields_set}
    )
    chosen.setdefault("finish_timeout_raises", True)
    # Zero is W&B's own choice, for ever.
    if not wandb.setup().settings.finish_timeout:
        chosen.setdefault("finish_timeout", PATIENCE_S)
    return wandb.init(**{**options, "settings": wandb.Settings(**chosen)})
