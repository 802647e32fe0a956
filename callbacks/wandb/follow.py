"""Send what a run directory records to Weights & Biases, from a process beside the training.

Run by `python -m bias_audit.callbacks.wandb.follow RUN_DIR OPTIONS`. Enters: on standard input a line of JSON for each
audit or failure, and one that says that there will be no more. Leaves: the audits in the W&B run. An error ends it with
one line on standard error and exit code 2.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bias_audit.callbacks.sinks import Session
from bias_audit.callbacks.wandb.writer import WandbWriter
from bias_audit.records.errors import MissingEvidenceError
from bias_audit.records.pictures import shareable
from bias_audit.records.results import AuditResult
from bias_audit.records.runs import Run, RunReader
from bias_audit.redaction import described


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
