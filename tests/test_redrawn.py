"""Weights that are drawn anew and given back, bit for bit."""

from __future__ import annotations

import pytest
import torch
from fitness_nets import SIZE, Learned, explained, make_net, marked, random
from torch import Tensor, nn

from bias_audit import audit_model
from bias_audit.attribution.borrow import borrowed
from bias_audit.attribution.redrawn import redrawn_weights
from bias_audit.evidence.fitness import fitness


def test_weights_are_given_back_bit_for_bit_after_an_exception_too() -> None:
    net = make_net()
    optimizer = torch.optim.AdamW(net.parameters())
    inputs = random(2, 3, *SIZE).requires_grad_()
    waiting = net(inputs).sum()
    before = {name: (p, p.data_ptr(), p._version, p.detach().clone()) for name, p in net.named_parameters()}
    buffers = {name: b.clone() for name, b in net.named_buffers()}

    def draw_and_fail(seed: int) -> None:
        with redrawn_weights(net) as redraw:
            redraw(seed)
            for name, (p, _, _, kept) in before.items():
                # A scalar is left as it is, and so is what is zero everywhere.
                moved = float((p != kept).float().mean())
                assert moved == (0 if p.numel() == 1 or not kept.any() else 1), name
                if p.numel() > 50:
                    assert float(p.detach().square().mean() / kept.square().mean()) == pytest.approx(1, abs=0.5)
            assert net.tied.weight is net.again.weight
            raise KeyboardInterrupt

    for seed in range(2):
        with pytest.raises(KeyboardInterrupt):
            draw_and_fail(seed)
    after = dict(net.named_parameters())
    assert after.keys() == before.keys()
    for name, (p, address, version, kept) in before.items():
        assert after[name] is p and p.data_ptr() == address and p._version == version
        assert torch.equal(p.view(torch.int32), kept.view(torch.int32))
    assert optimizer.param_groups[0]["params"][0] is net.temperature
    assert all(torch.equal(b, buffers[name]) for name, b in net.named_buffers())
    # A graph that was waiting is not disturbed.
    waiting.backward()
    again = inputs.detach().clone().requires_grad_()
    net(again).sum().backward()
    assert torch.equal(inputs.grad, again.grad)  # type: ignore[arg-type]


def test_an_audit_that_fails_with_random_weights_gives_the_models_own_back() -> None:
    class Refuses(Learned):
        own = (-1.0, 0.5, 0.5)

        def forward(self, images: Tensor) -> Tensor:
            if tuple(self.filter.flatten().tolist()) != self.own:
                raise ArithmeticError
            return super().forward(images)

    net = Refuses()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    with pytest.raises(ArithmeticError):
        audit_model(net, marked())
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_weights_are_drawn_by_their_seed() -> None:
    net = make_net()

    def drawn(seed: int) -> Tensor:
        redraw(seed)
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    with redrawn_weights(net) as redraw:
        one, two, same = drawn(1), drawn(2), drawn(1)
    assert torch.equal(one, same) and not torch.equal(one, two)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_other_precisions_and_of_inference_mode(dtype: torch.dtype) -> None:
    with torch.inference_mode(dtype is torch.bfloat16):
        layer = nn.Linear(40, 40).to(dtype)
    before = layer.weight.detach().clone()
    with redrawn_weights(layer) as redraw:
        redraw(0)
        assert layer.weight.dtype == dtype and (layer.weight != before).float().mean() > 0.9
        assert float(layer.weight.detach().float().std() / before.float().std()) == pytest.approx(1, abs=0.15)
    assert torch.equal(layer.weight, before)


def test_without_weights_nothing_can_be_drawn_and_the_fitness_is_unknown() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, images: Tensor) -> Tensor:
            return self.relu(images).mean(dim=(2, 3))

    net = Bare()
    with borrowed(net) as lent:
        found = fitness(lent, explained(net), random(3, 3, *SIZE), torch.tensor([0, 1, 2]), [0, 1, 2], 16)
    assert found[-1].isnan().all() and found[0].isfinite().any()
