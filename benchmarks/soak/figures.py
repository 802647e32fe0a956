"""What the long forms of the tests measured, as it is kept on disk.

Enters: the figures of one part. Leaves: `soak-<part>.json` and `.md` among the results.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from benchmarks.results import Machine


@dataclass(frozen=True)
class Figure:
    """One number, or one word, and what it must not exceed."""

    case: str
    value: float | str
    unit: str = ""
    limit: float | None = None

    @property
    def kept(self) -> bool:
        """Whether the limit is kept; true where there is none."""
        return self.limit is None or (not isinstance(self.value, str) and self.value <= self.limit)


@dataclass(frozen=True)
class Soaked:
    """One part's long form: what it is about, what it measured, when, on what and in how many minutes."""

    part: str
    about: str
    created: str
    machine: Machine
    minutes: float
    figures: tuple[Figure, ...]

    def write(self, folder: Path) -> Path:
        """Write both files into `folder`; returns the path of the page."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"soak-{self.part}.json").write_bytes(_SOAKED.dump_json(self, indent=1) + b"\n")
        page = folder / f"soak-{self.part}.md"
        page.write_text(self.markdown(), encoding="utf-8")
        return page

    def markdown(self) -> str:
        """The figures as a table, with how to measure them anew."""
        machine = self.machine
        rows = ["| case | value | unit | at most | |", "| --- |" + " --- |" * 4]
        for figure in self.figures:
            limit = "" if figure.limit is None else _shown(figure.limit)
            outcome = "" if figure.limit is None else "kept" if figure.kept else "**exceeded**"
            rows.append(f"| {figure.case} | {_shown(figure.value)} | {figure.unit} | {limit} | {outcome} |")
        parts = [
            f"# Soak: {self.part}, {self.created}",
            self.about,
            f"By `make soak ARGS={self.part}`, in {self.minutes:.1f} minutes. {machine.processor}, {machine.cores} "
            f"cores, {machine.memory_gib:g} GiB of memory, {machine.system}, Python {machine.python}, "
            f"{machine.packages[0]}.",
            "\n".join(rows),
        ]
        return "\n\n".join(parts) + "\n"


def _shown(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.4g}"


_SOAKED: TypeAdapter[Soaked] = TypeAdapter(Soaked)
