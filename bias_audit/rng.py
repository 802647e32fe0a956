"""Leave the caller's random numbers as they were.

Enters: nothing. Leaves: a context in which Python's, NumPy's and torch's global generators may be drawn from, and after
which each of them is back where it was.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def preserved_rng(seed: int | None = None) -> Iterator[None]:
    """Give back every global generator (Python, NumPy, torch on CPU and CUDA) on leaving, after an exception too.

    With `seed`, the CPU generators start from it inside.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> with preserved_rng(seed=1):
        ...     inside = torch.rand(1)
        >>> after = torch.rand(1)
        >>> _ = torch.manual_seed(0)
        >>> bool(after == torch.rand(1)) and bool(after != inside)
        True
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 the global generator is what is preserved
    cpu = torch.get_rng_state()
    # Asking for the state of a CUDA generator would start CUDA where nobody has.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            # `torch.manual_seed` would seed CUDA too, also where it is not initialized and so not given back.
            torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
