"""Leave the caller's random numbers, and torch's settings, as they were.

Enters: nothing. Leaves: a context in which Python's, NumPy's and torch's global generators may be drawn from, and after
which each of them is back where it was; and one for what torch is set to.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

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


@contextmanager
def preserved_settings() -> Iterator[None]:
    """Give back what torch is set to, on leaving, after an exception too.

    A forward pass that is broken off by an exception may leave behind what it would have set back at its end: an
    autocast that one hook enters and another leaves, a default dtype. Kept are autocast (whether, to what, how deep,
    its cache), the default dtype, deterministic algorithms, and cuDNN's `enabled`, `benchmark` and `deterministic`.

    Example:
        >>> with preserved_settings():
        ...     torch.set_default_dtype(torch.float64)
        >>> torch.get_default_dtype()
        torch.float32
    """
    before, nested = _settings(), _nesting()
    try:
        yield
    finally:
        left_open = _nesting() - nested
        for _ in range(left_open):
            torch.autocast_decrement_nesting()
        if left_open > 0 and nested == 0:
            # What nobody will leave any more would keep its copies of the weights for ever.
            torch.clear_autocast_cache()
        for (put, kept), (_, now) in zip(before, _settings(), strict=True):
            if kept != now:
                put(kept)


def _settings() -> list[tuple[Callable[[Any], object], Any]]:
    """How to set each setting, and what it is."""
    found: list[tuple[Callable[[Any], object], Any]] = [
        (torch.set_default_dtype, torch.get_default_dtype()),
        (torch.set_deterministic_debug_mode, torch.get_deterministic_debug_mode()),
        (torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled()),
    ]
    for device in ("cpu", "cuda"):
        found.append((partial(torch.set_autocast_enabled, device), torch.is_autocast_enabled(device)))
        found.append((partial(torch.set_autocast_dtype, device), torch.get_autocast_dtype(device)))
    cudnn = torch.backends.cudnn
    return found + [(partial(setattr, cudnn, n), getattr(cudnn, n)) for n in ("enabled", "benchmark", "deterministic")]


def _nesting() -> int:
    """How many autocasts are open, one in another."""
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()
