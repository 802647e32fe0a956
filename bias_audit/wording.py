"""Names and numbers as people read them, wherever they are printed.

Enters: any value, which may come from data. Leaves: text on one line, without characters that would steer a terminal or
break a table. What a format has to escape beyond that, it escapes itself.

Standard library only: the gate imports this module and must start in a blink.
"""

from __future__ import annotations

from bias_audit.terms import Estimate

MOST_LETTERS = 600


def one_line(value: object) -> str:
    """Any text on one line, without control characters.

    Example:
        >>> one_line("a\\nb\\x1b[31m")
        'a b�[31m'
    """
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(str(value).split()))


def shortened(value: object, most: int) -> str:
    """Any text on one line of at most `most` characters; what is left out is in the middle, since names differ at ends.

    Example:
        >>> shortened("a photograph of a nurse in a ward.jpg", 16)
        'a photog…ard.jpg'
    """
    line = one_line(value)
    return line if len(line) <= most else f"{line[: most // 2]}…{line[1 + most // 2 - most :]}"


def readable(name: str) -> str:
    """The name of a metric, or of what an estimate is about, in words.

    Example:
        >>> readable(Estimate("cramers_v", 0.5, 0.4, 0.6, 100, group="gender").subject)
        "Cramér's V by gender"
    """
    return name.replace("cramers_v", "Cramér's V").replace("_", " ")


def interval(e: Estimate, digits: int = 3) -> str:
    """An estimate's value and interval, "–" where it was not measured.

    Example:
        >>> interval(Estimate("accuracy", 0.9, 0.85, 0.95, 40))
        '0.900 [0.850, 0.950]'
    """
    return f"{e.value:z.{digits}f} [{e.low:z.{digits}f}, {e.high:z.{digits}f}]" if e.measured else "–"


def percent(e: Estimate, unit: str = "%") -> str:
    """A measured share and its interval in percent, or in points of it.

    Example:
        >>> percent(Estimate("accuracy", 0.9, 0.85, 0.95, 40))
        '90 % [85, 95]'
    """
    assert e.value is not None and e.low is not None and e.high is not None
    return f"{100 * e.value:z.0f} {unit} [{100 * e.low:z.0f}, {100 * e.high:z.0f}]"


def plain_percent(e: Estimate) -> str:
    """A measured share in percent, without its interval."""
    assert e.value is not None
    return f"{100 * e.value:z.0f} %"


def in_short(error: BaseException) -> str:
    """What was raised and the beginning of what it says, on one line."""
    words = one_line(error)
    return f"{type(error).__name__}: {words if len(words) <= MOST_LETTERS else f'{words[:MOST_LETTERS]} ...'}"
