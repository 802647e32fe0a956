"""A policy as it stands in a file, with the line of each rule.

Enters: the path of a YAML file or of a TOML file with the table `[tool.bias_audit]`, or a mapping. Leaves: a
`PolicyFile`; or one error with the file, the line and the key.

Standard library, pydantic and PyYAML only: the gate imports this module and must start in a blink.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from bias_audit.located import LineOf, Loc, at_line, below, read_file, read_toml, read_yaml
from bias_audit.policies.policy import METRICS, SHORTHANDS, Policy, Rule, Tolerance, wrong_name
from bias_audit.terms import Subjects

TABLE = ("tool", "bias_audit")


@dataclass(frozen=True)
class PolicyFile:
    """A policy, the file it was read from (None: from no file), and where in it a thing stands."""

    path: Path | None
    policy: Policy
    _line_of: LineOf = field(default=lambda loc: None, compare=False, repr=False)

    def line_of(self, title: str) -> int | None:
        """The line of the rule with this title, from 1 on; None where it is not known."""
        titles = [rule.title for rule in self.policy.rules]
        return self._line_of(("rules", titles.index(title))) if title in titles else None

    def check_names(self, subjects: Subjects, methods: Sequence[str]) -> None:
        """Raise if a rule names a region, class, attribute or method that an audit does not have.

        Raises:
            ValueError: says where it stands, which name it is, and which names there are.
        """
        where = "policy" if self.path is None else f"policy {self.path}"
        for i, rule in enumerate(self.policy.rules):
            wrong = wrong_name(rule, subjects, methods)
            if wrong:
                keys = ("region", "class", "method")
                key = next((key for key in keys if wrong.startswith((f"unknown {key} ", f"{key} "))), "group")
                raise ValueError(f"{where}{at_line(self._line_of(('rules', i, key)))}: rules.{i}.{key}: {wrong}")


def read_policy(source: Policy | str | Path | Mapping[str, Any] | None) -> PolicyFile:
    """Policy from a YAML file, a TOML file (`[tool.bias_audit]`), a mapping, or None for the default.

    Raises:
        ValueError: the file cannot be read, is not YAML or TOML, or has a key or value that no policy has; the message
            names the file, the line and the key.

    Example:
        >>> read_policy({"tolerance": 30})
        Traceback (most recent call last):
        ...
        ValueError: policy: tolerance: expected a mapping
    """
    if source is None:
        return PolicyFile(None, Policy())
    if isinstance(source, Policy):
        return PolicyFile(None, source)
    if isinstance(source, Mapping):
        return PolicyFile(None, _parse(source, "policy", lambda loc: None))
    path = Path(source)
    content, line_of = _read(path)
    if not isinstance(content, Mapping):
        kind = "nothing" if content is None else type(content).__name__
        raise ValueError(f"policy {path}: expected a mapping with the key `rules`, got {kind}")
    return PolicyFile(path, _parse(content, f"policy {path}", line_of), line_of)


def _read(path: Path) -> tuple[Any, LineOf]:
    """What the file says, and where it says it."""
    if path.suffix.lower() == ".toml":
        return read_file(path, f"policy {path}", lambda text: read_toml(text, TABLE), "toml")
    try:
        return read_file(path, f"policy {path}", read_yaml, path.suffix.lstrip(".") or "YAML")
    except ValueError as error:
        mark = getattr(error.__cause__, "problem_mark", None)
        if mark is None or not _is_bare_op(path.read_text(encoding="utf-8-sig"), mark.index):
            raise
        raise ValueError(f'{error} (an `op` such as ">=" or "!=" needs quotes)') from error


def _is_bare_op(text: str, index: int) -> bool:
    line = text[text.rfind("\n", 0, index) + 1 :].split("\n", 1)[0]
    return re.search(r"\bop:\s*[>!]", line) is not None


def _parse(content: Mapping[str, Any], where: str, line_of: LineOf) -> Policy:
    try:
        return Policy.model_validate(dict(content))
    except ValidationError as error:
        # A key that is misspelt is missing as well: what it is has more to tell.
        first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        # The parts of a union are no keys of the file's.
        loc: Loc = tuple(part for part in first["loc"] if part not in _TAGS)
        rule = below(content, loc[:2])
        if loc[2:3] == ("threshold",) and isinstance(rule, Mapping):
            written = next((key for key in SHORTHANDS if rule.get(key) is not None), "threshold")
            loc = (*loc[:2], written, *loc[3:])
        key = ".".join(str(part) for part in loc) or "(top level)"
        what = _EXPECTED.get(first["type"], " ".join(first["msg"].removeprefix("Value error, ").split()))
        if first["type"] == "extra_forbidden":
            what = _unknown_key(loc)
        if loc[2:] == ("metric",) and isinstance(first["input"], str):
            close = difflib.get_close_matches(first["input"], METRICS, 1, cutoff=0.5)
            what = f"unknown metric {first['input'][:40]!r}{f'; did you mean `{close[0]}`?' if close else f': {what}'}"
        raise ValueError(f"{where}{at_line(line_of(loc))}: {key}: {what}") from error
    except RecursionError as error:
        raise ValueError(f"{where}: is nested too deeply") from error


# The parts of a policy's unions.
_TAGS = ("number", "verdicts", "known", "own")
_EXPECTED = {
    "tuple_type": "expected a list",
    "model_type": "expected a mapping",
    "too_short": "expected at least 1, got none",
}


def _unknown_key(loc: Loc) -> str:
    owners: dict[str, type[BaseModel]] = {"rules": Rule, "tolerance": Tolerance}
    owner = owners.get(str(loc[0]), Policy) if len(loc) > 1 else Policy
    known = [field.alias or name for name, field in owner.model_fields.items()]
    known += SHORTHANDS if owner is Rule else []
    close = difflib.get_close_matches(str(loc[-1]), known, 1, cutoff=0.5)
    return f"unknown key; {f'did you mean `{close[0]}`? ' if close else ''}known are: {', '.join(known)}"
