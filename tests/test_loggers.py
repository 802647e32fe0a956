"""TensorBoard, MLflow and CSV: what is logged is read back with each one's own reader; one that fails fails alone."""

from __future__ import annotations

import csv
import io
import math
import random
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image, ImageChops
from pytorch_lightning.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger
from synthetic import make_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import Wrapped, audit_set, fit, loader, trainer

from bias_audit import AuditPlan, read_run
from bias_audit.callbacks import Background, BiasAuditCallback, Session
from bias_audit.callbacks.grids import TILE, grid, listing
from bias_audit.callbacks.loggers import sinks_of
from bias_audit.callbacks.mlflow import MlflowSink, metric_key
from bias_audit.callbacks.scalars import LoggerSink, in_words, scalars
from bias_audit.callbacks.sinks import FanOut
from bias_audit.callbacks.tensorboard import TensorBoardSink
from bias_audit.overlays import overlay
from bias_audit.records.panels import fixed_panel
from bias_audit.records.results import AuditResult
from bias_audit.records.runs import Run
from bias_audit.terms import Estimate, Verdict

PLAN = AuditPlan(batch_size=8, fitness_samples=0)
HARD_IDS = ("<script>alert(1)</script>", "a\nb", "[red]c[/red]", "d,e", "L" * 300, "医生", "a|b `c` **d**", "\x1b[31mx")
HARD_CLASSES = ("nurse, trainee", "nurse; trainee", "a/b", "医生", "护士", "<b>", "[red]", "\n", "C" * 300, "C" * 301)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where MLflow keeps its runs: it takes a second to make such a place."""
    return tmp_path_factory.mktemp("mlflow")


def mlflow_logger(store: Path, package: Any = pl) -> MLFlowLogger:
    options = {"tracking_uri": f"sqlite:///{store}/m.db", "artifact_location": str(store / "artifacts")}
    return package.loggers.MLFlowLogger("x", **options)


def events_of(logger: Any) -> EventAccumulator:
    found = EventAccumulator(logger.log_dir, size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    return found.Reload()


def listed(client: Any, run_id: str, path: str | None = None) -> list[str]:
    return [item.path for item in client.list_artifacts(run_id, path)]


def generators() -> tuple[Any, ...]:
    # Users' augmentations draw from the legacy one.
    legacy = np.random.get_state()[1].tolist()  # noqa: NPY002
    return random.getstate(), legacy, torch.get_rng_state().tolist()


def session_of(run: Run) -> Session:
    return Session("bias_audit", run.path, run.manifest, run.sheet())


def result_of(run: Run, index: int = -1, **changes: Any) -> AuditResult:
    return AuditResult(**vars(replace(run.audits[index], **changes)), scores=run.scores(index))


@dataclass(frozen=True)
class Trained:
    """A training, and then a test of the same Trainer, with three loggers."""

    run: Run
    tensorboard: TensorBoardLogger
    csv: CSVLogger
    mlflow: MLFlowLogger
    ours: tuple[dict[str, float], ...]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Trained:
    path = tmp_path_factory.mktemp("loggers")
    loggers = TensorBoardLogger(path), CSVLogger(path, flush_logs_every_n_steps=1), mlflow_logger(store)
    # A run that is already there stays out of what is uploaded.
    make_run(path / "run", audits=1, samples=4)
    audit = BiasAuditCallback(audit_set(), dirpath=path / "run", plan=PLAN, on_error="raise")
    run = trainer(path, audit, logger=list(loggers), log_every_n_steps=1, max_epochs=1)
    net = fit(run)
    run.test(net, loader(2, shuffle=False), verbose=False)
    read = read_run(path / "run")
    numbers = tuple(scalars(result_of(read, i), "bias_audit") for i in range(len(read.audits)))
    return Trained(read, *loggers, numbers)


@pytest.fixture(autouse=True)
def _no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    # It takes most of the time of so short a training. The one that `trained` makes is uploaded.
    monkeypatch.setattr("bias_audit.callbacks.page.ReportSink.write", lambda sink, result: None)
    monkeypatch.setattr("bias_audit.callbacks.page.ReportSink.end", lambda sink, error="": None)


def test_the_audits_that_are_looked_at_have_what_could_go_wrong(trained: Trained) -> None:
    assert [a.trigger for a in trained.run.audits] == ["reference", "validation", "test"]
    first, later = set(trained.ours[0]), set(trained.ours[-1])
    assert later - first, "an audit that measures what the first one did not"
    assert any(math.isnan(number) for number in trained.ours[0].values())


def test_tensorboard_has_every_number_at_its_step(trained: Trained) -> None:
    events = events_of(trained.tensorboard)
    for key in {key for numbers in trained.ours for key in numbers}:
        expected = [(a.step, n[key]) for a, n in zip(trained.run.audits, trained.ours, strict=True) if key in n]
        logged = [(e.step, e.value) for e in events.Scalars(key)]
        np.testing.assert_allclose(logged, expected, rtol=1e-6, err_msg=key)


def test_tensorboard_replays_training(trained: Trained) -> None:
    events = events_of(trained.tensorboard)
    assert set(events.Tags()["images"]) == {"bias_audit/overlays/panel", "bias_audit/overlays/worst"}
    steps = [a.step for a in trained.run.audits]
    sheet = trained.run.sheet()
    texts = [t.tensor_proto.string_val[0].decode() for t in events.Tensors("bias_audit/verdicts/text_summary")]
    for kind in ("panel", "worst"):
        pictures = events.Images(f"bias_audit/overlays/{kind}")
        assert [p.step for p in pictures] == steps
        for index, picture in enumerate(pictures):
            scores = trained.run.scores(index)
            # The text says which samples were drawn: each tile is that one's thumbnail under its own heatmap.
            lines = texts[index].split(f"overlays/{kind}:\n")[1].split("\n    \n")[0].splitlines()
            drawn = [sheet.ids.index(line.strip().split(". ", 1)[1].split(", ")[0]) for line in lines]
            assert len(drawn) == 8 or (kind == "worst" and 0 < len(drawn) < 8)
            image = Image.open(io.BytesIO(picture.encoded_image_string))
            for place, sample in enumerate(drawn):
                left, top = 8 + place % 4 * 168, 8 + place // 4 * (TILE + 45 + 8)
                tile = image.crop((left, top, left + TILE, top + TILE))
                thumbnail = Image.open(io.BytesIO(sheet.thumbnails[sample])).convert("RGB")
                expected = overlay(thumbnail, scores.maps[0, sample].astype(np.float32)).resize((TILE, TILE))
                assert ImageChops.difference(tile, expected).getextrema() == ((0, 0),) * 3
            if kind == "panel":
                assert drawn == fixed_panel(sheet, 8)
            else:
                shares = np.nansum([scores.of("energy_share", "gradcam", r) for r in ("face", "hair")], axis=0)
                assert shares[drawn].min() >= np.delete(shares, drawn).max()


def test_tensorboard_says_what_follows(trained: Trained) -> None:
    texts = events_of(trained.tensorboard).Tensors("bias_audit/verdicts/text_summary")
    for audit, text in zip(trained.run.audits, texts, strict=True):
        said = text.tensor_proto.string_val[0].decode()
        assert in_words(audit) in said
        for finding in audit.judgement.findings:
            assert (finding.sentence in said) == (audit.trigger != "reference")


def test_csv_has_every_number_though_some_come_later(trained: Trained) -> None:
    with (Path(trained.csv.log_dir) / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["bias_audit/violations"]]
    assert [int(row["step"]) for row in rows] == [a.step for a in trained.run.audits]
    for row, numbers in zip(rows, trained.ours, strict=True):
        logged = {k: float(v) for k, v in row.items() if v and k.startswith("bias_audit/")}
        assert logged == pytest.approx(numbers, nan_ok=True)


def test_mlflow_has_every_number_that_was_measured(trained: Trained) -> None:
    client, run_id = trained.mlflow.experiment, trained.mlflow.run_id
    assert "bias_audit/accuracy.gender.female" in client.get_run(run_id).data.metrics
    for key in {key for numbers in trained.ours for key in numbers}:
        logged = [(m.step, m.value) for m in client.get_metric_history(run_id, metric_key(key))]
        # Two audits are at one step: the store gives them in the order of their values.
        audits = zip(trained.run.audits, trained.ours, strict=True)
        expected = [(a.step, n[key]) for a, n in audits if key in n and not math.isnan(n[key])]
        np.testing.assert_allclose(sorted(logged), sorted(expected), err_msg=key)


def test_mlflow_has_pictures_a_tag_and_the_run_directory(trained: Trained, tmp_path: Path) -> None:
    client, run_id = trained.mlflow.experiment, trained.mlflow.run_id
    assert client.get_run(run_id).data.tags["bias_audit"] == in_words(trained.run.audits[-1])
    pictures = [p for p in listed(client, run_id, "images") if p.endswith(".png")]
    for kind in ("panel", "worst"):
        ours = [p for p in pictures if f"overlays.{kind}" in p]
        steps = sorted(int(p.split("step")[1].strip("+%").split("+")[0].split("%")[0]) for p in ours)
        assert steps == [a.step for a in trained.run.audits]
    fetched = Path(client.download_artifacts(run_id, "bias_audit", str(tmp_path)))
    for name in ("report.html", "manifest.json", "audits.jsonl", "audits/000002.npz"):
        assert (fetched / name).read_bytes() == (trained.run.path / name).read_bytes()
    assert (trained.run.path / "previous").exists() and not (fetched / "previous").exists()
    # Whoever downloads them has a run directory.
    assert read_run(fetched).audits == trained.run.audits


def test_mlflow_keeps_them_in_files_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # There a metric `a` and a metric `a/b` would be a file and a folder of one name.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run = read_run(make_run(tmp_path / "run", samples=8, audits=1))
    logger = MLFlowLogger("x", tracking_uri=f"file:{tmp_path}/mlruns")
    sink = MlflowSink(logger)
    sink.start(session_of(run))
    result = result_of(run)
    sink.write(result)
    numbers = {metric_key(k): v for k, v in scalars(result, "bias_audit").items() if not math.isnan(v)}
    assert logger.experiment.get_run(logger.run_id).data.metrics == pytest.approx(numbers)


def test_mlflow_takes_more_than_a_request_holds_and_any_name(tmp_path: Path, store: Path) -> None:
    run = read_run(
        make_run(tmp_path / "run", samples=20, audits=1, classes=HARD_CLASSES, ids=[*HARD_IDS, *"abcdefghijkl"])
    )
    many = tuple(Estimate(f"metric {i}", i, i, i, 9) for i in range(1001))
    result = result_of(run, estimates=run.audits[-1].estimates + many)
    logger = mlflow_logger(store)
    sink = MlflowSink(logger)
    sink.start(session_of(run))
    with warnings.catch_warnings():
        # Lightning warns where it changes a name: none is left to change.
        warnings.simplefilter("error", RuntimeWarning)
        sink.write(result)
    sink.fail(900, "no memory\nleft " + "x" * 9000)
    ours = {k: v for k, v in scalars(result, "bias_audit").items() if not math.isnan(v)}
    logged = logger.experiment.get_run(logger.run_id).data
    assert len(ours) > 1000 and sorted(logged.metrics.values()) == pytest.approx(sorted(ours.values()))
    assert logged.metrics["bias_audit/metric 1000"] == 1000
    assert logged.tags["bias_audit"].startswith("step 900: no audit, no memory left xxx")


@pytest.mark.parametrize(
    "name",
    [
        "bias_audit/accuracy/nurse, trainee",
        "bias_audit/accuracy/nurse; trainee",
        "bias_audit/accuracy/" + "C" * 300,
        "bias_audit/accuracy/" + "C" * 301,
        "bias_audit/accuracy/医生",
        "bias_audit/accuracy/护士",
        "bias_audit/accuracy/..//",
    ],
)
def test_every_name_becomes_a_key_of_its_own(name: str) -> None:
    others = ["bias_audit/accuracy", "bias_audit/accuracy/nurse_ trainee", "bias_audit/accuracy/" + "C" * 302]
    keys = {metric_key(n) for n in [name, name + "x", *others]}
    assert len(keys) == 5
    assert all(len(key) <= 250 and key.isascii() and key.count("/") == 1 for key in keys)


def test_what_comes_from_data_stays_text_in_tensorboard(tmp_path: Path) -> None:
    classes = ("<script>alert(2)</script>", "[x](javascript:alert(3))")
    run = read_run(make_run(tmp_path / "run", samples=8, audits=1, ids=HARD_IDS, classes=classes))
    logger = TensorBoardLogger(tmp_path)
    sink = TensorBoardSink(logger)
    sink.start(session_of(run))
    sink.write(result_of(run))
    sink.fail(900, "<script>\n# no memory")
    sink.end()
    from tensorboard.plugin_util import markdown_to_safe_html

    texts = events_of(logger).Tensors("bias_audit/verdicts/text_summary")
    said, failed = (t.tensor_proto.string_val[0].decode() for t in texts)
    # As TensorBoard shows it: a listing and nothing else.
    html = markdown_to_safe_html(said.encode())
    assert html.startswith("<pre><code>") and html.rstrip().endswith("</code></pre>") and html.count("<") == 4
    for name in ("&lt;script&gt;alert(1)", "[red]c[/red]", "a b", "医生", "**d**", "L" * 300, "\ufffd[31mx"):
        assert name in html
    assert failed == "    step 900: no audit, <script> # no memory"


def test_a_caption_is_as_wide_as_its_picture(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", samples=8, audits=1, ids=HARD_IDS, image_size=(40, 120)))
    picture = np.asarray(grid(session_of(run), run.scores(0), range(8)))
    between = [picture[:, :8], *(picture[:, x : x + 8] for x in (168, 336, 504, 672))]
    assert all((gap == 255).all() for gap in between)
    assert (picture[170:185, 8:168] < 128).any(), "the first id is drawn"
    assert grid(session_of(run), run.scores(0), [0, 1]).width == 2 * 168 + 8
    assert listing(session_of(run), run.scores(0), [4])[0].startswith("1. " + "L" * 300)
    with pytest.raises(ValueError, match="at least one"):
        grid(session_of(run), run.scores(0), [])


def test_without_regions_there_are_no_worst(tmp_path: Path, store: Path) -> None:
    run = read_run(make_run(tmp_path / "run", samples=8, audits=1, regions=[("wall", "context")]))
    for sink, logger in ((TensorBoardSink, TensorBoardLogger(tmp_path)), (MlflowSink, mlflow_logger(store))):
        written = sink(logger)
        written.start(session_of(run))
        written.write(result_of(run))
        written.end()
    assert events_of(TensorBoardLogger(tmp_path, version=0)).Tags()["images"] == ["bias_audit/overlays/panel"]


def test_they_move_no_global_generator(tmp_path: Path, store: Path) -> None:
    run = read_run(make_run(tmp_path / "run", samples=8, audits=2))
    for sink in (TensorBoardSink(TensorBoardLogger(tmp_path)), MlflowSink(mlflow_logger(store))):
        sinks, before = FanOut([sink], "raise"), generators()
        sinks.start(session_of(run))
        sinks.write(result_of(run, 0))
        sinks.write(result_of(run, 1))
        sinks.fail(900, "no memory")
        sinks.end()
        assert before == generators()


class Drawing:
    """A sink that draws from every global generator whenever it is called."""

    def start(self, session: Session) -> None:
        self._draw()

    def write(self, result: AuditResult) -> None:
        self._draw()

    def fail(self, step: int, reason: str) -> None:
        self._draw()
        raise OSError("and fails")

    def end(self, error: str = "") -> None:
        self._draw()

    def _draw(self) -> None:
        random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002


def test_what_a_sink_draws_is_given_back(tmp_path: Path) -> None:
    run, sink = read_run(make_run(tmp_path / "run", samples=8, audits=1)), Drawing()
    sinks, before = FanOut([sink], "warn"), generators()
    sinks.start(session_of(run))
    sinks.write(result_of(run, 0))
    sinks.end()
    with pytest.warns(RuntimeWarning, match="Drawing failed"):
        sinks.fail(900, "no memory")
    assert before == generators()
    sink.end()
    assert before != generators()


# One that fails.


class FullDisk(CSVLogger):
    """Takes what the Trainer logs, and from the second audit on no audit."""

    audits = 0

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.audits += "bias_audit/violations" in metrics
        if self.audits > 1 and "bias_audit/violations" in metrics:
            raise OSError("no space left on device")
        super().log_metrics(metrics, step)


class NoPictures(TensorBoardLogger):
    """Its writer takes numbers only."""

    @property
    def experiment(self) -> Any:
        writer = super().experiment
        writer.add_image = self._refuse
        return writer

    def _refuse(self, *_: Any, **__: Any) -> None:
        raise OSError("quota exceeded")


def test_a_logger_that_fails_is_told_once_and_leaves_the_others_alone(tmp_path: Path) -> None:
    well = CSVLogger(tmp_path, name="well")
    loggers = [FullDisk(tmp_path, name="full"), NoPictures(tmp_path, name="quota"), well]
    audit = BiasAuditCallback(audit_set(), dirpath=tmp_path / "run", plan=PLAN)
    run = trainer(tmp_path, audit, logger=loggers, max_epochs=3)
    with pytest.warns(RuntimeWarning, match="left out") as told:
        fit(run)
    said = sorted(str(w.message) for w in told if "bias-audit" in str(w.message))
    assert len(said) == 2
    assert "FullDisk failed" in said[0] and "no space left" in said[0]
    assert "TensorBoard failed" in said[1] and "quota exceeded" in said[1]
    assert run.current_epoch == 3
    recorded = read_run(tmp_path / "run")
    assert len(recorded.audits) == 4 and recorded.ended
    steps = [a.step for a in recorded.audits]
    with (Path(well.log_dir) / "metrics.csv").open(newline="") as file:
        assert [int(r["step"]) for r in csv.DictReader(file) if r["bias_audit/violations"]] == steps
    # The numbers of the one that refused pictures came all the same.
    assert [e.step for e in events_of(loggers[1]).Scalars("bias_audit/violations")] == steps


# Which is which.


@pytest.mark.parametrize("package", [pl, lp])
def test_a_logger_is_told_by_its_class_or_one_above_it(package: Any, tmp_path: Path, store: Path) -> None:
    loggers = package.loggers

    class Own(loggers.TensorBoardLogger):
        pass

    def kinds(logger: Any) -> list[Any]:
        return [type(s.sink) if isinstance(s, Background) else type(s) for s in sinks_of(logger)]

    assert kinds(Own(tmp_path)) == kinds(loggers.TensorBoardLogger(tmp_path)) == [LoggerSink, TensorBoardSink]
    assert kinds(loggers.CSVLogger(tmp_path)) == [LoggerSink]
    (slow,) = sinks_of(mlflow_logger(store, package))
    assert isinstance(slow, Background) and isinstance(slow.sink, MlflowSink)
    assert [s.name for s in sinks_of(Own(tmp_path))] == ["Own", "TensorBoard"]


def test_the_loggers_of_the_other_package(tmp_path: Path) -> None:
    logger = lp.loggers.TensorBoardLogger(tmp_path)
    audit = BiasAuditCallback(audit_set(1), plan=PLAN, on_error="raise")
    lp.Trainer(
        max_epochs=1, accelerator="cpu", logger=logger, callbacks=[audit], enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    ).fit(Wrapped(), loader(2))  # fmt: skip
    events = events_of(logger)
    steps = [a.step for a in read_run(logger.log_dir).audits]
    assert [e.step for e in events.Images("bias_audit/overlays/panel")] == steps
    assert [e.step for e in events.Scalars("bias_audit/accuracy")] == steps


# In words.


def test_how_things_stand_in_a_line(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "bad", reference=True, removal={"hair": 0.6}))
    assert in_words(run.audits[0]) == "step 0: before training, nothing follows"
    words = in_words(run.audits[-1])
    assert words.startswith("step 300: violated; reliance on ")
    judged = run.audits[-1].judgement
    verdicts = zip(judged.findings, ("suspected", "reliance", "suspected"), strict=True)
    findings = tuple(replace(f, name=n, verdict=Verdict(v)) for (f, v), n in zip(verdicts, "abc", strict=True))
    assert in_words(replace(run.audits[-1], judgement=replace(judged, findings=findings))) == (
        "step 300: violated; reliance on b; suspected on a, c"
    )
    held = read_run(make_run(tmp_path / "good", hair_enrichment=0.7, gap=0.02, spread=0.02)).audits[-1]
    assert in_words(held) == "step 300: held"
    long = read_run(make_run(tmp_path / "long", regions=[("r" * 300, "spurious")], enrichment={"r" * 300: 3.0}))
    assert len(in_words(long.audits[-1])) < 120
