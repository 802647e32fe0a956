"""Evidence (b): what becomes of the decision when a region is removed, or its cue swapped.

Enters: the logits of each image and of its changed versions. Leaves: `Effects` per image, and `Estimate`s. What a
removal does is compared with what the removal of a control region does in the same image: the difference is the effect.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bias_audit.attribution.targets import BinaryLogit, ClassLogit
from bias_audit.evidence.association import Alignment
from bias_audit.evidence.cells import Cell, cells
from bias_audit.evidence.changes import Change, Changes, Kind
from bias_audit.evidence.removal import FILLS
from bias_audit.ranks import ALONE, Ranks
from bias_audit.stats import bootstrap_ratios, newcombe, wilson
from bias_audit.terms import Estimate, Subjects

Floats = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Effects:
    """What the changes did to each of N images; S spurious regions, A attributes. NaN, or -1, where nothing was tried.

    `removal` and `control` `(4, N, S)`, in the order of `EFFECTS`: by how much the decided class's margin changes, the
    fall of the target's score, the fall of that margin, and whether the decision changes, when the region, or on
    average a control region, is in-painted. `margin` `(N,)` is that margin before. `fill` and
    `fill_control` `(F, N, S)`: whether the decision changes when it is filled in each of the ways of `FILLS`.
    `swapped` and `swap_control` int64 `(N, A, S + 1)`: the decisions with another value's cue, and with another image's
    cue of the same value; the last of S + 1 is the user's swap. `noise` `(2, N)`: how often an image is right with
    noise on all but the object, and on the object alone. `decisions` `(N,)`. `label_fall` `(N, S)`: the fall of the
    label's margin when the region is in-painted, beyond that of control regions.
    """

    removal: Floats
    control: Floats
    margin: Floats
    fill: Floats
    fill_control: Floats
    swapped: npt.NDArray[np.int64]
    swap_control: npt.NDArray[np.int64]
    noise: Floats
    decisions: npt.NDArray[np.int64]
    label_fall: Floats


def responses(
    changes: Changes,
    outputs: Callable[[Tensor], Tensor],
    batch_size: int,
    progress: Callable[[int, int], None] = lambda done, of: None,
    ranks: Ranks = ALONE,
) -> Tensor:
    """The logits `(N, V, C)` of each image under each change, NaN where it cannot be made.

    `outputs` gives the logits `(B, C)` of pictures `(B, 3, H, W)`; `progress(images done, images)` is called after each
    batch.
    """
    made = ranks.shared(changes.count, changes.made)
    shown = [(image, number) for image, numbers in enumerate(made) for number in numbers]
    batches = [shown[start : start + batch_size] for start in range(0, len(shown), batch_size)]

    def logits_of(batch: int) -> Tensor:
        return outputs(torch.stack([changes.picture(*place) for place in batches[batch]])).float()

    def done(batch: int, _: int) -> None:
        progress(batches[batch - 1][-1][0] + 1, changes.count)

    every = torch.cat(ranks.shared(len(batches), logits_of, done))
    found = every.new_full((changes.count, len(changes.list), every.shape[1]), torch.nan)
    images, numbers = zip(*shown, strict=True)
    found[list(images), list(numbers)] = every
    return found


def effects(logits: Tensor, scores: Tensor, labels: Tensor, changes: Sequence[Change]) -> tuple[Tensor, ...]:
    """The fields of `Effects`, as tensors on the logits' device.

    Args:
        logits: `(N, V, C)`, of each image under each of the V `changes`, the first of which is none; NaN where a change
            cannot be made.
        scores: `(N, V)`, the target's.
        labels: int64 `(N,)`.
    """
    made = logits.isfinite().all(dim=2)
    decisions = torch.where(made, _decided(logits), -1)
    margins = _margins_of(logits, decisions[:, :1])
    flips = torch.where(made & made[:, :1], (decisions != decisions[:, :1]).float(), torch.nan)
    falls = margins[:, :1] - margins
    of_label = _margins_of(logits, labels[:, None])
    label_falls = torch.where(made & made[:, :1], of_label[:, :1] - of_label, torch.nan)
    changed = torch.stack([falls.abs(), scores[:, :1] - scores, falls, flips])
    changed = torch.where(made & made[:, :1], changed, torch.nan)
    regions = sorted({c.region for c in changes if c.kind == "removal"})
    attributes = 1 + max((c.attribute for c in changes), default=-1)

    def columns(kind: Kind, region: int = -1, attribute: int = -1, detail: str = "") -> list[int]:
        wanted = Change(kind, region, attribute, detail)
        return [v for v, change in enumerate(changes) if change == wanted]

    def by_region(values: Tensor, kind: Kind, detail: str = "") -> Tensor:
        """Of values `(..., N, V)` the mean over the changes of a kind, `(..., N, S)`."""
        found = [values[..., columns(kind, r, detail=detail)].nanmean(dim=-1) for r in regions]
        return torch.stack(found, dim=-1) if found else values[..., :0]

    def by_attribute(kind: Kind) -> Tensor:
        rows = []
        for a in range(attributes):
            places = [columns(kind, r, a) for r in (*regions, -1)]
            nothing = decisions.new_full((len(decisions),), -1)
            rows.append(torch.stack([decisions[:, p[0]] if p else nothing for p in places], dim=1))
        return torch.stack(rows, dim=1) if rows else decisions.new_full((len(decisions), 0, len(regions) + 1), -1)

    right = torch.where(made, (decisions == labels[:, None]).float(), torch.nan)
    return (
        by_region(changed, "removal"),
        by_region(changed, "control"),
        margins[:, 0],
        torch.stack([by_region(flips, "fill", fill) for fill in FILLS]),
        torch.stack([by_region(flips, "fill_control", fill) for fill in FILLS]),
        by_attribute("swap"),
        by_attribute("swap_control"),
        torch.stack([right[:, columns(kind)].nanmean(dim=1) for kind in ("noise_rest", "noise_object")]),
        decisions[:, 0],
        by_region(label_falls, "removal") - by_region(label_falls, "control"),
    )


def _decided(logits: Tensor) -> Tensor:
    """The classes with the largest logits; of one logit, whether it is positive."""
    return (logits[..., 0] > 0).long() if logits.shape[-1] == 1 else logits.argmax(dim=-1)


def _margins_of(logits: Tensor, classes: Tensor) -> Tensor:
    """The margins `(N, V)` of one class for each image, `(N, 1)`: its logit minus the largest other."""
    every = classes.clamp_min(0).expand(logits.shape[:2])
    if logits.shape[-1] == 1:
        return BinaryLogit(every.flatten())(logits.flatten(0, 1)).view(every.shape)
    own = ClassLogit(every.flatten())(logits.flatten(0, 1)).view(every.shape)
    others = logits.scatter(2, every[:, :, None], -torch.inf).amax(dim=2)
    return own - others


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

    `removal_contrast` is the part of the decision that hangs on what a region says of an attribute: half of what the
    removal takes from the label's margin where the value goes with the class, less what it takes where it does not,
    over the mean margin, averaged over classes. What a hole does to the picture, whatever was in it, cancels.

    `swap_flips` is the share of decisions that change with the cue's value, beyond those that change with another
    image's cue of the same value. Where it is known which value goes with which class, `swap_aligned_accuracy` and
    `swap_conflicting_accuracy` are the accuracy of the same images with the one and with the other, `swap_gap` the
    first minus the second, and `swap_follows` the share of images that the conflicting cue draws to its own class: the
    spurious score of arXiv 2212.04629. Their `region` is the one that was swapped, None for the user's own swap.

    `core_accuracy` is that with Gaussian noise on all but the object, `spurious_accuracy` with noise on the object, and
    `relative_foreground_sensitivity` (-1 to 1) is their difference over the largest that their mean allows: arXiv
    2201.10766, section 5.

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
                # Of an image without the region nothing can be taken.
                fall = found.label_fall[:, s] if shown is None else np.where(shown[:, s], found.label_fall[:, s], 0)
                goes = _Goes(np.array(value_of_class)[labels], attributes[:, a], labels)
                estimates += _contrasts(fall, np.abs(found.margin), goes, subjects, attribute, region, seed)
    estimates += _noise(found.noise, seed)
    return tuple(estimates)


@dataclass(frozen=True)
class _Goes:
    """Of each of N images the value that goes with its class ("" for none), its own value, and its class."""

    partner: npt.NDArray[np.str_]
    own: npt.NDArray[np.str_]
    labels: npt.NDArray[np.int64]


def _contrasts(
    fall: Floats, margin: Floats, goes: _Goes, subjects: Subjects, attribute: str, region: str, seed: int
) -> Iterator[Estimate]:
    """`removal_contrast` over all and of each class with which a value goes; `fall` and `margin` `(N,)`."""
    compared = (goes.partner != "") & (goes.own != "") & np.isfinite(fall) & np.isfinite(margin)
    aligned = goes.own == goes.partner
    of_kind = [(kind & compared) for kind in (aligned, ~aligned)]
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
    strata = 2 * goes.labels + aligned
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


EFFECTS = ("effect", "score", "margin", "flips")


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
    """arXiv 2201.10766, equation 1; NaN where the mean leaves no room for a difference."""
    mean = (core + spurious) / 2
    room = 2 * np.minimum(mean, 1 - mean)
    return np.where(room > 0, (core - spurious) / np.where(room > 0, room, 1), np.nan)
