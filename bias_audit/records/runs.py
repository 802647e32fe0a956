"""Audits on disk: what one audit measured, written so that a kill at any moment leaves every earlier audit whole.

Enters: a `Manifest` and a `SampleSheet` once, then an `AuditResult` per audit. Leaves: a run directory, and `Run`, the
same read back.

    manifest.json    what was audited and how; checksummed
    samples.npz      ids, labels, attributes, thumbnails and region masks of the audited images
    audits.jsonl     one line per audit, each with its checksum and its predecessor's: estimates, findings, checks
    audits/*.npz     per audit the heatmaps at their own resolution and every score of every sample
    changed.npz      what the last interventions made of some images, to be looked at; absent before the first

An audit's arrays are written, synced and renamed into place before its line is appended and synced, so a line is never
without its arrays. A half-written last line is what a kill leaves: readers report it (`Run.torn`), `resume` cuts it,
and the line that says training is over, which it is not where it goes on.
Where only the arrays of the newest audits are kept, a line that names the others is synced before their files go.

Neither torch nor Lightning is imported here, and numpy only where arrays are touched.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO, Literal

from pydantic import TypeAdapter, ValidationError

from bias_audit.records.arrays import (
    changed_bytes,
    read_changed,
    read_scores,
    read_sheet,
    read_table,
    scores_bytes,
    sheet_bytes,
)
from bias_audit.records.results import (
    SCHEMA_VERSION,
    AuditResult,
    AuditSummary,
    ChangedPictures,
    Manifest,
    MissingEvidenceError,
    RecordError,
    SampleScores,
    SampleSheet,
    SampleTable,
)

MANIFEST, SAMPLES, AUDITS, PREVIOUS = "manifest.json", "samples.npz", "audits.jsonl", "previous"
CHANGED = "changed.npz"
# The manifest of a run that is being moved to `previous`.
_LEAVING = "manifest.previous.json"
# The folder in which a W&B run keeps a copy of the records, so that it can be judged wherever it is copied to.
COPIES = "bias_audit_records"


@dataclass(frozen=True)
class _Line:
    """One line of audits.jsonl, less its checksums."""

    kind: Literal["audit", "failed", "rewind", "best", "dropped", "end"]
    audit: AuditSummary | None = None
    arrays: str | None = None
    arrays_bytes: int = 0
    arrays_sha256: str = ""
    samples: int | None = None
    step: int | None = None
    reason: str = ""
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """A run directory read back.

    `audits` are in order of time, without their scores. `torn` says that the last line was cut off while it was
    written; `failed` why the latest audit is not the last word: one after it failed, or training broke off with an
    error; `ended` that training is over. `best_step` is the step of the checkpoint that training calls its best, None
    where it monitors nothing. `failed_steps` are those at which an audit failed, a later one or not.
    """

    path: Path
    manifest: Manifest
    audits: tuple[AuditSummary, ...]
    torn: bool
    ended: bool
    failed: str = ""
    _arrays: tuple[_Line, ...] = ()
    _bests: tuple[int, ...] = ()
    failed_steps: tuple[int, ...] = ()
    _dropped: frozenset[str] = frozenset()

    @property
    def best_step(self) -> int | None:
        """The step of the best checkpoint so far; None where none is known."""
        return self._bests[-1] if self._bests else None

    def has_scores(self, index: int) -> bool:
        """Whether audit `index` still has its scores: a run may keep those of its newest audits only."""
        arrays = self._arrays[index].arrays
        return arrays is not None and arrays not in self._dropped

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
        return read_scores(*_read_arrays(self.path, self._arrays[index]))

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
            _read_arrays(self.path, self._arrays[index])

    def samples(self, index: int) -> int | None:
        """How many samples audit `index` holds the scores of; None where its record does not say."""
        return self._arrays[index].samples

    def changed(self) -> ChangedPictures | None:
        """What the last interventions made of some images; None where none were made.

        Raises:
            RecordError: `changed.npz` cannot be read.
        """
        return read_changed(self.path / CHANGED)


def find_run(path: str | Path) -> Path:
    """The run directory at `path`, or the only one below it.

    Raises:
        RecordError: there is none, or more than one.
    """
    root = Path(path)
    if not root.is_dir():
        raise RecordError(f"{root}: no such directory: give a run directory (it holds {MANIFEST}) or one above it")
    found = sorted(_manifests(root))
    if not found:
        raise MissingEvidenceError(
            f"{root}: no {MANIFEST} here or below: no audit was recorded, or this is another directory"
        )
    if len(found) > 1:
        names = ", ".join(str(p) for p in found[:5]) + (" ..." if len(found) > 5 else "")
        raise RecordError(f"{root}: holds {len(found)} run directories ({names}): name one of them")
    return found[0]


def _manifests(root: Path) -> Iterator[Path]:
    # A run directory keeps its predecessors inside itself: what lies below a manifest is not searched, and neither is
    # `previous` while a new run has yet to write its manifest. A W&B run beside it holds the same once more.
    for folder, below, files in os.walk(root):
        below[:] = [] if MANIFEST in files else [name for name in below if name not in (PREVIOUS, COPIES)]
        if MANIFEST in files:
            yield Path(folder)


@dataclass(frozen=True)
class _Held:
    """One audit whose arrays are kept: its place among all, and that of the audit whose interventions it rests on."""

    name: str
    place: int
    step: int
    trigger: str
    rests_on: int

    @classmethod
    def of(cls, name: str, place: int, audit: AuditSummary) -> _Held:
        age = max((e.age for e in audit.estimates if e.metric.startswith("removal_")), default=0)
        return cls(name, place, audit.step, audit.trigger, place - age)


class RunDirectory:
    """The writer of a run directory.

    With `keep` the arrays of the newest so many audits are kept, and with them those of the reference, of the best
    checkpoint's audit, and of the audits whose interventions these rest on. What all the others measured and concluded
    is kept for ever, their arrays are not.

    Example:
        >>> directory = RunDirectory.create(path, manifest, sheet)  # doctest: +SKIP
        >>> directory.append(result)  # doctest: +SKIP
    """

    def __init__(self, path: Path, count: int, last_sha256: str, keep: int | None = None) -> None:
        self.path = path
        self._count = count
        self._last_sha256 = last_sha256
        self._keep = keep
        self._held: list[_Held] = []
        self._audits = 0
        self._best: int | None = None

    @classmethod
    def create(
        cls, path: str | Path, manifest: Manifest, sheet: SampleSheet, *, keep: int | None = None
    ) -> RunDirectory:
        """A new run directory; a run that is already there moves to `previous/<its run id>` inside the new one.

        Raises:
            OSError: the directory cannot be written.
        """
        path = Path(path)
        _clear_leftovers(path)
        if (path / MANIFEST).exists() or (path / _LEAVING).exists():
            _set_aside(path)
        (path / AUDITS).parent.mkdir(parents=True, exist_ok=True)
        (path / "audits").mkdir(exist_ok=True)
        write_whole(path / SAMPLES, sheet_bytes(sheet))
        write_whole(path / AUDITS, b"")
        # The manifest comes last: a directory that has one is complete.
        _write_manifest(path, manifest)
        return cls(path, 0, "", keep)

    @classmethod
    def resume(
        cls,
        path: str | Path,
        source: str | Path,
        manifest: Manifest,
        sheet: SampleSheet,
        step: int,
        *,
        keep: int | None = None,
    ) -> RunDirectory:
        """Go on with the run in `source` from `step` on: its audits up to `step` are kept, later ones are dropped.

        So is one that was made because training ended: it goes on, and an unbroken training would not have made it.

        Where `path` is another directory than `source`, the kept audits are copied and `source` stays as it is.

        Raises:
            RecordError: `source` cannot be read, or audited another data set, layer or method (says which differs).
        """
        reader = RunReader(source)
        run = reader.read()
        for name in ("fingerprint", "layer", "methods", "target", "sign"):
            old, new = getattr(run.manifest, name), getattr(manifest, name)
            if old != new:
                raise RecordError(f"{source}: cannot be resumed: its {name} is {old!r}, this audit's is {new!r}")
        path, source = Path(path), run.path
        if path.resolve() != source.resolve():
            manifest = manifest.model_copy(update={"run_id": run.manifest.run_id})
            directory = cls.create(path, manifest, sheet, keep=keep)
            # Known before the audits are, of which it decides which keep their arrays.
            for best in [best for best in run._bests if best <= step][-1:]:
                directory.best(best)
            for failed in [failed for failed in run.failed_steps if failed <= step]:
                directory.fail(failed, f"see {source}")
            for index, audit in enumerate(run.audits):
                if not _stays(audit, step):
                    continue
                if run.has_scores(index):
                    directory.append(AuditResult(**vars(audit), scores=run.scores(index)))
                else:
                    directory._append_line(_Line("audit", audit, samples=run.samples(index)))
                    directory._audits += 1
            changed = run.changed()
            if changed is not None and changed.step <= step and manifest.thumbnails:
                write_whole(path / CHANGED, changed_bytes(changed))
            return directory
        whole = _whole_lines((source / AUDITS).read_bytes())
        if run.ended:
            # From here on it is not over, even where no more than this can be done, as on a full disk.
            del whole[max(i for i, line in enumerate(whole) if _kind(line) == "end") :]
        if run.ended or run.torn:
            os.truncate(source / AUDITS, sum(len(line) + 1 for line in whole))
        if manifest.thumbnails != run.manifest.thumbnails:
            # From now on there are to be pictures, or none.
            write_whole(path / SAMPLES, sheet_bytes(sheet))
        # The policy may have changed: what is judged from now on is judged by the new one.
        kept = {"run_id": run.manifest.run_id, "created": run.manifest.created}
        _write_manifest(path, manifest.model_copy(update=kept))
        last = json.loads(whole[-1])["sha256"] if whole else ""
        directory = cls(path, sum(_kind(line) == "audit" for line in whole), last, keep)
        directory._append_line(_Line("rewind", step=step))
        directory._take_over(reader.read())
        changed = run.changed()
        if changed is not None and (changed.step > step or not manifest.thumbnails):
            (path / CHANGED).unlink()
        return directory

    def append(self, result: AuditResult) -> None:
        """Write one audit, synced to disk when this returns.

        Raises:
            OSError: the directory cannot be written.
        """
        content = scores_bytes(result.scores)
        if result.changed is not None:
            write_whole(self.path / CHANGED, changed_bytes(result.changed))
        name = f"audits/{self._count:06d}.npz"
        write_whole(self.path / name, content)
        samples = len(result.scores.ids)
        self._append_line(_Line("audit", result.summary(), name, len(content), _sha256(content), samples))
        self._count += 1
        if self._keep is not None:
            # Without it the list would grow with every audit, and never be asked.
            self._held.append(_Held.of(name, self._audits, result))
        self._audits += 1
        self._drop()

    def fail(self, step: int, reason: str) -> None:
        """Write that the audit at `step` could not be made: what comes before it is not the latest word."""
        self._append_line(_Line("failed", step=step, reason=reason))

    def best(self, step: int) -> None:
        """Write that the best checkpoint so far is that of `step`."""
        self._append_line(_Line("best", step=step))
        self._best = step

    def end(self, error: str = "") -> None:
        """Say that training is over: no audit follows unless it is resumed. `error` is what it broke off with."""
        self._append_line(_Line("end", reason=error))

    def _drop(self) -> None:
        """Let go of the arrays that are not to be kept."""
        if self._keep is None:
            return
        kept = {held.place for held in self._held[-self._keep :]}
        kept |= {held.place for held in self._held if held.trigger == "reference" or held.step == self._best}
        kept |= {held.rests_on for held in self._held if held.place in kept}
        gone = tuple(held.name for held in self._held if held.place not in kept)
        if gone:
            self._append_line(_Line("dropped", names=gone))
            self._held = [held for held in self._held if held.place in kept]
            for name in gone:
                (self.path / name).unlink(missing_ok=True)

    def _take_over(self, run: Run) -> None:
        """Go on from the audits of `run`, and clear up after whoever was killed while it wrote them."""
        self._audits, self._best = len(run.audits), run.best_step
        lines = [line.arrays if run.has_scores(i) else None for i, line in enumerate(run._arrays)]
        self._held = [_Held.of(name, i, run.audits[i]) for i, name in enumerate(lines) if name is not None]
        _clear_leftovers(self.path)
        if self._keep is None:
            return
        names = {held.name for held in self._held}
        for file in (self.path / "audits").glob("*.npz"):
            # Dropped, of an audit that was rewound, or never named by a line.
            if f"audits/{file.name}" not in names:
                file.unlink()

    def _append_line(self, line: _Line) -> None:
        body = json.loads(_LINE.dump_json(line, exclude_defaults=True))
        body["previous"] = self._last_sha256
        canonical = _canonical(body, allow_nan=False)
        digest = _sha256(canonical)
        text = _BEFORE_BODY + canonical + _AFTER_BODY % digest.encode()
        path = self.path / AUDITS
        size = path.stat().st_size
        try:
            with path.open("ab") as file:
                file.write(text + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            # A full disk may have taken half of the line, and the next one must not be glued to it.
            os.truncate(path, size)
            raise _named(error, path) from error
        self._last_sha256 = digest


def read_run(path: str | Path) -> Run:
    """Read the run directory at `path`, or the only one below it.

    Raises:
        RecordError: there is no run directory, or a file of it is missing, changed or of another version; the message
            names the file and the line.
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
        manifest = _read_manifest(root / MANIFEST)
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
        return Run(root, manifest, audits, torn, replay.ended, replay.failed, kept, bests, failures, dropped)

    def _parse(self, file: BinaryIO, path: Path) -> tuple[int, bool]:
        """Take the rest of the file in, line by line; how many there are, and whether the last one was cut off."""
        before = self._lines
        for raw in file:
            if not raw.endswith(b"\n"):
                return self._lines - before, True
            self._lines += 1
            line, self._last_sha256 = _parse_line(raw, f"{path}, line {self._lines}", self._last_sha256)
            self._replay.add(line)
            self._offset += len(raw)
        return self._lines - before, False


@dataclass
class _Replay:
    """What the lines read so far come to: see `Run`."""

    kept: list[_Line] = field(default_factory=list)
    bests: list[int] = field(default_factory=list)
    failures: list[int] = field(default_factory=list)
    dropped: set[str] = field(default_factory=set)
    ended: bool = False
    failed: str = ""

    def add(self, line: _Line) -> None:
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
            self.kept = [k for k in self.kept if k.audit is not None and _stays(k.audit, limit)]
            self.bests = [best for best in self.bests if best <= limit]
            self.failures = [step for step in self.failures if step <= limit]


def _stays(audit: AuditSummary, step: int) -> bool:
    """Whether an audit is one of a training that is resumed at `step`."""
    return audit.step <= step and audit.trigger != "end"


def _read_manifest(path: Path) -> Manifest:
    try:
        outer = json.loads(path.read_bytes())
        body, digest = outer["body"], outer["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RecordError(f"{path}: is not a whole manifest ({type(error).__name__}): record the run again") from error
    if _sha256(_canonical(body)) != digest:
        raise RecordError(f"{path}: its checksum does not match its content: it was changed or damaged")
    version = body.get("schema_version") if isinstance(body, dict) else None
    if version != SCHEMA_VERSION:
        raise RecordError(f"{path}: has schema version {version!r}, this tool reads {SCHEMA_VERSION}: use the other's")
    try:
        return Manifest.model_validate_json(json.dumps(body))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise RecordError(f"{path}: {key}: {first['msg']}") from error


def _whole_lines(content: bytes) -> list[bytes]:
    return content.split(b"\n")[:-1]


def _kind(raw: bytes) -> str:
    return str(json.loads(raw)["body"]["kind"])


def _parse_line(raw: bytes, place: str, previous: str) -> tuple[_Line, str]:
    """A line that follows one with the checksum `previous`, and its own."""
    try:
        outer = json.loads(raw)
        body, digest = outer["body"], outer["sha256"]
        # As `_append_line` writes it: to write its content anew would take half of the time.
        canonical = raw[len(_BEFORE_BODY) : -len(_AFTER_BODY % digest.encode()) - 1]
        if not raw.startswith(_BEFORE_BODY) or _sha256(canonical) != digest:
            canonical = _canonical(body)
        intact = _sha256(canonical) == digest and body["previous"] == previous
        line = _LINE.validate_json(canonical) if intact else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RecordError(f"{place}: is not a record ({type(error).__name__}): it was damaged") from error
    if line is None:
        raise RecordError(f"{place}: its checksum does not match: it was changed, moved or damaged")
    return line, digest


def _size(path: Path) -> int | None:
    """None where there is no such file; one look, as it may go between two."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size if S_ISREG(status.st_mode) else None


def _check_arrays(root: Path, line: _Line) -> None:
    path = _array_path(root, line)
    size = _size(path)
    if size != line.arrays_bytes:
        got, kind = ("is missing", MissingEvidenceError) if size is None else (f"has {size} bytes", RecordError)
        raise kind(f"{path}: {got}, its record says {line.arrays_bytes}: the run directory is incomplete")


def _array_path(root: Path, line: _Line) -> Path:
    name = Path(line.arrays or "")
    if name.parent != Path("audits") or name.suffix != ".npz":
        raise RecordError(f"{root / AUDITS}: names the array file {line.arrays!r}, which is not in audits/")
    return root / name


def _read_arrays(root: Path, line: _Line) -> tuple[Path, bytes]:
    path = _array_path(root, line)
    try:
        content = path.read_bytes()
    except OSError as error:
        # Dropped since the run was read, or lost.
        kind = MissingEvidenceError if isinstance(error, FileNotFoundError) else RecordError
        raise kind(f"{path}: cannot be read ({error.strerror})") from error
    if _sha256(content) != line.arrays_sha256:
        raise RecordError(f"{path}: its checksum does not match its record: it was changed or damaged")
    return path, content


def _set_aside(path: Path) -> None:
    """Move the run in `path` to `path/previous/<run id>`, so that `path` always holds the latest run."""
    # From here on no run is here, even where no more than this can be done, as on a full disk.
    if (path / MANIFEST).exists():
        (path / MANIFEST).replace(path / _LEAVING)
    try:
        run_id = _read_manifest(path / _LEAVING).run_id
    except RecordError:
        run_id = f"unreadable-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}"
    # The same run may be resumed here more than once; a manifest from elsewhere does not choose the folder.
    name = Path(run_id).name.lstrip(".") or "unnamed"
    taken = 1
    target = path / PREVIOUS / name
    # One without a manifest is what a kill left of this move: it is gone on with.
    while (target / MANIFEST).exists():
        taken += 1
        target = path / PREVIOUS / f"{name}-{taken}"
    target.mkdir(parents=True, exist_ok=True)
    for item in path.iterdir():
        if item.name not in (PREVIOUS, _LEAVING):
            shutil.move(item, target / item.name)
    (path / _LEAVING).replace(target / MANIFEST)


def _clear_leftovers(path: Path) -> None:
    """Remove what writers left that were killed while they wrote a file whole."""
    for folder in (path, path / "audits"):
        for file in folder.glob(".*.tmp"):
            writer = file.name.split(".")[-2]
            if writer.isdigit() and not _is_another(int(writer)):
                file.unlink(missing_ok=True)


def _is_another(process: int) -> bool:
    """Whether a process of this number lives that is not this one."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        # It is someone else's.
        return True
    return True


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is either whole or absent, and on disk when this returns."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise _named(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def manifest_bytes(manifest: Manifest) -> bytes:
    """The content of `manifest.json`."""
    body = manifest.model_dump(mode="json", by_alias=True)
    digest = _sha256(_canonical(body))
    return json.dumps({"body": body, "sha256": digest}, indent=1, allow_nan=False).encode() + b"\n"


def _named(error: OSError, path: Path) -> OSError:
    """The same error, with the file that a person knows: a full disk names none."""
    return OSError(error.errno, error.strerror, str(path))


def _write_manifest(path: Path, manifest: Manifest) -> None:
    write_whole(path / MANIFEST, manifest_bytes(manifest))


def _canonical(body: Any, allow_nan: bool = True) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=allow_nan).encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


_BEFORE_BODY, _AFTER_BODY = b'{"body":', b',"sha256":"%b"}'
_LINE: TypeAdapter[_Line] = TypeAdapter(_Line)
