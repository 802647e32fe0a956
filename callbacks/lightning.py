"""When to audit, and on which rank; nothing else.

Enters: the Trainer's hooks. Leaves: audits, handed to the sinks, and scalars that monitors see.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args
from weakref import ref

import pytorch_lightning
from torch import nn

from bias_audit.audit import Auditor, Training
from bias_audit.callbacks.loggers import sinks_for
from bias_audit.callbacks.progress import under_way
from bias_audit.callbacks.resume import Earlier, earlier_run
from bias_audit.callbacks.scalars import monitored
from bias_audit.callbacks.schedule import Schedule, is_final
from bias_audit.callbacks.sinks import FanOut, Session, Sink
from bias_audit.callbacks.trainer import (
    all_ranks,
    asked_for,
    lends_averages,
    log_dir,
    ranks_of,
    saver_of,
    validated,
    weights_in,
)
from bias_audit.data.dataset import AuditDataset
from bias_audit.plan import AuditPlan
from bias_audit.policies.file import read_policy
from bias_audit.policies.policy import Policy
from bias_audit.ranks import RankGoneError
from bias_audit.records.errors import RecordError
from bias_audit.records.manifest import Thumbnails
from bias_audit.records.results import AuditResult, AuditSummary
from bias_audit.records.samples import SampleScores
from bias_audit.redaction import described
from bias_audit.rng import preserved_rng
from bias_audit.stages.riding import RideAlong

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

# `lightning.pytorch` and `pytorch_lightning` are distinct packages, and each one's Trainer takes its own callbacks.
_BASES: tuple[type, ...] = (pytorch_lightning.Callback,)
if find_spec("lightning") is not None:
    import lightning.pytorch

    _BASES += (lightning.pytorch.Callback,)

OnViolation = Literal["warn", "stop", "raise"]
OnError = Literal["warn", "raise"]


class BiasViolation(RuntimeError):
    """A rule of the policy is violated and the callback was told to raise."""


class BiasAuditCallback(*_BASES):  # type: ignore[misc]
    """Audits the model while it trains; training is not changed by it, not by one bit.

    By default it audits once before training, as the reference, and after each validation; with no validation, after
    each training epoch. The sanity check and `fast_dev_run` are skipped. `trainer.validate` and `trainer.test` audit
    once.

    Args:
        audit_set: the annotated held-out images; or "validation", where the validation DataLoader's data set is an
            `AuditDataset` (with `collate_fn=AuditBatch.collate`, or with each batch holding an `AuditBatch`): then an
            audit after a validation takes its activations from that validation's own forward passes.
        policy: what must hold: a `Policy`, a mapping, or the path of a YAML or TOML file.
        every_n_epochs, every_n_steps, every: audit less or more often: one of them. `every` is a timedelta, or a
            mapping of its arguments such as `{"minutes": 30}`.
        plan: how to audit: layer, target, batch size, the number of samples.
        on_violation: "warn", "stop" the training after this audit, or "raise" `BiasViolation`.
        on_error: what a failing audit (after the first) or sink does: "warn" and let training go on, or "raise".
        reference: whether to audit before training.
        wandb: None logs to the Trainer's WandbLogger if it has one, a mapping of `wandb.init`'s arguments to a run of
            its own, False to none.
        dirpath: the run directory; by default `<log dir>/<name>`.
        name: of the run directory and of the metrics; tells several callbacks in one Trainer apart.
        sinks: further places for the results.
        training: labels and attributes of the training set, for the association in it: a `Metadata`, an annotated data
            set, or the path of a CSV with the columns `label` and those of the attributes. No image is opened.
        keep: of how many of the newest audits the run directory keeps the scores and heatmaps, beside those of the
            reference and of the best checkpoint; None keeps all. What older audits found is always kept.
        thumbnails: whether pictures of the audited images are kept. False writes none anywhere; "local" keeps them in
            the run directory and its page, and loggers get heatmaps over the outlines of the regions.

    Raises:
        ValueError: more than one schedule, a schedule that is not positive, an unknown choice, or a policy or training
            labels that cannot be read or name what the audit set does not have.

    Example:
        >>> from bias_audit.data.scenes import scene_dataset
        >>> audit_set = scene_dataset({("doctor", "female"): 4, ("nurse", "male"): 4}, seed=0)
        >>> policy = {"rules": [{"metric": "verdict", "region": "spurious", "forbid": "reliance"}]}
        >>> callback = BiasAuditCallback(audit_set, policy, every_n_epochs=5)
        >>> trainer = pytorch_lightning.Trainer(callbacks=[callback], logger=False, enable_checkpointing=False)
        >>> callback in trainer.callbacks
        True
    """

    def __init__(
        self,
        audit_set: AuditDataset | Literal["validation"],
        policy: Policy | str | Path | Mapping[str, Any] | None = None,
        *,
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        every: timedelta | Mapping[str, float] | None = None,
        plan: AuditPlan | None = None,
        on_violation: OnViolation = "warn",
        on_error: OnError = "warn",
        reference: bool = True,
        wandb: bool | Mapping[str, Any] | None = None,
        dirpath: str | Path | None = None,
        name: str = "bias_audit",
        sinks: Sequence[Sink] = (),
        training: Training = None,
        keep: int | None = None,
        thumbnails: Thumbnails = True,
    ) -> None:
        super().__init__()
        self.schedule = Schedule.of(every_n_epochs, every_n_steps, every)
        if keep is not None and keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        for key, choice, choices in (("on_violation", on_violation, OnViolation), ("on_error", on_error, OnError)):
            if choice not in get_args(choices):
                raise ValueError(f"unknown {key} {choice!r}: expected one of {', '.join(get_args(choices))}")
        if thumbnails not in (True, False, "local"):
            raise ValueError(f'unknown thumbnails {thumbnails!r}: expected True, False or "local"')
        if wandb is True:
            raise ValueError(
                "wandb=True is ambiguous: leave it out to use the Trainer's WandbLogger, or give a mapping"
            )
        if isinstance(audit_set, str) and audit_set != "validation":
            raise ValueError(f'expected an AuditDataset or "validation" as audit set, got {audit_set!r}')
        self.plan, self.policy = plan, read_policy(policy).policy
        self.training, self.thumbnails = training, thumbnails
        self._auditor = (
            None if isinstance(audit_set, str) else Auditor(audit_set, plan, self.policy, training, thumbnails)
        )
        self._ride: RideAlong | None = None
        self._validated_set: AuditDataset | None = None
        self._from_validation = isinstance(audit_set, str)
        self._riding = self._ridden = False
        self.on_violation, self.on_error, self.reference = on_violation, on_error, reference
        self.name, self.dirpath = name, None if dirpath is None else Path(dirpath)
        self.keep = keep
        self._wandb, self._more_sinks = wandb, tuple(sinks)
        self._trainer: ref[Trainer] | None = None
        self._loaded: tuple[int | None, int | None] = None, None
        self._broken_off = False
        self._steps_seen, self._clock, self._audited_epoch = 0, time.monotonic(), -1
        self._warned: frozenset[str] = frozenset()
        self._forget()

    def _forget(self) -> None:
        """Know nothing of a training: neither its run directory nor its audits."""
        self.run_dir: Path | None = None
        self.last_result: AuditResult | None = None
        self._sinks: FanOut | None = None
        self._reference_scores: SampleScores | None = None
        self._previous: AuditSummary | None = None
        self._earlier: Earlier | None = None
        self._last_step = -1
        self._saver: Any = None
        self._best: tuple[str, Any] = ("", None)
        self._best_step: int | None = None
        self._run_id = ""

    @property
    def auditor(self) -> Auditor:
        """What audits; with `audit_set="validation"` from the first audit on."""
        if self._auditor is None:
            raise RuntimeError("the audit set is that of the validation, which has not begun")
        return self._auditor

    @property
    def state_key(self) -> str:
        """Keeps the state of several callbacks in one Trainer apart."""
        return f"{type(self).__qualname__}[{self.name}]"

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and texts: anything else would make the user's checkpoint unloadable."""
        # The checkpoint that is being saved may be the best, of which the ModelCheckpoint knows by now.
        self._note_best()
        if self.run_dir is None:
            return {}
        return {
            "run_dir": str(self.run_dir.resolve()),
            "run_id": self._run_id,
            "step": self._last_step,
            "steps_seen": self._steps_seen,
            "seconds_since_audit": time.monotonic() - self._clock,
            "best_step": self._best_step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the checkpoint left off, in its run directory or a copy of it."""
        trainer = self._trainer() if self._trainer is not None else None
        # A checkpoint that is only validated or tested does not change what was seen of the training.
        if state and (trainer is None or trainer.state.fn == "fit"):
            self._run_id = state.get("run_id", "")
            self._earlier = Earlier(Path(state["run_dir"]), state["step"], self._run_id)
            self._last_step = state["step"]
            self._steps_seen = state["steps_seen"]
            self._clock = time.monotonic() - state["seconds_since_audit"]
            self._best_step = state.get("best_step")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember when the weights were saved: one that is only validated or tested is audited as of then."""
        if trainer.state.fn != "fit":
            self._loaded = checkpoint.get("global_step"), checkpoint.get("epoch")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin a new run with a new Trainer; the same Trainer's fit, validate and test share one."""
        self._broken_off, self._loaded = False, (None, None)
        if self._trainer is None or self._trainer() is not trainer:
            self._trainer = ref(trainer)
            self._forget()
            if self._from_validation:
                # Another Trainer validates on a set of its own.
                self._auditor, self._riding, self._ridden = None, True, False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Audit the untrained model, unless training was resumed."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._saver = saver_of(trainer)
        if self._saver is not None:
            # What a resumed training brings along is in its records.
            self._best = self._saver.best_model_path, self._saver.best_model_score
        self._take_up(trainer, pl_module)
        if self.reference and self._reference_scores is None:
            self._audit(trainer, pl_module, "reference")
        if self._earlier is None:
            self._clock, self._steps_seen = time.monotonic(), trainer.global_step

    def on_train_batch_start(self, *_: Any) -> None:
        """Note a best checkpoint that was saved since the last step."""
        self._note_best()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Audit every n steps or every interval of time."""
        if self.schedule.after_steps(self._steps_seen, trainer.global_step):
            self._audit(trainer, pl_module, "step")
        # The ranks' clocks differ; all must do the same.
        if self.schedule.every is not None and trainer.strategy.broadcast(
            self.schedule.after_time(time.monotonic() - self._clock)
        ):
            self._audit(trainer, pl_module, "time")
        self._steps_seen = trainer.global_step

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ride along with this validation, if an audit follows it and its batches carry the regions."""
        self._ride = None
        if self._riding and trainer.state.fn == "fit" and self.schedule.after_validation(trainer):
            if self.run_dir is None:
                self._take_up(trainer, pl_module)
            self._ride = self._ride_along(trainer, pl_module)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any) -> None:
        """Get on."""
        if self._ride is not None:
            self._ride.begin(batch)

    def on_validation_batch_end(self, *_: Any) -> None:
        """Get off."""
        if self._ride is not None:
            self._ride.end()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Audit after each validation, or after the last of every n-th epoch."""
        trigger = self.schedule.after_validation(trainer)
        if trigger:
            self._audit(trainer, pl_module, trigger)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Audit after an epoch without validation."""
        no_validation = self.schedule.by_validation and not trainer.enable_validation
        if no_validation or (self.schedule.after_epoch(trainer) and self._audited_epoch != trainer.current_epoch):
            self._audit(trainer, pl_module, "epoch")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Audit the weights that training ends with, unless the last audit saw them and carried no evidence on."""
        last = self.last_result
        averaged_since = last is not None and weights_in(trainer, self, "end") == "ema" != last.weights
        carries = last is not None and any(e.age for e in last.estimates)
        if last is None or last.step != trainer.global_step or averaged_since or carries:
            self._audit(trainer, pl_module, "end")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Audit once."""
        self._audit(trainer, pl_module, "test")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so where nothing was left to train: Lightning then calls no hook in which an audit could be made."""
        nothing_trained = self._earlier is not None and self.run_dir is None and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if nothing_trained and trainer.is_global_zero:
            warnings.warn(
                "bias-audit: the checkpoint is of a training that was over, so nothing was trained and nothing audited;"
                " if its run lacks the last audit, trainer.validate(..., ckpt_path=...) makes one of this checkpoint",
                UserWarning,
                stacklevel=2,
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the sinks: what was measured before the exception stays, but is not the last word."""
        if self._ride is not None:
            self._ride.end()
            self._ride = None
        self._note_best()
        if self._sinks is not None:
            self._sinks.end(described(exception))
        self._broken_off = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the sinks."""
        self._note_best()
        if self._sinks is not None and not self._broken_off:
            self._sinks.end()

    def _note_best(self) -> None:
        """Record the step of the best checkpoint if there is a new one.

        A ModelCheckpoint saves after this callback's hooks, so a later hook sees it: before the next step is made.
        """
        trainer = self._trainer() if self._trainer is not None else None
        if trainer is None or self._saver is None or self._sinks is None or trainer.state.fn != "fit":
            return
        path, score = self._saver.best_model_path, self._saver.best_model_score
        # Its file may keep its name, and to compare scores would wait for the device.
        if path and (path != self._best[0] or score is not self._best[1]):
            self._best, self._best_step = (path, score), trainer.global_step
            self._sinks.best(self._best_step)

    def _ride_along(self, trainer: Trainer, pl_module: LightningModule) -> RideAlong | None:
        shown = validated(trainer)
        if trainer.world_size > 1:
            self._stop_riding(trainer, "each of several ranks sees a part of the validation only")
            return None
        if lends_averages(trainer, self):
            self._stop_riding(
                trainer, "a WeightAveraging before this callback takes its weights back before the audit is made"
            )
            return None
        if shown is not self._validated_set:
            self._stop_riding(trainer, "the validation's DataLoader was made anew, over another audit set")
            return None
        places = {name: place for place, name in enumerate(self.auditor.audit_set.ids)}
        return RideAlong(
            self.auditor,
            pl_module,
            {index: places[name] for index, name in enumerate(shown.ids) if name in places},
            trainer.precision_plugin.forward_context,
            tried=self._ridden,
        )

    def _stop_riding(self, trainer: Trainer, reason: str) -> None:
        self._riding = False
        if trainer.is_global_zero:
            warnings.warn(
                f"bias-audit: cannot ride along with the validation ({reason}); audits make forward passes of their "
                "own, which gives the same numbers and takes longer",
                UserWarning,
                stacklevel=2,
            )

    def _take_up(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the run directory and open the sinks, and take the reference from a run that is resumed.

        The records are opened before anything is measured: from now on an earlier run in the same place is no evidence
        of this one, even if training breaks off before its first audit.
        """
        if trainer.state.fn != "fit":
            # A checkpoint that is only validated or tested does not continue the training that made it.
            self._earlier = self._best_step = None
        with all_ranks(trainer).together():
            # A logger may ask a server where it is, on the first rank only.
            run_dir = self.dirpath or log_dir(trainer) / self.name
            if self._auditor is None:
                self._validated_set = validated(trainer)
                self._auditor = Auditor(self._validated_set, self.plan, self.policy, self.training, self.thumbnails)
            if self._earlier is not None and trainer.is_global_zero:
                try:
                    self._earlier = earlier_run(self._earlier.path, self._earlier.step, self._earlier.run_id)
                    self._run_id = self._earlier.run_id
                except RecordError as error:
                    self._earlier = None
                    warnings.warn(f"bias-audit: starts a new run, the one before is not there: {error}", stacklevel=2)
        # What is carried on decides what is measured, on all ranks alike, whichever of them can read the directory.
        self._earlier, run_dir = trainer.strategy.broadcast((self._earlier, run_dir))
        # Whole, because a training may change its working directory.
        self.run_dir = run_dir.absolute()
        self.auditor.prepare(pl_module, trainer.precision_plugin.forward_context, ranks_of(trainer))
        with all_ranks(trainer).together():
            if trainer.is_global_zero and self._sinks is None:
                with preserved_rng():
                    self._sinks = self._open_sinks(trainer, pl_module)
                    if self._best_step is not None:
                        # A run is gone on with from its last audit, and the best checkpoint may have come after that.
                        self._sinks.best(self._best_step)
        if self._earlier is not None:
            self._reference_scores = self._earlier.reference or self._reference_scores
            self._previous = self._earlier.previous or self._previous

    def _audit(self, trainer: Trainer, pl_module: LightningModule, trigger: str) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self.run_dir is None:
            self._take_up(trainer, pl_module)
        self._clock = time.monotonic()
        if trigger != "reference":
            self._audited_epoch = trainer.current_epoch
        failure: Exception | None = None
        ride, self._ride = self._ride, None
        try:
            scored = None if ride is None else ride.finish()
            if ride is not None and scored is None:
                self._stop_riding(trainer, ride.reason)
            self._ridden = scored is not None
            with ExitStack() as shown:
                with all_ranks(trainer).together():
                    bar = trainer.progress_bar_callback if trainer.is_global_zero else None
                    progress = shown.enter_context(under_way(bar))
                step, epoch = self._loaded
                result = self.auditor.run(
                    pl_module,
                    step=trainer.global_step if step is None else step,
                    epoch=trainer.current_epoch if epoch is None else epoch,
                    weights=weights_in(trainer, self, trigger),
                    trigger=trigger,
                    reference=self._reference_scores,
                    scored=scored,
                    # What training ends with is judged by interventions and a test of the methods on just that.
                    previous=None if is_final(trainer, trigger) else self._previous,
                    forward_context=trainer.precision_plugin.forward_context,
                    progress=progress,
                    ranks=ranks_of(trainer),
                )
        except RankGoneError:
            # Training cannot go on without it, either.
            raise
        except Exception as error:
            failure = error
        # A rank that went on alone would wait for the others for ever: what fails on one has failed on all.
        if not trainer.strategy.reduce_boolean_decision(failure is None):
            failure = failure or RuntimeError("it failed on another rank")
            # What fails the first time is a mistake in the set-up, which should be known before hours of training.
            if self.last_result is None or self.on_error == "raise":
                raise failure
            self._report_failure(trainer, failure)
            return
        if trigger == "reference":
            self._reference_scores = result.scores
        self.last_result, self._previous, self._last_step = result, result, result.step
        self._hand_over(trainer, pl_module, result)
        if trigger != "reference":
            self._act(trainer, result)

    def _hand_over(self, trainer: Trainer, pl_module: LightningModule, result: AuditResult) -> None:
        # One set of numbers for all ranks: devices may round differently, and monitors must decide alike.
        numbers: dict[str, float] = trainer.strategy.broadcast(monitored(result, self.name, asked_for(trainer)))
        on_step = result.trigger in ("step", "time")
        if result.trigger not in ("reference", "end"):
            for key, number in numbers.items():
                # Not to the loggers, which have it: Lightning would emit the value again at every later step.
                pl_module.log(key, number, logger=False, on_step=on_step, on_epoch=not on_step, batch_size=1)
        with all_ranks(trainer).together() if self.on_error == "raise" else nullcontext():
            if self._sinks is not None:
                # A sink may draw random numbers, for the name of a file, say.
                with preserved_rng():
                    self._sinks.write(result)

    def _open_sinks(self, trainer: Trainer, model: nn.Module) -> FanOut:
        assert self.run_dir is not None
        sinks = sinks_for(trainer, self.run_dir, self._wandb, self._more_sinks, self.on_error)
        fan_out, earlier = FanOut(sinks, self.on_error), self._earlier
        manifest, sheet = self.auditor.manifest(model), self.auditor.sheet
        resumed, step = (None, 0) if earlier is None else (earlier.path, earlier.step)
        if resumed is None:
            self._run_id = manifest.run_id
        fan_out.start(Session(self.name, self.run_dir, manifest, sheet, resumed, step, self.keep))
        return fan_out

    def _report_failure(self, trainer: Trainer, error: Exception) -> None:
        reason = described(error)
        if trainer.is_global_zero:
            warnings.warn(
                f"bias-audit: the audit at step {trainer.global_step} failed, training goes on: {reason}",
                RuntimeWarning,
                stacklevel=2,
            )
        # A training that is resumed from a later checkpoint does not make this audit again.
        self._last_step = trainer.global_step
        if self._sinks is not None:
            self._sinks.fail(trainer.global_step, reason)

    def _act(self, trainer: Trainer, result: AuditResult) -> None:
        # Rank 0 decides for all: a rank that goes on alone would wait for the others for ever.
        violations: list[str] = trainer.strategy.broadcast([c.message for c in result.judgement.violations])
        if not violations:
            self._warned = frozenset()
            return
        text = f"bias-audit: at step {result.step} the policy is violated: " + "; ".join(violations)
        if self.on_violation == "raise":
            raise BiasViolation(text)
        subjects = frozenset(c.subject for c in result.judgement.violations)
        if trainer.is_global_zero and subjects != self._warned:
            warnings.warn(text, UserWarning, stacklevel=2)
        self._warned = subjects
        if self.on_violation == "stop":
            trainer.should_stop = True
