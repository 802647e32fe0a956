"""A small net, and what is measured of it by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bias_audit import AuditDataset, AuditSample
from bias_audit.attribution.cam import gradcam, hirescam
from bias_audit.attribution.capture import capture
from bias_audit.attribution.targets import ClassMargin
from bias_audit.evidence.fitness import Explained
from bias_audit.evidence.perturbation import STEPS

SIZE = (21, 18)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def area(score: Callable[[Tensor], float], image: Tensor, fill: Tensor, order: list[int], inserts: bool) -> float:
    """The area under the score while the pixels in `order` are uncovered, or filled, one share after the other."""
    curve = []
    for step in range(STEPS + 1):
        changed = {p for place, p in enumerate(order) if place * STEPS < step * len(order)}
        picture = torch.empty_like(image)
        for p, (y, x) in enumerate(np.ndindex(*image.shape[-2:])):
            picture[..., y, x] = (image if (p in changed) == inserts else fill)[..., y, x]
        curve.append(score(picture))
    return sum((a + b) / 2 for a, b in pairwise(curve)) / STEPS


class Net(nn.Module):
    """Two convolutions and a hidden layer: the methods differ; one weight is tied, one is a scalar, one is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1)
        )
        self.relu = nn.ReLU(inplace=True)
        self.hidden = nn.LazyLinear(6)
        self.again = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)
        self.temperature = nn.Parameter(torch.tensor([0.3]))
        self.again.weight = nn.Parameter(torch.empty(6, 6))
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.again.weight
        nn.init.normal_(self.again.weight, std=0.4)
        self.features[0].weight.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.tanh(self.hidden(self.relu(self.features(images)).flatten(1)))
        return self.head(torch.tanh(self.tied(torch.tanh(self.again(hidden))))) / self.temperature


def make_net(seed: int = 0) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Net()
        for _ in range(3):
            net(torch.rand(8, 3, *SIZE))
    return net.eval()


METHODS = {"gradcam": gradcam, "hirescam": hirescam}


def explained(net: nn.Module, sign: Any = "positive", **more: Callable[[Tensor], Tensor]) -> Explained:
    """Both methods on the network's `relu`, and `more` that see the images alone."""

    def maps(images: Tensor, classes: Tensor) -> Tensor:
        taken = capture(net, images, ClassMargin(classes), "relu")
        found = [method(taken.activations, taken.gradients, sign) for method in METHODS.values()]
        size = taken.activations.shape[2:]
        return torch.stack(found + [nn.functional.adaptive_avg_pool2d(m(images), size)[:, 0] for m in more.values()])

    return Explained(
        (*METHODS, *more), maps, lambda images: net(images), lambda outputs, y: ClassMargin(y)(outputs), sign
    )


class Fixed(nn.Module):
    """Sees the cyan of the mark through a filter that is no weight; only the head is learned.

    Its maps are the same picture whatever the head is: `spread` wide, they are no evidence of the model.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filter", torch.tensor([-1.0, 0.5, 0.5])[None, :, None, None])
        self.relu = nn.ReLU()
        self.head = nn.Linear(1, 2)
        self.head.weight.data = torch.tensor([[-9.0], [9.0]])
        self.head.bias.data = torch.tensor([0.2, -0.2])

    def forward(self, images: Tensor) -> Tensor:
        seen = self.relu(nn.functional.conv2d(images, self.filter))  # type: ignore[arg-type]
        return self.head(seen.mean(dim=(2, 3)))


class Learned(Fixed):
    """The same decision, and the filter is a weight."""

    def __init__(self) -> None:
        super().__init__()
        kept = self._buffers.pop("filter")
        self.filter = nn.Parameter(kept)  # type: ignore[arg-type]


@cache
def marked(each: int = 30) -> AuditDataset:
    """Noise with a cyan mark on half of the images of either class: a model that reads it is wrong on the others."""
    rng = np.random.default_rng(0)
    samples = []
    for label, mark, number in [(y, m, i) for y in (0, 1) for m in (0, 1) for i in range(each)]:
        picture = rng.integers(0, 20, (12, 12, 3))
        if mark:
            picture[8:11, 7:11] = (20, 240, 240)
        mask = torch.zeros(12, 12, dtype=torch.bool)
        mask[8:11, 7:11] = True
        image = torch.from_numpy(picture.astype(np.uint8)).permute(2, 0, 1).contiguous()
        samples.append(
            AuditSample(image, label, {"mark": mask}, {"mark": ("no", "yes")[mark]}, f"{label}{mark}{number}")
        )
    return AuditDataset(samples, spurious=["mark"])
