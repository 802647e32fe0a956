"""Visual question answering: does the heatmap of an answer lie on the thing that was asked about?

A CNN and an LSTM learn to answer questions about generated scenes of three things, no two alike in shape or colour:
"what colour is the circle ?", "what shape is the red one". Two questions about two things of one image must give two
maps. As in the Grad-CAM paper (arXiv 1610.02391, "Visual Question Answering") the network has no attention: features of
the image, averaged over all places, and of the question are multiplied (arXiv 1505.00468), and what is explained is the
gradient of the answer's log probability. An average has lost where things are, so no question is about places.

    python examples/vqa.py            # about half a minute; pictures in runs/vqa
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.ops import Conv2dNormActivation

from bias_audit import Heatmaps, explain
from bias_audit.attribution.targets import LogProbability, Target
from bias_audit.localization import energy_share, enrichment, pointing_game, project_regions
from bias_audit.overlays import overlay, side_by_side
from bias_audit.stats import wilson

SHAPES, COLOURS = ("circle", "square", "triangle", "cross"), ("red", "green", "blue", "yellow")
ANSWERS = (*SHAPES, *COLOURS)
WORDS = ("what", "is", "the", "colour", "?", "shape", "one", *ANSWERS)
NUMBER = {word: number for number, word in enumerate(WORDS)}
SIDE, THINGS = 64, 3


@dataclass(frozen=True)
class Scenes:
    """Images `(N, 3, 64, 64)`, 0 to 1; of three things each, int64 `(N, 3)`, their shapes and colours; and their masks
    `(N, 3, 64, 64)`."""

    images: Tensor
    shapes: Tensor
    colours: Tensor
    masks: Tensor

    def first(self, count: int) -> Scenes:
        """The first `count` of them."""
        return Scenes(self.images[:count], self.shapes[:count], self.colours[:count], self.masks[:count])


def draw_scenes(count: int, seed: int) -> Scenes:
    """`count` scenes: three things in three of nine cells, on grey with a gradient and noise."""
    rng = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=rng)

    def distinct(kinds: int) -> Tensor:
        return torch.rand(count, kinds, generator=rng).argsort(dim=1)[:, :THINGS]

    shapes, colours, cells = distinct(4), distinct(4), distinct(9)
    centres = 11 + 21 * torch.stack([cells % 3, cells // 3]) + uniform(-2, 2, THINGS)
    radius = uniform(7, 9, THINGS)
    places = torch.arange(SIDE) + 0.5
    x, y = (((places - centre[..., None]) / radius[..., None]) for centre in centres)
    x, y = x[:, :, None, :], y[:, :, :, None]
    outlines = torch.stack(
        [
            x**2 + y**2 < 1,
            torch.maximum(x.abs(), y.abs()) < 0.85,
            (y < 0.8) & (y > 2 * x.abs() - 1),
            (torch.minimum(x.abs(), y.abs()) < 0.3) & (torch.maximum(x.abs(), y.abs()) < 1),
        ]
    )
    scene, thing = torch.arange(count)[:, None], torch.arange(THINGS)
    masks = outlines[shapes, scene, thing]

    paints = torch.tensor([[0.85, 0.15, 0.15], [0.15, 0.7, 0.2], [0.2, 0.3, 0.9], [0.9, 0.8, 0.1]])
    painted = paints[colours] + uniform(-0.1, 0.1, THINGS, 3)
    ramp = uniform(-0.2, 0.2, 2)[:, :, None] * torch.linspace(-1, 1, SIDE)
    ground = uniform(0.35, 0.75, 1, 1, 1) + ramp[:, 0, None, :, None] + ramp[:, 1, None, None, :]
    images = torch.einsum("ntc,nthw->nchw", painted, masks.float()) + ground * ~masks.any(dim=1, keepdim=True)
    noise = 0.04 * torch.randn(count, 3, SIDE, SIDE, generator=rng)
    return Scenes((images + noise).clamp(0, 1), shapes, colours, masks)


def ask(shapes: Tensor, colours: Tensor, of_colour: bool) -> tuple[Tensor, Tensor]:
    """Questions `(N, Q, 6)` and answers `(N, Q)` about things of the given shapes and colours, `(N, Q)`.

    With `of_colour` a question names the thing by its shape and asks for its colour; without, the reverse.
    """
    form = "what colour is the circle ?" if of_colour else "what shape is the red one"
    questions = torch.tensor([NUMBER[word] for word in form.split()]).repeat(*shapes.shape, 1)
    by_shape, by_colour = shapes, len(SHAPES) + colours
    questions[:, :, 4] = NUMBER[ANSWERS[0]] + (by_shape if of_colour else by_colour)
    return questions, by_colour if of_colour else by_shape


class Answerer(pl.LightningModule):
    """Pooled image features times question features (arXiv 1505.00468), to logits of the eight answers."""

    def __init__(self) -> None:
        super().__init__()
        # A last map of 16 x 16: what is explained should be no coarser than what is drawn.
        self.features = nn.Sequential(
            Conv2dNormActivation(3, 16, kernel_size=5, stride=2),
            nn.MaxPool2d(2),
            Conv2dNormActivation(16, 32),
            Conv2dNormActivation(32, 48),
            Conv2dNormActivation(48, 48),
        )
        self.embedding = nn.Embedding(len(WORDS), 32)
        self.lstm = nn.LSTM(32, 64, batch_first=True)
        # The averages differ little between images: brought to one scale, they train three times as fast.
        self.seen = nn.Sequential(nn.BatchNorm1d(48), nn.Linear(48, 128))
        self.asked = nn.Linear(64, 128)
        self.answers = nn.Linear(128, len(ANSWERS))

    def forward(self, images: Tensor, questions: Tensor) -> Tensor:
        """Logits `(B, Q, answers)` of questions `(B, Q, 6)` about images `(B, 3, 64, 64)`."""
        read = self.lstm(self.embedding(questions.flatten(0, 1)))[0][:, -1].unflatten(0, questions.shape[:2])
        seen = self.seen(self.features(images).mean(dim=(2, 3)))[:, None]
        # No non-linearity before or after the product: with one the network answers as well and its maps are diffuse.
        return self.answers(seen * self.asked(read))

    def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
        """Cross-entropy of the answers to all six questions; half of the batches are mirrored."""
        images, shapes, colours = batch
        images = images.flip(3) if torch.rand(()) < 0.5 else images
        questions, answers = (
            torch.cat(both, 1) for both in zip(ask(shapes, colours, True), ask(shapes, colours, False), strict=True)
        )
        return nn.functional.cross_entropy(self(images, questions).flatten(0, 1), answers.flatten())

    def configure_optimizers(self) -> dict[str, object]:
        """AdamW, its rate rising and falling once."""
        optimizer = torch.optim.AdamW(self.parameters(), weight_decay=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=8e-3, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def explain_answers(model: nn.Module, images: Tensor, questions: Tensor, answers: Tensor) -> Heatmaps:
    """Maps `(Q, N, 16, 16)`, from one forward pass, of the answers `(N, Q)` to questions `(N, Q, 6)`."""

    def answer_to(question: int) -> Target:
        log_probability = LogProbability(answers[:, question])
        return lambda outputs: log_probability(outputs[:, question])

    return explain(
        model,
        {"images": images, "questions": questions},
        forward_fn=lambda answerer, batch: answerer(batch["images"], batch["questions"]),
        layer="features",
        target=[answer_to(question) for question in range(answers.shape[1])],
    )


Proportion = tuple[float, float, float]


@dataclass(frozen=True)
class Localised:
    """Where the maps of one kind of question lie, over `n` images; a proportion has its 95 % interval (Wilson).

    Each image is asked about two of its things. `right` is the share of right answers about the first, `hits` that of
    its maps with the maximum on it, `chance` what a maximum anywhere would give: its mean share of the area.
    `on_other` is the share with the maximum on the second thing, and `asked_thing` that with more energy per area on
    the first than on the second. `moves` is the share of images in which the first thing gets more of the energy when
    it is asked about than when the second is. Chance is 0.5 for both. A silent map misses.
    """

    asks_for: str
    n: int
    right: Proportion
    hits: Proportion
    chance: float
    on_other: Proportion
    asked_thing: Proportion
    moves: Proportion


def localise(model: Answerer, scenes: Scenes) -> list[Localised]:
    """One row for questions about colour, one for questions about shape."""
    return [localise_kind(model, scenes, of_colour) for of_colour in (True, False)]


def localise_kind(model: Answerer, scenes: Scenes, of_colour: bool) -> Localised:
    """Ask every image about its first two things."""
    questions, answers = ask(scenes.shapes[:, :2], scenes.colours[:, :2], of_colour)
    heatmaps = explain_answers(model, scenes.images, questions, answers)
    grid = project_regions(scenes.masks, (heatmaps.maps.shape[-2], heatmaps.maps.shape[-1]))
    hits = pointing_game(heatmaps.upsample((SIDE, SIDE))[0], scenes.masks).value > 0.5
    first, second = (energy_share(maps, grid) for maps in heatmaps.maps)
    density = enrichment(first, grid.area).value
    return Localised(
        asks_for="colour" if of_colour else "shape",
        n=len(answers),
        right=share(heatmaps.outputs[:, 0].argmax(dim=1) == answers[:, 0]),
        hits=share(hits[:, 0]),
        chance=float(grid.area[:, 0].mean()),
        on_other=share(hits[:, 1]),
        asked_thing=share(density[:, 0] > density[:, 1]),
        moves=share(first.value[:, 0] > second.value[:, 0]),
    )


def share(hits: Tensor) -> Proportion:
    """The share of hits with its 95 % interval."""
    return wilson(int(hits.sum()), len(hits))


def table(rows: list[Localised]) -> Table:
    """The rows as people read them."""
    drawn = Table(
        "asks for", *(row.asks_for for row in rows), box=box.SIMPLE, title="per cent of images, 95 % interval"
    )
    drawn.add_row("n", *(str(row.n) for row in rows))
    drawn.add_row("answered rightly", *(text(row.right) for row in rows))
    drawn.add_row("maximum on the thing asked about", *(text(row.hits) for row in rows))
    drawn.add_row("  by chance", *(f"{100 * row.chance:.0f}" for row in rows))
    drawn.add_row("maximum on another thing", *(text(row.on_other) for row in rows))
    drawn.add_row("more on it than on another (by chance 50)", *(text(row.asked_thing) for row in rows))
    drawn.add_row("more on it than when not asked about (50)", *(text(row.moves) for row in rows))
    return drawn


def text(proportion: Proportion) -> str:
    """In per cent."""
    value, low, high = (100 * part for part in proportion)
    return f"{value:.0f} ({low:.0f}, {high:.0f})"


def draw_maps(model: Answerer, scenes: Scenes, path: Path) -> None:
    """A row per scene: the picture, and over it the maps of the right answers to four questions about two things."""
    asked = [ask(scenes.shapes[:, :2], scenes.colours[:, :2], of_colour) for of_colour in (True, False)]
    questions, answers = torch.cat([asked[0][0], asked[1][0]], dim=1), torch.cat([asked[0][1], asked[1][1]], dim=1)
    maps = explain_answers(model, scenes.images, questions, answers).maps
    rows = []
    for row, image in enumerate(scenes.images):
        picture = Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy())
        tiles = [("", picture.resize((256, 256)))]
        for question, answer, heat in zip(questions[row], answers[row], maps[:, row], strict=True):
            asked_for = " ".join(WORDS[word] for word in question).removesuffix(" ?")
            shown = overlay(picture, (heat / heat.max().clamp_min(1e-30)).numpy())
            tiles.append((f"{asked_for}? {ANSWERS[answer]}", shown))
        rows.append(tiles)
    path.parent.mkdir(parents=True, exist_ok=True)
    side_by_side(rows).save(path)


def main(arguments: Sequence[str] | None = None) -> list[Localised]:
    """Train, explain, and say where the maps lie."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=2000, help="to train on")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/vqa"))
    options = parser.parse_args(arguments)

    pl.seed_everything(options.seed)
    train, held_out = draw_scenes(options.scenes, seed=options.seed), draw_scenes(300, seed=options.seed + 1_000_000)
    model = Answerer()
    trainer = pl.Trainer(
        max_epochs=options.epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(train.images, train.shapes, train.colours), 32, shuffle=True))

    rows = localise(model, held_out)
    draw_maps(model, held_out.first(6), options.out / "answers.png")
    console = Console()
    console.print(table(rows))
    console.print(f"pictures: {options.out / 'answers.png'}")
    return rows


if __name__ == "__main__":
    main()
