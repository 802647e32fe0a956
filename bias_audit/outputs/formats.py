"""The gate's result as text in each of `FORMATS`.

Enters: a `GateResult`. Leaves: text.

    human      a table for a terminal or a log
    json       every check on one flat list; its JSON Schema is bias_audit/schemas/gate.schema.json
    markdown   a comment on a pull request
    junit      the XML that GitHub, GitLab and Jenkins show among the tests
    github     annotations at the policy's lines, and the page of the step

All that comes from data is escaped for where it goes. Each format is loaded when it is asked for.
"""

from __future__ import annotations

from io import StringIO
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from bias_audit.gate.result import GateResult

Format = Literal["human", "json", "markdown", "junit", "github"]
FORMATS: tuple[Format, ...] = get_args(Format)
# A file has no width of its own; 80 columns would break every row.
WIDTH = 140


def render(result: GateResult, format: str) -> str:
    """The result as text in one of `FORMATS`.

    Raises:
        ValueError: there is no such format.

    Example:
        >>> print(render(run_gate(read_run("runs/today")), "markdown"))  # doctest: +SKIP
        ### ❌ bias-audit gate: violated
        ...
    """
    match known_format(format):
        case "json":
            from bias_audit.outputs.json_report import render_json

            return render_json(result)
        case "markdown":
            from bias_audit.outputs.markdown import render_markdown

            return render_markdown(result)
        case "junit":
            from bias_audit.outputs.junit import render_junit

            return render_junit(result)
        case "github":
            from bias_audit.outputs.github import render_github

            return render_github(result)
        case "human":
            from rich.console import Console

            from bias_audit.terminal.gate import print_gate

            page = StringIO()
            print_gate(Console(file=page, width=WIDTH, force_terminal=False), result)
            return page.getvalue()


def known_format(name: str) -> Format:
    """The format of this name.

    Raises:
        ValueError: there is none.
    """
    for format in FORMATS:
        if format == name:
            return format
    raise ValueError(f"--format {name}: unknown; known are {', '.join(FORMATS)}")
