"""Audits by several processes record what one process records, and no rank waits for one that is gone.

Enters: how many ranks, what they train and what goes wrong on one of them. Leaves: what each rank says in the end, run
directories, and the same runs made again by one process from the weights that were audited.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.soak.batches import moved_by_batch_size, scored_in_parts
from benchmarks.soak.figures import Figure
from benchmarks.soak.rank_trainings import POLICY, Audited, Net, Trained, Training, ridden, train
from benchmarks.soak.team import Team
from bias_audit.audit import Auditor
from bias_audit.records.results import AuditResult
from bias_audit.records.runs import read_run
from bias_audit.records.samples import SampleScores
from bias_audit.records.writing import RunDirectory

# Written into the records, and another each time.
_TIMES = {"created", "seconds", "run_id", "sha256", "previous"}
# Of the long form: how many images in batches of how many, and after how many steps, None for each validation. Fewer
# batches than ranks, as many, and numbers that no number of ranks divides.
_AUDITS = ((1, 7, 1), (2, 1, None), (23, 1, 1), (23, 7, None), (60, 7, 1), (60, 16, None))


def audited_again(training: Training, audits: Sequence[Audited], out: Path) -> Path:
    """The run that one process makes of the same weights."""
    net, auditor = Net(), Auditor(training.audit_set(), training.plan(), POLICY)
    auditor.prepare(net)
    directory = RunDirectory.create(out, auditor.manifest(net), auditor.sheet)
    reference: SampleScores | None = None
    previous: AuditResult | None = None
    for number, audit in enumerate(audits):
        net.load_state_dict(audit.state)
        previous = auditor.run(
            net,
            step=audit.step,
            epoch=audit.epoch,
            trigger=audit.trigger,
            reference=reference,
            # What training ends with is measured anew.
            previous=None if number == len(audits) - 1 else previous,
        )
        reference = reference or previous.scores
        directory.append(previous)
    directory.end()
    return out


def recorded(run: Path) -> dict[str, Any]:
    """What a run directory's files hold, but for times and the checksums that follow from them; without its page."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in run.rglob("*") if p.is_file() and p.suffix != ".html"):
        content = path.read_bytes()
        if path.suffix in (".json", ".jsonl"):
            lines = content.splitlines() if path.suffix == ".jsonl" else [content]
            found[path.name] = [_timeless(json.loads(line)) for line in lines]
        else:
            found[path.name] = hashlib.sha256(content).hexdigest()
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(inner) for key, inner in value.items() if key not in _TIMES}
    return [_timeless(inner) for inner in value] if isinstance(value, list) else value


def soak(progress: Callable[[str], None]) -> tuple[Figure, ...]:
    """The long form: more ranks, more batches, more faults, and the times until all ranks have ended."""
    # Of Lightning, on devices and what else one might buy.
    logging.disable(logging.WARNING)
    with TemporaryDirectory() as folder:
        root = Path(folder)
        return (*_same_runs(root, progress), *_ends(root, progress), *_in_other_batches(root, progress))


def _same_runs(root: Path, progress: Callable[[str], None]) -> Iterator[Figure]:
    for world in (1, 2, 3, 4):
        team = Team(world, root / f"meeting-{world}")
        same = 0
        try:
            sharding = (False, True) if world > 1 else (False,)
            for number, ((audited, batch_size, steps), sharded) in enumerate(product(_AUDITS, sharding)):
                training = Training(root / f"{world}-{number}", audited, batch_size, steps, sharded=sharded)
                every = team.do(train, training)
                case = f"{world} ranks, {training}"
                assert all(isinstance(said, Trained) and not said.error for said in every), f"{case}: {every}"
                alone = audited_again(training, every[0].audits, training.out / "alone")
                assert recorded(training.out / "run") == recorded(alone), f"{case}: other records than one process'"
                # As texts: what could not be measured is NaN, which is not equal to itself.
                assert len({repr(said.monitored) for said in every}) == 1, f"{case}: monitors differ"
                without = [said.ended for said in team.do(train, replace(training, audit=False))]
                assert without == [said.ended for said in every], f"{case}: training has changed"
                same += 1
                progress(f"{case}: the same")
        finally:
            team.close()
        yield Figure(f"trainings on {world} rank{'s' * (world > 1)} whose records are those of one process", same)


def _ends(root: Path, progress: Callable[[str], None]) -> Iterator[Figure]:
    for fault, timeout_s, sharded in (("killed", 60.0, False), ("killed", 60.0, True), ("stopped", 10.0, False)):
        longest = 0.0
        for world in (2, 3, 4):
            out = root / f"{fault}-{world}-{sharded}"
            team = Team(world, root / f"meeting-{out.name}", timeout_s, stays=False)
            try:
                team.tell(train, Training(out, fault=fault, sharded=sharded))
                others = [team.answer(rank) for rank in range(world) if rank != 1]
                gone = time.time() - (out / "gone").stat().st_mtime
            finally:
                team.close()
            assert all(said is None or said.error for said in others), f"{fault}, {world} ranks: one goes on alone"
            audits = [audit.trigger for audit in read_run(out / "run").audits]
            assert audits == ["reference"], f"{fault}, {world} ranks: audits {audits}"
            longest = max(longest, gone)
            progress(f"{fault}, {world} ranks: {gone:.1f} s")
        about = f"until all ranks have ended, one {fault}{', sharded' if sharded else ''}, timeout {timeout_s:.0f} s"
        # Who is killed is noticed at once; who hangs when the process group has waited once.
        yield Figure(about, longest, "s", 30)


def _in_other_batches(root: Path, progress: Callable[[str], None]) -> Iterator[Figure]:
    sizes = (1, 7, 16, 64)
    different = scored_in_parts(64, sizes[:-1])
    assert not any(different.values()), f"scores of the same activations depend on the batch: {different}"
    yield Figure("scores of the same activations in batches of 1, 7 and 16 that differ from those of 64", 0, "", 0)
    moved = []
    for seed in range(10):
        moved += moved_by_batch_size(64, sizes, (seed,))
        progress(f"seed {seed}: {moved[-1]}")
    assert not any(m.decided for m in moved), f"batch sizes change decisions: {[m.decided for m in moved]}"
    most = max(moved, key=lambda m: m.most)
    yield Figure("verdicts, checks, counts and decisions that batches of 1, 7, 16 and 64 change, 10 models", 0, "", 0)
    yield Figure("the most that they move a margin", max(m.logit for m in moved), "logits", 1e-5)
    yield Figure(f"the most that they move an estimate or its interval ({most.metric})", most.most, "", 1e-2)
    runs = [recorded(ridden(root / f"workers-{n}", workers)) for n, workers in enumerate((0, 0, 1, 4))]
    assert all(run == runs[0] for run in runs), "the number of workers, or a second time, changes the records"
    yield Figure("records that a second time, or 1 or 4 workers, change", 0, "", 0)
