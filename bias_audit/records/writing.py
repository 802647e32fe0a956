"""The writer of a run directory: a kill at any moment leaves every earlier audit whole.

Enters: a `Manifest` and a `SampleSheet` once, then an `AuditResult` per audit. Leaves: the files of a run directory.

An audit's arrays are written, synced and renamed into place before its line is appended and synced, so a line is never
without its arrays. `resume` cuts a half-written last line, and the line that says training is over, which it is not
where it goes on. Where only the arrays of the newest audits are kept, a line that names the others is synced before
their files go.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from bias_audit.atomic import clear_leftovers, named, write_whole
from bias_audit.records.arrays import changed_bytes, scores_bytes, sheet_bytes
from bias_audit.records.errors import RecordError
from bias_audit.records.files import ARRAYS, AUDITS, CHANGED, MANIFEST, OWN, PREVIOUS, SAMPLES
from bias_audit.records.log import Line, kind_of, line_bytes, manifest_bytes, read_manifest, sha256, whole_lines
from bias_audit.records.manifest import Manifest
from bias_audit.records.results import AuditResult, AuditSummary
from bias_audit.records.runs import Run, RunReader, stays
from bias_audit.records.samples import SampleSheet

# The manifest of a run that is being moved to `previous`.
_LEAVING = "manifest.previous.json"


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
        _clear_up(path)
        if (path / MANIFEST).exists() or (path / _LEAVING).exists():
            _set_aside(path)
        (path / ARRAYS).mkdir(parents=True, exist_ok=True)
        write_whole(path / SAMPLES, sheet_bytes(sheet))
        write_whole(path / AUDITS, b"")
        # The manifest comes last: a directory that has one is complete.
        write_whole(path / MANIFEST, manifest_bytes(manifest))
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
        path = Path(path)
        if path.resolve() == run.path.resolve():
            return cls._go_on(reader, run, manifest, sheet, step, keep)
        return cls._copy(path, run, manifest, sheet, step, keep)

    @classmethod
    def _copy(
        cls, path: Path, run: Run, manifest: Manifest, sheet: SampleSheet, step: int, keep: int | None
    ) -> RunDirectory:
        """A new run directory with the audits of `run` up to `step`."""
        directory = cls.create(path, manifest.model_copy(update={"run_id": run.manifest.run_id}), sheet, keep=keep)
        # Known before the audits are, of which it decides which keep their arrays.
        for best in [best for best in run.best_steps if best <= step][-1:]:
            directory.best(best)
        for failed in [failed for failed in run.failed_steps if failed <= step]:
            directory.fail(failed, f"see {run.path}")
        for index, audit in enumerate(run.audits):
            if not stays(audit, step):
                continue
            if run.has_scores(index):
                directory.append(AuditResult(**vars(audit), scores=run.scores(index)))
            else:
                directory._append_line(Line("audit", audit, samples=run.samples(index)))
                directory._audits += 1
        changed = run.changed()
        if changed is not None and changed.step <= step and manifest.thumbnails:
            write_whole(path / CHANGED, changed_bytes(changed))
        return directory

    @classmethod
    def _go_on(
        cls, reader: RunReader, run: Run, manifest: Manifest, sheet: SampleSheet, step: int, keep: int | None
    ) -> RunDirectory:
        """The same run directory, of which later audits than those up to `step` no longer count."""
        path = run.path
        whole = whole_lines((path / AUDITS).read_bytes())
        if run.ended:
            # From here on it is not over, even where no more than this can be done, as on a full disk.
            del whole[max(i for i, line in enumerate(whole) if kind_of(line) == "end") :]
        if run.ended or run.torn:
            os.truncate(path / AUDITS, sum(len(line) + 1 for line in whole))
        if manifest.thumbnails != run.manifest.thumbnails:
            # From now on there are to be pictures, or none.
            write_whole(path / SAMPLES, sheet_bytes(sheet))
        # The policy may have changed: what is judged from now on is judged by the new one.
        kept = {"run_id": run.manifest.run_id, "created": run.manifest.created}
        write_whole(path / MANIFEST, manifest_bytes(manifest.model_copy(update=kept)))
        last = json.loads(whole[-1])["sha256"] if whole else ""
        directory = cls(path, sum(kind_of(line) == "audit" for line in whole), last, keep)
        directory._append_line(Line("rewind", step=step))
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
        name = f"{ARRAYS}/{self._count:06d}.npz"
        write_whole(self.path / name, content)
        samples = len(result.scores.ids)
        self._append_line(Line("audit", result.summary(), name, len(content), sha256(content), samples))
        self._count += 1
        if self._keep is not None:
            # Without it the list would grow with every audit, and never be asked.
            self._held.append(_Held.of(name, self._audits, result))
        self._audits += 1
        self._drop()

    def fail(self, step: int, reason: str) -> None:
        """Write that the audit at `step` could not be made: what comes before it is not the latest word."""
        self._append_line(Line("failed", step=step, reason=reason))

    def best(self, step: int) -> None:
        """Write that the best checkpoint so far is that of `step`."""
        self._append_line(Line("best", step=step))
        self._best = step

    def end(self, error: str = "") -> None:
        """Say that training is over: no audit follows unless it is resumed. `error` is what it broke off with."""
        self._append_line(Line("end", reason=error))

    def _drop(self) -> None:
        """Let go of the arrays that are not to be kept."""
        if self._keep is None:
            return
        kept = {held.place for held in self._held[-self._keep :]}
        kept |= {held.place for held in self._held if held.trigger == "reference" or held.step == self._best}
        kept |= {held.rests_on for held in self._held if held.place in kept}
        gone = tuple(held.name for held in self._held if held.place not in kept)
        if gone:
            self._append_line(Line("dropped", names=gone))
            self._held = [held for held in self._held if held.place in kept]
            for name in gone:
                (self.path / name).unlink(missing_ok=True)

    def _take_over(self, run: Run) -> None:
        """Go on from the audits of `run`, and clear up after whoever was killed while it wrote them."""
        self._audits, self._best = len(run.audits), run.best_step
        names = [run.array_file(i) for i in range(len(run.audits))]
        self._held = [_Held.of(name, i, run.audits[i]) for i, name in enumerate(names) if name is not None]
        _clear_up(self.path)
        if self._keep is None:
            return
        held = {its.name for its in self._held}
        for file in (self.path / ARRAYS).glob("*.npz"):
            # Dropped, of an audit that was rewound, or never named by a line.
            if f"{ARRAYS}/{file.name}" not in held:
                file.unlink()

    def _append_line(self, line: Line) -> None:
        text, digest = line_bytes(line, self._last_sha256)
        path = self.path / AUDITS
        size = path.stat().st_size
        try:
            with path.open("ab") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            # A full disk may have taken half of the line, and the next one must not be glued to it.
            os.truncate(path, size)
            raise named(error, path) from error
        self._last_sha256 = digest


def _set_aside(path: Path) -> None:
    """Move the run in `path` to `path/previous/<run id>`, so that `path` always holds the latest run."""
    # From here on no run is here, even where no more than this can be done, as on a full disk.
    if (path / MANIFEST).exists():
        (path / MANIFEST).replace(path / _LEAVING)
    try:
        run_id = read_manifest(path / _LEAVING).run_id
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
    for name in OWN:
        if (path / name).exists():
            shutil.move(path / name, target / name)
    (path / _LEAVING).replace(target / MANIFEST)


def _clear_up(path: Path) -> None:
    """Remove what writers left in a run directory that were killed."""
    for folder in (path, path / ARRAYS):
        clear_leftovers(folder)
