"""README.md: each of its blocks runs as it is written, its links lead somewhere, its figures are those of the records.

What a block takes for granted is made here: pictures of which a net made by hand decides by the corner, annotated as
the README's example has it.
"""

from __future__ import annotations

import csv
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from planted import CLASSES, CORNER, CORNERS, MIDDLE, SIDE, Planted, write_planted
from pytorch_lightning import Trainer
from scipy.stats import binomtest
from snippets import ROOT, blocks, run_bash, run_python
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from bias_audit import AuditBatch, AuditDataset, Policy, read_run
from bias_audit.attribution.methods import METHODS
from bias_audit.cli import app
from bias_audit.terms import Verdict

README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
# One more, or one less, and this fails: each has a test of its own.
DEMO, TRAIN, EXPLAIN, POLICY, LOOK = blocks(README)
PER_CELL = 20
QUANTUS = "grad-cam + Quantus"
# What the README's example calls the two classes, and the colours of the corner.
LABELS = dict(zip(CLASSES, ("doctor", "nurse"), strict=True))
GENDERS = dict(zip(CORNERS, ("male", "female"), strict=True))
# The corner is the face. The stethoscope is a part of the coat, on one of two pictures, and the hair is plain grey.
BOXES = {
    "coat": (MIDDLE.start, MIDDLE.start, 10, 10),
    "stethoscope": (MIDDLE.start + 3, MIDDLE.start + 2, 4, 6),
    "face": (CORNER.start, CORNER.start, 7, 7),
    "hair": (SIDE - 9, 2, 6, 6),
}


class Still(Planted):
    """Trained in steps of no size: it goes on deciding by the corner, or the face."""

    def training_step(self, batch: AuditBatch, _index: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch.images), batch.labels)

    def validation_step(self, batch: AuditBatch, _index: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch.images), batch.labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the README takes it for granted: images, instances.json, labels.csv, train.csv, audit.yaml."""
    root = write_planted(tmp_path_factory.mktemp("readme"), PER_CELL)
    with (root / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    polygons = {
        name: [x, y, x + width, y, x + width, y + height, x, y + height]
        for name, (x, y, width, height) in BOXES.items()
    }
    annotations = [
        {"image_id": i, "category_id": c, "segmentation": [polygon], "iscrowd": 0, "bbox": BOXES[name], "area": 1}
        for i in range(len(rows))
        for c, (name, polygon) in enumerate(polygons.items())
        if name != "stethoscope" or i % 2
    ]
    coco = {
        "images": [{"id": i, "file_name": r["file"], "width": SIDE, "height": SIDE} for i, r in enumerate(rows)],
        "categories": [{"id": c, "name": name} for c, name in enumerate(polygons)],
        "annotations": [a | {"id": i} for i, a in enumerate(annotations)],
    }
    (root / "instances.json").write_text(json.dumps(coco))
    for source, target, columns in (("labels", "labels", ["file"]), ("training", "train", [])):
        with (root / f"{source}.csv").open(newline="") as file:
            table = list(csv.DictReader(file))
        with (root / f"{target}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*columns, "label", "gender"])
            writer.writerows([*(r[c] for c in columns), LABELS[r["label"]], GENDERS[r["colour"]]] for r in table)
    (root / "audit.yaml").write_text(POLICY.text)
    return root


@pytest.fixture(scope="module")
def names(project: Path) -> dict[str, Any]:
    """What the blocks name and a reader has: a model, its loaders, its transform, a batch."""
    transform = v2.ToDtype(torch.float32, scale=True)
    regions = {"object": ["coat"], "spurious": ["face"]}
    pictures = AuditDataset.from_coco(
        project / "instances.json", project / "images", labels=project / "labels.csv", transform=transform, **regions
    )
    loader = DataLoader(pictures, batch_size=24, collate_fn=AuditBatch.collate)
    batch = pictures.batch(range(8))
    return {
        "Trainer": Trainer,
        "evaluation_transform": transform,
        "model": Still(on_corner=0.9),
        "train_loader": loader,
        "val_loader": loader,
        "images": batch.images,
        "labels": batch.labels,
    }


def test_a_training_as_shown_is_audited_and_its_merge_refused(project: Path, names: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        run_python(TRAIN, names)
    run = read_run(project / "lightning_logs/version_0")
    assert [audit.trigger for audit in run.audits] == ["reference"] + ["validation"] * 5
    verdicts = {f.name: f.verdict for f in run.audits[-1].judgement.findings}
    assert verdicts == {"face": "reliance", "hair": "cleared", "gender": "reliance"}

    (project / "lightning_logs/version_0/bias_audit/report.html").unlink(missing_ok=True)
    done = run_bash(LOOK, project)
    assert done.returncode == 1, done.stderr
    drawn, *said = done.stdout.splitlines()
    assert (project / drawn).name == "report.html" and (project / drawn).stat().st_size > 100_000
    assert "gate: violated: verdict on region face: reliance" in " ".join(" ".join(said).split())


def test_heatmaps_as_shown(names: dict[str, Any]) -> None:
    net = names["model"]
    before = {name: value.clone() for name, value in net.state_dict().items()}, net.training
    heatmaps = run_python(EXPLAIN, dict(names))["heatmaps"]
    # Of a 1 x 1 convolution: the grid is the image's own.
    assert heatmaps.maps.shape == (8, SIDE, SIDE) and heatmaps.maps.dtype == torch.float32
    assert all(torch.equal(before[0][name], value) for name, value in net.state_dict().items())
    assert net.training == before[1] and all(p.grad is None for p in net.parameters())


def test_the_policy_is_one_and_begins_with_the_default() -> None:
    policy, default = Policy.model_validate(yaml.safe_load(POLICY.text)), Policy()
    assert policy.rules[:2] == default.rules[:2] and {r.severity for r in default.rules[2:]} == {"warn"}


def test_the_demo_is_what_the_slow_tests_run() -> None:
    """The one block that is not run here: it makes an environment, and trains for minutes.

    `bias-audit demo` is run by tests/test_demo.py; environments are made by `make wheel` and `make lowest`.
    """
    assert DEMO.text.split("#")[0].strip() == "make demo"
    planned = subprocess.run(
        ["make", "--no-print-directory", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert planned.splitlines()[-1] == ".venv/bin/bias-audit demo --out demo"
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert {"make test-slow", "make wheel", "make lowest"} <= set(ci)


def test_links_lead_somewhere() -> None:
    targets = [t for t in re.findall(r"\]\(([^)]+)\)", TEXT) if not t.startswith("https://")]
    assert len(targets) > 20
    for target in targets:
        path, _, anchor = target.partition("#")
        assert (ROOT / path).exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


def test_commands_verdicts_examples_and_methods_are_those_that_there_are() -> None:
    commands = typer.main.get_command(app).commands
    named = set(re.findall(r"`bias-audit (\w+)", TEXT)) | set(re.findall(r"^bias-audit (\w+)", LOOK.text, re.MULTILINE))
    named |= set(re.findall(r"`(\w+)`", re.search(r"Further commands.*?\(", TEXT, re.DOTALL)[0]))
    assert named <= set(commands)
    assert set(re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)) == {str(verdict) for verdict in Verdict}
    examples = {path.name for path in (ROOT / "examples").glob("*.py")} | {"lightning_cli"}
    of_table = "".join(line for line in TEXT.splitlines() if line.startswith("| `") and (".py" in line))
    assert set(re.findall(r"`([\w.]+)/?`", of_table)) == examples
    assert f"| explanations | {len(METHODS)}: " in TEXT


def test_costs_are_those_of_the_benchmark() -> None:
    """The first number of each cell of the last column but one, "0.98 [0.85, 1.04]"."""
    (page,) = {ROOT / path for path in re.findall(r"benchmarks/results/intel[\w-]+\.md", TEXT)}
    ratios: dict[str, dict[str, str]] = {}
    for model, table in re.findall(r"^\*\*(\w+)\*\*, (?:explan|compl).*?\n\n(.*?)\n\n", page.read_text(), re.M | re.S):
        rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:]]
        ratios.setdefault(model, {}).update({row[0]: row[3].split(" ")[0] for row in rows})
    columns = ("bias-audit: explanation", "bias-audit: complete audit", "torchcam", "captum", "grad-cam", QUANTUS)
    shown = {"resnet18": "ResNet-18", "resnet50": "ResNet-50", "convnext_tiny": "ConvNeXt-T", "vit_b_16": "ViT-B/16"}
    for model, title in shown.items():
        cells = [ratios[model].get(column, "") for column in columns]
        # Captum takes no tokens.
        assert f"| {title} | {' | '.join(cells)} |".replace("|  |", "| |") in TEXT


def test_shares_are_those_of_the_power_study() -> None:
    models = json.loads((ROOT / "benchmarks/results/power.json").read_text())["models"]
    drops = [m["truth"]["aligned"] - m["truth"]["flipped"] for m in models]
    used = [m for m, drop in zip(models, drops, strict=True) if drop >= 0.2]
    unused = [m for m, drop in zip(models, drops, strict=True) if drop <= 0.05]

    def share(found: list[Any], rule: str) -> str:
        count = sum(m[rule] == "reliance" for m in found)
        interval = binomtest(count, len(found)).proportion_ci(method="wilson")
        return f"{count / len(found):.0%} [{100 * interval.low:.0f}, {100 * interval.high:.0f}]".replace("%", " %")

    said = " ".join(TEXT.split())
    assert len(models) == 400
    assert f"{share(used, 'without_swaps')} of the used cues" in said
    assert f"and {share(unused, 'without_swaps')} of those not used" in said
    with_swap = [share(found, "region").split(" [")[0] for found in (used, unused)]
    assert f"({with_swap[0]} and {with_swap[1]} with a swap" in said
