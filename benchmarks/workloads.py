"""What is audited in the benchmark: torchvision's models with random weights, on generated scenes at 224 pixels.

Enters: a model's name, how many images and in which batches. Leaves: a `Workload`, everything in memory. Time does not
depend on the weights, so that nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
import torchvision
from torch import Tensor, nn
from torchvision.transforms import v2

from bias_audit.data.dataset import AuditDataset
from bias_audit.data.samples import AuditBatch
from bias_audit.data.scenes import GENDERS, OCCUPATIONS, scene_dataset

SIZE = 224
SEED = 0
TRANSFORM = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.25] * 3)])


def tokens_as_map(tokens: Tensor) -> Tensor:
    """Tokens `(B, 1 + n * n, C)`, the class token first, as a feature map `(B, C, n, n)`."""
    side = round((tokens.shape[1] - 1) ** 0.5)
    return tokens[:, 1:].reshape(len(tokens), side, side, -1).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Spec:
    """A model and how it is measured: `batch` images at a time, `images` in an audit.

    `layer` is the one that everybody explains; `reshape` makes its output a feature map, where it is none.
    """

    model: str
    layer: str
    batch: int
    images: int
    reshape: Callable[[Tensor], Tensor] | None = None


# The layers are those that `find_layer` names and that the peers' documentation recommends.
SPECS = {
    spec.model: spec
    for spec in (
        Spec("resnet18", "layer4", batch=32, images=64),
        Spec("resnet50", "layer4", batch=32, images=64),
        Spec("convnext_tiny", "features", batch=32, images=64),
        Spec("vit_b_16", "encoder.layers.encoder_layer_11.ln_1", batch=16, images=32, reshape=tokens_as_map),
    )
}


@dataclass(frozen=True)
class Workload:
    """A model in eval mode and the images it is measured on, in memory and as the model takes them."""

    spec: Spec
    model: nn.Module
    audit_set: AuditDataset
    batches: tuple[AuditBatch, ...]

    @property
    def module(self) -> nn.Module:
        """The layer that everybody explains."""
        return self.model.get_submodule(self.spec.layer)


def random_model(name: str) -> nn.Module:
    """A torchvision classifier of two classes with random weights, in eval mode.

    Example:
        >>> random_model("resnet18")(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 2])
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=len(OCCUPATIONS))
        for module in model.modules():
            # torchvision's Vision Transformer begins with a head of zeros, through which no gradient comes.
            if isinstance(module, nn.Linear) and not module.weight.any():
                nn.init.normal_(module.weight, std=0.02)
    return model.eval()


def make_workload(spec: Spec) -> Workload:
    """The model and its images, all decoded.

    Raises:
        ValueError: fewer images than there are cells of occupation and gender.
    """
    cells = list(product(OCCUPATIONS, GENDERS))
    if spec.images < len(cells):
        raise ValueError(f"expected at least {len(cells)} images, one of each occupation and gender, got {spec.images}")
    counts = {cell: spec.images // len(cells) + (i < spec.images % len(cells)) for i, cell in enumerate(cells)}
    audit_set = scene_dataset(counts, SEED, SIZE, TRANSFORM)
    starts = range(0, spec.images, spec.batch)
    batches = tuple(audit_set.batch(range(start, min(start + spec.batch, spec.images))) for start in starts)
    return Workload(spec, random_model(spec.model), audit_set, batches)
