"""Audits that take their activations from the user's own validation: the same numbers, and not a bit of it changed."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bias_audit import AuditDataset
from bias_audit.attribution.borrow import borrowed
from bias_audit.attribution.capture import capture
from bias_audit.attribution.ride import Rider, why_not
from bias_audit.attribution.targets import ClassLogit
from bias_audit.callbacks import BiasAuditCallback
from bias_audit.data.samples import AuditBatch
from bias_audit.localization import ProjectedRegions, Scored, energy_share
from bias_audit.plan import AuditPlan
from tests.training import Net, audit_set, loader, trainer

pytestmark = pytest.mark.usefixtures("without_page")
CLASSES = torch.tensor([0, 1, 1, 0])
TARGET = ClassLogit(CLASSES)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("layer", ["features", "features.3", "act"])
def test_a_rider_takes_what_a_capture_takes(net: Net, images: Tensor, layer: str) -> None:
    with borrowed(net) as lent:
        expected = capture(lent, images, TARGET, layer)
    with torch.no_grad():
        plain = net(images)
        with Rider(net, layer, TARGET, (32, 32)) as rider:
            ridden = net(images)
            assert not torch.is_grad_enabled()
    assert torch.equal(plain, ridden)
    assert not ridden.requires_grad
    assert rider.capture is not None and rider.passes == 1
    for name in ("activations", "gradients", "outputs", "scores"):
        assert torch.equal(getattr(rider.capture, name), getattr(expected, name)), name
    assert hooks_of(net) == 0
    assert all(p.grad is None for p in net.parameters())


def test_the_call_may_be_to_a_module_inside(net: Net, images: Tensor) -> None:
    whole = nn.ModuleDict({"net": net, "other": nn.Linear(2, 2)})
    with borrowed(net) as lent:
        expected = capture(lent, images, TARGET, "features")
    with torch.no_grad(), Rider(whole, "net.features", TARGET, (32, 32)) as rider:
        whole["net"](images)
    assert rider.capture is not None
    assert torch.equal(rider.capture.gradients, expected.gradients)


def test_a_pass_that_raises_leaves_grad_off_and_no_hook(net: Net, images: Tensor) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("in the head")

    handle = net.head.register_forward_hook(fail)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="in the head"), Rider(net, "features", TARGET, (32, 32)) as rider:
            net(images)
        assert not torch.is_grad_enabled()
    assert rider.capture is None
    handle.remove()
    assert hooks_of(net) == 0


def test_only_the_first_pass_is_ridden(net: Net, images: Tensor) -> None:
    with torch.no_grad(), Rider(net, "features", TARGET, (32, 32)) as rider:
        net(images)
        second = net(images.flip(0))
    assert rider.passes == 2
    assert rider.capture is not None
    assert torch.equal(second, net(images.flip(0)).detach())
    assert torch.equal(rider.capture.outputs, net(images).detach())


def test_a_problem_is_kept_and_not_raised_into_the_pass(net: Net, images: Tensor) -> None:
    def broken(outputs: Tensor) -> Tensor:
        raise ValueError("no such class")

    with torch.no_grad(), Rider(net, "features", broken, (32, 32)) as rider:
        outputs = net(images)
    assert rider.capture is None
    assert str(rider.problem) == "no such class"
    assert torch.equal(outputs, net(images).detach())


class Attentive(nn.Module):
    """Its attention has a fast path that it takes only without grad."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 32, 8, stride=8)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 2)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.norm(self.embed(images).flatten(2).transpose(1, 2))
        return self.head(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))


def test_why_not(net: Net, images: Tensor) -> None:
    with borrowed(net) as lent:
        assert why_not(lent, images, "features", TARGET) == ""
        assert "one score per image" in why_not(lent, images, "features", lambda o: o)
        assert "head" in why_not(lent, images, "head", TARGET)
    assert hooks_of(net) == 0
    net.head = torch.compile(net.head, backend="eager")  # type: ignore[assignment]
    with borrowed(net) as lent:
        assert "compiled" in why_not(lent, images, "features", TARGET)


def test_attention_with_a_fast_path_is_ridden_only_if_its_bits_stay(images: Tensor) -> None:
    torch.manual_seed(0)
    model = Attentive().eval()
    with borrowed(model) as lent:
        plain = lent(images)
        with Rider(lent, "norm", TARGET, (32, 32)):
            ridden = lent(images)
        reason = why_not(lent, images, "norm", TARGET)
    assert (reason == "") == torch.equal(plain, ridden)
    if reason:
        assert "other bits" in reason


# With a Trainer.


class Validated(Net):
    """Validates on `AuditBatch`es and keeps what its forward passes gave."""

    def __init__(self, way: str = "plain") -> None:
        super().__init__()
        self.way = way
        self.outputs: list[Tensor] = []
        # No list: what a pass writes into `self` is taken back after those that are not the training's own.
        self.passes = SimpleNamespace(made=0)

    def forward(self, images: Tensor) -> Tensor:
        self.passes.made += 1
        outputs = super().forward(images)
        if self.way == "remembered":
            self.kept = outputs
        return outputs

    def validation_step(self, batch: Any, _index: int) -> None:
        shown = batch["audited"] if isinstance(batch, dict) else batch
        images = shown.images.flip(3) if self.way == "flipped" else shown.images
        if self.way == "attacked":
            # One step of an attack, as adversarial validation makes it.
            with torch.enable_grad():
                leaf = images.clone().requires_grad_()
                images = images + 0.01 * torch.autograd.grad(self(leaf).sum(), leaf)[0].sign()
        outputs = self(images)
        if self.way == "twice":
            outputs = outputs + self(images.flip(3))
        assert not outputs.requires_grad
        assert not torch.is_grad_enabled()
        self.outputs.append(outputs)
        self.log("val_loss", nn.functional.cross_entropy(outputs, shown.labels))


def fit(tmp_path: Path, callback: BiasAuditCallback | None, held_out: AuditDataset, **options: Any) -> Validated:
    settings = {"shuffle": False, "batch_size": 5, "way": "plain", "collate_fn": AuditBatch.collate} | options
    way, limit = settings.pop("way"), settings.pop("limit_val_batches", 1.0)
    pl.seed_everything(0, verbose=False)
    net = Validated(way)
    run = trainer(tmp_path, *([callback] if callback else []), limit_val_batches=limit, num_sanity_val_steps=1)
    generator = torch.Generator().manual_seed(1)
    run.fit(net, loader(), DataLoader(held_out, generator=generator, **settings))
    return net


def normalised(batch: AuditBatch) -> AuditBatch:
    return AuditBatch((batch.images - 0.5) / 0.25, batch.labels, batch.masks, batch.indices)


PLAN = AuditPlan(fitness_samples=0, intervention_samples=0)


def assert_same_scores(one: BiasAuditCallback, other: BiasAuditCallback) -> None:
    assert one.last_result is not None and other.last_result is not None
    a, b = one.last_result.scores, other.last_result.scores
    assert a.ids == b.ids
    np.testing.assert_array_equal(a.predictions, b.predictions)
    for name in ("margin", "values", "magnitude", "areas"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=2e-3, atol=2e-4, err_msg=name)


@pytest.mark.parametrize(
    "options", [{}, {"shuffle": True}, {"collate_fn": lambda b: {"audited": AuditBatch.collate(b)}}]
)
def test_riding_gives_the_numbers_of_an_audit_and_changes_nothing(tmp_path: Path, options: dict[str, Any]) -> None:
    held_out = audit_set()
    without = fit(tmp_path / "without", None, held_out, **options)
    own = BiasAuditCallback(held_out, plan=PLAN)
    fit(tmp_path / "own", own, held_out, **options)
    riding = BiasAuditCallback("validation", plan=PLAN)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="bias-audit: cannot ride")
        net = fit(tmp_path / "riding", riding, held_out, **options)
    assert_same_scores(riding, own)
    assert riding.last_result is not None and riding.last_result.trigger == "validation"
    assert all(torch.equal(a, b) for a, b in zip(without.outputs, net.outputs, strict=True))
    for (name, a), (_, b) in zip(without.state_dict().items(), net.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    # On top of the training's own: a pass to find the layer, the reference audit on 12 images at once, and three passes
    # in the trial on the first batch. Two audits after validations cost none.
    assert net.passes.made - without.passes.made == 1 + 1 + 3
    assert hooks_of(net) == 0


def drawn(maps: Tensor, regions: ProjectedRegions) -> Scored:
    share, valid = energy_share(maps, regions)
    return Scored(torch.rand_like(share), valid)


def test_a_metric_that_draws_random_numbers_changes_no_bit_either(tmp_path: Path) -> None:
    held_out = audit_set()
    without = fit(tmp_path / "without", None, held_out)
    riding = BiasAuditCallback("validation", plan=replace(PLAN, metrics=(drawn,)))
    net = fit(tmp_path / "riding", riding, held_out)
    assert riding.last_result is not None and "own.drawn" in riding.last_result.scores.metrics
    for (name, a), (_, b) in zip(without.state_dict().items(), net.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_of_a_larger_set_the_drawn_samples_are_audited(tmp_path: Path) -> None:
    held_out = audit_set()
    plan = AuditPlan(max_samples=6, fitness_samples=0, intervention_samples=0)
    own = BiasAuditCallback(held_out, plan=plan)
    fit(tmp_path / "own", own, held_out)
    riding = BiasAuditCallback("validation", plan=plan)
    fit(tmp_path / "riding", riding, held_out, shuffle=True)
    assert len(riding.auditor.audit_set) == 6
    assert_same_scores(riding, own)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"limit_val_batches": 1}, "showed 5 of the 12 audited images"),
        ({"way": "flipped"}, "the batch's images as they are"),
        ({"way": "twice"}, "2 forward passes through the layer"),
        ({"way": "attacked"}, "2 forward passes through the layer, or with grad"),
        ({"way": "remembered"}, "keeps tensors of its forward pass"),
        ({"collate_fn": lambda b: normalised(AuditBatch.collate(b))}, "not the audit set's images"),
    ],
)
def test_a_validation_that_cannot_be_ridden_is_left_alone(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    held_out = audit_set()
    without = fit(tmp_path / "without", None, held_out, **options)
    own = BiasAuditCallback(held_out, plan=PLAN)
    fit(tmp_path / "own", own, held_out, **options)
    riding = BiasAuditCallback("validation", plan=PLAN)
    with pytest.warns(UserWarning, match=f"cannot ride along .*{reason}") as caught:
        net = fit(tmp_path / "riding", riding, held_out, **options)
    assert sum("cannot ride" in str(w.message) for w in caught) == 1
    assert_same_scores(riding, own)
    assert all(torch.equal(a, b) for a, b in zip(without.outputs, net.outputs, strict=True))
    assert hooks_of(net) == 0


@pytest.mark.skipif(torch.__version__ < "2.9", reason="ties between pixels fall otherwise in other batches")
def test_another_trainer_validates_on_a_set_of_its_own(tmp_path: Path) -> None:
    # As the folds of a cross-validation do, whose samples may have the same ids.
    one, other = audit_set(seed=7), audit_set(seed=8)
    riding = BiasAuditCallback("validation", plan=PLAN)
    fit(tmp_path / "one", riding, one)
    fit(tmp_path / "other", riding, other)
    own = BiasAuditCallback(other, plan=PLAN)
    fit(tmp_path / "own", own, other)
    assert riding.auditor.audit_set is other
    assert_same_scores(riding, own)


def test_a_set_that_changes_within_a_training_is_not_ridden(tmp_path: Path) -> None:
    class Anew(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return loader()

        def val_dataloader(self) -> Any:
            return DataLoader(audit_set(seed=7), batch_size=5, collate_fn=AuditBatch.collate)

    riding = BiasAuditCallback("validation", plan=PLAN)
    run = trainer(tmp_path, riding, reload_dataloaders_every_n_epochs=1)
    with pytest.warns(UserWarning, match="made anew, over another audit set"):
        run.fit(Validated(), Anew())


@pytest.mark.skipif(not hasattr(pl.callbacks, "WeightAveraging"), reason="this Lightning has no WeightAveraging yet")
def test_averaged_weights_that_are_taken_back_before_the_audit_are_not_ridden(tmp_path: Path) -> None:
    from pytorch_lightning.callbacks import WeightAveraging

    riding = BiasAuditCallback("validation", plan=PLAN)
    run = trainer(tmp_path, WeightAveraging(avg_fn=lambda average, new, _n: (average + new) / 2), riding)
    with pytest.warns(UserWarning, match="WeightAveraging before this callback"):
        run.fit(Validated(), loader(), DataLoader(audit_set(), batch_size=5, collate_fn=AuditBatch.collate))
    assert riding.last_result is not None


def test_a_forward_fn_of_the_plan_is_ridden_too(tmp_path: Path) -> None:
    class Inside(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: AuditBatch, _index: int) -> None:
            self.net(batch.images)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-2)

    riding = BiasAuditCallback("validation", plan=AuditPlan(forward_fn=lambda m, x: m.net(x), fitness_samples=0))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="bias-audit: cannot ride")
        trainer(tmp_path, riding).fit(
            Inside(), loader(), DataLoader(audit_set(), batch_size=5, collate_fn=AuditBatch.collate)
        )
    assert riding.last_result is not None and riding.last_result.trigger == "validation"


def test_fast_dev_run_audits_nothing(tmp_path: Path) -> None:
    riding = BiasAuditCallback("validation", plan=PLAN, dirpath=tmp_path / "audits")
    run = trainer(tmp_path, riding, fast_dev_run=True)
    run.fit(Validated(), loader(), DataLoader(audit_set(), batch_size=5, collate_fn=AuditBatch.collate))
    assert not (tmp_path / "audits").exists()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_batches_go_through_every_precision(tmp_path: Path, precision: str) -> None:
    riding = BiasAuditCallback("validation", plan=PLAN)
    run = trainer(tmp_path, riding, precision=precision)
    run.fit(Validated(), loader(), DataLoader(audit_set(), batch_size=5, collate_fn=AuditBatch.collate))
    assert riding.last_result is not None
    assert np.isfinite(riding.last_result.scores.margin).all()


def test_a_validation_step_that_raises_leaves_no_hook(tmp_path: Path) -> None:
    class Failing(Validated):
        def validation_step(self, batch: Any, index: int) -> None:
            super().validation_step(batch, index)
            if index == 1 and not self.trainer.sanity_checking:
                raise RuntimeError("bad batch")

    net = Failing()
    run = trainer(tmp_path, BiasAuditCallback("validation", plan=PLAN))
    with pytest.raises(RuntimeError, match="bad batch"):
        run.fit(net, loader(), DataLoader(audit_set(), batch_size=5, collate_fn=AuditBatch.collate))
    assert hooks_of(net) == 0


def test_standalone_validation_is_audited_on_its_set(tmp_path: Path) -> None:
    held_out = audit_set()
    callback = BiasAuditCallback("validation", plan=PLAN)
    trainer(tmp_path, callback).validate(
        Validated(), DataLoader(held_out, batch_size=5, collate_fn=AuditBatch.collate), verbose=False
    )
    assert callback.last_result is not None
    assert callback.last_result.scores.ids == held_out.ids


def test_a_validation_without_regions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'audit_set="validation" expects .* got DataLoaders over \[\'Augmented\'\]'):
        trainer(tmp_path, BiasAuditCallback("validation")).fit(Net(), loader(), loader(2, shuffle=False))
    with pytest.raises(ValueError, match='expected an AuditDataset or "validation"'):
        BiasAuditCallback("valid")  # type: ignore[arg-type]


def test_batches_of_a_data_loader_are_those_of_the_audit_set() -> None:
    held_out = audit_set()
    first = next(iter(DataLoader(held_out, batch_size=5, collate_fn=AuditBatch.collate)))
    expected = held_out.batch(range(5))
    assert first.indices == expected.indices
    for name in ("images", "labels", "masks"):
        assert torch.equal(getattr(first, name), getattr(expected, name))
    assert first.to("cpu").indices == first.indices
    with pytest.raises(IndexError):
        held_out[12]
