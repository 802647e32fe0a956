"""Captioning: does the heatmap of the word "woman" lie on the woman?

A CNN and an LSTM learn to caption generated scenes: two people, each a woman, a man or a child, and a ball, a kite or a
dog, such as "a woman and a man with a kite". Who is mentioned first is a coin's toss, so both people are equally likely
as the first word: asked about either, the same image, caption and network must give another map. As in the Grad-CAM
paper (arXiv 1610.02391, "Image Captioning") what is explained is the gradient of a log probability, and the network has
no attention: the LSTM reads image features averaged over all places.

    python examples/captioning.py            # about half a minute; pictures in runs/captioning
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
import torch
from PIL import Image, ImageDraw
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.ops import Conv2dNormActivation

from bias_audit import Heatmaps, explain
from bias_audit.attribution.targets import CaptionLogProbability, WordLogProbability
from bias_audit.localization import energy_share, enrichment, pointing_game, project_regions
from bias_audit.overlays import overlay, side_by_side
from bias_audit.stats import wilson

PEOPLE, THINGS = ("woman", "man", "child"), ("ball", "kite", "dog")
WORDS = ("<start>", "<end>", "a", "and", "with", *PEOPLE, *THINGS)
NUMBER = {word: number for number, word in enumerate(WORDS)}
# <start> a FIRST and a SECOND with a THING <end>: where the three words that speak of the image stand.
FIRST, SECOND, THING, LENGTH = 2, 5, 8, 10
SIDE, SUBPIXELS = 64, 3

Points = Sequence[tuple[float, float]]
Colour = tuple[int, ...]
Paint = Callable[[Points, Colour], None]


@dataclass(frozen=True)
class Scenes:
    """Images `(N, 3, 64, 64)`, 0 to 1; tokens `(N, 10)` of their captions; masks `(N, 3, 64, 64)` of what the caption's
    first person, second person and thing fill."""

    images: Tensor
    tokens: Tensor
    masks: Tensor

    def first(self, count: int) -> Scenes:
        """The first `count` of them."""
        return Scenes(self.images[:count], self.tokens[:count], self.masks[:count])


def draw_scenes(count: int, seed: int) -> Scenes:
    """`count` scenes with their captions."""
    rng = np.random.default_rng(seed)
    images, tokens, masks = zip(*(draw_scene(rng) for _ in range(count)), strict=True)
    return Scenes(
        torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255,
        torch.tensor(tokens),
        torch.from_numpy(np.stack(masks)),
    )


def draw_scene(rng: np.random.Generator) -> tuple[npt.NDArray[np.uint8], list[int], npt.NDArray[np.bool_]]:
    """One picture, its caption, and what each of the caption's three fills."""
    size = SIDE * SUBPIXELS
    picture, regions = Image.new("RGB", (size, size), colour(rng, 150, 235)), Image.new("L", (size, size))
    on_picture, on_regions = ImageDraw.Draw(picture), ImageDraw.Draw(regions)
    on_picture.rectangle((0, rng.uniform(44, 52) * SUBPIXELS, size, size), fill=colour(rng, 90, 190))
    for left, top, width, height in rng.uniform([0, 0, 5, 5], [50, 30, 16, 16], (rng.integers(1, 4), 4)) * SUBPIXELS:
        on_picture.rectangle((left, top, left + width, top + height), fill=colour(rng, 100, 240))

    def brush(region: int, x: float, y: float, scale: float) -> Paint:
        def paint(points: Points, fill: Colour) -> None:
            placed = [((x + scale * a) * SUBPIXELS, (y + scale * b) * SUBPIXELS) for a, b in points]
            on_picture.polygon(placed, fill=fill)
            on_regions.polygon(placed, fill=region)

        return paint

    people, thing = rng.permutation(PEOPLE)[:2], str(rng.choice(THINGS))
    columns = 11 + 21 * rng.permutation(3) + rng.uniform(-1.5, 1.5, 3)
    for region, person in enumerate(people):
        scale = rng.uniform(0.88, 1.0) * (0.75 if person == "child" else 1)
        paint_person(brush(1 + region, columns[region], rng.uniform(54, 59), scale), person, rng)
    height = {"ball": rng.uniform(30, 52), "kite": rng.uniform(12, 36), "dog": rng.uniform(48, 53)}[thing]
    paint_thing(brush(3, columns[2], height, rng.uniform(1.2, 1.5)), thing, rng)

    noisy = np.asarray(picture.reduce(SUBPIXELS)) + rng.normal(0, 5, (SIDE, SIDE, 3))
    middle = np.asarray(regions)[SUBPIXELS // 2 :: SUBPIXELS, SUBPIXELS // 2 :: SUBPIXELS]
    masks = np.stack([middle == region for region in (1, 2, 3)])
    caption = f"<start> a {people[0]} and a {people[1]} with a {thing} <end>"
    return noisy.clip(0, 255).astype(np.uint8), [NUMBER[word] for word in caption.split()], masks


def colour(rng: np.random.Generator, low: int, high: int) -> Colour:
    """Any colour between two greys: no colour tells who or what it is."""
    return tuple(rng.integers(low, high, 3).tolist())


def paint_person(paint: Paint, person: str, rng: np.random.Generator) -> None:
    """A standing figure, 48 high, the ground at 0: a pleated dress, a jacket with a tie, or a striped shirt."""
    skin = ((240, 200, 170), (190, 135, 95), (110, 72, 52))[rng.integers(3)]
    hair, top, bottom = colour(rng, 20, 110), colour(rng, 40, 230), colour(rng, 30, 200)
    if person == "woman":
        paint([(-5, -46), (5, -46), (7, -30), (-7, -30)], hair)
        for side in (-1, 1):
            paint([(2.5 * side, -10), (side, -10), (side, 0), (2.5 * side, 0)], skin)
        paint([(-4, -34), (4, -34), (3, -24), (9, -8), (-9, -8), (-3, -24)], top)
        for pleat in (-2, 0, 2):
            paint([(pleat - 0.5, -24), (pleat + 0.5, -24), (3 * pleat + 1, -8), (3 * pleat - 1, -8)], darker(top))
    elif person == "man":
        paint([(-5.5, -20), (5.5, -20), (5.5, 0), (1, 0), (0, -14), (-1, 0), (-5.5, 0)], bottom)
        paint([(-7, -34), (7, -34), (6, -18), (-6, -18)], top)
        paint([(-4, -34), (4, -34), (0, -21)], (245, 245, 240))
        paint([(-1, -34), (1, -34), (1.3, -24), (0, -22), (-1.3, -24)], darker(top))
    else:
        paint([(-5, -20), (5, -20), (5, -12), (0, -13), (-5, -12)], bottom)
        for side in (-1, 1):
            paint([(4 * side, -12), (2 * side, -12), (2 * side, 0), (4 * side, 0)], skin)
        paint([(-6, -34), (6, -34), (5, -19), (-5, -19)], top)
        for stripe in (-32, -28, -24):
            paint([(-6, stripe), (6, stripe), (6, stripe + 2), (-6, stripe + 2)], (245, 245, 240))
    for side in (-1, 1):
        paint([(4 * side, -34), (6.5 * side, -33), (9.5 * side, -21), (7.5 * side, -20)], top)
    paint(ellipse(0, -40, 4.5, 6), skin)
    paint([(-5, -41), (-4.5, -46), (0, -48), (4.5, -46), (5, -41), (3, -44), (-3, -44)], hair)


def paint_thing(paint: Paint, thing: str, rng: np.random.Generator) -> None:
    """A thing about 12 wide round the origin: a ball with a band, a kite in two colours or a dog with a spot."""
    fill = colour(rng, 30, 240)
    other = tuple(255 - value for value in fill)
    if thing == "ball":
        paint(ellipse(0, 0, 5, 5), fill)
        paint([(-5, -1), (5, -1), (5, 1), (-5, 1)], other)
    elif thing == "kite":
        paint([(0, -8), (5, -1), (0, 7), (-5, -1)], fill)
        paint([(0, -8), (5, -1), (0, 7)], other)
    else:
        outline = [(-6, -4), (3, -4), (3, -7), (7, -7), (7, -3), (4, -1), (4, 5), (2, 5), (2, 1), (-4, 1), (-4, 5)]
        facing = rng.choice((-1, 1))
        paint([(facing * x, y) for x, y in [*outline, (-6, 5)]], fill)
        paint(ellipse(-2 * facing, -1.5, 2, 1.5), other)


def darker(fill: Colour) -> Colour:
    """The same colour in shadow."""
    return tuple(value // 2 for value in fill)


def ellipse(x: float, y: float, width: float, height: float) -> Points:
    """Its outline."""
    return [(x + width * np.cos(angle), y + height * np.sin(angle)) for angle in np.linspace(0, 2 * np.pi, 24)]


class Captioner(pl.LightningModule):
    """An LSTM that reads the image's features, averaged over all places, with every word (after arXiv 1411.4389)."""

    def __init__(self) -> None:
        super().__init__()
        # A last map of 16 x 16: what is explained should be no coarser than what is drawn. And no normalisation of its
        # averages: that would scale up features that hardly vary, and maps would show where those happen to be.
        self.features = nn.Sequential(
            Conv2dNormActivation(3, 16, kernel_size=5, stride=2),
            nn.MaxPool2d(2),
            Conv2dNormActivation(16, 32),
            Conv2dNormActivation(32, 48),
            Conv2dNormActivation(48, 48),
        )
        self.embedding = nn.Embedding(len(WORDS), 32)
        self.lstm = nn.LSTM(32 + 48, 64, batch_first=True)
        self.words = nn.Linear(64, len(WORDS))

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Logits `(B, T, words)` under teacher forcing: at step t of the word after `tokens[:, t]`."""
        seen = self.features(images).mean(dim=(2, 3))[:, None].expand(-1, tokens.shape[1], -1)
        return self.words(self.lstm(torch.cat([self.embedding(tokens), seen], dim=2))[0])

    def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
        """Cross-entropy of every word; half of the batches are mirrored, which no caption minds."""
        images, tokens = batch
        images = images.flip(3) if torch.rand(()) < 0.5 else images
        logits, words = self(images, tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
        return nn.functional.cross_entropy(logits, words)

    def configure_optimizers(self) -> dict[str, object]:
        """AdamW, its rate rising and falling once."""
        optimizer = torch.optim.AdamW(self.parameters(), weight_decay=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=6e-3, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@torch.no_grad()
def describe(model: Captioner, images: Tensor) -> Tensor:
    """Captions `(B, 10)`, each word the most probable one after those before."""
    model.eval()
    tokens = torch.full((len(images), 1), NUMBER["<start>"])
    for _ in range(LENGTH - 1):
        tokens = torch.cat([tokens, model(images, tokens)[:, -1].argmax(dim=1, keepdim=True)], dim=1)
    return tokens


def described_rightly(captions: Tensor, scenes: Scenes) -> Tensor:
    """Whether each caption names the scene's people and thing, the people in either order: bool `(N,)`."""
    swapped = scenes.tokens.clone()
    swapped[:, [FIRST, SECOND]] = scenes.tokens[:, [SECOND, FIRST]]
    return (captions == scenes.tokens).all(dim=1) | (captions == swapped).all(dim=1)


def explain_words(model: nn.Module, scenes: Scenes) -> Heatmaps:
    """Maps `(4, N, 16, 16)` from one forward pass: of either person as the first word, of the thing, of the caption."""
    read, predicted = scenes.tokens[:, :-1], scenes.tokens[:, 1:]
    after_a, after_with_a = torch.full((len(read),), FIRST - 1), torch.full((len(read),), THING - 1)
    return explain(
        model,
        {"images": scenes.images, "tokens": read},
        forward_fn=lambda captioner, batch: captioner(batch["images"], batch["tokens"]),
        layer="features",
        target=[
            WordLogProbability(after_a, scenes.tokens[:, FIRST]),
            WordLogProbability(after_a, scenes.tokens[:, SECOND]),
            WordLogProbability(after_with_a, scenes.tokens[:, THING]),
            CaptionLogProbability(predicted),
        ],
    )


Proportion = tuple[float, float, float]


@dataclass(frozen=True)
class Localised:
    """Where a word's maps lie, over `n` images; a proportion is a value with its 95 % interval (Wilson).

    `hits` is the share of maps whose maximum lies on what the word names, `chance` what a maximum anywhere would give:
    the region's mean share of the area. For people, `on_other` is the share with the maximum on the other person in the
    image, `right_person` that with more energy per area on the one who is named; chance is 0.5. A silent map misses.
    """

    word: str
    n: int
    hits: Proportion
    chance: float
    on_other: Proportion | None = None
    right_person: Proportion | None = None


def localise(model: nn.Module, scenes: Scenes) -> list[Localised]:
    """One row per word, and one for whole captions, whose region is all three."""
    heatmaps = explain_words(model, scenes)
    regions = torch.cat([scenes.masks, scenes.masks.any(dim=1, keepdim=True)], dim=1)
    grid = project_regions(regions, (heatmaps.maps.shape[-2], heatmaps.maps.shape[-1]))
    # (4 maps, N, 4 regions): the map of word k should lie on region k.
    upsampled = heatmaps.upsample((SIDE, SIDE))
    hits = torch.stack([pointing_game(maps, regions).value for maps in upsampled]) > 0.5
    heat = torch.stack([enrichment(energy_share(maps, grid), grid.area).value for maps in heatmaps.maps])

    rows = []
    for word in PEOPLE:
        # Whoever is the caption's first or second person.
        named = [scenes.tokens[:, FIRST] == NUMBER[word], scenes.tokens[:, SECOND] == NUMBER[word]]
        own = torch.cat([hits[k, named[k], k] for k in (0, 1)])
        other = torch.cat([hits[k, named[k], 1 - k] for k in (0, 1)])
        right = torch.cat([heat[k, named[k], k] > heat[k, named[k], 1 - k] for k in (0, 1)])
        area = torch.cat([grid.area[named[k], k] for k in (0, 1)])
        rows.append(Localised(word, len(own), share(own), float(area.mean()), share(other), share(right)))
    for word in THINGS:
        shown = scenes.tokens[:, THING] == NUMBER[word]
        rows.append(Localised(word, int(shown.sum()), share(hits[2, shown, 2]), float(grid.area[shown, 2].mean())))
    return [*rows, Localised("(caption)", len(regions), share(hits[3, :, 3]), float(grid.area[:, 3].mean()))]


def share(hits: Tensor) -> Proportion:
    """The share of hits with its 95 % interval."""
    return wilson(int(hits.sum()), len(hits))


def table(rows: list[Localised]) -> Table:
    """The rows as people read them."""
    drawn = Table(box=box.SIMPLE, title="per cent of images, 95 % interval")
    for heading in ("word", "n", "maximum on it", "by chance", "on the other", "right person (by chance 50)"):
        drawn.add_column(heading)
    for row in rows:
        of_people = [text(proportion) for proportion in (row.on_other, row.right_person) if proportion]
        drawn.add_row(row.word, str(row.n), text(row.hits), f"{100 * row.chance:.0f}", *of_people)
    return drawn


def text(proportion: Proportion) -> str:
    """In per cent."""
    value, low, high = (100 * part for part in proportion)
    return f"{value:.0f} ({low:.0f}, {high:.0f})"


def draw_maps(model: Captioner, scenes: Scenes, path: Path) -> None:
    """A row per scene: the picture under the network's caption, and the map of each word over it."""
    captions, maps = describe(model, scenes.images), explain_words(model, scenes).maps
    titles = ["{} (as first word)", "{} (as first word)", "{}", "whole caption"]
    rows = []
    for row, image in enumerate(scenes.images):
        picture = Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy())
        words = " ".join(WORDS[token] for token in captions[row, 1:-1])
        tiles = [(words, picture.resize((256, 256)))]
        for title, heat, place in zip(titles, maps[:, row], (FIRST, SECOND, THING, THING), strict=True):
            shown = overlay(picture, (heat / heat.max().clamp_min(1e-30)).numpy())
            tiles.append((title.format(WORDS[scenes.tokens[row, place]]), shown))
        rows.append(tiles)
    path.parent.mkdir(parents=True, exist_ok=True)
    side_by_side(rows).save(path)


@dataclass(frozen=True)
class Outcome:
    """The share of held-out scenes that the network captions rightly, and where its words' maps lie."""

    right_captions: Proportion
    rows: list[Localised]


def main(arguments: Sequence[str] | None = None) -> Outcome:
    """Train, explain, and say where the maps lie."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=2000, help="to train on")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shuffled", action="store_true", help="train on the captions of other scenes: a control")
    parser.add_argument("--out", type=Path, default=Path("runs/captioning"))
    options = parser.parse_args(arguments)

    pl.seed_everything(options.seed)
    train, held_out = draw_scenes(options.scenes, options.seed), draw_scenes(300, options.seed + 1_000_000)
    tokens = train.tokens[torch.randperm(options.scenes)] if options.shuffled else train.tokens
    model = Captioner()
    trainer = pl.Trainer(
        max_epochs=options.epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(train.images, tokens), batch_size=32, shuffle=True))

    right = described_rightly(describe(model, held_out.images), held_out)
    outcome = Outcome(share(right), localise(model, held_out))
    draw_maps(model, held_out.first(6), options.out / "words.png")
    console = Console()
    console.print(f"{outcome.right_captions[0]:.0%} of {len(right)} held-out scenes captioned rightly")
    console.print(table(outcome.rows))
    console.print(f"pictures: {options.out / 'words.png'}")
    return outcome


if __name__ == "__main__":
    main()
