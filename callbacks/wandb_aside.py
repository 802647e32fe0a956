"""Results in Weights & Biases, sent by a process of its own while training goes on.

Enters: an open W&B run, and word that an audit has been recorded. Leaves: in that run, what `WandbWriter` makes of the
run directory's audits, one after the other. The process attaches to the run by the W&B service that both share.

Run by `python -m bias_audit.callbacks.wandb_aside RUN_DIR OPTIONS`, which reads messages from standard input.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bias_audit.callbacks.aside import PATIENCE_S, Aside
from bias_audit.callbacks.sinks import Session
from bias_audit.callbacks.wandb import WHERE, WandbWriter
from bias_audit.overlays import PANEL, WORST, shareable
from bias_audit.records.results import AuditResult, MissingEvidenceError
from bias_audit.records.runs import Run, RunReader, read_run
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
            given = int(json.loads((path / WHERE).read_bytes())["audits"])
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
            "bias_audit.callbacks.wandb_aside", str(session.path), json.dumps(options | place | self._counts)
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


def follow(path: Path, options: dict[str, Any], lines: Iterable[str]) -> None:
    """Send what is recorded up to the place that each message in `lines` names, until one says `end` or none is left.

    Raises:
        RecordError: the run directory cannot be read.
        RuntimeError: W&B did not take all of it.
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
    reader = RunReader(path)
    started, sent, gone, refused = False, 0, 0, ""
    for line in lines:
        do, place, *what = json.loads(line)
        run = reader.read()
        if not started:
            started, sent = True, place - (do == "write")
            resumed = None if options["resumed"] is None else path
            sheet = shareable(run.sheet(), run.manifest)
            session = Session(
                options["name"], path, run.manifest, sheet, resumed, options["resumed"] or 0, options["keep"]
            )
            writer.start(session, run.audits[:sent])
        while sent < min(place, len(run.audits)):
            result = _result(run, sent, reader)
            if result is None:
                gone += 1
                writer.skip(run.audits[sent])
            else:
                try:
                    writer.write(result)
                except wandb.Error as error:
                    # The network may come back: the next message tries again.
                    refused = described(error)
                    break
            sent += 1
        if do == "fail":
            writer.fail(what[0], what[1])
        elif do == "end":
            if sent < min(place, len(run.audits)):
                raise RuntimeError(refused)
            # A failure of which no message came through is in the records, too.
            writer.end(*what if any(what) else run.failed)
            break
        elif place > len(run.audits):
            writer.fail(what[0], "it could not be recorded, so it is not sent")
    if gone:
        raise RuntimeError(f"of {gone} audits the run directory no longer had the scores when W&B came to them")


def _result(run: Run, index: int, reader: RunReader) -> AuditResult | None:
    """The audit with its scores; None where these have been dropped."""
    try:
        return AuditResult(**vars(run.audits[index]), scores=run.scores(index))
    except MissingEvidenceError:
        # They may have been dropped since the records were read.
        if reader.read().has_scores(index):
            raise
        return None


def main() -> None:
    """The process, which gives way to the training."""
    os.nice(10)
    try:
        follow(Path(sys.argv[1]), json.loads(sys.argv[2]), sys.stdin)
    except Exception as error:
        print(described(error), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
