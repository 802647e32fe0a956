"""Processes that meet in one process group and do what they are told.

Enters: a function and its arguments. Leaves: what it gave on each rank.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed

# The longest wait for what a rank says: only one that hangs takes it.
PATIENCE_S = 240


class Team:
    """Processes that meet in one process group and then do what they are told, all of them the same.

    Args:
        world: how many.
        meeting: a file that is not there yet.
        timeout_s: the process group's: how long a rank waits for another in one exchange.
        stays: whether the processes do more than one thing. One that ends lets go of the others.
    """

    def __init__(self, world: int, meeting: Path, timeout_s: float = PATIENCE_S, stays: bool = True) -> None:
        context = multiprocessing.get_context("forkserver")
        # What a process has imported before it is forked it need not import again.
        context.set_forkserver_preload(["benchmarks.soak.rank_trainings"])
        self.world, self.processes, self._ends = world, [], []
        for rank in range(world):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, meeting, timeout_s, stays, there), daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self._ends.append(here)

    def do(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """What `work(rank, world, *args)` gives on each rank, or an exception; None where its process is gone.

        Raises:
            AssertionError: a rank said nothing.
        """
        self.tell(work, *args)
        return [self.answer(rank) for rank in range(self.world)]

    def tell(self, work: Callable[..., Any], *args: Any) -> None:
        """Let each rank begin."""
        for end in self._ends:
            end.send((work, args))

    def answer(self, rank: int) -> Any:
        """What a rank gave, as `do` says."""
        assert self._ends[rank].poll(PATIENCE_S), f"rank {rank} of {self.world} hangs"
        try:
            return pickle.loads(self._ends[rank].recv_bytes())
        except EOFError:
            return None

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()


def _serve(rank: int, world: int, meeting: Path, timeout_s: float, stays: bool, end: Connection) -> None:
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    # Lightning tells of devices and gives advice.
    logging.disable(logging.WARNING)
    if world > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s)
        )
    while True:
        work, args = end.recv()
        try:
            given = work(rank, world, *args)
        except Exception as error:
            given = error
        end.send_bytes(pickle.dumps(given))
        if not stays:
            # Without the goodbye that waits for a rank which is gone.
            os._exit(1)
