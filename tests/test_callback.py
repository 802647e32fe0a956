"""The callback in real Trainers: when it audits, and what it leaves behind."""

from __future__ import annotations

import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from training import Net, Wrapped, audit_set, fit, loader, trainer

from benchmarks.soak.pages import drawing
from bias_audit import AuditPlan, read_run, run_gate
from bias_audit.callbacks import BiasAuditCallback, BiasViolation
from bias_audit.records.results import AuditResult
from bias_audit.terms import Outcome

try:
    from pytorch_lightning.callbacks import WeightAveraging
except ImportError:
    WeightAveraging = None
# The tests that need a page say so.
pytestmark = pytest.mark.usefixtures("without_page")
needs_averaging = pytest.mark.skipif(WeightAveraging is None, reason="this Lightning has no WeightAveraging yet")

# On scenes with the face always in view some energy falls on it: this rule is violated whatever the model is.
ALWAYS_VIOLATED = {
    "rules": [
        {"metric": "accuracy", "op": ">=", "threshold": 1.0},
        {"metric": "accuracy", "op": "<=", "threshold": 0.0},
    ],
    "min_samples": 1,
}
NEVER = {"rules": [{"metric": "accuracy", "min": 0.0}], "min_samples": 1}


def callback(tmp_path: Path, **options: Any) -> BiasAuditCallback:
    return BiasAuditCallback(audit_set(), **({"dirpath": tmp_path / "run"} | options))


def audited(path: Path) -> list[tuple[str, int]]:
    return [(audit.trigger, audit.step) for audit in read_run(path).audits]


# When it audits.


def test_by_default_before_training_and_after_each_validation(tmp_path: Path) -> None:
    fit(trainer(tmp_path, callback(tmp_path), num_sanity_val_steps=2))
    assert audited(tmp_path / "run") == [("reference", 0), ("validation", 4), ("validation", 8)]


def test_without_validation_after_each_epoch(tmp_path: Path) -> None:
    fit(trainer(tmp_path, callback(tmp_path)), validate=False)
    assert audited(tmp_path / "run") == [("reference", 0), ("epoch", 4), ("epoch", 8)]


@pytest.mark.parametrize(
    ("schedule", "options", "expected"),
    [
        ({"every_n_epochs": 2}, {"max_epochs": 5}, [("epoch", 8), ("epoch", 16), ("end", 20)]),
        # Two validations an epoch: the last of the epoch's is audited.
        ({"every_n_epochs": 2}, {"max_epochs": 2, "val_check_interval": 0.5}, [("epoch", 8)]),
        # No validation in the epochs that are due.
        ({"every_n_epochs": 2}, {"max_epochs": 4, "check_val_every_n_epoch": 3}, [("epoch", 8), ("epoch", 16)]),
        ({"every_n_steps": 3}, {}, [("step", 3), ("step", 6), ("end", 8)]),
        # Two optimizer steps an epoch, four batches: each multiple once. The interventions of the first are carried on,
        # and what training ends with is judged by its own.
        ({"every_n_steps": 2}, {"accumulate_grad_batches": 2}, [("step", 2), ("step", 4), ("end", 4)]),
        (
            {"every": timedelta(microseconds=1)},
            {"max_epochs": 1},
            [("time", 1), ("time", 2), ("time", 3), ("time", 4), ("end", 4)],
        ),
        ({"every": {"hours": 9}}, {}, [("end", 8)]),
        ({}, {"check_val_every_n_epoch": 2, "max_epochs": 3}, [("validation", 8), ("end", 12)]),
    ],
)
def test_schedules(tmp_path: Path, schedule: Any, options: Any, expected: list[tuple[str, int]]) -> None:
    fit(trainer(tmp_path, callback(tmp_path, reference=False, **schedule), **options))
    assert audited(tmp_path / "run") == expected


def test_manual_optimization_skips_no_multiple(tmp_path: Path) -> None:
    # Two optimizers step twice a batch: global_step goes 2, 4, 6, ... and never hits a multiple of 3 but 6.
    fit(trainer(tmp_path, callback(tmp_path, every_n_steps=3, reference=False), max_epochs=1), Net(manual=True))
    assert audited(tmp_path / "run") == [("step", 4), ("step", 6), ("end", 8)]


def test_fast_dev_run_audits_nothing(tmp_path: Path) -> None:
    fit(trainer(tmp_path, callback(tmp_path), fast_dev_run=True))
    assert not (tmp_path / "run").exists()


def test_validate_and_test_audit_once(tmp_path: Path) -> None:
    run = trainer(tmp_path, callback(tmp_path))
    net = fit(run)
    run.validate(net, loader(2, shuffle=False), verbose=False)
    run.test(net, loader(2, shuffle=False), verbose=False)
    assert audited(tmp_path / "run")[-2:] == [("validate", 8), ("test", 8)]
    fresh = trainer(tmp_path, callback(tmp_path, dirpath=tmp_path / "alone"))
    fresh.validate(net, loader(2, shuffle=False), verbose=False)
    assert audited(tmp_path / "alone") == [("validate", 0)]
    # Under inference_mode the heatmaps are those of training.
    one, other = read_run(tmp_path / "run"), read_run(tmp_path / "alone")
    torch.testing.assert_close(
        torch.from_numpy(one.scores(-1).values), torch.from_numpy(other.scores(0).values), equal_nan=True
    )


# What it logs, and who sees it.


def test_monitors_see_the_scalars(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "best", monitor="bias_audit/energy_share/hair", mode="min", filename="best")
    stopping = EarlyStopping("bias_audit/enrichment/face", patience=0, mode="max", min_delta=1e6)
    run = trainer(tmp_path, callback(tmp_path), checkpoint, stopping, max_epochs=9, enable_checkpointing=True)
    fit(run)
    # The first value sets the best, the second is no improvement of 1e6: stopped after two epochs.
    assert run.current_epoch == 2
    audits = read_run(tmp_path / "run").audits
    shares = [a.estimate("energy_share", region="hair", method="gradcam").value for a in audits[1:]]
    assert checkpoint.best_model_score.item() == pytest.approx(min(shares))
    assert run.callback_metrics["bias_audit/violations"] == 0
    # The headlines are there unasked; what nobody asks for costs time.
    assert {"bias_audit/accuracy", "bias_audit/enrichment/hair"} <= {*run.callback_metrics}
    assert "bias_audit/energy_share/face/nurse" not in run.callback_metrics


def test_a_checkpoint_that_is_tested_is_audited_as_of_its_own_step(tmp_path: Path) -> None:
    class Worsening(Net):
        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val_loss", float(self.current_epoch))

        test_step = validation_step

    best = ModelCheckpoint(tmp_path / "checkpoints", monitor="val_loss")
    run = trainer(tmp_path, callback(tmp_path), best, enable_checkpointing=True)
    net = fit(run, Worsening)
    for evaluate, trigger in ((run.test, "test"), (run.validate, "validate")):
        evaluate(net, loader(2, shuffle=False), ckpt_path="best", verbose=False)
        found = read_run(tmp_path / "run")
        assert (found.audits[-1].step, found.audits[-1].trigger, found.best_step) == (4, trigger, 4)
    # By another Trainer, which has seen no training.
    again = trainer(tmp_path, callback(tmp_path, dirpath=tmp_path / "again"))
    again.test(net, loader(2, shuffle=False), ckpt_path=best.best_model_path, verbose=False)
    (audit,) = read_run(tmp_path / "again").audits
    assert (audit.step, audit.epoch, audit.trigger) == (4, 0, "test")
    # Without a checkpoint it is the model as it stands.
    run.test(net, loader(2, shuffle=False), verbose=False)
    assert read_run(tmp_path / "run").audits[-1].step == 8


def test_a_file_name_and_a_scheduler_get_the_number_they_name(tmp_path: Path) -> None:
    key = "bias_audit/energy_share/face/nurse"
    checkpoint = ModelCheckpoint(tmp_path / "best", filename=f"{{{key}:.4f}}", auto_insert_metric_name=False)

    class Scheduled(Net):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1e-3)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1e6)
            monitor = "bias_audit/pointing_game/hair/hirescam"
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": monitor}}

    run = trainer(tmp_path, callback(tmp_path), checkpoint, enable_checkpointing=True)
    fit(run, Scheduled)
    last = read_run(tmp_path / "run").audits[-1]
    share = last.estimate("energy_share", region="face", class_name="nurse", method="gradcam")
    assert f"{share.value:.4f}" in checkpoint.best_model_path
    assert run.optimizers[0].param_groups[0]["lr"] < 1e-3


def test_loggers_get_each_audit_once(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="csv")
    fit(trainer(tmp_path, callback(tmp_path, dirpath=None), logger=logger, log_every_n_steps=1))
    path = Path(logger.log_dir)
    rows = [line.split(",") for line in (path / "metrics.csv").read_text().splitlines()]
    step, share = rows[0].index("step"), rows[0].index("bias_audit/energy_share/hair")
    logged = [(int(row[step]), float(row[share])) for row in rows[1:] if row[share]]
    recorded = [
        (a.step, a.estimate("energy_share", region="hair", method="gradcam").value)
        for a in read_run(path / "bias_audit").audits
    ]
    assert logged == [(s, pytest.approx(v)) for s, v in recorded]


def test_lightning_pytorch_trainer_and_two_callbacks(tmp_path: Path) -> None:
    import lightning.pytorch as lp

    one, other = BiasAuditCallback(audit_set()), BiasAuditCallback(audit_set(2, seed=9), name="second")
    checkpoint = lp.callbacks.ModelCheckpoint(monitor="second/energy_share/hair")
    run = lp.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, default_root_dir=tmp_path, callbacks=[one, other, checkpoint],
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    run.fit(Wrapped(), loader())
    assert read_run(tmp_path / "bias_audit").manifest.samples_audited == 12
    assert read_run(tmp_path / "second").manifest.samples_audited == 8
    assert checkpoint.best_model_score == run.callback_metrics["second/energy_share/hair"]
    assert one.state_key != other.state_key


def test_the_run_directory_is_whole_after_every_audit(tmp_path: Path) -> None:
    seen: list[tuple[int, bool, int]] = []

    class Watching:
        def start(self, session: Any) -> None: ...
        def fail(self, step: int, reason: str) -> None: ...
        def end(self, error: str = "") -> None: ...
        def write(self, result: AuditResult) -> None:
            run = read_run(tmp_path / "run")
            assert run.audits[-1] == result.summary()
            page = tmp_path / "run" / "report.html"
            # The page is drawn on a thread of its own; what there is of it is whole at any moment.
            until = time.monotonic() + 60
            while not (page.exists() and f"step {result.step}, epoch" in page.read_text()):
                assert time.monotonic() < until
                time.sleep(0.01)
            seen.append((len(run.audits), run.ended, page.read_text().count("<html")))

    with drawing(page=True):
        fit(trainer(tmp_path, callback(tmp_path, sinks=[Watching()], on_error="raise")))
    assert seen == [(1, False, 1), (2, False, 1), (3, False, 1)]
    assert read_run(tmp_path / "run").ended


def test_default_directories(tmp_path: Path) -> None:
    fit(trainer(tmp_path, callback(tmp_path, dirpath=None), max_epochs=1))
    assert (tmp_path / "bias_audit" / "manifest.json").exists()
    first = read_run(tmp_path / "bias_audit").manifest.run_id
    fit(trainer(tmp_path, callback(tmp_path, dirpath=None), max_epochs=1))
    second = read_run(tmp_path).manifest.run_id
    assert first != second
    assert (tmp_path / "bias_audit" / "previous" / first / "audits.jsonl").exists()


# What it does about a violation.


def test_warns_once_while_the_violation_stays_the_same(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="at step 4 the policy is violated: accuracy") as caught:
        fit(trainer(tmp_path, callback(tmp_path, policy=ALWAYS_VIOLATED), max_epochs=3))
    assert sum("policy is violated" in str(w.message) for w in caught) == 1
    assert len(read_run(tmp_path / "run").audits) == 4
    assert run_gate(read_run(tmp_path / "run")).outcome is Outcome.VIOLATED


def test_stops(tmp_path: Path) -> None:
    run = trainer(tmp_path, callback(tmp_path, policy=ALWAYS_VIOLATED, on_violation="stop"), max_epochs=9)
    with pytest.warns(UserWarning, match="violated"):
        fit(run)
    assert run.current_epoch == 1


def test_raises_after_recording(tmp_path: Path) -> None:
    with pytest.raises(BiasViolation, match="accuracy"):
        fit(trainer(tmp_path, callback(tmp_path, policy=ALWAYS_VIOLATED, on_violation="raise")))
    assert audited(tmp_path / "run") == [("reference", 0), ("validation", 4)]


def test_a_policy_that_holds_is_silent(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(trainer(tmp_path, callback(tmp_path, policy=NEVER, on_violation="raise")))
    assert not [w for w in caught if "bias-audit" in str(w.message)]
    assert run_gate(read_run(tmp_path / "run")).outcome is Outcome.HELD


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_training_that_breaks_off_does_not_pass(tmp_path: Path, error: type[BaseException]) -> None:
    class Crash(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 1:
                raise error("in epoch 1")

    with pytest.raises((error, SystemExit)):
        fit(trainer(tmp_path, callback(tmp_path, policy=NEVER), Crash()))
    run = read_run(tmp_path / "run")
    assert audited(tmp_path / "run") == [("reference", 0), ("validation", 4)]
    result = run_gate(run)
    assert result.outcome is Outcome.INCONCLUSIVE
    assert f"training broke off with {error.__name__}: in epoch 1" in result.doubts


# Checkpoints and resuming.


def test_a_resumed_run_gives_what_an_unbroken_one_gives(tmp_path: Path) -> None:
    class Plain(torch.utils.data.Dataset):
        """No randomness: resuming restores the weights and not the generators."""

        images = torch.stack([image for image, _ in (loader().dataset[i] for i in range(32))])

        def __len__(self) -> int:
            return 32

        def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
            return self.images[i], i % 2

    data = torch.utils.data.DataLoader(Plain(), batch_size=8)

    def go(path: Path, epochs: int, ckpt: Path | None = None) -> None:
        pl.seed_everything(0, verbose=False)
        net = Net()
        net.dropout.p = 0.0
        run = trainer(path, callback(path, every_n_steps=2), max_epochs=epochs, enable_checkpointing=False)
        run.fit(net, data, ckpt_path=ckpt)
        run.save_checkpoint(path / f"{epochs}.ckpt")

    go(tmp_path / "unbroken", 4)
    go(tmp_path / "broken", 2)
    assert torch.load(tmp_path / "broken" / "2.ckpt", weights_only=True)["callbacks"]
    # Goes on in the same directory, and from an earlier checkpoint than the records reach.
    go(tmp_path / "broken", 3, tmp_path / "broken" / "2.ckpt")
    go(tmp_path / "broken", 4, tmp_path / "broken" / "2.ckpt")
    # Goes on in another directory: the audits so far come along.
    go(tmp_path / "elsewhere", 4, tmp_path / "broken" / "2.ckpt")
    expected = read_run(tmp_path / "unbroken" / "run")
    for name in ("broken", "elsewhere"):
        run = read_run(tmp_path / name / "run")
        assert [(a.trigger, a.step) for a in run.audits] == [(a.trigger, a.step) for a in expected.audits]
        assert [a.estimates for a in run.audits] == [a.estimates for a in expected.audits]
        for index in range(len(run.audits)):
            assert (run.scores(index).maps == expected.scores(index).maps).all()
    # The audit that the broken training ended with is not one of the longer training's.
    assert audited(tmp_path / "unbroken" / "run")[-2:] == [("step", 16), ("end", 16)]


def test_a_training_whose_place_another_has_taken_goes_on_with_its_own_records(tmp_path: Path) -> None:
    def go(epochs: int, ckpt: Path | None = None) -> None:
        run = trainer(tmp_path, callback(tmp_path, plan=AuditPlan(fitness_samples=0)), max_epochs=epochs)
        fit(run, ckpt_path=ckpt)
        run.save_checkpoint(tmp_path / "a.ckpt")

    go(1)
    first = read_run(tmp_path / "run")
    own = (tmp_path / "a.ckpt").rename(tmp_path / "own.ckpt")
    go(1)
    other = read_run(tmp_path / "run")
    go(2, own)
    found = read_run(tmp_path / "run")
    assert found.manifest.run_id == first.manifest.run_id != other.manifest.run_id
    assert found.audits[: len(first.audits)] == first.audits and found.audits[-1].step == 8
    assert read_run(tmp_path / "run" / "previous" / other.manifest.run_id).audits == other.audits


def test_a_checkpoint_of_a_resumed_run_knows_the_audits_before_it(tmp_path: Path) -> None:
    first = callback(tmp_path)
    fit(trainer(tmp_path, first))
    resumed = callback(tmp_path)
    resumed.load_state_dict(first.state_dict())
    resumed.run_dir = tmp_path / "run"
    assert resumed.state_dict()["step"] == first.state_dict()["step"] == 8


def test_validating_a_checkpoint_does_not_touch_its_run(tmp_path: Path) -> None:
    run = trainer(tmp_path, callback(tmp_path))
    fit(run)
    run.save_checkpoint(tmp_path / "a.ckpt")
    before = (tmp_path / "run" / "audits.jsonl").read_bytes()
    fresh = trainer(tmp_path, callback(tmp_path, dirpath=tmp_path / "other"))
    fresh.validate(Net(), loader(2, shuffle=False), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert (tmp_path / "run" / "audits.jsonl").read_bytes() == before
    assert len(read_run(tmp_path / "other").audits) == 1
    # Going on with it trains nothing, and Lightning calls no hook in which an audit could be made.
    again = trainer(tmp_path, callback(tmp_path))
    with pytest.warns(UserWarning, match="of a training that was over, so nothing was trained and nothing audited"):
        fit(again, ckpt_path=tmp_path / "a.ckpt")
    assert (tmp_path / "run" / "audits.jsonl").read_bytes() == before


@needs_averaging
@pytest.mark.parametrize(("audit_first", "expected"), [(True, ["ema"]), (False, ["raw", "ema"])])
def test_which_weights_an_audit_saw_is_recorded(tmp_path: Path, audit_first: bool, expected: list[str]) -> None:
    seen: list[torch.Tensor] = []

    class Spy:
        def start(self, session: Any) -> None: ...
        def fail(self, step: int, reason: str) -> None: ...
        def end(self, error: str = "") -> None: ...
        def write(self, result: AuditResult) -> None:
            seen.append(net.head[0].weight.detach().clone())

    net = Net()
    auditing, averaging = callback(tmp_path, reference=False, sinks=[Spy()]), WeightAveraging()
    raw: list[torch.Tensor] = []

    class Raw(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            raw.append(pl_module.head[0].weight.detach().clone())

    order = [auditing, averaging] if audit_first else [averaging, auditing]
    fit(trainer(tmp_path, *order, Raw(), max_epochs=1), net)
    assert [a.weights for a in read_run(tmp_path / "run").audits] == expected
    assert torch.equal(seen[0], raw[-1]) == (expected[0] == "raw")
    # The last audit is of the weights that training leaves in the model.
    assert torch.equal(seen[-1], net.head[0].weight)


# What goes wrong.


class Failing:
    """A sink whose disk is full from the second audit on."""

    def __init__(self) -> None:
        self.calls = 0

    def start(self, session: Any) -> None: ...
    def fail(self, step: int, reason: str) -> None: ...
    def end(self, error: str = "") -> None:
        raise AssertionError("called after it failed")

    def write(self, result: AuditResult) -> None:
        self.calls += 1
        if self.calls == 2:
            raise OSError("disk full")


def test_a_failing_sink_is_left_out_and_training_goes_on(tmp_path: Path) -> None:
    sink = Failing()
    with pytest.warns(RuntimeWarning, match="Failing failed .* disk full") as caught:
        fit(trainer(tmp_path, callback(tmp_path, sinks=[sink]), max_epochs=4))
    assert sink.calls == 2
    assert sum("disk full" in str(w.message) for w in caught) == 1
    assert len(read_run(tmp_path / "run").audits) == 5
    with pytest.raises(OSError, match="disk full"):
        fit(trainer(tmp_path, callback(tmp_path, sinks=[Failing()], on_error="raise"), max_epochs=4))


class Breaking(Net):
    """Its forward fails outside of training and validation steps, from the second audit on."""

    audits = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # The audit's images are not augmented; the first pixel tells them apart.
        if len(images) == 12:
            type(self).audits += 1
            if self.audits == 2:
                raise RuntimeError("out of memory, say")
        return super().forward(images)


def test_a_failing_audit_is_recorded_and_training_goes_on(tmp_path: Path) -> None:
    Breaking.audits = 0
    with pytest.warns(RuntimeWarning, match="audit at step 4 failed, training goes on: RuntimeError: out of memory"):
        fit(trainer(tmp_path, callback(tmp_path, policy=NEVER), max_epochs=1), Breaking())
    run = read_run(tmp_path / "run")
    # The audit at the end of training makes up for it.
    assert [a.trigger for a in run.audits] == ["reference", "end"]
    assert run_gate(run).outcome is Outcome.HELD


def test_a_failed_audit_is_known_where_training_goes_on_from_after_it(tmp_path: Path) -> None:
    Breaking.audits = 0
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=3, save_top_k=-1, filename="{step}")
    run = trainer(tmp_path, callback(tmp_path, every_n_steps=2), saver, max_epochs=1, enable_checkpointing=True)
    with pytest.warns(RuntimeWarning, match="audit at step 2 failed"):
        fit(run, Breaking(), validate=False)
    run = trainer(tmp_path, callback(tmp_path, every_n_steps=2), max_epochs=1)
    fit(run, Breaking(), validate=False, ckpt_path=tmp_path / "saved" / "step=3.ckpt")
    assert read_run(tmp_path / "run").failed_steps == (2,)


def test_a_mistake_in_the_set_up_is_raised_at_once(tmp_path: Path) -> None:
    plan = AuditPlan(layer="head")
    with pytest.raises(ValueError, match="'head' has no spatial output"):
        fit(trainer(tmp_path, callback(tmp_path, plan=plan)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_epochs": 1, "every_n_steps": 5}, "expected one schedule, got every_n_epochs and every_n_steps"),
        ({"every_n_steps": 0}, "every_n_steps must be at least 1"),
        ({"every": timedelta(0)}, "longer than nothing"),
        ({"on_violation": "explode"}, "unknown on_violation 'explode'"),
        ({"wandb": True}, "ambiguous"),
        ({"policy": {"rules": [{"metric": "enrichment", "region": "nose", "max": 1}]}}, "unknown region 'nose'"),
        ({"policy": {"ruels": []}}, "ruels: unknown key"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BiasAuditCallback(audit_set(), **options)


# Other ways to train.


def test_tensorboard_directory(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    logger = TensorBoardLogger(tmp_path, name="tb")
    fit(trainer(tmp_path, callback(tmp_path, dirpath=None), logger=logger, max_epochs=1))
    assert (Path(logger.log_dir) / "bias_audit" / "manifest.json").exists()


# An earlier run in the same place is no evidence of this one.


class CrashAtOnce(pl.Callback):
    def on_train_batch_start(self, *_: Any) -> None:
        raise MemoryError("at once")


@pytest.mark.parametrize("resumed", [False, True])
def test_a_training_that_crashes_before_its_first_audit_does_not_pass_on_an_old_run(
    tmp_path: Path, resumed: bool
) -> None:
    first = trainer(tmp_path, callback(tmp_path, policy=NEVER))
    fit(first)
    first.save_checkpoint(tmp_path / "a.ckpt")
    assert run_gate(read_run(tmp_path / "run")).outcome is Outcome.HELD
    again = trainer(tmp_path, callback(tmp_path, policy=NEVER, reference=False), CrashAtOnce(), max_epochs=4)
    with pytest.raises(MemoryError):
        fit(again, ckpt_path=tmp_path / "a.ckpt" if resumed else None)
    assert run_gate(read_run(tmp_path / "run")).outcome is Outcome.INCONCLUSIVE


def test_another_audit_set_cannot_go_on_with_a_run(tmp_path: Path) -> None:
    first = trainer(tmp_path, callback(tmp_path))
    fit(first)
    first.save_checkpoint(tmp_path / "a.ckpt")
    other = BiasAuditCallback(audit_set(2, seed=99), dirpath=tmp_path / "run")
    with pytest.raises(ValueError, match="cannot be resumed: its fingerprint"):
        fit(trainer(tmp_path, other, max_epochs=4), ckpt_path=tmp_path / "a.ckpt")


def test_every_epoch_without_validation(tmp_path: Path) -> None:
    fit(trainer(tmp_path, callback(tmp_path, every_n_epochs=1)), validate=False)
    assert audited(tmp_path / "run") == [("reference", 0), ("epoch", 4), ("epoch", 8)]
