"""A model with its weights, from what a user names on the command line.

Enters: what makes the model, and the file of its weights or of a Lightning checkpoint. Leaves: a `Loaded`, on the CPU.
Code in the file is run only if it is trusted.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from bias_audit.checkpoints import saved
from bias_audit.imports import called, imported
from bias_audit.rng import preserved_rng
from bias_audit.wording import in_short

# Where Lightning looks in a checkpoint, old or new, for the arguments of the class.
_ARGUMENTS = ("hparams", "module_arguments", "hyper_parameters")
# With these among them, as LightningCLI writes them, the file chooses which classes are imported and made.
_CHOOSES = ("_instantiator", "_class_path")
# What `torch.compile` adds to a name, wherever in the model it was called.
_COMPILED = "_orig_mod."


@dataclass(frozen=True)
class Loaded:
    """A model, and when it was saved: 0 where its file does not say."""

    model: nn.Module
    step: int = 0
    epoch: int = 0


def load(
    model: str, *, checkpoint: Path | None = None, weights: Path | None = None, trust: bool = False, seed: int = 0
) -> Loaded:
    """The model that `model` names, with its weights, on the CPU.

    Args:
        model: `package.module:name` of what gives an `nn.Module`, or with `checkpoint` of a LightningModule class.
        checkpoint: a Lightning checkpoint of that class.
        weights: a state dict, a Lightning checkpoint or a .safetensors file.
        trust: unpickle objects of any kind, which runs code that the file chooses.
        seed: of the weights that the model draws: the same on every rank, and a second time.

    Raises:
        ValueError: the model or the file cannot be loaded, or they do not fit each other; says what was named where.
    """
    if checkpoint is not None and weights is not None:
        raise ValueError("expected --checkpoint (with a LightningModule class) or --weights, got both: keep one")
    if checkpoint is not None:
        return _from_checkpoint(model, checkpoint, trust)
    with preserved_rng(seed):
        made = called(model, "--model")
    if not isinstance(made, nn.Module):
        raise ValueError(f"--model: {model!r} returned {type(made).__name__}, expected an nn.Module")
    if weights is None:
        return Loaded(made)
    content = _weights(weights, trust)
    _fill(made, content.get("state_dict", content), weights)
    return Loaded(made, *_when(content))


def _from_checkpoint(name: str, path: Path, trust: bool) -> Loaded:
    kind: Any = imported(name, "--model")
    if not (isinstance(kind, type) and hasattr(kind, "load_from_checkpoint")):
        raise ValueError(
            f"--model: {name!r} is no LightningModule class, which --checkpoint needs: name it, or give the file as "
            "--weights"
        )
    content = _weights(path, trust)
    if not isinstance(content.get("state_dict"), Mapping):
        raise ValueError(
            f"{path}: holds no `state_dict`, so it is weights and no Lightning checkpoint: `run` takes it as "
            f"--weights; for `gate` name in --model a function that makes the model, not {name!r}"
        )
    if not trust:
        _check_arguments(content, path)
    try:
        with _loading(trust):
            model = kind.load_from_checkpoint(path, map_location="cpu")
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path}: {name!r} cannot be made from it: {in_short(error)}") from error
    return Loaded(model, *_when(content))


def _check_arguments(content: Mapping[str, Any], path: Path) -> None:
    """Refuse a checkpoint that says by what the model is made."""
    for key in _ARGUMENTS:
        found = content.get(key, {})
        # Lightning would take a list of pairs as well.
        if not isinstance(found, Mapping):
            raise ValueError(f"{path}: {key}: expected a mapping, got {type(found).__name__}")
        chosen = next((name for name in _CHOOSES if name in found), None)
        if chosen is not None:
            raise ValueError(
                f"{path}: {key}: names in {chosen} what is to be called to make the model ({found[chosen]!r:.200}), as "
                "LightningCLI writes it, and that may run code: if you trust who wrote it, add --trust-checkpoint"
            )


@contextmanager
def _loading(trust: bool) -> Iterator[None]:
    """What `torch.load` may do inside, whoever calls it: before 2.6 Lightning loads anything and cannot be told not to.

    Later versions take `weights_only`, which earlier ones would hand to the user's class.
    """
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[trust]] = "1"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Environment variable TORCH_FORCE")
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _weights(path: Path, trust: bool) -> Mapping[str, Any]:
    """What a file of weights or a checkpoint holds, on the CPU; code in it is run only if it is trusted."""
    if path.suffix == ".safetensors":
        return _safetensors(path)
    content = saved(path, trust)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected a state dict or a Lightning checkpoint, got {type(content).__name__}")
    return content


def _safetensors(path: Path) -> Mapping[str, Any]:
    try:
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise ValueError(f"{path}: needs the package safetensors: pip install safetensors") from error
    try:
        weights: Mapping[str, Any] = load_file(path)
    except Exception as error:
        raise ValueError(f"{path}: cannot be read as safetensors: {in_short(error)}") from error
    return weights


def _fill(model: nn.Module, state: Any, path: Path) -> None:
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{path}: expected a state dict, from names to tensors, got {type(state).__name__}")
    state, prefix = _unwrapped(state, set(model.state_dict()))
    without = f" without `{prefix}`, with which all its names begin," if prefix else ""
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except Exception as error:
        raise ValueError(f"{path}:{without} does not fit {type(model).__name__}: {in_short(error)}") from error
    wrong = [
        f"{what} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in (("it lacks", missing), ("the model has no", unexpected))
        if names
    ]
    if wrong:
        raise ValueError(f"{path}:{without} does not fit {type(model).__name__}: {'; '.join(wrong)}")


def _unwrapped(state: Mapping[str, Any], names: set[str]) -> tuple[Mapping[str, Any], str]:
    """The weights by the model's own names, and what was taken off all of theirs.

    What saved them may have held the model as a part: a LightningModule as `model.`, DistributedDataParallel as
    `module.`, `torch.compile` as `_orig_mod.`.
    """
    if set(state) == names:
        return state, ""
    if not any(_COMPILED in name for name in names):
        plain = {name.replace(_COMPILED, ""): value for name, value in state.items()}
        state = plain if len(plain) == len(state) else state
    parts = next(iter(state), "").split(".")[:-1]
    outer = [f"{'.'.join(parts[:count])}." for count in range(1, len(parts) + 1)]
    prefixes = [prefix for prefix in outer if all(name.startswith(prefix) for name in state)]
    for prefix in prefixes:
        if {name.removeprefix(prefix) for name in state} == names:
            return {name.removeprefix(prefix): value for name, value in state.items()}, prefix
    # None fits: the outermost is what to look at, unless the model has such a part itself.
    if prefixes and not any(name.startswith(prefixes[0]) for name in names):
        return {name.removeprefix(prefixes[0]): value for name, value in state.items()}, prefixes[0]
    return state, ""


def _when(content: Mapping[str, Any]) -> tuple[int, int]:
    """Step and epoch, as Lightning writes them beside a state dict."""
    step, epoch = (content.get(name) for name in ("global_step", "epoch"))
    return (step if isinstance(step, int) else 0), (epoch if isinstance(epoch, int) else 0)
