"""Draw one chart as static SVG: lines over training with their intervals, in the page's own colours.

Enters: `Series` of estimates, limits, and the steps at which something set in. Leaves: a `Chart`, or a small `Panel`.

Nothing is kept between calls and no random number is drawn, so charts can be drawn on any thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from bias_audit.report.numbers import interval
from bias_audit.report.series import Event, Line, Reading, Series, thin
from bias_audit.report.svg import svg
from bias_audit.terms import Estimate

# A longer history is thinned evenly: a chart has a few hundred pixels, and nobody reads a thousand rows or columns.
MOST_ROWS, MOST_COLUMNS, MOST_CELLS = 60, 24, 600
MOST_SERIES, MOST_POINTS_MARKED = 6, 12
# As many lines of text fit above a chart.
MOST_EVENTS = 3
WIDTH, HEIGHT, LEFT, RIGHT = 208, 150, 36, 128
LABEL_PX, EVENT_PX = 12, 13
# Whole steps, and thousands by their letter only where numbers would be long.
_STEPS: dict[str, Any] = {
    "tickMinStep": 1,
    "grid": False,
    "labelExpr": "datum.value < 10000 ? format(datum.value, 'd') : format(datum.value, '~s')",
}


@dataclass(frozen=True)
class Chart:
    """One chart: its SVG, what its marks mean where no label says so, and the same numbers as a table."""

    title: str
    caption: str
    keys: tuple[tuple[str, str], ...]
    svg: Markup
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Panel:
    """One of several small charts that share their scales; its title stands outside of its SVG."""

    title: str
    svg: Markup


@dataclass(frozen=True)
class Panels:
    """Small charts with common scales, the key to their lines, and the same numbers as one table."""

    title: str
    caption: str
    keys: tuple[tuple[str, str], ...]
    panels: tuple[Panel, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Question:
    """What a reader asks, how to read the answer, and the charts that answer it."""

    title: str
    text: str
    charts: tuple[Chart, ...]
    panels: Panels | None = None


def domain_of(readings: Iterable[Reading | None], references: Iterable[float]) -> tuple[float, float]:
    """From 0 to what shows every value; intervals that reach far beyond are cut: they would flatten the rest."""
    return domain_of_estimates((r.estimate for r in readings if r is not None), references)


def domain_of_estimates(estimates: Iterable[Estimate], references: Iterable[float]) -> tuple[float, float]:
    """As `domain_of`, of estimates of one audit."""
    measured = [e for e in estimates if e.measured]
    values = [e.value for e in measured if e.value is not None] + list(references)
    highest, widest = max(values, default=0.0), max((e.high for e in measured if e.high is not None), default=0.0)
    return min([0.0, *values]), 1.05 * max(1.12 * highest, min(widest, 1.6 * highest)) or 1.0


def over_time(
    key: str,
    title: str,
    unit: str,
    series: Sequence[Series],
    steps: Sequence[int],
    lines: Sequence[Line],
    domain: tuple[float, float],
    events: Sequence[Event] = (),
    above: int = 0,
) -> Chart:
    """Each series against the training step, named at its end, with its interval as a band.

    A reading that is carried on from an earlier audit is no new measurement: it gets no point of its own, and the line
    goes from measurement to measurement.

    Args:
        key: stands in front of the ids of the SVG, so that charts can share a page.
        steps: of the audits, in order; with only one the intervals stand side by side.
        domain: lowest and highest value of the vertical axis.
        events: drawn as upright lines; of more than `MOST_EVENTS` the caption names the rest.
        above: lines of text for which there is room above the plot, so that plots of one row stand level.
    """
    series = [s for s in series if s.last is not None]
    drawn = series[:MOST_SERIES]
    single = len(set(steps)) == 1
    events = () if single else sorted(events, key=lambda event: event.step)
    marked = events[:MOST_EVENTS]
    x_domain = [steps[0] - 1, steps[0] + 1] if single else [min(steps), max(steps)]
    merged: dict[float, str] = {}
    for line in dict.fromkeys(lines):
        merged[line.at] = f"{merged[line.at]}, {line.label}" if line.at in merged else line.label
    # Series and limits are named in one column, so that no name covers another or a line.
    names = [(s.last or 0.0, s.name, f"var(--ink-{s.style.hue})") for s in drawn]
    names += [(at, text, "var(--muted)") for at, text in merged.items()]
    places = _spread([at for at, _, _ in names], domain)
    labels = [{"at": at, "text": text, "hue": hue} for at, (_, text, hue) in zip(places, names, strict=True)]

    # Text and upright lines would stretch the axis to 0.
    x_scale = {"domain": x_domain, "nice": False, "zero": False}
    x = {"field": "x", "type": "quantitative", "scale": x_scale}
    axis: dict[str, Any] = {"title": "training step", "tickCount": 4, **_STEPS}
    if single:
        axis |= {"values": [steps[0]]}
    scale = {"domain": list(domain), "nice": False, "zero": False}
    head = EVENT_PX * max(above, len(marked))
    # Above the axis rather than along it: short lines of type are read, turned ones are not.
    upright = {"titleAngle": 0, "titleAlign": "left", "titleBaseline": "bottom", "titleX": 0, "titleY": -8 - head}
    y = {"field": "y", "type": "quantitative", "scale": scale, "axis": {"title": unit, "tickCount": 5, **upright}}
    at = {"field": "at", "type": "quantitative", "scale": scale}
    layers: list[dict[str, Any]] = [
        {
            "data": {"values": [{"at": at} for at in merged]},
            "mark": {"type": "rule", "color": "var(--muted)", "strokeDash": [3, 3], "clip": True},
            "encoding": {"y": at},
        },
        *_event_layers(marked, x_domain),
        *_line_layers(drawn, {**x, "axis": axis}, y, single),
    ]
    sparse = any(r is None or r.carried for s in drawn for r in s.readings)
    if sparse or len(steps) <= MOST_POINTS_MARKED:
        shape = {"field": "s", "scale": _scale(drawn, [s.style.shape for s in drawn]), "legend": None}
        size = 30 if len(steps) <= MOST_POINTS_MARKED else 14
        layers.append(
            {
                "mark": {"type": "point", "filled": True, "size": size, "opacity": 1},
                "encoding": {"x": x, "y": y, "shape": shape, **_color(drawn)},
            }
        )
    layers.append(
        {
            "data": {"values": labels},
            "mark": {"type": "text", "align": "left", "baseline": "middle", "dx": 7, "limit": 118, "fontSize": 11},
            "encoding": {
                "x": {"datum": x_domain[1], "type": "quantitative"},
                "y": at,
                "text": {"field": "text"},
                "color": {"field": "hue", "type": "nominal", "scale": None},
            },
        }
    )
    spec = {"layer": layers, "data": {"values": _rows(drawn, steps)}, "width": WIDTH, "height": HEIGHT}
    columns, rows, cut = table(series, steps)
    said = [f"{len(drawn)} of {len(series)} series drawn."] if len(drawn) < len(series) else []
    said += [cut] if cut else []
    said += [f"Also {event.label}." for event in events[MOST_EVENTS:]]
    drawing = svg(key, spec, left=LEFT, right=RIGHT, top=26 + head, bottom=40)
    return Chart(title, " ".join(said), (), drawing, columns, rows)


def small(
    key: str, title: str, series: Sequence[Series], steps: Sequence[int], lines: Sequence[float], domain: Any
) -> Panel:
    """A small chart without names or units: a caption that many of them share says what they are."""
    single = len(set(steps)) == 1
    x_domain = [steps[0] - 1, steps[0] + 1] if single else [min(steps), max(steps)]
    x_axis: dict[str, Any] = {"title": None, "tickCount": 2, **_STEPS}
    x_axis |= {"values": [steps[0]]} if single else {}
    x_scale = {"domain": x_domain, "nice": False, "zero": False}
    x = {"field": "x", "type": "quantitative", "scale": x_scale, "axis": x_axis}
    scale = {"domain": list(domain), "nice": False, "zero": False}
    y = {"field": "y", "type": "quantitative", "scale": scale, "axis": {"title": None, "tickCount": 3}}
    layers: list[dict[str, Any]] = [
        {
            "data": {"values": [{"at": at} for at in sorted(set(lines))]},
            "mark": {"type": "rule", "color": "var(--muted)", "strokeDash": [3, 3], "clip": True},
            "encoding": {"y": {"field": "at", "type": "quantitative", "scale": scale}},
        },
        *_line_layers(series, x, y, single),
    ]
    spec = {"layer": layers, "data": {"values": _rows(series, steps)}, "width": 132, "height": 84}
    return Panel(title, svg(key, spec, left=26, right=16, top=8, bottom=22))


def table(series: Sequence[Series], steps: Sequence[int]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...], str]:
    """Columns and rows of the readings behind a chart, and what was left out of them, "" if nothing was.

    A carried reading names the step at which it was measured instead of repeating its numbers.
    """
    kept = series[:MOST_COLUMNS]
    if not kept:
        return ("step",), (), ""
    shown = thin(len(steps), min(MOST_ROWS, MOST_CELLS // len(kept)))
    rows = tuple((str(steps[k]), *(_reading(s.readings[k]) for s in kept)) for k in shown)
    said = [f"{len(shown)} of {len(steps)} audits"] if len(shown) < len(steps) else []
    said += [f"{len(kept)} of {len(series)} series"] if len(kept) < len(series) else []
    left = f"The table has {' and '.join(said)}; the records have all." if said else ""
    columns = ("step", *(s.name for s in kept))
    return columns, rows, left


def cell(e: Estimate | None) -> str:
    """An estimate as a table has it: value, interval and the number of images."""
    return f"{interval(e, 2)}, n = {e.n}" if e is not None and e.measured else "–"


def _rows(series: Sequence[Series], steps: Sequence[int]) -> list[dict[str, Any]]:
    """What Vega-Lite draws: each measurement once, at the step at which it was made, and a gap where there is none."""
    single = len(set(steps)) == 1
    rows: list[dict[str, Any]] = []
    for i, s in enumerate(series):
        seen: set[int] = set()
        for step, reading in zip(steps, s.readings, strict=True):
            known = reading is not None and reading.estimate.measured
            at = reading.measured_at if reading is not None and known else step
            if at in seen:
                continue
            seen.add(at)
            e = reading.estimate if reading is not None and known else None
            rows.append(
                {
                    "s": f"s{i}",
                    # With one audit the intervals stand side by side instead of on top of each other.
                    "x": at + ((i + 1) / (len(series) + 1) - 0.5 if single else 0.0),
                    "y": e.value if e else None,
                    "low": e.low if e else None,
                    "high": e.high if e else None,
                }
            )
    return rows


def _line_layers(series: Sequence[Series], x: dict[str, Any], y: dict[str, Any], single: bool) -> list[dict[str, Any]]:
    interval = {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, **_color(series)}
    line = {
        "mark": {"type": "line", "clip": True, "strokeWidth": 1.75},
        "encoding": {"x": x, "y": y, **_look(series)},
    }
    if single:
        return [line, {"mark": {"type": "rule", "clip": True, "strokeWidth": 1.5}, "encoding": interval}]
    return [{"mark": {"type": "area", "clip": True, "opacity": 0.16}, "encoding": interval}, line]


def _event_layers(events: Sequence[Event], x_domain: Sequence[int]) -> list[dict[str, Any]]:
    """An upright line for each event, and above the plot its name on a line of its own."""
    layers: list[dict[str, Any]] = []
    first, last = x_domain
    for i, event in enumerate(events):
        # A name runs to the right, above those of the series, unless there is no room for it.
        place = (event.step - first) / (last - first)
        left = place <= 0.8
        room = RIGHT + WIDTH * (1 - place) if left else LEFT + WIDTH * place
        data: dict[str, Any] = {"values": [{}]}
        at = {"x": {"datum": event.step, "type": "quantitative"}}
        text: dict[str, Any] = {"type": "text", "text": event.label, "align": "left" if left else "right"}
        text |= {"baseline": "bottom", "dx": 4 if left else -4, "dy": 2, "limit": room - 8, "fontSize": 11}
        text |= {"color": "var(--ink)"}
        row = -4 - EVENT_PX * (len(events) - 1 - i)
        layers += [
            {
                "data": data,
                "mark": {"type": "rule", "color": "var(--ink)", "strokeWidth": 1},
                "encoding": {**at, "y": {"value": row}, "y2": {"value": HEIGHT}},
            },
            {
                "data": data,
                "mark": text,
                "encoding": {**at, "y": {"value": row}},
            },
        ]
    return layers


def _scale(series: Sequence[Series], values: Sequence[Any]) -> dict[str, Any]:
    return {"domain": [f"s{i}" for i in range(len(series))], "range": list(values)}


def _color(series: Sequence[Series]) -> dict[str, Any]:
    hues = [f"var(--{s.style.hue})" for s in series]
    return {"color": {"field": "s", "type": "nominal", "scale": _scale(series, hues), "legend": None}}


def _look(series: Sequence[Series]) -> dict[str, Any]:
    dashes = _scale(series, [list(s.style.dash) for s in series])
    return {**_color(series), "strokeDash": {"field": "s", "type": "nominal", "scale": dashes, "legend": None}}


def _spread(values: Sequence[float], domain: tuple[float, float]) -> list[float]:
    """Heights for labels that would stand at `values`, moved apart until none covers another."""
    gap = (domain[1] - domain[0]) * LABEL_PX / HEIGHT
    order = sorted(range(len(values)), key=lambda i: values[i])
    places = [min(max(values[i], domain[0]), domain[1]) for i in order]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    ceiling = domain[1]
    for i in reversed(range(len(places))):
        places[i] = min(places[i], ceiling)
        ceiling = places[i] - gap
    spread = [0.0] * len(values)
    for place, i in zip(places, order, strict=True):
        spread[i] = place
    return spread


def _reading(reading: Reading | None) -> str:
    if reading is None:
        return "–"
    if reading.carried and reading.estimate.measured:
        return f"as at step {reading.measured_at}"
    return cell(reading.estimate)
