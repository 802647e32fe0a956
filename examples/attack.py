"""Under attack: a network is fooled into seeing what is not there. Do its heatmaps still find what is?

The Grad-CAM paper shows two pictures in which they do (arXiv 1610.02391, "Effect of adversarial noise on VGG-16"): the
network is made certain of a class that is absent, and its maps of the classes that are present still lie on them. Here
this is counted, for one network: it learns which two of six kinds of things a generated scene shows; projected gradient
descent (arXiv 1706.06083) then changes every pixel by at most epsilon towards a third kind; and the map of a kind that
is there is measured before and after, next to the probabilities that the network gives. The kinds differ in colour, so
the change that it takes can be seen.

    python examples/attack.py            # about half a minute; pictures in runs/attack
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.ops import Conv2dNormActivation

from bias_audit import explain
from bias_audit.localization import energy_share, enrichment, pointing_game, project_regions
from bias_audit.overlays import overlay, side_by_side
from bias_audit.stats import bootstrap_ratios, wilson

KINDS = ("red disc", "green square", "blue triangle", "yellow cross", "purple diamond", "orange bar")
PAINTS = ((0.85, 0.15, 0.15), (0.15, 0.7, 0.2), (0.2, 0.3, 0.9), (0.9, 0.85, 0.1), (0.6, 0.2, 0.8), (0.95, 0.5, 0.1))
SIDE, THINGS = 64, 2


@dataclass(frozen=True)
class Scenes:
    """Images `(N, 3, 64, 64)`, 0 to 1; the kinds of their two things, int64 `(N, 2)`; masks `(N, 2, 64, 64)`."""

    images: Tensor
    kinds: Tensor
    masks: Tensor


def draw_scenes(count: int, seed: int) -> Scenes:
    """`count` scenes: two things of two kinds, in two of nine cells, on grey with a gradient and noise."""
    rng = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=rng)

    kinds = torch.rand(count, len(KINDS), generator=rng).argsort(dim=1)[:, :THINGS]
    cells = torch.rand(count, 9, generator=rng).argsort(dim=1)[:, :THINGS]
    centres = 11 + 21 * torch.stack([cells % 3, cells // 3]) + uniform(-2, 2, THINGS)
    radius = uniform(7.5, 9.5, THINGS)
    x, y = (((torch.arange(SIDE) + 0.5 - centre[..., None]) / radius[..., None]) for centre in centres)
    x, y = x[:, :, None, :], y[:, :, :, None]
    further, nearer = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    outlines = torch.stack(
        [
            x**2 + y**2 < 1,
            further < 0.85,
            (y < 0.8) & (y > 2 * x.abs() - 1),
            (nearer < 0.3) & (further < 1),
            x.abs() + y.abs() < 1,
            (x.abs() < 1) & (y.abs() < 0.5),
        ]
    )
    masks = outlines[kinds, torch.arange(count)[:, None], torch.arange(THINGS)]

    painted = torch.tensor(PAINTS)[kinds] + uniform(-0.1, 0.1, THINGS, 3)
    ramp = uniform(-0.2, 0.2, 2)[:, :, None] * torch.linspace(-1, 1, SIDE)
    ground = uniform(0.35, 0.75, 1, 1, 1) + ramp[:, 0, None, :, None] + ramp[:, 1, None, None, :]
    noise = 0.04 * torch.randn(count, 3, SIDE, SIDE, generator=rng)
    images = torch.einsum("ntc,nthw->nchw", painted, masks.float()) + ground * ~masks.any(dim=1, keepdim=True)
    return Scenes((images + noise).clamp(0, 1), kinds, masks)


class Classifier(pl.LightningModule):
    """Convolutions, an average over all places and one linear layer: softmax over the six kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            Conv2dNormActivation(3, 16, kernel_size=5, stride=2),
            nn.MaxPool2d(2),
            Conv2dNormActivation(16, 32),
            Conv2dNormActivation(32, 48),
            Conv2dNormActivation(48, 48),
        )
        self.kinds = nn.Linear(48, len(KINDS))

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, kinds)`."""
        return self.kinds(self.features(images).mean(dim=(2, 3)))

    def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
        """Cross-entropy; the two kinds that are there have half of the probability each."""
        images, kinds = batch
        return nn.functional.cross_entropy(self(images), nn.functional.one_hot(kinds, len(KINDS)).float().mean(dim=1))

    def configure_optimizers(self) -> dict[str, object]:
        """AdamW, its rate rising and falling once."""
        optimizer = torch.optim.AdamW(self.parameters(), weight_decay=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=8e-3, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def attack(model: nn.Module, images: Tensor, wanted: Tensor, epsilon: float, steps: int) -> Tensor:
    """Images within `epsilon` of the given ones in every pixel, 0 to 1, that the model takes for `wanted`, `(N,)`.

    Projected gradient descent on the cross-entropy, without random start: `x <- clip(x - a sign(grad))`, with the step
    `a = 2.5 epsilon / steps` (arXiv 1706.06083, section 2.1, towards a class instead of away from one).
    """
    changed = images
    for _ in range(steps):
        changed = changed.detach().requires_grad_()
        loss = nn.functional.cross_entropy(model(changed), wanted, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, changed)
        stepped = changed.detach() - 2.5 * epsilon / steps * gradient.sign()
        changed = stepped.clamp(images - epsilon, images + epsilon).clamp(0, 1)
    return changed


Estimate = tuple[float, float, float]


@dataclass(frozen=True)
class Located:
    """How `n` images fare under an attack of strength `epsilon`; each estimate has its 95 % interval.

    `fooled` is the share of images whose predicted kind is the absent one, `certain` that in which it has a probability
    above 0.9; `present` is the mean probability of the two kinds that are there, taken together. The rest is about the
    map of the first thing's kind: `hits` the share with the maximum on it, `chance` the thing's mean share of the
    area, `right_thing` the share with more energy per area on it than on the other thing (by chance 0.5), `energy` the
    mean share of the energy on it, and `change` how much of that share the attack adds. A silent map has and hits
    nothing. Shares of images have Wilson intervals, means are bootstrapped over images.
    """

    epsilon: float
    n: int
    fooled: Estimate
    certain: Estimate
    present: Estimate
    hits: Estimate
    chance: float
    right_thing: Estimate
    energy: Estimate
    change: Estimate


def attack_and_locate(
    model: Classifier, scenes: Scenes, epsilons: Sequence[float], steps: int, seed: int
) -> tuple[list[Located], list[Tensor]]:
    """A row per epsilon, the first without attack, and the images of each; the wanted kind is any that is absent."""
    model.eval()
    rng = torch.Generator().manual_seed(seed)
    wanted = torch.rand(len(scenes.kinds), len(KINDS), generator=rng).scatter(1, scenes.kinds, -1).argmax(dim=1)
    attacked = [scenes.images, *(attack(model, scenes.images, wanted, epsilon, steps) for epsilon in epsilons)]

    rows: list[Located] = []
    before = None
    for epsilon, images in zip((0.0, *epsilons), attacked, strict=True):
        heatmaps = explain(model, images, target=scenes.kinds[:, 0], layer="features")
        grid = project_regions(scenes.masks, (heatmaps.maps.shape[-2], heatmaps.maps.shape[-1]))
        energy = energy_share(heatmaps.maps, grid)
        density = enrichment(energy, grid.area).value
        before = energy.value[:, 0] if before is None else before
        p = heatmaps.outputs.softmax(dim=1)
        of_wanted = p.gather(1, wanted[:, None])[:, 0]
        rows.append(
            Located(
                epsilon=epsilon,
                n=len(images),
                fooled=share(p.argmax(dim=1) == wanted),
                certain=share(of_wanted > 0.9),
                present=mean(p.gather(1, scenes.kinds).sum(dim=1)),
                hits=share(pointing_game(heatmaps.upsample((SIDE, SIDE)), scenes.masks).value[:, 0] > 0.5),
                chance=float(grid.area[:, 0].mean()),
                right_thing=share(density[:, 0] > density[:, 1]),
                energy=mean(energy.value[:, 0]),
                change=mean(energy.value[:, 0] - before),
            )
        )
    return rows, attacked


def share(hits: Tensor) -> Estimate:
    """The share of hits with its 95 % interval."""
    return wilson(int(hits.sum()), len(hits))


def mean(values: Tensor) -> Estimate:
    """The mean over images with its 95 % interval."""
    column = values.double().numpy()[:, None]
    found = bootstrap_ratios(column, np.ones_like(column), np.zeros(len(column)), seed=0)
    return float(found.value[0]), float(found.low[0]), float(found.high[0])


def table(rows: list[Located]) -> Table:
    """The rows as people read them, a column per strength."""
    drawn = Table(box=box.SIMPLE, title=f"per cent, 95 % interval, {rows[0].n} images")
    for heading in ("epsilon", *(f"{255 * row.epsilon:.0f}/255" for row in rows)):
        drawn.add_column(heading)
    drawn.add_row("absent kind predicted", *(text(row.fooled) for row in rows))
    drawn.add_row("  with p > 0.9", *(text(row.certain) for row in rows))
    drawn.add_row("p of what is there", *(text(row.present) for row in rows))
    drawn.add_row("its map's maximum on it", *(text(row.hits) for row in rows))
    drawn.add_row("  by chance", *(f"{100 * row.chance:.0f}" for row in rows))
    drawn.add_row("more on it than on the other (by chance 50)", *(text(row.right_thing) for row in rows))
    drawn.add_row("energy on it", *(text(row.energy) for row in rows))
    drawn.add_row("  change", *(text(row.change) for row in rows))
    return drawn


def text(estimate: Estimate) -> str:
    """In per cent."""
    value, low, high = (100 * part for part in estimate)
    return f"{value:.0f} ({low:.0f}, {high:.0f})"


def draw_maps(model: Classifier, kinds: Tensor, attacked: list[Tensor], path: Path) -> None:
    """A row per scene: for each strength the picture under what is predicted, and over it the map of its first kind."""
    rows: list[list[tuple[str, Image.Image]]] = [[] for _ in kinds]
    for images in attacked:
        heatmaps = explain(model, images, target=kinds[:, 0], layer="features")
        certainty, predicted = heatmaps.outputs.softmax(dim=1).max(dim=1)
        for row, heat in enumerate(heatmaps.maps):
            picture = Image.fromarray((images[row] * 255).byte().permute(1, 2, 0).numpy())
            shown = overlay(picture, (heat / heat.max().clamp_min(1e-30)).numpy())
            rows[row].append((f"{KINDS[predicted[row]]} {certainty[row]:.2f}", picture.resize(shown.size)))
            rows[row].append((f"map of {KINDS[kinds[row, 0]]}", shown))
    path.parent.mkdir(parents=True, exist_ok=True)
    side_by_side(rows, side=192).save(path)


@dataclass(frozen=True)
class Outcome:
    """The share of held-out scenes of which both kinds are ranked first, and a row per strength of the attack."""

    right: Estimate
    rows: list[Located]


def main(arguments: Sequence[str] | None = None) -> Outcome:
    """Train, attack, explain, and say where the maps lie."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=2000, help="to train on")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--epsilon", type=float, nargs="+", default=[8.0, 16.0, 32.0], help="in 255ths")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/attack"))
    options = parser.parse_args(arguments)

    pl.seed_everything(options.seed)
    train, held_out = draw_scenes(options.scenes, seed=options.seed), draw_scenes(200, seed=options.seed + 1_000_000)
    model = Classifier()
    trainer = pl.Trainer(
        max_epochs=options.epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(train.images, train.kinds), batch_size=32, shuffle=True))

    epsilons = [epsilon / 255 for epsilon in options.epsilon]
    rows, attacked = attack_and_locate(model, held_out, epsilons, options.steps, options.seed)
    with torch.no_grad():
        ranked = model(held_out.images).topk(THINGS).indices.sort(dim=1).values
    right = share((ranked == held_out.kinds.sort(dim=1).values).all(dim=1))
    draw_maps(model, held_out.kinds[:6], [images[:6] for images in attacked], options.out / "attack.png")
    console = Console()
    console.print(f"{right[0]:.0%} of {len(ranked)} held-out scenes: both kinds ranked first")
    console.print(table(rows))
    console.print(f"pictures: {options.out / 'attack.png'}")
    return Outcome(right, rows)


if __name__ == "__main__":
    main()
