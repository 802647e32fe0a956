"""The pages of docs/: their blocks run as they are written, in the page's order; the site builds without a warning.

A block whose first line is `# name` is that file; `bias-audit` and `python` in bash blocks are run in this process;
what a `text` block shows behind a block is what that block prints. A page that another file tests is named with it.
"""

from __future__ import annotations

import csv
import json
import re
import runpy
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from howto_data import COUNT, SIDE, prepare
from snippets import ROOT, Block, blocks, run_python
from synthetic import make_run
from torch.utils.data import DataLoader, TensorDataset

from bias_audit.cli import main
from bias_audit.policies.file import read_policy

DOCS = ROOT / "docs"
TESTED_BY = {
    "regions.md": "tests/test_regions_howto.py",
    "extend.md": "tests/test_own.py",
    "gate.md": "tests/test_ci.py",
}
PAGES = sorted(
    path.relative_to(DOCS).as_posix()
    for path in DOCS.glob("**/*.md")
    if path.relative_to(DOCS).as_posix() not in TESTED_BY and blocks(path)
)
# Seconds each: several trainings, pictures of 224 pixels, a W&B run.
SLOW = {"tutorial.md", "run.md", "lightning_cli.md", "wandb.md"}

# Blocks that are not run here, by page and first line, and what runs the like.
ELSEWHERE = {
    ("tutorial.md", "python3 -m venv .venv"): "make wheel installs into a clean environment",
    ("multi_gpu.md", "import pytorch_lightning as pl"): "tests/test_ranks.py: ranks on CPUs",
    ("multi_gpu.md", "bias-audit run --model mypackage.models:make --weights last.pt --data data.yaml --out runs/ranks "
     "--accelerator cpu --devices 2"): "tests/test_run.py",
    ("run.md", "bias-audit run --model mypackage.models:Classifier --checkpoint last.ckpt --data data.yaml "
     "--out runs/last \\"): "tests/test_run.py: bfloat16 and eight devices are not everywhere",
    ("doctor_nurse.md", "python examples/doctor_nurse.py --full --seeds 20 --jobs 2 --out docs"): (
        "tests/test_doctor_nurse.py, a small one"
    ),
}  # fmt: skip
# Commands whose exit code is not 0, as the pages say but where a stand-in decides.
CODES = {
    "bias-audit gate runs/last --checkpoint last.ckpt": 3,  # of 24 images of noise
    "bias-audit gate runs/cli": 3,  # of the same
    "bias-audit gate runs/biased": 1,
    "bias-audit gate runs/balanced --policy strict.yaml": 3,
}

# What reliability.md says, and which figure of benchmarks/results/soak-*.json that is; bytes are said in KB.
RECORDED = {
    "scale": {
        "scores {:.0f} s": "scores, 100,000 samples: time",
        "statistics {:.0f} s": "statistics, 100,000 samples: time",
        "write {:.1f} s": "write, 100,000 samples: time",
        "read {:.1f} s": "read, 100,000 samples: time",
        "report {:.0f} s;": "report, 100,000 samples: time",
        "{:.1f} KB in scores": "scores: memory a further sample",
        "{:.1f} KB in statistics": "statistics: memory a further sample",
        "{:.1f} KB in the report": "report: memory a further sample",
    },
    "kill": {
        "{:.0f} kills in": "kills",
        "in {:.0f} trainings, ": "trainings",
        "{:.0f} lives": "lives that went on with the records, under the same run id",
    },
    "long": {"{:.2f} KiB an audit": "all kept: memory of the training per audit"},
    "ranks": {
        "killed: {:.1f} s": "until all ranks have ended, one killed, timeout 60 s",
        "stopped: {:.1f} s": "until all ranks have ended, one stopped, timeout 10 s",
    },
    "sinks": {
        "at most {:.1f} ms": "network comes and goes: longest that an audit was held up",
        "{:.0f} s of waiting": "network stalls for good: the end waited",
    },
}

NET = """
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def make():
    features = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.ReLU())
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))

class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = make()
    def forward(self, images):
        return self.net(images)
    def training_step(self, batch, index):
        images, labels = (batch.images, batch.labels) if hasattr(batch, "images") else batch
        return nn.functional.cross_entropy(self(images), labels)
    validation_step = training_step
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

class Photographs(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.rand(16, 3, 32, 32), torch.arange(16) % 2), batch_size=8)
"""
DATA = {
    "reader": "coco", "annotations": "instances.json", "images": "images", "labels": "labels.csv",
    "object": ["tie"], "spurious": {"hair": ["person"]}, "classes": ["doctor", "nurse"],
}  # fmt: skip


def supplied(page: str, folder: Path) -> dict[str, Any]:
    """What the page says that its reader has: files in the folder, and names for its Python."""
    prepare(page.removesuffix(".md"), folder)
    if page in ("tutorial.md", "vit.md"):
        return {}
    if not (folder / "instances.json").exists() and page not in ("masks.md", "boxes.md"):
        prepare("coco", folder)
    (folder / "mypackage").mkdir()
    (folder / "mypackage/__init__.py").write_text("from mypackage.models import Classifier, Photographs\n")
    (folder / "mypackage/models.py").write_text(NET)
    from mypackage.models import Classifier, make

    (folder / "data.yaml").write_text(yaml.safe_dump(DATA))
    (folder / "audit.yaml").write_text("rules:\n  - {metric: accuracy, min: 0.0}\n")
    if page == "run.md":  # It says after its first command what the command reads.
        (folder / "data.yaml").write_text(next(b.text for b in blocks(DOCS / page) if b.first == "# data.yaml"))
    rows = [(("doctor", "nurse")[i % 2], ("man", "woman")[i // 2 % 2]) for i in range(COUNT)]
    with (folder / "train.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("label", "gender"), *rows])
    torch.save(make().state_dict(), folder / "last.pt")
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, default_root_dir=folder, max_steps=0)
    trainer.strategy.connect(Classifier())
    trainer.save_checkpoint(folder / "last.ckpt", weights_only=True)
    for name in ("first", "second"):
        make_run(folder / "runs" / name)
    images, labels = torch.rand(COUNT, 3, SIDE, SIDE), torch.arange(COUNT) % 2
    dataset = TensorDataset(images, labels)
    given: dict[str, Any] = {
        "model": Classifier() if page != "mend.md" else make(),
        "dataset": dataset,
        "train_loader": DataLoader(dataset, batch_size=8),
        "val_loader": DataLoader(dataset, batch_size=8),
        "labels": [row[0] for row in rows],
        "genders": [row[1] for row in rows],
        "images": images,
        "image_labels": labels,
        "spurious_masks": torch.arange(SIDE).expand(COUNT, SIDE, SIDE) < 8,
    }
    if (folder / "instances.json").exists():
        from bias_audit.data.declared import read_declared

        given["audit_set"] = read_declared("data.yaml")
    return given


def run_command(command: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of one line, run in this process."""
    words = shlex.split(command, comments=True)
    with monkeypatch.context() as patched:
        try:
            if words[0] == "bias-audit":
                patched.setattr(sys, "argv", words)
                main()
            else:
                assert words[0] == "python", f"{command}: neither bias-audit nor python; name what runs it in ELSEWHERE"
                patched.setattr(sys, "argv", words[1:])
                runpy.run_path(words[1], run_name="__main__")
        except SystemExit as exit:
            return int(exit.code or 0)
    return 0


def run_block(block: Block, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    file = re.match(r"# ([\w/.-]+\.(?:py|yaml))$", block.first)
    if file:
        Path(file[1]).write_text(block.text)
    if block.language == "yaml":
        assert file, f"{block}: say which file it is in its first line"
        if "rules" in yaml.safe_load(block.text):
            read_policy(file[1])
    elif block.language == "bash":
        for line in block.text.replace("\\\n", " ").splitlines():
            if line.strip():
                code = run_command(line, monkeypatch)
                assert code == CODES.get(line.strip(), 0), f"{block.path.name}: {line}"
    elif block.language == "python" and not file:
        run_python(block, names)


def squeezed(text: str, digits: str | None = None) -> str:
    """In one line; with `digits` every number is that."""
    text = " ".join(re.sub(r"[│┃]", " ", text).split())
    return text if digits is None else re.sub(r"\d+(\.\d+)?", digits, text)


@pytest.mark.parametrize("page", [pytest.param(p, marks=[pytest.mark.slow] if p in SLOW else []) for p in PAGES])
def test_the_blocks_of_a_page_run(
    page: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    if page != "tutorial.md":  # It ends in the page; drawing it takes seconds.
        request.getfixturevalue("without_page")
    names = supplied(page, folder)
    capfd.readouterr()
    printed, by = "", ""
    for block in blocks(DOCS / page):
        if block.language == "text":
            # What a person has, before the first block that runs; then what the block before it prints.
            if by == "python":
                assert squeezed(printed) == squeezed(block.text), block
            elif by == "bash":
                assert squeezed(block.text, "#") in squeezed(printed, "#"), f"{block}\n{printed}"
        elif (page, block.first) not in ELSEWHERE:
            assert block.language in ("python", "bash", "yaml", "csv", "json"), f"{block}: what is it?"
            run_block(block, names, monkeypatch)
            printed, by = capfd.readouterr().out, block.language if "print(" in block.text else ""
            by = "bash" if block.language == "bash" else by
    if page == "tutorial.md":
        assert (folder / "runs/biased/report.html").exists() and (folder / "compare.html").exists()


def test_every_exception_is_of_a_block() -> None:
    firsts = {(page, block.first) for page in PAGES for block in blocks(DOCS / page)}
    assert set(ELSEWHERE) <= firsts
    lines = {line.strip() for page in PAGES for block in blocks(DOCS / page) for line in block.text.splitlines()}
    assert set(CODES) <= lines


def test_audit_yaml_is_a_policy_and_data_yaml_an_audit_set_on_every_page() -> None:
    named = {"# audit.yaml": "rules", "# data.yaml": "reader"}
    found = [b for page in (ROOT / "README.md", *DOCS.glob("**/*.md")) for b in blocks(page) if b.language == "yaml"]
    files = [(b, named[b.first.partition(";")[0]]) for b in found if b.first.partition(";")[0] in named]
    assert len(files) >= 6
    for block, key in files:
        assert key in yaml.safe_load(block.text), block
    said = [text for page in DOCS.glob("**/*.md") for text in re.findall(r"--data (\S+)", page.read_text("utf-8"))]
    assert said and "audit.yaml" not in said


def test_figures_of_the_promises_are_those_that_were_recorded() -> None:
    page = " ".join((DOCS / "reliability.md").read_text(encoding="utf-8").split())
    for part, figures in RECORDED.items():
        record = json.loads((ROOT / f"benchmarks/results/soak-{part}.json").read_text(encoding="utf-8"))
        found = {figure["case"]: figure for figure in record["figures"]}
        for said, case in figures.items():
            value = found[case]["value"] / (1000 if found[case]["unit"] == "bytes" else 1)
            assert said.format(value) in page, (part, case, value)


@pytest.mark.skipif(find_spec("mkdocs") is None, reason="mkdocs is not installed: pip install 'bias-audit[docs]'")
@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_asks_nothing_of_the_network(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    pages = list((tmp_path / "site").glob("**/*.html"))
    assert len(pages) > 30
    for page in pages:
        loaded = re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=\"([^\"]+)\"", page.read_text())
        assert not [url for url in loaded if re.match(r"(https?:)?//", url)], page
