"""One audit by several processes: each does a part of the work, and all of them end up with the whole.

Enters: pieces of work that are the same on every rank, and torch.distributed's default group. Leaves: the results of
all pieces on every rank, in their order; or an exception on every rank, whichever of them it arose on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed
from torch import Tensor
from torch.utils._pytree import tree_map

from bias_audit.progress import Progress, silent

T = TypeVar("T")
# Where in its own source a backend noticed, which it puts before what it says.
_SOURCE = re.compile(r"\[[^\[\]]*\.\w+:\d+\]\s*")


class RankError(ValueError):
    """What went wrong on another rank, and so on all of them."""


class RankGoneError(RankError):
    """Another rank is gone, or was not heard of for as long as the process group waits."""


@dataclass(frozen=True)
class Ranks:
    """Which of `world` processes this is, from 0; one alone by default.

    Example:
        >>> Ranks().shared(3, lambda piece: piece * piece)
        [0, 1, 4]
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def every(cls) -> Ranks:
        """All ranks of torch.distributed's default group; one alone where there is no group."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return cls()
        return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())

    def shared(self, count: int, work: Callable[[int], T], progress: Progress = silent) -> list[T]:
        """`[work(0), ..., work(count - 1)]` on every rank, each piece done by one of them.

        Every rank calls `work` equally often: the forward passes of some models wait for those of the other ranks. A
        rank takes neighbouring pieces, which often need the same things. Tensors come back on the CPU, unless there is
        one rank alone.

        Args:
            count: of the pieces; the same on every rank.
            work: does one piece.
            progress: called with (pieces done, pieces in all) after each, as if all ranks were equally fast.

        Raises:
            RankError: on another rank a piece, or what was done since the last exchange, raised.
        """
        rounds = -(-count // self.world)
        done: list[T] = []
        for turn in range(rounds):
            piece = self.rank * rounds + turn
            # A rank with nothing left goes along, and what it does is dropped.
            result = work(min(piece, count - 1))
            if piece < count:
                done.append(result)
            progress(min((turn + 1) * self.world, count), count)
        if self.world == 1:
            return done
        return [result for part in self._exchange(tree_map(_on_cpu, done)) for result in part]

    def as_on_first(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        """Give these tensors, in place, the content that they have on the first rank; `device` is the ranks' own.

        Raises:
            ValueError: the ranks' tensors differ in number, shape or type.
            RankError: as `shared`.
        """
        if self.world == 1:
            return
        kinds = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        # After this exchange no rank fails before the others are done, too.
        if any(of_other != kinds for of_other in self._exchange(kinds)):
            raise ValueError("expected the same buffers in the model on every rank, got other shapes or types")
        for tensor in tensors:
            content = tensor.detach().to(device, copy=True)
            try:
                torch.distributed.broadcast(content, 0)
            except Exception as error:
                raise _gone(error) from error
            tensor.copy_(content)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What raises on one rank inside raises on all: none waits for a rank that will not come. So does `sys.exit`.

        Inside, the ranks call `shared` in the same order. Contexts of this kind do not nest.

        Raises:
            RankError: another rank raised; the message is that rank's.
            RankGoneError: another rank is gone: then there is nothing more to agree on.
        """
        try:
            yield
        except RankError:
            raise
        except (Exception, SystemExit) as error:
            if self.world > 1:
                known = isinstance(error, ValueError | OSError)
                self._exchange(None, f"{'' if known else f'{type(error).__name__}: '}{error}", own=True)
            raise
        else:
            if self.world > 1:
                self._exchange(None)

    def _exchange(self, content: Any, failure: str | None = None, own: bool = False) -> list[Any]:
        """What each rank gives, from all ranks; with what it failed with, if it did, and then it is no use."""
        found: list[tuple[str | None, Any]] = [(None, None)] * self.world
        try:
            torch.distributed.all_gather_object(found, (failure, content))
        except Exception as error:
            raise _gone(error, failure or "") from error
        for rank, (said, _) in enumerate(found):
            if said is not None and not own:
                raise RankError(f"{said} (on rank {rank} of {self.world})")
        return [given for _, given in found]


ALONE = Ranks()


def _gone(error: Exception, failure: str = "") -> RankGoneError:
    """What an exchange that failed says, and before it what this rank itself had failed with."""
    own = " ".join(_SOURCE.sub("", failure).split())
    # Advice on how to debug the backend follows.
    why = re.split(r"\.\s|\n", _SOURCE.sub("", str(error)), maxsplit=1)[0]
    return RankGoneError(f"{own}{'; and ' if own else ''}another rank is gone: {why}")


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value
