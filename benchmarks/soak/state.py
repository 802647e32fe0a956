"""Everything in which two trainings can end differently, by name.

Enters: a model, or nested state. Leaves: tensors, numbers and texts that can be compared to the bit.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path


@dataclass(frozen=True)
class End:
    """What a training has left, by name: tensors, numbers, texts."""

    leaves: Mapping[str, Any]

    def differences(self, other: End) -> tuple[str, ...]:
        """Names of what is not the same in both, to the bit."""
        names = sorted({*self.leaves, *other.leaves})
        return tuple(n for n in names if not _same(self.leaves.get(n, _NOTHING), other.leaves.get(n, _NOTHING)))


_NOTHING = object()


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        # By their bytes: NaN is the same as NaN, and 0 is not the same as -0.
        return one.dtype == other.dtype and one.shape == other.shape and _bytes(one) == _bytes(other)
    return type(one) is type(other) and (one == other or (one != one and other != other))


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


def flat(name: str, tree: Any) -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts, lists and tuples with their names; what a leaf is not told apart by, by its text."""
    for path, leaf in tree_flatten_with_path(tree)[0]:
        kept = leaf.detach().clone() if isinstance(leaf, Tensor) else leaf
        plain = isinstance(kept, Tensor | int | float | str | bool | bytes | None)
        yield name + keystr(path), kept if plain else type(kept).__name__


def generators() -> dict[str, Any]:
    """The states of all global generators."""
    _, keys, *rest = np.random.get_state()  # noqa: NPY002 - the global generator is what is looked at
    states: dict[str, Any] = {
        "python": repr(random.getstate()),
        "numpy": (np.asarray(keys).tobytes(), *rest),
        "torch": torch.get_rng_state(),
    }
    cuda: Any = torch.cuda
    if cuda.is_initialized():
        states["cuda"] = cuda.get_rng_state_all()
    return states


def process() -> dict[str, Any]:
    """What is set for the whole process or thread, and decides what the next operation computes."""
    nesting = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    inner: Any = torch
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "autocast": [(torch.is_autocast_enabled(d), str(torch.get_autocast_dtype(d))) for d in ("cpu", "cuda")],
        "autocast cache": torch.is_autocast_cache_enabled(),
        "autocast nesting": nesting,
        "deterministic": (torch.get_deterministic_debug_mode(), inner.utils.deterministic.fill_uninitialized_memory),
        "cudnn": [getattr(torch.backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic")],
        "mkldnn": inner._C._get_mkldnn_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "compiler": str(inner._dynamo.eval_frame._stance),
        "function modes": len(inner.overrides._get_current_function_mode_stack()),
        "dispatch modes": inner._C._len_torch_dispatch_stack(),
        "saved tensors": inner._C._autograd._top_saved_tensors_default_hooks(True) is not None,
    }


def model_state(model: nn.Module) -> dict[str, Any]:
    """Every submodule's mode and hooks, every parameter and buffer with what autograd knows of it."""
    modules = [
        (
            name,
            module.training,
            {k: [(i, id(f)) for i, f in v.items()] for k, v in vars(module).items() if holds_hooks(k, v)},
        )
        for name, module in model.named_modules()
    ]
    tensors = {
        name: (tensor, str(tensor.dtype), tensor.requires_grad, tensor.grad, id(tensor), tensor.data_ptr())
        for named in (model.named_parameters(), model.named_buffers())
        for name, tensor in named
    }
    return {"modules": modules, "tensors": tensors}


def holds_hooks(name: str, value: Any) -> bool:
    """Whether a module's attribute is one of its tables of hooks."""
    return isinstance(value, dict) and "hook" in name
