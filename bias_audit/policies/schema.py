"""The JSON Schema of a policy, for editors: it completes keys and marks what is misspelt while a policy is written.

Enters: nothing. Leaves: the schema, made from the models that read a policy, and what a model's own checks add to it.
`bias_audit/schemas/policy.schema.json` is the same as a file.
"""

from __future__ import annotations

import json
import re
from typing import Any

from bias_audit.policies.policy import SHORTHANDS, Policy, Rule, Tolerance
from bias_audit.terms import Verdict

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def policy_schema() -> str:
    """The schema as text, of draft 2020-12.

    It knows the keys, their values, and that a rule has one limit. What it does not know is what a metric goes with:
    `bias-audit policy check` does.

    Example:
        >>> json.loads(policy_schema())["title"]
        'Policy'
    """
    schema = Policy.model_json_schema(by_alias=True)
    rule = schema["$defs"]["Rule"]
    # A key that is not meant is left out, not written as null.
    rule["properties"] = {key: _without_null(its) for key, its in rule["properties"].items()}
    verdicts = _one_or_several()
    rule["properties"]["threshold"] = {
        "description": "a number; of a verdict a verdict, or several",
        "anyOf": [{"type": "number"}, *verdicts],
    }
    rule["properties"] |= {
        key: {"description": f'short for `op: "{op}"` and `threshold`'}
        | ({"anyOf": verdicts} if key == "forbid" else {"type": "number"})
        for key, op in SHORTHANDS.items()
    }
    rule["oneOf"] = [{"required": ["op"]}, *({"required": [key]} for key in SHORTHANDS)]
    rule["dependentRequired"] = {"threshold": ["op"]}
    number, verdict = ({"properties": {"op": {"enum": ops}}} for ops in (["<", "<=", ">", ">="], ["==", "!="]))
    of_number = {"anyOf": [{"required": [key]} for key in ("threshold", "max_regression", "max", "min")]}
    no_forbid = {"not": {"required": ["forbid"]}}
    no_number = {"not": {"anyOf": [{"required": [key]} for key in ("max", "min", "max_regression", "class", "method")]}}
    rule |= {
        "if": {"properties": {"metric": {"const": "verdict"}}, "required": ["metric"]},
        "then": {"allOf": [verdict, no_number, {"properties": {"threshold": {"anyOf": verdicts}}}]},
        "else": {"allOf": [number, of_number, no_forbid, {"properties": {"threshold": {"type": "number"}}}]},
    }
    head = {"$schema": DIALECT, "title": "Policy", "description": _said(Policy)}
    for model in (Rule, Tolerance):
        schema["$defs"][model.__name__]["description"] = _said(model)
    return json.dumps(head | {key: its for key, its in schema.items() if key not in head}, indent=1) + "\n"


def _said(model: type[Any]) -> str:
    """What a model's docstring says, up to its errors and its example."""
    return " ".join(re.split(r"\n\s*(?:Raises|Example):\n", model.__doc__ or "")[0].split())


def _without_null(its: dict[str, Any]) -> dict[str, Any]:
    kinds = [kind for kind in its.get("anyOf", ()) if kind != {"type": "null"}]
    return kinds[0] if len(kinds) == 1 else its


def _one_or_several() -> list[dict[str, Any]]:
    one = {"enum": [str(verdict) for verdict in Verdict]}
    return [one, {"type": "array", "items": one, "minItems": 1}]
