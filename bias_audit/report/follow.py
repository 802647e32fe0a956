"""Keep a run's page up to date from a process of its own, so that drawing it takes no time from the training.

Run by `python -m bias_audit.report.follow RUN_DIR`. Enters: a message on standard input for each audit, and `end` when
there will be no more, as lines of JSON. Leaves: `report.html`, drawn anew for the newest of the messages that wait, and
once at the end. An error ends it with one line on standard error and exit code 2.
"""

from __future__ import annotations

import json
import os
import sys
import threading

from bias_audit.records.errors import MissingEvidenceError
from bias_audit.records.runs import RunReader
from bias_audit.report.page import write_report

# Said rather than left to the end of the input, which does not come while a forked worker of the training's lives.
END = "end"


def follow(path: str) -> None:
    """Draw the page of the run directory at `path` until standard input says `end`, or ends.

    Raises:
        RecordError: the run directory cannot be read.
        OSError: the page cannot be written.
    """
    wanted, over = threading.Event(), threading.Event()

    def read() -> None:
        try:
            for line in sys.stdin:
                if json.loads(line)[0] == END:
                    break
                wanted.set()
        finally:
            over.set()
            wanted.set()

    threading.Thread(target=read, daemon=True).start()
    records = RunReader(path)
    while True:
        wanted.wait()
        # What is asked for from here on is not in this page.
        wanted.clear()
        last = over.is_set()
        _draw(records)
        if last:
            return


def _draw(records: RunReader) -> None:
    run = records.read()
    while True:
        try:
            write_report(run)
            return
        except MissingEvidenceError:
            # The training may have dropped arrays since: then there are more records.
            before, run = run, records.read()
            if run == before:
                raise


def main() -> None:
    """The process, which gives way to the training."""
    os.nice(10)
    try:
        follow(sys.argv[1])
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
