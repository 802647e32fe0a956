"""`bias-audit run`: models from checkpoints and weights, on one rank and on several, and what becomes of mistakes."""

from __future__ import annotations

import inspect
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted import biased, clean, save_checkpoint, write_planted
from safetensors.torch import save_file

from bias_audit import Auditor, AuditPlan, read_run
from bias_audit.callbacks.loading import load
from bias_audit.callbacks.running import RunOptions, audit_checkpoint
from bias_audit.cli import main, run
from bias_audit.data.declared import read_declared
from bias_audit.ranks import Ranks
from bias_audit.records.runs import Run

OWN = """
from planted import Planted, biased, clean
class Bare(Planted):
    def __init__(self):
        super().__init__()
        self.head = __import__("torch").nn.Linear(4, 2)
class Counted(Planted):
    # Leaves a line for each forward pass in a file of its process.
    def forward(self, images):
        with open(f"passes-{__import__('os').getpid()}", "a") as file:
            print(len(images), file=file)
        return super().forward(images)
class Leaves(Planted):
    def forward(self, images):
        raise SystemExit(3)
class Interrupted(Planted):
    def forward(self, images):
        raise KeyboardInterrupt
class Dies(Planted):
    def forward(self, images):
        if __import__("torch").distributed.get_rank():
            __import__("os")._exit(9)
        return super().forward(images)
class Whole(__import__("torch").nn.Module):
    def __init__(self):
        super().__init__()
        self.body = Planted()
    def forward(self, images):
        return self.body(images)
class Marked:
    # Made, it makes a folder.
    def __init__(self, path):
        __import__("os").mkdir(path)
class Takes(Planted):
    def __init__(self, mod: Marked | None = None):
        super().__init__()
def number(): return 3
def fails(): raise KeyError("weights")
"""


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


Command = Callable[..., Done]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_planted(tmp_path_factory.mktemp("planted"))
    (root / "own_models.py").write_text(OWN)
    return root


@pytest.fixture
def command(planted: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """The console script in this process, begun in the folder of the pictures: Lightning takes seconds to import."""
    monkeypatch.chdir(planted)

    def run_command(*arguments: Any) -> Done:
        monkeypatch.setattr(sys, "argv", ["bias-audit", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        written = capfd.readouterr()
        return Done(int(ended.value.code or 0), written.out, written.err)

    return run_command


def arguments(model: str, out: Path, *more: Any, data: str = "audit.yaml") -> tuple[Any, ...]:
    return "run", "--model", model, "--data", data, "--out", out, "--accelerator", "cpu", *more


def same(one: Run, other: Run) -> None:
    """Every score and estimate, to the bit."""
    assert one.manifest.fingerprint == other.manifest.fingerprint
    first, second = one.scores(0), other.scores(0)
    for f in fields(first):
        np.testing.assert_array_equal(getattr(first, f.name), getattr(second, f.name), f.name)
    assert one.audits[0].estimates == other.audits[0].estimates
    assert one.audits[0].judgement == other.audits[0].judgement
    np.testing.assert_equal(vars(one.changed()), vars(other.changed()))
    sheets = [run.sheet() for run in (one, other)]
    np.testing.assert_equal(*(vars(sheet) | {"masks": vars(sheet.masks)} for sheet in sheets))


# What it finds, and what it leaves behind.


@pytest.fixture(scope="module")
def runs(planted: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run directory of a checkpoint, made once."""

    @cache
    def run_of(name: str) -> Path:
        out = tmp_path_factory.mktemp("runs") / name
        options = RunOptions(
            "planted:Planted",
            planted / "audit.yaml",
            out,
            planted / f"{name}.ckpt",
            training=planted / "training.csv",
            accelerator="cpu",
        )
        return audit_checkpoint(options)

    return run_of


@pytest.mark.parametrize(("name", "code"), [("biased", 1), ("clean", 0)])
def test_the_gate_refuses_a_planted_bias_and_passes_its_twin(
    runs: Callable[[str], Path], command: Command, name: str, code: int
) -> None:
    done = command("gate", runs(name))
    assert (done.code, done.err) == (code, "")


def test_a_run_directory_like_any_other(runs: Callable[[str], Path]) -> None:
    found = read_run(runs("biased"))
    assert found.ended and not found.torn and not found.failed
    audit = found.audits[0]
    assert [(audit.step, audit.epoch, audit.trigger, audit.weights)] == [(70, 7, "test", "raw")]
    # The names of layers are those that the class has by itself, as in its training.
    assert found.manifest.layer == "seen" and found.manifest.model == "Planted"
    assert found.manifest.samples_audited == 160
    assert "step 70" in (found.path / "report.html").read_text()
    assert audit.estimate("cramers_v", group="colour").value == pytest.approx(0.9, abs=0.05)


@pytest.mark.newest("rich 13 and 14 leave an empty line where a bar is not shown")
def test_what_it_is_told(command: Command, planted: Path, tmp_path: Path) -> None:
    (planted / "strict.yaml").write_text("min_samples: 33\n")
    given = ("--policy", "strict.yaml", "--layer", "colours", "--batch-size", 7, "--max-samples", 9, "--seed", 4)
    done = command(*arguments("planted:clean", tmp_path / "out", *given, "--precision", "bf16-true"))
    assert (done.code, done.out, done.err) == (0, f"{tmp_path / 'out'}\n", "")
    found = read_run(tmp_path / "out")
    told = found.manifest
    assert (told.policy.min_samples, told.layer, told.samples_audited, told.seed) == (33, "colours", 9, 4)
    assert found.audits[0].step == 0
    # bfloat16 has eight bits: a margin has no more.
    margin = torch.from_numpy(found.scores(0).margin)
    assert torch.equal(margin.bfloat16().float(), margin)


def test_the_defaults_are_the_plans() -> None:
    told = inspect.signature(run).parameters
    assert {name: told[name].default for name in ("layer", "batch_size", "max_samples", "seed")} == {
        name: getattr(AuditPlan(), name) for name in ("layer", "batch_size", "max_samples", "seed")
    }


@pytest.mark.parametrize("kind", ["pt", "safetensors", "checkpoint"])
def test_weights_of_every_kind(command: Command, planted: Path, tmp_path: Path, kind: str) -> None:
    net, path = biased(), tmp_path / f"weights.{kind}"
    if kind == "safetensors":
        save_file(net.state_dict(), path)
    elif kind == "pt":
        torch.save(net.state_dict(), path)
    else:
        save_checkpoint(path, net, step=11)
    given = ("--weights", path, "--max-samples", 8)
    assert command(*arguments("own_models:Bare", tmp_path / "out", *given)).code == 0
    audit = read_run(tmp_path / "out").audits[0]
    assert audit.step == (11 if kind == "checkpoint" else 0)
    # By its own weights it would not decide by the corner.
    assert audit.estimate("accuracy").value == 0.5


def test_an_earlier_run_is_no_evidence_of_an_audit_that_fails(
    command: Command, planted: Path, tmp_path: Path, runs: Callable[[str], Path]
) -> None:
    out = shutil.copytree(runs("clean"), tmp_path / "out")
    done = command(*arguments("planted:clean", out, "--layer", "head"))
    assert done.code == 2 and "layer 'head' has no spatial output" in done.err
    left = read_run(out)
    assert not left.audits and "layer 'head'" in left.failed
    assert command("gate", out).code == 3
    before = next((out / "previous").iterdir())
    assert len(read_run(before).audits) == 1


def test_weights_that_no_file_gives_are_drawn_by_the_seed() -> None:
    # Each rank makes the model itself.
    def weights(seed: int) -> torch.Tensor:
        return next(load("torchvision.models:squeezenet1_1", seed=seed).model.parameters()).detach()

    state = torch.get_rng_state()
    assert torch.equal(weights(0), weights(0)) and not torch.equal(weights(0), weights(1))
    assert torch.equal(torch.get_rng_state(), state)


# What cannot be loaded.


class Opens:
    """Unpickled it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("option", ["--checkpoint", "--weights"])
def test_code_in_a_checkpoint_runs_only_if_it_is_trusted(
    command: Command, tmp_path: Path, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the environment says of it does not decide.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = save_checkpoint(tmp_path / "a.ckpt", clean(), callbacks={"mine": Opens(tmp_path / "opened")})
    given = arguments("planted:Planted", tmp_path / "out", option, path, "--max-samples", 4)
    done = command(*given)
    assert done.code == 2 and not (tmp_path / "opened").exists() and not (tmp_path / "out").exists()
    assert "holds more than weights (posix.mkdir)" in done.err and "--trust-checkpoint" in done.err
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    if option == "--weights":
        assert command(*given, "--trust-checkpoint").code == 0
        assert (tmp_path / "opened").is_dir()


def test_a_trusted_checkpoint_makes_its_class(command: Command, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "a.ckpt", clean(), callbacks={"mine": Path("plain text is no weight")})
    given = arguments("planted:Planted", tmp_path / "out", "--checkpoint", path, "--max-samples", 4)
    assert command(*given).code == 2
    assert command(*given, "--trust-checkpoint").code == 0
    assert read_run(tmp_path / "out").audits[0].step == 70


@pytest.mark.parametrize("key", ["hparams", "module_arguments", "hyper_parameters"])
@pytest.mark.parametrize(
    "asked",
    [
        {"_instantiator": "os.mkdir"},
        {"_instantiator": "pytorch_lightning.cli.instantiate_module"},
        {"_class_path": "own_models.Takes"},
        [["_instantiator", "pytorch_lightning.cli.instantiate_module"]],
    ],
)
def test_a_checkpoint_does_not_choose_what_is_called(command: Command, tmp_path: Path, key: str, asked: Any) -> None:
    # Its own class would be made with an object of another that the file names.
    other = {"mod": {"class_path": "own_models.Marked", "init_args": {"path": str(tmp_path / "made")}}}
    asked = [*asked, *other.items()] if isinstance(asked, list) else asked | other
    path = save_checkpoint(tmp_path / "a.ckpt", clean(), **{"hyper_parameters": {}, key: asked})
    done = command(*arguments("own_models:Takes", tmp_path / "out", "--checkpoint", path))
    assert done.code == 2 and done.err.count("\n") == 1 and f"a.ckpt: {key}: " in done.err
    assert not (tmp_path / "made").exists()
    assert isinstance(asked, list) or ("names in _" in done.err and "add --trust-checkpoint" in done.err)


@pytest.mark.newest("rich 13 and 14 leave an empty line where a bar is not shown")
def test_a_trusted_checkpoint_of_lightning_cli(command: Command, tmp_path: Path) -> None:
    asked = {
        "_instantiator": "pytorch_lightning.cli.instantiate_module",
        "_class_path": "own_models.Takes",
        "mod": {"class_path": "own_models.Marked", "init_args": {"path": str(tmp_path / "made")}},
    }
    path = save_checkpoint(tmp_path / "a.ckpt", clean(), hyper_parameters=asked)
    given = ("--checkpoint", path, "--max-samples", 4, "--trust-checkpoint")
    done = command(*arguments("own_models:Takes", tmp_path / "out", *given))
    assert (done.code, done.err) == (0, "") and (tmp_path / "made").is_dir()


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"model.{name}",
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"net.model.{name}",
        lambda name: name.replace("head.", "head._orig_mod."),
    ],
)
def test_weights_of_a_model_that_was_wrapped(planted: Path, tmp_path: Path, rename: Callable[[str], str]) -> None:
    torch.save({rename(name): value for name, value in biased().state_dict().items()}, tmp_path / "w")
    loaded = load("own_models:Bare", weights=tmp_path / "w").model.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in biased().state_dict().items())


def test_weights_of_another_model_that_was_wrapped(planted: Path, tmp_path: Path) -> None:
    state = {f"model.{name}": value for name, value in clean().state_dict().items()}
    bare = {key.removeprefix("model."): value for key, value in state.items()}
    more = {"loss.weight": torch.ones(2)}
    for name, content, message in (
        ("Bare", {k: v for k, v in state.items() if "bias" not in k}, "without `model.`.* does not fit Bare: it lacks"),
        ("Bare", state | {"model.head.bias": torch.zeros(3)}, "without `model.`.* does not fit Bare: RuntimeError"),
        # No prefix of all.
        ("Bare", state | more, "w: does not fit Bare: it lacks .*the model has no model.colours.weight"),
        # Nothing is taken off that belongs to the model, and nothing is added.
        ("Whole", {f"body.{k}": v for k, v in bare.items() if "bias" not in k}, "w: does not fit Whole: it lacks body"),
        ("Whole", bare, "w: does not fit Whole: it lacks body"),
    ):
        torch.save(content, tmp_path / "w")
        with pytest.raises(ValueError, match=message):
            load(f"own_models:{name}", weights=tmp_path / "w")


def files(tmp_path: Path) -> dict[str, Path]:
    """Damaged and unfitting files by name."""
    state = clean().state_dict()
    wrong = {
        "lacking": {k: v for k, v in state.items() if k != "head.bias"},
        "beyond": state | {"tail.weight": torch.zeros(1), "tail.bias": torch.zeros(1)},
        "shape": state | {"head.bias": torch.zeros(3)},
        "list": [1, 2],
        "number": {"state_dict": 3},
        "no state": {"global_step": 4},
    }
    for name, content in wrong.items():
        torch.save(content, tmp_path / name)
    whole = (tmp_path / "lacking").read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text.safetensors").write_text("no tensors at all")
    (tmp_path / "pickle").write_bytes(pickle.dumps({"a": Opens(tmp_path / "opened")}))
    return {path.name: path for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("option", "file", "message"),
    [
        ("--weights", "lacking", "does not fit Planted: it lacks head.bias"),
        ("--weights", "beyond", "does not fit Planted: the model has no tail.weight, tail.bias"),
        ("--weights", "shape", "does not fit Planted: RuntimeError: .*size mismatch for head.bias"),
        ("--weights", "list", "expected a state dict or a Lightning checkpoint, got list"),
        ("--weights", "number", "expected a state dict, from names to tensors, got int"),
        ("--weights", "cut", "cannot be read as weights or a checkpoint"),
        ("--weights", "empty", "cannot be read as weights or a checkpoint"),
        ("--weights", "pickle", "cannot be read as weights or a checkpoint"),
        ("--weights", "text.safetensors", "cannot be read as safetensors"),
        ("--weights", "nowhere.safetensors", "cannot be read as safetensors"),
        ("--weights", "nowhere", "cannot be read .No such file"),
        ("--weights", ".", "cannot be read .Is a directory"),
        ("--checkpoint", "lacking", "holds no `state_dict`, so it is weights and no Lightning checkpoint: `run` takes"),
        ("--checkpoint", "number", "holds no `state_dict`"),
        ("--checkpoint", "cut", "cannot be read as weights or a checkpoint"),
    ],
)
def test_files_that_do_not_fit(command: Command, tmp_path: Path, option: str, file: str, message: str) -> None:
    path = files(tmp_path).get(file, tmp_path / file)
    done = command(*arguments("planted:Planted", tmp_path / "out", option, path))
    assert done.code == 2 and not (tmp_path / "opened").exists()
    assert done.err.count("\n") == 1 and "internal error" not in done.err and str(path) in done.err
    assert re.search(message, done.err), done.err


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        ("planted", (), "--model: expected package.module:name, got 'planted'"),
        ("nowhere:Net", (), "--model: 'nowhere:Net' cannot be imported (ModuleNotFoundError"),
        ("own_models:number", (), "--model: 'own_models:number' returned int, expected an nn.Module"),
        ("own_models:fails", (), "--model: 'own_models:fails' raised KeyError: 'weights'"),
        ("planted:clean", ("--checkpoint", "clean.ckpt"), "'planted:clean' is no LightningModule class"),
        ("planted:clean", ("--checkpoint", "a", "--weights", "b"), "--checkpoint (with a LightningModule class) or"),
        ("planted:clean", ("--devices", "many"), "the Trainer cannot be made with accelerator cpu, devices many"),
        ("planted:clean", ("--strategy", "dpp"), "the Trainer cannot be made with"),
        ("planted:clean", ("--precision", "8"), "the Trainer cannot be made with"),
        ("planted:clean", ("--batch-size", 0), "batch_size must be at least 1, got 0"),
        ("planted:clean", ("--data", "nowhere.yaml"), "nowhere.yaml: cannot be read"),
        ("planted:clean", ("--policy", "audit.yaml"), "policy audit.yaml, line 1: reader: unknown key"),
        ("planted:clean", ("--training", "labels.txt"), "labels.txt: cannot be read as CSV"),
        ("planted:clean", ("--layer", "nowhere"), "nowhere"),
        ("own_models:Leaves", (), "the model ended the process (sys.exit(3)), expected it to return its outputs"),
        ("planted:clean", ("--out", "labels.csv"), "--out labels.csv: is a file: name a directory"),
        ("planted:clean", ("--batch", 3), "No such option"),
    ],
)
def test_mistakes_are_one_line(
    command: Command, tmp_path: Path, model: str, more: tuple[Any, ...], message: str
) -> None:
    done = command(*arguments(model, tmp_path / "out", *more))
    assert done.code == 2 and message in done.err and done.out == ""
    assert "internal error" not in done.err and "Traceback" not in done.err


def test_an_interrupt_is_no_mistake(command: Command, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        done = command(*arguments("own_models:Interrupted", tmp_path / "out"))
    finally:
        # Lightning is not to be interrupted twice.
        signal.signal(signal.SIGINT, before)
    assert done.code == 130 and "the model ended" not in done.err


def test_a_class_that_its_checkpoint_does_not_fit(command: Command, tmp_path: Path) -> None:
    content = torch.load(save_checkpoint(tmp_path / "a.ckpt", clean()), weights_only=True)
    del content["state_dict"]["head.bias"]
    torch.save(content, tmp_path / "a.ckpt")
    done = command(*arguments("planted:Planted", tmp_path / "out", "--checkpoint", tmp_path / "a.ckpt"))
    assert done.code == 2 and "'planted:Planted' cannot be made from it" in done.err and "head.bias" in done.err


# Several ranks. `ddp` starts the console script anew for each.


def started(planted: Path, *given: Any) -> subprocess.CompletedProcess[str]:
    script = Path(sys.executable).with_name("bias-audit")
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    line = [str(script), *map(str, given)]
    return subprocess.run(line, cwd=planted, env=environment, capture_output=True, text=True, timeout=120)


@dataclass(frozen=True)
class Watched(Ranks):
    """One rank alone, with the numbers of pieces that it was given."""

    counts: list[int] = field(default_factory=list)

    def shared(self, count: int, *work: Any) -> list[Any]:
        self.counts.append(count)
        return super().shared(count, *work)


@pytest.fixture
def forked(command: Command, planted: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Command]:
    """The console script, whose ranks are forked from this process where they can be: a new one takes seconds."""
    if torch.cuda.is_initialized():

        def run_anew(*arguments: Any) -> Done:
            done = started(planted, *arguments)
            return Done(done.returncode, done.stdout, done.stderr)

        yield run_anew
        return
    # Threads do not outlive a fork.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield command
    torch.set_num_threads(threads)


FORKED = ("--devices", 2, "--strategy", "ddp_fork")


def passes(planted: Path) -> list[int]:
    """Forward passes of each process."""
    found = [path.read_text().count("\n") for path in planted.glob("passes-*")]
    for path in planted.glob("passes-*"):
        path.unlink()
    return found


@pytest.mark.newest("gloo writes to standard output in torch 2.8")
def test_two_ranks_give_what_one_gives_with_less_work(forked: Command, planted: Path, tmp_path: Path) -> None:
    # 13 images in batches of 4: the last batch is short, and neither images nor batches can be halved.
    given = ("--weights", "biased.ckpt", "--batch-size", 4, "--max-samples", 13)
    done = forked(*arguments("own_models:Counted", tmp_path / "two", *given, *FORKED))
    assert done == Done(0, f"{tmp_path / 'two'}\n", "")
    by_two = passes(planted)
    assert forked(*arguments("own_models:Counted", tmp_path / "one", *given)).code == 0
    [alone] = passes(planted)
    one = read_run(tmp_path / "one")
    same(one, read_run(tmp_path / "two"))
    # Each rank makes as many passes as the other: half of them, but for the test of the methods, which each makes.
    watched = Watched()
    Auditor(read_declared(planted / "audit.yaml"), AuditPlan(batch_size=4, max_samples=13)).run(biased(), ranks=watched)
    scoring, making, changed, probing = watched.counts
    assert (scoring, making, probing) == (4, 13, 4)
    assert by_two == [alone - scoring // 2 - changed // 2 - probing // 2] * 2


@pytest.mark.newest("gloo writes to standard output in torch 2.8")
@pytest.mark.parametrize("anew", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_image_that_one_rank_cannot_decode_ends_all(
    forked: Command, planted: Path, tmp_path: Path, anew: bool
) -> None:
    root = shutil.copytree(planted, tmp_path / "planted")
    # The first of the audit set is the first rank's, the last the second's: each says what both found.
    rows = (root / "labels.csv").read_text().splitlines()[1:]
    broken = [row.split(",")[0] for row in (rows[0], rows[-1])]
    for name in broken:
        picture = root / "images" / name
        picture.write_bytes(picture.read_bytes()[:100])
    given = arguments("planted:clean", tmp_path / "out", data=str(root / "audit.yaml"))
    if anew:
        ended = started(root, *given, "--devices", 2)
        done = Done(ended.returncode, ended.stdout, ended.stderr)
    else:
        done = forked(*given, *FORKED)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 2)
    for name, line in zip(broken, done.err.splitlines(), strict=True):
        assert line.startswith(f"bias-audit: sample '{name}': does not decode")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("own_models:Dies", "(a rank is gone: process 1 terminated with exit code 9|another rank is gone: )"),
        ("own_models:Leaves", "(the model ended the process|SystemExit: 3 .on rank)"),
    ],
)
def test_a_rank_that_ends_ends_all(planted: Path, tmp_path: Path, model: str, said: str) -> None:
    done = started(planted, *arguments(model, tmp_path / "out", *FORKED))
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert re.match(f"bias-audit: {said}", done.stderr), done.stderr
    assert ".cc:" not in done.stderr and "RankError" not in done.stderr
