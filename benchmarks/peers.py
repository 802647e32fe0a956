"""Other packages that explain or audit, each used as its documentation shows.

Enters: a `Workload` and a batch. Leaves: maps of the batch's labels at the layer that everybody explains, or scores per
region. The peers' objects are made anew for each batch: their hooks would slow down whoever comes next.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.workloads import Workload
from bias_audit import explain
from bias_audit.data.samples import AuditBatch
from bias_audit.localization import with_remainder

GRADCAM, CAPTUM, TORCHCAM, QUANTUS = "grad-cam", "captum", "torchcam", "grad-cam + Quantus"
# What takes several times as long as the bare forward is timed in each n-th round only.
SELDOM = 3


@dataclass(frozen=True)
class Peer:
    """A package that computes Grad-CAM: maps `(B, h, w)` or `(B, H, W)`; `modules` are what it is imported as."""

    name: str
    modules: tuple[str, ...]
    maps: Callable[[Workload, AuditBatch], Tensor]
    every: int = 1
    takes_tokens: bool = True

    def excuse(self, work: Workload) -> str:
        """Why it cannot take part, "" if it can."""
        if any(importlib.util.find_spec(module) is None for module in self.modules):
            return "not installed"
        if work.spec.reshape is not None and not self.takes_tokens:
            return "not supported: takes feature maps, no tokens"
        return ""


def by_gradcam(work: Workload, batch: AuditBatch) -> Tensor:
    """Grad-CAM by grad-cam: upsampled, scaled to [0, 1], on the CPU."""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    targets = [ClassifierOutputTarget(label) for label in batch.labels.tolist()]
    with GradCAM(model=work.model, target_layers=[work.module], reshape_transform=work.spec.reshape) as cam:
        return torch.from_numpy(cam(input_tensor=batch.images, targets=targets))


def by_captum(work: Workload, batch: AuditBatch) -> Tensor:
    """Grad-CAM by captum, at the layer's resolution."""
    from captum.attr import LayerGradCam

    way = LayerGradCam(work.model, work.module)
    maps: Tensor = way.attribute(batch.images, target=batch.labels, relu_attributions=True)
    return maps[:, 0].detach()


def by_torchcam(work: Workload, batch: AuditBatch) -> Tensor:
    """Grad-CAM by torchcam, at the layer's resolution, scaled to [0, 1]."""
    from torchcam.methods import GradCAM

    with GradCAM(work.model, work.spec.layer, reshape_transform=work.spec.reshape) as extractor:
        outputs = work.model(batch.images)
        maps: Tensor = extractor(batch.labels.tolist(), outputs)[0]
    return maps


PEERS = (
    Peer(GRADCAM, ("pytorch_grad_cam",), by_gradcam, every=SELDOM),
    Peer(CAPTUM, ("captum",), by_captum, takes_tokens=False),
    Peer(TORCHCAM, ("torchcam",), by_torchcam),
)
QUANTUS_PEER = Peer(QUANTUS, ("pytorch_grad_cam", "quantus"), by_gradcam, every=SELDOM)


def by_quantus(work: Workload, batches: Sequence[AuditBatch]) -> list[list[float]]:
    """The peers' complete audit: grad-cam's maps, and of them three of Quantus's metrics in each region.

    It does less than ours: one method instead of two, three metrics instead of five, no statistics, no records.
    """
    # An image without a region gives NaN in it, of which Quantus and NumPy warn each time.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [scores for batch in batches for scores in _quantus_scores(work, batch)]


def _quantus_scores(work: Workload, batch: AuditBatch) -> list[list[float]]:
    # Its names are re-exported in a way that type checkers do not follow.
    quantus: Any = importlib.import_module("quantus")
    metrics = [
        metric(abs=False, normalise=False, disable_warnings=True, display_progressbar=False)
        for metric in (quantus.RelevanceRankAccuracy, quantus.PointingGame, quantus.RelevanceMassAccuracy)
    ]
    maps = by_gradcam(work, batch).numpy()[:, None]
    given: dict[str, Any] = {"x_batch": batch.images.numpy(), "y_batch": batch.labels.numpy(), "a_batch": maps}
    regions = [region[:, None].numpy() for region in with_remainder(batch.masks).unbind(dim=1)]
    return [metric(model=work.model, s_batch=region, **given) for region in regions for metric in metrics]


@dataclass(frozen=True)
class Agreement:
    """How far a peer's maps are ours: the least correlation over `images` images, both at the peer's resolution."""

    model: str
    contender: str
    images: int
    correlation: float


def agreements(work: Workload) -> tuple[Agreement, ...]:
    """Each peer's maps of the first batch beside ours.

    Raises:
        RuntimeError: a peer explains something else, so that comparing its time means nothing.
    """
    batch = work.batches[0]
    mine = explain(work.model, batch.images, target=batch.labels, layer=work.spec.layer)
    found: list[Agreement] = []
    for peer in (p for p in PEERS if not p.excuse(work)):
        theirs = peer.maps(work, batch)
        here = mine.upsample(theirs.shape[1:])
        # A map that is zero everywhere has no correlation with anything.
        telling = here.flatten(1).std(dim=1) > 0
        pairs = zip(here[telling].flatten(1), theirs[telling].flatten(1), strict=True)
        correlations = [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in pairs]
        least = min(correlations, default=float("nan"))
        if not least > 0.99:
            raise RuntimeError(
                f"{work.spec.model}: {peer.name}'s maps are not ours (least correlation {least:.3f} of "
                f"{len(correlations)} maps): it explains another layer or class"
            )
        found.append(Agreement(work.spec.model, peer.name, len(correlations), least))
    return tuple(found)
