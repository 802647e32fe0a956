"""One audit as a figure, for a notebook or a paper.

Enters: what an `AuditResult` holds, and perhaps the `SampleSheet` of its images. Leaves: a matplotlib `Figure` of the
verdicts, the enrichment of each region, and the worst heatmaps.

Matplotlib is imported only to draw, and never through pyplot: the figure belongs to who asked for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from bias_audit.headlines import headlines
from bias_audit.notebook import COLOURS, SIGNS
from bias_audit.terms import REMAINDER, Estimate
from bias_audit.wording import one_line, readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

    from bias_audit.records.panels import Looked
    from bias_audit.records.samples import SampleScores, SampleSheet
    from bias_audit.verdicts.findings import Finding

MOST_SHOWN, MOST_ROWS = 12, 20
_PER_ROW = 4


def audit_figure(
    title: str,
    findings: Sequence[Finding],
    estimates: Iterable[Estimate],
    scores: SampleScores,
    sheet: SampleSheet | None,
    samples: int,
) -> Figure:
    """One audit as a figure: see `AuditResult.plot`, which calls this with what it holds.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: `samples` is out of range, or the sheet is of other images.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("matplotlib is not installed: pip install 'bias-audit[plot]'") from error
    import numpy as np

    from bias_audit.records.panels import most_looked

    if not 0 <= samples <= MOST_SHOWN:
        raise ValueError(f"samples: expected 0 to {MOST_SHOWN}, got {samples}")
    if sheet is not None and (missing := set(scores.ids) - set(sheet.ids)):
        raise ValueError(f"sheet: it lacks {len(missing)} of the audited samples: give the sheet of this audit's run")
    spurious = [f.name for f in findings if f.kind == "region" and f.name in scores.regions]
    worst = most_looked(scores, spurious, samples)
    lines = [_short(f) for f in findings]
    shown = _enrichments(estimates)
    heights = [0.5 + 0.26 * len(lines), 0.9 + 0.3 * max(1, len(shown)), 2.3 * math.ceil(len(worst) / _PER_ROW)]
    figure = Figure(figsize=(8.0, sum(heights)), layout="constrained")
    ratios = [height for height in heights if height]
    parts = np.asarray(figure.subfigures(len(ratios), 1, height_ratios=ratios), dtype=object)
    _write_lines(parts[0], [_plain(title), *lines], findings)
    _draw_enrichment(parts[1].subplots(), shown)
    if worst:
        _draw_worst(parts[2], scores, sheet, worst)
    return figure


def _plain(text: object, most: int = 110) -> str:
    """Text on one line in which matplotlib finds neither formulas nor more than fits."""
    words = one_line(text)
    return (words if len(words) <= most else words[: most - 1] + "…").replace("$", r"\$")


def _short(finding: Finding) -> str:
    evidence = f": {readable(str(finding.evidence[0]))}" if finding.evidence else ""
    return _plain(f"{SIGNS[finding.verdict]} {finding.verdict}: {finding.kind} {finding.name}{evidence}")


def _write_lines(part: SubFigure, lines: Sequence[str], findings: Sequence[Finding]) -> None:
    colours = ["black", *(COLOURS[f.verdict] for f in findings)]
    for i, (line, colour) in enumerate(zip(lines, colours, strict=True)):
        weight = "bold" if i == 0 else "normal"
        part.text(0.01, 1 - (i + 0.7) / (len(lines) + 0.4), line, color=colour, weight=weight, fontsize=9)


def _enrichments(estimates: Iterable[Estimate]) -> list[Estimate]:
    """Enrichment of each region over all images, as it was measured."""
    found = [e for e in headlines(estimates) if e.metric == "enrichment" and e.region != REMAINDER and e.measured]
    return found[:MOST_ROWS]


def _draw_enrichment(axes: Axes, shown: Sequence[Estimate]) -> None:
    axes.axvline(1, color="0.4", linewidth=0.8, linestyle=(0, (4, 3)))
    methods = list(dict.fromkeys(e.method for e in shown))
    regions = list(dict.fromkeys(e.region for e in shown))
    for m, method in enumerate(methods):
        mine = [e for e in shown if e.method == method]
        places = [regions.index(e.region) + 0.24 * (m - (len(methods) - 1) / 2) for e in mine]
        values = [e.value or 0.0 for e in mine]
        sides = [[v - (e.low or 0.0) for v, e in zip(values, mine, strict=True)]]
        sides.append([(e.high or 0.0) - v for v, e in zip(values, mine, strict=True)])
        hue = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")[m % 4]
        fill = "white" if m % 2 else hue
        axes.errorbar(
            values, places, xerr=sides, fmt="os^Dv"[m % 5], color=hue, markerfacecolor=fill, label=_plain(method)
        )
    axes.set_yticks(range(len(regions)), [_plain(region, 30) for region in regions])
    axes.set_ylim(len(regions) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.set_xlabel("enrichment (× share of area; 1 = chance), 95 % interval")
    axes.spines[["top", "right"]].set_visible(False)
    if methods:
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    else:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center")


def _draw_worst(part: SubFigure, scores: SampleScores, sheet: SampleSheet | None, worst: Sequence[Looked]) -> None:
    import numpy as np

    from bias_audit.overlays import overlay
    from bias_audit.records.pictures import opened

    part.suptitle(f"Most of the heatmap on a spurious region ({_plain(scores.methods[0])})", fontsize=9)
    grid = part.subplots(math.ceil(len(worst) / _PER_ROW), _PER_ROW, squeeze=False)
    for axes, (i, region, share) in zip(grid.ravel(), worst, strict=False):
        heat = scores.maps[0, i].astype(np.float32)
        if sheet is None:
            axes.imshow(heat, cmap="inferno", vmin=0, vmax=1)
        else:
            picture = opened(sheet.thumbnails[sheet.ids.index(scores.ids[i])]).convert("RGB")
            axes.imshow(np.asarray(overlay(picture, heat)))
        right = "correct" if scores.correct[i] else "wrong"
        axes.set_title(f"{_plain(scores.ids[i], 22)}\n{share:.2f} on {_plain(region, 14)}, {right}", fontsize=7)
    for axes in part.axes:
        axes.set_axis_off()
