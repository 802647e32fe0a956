"""A process beside the training, for what would keep the training waiting for the interpreter.

Enters: a module that reads messages, and the messages. Leaves: that module at work in a process of its own.

A thread is no way out: while one thread runs Python, another waits up to five milliseconds each time it comes back from
an operation, and a training step is made of hundreds of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import IO, Any

import bias_audit
from bias_audit.redaction import without_secrets

# What hangs, such as a network, must not keep a training that is over from ending.
PATIENCE_S = 120.0
# What is written at once goes into the pipe whole or not at all if it has at most 4096 bytes; JSON takes up to twelve
# for a character.
_LONGEST = 300
_LAST_WORDS = 65536


class Aside:
    """Runs `python -m module arguments` when it is first told something, and sends it a line of JSON for each message.

    The module is to end on the message that `end` sends. If it fails, with a line on standard error that says why, the
    next message raises.

    Example:
        >>> page = Aside("bias_audit.report.follow", "runs/today")
        >>> page.tell("audited")  # doctest: +SKIP
        True
    """

    def __init__(self, module: str, *arguments: str) -> None:
        self._command = [sys.executable, "-P", "-m", module, *arguments]
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None

    def tell(self, *message: Any) -> bool:
        """Send a message; False, at once, where so many wait that it cannot be taken.

        Raises:
            RuntimeError: the process has failed.
        """
        if self._process is None:
            self._begin()
        assert self._process is not None and self._process.stdin is not None
        short = [part[:_LONGEST] if isinstance(part, str) else part for part in message]
        try:
            # A pipe takes so short a line whole or, as it does not block, not at all.
            os.write(self._process.stdin.fileno(), json.dumps(short).encode() + b"\n")
        except BlockingIOError:
            return False
        except BrokenPipeError:
            self._process.wait()
            self._over()
            raise RuntimeError("it ended before the training") from None
        return True

    def end(self, *message: Any) -> None:
        """Send the last message, and wait for what is under way.

        Raises:
            RuntimeError: the process has failed, or is not done in `PATIENCE_S` seconds.
        """
        until = time.monotonic() + PATIENCE_S
        while not self.tell(*message) and time.monotonic() < until:
            time.sleep(0.01)
        assert self._process is not None
        try:
            self._process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            self._over(say=False)
            raise RuntimeError(f"it was not done {PATIENCE_S:.0f} seconds after the training") from None
        self._over()

    def _begin(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        surroundings = {"OMP_NUM_THREADS": "1"}
        # Where the package is not installed, it was found by what this process did to its path.
        home = str(Path(bias_audit.__file__).parents[1])
        if home not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
            surroundings["PYTHONPATH"] = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            env=os.environ | surroundings,
            # Ctrl-C is the training's, which then says that it is over. A session of its own would be scheduled like
            # the training's, however nice the process is.
            process_group=0,
        )
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)

    def _over(self, say: bool = True) -> None:
        """Close what belongs to a process that has ended, and raise what it said if it failed."""
        assert self._process is not None and self._process.stdin is not None and self._errors is not None
        code = self._process.returncode
        self._process.stdin.close()
        # Of what somebody's code prints in hours, the last words tell.
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - _LAST_WORDS))
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        self._errors.close()
        self._process = self._errors = None
        if code and say:
            raise RuntimeError(without_secrets(lines[-1]) if lines else "the process was killed")
