"""Interventions within an audit: on nets whose every answer can be worked out, a planted cue beside innocent ones, and
the model given back."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from estimates import alike
from torch import Tensor, nn
from torchvision.transforms import v2

from bias_audit import AuditDataset, Auditor, AuditPlan, AuditResult, AuditSample, audit_model, read_run
from bias_audit.attribution.features import penultimate
from bias_audit.data.metadata import Metadata
from bias_audit.evidence.aging import carried
from bias_audit.evidence.changes import Changes
from bias_audit.evidence.effects import EFFECTS
from bias_audit.evidence.removal import inpainted, widened
from bias_audit.terms import INTERVENTION_METRICS, PROBE_METRICS, Estimate, Verdict

SIDE = 20


def mask(top: int, left: int, height: int, width: int) -> Tensor:
    found = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    found[top : top + height, left : left + width] = True
    return found


GREYS = {"dark": 30, "light": 225}
# How much lighter than its noisy ground a bar is: easy to see, and hardly.
CLEAR, FAINT = 46, 18


def picture(number: int, label: int, value: str, *, patch: bool = True, contrast: int = CLEAR) -> Tensor:
    """A bar, upright for class 1 and level for class 0, in noise; and a patch whose grey is the value's."""
    rng = np.random.default_rng(number)
    image = 120 + rng.normal(0, 28, (3, SIDE, SIDE))
    row, column = rng.integers(7, 12, 2)
    height, width = (11, 2) if label else (2, 11)
    top, left = row - height // 2, column - width // 2
    image[:, top : top + height, left : left + width] += contrast
    if patch:
        image[:, 0:5, 0:5] = GREYS[value] + rng.normal(0, 8, (3, 5, 5))
    return torch.from_numpy(image.clip(0, 255).astype(np.uint8))


def bars(each: int = 6, contrast: int = CLEAR, **options: Any) -> AuditDataset:
    samples = []
    for number, label, value in product(range(each), (0, 1), GREYS):
        key = 10_000 + 4 * number + 2 * label + (value == "light")
        regions = {"patch": mask(0, 0, 5, 5), "bar": mask(6, 6, 8, 8)}
        samples.append(
            AuditSample(picture(key, label, value, contrast=contrast), label, regions, {"grey": value}, f"{key}")
        )
    return AuditDataset(samples, object=["bar"], spurious=["patch"], classes=["level", "upright"], **options)


def repainted(sample: AuditSample, value: str, contrast: int = CLEAR) -> Tensor:
    return picture(int(sample.id), sample.label, value, contrast=contrast)


class Net(nn.Module):
    """Two convolutions, dropout, BatchNorm and a hidden layer."""

    def __init__(self, outputs: int = 2) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 5, stride=2, padding=2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
        )
        self.dropout = nn.Dropout(0.1)
        self.hidden, self.head = nn.Linear(800, 16), nn.Linear(16, outputs)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.dropout(self.features(images).flatten(1)))))


def make_net(outputs: int = 2, seed: int = 0) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Net(outputs)
        net(torch.rand(16, 3, SIDE, SIDE))  # running statistics of their own
        return net.double().eval()


QUICK = AuditPlan(batch_size=7, fitness_samples=0)


def recomputed(net: nn.Module, audit_set: AuditDataset, plan: AuditPlan) -> dict[str, npt.NDArray[np.float64]]:
    """Of each image what in-painting the patch does, from one forward pass for each picture."""
    changes = Changes(audit_set, plan.control_regions, 64, plan.swaps, (), plan.seed)

    def logits(prepared: Tensor) -> list[float]:
        with torch.no_grad():
            out = net(audit_set.finished(prepared[None]).double())[0].tolist()
        return [-out[0], out[0]] if len(out) == 1 else out

    def decided_margin(row: list[float], of: int) -> float:
        return row[of] - max(x for i, x in enumerate(row) if i != of)

    rows = []
    for i in range(len(audit_set)):
        image, masks = audit_set.prepared(i)
        removed = inpainted(image, widened(masks[1].numpy()))
        controls = [p for number, p in changes.pictures(i) if changes.list[number].kind == "control"]
        if not masks[1].any() or not controls:
            rows.append(np.full(4, np.nan))
            continue
        clean, y = logits(image), audit_set.samples[i].label
        of = clean.index(max(clean))

        def what(changed: list[float], clean: list[float] = clean, of: int = of, y: int = y) -> list[float]:
            fall = decided_margin(clean, of) - decided_margin(changed, of)
            # With one logit the label's margin is that logit, not the difference of both signs.
            score = decided_margin(clean, y) - decided_margin(changed, y)
            return [abs(fall), score, fall, changed.index(max(changed)) != of]

        mine = np.array(what(logits(removed)), dtype=np.float64)
        beside = np.array([what(logits(c)) for c in controls], dtype=np.float64).mean(axis=0)
        rows.append(mine - beside)
    return dict(zip(EFFECTS, np.array(rows).T, strict=True))


NORMALISED = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.2] * 3)]
TRANSFORMS = {
    "none": None,
    "random": v2.Compose([v2.RandomHorizontalFlip(), v2.RandomResizedCrop(SIDE, (0.6, 1.0))]),
    "floats": v2.Compose([*NORMALISED, v2.Resize((SIDE, SIDE))]),
    "normalised at the end": v2.Compose(NORMALISED),
}


@pytest.mark.parametrize(("transform", "outputs"), [*product(TRANSFORMS, [2]), ("none", 1), ("none", 3)])
def test_recorded_effects_are_those_of_single_pictures_and_the_estimates_are_their_means(
    transform: str, outputs: int, tmp_path: Path
) -> None:
    net, audit_set = make_net(outputs), bars(transform=TRANSFORMS[transform])
    result = audit_model(net, audit_set, plan=QUICK, out=tmp_path)
    scores = result.scores
    assert scores.effect_metrics == tuple(f"removal_{effect}" for effect in EFFECTS)
    assert scores.effects.shape == (4, 24, 2) and scores.effects.dtype == np.float32
    assert np.isnan(scores.effects[:, :, 0]).all()  # the object is not removed
    expected = recomputed(net, audit_set, QUICK)
    for e, name in enumerate(EFFECTS):
        # Two logits of one: -z and z; the tool's margin of a single logit is z.
        off = 2 if outputs == 1 and name != "flips" else 1
        np.testing.assert_allclose(scores.effects[e, :, 1], expected[name] / off, rtol=1e-4, atol=1e-5)
        per_image = scores.effects[e, :, 1].astype(np.float64)
        for class_name, group, members in (
            (None, None, np.ones(24, dtype=bool)),
            ("upright", None, scores.labels == 1),
            (None, "grey=dark", audit_set.attribute_table[:, 0] == "dark"),
            ("level", "grey=light", (scores.labels == 0) & (audit_set.attribute_table[:, 0] == "light")),
        ):
            if name == "effect" and outputs > 2:
                continue  # the decided class's margin is recorded for two classes only
            shown = members & np.isfinite(per_image)
            whole = np.abs(scores.margin[shown]).sum() if name == "effect" else shown.sum()
            estimate = result.estimate(f"removal_{name}", region="patch", class_name=class_name, group=group)
            assert estimate.value == pytest.approx(per_image[shown].sum() / whole, rel=1e-4, abs=1e-6)
            assert estimate.n == shown.sum() and (transform == "random" or shown.sum() == members.sum())
    again = read_run(tmp_path)
    assert again.audits[0].estimates == result.estimates
    np.testing.assert_array_equal(again.scores(0).effects, scores.effects)
    assert again.scores(0).effect_metrics == scores.effect_metrics


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_the_batch_size_does_not_matter_and_a_second_audit_says_the_same(size: int) -> None:
    plan = replace(QUICK, swaps={"grey": repainted})
    first = audit_model(make_net(), bars(), plan=plan)
    other = audit_model(make_net(), bars(), plan=replace(plan, batch_size=size))
    alike(first.estimates, other.estimates)
    np.testing.assert_allclose(first.scores.effects, other.scores.effects, atol=1e-5)
    assert audit_model(make_net(), bars(), plan=plan).estimates == first.estimates


def test_another_seed_draws_other_controls_and_noise() -> None:
    first, other = (audit_model(make_net(), bars(), plan=replace(QUICK, seed=s)) for s in (0, 1))
    for metric, region in (("control_effect", "patch"), ("removal_score", "patch")):
        assert first.estimate(metric, region=region).value != other.estimate(metric, region=region).value


def test_images_of_several_sizes_are_refused_in_words() -> None:
    regions = {"patch": torch.zeros(28, 28, dtype=torch.bool)}
    regions["patch"][:5, :5] = True
    large = AuditSample(torch.zeros(3, 28, 28, dtype=torch.uint8), 0, regions, {"grey": "dark"}, "large")
    audit_set = AuditDataset([*bars(1).samples, large], object=["bar"], spurious=["patch"])
    pooled = nn.Sequential(nn.Conv2d(3, 4, 5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    for size in (1, 4, 5):
        with pytest.raises(ValueError, match="a transform that resizes"):
            audit_model(pooled, audit_set, plan=replace(QUICK, batch_size=size))


def test_progress_counts_the_images_and_then_those_that_are_changed() -> None:
    told: list[tuple[int, int]] = []
    plan = AuditPlan(batch_size=10, intervention_samples=8, fitness_samples=0)
    result = audit_model(make_net(), bars(), plan=plan, progress=lambda done, of: told.append((done, of)))
    assert {of for _, of in told} == {24 + 8} and told[:3] == [(10, 32), (20, 32), (24, 32)]
    assert told[-1] == (32, 32) and told == sorted(told)
    # Eight of them were changed, two of each class and grey.
    changed = np.isfinite(result.scores.effects[0, :, 1])
    assert changed.sum() == 8
    cells = zip(result.scores.labels[changed].tolist(), bars().attribute_table[changed, 0].tolist(), strict=True)
    assert Counter(cells) == Counter(2 * list(product((0, 1), GREYS)))
    assert result.estimate("removal_effect", region="patch").n == 8
    told.clear()
    audit_model(
        make_net(),
        bars(),
        plan=replace(plan, intervention_samples=0),
        progress=lambda done, of: told.append((done, of)),
    )
    assert told == [(10, 24), (20, 24), (24, 24)]


def test_interventions_are_carried_until_they_are_due_again() -> None:
    auditor = Auditor(bars(), replace(QUICK, intervention_every=3))
    other = make_net(seed=5)
    reference = auditor.run(make_net(), trigger="reference")
    assert not of_interventions(reference) and reference.scores.effects.size == 0
    first = auditor.run(make_net(), previous=reference.summary())
    second = auditor.run(other, previous=first.summary())
    third = auditor.run(other, previous=second.summary())
    fourth = auditor.run(other, previous=third.summary())
    assert [{e.age for e in of_interventions(r)} for r in (first, second, third, fourth)] == [{0}, {1}, {2}, {0}]
    for age, audit in ((1, second), (2, third)):
        assert of_interventions(audit) == [replace(e, age=age) for e in of_interventions(first)]
        assert audit.scores.effects.size == 0 and audit.scores.effect_metrics == ()
    assert [e.value for e in of_interventions(fourth)] != [e.value for e in of_interventions(first)]
    alike(fourth.estimates, Auditor(bars(), auditor.plan).run(other).estimates, 1e-9)
    # Each finding rests on what is carried as on what was measured now.
    patch = next(f for f in second.judgement.findings if f.kind == "region")
    assert {e.age for e in patch.evidence if e.metric in INTERVENTION_METRICS} == {1}


def of_interventions(result: AuditResult) -> list[Estimate]:
    return [e for e in result.estimates if e.metric in (*INTERVENTION_METRICS, *PROBE_METRICS)]


def test_every_audit_may_be_asked_to_intervene_and_none() -> None:
    auditor = Auditor(bars(), replace(QUICK, intervention_every=1))
    first = auditor.run(make_net())
    assert {e.age for e in of_interventions(auditor.run(make_net(), previous=first.summary()))} == {0}
    assert not of_interventions(Auditor(bars(), replace(QUICK, intervention_samples=0)).run(make_net()))


@pytest.mark.parametrize(("age", "every", "ages"), [(0, 1, []), (0, 2, [1]), (1, 2, []), (3, 10, [4]), (9, 10, [])])
def test_what_is_carried_is_one_audit_older(age: int, every: int, ages: list[int]) -> None:
    earlier = (Estimate("removal_effect", 0.5, 0.4, 0.6, 30, region="hair", age=age), Estimate("accuracy", 1, 1, 1, 9))
    assert [e.age for e in carried(earlier, ["removal_effect"], every)] == ages
    assert all(replace(e, age=age) == earlier[0] for e in carried(earlier, ["removal_effect"], every))


def state_of(net: nn.Module) -> list[Any]:
    return [
        *((name, id(t), t.detach().clone()) for name, t in [*net.named_parameters(), *net.named_buffers()]),
        *((n, p.requires_grad, p.grad is None or p.grad.clone()) for n, p in net.named_parameters()),
        *((n, m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in net.named_modules()),
        ("random", torch.get_rng_state(), torch.from_numpy(np.random.get_state()[1].astype(np.int64))),  # noqa: NPY002
        ("grad", torch.is_grad_enabled()),
    ]


def same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return torch.equal(one, two)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return bool(one == two)


class Stop(Exception):
    pass


def draws_and_gives(sample: AuditSample, value: str, fails_at: str = "") -> Tensor:
    torch.rand(3)
    np.random.rand(3)  # noqa: NPY002
    if sample.id == fails_at:
        raise Stop
    return repainted(sample, value)


@pytest.mark.parametrize("fails_at", ["", "10000", "10010"], ids=["never", "first", "later"])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_and_the_generators_are_given_back(fails_at: str, training: bool) -> None:
    net = make_net().train(training)
    net.features[1].train(not training)
    net.hidden.requires_grad_(False)
    net.head.weight.grad = torch.ones_like(net.head.weight)
    plan = replace(QUICK, swaps={"grey": partial(draws_and_gives, fails_at=fails_at)})
    before = state_of(net)
    auditor = Auditor(bars(), plan)
    if fails_at:
        for _ in range(2):
            with pytest.raises(Stop):
                auditor.run(net)
            assert same(before, state_of(net))
    else:
        assert auditor.run(net).estimate("swap_flips", group="grey").n == 24
    assert same(before, state_of(net))


def test_a_swap_that_fails_once_leaves_nothing_half_done() -> None:
    calls: list[str] = []

    def fails_once(sample: AuditSample, value: str) -> Tensor:
        calls.append(sample.id)
        if len(calls) == 6:
            raise Stop
        return repainted(sample, value)

    auditor = Auditor(bars(), replace(QUICK, swaps={"grey": fails_once}))
    with pytest.raises(Stop):
        auditor.run(make_net())
    sound = Auditor(bars(), replace(QUICK, swaps={"grey": repainted})).run(make_net())
    alike(auditor.run(make_net()).estimates, sound.estimates, 1e-9)


@pytest.mark.parametrize(
    ("swaps", "message"),
    [
        ({"hair": repainted}, r"unknown attribute 'hair'.*has grey"),
        ({"grey": lambda s, v: s.image[:, :9]}, r"'10000'.*swapped image of its size \(3, 20, 20\), got \(3, 9, 20\)"),
        ({"grey": lambda s, v: s.image / 255}, r"'10000'.*uint8 tensor"),
    ],
    ids=["unknown attribute", "size", "floats"],
)
def test_a_swap_that_cannot_be_used_is_refused(swaps: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        audit_model(make_net(), bars(), plan=replace(QUICK, swaps=swaps))


def test_the_users_swap_stands_in_for_the_exchange_of_regions() -> None:
    exchanged = audit_model(make_net(), bars(), plan=QUICK)
    assert exchanged.estimate("swap_flips", region="patch", group="grey").n == 24
    swapped = audit_model(make_net(), bars(), plan=replace(QUICK, swaps={"grey": repainted}))
    assert {e.region for e in swapped.estimates if e.metric == "swap_flips"} == {None}
    some = replace(QUICK, swaps={"grey": lambda s, v: repainted(s, v) if s.label else None})
    partly = audit_model(make_net(), bars(), plan=some)
    assert partly.estimate("swap_flips", group="grey").n == 12
    assert partly.estimate("swap_flips", class_name="level", group="grey").n == 0
    none = audit_model(make_net(), bars(), plan=replace(QUICK, swaps={"grey": lambda s, v: None}))
    e = none.estimate("swap_flips", group="grey")
    assert (e.value, e.n, e.reason) == (None, 0, "nothing was swapped")
    assert not [e for e in none.estimates if e.metric == "swap_flips" and e.region]


def test_a_swap_needs_no_region() -> None:
    audit_set = AuditDataset(bars().samples, object=["bar"], classes=["level", "upright"])
    result = audit_model(make_net(), audit_set, plan=replace(QUICK, swaps={"grey": repainted}))
    assert result.estimate("swap_flips", group="grey").n == 24
    assert not [e for e in result.estimates if e.metric == "removal_effect"]
    assert result.scores.effects.shape == (4, 24, 1) and np.isnan(result.scores.effects).all()
    assert not of_interventions(audit_model(make_net(), audit_set, plan=QUICK))


class NotFinite(nn.Module):
    """A net that gives no number for images without a patch."""

    def __init__(self, net: nn.Module, value: float, everywhere: bool = False) -> None:
        super().__init__()
        self.net, self.value, self.everywhere = net, value, everywhere

    def forward(self, images: Tensor) -> Tensor:
        patch = images[:, :, 1:4, 1:4].mean(dim=(1, 2, 3))
        bare = ((patch - 0.47).abs() < 0.2) | self.everywhere
        return torch.where(bare[:, None], self.value, self.net(images))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_outputs_that_are_no_numbers_are_left_out_and_said_to_be(value: float) -> None:
    gone = audit_model(NotFinite(make_net(), value), bars(), plan=QUICK)
    e = gone.estimate("removal_effect", region="patch")
    assert not e.measured and e.n == 0 and e.reason
    assert np.isnan(gone.scores.effects).all() and gone.estimate("accuracy").measured
    # With nothing shown by removal, the region is not cleared by it.
    patch = next(f for f in gone.judgement.findings if f.kind == "region")
    assert patch.verdict is not Verdict.CLEARED
    everywhere = audit_model(NotFinite(make_net(), value, True), bars(), plan=QUICK)
    for e in everywhere.estimates:
        # What a region's pixels show is measured without any model.
        if e.metric in INTERVENTION_METRICS and e.region and e.metric != "region_probe_gain":
            assert not e.measured and e.n == 0 and e.reason == "the model's outputs are not finite", e
    assert {f.verdict for f in everywhere.judgement.findings} == {Verdict.INCONCLUSIVE}


@pytest.mark.parametrize("batch", [1, 4])
def test_the_features_are_what_the_last_linear_layer_reads(batch: int) -> None:
    net = make_net()
    images = torch.rand(batch, 3, SIDE, SIDE, dtype=torch.float64)
    with penultimate(net) as latest:
        assert latest() is None
        logits = net(images)
        features = latest()
        assert features is not None and features.shape == (batch, 16) and not features.requires_grad
        torch.testing.assert_close(features @ net.head.weight.T + net.head.bias, logits)
        net(images + 1)
        assert not torch.equal(latest(), features)  # type: ignore[arg-type]
    assert not any(m._forward_pre_hooks for m in net.modules())
    with pytest.raises(Stop), penultimate(net):
        raise Stop
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_a_net_without_a_linear_layer_has_no_probe_and_says_so() -> None:
    convolutions = nn.Sequential(
        nn.Conv2d(3, 4, 5), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    result = audit_model(convolutions, bars(), plan=QUICK)
    for metric in PROBE_METRICS:
        e = result.estimate(metric, group="grey")
        assert not e.measured and e.n == 0 and "no linear layer" in e.reason
    assert audit_model(make_net(), bars(), plan=QUICK).estimate("probe_accuracy", group="grey").measured


@cache
def trained(agreement: float, contrast: int, seed: int = 1) -> tuple[nn.Module, Metadata]:
    """A net trained on bars whose patch goes with the class in a share `agreement` of the images."""
    rng = np.random.default_rng(seed)
    labels = np.arange(800) % 2
    values = np.where((rng.random(800) < agreement) == (labels == 1), "light", "dark")
    images = torch.stack(
        [picture(i, int(y), str(v), contrast=contrast) for i, (y, v) in enumerate(zip(labels, values, strict=True))]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Net()
        optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
        targets = torch.from_numpy(labels)
        for _ in range(8):
            for chosen in torch.randperm(800).split(40):
                loss = nn.functional.cross_entropy(net(images[chosen].float() / 255), targets[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return net.eval(), Metadata.of(labels.tolist(), {"grey": values.tolist()})


@pytest.mark.parametrize("by_user", [True, False], ids=["the user's swap", "exchanged patches"])
@pytest.mark.parametrize(("agreement", "contrast"), [(0.95, FAINT), (0.5, CLEAR)], ids=["planted", "independent"])
def test_a_planted_cue_is_relied_on_and_one_as_salient_is_not(agreement: float, contrast: int, by_user: bool) -> None:
    net, metadata = trained(agreement, contrast)
    swaps = {"grey": partial(repainted, contrast=contrast)} if by_user else {}
    plan = AuditPlan(fitness_samples=0, swaps=swaps)
    result = audit_model(net, bars(40, contrast), plan=plan, training=metadata)
    verdicts = {f.kind: f.verdict for f in result.judgement.findings}
    region = None if by_user else "patch"
    flips = result.estimate("swap_flips", region=region, group="grey")
    effect = result.estimate("removal_effect", region="patch")
    if agreement > 0.9:
        assert verdicts == {"region": Verdict.RELIANCE, "attribute": Verdict.RELIANCE}
        assert effect.low > 0.1 and flips.low > 0.1  # type: ignore[operator]
        gap = result.estimate("swap_gap", region=region, group="grey")
        aligned = result.estimate("swap_aligned_accuracy", region=region, group="grey")
        conflicting = result.estimate("swap_conflicting_accuracy", region=region, group="grey")
        assert gap.value == pytest.approx(aligned.value - conflicting.value) and gap.low > 0.1  # type: ignore[operator]
        # With two classes whoever leaves the label follows the cue.
        follows = result.estimate("swap_follows", region=region, group="grey")
        assert follows.value >= gap.value - 0.05  # type: ignore[operator]
        if by_user:
            # The swap by hand, on pictures that the audit has not seen in this form.
            assert gap.value == pytest.approx(drop_by_hand(net, contrast), abs=1e-6)
    else:
        assert Verdict.RELIANCE not in verdicts.values() and verdicts["region"] is not Verdict.SUSPECTED
        assert effect.high < 0.1 and abs(flips.value) < 0.05  # type: ignore[operator, arg-type]
        # What goes with which class is not known, so no swap is for or against it.
        assert not [e for e in result.estimates if e.metric == "swap_gap"]


def drop_by_hand(net: nn.Module, contrast: int) -> float:
    """Accuracy on the audited bars with the patch that goes with the class, less that with the other."""
    hits = {"light": 0, "dark": 0}
    for sample in bars(40).samples:
        for value in GREYS:
            shown = picture(int(sample.id), sample.label, value, contrast=contrast)
            with torch.no_grad():
                right = int(net(shown[None].float() / 255).argmax()) == sample.label
            hits["light" if (value == "light") == (sample.label == 1) else "dark"] += right
    return (hits["light"] - hits["dark"]) / 160
