"""The table and the plot of a run of the benchmark.

Enters: `Results`. Leaves: Markdown, and a PNG of each contender's time over the bare forward's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import vl_convert

from benchmarks.contenders import AFTERWARDS, AUDIT, BARE, EXPLAIN, GROUPS, RIDE, TESTED
from benchmarks.results import Block, Results, checks, table
from benchmarks.timing import Interval, Series, median_interval, ratios
from benchmarks.workloads import SIZE
from bias_audit import AuditPlan

OURS, THEIRS = "#1f6fb4", "#8a8f98"
_X_TITLE = "time / time of the bare forward pass (of what rides along: of the validation alone)"
TARGETS = {EXPLAIN: 1.02, AUDIT: 1.05, RIDE: 1.03}


def markdown(results: Results, plot: str) -> str:
    """The whole page; `plot` is the name of the image beside it."""
    parts = [
        f"# Benchmark of {results.created}",
        _machine(results),
        f"![Time over that of the bare forward pass]({plot})",
        "## Targets",
        _targets(results),
        "## Time",
        _how_timed(results),
        *(_timings(results, model) for model in results.models),
    ]
    if results.memory:
        parts += ["## Memory", _HOW_MEASURED, _memory(results)]
    if results.agreements:
        parts += ["## Do all explain the same?", _agreement(results)]
    if results.device_rows:
        parts += ["## On the accelerator", _device(results)]
    return "\n\n".join(parts) + "\n"


def _machine(results: Results) -> str:
    machine = results.machine
    load = "" if machine.load is None else f" Load average when it began: {machine.load:.2f}."
    device = f" Accelerator: {machine.device}." if machine.device else " No accelerator."
    return (
        f"{machine.processor}, {machine.cores} cores, {machine.memory_gib:g} GiB of memory, {machine.system}.{device}"
        f"{load} Python {machine.python}; {', '.join(machine.packages)}. {results.threads} threads, float32, images of "
        f"{SIZE} x {SIZE} pixels, random weights."
    )


def _how_timed(results: Results) -> str:
    return (
        f"All contenders of a table run in one process, one after the other in an order drawn anew in each round "
        f"({results.rounds} rounds; audits and validations in half of them, what is slow in every third). A ratio is "
        "that to the first line in the same round; given are the median and its 95 % bootstrap interval, of five "
        "rounds or fewer the range.\n\n"
        "The bare forward runs in `inference_mode`. An explanation is Grad-CAM of the label's logit at a layer that is "
        "known; peers are called as their documentation shows. A complete audit is one of an `Auditor` that has run "
        "before: images from memory, Grad-CAM and HiResCAM, five metrics in four regions and the remainder, intervals, "
        "verdict, and records synced to disk. grad-cam + Quantus does less: Grad-CAM alone, three metrics in the same "
        "regions, no intervals, no records. A validation is that of a training, without grad, with loss and accuracy; "
        "the audit that rides along makes no forward pass of its own and is complete when the validation ends."
    )


_HOW_MEASURED = (
    "Each contender in a process of its own with one thread, on one batch: how much resident memory it needed at most "
    "on top of what the process held with the model and the data loaded and after one bare forward pass; what of that "
    "the bare forward does not need; and the whole process's peak."
)


def _targets(results: Results) -> str:
    rows = [
        (c.model, c.what, c.target, written(c.value), f"**{c.outcome}**" if c.outcome != "met" else "met")
        for c in checks(results)
    ]
    return table(("model", "what", "target", "measured", "outcome"), rows)


def _timings(results: Results, model: str) -> str:
    parts = []
    for block in (b for b in results.blocks if b.model == model):
        rows = [_timing(block, series) for series in block.series]
        skipped = [s for s in results.skipped if (s.model, s.group) == (model, block.group)]
        rows += [(s.contender, s.reason, "", "", "") for s in skipped]
        title = f"**{model}**, {block.group}: {block.images} images in batches of {min(block.batch, block.images)}"
        parts += [title, table(("", "ms", "ms per image", f"ratio to {block.series[0].contender}", "rounds"), rows)]
        tested = _tested(block)
        parts += [tested] if tested else []
    return "\n\n".join(parts)


def _timing(block: Block, series: Series) -> tuple[str, ...]:
    seconds = _seconds(series)
    ratio = "1" if series is block.series[0] else written(median_interval(ratios(series, block.series[0])))
    times = f"{1e3 * seconds.median:.0f}", f"{1e3 * seconds.median / block.images:.2f}"
    return series.contender, *times, ratio, str(seconds.rounds)


def _seconds(series: Series) -> Interval:
    return median_interval(np.array([s for s in series.seconds if s is not None]))


def _tested(block: Block) -> str:
    """What testing the explanation methods adds to an audit on average."""
    plain, tested, first = block.of(AUDIT), block.of(TESTED), block.series[0]
    if plain is None or tested is None:
        return ""
    plan = AuditPlan()
    audit, one = _seconds(plain).median, _seconds(tested).median - _seconds(plain).median
    on_average = (audit + one * plan.fitness_samples / plan.fitness_every) / _seconds(first).median
    return (
        f"By default every {plan.fitness_every}th audit also tests its methods, on {plan.fitness_samples} images. One "
        f"image costs {1e3 * one:.0f} ms, so that with these tests an audit of {block.images} images takes "
        f"{on_average:.2f} times the bare forward on average."
    )


def _memory(results: Results) -> str:
    rows = []
    for m in results.memory:
        plain = results.memory_of(m.model, m.group, BARE)
        more = "" if plain is None or m is plain else f"{m.added - plain.added:+.0f}"
        ratio = "" if plain is None else f"{m.added / plain.added:.2f}"
        rows.append((m.model, m.group, m.contender, f"{m.added:.0f}", ratio, more, f"{m.peak:.0f}"))
    titles = ("model", "", "contender", "MiB on top", "ratio to bare", "MiB more than bare", "MiB of the process")
    return table(titles, rows)


def _agreement(results: Results) -> str:
    rows = [(a.model, a.contender, str(a.images), f"{a.correlation:.5f}") for a in results.agreements]
    text = "Least correlation of a peer's map with ours, over the images of one batch; below 0.99 nothing is timed."
    return text + "\n\n" + table(("model", "contender", "maps", "least correlation"), rows)


def _device(results: Results) -> str:
    rows = []
    for r in results.device_rows:
        memory = "" if r.bare_mib is None or r.audit_mib is None else f"{r.audit_mib / r.bare_mib:.2f}"
        share = f"{r.tflops:.1f} ({100 * r.tflops / r.matmul_tflops:.0f} %)"
        speed = f"{r.images_per_second:.0f}"
        numbers = (speed, share, written(r.explanation), written(r.audit), memory, "; ".join(r.waits) or "none")
        rows.append((r.model, r.precision, str(r.batch), *numbers))
    titles = ("model", "precision", "batch", "images/s, bare", "TFLOP/s (share of a matrix product's)")
    more = ("explanation / bare", "audit / bare", "audit's memory / bare", "host waits in an audit")
    return table((*titles, *more), rows)


def written(value: Interval) -> str:
    """A median and its bounds as text."""
    digits = 2 if value.median < 2.995 else 1
    if value.rounds < 2:
        return f"{value.median:.{digits}f}"
    return f"{value.median:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def plot(results: Results) -> bytes:
    """A PNG: per model a row for each contender, its median ratio to the bare forward and the interval."""
    values = [row for block in results.blocks for row in _points(block)]
    order = list(dict.fromkeys(v["contender"] for v in sorted(values, key=lambda v: (v["group"], v["rank"]))))
    y = {
        "field": "contender",
        "type": "nominal",
        "sort": order,
        "title": None,
        "axis": {"ticks": False, "domain": False},
    }
    most = max((v["high"] for v in values), default=2.0)
    least = min((v["low"] for v in values), default=1.0)
    scale = {"type": "log", "domain": [min(0.95, least), 1.25 * most], "nice": False}
    ticks = [t for t in (0.5, 0.75, 1, 1.25, 1.5, 2, 3, 4, 5, 6, 8, 10, 15, 20) if 0.9 * least <= t <= 1.2 * most]
    x = {"type": "quantitative", "scale": scale}
    axis = {"values": ticks, "format": "~g", "grid": True, "gridColor": "#eceef1"}
    colour = {
        "field": "ours",
        "type": "nominal",
        "scale": {"domain": ["bias-audit", "others"], "range": [OURS, THEIRS]},
        "legend": None,
    }
    layers: list[dict[str, Any]] = [
        {"mark": {"type": "rule", "color": "#3b3f46"}, "encoding": {"x": {"datum": 1, **x}}},
        {
            "mark": {"type": "tick", "color": "#d1495b", "thickness": 2, "size": 17, "opacity": 1},
            "transform": [{"filter": "isValid(datum.target)"}],
            "encoding": {"x": {"field": "target", **x}, "y": y},
        },
        {
            "mark": {"type": "rule", "strokeWidth": 2},
            "encoding": {"x": {"field": "low", **x}, "x2": {"field": "high"}, "y": y, "color": colour},
        },
        {
            "mark": {"type": "point", "filled": True, "size": 70, "opacity": 1},
            "encoding": {
                "x": {"field": "ratio", "title": _X_TITLE, "axis": axis, **x},
                "y": y,
                "color": colour,
            },
        },
        {
            "mark": {"type": "text", "align": "left", "dx": 9, "fontSize": 11, "color": "#3b3f46"},
            "encoding": {"x": {"field": "high", **x}, "y": y, "text": {"field": "label"}},
        },
    ]
    machine = results.machine
    spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "data": {"values": values},
        "facet": {
            "row": {
                "field": "model",
                "title": None,
                "sort": list(results.models),
                "header": {
                    "labelAngle": 0,
                    "labelAnchor": "start",
                    "labelFontWeight": "bold",
                    "labelOrient": "top",
                    "labelPadding": 0,
                },
            }
        },
        "spec": {"width": 520, "height": {"step": 21}, "layer": layers},
        "spacing": 14,
        "resolve": {"scale": {"y": "independent"}},
        "title": {
            "text": "What explaining and auditing cost",
            "subtitle": [
                f"{machine.processor}, {machine.cores} cores, torch {_torch(machine.packages)}, float32; "
                "median and 95 % interval of ratios within rounds",
                "red: the target",
            ],
            "anchor": "start",
            "subtitleColor": "#5b616b",
            "offset": 12,
        },
        "config": {"view": {"stroke": None}, "axis": {"labelFontSize": 12, "titleFontWeight": "normal"}},
        "padding": 12,
        "background": "white",
    }
    return bytes(vl_convert.vegalite_to_png(spec, scale=2))


def _torch(packages: Sequence[str]) -> str:
    return next(p.removeprefix("torch ") for p in packages if p.startswith("torch "))


def _points(block: Block) -> list[dict[str, Any]]:
    found = []
    for series in block.series[1:]:
        if series.contender in (AFTERWARDS, TESTED):
            continue
        value = median_interval(ratios(series, block.series[0]))
        point = {
            "model": block.model,
            "contender": series.contender,
            "ours": "bias-audit" if series.contender.startswith("bias-audit") else "others",
            "ratio": value.median,
            "low": value.low,
            "high": value.high,
            "target": TARGETS.get(series.contender),
            "label": f"{value.median:.2f}",
            "group": list(GROUPS).index(block.group),
            "rank": 0 if series.contender.startswith("bias-audit") else value.median,
        }
        found.append(point)
    return found


def write_page(results: Results, path: Path) -> None:
    """`path`.md and `path`.png; `path` has no suffix."""
    image = path.with_name(path.name + ".png")
    image.write_bytes(plot(results))
    path.with_name(path.name + ".md").write_text(markdown(results, image.name), encoding="utf-8")
