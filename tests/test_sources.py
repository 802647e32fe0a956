"""Where evidence comes from: W&B runs on disk and through its API, and checkpoints audited on the spot."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from planted import clean, write_planted
from synthetic import make_run
from wandb_server import Double, Logged, serving

from bias_audit.callbacks import Session, WandbSink
from bias_audit.callbacks.wandb.writer import WandbWriter
from bias_audit.cli import app
from bias_audit.records.errors import MissingEvidenceError, RecordError
from bias_audit.records.files import AUDITS, COPIES, MANIFEST, find_run
from bias_audit.records.results import AuditResult
from bias_audit.records.runs import read_run
from bias_audit.sources import open_run

CLEAN: dict[str, Any] = {"hair_enrichment": 0.7, "gap": 0.02, "spread": 0.02}
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "FORCE_COLOR", "XDG_"))}
# Opens each source and says what became of it.
OPEN = """
import json, sys
from bias_audit.records.runs import read_run
from bias_audit.sources import open_run
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
