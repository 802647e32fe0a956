"""A run directory made of seeded random numbers, as a training run would leave it.

Enters: what the run should show (how much the spurious regions are looked at, how far accuracy differs by group, how
wide the intervals are). Leaves: a run directory written through `RunDirectory` and judged by `judge`.

No model is involved. Scores of samples are measured on invented heatmaps; estimates are drawn around the given values.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from bias_audit.policies.policy import Policy
from bias_audit.records.files import AUDITS
from bias_audit.records.manifest import Manifest
from bias_audit.records.results import AuditResult
from bias_audit.records.runs import Run, read_run
from bias_audit.records.samples import ChangedPictures, PackedMasks, SampleScores, SampleSheet
from bias_audit.records.writing import RunDirectory
from bias_audit.terms import EXPLAINER_METRICS, REMAINDER, Estimate, Role, Subjects
from bias_audit.verdicts.judgement import judge

Array = npt.NDArray[Any]

METHODS = ("gradcam", "hirescam")
EFFECTS = ("removal_effect", "removal_score", "removal_margin", "removal_flips")
METRICS = ("energy_share", "enrichment", "pointing_game", "iou", "relevance_rank_accuracy")
# Ellipses (left, top, right, bottom) as shares of the image; regions of other names are laid out in a row of bands.
SHAPES = {"coat": (0.18, 0.62, 0.82, 1.15), "hair": (0.28, 0.06, 0.72, 0.36), "face": (0.34, 0.22, 0.66, 0.62)}
POLICY = Policy.model_validate(
    {
        "min_samples": 5,
        "tolerance": {"enrichment": 1.25, "accuracy_gap": 0.1},
        "rules": [
            {"metric": "verdict", "region": "spurious", "forbid": ["reliance"]},
            {"metric": "enrichment", "region": "spurious", "max": 1.5},
            {"metric": "enrichment", "region": "object", "min": 1.0, "severity": "warn"},
            {"metric": "worst_group_accuracy", "group": "gender", "min": 0.5},
        ],
    }
)


def made_once(new_folder: Callable[[str], Path]) -> Callable[..., Run]:
    """`make_run` of one audit of 60 samples, made once for the same arguments; not to be written to."""
    made: dict[str, Run] = {}

    def of(**options: Any) -> Run:
        known = repr(sorted(options.items(), key=lambda item: item[0]))
        if known not in made:
            path = new_folder("runs") / "run"
            made[known] = read_run(make_run(path, **{"audits": 1, "samples": 60} | options))
        return made[known]

    return of


def make_run(
    path: str | Path,
    *,
    audits: int = 3,
    samples: int = 24,
    regions: Sequence[tuple[str, Role]] = (("coat", "object"), ("hair", "spurious"), ("face", "spurious")),
    attributes: Sequence[tuple[str, Sequence[str]]] = (("gender", ("female", "male")),),
    classes: Sequence[str] = ("doctor", "nurse"),
    ids: Sequence[str] | None = None,
    map_size: tuple[int, int] = (8, 8),
    image_size: tuple[int, int] = (96, 96),
    seed: int = 0,
    hair_enrichment: float = 2.0,
    enrichment: Mapping[str, float] | None = None,
    gap: float = 0.3,
    spread: float = 0.1,
    silent: int = 1,
    fitness: Mapping[str, float] | None = None,
    removal: Mapping[str, float] | None = None,
    shows: Sequence[str] | None = None,
    lacking: tuple[str, int] | None = None,
    association: float | None = None,
    policy: Policy | None = None,
    run_id: str = "synthetic-0",
    differing: Mapping[str, Any] | None = None,
    reference: bool = False,
    failed: str = "",
    ended: bool = True,
    torn: bool = False,
) -> Path:
    """Write a run directory at `path` and return it.

    As it stands the run is violated (reliance on hair). `hair_enrichment=0.7, gap=0.02, spread=0.02` makes it held,
    `spread=3.0` inconclusive. `enrichment` gives other regions' values at the last audit; `gap` is the accuracy of the
    best minus the worst group then, `spread` the half-width of the intervals relative to the value. Of each audit
    `silent` samples have an all-zero heatmap. `fitness` gives each explanation method's similarity to random weights,
    measured at the first audit and carried on. `removal` gives the share of decisions that change without a region at
    the last audit, which grows from 0 as all else does, and as much of the margin; the last audit has its effect on
    each sample, and pictures of four samples without the region, and with another value of each attribute. `shows` are
    those of them from which every attribute can be read, None if nobody tried. `lacking` names a region that so many
    of the samples do not show. `association` is every attribute's with
    the label in the training data. `policy` is by default `POLICY`, or the tool's own where `attributes` has no gender.
    `differing` gives fields of the manifest other values.
    `reference` puts an audit before training in front, at step 0, beside the `audits`. `failed` is the reason why a
    further audit could not be made; `torn` cuts off the last record.
    """
    rng = np.random.default_rng(seed)
    subjects = Subjects(tuple(regions), tuple((name, tuple(values)) for name, values in attributes), tuple(classes))
    if policy is None:
        policy = POLICY if "gender" in dict(attributes) else Policy(min_samples=5)
    names = tuple(ids) if ids is not None else tuple(f"portrait-{i:03d}" for i in range(samples))
    sheet = _sheet(names, subjects, image_size, rng)
    if lacking is not None:
        sheet.masks.bits[: lacking[1], [name for name, _ in subjects.regions].index(lacking[0])] = 0
    manifest = Manifest(
        run_id=run_id,
        created="2025-01-02T03:04:05+00:00",
        tool="bias-audit 0.1.0",
        model="ResNet-18 on portraits",
        layer="layer4.1",
        methods=METHODS,
        target="label logit",
        sign="positive",
        subjects=subjects,
        fingerprint="3f9a1c77d2e84b06" * 4,
        samples_available=2 * len(names),
        samples_audited=len(names),
        seed=seed,
        policy=policy,
    ).model_copy(update=dict(differing or {}))
    directory = RunDirectory.create(path, manifest, sheet)
    cover = _on_grid(np.unpackbits(sheet.masks.bits, axis=-1, count=sheet.masks.width), map_size)
    final = {name: 1.6 if role == "object" else 0.7 for name, role in subjects.regions}
    final |= {"hair": hair_enrichment} if "hair" in final else {}
    final |= dict(enrichment or {}) | {REMAINDER: 0.8}
    for k in range(-1 if reference else 0, audits):
        progress = (k + 1) / max(1, audits)
        # Before training every region gets about what its area gives, and every group is guessed alike.
        looks = {name: 1.0 + (value - 1.0) * progress**0.7 for name, value in final.items()}
        accuracy, difference = 0.55 + 0.35 * progress, gap * progress
        scores = _scores(sheet, subjects, cover, looks, accuracy, difference, silent, rng)
        changed = None
        if removal and k == audits - 1:
            scores = replace(scores, effect_metrics=EFFECTS, effects=_effects(scores, subjects, removal, rng))
            changed = _changed(sheet, subjects, scores, removal, 100 * (k + 1))
        estimates = _estimates(subjects, scores, looks, accuracy, difference, spread, rng)
        if k >= 0:
            estimates += tuple(
                Estimate(metric, value, value - 0.05, value + 0.05, 16, method=method, age=k)
                for metric in EXPLAINER_METRICS
                for method, value in (fitness or {}).items()
            )
        removed = removal or {} if k >= 0 else {}
        estimates += tuple(_causal(removed, shows, association, subjects, progress, samples=len(names)))
        directory.append(
            AuditResult(
                step=100 * (k + 1),
                epoch=max(0, k),
                weights="raw",
                created=f"2025-01-02T04:{(k + 1) % 60:02d}:00+00:00",
                seconds=1.5,
                estimates=estimates,
                judgement=judge(estimates, subjects, policy),
                trigger="reference" if k < 0 else "validation",
                scores=scores,
                changed=changed,
            )
        )
    if failed:
        directory.fail(100 * (audits + 1), failed)
    if ended:
        directory.end()
    if torn:
        with (directory.path / AUDITS).open("ab") as file:
            file.write(b'{"body":{"kind":"aud')
    return directory.path


def _boxes(subjects: Subjects) -> list[tuple[float, float, float, float]]:
    count = len(subjects.regions)
    return [SHAPES.get(name, (0.2, i / count, 0.8, (i + 0.9) / count)) for i, (name, _) in enumerate(subjects.regions)]


def _sheet(names: tuple[str, ...], subjects: Subjects, size: tuple[int, int], rng: np.random.Generator) -> SampleSheet:
    height, width = size
    labels = np.arange(len(names)) % len(subjects.classes)
    columns = [
        np.array(values)[(np.arange(len(names)) // (len(subjects.classes) + a)) % len(values)]
        for a, (_, values) in enumerate(subjects.attributes)
    ]
    thumbnails = []
    masks = np.zeros((len(names), len(subjects.regions), height, width), dtype=bool)
    for i in range(len(names)):
        dx, dy, tint = rng.uniform(-0.08, 0.08), rng.uniform(-0.05, 0.05), rng.integers(0, 40, 3)
        picture = Image.new("RGB", (width, height), tuple(int(c) for c in np.array((150, 160, 165)) + tint))
        for r, (left, top, right, bottom) in enumerate(_boxes(subjects)):
            box = ((left + dx) * width, (top + dy) * height, (right + dx) * width, (bottom + dy) * height)
            color = ((236, 238, 240), (84, 58, 40), (222, 178, 150), (90, 120, 90))[r % 4]
            ImageDraw.Draw(picture).ellipse(box, fill=tuple(int(c) for c in np.array(color) - tint))
            mask = Image.new("1", (width, height))
            ImageDraw.Draw(mask).ellipse(box, fill=1)
            masks[i, r] = np.array(mask)
        thumbnails.append(_jpeg(picture.filter(ImageFilter.GaussianBlur(0.8))))
    attributes = np.stack(columns, 1) if columns else np.zeros((len(names), 0), dtype=np.str_)
    return SampleSheet(
        names, labels.astype(np.int64), attributes.astype(np.str_), tuple(thumbnails), PackedMasks.of(masks)
    )


def _scores(
    sheet: SampleSheet,
    subjects: Subjects,
    cover: Array,
    looks: dict[str, float],
    accuracy: float,
    difference: float,
    silent: int,
    rng: np.random.Generator,
) -> SampleScores:
    count, (h, w) = len(sheet.ids), cover.shape[2:]
    regions = (*(name for name, _ in subjects.regions), REMAINDER)
    cover = np.concatenate([cover, 1 - cover.max(1, keepdims=True, initial=0)], 1)
    weights = np.array([looks[name] for name in regions])
    # Each map is the regions' own shapes, weighted by how much they are looked at, under noise.
    noise = rng.gamma(1.5, 0.6, (len(METHODS), count, h, w)) * rng.gamma(4, 0.25, (len(METHODS), count, 1, 1))
    maps = np.einsum("r,nrhw->nhw", weights**2, cover) * noise
    maps = np.maximum(maps - 0.25 * maps.mean((2, 3), keepdims=True), 0)
    maps[:, rng.permutation(count)[:silent]] = 0
    peak = maps.max((2, 3))
    total = maps.sum((2, 3))
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.einsum("mnhw,nrhw->mnr", maps, cover) / total[..., None]
        areas = cover.mean((2, 3))
        areas[areas == 0] = np.nan
        lifted = share / areas
        normal = np.where(peak[..., None, None] > 0, maps / peak[..., None, None], 0)
    share[:, np.isnan(areas)] = np.nan
    valid = np.where(np.isnan(share), np.nan, 1.0)
    top = normal.reshape(*normal.shape[:2], -1).argmax(-1)
    hit = np.take_along_axis(cover.reshape(count, len(regions), -1)[None], top[..., None, None], -1)[..., 0] > 0.5
    hot = normal > 0.5
    inside = cover > 0.5
    iou = np.einsum("mnhw,nrhw->mnr", hot, inside) / np.maximum(1, (hot[:, :, None] | inside[None]).sum((3, 4)))
    values = np.stack([share, lifted, hit * valid, iou * valid, share])
    first = np.zeros(count, dtype=bool)
    if subjects.attributes:
        first = sheet.attributes[:, 0] == subjects.attributes[0][1][0]
    right = rng.random(count) < accuracy + np.where(first, -difference / 2, difference / 2)
    labels = sheet.labels
    predictions = np.where(right, labels, (labels + 1) % max(2, len(subjects.classes)))
    margin = np.where(right, 1, -1) * rng.gamma(2, 1, count)
    return SampleScores(
        METRICS,
        METHODS,
        regions,
        sheet.ids,
        labels,
        predictions.astype(np.int64),
        margin.astype(np.float32),
        areas.astype(np.float32),
        values.astype(np.float32),
        normal.astype(np.float16),
        peak.astype(np.float32),
    )


def _effects(scores: SampleScores, subjects: Subjects, removal: Mapping[str, float], rng: np.random.Generator) -> Array:
    """What the removal of each region does to each sample, NaN for regions that were not removed."""
    effects = np.full((len(EFFECTS), len(scores.ids), len(subjects.regions)), np.nan, dtype=np.float32)
    for r, (name, _) in enumerate(subjects.regions):
        if name in removal:
            effects[:3, :, r] = 5 * removal[name] * rng.gamma(4, 0.25, (3, len(scores.ids)))
            effects[3, :, r] = rng.random(len(scores.ids)) < removal[name]
    return effects


def _changed(
    sheet: SampleSheet, subjects: Subjects, scores: SampleScores, removal: Mapping[str, float], step: int
) -> ChangedPictures:
    """Samples with a region painted over in grey, and with the whole picture tinted for another value."""
    names = [name for name, _ in subjects.regions]
    rows: list[tuple[Any, ...]] = []
    for i in range(min(4, len(sheet.ids))):
        picture = Image.open(io.BytesIO(sheet.thumbnails[i])).convert("RGB")
        for region in removal:
            mask = Image.fromarray(sheet.masks[i][names.index(region)]).convert("L").crop((0, 0, *picture.size))
            removed = Image.composite(Image.new("RGB", picture.size, (150, 160, 165)), picture, mask)
            fall = float(scores.effects[2, i, names.index(region)])
            rows.append((sheet.ids[i], "removal", region, "", "", 1 - scores.labels[i], fall, _jpeg(removed)))
        for attribute, values in subjects.attributes:
            tinted = Image.blend(picture, Image.new("RGB", picture.size, (90, 120, 220)), 0.3)
            rows.append((sheet.ids[i], "swap", "", attribute, values[-1], scores.labels[i], -0.5, _jpeg(tinted)))
    ids, kinds, regions, attributes, values, decisions, falls, pictures = zip(*rows, strict=True)
    return ChangedPictures(
        step, ids, kinds, regions, attributes, values, np.array(decisions), np.array(falls, np.float32), pictures
    )


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def _on_grid(masks: Array, size: tuple[int, int]) -> Array:
    """Each mask's coverage of each cell of the heatmap, by averaging over the pixels nearest to it."""
    for axis, cells in ((2, size[0]), (3, size[1])):
        edges = np.linspace(0, masks.shape[axis], cells + 1).astype(int)[:-1]
        counts = np.diff([*edges, masks.shape[axis]])
        shape = [1] * 4
        shape[axis] = cells
        masks = np.add.reduceat(masks.astype(np.float32), edges, axis) / counts.reshape(shape)
    return masks


def _estimates(
    subjects: Subjects,
    scores: SampleScores,
    looks: dict[str, float],
    accuracy: float,
    difference: float,
    spread: float,
    rng: np.random.Generator,
) -> tuple[Estimate, ...]:
    count = len(scores.ids)
    groups = [f"{name}={value}" for name, values in subjects.attributes for value in values]
    per_class = count // len(subjects.classes)
    subsets: list[tuple[str | None, str | None, int]] = [(None, None, count)]
    subsets += [(name, None, per_class) for name in subjects.classes]
    subsets += [(None, group, count // 2) for group in groups]
    subsets += [(name, group, per_class // 2) for name in subjects.classes for group in groups]
    estimates = []

    def add(
        metric: str,
        value: float,
        n: int,
        top: float = math.inf,
        *,
        region: str | None = None,
        class_name: str | None = None,
        group: str | None = None,
        method: str | None = None,
    ) -> None:
        names = (region, class_name, group, method)
        if n == 0:
            estimates.append(Estimate(metric, None, None, None, 0, *names, reason="no such image"))
            return
        value = min(max(value * (1 + rng.normal(0, min(spread, 0.2) / 4)), 0.0), top)
        # Narrower for many images, as intervals are, but of the width that was asked for.
        half = spread * max(value, 0.05) * (count / n) ** 0.25
        estimates.append(Estimate(metric, value, max(0.0, value - half), min(top, value + half), n, *names))

    for r, region in enumerate(scores.regions):
        area = float(np.nanmean(scores.areas[:, r])) if count and not np.isnan(scores.areas[:, r]).all() else 0.1
        for m, method in enumerate(METHODS):
            # HiResCAM sees a cue more sharply than Grad-CAM, as it does on a small head.
            look = 1 + (looks[region] - 1) * (1 + 0.25 * m)
            share = min(1.0, area * look)
            for class_name, group, n in subsets:
                put = partial(add, region=region, class_name=class_name, group=group, method=method)
                put("enrichment", look, n)
                put("energy_share", share, n, 1.0)
                put("energy_share_gain", max(0.0, share - area), n, 1.0)
                put("pointing_game", min(1.0, 1.2 * share), n, 1.0)
                put("iou", 0.6 * share, n, 1.0)
                put("relevance_rank_accuracy", share, n, 1.0)
                covered = float((scores.magnitude[m] > 0).mean()) if count else 0.0
                estimates.append(Estimate("coverage", covered, covered, covered, n, region, class_name, group, method))
    for class_name in (None, *subjects.classes):
        add("accuracy", accuracy, count if class_name is None else per_class, 1.0, class_name=class_name)
        for name, values in subjects.attributes:
            for k, value in enumerate(values):
                its = accuracy + difference * (k / max(1, len(values) - 1) - 0.5)
                add("accuracy", its, count // 2 if class_name is None else per_class // 2, 1.0, class_name=class_name,
                    group=f"{name}={value}")  # fmt: skip
            add("accuracy_gap", difference, count if class_name is None else per_class, 1.0, class_name=class_name,
                group=name)  # fmt: skip
    for name, _ in subjects.attributes:
        add("worst_group_accuracy", accuracy - difference / 2, count, 1.0, group=name)
    return tuple(estimates)


def _causal(
    removal: Mapping[str, float],
    shows: Sequence[str] | None,
    association: float | None,
    subjects: Subjects,
    progress: float,
    *,
    samples: int,
) -> Iterator[Estimate]:
    """What removals did, over all classes and in each, what can be read from the regions, and how far attributes and
    label go together in training.
    """

    def around(metric: str, value: float, half: float, n: int, **names: str | None) -> Estimate:
        return Estimate(metric, value, value - half, value + half, n, **names)

    for region, final in removal.items():
        for class_name in (None, *subjects.classes):
            n = samples if class_name is None else samples // len(subjects.classes)
            names = {"region": region, "class_name": class_name}
            yield around("removal_flips", final * progress, 0.03, n, **names)
            yield around("control_flips", 0.01, 0.01, n, **names)
            yield around("removal_effect", final * progress, 0.03, n, **names)
            yield around("control_effect", 0.02, 0.01, n, **names)
            yield around("removal_score", 5 * final * progress, 0.2, n, **names)
            yield around("control_score", 0.1, 0.1, n, **names)
        for attribute, _ in subjects.attributes if shows is not None else ():
            told = region in (shows or ())
            names = {"region": region, "group": attribute}
            yield around("region_probe_gain", 0.4 if told else 0.0, 0.05, samples, **names)
            yield around("removal_contrast", final * progress if told else 0.0, 0.03, samples, **names)
    if association is not None:
        for attribute, _ in subjects.attributes:
            yield around("cramers_v", association, 0.02, 100 * samples, group=attribute)


if __name__ == "__main__":
    # A violated run, for checks outside of pytest.
    print(make_run(Path(sys.argv[1])))
