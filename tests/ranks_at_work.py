"""What each of several processes does in the tests of `bias_audit.ranks`."""

from __future__ import annotations

import os
from typing import Any

import torch

from bias_audit.ranks import RankError, Ranks


def by_ranks(_rank: int, _world: int, case: str) -> Any:
    ranks = Ranks.every()
    try:
        with ranks.together():
            return CASES[case](ranks)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def ends(rank: int, how: str) -> None:
    """As a rank that Lightning spawned may end."""
    if how == "gone":
        os._exit(9)
    try:
        raise KeyError("first")
    except KeyError as error:
        raise {"rank": RankError, "kind": RuntimeError}[how]("broken:\n  in two\nlines") from error


def _pieces(ranks: Ranks) -> Any:
    shared, calls, progress = [], [], []
    for count in (0, 1, 2, 3, 7):
        called: list[int] = []

        def work(piece: int, called: list[int] = called) -> dict[str, Any]:
            called.append(piece)
            return {"square": torch.tensor(piece * piece), "piece": piece}

        steps: list[tuple[int, int]] = []
        parts = ranks.shared(count, work, lambda done, of, steps=steps: steps.append((done, of)))
        assert [part["piece"] for part in parts] == list(range(count))
        shared.append([int(part["square"]) for part in parts])
        calls.append(len(called))
        progress = steps
    return shared, calls, progress


def _fails(ranks: Ranks) -> Any:
    def work(piece: int) -> int:
        if piece == 1:
            raise ValueError("broken")
        return piece

    return ranks.shared(3, work)


def _fails_late(ranks: Ranks) -> Any:
    shared = ranks.shared(3, lambda piece: piece)
    if ranks.rank == 1:
        raise ValueError("broken")
    return shared


def _all_fail(ranks: Ranks) -> Any:
    raise KeyError(f"on {ranks.rank}")


def _as_on_first(ranks: Ranks) -> Any:
    given = [torch.full((2, 2), ranks.rank, dtype=torch.bfloat16).t(), torch.tensor(ranks.rank), torch.empty(0)]
    before = [tensor._version for tensor in given]
    ranks.as_on_first(given, torch.device("cpu"))
    # Who keeps a copy to put back tells by this that he has to.
    assert all(tensor._version > version for tensor, version in zip(given, before, strict=True))
    return [tensor.tolist() for tensor in given]


def _as_no_other(ranks: Ranks) -> Any:
    ranks.as_on_first([torch.zeros(1 + ranks.rank // 2)], torch.device("cpu"))


CASES = {
    "pieces": _pieces,
    "fails": _fails,
    "fails late": _fails_late,
    "all fail": _all_fail,
    "as on first": _as_on_first,
    "as no other": _as_no_other,
}
