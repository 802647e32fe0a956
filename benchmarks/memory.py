"""Peak memory of one contender, in a process of its own.

Enters: a model, a group and a contender by name. Leaves: how much resident memory the process needed at most while the
contender was made and run, and how much it had before: with the model and the data in memory and after one
bare forward pass, so that what every process loads and allocates once is in neither.

glibc keeps freed memory for itself, which would blur the peak. In the measured process it is told to give every block
of more than 64 KiB back at once (MALLOC_MMAP_THRESHOLD_).
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.contenders import AFTERWARDS, AUDIT_GROUP, EXPLANATION_GROUP, GROUPS, TESTED, bare
from benchmarks.workloads import SPECS, Spec, make_workload

ROOT = Path(__file__).resolve().parents[1]
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass(frozen=True)
class Task:
    """Whose memory to measure."""

    spec: Spec
    group: str
    contender: str


@dataclass(frozen=True)
class Memory:
    """MiB of resident memory of a contender's process, before and at most."""

    model: str
    group: str
    contender: str
    before: float
    peak: float

    @property
    def added(self) -> float:
        """What the contender needed on top of the model and the data, in MiB."""
        return self.peak - self.before


def can_measure() -> bool:
    """Whether this system tells a process its own peak and lets it be reset."""
    return os.access(_CLEAR, os.W_OK) and _STATUS.exists()


def measure_all(tasks: Sequence[Task], progress: Callable[[Task], object] = lambda task: None) -> tuple[Memory, ...]:
    """Each task in a fresh process, several at a time with one thread each, since time does not matter here.

    Raises:
        RuntimeError: a process failed; with the end of what it wrote.
    """
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        found: list[Memory] = []
        for task, memory in zip(tasks, pool.map(_in_a_process, tasks), strict=True):
            found.append(memory)
            progress(task)
    return tuple(found)


def _in_a_process(task: Task) -> Memory:
    numbers = [str(task.spec.batch), str(task.spec.images)]
    command = [sys.executable, "-m", "benchmarks.memory", task.spec.model, task.group, task.contender, *numbers]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {task.contender} failed:\n{done.stderr[-2000:]}")
    return Memory(task.spec.model, task.group, task.contender, *json.loads(done.stdout.splitlines()[-1]))


def measure(task: Task) -> tuple[float, float]:
    """MiB before and at most, in this process."""
    work = make_workload(task.spec)
    bare(work.model, work.batches[:1])
    with TemporaryDirectory() as folder:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before = resident("VmRSS")
        clear_peak()
        group = GROUPS[task.group](work, Path(folder) / "run")
        contender = next(c for c in group.contenders if c.name == task.contender)
        contender.run()
        return before, resident("VmHWM")


def tasks_of(spec: Spec, group: str, contenders: Sequence[str]) -> list[Task]:
    """The tasks of one group: of an audit one batch, which needs as much as more would."""
    if group not in (EXPLANATION_GROUP, AUDIT_GROUP):
        return []
    small = dataclasses.replace(spec, images=spec.batch)
    return [Task(small, group, name) for name in contenders if name not in (AFTERWARDS, TESTED)]


def clear_peak() -> None:
    """Let this process's peak begin anew at what it holds now."""
    _CLEAR.write_text("5")


def resident(field: str) -> float:
    """MiB of resident memory of this process: `VmRSS` now, `VmHWM` at most."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) / 1024


def _main(arguments: Sequence[str]) -> None:
    model, group, contender, batch, images = arguments
    torch.set_num_threads(1)
    spec = dataclasses.replace(SPECS[model], batch=int(batch), images=int(images))
    sys.stdout.write(json.dumps(measure(Task(spec, group, contender))) + "\n")


if __name__ == "__main__":
    _main(sys.argv[1:])
