"""Checkpoints: what one holds, and when it was saved.

Enters: the path of a checkpoint, which may come from anywhere. Leaves: its content, or the step that it was saved at.

torch is imported only to read one.
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

from bias_audit.records.errors import MissingEvidenceError
from bias_audit.wording import in_short

# FSDP and ModelParallelStrategy save a checkpoint as a directory, with all that is not sharded in this file.
_SHARDED = "meta.pt"


def checkpoint_step(path: str | Path, trust: bool = False) -> int:
    """The step at which Lightning saved a checkpoint: evidence from before it is stale.

    Tensors are not read, so that a checkpoint of any size is dated at once.

    Args:
        path: a checkpoint file, or the directory of a sharded one.
        trust: unpickle objects of any kind, which runs code that the file chooses.

    Raises:
        ValueError: it is no file that torch can read, or it holds objects that only `trust` unpickles.
        MissingEvidenceError: it does not say at which step it was saved, as a state dict does not.

    Example:
        >>> checkpoint_step("checkpoints/last.ckpt")  # doctest: +SKIP
        1200
    """
    path = Path(path)
    file = path / _SHARDED if path.is_dir() else path
    if path.is_dir() and not file.exists():
        raise ValueError(f"{path}: is a directory without {_SHARDED}: give a checkpoint file, or a sharded checkpoint")
    undated = f"{path}: cannot be dated, so that the evidence may be older than it: it has no global_step"
    if file.suffix == ".safetensors":
        raise MissingEvidenceError(f"{undated}: give the Lightning checkpoint that the weights are from")
    found = saved(file, trust, "meta")
    step = found.get("global_step") if isinstance(found, dict) else None
    if step is None:
        raise MissingEvidenceError(f"{undated}: give a checkpoint that Lightning saved")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError(f"{path}: global_step: expected a count of steps, got {step!r}: it is no Lightning checkpoint")
    return step


def saved(path: Path, trust: bool = False, device: str = "cpu") -> Any:
    """What `torch.save` wrote to `path`, its tensors on `device`; "meta" leaves out what they hold.

    Raises:
        ValueError: it is no file that torch can read, or it holds objects that only `trust` unpickles.
    """
    import torch

    try:
        with warnings.catch_warnings():
            # What it thinks of how the file was pickled.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location=device, weights_only=not trust)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): give the path of a file") from error
    except Exception as error:
        # A damaged file raises whatever its parts do: RuntimeError, EOFError, OSError, struct.error ...
        beyond = _beyond_weights(path) if isinstance(error, pickle.UnpicklingError) and not trust else []
        if beyond:
            raise ValueError(
                f"{path}: holds more than weights ({', '.join(beyond[:3])}), and to load that may run code: if you "
                "trust who wrote it, add --trust-checkpoint"
            ) from error
        raise ValueError(f"{path}: cannot be read as weights or a checkpoint: {in_short(error)}") from error


def _beyond_weights(path: Path) -> list[str]:
    import torch

    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:
        return []
