"""What a Trainer tells: its ranks, where it logs, what it validates on, monitors and saves.

Enters: a Trainer of either package, `lightning.pytorch` or `pytorch_lightning`; their classes are told by their names.
Leaves: facts; nothing in the Trainer is changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils._pytree import tree_leaves

from bias_audit.data.dataset import AuditDataset
from bias_audit.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from pytorch_lightning import Trainer


def kinds_of(thing: Any) -> set[str]:
    """The names of a thing's class and of those that it is made from."""
    return {base.__name__ for base in type(thing).__mro__}


def ranks_of(trainer: Trainer) -> Ranks:
    """The ranks that share an audit: all, where each has the whole model; else each makes it alone, with the others."""
    shares = trainer.distributed_sampler_kwargs
    return Ranks.every() if shares is not None and shares["num_replicas"] == trainer.world_size else ALONE


def all_ranks(trainer: Trainer) -> Ranks:
    """All ranks, which go on or stop together, whether or not they share an audit."""
    return Ranks.every() if trainer.world_size > 1 else ALONE


def validated(trainer: Trainer) -> AuditDataset:
    """The audit set that the Trainer validates, or tests, on.

    Raises:
        ValueError: none of its DataLoaders has one, or several have.
    """
    loaders: list[Any] = tree_leaves([trainer.val_dataloaders, trainer.test_dataloaders])
    found = {id(s): s for s in (getattr(loader, "dataset", None) for loader in loaders) if isinstance(s, AuditDataset)}
    if len(found) != 1:
        kinds = [type(getattr(loader, "dataset", None)).__name__ for loader in loaders if loader is not None]
        raise ValueError(
            'audit_set="validation" expects one validation DataLoader over an AuditDataset, got DataLoaders over '
            f"{kinds}: make one with DataLoader(audit_set, collate_fn=AuditBatch.collate), or give the callback the set"
        )
    return next(iter(found.values()))


def asked_for(trainer: Trainer) -> list[str]:
    """What the callbacks and schedulers say of the numbers they need: monitors, and patterns of file names."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    said = [getattr(c, name, None) for c in callbacks for name in ("monitor", "filename")]
    said += [config.monitor for config in trainer.lr_scheduler_configs]
    return [text for text in said if isinstance(text, str)]


def log_dir(trainer: Trainer) -> Path:
    """Where the Trainer's first logger keeps this run's files; the default root where there is no logger."""
    logger = trainer.loggers[0] if trainer.loggers else None
    if logger is None:
        return Path(trainer.default_root_dir)
    if logger.log_dir:
        return Path(logger.log_dir)
    return Path(logger.save_dir or trainer.default_root_dir) / str(logger.name) / str(logger.version)


def saver_of(trainer: Trainer) -> Any:
    """The first ModelCheckpoint that tells by a number which checkpoint is the best; None if there is none."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return next((c for c in callbacks if "ModelCheckpoint" in kinds_of(c) and c.monitor is not None), None)


def lends_averages(trainer: Trainer, callback: object) -> bool:
    """Whether a WeightAveraging before `callback` in the list takes its weights back before the callback's hook."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return any("WeightAveraging" in kinds_of(c) for c in callbacks[: callbacks.index(callback)])


def weights_in(trainer: Trainer, callback: object, trigger: str) -> str:
    """Which weights, "raw" or "ema", the model holds in a hook of `callback`.

    A WeightAveraging lends its averaged weights to each validation and takes them back in its own hook at the end of
    it, so that a callback before it in the list sees them; when training ends it leaves them in the model.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    place = callbacks.index(callback)
    before, after = callbacks[:place], callbacks[place + 1 :]
    lenders = before if trigger == "end" else after if trainer.validating else []
    kinds = {"WeightAveraging", "StochasticWeightAveraging"} if trigger == "end" else {"WeightAveraging"}
    return "ema" if any(kinds & kinds_of(c) for c in lenders) else "raw"
