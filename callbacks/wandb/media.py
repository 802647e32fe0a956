"""What a W&B run shows of an audit beside its numbers: overlays, tables and confusion matrices.

Enters: an audit's scores, its samples and what they are of. Leaves: W&B's own pictures, charts and tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bias_audit.callbacks.wandb.keys import MOST_CLASSES, Keys
from bias_audit.overlays import overlay
from bias_audit.records.panels import fixed_panel
from bias_audit.records.pictures import opened
from bias_audit.records.samples import SampleScores, SampleSheet
from bias_audit.terms import ROLES, Estimate, Subjects

if TYPE_CHECKING:
    import wandb


MOST_ROWS = 1000
MOST_CONFUSIONS = 12
_LONGEST_CAPTION = 120


def picture(scores: SampleScores, sheet: SampleSheet, subjects: Subjects, index: int) -> wandb.Image:
    """A sample's heatmap over its picture, with its regions as masks to switch on and off."""
    import wandb

    thumbnail = opened(sheet.thumbnails[index]).convert("RGB")
    heat = np.nan_to_num(scores.maps[0, index].astype(np.float32))
    picture = overlay(thumbnail, heat)
    factor = picture.width // thumbnail.width
    caption = f"{short(sheet.ids[index], _LONGEST_CAPTION)}: {subjects.class_name(int(scores.labels[index]))}"
    if scores.labels[index] != scores.predictions[index]:
        caption += f", predicted {subjects.class_name(int(scores.predictions[index]))}"
    if not heat.any():
        caption += ", no heat"
    masks = {
        layer: {"mask_data": drawn.repeat(factor, axis=0).repeat(factor, axis=1)[: picture.height, : picture.width]}
        | {"class_labels": labels}
        for layer, labels, drawn in _layers(sheet.masks[index], subjects)
    }
    return wandb.Image(picture, caption=caption, masks=masks or None, file_type="jpg")


def _layers(
    masks: npt.NDArray[np.bool_], subjects: Subjects
) -> Iterator[tuple[str, dict[int, str], npt.NDArray[np.uint8]]]:
    """The regions of each role as numbers from 1 on; one that would hide another has a layer of its own.

    A layer is as large as the masks, which are padded to the largest thumbnail.
    """
    order = [name for name, _ in subjects.regions]
    for role in ROLES:
        labels = {k: short(name, _LONGEST_CAPTION) for k, name in enumerate(subjects.regions_with(role), 1)}
        layers: list[npt.NDArray[np.uint8]] = []
        for number, name in enumerate(subjects.regions_with(role), 1):
            mask = masks[order.index(name)]
            free = next((layer for layer in layers if not layer[mask].any()), None)
            if free is None:
                layers.append(free := np.zeros(mask.shape, dtype=np.uint8))
            free[mask] = number
        for count, layer in enumerate(layers, 1):
            yield (role if count == 1 else f"{role} {count}"), labels, layer


def shares(estimates: Sequence[Estimate], subjects: Subjects, method: str) -> Any:
    """The share of the heat on each region over all images, as a bar chart."""
    import wandb

    roles = dict(subjects.regions)
    found = [e for e in estimates if e.metric == "energy_share" and e.method == method]
    rows = []
    for e in found:
        if e.class_name is None and e.group is None and e.region is not None:
            label = f"{short(e.region, _LONGEST_CAPTION)} ({roles.get(e.region, 'no region')})"
            rows.append([label if e.measured else f"{label}: not measured", e.value])
    table = wandb.Table(columns=["region", "share of heat"], data=rows)
    title = f"Share of the {method} heat by region"
    return wandb.plot.bar(table, "region", "share of heat", title, split_table=True)


def confusions(keys: Keys, scores: SampleScores, sheet: SampleSheet, subjects: Subjects) -> Iterator[tuple[str, Any]]:
    """A confusion matrix over all images and one of each group, as far as a person can read them."""
    import wandb

    count = len(subjects.classes)
    if not 0 < count <= MOST_CLASSES:
        return
    names = [short(name, _LONGEST_CAPTION) for name in subjects.classes]
    known = scores.predictions >= 0
    if not known.all():
        names.append("not finite")
    predicted = np.where(known, scores.predictions, count).clip(max=len(names) - 1)
    groups = [(attribute, value) for attribute, values in subjects.attributes for value in values]
    for attribute, value in [("", ""), *groups[:MOST_CONFUSIONS]]:
        chosen = np.ones(len(scores.ids), dtype=bool)
        if attribute:
            column = [name for name, _ in subjects.attributes].index(attribute)
            chosen = sheet.attributes[:, column] == value
        if chosen.any():
            group = short(f", {attribute} = {value}", _LONGEST_CAPTION) if attribute else ""
            yield (
                keys.confusion(attribute, value),
                wandb.plot.confusion_matrix(
                    y_true=scores.labels[chosen].tolist(),
                    preds=predicted[chosen].tolist(),
                    class_names=names,
                    title=f"Confusion{group} (n = {chosen.sum()})",
                    split_table=True,
                ),
            )


def samples_table(
    scores: SampleScores, sheet: SampleSheet, subjects: Subjects, removed: tuple[SampleScores, int] | None
) -> wandb.Table:
    """A row for each sample; the effects of removals are those last measured, at the step that they say."""
    import wandb

    method = scores.methods[0]
    # An attribute may have the name of another column, and two columns must not.
    names: list[str | int] = ["id", "label", "predicted", "correct", "margin"]
    names += [_other(name, names) for name, _ in subjects.attributes]
    columns: list[list[float | None]] = []
    for region in scores.regions:
        for metric in ("energy_share", "enrichment"):
            names.append(_other(f"{metric} {region}", names))
            columns.append([_number(x) for x in scores.of(metric, method, region)])
    if removed is not None:
        earlier, step = removed
        at = {name: i for i, name in enumerate(earlier.ids)}
        places = [at.get(name) for name in scores.ids]
        for metric in ("removal_flips", "removal_margin"):
            for r, (region, _) in enumerate(subjects.regions):
                measured = earlier.effects[earlier.effect_metrics.index(metric), :, r]
                if np.isfinite(measured).any():
                    names.append(_other(f"{metric} {region}", names))
                    columns.append([None if i is None else _number(measured[i]) for i in places])
        names.append("removals at step")
        columns.append([step] * len(scores.ids))
    rows = [
        [
            sheet.ids[i],
            subjects.class_name(int(scores.labels[i])),
            subjects.class_name(int(scores.predictions[i])),
            bool(scores.correct[i]),
            _number(scores.margin[i]),
            *(str(v) or None for v in sheet.attributes[i]),
            *(column[i] for column in columns),
        ]
        for i in sorted(fixed_panel(sheet, MOST_ROWS))
    ]
    return wandb.Table(columns=names, data=rows)


def _other(name: str, names: Sequence[str | int]) -> str:
    while name in names:
        name += " "
    return name


def _number(x: np.float32) -> float | None:
    return float(x) if np.isfinite(x) else None


def short(text: str, longest: int) -> str:
    """Text on one line of at most `longest` characters."""
    text = " ".join(text.split())
    return text if len(text) <= longest else text[: longest - 1] + "…"
