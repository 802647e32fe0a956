"""What the commands print: tables, sparklines and pictures.

Enters: what was read or measured, and a console. Leaves: text, in colour where the console has it, and legible without.

All that comes from data is printed as it is: never as markup, and without characters that would steer the terminal.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from bias_audit.gate.gate import GateResult
from bias_audit.headlines import caveats, headlines
from bias_audit.outputs.rows import Row, State, advice, blocking, interval, outcome_words, rows, tally
from bias_audit.records.history import Onset, onsets
from bias_audit.records.results import AuditSummary
from bias_audit.records.runs import Run
from bias_audit.terms import Estimate, Outcome, Verdict
from bias_audit.verdict import Judgement

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image

    from bias_audit.evidence.clusters import Cluster
    from bias_audit.gate.baseline import Baseline
    from bias_audit.gate.compare import Comparison, Difference
    from bias_audit.policies.check import PolicyReport
    from bias_audit.regions.check import RegionReport
    from bias_audit.regions.choose import Choices
    from bias_audit.regions.propose import Found
    from bias_audit.report.clusters import RunClusters

_STYLES = {Outcome.HELD: "green", Outcome.VIOLATED: "bold red", Outcome.INCONCLUSIVE: "yellow"}
_VERDICT_STYLES = {
    Verdict.RELIANCE: "bold red",
    Verdict.SUSPECTED: "yellow",
    Verdict.CLEARED: "green",
    Verdict.INCONCLUSIVE: "yellow",
}
_ROW_STYLES: dict[State, str] = {
    "violated": "bold red",
    "warning": "red",
    "inconclusive": "yellow",
    "held": "green",
}
_REGION_STYLES = {"violated": "bold red", "warning": "yellow", "inconclusive": "yellow", "held": "green"}
_BARS = "▁▂▃▄▅▆▇█"
# A picture is so many cells wide; half a cell high it is a square of pixels.
PICTURE = 24
MOST_BARS, MOST_ROWS, MOST_CHECKS = 40, 40, 100
# So many images that a check of regions names are printed; its page has all.
MOST_FLAGS = 10
# From so many columns on each thing that is said of a check has its own.
WIDE = 110
# A name may be of any length; the JSON has the whole.
_MOST_LETTERS = 200
# A scale that ends lower would make noise look like a rise.
LEAST_SCALE = 0.1


def console(colours: bool = False) -> Console:
    """The console for standard output; with `colours` they are written to a file or a pipe as well."""
    if sys.stdout.isatty():
        return Console()
    # A log file has no width; 80 columns would break every row.
    return Console(width=140, force_terminal=True, color_system="truecolor") if colours else Console(width=140)


def text(value: object, style: str = "") -> Text:
    """Any text on one line, without markup and control characters.

    Example:
        >>> text("[red]a\\nb").plain
        '[red]a b'
    """
    words = " ".join(str(value).split())
    return Text("".join(c if c.isprintable() else "\ufffd" for c in words), style=style)


def shortened(value: object, most: int) -> str:
    """Any text on one line of at most `most` characters; what is left out is in the middle, since names differ at ends.

    Example:
        >>> shortened("a photograph of a nurse in a ward.jpg", 16)
        'a photog…ard.jpg'
    """
    line = text(value).plain
    return line if len(line) <= most else f"{line[: most // 2]}…{line[1 + most // 2 - most :]}"


def print_gate(console: Console, result: GateResult) -> None:
    """What the gate found: what each check measured, then a line on what to do and one with the outcome."""
    found = rows(result)
    if result.judgement is not None and result.judgement.findings:
        console.print(_findings_table(result.judgement))
    if found:
        console.print(_checks_table(found, console.width))
        for row in found[:MOST_CHECKS]:
            if row.worst:
                # On a line of their own, whole: an id is there to be copied.
                console.print(text(f"images: {', '.join(row.worst)} ({row.check.subject})"), soft_wrap=True)
    if result.audit is not None:
        console.print(_audit_line(result.audit).append(f" {tally(result)}."))
    _print_onsets(console, result.onsets)
    for doubt in result.doubts:
        console.print(text(f"Inconclusive: {doubt}.", "yellow"))
    if advice(result):
        console.print(text(advice(result)))
    console.print(text(f"bias-audit gate: {outcome_words(result)}{_because(result)}", _STYLES[result.outcome]))


def print_clusters(console: Console, found: RunClusters, telling: Sequence[Cluster]) -> None:
    """A table of the clusters, the most telling first, and a line for each class without."""
    if telling:
        console.print(_clusters_table(found, telling))
    for one in found.classes:
        if len(one.clusters) < 2:
            alone = one.reason or f"one cluster: no group of its {len(one.samples)} heatmaps stands apart"
            console.print(text(f"Class {one.class_name}: {alone}."))


def print_choices(console: Console, found: Choices) -> None:
    """A row for each cell: its images, those annotated, those chosen; and how many were chosen for their heatmaps."""
    table = Table(title="What to annotate", title_justify="left", expand=True)
    for name in ("label", *found.attributes):
        table.add_column(text(name), overflow="fold")
    for name in ("images", "annotated", "chosen", "after that"):
        table.add_column(name, justify="right", no_wrap=True)
    for cell in found.cells[:MOST_ROWS]:
        after = cell.annotated + cell.chosen
        counts = (str(cell.images), str(cell.annotated), str(cell.chosen), str(after))
        table.add_row(*map(text, (cell.label, *cell.values, *counts)), style="yellow" if after == cell.images else "")
    console.print(table)
    if len(found.cells) > MOST_ROWS:
        console.print(text(f"and {len(found.cells) - MOST_ROWS} more cells"))
    led = sum(choice.why != "balance" for choice in found.picked)
    images = "1 image" if len(found.picked) == 1 else f"{len(found.picked)} images"
    console.print(text(f"{images} to annotate, {led} of them for where their heatmaps lie."))
    if any(cell.annotated + cell.chosen == cell.images for cell in found.cells):
        console.print(text("A cell in yellow has no image left.", "yellow"))


def print_proposals(console: Console, found: Sequence[Found]) -> None:
    """A row for each region: in how many images it was found, and how often."""
    table = Table(title="Proposed", title_justify="left", expand=True)
    table.add_column("region", overflow="fold")
    for name in ("images", "annotations", "only boxes"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in found:
        counts = (str(one.images), str(one.annotations), str(one.boxes))
        table.add_row(*map(text, (one.region, *counts)), style="" if one.images else "yellow")
    console.print(table)
    if any(one.boxes for one in found):
        console.print(text("A box holds some of what lies around: its area is more than the thing's.", "yellow"))


def print_run(console: Console, run: Run, index: int, pictures: int) -> None:
    """One audit of a run: verdicts, how its leading numbers came about, when they set in, and the worst samples.

    Args:
        index: of the audit, counted from 0; -1 is the last.
        pictures: how many samples to draw: those with most of the heatmap on a spurious region.

    Raises:
        ValueError: there is no such audit.
        RecordError: the samples or the audit's arrays cannot be read.
    """
    count = len(run.audits)
    if not -count <= index < count:
        have = f"0 to {count - 1}, or -1 for the last" if count else "none: the run recorded no audit"
        raise ValueError(f"{run.path}: there is no audit {index}; there are {have}")
    index %= count
    audit, past = run.audits[index], run.audits[: index + 1]
    console.print(text(f"{run.manifest.model}, layer {run.manifest.layer}: {run.path}", "bold"))
    console.print(_findings_table(audit.judgement))
    leading = _leading(audit)
    console.print(_course_table(past, leading))
    for e in leading:
        if not e.measured:
            console.print(text(str(e).replace("_", " "), "yellow"))
    console.print(_audit_line(audit))
    for caveat in caveats(run.manifest.annotated):
        console.print(text(caveat, "yellow"))
    _print_onsets(console, onsets(past))
    for doubt in _doubts(run, index):
        console.print(text(doubt, "yellow"))
    outcome = audit.judgement.outcome
    said = "before training: nothing follows" if audit.trigger == "reference" else f"policy {outcome}"
    console.print(text(f"bias-audit show: {said}", _STYLES[outcome] if audit.trigger != "reference" else ""))
    if pictures:
        _print_samples(console, run, index, pictures)


def print_comparison(console: Console, found: Comparison) -> None:
    """What changed from run A to run B: verdicts first, then the numbers that lead, then how many others changed."""
    for letter, side in (("A", found.a), ("B", found.b)):
        console.print(text(f"{letter}: {side.run.path}, step {side.audit.step}, {side.run.manifest.model}"))
    for note in found.notes:
        console.print(text(note))
    if found.verdicts:
        console.print(_verdicts_table(found))
    leading = {e.subject for side in (found.a, found.b) for e in _leading(side.audit)}
    order = ("changed", "uncertain", "open", "unknown")
    rows = sorted((d for d in found.differences if d.before.subject in leading), key=lambda d: order.index(d.state))
    if rows:
        console.print(_differences_table(rows[:MOST_ROWS]))
    if any(d.pairs is None and d.state != "unknown" for d in rows):
        console.print(text("* from the two intervals, as if of different images; rather too wide where they are not."))
    for d in rows:
        if d.state == "unknown":
            console.print(text(d.change.reason.replace("_", " "), "yellow"))
    console.print(text(found))


def sparkline(values: Sequence[float | None], low: float, high: float) -> str:
    """Values as bars on a scale from `low` to `high`, a dot where there is none.

    Example:
        >>> sparkline([0.0, None, 0.5, 1.0], 0.0, 1.0)
        '▁·▅█'
    """
    bars = [None if v is None else min(max((v - low) / (high - low), 0.0), 1.0) for v in values]
    return "".join("·" if bar is None else _BARS[round(7 * bar)] for bar in bars)


def _audit_line(audit: AuditSummary) -> Text:
    return text(f"Audit at step {audit.step}, epoch {audit.epoch}, {audit.weights} weights.")


def _print_onsets(console: Console, history: Sequence[Onset]) -> None:
    for onset in history:
        if onset.since is not None and len(onset.steps) > 1:
            console.print(text(onset))


def _doubts(run: Run, index: int) -> Iterable[str]:
    if index < len(run.audits) - 1:
        yield f"{len(run.audits) - 1 - index} later audits are not in this."
        return
    if run.failed:
        yield f"Inconclusive: {run.failed}."
    if run.torn:
        yield "The last record was cut off while it was written."
    if not run.ended:
        yield "Training has not finished, or was killed: this is not final."


def _table(title: str, **columns: dict[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", expand=True)
    for name, options in columns.items():
        table.add_column(name.replace("_", " "), **{"overflow": "fold"} | options)
    return table


_NAME: dict[str, Any] = {"max_width": 48}
_WORD: dict[str, Any] = {"no_wrap": True}
_COUNT: dict[str, Any] = {"justify": "right", "no_wrap": True}


def print_baseline(
    console: Console, made: Baseline, path: Path, size: int, before: Baseline | None, outcome: Outcome
) -> None:
    """What became the baseline, what it replaces, and whether the run's own policy allows what it shows."""
    about = made.about
    what = f"step {about.step} of run {about.run_id}, {len(made.estimates)} estimates, {about.samples_audited} images"
    console.print(text(f"{path}: {what}, {size / 1000:.0f} kB"))
    if before is not None:
        console.print(text(f"It replaces step {before.about.step} of run {before.about.run_id}."))
    if outcome is not Outcome.HELD:
        console.print(text(f"By its own policy this run is {outcome}, and so is now the baseline.", "yellow"))


def print_policy(console: Console, report: PolicyReport, missing: str = "") -> None:
    """Each rule in a sentence, what it is about and how it would come out; `missing` is why there is no run."""
    result, count = report.result, len(report.rules)
    where = "" if result is None or result.audit is None else f" on run {result.run_id}, step {result.audit.step}"
    console.print(text(f"{report.policy.path}: {count} rule{'' if count == 1 else 's'}{where}", "bold"))
    console.print(
        text("Violated: the whole 95 % interval lies beyond the limit. Held: it lies within. Else inconclusive.")
    )
    for i, one in enumerate(report.rules, 1):
        line = "" if one.line is None else f"line {one.line}, "
        console.print(text(f"{i}. {one.rule.title} ({line}{one.rule.severity})", "bold"))
        said = [text(f"Asks: {one.sentence}.")]
        for c in one.checks[:MOST_ROWS]:
            step = f" at step {c.step}" if one.rule.at == "every" else ""
            said.append(text(f"{c.outcome}{step}: {c.message}", _STYLES[c.outcome]))
        said += [text(f"and {len(one.checks) - MOST_ROWS} more")] if len(one.checks) > MOST_ROWS else []
        said += [text(f"Matches nothing: {one.nothing}.", "yellow")] if one.nothing else []
        for words in said:
            console.print(Padding(words, (0, 0, 0, 3), expand=False))
    for doubt in (missing,) if missing else () if result is None else result.doubts:
        console.print(text(f"Inconclusive: {doubt}.", "yellow"))
    if result is not None:
        outcomes = [one.outcome for one in report.rules]
        told = [f"{outcomes.count(outcome)} {outcome}" for outcome in Outcome if outcome in outcomes]
        told += [f"{outcomes.count(None)} without anything to ask of"] if None in outcomes else []
        console.print(text(f"bias-audit policy check: of {count} rules {', '.join(told)}"))


def print_region_check(console: Console, report: RegionReport) -> None:
    """Each check of regions and what it found, what must be mended first; then the images that it names."""
    found = report.survey.of
    console.print(text(f"{found.name}: {len(found.items)} images, {len(found.regions)} regions", "bold"))
    table = _table("Regions", outcome=_WORD, check=_WORD, found={"ratio": 1})
    for result in report.worst_first:
        state = result.found.state
        said = text(shortened(result.found.said, 6 * _MOST_LETTERS))
        table.add_row(text(state, _REGION_STYLES.get(state, "")), text(result.check.code), said)
    console.print(table)
    for result in report.worst_first:
        flags = result.found.flags
        for flag in flags[:MOST_FLAGS]:
            console.print(text(f"{result.check.code}: {found.items[flag.index].file}: {flag.said}"), soft_wrap=True)
        if len(flags) > MOST_FLAGS:
            console.print(text(f"{result.check.code}: and {len(flags) - MOST_FLAGS} more"))
    outcome = f"bias-audit regions check: {report.state}: {shortened(report.headline, 6 * _MOST_LETTERS)}"
    console.print(text(outcome, _REGION_STYLES[report.state]))


def _findings_table(judgement: Judgement) -> Table:
    table = _table("Findings", about=_NAME, verdict=_WORD, why={"ratio": 1})
    for finding in judgement.findings:
        sentence = finding.sentence
        if finding.samples_to_settle is not None:
            sentence += f" About {finding.samples_to_settle} images of that kind would settle it."
        verdict = text(finding.verdict, _VERDICT_STYLES[finding.verdict])
        table.add_row(text(f"{finding.kind} {finding.name}"), verdict, text(sentence))
    return table


def _because(result: GateResult) -> str:
    """The first thing that stands in the way, in the words of its check."""
    rows = blocking(result)
    if not rows:
        return ""
    more = f" (and {len(rows) - 1} more)" if len(rows) > 1 else ""
    return f": {shortened(rows[0].check.message, 6 * _MOST_LETTERS)}{more}"


def _checks_table(found: Sequence[Row], width: int) -> Table:
    """A line for each check; on a narrow terminal what belongs together is stacked."""
    wide = width >= WIDE
    if wide:
        columns = {
            "rule": {"ratio": 2},
            "on": {"ratio": 3},
            "measured": {"max_width": 30},
            "must be": {"max_width": 16},
        }
        columns |= {"n": _COUNT, "since step": _COUNT, "outcome": _WORD}
    else:
        columns = {"rule, and on what": {"ratio": 1}, "measured, must be, n": {"max_width": 22}, "outcome": _WORD}
    table = _table("Rules", **columns)
    table.show_lines = not wide
    for row in found[:MOST_CHECKS]:
        outcome, since = text(row.label, _ROW_STYLES[row.state]), "" if row.since is None else str(row.since)
        rule, on, measured, limit = (
            text(shortened(x, _MOST_LETTERS)) for x in (row.check.rule, row.check.subject, row.measured, row.limit)
        )
        more = [shortened(row.reason, 3 * _MOST_LETTERS)] if row.state == "inconclusive" else []
        notes = [text(note, "dim") for note in more]
        if wide:
            table.add_row(rule, _stacked(on, *notes), measured, limit, row.n, since, outcome)
        else:
            # A rule without a subject of its own is its subject.
            named = [rule] if row.check.subject == row.check.rule else [rule, on]
            count = [text(f"n = {row.n}")] if row.n != "–" else []
            when = [text(f"since {since}")] if since else []
            table.add_row(_stacked(*named, *notes), _stacked(measured, limit, *count), _stacked(outcome, *when))
    if len(found) > MOST_CHECKS:
        table.caption = f"{MOST_CHECKS} of {len(found)}, those first that are not held; --format json has all."
    return table


def _stacked(*lines: Text) -> Text:
    return Text("\n").join(lines)


def _interval(e: Estimate) -> str:
    return interval(e, digits=2)


def _clusters_table(found: RunClusters, telling: Sequence[Cluster]) -> Table:
    table = _table(
        f"Heatmaps by {found.method} at step {found.step}",
        **{"class": _NAME, "cluster": _COUNT, "images": _COUNT, "accuracy": _WORD},
        what_departs_from_the_class={"ratio": 2},
        nearest_to_its_centre={"ratio": 2},
    )
    for cluster in telling:
        shown = [str(contrast) for contrast in cluster.contrasts if contrast.shown]
        table.add_row(
            text(cluster.class_name),
            str(cluster.number),
            str(len(cluster.members)),
            _interval(cluster.accuracy),
            text("; ".join(shown) or "nothing beyond chance"),
            text(", ".join(found.ids[i] for i in cluster.nearest)),
        )
    return table


def _leading(audit: AuditSummary) -> tuple[Estimate, ...]:
    """The headlines, and what leads the evidence of each finding."""
    leading = [finding.evidence[0] for finding in audit.judgement.findings if finding.evidence]
    return tuple(dict.fromkeys((*headlines(audit.estimates), *leading)))


def _course_table(audits: Sequence[AuditSummary], leading: Sequence[Estimate]) -> Table:
    """How each leading number came about: a bar for each audit, the first and the last value."""
    shown = audits[-MOST_BARS:]
    span = f"step {shown[0].step}" + (f" to {shown[-1].step}" if len(shown) > 1 else "")
    left = f", the last {len(shown)} of {len(audits)} audits" if len(shown) < len(audits) else ""
    table = _table(f"Over time: {span}{left}", what=_NAME, course=_WORD, first=_COUNT, last=_COUNT, n=_COUNT)
    rows = [(e, _course(e, shown)) for e in leading[:MOST_ROWS]]
    for e, values in rows:
        # Bars of one metric share a scale from 0 on: what hardly moves must not look as if it did.
        of_metric = [v for other, course in rows if other.metric == e.metric for v in course if v is not None]
        bars = sparkline(values, min([0.0, *of_metric]), max([LEAST_SCALE, *of_metric]))
        ago = f", {e.age} audit{'' if e.age == 1 else 's'} ago" if e.age else ""
        first = next((f"{v:z.2f}" for v in values if v is not None), "–")
        table.add_row(text(e.subject.replace("_", " ")), bars, first, _interval(e) + ago, str(e.n))
    if len(leading) > MOST_ROWS:
        table.caption = f"{MOST_ROWS} of {len(leading)}; the report has all."
    return table


def _course(e: Estimate, audits: Sequence[AuditSummary]) -> list[float | None]:
    """The values of one estimate; one that is carried on from an earlier audit is the same measurement again."""
    own = [next((x for x in audit.estimates if x.subject == e.subject), None) for audit in audits]
    return [x.value if x is not None and x.measured and x.age == 0 else None for x in own]


def _verdicts_table(found: Comparison) -> Table:
    table = _table("Verdicts", about=_NAME, A=_WORD, B=_WORD, why_in_B={"ratio": 1})
    for change in sorted(found.verdicts, key=lambda change: not change.changed):
        words = [
            text(f.verdict, _VERDICT_STYLES[f.verdict]) if f is not None else text("not judged")
            for f in (change.before, change.after)
        ]
        after = change.after.sentence if change.after is not None else ""
        name = text(f"{change.kind} {change.name}")
        table.add_row(name, words[0], Text("→ " if change.changed else "  ") + words[1], text(after))
    return table


def _differences_table(rows: Sequence[Difference]) -> Table:
    table = _table("Leading numbers", what={"ratio": 1}, A=_COUNT, B=_COUNT, difference=_COUNT, n=_COUNT, state=_WORD)
    for d in rows:
        c = d.change
        difference = "–" if c.value is None else f"{c.value:+z.2f} [{c.low:+z.2f}, {c.high:+z.2f}]"
        n = str(min(d.before.n, d.after.n)) + "*" if d.pairs is None else f"{d.pairs} "
        style = {"changed": "bold", "uncertain": "", "open": "dim", "unknown": "yellow"}[d.state]
        table.add_row(text(d.subject), _interval(d.before), _interval(d.after), difference, n, d.state, style=style)
    return table


def _print_samples(console: Console, run: Run, index: int, count: int) -> None:
    """The samples whose heatmaps lie most on a spurious region, in rows as wide as the console."""
    from PIL import Image

    from bias_audit.overlays import most_looked, opened, overlay

    sheet, scores, subjects = run.sheet(), run.scores(index), run.manifest.subjects
    worst = most_looked(scores, run.manifest.subjects.regions_with("spurious"), count)
    if not worst:
        console.print("No sample has a heatmap on a spurious region.")
        return
    console.print(text(f"Most of the heatmap on a spurious region ({scores.methods[0]}), left to right:"))
    place = {name: i for i, name in enumerate(sheet.ids)}
    # Half cells without colour would be a block of one shade.
    drawable = not console.no_color
    each_row = max(1, console.width // (PICTURE + 2))
    for start in range(0, len(worst), each_row):
        row = worst[start : start + each_row]
        width = len(row) * (PICTURE + 2) - 2
        strip = Image.new("RGB", (width * 8, PICTURE * 8))
        for k, (i, _, _) in enumerate(row):
            picture = opened(sheet.thumbnails[place[scores.ids[i]]]).convert("RGB")
            drawn = overlay(picture, scores.maps[0, i].astype("float32"))
            drawn.thumbnail((PICTURE * 8, PICTURE * 8))
            strip.paste(drawn, (k * (PICTURE + 2) * 8, 0))
        if drawable:
            _print_picture(console, strip, width)
        for k, (i, region, share) in enumerate(row, start + 1):
            label, decided = scores.labels[i], scores.predictions[i]
            said = f"{subjects.class_name(int(label))}, decided {subjects.class_name(int(decided))}"
            told = f"{share:.2f} on {region}; {said}"
            console.print(text(f"{k}. {scores.ids[i]}: {told}"))


def _print_picture(console: Console, picture: Image, cells: int) -> None:
    """A picture by the terminal's own graphics where it has some, else as coloured half cells."""
    if console.is_terminal and sys.stdout.isatty():
        try:
            # Importing it asks the terminal what it can show.
            from textual_image.renderable import Image as Drawn

            console.print(Drawn(picture, width=cells, height="auto"))
            return
        except ImportError:
            pass
        except Exception:
            # It divides by sizes that a terminal may well give as 0; half cells need none.
            console.print()
    small = picture.resize((cells, max(2, 2 * round(cells * picture.height / picture.width / 2))))
    for y in range(0, small.height, 2):
        line = Text()
        for x in range(small.width):
            upper, lower = (small.crop((x, at, x + 1, at + 1)).tobytes().hex() for at in (y, y + 1))
            line.append("▀", style=f"#{upper} on #{lower}")
        console.print(line, no_wrap=True, crop=True)
