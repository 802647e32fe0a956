"""Where evidence comes from: W&B runs on disk and through its API, checkpoints, and the best of them."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import wandb
from planted import clean, write_planted
from pytorch_lightning.callbacks import ModelCheckpoint
from synthetic import make_run
from torch.utils.data import DataLoader, TensorDataset
from training import Net, audit_set, trainer
from wandb_server import Double, Logged, serving

from bias_audit.callbacks import BiasAuditCallback, Session, WandbSink
from bias_audit.callbacks.sinks import FanOut, RunDirectorySink
from bias_audit.callbacks.wandb import WandbWriter
from bias_audit.cli import app
from bias_audit.gate.sources import checkpoint_step, open_run
from bias_audit.plan import AuditPlan
from bias_audit.records.results import AuditResult, MissingEvidenceError, RecordError
from bias_audit.records.runs import AUDITS, COPIES, MANIFEST, RunDirectory, find_run, read_run

CLEAN: dict[str, Any] = {"hair_enrichment": 0.7, "gap": 0.02, "spread": 0.02}
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "FORCE_COLOR", "XDG_"))}
# Opens each source and says what became of it.
OPEN = """
import json, sys
from bias_audit.records.runs import read_run
from bias_audit.gate.sources import open_run
for source in sys.argv[1:]:
    try:
        with open_run(source) as path:
            print(json.dumps(["", read_run(path).audits[-1].judgement.outcome, str(path)]))
    except Exception as error:
        print(json.dumps([type(error).__name__, str(error), ""]))
"""


def process(*command: Any, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # A home of its own: neither a login nor a cache of whoever runs the tests.
    own = ENVIRONMENT | {"HOME": str(home)} | environment
    return subprocess.run(list(map(str, command)), capture_output=True, encoding="utf-8", env=own, check=False)


def gate(*arguments: Any, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    script = Path(sys.executable).with_name("bias-audit")
    return process(script, "gate", *arguments, home=home, **environment)


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2 and done.stdout == "", (done.returncode, done.stdout, done.stderr)
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr and "internal" not in done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    biased, clean = make_run(folder / "biased", audits=2), make_run(folder / "clean", audits=1, **CLEAN)
    killed = make_run(folder / "killed", audits=1, ended=False, **CLEAN)
    return {"biased": biased, "clean": clean, "killed": killed}


# A W&B run on this machine


@pytest.fixture(scope="module")
def offline(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What W&B keeps of an offline run; the run directories themselves are gone."""
    found: dict[str, Path] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        for kind in ("biased", "clean"):
            folder = tmp_path_factory.mktemp(kind)
            path = folder / "run"
            shutil.copytree(runs[kind], path)
            run = wandb.init(project="doctors", dir=folder)
            copy = Path(run.dir).parent / COPIES / "bias_audit"
            recorded = read_run(path)
            session = Session("bias_audit", path, recorded.manifest, recorded.sheet())
            audits = [AuditResult(**vars(a), scores=recorded.scores(i)) for i, a in enumerate(recorded.audits)]
            if kind == "biased":
                writer = WandbWriter(run)
                writer.start(session)
                writer.write(audits[0])
                assert [a.step for a in read_run(copy).audits] == [100] and not read_run(copy).ended
                writer.end()
                assert read_run(copy).ended
                # Another stage begins: what ended the one before is not its last word.
                writer.start(session, recorded.audits)
                with pytest.raises(MissingEvidenceError):
                    read_run(copy)
                writer.end()
                run.finish()
            else:
                # By the process that sends while a training goes on.
                sink = WandbSink(run, own=True)
                sink.start(session)
                sink.write(audits[0])
                sink.end()
            assert find_run(folder) == path, "the copy beside it is no second run"
            for name in ("samples.npz", "audits/000000.npz"):
                assert (copy / name).samefile(path / name), "it takes no room twice"
            assert (copy / AUDITS).read_bytes() == (path / AUDITS).read_bytes()
            assert not (copy / AUDITS).samefile(path / AUDITS), "a training writes on in its own"
            # Carried to another machine.
            found[kind] = folder / "carried" / Path(run.dir).parent.name
            shutil.copytree(Path(run.dir).parent, found[kind])
            shutil.rmtree(path)
        wandb.teardown()
    return found


def test_an_offline_run_is_judged_wherever_it_is_carried(offline: dict[str, Path], tmp_path: Path) -> None:
    biased, clean = offline["biased"], offline["clean"]
    assert biased.name.startswith("offline-run-")
    assert gate(biased, home=tmp_path).returncode == 1
    done = gate(clean, home=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    (log,) = clean.glob("*.wandb")
    with open_run(log) as path, open_run(clean) as other:
        assert path == other == clean / COPIES / "bias_audit"
        assert read_run(path).scores(-1).ids
        assert read_run(path).sheet().ids


def test_a_wandb_run_without_audits_is_no_evidence(offline: dict[str, Path], tmp_path: Path) -> None:
    bare = tmp_path / "offline-run-1"
    shutil.copytree(offline["clean"], bare, ignore=shutil.ignore_patterns(COPIES))
    # Of a log that lies alone, what lies beside it is another run.
    make_run(tmp_path / "beside", audits=1, **CLEAN)
    log = shutil.copy(next(bare.glob("*.wandb")), tmp_path)
    for source in (bare, log):
        with pytest.raises(MissingEvidenceError, match="is a W&B run that keeps no audits"), open_run(source):
            pass
    done = gate(bare, home=tmp_path)
    assert done.returncode == 3 and "keeps no audits" in " ".join(done.stdout.split()), done


# Through W&B's public API


@pytest.fixture(scope="module")
def double(runs: dict[str, Path]) -> Double:
    found = Double(runs={"biased": "finished", "clean": "finished", "crashed": "crashed", "killed": "crashed"})
    found.runs |= {"silent": "finished", "two": "finished", "half": "running"}
    audits = [
        # The tenth version is newer than the ninth, though they are of the same second; a table is no audit.
        Logged("bias_audit-1", 9, "biased", runs["clean"]),
        Logged("bias_audit-1", 10, "biased", runs["biased"], aliases=("latest", "final")),
        Logged("run-biased-table", 11, "biased", runs["clean"], type="run_table"),
        Logged("bias_audit-2", 0, "clean", runs["biased"]),
        Logged("bias_audit-2", 1, "clean", runs["clean"], aliases=("latest",)),
        Logged("bias_audit-3", 0, "crashed", runs["clean"]),
        Logged("bias_audit-3", 1, "killed", runs["killed"]),
        Logged("bias_audit-4", 0, "two", runs["clean"]),
        Logged("other-4", 0, "two", runs["clean"]),
        Logged("bias_audit-5", 0, "half", runs["clean"]),
        Logged("bias_audit-5", 1, "half", runs["clean"], state="DELETED"),
    ]
    found.artifacts += audits
    return found


@pytest.fixture(scope="module")
def served(double: Double) -> Iterator[dict[str, str]]:
    with serving(double) as environment:
        yield environment


@pytest.mark.slow
def test_a_run_in_wandb(served: dict[str, str], tmp_path: Path) -> None:
    biased = gate("acme/doctors/biased", home=tmp_path, **served)
    assert (biased.returncode, biased.stderr) == (1, ""), biased
    assert "hair" in biased.stdout and "reliance" in biased.stdout
    (tmp_path / "temporary").mkdir()
    clean = gate("acme/doctors/clean", home=tmp_path, TMPDIR=str(tmp_path / "temporary"), **served)
    assert (clean.returncode, clean.stderr) == (0, ""), clean
    assert list((tmp_path / "temporary").glob("bias-audit*")) == []


def test_what_wandb_has_and_has_not(served: dict[str, str], tmp_path: Path) -> None:
    places: dict[str, tuple[str, str]] = {
        "acme/doctors/bias_audit-1:v9": ("", "held"),
        "acme/doctors/bias_audit-1:final": ("", "violated"),
        "acme/doctors/killed": ("", "held"),
        "acme/doctors/silent": ("MissingEvidenceError", "it has sent no audit"),
        "acme/doctors/crashed": ("MissingEvidenceError", "has crashed since: to judge that audit, give acme/doctors/"),
        "acme/doctors/half": ("MissingEvidenceError", "no longer has its last audit, bias_audit-5:v1: it is DELETED"),
        "acme/doctors/two": ("RecordError", "acme/doctors/bias_audit-4:latest, acme/doctors/other-4:latest"),
        "acme/doctors/nobody": ("RecordError", "no such file or directory, and as a path in W&B it cannot be had"),
        "acme/nowhere/clean": ("RecordError", "no such file or directory, and as a path in W&B it cannot be had"),
        "acme/doctors/bias_audit-1:v77": ("RecordError", "'bias_audit-1:v77' not found in 'acme/doctors'"),
        "acme/doctors/run-biased-table:v11": ("RecordError", "of type 'run_table', expected 'bias-audit'"),
    }
    done = process(sys.executable, "-c", OPEN, *places, home=tmp_path, **served)
    assert done.stderr == ""
    for (name, (kind, words)), line in zip(places.items(), done.stdout.splitlines(), strict=True):
        found, text, path = json.loads(line)
        assert found == kind and words in text, (name, line)
        assert (kind == "" or text.startswith(f"{name}: ")) and not Path(path or "/none").exists()


@pytest.mark.parametrize("key", [{}, pytest.param({"WANDB_API_KEY": "f" * 40}, marks=pytest.mark.slow)])
def test_no_account_and_a_wrong_one(served: dict[str, str], tmp_path: Path, key: dict[str, str]) -> None:
    words = ("logs/version_0/bias_audit: no such file or directory", "path in W&B", "`wandb login`", "WANDB_API_KEY")
    environment = {"WANDB_BASE_URL": served["WANDB_BASE_URL"]} | key
    text = one_line(gate("logs/version_0/bias_audit", home=tmp_path, **environment))
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    "how", [*(pytest.param(how, marks=pytest.mark.slow) for how in ("short", "gone")), "cut", "changed"]
)
def test_a_download_that_is_not_whole_is_no_pass(
    how: str, runs: dict[str, Path], double: Double, served: dict[str, str], tmp_path: Path
) -> None:
    # Under a name of its own: no cache has it.
    folder = tmp_path / "run"
    shutil.copytree(runs["clean"], folder)
    logged = Logged(f"bias_audit-{how}", 0, how, folder, aliases=("latest",))
    double.runs[how] = "finished"
    double.artifacts.append(logged)
    if how == "changed":
        # W&B has it as it was sent, and it was sent damaged: the records' own checksums tell.
        damaged = (folder / AUDITS).read_bytes().replace(b'"value":0.', b'"value":1.', 1)
        (folder / AUDITS).write_bytes(damaged)
    else:
        getattr(double, how).add({"cut": "samples.npz", "short": AUDITS, "gone": MANIFEST}[how])
    try:
        text = one_line(gate(f"acme/doctors/{how}", home=tmp_path, **served))
    finally:
        for names in (double.cut, double.short, double.gone):
            names.clear()
    assert f"bias-audit: acme/doctors/{how}" in text and "/tmp/bias-audit-" not in text
    if how == "changed":
        assert f"acme/doctors/changed/{AUDITS}, line 1: its checksum does not match" in text


def test_an_artifact_that_points_elsewhere_is_refused(
    double: Double, served: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("not for the runner's disk")
    monkeypatch.setattr(double, "referred", {"secret": secret.as_uri()})
    text = one_line(gate("acme/doctors/bias_audit-2:latest", home=tmp_path, **served))
    assert "refers to files elsewhere" in text


@pytest.mark.parametrize(
    "name", ["nothing", "no/such", "a/b/c/d", "/a/b/c", "./a/b/c", "../b/c", "a//c", "a/b/c:", "a/b/c?d", "a/b/\n"]
)
def test_what_cannot_be_a_path_in_wandb_is_not_asked_for(name: str) -> None:
    with pytest.raises(RecordError, match="no such file or directory: give a run directory") as caught, open_run(name):
        pass
    assert str(caught.value).startswith(f"{name}: ") and "entity/project/run" in str(caught.value)


def test_what_is_here_comes_before_what_is_there(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(runs["biased"], tmp_path / "acme/doctors/clean")
    monkeypatch.chdir(tmp_path)
    with open_run("acme/doctors/clean") as path:
        assert path == Path("acme/doctors/clean") and read_run(path).ended


def test_neither_torch_nor_wandb_for_a_run_directory(runs: dict[str, Path], tmp_path: Path) -> None:
    code = OPEN + "print([name for name in ('torch', 'wandb', 'pytorch_lightning') if name in sys.modules])"
    done = process(sys.executable, "-c", code, runs["clean"], tmp_path, "no/such", home=tmp_path)
    assert done.stdout.splitlines()[-1] == "[]", done


# The checkpoint that is to be released


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints as Lightning and torch save them; not to be written to."""
    folder = tmp_path_factory.mktemp("saved")

    class Configured(Net):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters({"options": argparse.Namespace(depth=2)})

    for name, net in (("plain", Net), ("objects", Configured)):
        run = trainer(folder, max_epochs=1, limit_val_batches=0)
        run.fit(net(), batches())
        run.save_checkpoint(folder / f"{name}.ckpt")
        run.save_checkpoint(folder / f"{name}-weights.ckpt", weights_only=True)
    torch.save(Net().state_dict(), folder / "state.pt")
    found = torch.load(folder / "plain.ckpt", weights_only=True)
    torch.save(found, folder / "legacy.ckpt", _use_new_zipfile_serialization=False)
    torch.save(found | {"global_step": "4"}, folder / "text.ckpt")
    torch.save([1, 2], folder / "list.pt")
    (folder / "sharded").mkdir()
    shutil.copy(folder / "plain.ckpt", folder / "sharded" / "meta.pt")
    content = (folder / "plain.ckpt").read_bytes()
    (folder / "cut.ckpt").write_bytes(content[: len(content) // 2])
    (folder / "empty.ckpt").write_bytes(b"")
    (folder / "text.txt").write_text("no checkpoint")
    (folder / "weights.safetensors").write_bytes(b"")
    return folder


@pytest.mark.parametrize("name", ["plain.ckpt", "plain-weights.ckpt", "legacy.ckpt", "sharded"])
def test_a_checkpoint_says_its_step(name: str, saved: Path) -> None:
    assert checkpoint_step(saved / name) == 4


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("state.pt", MissingEvidenceError, "cannot be dated"),
        ("list.pt", MissingEvidenceError, "cannot be dated"),
        ("weights.safetensors", MissingEvidenceError, "cannot be dated"),
        ("objects.ckpt", ValueError, "more than weights .argparse.Namespace.*add --trust-checkpoint"),
        ("text.ckpt", ValueError, "global_step: expected a count of steps, got '4'"),
        ("cut.ckpt", ValueError, "is not a checkpoint that torch can read"),
        ("empty.ckpt", ValueError, "is not a checkpoint that torch can read"),
        ("text.txt", ValueError, "is not a checkpoint that torch can read"),
        ("nothing.ckpt", ValueError, "cannot be read .No such file or directory"),
        (".", ValueError, "is a directory without meta.pt"),
    ],
)
def test_a_checkpoint_that_does_not(name: str, kind: type[Exception], words: str, saved: Path) -> None:
    with pytest.raises(kind, match=words) as caught:
        checkpoint_step(saved / name)
    assert str(saved / name) in str(caught.value) and "\n" not in str(caught.value)
    # Damage is no lack of evidence.
    assert type(caught.value) is kind


def test_objects_are_unpickled_only_on_trust(saved: Path, tmp_path: Path) -> None:
    assert checkpoint_step(saved / "objects.ckpt", trust=True) == 4

    class Hostile:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    for name, save in (("new", torch.save), ("old", lambda what, path: path.write_bytes(pickle.dumps(what)))):
        save({"global_step": 4, "x": Hostile()}, tmp_path / name)
        with pytest.raises(ValueError, match=r"--trust-checkpoint|not a checkpoint"):
            checkpoint_step(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.newest("torch 2.8 reads the weights all the same")
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system does not say what was read")
def test_weights_are_not_read_to_date_a_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "large.ckpt"
    torch.save({"global_step": 7, "state_dict": {"w": torch.zeros(16 << 20)}}, file)

    def read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = read()
    assert checkpoint_step(file) == 7
    assert read() - before < file.stat().st_size // 16


def test_stale_evidence_is_inconclusive(
    saved: Path, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def gated(*arguments: Any) -> tuple[int, str]:
        code = app(["gate", str(runs["clean"]), "--checkpoint", *map(str, arguments)], standalone_mode=False)
        return code or 0, " ".join(capsys.readouterr().out.split())

    # Of step 4; the evidence is of step 100.
    with pytest.raises(ValueError, match="--trust-checkpoint"):
        gated(saved / "objects.ckpt")
    for step in (100, 101):
        content = torch.load(saved / "plain.ckpt", weights_only=True) | {"global_step": step}
        torch.save(content, tmp_path / f"{step}.ckpt")
    content = torch.load(saved / "objects.ckpt", weights_only=False) | {"global_step": 100}
    torch.save(content, tmp_path / "objects.ckpt")
    for given, expected, words in (
        ((tmp_path / "100.ckpt",), 0, "passed"),
        ((tmp_path / "objects.ckpt", "--trust-checkpoint"), 0, "passed"),
        ((tmp_path / "101.ckpt",), 3, "stale: the last audit is of step 100, the checkpoint of step 101"),
        (
            (saved / "plain.ckpt",),
            3,
            "the last audit is of step 100, the checkpoint of step 4: not what is to be merged",
        ),
        ((saved / "state.pt",), 3, "cannot be dated"),
    ):
        code, text = gated(*given)
        assert code == expected and words in text, text


# The best checkpoint


class Scripted(Net):
    """Its validation loss is what the script says, one number for each validation."""

    def __init__(self, losses: tuple[float, ...]) -> None:
        super().__init__()
        self.losses = losses

    def validation_step(self, batch: Any, _index: int) -> None:
        self.log("val_loss", self.losses[self.trainer.current_epoch % len(self.losses)])

    test_step = validation_step


def batches() -> DataLoader[Any]:
    """Four: a step each."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(8, 3, 32, 32, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(8) % 2), batch_size=2)


# Quick: what is measured is of no interest here.
PLAN = AuditPlan(fitness_samples=0, intervention_samples=0)


@pytest.fixture
def _no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page is drawn by a process of its own, which takes longer than all that is tested here."""
    monkeypatch.setattr("bias_audit.callbacks.lightning.ReportSink", Silent)


def callback(path: Path, **options: Any) -> BiasAuditCallback:
    settings = {"every_n_epochs": 99, "reference": False, "plan": PLAN} | options
    return BiasAuditCallback(audit_set(1), dirpath=path / "run", **settings)


def saver(path: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(path / "saved", **{"monitor": "val_loss"} | options)


def best_in(path: Path) -> list[int]:
    lines = (path / "run" / AUDITS).read_text().splitlines()
    return [body["step"] for body in (json.loads(line)["body"] for line in lines) if body["kind"] == "best"]


def train(path: Path, losses: tuple[float, ...], *callbacks: Any, **options: Any) -> pl.Trainer:
    pl.seed_everything(0, verbose=False)
    run = trainer(path, *callbacks, max_epochs=len(losses), enable_checkpointing=True)
    run.fit(Scripted(losses), batches(), batches(), **options)
    return run


@pytest.mark.usefixtures("_no_page")
@pytest.mark.parametrize(
    ("options", "losses", "steps"),
    [
        # The file keeps its name, no state of any callback is asked for, and the last is the best.
        (
            {"filename": "best", "enable_version_counter": False, "save_weights_only": True},
            (0.5, 0.3, 0.9, 0.1),
            [4, 8, 16],
        ),
        ({"save_top_k": 3, "save_last": True}, (0.5, 0.9, 0.1, 0.3), [4, 12]),
    ],
)
def test_the_step_of_the_best_checkpoint_is_recorded(
    options: dict[str, Any], losses: tuple[float, ...], steps: list[int], tmp_path: Path
) -> None:
    best = saver(tmp_path, **options)
    audited = train(tmp_path, losses, callback(tmp_path), best)
    assert best_in(tmp_path) == steps
    run = read_run(tmp_path / "run")
    assert run.best_step == steps[-1] == checkpoint_step(best.best_model_path)
    assert run.ended and [a.step for a in run.audits] == [16]
    # Not one bit of the training is another.
    alone = train(tmp_path / "alone", losses, saver(tmp_path / "alone", **options))
    states = [run.lightning_module.state_dict().values() for run in (audited, alone)]
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.usefixtures("_no_page")
def test_without_a_monitor_no_checkpoint_is_the_best(tmp_path: Path) -> None:
    train(tmp_path, (0.5, 0.2), callback(tmp_path), saver(tmp_path, monitor=None))
    run = read_run(tmp_path / "run")
    assert run.best_step is None and run.ended


@pytest.mark.usefixtures("_no_page")
def test_of_several_the_first_with_a_monitor_counts(tmp_path: Path) -> None:
    class Own(ModelCheckpoint):
        pass

    others = [ModelCheckpoint(tmp_path / "a"), Own(tmp_path / "b", monitor="val_loss", mode="max"), saver(tmp_path)]
    run = train(tmp_path, (0.5, 0.9, 0.2), callback(tmp_path), *others)
    assert best_in(tmp_path) == [4, 8]
    # A test after it changes no best, and is no training.
    run.test(run.lightning_module, batches(), verbose=False)
    recorded = read_run(tmp_path / "run")
    assert recorded.best_step == 8 and recorded.ended and recorded.audits[-1].trigger == "test"


@pytest.mark.usefixtures("_no_page")
def test_a_resumed_run_knows_the_best_of_before(tmp_path: Path) -> None:
    # Audited after the second epoch, best in the third: the records are gone on with from the second.
    losses = (0.5, 0.4, 0.2, 0.3)
    often = {"every_n_epochs": 2}
    train(tmp_path, losses[:3], callback(tmp_path, **often), saver(tmp_path, filename="{step}", save_top_k=-1))
    assert best_in(tmp_path) == [4, 8, 12]
    third, second = tmp_path / "saved/step=12.ckpt", tmp_path / "saved/step=8.ckpt"
    train(tmp_path, losses, callback(tmp_path, **often), saver(tmp_path), ckpt_path=third)
    run = read_run(tmp_path / "run")
    assert run.best_step == 12 and [a.step for a in run.audits] == [8, 16]
    # From before the best: what came after is another training's.
    train(tmp_path, (0.5, 0.4, 9.0), callback(tmp_path, **often), saver(tmp_path), ckpt_path=second)
    assert read_run(tmp_path / "run").best_step == 8


def test_rewinding_drops_the_best_of_later(tmp_path: Path, runs: dict[str, Path]) -> None:
    shutil.copytree(runs["biased"], tmp_path / "run")
    run = read_run(tmp_path / "run")
    again = RunDirectory.resume(run.path, run.path, run.manifest, run.sheet(), 200)
    for step in (100, 150, 190):
        again.best(step)
    assert read_run(run.path).best_step == 190
    RunDirectory.resume(tmp_path / "other", run.path, run.manifest, run.sheet(), 160)
    assert read_run(tmp_path / "other").best_step == 150
    RunDirectory.resume(run.path, run.path, run.manifest, run.sheet(), 120).end()
    assert read_run(run.path).best_step == 100
    # What is saved after the end takes nothing from it, and a sink of one's own need not know.
    sinks = FanOut([RunDirectorySink(), Silent()], "raise")
    sinks.start(Session("bias_audit", run.path, run.manifest, run.sheet(), run.path, 120))
    assert not read_run(run.path).ended
    sinks.end()
    sinks.best(110)
    assert read_run(run.path).ended and read_run(run.path).best_step == 110


class Silent:
    """A sink that has no notion of a best checkpoint."""

    def start(self, session: Any) -> None: ...

    def write(self, result: Any) -> None: ...

    def fail(self, step: int, reason: str) -> None: ...

    def end(self, error: str = "") -> None: ...


# A checkpoint audited on the spot


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with a corner, a checkpoint of a net that decides by it, and the weights of one that does not."""
    folder = write_planted(tmp_path_factory.mktemp("planted"), per_cell=5)
    torch.save(clean().state_dict(), folder / "clean.pt")
    rules = "min_samples: 5\nrules: [{metric: removal_flips, region: corner, max: 0.2, at: checkpoint}]\n"
    (folder / "rules.yaml").write_text(rules)
    return folder


@pytest.mark.slow
def test_the_model_is_looked_for_in_the_current_directory(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    given = ("--data", planted / "audit.yaml", "--policy", planted / "rules.yaml")
    done = gate(planted / "biased.ckpt", "--model", "planted:Planted", *given, home=tmp_path)
    assert done.returncode == 1 and "removal_flips on corner" in done.stdout and "Traceback" not in done.stderr, done


def test_a_checkpoint_is_audited_on_the_spot(
    planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gated(source: Path, *arguments: Any) -> int:
        given = ("gate", source, "--data", planted / "audit.yaml", "--policy", planted / "rules.yaml", *arguments)
        return app(list(map(str, given)), standalone_mode=False) or 0

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    assert gated(planted / "biased.ckpt", "--model", "planted:Planted") == 1
    assert "removal_flips on corner" in capsys.readouterr().out
    assert list((tmp_path / "temporary").glob("bias-audit*")) == []
    # The weights alone, for a net that is made with others.
    code = gated(planted / "clean.pt", "--model", "planted:biased", "--out", tmp_path / "run")
    assert code == 0, capsys.readouterr().out
    run = read_run(tmp_path / "run")
    assert [a.trigger for a in run.audits] == ["test"] and run.ended and (tmp_path / "run/report.html").exists()
    # Weights for a class that loads checkpoints: what is advised, this command has.
    with pytest.raises(ValueError, match="for `gate` name in --model a function that makes the model"):
        gated(planted / "clean.pt", "--model", "planted:Planted")
    with pytest.raises(ValueError, match=r"--out .*clean\.pt: is a file: name a directory"):
        gated(planted / "clean.pt", "--model", "planted:clean", "--out", planted / "clean.pt")


@pytest.mark.parametrize("given", [("--model", "m:n"), ("--data", "audit.yaml"), ("--out", "there")])
def test_on_the_spot_needs_model_and_data(given: tuple[str, str], tmp_path: Path) -> None:
    text = one_line(gate("clean.pt", *given, home=tmp_path))
    assert "--model and --data together" in text
