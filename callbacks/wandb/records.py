"""An audit's records in a W&B run: as artifacts, and as a copy in W&B's directory of the run.

Enters: an open W&B run, and a run directory. Leaves: artifacts from which `bias-audit gate` judges each audit, and on
this machine the same files in W&B's directory of the run: an artifact of an offline run only says where its files are.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from bias_audit.atomic import write_whole
from bias_audit.callbacks.sinks import Session
from bias_audit.records.arrays import sheet_bytes
from bias_audit.records.files import AUDITS, CHANGED, COPIES, MANIFEST, PREVIOUS, REPORT, SAMPLES, WANDB
from bias_audit.records.log import manifest_bytes
from bias_audit.records.results import AuditResult
from bias_audit.redaction import described

if TYPE_CHECKING:
    import wandb

# Where in the run directory it is said which W&B run has it.


class SentRecords:
    """What `run` is given of the records of one session, under the callback's name as W&B has it, `word`.

    Of a session whose pictures are to stay, outlines go in their place, and a manifest that says so.
    """

    def __init__(self, run: wandb.Run, session: Session, word: str) -> None:
        self._run, self._session, self._word = run, session, word
        self._instead: TemporaryDirectory[str] | None = None
        self._refused = ""

    @property
    def bare(self) -> bool:
        """Whether no picture may leave the run directory."""
        return self._session.manifest.thumbnails == "local"

    def start(self, audits: int) -> None:
        """Note that W&B has so many audits, in the run directory where it is sent."""
        if not self._is_sent:
            return
        if self.bare:
            # The manifest says that what lies beside it holds no picture.
            self._instead = TemporaryDirectory(prefix="bias-audit-")
            manifest = self._session.manifest.model_copy(update={"thumbnails": False})
            write_whole(self._file(SAMPLES), sheet_bytes(self._session.sheet))
            write_whole(self._file(MANIFEST), manifest_bytes(manifest))
        self.note(audits)
        # What was the last word of an earlier stage is none until an audit of this one has been sent.
        (self._copy / MANIFEST).unlink(missing_ok=True)

    def note(self, audits: int) -> None:
        """Note in the run directory which W&B run was given how many of its audits."""
        if self._is_sent:
            write_whole(self._session.path / WANDB, where(self._run, self._session.name, audits))

    def send(self, result: AuditResult, metadata: dict[str, Any]) -> bool:
        """The run directory as of this audit: whoever downloads it can run the gate on it; False where it was not sent.

        Nothing is lost then: a later artifact holds this audit, too.
        """
        import wandb

        records, arrays = _records_until(self._session.path, result)
        if not records:
            return False
        artifact = wandb.Artifact(self._artifact_name, type="bias-audit", metadata=metadata)
        with artifact.new_file(AUDITS, "wb") as file:
            file.write(records)
        # What stays as it is W&B reads when it comes to it, and sends once; of what may go it takes a copy.
        stays: Literal["immutable", "mutable"] = (
            "immutable" if self._session.keep is None and not self.bare else "mutable"
        )
        try:
            artifact.add_file(str(self._file(MANIFEST)), skip_cache=True)
            for name in (SAMPLES, *arrays):
                artifact.add_file(str(self._file(name)), name=name, skip_cache=True, policy=stays)
        except (OSError, ValueError):
            if all((self._session.path / name).is_file() for name in arrays):
                raise
            # Dropped since: this audit's directory is not there any more.
            return False
        if not self._log_artifact(artifact, ["latest", f"step-{result.step}"]):
            return False
        self._keep_copy(records, arrays)
        return True

    def send_all(self, metadata: dict[str, Any], page: str | None) -> None:
        """The run directory as it is at the end; where no picture may leave it, with `page` in place of its own.

        Raises:
            RuntimeError: W&B did not take it.
        """
        import wandb

        path = self._session.path
        artifact = wandb.Artifact(self._artifact_name, type="bias-audit", metadata=metadata)
        # Whatever else lies in the run directory may show pictures.
        items = [path / AUDITS, path / "audits", self._file(SAMPLES), self._file(MANIFEST)]
        for item in sorted(items if self.bare else path.iterdir()):
            if item.is_dir() and item.name != PREVIOUS:
                artifact.add_dir(str(item), name=item.name, skip_cache=True)
            elif item.is_file():
                artifact.add_file(str(item), skip_cache=True)
        if self.bare and page is not None:
            with artifact.new_file(REPORT, "w", encoding="utf-8") as file:
                file.write(page)
        taken = self._log_artifact(artifact, ["latest", "final"])
        arrays = [f"audits/{file.name}" for file in (path / "audits").glob("*.npz")]
        changed = [CHANGED] if (path / CHANGED).exists() and not self.bare else []
        self._keep_copy((path / AUDITS).read_bytes(), (*arrays, *changed))
        if not taken:
            raise RuntimeError(f"W&B did not take the run directory ({self._refused})")

    @property
    def _is_sent(self) -> bool:
        return self._session.path.is_dir() and not self._run.disabled

    @property
    def _artifact_name(self) -> str:
        return f"{self._word}-{self._session.manifest.run_id}"

    @property
    def _copy(self) -> Path:
        return Path(self._run.dir).parent / COPIES / self._word

    def _file(self, name: str) -> Path:
        """A file of the run directory, or what is sent in its place."""
        if self._instead is not None and name in (SAMPLES, MANIFEST):
            return Path(self._instead.name) / name
        return self._session.path / name

    def _log_artifact(self, artifact: wandb.Artifact, aliases: list[str]) -> bool:
        """Whether W&B took it, about which it asks the network at once."""
        import wandb

        try:
            self._run.log_artifact(artifact, aliases=aliases)
        except wandb.Error as error:
            self._refused = described(error)
            return False
        return True

    def _keep_copy(self, records: bytes, names: Sequence[str]) -> None:
        """Keep the records in W&B's directory of the run."""
        folder = self._copy
        (folder / "audits").mkdir(parents=True, exist_ok=True)
        for name in (SAMPLES, *names):
            _link(self._file(name), folder / name)
        write_whole(folder / AUDITS, records)
        # The manifest comes last: a directory that has one is complete.
        write_whole(folder / MANIFEST, self._file(MANIFEST).read_bytes())
        for file in (folder / "audits").iterdir():
            if f"audits/{file.name}" not in names:
                # A link to arrays that were dropped would keep them on the disk.
                file.unlink()


def where(run: wandb.Run, name: str, audits: int) -> bytes:
    """Which W&B run was given how many of the recorded audits, for `bias-audit dashboard push`."""
    facts = {"entity": run.entity, "project": run.project, "id": run.id, "offline": run.offline, "name": name}
    return json.dumps(facts | {"audits": audits}).encode() + b"\n"


def _link(source: Path, target: Path) -> None:
    """The same file in another place, which costs nothing: records are replaced, never changed. A copy elsewhere."""
    if target.exists() and target.samefile(source):
        return
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        # Another file system, or one without links.
        shutil.copyfile(source, target)


def _records_until(path: Path, result: AuditResult) -> tuple[bytes, tuple[str, ...]]:
    """The lines up to this audit's, which the training thread may have gone beyond, and the arrays they name.

    With it come the lines that say which arrays were dropped for its sake. Nothing where the records do not have it
    (their own sink has said why), or where arrays that it goes with have been dropped since.
    """
    try:
        lines = (path / AUDITS).read_bytes().split(b"\n")[:-1]
    except OSError:
        return b"", ()
    end, dropped = len(lines), False
    for number in reversed(range(len(lines))):
        body = json.loads(lines[number])["body"]
        audit, kind = body.get("audit", {}), body["kind"]
        named = audit.get("step"), audit.get("created"), audit.get("trigger", "manual")
        if named == (result.step, result.created, result.trigger):
            names = (f"audits/{file.name}" for file in sorted((path / "audits").glob("*.npz")))
            return b"\n".join(lines[:end]) + b"\n", tuple(name for name in names if name <= body["arrays"])
        dropped = dropped or kind == "dropped"
        if kind not in ("dropped", "best"):
            if dropped:
                break
            end = number
    return b"", ()
