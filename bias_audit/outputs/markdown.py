"""The gate's result as a comment on a pull request.

Enters: a `GateResult`. Leaves: Markdown that GitHub and GitLab take: a headline, and tables in HTML.

In HTML nothing that comes from data is read as Markdown: no link, no picture, no table's end. What the sites look for
in plain text, such as a mention of somebody, is broken by an empty comment, which shows nothing.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from html import escape

from bias_audit.gate.result import GateResult
from bias_audit.gate.rows import Row, State, advice, outcome_words, rows, tally
from bias_audit.wording import shortened

# GitHub takes comments of 65,536 characters. Counted in bytes, so that no way of counting makes it too long.
COMMENT_BYTES = 65_536
_MARKS: dict[State, str] = {"violated": "❌", "warning": "⚠️", "inconclusive": "❔", "held": "✅"}
# A comment is narrow: more columns would break every number.
_COLUMNS = ("outcome", "rule, and on what", "measured, and what must hold")
# Mentions, references, labels, emojis, addresses and formulas hold one of these before what they name.
_SPECIAL = re.compile(r"[@#!~%$:](?=[^\s=])")
# A name may be of any length; the whole is in the JSON.
_NAME, _SENTENCE, _ID, _DOUBTS = 120, 400, 60, 10
_ROW_BYTES = 100


def render_markdown(result: GateResult, most: int = COMMENT_BYTES) -> str:
    """The result as Markdown of at most `most` bytes; what does not fit is left out by whole rows, held ones first.

    Example:
        >>> len(render_markdown(run_gate(read_run("runs/today"))).encode()) <= COMMENT_BYTES  # doctest: +SKIP
        True
    """
    found, head, todo = rows(result), _head(result), advice(result)
    # No row is shorter than its tags.
    shown = [_row(row) for row in found[: most // _ROW_BYTES]]

    def page(kept: int) -> str:
        return head + "\n".join(_body(found, shown[:kept], todo)) + "\n"

    fitting = bisect_right(range(len(shown) + 1), most, key=lambda kept: len(page(kept).encode()))
    return page(max(0, fitting - 1))


def _head(result: GateResult) -> str:
    outcome = f"{_MARKS[result.outcome.value]} bias-audit gate: {outcome_words(result)}"
    parts = [f"### {outcome}\n", f"<p>{_prose(tally(result))}.<br>{_what(result)}</p>"]
    if result.doubts:
        more = f"<li>and {len(result.doubts) - _DOUBTS} more</li>" if len(result.doubts) > _DOUBTS else ""
        doubts = "".join(f"<li>{_prose(doubt)}</li>" for doubt in result.doubts[:_DOUBTS])
        parts.append(f"<p>Reasons for doubt:</p><ul>{doubts}{more}</ul>")
    parts += [f"<p>{_prose(caveat)}</p>" for caveat in result.caveats[:_DOUBTS]]
    return "\n".join(parts) + "\n"


def _body(found: Sequence[Row], shown: Sequence[str], todo: str) -> Iterator[str]:
    """The tables with the rows that are `shown`. A blank line would end HTML in Markdown: there is none."""
    telling = sum(row.state != "held" for row in found)
    if shown[:telling]:
        yield _table(shown[:telling])
    if todo:
        yield f"<p>{_prose(todo)}</p>"
    if shown[telling:]:
        held = len(found) - telling
        title = f"{held} check{'' if held == 1 else 's'} held"
        yield f"<details><summary>{title}</summary>\n{_table(shown[telling:])}\n</details>"
    if len(shown) < len(found):
        left = max(telling - len(shown), 0)
        which = f"{left} of them not held, " if left else ""
        yield f"<p>{len(found) - len(shown)} rows were left out, {which}to keep this short: the JSON has all.</p>"


def _what(result: GateResult) -> str:
    policy = "" if result.policy.path is None else f", by {_code(result.policy.path, _NAME)}"
    if result.audit is None:
        return f"No audit of {_code(result.source, _NAME)} to judge{policy}."
    audit = result.audit
    where = f"step {audit.step}, epoch {audit.epoch}, {_prose(audit.weights)} weights"
    return f"{_code(result.source, _NAME)} at {where}{policy}."


def _table(shown: Sequence[str]) -> str:
    head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{''.join(shown)}</tbody>\n</table>"


def _row(row: Row) -> str:
    outcome, rule = [f"{_MARKS[row.state]} {row.label}"], [f"<strong>{_prose(row.check.rule, _NAME)}</strong>"]
    measured = [_prose(row.measured)]
    if row.since is not None:
        outcome.append(f"since step {row.since}")
    if row.check.subject != row.check.rule:
        rule.append(_prose(row.check.subject, _NAME))
    if row.state != "held":
        rule.append(f"<sub>{_prose(row.reason)}</sub>")
    if row.worst:
        rule.append(f"<sub>images: {', '.join(_code(name, _ID) for name in row.worst)}</sub>")
    if row.limit:
        measured.append(f"must be {_prose(row.limit, _NAME)}")
    if row.n != "–":
        measured.append(f"n = {row.n}")
    cells = "".join(f"<td>{'<br>'.join(lines)}</td>" for lines in (outcome, rule, measured))
    return f"<tr>{cells}</tr>\n"


def _code(value: object, most: int) -> str:
    return f"<code>{_escaped(shortened(value, most))}</code>"


def _prose(value: object, most: int = _SENTENCE) -> str:
    return _escaped(shortened(value, most))


def _escaped(line: str) -> str:
    return _SPECIAL.sub(r"\g<0><!-- -->", escape(line, quote=False))
