"""What each of three processes does in the tests of `bias_audit.ranks`."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed

from bias_audit.ranks import RankError, Ranks


def by_ranks(case: str, rank: int, meeting: str, found: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=3)
    ranks = Ranks.every()
    try:
        with ranks.together():
            said = CASES[case](ranks)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    found.put((rank, said))
    found.close()
    found.join_thread()
    # Without the goodbye that waits for a rank which is gone.
    os._exit(0)


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


def _gone(ranks: Ranks) -> Any:
    # Once, so that all have met.
    ranks.shared(3, lambda piece: piece)
    if ranks.rank == 1:
        os._exit(9)
    return ranks.shared(3, lambda piece: piece)


CASES = {"pieces": _pieces, "fails": _fails, "fails late": _fails_late, "all fail": _all_fail, "gone": _gone}
