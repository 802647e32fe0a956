"""The checkpoint that is to be released: the step that it was saved at, and evidence that is older."""

from __future__ import annotations

import argparse
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import make_run
from training import Net, batches, trainer

from bias_audit.checkpoints import checkpoint_step
from bias_audit.cli import app
from bias_audit.records.errors import MissingEvidenceError

CLEAN: dict[str, Any] = {"hair_enrichment": 0.7, "gap": 0.02, "spread": 0.02}


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
        ("cut.ckpt", ValueError, "cannot be read as weights or a checkpoint"),
        ("empty.ckpt", ValueError, "cannot be read as weights or a checkpoint"),
        ("text.txt", ValueError, "cannot be read as weights or a checkpoint"),
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
        with pytest.raises(ValueError, match=r"--trust-checkpoint|cannot be read as weights"):
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


def test_stale_evidence_is_inconclusive(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clean = make_run(tmp_path / "clean", audits=1, **CLEAN)

    def gated(*arguments: Any) -> tuple[int, str]:
        code = app(["gate", str(clean), "--checkpoint", *map(str, arguments)], standalone_mode=False)
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
