"""What the intervals and tests of `bias_audit.stats` cost, and how often the intervals hold the truth.

Run by `python -m benchmarks.statistics`, on an idle machine. Enters: nothing but options. Leaves: raw timings and
shares as JSON and tables as Markdown, in `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count
from pathlib import Path
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import scipy.stats
from pydantic import TypeAdapter
from threadpoolctl import threadpool_limits

from benchmarks.results import Machine, this_machine, today
from benchmarks.timing import Contender, Series, alternate, median_interval
from bias_audit import stats
from bias_audit.stats import bootstrap_ratios, permutation_test

Floats = npt.NDArray[np.float64]

RESULTS = Path(__file__).parent / "results"
TARGET = 5.0
LARGE, KNOWN, ANEW, PERMUTED, PEER = (
    "bootstrap of 200 hypotheses on 2,000 images, 10,000 resamples",
    "bootstrap of an audit: 150 hypotheses on 512 images, resampled before",
    "the same, resampled for the first time",
    "permutation test of 50 hypotheses on 512 images",
    "scipy.stats.bootstrap of one of the 200 hypotheses",
)


@dataclass(frozen=True)
class Coverage:
    """How many of `intervals` for the mean of `n` numbers lie wholly above or below the true mean."""

    numbers: str
    n: int
    kind: str
    above: int
    below: int
    intervals: int


@dataclass(frozen=True)
class Measured:
    """One run; `peak_mib` is the most memory that arrays took during the large bootstrap, beside those given to it."""

    created: str
    machine: Machine
    threads: int
    scale: float
    series: tuple[Series, ...]
    peak_mib: float
    coverage: tuple[Coverage, ...]


# A distribution with its mean: numbers of a shape from a generator.
Draw = Callable[[np.random.Generator, tuple[int, int]], Floats]
NUMBERS: dict[str, tuple[Draw, float]] = {
    "normal": (lambda rng, shape: rng.normal(0, 1, shape), 0.0),
    "exponential": (lambda rng, shape: rng.exponential(1, shape), 1.0),
    "log-normal": (lambda rng, shape: rng.lognormal(0, 1, shape), math.exp(0.5)),
    "energy shares: beta(0.5, 3)": (lambda rng, shape: rng.beta(0.5, 3, shape), 0.5 / 3.5),
    "hits, 40 %": (lambda rng, shape: (rng.random(shape) < 0.4).astype(np.float64), 0.4),
}
SIZES = (5, 8, 10, 15, 20, 40, 80)


def main(arguments: Sequence[str] | None = None) -> Measured:
    """Run with these command line arguments; returns what was measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.statistics", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="rounds of timing")
    parser.add_argument("--threads", type=int, default=2, help="threads of the matrix products")
    parser.add_argument("--scale", type=float, default=1.0, help="below 1: so much less of everything, for a trial")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args(arguments)
    machine = dataclasses.replace(
        this_machine(), packages=tuple(f"{name} {version(name)}" for name in ("numpy", "scipy"))
    )
    with threadpool_limits(options.threads):
        series = alternate(contenders(options.scale), options.rounds, progress=lambda name: print(name, flush=True))
        print("memory", flush=True)
        peak = peak_of(contenders(options.scale)[0].run)
    print("coverage", flush=True)
    found = coverage(round(4000 * options.scale))
    measured = Measured(today(), machine, options.threads, options.scale, series, peak, found)
    path = options.out / f"statistics-{machine.slug}-{measured.created}"
    options.out.mkdir(parents=True, exist_ok=True)
    Path(f"{path}.json").write_bytes(TypeAdapter(Measured).dump_json(measured, indent=1) + b"\n")
    Path(f"{path}.md").write_text(markdown(measured), encoding="utf-8")
    print(f"{path}.json, {path}.md")
    return measured


def contenders(scale: float) -> list[Contender]:
    """What is timed; `scale` shrinks the number of images, hypotheses and resamples alike."""
    rng = np.random.default_rng(0)

    def sized(whole: int) -> int:
        return max(4, round(whole * scale))

    def columns(images: int, hypotheses: int) -> tuple[Floats, Floats, npt.NDArray[np.int64]]:
        values = rng.exponential(1, (sized(images), sized(hypotheses)))
        return values, np.ones_like(values), np.arange(sized(images)) % 4

    large, audit, members = columns(2000, 200), columns(512, 150), rng.random((sized(512), sized(50))) < 0.2
    column, fresh = large[0][:, 0], count(1)
    return [
        Contender(LARGE, lambda: bootstrap_ratios(*large, seed=0, resamples=sized(10_000))),
        Contender(KNOWN, lambda: bootstrap_ratios(*audit, seed=0)),
        Contender(ANEW, lambda: bootstrap_ratios(*audit, seed=next(fresh))),
        Contender(PERMUTED, lambda: permutation_test(audit[0][:, : members.shape[1]], members, audit[2], seed=0)),
        Contender(
            PEER,
            lambda: scipy.stats.bootstrap((column,), np.mean, n_resamples=sized(10_000), batch=500, rng=rng),
            every=3,
        ),
    ]


def peak_of(run: Callable[[], object]) -> float:
    """MiB that Python and NumPy held at most while this ran, beyond what they held before."""
    tracemalloc.start()
    run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def coverage(intervals: int) -> tuple[Coverage, ...]:
    """95 % intervals for the means of small samples, so many of each kind, size and distribution.

    The same samples get percentile intervals and BCa intervals, both expanded. Which of the two the tool takes depends
    on the number of images; here it takes the one kind for all.
    """
    found = []
    # The columns of a block share their resamples: several blocks average over them.
    blocks = [len(part) for part in np.array_split(range(intervals), math.ceil(intervals / 500))]
    for name, (draw, mean) in NUMBERS.items():
        for n in SIZES:
            samples = [draw(np.random.default_rng((n, seed)), (n, columns)) for seed, columns in enumerate(blocks)]
            for kind, least in (("percentile", n + 1), ("BCa", 0)):
                with patch.object(stats, "LEAST_FOR_BCA", least):
                    got = [
                        bootstrap_ratios(sample, np.ones_like(sample), np.zeros(n), seed=seed)
                        for seed, sample in enumerate(samples)
                    ]
                above = sum(int((i.low > mean).sum()) for i in got)
                below = sum(int((i.high < mean).sum()) for i in got)
                found.append(Coverage(name, n, kind, above, below, intervals))
    return tuple(found)


def markdown(measured: Measured) -> str:
    """The whole page."""
    machine = measured.machine
    parts = [
        f"# Statistics, {measured.created}",
        f"By `python -m benchmarks.statistics`. {machine.processor}, {machine.cores} cores, {machine.memory_gib:g} GiB "
        f"of memory, {machine.system}. Load average when it began: {machine.load or 0:.2f}. Python {machine.python}; "
        f"{', '.join(machine.packages)}. {measured.threads} threads.",
        "## Time",
        "Medians of several rounds with their 95 % bootstrap intervals; of five rounds or fewer the range. The target "
        f"for the first line is {TARGET:g} seconds. Beside the columns given to it, it takes {measured.peak_mib:.0f} "
        "MiB of memory.",
        _times(measured.series),
        "## How often the intervals hold the truth",
        f"Of {measured.coverage[0].intervals} intervals of 95 % for the mean of n numbers, how many per cent lie "
        "wholly above the true mean and wholly below it: 2.5 each would be right. Both kinds are expanded by "
        f"Student's quantile. The tool takes percentile intervals below n = {stats.LEAST_FOR_BCA}, BCa intervals from "
        "there on.",
        _misses(measured.coverage),
    ]
    return "\n\n".join(parts) + "\n"


def _times(series: Sequence[Series]) -> str:
    lines = ["| what | milliseconds |", "| --- | --- |"]
    for s in series:
        found = median_interval(np.array([1000 * x for x in s.seconds if x is not None]))
        lines.append(f"| {s.contender} | {found.median:,.0f} [{found.low:,.0f}, {found.high:,.0f}] |")
    return "\n".join(lines)


def _misses(found: Sequence[Coverage]) -> str:
    lines = [
        "| numbers | n | percentile: above | below | BCa: above | below |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    pairs = {(c.numbers, c.n): "" for c in found}
    for c in found:
        pairs[c.numbers, c.n] += f" {100 * c.above / c.intervals:.1f} | {100 * c.below / c.intervals:.1f} |"
    return "\n".join([*lines, *(f"| {numbers} | {n} |{shares}" for (numbers, n), shares in pairs.items())])


if __name__ == "__main__":
    main()
