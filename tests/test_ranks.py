"""Several ranks, and the same audit made in other ways: one result, and nobody waits for what will not come."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
from ranks_at_work import by_ranks, ends
from torch.multiprocessing import start_processes
from torch.multiprocessing.spawn import ProcessException

from benchmarks.soak.batches import moved_by_batch_size, scored_in_parts
from benchmarks.soak.rank_trainings import Trained, Training, ridden, train
from benchmarks.soak.ranks import audited_again, recorded
from benchmarks.soak.team import PATIENCE_S, Team
from bias_audit.callbacks.running import raised_by_rank
from bias_audit.gate.gate import Outcome, run_gate
from bias_audit.records.runs import read_run

Teams = Callable[[int], Team]


@pytest.fixture(scope="module")
def teams(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Teams]:
    """Processes that stay for all tests, as many as are asked for."""
    there: dict[int, Team] = {}

    def of(world: int) -> Team:
        if world not in there:
            there[world] = Team(world, tmp_path_factory.mktemp("team") / "meeting")
        return there[world]

    yield of
    for team in there.values():
        team.close()


@pytest.fixture(scope="module")
def unaudited(teams: Teams, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, bool], list[str]]:
    """What each of so many ranks ends with that are not audited, with sharded parameters or not."""

    @cache
    def ended(world: int, sharded: bool) -> list[str]:
        training = Training(tmp_path_factory.mktemp("unaudited"), audit=False, sharded=sharded)
        return [said.ended for said in teams(world).do(train, training)]

    return ended


@pytest.mark.parametrize("case", ["pieces", "fails", "fails late", "all fail", "as on first", "as no other"])
def test_ranks_share_work_and_errors(teams: Teams, case: str) -> None:
    said = teams(3).do(by_ranks, case)
    if case == "pieces":
        for shared, calls, progress in said:
            # Fewer pieces than ranks, as many, and some left over: in order, and each rank works equally often.
            assert shared == [[i * i for i in range(count)] for count in (0, 1, 2, 3, 7)]
            assert calls == [0, 1, 1, 1, 3] and progress == [(3, 7), (6, 7), (7, 7)]
    elif case == "all fail":
        assert said == [f"KeyError: 'on {rank}'" for rank in range(3)]
    elif case == "as on first":
        assert said == [[[[0, 0], [0, 0]], 0, []]] * 3
    elif case == "as no other":
        assert (
            said == ["ValueError: expected the same buffers in the model on every rank, got other shapes or types"] * 3
        )
    else:
        other = "RankError: broken (on rank 1 of 3)"
        assert said == [other, "ValueError: broken", other]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("rank", "broken:\n  in two\nlines"),
        ("kind", "RuntimeError: broken:\n  in two\nlines"),
        ("gone", "a rank is gone: process 0 terminated with exit code 9"),
    ],
)
def test_what_a_spawned_rank_said_last(teams: Teams, how: str, said: str) -> None:
    # By now there is a process to fork from.
    teams(3)
    with pytest.raises(ProcessException) as caught:
        start_processes(ends, args=(how,), nprocs=1, start_method="forkserver")
    assert str(raised_by_rank(caught.value)) == said


@pytest.mark.parametrize(
    ("world", "options", "outcome"),
    [
        (2, {"bar": True}, Outcome.VIOLATED),
        # Between two steps each rank has BatchNorm statistics of its own; three ranks cannot share five batches alike.
        (3, {"every_n_steps": 2, "batch_size": 2}, Outcome.VIOLATED),
        # Fewer images than ranks.
        (3, {"audited": 2, "batch_size": 1}, Outcome.INCONCLUSIVE),
        # Each rank holds a part of the parameters.
        (2, {"every_n_steps": 2, "sharded": True}, Outcome.VIOLATED),
    ],
)
def test_ranks_record_what_one_process_records(
    teams: Teams,
    unaudited: Callable[[int, bool], list[str]],
    tmp_path: Path,
    world: int,
    options: dict[str, Any],
    outcome: Outcome,
) -> None:
    training = Training(tmp_path, **options)
    every: list[Trained] = teams(world).do(train, training)
    first = every[0]
    assert [said.error for said in every] == [""] * world
    assert {audit.trigger for audit in first.audits} >= {
        "reference",
        "step" if "every_n_steps" in options else "validation",
    }
    alone = audited_again(training, first.audits, tmp_path / "alone")
    assert recorded(tmp_path / "run") == recorded(alone)
    assert run_gate(read_run(tmp_path / "run")).outcome is run_gate(read_run(alone)).outcome is outcome
    # What monitors and schedulers see is the same, and one rank speaks for all.
    assert first.monitored and all(said.monitored == first.monitored for said in every)
    assert {said.run_dir for said in every} == {tmp_path / "run"}
    assert [len(said.warned) for said in every] == [int(outcome is Outcome.VIOLATED)] + [0] * (world - 1)
    if training.bar:
        assert [said.printed.count("run, step") for said in every] == [2, 0]
        with (tmp_path / "metrics.csv").open() as file:
            assert [row["step"] for row in csv.DictReader(file) if row["run/accuracy"]] == ["0", "3", "6"]
    # Not a bit of the training has changed.
    assert [said.ended for said in every] == unaudited(world, training.sharded)


@dataclass(frozen=True)
class Failure:
    """What goes wrong on one of two ranks, and what it says."""

    fault: str
    on_error: Literal["warn", "raise"]
    culprit: int
    said: str


GONE = "sample '[a-z0-9-]+': does not decode: the disk is gone"
FAILURES = [
    # Before the first audit all images that do not decode are named, later the first that is met.
    Failure("decode first", "warn", 1, rf"Misfit: {GONE}(\n{GONE})+"),
    Failure("decode", "warn", 1, GONE),
    Failure("raise", "raise", 1, "Broken: in the middle"),
    Failure("bar", "warn", 0, "Broken: in the bar"),
    Failure("sink", "raise", 0, "Broken: in the sink"),
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: f"{failure.fault}-{failure.on_error}")
def test_what_fails_on_one_rank_fails_on_all(
    teams: Teams, unaudited: Callable[[int, bool], list[str]], tmp_path: Path, failure: Failure
) -> None:
    training = Training(tmp_path, fault=failure.fault, on_error=failure.on_error, bar=failure.fault == "bar")
    every: list[Trained] = teams(2).do(train, training)
    if failure.fault.endswith("first") or failure.on_error == "raise":
        # All stop, and each says why.
        here, there = every[failure.culprit], every[1 - failure.culprit]
        assert re.fullmatch(failure.said, here.error)
        # What does not decode is told to all.
        told = rf"RankError: {failure.said} \(on rank {failure.culprit} of 2\)"
        assert there.error == here.error if failure.fault == "decode first" else re.fullmatch(told, there.error)
    else:
        # All go on as if there had been no audit, and one says why.
        assert [said.error for said in every] == ["", ""] and every[1].warned == ()
        assert re.search(f"training goes on: .*{failure.said}", every[0].warned[0])
        assert [said.ended for said in every] == unaudited(2, False)
    if not failure.fault.endswith("first"):
        run = read_run(tmp_path / "run")
        assert "validation" not in [audit.trigger for audit in run.audits]
        assert run_gate(run).outcome is not Outcome.HELD


@pytest.mark.parametrize(
    ("world", "fault", "timeout_s", "sharded"),
    [
        # Noticed in a forward pass, which needs the part of the weights that is gone with it.
        (3, "killed", PATIENCE_S, True),
        # It takes as long as the process group waits, which a slow machine must not need for less.
        pytest.param(2, "stopped", 15, False, marks=pytest.mark.slow),
        (2, "killed", PATIENCE_S, False),
    ],
)
def test_a_rank_that_is_gone_ends_the_others(
    tmp_path: Path, world: int, fault: str, timeout_s: float, sharded: bool
) -> None:
    team = Team(world, tmp_path / "meeting", timeout_s, stays=False)
    try:
        team.tell(train, Training(tmp_path, fault=fault, sharded=sharded))
        for rank in {0, world - 1} - {1}:
            said = team.answer(rank).error
            # In one line, and not with the file and line in the backend's source.
            assert re.fullmatch(r"RankGoneError: (\w+: [^/\n]+; and )?another rank is gone: [^/\n]+", said), said
    finally:
        team.close()
    run = read_run(tmp_path / "run")
    assert [audit.trigger for audit in run.audits] == ["reference"]
    assert run_gate(run).outcome is Outcome.INCONCLUSIVE


# One process, in other ways.


def test_what_follows_from_the_gradients_does_not_depend_on_the_batch() -> None:
    assert scored_in_parts(audited=9, sizes=(1, 2, 7)) == {1: (), 2: (), 7: ()}


def test_batch_sizes_move_the_model_s_own_rounding_only() -> None:
    [moved] = moved_by_batch_size(audited=12, sizes=(1, 7, 12), seeds=(0,))
    # As the model's logits do, in single precision: nothing that is counted or decided.
    assert moved.decided == () and 0 < moved.logit < 1e-5 and moved.most < 5e-3


def test_workers_and_a_second_time_change_no_bit_of_the_records(tmp_path: Path) -> None:
    runs = [ridden(tmp_path / f"{n}", workers) for n, workers in enumerate((0, 2))]
    one, other = (recorded(run) for run in runs)
    assert one == other
