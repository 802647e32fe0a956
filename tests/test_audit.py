"""Audits against a composition by hand, image by image; planted cues beside innocent ones; the model given back."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pixelwise
import pytest
import torch
from torch import Tensor, nn

from bias_audit import AuditDataset, Auditor, AuditPlan, AuditResult, AuditSample, audit_model, explain, read_run
from bias_audit.data.scenes import GENDERS, OCCUPATIONS, scene_dataset
from bias_audit.localization import LEVELS
from bias_audit.policies.file import read_policy
from bias_audit.terms import GROUP_METRICS, REMAINDER, Estimate, Outcome, Verdict

SIZE = 32
REGIONS = ("coat", "stethoscope", "face", "hair", REMAINDER)
METHODS = ("gradcam", "hirescam")
NAN = float("nan")


class Net(nn.Module):
    """A hidden layer in front of which nothing is pooled: the two methods differ. Float64, so that ties stay ties."""

    def __init__(self, outputs: int = 2) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 5, stride=4), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1)
        )
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.5)
        self.hidden = nn.Linear(5 * 7 * 7, 8)
        self.head = nn.Linear(8, outputs)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.relu(self.features(images))
        return self.head(torch.tanh(self.hidden(self.dropout(maps.flatten(1)))))


def make_net(outputs: int = 2, seed: int = 3) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Net(outputs)
        for _ in range(3):
            net(torch.rand(16, 3, SIZE, SIZE))  # running statistics of their own
    return net.double().eval()


def counts(each: int) -> dict[tuple[str, str], int]:
    return dict.fromkeys(product(OCCUPATIONS, GENDERS), each)


@cache
def scenes(each: int = 3, seed: int = 5) -> AuditDataset:
    return scene_dataset(counts(each), seed, SIZE)


def inputs(audit_set: AuditDataset) -> Tensor:
    return torch.stack([torch.as_tensor(s.image) for s in audit_set.samples]).double() / 255  # type: ignore[union-attr]


def masks_of(sample: Any) -> dict[str, Any]:
    masks = {name: sample.regions[name].numpy() for name in REGIONS[:-1]}
    return masks | {REMAINDER: ~np.logical_or.reduce(list(masks.values()))}


def by_hand(
    net: nn.Module, audit_set: AuditDataset, target: Callable[[Tensor], Tensor], plan: AuditPlan
) -> dict[tuple[str, str, str, int], tuple[float, float]]:
    """Every score, from `explain` and loops over pixels: NaN where there is none; and how far off it may be."""
    values = {}
    for method in METHODS:
        heatmaps = explain(net, inputs(audit_set), target=target, method=method, sign=plan.sign, layer=plan.layer)
        pixels = heatmaps.upsample((SIZE, SIZE)).double().numpy()
        for i, sample in enumerate(audit_set.samples):
            fine = pixelwise.upsampled(heatmaps.maps[i].numpy(), SIZE, SIZE)
            for region, mask in masks_of(sample).items():
                found = {
                    "energy_share": pixelwise.energy_share(fine, mask),
                    "enrichment": pixelwise.enrichment(fine, mask),
                    "pointing_game": pixelwise.pointing_game(pixels[i], mask, plan.pointing_tolerance),
                    "iou": pixelwise.iou(pixels[i], mask, plan.iou_threshold),
                    "relevance_rank_accuracy": pixelwise.relevance_rank_accuracy(pixels[i], mask),
                }
                slack = pixelwise.rank_slack(pixels[i], mask, LEVELS - 3)
                off = {m: 1e-5 + (slack if m == "relevance_rank_accuracy" else 0) for m in found}
                values |= {(m, method, region, i): (NAN if v is None else v, off[m]) for m, v in found.items()}
    return values


def margin_to(labels: Tensor, outputs: Tensor) -> Tensor:
    """The label's output minus the largest of the others, row by row."""
    rows = [row[y] - torch.cat([row[:y], row[y + 1 :]]).max() for row, y in zip(outputs, labels.tolist(), strict=True)]
    return torch.stack(rows)


def label_to(labels: Tensor, outputs: Tensor) -> Tensor:
    return torch.stack([row[y] for row, y in zip(outputs, labels.tolist(), strict=True)])


def signed_logit(labels: Tensor, outputs: Tensor) -> Tensor:
    return torch.stack([row[0] if y else -row[0] for row, y in zip(outputs, labels.tolist(), strict=True)])


def squares(labels: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda outputs: (outputs[:, 0] + labels) ** 2


PLANS = {
    "margin": (AuditPlan(), margin_to, 2),
    "margin of three": (AuditPlan(iou_threshold=0.5), margin_to, 3),
    "label": (AuditPlan(target="label", pointing_tolerance=3), label_to, 2),
    "predicted": (AuditPlan(target="predicted", sign="absolute"), lambda _, outputs: outputs.max(dim=1).values, 3),
    "a function": (AuditPlan(target=squares, sign="negative"), lambda y, outputs: squares(y)(outputs), 2),
    "one logit": (AuditPlan(pointing_tolerance=1), signed_logit, 1),
    "one logit, label": (AuditPlan(target="label", layer="features.2"), signed_logit, 1),
}


@pytest.mark.parametrize("name", PLANS)
def test_scores_are_those_of_explain_and_loops_over_pixels(name: str) -> None:
    plan, target, classes = PLANS[name]
    audit_set, net = scenes(), make_net(classes)
    if classes == 1:
        net.head.bias.data -= net(inputs(audit_set)).quantile(0.5)  # logits of both signs, close to 0
    scores = audit_model(net, audit_set, plan=plan).scores
    labels = torch.tensor([s.label for s in audit_set.samples])
    expected = by_hand(net, audit_set, partial(target, labels), plan)
    assert scores.regions == REGIONS and scores.methods == METHODS and scores.ids == audit_set.ids
    measured = 0
    for (metric, method, region, i), (value, off) in expected.items():
        found = float(scores.of(metric, method, region)[i])
        assert found == pytest.approx(value, abs=off, rel=1e-5, nan_ok=True)
        measured += not math.isnan(value)
    assert measured > 0.8 * 12 * 4 * 2 * 5  # a stethoscope is missing now and then
    outputs = net(inputs(audit_set)).detach()
    if classes == 1:
        decided = [int(row[0] > 0) for row in outputs]
        assert set(decided) == {0, 1} and outputs.abs().max() < 0.5
        margin = signed_logit(labels, outputs)
    else:
        decided = [int(row.argmax()) for row in outputs]
        margin = margin_to(labels, outputs)
    assert scores.predictions.tolist() == decided
    np.testing.assert_allclose(scores.margin, margin, rtol=1e-4, atol=1e-6)


def test_the_record_keeps_maps_magnitudes_areas_and_estimates_of_the_scores() -> None:
    audit_set, net = scenes(), make_net()
    result = audit_model(net, audit_set)
    scores = result.scores
    labels = torch.tensor([s.label for s in audit_set.samples])
    for m, method in enumerate(METHODS):
        maps = explain(net, inputs(audit_set), target=partial(margin_to, labels), method=method).maps.numpy()
        np.testing.assert_allclose(scores.magnitude[m], maps.max(axis=(1, 2)), rtol=1e-5)
        np.testing.assert_allclose(scores.maps[m] * scores.magnitude[m][:, None, None], maps, rtol=2e-3, atol=1e-7)
    assert not np.allclose(scores.maps[0], scores.maps[1], atol=0.05)  # the head keeps the methods apart
    for i, sample in enumerate(audit_set.samples):
        for r, mask in enumerate(masks_of(sample).values()):
            expected = mask.sum() / SIZE**2 if mask.any() else NAN
            assert float(scores.areas[i, r]) == pytest.approx(expected, rel=1e-5, nan_ok=True)
    share = scores.of("energy_share", "hirescam", "hair")
    men = [i for i, s in enumerate(audit_set.samples) if s.attributes["gender"] == "male" and s.label == 1]
    e = result.estimate("energy_share", region="hair", class_name="nurse", group="gender=male", method="hirescam")
    assert e.n == len(men) == 3 and e.value == pytest.approx(float(np.mean([share[i] for i in men])), rel=1e-5)
    right = [int(scores.predictions[i]) == audit_set.samples[i].label for i in men]
    assert result.estimate("accuracy", class_name="nurse", group="gender=male").value == sum(right) / 3


def same(one: tuple[Estimate, ...], two: tuple[Estimate, ...], tolerance: float = 1e-5) -> None:
    def names(estimates: tuple[Estimate, ...]) -> list[Any]:
        return [(e.metric, e.region, e.class_name, e.group, e.method, e.n, e.reason) for e in estimates]

    def numbers(estimates: tuple[Estimate, ...]) -> Any:
        return np.array([(e.value, e.low, e.high) for e in estimates], dtype=float)

    assert names(one) == names(two)
    np.testing.assert_allclose(numbers(one), numbers(two), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("size", [1, 5, 7])
def test_the_batch_size_does_not_matter(size: int) -> None:
    net = make_net()
    whole = audit_model(net, scenes(), plan=AuditPlan(batch_size=12))
    parts = audit_model(net, scenes(), plan=AuditPlan(batch_size=size))
    assert parts.scores.predictions.tolist() == whole.scores.predictions.tolist()
    for field in ("values", "areas", "magnitude", "margin"):
        np.testing.assert_allclose(getattr(parts.scores, field), getattr(whole.scores, field), atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(parts.scores.maps, whole.scores.maps, atol=1e-3)
    same(parts.estimates, whole.estimates)


def test_a_second_audit_says_the_same_and_gains_are_measured_against_the_first() -> None:
    auditor = Auditor(scenes(), AuditPlan(batch_size=5))
    net = make_net()
    first, again = auditor.run(net), auditor.run(net, step=7, epoch=2, weights="ema", trigger="step")
    same(first.estimates, again.estimates, 0)
    assert (again.step, again.epoch, again.weights, again.trigger) == (7, 2, "ema", "step")
    other = auditor.run(make_net(seed=9), reference=first.scores)
    unchanged = auditor.run(net, reference=first.scores)
    for region, method in product(REGIONS, METHODS):
        gain = other.estimate("energy_share_gain", region=region, method=method)
        now, then = (r.scores.of("energy_share", method, region) for r in (other, first))
        both = [float(a) - float(b) for a, b in zip(now, then, strict=True) if not math.isnan(a - b)]
        assert gain.n == len(both) and gain.value == pytest.approx(np.mean(both), abs=1e-6) and abs(gain.value) > 1e-4
        zero = unchanged.estimate("energy_share_gain", region=region, method=method)
        assert (zero.value, zero.low, zero.high) == (0, 0, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_of_another_precision_is_audited_without_a_named_layer(dtype: torch.dtype) -> None:
    net = make_net().to(dtype)
    result = audit_model(net, scenes())
    heatmaps = explain(net, scenes().batch(range(12)).images)
    assert heatmaps.layer == "relu" and heatmaps.maps.dtype == torch.float32
    assert heatmaps.outputs.argmax(dim=1).tolist() == result.scores.predictions.tolist()
    assert np.isfinite(result.scores.of("energy_share", "gradcam", "hair")).any()


def test_progress_is_told_after_every_batch() -> None:
    told: list[tuple[int, int]] = []

    def tell(done: int, of: int) -> None:
        told.append((done, of))

    audit_model(make_net(), scenes(), plan=AuditPlan(batch_size=5, intervention_samples=0), progress=tell)
    assert told == [(5, 12), (10, 12), (12, 12)]
    told.clear()
    # The images that regions are removed from are worked on a second time.
    audit_model(make_net(), scenes(), plan=AuditPlan(batch_size=5, intervention_samples=8), progress=tell)
    assert told[:3] == [(5, 20), (10, 20), (12, 20)] and told[-1] == (20, 20)
    assert told == sorted(told) and {done for done, _ in told[3:]} == set(range(13, 21))


def labelled(labels: list[int]) -> AuditDataset:
    patch = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    patch[4:9, 6:20] = True
    rng = torch.Generator().manual_seed(0)
    samples = [
        AuditSample(
            torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8, generator=rng),
            y,
            {"patch": patch},
            {},
            f"image {i}",
        )
        for i, y in enumerate(labels)
    ]
    return AuditDataset(samples, spurious=["patch"])


@pytest.mark.parametrize(("outputs", "classes"), [(1, 2), (2, 2), (3, 3)])
@pytest.mark.parametrize("target", ["margin", "label", "predicted"])
def test_a_label_that_the_model_has_no_output_for_names_its_sample(outputs: int, classes: int, target: Any) -> None:
    plan = AuditPlan(batch_size=2, target=target)
    fits = audit_model(make_net(outputs), labelled([0, classes - 1, 0]), plan=plan)
    assert fits.estimate("accuracy").n == 3
    with pytest.raises(ValueError, match=rf"sample 'image 2': label {classes} is out of range: .* {classes} classes"):
        audit_model(make_net(outputs), labelled([0, 1, classes]), plan=plan)


class Broken(nn.Module):
    """A net whose outputs are not numbers wherever `hits(images)` says so."""

    def __init__(self, hits: Callable[[Tensor], Tensor], value: float = NAN) -> None:
        super().__init__()
        self.net, self.hits, self.value = make_net(), hits, value

    def forward(self, images: Tensor) -> Tensor:
        outputs = self.net(images)
        factor = torch.ones(len(images), 1, dtype=outputs.dtype)
        factor[self.hits(images)] = self.value
        return outputs * factor


def everywhere(images: Tensor) -> Tensor:
    return torch.ones(len(images), dtype=torch.bool)


STRICT = {
    "min_samples": 1,
    "tolerance": {"enrichment": 30.0, "accuracy_gap": 0.999},
    "rules": [
        {"metric": "verdict", "region": "spurious", "forbid": ["reliance", "suspected"]},
        {"metric": "verdict", "group": "gender", "forbid": ["reliance", "suspected"], "name": "for whom"},
        {"metric": "enrichment", "region": "hair", "max": 1000},
        {"metric": "accuracy", "min": 0, "class": "each", "name": "each class"},
        {"metric": "accuracy", "min": 0, "group": "gender", "name": "each gender"},
        {"metric": "worst_group_accuracy", "group": "gender", "min": 0},
        {"metric": "accuracy_gap", "group": "gender", "class": "each", "max": 1},
    ],
}


# What these say is of the images and their labels, or of a layer that is sound, not of the outputs.
OF_DATA = ("audit_", "region_probe_gain", "probe_")


@pytest.mark.parametrize("value", [NAN, math.inf])
def test_outputs_that_are_not_numbers_are_never_a_pass(value: float, tmp_path: Path) -> None:
    result = audit_model(Broken(everywhere, value), scenes(), policy=STRICT, out=tmp_path)
    assert result.scores.predictions.tolist() == [-1] * 12 and np.isnan(result.scores.margin).all()
    of_model = [e for e in result.estimates if not e.metric.startswith(OF_DATA)]
    if math.isnan(value):
        assert np.isnan(result.scores.values).all()
        for e in of_model:
            assert e.metric == "coverage" or (not e.measured and e.n == 0 and e.reason)
            assert e.metric != "coverage" or e.value == (0 if e.n else None)
    for e in of_model:
        if e.region is None and e.metric.startswith(GROUP_METRICS) and e.metric != "wrong_reason_rate":
            assert (e.value, e.low, e.high, e.n) == (None, None, None, 0) and "finite" in e.reason
    assert {f.verdict for f in result.judgement.findings} == {Verdict.INCONCLUSIVE}
    assert result.judgement.outcome is Outcome.INCONCLUSIVE
    open_ = {c.rule for c in result.judgement.checks if c.outcome is Outcome.INCONCLUSIVE}
    assert {"for whom", "each class", "each gender"} < open_
    assert not math.isnan(value) or {c.outcome for c in result.judgement.checks} == {Outcome.INCONCLUSIVE}
    assert read_run(tmp_path).audits[0].estimates == result.estimates
    # The same policy holds for the same net where its outputs are numbers.
    sound = audit_model(Broken(everywhere, 1.0), scenes(), policy=STRICT, plan=AuditPlan(intervention_samples=0))
    assert (sound.scores.predictions >= 0).all() and sound.judgement.outcome is Outcome.HELD


def test_a_class_of_which_nothing_is_decided_is_never_passed_over() -> None:
    audit_set = scenes()
    nurses = inputs(audit_set)[torch.tensor(audit_set.labels == 1)]

    def is_nurse(images: Tensor) -> Tensor:
        return torch.tensor([any(torch.allclose(image, nurse, atol=1e-5) for nurse in nurses) for image in images])

    result = audit_model(Broken(is_nurse), audit_set, policy=STRICT)
    assert (result.scores.predictions == -1).tolist() == (audit_set.labels == 1).tolist()
    assert result.estimate("accuracy", class_name="doctor").measured and not result.estimate("accuracy").measured
    for e in result.estimates:
        if e.class_name == "nurse" and e.metric != "coverage" and not e.metric.startswith(OF_DATA):
            assert not e.measured and e.reason
    assert not result.estimate("worst_group_accuracy", group="gender").measured
    outcomes = {c.subject: c.outcome for c in result.judgement.checks if c.rule == "each class"}
    assert outcomes == {
        "accuracy for class doctor": Outcome.HELD,
        "accuracy for class nurse": Outcome.INCONCLUSIVE,
    }
    assert result.judgement.outcome is Outcome.INCONCLUSIVE
    assert {f.verdict for f in result.judgement.findings} == {Verdict.INCONCLUSIVE}


class Colours(nn.Module):
    """Reads one colour pair and nothing else: class 1 for the second of the pair, class 0 for the first."""

    def __init__(self, first: list[float], second: list[float]) -> None:
        super().__init__()
        self.look = nn.Conv2d(3, 2, 1)
        self.relu = nn.ReLU()
        self.look.weight.data = torch.tensor([first[:3], second[:3]])[:, :, None, None]
        self.look.bias.data = torch.tensor([first[3], second[3]])

    def forward(self, images: Tensor) -> Tensor:
        return self.relu(self.look(images)).mean(dim=(2, 3))


# Weights of red, green and blue, and a bias: yellow against red, cyan against blue.
READS_OBJECT = ([1.0, 1.0, 0.0, -1.1], [1.0, -1.0, 0.0, 0.0])
READS_MARK = ([0.0, 1.0, 1.0, -1.1], [0.0, -1.0, 1.0, 0.0])
REDS, BLUES = [(200, 200, 0), (200, 0, 0)], [(0, 200, 200), (0, 0, 200)]


def marked(each: int = 45) -> AuditDataset:
    """A yellow or red object that is the class, and a cyan or blue mark that is as salient and is not."""
    rng = np.random.default_rng(0)
    samples = []
    for label, mark, number in product((0, 1), (0, 1), range(each)):
        picture = np.zeros((12, 12, 3))
        picture[2:6, 1:5], picture[8:11, 7:11] = REDS[label], BLUES[mark]
        picture += picture.clip(0, 1) * rng.integers(-20, 21, (12, 12, 1))
        masks = {name: torch.zeros(12, 12, dtype=torch.bool) for name in ("object", "mark")}
        masks["object"][2:6, 1:5] = masks["mark"][8:11, 7:11] = True
        image = torch.from_numpy(picture.clip(0, 255).astype(np.uint8)).permute(2, 0, 1).contiguous()
        regions = {"thing": masks["object"], "mark": masks["mark"]}
        samples.append(AuditSample(image, label, regions, {"mark": ("cyan", "blue")[mark]}, f"{label}{mark}{number}"))
    return AuditDataset(samples, object=["thing"], spurious=["mark"])


@pytest.mark.parametrize(
    ("reads", "verdict", "outcome"),
    [(READS_MARK, Verdict.RELIANCE, Outcome.VIOLATED), (READS_OBJECT, Verdict.CLEARED, Outcome.HELD)],
    ids=["planted", "innocent"],
)
def test_a_cue_that_decides_is_found_and_one_as_salient_that_does_not_is_cleared(
    reads: tuple[list[float], list[float]], verdict: Verdict, outcome: Outcome
) -> None:
    result = audit_model(Colours(*reads), marked())
    assert {(f.kind, f.name): f.verdict for f in result.judgement.findings} == {
        ("region", "mark"): verdict,
        ("attribute", "mark"): verdict,
    }
    assert result.judgement.outcome is outcome
    planted = verdict is Verdict.RELIANCE
    area = 12 / 144
    for method, label in product(METHODS, "01"):
        e = result.estimate("enrichment", region="mark", class_name=label, method=method)
        assert e.value == pytest.approx(1 / area if planted else 0, rel=0.2)
        # Where mark and label disagree, nothing speaks for the label: the map is silent.
        covered = result.estimate("coverage", region="mark", class_name=label, method=method)
        assert covered.value == pytest.approx(0.5 if planted else 1) and covered.n == 90
    assert result.estimate("accuracy_gap", class_name="1", group="mark").value == pytest.approx(1 if planted else 0)


def test_of_a_larger_set_a_part_is_drawn_once_and_recorded() -> None:
    audit_set, net = scenes(6, 2), make_net()
    plan = AuditPlan(max_samples=10, batch_size=4, seed=1)
    auditor = Auditor(audit_set, plan)
    first, again = auditor.run(net), auditor.run(make_net(seed=8))
    ids = first.scores.ids
    assert len(set(ids)) == len(ids) == 10 and set(ids) < set(audit_set.ids)
    assert again.scores.ids == ids == Auditor(audit_set, plan).run(net).scores.ids
    others = [Auditor(audit_set, AuditPlan(max_samples=10, seed=s)).run(net).scores.ids for s in (2, 3)]
    assert ids not in others
    by_id = {s.id: s for s in audit_set.samples}
    drawn = [(by_id[i].label, by_id[i].attributes["gender"]) for i in ids]
    assert sorted(drawn.count(cell) for cell in product((0, 1), GENDERS)) == [2, 2, 3, 3]
    manifest = auditor.manifest(net)
    assert (manifest.samples_available, manifest.samples_audited, manifest.seed) == (24, 10, 1)
    assert auditor.sheet.ids == ids
    whole = audit_model(net, audit_set).scores
    places = [whole.ids.index(i) for i in ids]
    np.testing.assert_allclose(first.scores.values, whole.values[:, :, places], atol=1e-5, rtol=1e-5)
    assert first.estimate("accuracy").n == 10


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            {"metric": "iou", "region": "hat", "max": 1},
            "unknown region 'hat'.*coat, face, hair, remainder, stethoscope",
        ),
        ({"metric": "accuracy", "class": "surgeon", "min": 0}, "unknown class 'surgeon'.*doctor, nurse"),
        ({"metric": "accuracy_gap", "group": "age", "max": 1}, "unknown attribute 'age'.*gender"),
        ({"metric": "accuracy", "group": "gender=other", "min": 0}, "'gender' has no value 'other'.*female, male"),
    ],
)
def test_a_policy_that_names_what_is_not_there_is_refused_before_the_audit(rule: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Auditor(scenes(), policy={"rules": [rule]})


def test_a_policy_of_known_names_is_kept() -> None:
    policy = {"rules": [{"metric": "accuracy", "class": "nurse", "group": "gender=male", "min": 0}], "min_samples": 1}
    result = Auditor(scenes(), policy=policy).run(make_net())
    (check,) = result.judgement.checks
    assert check.estimate == result.estimate("accuracy", class_name="nurse", group="gender=male")
    assert check.outcome is Outcome.HELD


def test_a_run_directory_reads_back_as_the_result(tmp_path: Path) -> None:
    audit_set, net = scenes(), make_net()
    plan = AuditPlan(target=squares, sign="absolute", batch_size=5, seed=4)
    policy = {"min_samples": 2, "rules": [{"metric": "iou", "region": "hair", "max": 0.9}]}
    result = audit_model(net, audit_set, plan=plan, policy=policy, out=tmp_path / "audit")
    run = read_run(tmp_path)
    assert run.ended and not run.torn and not run.failed and len(run.audits) == 1
    assert run.audits[0] == result.summary() and isinstance(result, AuditResult)
    for name, array in vars(result.scores).items():
        np.testing.assert_array_equal(vars(run.scores(0))[name], array)
    manifest = run.manifest
    assert (manifest.model, manifest.layer, manifest.methods) == ("Net", "relu", METHODS)
    assert (manifest.target, manifest.sign, manifest.seed) == ("squares", "absolute", 4)
    assert manifest.subjects == audit_set.subjects and manifest.policy == read_policy(policy).policy
    assert (manifest.samples_available, manifest.samples_audited) == (12, 12)
    assert run.sheet().ids == audit_set.ids and len(run.sheet().thumbnails) == 12


def state_of(net: nn.Module) -> dict[str, Any]:
    return {
        "tensors": {name: (id(t), t.detach().clone()) for name, t in [*net.named_parameters(), *net.named_buffers()]},
        "grads": {n: (p.requires_grad, None if p.grad is None else p.grad.clone()) for n, p in net.named_parameters()},
        "modes": {name: m.training for name, m in net.named_modules()},
        "hooks": {
            name: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for name, m in net.named_modules()
        },
        "random": (torch.get_rng_state(), np.random.get_state()[1].copy()),  # noqa: NPY002
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


def assert_same_state(one: Any, two: Any) -> None:
    assert type(one) is type(two)
    if isinstance(one, dict):
        assert one.keys() == two.keys()
    if isinstance(one, dict | tuple):
        pairs = [(one[k], two[k]) for k in one] if isinstance(one, dict) else zip(one, two, strict=True)
        for a, b in pairs:
            assert_same_state(a, b)
    else:
        np.testing.assert_array_equal(one, two)


class Stop(Exception):
    pass


def refuse_after_first(done: int, of: int) -> None:
    if done < of:
        raise Stop


class DrawsAndFails(Net):
    """Draws random numbers, writes into a buffer, and fails on its third forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        torch.rand(1)
        np.random.rand()  # noqa: NPY002
        self.calls += 1
        if self.calls > 2:  # the first looks for the layer
            raise Stop
        return super().forward(images)


@pytest.mark.parametrize("where", ["model", "progress", "label", "target", "nowhere"])
def test_the_model_is_given_back_as_it_was(where: str) -> None:
    torch.manual_seed(0)
    net: nn.Module = DrawsAndFails() if where == "model" else Net()
    net.train()
    net.features[1].eval()  # type: ignore[index, union-attr]
    net.hidden.requires_grad_(False)  # type: ignore[union-attr]
    net.head.weight.grad = torch.ones_like(net.head.weight)  # type: ignore[union-attr, arg-type]
    audit_set = labelled([0, 1, 1, 0, 2 if where == "label" else 1])

    def target(labels: Tensor) -> Callable[[Tensor], Tensor]:
        if len(labels) == 1:
            raise Stop
        return lambda outputs: outputs[:, 0]

    plan = AuditPlan(batch_size=2, target=target if where == "target" else "margin")
    before = state_of(net)
    run = partial(audit_model, net, audit_set, plan=plan)
    if where == "nowhere":
        assert run().estimate("accuracy").n == 5
    elif where == "progress":
        with pytest.raises(Stop):
            run(progress=refuse_after_first)
    else:
        with pytest.raises(ValueError if where == "label" else Stop):
            run()
    assert_same_state(before, state_of(net))
    if where != "model":
        loss = net(torch.rand(4, 3, SIZE, SIZE)).sum()
        loss.backward()
        assert net.features[0].weight.grad is not None  # type: ignore[index, union-attr]


def test_a_forward_context_is_entered_for_every_batch() -> None:
    entered: list[bool] = []

    class Context:
        def __enter__(self) -> None:
            entered.append(True)

        def __exit__(self, *_: Any) -> None:
            entered.append(False)

    auditor = Auditor(labelled([0, 1, 1]), AuditPlan(batch_size=2, fitness_samples=0, intervention_samples=0))
    auditor.run(make_net(), forward_context=Context)
    # Once to find the layer, then for each batch.
    assert entered == [True, False] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sign": "signed"}, "an audit measures shares of energy, which signed maps do not have"),
        ({"sign": "both"}, "unknown sign 'both': expected one of positive, negative, absolute"),
        ({"target": "logit"}, "unknown target 'logit': expected one of label, margin, predicted"),
        ({"target": 3}, "unknown target 3"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_samples": -2}, "max_samples must be at least 1, got -2"),
        ({"iou_threshold": 1.0}, r"iou_threshold must lie in \[0, 1\), got 1.0"),
        ({"iou_threshold": -0.1}, r"iou_threshold must lie in \[0, 1\), got -0.1"),
        ({"iou_threshold": NAN}, r"iou_threshold must lie in \[0, 1\), got nan"),
        ({"pointing_tolerance": -1}, "pointing_tolerance must be at least 0, got -1"),
        ({"fitness_samples": -1}, "fitness_samples must be at least 0, got -1"),
        ({"fitness_every": 0}, "fitness_every must be at least 1, got 0"),
    ],
)
def test_a_plan_out_of_range_is_refused_by_name(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AuditPlan(**options)


def test_a_plan_at_its_limits_is_taken() -> None:
    plan = AuditPlan(batch_size=1, max_samples=1, iou_threshold=0.0, pointing_tolerance=0, sign="negative")
    assert plan.target_name == "margin" and AuditPlan(target=squares).target_name == "squares"
    assert audit_model(make_net(), scenes(), plan=plan).estimate("accuracy").n == 1


def test_images_without_any_region_are_audited() -> None:
    samples = [replace_regions(s) for s in scenes().samples]
    result = audit_model(make_net(), AuditDataset(samples, classes=OCCUPATIONS))
    assert result.scores.regions == (REMAINDER,) and result.scores.maps.shape[1] == len(samples)
    assert result.estimate("accuracy").measured
    assert [f.name for f in result.judgement.findings] == ["gender"]
    assert result.judgement.outcome is Outcome.INCONCLUSIVE


def replace_regions(sample: Any) -> AuditSample:
    return AuditSample(sample.image, sample.label, {}, sample.attributes, sample.id)
