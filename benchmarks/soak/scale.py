"""What an audit costs as its samples grow: seconds and memory of each stage behind the model, for up to 100,000 rows.

Enters: how many samples, and a seed. Leaves: for each stage (scores of heatmaps, statistics, verdicts, records written
and read, report) its seconds, and by how much the process grew at most while it ran. Heatmaps and regions are random;
everything else is the product's own code. Each size runs in a process of its own with one thread.
"""

from __future__ import annotations

import gc
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

from benchmarks.memory import can_measure, clear_peak, resident
from benchmarks.soak.figures import Figure
from bias_audit.attribution.capture import Capture
from bias_audit.data.metadata import Metadata
from bias_audit.evidence.association import alignments, association
from bias_audit.evidence.attention import attention
from bias_audit.evidence.performance import performance
from bias_audit.localization import label_pixels, project_regions, with_remainder
from bias_audit.plan import AuditPlan
from bias_audit.policies.policy import Policy
from bias_audit.records.manifest import Manifest
from bias_audit.records.results import AuditResult
from bias_audit.records.runs import read_run
from bias_audit.records.samples import PackedMasks, SampleScores, SampleSheet
from bias_audit.records.writing import RunDirectory
from bias_audit.report.page import render
from bias_audit.stages.scoring import METRICS, SAMPLE_AXES, BatchScores, score_batch
from bias_audit.terms import REMAINDER, Subjects
from bias_audit.verdicts.judgement import judge

ROOT = Path(__file__).resolve().parents[2]
SIZES = (1_000, 10_000, 100_000)
BATCH, CHANNELS, GRID, SIDE, THUMBNAIL = 256, 8, 7, 56, 32
SUBJECTS = Subjects(
    (("coat", "object"), ("face", "spurious"), ("hair", "spurious")),
    (("gender", ("female", "male")),),
    ("doctor", "nurse"),
)
STAGES = ("scores", "statistics", "verdicts", "write", "read", "report")
# With twice the samples a stage may take 2.3 times as long: what is ordered is not quite linear.
STEEPEST = 1.2


@dataclass(frozen=True)
class Stage:
    """What one stage took: its seconds, and the MiB by which the process grew at most."""

    name: str
    seconds: float
    peak: float


@dataclass(frozen=True)
class Scaled:
    """What `samples` took: its stages, and the bytes that the scores and the sheet of one sample take in memory."""

    samples: int
    stages: tuple[Stage, ...]
    scores_bytes: float
    sheet_bytes: float
    disk_bytes: float
    page_bytes: int

    def stage(self, name: str) -> Stage:
        """The stage of that name."""
        return next(stage for stage in self.stages if stage.name == name)


def soak(progress: Callable[[str], None]) -> tuple[Figure, ...]:
    """Every size in a process of its own."""
    found = []
    for samples in SIZES:
        progress(f"{samples:,} samples")
        found.append(in_a_process(samples))
    return figures(found)


def figures(found: list[Scaled]) -> tuple[Figure, ...]:
    """Seconds and MiB of each stage and size, and how they grow from the last size but one to the last."""
    out = [
        figure
        for name in STAGES
        for scaled in found
        for figure in (
            Figure(f"{name}, {scaled.samples:,} samples: time", scaled.stage(name).seconds, "s"),
            Figure(f"{name}, {scaled.samples:,} samples: memory at most", scaled.stage(name).peak, "MiB"),
        )
    ]
    small, large = found[-2:]
    for name in STAGES:
        times = large.stage(name).seconds / small.stage(name).seconds
        power = float(np.log(times) / np.log(large.samples / small.samples))
        out.append(Figure(f"{name}: time grows as samples to the power of", power, "", STEEPEST))
        more = (large.stage(name).peak - small.stage(name).peak) * 2**20 / (large.samples - small.samples)
        out.append(Figure(f"{name}: memory a further sample", more, "bytes"))
    out.append(Figure("scores of a sample in memory", large.scores_bytes, "bytes"))
    out.append(Figure("picture and masks of a sample in memory", large.sheet_bytes, "bytes"))
    out.append(Figure("a sample's scores of one audit on disk", large.disk_bytes, "bytes"))
    out.append(Figure(f"page, {large.samples:,} samples", large.page_bytes / 1e6, "MB", 10))
    return tuple(out)


def in_a_process(samples: int, seed: int = 0) -> Scaled:
    """`measure` in a fresh process.

    Raises:
        RuntimeError: it failed; with the end of what it wrote.
    """
    command = [sys.executable, "-m", "benchmarks.soak.scale", str(samples), str(seed)]
    # Blocks that are freed are given back, or the peak of one stage would be hidden in what another left.
    surroundings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{samples} samples failed:\n{done.stderr[-2000:]}")
    known = json.loads(done.stdout.splitlines()[-1])
    return Scaled(**known | {"stages": tuple(Stage(**stage) for stage in known["stages"])})


def measure(samples: int, seed: int = 0) -> Scaled:
    """One audit of `samples` random heatmaps from its scores to its page, in this process."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, samples)
    attributes = np.array(SUBJECTS.attributes[0][1])[rng.integers(0, 2, samples)][:, None]
    stages: list[Stage] = []
    score_samples(labels[:BATCH], seed)  # What is loaded and allocated once is no stage's.
    with _timed("scores", stages):
        scores = score_samples(labels, seed)
    # An earlier audit of the same samples: here the same scores, turned around.
    reference = replace(scores, values=np.ascontiguousarray(scores.values[:, :, ::-1]))
    training = Metadata.of(labels.tolist(), {"gender": attributes[:, 0].tolist()})
    policy = Policy()
    with _timed("statistics", stages):
        estimates = (
            *attention(scores, attributes, SUBJECTS, seed=seed, reference=reference),
            *performance(
                scores.correct,
                labels,
                attributes,
                SUBJECTS,
                scores.predictions >= 0,
                predictions=scores.predictions,
                alignments=alignments(training, SUBJECTS, seed),
                seed=seed,
            ),
            *association(training, SUBJECTS, seed=seed),
        )
    with _timed("verdicts", stages):
        judgement = judge(estimates, SUBJECTS, policy)
    result = AuditResult(
        100, 0, "raw", "2026-01-01T00:00:00+00:00", 1.0, estimates, judgement, "validation", scores=scores
    )
    sheet = _sheet(scores, attributes, rng)
    with TemporaryDirectory() as folder:
        directory = RunDirectory.create(folder, _manifest(samples, seed, policy), sheet)
        with _timed("write", stages):
            directory.append(result)
        directory.end()
        with _timed("read", stages):
            read_run(folder).scores(0)
        with _timed("report", stages):
            page = render(read_run(folder))
        disk = sum(path.stat().st_size for path in (Path(folder) / "audits").iterdir()) / samples
    held = sum(array.nbytes for array in vars(scores).values() if isinstance(array, np.ndarray)) / samples
    shown = sheet.masks.bits.nbytes / samples + len(sheet.thumbnails[0])
    return Scaled(samples, tuple(stages), held, shown, disk, len(page.encode()))


def score_samples(labels: np.ndarray, seed: int) -> SampleScores:
    """Every score of random heatmaps with random regions, batch by batch as an audit does it."""
    plan = AuditPlan(batch_size=BATCH)
    parts = torch.split(torch.from_numpy(labels), BATCH)
    batches = [_batch(part, seed + number, plan) for number, part in enumerate(parts)]
    values, maps, magnitude, areas, predictions, margin = (
        torch.cat(of_each, dim=axis).numpy()
        for of_each, axis in zip(zip(*batches, strict=True), SAMPLE_AXES, strict=True)
    )
    ids = tuple(f"image {i:06d}" for i in range(len(labels)))
    regions = (*(name for name, _ in SUBJECTS.regions), REMAINDER)
    return SampleScores(
        METRICS, plan.method_names, regions, ids, labels, predictions, margin, areas, values, maps, magnitude
    )


def _batch(labels: torch.Tensor, seed: int, plan: AuditPlan) -> BatchScores:
    draw = torch.Generator().manual_seed(seed)
    count = len(labels)
    activations = torch.randn(count, CHANNELS, GRID, GRID, generator=draw).relu()
    gradients = torch.randn(count, CHANNELS, GRID, GRID, generator=draw)
    outputs = torch.randn(count, 2, generator=draw) + 2 * torch.nn.functional.one_hot(labels, 2)
    covered = with_remainder(_rectangles(count, draw))
    projected, pixels = project_regions(covered, (GRID, GRID)), label_pixels(covered)
    return score_batch(Capture(activations, gradients, outputs, outputs[:, 0]), labels, projected, pixels, plan)


def _rectangles(count: int, draw: torch.Generator) -> torch.Tensor:
    """A rectangle of random place and size for each region, bool `(B, 3, SIDE, SIDE)`."""
    corners = torch.randint(0, SIDE // 2, (count, 3, 2, 1), generator=draw)
    lengths = torch.randint(6, SIDE // 2, (count, 3, 2, 1), generator=draw)
    along = torch.arange(SIDE).expand(count, 3, 2, SIDE)
    inside = (along >= corners) & (along < corners + lengths)
    return inside[:, :, 0, :, None] & inside[:, :, 1, None, :]


def _sheet(scores: SampleScores, attributes: np.ndarray, rng: np.random.Generator) -> SampleSheet:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (THUMBNAIL, THUMBNAIL, 3), dtype=np.uint8)).save(buffer, "JPEG")
    masks = np.zeros((len(scores.ids), 3, THUMBNAIL, THUMBNAIL), dtype=bool)
    masks[:, :, 4:20, 8:16] = True
    return SampleSheet(
        scores.ids, scores.labels, attributes, (buffer.getvalue(),) * len(scores.ids), PackedMasks.of(masks)
    )


def _manifest(samples: int, seed: int, policy: Policy) -> Manifest:
    plan = AuditPlan()
    return Manifest(
        run_id="scale",
        created="2026-01-01T00:00:00+00:00",
        tool="soak",
        model="none",
        layer="none",
        methods=plan.method_names,
        target=plan.target_name,
        sign=plan.sign,
        subjects=SUBJECTS,
        fingerprint="",
        samples_available=samples,
        samples_audited=samples,
        seed=seed,
        policy=policy,
    )


@contextmanager
def _timed(name: str, stages: list[Stage]) -> Iterator[None]:
    gc.collect()
    before = resident("VmRSS") if can_measure() else 0.0
    if can_measure():
        clear_peak()
    started = time.perf_counter()
    yield
    seconds = time.perf_counter() - started
    stages.append(Stage(name, seconds, resident("VmHWM") - before if can_measure() else 0.0))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps(asdict(measure(*map(int, sys.argv[1:])))) + "\n")
