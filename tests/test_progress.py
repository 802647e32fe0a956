"""What the progress bars say of the audits, on a terminal, in a log file, and with other bars or none."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import pyte
import pytest
import pytorch_lightning as pl
import rich
import torch
from synthetic import make_run
from test_loggers import Wrapped, result_of, session_of
from training import Net, audit_set, fit, loader, trainer

from bias_audit import AuditPlan, read_run
from bias_audit.callbacks import BiasAuditCallback
from bias_audit.callbacks.progress import UNDER_WAY, ProgressBarSink, under_way
from bias_audit.callbacks.scalars import in_words
from bias_audit.records.results import AuditResult
from bias_audit.stages.scoring import score_batch
from bias_audit.terms import Verdict

# Two batches an audit, so that its bar moves.
PLAN = AuditPlan(batch_size=6, fitness_samples=0, intervention_samples=0)


class Screen(io.StringIO):
    """Standard output as a terminal or, with `tty=False`, a file; in `encoding`."""

    def __init__(self, tty: bool = True, encoding: str = "utf-8") -> None:
        super().__init__()
        self._tty, self._encoding = tty, encoding

    @property
    def encoding(self) -> str:
        return self._encoding

    def isatty(self) -> bool:
        return self._tty

    def write(self, words: str) -> int:
        words.encode(self._encoding)
        return super().write(words)

    def rows(self) -> list[str]:
        """What a person sees now."""
        terminal = pyte.Screen(120, 40)
        pyte.Stream(terminal).feed(self.getvalue().replace("\n", "\r\n"))
        return [row.rstrip() for row in terminal.display if row.strip()]


@pytest.fixture(autouse=True)
def _wide_terminal_and_no_page(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # The page takes most of the time of so short a training, and is another test's.
    monkeypatch.setattr("bias_audit.callbacks.page.ReportSink.write", lambda sink, result: None)
    monkeypatch.setattr("bias_audit.callbacks.page.ReportSink.end", lambda sink, error="": None)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    # Rich keeps one console for all: the next test gets a new one.
    yield
    rich.reconfigure()


def shown(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Screen:
    screen = Screen(**options)
    monkeypatch.setattr(sys, "stdout", screen)
    return screen


def train(path: Path, package: Any, *callbacks: Any, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
        "enable_model_summary": False, "default_root_dir": path,
    }  # fmt: skip
    run = package.Trainer(callbacks=list(callbacks), **(settings | options))
    pl.seed_everything(0, verbose=False)
    run.fit(Net() if package is pl else Wrapped(), loader(2), loader(1, shuffle=False) if package is pl else None)
    return run


def lines_for(path: Path) -> list[str]:
    return [f"bias_audit, {in_words(a)}" for a in read_run(path).audits if a.trigger != "reference"]


@pytest.mark.parametrize("package", [pl, lp])
@pytest.mark.parametrize("kind", ["TQDMProgressBar", "RichProgressBar"])
def test_a_line_after_each_audit_and_a_bar_while_it_runs(
    package: Any, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen, tqdm = shown(monkeypatch), kind == "TQDMProgressBar"
    bar = getattr(package.callbacks, kind)()
    audit = BiasAuditCallback(audit_set(), plan=PLAN, on_error="raise")
    halfway: list[list[str]] = []

    def scored(*args: Any) -> Any:
        if len(calls) % 2:
            halfway.append(screen.rows())
        calls.append(1)
        return score_batch(*args)

    calls: list[int] = []
    monkeypatch.setattr("bias_audit.audit.score_batch", scored)
    # Without a sanity check, so that the audit before training comes before the bar.
    train(tmp_path, package, audit, bar, num_sanity_val_steps=0)
    expected = lines_for(tmp_path)
    assert len(expected) == 2
    # Before training there is nothing yet to stand next to, on a Rich bar.
    assert [any(UNDER_WAY in row and "6/12" in row for row in rows) for rows in halfway] == [tqdm, True, True]
    assert [sum(row in expected for row in rows) for rows in halfway] == [0, 0, 1]
    rows = screen.rows()
    assert [row for row in rows if row.startswith("bias_audit")] == expected
    assert not any(UNDER_WAY in row for row in rows), "nothing of it is left on the screen"
    assert sum(row.startswith("Epoch 1") for row in rows) == 1
    if not tqdm:
        # Lightning finds its own tasks by their place, so ours must not move them.
        assert [task.id for task in bar.progress.tasks] == list(range(len(bar.progress.tasks)))
        assert bar.train_progress_bar.description.startswith("Epoch")


@pytest.mark.parametrize("kind", ["TQDMProgressBar", "RichProgressBar"])
def test_a_log_file_gets_the_lines_and_no_bar(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = shown(monkeypatch, tty=False)
    audit = BiasAuditCallback(audit_set(), plan=PLAN, on_error="raise")
    train(tmp_path, pl, audit, getattr(pl.callbacks, kind)())
    # tqdm goes up a row in a file too.
    rows = screen.getvalue().replace("\x1b[A", "").splitlines()
    assert [row for row in rows if row.startswith("bias_audit")] == lines_for(tmp_path)
    assert UNDER_WAY not in screen.getvalue()


@pytest.mark.parametrize(
    ("bar", "options"),
    [
        (None, {"enable_progress_bar": False}),
        (pl.callbacks.TQDMProgressBar(refresh_rate=0), {}),
        (pl.callbacks.RichProgressBar(refresh_rate=0), {}),
    ],
)
def test_without_a_bar_nothing_is_said(
    bar: Any, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = shown(monkeypatch)
    train(tmp_path, pl, BiasAuditCallback(audit_set(), plan=PLAN), *([bar] if bar else []), max_epochs=1, **options)
    assert len(lines_for(tmp_path)) == 1
    assert "bias" not in screen.getvalue().lower()


class OwnBar(pl.callbacks.ProgressBar):
    """A user's own: it keeps what it is given to print."""

    def __init__(self) -> None:
        super().__init__()
        self.printed: list[Any] = []

    def disable(self) -> None: ...
    def enable(self) -> None: ...
    def print(self, *args: Any, **kwargs: Any) -> None:
        self.printed.append((args, kwargs))


def test_another_bar_prints_the_lines_its_own_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = shown(monkeypatch)
    bar = OwnBar()
    train(tmp_path, pl, BiasAuditCallback(audit_set(), plan=PLAN, on_error="raise"), bar)
    assert bar.printed == [((line,), {}) for line in lines_for(tmp_path)]
    assert "bias" not in screen.getvalue().lower()


class BrokenBar(OwnBar):
    def print(self, *args: Any, **kwargs: Any) -> None:
        raise BrokenPipeError("nobody reads")


def test_a_bar_that_cannot_print_is_left_out(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="BrokenBar failed and is left out .* nobody reads") as told:
        train(tmp_path, pl, BiasAuditCallback(audit_set(), plan=PLAN), BrokenBar())
    assert sum("bias-audit" in str(w.message) for w in told) == 1
    assert len(read_run(tmp_path).audits) == 3


@pytest.mark.parametrize("kind", ["TQDMProgressBar", "RichProgressBar"])
def test_an_audit_that_fails_takes_its_bar_away(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = shown(monkeypatch)
    bar = getattr(pl.callbacks, kind)()

    class Breaks(pl.Callback):
        def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if not trainer.sanity_checking:
                # From the second batch of the next audit on.
                monkeypatch.setattr("bias_audit.audit.score_batch", lambda *args: _second(calls, args))

    calls: list[int] = []
    audit = BiasAuditCallback(audit_set(), plan=PLAN)
    with pytest.warns(RuntimeWarning, match="the audit at step 1 failed"):
        train(tmp_path, pl, Breaks(), audit, bar, max_epochs=1)
    assert UNDER_WAY in screen.getvalue() and not any(UNDER_WAY in row for row in screen.rows())
    # The audit that training ends with was made, and has its line.
    assert [row for row in screen.rows() if row.startswith("bias_audit")] == lines_for(tmp_path)


def _second(calls: list[int], args: tuple[Any, ...]) -> Any:
    calls.append(1)
    if len(calls) == 2:
        raise MemoryError("no memory")
    return score_batch(*args)


@pytest.mark.parametrize("kind", ["TQDMProgressBar", "RichProgressBar"])
def test_training_is_the_same_with_and_without_the_audits_bars(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown(monkeypatch)
    ends = []
    for audits in ([], [BiasAuditCallback(audit_set(), plan=PLAN, dirpath=tmp_path / "run")]):
        run = trainer(tmp_path, *audits, getattr(pl.callbacks, kind)(), enable_progress_bar=True, max_epochs=1)
        ends.append(([*fit(run).state_dict().values()], torch.get_rng_state()))
    assert all(torch.equal(a, b) for a, b in zip(ends[0][0], ends[1][0], strict=True))
    assert torch.equal(ends[0][1], ends[1][1])


# Names that come from data.


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, AuditResult]:
    regions = [("[red]hair[/red]\n\x1b[31m:smile:", "spurious"), ("Gesichtsröte 医生", "spurious")]
    path = tmp_path_factory.mktemp("hostile") / "run"
    run = read_run(make_run(path, samples=8, audits=1, regions=regions))
    result = result_of(run)
    found = tuple(replace(f, verdict=Verdict.RELIANCE) for f in result.judgement.findings)
    return session_of(run), replace(result, judgement=replace(result.judgement, findings=found))


@pytest.mark.parametrize("bar", [pl.callbacks.TQDMProgressBar(), pl.callbacks.RichProgressBar(), OwnBar()])
def test_a_name_stays_text(bar: Any, hostile: tuple[Any, AuditResult], monkeypatch: pytest.MonkeyPatch) -> None:
    screen = shown(monkeypatch)
    sink = ProgressBarSink(bar)
    sink.start(hostile[0])
    sink.write(hostile[1])
    sink.fail(900, "no memory")
    sink.end()
    text = "\n".join(args[0] for args, _ in bar.printed) + "\n" if isinstance(bar, OwnBar) else screen.getvalue()
    assert "[red]hair[/red] \ufffd[31m:smile:" in text and "医生" in text
    assert text.count("\n") == 1 and text.endswith("\n") and "\x1b" not in text


@pytest.mark.parametrize("bar", [pl.callbacks.TQDMProgressBar(), pl.callbacks.RichProgressBar()])
def test_a_log_file_in_ascii_is_no_reason_to_fail(
    bar: Any, hostile: tuple[Any, AuditResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = shown(monkeypatch, tty=False, encoding="ascii")
    sink = ProgressBarSink(bar)
    sink.start(hostile[0])
    sink.write(hostile[1])
    assert "Gesichtsr?te ??" in screen.getvalue()


def test_the_audit_before_training_says_nothing(
    hostile: tuple[Any, AuditResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = shown(monkeypatch)
    sink = ProgressBarSink(pl.callbacks.TQDMProgressBar())
    sink.start(hostile[0])
    sink.write(replace(hostile[1], trigger="reference"))
    assert screen.getvalue() == ""


def test_another_rank_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = shown(monkeypatch)
    # Lightning disables the bars of all ranks but the first.
    bars = [None, pl.callbacks.TQDMProgressBar(), pl.callbacks.RichProgressBar()]
    for bar in bars:
        if bar is not None:
            bar.disable()
        with under_way(bar) as progress:
            progress(1, 2)
            progress(2, 2)
    assert screen.getvalue() == ""
