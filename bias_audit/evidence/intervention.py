"""Evidence (b): what becomes of the decision when a region is removed, or its cue swapped.

Enters: `Effects` per image. Leaves: `Estimate`s. What a removal does is compared with what the removal of a control
region does in the same image: the difference is the effect.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt

from bias_audit.evidence.association import Alignment
from bias_audit.evidence.cells import Cell, cells
from bias_audit.evidence.effects import EFFECTS, Effects, Floats
from bias_audit.evidence.removal import FILLS
from bias_audit.stats import bootstrap_ratios, newcombe, wilson
from bias_audit.terms import INPAINTING, Estimate, Subjects


def intervention_estimates(
    found: Effects,
    labels: npt.NDArray[np.int64],
    attributes: npt.NDArray[np.str_],
    wanted: npt.NDArray[np.str_],
    subjects: Subjects,
    alignments: Sequence[Alignment],
    *,
    by_user: Collection[str] = (),
    shown: npt.NDArray[np.bool_] | None = None,
    seed: int,
) -> tuple[Estimate, ...]:
    """Every estimate of the interventions.

    `removal_effect` is the part of the decision that hangs on a region: how far the decided class's margin moves, up or
    down, when the region is removed, less how far it moves for control regions, over the mean margin. Up counts too: a
    cue that speaks against what the model decides holds its margin down. `removal_score` (logits, of the audit's
    target), `removal_margin` (logits) and `removal_flips` (-1 to 1) are the fall of the score, the fall of the margin
    and the share of decisions that change, beyond the same for control regions, image by image; `control_...` is what
    the controls do. `fill_flips` and
    `fill_control_flips` tell how many decisions another fill changes, in the region and in a control: by the second
    one sees what the fill itself inserts; their `method` is the fill.

    A region may leave most images no room for a control region of its size: a background, what covers more than half,
    what stands among objects. Then nothing is known beyond control regions. Where that is so, over all images or in one
    class, `fill_flips` of the method "inpainting" is the share of decisions that its removal changes, whatever that of
    another region would: an upper bound of `removal_flips`.

    `removal_contrast` is the part of the decision that hangs on what a region says of an attribute: half of what the
    removal takes from the label's margin where the value goes with the class, less what it takes where it does not,
    over the mean margin, averaged over classes. What a hole does to the picture, whatever was in it, cancels: so it
    needs no control regions, and only takes off what they do in classes where most images of either kind have room for
    them.

    `swap_flips` is the share of decisions that change with the cue's value, beyond those that change with another
    image's cue of the same value. Where it is known which value goes with which class, `swap_aligned_accuracy` and
    `swap_conflicting_accuracy` are the accuracy of the same images with the one and with the other, `swap_gap` the
    first minus the second, and `swap_follows` the share of images that the conflicting cue draws to its own class: the
    spurious score of arXiv 2212.04629. Their `region` is the one that was swapped, None for the user's own swap.

    `core_accuracy` is that with Gaussian noise on all but the object, `spurious_accuracy` with noise on the object, and
    `relative_foreground_sensitivity` (-1 to 1) is their difference over the largest that their mean allows: arXiv
    2201.10766.

    `labels` `(N,)`, `attributes` and `wanted`, the swapped values, `(N, A)`; `by_user` are the attributes that the user
    has swaps for; `shown` `(N, S)` tells which images show which region, by default all.
    """
    every = list(cells(labels, attributes, subjects))
    spurious = subjects.regions_with("spurious")
    estimates: list[Estimate] = []
    for s, removed in enumerate(spurious):
        estimates += _removal(found, s, removed, every, seed)
    for a, (attribute, _) in enumerate(subjects.attributes):
        value_of_class = next((known.value_of_class for known in alignments if known.attribute == attribute), None)
        for s, region in enumerate([*spurious, None]):
            control = found.decisions if region is None else found.swap_control[:, a, s]
            swap = _Swap(
                found.decisions, found.swapped[:, a, s], control, attributes[:, a], wanted[:, a], value_of_class
            )
            # An attribute is swapped in one way: by the user, or region by region.
            if (attribute in by_user) == (region is None):
                estimates += _swaps(swap, labels, every, attribute, region)
            if region is not None and value_of_class is not None:
                goes = _Goes(np.array(value_of_class)[labels], attributes[:, a], labels)
                removed, control = found.label_fall[:, :, s]
                fall = _beyond_controls(removed, control, goes)
                # Of an image without the region nothing can be taken.
                fall = fall if shown is None else np.where(shown[:, s], fall, 0)
                estimates += _contrasts(fall, np.abs(found.margin), goes, subjects, attribute, region, seed)
    estimates += _noise(found.noise, seed)
    return tuple(estimates)


@dataclass(frozen=True)
class _Goes:
    """Of each of N images the value that goes with its class ("" for none), its own value, and its class."""

    partner: npt.NDArray[np.str_]
    own: npt.NDArray[np.str_]
    labels: npt.NDArray[np.int64]

    @property
    def aligned(self) -> npt.NDArray[np.bool_]:
        found: npt.NDArray[np.bool_] = self.own == self.partner
        return found


def _beyond_controls(removed: Floats, control: Floats, goes: _Goes) -> Floats:
    """The fall less what control regions do; in a class whose images of one kind mostly have none, the bare fall.

    The two kinds of a class are compared, so they have to be measured alike; and a class whose images have no room must
    not be left out, for the others do not speak for it.
    """
    fall = removed - control
    for label in np.unique(goes.labels):
        mine = goes.labels == label
        if any(_lacks_controls(removed[kind], control[kind]) for kind in (mine & goes.aligned, mine & ~goes.aligned)):
            fall[mine] = removed[mine]
    return fall


def _contrasts(
    fall: Floats, margin: Floats, goes: _Goes, subjects: Subjects, attribute: str, region: str, seed: int
) -> Iterator[Estimate]:
    """`removal_contrast` over all and of each class with which a value goes; `fall` and `margin` `(N,)`."""
    compared = (goes.partner != "") & (goes.own != "") & np.isfinite(fall) & np.isfinite(margin)
    of_kind = [(kind & compared) for kind in (goes.aligned, ~goes.aligned)]
    both = [c for c in np.unique(goes.labels[compared]) if all((kind & (goes.labels == c)).any() for kind in of_kind)]
    named = [(None, both), *((subjects.classes[c], [c]) for c in np.unique(goes.labels[goes.partner != ""]))]
    weights, over, counts = [], [], []
    for _, classes in named:
        weight, members = np.zeros(len(fall)), compared & np.isin(goes.labels, classes)
        for c in classes:
            for kind, sign in zip(of_kind, (0.5, -0.5), strict=True):
                mine = kind & (goes.labels == c)
                weight[mine] = sign / max(1, mine.sum()) / len(classes)
        weights.append(weight)
        over.append(np.where(members, margin, 0) / max(1, members.sum()))
        counts.append(min(int((kind & members).sum()) for kind in of_kind))
    strata = 2 * goes.labels + goes.aligned
    found = bootstrap_ratios(
        np.stack(weights, axis=1) * np.where(compared, fall, 0)[:, None], np.stack(over, axis=1), strata, seed=seed
    )
    for (class_name, _), n, value, low, high in zip(named, counts, *(b.tolist() for b in found), strict=True):
        numbers: Numbers = (value, low, high) if n > 1 and math.isfinite(value + low + high) else (None, None, None)
        reason = "" if numbers[0] is not None else f"too few images with and without the {attribute} of the class"
        yield Estimate("removal_contrast", *numbers, n, region, class_name, attribute, None, reason)


@dataclass(frozen=True)
class _Swap:
    """One attribute's swap in each of N images: decisions without, with it and with its control, and the values."""

    clean: npt.NDArray[np.int64]
    swapped: npt.NDArray[np.int64]
    control: npt.NDArray[np.int64]
    own: npt.NDArray[np.str_]
    wanted: npt.NDArray[np.str_]
    value_of_class: tuple[str, ...] | None

    @property
    def tried(self) -> npt.NDArray[np.bool_]:
        tried: npt.NDArray[np.bool_] = (self.clean >= 0) & (self.swapped >= 0) & (self.control >= 0)
        return tried


def _lacks_controls(removed: Floats, control: Floats) -> bool:
    """Whether most images that show a region have no control region of its size; both `(N,)`, NaN where not tried."""
    shown = np.isfinite(removed)
    return bool(2 * (shown & np.isfinite(control)).sum() < shown.sum())


def _removal(found: Effects, s: int, region: str, every: list[Cell], seed: int) -> Iterator[Estimate]:
    removed, control = found.removal[:, :, s].astype(np.float64), found.control[:, :, s].astype(np.float64)
    shown: npt.NDArray[np.bool_] = np.asarray(np.isfinite(removed).all(axis=0))
    both = shown & np.asarray(np.isfinite(control).all(axis=0))
    removed, control = np.where(both, removed, 0), np.where(both, control, 0)
    ones, margin = np.ones(len(both)), np.abs(found.margin.astype(np.float64))
    beyond = (removed - control)[:-1]
    of, over = np.concatenate([beyond, control[:-1]]), np.stack([margin, ones, ones] * 2)
    metrics = [f"{what}_{effect}" for what in ("removal", "control") for effect in EFFECTS[:-1]]
    for _, cells_of in groupby(every, key=lambda cell: cell.attribute):
        group = list(cells_of)
        members = np.stack([cell.members & both for cell in group])
        ratios = _ratios(of, over, members, group[0].strata, seed)
        for cell, numbers, mine in zip(group, ratios, members, strict=True):
            n = int(mine.sum())
            reason = _why_not_removed(found, cell.members, shown, region)
            flips, control_flips = float(removed[-1, mine].sum()), float(control[-1, mine].sum())
            yield _estimate("removal_flips", _share(flips, control_flips, n), n, region, cell, reason)
            yield _estimate("control_flips", _share(control_flips, None, n), n, region, cell, reason)
            for metric, triple in zip(metrics, numbers, strict=True):
                yield _estimate(metric, triple, n, region, cell, reason)
    for f, fill in enumerate(FILLS):
        for metric, flips_of in (("fill_flips", found.fill), ("fill_control_flips", found.fill_control)):
            known = np.asarray(flips_of[f, :, s])
            known = known[np.isfinite(known)]
            reason = _why_not_removed(found, every[0].members, shown, region)
            share = _share(float(known.sum()), None, known.size)
            yield _estimate(metric, share, known.size, region, every[0], reason, fill)
    for cell in every:
        mine = cell.members & shown
        bare, compared = found.removal[-1, mine, s], found.control[-1, mine, s]
        if cell.attribute is None and _lacks_controls(bare, compared):
            share = _share(float(bare.sum()), None, bare.size)
            yield _estimate("fill_flips", share, bare.size, region, cell, "", INPAINTING)


def _why_not_removed(found: Effects, members: npt.NDArray[np.bool_], shown: npt.NDArray[np.bool_], region: str) -> str:
    if (members & shown).any():
        return "no control region of its size fits"
    if (found.decisions[members] < 0).any():
        return "the model's outputs are not finite"
    return f"no image shows {region} and something beside it"


Numbers = tuple[float | None, float | None, float | None]


def _share(first: float, second: float | None, n: int) -> Numbers:
    """A share of n, or the difference of two: by Wilson's interval, which has a width where nothing ever happens.

    The two are of the same images. As if they were not, the interval is a little too wide where the same images are
    concerned by both, and too narrow by less than their product where others are.
    """
    if n == 0:
        return None, None, None
    return wilson(first, n) if second is None else newcombe((first, n), (second, n))


def _ratios(
    of: Floats, over: Floats, members: npt.NDArray[np.bool_], strata: npt.NDArray[np.generic], seed: int
) -> list[list[Numbers]]:
    """For each row of members `(C, N)`, of each of the rows `(K, N)` the sum over that of the other; no interval of
    a single image."""
    pairs = [np.where(mine, values, 0).T for values in (of, over) for mine in members]
    columns, count = np.concatenate(pairs, axis=1), len(of) * len(members)
    found = bootstrap_ratios(columns[:, :count], columns[:, count:], strata, seed=seed)
    sizes = members.sum(axis=1).repeat(len(of))
    numbers: list[Numbers] = []
    for value, low, high, n in zip(*(bound.tolist() for bound in found), sizes.tolist(), strict=True):
        known = n > 0 and math.isfinite(value)
        wide = n > 1 and known and math.isfinite(low) and math.isfinite(high)
        numbers.append((value if known else None, low if wide else None, high if wide else None))
    return [numbers[start : start + len(of)] for start in range(0, count, len(of))]


def _estimate(
    metric: str, numbers: Numbers, n: int, region: str | None, cell: Cell, reason: str, method: str | None = None
) -> Estimate:
    return Estimate(metric, *numbers, n, region, cell.class_name, cell.group, method, _why(numbers, n, reason))


def _why(numbers: Numbers, n: int, reason: str) -> str:
    """Why there is no interval."""
    if n == 0 or numbers[0] is None:
        return reason if n == 0 else "the decisions have no margin"
    return "one image gives no interval" if numbers[1] is None else ""


def _swaps(
    swap: _Swap, labels: npt.NDArray[np.int64], every: list[Cell], attribute: str, region: str | None
) -> Iterator[Estimate]:
    untried = f"no image of another {attribute} has its {region} in the same place" if region else "nothing was swapped"
    if (swap.clean < 0).all():
        untried = "the model's outputs are not finite"
    elif (swap.wanted == "").all():
        untried = f"{attribute} has one value only"

    def estimate(metric: str, numbers: Numbers, n: int, cell: Cell, reason: str = untried) -> Estimate:
        return Estimate(metric, *numbers, n, region, cell.class_name, attribute, None, _why(numbers, n, reason))

    by_class = [cell for cell in every if cell.attribute is None]
    for cell in by_class:
        members = cell.members & swap.tried
        first, second = (float((d != swap.clean)[members].sum()) for d in (swap.swapped, swap.control))
        n = int(members.sum())
        yield estimate("swap_flips", _share(first, second, n), n, cell)
    if swap.value_of_class is None:
        return
    goes_with = np.array(swap.value_of_class)
    partner = goes_with[labels]
    is_aligned, becomes_aligned = ((v == partner) & (partner != "") for v in (swap.own, swap.wanted))
    aligned = np.where(is_aligned, swap.control, swap.swapped)
    conflicting = np.where(is_aligned, swap.swapped, swap.control)
    cue = np.where(is_aligned, swap.wanted, swap.own)
    drawn = (conflicting != aligned) & (goes_with[np.clip(conflicting, 0, len(goes_with) - 1)] == cue)
    right, still_right = aligned == labels, conflicting == labels
    for cell in by_class:
        members = cell.members & swap.tried & (is_aligned | becomes_aligned)
        n = int(members.sum())
        why = f"no value of {attribute} goes with the class" if (cell.members & swap.tried).any() else untried
        for metric, hits, others in (
            ("swap_aligned_accuracy", right, None),
            ("swap_conflicting_accuracy", still_right, None),
            ("swap_gap", right & ~still_right, still_right & ~right),
            ("swap_follows", drawn, None),
        ):
            less = None if others is None else float(others[members].sum())
            yield estimate(metric, _share(float(hits[members].sum()), less, n), n, cell, why)


_NOISY = ("core_accuracy", "spurious_accuracy", "relative_foreground_sensitivity")


def _noise(right: Floats, seed: int) -> Iterator[Estimate]:
    """`right` `(2, N)`: the share of trials in which each image is right, with noise off and on the object."""
    shown = right[:, np.isfinite(right).all(axis=0)].astype(np.float64)
    n = shown.shape[1]
    if n < 2:
        reason = "one image gives no interval" if n else "no image with an object and a place beside it"
        yield from (Estimate(metric, None, None, None, n, reason=reason) for metric in _NOISY)
        return
    ones = np.ones_like(shown.T)
    accuracy = bootstrap_ratios(shown.T, ones, np.zeros(n), seed=seed)
    for i, metric in enumerate(_NOISY[:2]):
        # Trials of one image are not independent: resampling takes all of an image's.
        share = float(accuracy.value[i])
        numbers: Numbers = (share, float(accuracy.low[i]), float(accuracy.high[i]))
        yield Estimate(metric, *(wilson(float(shown[i].sum()), n) if share in (0, 1) else numbers), n)
    drawn = shown[:, np.random.default_rng(seed).integers(n, size=(2000, n))].mean(axis=2)
    sensitivity = _foreground_sensitivity(*drawn)
    whole = float(_foreground_sensitivity(*shown.mean(axis=1)[:, None])[0])
    if not math.isfinite(whole):
        yield Estimate(_NOISY[2], None, None, None, n, reason="with noise on either part all images are right, or none")
    elif not np.isfinite(sensitivity).all() or np.ptp(sensitivity) < 1e-9:  # equal but for rounding
        yield Estimate(_NOISY[2], whole, None, None, n, reason="too few images are right, or wrong, for an interval")
    else:
        bounds = np.percentile(sensitivity, [2.5, 97.5])
        yield Estimate(_NOISY[2], whole, min(float(bounds[0]), whole), max(float(bounds[1]), whole), n)


def _foreground_sensitivity(core: Floats, spurious: Floats) -> Floats:
    """That of arXiv 2201.10766; NaN where the mean leaves no room for a difference."""
    mean = (core + spurious) / 2
    room = 2 * np.minimum(mean, 1 - mean)
    return np.where(room > 0, (core - spurious) / np.where(room > 0, room, 1), np.nan)
