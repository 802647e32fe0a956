"""Where evidence comes from: what a person names, made a run directory that can be read.

Enters: a path on this machine, or one in Weights & Biases, or a checkpoint that is audited on the spot; and the
checkpoint that is to be released. Leaves: a run directory, read by `records.read_run` like any other, and the step that
the checkpoint was saved at.

wandb is imported only for a path in Weights & Biases, and torch only for a checkpoint.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bias_audit.records.results import MissingEvidenceError, RecordError
from bias_audit.records.runs import COPIES, MANIFEST, find_run

# What W&B takes as the name of a user or team, a project, a run, or an artifact and its version.
_WANDB = re.compile(r"[\w.-]+/[^/:\\#?%\x00-\x1f]+/[^/:\\#?%\x00-\x1f]+(:[^/:\\#?%\x00-\x1f]+)?", re.ASCII)
# FSDP and ModelParallelStrategy save a checkpoint as a directory, with all that is not sharded in this file.
_SHARDED = "meta.pt"


@contextmanager
def open_run(source: str | Path) -> Iterator[Path]:
    """The run directory that `source` names, as long as the context lasts.

    Args:
        source: a run directory or one above exactly one such; the directory of a W&B run on this machine, or the
            `.wandb` file in it; or, where nothing on this machine has that name, the path of a run in Weights & Biases,
            `entity/project/run`, or of an artifact there, `entity/project/artifact:version`. What is there is
            downloaded into a temporary folder, which is deleted when the context ends; of a run its newest audit.

    Raises:
        RecordError: nothing has that name; or W&B does not know it, cannot be reached, or has no account to ask for.
        MissingEvidenceError: it is a W&B run in which nothing was audited, or whose last audit is not all there.

    Example:
        >>> from bias_audit.records.runs import read_run
        >>> with open_run("runs/today") as path:  # doctest: +SKIP
        ...     run = read_run(path)
    """
    if os.path.lexists(source):
        yield local_run(Path(source))
        return
    name = str(source)
    if not _WANDB.fullmatch(name) or name.startswith("."):
        raise RecordError(
            f"{name}: no such file or directory: give a run directory (it holds {MANIFEST}) or one above it, the "
            "directory of a W&B run, or a path in W&B: entity/project/run or entity/project/artifact:version"
        )
    from bias_audit.callbacks.wandb_source import download

    with TemporaryDirectory(prefix="bias-audit-") as folder:
        path = Path(folder) / "run"
        try:
            download(name, path)
            yield find_run(path)
        except RecordError as error:
            # A path that is about to be deleted tells nobody anything.
            raise type(error)(str(error).replace(str(path), name)) from error


@contextmanager
def audited(
    source: str | Path,
    *,
    model: str,
    data: Path,
    out: Path | None = None,
    policy: Path | None = None,
    trust: bool = False,
) -> Iterator[Path]:
    """The run directory of an audit of the checkpoint `source`, made now; it lasts as long as the context.

    Args:
        source: a Lightning checkpoint where `model` is the class that wrote it, else a state dict or a checkpoint with
            the model's weights.
        model: `package.module:name` of a LightningModule class, or of what gives an `nn.Module`.
        data: the YAML file that declares the audit set.
        out: where the run directory is to stay; by default it is temporary.
        policy: what is recorded as the policy of the audit.
        trust: unpickle objects of any kind, which runs code that the file chooses.

    Raises:
        ValueError: the model, its weights, the audit set or the policy cannot be loaded, or do not fit each other.
        OSError: the run directory cannot be written.

    Example:
        >>> with audited("last.ckpt", model="mine:Net", data=Path("audit.yaml")) as path:  # doctest: +SKIP
        ...     run = read_run(path)
    """
    from bias_audit.callbacks.running import RunOptions, audit_checkpoint
    from bias_audit.data.declared import import_from_here, imported

    import_from_here()
    written = hasattr(imported(model, "--model"), "load_from_checkpoint")
    path = Path(source)
    with nullcontext(out) if out is not None else TemporaryDirectory(prefix="bias-audit-") as folder:
        options = RunOptions(
            model,
            data,
            Path(folder),
            checkpoint=path if written else None,
            weights=None if written else path,
            trust_checkpoint=trust,
            policy=policy,
        )
        yield audit_checkpoint(options)


def local_run(path: Path) -> Path:
    """The run directory at `path`, in or below it; of a W&B run on this machine the copy that it keeps.

    Raises:
        RecordError: there is none, or more than one, or `path` is a file of another kind.
        MissingEvidenceError: it is a W&B run in which nothing was audited.
    """
    log = path.suffix == ".wandb" and path.is_file()
    folder = path.parent if log else path
    if not folder.is_dir():
        raise RecordError(
            f"{path}: is a file, expected a run directory (it holds {MANIFEST}), one above it, or a W&B run: to judge "
            "a checkpoint give its run directory and `--checkpoint`, or audit it on the spot with `--model` and "
            "`--data`"
        )
    if (folder / COPIES).is_dir():
        return find_run(folder / COPIES)
    try:
        # What else lies about a log is not of its run.
        if not log:
            return find_run(folder)
    except MissingEvidenceError:
        if not any(folder.glob("run-*.wandb")):
            raise
    raise MissingEvidenceError(
        f"{path}: is a W&B run that keeps no audits: nothing was audited in it, or nothing was sent yet: give the run "
        "directory, or where W&B has it its path, entity/project/run"
    )


def checkpoint_step(path: str | Path, trust: bool = False) -> int:
    """The step at which Lightning saved a checkpoint: evidence from before it is stale.

    Tensors are not read, so that a checkpoint of any size is dated at once.

    Args:
        path: a checkpoint file, or the directory of a sharded one.
        trust: unpickle objects of any kind, which runs code that the file chooses.

    Raises:
        ValueError: it is no file that torch can read, or it holds objects that only `trust` unpickles.
        MissingEvidenceError: it does not say at which step it was saved, as a state dict does not.

    Example:
        >>> checkpoint_step("checkpoints/last.ckpt")  # doctest: +SKIP
        1200
    """
    path = Path(path)
    file = path / _SHARDED if path.is_dir() else path
    if path.is_dir() and not file.exists():
        raise ValueError(f"{path}: is a directory without {_SHARDED}: give a checkpoint file, or a sharded checkpoint")
    undated = f"{path}: cannot be dated, so that the evidence may be older than it: it has no global_step"
    if file.suffix == ".safetensors":
        raise MissingEvidenceError(f"{undated}: give the Lightning checkpoint that the weights are from")
    found = _load(file, trust)
    step = found.get("global_step") if isinstance(found, dict) else None
    if step is None:
        raise MissingEvidenceError(f"{undated}: give a checkpoint that Lightning saved")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError(f"{path}: global_step: expected a count of steps, got {step!r}: it is no Lightning checkpoint")
    return step


def _load(path: Path, trust: bool) -> Any:
    """What `torch.save` wrote to `path`, less the content of its tensors."""
    import torch

    try:
        with warnings.catch_warnings():
            # Advice on how it was pickled.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="meta", weights_only=not trust)
    except (FileNotFoundError, PermissionError) as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:
        # A damaged file raises whatever its parts do: RuntimeError, EOFError, OSError, struct.error ...
        beyond = re.search(r"GLOBAL (\S+)", str(error))
        if beyond is not None and not trust:
            raise ValueError(
                f"{path}: holds more than weights ({beyond.group(1)}), and to load that may run code: if you trust who "
                "wrote it, add --trust-checkpoint"
            ) from error
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise ValueError(f"{path}: is not a checkpoint that torch can read ({reason})") from error
