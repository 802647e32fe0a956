"""A long training with many audits leaves nothing behind: memory, threads, hooks, files, processes and tensors.

Enters: how many audits of how many samples. Leaves: what the process held after each audit, what was left after the
training, and how much the run directory, reading it and its page grew.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from scipy import stats
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.memory import resident
from benchmarks.soak.figures import Figure
from bias_audit import AuditPlan
from bias_audit.callbacks import BiasAuditCallback
from bias_audit.records.files import AUDITS, REPORT
from bias_audit.records.runs import RunReader, read_run
from bias_audit.report.page import write_report
from tests.training import SIZE, Net, audit_set, trainer

ROOT = Path(__file__).resolve().parents[2]
AUDIT_COUNT, SAMPLES, KEEP = 2_000, 64, 50
# Audits until all that is made once is made; those that are not counted in the slope.
WARM_UP = 200
# A training's audits differ: every tenth makes interventions, every fiftieth tests the methods.
CYCLE = 50
# A block holds at most half a KiB, and larger things are in the KiB.
SLOPE_KIB, BLOCKS, PAGE_MB = 1.0, 1.0, 5.0


@dataclass(frozen=True)
class Held:
    """What a process holds: objects that the garbage collector knows by type, and what they stand for."""

    objects: Counter[str]
    tensors: int
    hooks: int
    threads: tuple[str, ...]
    files: int
    children: int

    def more_than(self, before: Held) -> dict[str, int]:
        """By how much each count is larger than it was; empty where none is."""
        more = {name: n for name, n in (self.objects - before.objects).items() if name not in ("Held", "Counter")}
        gained = {f"objects of type {name}": n for name, n in more.items()}
        for name in ("tensors", "hooks", "files", "children"):
            gained[name] = getattr(self, name) - getattr(before, name)
        gained["threads"] = len(self.threads) - len(before.threads)
        return {name: n for name, n in gained.items() if n > 0}


def held(model: nn.Module | None = None) -> Held:
    """What this process holds now, after a garbage collection; the hooks are those of `model`."""
    gc.collect()
    every = gc.get_objects()
    modules = () if model is None else model.modules()
    return Held(
        Counter(type(thing).__qualname__ for thing in every),
        sum(issubclass(type(thing), torch.Tensor) for thing in every),
        sum(len(value) for module in modules for name, value in vars(module).items() if name.endswith("_hooks")),
        tuple(thread.name for thread in threading.enumerate()),
        len(os.listdir("/proc/self/fd")),
        len(_children()),
    )


def _children() -> list[str]:
    found = []
    for task in Path("/proc/self/task").iterdir():
        # A thread may end meanwhile.
        with suppress(FileNotFoundError, ProcessLookupError):
            found += (task / "children").read_text().split()
    return found


class Probe(pl.Callback):
    """Looks at the process after each training step, and so after its audit, by calling `look`."""

    def __init__(self, look: Callable[[int, nn.Module], None]) -> None:
        self._look, self._steps = look, 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Look."""
        self._steps += 1
        self._look(self._steps, pl_module)


def train(
    path: Path,
    audits: int,
    samples: int,
    look: Callable[[int, nn.Module], None] = lambda *_: None,
    cycle: int = CYCLE,
    **options: Any,
) -> Path:
    """A training of as many steps, each followed by an audit, with the callback as users have it; the run directory.

    Args:
        path: where the run directory goes.
        audits, samples: how many steps, and how many samples each audits: a multiple of 4.
        look: called with (audits so far, the model) after each step.
        cycle: audits after which they repeat themselves: after so many the methods are tested anew.
        options: further arguments of the callback.
    """
    plan = AuditPlan(fitness_samples=2, intervention_samples=8, fitness_every=cycle, intervention_every=min(10, cycle))
    callback = BiasAuditCallback(
        audit_set(samples // 4), every_n_steps=1, plan=plan, dirpath=path, **{"on_error": "raise"} | options
    )
    pl.seed_everything(0, verbose=False)
    pictures = torch.rand(8, 3, SIZE, SIZE)
    loader = DataLoader(TensorDataset(pictures.repeat(audits, 1, 1, 1)[: 4 * audits], torch.arange(4 * audits) % 2), 4)
    trainer(path.parent, callback, Probe(look), max_epochs=1).fit(Net(), loader)
    return path


def soak(progress: Callable[[str], None]) -> tuple[Figure, ...]:
    """Two trainings, the second with `keep`, each in a process of its own."""
    figures: list[Figure] = []
    for keep in (None, KEEP):
        name = "all kept" if keep is None else f"keep={keep}"
        progress(f"{AUDIT_COUNT} audits, {name}")
        with TemporaryDirectory() as folder:
            measured = _in_a_process(Path(folder) / "run", AUDIT_COUNT, SAMPLES, keep)
            figures += of_training(name, measured)
            progress("reading and drawing")
            figures += of_records(name, Path(folder) / "run")
    return tuple(figures)


def of_training(name: str, measured: Measured) -> list[Figure]:
    """What the process of a training held.

    Raises:
        AssertionError: something was left behind.
    """
    assert not measured.left, f"{name}: left behind by the training: {measured.left}"
    assert not measured.gained, f"{name}: more of it after each cycle of audits: {measured.gained}"
    slope, half = slope_of(measured.resident_kib[WARM_UP:])
    interval = f"{slope - half:.3f} to {slope + half:.3f}"
    later = measured.blocks[WARM_UP // CYCLE :]
    blocks = (later[-1] - later[0]) / (CYCLE * (len(later) - 1))
    return [
        Figure(f"{name}: memory of the training per audit", slope, "KiB", SLOPE_KIB),
        Figure(f"{name}: memory of the training per audit, 95 % interval", interval, "KiB"),
        Figure(f"{name}: Python's blocks of memory per audit", blocks, "", BLOCKS),
        Figure(f"{name}: memory of the training at most", max(measured.resident_kib) / 1024, "MiB"),
        Figure(f"{name}: time per step and audit", measured.seconds / len(measured.resident_kib), "s"),
    ]


def of_records(name: str, path: Path) -> list[Figure]:
    """What the records of a training take on disk, in memory and in a page."""
    run = read_run(path)
    count = len(run.audits)
    lines, arrays = (path / AUDITS).stat().st_size, sum(file.stat().st_size for file in (path / "audits").iterdir())
    began = time.perf_counter()
    reader = RunReader(path)
    reader.read()
    read, began = time.perf_counter() - began, time.perf_counter()
    run = reader.read()
    again, began = time.perf_counter() - began, time.perf_counter()
    write_report(run)
    drawn = time.perf_counter() - began
    return [
        Figure(f"{name}: lines per audit on disk", lines / count / 1024, "KiB"),
        Figure(f"{name}: arrays per audit on disk", arrays / count / 1024, "KiB"),
        Figure(f"{name}: reading {count} audits", read, "s"),
        Figure(f"{name}: reading them again where none is new", again, "s"),
        Figure(f"{name}: drawing the page of {count} audits", drawn, "s"),
        Figure(f"{name}: page of {count} audits", (path / REPORT).stat().st_size / 1e6, "MB", PAGE_MB),
    ]


def slope_of(values: Sequence[float]) -> tuple[float, float]:
    """The least-squares slope of values against their place, and half of its 95 % interval.

    What a process holds wanders, so that neighbours are alike and the usual interval would be too narrow. The line is
    laid through the means of 20 blocks.

    Example:
        >>> slope, half = slope_of([3.0 * i + i % 2 for i in range(400)])
        >>> abs(slope - 3) < 1e-6, half < 1e-6
        (True, True)
    """
    blocks = np.array_split(np.asarray(values, dtype=np.float64), 20)
    ends = np.cumsum([len(block) for block in blocks])
    places = ends - np.array([len(block) + 1 for block in blocks]) / 2
    line = stats.linregress(places, [block.mean() for block in blocks])
    return float(line.slope), float(line.stderr * stats.t.ppf(0.975, len(blocks) - 2))


@dataclass(frozen=True)
class Measured:
    """One training: KiB of memory after each audit and Python's blocks of memory after each cycle of audits, what there
    was more of in each half of the cycles, and after the training than before it."""

    resident_kib: tuple[float, ...]
    blocks: tuple[int, ...]
    seconds: float
    left: dict[str, int]
    gained: dict[str, int]


def measure(
    path: Path, audits: int, samples: int, *, warm_up: int = WARM_UP, cycle: int = CYCLE, **options: Any
) -> Measured:
    """One training, after a short one that makes what is made once in a process.

    It is looked at after each audit, and all that it holds is counted one cycle after `warm_up` audits, at the end of
    the last whole cycle, and half-way: what is kept of each audit grows both times, what is made once does not. What
    the C library keeps for later is given back before: it comes and goes by megabytes.
    """
    train(path.parent / "first", cycle + 2, samples, cycle=cycle, **options)
    # Without an object for each number, which would be counted.
    sizes = array("d")
    blocks: list[int] = []
    counted: list[Held] = []
    first, last = warm_up + cycle, audits - audits % cycle
    middle = first + (last - first) // (2 * cycle) * cycle

    def look(count: int, model: nn.Module) -> None:
        ctypes.CDLL(None).malloc_trim(0)
        sizes.append(resident("VmRSS") * 1024)
        if count % cycle == 0:
            gc.collect()
            blocks.append(sys.getallocatedblocks())
        if count in (first, middle, last):
            counted.append(held(model))

    before = held()
    began = time.perf_counter()
    train(path, audits, samples, look, cycle, **options)
    seconds = time.perf_counter() - began
    left = held().more_than(before)
    early, late = counted[-2].more_than(counted[0]), counted[-1].more_than(counted[-2])
    gained = {name: early[name] + late[name] for name in early if name in late}
    return Measured(tuple(sizes), tuple(blocks), seconds, left, gained)


def _in_a_process(path: Path, audits: int, samples: int, keep: int | None) -> Measured:
    command = [sys.executable, "-m", "benchmarks.soak.long", str(path), str(audits), str(samples), str(keep or 0)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{audits} audits failed:\n{done.stderr[-3000:]}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    out, audits, samples, keep = sys.argv[1:]
    found = measure(Path(out), int(audits), int(samples), keep=int(keep) or None)
    sys.stdout.write(json.dumps(asdict(found)) + "\n")
