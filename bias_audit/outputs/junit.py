"""The gate's result as JUnit XML, for the page of tests of GitHub's reporters, GitLab and Jenkins.

Enters: a `GateResult`. Leaves: XML: a test case per rule and subject; violated is a failure, inconclusive an error.

GitLab shows `classname` as the suite, takes the first of two cases with one name, and shows the text of a failure,
not its message. Jenkins splits `classname` at its last dot. The names say what was asked and nothing that was measured,
so that a case keeps its history. What XML 1.0 has no place for is no printable character, and is replaced by
`one_line`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from xml.etree import ElementTree

from bias_audit.gate.result import GateResult
from bias_audit.gate.rows import Row, advice, rows
from bias_audit.terms import Outcome
from bias_audit.wording import one_line

SUITE = "bias_audit"
EVIDENCE = "the evidence is whole"


def render_junit(result: GateResult) -> str:
    """The result as JUnit XML that holds to the schema of Jenkins' xUnit plugin."""
    cases = [_evidence(result), *_cases(rows(result))]
    counts = {
        "tests": str(len(cases)),
        "failures": str(sum(case.find("failure") is not None for case in cases)),
        "errors": str(sum(case.find("error") is not None for case in cases)),
    }
    root = ElementTree.Element("testsuites", {"name": SUITE, **counts, "time": "0"})
    suite = ElementTree.SubElement(root, "testsuite", {"name": SUITE, **counts, "skipped": "0", "time": "0"})
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in _properties(result):
        ElementTree.SubElement(properties, "property", {"name": name, "value": one_line(value)})
    suite.extend(cases)
    ElementTree.indent(root)
    # In ASCII, so that it is what it says it is in whatever encoding it is printed.
    written = ElementTree.tostring(root, encoding="us-ascii").decode()
    # What is printed in a CI job is read for commands: these begin with ##[ wherever they stand.
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{written.replace("##[", "#&#35;[")}\n'


def _properties(result: GateResult) -> Iterable[tuple[str, object]]:
    yield "source", result.source
    yield "outcome", result.outcome
    if result.policy.path is not None:
        yield "policy", result.policy.path
    if result.run_id is not None:
        yield "run_id", result.run_id
    if result.audit is not None:
        yield "step", result.audit.step
    for caveat in result.caveats:
        yield "caveat", caveat
    if advice(result):
        yield "advice", advice(result)


def _evidence(result: GateResult) -> ElementTree.Element:
    """The case that every file has: whether there is any reason for doubt."""
    case = ElementTree.Element("testcase", {"classname": f"{SUITE}.evidence", "name": EVIDENCE, "time": "0"})
    doubts = list(result.doubts)
    if not doubts and not result.checks:
        doubts = ["nothing was checked"]
    if doubts:
        error = ElementTree.SubElement(case, "error", {"type": "inconclusive", "message": one_line("; ".join(doubts))})
        error.text = "\n".join(one_line(doubt) for doubt in doubts)
    return case


def _cases(found: Sequence[Row]) -> Iterable[ElementTree.Element]:
    """A case for each rule and subject; what was judged at several audits is one case."""

    def name(row: Row) -> tuple[str, str]:
        rule, subject = one_line(row.check.rule), one_line(row.check.subject)
        return f"{SUITE}.{row.metric}", rule if rule == subject else f"{rule}: {subject}"

    # The sort is stable: within a case, what is violated stays first.
    for (classname, title), group in groupby(sorted(found, key=name), key=name):
        yield _case(classname, title, list(group))


def _case(classname: str, title: str, of_it: Sequence[Row]) -> ElementTree.Element:
    case = ElementTree.Element("testcase", {"classname": classname, "name": title, "time": "0"})
    worst = of_it[0]
    told = "\n\n".join(_told(row) for row in of_it)
    if worst.state == "violated" or (worst.state == "inconclusive" and worst.counts):
        kind = "failure" if worst.state == "violated" else "error"
        attributes = {"type": worst.check.outcome.value, "message": one_line(f"{worst.measured}: {worst.reason}")}
        ElementTree.SubElement(case, kind, attributes).text = told
    elif worst.check.outcome is not Outcome.HELD:
        outcome = worst.check.outcome
        warned = f"This is {outcome}. It passes because its severity is `warn`; --fail-on warn makes it fail.\n"
        ElementTree.SubElement(case, "system-out").text = warned + told
    return case


def _told(row: Row) -> str:
    lines = [
        f"{row.label}: {row.check.subject}",
        f"measured: {row.measured}{'' if row.n == '–' else f' (n = {row.n})'}",
        f"must be: {row.limit}",
        f"why: {row.reason}",
    ]
    if row.since is not None:
        lines.append(f"since step: {row.since}")
    if row.worst:
        lines.append(f"images to look at: {', '.join(row.worst)}")
    if row.line is not None:
        lines.append(f"rule: line {row.line} of the policy")
    return "\n".join(one_line(line) for line in lines)
