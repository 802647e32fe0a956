"""How far a long piece of work is, for whoever shows it."""

from __future__ import annotations

from collections.abc import Callable

# Called with (pieces done, pieces in all), after each.
Progress = Callable[[int, int], None]


def silent(done: int, of: int) -> None:
    """The `Progress` that shows nothing."""
