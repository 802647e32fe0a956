"""What is private stays here: pictures that are not to be sent, and the secrets of the environment."""

from __future__ import annotations

import base64
import gzip
import io
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from PIL import Image
from planted import write_planted
from pytorch_lightning.loggers import MLFlowLogger, TensorBoardLogger
from synthetic import make_run
from training import Net, fit, trainer
from typer.testing import CliRunner

from bias_audit import AuditDataset, AuditPlan, AuditSample, audit_model, read_run
from bias_audit.callbacks import BiasAuditCallback, ReportSink, Session
from bias_audit.callbacks.aside import Aside
from bias_audit.callbacks.mlflow import MlflowSink
from bias_audit.cli import app, main
from bias_audit.data.sheet import describe
from bias_audit.records.arrays import sheet_bytes
from bias_audit.records.files import CHANGED, REPORT, SAMPLES
from bias_audit.records.pictures import opened, outlined
from bias_audit.records.runs import Run
from bias_audit.records.writing import RunDirectory
from bias_audit.redaction import without_secrets
from bias_audit.report.page import write_report

# Of a colour that no heatmap, no outline and no paper has.
GREEN = (20, 220, 40)


def pictures_in(content: bytes) -> Iterator[Image.Image]:
    """Every picture in a file of any kind: whole, in one piece within it, in an archive, or in a page."""
    if content.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for name in archive.namelist():
                yield from pictures_in(archive.read(name))
        return
    for packed in re.findall(rb'(?:id="data">|;base64,)([A-Za-z0-9+/=]+)', content):
        inner = base64.b64decode(packed)
        yield from pictures_in(gzip.decompress(inner) if inner.startswith(b"\x1f\x8b") else inner)
    for found in re.finditer(rb"\xff\xd8\xff[\xe0\xdb]|\x89PNG\r\n|RIFF....WEBP", content, re.DOTALL):
        with Image.open(io.BytesIO(content[found.start() :])) as picture:
            yield picture.convert("RGB")


def shows_green(content: bytes) -> bool:
    """Whether a file has a picture with a pixel that only the photographs have."""
    for picture in pictures_in(content):
        red, green, blue = np.moveaxis(np.asarray(picture, dtype=np.int64), -1, 0)
        if (green - np.maximum(red, blue) > 60).any():
            return True
    return False


def files_below(*folders: Path) -> dict[Path, bytes]:
    found = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in found}


def green_set(count: int = 8) -> AuditDataset:
    image = torch.tensor(GREEN, dtype=torch.uint8)[:, None, None].repeat(1, 32, 32)
    logo, object_ = (torch.zeros(32, 32, dtype=torch.bool) for _ in range(2))
    logo[2:8, 2:8] = object_[12:28, 12:28] = True
    regions = {"logo": logo, "thing": object_}
    samples = [AuditSample(image, i % 2, regions, {"group": "ab"[i // 2 % 2]}, f"photo-{i}") for i in range(count)]
    return AuditDataset(samples, object=["thing"], spurious=["logo"])


PLAN = AuditPlan(batch_size=8, fitness_samples=0, intervention_samples=8)
SECRETS = {
    "WANDB_API_KEY": "c0ffee" * 6 + "c0ff",
    "AWS_SECRET_ACCESS_KEY": "wJalr/XUtnFEMI+K7MDENG/bPxRfiCYEXAMPLEKEY",
    "MLFLOW_TRACKING_PASSWORD": "correct horse battery",
    "HF_TOKEN": "hf_zzzzzzzzzzzzzzzzzzzz",
}


class Talks:
    """A forward that fails at step 4, and says all that it knows."""

    def __call__(self, model: Net, images: torch.Tensor) -> torch.Tensor:
        if model.trainer.global_step == 4:
            raise OSError(f"cannot reach https://me:hunter22@example.org: {SECRETS}")
        return model(images)


@dataclass(frozen=True)
class Trained:
    """A training on green photographs that are to stay, whose second audit failed; all loggers' files are in `sent`."""

    run: Run
    sent: dict[Path, bytes]
    warned: str


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    path = tmp_path_factory.mktemp("private")
    (path / "sent/wandb").mkdir(parents=True)
    # What somebody draws into the run directory.
    (path / "run").mkdir()
    Image.new("RGB", (32, 32), GREEN).save(path / "run/other.png")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for name, value in (SECRETS | {"MLFLOW_ALLOW_FILE_STORE": "true"}).items():
            patch.setenv(name, value)
        # What W&B keeps for all runs, such as what it uploads later, lies in the home.
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
            patch.setenv(name, str(path / "sent/wandb" / name))
        loggers = [
            TensorBoardLogger(path / "sent", name="tb"),
            MLFlowLogger("x", tracking_uri=f"file:{path}/sent/mlruns"),
        ]
        callback = BiasAuditCallback(
            green_set(),
            dirpath=path / "run",
            plan=replace(PLAN, forward_fn=Talks()),
            wandb={"mode": "offline", "dir": path / "sent/wandb", "project": "private"},
            thumbnails="local",
        )
        fit(trainer(path, callback, logger=loggers))
        wandb.teardown()
    run = read_run(path / "run")
    return Trained(run, files_below(path / "sent"), "\n".join(str(w.message) for w in warned))


def test_pictures_that_are_to_stay_are_in_nothing_that_is_sent(trained: Trained) -> None:
    run = trained.run
    assert [audit.step for audit in run.audits] == [0, 8] and run.failed_steps == (4,)
    own = {path.name for path, content in files_below(run.path).items() if shows_green(content)}
    assert own == {SAMPLES, CHANGED, REPORT, "other.png"}, "where pictures are to be found, the test finds them"
    kinds = {path.name if "tfevents" not in path.name else "tfevents" for path in trained.sent}
    assert {SAMPLES, REPORT, "manifest.json", "audits.jsonl", "tfevents"} <= kinds
    assert CHANGED not in kinds and "other.png" not in kinds
    assert sum(len(list(pictures_in(content))) for content in trained.sent.values()) > 20
    assert [path for path, content in trained.sent.items() if shows_green(content)] == []
    photos = run.sheet().thumbnails
    assert [path for path, content in trained.sent.items() if any(photo in content for photo in photos)] == []


def test_what_was_sent_without_pictures_is_whole(trained: Trained, tmp_path: Path) -> None:
    copies = [path.parent for path in trained.sent if path.name == "audits.jsonl"]
    assert len(copies) >= 2
    for copy in copies:
        found = read_run(copy)
        assert found.manifest.thumbnails is False and found.audits == trained.run.audits
        for mine, its in zip(outlined(trained.run.sheet()).thumbnails, found.sheet().thumbnails, strict=True):
            assert opened(mine).size == opened(its).size and mine == its
        for index in range(2):
            found.verify(index)


def test_secrets_of_the_environment_are_in_nothing_that_is_written(trained: Trained) -> None:
    texts = {"warnings": trained.warned.encode()} | {str(p): c for p, c in trained.sent.items()}
    texts |= {str(path): content for path, content in files_below(trained.run.path).items()}
    for secret in (*SECRETS.values(), "hunter22"):
        assert [name for name, content in texts.items() if secret.encode() in content] == []
    # It was said that something failed, and what.
    assert "OSError: cannot reach https://***@example.org" in trained.warned
    assert trained.run.path.joinpath("audits.jsonl").read_bytes().count(b"cannot reach https://***@example.org") == 1


def test_a_process_beside_does_not_tell_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "s3cr3t-s3cr3t")
    aside = Aside("bias_audit.report.follow", str(tmp_path / "s3cr3t-s3cr3t"))
    aside.tell("audited")
    with pytest.raises(RuntimeError, match=r"RecordError: .*/\*\*\*: no such directory") as caught:
        aside.end("end")
    assert "s3cr3t" not in str(caught.value)


def test_the_command_does_not_tell_secrets(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SOME_API_KEY", "s3cr3t-s3cr3t")
    monkeypatch.setattr(sys, "argv", ["bias-audit", "report", "runs/s3cr3t-s3cr3t"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err.startswith("bias-audit: runs/***: no such directory")


def test_what_is_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {
        "DB_PASS": "swordfish",
        "A_TOKEN": "abcdefgh",
        "B_SECRET": "abcdefgh-more",
        "SHORT_KEY": "short",
        "OTHER": "innocent-value",
    }
    known["GOOGLE_APPLICATION_CREDENTIALS"] = str(tmp_path)
    for name, value in known.items():
        monkeypatch.setenv(name, value)
    text = f"short innocent-value {tmp_path} https://example.org/a@b"
    assert without_secrets(f"abcdefgh-more swordfish {text}") == f"*** *** {text}"
    assert without_secrets("at https://me:p@ss@example.org: no") == "at https://***@example.org: no"


def test_without_thumbnails_no_picture_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_pictures = audit_model(Net().eval(), green_set(), plan=PLAN, out=tmp_path / "with")
    assert with_pictures.changed is not None and shows_green((tmp_path / "with" / SAMPLES).read_bytes())
    result = audit_model(Net().eval(), green_set(), plan=PLAN, out=tmp_path / "without", thumbnails=False)
    assert result.changed is None and result.scores.effects.size
    write_report(tmp_path / "without")
    assert not any(map(shows_green, files_below(tmp_path / "without").values()))
    run = read_run(tmp_path / "without")
    assert run.manifest.thumbnails is False and run.changed() is None
    page = (run.path / REPORT).read_text(encoding="utf-8")
    assert "The images are not shown" in page and not list(pictures_in(page.encode()))
    # Nor is one sent that somebody drew beside the records, as a comparison with a run that has pictures.
    Image.new("RGB", (32, 32), GREEN).save(run.path / "other.png")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    sink = MlflowSink(MLFlowLogger("x", tracking_uri=f"file:{tmp_path}/mlruns"))
    sink.start(Session("bias_audit", run.path, run.manifest, run.sheet()))
    sink.end()
    sent = files_below(tmp_path / "mlruns")
    assert {SAMPLES, REPORT, "audits.jsonl"} <= {path.name for path in sent} and not any(
        map(shows_green, sent.values())
    )


def test_outlines_show_where_the_regions_are_and_nothing_else(tmp_path: Path) -> None:
    sheet = describe(green_set()).sheet
    (drawn, *_), (photo, *_) = outlined(sheet).thumbnails, sheet.thumbnails
    assert opened(drawn).size == opened(photo).size
    picture = np.asarray(opened(drawn).convert("L"), dtype=np.int64)
    edges = np.zeros((32, 32), dtype=bool)
    for top, bottom in ((2, 8), (12, 28)):
        edges[top:bottom, top:bottom] = True
        edges[top + 1 : bottom - 1, top + 1 : bottom - 1] = False
    assert (np.abs(np.where(edges, 96, 224) - picture) < 40).all()
    # Whatever the photograph shows, its outlines are the same.
    other = replace(sheet, thumbnails=make_black(sheet.thumbnails))
    assert outlined(other).thumbnails == outlined(sheet).thumbnails


def make_black(thumbnails: tuple[bytes, ...]) -> tuple[bytes, ...]:
    buffer = io.BytesIO()
    Image.new("RGB", opened(thumbnails[0]).size).save(buffer, "JPEG")
    return (buffer.getvalue(),) * len(thumbnails)


def test_a_run_that_goes_on_without_pictures_leaves_none(tmp_path: Path) -> None:
    audit_model(Net().eval(), green_set(), plan=PLAN, out=tmp_path / "run")
    run = read_run(tmp_path / "run")
    write_report(run)
    assert {path.name for path, content in files_below(run.path).items() if shows_green(content)} == {
        SAMPLES,
        CHANGED,
        REPORT,
    }
    bare, sheet = run.manifest.model_copy(update={"thumbnails": False}), outlined(run.sheet())
    # In another place, and in its own.
    for path in (tmp_path / "other", run.path):
        RunDirectory.resume(path, run.path, bare, sheet, 0)
        ReportSink().start(Session("bias_audit", path, bare, sheet, run.path))
        assert len(read_run(path).audits) == 1 and not any(map(shows_green, files_below(path).values()))


@pytest.mark.parametrize("given", ["remote", 2, None])
def test_an_unknown_choice_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match='expected True, False or "local"'):
        BiasAuditCallback(green_set(), thumbnails=given)


def test_the_commands_without_thumbnails(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", audits=1, samples=8, removal={"hair": 0.3}))
    buffer = io.BytesIO()
    Image.new("RGB", (96, 96), GREEN).save(buffer, "JPEG")
    (run.path / SAMPLES).write_bytes(sheet_bytes(replace(run.sheet(), thumbnails=(buffer.getvalue(),) * 8)))
    other = make_run(tmp_path / "other", audits=1, samples=8, seed=1)
    page, compared = run.path / REPORT, tmp_path / "compare.html"
    for path, words in ((page, ("report", run.path)), (compared, ("compare", run.path, other, "--out", compared))):
        for more in ((), ("--no-thumbnails",)):
            done = CliRunner().invoke(app, [*map(str, words), *more])
            assert done.exit_code == 0, done.output
            assert shows_green(path.read_bytes()) is not bool(more)


def test_a_run_without_thumbnails(tmp_path: Path) -> None:
    root = write_planted(tmp_path / "root", per_cell=2)
    assert any(map(shows_green, files_below(root).values())), "leaves are green"
    words = ["run", "--model", "planted:Planted", "--checkpoint", root / "clean.ckpt", "--data", root / "audit.yaml"]
    words += ["--out", tmp_path / "run", "--accelerator", "cpu", "--no-thumbnails"]
    assert CliRunner().invoke(app, [*map(str, words)]).exit_code == 0
    files = files_below(tmp_path / "run")
    assert {SAMPLES, REPORT} <= {path.name for path in files} and not any(map(shows_green, files.values()))
