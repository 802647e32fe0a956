"""The doctor/nurse study of the Grad-CAM paper (arXiv 1610.02391, section 6.3), on generated scenes, with many seeds.

Networks alike are trained on biased scenes and on as many balanced ones, tested on gender-balanced scenes of their own,
and audited on others. What this says of the tool is in docs/doctor_nurse.md, which the second command makes.

python examples/doctor_nurse.py                                          # two seeds, small: about a minute
python examples/doctor_nurse.py --full --seeds 20 --jobs 2 --out docs    # the study: about an hour
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytorch_lightning as pl
import scipy.stats
import torch
import vl_convert
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from bias_audit import AuditDataset, AuditPlan, audit_model
from bias_audit.data.metadata import Metadata
from bias_audit.data.scenes import (
    GENDERS,
    OCCUPATIONS,
    balanced_scenes,
    bayes_accuracy,
    counts_with_bias,
    draw_scenes,
    swap_gender,
)
from bias_audit.demo import AUDITED_PER_CELL, DATA, EPOCHS, PER_CLASS, SIZE, TRANSFORM, SceneClassifier
from bias_audit.terms import Verdict

PAPER = {"biased": 0.82, "balanced": 0.90}
# Of fewer networks an interval says nothing.
FEWEST = 5
BEGIN, END = "<!-- results -->", "<!-- end of results -->"


@dataclass(frozen=True)
class Settings:
    """How big a training is, and on how many scenes of each occupation and gender it is tested and audited."""

    size: int
    per_class: int
    epochs: int
    per_cell: int

    @property
    def steps(self) -> int:
        """Steps of the optimizer."""
        return self.epochs * (2 * self.per_class // 32)


SMALL = Settings(size=64, per_class=300, epochs=8, per_cell=60)
FULL = Settings(SIZE, PER_CLASS, EPOCHS, AUDITED_PER_CELL)


@dataclass(frozen=True)
class Tested:
    """One network: its accuracy on the test scenes, and what an audit of other scenes says of it.

    `usual` is the accuracy where gender goes with occupation as in the biased data, `unusual` that where it does not,
    `redrawn` the share of decisions that change when a scene is drawn again as the other gender. `verdicts` are
    (finding, verdict) pairs.
    """

    training: str
    seed: int
    accuracy: float
    female_doctors: float
    male_doctors: float
    female_nurses: float
    male_nurses: float
    usual: float
    unusual: float
    redrawn: float
    verdicts: tuple[tuple[str, str], ...]


def trained(training: str, seed: int, settings: Settings, cache: Path) -> SceneClassifier:
    """The network of one training set and seed, from the cache if it was trained before."""
    path = cache / f"{training}-{seed:02d}.pt"
    if not path.exists():
        net = train(training, seed, settings)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
    net = SceneClassifier(settings.steps)
    net.load_state_dict(torch.load(path, weights_only=True))
    return net.eval()


def train(training: str, seed: int, settings: Settings) -> SceneClassifier:
    """A network trained on scenes drawn with this seed, as the demo trains it."""
    scenes = draw_scenes(counts_with_bias(settings.per_class, *DATA[training]), 3 * seed, settings.size)
    images = TRANSFORM(torch.stack([torch.from_numpy(scene.image.copy()) for scene in scenes]))
    labels = torch.tensor([OCCUPATIONS.index(scene.occupation) for scene in scenes])
    batches = DataLoader(
        TensorDataset(images, labels),
        batch_size=32,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
        drop_last=True,
    )
    pl.seed_everything(seed, verbose=False)
    net = SceneClassifier(settings.steps)
    pl.Trainer(
        max_epochs=settings.epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    ).fit(net, batches)
    return net


def metadata(training: str, per_class: int) -> Metadata:
    """Label and gender of every scene of a training set."""
    cells = counts_with_bias(per_class, *DATA[training])
    rows = [(OCCUPATIONS.index(o), gender) for (o, gender), count in cells.items() for _ in range(count)]
    return Metadata.of([label for label, _ in rows], {"gender": [gender for _, gender in rows]})


@torch.no_grad()
def decisions(net: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """The predicted classes of uint8 images `(N, 3, size, size)`."""
    return torch.cat([net(TRANSFORM(some)).argmax(dim=1) for some in torch.split(images, 250)])


def measured(net: Callable[[Tensor], Tensor], test: AuditDataset) -> dict[str, float]:
    """The accuracies of `Tested`, and the share of decisions that redrawing changes, by scenes and decisions alone."""
    labels, genders = torch.from_numpy(test.labels), test.attribute_table[:, 0]
    others = [GENDERS[1 - GENDERS.index(gender)] for gender in genders]
    decided, redrawn = (
        decisions(net, torch.stack([swap_gender(s, g) for s, g in zip(test.samples, shown, strict=True)]))
        for shown in (genders, others)
    )
    doctor = labels == OCCUPATIONS.index("doctor")
    male = torch.from_numpy(genders == "male")
    which = {
        "accuracy": torch.ones_like(doctor),
        "female_doctors": doctor & ~male,
        "male_doctors": doctor & male,
        "female_nurses": ~doctor & ~male,
        "male_nurses": ~doctor & male,
        "usual": doctor == male,
        "unusual": doctor != male,
    }
    right = (decided == labels).double()
    rates = {name: right[of].mean().item() for name, of in which.items()}
    rates["redrawn"] = (decided != redrawn).double().mean().item()
    return {name: round(rate, 4) for name, rate in rates.items()}


def verdicts(net: SceneClassifier, scenes: AuditDataset, training: Metadata) -> tuple[tuple[str, str], ...]:
    """What an audit says of each region and of gender; it may redraw scenes, and knows the training set's columns."""
    # That the map of a head of pooling and one linear layer shows what the score is made of needs no test.
    plan = AuditPlan(
        batch_size=100,
        max_samples=len(scenes),
        fitness_samples=0,
        intervention_samples=400,
        swaps={"gender": swap_gender},
    )
    result = audit_model(net, scenes, plan=plan, training=training)
    return tuple((f"{f.kind} {f.name}", str(f.verdict)) for f in result.judgement.findings)


def one(job: tuple[str, int], settings: Settings, cache: Path, again: bool) -> Tested:
    """Train, test and audit one network, or read what came of it; alone in its process it keeps to one thread."""
    path = cache / "{}-{:02d}.json".format(*job)
    if path.exists() and not again:
        row = json.loads(path.read_text())
        return Tested(**{**row, "verdicts": tuple((name, verdict) for name, verdict in row["verdicts"])})
    torch.set_num_threads(1)
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on loaders
        training, seed = job
        net = trained(training, seed, settings, cache)
        # Scenes of other seeds than the training's: one set to test on, another to audit.
        test = balanced_scenes(settings.per_cell, 3 * seed + 1, settings.size)
        audited = balanced_scenes(settings.per_cell, 3 * seed + 2, settings.size, TRANSFORM)
        said = verdicts(net, audited, metadata(training, settings.per_class))
        found = Tested(training, seed, **measured(net, test), verdicts=said)
    path.write_text(json.dumps(asdict(found)))
    return found


def study(settings: Settings, seeds: int, jobs: int, cache: Path, again: bool) -> list[Tested]:
    """Every network of the study; what lies in the cache is not done again, but for tests and audits if `again`."""
    todo = [(training, seed) for seed in range(seeds) for training in DATA]
    work = partial(one, settings=settings, cache=cache, again=again)
    rows = []
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for row in (pool.map if jobs > 1 else map)(work, todo):
            rows.append(row)
            named = ", ".join(f"{name} {verdict}" for name, verdict in row.verdicts)
            print(
                f"{len(rows)}/{len(todo)} {row.training} {row.seed}: accuracy {row.accuracy:.3f}; {named}", flush=True
            )
    return rows


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval of Student's t over networks, each with training data, weights and test scenes of its own.

    Of fewer than `FEWEST` the interval is NaN.
    """
    mean = statistics.fmean(values)
    if len(values) < FEWEST:
        return mean, math.nan, math.nan
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def as_markdown(rows: Sequence[Tested]) -> str:
    """The results as tables."""
    by_training = {training: [row for row in rows if row.training == training] for training in DATA}

    def cell(values: Sequence[float]) -> str:
        mean, low, high = (100 * x for x in interval(values))
        return f"{mean:.1f} %" if math.isnan(low) else f"{mean:.1f} % [{low:.1f}, {high:.1f}]"

    lines = ["| | biased | balanced | balanced − biased |", "| --- | --- | --- | --- |"]
    lines.append(
        f"| paper (photographs, one network each) | {cell([PAPER['biased']])} | {cell([PAPER['balanced']])} | 8.0 % |"
    )
    titles = {
        "accuracy": "accuracy",
        "female_doctors": "– female doctors",
        "male_doctors": "– male doctors",
        "female_nurses": "– female nurses",
        "male_nurses": "– male nurses",
        "usual": "– gender as usual in the biased data",
        "unusual": "– gender the other way",
        "redrawn": "decisions that change when the scene is redrawn as the other gender",
    }
    for name, title in titles.items():
        columns = [[getattr(row, name) for row in of] for of in by_training.values()]
        change = [after - before for before, after in zip(*columns, strict=True)]
        lines.append(f"| {title} | {' | '.join(map(cell, (*columns, change)))} |")
    lines += ["", "| verdict | on | biased | balanced |", "| --- | --- | --- | --- |"]
    for finding in dict.fromkeys(name for row in rows for name, _ in row.verdicts):
        counts = [Counter(dict(row.verdicts)[finding] for row in of) for of in by_training.values()]
        for verdict in Verdict:
            if any(count[verdict] for count in counts):
                cells = " | ".join(
                    f"{count[verdict]} of {len(of)}" for count, of in zip(counts, by_training.values(), strict=True)
                )
                lines.append(f"| {verdict} | {finding} | {cells} |")
    return "\n".join(lines)


def draw(rows: Sequence[Tested]) -> str:
    """Each network's accuracy as a dot, their mean with its interval, the paper's numbers and the best possible."""
    groups = {"accuracy": "all", "usual": "gender as usual", "unusual": "gender the other way"}
    dots = [{"training": r.training, "on": title, "y": getattr(r, n)} for r in rows for n, title in groups.items()]
    means = []
    for training in DATA:
        for name, title in groups.items():
            mean, low, high = interval([getattr(r, name) for r in rows if r.training == training])
            means.append({"training": training, "on": title, "y": mean, "low": low, "high": high})
    paper = [{"training": training, "on": "all", "y": accuracy} for training, accuracy in PAPER.items()]
    x = {"field": "on", "sort": list(groups.values()), "title": None, "axis": {"labelAngle": 0}}
    y = {"field": "y", "type": "quantitative", "title": "accuracy", "axis": {"format": "%"}, "scale": {"zero": False}}
    offset = {"field": "training", "sort": list(DATA)}
    colour = {
        "field": "training",
        "sort": list(DATA),
        "title": None,
        "scale": {"range": ["#d55e00", "#0072b2"]},
        "legend": {"orient": "top"},
    }
    place = {"x": {**x, "type": "nominal"}, "xOffset": offset, "y": y}
    layers = [
        {
            "data": {"values": [{"y": bayes_accuracy()}]},
            "mark": {"type": "rule", "strokeDash": [4, 3]},
            "encoding": {"y": y},
        },
        {
            "data": {"values": [{"y": bayes_accuracy(), "text": "best without gender"}]},
            "mark": {"type": "text", "align": "right", "dy": -6, "x": "width"},
            "encoding": {"y": y, "text": {"field": "text"}},
        },
        {
            "data": {"values": dots},
            "mark": {"type": "point", "filled": True, "opacity": 0.35, "size": 25},
            "encoding": {**place, "color": colour},
        },
        {
            "data": {"values": means},
            "mark": {"type": "rule", "strokeWidth": 2},
            "encoding": {**place, "y": {**y, "field": "low"}, "y2": {"field": "high"}},
        },
        {
            "data": {"values": means},
            "mark": {"type": "tick", "thickness": 2, "width": 18, "color": "black"},
            "encoding": place,
        },
        {
            "data": {"values": paper},
            "mark": {"type": "point", "shape": "diamond", "size": 90, "color": "black"},
            "encoding": place,
        },
    ]
    spec = {"width": {"step": 60}, "height": 300, "background": "white", "layer": layers}
    svg: str = vl_convert.vegalite_to_svg(spec)
    return svg


def write(rows: Sequence[Tested], settings: Settings, out: Path) -> None:
    """The rows as JSON, their figure, and their tables put into the page between its two marks."""
    out.mkdir(parents=True, exist_ok=True)
    record = {"settings": asdict(settings), "bayes_accuracy": bayes_accuracy(), "networks": [asdict(r) for r in rows]}
    (out / "doctor_nurse.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / "doctor_nurse.svg").write_text(draw(rows) + "\n")
    page = out / "doctor_nurse.md"
    text = page.read_text() if page.exists() else f"{BEGIN}\n{END}\n"
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{as_markdown(rows)}\n{END}{after}")


def main() -> None:
    """Run the study and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="trainings as big as the demo's")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--cache", type=Path, default=Path("runs/doctor_nurse"), help="folder of weights and rows")
    parser.add_argument("--again", action="store_true", help="test and audit the cached networks anew")
    parser.add_argument("--out", type=Path, default=Path("runs/doctor_nurse"))
    options = parser.parse_args()
    settings = FULL if options.full else SMALL
    cache = options.cache / f"{settings.size}px-{settings.per_class}-{settings.epochs}"
    rows = study(settings, options.seeds, options.jobs, cache, options.again)
    write(rows, settings, options.out)
    print(as_markdown(rows))


if __name__ == "__main__":
    main()
