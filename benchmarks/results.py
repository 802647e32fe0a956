"""What a run of the benchmark measured, as it is kept on disk and as it is compared with the targets.

Enters: timings, memory, agreement. Leaves: `Results`, written to and read from JSON, and the `Check`s of the targets;
and what other benchmarks write too: the date, the machine, a table.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch
from pydantic import TypeAdapter

from benchmarks.contenders import (
    AUDIT,
    AUDIT_GROUP,
    BARE,
    EXPLAIN,
    EXPLANATION_GROUP,
    RIDE,
    VALIDATION,
    VALIDATION_GROUP,
    Skipped,
)
from benchmarks.gpu import DeviceRow
from benchmarks.memory import Memory
from benchmarks.peers import CAPTUM, PEERS, QUANTUS, Agreement
from benchmarks.timing import Floats, Interval, Series, median_interval, ratios

Outcome = Literal["met", "missed", "undecided"]
_PACKAGES = ("torch", "torchvision", "grad-cam", "captum", "torchcam", "quantus")


@dataclass(frozen=True)
class Machine:
    """What the figures were measured on."""

    processor: str
    cores: int
    memory_gib: float
    system: str
    python: str
    packages: tuple[str, ...]
    device: str
    load: float | None

    @property
    def slug(self) -> str:
        """A name for files."""
        text = f"{self.device or self.processor} {self.cores} cores".lower()
        return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)|cpu|@.*ghz", "", text)).strip("-")


@dataclass(frozen=True)
class Block:
    """The timings of one group on one model; ratios are to the first series."""

    model: str
    group: str
    images: int
    batch: int
    series: tuple[Series, ...]

    def of(self, contender: str) -> Series | None:
        """One contender's series, None if it took no part."""
        return next((s for s in self.series if s.contender == contender), None)

    def ratios(self, contender: str, to: str) -> Floats | None:
        """Ratios round by round, None where one of the two took no part."""
        first, second = self.of(contender), self.of(to)
        return None if first is None or second is None else ratios(first, second)


@dataclass(frozen=True)
class Results:
    """One run of the benchmark."""

    created: str
    machine: Machine
    threads: int
    rounds: int
    blocks: tuple[Block, ...] = ()
    memory: tuple[Memory, ...] = ()
    agreements: tuple[Agreement, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    device_rows: tuple[DeviceRow, ...] = ()

    @property
    def models(self) -> tuple[str, ...]:
        """The models, in order."""
        return tuple(dict.fromkeys(block.model for block in self.blocks))

    def block(self, model: str, group: str) -> Block | None:
        """The timings of a group, None if there are none."""
        return next((b for b in self.blocks if (b.model, b.group) == (model, group)), None)

    def memory_of(self, model: str, group: str, contender: str) -> Memory | None:
        """A contender's memory, None if it was not measured."""
        wanted = (model, group, contender)
        return next((m for m in self.memory if (m.model, m.group, m.contender) == wanted), None)

    def write(self, path: Path) -> None:
        """As JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_RESULTS.dump_json(self, indent=1) + b"\n")

    @classmethod
    def read(cls, path: Path) -> Results:
        """What `write` wrote.

        Raises:
            pydantic.ValidationError: the file is of another version.
        """
        return _RESULTS.validate_json(path.read_bytes())


@dataclass(frozen=True)
class Check:
    """A target beside what was measured; `value` is a ratio, with its bounds where it comes from several rounds."""

    model: str
    what: str
    target: str
    value: Interval
    outcome: Outcome


def checks(results: Results) -> Iterator[Check]:
    """Every target of the project on every model that it was measured on.

    A target is met or missed where the whole interval lies on one side of it, otherwise undecided.
    """
    for model in results.models:
        explained, audited = results.block(model, EXPLANATION_GROUP), results.block(model, AUDIT_GROUP)
        if explained is not None:
            yield from _at_most(model, "time of an explanation / bare forward", explained, EXPLAIN, BARE, 1.02)
            for peer in PEERS:
                yield from _tie_or_better(model, explained, peer.name)
        if audited is not None:
            yield from _at_most(model, "time of a complete audit / bare forward", audited, AUDIT, BARE, 1.05)
            yield from _at_least(model, "time of grad-cam + Quantus / complete audit", audited, QUANTUS, AUDIT, 4.0)
        validated = results.block(model, VALIDATION_GROUP)
        if validated is not None:
            yield from _at_most(model, "time of a validation with an audit / alone", validated, RIDE, VALIDATION, 1.03)
        yield from _memory_checks(results, model)


def _at_most(model: str, what: str, block: Block, of: str, to: str, limit: float) -> Iterator[Check]:
    values = block.ratios(of, to)
    if values is not None:
        found = median_interval(values)
        yield Check(model, what, f"at most {limit:g}", found, _side(limit - found.high, limit - found.low))


def _at_least(model: str, what: str, block: Block, of: str, to: str, limit: float) -> Iterator[Check]:
    values = block.ratios(of, to)
    if values is not None:
        found = median_interval(values)
        yield Check(model, what, f"at least {limit:g}", found, _side(found.low - limit, found.high - limit))


def _tie_or_better(model: str, block: Block, peer: str) -> Iterator[Check]:
    """Met unless the peer is faster beyond doubt: an interval that holds 1 is a tie."""
    values = block.ratios(EXPLAIN, peer)
    if values is not None:
        found = median_interval(values)
        what = f"time of an explanation / {peer}"
        yield Check(model, what, "tie or better", found, "missed" if found.low > 1 else "met")


def _side(least: float, most: float) -> Outcome:
    """Whether a margin whose bounds these are is certainly not negative, certainly negative, or neither."""
    return "met" if least >= 0 else "missed" if most < 0 else "undecided"


def _memory_checks(results: Results, model: str) -> Iterator[Check]:
    audit, audit_bare = (results.memory_of(model, AUDIT_GROUP, name) for name in (AUDIT, BARE))
    if audit is not None and audit_bare is not None:
        ratio = audit.added / audit_bare.added
        yield _single(model, "peak memory of a complete audit / bare forward", "at most 1.2", ratio, ratio <= 1.2)
    mine, captum, plain = (results.memory_of(model, EXPLANATION_GROUP, name) for name in (EXPLAIN, CAPTUM, BARE))
    if mine is not None and captum is not None and plain is not None:
        # A process's memory is not told more closely than to a MiB or so, and we may add less.
        ratio = (captum.added - plain.added) / max(mine.added - plain.added, 1.0)
        what = "memory that captum adds to the bare forward / that an explanation adds"
        yield _single(model, what, "at least 3", ratio, ratio >= 3)


def _single(model: str, what: str, target: str, value: float, met: bool) -> Check:
    return Check(model, what, target, Interval(value, value, value, 1), "met" if met else "missed")


def this_machine() -> Machine:
    """The machine that this runs on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return Machine(
        processor=_processor(),
        cores=os.cpu_count() or 1,
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        packages=tuple(f"{name} {_version(name)}" for name in _PACKAGES),
        device=device,
        load=load,
    )


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def today() -> str:
    """The date, in UTC."""
    return datetime.now(UTC).date().isoformat()


_RESULTS: TypeAdapter[Results] = TypeAdapter(Results)
