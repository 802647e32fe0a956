"""Trainings killed at any moment, and gone on with from their last checkpoint.

Enters: how many kills, and a seed. Leaves: after each kill, what there is: records that can be read, each audit whole
and the one that an unbroken training made at that step, or absent; a page, and a gate that does not pass. At the end
the same audits under the same run id as without a kill.

A training is killed by a signal that it cannot catch, as it opens, renames or removes its n-th file in the run
directory, or a random time after that.
"""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.soak.figures import Figure
from bias_audit import AuditDataset, AuditPlan
from bias_audit.callbacks import BiasAuditCallback
from bias_audit.data.scenes import OCCUPATIONS, balanced_scenes, counts_with_bias, draw_scenes
from bias_audit.records.errors import MissingEvidenceError
from bias_audit.records.files import MANIFEST, PREVIOUS, REPORT
from bias_audit.records.results import AuditSummary
from bias_audit.records.runs import Run, RunReader, read_run
from bias_audit.records.samples import SampleScores
from bias_audit.report.page import write_report
from bias_audit.sources import judge_source

SIZE = 32
RUN, CHECKPOINTS = "bias_audit", "checkpoints"
# Nothing here takes so long: what does hangs.
PATIENCE_S = 300.0
# A life is killed as it touches one of so many files, of which an audit takes five to ten, or so many seconds later.
MOST_FILES, LONGEST_S = 35, 0.1
PLAN = AuditPlan(
    methods=("gradcam",),
    intervention_every=3,
    intervention_samples=4,
    control_regions=1,
    fitness_every=4,
    fitness_samples=2,
)
# A rule that holds at every audit: a gate that does not pass has other reasons.
POLICY = {"min_samples": 1, "rules": [{"metric": "accuracy", "at": "every", "min": 0.0, "on": "point"}]}
# Audits every few steps, with checkpoints in the middle of an epoch; or after each validation, with the best kept.
Schedule = Literal["steps", "validation"]


class Net(pl.LightningModule):
    """Small, and trained the same whether or not it is resumed: all that it draws from a generator are its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, stride=2)
        )
        self.head = nn.Linear(6, 2)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch."""
        logits: Tensor = self.head(self.body(images).relu().mean(dim=(2, 3)))
        return logits

    def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
        """The loss of a batch."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], _index: int) -> None:
        """Log what the checkpoints are chosen by."""
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One with a state of its own, which a checkpoint has to bring back."""
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@cache
def data() -> tuple[AuditDataset, Tensor, Tensor]:
    """What is audited, and the images and labels that are trained on."""
    scenes = draw_scenes(counts_with_bias(8, 0.75, 0.75), 1, SIZE)
    images = torch.stack([torch.from_numpy(scene.image.copy()).float() / 255 for scene in scenes])
    return balanced_scenes(3, 7, SIZE), images, torch.tensor([OCCUPATIONS.index(s.occupation) for s in scenes])


class _NotOfTheEnd(ModelCheckpoint):
    """Of a checkpoint of the last step Lightning has nothing left to train, and calls no hook that audits."""

    def _should_skip_saving_checkpoint(self, trainer: pl.Trainer) -> bool:
        return bool(super()._should_skip_saving_checkpoint(trainer)) or trainer.global_step >= trainer.max_steps


def train(folder: Path, schedule: Schedule, keep: int | None, steps: int) -> None:
    """Train in `folder`, from its last checkpoint where there is one."""
    pl.seed_everything(0, verbose=False)
    audit_set, images, labels = data()
    by_steps = schedule == "steps"
    # Every batch is the same one: Lightning begins an epoch anew in whose middle it was saved.
    count = steps if by_steps else 4
    batches = TensorDataset(images.repeat(count, 1, 1, 1), labels.repeat(count))
    saver = (
        ModelCheckpoint(folder / CHECKPOINTS, every_n_train_steps=3, save_top_k=-1, filename="{step}")
        if by_steps
        else _NotOfTheEnd(folder / CHECKPOINTS, monitor="val_loss", save_top_k=2, save_last=True)
    )
    audit = BiasAuditCallback(
        audit_set,
        POLICY,
        every_n_steps=2 if by_steps else None,
        plan=PLAN,
        dirpath=folder / RUN,
        keep=keep,
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[audit, saver],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    saved = sorted((folder / CHECKPOINTS).glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns)
    trainer.fit(
        Net(),
        DataLoader(batches, batch_size=len(images)),
        None if by_steps else DataLoader(TensorDataset(images, labels), batch_size=len(images)),
        ckpt_path=saved[-1] if saved else None,
    )


@dataclass(frozen=True)
class Training:
    """One training, which may take several lives."""

    folder: Path
    schedule: Schedule
    keep: int | None
    steps: int

    def live(self, at: int | None = None, *, dies: bool = False) -> Life:
        """Begin a life, which says so at the so-many-th file that it opens, renames or removes, or ends there."""
        context = multiprocessing.get_context("fork")
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=_life, args=(self, at, dies, writer), daemon=True)
        process.start()
        return Life(process, reader)


class Life:
    """A process that trains, in a session of its own with what it starts."""

    def __init__(self, process: Any, reader: Connection) -> None:
        self._process, self._reader = process, reader
        self._session = int(process.pid)

    def there(self, seconds: float) -> bool:
        """Whether it ends, or is where it was to say so, within so many seconds."""
        return bool(wait((self._process.sentinel, self._reader), seconds))

    def kill(self, all_of_it: bool = True) -> int:
        """End it, with the process that draws its page or without; returns its exit code."""
        if all_of_it:
            self.kill_rest()
        self._process.kill()
        self._process.join()
        self._reader.close()
        return int(self._process.exitcode)

    def kill_rest(self) -> None:
        """End what it has started, such as the process that draws its page."""
        for process in _of_session(self._session):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def _life(training: Training, at: int | None, dies: bool, writer: Connection) -> None:
    os.setsid()
    # What is forked must not wait for threads that were not.
    torch.set_num_threads(1)
    with (training.folder / "said").open("ab") as said:
        for stream in (1, 2):
            os.dup2(said.fileno(), stream)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    if at is not None:
        at_file(training.folder / RUN, at, die if dies else lambda: writer.send(None))
    train(training.folder, training.schedule, training.keep, training.steps)


def at_file(folder: Path, number: int, do: Callable[[], None]) -> None:
    """Have something done before this process opens, renames or removes its so-many-th file in `folder`."""
    left = [number]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.remove", "os.truncate", "os.mkdir") and str(args[0]).startswith(inside):
            left[0] -= 1
            if left[0] == 0:
                do()

    inside = str(folder)
    sys.addaudithook(hook)


def die() -> None:
    """End this process as no handler can prevent."""
    os.kill(os.getpid(), signal.SIGKILL)


def _of_session(session: int) -> list[int]:
    """The processes of a session; none where the system does not tell."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # After the name, which may hold anything: state, parent, group, session.
            if int((folder / "stat").read_text().rpartition(")")[2].split()[3]) == session:
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@dataclass(frozen=True)
class Audited:
    """One audit less its times; `scores` is a digest of them, "" where they were dropped."""

    summary: AuditSummary
    scores: str

    @property
    def name(self) -> tuple[int, str]:
        """What tells it from the others of its training."""
        return self.summary.step, self.summary.trigger


def audits_of(run: Run) -> list[Audited]:
    """The audits of a run, their scores read and checked where they are kept."""
    return [
        Audited(replace(audit, created="", seconds=0.0), _digest(run.scores(index)) if run.has_scores(index) else "")
        for index, audit in enumerate(run.audits)
    ]


def _digest(scores: SampleScores) -> str:
    return hashlib.sha256(b"".join(np.asarray(array).tobytes() for array in vars(scores).values())).hexdigest()


def until_over(life: Life, folder: Path) -> None:
    """Wait until a life has ended or says that it is there, or its records say that only its page is left to draw.

    Raises:
        AssertionError: nothing of it happens.
    """
    reader, until = RunReader(folder), time.monotonic() + PATIENCE_S
    while not life.there(0.1):
        assert time.monotonic() < until, f"a training did not end: {said(folder)}"
        # Read while it is written; it may not have begun to write.
        with suppress(MissingEvidenceError):
            if reader.read().ended:
                return


def said(folder: Path) -> str:
    """The last lines that the lives of a training printed."""
    return (folder / "said").read_text()[-2000:]


def unbroken(training: Training) -> list[Audited]:
    """The audits of a training that nobody kills; its page is not waited for."""
    life = training.live()
    until_over(life, training.folder)
    life.kill()
    run = read_run(training.folder)
    assert run.ended, f"a training that nobody killed broke off: {said(training.folder)}"
    return audits_of(run)


def examine(training: Training, whole: list[Audited], *, page: bool) -> Run | None:
    """What a kill has left, None if no run directory.

    Args:
        whole: the audits of the same training unbroken, all with their scores.
        page: whether to draw the page too.

    Raises:
        AssertionError: an audit is missing between others, is there twice, or is another; or the gate passes on a
            training that has not ended.
        RecordError: the records cannot be read.
    """
    gate = judge_source(str(training.folder), POLICY)
    # What has a manifest can be read.
    run = read_run(training.folder / RUN) if (training.folder / RUN / MANIFEST).exists() else None
    if run is None:
        assert gate.exit_code == 3, f"the gate exits with {gate.exit_code} where there are no records"
        return None
    found = audits_of(run)
    expected = whole[: len(found)]
    assert [a.name for a in found] == [a.name for a in expected], f"audits {[a.name for a in found]} in {run.path}"
    for is_, should in zip(found, expected, strict=True):
        same = is_.summary == should.summary and is_.scores in (should.scores, "")
        assert same, f"the audit {is_.name} in {run.path} is not the one of an unbroken training"
        assert training.keep is not None or is_.scores, f"the audit {is_.name} in {run.path} has no scores"
    allowed = (0,) if run.ended and not run.torn else (3,)
    assert gate.exit_code in allowed, f"the gate exits with {gate.exit_code} at a kill: {gate.doubts}"
    if page:
        write_report(run)
    return run


def finished(training: Training, whole: list[Audited]) -> None:
    """Check what a training has left that was killed and is now over.

    Raises:
        AssertionError: it has not the audits of an unbroken one, or has left files behind.
    """
    run = examine(training, whole, page=False)
    assert run is not None and run.ended, f"{training.folder}: training is not over"
    assert len(run.audits) == len(whole), f"{run.path}: {len(run.audits)} audits, unbroken {len(whole)}"
    held = [index for index in range(len(run.audits)) if run.has_scores(index)]
    assert len(run.audits) - 1 in held and 0 in held, f"{run.path}: only the audits {held} have their scores"
    if training.keep is not None:
        files = len(list((run.path / "audits").glob("*.npz")))
        assert files == len(held), f"{run.path}: {files} array files, and {len(held)} audits have theirs"
    # The process that draws the page was killed as soon as the records were whole.
    left = [str(f) for f in run.path.rglob("*.tmp") if PREVIOUS not in f.parts and not f.name.startswith(f".{REPORT}.")]
    assert not left, f"left behind: {left}"
    for folder in (run.path / PREVIOUS).glob("*"):
        read_run(folder)


@dataclass(frozen=True)
class Tally:
    """What was killed, and what that met."""

    trainings: int
    kills: int
    aimed: int
    without_records: int
    torn: int
    begun_anew: int
    gone_on: int
    audits: int


def kill_trainings(
    folder: Path,
    kills: int,
    seed: int,
    *,
    steps: int = 10,
    pages: int = 10,
    progress: Callable[[str], None] = lambda text: None,
) -> Tally:
    """Kill trainings in `folder` so many times, and let each of them end.

    Args:
        steps: of each training; no checkpoint may be of the last, from which Lightning has nothing left to train.
        pages: the page is drawn after every so-many-th kill.

    Raises:
        AssertionError: see `examine` and `finished`.
    """
    # Once, and not in each life: what is forked has it.
    data()
    rng = random.Random(seed)
    whole: dict[Schedule, list[Audited]] = {}
    count: Counter[str] = Counter()
    while count["kills"] < kills:
        number = count["trainings"]
        schedule: Schedule = ("steps", "validation")[number % 2]
        if schedule not in whole:
            (folder / schedule).mkdir()
            whole[schedule] = unbroken(Training(folder / schedule, schedule, None, steps))
        training = Training(folder / str(number), schedule, (None, 2)[number // 2 % 2], steps)
        training.folder.mkdir()
        count["trainings"] += 1
        _kill_one(training, whole[schedule], kills, pages, rng, count)
        finished(training, whole[schedule])
        count["audits"] += len(whole[schedule])
        progress(f"{count['kills']} of {kills} kills, {count['trainings']} trainings")
        shutil.rmtree(training.folder)
    return Tally(**{f.name: count[f.name] for f in fields(Tally)})


def _kill_one(
    training: Training, whole: list[Audited], kills: int, pages: int, rng: random.Random, count: Counter[str]
) -> None:
    """Kill one training until it is over, or there were enough kills and it ends by itself."""
    run: Run | None = None
    lives: list[Life] = []
    while run is None or not run.ended:
        assert len(lives) <= kills, f"{training.folder}: a training does not end: {said(training.folder)}"
        saved = any((training.folder / CHECKPOINTS).glob("*.ckpt"))
        before = run
        enough = count["kills"] >= kills
        aimed = rng.random() < 0.5
        life = training.live() if enough else training.live(rng.randrange(1, MOST_FILES), dies=aimed)
        lives.append(life)
        until_over(life, training.folder)
        if not enough and not aimed:
            time.sleep(rng.uniform(0, LONGEST_S))
        code = life.kill(all_of_it=rng.random() < 0.75)
        assert code in (0, -signal.SIGKILL), f"a training ended with {code}: {said(training.folder)}"
        if code and not enough:
            count["kills"] += 1
            count["aimed"] += aimed
        run = examine(training, whole, page=count["kills"] % pages == 0)
        count["without_records"] += run is None
        count["torn"] += run is not None and run.torn
        if saved and before is not None:
            assert run is not None, f"{training.folder}: the records are gone"
            same = run.manifest.run_id == before.manifest.run_id
            assert same, f"{run.path}: a resumed training goes on as {run.manifest.run_id}"
            count["gone_on"] += 1
        elif before is not None:
            count["begun_anew"] += 1
    for life in lives:
        # Of those not killed with all they had started, something may still draw a page.
        life.kill_rest()


def soak(progress: Callable[[str], None]) -> tuple[Figure, ...]:
    """200 kills."""
    with tempfile.TemporaryDirectory() as folder:
        tally = kill_trainings(Path(folder), 200, 0, progress=progress)
    return (
        Figure("kills", tally.kills),
        Figure("of them aimed at a file that is opened, renamed or removed", tally.aimed),
        Figure("trainings", tally.trainings),
        Figure("lives that went on with the records, under the same run id", tally.gone_on),
        Figure("lives that began anew, as no checkpoint had been saved", tally.begun_anew),
        Figure("kills before the run directory was made", tally.without_records),
        Figure("kills that left a line half written", tally.torn),
        Figure("audits recorded at the end, each the one of an unbroken training", tally.audits),
        Figure("audits half there, there twice, or missing", 0, limit=0),
    )
