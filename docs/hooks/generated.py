"""Parts of the reference that are made from the program: the command line, and the keys of a policy file.

A page says where such a part belongs by a comment, `<!-- made here: commands -->`; on GitHub the page is without it.
"""

from __future__ import annotations

import html
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HERE = re.compile(r"^<!-- made here: (\w+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with what is made for it."""
    return HERE.sub(lambda found: MADE[found[1]](), markdown)


def commands() -> str:
    """Every command with its arguments and options, from the Typer application."""
    typer = [sys.executable, "-m", "typer", "bias_audit.cli", "utils", "docs", "--name", "bias-audit"]
    said = subprocess.run(typer, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    lines, command = [], ""
    # Its own heading is the page's.
    for line in said.splitlines()[1:]:
        heading = re.fullmatch(r"#+ `(.+)`", line)
        command = heading[1] if heading else command
        # What a command is for it cuts short in lists; the command itself says it whole.
        listed = re.match(r"\* `([a-z][\w-]*)`: ", line)
        if listed:
            name = f"{command or 'bias-audit'} {listed[1]}"
            line = f"* [`{listed[1]}`](#{name.replace(' ', '-')})"
        lines.append(line)
    return "\n".join(lines)


def policy() -> str:
    """The keys of a policy, of a rule and of the tolerances, from the JSON Schema."""
    sys.path.insert(0, str(ROOT))
    from bias_audit.policies.policy import Policy, Rule, Tolerance
    from bias_audit.policies.schema import policy_schema

    schema = json.loads(policy_schema())
    of = schema["$defs"]
    return "\n\n".join(
        [
            _keys("Keys of the file", Policy, schema, of),
            _keys("Keys of a rule", Rule, of["Rule"], of),
            _keys("Keys of `tolerance`", Tolerance, of["Tolerance"], of),
        ]
    )


def _keys(title: str, model: type[Any], described: dict[str, Any], of: dict[str, Any]) -> str:
    """A section on what one model of a policy reads."""
    said = (inspect.getdoc(model) or "").partition("Example:")[0].strip()
    required = described.get("required", ())
    rows = [
        f"| `{key}` | {_values(its, of)} | {'required' if key in required else _default(its)} |"
        for key, its in described["properties"].items()
    ]
    return "\n".join([f"## {title}", "", said, "", "| key | values | default |", "|---|---|---|", *rows])


def _values(its: dict[str, Any], of: dict[str, Any]) -> str:
    """What a key takes, in words."""
    if "$ref" in its:
        name = its["$ref"].rpartition("/")[2]
        return _values(of[name], of) if "enum" in of[name] else f"the keys of `{name.lower()}`, below"
    if "anyOf" in its or "oneOf" in its:
        said = dict.fromkeys(_values(one, of) for one in its.get("anyOf", its.get("oneOf")))
        return " or ".join(said)
    if "enum" in its or "const" in its:
        return ", ".join(f"`{value}`" for value in its.get("enum", [its.get("const")]))
    if its.get("type") == "array":
        return "rules, at least one" if "$ref" in its["items"] else f"a list of {_values(its['items'], of)}"
    if "pattern" in its:
        return f"a name that matches `{its['pattern']}`"
    bounds = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    limits = [f"{word} {its[key]:g}" for key, word in bounds.items() if key in its]
    kind = {"string": "text", "integer": "a whole number", "number": "a number"}[its["type"]]
    return ", ".join([kind, *limits])


def _default(its: dict[str, Any]) -> str:
    default = its.get("default")
    return "" if default is None or isinstance(default, list | dict) else f"`{html.escape(str(default))}`"


MADE = {"commands": commands, "policy": policy}
