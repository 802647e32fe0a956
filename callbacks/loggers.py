"""Which sinks the results of a training go to.

Enters: a Trainer with its loggers and its progress bar, and what the user asked for. Leaves: sinks, not yet started.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bias_audit.callbacks.background import Background
from bias_audit.callbacks.mlflow import MlflowSink
from bias_audit.callbacks.page import ReportSink
from bias_audit.callbacks.progress import ProgressBarSink
from bias_audit.callbacks.scalars import LoggerSink
from bias_audit.callbacks.sinks import RunDirectorySink, Sink
from bias_audit.callbacks.tensorboard import TensorBoardSink
from bias_audit.callbacks.trainer import kinds_of
from bias_audit.callbacks.wandb.sink import WandbSink, own_run
from bias_audit.redaction import without_secrets

if TYPE_CHECKING:
    from pytorch_lightning import Trainer


def sinks_for(
    trainer: Trainer, run_dir: Path, wandb: bool | Mapping[str, Any] | None, more: Sequence[Sink], on_error: str
) -> list[Sink]:
    """All sinks of a training, in the order in which they are called.

    Args:
        trainer: whose loggers and progress bar get results.
        run_dir: of the records.
        wandb: as of `BiasAuditCallback`.
        more: the user's own.
        on_error: "warn" goes on without a W&B run that cannot be had.

    Raises:
        Exception: whatever W&B raises, with `on_error` "raise".
    """
    # The page before the loggers: when training ends it is done when they upload it.
    sinks: list[Sink] = [RunDirectorySink(), ReportSink()]
    sinks += [sink for logger in trainer.loggers for sink in sinks_of(logger)]
    if trainer.progress_bar_callback is not None:
        sinks.append(ProgressBarSink(trainer.progress_bar_callback))
    sinks += more
    try:
        run = None if wandb is False else _wandb_run(trainer, wandb)
    except Exception as error:
        if on_error == "raise":
            raise
        run = None
        said = without_secrets(str(error))
        warnings.warn(
            f"bias-audit: no W&B run, training goes on without: {said}; the run directory has the audits, and "
            f"`bias-audit dashboard push {run_dir} --project NAME --send` makes a W&B run of them",
            RuntimeWarning,
            stacklevel=2,
        )
    if run is not None:
        sinks.append(WandbSink(run, own=bool(wandb)))
    # What works on a thread takes the interpreter from those after it.
    return sorted(sinks, key=lambda sink: isinstance(sink, Background))


def sinks_of(logger: Any) -> list[Sink]:
    """Where one of the Trainer's loggers gets its results, by the name of its class: there are two packages of them."""
    kinds = kinds_of(logger)
    if "MLFlowLogger" in kinds:
        return [Background(MlflowSink(logger))]
    if "TensorBoardLogger" in kinds:
        return [LoggerSink(logger), Background(TensorBoardSink(logger))]
    return [LoggerSink(logger)]


def _wandb_run(trainer: Trainer, options: bool | Mapping[str, Any] | None) -> Any:
    """The W&B run to log to, if any."""
    if options:
        assert isinstance(options, Mapping)
        return own_run(options)
    loggers: list[Any] = [logger for logger in trainer.loggers if "WandbLogger" in kinds_of(logger)]
    return loggers[0].experiment if loggers else None
