"""The gate's result in a GitHub workflow: annotations at the lines of the policy, and the page of the step.

Enters: a `GateResult`. Leaves: workflow commands, one a line, and Markdown at the end of the step's page.

GitHub shows ten annotations of each kind for a step and drops the others: the tenth says how many there are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bias_audit.gate.result import GateResult
from bias_audit.gate.rows import Row, rows
from bias_audit.outputs.markdown import render_markdown
from bias_audit.wording import shortened

MOST = 10
SUMMARY_BYTES = 1024 * 1024
# The runner cuts messages at 4,096 characters; names may be of any length.
_MESSAGE, _TITLE, _PART = 4_000, 200, 600

FULL = "::notice title=bias-audit::The page of this step is full: what the gate found is not on it.\n"

Kind = Literal["error", "warning", "notice"]
KINDS: tuple[Kind, ...] = ("error", "warning", "notice")


@dataclass(frozen=True)
class _Annotation:
    kind: Kind
    title: str
    message: str
    line: int | None = None


def render_github(result: GateResult) -> str:
    """The result as workflow commands.

    Example:
        >>> print(render_github(run_gate(read_run("runs/today"), "audit.yaml")))  # doctest: +SKIP
        ::error file=audit.yaml,line=3,title=bias-audit%3A no reliance::verdict on region hair: reliance ...
    """
    found = list(_annotations(result))
    file = _in_repository(result.policy.path)
    lines = []
    for kind in KINDS:
        of_kind = [one for one in found if one.kind == kind]
        if len(of_kind) > MOST:
            left = len(of_kind) - MOST + 1
            message = f"{left} more like these; the step's page and the other formats have all."
            of_kind = [*of_kind[: MOST - 1], _Annotation(kind, "bias-audit", message)]
        lines += [_command(one, file) for one in of_kind]
    return "".join(f"{line}\n" for line in lines)


def write_step_summary(result: GateResult) -> bool:
    """Add the result to the page of the workflow's step, as much as fits; False if nothing does.

    Raises:
        OSError: the file that GITHUB_STEP_SUMMARY names cannot be written.
    """
    name = os.environ.get("GITHUB_STEP_SUMMARY")
    if not name:
        return True
    path = Path(name)
    taken = path.stat().st_size if path.exists() else 0
    # Markdown begins on a line of its own, after a blank one.
    before = "\n\n" if taken else ""
    page = f"{before}{render_markdown(result, SUMMARY_BYTES - taken - len(before))}".encode()
    # Of a page that is too large GitHub shows nothing at all.
    if taken + len(page) > SUMMARY_BYTES:
        return False
    with path.open("ab") as file:
        file.write(page)
    return True


def _annotations(result: GateResult) -> Iterator[_Annotation]:
    # What does not fail the step is no error to GitHub either.
    failing: Kind = "error" if result.exit_code else "warning"
    doubted: Kind = "error" if result.exit_code == 3 else "notice" if result.on_inconclusive == "pass" else "warning"
    if result.doubts or not result.checks:
        doubts = "\n".join(shortened(doubt, _PART) for doubt in result.doubts) or "nothing was checked"
        yield _Annotation(doubted, "bias-audit: the evidence is not whole", doubts)
    for row in rows(result):
        kind: Kind | None = None
        match row.state:
            case "violated":
                kind = failing
            case "warning":
                kind = "warning"
            case "inconclusive":
                kind = doubted if row.counts else "notice"
        if kind is not None:
            yield _Annotation(kind, f"bias-audit: {row.check.rule}", _message(row), row.line)


def _message(row: Row) -> str:
    count = "" if row.n == "–" else f", n = {row.n}"
    lines = [
        f"{shortened(row.check.subject, _PART)}: {row.label}",
        f"measured {row.measured}{count}; must be {shortened(row.limit, _PART)}",
        shortened(row.reason, _PART),
    ]
    if row.since is not None:
        lines.append(f"since step {row.since}")
    if row.worst:
        lines.append(f"images to look at: {', '.join(shortened(name, _PART // 5) for name in row.worst)}")
    return "\n".join(lines)


def _command(one: _Annotation, file: str | None) -> str:
    properties = []
    if file is not None:
        properties += [f"file={_property(file)}", f"line={one.line or 1}"]
    properties.append(f"title={_property(shortened(one.title, _TITLE))}")
    return f"::{one.kind} {','.join(properties)}::{_data(one.message[:_MESSAGE])}"


def _in_repository(path: Path | None) -> str | None:
    """The policy's path as GitHub names files, from the root of the repository; None if it lies elsewhere."""
    if path is None:
        return None
    root = Path(os.environ.get("GITHUB_WORKSPACE") or ".").resolve()
    where = path.resolve()
    return where.relative_to(root).as_posix() if where.is_relative_to(root) else None


def _data(message: str) -> str:
    return message.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(value: str) -> str:
    return _data(value).replace(":", "%3A").replace(",", "%2C")
