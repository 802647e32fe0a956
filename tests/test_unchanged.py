"""A training with audits ends as one without, to the bit; and an audit that raises gives back what it borrowed.

Each way to train is tried once here; `benchmarks.soak` tries each with each schedule.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from benchmarks.soak.pages import drawing
from benchmarks.soak.state import End, flat, generators, model_state, process
from benchmarks.soak.trainings import PLAN, SCHEDULES, TRAININGS, Restless, Schedule, Training
from benchmarks.soak.unchanged import BY_TWO, by_two, check, fitted, outcome
from bias_audit import explain
from bias_audit.attribution.borrow import borrowed
from bias_audit.audit import Auditor
from bias_audit.records.runs import read_run
from tests.training import audit_set

# Each training with one schedule, each schedule with several trainings; where nothing is validated, one that audits.
PAIRS = [(training, SCHEDULES[i % len(SCHEDULES)]) for i, training in enumerate(TRAININGS)]
PAIRS += [(training, SCHEDULES[1]) for training in TRAININGS if training.name == "no validation"]


@pytest.mark.parametrize(("training", "schedule"), PAIRS, ids=[f"{t.name}-{s.name}" for t, s in PAIRS])
def test_training_is_not_changed_by_one_bit(tmp_path: Path, training: Training, schedule: Schedule) -> None:
    with drawing(page=False):
        without = fitted(training, tmp_path / "without")
        found = outcome(training, schedule, without, tmp_path)
    assert found.differences == () and found.compared > 100
    check(training, found)


def test_two_ranks_are_not_changed_by_one_bit(tmp_path: Path) -> None:
    every = by_two(tmp_path, SCHEDULES[2:], page=False)
    assert [found.differences for found in every] == [()] * 2 * len(SCHEDULES[2:])
    for found in every:
        check(BY_TWO, found)


def test_a_difference_of_one_bit_is_told() -> None:
    weights = torch.zeros(3)
    one, other = End(dict(flat("w", [weights, 1.0]))), End(dict(flat("w", [-weights, 1.0])))
    assert one.differences(one) == ()
    assert one.differences(other) == ("w[0]",)
    assert one.differences(End({})) == ("w[0]", "w[1]")


# Audits that fail.


class Faults:
    """A plan's forward function that raises in each audit, each time at another pass."""

    def __init__(self) -> None:
        self.step, self.passes, self.raised = -1, 0, 0

    def __call__(self, model: Any, images: Tensor) -> Tensor:
        if model.global_step != self.step:
            self.step, self.passes = model.global_step, 0
        outputs: Tensor = model(images)
        self.passes += 1
        if self.step > 0 and self.passes == 2 * self.step - 1:
            self.raised += 1
            raise RuntimeError(f"pass {self.passes}")
        return outputs


class FullDisk:
    """A sink that fails at its second audit, and draws random numbers before."""

    def __init__(self) -> None:
        self.calls = 0

    def start(self, session: Any) -> None:
        torch.rand(1)

    def write(self, result: Any) -> None:
        torch.rand(1)
        self.calls += 1
        if self.calls == 2:
            raise OSError("disk full")

    def fail(self, step: int, reason: str) -> None: ...
    def end(self, error: str = "") -> None: ...


@pytest.mark.parametrize("how", ["audits", "sink", "ride"])
def test_what_fails_changes_no_bit_of_the_training(tmp_path: Path, how: str) -> None:
    training = replace(TRAININGS[0], net=Restless)
    faults, targets = Faults(), count()

    def broken(labels: Tensor) -> Any:
        # While it rides along: the passes before are the reference's and the trial's.
        if next(targets) >= 4:
            raise RuntimeError("no target")
        return lambda outputs: outputs[:, 0]

    schedule = {
        "audits": Schedule("fails", {"every_n_steps": 1, "plan": replace(PLAN, forward_fn=faults)}),
        "sink": Schedule("fails", {"every_n_steps": 1, "sinks": [FullDisk()]}),
        "ride": Schedule("fails", {"plan": replace(PLAN, target=broken)}, rides=True),
    }[how]
    training = TRAININGS[0] if how == "ride" else training
    with drawing(page=False):
        found = outcome(training, schedule, fitted(training, tmp_path / "without"), tmp_path)
    assert found.differences == ()
    audits = len(read_run(tmp_path / "audits").audits)
    if how == "audits":
        # The one before training, that at its end, and those that are done before the pass that would fail.
        assert faults.raised >= 5
        assert audits <= 1 + (8 - faults.raised) + 1
    elif how == "sink":
        assert audits == 1 + 8 + 1
    else:
        assert "no target" in found.refused


class Fuse(nn.Module):
    """Hands on what it gets, until it blows."""

    def __init__(self) -> None:
        super().__init__()
        # Out of reach of what takes back what a pass writes into a module.
        self.state = SimpleNamespace(left=-1, error=RuntimeError)

    def forward(self, images: Tensor) -> Tensor:
        self.state.left -= 1
        if self.state.left == 0:
            raise self.state.error("blown")
        return images


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SURROUNDINGS: list[Callable[[], AbstractContextManager[Any]]] = [
    nullcontext,
    lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    torch.no_grad,
    torch.inference_mode,
    deterministic,
    lambda: torch.compiler.set_stance("eager_on_recompile"),
]


def in_training(net: Restless) -> Restless:
    """As a training has it: parts frozen, gradients there, hooks of every kind."""
    net.train()
    net.features[0].requires_grad_(False)
    net(torch.rand(4, 3, 32, 32)).sum().backward()
    net.features[1].eval()
    net.register_forward_pre_hook(lambda *_: None)
    net.features.register_forward_hook(lambda *_: None)
    net.head.register_full_backward_hook(lambda *_: None)
    net.head.register_full_backward_pre_hook(lambda *_: None)
    net.register_state_dict_post_hook(lambda *_: None)
    net.register_state_dict_pre_hook(lambda *_: None)
    net.register_load_state_dict_pre_hook(lambda *_: None)
    net.register_load_state_dict_post_hook(lambda *_: None)
    return net


def everything(net: Restless) -> End:
    own = [net.seen, net.memory, [hasattr(net, name) for name in ("extra", "loose")]]
    return End(dict(flat("", [process(), generators(), model_state(net), own])))


@pytest.mark.parametrize("place", ["trunk", "tail"])
def test_an_audit_that_raises_at_any_pass_gives_everything_back(place: str) -> None:
    torch.manual_seed(0)
    net, fuse = Restless(), Fuse()
    (net.features if place == "trunk" else net.head).insert(0, fuse)
    in_training(net)
    auditor = Auditor(audit_set(1), replace(PLAN, layer="features"))
    for passes in count(1):
        fuse.state.left = -1
        with SURROUNDINGS[passes % len(SURROUNDINGS)]():
            before = everything(net)
            fuse.state.left = passes
            fuse.state.error = (RuntimeError, KeyboardInterrupt, SystemExit)[passes % 3]
            try:
                auditor.run(net, trigger="validation")
            except (RuntimeError, KeyboardInterrupt, SystemExit) as error:
                blown = str(error)
            assert before.differences(everything(net)) == (), passes
        if fuse.state.left > 0:
            break
    # One pass for the scores, the rest for the test of the methods and the interventions.
    assert passes > 10 and blown == "blown"


def broken_target(_labels: Tensor) -> Any:
    def target(outputs: Tensor) -> Tensor:
        torch.rand(1)
        raise RuntimeError("blown")

    return target


def broken_swap(sample: Any, value: Any) -> Any:
    torch.rand(1)
    raise RuntimeError("blown")


@pytest.mark.parametrize(
    "options", [{"target": broken_target}, {"swaps": {"gender": broken_swap}}], ids=["target", "swap"]
)
def test_what_raises_outside_of_the_model_gives_everything_back(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = in_training(Restless())
    auditor = Auditor(audit_set(1), replace(PLAN, layer="features", **options))
    before = everything(net)
    with pytest.raises(RuntimeError, match="blown"):
        auditor.run(net, trigger="validation")
    assert before.differences(everything(net)) == ()


class Unruly(Restless):
    """Leaves settings, hooks and things of its own behind when it is broken off."""

    def forward(self, images: Tensor) -> Tensor:
        torch.autocast("cpu", dtype=torch.bfloat16).__enter__()
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
        torch.set_grad_enabled(True)
        for module in self.modules():
            module.register_forward_hook(lambda *_: None)
            module.register_state_dict_pre_hook(lambda *_: None)
        self.extra = nn.Linear(2, 2)
        self.register_buffer("loose", torch.zeros(1))
        self.losses.append(torch.zeros(1))
        self.hidden.data += 1
        self.features[0].weight.requires_grad_(True)
        raise RuntimeError("blown")


def test_what_a_broken_off_pass_leaves_set_is_set_back() -> None:
    torch.manual_seed(0)
    net = in_training(Restless())
    net.__class__ = Unruly
    before, losses = everything(net), len(net.losses)
    with pytest.raises(RuntimeError, match="blown"):
        Auditor(audit_set(1), replace(PLAN, layer="features")).run(net)
    assert before.differences(everything(net)) == ()
    assert len(net.losses) == losses


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_explaining_in_the_middle_of_a_training_step_changes_no_gradient(dtype: torch.dtype | None) -> None:
    ends = []
    for explains in (False, True):
        pl.seed_everything(0, verbose=False)
        net, images = Restless().train(), torch.rand(4, 3, 32, 32)
        with ExitStack() as stack:
            if dtype is not None:
                stack.enter_context(torch.autocast("cpu", dtype=dtype))
            first = net(images)
            if explains:
                explain(net, images, layer="features")
            loss = (first - net(images).flip(0)).square().sum()
        loss.backward()
        ends.append(End(dict(flat("", [generators(), [p.grad for p in net.parameters()], dict(net.named_buffers())]))))
    assert ends[0].differences(ends[1]) == ()


def test_a_generator_of_the_models_own_is_where_it_was() -> None:
    class Drawing(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
            self.generator = torch.Generator().manual_seed(0)

        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) + torch.rand(2, generator=self.generator)

    net = Drawing()
    with borrowed(net) as lent:
        lent(torch.rand(1, 3, 8, 8))
    expected = torch.rand(2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.rand(2, generator=net.generator), expected)


def test_containers_of_every_kind_are_as_they_were() -> None:
    class Counting(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.counted, self.by_name = Counter(a=3), OrderedDict(b=1, a=2)
            self.listed, self.recent = defaultdict(list, a=[1]), deque([1, 2], maxlen=2)
            self.named = {"a", "b"}

        def forward(self, rows: Tensor) -> Tensor:
            self.counted.update("az")
            self.by_name.move_to_end("b")
            self.listed["z"].append(1)
            self.recent.append(3)
            self.named.discard("a")
            return super().forward(rows)

    net = Counting()
    held, names = net.counted, list(vars(net))
    with borrowed(net) as lent:
        lent(torch.rand(1, 2))
    assert net.counted is held and net.counted == Counter(a=3) and list(net.by_name) == ["b", "a"]
    assert net.listed == {"a": [1]} and net.recent == deque([1, 2]) and net.named == {"a", "b"}
    assert list(vars(net)) == names
