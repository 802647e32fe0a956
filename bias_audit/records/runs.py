"""A run directory read back, as often as it grows.

Enters: the path of a run directory. Leaves: `Run`: its manifest and all its audits, each checked; the arrays of an
audit and the samples are read when they are asked for.

A half-written last line is what a kill leaves: it is reported (`Run.torn`) and not read. Neither torch nor Lightning is
imported here, and numpy only where arrays are touched.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG
from typing import BinaryIO

from bias_audit.records.arrays import read_changed, read_scores, read_sheet, read_table
from bias_audit.records.errors import MissingEvidenceError, RecordError
from bias_audit.records.files import ARRAYS, AUDITS, CHANGED, MANIFEST, SAMPLES, find_run
from bias_audit.records.log import Line, parse_line, read_manifest, sha256
from bias_audit.records.manifest import Manifest
from bias_audit.records.results import AuditSummary
from bias_audit.records.samples import ChangedPictures, SampleScores, SampleSheet, SampleTable


@dataclass(frozen=True)
class Run:
    """A run directory read back.

    `audits` are in order of time, without their scores. `torn` says that the last line was cut off while it was
    written; `failed` why the latest audit is not the last word: one after it failed, or training broke off with an
    error; `ended` that training is over. `best_steps` are those of the checkpoints that training called its best, in
    order of time, none where it monitors nothing; `failed_steps` those at which an audit failed, a later one or not.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from bias_audit import AuditPlan, audit_model
        >>> from bias_audit.data.scenes import scene_dataset
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> few = scene_dataset({("doctor", "female"): 4, ("nurse", "male"): 4}, seed=0)
        >>> plan = AuditPlan(fitness_samples=0, intervention_samples=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = audit_model(net, few, plan=plan, out=folder)
        ...     run = read_run(folder)
        >>> [audit.trigger for audit in run.audits], run.ended, run.unfinished
        (['manual'], True, ())
    """

    path: Path
    manifest: Manifest
    audits: tuple[AuditSummary, ...]
    torn: bool
    ended: bool
    failed: str = ""
    best_steps: tuple[int, ...] = ()
    failed_steps: tuple[int, ...] = ()
    _lines: tuple[Line, ...] = ()
    _dropped: frozenset[str] = frozenset()

    @property
    def trained(self) -> tuple[int, ...]:
        """Which audits are of the trained model, counted from 0: all but the reference, which is no evidence."""
        return tuple(i for i, audit in enumerate(self.audits) if not audit.is_reference)

    @property
    def best_step(self) -> int | None:
        """The step of the best checkpoint so far; None where none is known."""
        return self.best_steps[-1] if self.best_steps else None

    @property
    def unfinished(self) -> tuple[str, ...]:
        """Why the last audit is not the last word: one after it failed, was cut off, or training has not ended."""
        reasons = [self.failed] if self.failed else []
        if self.torn:
            reasons.append("the last record was cut off while it was written")
        if not self.ended:
            reasons.append("training has not finished, or was killed: the model it ends with was not audited")
        return tuple(reasons)

    def partial(self, index: int) -> str:
        """That audit `index` holds the scores of a part of the samples only; "" where it holds all."""
        count, of = self.samples(index), self.manifest.samples_audited
        if count is None or count >= of:
            return ""
        return f"the audit at step {self.audits[index].step} is partial: it holds {count} of {of} samples"

    def place_of(self, audit: int) -> int:
        """Where in `audits` the one is that a person named by its number from 0; -1 is the last.

        Raises:
            ValueError: there is none of that number.
        """
        count = len(self.audits)
        if not -count <= audit < count:
            have = f"0 to {count - 1}, or -1 for the last" if count else "none: the run recorded no audit"
            raise ValueError(f"{self.path}: there is no audit {audit}; there are {have}")
        return audit % count

    def array_file(self, index: int) -> str | None:
        """The file of audit `index` below the run directory; None where its arrays were dropped."""
        name = self._lines[index].arrays
        return None if name in self._dropped else name

    def has_scores(self, index: int) -> bool:
        """Whether audit `index` still has its scores: a run may keep those of its newest audits only."""
        return self.array_file(index) is not None

    def scores(self, index: int) -> SampleScores:
        """The scores of audit `index`, read from its file and checked against its checksum.

        Raises:
            MissingEvidenceError: they were not kept (see `has_scores`), or the file is missing.
            RecordError: the file is truncated or changed.
        """
        if not self.has_scores(index):
            raise MissingEvidenceError(
                f"{self.path}: the scores of the audit at step {self.audits[index].step} were dropped: this run keeps "
                "those of its newest audits, of the best checkpoint and of the reference; ask for one of these"
            )
        return read_scores(*_read_arrays(self.path, self._lines[index]))

    def sheet(self) -> SampleSheet:
        """The audited images.

        Raises:
            RecordError: `samples.npz` is missing or cannot be read.
        """
        return read_sheet(self.path / SAMPLES)

    def sample_table(self) -> SampleTable:
        """The audited images' ids, labels and attributes: much faster than the whole sheet where they are many.

        Raises:
            RecordError: `samples.npz` is missing or cannot be read.
        """
        return read_table(self.path / SAMPLES)

    def verify(self, index: int) -> None:
        """Raise unless the arrays of audit `index` are those that were recorded, or were dropped on purpose.

        Raises:
            RecordError: their file is missing, truncated or changed.
        """
        if self.has_scores(index):
            _read_arrays(self.path, self._lines[index])

    def samples(self, index: int) -> int | None:
        """How many samples audit `index` holds the scores of; None where its record does not say."""
        return self._lines[index].samples

    def changed(self) -> ChangedPictures | None:
        """What the last interventions made of some images; None where none were made.

        Raises:
            RecordError: `changed.npz` cannot be read.
        """
        return read_changed(self.path / CHANGED)


def read_run(path: str | Path) -> Run:
    """Read the run directory at `path`, or the only one below it.

    Raises:
        RecordError: there is no run directory, or a file of it is missing, changed or of another version; the message
            names the file and the line.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from bias_audit import AuditPlan, audit_model
        >>> from bias_audit.data.scenes import scene_dataset
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> few = scene_dataset({("doctor", "female"): 4, ("nurse", "male"): 4}, seed=0)
        >>> plan = AuditPlan(fitness_samples=0, intervention_samples=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = audit_model(net, few, plan=plan, out=folder)
        ...     run = read_run(folder)
        >>> run.manifest.subjects.classes, run.manifest.samples_audited
        (('doctor', 'nurse'), 8)
    """
    return RunReader(path).read()


class RunReader:
    """Reads one run directory again and again: of its lines only those written since the last time.

    Where the file of lines was replaced or cut, or does not go on from the last line read, all of it is read anew. An
    array file is looked for when its line is read.

    Args:
        path: the run directory, or one above the only one.

    Example:
        >>> reader = RunReader("runs/today")  # doctest: +SKIP
        >>> len(reader.read().audits)  # doctest: +SKIP
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._forget()

    def _forget(self) -> None:
        self._inode: int | None = None
        self._offset, self._lines, self._last_sha256 = 0, 0, ""
        self._replay = _Replay()

    def read(self) -> Run:
        """The run as it is now.

        Raises:
            RecordError: as of `read_run`.
        """
        went_on = self._offset > 0
        try:
            return self._read_on()
        except RecordError:
            self._forget()
            if not went_on:
                raise
        return self._read_on()

    def _read_on(self) -> Run:
        root = find_run(self._path)
        manifest = read_manifest(root / MANIFEST)
        try:
            with (root / AUDITS).open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self._forget()
                file.seek(self._offset)
                lines, torn = self._parse(file, root / AUDITS)
        except OSError as error:
            kind = MissingEvidenceError if isinstance(error, FileNotFoundError) else RecordError
            raise kind(f"{root / AUDITS}: cannot be read ({error.strerror}): the run is incomplete") from error
        self._inode = status.st_ino
        replay = self._replay
        # What a rewind leaves keeps its order, so that what is new is at the end.
        new = replay.kept[max(0, len(replay.kept) - lines) :]
        try:
            for line in new:
                if line.arrays is not None and line.arrays not in replay.dropped:
                    _check_arrays(root, line)
        except MissingEvidenceError:
            # Without its lines the run is being set aside for another.
            if _size(root / AUDITS) in (None, status.st_size):
                raise
            self._forget()
            # They may have been dropped since their line was read: then the records say so by now.
            return self._read_on()
        audits = tuple(line.audit for line in replay.kept if line.audit is not None)
        kept, bests, failures = tuple(replay.kept), tuple(replay.bests), tuple(replay.failures)
        dropped = frozenset(replay.dropped)
        return Run(root, manifest, audits, torn, replay.ended, replay.failed, bests, failures, kept, dropped)

    def _parse(self, file: BinaryIO, path: Path) -> tuple[int, bool]:
        """Take the rest of the file in, line by line; how many there are, and whether the last one was cut off."""
        before = self._lines
        for raw in file:
            if not raw.endswith(b"\n"):
                return self._lines - before, True
            self._lines += 1
            line, self._last_sha256 = parse_line(raw, f"{path}, line {self._lines}", self._last_sha256)
            self._replay.add(line)
            self._offset += len(raw)
        return self._lines - before, False


@dataclass
class _Replay:
    """What the lines read so far come to: see `Run`."""

    kept: list[Line] = field(default_factory=list)
    bests: list[int] = field(default_factory=list)
    failures: list[int] = field(default_factory=list)
    dropped: set[str] = field(default_factory=set)
    ended: bool = False
    failed: str = ""

    def add(self, line: Line) -> None:
        """Take the next line in."""
        if line.kind == "best" and line.step is not None:
            # It is no audit: a checkpoint may be written after the end as well.
            self.bests.append(line.step)
            return
        if line.kind == "dropped":
            self.dropped.update(line.names)
            return
        self.ended = line.kind == "end"
        if line.kind == "audit":
            self.kept.append(line)
            self.failed = ""
        elif line.kind == "failed":
            self.failed = f"the audit at step {line.step} failed: {line.reason}"
            self.failures += [line.step] if line.step is not None else []
        elif line.kind == "end" and line.reason:
            self.failed = f"training broke off with {line.reason}"
        elif line.kind == "rewind" and line.step is not None:
            self.failed, limit = "", line.step
            self.kept = [k for k in self.kept if k.audit is not None and stays(k.audit, limit)]
            self.bests = [best for best in self.bests if best <= limit]
            self.failures = [step for step in self.failures if step <= limit]


def stays(audit: AuditSummary, step: int) -> bool:
    """Whether an audit is one of a training that is resumed at `step`."""
    return audit.step <= step and audit.trigger != "end"


def _size(path: Path) -> int | None:
    """None where there is no such file; one look, as it may go between two."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size if S_ISREG(status.st_mode) else None


def _check_arrays(root: Path, line: Line) -> None:
    path = _array_path(root, line)
    size = _size(path)
    if size != line.arrays_bytes:
        got, kind = ("is missing", MissingEvidenceError) if size is None else (f"has {size} bytes", RecordError)
        raise kind(f"{path}: {got}, its record says {line.arrays_bytes}: the run directory is incomplete")


def _array_path(root: Path, line: Line) -> Path:
    name = Path(line.arrays or "")
    if name.parent != Path(ARRAYS) or name.suffix != ".npz":
        raise RecordError(f"{root / AUDITS}: names the array file {line.arrays!r}, which is not in {ARRAYS}/")
    return root / name


def _read_arrays(root: Path, line: Line) -> tuple[Path, bytes]:
    path = _array_path(root, line)
    try:
        content = path.read_bytes()
    except OSError as error:
        # Dropped since the run was read, or lost.
        kind = MissingEvidenceError if isinstance(error, FileNotFoundError) else RecordError
        raise kind(f"{path}: cannot be read ({error.strerror})") from error
    if sha256(content) != line.arrays_sha256:
        raise RecordError(f"{path}: its checksum does not match its record: it was changed or damaged")
    return path, content
