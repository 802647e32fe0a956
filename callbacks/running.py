"""An audit without a training: what `bias-audit run` does.

Enters: `RunOptions`: where the model, its weights and the audit set are, and what the Trainer is told. Leaves: a run
directory like any other, with its page. Lightning brings the devices, the ranks and the precision.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from torch import nn
from torch.multiprocessing.spawn import ProcessException, ProcessRaisedException
from torch.utils.data import DataLoader, TensorDataset

from bias_audit.audit import Auditor, Progress
from bias_audit.callbacks.lightning import ranks_of
from bias_audit.callbacks.progress import UNDER_WAY
from bias_audit.data.annotations import Misfit
from bias_audit.data.declared import called, import_from_here, imported, read_declared
from bias_audit.plan import AuditPlan
from bias_audit.records.runs import RunDirectory
from bias_audit.redaction import described
from bias_audit.report import write_report
from bias_audit.rng import preserved_rng

# Where Lightning looks in a checkpoint, old or new, for the arguments of the class.
_ARGUMENTS = ("hparams", "module_arguments", "hyper_parameters")
# With these among them, as LightningCLI writes them, the file chooses which classes are imported and made.
_CHOOSES = ("_instantiator", "_class_path")
# What `torch.compile` adds to a name, wherever in the model it was called.
_COMPILED = "_orig_mod."
_LOGGERS = (
    "pytorch_lightning",
    "lightning_fabric",
    "lightning.pytorch",
    "lightning.fabric",
    "torch.multiprocessing.spawn",
)
_MOST_CHARACTERS = 600


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


@dataclass(frozen=True)
class _Loaded:
    """A model, and when it was saved: 0 where its file does not say."""

    model: nn.Module
    step: int = 0
    epoch: int = 0


def audit_checkpoint(options: RunOptions) -> Path:
    """Audit a model as it is and return the run directory; an earlier run in its place moves to `previous/` in it.

    Whatever names a module is imported from the current directory too. On ranks other than the first this exits the
    process: what follows an audit is the first's to do.

    Raises:
        ValueError: the model, its weights or the audit set cannot be loaded, do not fit each other, or the Trainer
            cannot do what it is told; a sample does not decode, on whichever rank.
        OSError: the run directory cannot be written.

    Example:
        >>> audit_checkpoint(RunOptions("mine:Net", Path("audit.yaml"), Path("run"), Path("a.ckpt")))  # doctest: +SKIP
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
    audit = _Audit(_load(options), auditor, options.out)
    with _quiet():
        trainer = _trainer(options)
        try:
            trainer.test(audit, DataLoader(TensorDataset(torch.zeros(1))), verbose=False)
        except ProcessException as error:
            raise _raised_by_rank(error) from error
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

    def __init__(self, loaded: _Loaded, auditor: Auditor, out: Path) -> None:
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


def _raised_by_rank(error: ProcessException) -> ValueError:
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
        raise ValueError(f"the Trainer cannot be made with {said}: {_short(error)}") from error


def _load(options: RunOptions) -> _Loaded:
    """The model that the options name, with its weights, on the CPU."""
    if options.checkpoint is not None and options.weights is not None:
        raise ValueError("expected --checkpoint (with a LightningModule class) or --weights, got both: keep one")
    if options.checkpoint is not None:
        return _from_checkpoint(options.model, options.checkpoint, options.trust_checkpoint)
    # Weights that it draws are the same on every rank, and a second time.
    with preserved_rng(options.seed):
        model = called(options.model, "--model")
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model: {options.model!r} returned {type(model).__name__}, expected an nn.Module")
    if options.weights is None:
        return _Loaded(model)
    weights = _weights(options.weights, options.trust_checkpoint)
    state = weights.get("state_dict", weights)
    _fill(model, state, options.weights)
    return _Loaded(model, *_when(weights))


def _from_checkpoint(name: str, path: Path, trust: bool) -> _Loaded:
    kind: Any = imported(name, "--model")
    if not (isinstance(kind, type) and hasattr(kind, "load_from_checkpoint")):
        raise ValueError(
            f"--model: {name!r} is no LightningModule class, which --checkpoint needs: name it, or give the file as "
            "--weights"
        )
    content = _weights(path, trust)
    if not isinstance(content.get("state_dict"), Mapping):
        raise ValueError(
            f"{path}: holds no `state_dict`, so it is weights and no Lightning checkpoint: `run` takes it as "
            f"--weights; for `gate` name in --model a function that makes the model, not {name!r}"
        )
    if not trust:
        _check_arguments(content, path)
    try:
        with _loading(trust):
            model = kind.load_from_checkpoint(path, map_location="cpu")
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path}: {name!r} cannot be made from it: {_short(error)}") from error
    return _Loaded(model, *_when(content))


def _check_arguments(content: Mapping[str, Any], path: Path) -> None:
    """Refuse a checkpoint that says by what the model is made."""
    for key in _ARGUMENTS:
        found = content.get(key, {})
        # Lightning would take a list of pairs as well.
        if not isinstance(found, Mapping):
            raise ValueError(f"{path}: {key}: expected a mapping, got {type(found).__name__}")
        chosen = next((name for name in _CHOOSES if name in found), None)
        if chosen is not None:
            raise ValueError(
                f"{path}: {key}: names in {chosen} what is to be called to make the model ({found[chosen]!r:.200}), as "
                "LightningCLI writes it, and that may run code: if you trust who wrote it, add --trust-checkpoint"
            )


@contextmanager
def _loading(trust: bool) -> Iterator[None]:
    """What `torch.load` may do inside, whoever calls it: before 2.6 Lightning loads anything and cannot be told not to.

    Later versions take `weights_only`, which earlier ones would hand to the user's class.
    """
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[trust]] = "1"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Environment variable TORCH_FORCE")
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _weights(path: Path, trust: bool) -> Mapping[str, Any]:
    """What a file of weights or a checkpoint holds, on the CPU; code in it is run only if it is trusted."""
    if path.suffix == ".safetensors":
        return _safetensors(path)
    try:
        with warnings.catch_warnings():
            # What it thinks of how the file was pickled.
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=not trust)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error}): give the path of a file") from error
    except Exception as error:
        beyond = _beyond_weights(path) if isinstance(error, pickle.UnpicklingError) else ()
        if beyond:
            raise ValueError(
                f"{path}: holds more than weights ({', '.join(beyond[:3])}), and to load that may run code: if you "
                "trust who wrote it, add --trust-checkpoint"
            ) from error
        raise ValueError(f"{path}: cannot be read as weights or a checkpoint: {_short(error)}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected a state dict or a Lightning checkpoint, got {type(content).__name__}")
    return content


def _beyond_weights(path: Path) -> list[str]:
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:
        return []


def _safetensors(path: Path) -> Mapping[str, Any]:
    try:
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise ValueError(f"{path}: needs the package safetensors: pip install safetensors") from error
    try:
        weights: Mapping[str, Any] = load_file(path)
    except Exception as error:
        raise ValueError(f"{path}: cannot be read as safetensors: {_short(error)}") from error
    return weights


def _fill(model: nn.Module, state: Any, path: Path) -> None:
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{path}: expected a state dict, from names to tensors, got {type(state).__name__}")
    state, prefix = _unwrapped(state, set(model.state_dict()))
    without = f" without `{prefix}`, with which all its names begin," if prefix else ""
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except Exception as error:
        raise ValueError(f"{path}:{without} does not fit {type(model).__name__}: {_short(error)}") from error
    wrong = [
        f"{what} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in (("it lacks", missing), ("the model has no", unexpected))
        if names
    ]
    if wrong:
        raise ValueError(f"{path}:{without} does not fit {type(model).__name__}: {'; '.join(wrong)}")


def _unwrapped(state: Mapping[str, Any], names: set[str]) -> tuple[Mapping[str, Any], str]:
    """The weights by the model's own names, and what was taken off all of theirs.

    What saved them may have held the model as a part: a LightningModule as `model.`, DistributedDataParallel as
    `module.`, `torch.compile` as `_orig_mod.`.
    """
    if set(state) == names:
        return state, ""
    if not any(_COMPILED in name for name in names):
        plain = {name.replace(_COMPILED, ""): value for name, value in state.items()}
        state = plain if len(plain) == len(state) else state
    parts = next(iter(state), "").split(".")[:-1]
    outer = [f"{'.'.join(parts[:count])}." for count in range(1, len(parts) + 1)]
    prefixes = [prefix for prefix in outer if all(name.startswith(prefix) for name in state)]
    for prefix in prefixes:
        if {name.removeprefix(prefix) for name in state} == names:
            return {name.removeprefix(prefix): value for name, value in state.items()}, prefix
    # None fits: the outermost is what to look at, unless the model has such a part itself.
    if prefixes and not any(name.startswith(prefixes[0]) for name in names):
        return {name.removeprefix(prefixes[0]): value for name, value in state.items()}, prefixes[0]
    return state, ""


def _when(content: Mapping[str, Any]) -> tuple[int, int]:
    """Step and epoch, as Lightning writes them beside a state dict."""
    step, epoch = (content.get(name) for name in ("global_step", "epoch"))
    return (step if isinstance(step, int) else 0), (epoch if isinstance(epoch, int) else 0)


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    text = text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]} ..."
    return f"{type(error).__name__}: {text}"
