"""How long the gate takes, from a cold start to its exit code, on a run of 100,000 sample rows and 20 audits.

Run by `python -m benchmarks.gate`, on an idle machine. Enters: nothing but options. Leaves: raw timings as JSON and a
table as Markdown, in `benchmarks/results/`.

The run is written by the project's own writer and holds random scores and estimates; the gate is the console script in
a process of its own. Each round times every case once, so that what else the machine does falls on all alike.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
from pydantic import TypeAdapter

from benchmarks.results import Machine, this_machine, today
from bias_audit.policies.policy import Policy
from bias_audit.records.manifest import Manifest
from bias_audit.records.results import AuditResult
from bias_audit.records.samples import PackedMasks, SampleScores, SampleSheet
from bias_audit.records.writing import RunDirectory
from bias_audit.terms import REMAINDER, Estimate, Subjects
from bias_audit.verdicts.judgement import judge

RESULTS = Path(__file__).parent / "results"
TARGET = 1.5
METHODS = ("gradcam", "hirescam")
METRICS = ("energy_share", "enrichment", "pointing_game", "iou", "relevance_rank_accuracy")
SUBJECTS = Subjects(
    regions=(("coat", "object"), ("face", "spurious"), ("hair", "spurious")),
    attributes=(("gender", ("female", "male")), ("site", ("a", "b", "c"))),
    classes=tuple(f"class {i}" for i in range(10)),
)
CLEAN, BIASED = 0.7, 2.0


@dataclass(frozen=True)
class Case:
    """A way to start the gate; `seconds` of each round, `exit_code` of all."""

    name: str
    exit_code: int
    seconds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Measured:
    """One run of this benchmark; `bytes` is what audits.jsonl holds."""

    created: str
    machine: Machine
    samples: int
    audits: int
    estimates: int
    bytes: int
    cases: tuple[Case, ...]


def write_run(path: Path, samples: int, audits: int, enrichment: float) -> int:
    """A run directory of that size whose hair is looked at `enrichment` times as much as its area; the number of
    estimates of each audit."""
    rng = np.random.default_rng(0)
    ids = tuple(f"image {i:06d}" for i in range(samples))
    labels = rng.integers(0, len(SUBJECTS.classes), samples)
    attributes = np.stack([rng.choice(values, samples) for _, values in SUBJECTS.attributes], axis=1)
    sheet = SampleSheet(
        ids, labels, attributes, (b"jpeg" * 100,) * samples, PackedMasks.of(np.zeros((samples, 3, 8, 8), dtype=bool))
    )
    rules = [
        {"metric": "enrichment", "region": "hair", "class": "each", "max": 1.5},
        {"metric": "energy_share", "region": "object", "min": 0.1},
        {"metric": "accuracy", "class": "each", "group": "gender", "min": 0.5},
        {"metric": "accuracy_gap", "group": "site", "max": 0.1},
    ]
    policy = Policy.model_validate({"rules": rules})
    manifest = Manifest(
        run_id="benchmark",
        created=today(),
        tool="benchmark",
        model="none",
        layer="none",
        methods=METHODS,
        target="label",
        sign="positive",
        subjects=SUBJECTS,
        fingerprint="",
        samples_available=samples,
        samples_audited=samples,
        seed=0,
        policy=policy,
    )
    directory = RunDirectory.create(path, manifest, sheet)
    regions = (*(name for name, _ in SUBJECTS.regions), REMAINDER)
    scores = SampleScores(
        METRICS,
        METHODS,
        regions,
        ids,
        labels,
        np.where(rng.random(samples) < 0.9, labels, 0),
        rng.normal(1, 1, samples).astype(np.float32),
        np.full((samples, len(regions)), 0.2, np.float32),
        rng.random((len(METRICS), len(METHODS), samples, len(regions)), dtype=np.float32),
        rng.random((len(METHODS), samples, 7, 7)).astype(np.float16),
        np.ones((len(METHODS), samples), np.float32),
    )
    count = 0
    for k in range(audits):
        estimates = tuple(_estimates(samples, enrichment))
        count = len(estimates)
        judgement = judge(estimates, SUBJECTS, policy)
        result = AuditResult(100 * (k + 1), k, "raw", today(), 1.0, estimates, judgement, "validation", scores=scores)
        directory.append(result)
    directory.end()
    return count


def _estimates(samples: int, enrichment: float) -> Sequence[Estimate]:
    groups = [None, *(f"{name}={value}" for name, values in SUBJECTS.attributes for value in values)]
    classes = (None, *SUBJECTS.classes)
    found = []
    for class_name in classes:
        for group in groups:
            n = samples // (1 if class_name is None else 10) // (1 if group is None else 2)
            found.append(Estimate("accuracy", 0.9, 0.88, 0.92, n, None, class_name, group))
            for region in (*(name for name, _ in SUBJECTS.regions), REMAINDER):
                value = enrichment if region == "hair" else 1.0
                for method in METHODS:
                    for metric in METRICS if group is None else METRICS[:2]:
                        ends = 0.98 * value, 1.02 * value
                        found.append(Estimate(metric, value, *ends, n, region, class_name, group, method))
        for attribute, _ in SUBJECTS.attributes:
            found.append(Estimate("accuracy_gap", 0.02, 0.0, 0.04, samples, class_name=class_name, group=attribute))
    return found


def measure(samples: int, audits: int, rounds: int, folder: Path) -> Measured:
    """Time each case `rounds` times."""
    count = write_run(folder / "clean", samples, audits, CLEAN)
    write_run(folder / "biased", samples, audits, BIASED)
    gate = [str(Path(sys.executable).with_name("bias-audit")), "gate"]
    files = [f"--output={folder / name}" for name in ("gate.json", "gate.md", "gate.xml")]
    commands = {
        "interpreter alone": ([sys.executable, "-c", "pass"], 0),
        "clean": ([*gate, str(folder / "clean")], 0),
        "violated": ([*gate, str(folder / "biased")], 1),
        "violated, with JSON, Markdown and JUnit files": ([*gate, str(folder / "biased"), *files], 1),
    }
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, (command, expected) in commands.items():
            started = time.perf_counter()
            done = subprocess.run(command, capture_output=True, check=False)
            taken[name].append(time.perf_counter() - started)
            if done.returncode != expected:
                raise RuntimeError(f"{name}: expected exit code {expected}, got {done.returncode}: {done.stderr!r}")
    size = (folder / "clean" / "audits.jsonl").stat().st_size
    cases = tuple(Case(name, expected, tuple(taken[name])) for name, (_, expected) in commands.items())
    return Measured(today(), this_machine(), samples, audits, count, size, cases)


def markdown(measured: Measured) -> str:
    """The whole page."""
    machine = measured.machine
    lines = ["| case | exit code | median, s | smallest | largest | target |", "| --- |" + " --- |" * 5]
    for case in measured.cases:
        numbers = f"{median(case.seconds):.2f} | {min(case.seconds):.2f} | {max(case.seconds):.2f}"
        target = "" if case.name == measured.cases[0].name else f"at most {TARGET:g}"
        lines.append(f"| {case.name} | {case.exit_code} | {numbers} | {target} |")
    parts = [
        f"# The gate, {measured.created}",
        f"By `python -m benchmarks.gate`. {machine.processor}, {machine.cores} cores, {machine.memory_gib:g} GiB of "
        f"memory, {machine.system}. Load average when it ended: {machine.load or 0:.2f}. Python {machine.python}.",
        f"A run of {measured.samples:,} sample rows x {measured.audits} audits, {measured.estimates:,} estimates in "
        f"each, {measured.bytes:,} bytes of audits.jsonl. From the start of a process to its end, "
        f"{len(measured.cases[0].seconds)} rounds, the cases in turn.",
        "\n".join(lines),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> Measured:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--audits", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        measured = measure(options.samples, options.audits, options.rounds, Path(folder))
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"gate-{measured.machine.slug}-{measured.created}"
    stem.with_suffix(".json").write_bytes(TypeAdapter(Measured).dump_json(measured, indent=1) + b"\n")
    stem.with_suffix(".md").write_text(markdown(measured), encoding="utf-8")
    print(markdown(measured))
    return measured


if __name__ == "__main__":
    main()
