"""Records that a training sent to Weights & Biases, brought back.

Enters: the path of a run or of an artifact in W&B. Leaves: its run directory, each file checked against the digest that
W&B has of it.
"""

from __future__ import annotations

from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING

from bias_audit.records.errors import MissingEvidenceError, RecordError
from bias_audit.records.runs import read_run

if TYPE_CHECKING:
    from wandb import Artifact

KIND = "bias-audit"
# Far beyond what a training leaves; it goes into a temporary folder, which may be in memory.
MOST_BYTES = 8 << 30
# States in which W&B says that a run did not end well.
_BROKEN_OFF = ("crashed", "failed", "killed")


def download(source: str, folder: Path) -> None:
    """Write the run directory that W&B has at `source` to `folder`.

    Args:
        source: `entity/project/run`, of which the newest audit is taken, or `entity/project/artifact:version`.
        folder: where to; made if it is not there.

    Raises:
        RecordError: there is no account, W&B does not know `source` or cannot be reached, or a file came damaged.
        MissingEvidenceError: nothing was audited in the run, or its last audit is not all there.

    Example:
        >>> download("acme/doctors/1mbku38n", Path("records"))  # doctest: +SKIP
    """
    import requests
    import wandb

    # W&B's own progress is of no interest where one line is expected.
    wandb.setup(settings=wandb.Settings(silent=True))
    try:
        artifact, state = (_artifact(source), "") if ":" in source else _newest(source)
        if any(entry.ref is not None for entry in artifact.manifest.entries.values()):
            raise RecordError(f"{source}: refers to files elsewhere, which no audit does: it was not sent by this tool")
        _check_files(source, artifact)
        artifact.download(root=str(folder))
        # Without this a download that broke off would do as well.
        artifact.verify(root=str(folder))
    except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
        raise RecordError(
            f"{source}: no such file or directory; it may be a path in W&B, which cannot be asked ({_first(error)}): "
            "run `wandb login` or set WANDB_API_KEY, and WANDB_BASE_URL for a server of your own"
        ) from error
    except RecordError:
        raise
    except (wandb.errors.Error, requests.RequestException, OSError, ValueError) as error:
        raise RecordError(
            f"{source}: no such file or directory, and as a path in W&B it cannot be had: {_first(error)}"
        ) from error
    if state in _BROKEN_OFF:
        run = read_run(folder)
        if run.ended and not run.failed:
            # A training that was resumed may have gone on for long before its next audit was due.
            raise MissingEvidenceError(
                f"{source}: its last audit ended a training, but W&B says that the run has {state} since: to judge "
                f"that audit, give {artifact.entity}/{artifact.project}/{artifact.name}"
            )


def _check_files(source: str, artifact: Artifact) -> None:
    """Raise if a file of the artifact would be written outside of the folder, or all of them are too large."""
    entries = artifact.manifest.entries
    # Whoever made the artifact chose the names of its files.
    outside = next((n for n in entries if PureWindowsPath(n).anchor or ".." in PureWindowsPath(n).parts), None)
    if outside is not None:
        raise RecordError(f"{source}: holds a file {outside!r:.200}, which no audit does: it was not sent by this tool")
    size = sum(entry.size or 0 for entry in entries.values())
    if size > MOST_BYTES:
        raise RecordError(f"{source}: has {size} bytes, expected at most {MOST_BYTES}: download it yourself")


def _artifact(source: str) -> Artifact:
    import wandb

    found: Artifact = wandb.Api().artifact(source)
    if found.type != KIND:
        raise RecordError(f"{source}: is an artifact of type {found.type!r}, expected {KIND!r}")
    return found


def _newest(source: str) -> tuple[Artifact, str]:
    """The last audit that a run has sent, and the state of the run."""
    import wandb

    run = wandb.Api().run(source)
    audits = [artifact for artifact in run.logged_artifacts() if artifact.type == KIND]
    if not audits:
        raise MissingEvidenceError(f"{source}: W&B has the run, but it has sent no audit")
    names = sorted({artifact.name.partition(":")[0] for artifact in audits})
    if len(names) > 1:
        place = f"{audits[0].entity}/{audits[0].project}"
        given = ", ".join(f"{place}/{name}:latest" for name in names[:5])
        raise RecordError(f"{source}: holds the audits of {len(names)} callbacks: name one of them: {given}")
    newest = max(audits, key=lambda artifact: int(artifact.version.removeprefix("v")))
    if newest.state != "COMMITTED":
        raise MissingEvidenceError(f"{source}: W&B no longer has its last audit, {newest.name}: it is {newest.state}")
    return newest, str(run.state)


def _first(error: Exception) -> str:
    """What it says on its first line."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
