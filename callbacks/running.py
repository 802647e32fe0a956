"""An audit without a training: what `bias-audit run` does.

Enters: `RunOptions`: where the model, its weights and the audit set are, and what the Trainer is told. Leaves: a run
directory like any other, with its page. Lightning brings the devices, the ranks and the precision.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from torch.multiprocessing.spawn import ProcessException, ProcessRaisedException
from torch.utils.data import DataLoader, TensorDataset

from bias_audit.audit import Auditor
from bias_audit.callbacks.loading import Loaded, load
from bias_audit.callbacks.progress import UNDER_WAY
from bias_audit.callbacks.trainer import ranks_of
from bias_audit.data.annotations import Misfit
from bias_audit.data.declared import read_declared
from bias_audit.imports import import_from_here
from bias_audit.plan import AuditPlan
from bias_audit.progress import Progress
from bias_audit.records.writing import RunDirectory
from bias_audit.redaction import described
from bias_audit.report.page import write_report
from bias_audit.wording import in_short

_LOGGERS = (
    "pytorch_lightning",
    "lightning_fabric",
    "lightning.pytorch",
    "lightning.fabric",
    "torch.multiprocessing.spawn",
)


@dataclass(frozen=True)
class RunOptions:
    """What to audit, and on what.

    `model` is `package.module:name`: a function or class that gives an `nn.Module`, with `weights` (a state dict, a
    Lightning checkpoint or a .safetensors file) or as it is; or with `checkpoint` the LightningModule class that wrote
    it. `data` declares the audit set (see `data.declared`), `out` is the run directory. `layer` to `seed` are those of
    `AuditPlan`; without `thumbnails` no picture is written; the rest is the Trainer's.
    """

    model: str
    data: Path
    out: Path
    checkpoint: Path | None = None
    weights: Path | None = None
    trust_checkpoint: bool = False
    policy: Path | None = None
    training: Path | None = None
    layer: str | None = None
    batch_size: int = AuditPlan.batch_size
    max_samples: int = AuditPlan.max_samples
    seed: int = AuditPlan.seed
    thumbnails: bool = True
    accelerator: str = "auto"
    devices: str = "1"
    num_nodes: int = 1
    strategy: str = "auto"
    precision: str | None = None


def audit_checkpoint(options: RunOptions) -> Path:
    """Audit a model as it is and return the run directory; an earlier run in its place moves to `previous/` in it.

    Whatever names a module is imported from the current directory too. On ranks other than the first this exits the
    process: what follows an audit is the first's to do.

    Raises:
        ValueError: the model, its weights or the audit set cannot be loaded, do not fit each other, or the Trainer
            cannot do what it is told; a sample does not decode, on whichever rank.
        OSError: the run directory cannot be written.

    Example:
        >>> audit_checkpoint(RunOptions("mine:Net", Path("data.yaml"), Path("run"), Path("a.ckpt")))  # doctest: +SKIP
        PosixPath('run')
    """
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out {options.out}: is a file: name a directory")
    import_from_here()
    audit_set = read_declared(options.data)
    plan = AuditPlan(
        layer=options.layer, batch_size=options.batch_size, max_samples=options.max_samples, seed=options.seed
    )
    auditor = Auditor(audit_set, plan, options.policy, options.training, options.thumbnails)
    audit = _Audit(
        load(
            options.model,
            checkpoint=options.checkpoint,
            weights=options.weights,
            trust=options.trust_checkpoint,
            seed=options.seed,
        ),
        auditor,
        options.out,
    )
    with _quiet():
        trainer = _trainer(options)
        try:
            trainer.test(audit, DataLoader(TensorDataset(torch.zeros(1))), verbose=False)
        except ProcessException as error:
            raise raised_by_rank(error) from error
        except SystemExit as error:
            # Lightning's way to be interrupted, with an exit code that means "violated" here.
            if isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from error
            raise ValueError(_exited(error)) from error
    if not trainer.is_global_zero:
        # No error code, either: Lightning would kill the first rank, which has the same error to report.
        raise SystemExit(0)
    if audit.failure is not None:
        raise audit.failure
    write_report(options.out)
    return options.out


class _Audit(pl.LightningModule):
    """A test of nothing, at whose end the audit is made."""

    def __init__(self, loaded: Loaded, auditor: Auditor, out: Path) -> None:
        super().__init__()
        # As a part of this module it goes to the device; its layers keep the names that they have on their own.
        self.model = loaded.model
        self.failure: Exception | None = None
        self._loaded, self._auditor, self._out = loaded, auditor, out
        self._maker = os.getpid()

    def test_step(self, *_: Any) -> None:
        """Nothing."""

    def on_test_epoch_end(self) -> None:
        """Audit, on all ranks together. What fails is kept: an exception in the Trainer may kill the first rank."""
        try:
            self._audit()
        except (Exception, SystemExit) as error:
            failure = ValueError(_exited(error)) if isinstance(error, SystemExit) else error
            if os.getpid() != self._maker:
                # A spawned process has no other way to say so.
                raise failure from error.__cause__
            self.failure = failure

    def _audit(self) -> None:
        context, ranks = self.trainer.precision_plugin.forward_context, ranks_of(self.trainer)
        directory: RunDirectory | None = None
        self._auditor.prepare(self.model, context, ranks)
        with ranks.together():
            if self.trainer.is_global_zero:
                # Before anything is measured: from now on an earlier run in the same place is no evidence of this one.
                directory = RunDirectory.create(self._out, self._auditor.manifest(self.model), self._auditor.sheet)
        try:
            with _bar(self.trainer.is_global_zero) as progress:
                result = self._auditor.run(
                    self.model,
                    step=self._loaded.step,
                    epoch=self._loaded.epoch,
                    trigger="test",
                    forward_context=context,
                    progress=progress,
                    ranks=ranks,
                )
        except (Exception, SystemExit) as error:
            if directory is not None:
                directory.end(described(error))
            raise
        if directory is not None:
            directory.append(result)
            directory.end()


def _exited(error: SystemExit) -> str:
    return f"the model ended the process (sys.exit({error.code!r})), expected it to return its outputs"


def raised_by_rank(error: ProcessException) -> ValueError:
    """What a spawned rank raised, without its traceback; or how it ended, where it had no time to say so."""
    if not isinstance(error, ProcessRaisedException):
        return ValueError(f"a rank is gone: {error}")
    # All of a traceback is indented but for its first line, and what was raised, which comes last.
    trace = str(error).rpartition("Traceback (most recent call last):\n")[2]
    raised = re.sub(r"\A(?:[ \t].*\n)*", "", trace).strip()
    name, _, text = raised.partition(": ")
    kind = name.rpartition(".")[2]
    if kind == "Misfit":
        return Misfit(text.splitlines())
    known = kind in ("ValueError", "OSError", "RankError")
    return ValueError(text if known else f"{kind}: {text}" if text else kind)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's lines about devices, its advice on the one batch that only opens the door, and which of the
    spawned ranks are ended when one fails."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _bar(shown: bool) -> Iterator[Progress]:
    screen = Console(stderr=True)
    columns = (TextColumn(UNDER_WAY), BarColumn(), MofNCompleteColumn(), TextColumn("images"), TimeRemainingColumn())
    with Bars(*columns, console=screen, transient=True, disable=not (shown and screen.is_terminal)) as bars:
        task = bars.add_task(UNDER_WAY, total=None)
        yield lambda done, of: bars.update(task, completed=done, total=of)


def _trainer(options: RunOptions) -> pl.Trainer:
    told = {name: getattr(options, name) for name in ("accelerator", "devices", "num_nodes", "strategy", "precision")}
    try:
        return pl.Trainer(
            **told,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            # The audit differentiates.
            inference_mode=False,
            use_distributed_sampler=False,
        )
    except Exception as error:
        said = ", ".join(f"{name} {value}" for name, value in told.items() if value is not None)
        raise ValueError(f"the Trainer cannot be made with {said}: {in_short(error)}") from error
