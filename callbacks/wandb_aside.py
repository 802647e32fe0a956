"""Results in Weights & Biases, sent by a process of its own while training goes on.

Enters: an open W&B run, and word that an audit has been recorded. Leaves: in that run, what `WandbWriter` makes of the
run directory's audits, one after the other. The process attaches to the run by the W&B service that both share.

Run by `python -m bias_audit.callbacks.wandb_aside RUN_DIR OPTIONS`, which reads messages from standard input.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bias_audit.callbacks.aside import Aside
from bias_audit.callbacks.sinks import Session
from bias_audit.callbacks.wandb import WandbWriter
from bias_audit.overlays import PANEL, WORST
from bias_audit.records import AuditResult, RecordError, Run, read_run

if TYPE_CHECKING:
    import wandb


class WandbSink:
    """Sends what the run directory records to `run`; see `WandbWriter` for what that is.

    What cannot be recorded is not sent: only the scalars, which the Trainer's logger sends, do without.

    Args:
        run: an open W&B run, on line or off.
        own: the run is the sink's: it sends the monitors' scalars too, and finishes the run at the end.
        panel: how many samples the fixed panel shows, the same at every audit.
        worst: how many of the worst samples are shown.

    Raises:
        ValueError: `panel` or `worst` is more than W&B shows of one key.

    Example:
        >>> import wandb  # doctest: +SKIP
        >>> BiasAuditCallback(audit_set, sinks=[WandbSink(wandb.init(), own=True)])  # doctest: +SKIP
    """

    def __init__(self, run: wandb.Run, *, own: bool = False, panel: int = PANEL, worst: int = WORST) -> None:
        WandbWriter(run, panel=panel, worst=worst)  # What it cannot show is said here and now.
        self._run, self._own, self._counts = run, own, {"panel": panel, "worst": worst}
        self._aside: Aside | None = None
        self._left_out = 0
        self._finished = False

    def start(self, session: Session) -> None:
        """Remember where; a disabled run is sent nothing."""
        self._session = session
        if self._run.disabled:
            return
        resumed = session.resumed_step if session.resumed_from is not None else None
        place = {"root": str(self._run.settings.root_dir), "files": str(self._run.dir)}
        options = {"run": self._run.id, "name": session.name, "own": self._own, "resumed": resumed, **self._counts}
        self._aside = Aside("bias_audit.callbacks.wandb_aside", str(session.path), json.dumps(options | place))

    def write(self, result: AuditResult) -> None:
        """Have the audit sent."""
        self._reopen()
        if self._aside is not None and not self._aside.tell("write", result.created, result.step, result.trigger):
            self._left_out += 1

    def fail(self, step: int, reason: str) -> None:
        """Have it said that an audit could not be made."""
        self._reopen()
        if self._aside is not None:
            self._aside.tell("fail", step, reason)

    def end(self, error: str = "") -> None:
        """Wait for what is under way; then finish a run of the sink's own."""
        try:
            if self._aside is not None:
                self._aside.end("end", error)
        finally:
            if self._own:
                self._run.finish(exit_code=1 if error else 0)
                self._finished = True
        if self._left_out:
            warnings.warn(
                f"bias-audit: W&B is slower than the audits: {self._left_out} of them were not sent; the run directory "
                "has all, and `bias-audit dashboard push --send` sends it",
                RuntimeWarning,
                stacklevel=2,
            )
            self._left_out = 0

    def _reopen(self) -> None:
        """Go on with a run of the sink's own that was finished: the same Trainer fits, and then it tests."""
        if not self._finished:
            return
        import wandb

        before = self._run
        mode: Literal["offline", "online"] = "offline" if before.offline else "online"
        self._run = wandb.init(
            id=before.id,
            entity=before.entity or None,
            project=before.project,
            dir=before.settings.root_dir,
            mode=mode,
            resume="allow",
        )
        self._finished = False
        self.start(self._session)


def follow(path: Path, options: dict[str, Any], lines: Iterable[str]) -> None:
    """Send what the messages in `lines` name until one of them says `end`, or there are no more.

    Raises:
        RecordError: the run directory cannot be read.
        ValueError: W&B puts the files of the run elsewhere than in the process that opened it.
    """
    # Where W&B looks for the files of a run is not told to a process that attaches to it.
    os.environ["WANDB_DIR"] = options["root"]
    import wandb

    # W&B's own way for several processes to log to one run; its type stub leaves it out.
    attached = wandb.attach(options["run"])  # type: ignore[attr-defined]
    if attached.dir != options["files"]:
        raise ValueError(f"W&B keeps this run's files in {options['files']}, and another process's in {attached.dir}")
    writer = WandbWriter(attached, own=options["own"], panel=options["panel"], worst=options["worst"])
    started = False
    for line in lines:
        do, *what = json.loads(line)
        run = read_run(path)
        index = _named(run, what) if do == "write" else len(run.audits)
        if not started:
            resumed = None if options["resumed"] is None else path
            session = Session(options["name"], path, run.manifest, run.sheet(), resumed, options["resumed"] or 0)
            writer.start(session, run.audits[:index])
            started = True
        if do == "write":
            writer.write(AuditResult(**vars(run.audits[index]), scores=run.scores(index)))
        elif do == "fail":
            writer.fail(*what)
        else:
            writer.end(*what)
            return


def _named(run: Run, what: list[Any]) -> int:
    """The place of the audit that a message names."""
    found = [i for i, audit in enumerate(run.audits) if [audit.created, audit.step, audit.trigger] == what]
    if not found:
        raise RecordError(f"{run.path}: has no audit of step {what[1]}: it could not be recorded, so it is not sent")
    return found[-1]


def main() -> None:
    """The process, which gives way to the training."""
    os.nice(10)
    try:
        follow(Path(sys.argv[1]), json.loads(sys.argv[2]), sys.stdin)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
