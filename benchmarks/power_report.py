"""The power study as a table and a figure.

Enters: the `Judged` models of a study. Leaves: its targets, a page of Markdown, and a PNG.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import vl_convert
from pydantic import TypeAdapter

from benchmarks.families import AGREEMENT, FAMILIES, KINDS
from benchmarks.results import table
from benchmarks.trained import NOT_USED, TESTED, USED, USES, Use
from benchmarks.verdicts import AUDITED, RULES, Judged, Rule
from bias_audit.stats import wilson
from bias_audit.terms import Verdict

COLOURS = {
    Verdict.RELIANCE: "#c2452d",
    Verdict.SUSPECTED: "#e8a33d",
    Verdict.INCONCLUSIVE: "#b9bec6",
    Verdict.CLEARED: "#3f7fb5",
}
# What the project promises, as shares of models.
LEAST_FOUND, MOST_ACCUSED, MOST_SUSPECTED = 0.95, 0.05, 0.1
# So many wrong verdicts are told in full.
_TOLD = 20


@dataclass(frozen=True)
class Study:
    """A run of the power study."""

    created: str
    torch: str
    models: tuple[Judged, ...]

    def write(self, path: Path) -> None:
        """As JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_STUDY.dump_json(self, indent=1) + b"\n")

    @classmethod
    def read(cls, path: Path) -> Study:
        """What `write` wrote.

        Raises:
            pydantic.ValidationError: the file is of another version.
        """
        return _STUDY.validate_json(path.read_bytes())


@dataclass(frozen=True)
class Target:
    """A promise beside what was found: `count` of `n` models, and whether their share keeps to the limit."""

    what: str
    limit: str
    count: int
    n: int
    outcome: Literal["met", "missed", "no such model"]


def targets(study: Study, rule: Rule = RULES[0]) -> tuple[Target, ...]:
    """The study's targets, for one rule."""
    used, others = of_use(study.models, "used"), of_use(study.models, "not used")
    found, accused = count(used, rule, Verdict.RELIANCE), count(others, rule, Verdict.RELIANCE)
    suspected = count(others, rule, Verdict.SUSPECTED)
    return (
        _target("used cues in reliance", f"at least {LEAST_FOUND:.0%}", found, len(used), LEAST_FOUND, 1),
        _target("cues not used in reliance", f"at most {MOST_ACCUSED:.0%}", accused, len(others), 0, MOST_ACCUSED),
        _target("and in suspected", f"at most {MOST_SUSPECTED:.0%}", suspected, len(others), 0, MOST_SUSPECTED),
    )


def _target(what: str, limit: str, found: int, n: int, least: float, most: float) -> Target:
    if n == 0:
        return Target(what, limit, 0, 0, "no such model")
    return Target(what, limit, found, n, "met" if least <= found / n <= most else "missed")


def of_use(models: Iterable[Judged], use: Use) -> list[Judged]:
    """The models of which the truth is this."""
    return [model for model in models if model.truth.use == use]


def count(models: Iterable[Judged], rule: Rule, verdict: Verdict) -> int:
    """The models of which a rule says this."""
    return sum(rule.says(model) is verdict for model in models)


def write_page(study: Study, path: Path) -> None:
    """`path`.md and `path`.png; `path` has no suffix."""
    image = path.with_suffix(".png")
    image.write_bytes(figure(study))
    path.with_suffix(".md").write_text(markdown(study, image.name), encoding="utf-8")


def markdown(study: Study, image: str) -> str:
    """The whole page; `image` is the name of the figure beside it."""
    families = tuple(dict.fromkeys(model.family for model in study.models))
    parts = [
        f"# Power study of {study.created}",
        _introduction(study),
        f"![Verdicts by family and kind, and against the truth]({image})",
        "## Targets",
        _targets(study),
        "## The truth",
        _TRUTH,
        _truths(study.models, families),
        "## Verdicts",
        _VERDICTS,
        *(_verdicts(study.models, families, rule) for rule in (*RULES, *_MORE)),
        "## Where the audit is wrong",
        _wrong(study.models),
    ]
    return "\n\n".join(parts) + "\n"


_MORE = (
    Rule("the audit, without swapped pictures", lambda model: model.without_swaps),
    Rule("the audit, on the attribute", lambda model: model.attribute),
)


def _introduction(study: Study) -> str:
    kinds = {
        "used": "the cue goes with the label in training, and the object is hard to read",
        "independent": "the cue is as salient, and goes with no label",
        "ignored": "the cue goes with the label, but the object is easy to read",
        "none": "as `used`, but only the columns of the training set have the cue: no picture shows it",
    }
    ranges = ", ".join(f"{low:.0%} to {high:.0%} (`{kind}`)" for kind, (low, high) in AGREEMENT.items())
    strengths = "; ".join(
        f"{family.name}: {family.strength[0]:.0%} to {family.strength[1]:.0%}" for family in FAMILIES.values()
    )
    seconds = sorted(model.seconds for model in study.models)
    lines = "\n".join(f"- `{kind}`: {what}." for kind, what in kinds.items())
    return (
        f"{len(study.models)} small networks of {len(FAMILIES)} families and four kinds each (`benchmarks/families.py` "
        f"draws them):\n\n{lines}\n\n"
        "Seeds change the training images, the weights that training starts from, how often the cue has the label's "
        f"value in training ({ranges}), and how strong the cue is drawn, as a share of its full strength ({strengths})."
        f"\n\nAn audit sees {AUDITED} images of its own, on which the cue goes with no label, the training set's "
        "columns, and pictures drawn anew with another cue. Policy and plan are the defaults, with interventions on "
        f"all {AUDITED} images. An audit took {seconds[len(seconds) // 2]:.1f} s in the median, on one thread. "
        f"torch {study.torch}.\n\n"
        "Made by `python -m benchmarks.power --cache DIR`; `--rejudge` judges the same records again."
    )


def _targets(study: Study) -> str:
    rows = []
    for rule in RULES:
        for target in targets(study, rule):
            outcome = target.outcome if target.outcome == "met" else f"**{target.outcome}**"
            rows.append((rule.title, target.what, target.limit, _share(target.count, target.n), outcome))
    return table(("rule", "what", "target", "found", "outcome"), rows)


_TRUTH = (
    f"On {TESTED} pictures that neither training nor audit sees, each drawn twice: with the cue that goes with the "
    "class, and with that of another. The difference of the two accuracies is the truth. A cue is *used* if flipping "
    f"it costs at least {USED:g} of accuracy, and *not used* if it costs at most {NOT_USED:g}."
)


def _truths(models: Sequence[Judged], families: Sequence[str]) -> str:
    rows = []
    for family, kind, cell in _cells(models, families):
        drops = [model.truth.drop for model in cell]
        aligned, flipped = (sum(getattr(m.truth, name) for m in cell) / len(cell) for name in ("aligned", "flipped"))
        numbers = f"{aligned:.2f}", f"{flipped:.2f}", f"{min(drops):.2f} to {max(drops):.2f}"
        rows.append((family, kind, str(len(cell)), *numbers, *(str(len(of_use(cell, use))) for use in USES)))
    titles = ("family", "kind", "models", "accuracy, cue aligned", "cue flipped", "drop, from and to", *USES)
    return table(titles, rows)


_VERDICTS = (
    "On the cue's place, by the truth rather than by what a kind was meant to be. The naive rule calls a cue used "
    "where its place gets more than half of the mean Grad-CAM energy. The rule of the gap calls it used where accuracy "
    "with the cue that goes with the class, minus accuracy with another, lies above 0.1 with its whole interval; where "
    "no value goes with a class, best minus worst value. Shares have their 95 % Wilson interval."
)


def _verdicts(models: Sequence[Judged], families: Sequence[str], rule: Rule) -> str:
    rows = []
    for family, kind, cell in _cells(models, families):
        for use in USES:
            mine = of_use(cell, use)
            if mine:
                rows.append((family, kind, use, str(len(mine)), *(str(count(mine, rule, v)) for v in COLOURS)))
    for use in USES:
        mine = of_use(models, use)
        if mine:
            shares = (_share(count(mine, rule, verdict), len(mine)) for verdict in COLOURS)
            rows.append(("**all**", "", use, str(len(mine)), *shares))
    return f"**{rule.title}**\n\n" + table(("family", "kind", "the cue is", "models", *COLOURS), rows)


def _cells(models: Sequence[Judged], families: Sequence[str]) -> Iterator[tuple[str, str, list[Judged]]]:
    for family in families:
        for kind in KINDS:
            cell = [model for model in models if (model.family, model.kind) == (family, kind)]
            if cell:
                yield family, kind, cell


def _wrong(models: Sequence[Judged]) -> str:
    """What the audit says where it misses a used cue, or accuses or suspects one that is not used."""
    missed = [m for m in of_use(models, "used") if m.region is not Verdict.RELIANCE]
    accused = [m for m in of_use(models, "not used") if m.region in (Verdict.RELIANCE, Verdict.SUSPECTED)]
    if not missed and not accused:
        return "Nowhere."
    lines = [
        f"- {m.family}, {m.kind}, seed {m.seed}: {m.region}; accuracy falls by {m.truth.drop:.2f}. {m.sentence}"
        for m in (*missed, *accused)
    ]
    more = len(lines) - _TOLD
    return "\n".join(lines[:_TOLD]) + (f"\n\nAnd {more} more, in the JSON." if more > 0 else "")


def _share(found: int, n: int) -> str:
    if n == 0:
        return "–"
    share, low, high = wilson(found, n)
    return f"{found}, {share:.0%} [{low:.0%}, {high:.0%}]" if found else f"0 [0%, {high:.0%}]"


def figure(study: Study) -> bytes:
    """A PNG: above, the share of each verdict by rule, family and kind; below, each model's verdict by the truth."""
    colour = {
        "field": "verdict",
        "type": "nominal",
        "scale": {"domain": list(COLOURS), "range": list(COLOURS.values())},
        "legend": {"orient": "top", "title": None, "symbolType": "square"},
    }
    families = list(dict.fromkeys(model.family for model in study.models))
    order = [f"{family}: {kind}" for family in families for kind in KINDS]
    rules = [rule.title for rule in RULES]
    values = [
        {
            "rule": rule.title,
            "family": model.family,
            "cell": f"{model.family}: {model.kind}",
            "verdict": str(rule.says(model)),
            "place": list(COLOURS).index(rule.says(model)),
            "drop": model.truth.drop,
            "y": (model.seed * 0.618034) % 1,
        }
        for model in study.models
        for rule in RULES
    ]
    shared: dict[str, Any] = {"field": "rule", "title": None, "sort": rules, "header": {"labelFontWeight": "bold"}}
    bars = {
        "facet": {"column": shared},
        "spacing": 20,
        "spec": {
            "width": 210,
            "height": {"step": 17},
            "mark": {"type": "bar", "height": 13},
            "encoding": {
                "y": {"field": "cell", "type": "nominal", "sort": order, "title": None, "axis": {"ticks": False}},
                "x": {
                    "aggregate": "count",
                    "stack": "normalize",
                    "title": "share of models",
                    "axis": {"format": "%", "values": [0, 0.5, 1]},
                },
                "color": colour,
                "order": {"field": "place"},
            },
        },
    }
    band = {"mark": {"type": "rect", "color": "#f1f3f5"}, "encoding": {"x": {"datum": NOT_USED}, "x2": {"datum": USED}}}
    points = {
        "mark": {"type": "circle", "size": 34, "opacity": 0.85},
        "encoding": {
            "x": {
                "field": "drop",
                "type": "quantitative",
                "title": "accuracy lost, cue flipped",
                "scale": {"domain": [-0.1, 1.02], "nice": False},
                "axis": {"grid": False, "values": [0, 0.2, 0.4, 0.6, 0.8, 1]},
            },
            "y": {"field": "y", "type": "quantitative", "axis": None, "scale": {"domain": [-0.15, 1.15]}},
            "color": colour,
        },
    }
    strips = {
        "facet": {
            "column": {**shared, "header": {"labels": False}},
            "row": {
                "field": "family",
                "title": None,
                "sort": families,
                "header": {"labelAngle": 0, "labelAlign": "left"},
            },
        },
        "spec": {"width": 210, "height": 62, "layer": [band, points]},
        "spacing": {"row": 6, "column": 20},
    }
    spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "data": {"values": values},
        "vconcat": [bars, strips],
        "title": {
            "text": "What is said of the cue",
            "subtitle": [
                f"{len(study.models)} small networks; below, one point for each; grey band: neither used nor not used",
            ],
            "anchor": "start",
            "subtitleColor": "#5b616b",
            "offset": 10,
        },
        "config": {"view": {"stroke": "#e2e5e9"}, "axis": {"titleFontWeight": "normal"}},
        "padding": 12,
        "background": "white",
    }
    return bytes(vl_convert.vegalite_to_png(spec, scale=2))


_STUDY: TypeAdapter[Study] = TypeAdapter(Study)
