"""Where evidence comes from: what a person names, made a run directory that can be read, and judged.

Enters: a path on this machine, or one in Weights & Biases, or a checkpoint that is audited on the spot. Leaves: a run
directory, read by `records.runs.read_run` like any other; or what the gate says of it.

wandb is imported only for a path in Weights & Biases, and torch only for a checkpoint.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

from bias_audit.gate.gate import Rules, no_evidence, run_gate
from bias_audit.gate.result import FailOn, GateResult, OnInconclusive
from bias_audit.policies.file import PolicyFile, read_policy
from bias_audit.records.errors import MissingEvidenceError, RecordError
from bias_audit.records.files import COPIES, MANIFEST, find_run
from bias_audit.records.runs import read_run

# What W&B takes as the name of a user or team, a project, a run, or an artifact and its version.
_WANDB = re.compile(r"[\w.-]+/[^/:\\#?%\x00-\x1f]+/[^/:\\#?%\x00-\x1f]+(:[^/:\\#?%\x00-\x1f]+)?", re.ASCII)


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
    from bias_audit.callbacks.wandb.source import download

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
        >>> with audited("last.ckpt", model="mine:Net", data=Path("data.yaml")) as path:  # doctest: +SKIP
        ...     run = read_run(path)
    """
    from bias_audit.callbacks.running import RunOptions, audit_checkpoint
    from bias_audit.imports import import_from_here, imported

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


def judge_source(
    source: str,
    policy: Rules = None,
    *,
    opened: AbstractContextManager[Path] | None = None,
    baseline: str | Path | None = None,
    checkpoint: str | Path | None = None,
    trust_checkpoint: bool = False,
    fail_on: FailOn = "error",
    on_inconclusive: OnInconclusive = "fail",
    exit_zero: bool = False,
) -> GateResult:
    """Judge what is recorded at `source`: a run directory, or what else `open_run` takes.

    Evidence that is not there at all is a doubt like any other.

    Args:
        opened: the run directory that was made of the source, where it is none by itself.
        baseline: a baseline's file, or a run directory.
        checkpoint: what is to be merged; `trust_checkpoint` unpickles objects of any kind in it.

    Raises:
        ValueError: as `run_gate`; or nothing has the name of the source, the records or the baseline are damaged, or
            the checkpoint cannot be read.
        OSError: something cannot be read.

    Example:
        >>> judge_source("runs/today", "audit.yaml", baseline="bias-audit-baseline.jsonl")  # doctest: +SKIP
    """
    from bias_audit.checkpoints import checkpoint_step
    from bias_audit.gate.baseline_file import read_baseline

    file = policy if isinstance(policy, PolicyFile) or policy is None else read_policy(policy)
    against = None if baseline is None else read_baseline(baseline)
    step, doubts = None, []
    if checkpoint is not None:
        try:
            step = checkpoint_step(checkpoint, trust_checkpoint)
        except MissingEvidenceError as error:
            doubts.append(str(error))
    try:
        with open_run(source) if opened is None else opened as path:
            run = read_run(path)
            if opened is not None and checkpoint is None and run.audits:
                # What was audited here and now is what is to be merged.
                step = run.audits[-1].step
            return run_gate(
                run,
                file,
                baseline=against,
                checkpoint_step=step,
                fail_on=fail_on,
                on_inconclusive=on_inconclusive,
                exit_zero=exit_zero,
                source=source,
                doubts=doubts,
            )
    except MissingEvidenceError as error:
        return no_evidence(
            source, str(error), file, fail_on=fail_on, on_inconclusive=on_inconclusive, exit_zero=exit_zero
        )
