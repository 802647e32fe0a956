"""Results in Weights & Biases.

Enters: a W&B run and each `AuditResult`. Leaves, in that run, in sections that follow the questions a reader asks: what
the findings are, where the model looks, whether it relies on it, and for whom it is wrong; overlays of a fixed panel
and of the worst samples with masks to switch on and off; a table of samples; confusion matrices by group; an alert when
a rule is violated that was not before; a summary; the page; and for each audit, after a hundred whenever there are a
tenth more, an artifact that holds the run directory as it was then. With no account all of it works offline: an
artifact of an offline run only says where its files are, so the records are kept in W&B's directory of the run too,
from where `bias-audit gate` reads them on any machine.

In W&B's lineage the audits of a training stand beside its checkpoints, as outputs of one run; each names its step, and
the state of the callback in a checkpoint names the audit's. A run that audits a checkpoint which it got by
`use_artifact` has the checkpoint as its input and the audit as its output.

The scalars that monitors know, `bias_audit/...`, come by the Trainer's logger; in any other run they are logged here.

A `WandbWriter` may write beside a training that logs to the same run: it passes W&B no step, so that W&B puts all rows
in one order.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from bias_audit.callbacks.sinks import Session, scalars
from bias_audit.callbacks.wandb_keys import MOST_CLASSES, Keys
from bias_audit.overlays import PANEL, WORST, fixed_panel, opened, overlay, worst
from bias_audit.records.arrays import sheet_bytes
from bias_audit.records.history import onsets
from bias_audit.records.results import AuditResult, AuditSummary, SampleScores, SampleSheet
from bias_audit.records.runs import (
    AUDITS,
    CHANGED,
    COPIES,
    MANIFEST,
    PREVIOUS,
    SAMPLES,
    manifest_bytes,
    read_run,
    write_whole,
)
from bias_audit.redaction import described
from bias_audit.report import REPORT, render
from bias_audit.terms import ROLES, Estimate, Outcome, Subjects, Verdict

if TYPE_CHECKING:
    import wandb

# The key by which Lightning's WandbLogger orders what it logs; W&B's own step is left to it.
STEP = "trainer/global_step"
# Where in the run directory it is said which W&B run has it.
WHERE = "wandb.json"
# W&B shows so many pictures of one key and step, and drops the others.
MOST_PICTURES = 108
MOST_ROWS = 1000
MOST_CONFUSIONS = 12
# The page is a few megabytes: it is sent with the first trained audit, then with every so-many-th, and at the end.
PAGE_EVERY = 5
# Page and artifact hold every audit so far: from so many on they are sent when there are a tenth more, so that all that
# is sent grows with the number of audits, and not with its square.
MANY = 100
ALERT_EVERY_S = 600.0
LEVELS = {Verdict.CLEARED: 0, Verdict.INCONCLUSIVE: 1, Verdict.SUSPECTED: 2, Verdict.RELIANCE: 3}
_LONGEST_TITLE, _LONGEST_TEXT, _LONGEST_CAPTION = 63, 2000, 120


class WandbWriter:
    """Logs to `run`.

    Args:
        run: an open W&B run.
        own: the run is not the Trainer's, so that nobody else logs the monitors' scalars.
        panel: how many samples the fixed panel shows, the same at every audit.
        worst: how many of the worst samples are shown.
        live: the audits are being made now; of past ones no alert is sent, and the page is sent at the end only.

    Raises:
        ValueError: `panel` or `worst` is more than W&B shows of one key.

    Example:
        >>> import wandb  # doctest: +SKIP
        >>> writer = WandbWriter(wandb.init(), own=True)  # doctest: +SKIP
    """

    def __init__(
        self, run: wandb.Run, *, own: bool = False, panel: int = PANEL, worst: int = WORST, live: bool = True
    ) -> None:
        for name, count in (("panel", panel), ("worst", worst)):
            if not 0 <= count <= MOST_PICTURES:
                raise ValueError(f"{name} must be from 0 to {MOST_PICTURES}, the most that W&B shows, got {count}")
        self._run, self._own, self._panel, self._worst, self._live = run, own, panel, worst, live
        self._session: Session | None = None
        self._audits: list[AuditSummary] = []
        self._effects: tuple[SampleScores, int] | None = None
        self._told: set[str] = set()
        self._held_back: dict[str, str] = {}
        self._told_at = -ALERT_EVERY_S
        self._page_due, self._artifact_due = 1, 0
        self._refused = ""
        self._instead: TemporaryDirectory[str] | None = None
        self._defined: set[str] = set()

    @property
    def session(self) -> Session:
        """What is audited; after `start`."""
        assert self._session is not None
        return self._session

    def start(self, session: Session, before: Sequence[AuditSummary] = ()) -> None:
        """Note what is audited in the run's config, and in the run directory where it is sent.

        `before` are earlier audits of the same run: since when a model relies on a cue is told by them too.
        """
        self._audits = list(before)
        # What was told before this process began is not told again.
        self._told = {check.subject for check in before[-1].judgement.violations} if before else set()
        self._session, manifest = session, session.manifest
        self._keys = Keys(session.name, manifest.subjects)
        many = len(manifest.subjects.classes) > MOST_CLASSES
        facts = {
            "model": manifest.model,
            "layer": manifest.layer,
            "methods": list(manifest.methods),
            "fingerprint": manifest.fingerprint,
            "samples": manifest.samples_audited,
            "samples_in_table": min(len(session.sheet.ids), MOST_ROWS),
            "confusion": f"not drawn: more than {MOST_CLASSES} classes" if many else "drawn",
            "audit_run": manifest.run_id,
            "resumed_at_step": session.resumed_step if session.resumed_from else None,
        }
        self._run.config.update({session.name: facts}, allow_val_change=True)  # type: ignore[no-untyped-call]
        if session.path.is_dir() and not self._run.disabled:
            if self._bare:
                # The manifest says that what lies beside it holds no picture.
                self._instead = TemporaryDirectory(prefix="bias-audit-")
                write_whole(self._file(SAMPLES), sheet_bytes(session.sheet))
                write_whole(self._file(MANIFEST), manifest_bytes(manifest.model_copy(update={"thumbnails": False})))
            self._note()
            # What was the last word of an earlier stage is none until an audit of this one has been sent.
            (self._copy / MANIFEST).unlink(missing_ok=True)

    def write(self, result: AuditResult) -> None:
        """Log one audit.

        Raises:
            wandb.Error: W&B does not answer; nothing of the audit was logged, and it may be tried again.
        """
        keys, sheet, scores = self._keys, self.session.sheet, result.scores
        subjects = self.session.manifest.subjects
        effects = (scores, result.step) if scores.effects.size else self._effects
        self._audits.append(result.summary())
        logged: dict[str, Any] = {STEP: result.step, **self._numbers(result)}
        logged |= {
            keys.findings: self._findings(result),
            keys.shares: _shares(result.estimates, subjects, scores.methods[0]),
            keys.samples: _table(scores, sheet, subjects, effects),
            **dict(_confusions(keys, scores, sheet, subjects)),
        }
        for key, indices in (
            (keys.panel, fixed_panel(sheet, self._panel)),
            (keys.worst, worst(scores, subjects, self._worst)),
        ):
            if indices:
                logged[key] = [_picture(scores, sheet, subjects, i) for i in indices]
        page = self._page() if self._live and len(self._audits) > self._page_due else None
        if page is not None:
            logged[keys.page] = page
        if self._own:
            logged |= scalars(result, self.session.name)
            self._order_by_step(logged)
        try:
            # Of a table W&B wants to know from the network at once whether there is one of its name.
            self._run.log(logged)
        except BaseException:
            self._audits.pop()
            raise
        self._effects = effects
        if page is not None:
            self._page_due = _next(len(self._audits) - 1, PAGE_EVERY)
        self._run.summary.update(self._summary(result))
        if result.trigger != "reference":
            self._alert(result)
        count = len(self._audits) - 1
        if count >= self._artifact_due and self._send_records(result):
            self._artifact_due = _next(count, 1)
        self._note()

    def skip(self, audit: AuditSummary) -> None:
        """Count an audit that cannot be logged, because its scores are gone."""
        self._audits.append(audit)
        self._note()

    def fail(self, step: int, reason: str) -> None:
        """Say in the summary that an audit could not be made."""
        self._doubt(f"the audit at step {step} failed: {reason}")

    def end(self, error: str = "") -> None:
        """Log the page and the run directory, and what alerts were held back.

        Raises:
            RuntimeError: W&B did not take the run directory.
        """
        import wandb

        self._send_alert(self._held_back)
        if error:
            self._doubt(error)
        path = self.session.path
        page = self._page()
        if page is not None:
            self._run.log({self._keys.page: page})
        artifact = wandb.Artifact(self._artifact_name, type="bias-audit", metadata=self._metadata(error))
        # Whatever else lies in the run directory may show pictures.
        items = [path / AUDITS, path / "audits", self._file(SAMPLES), self._file(MANIFEST)]
        for item in sorted(items if self._bare else path.iterdir()):
            if item.is_dir() and item.name != PREVIOUS:
                artifact.add_dir(str(item), name=item.name, skip_cache=True)
            elif item.is_file():
                artifact.add_file(str(item), skip_cache=True)
        if self._bare and page is not None:
            with artifact.new_file(REPORT, "w", encoding="utf-8") as file:
                file.write(page.html)
        taken = self._log_artifact(artifact, ["latest", "final"])
        arrays = [f"audits/{file.name}" for file in (path / "audits").glob("*.npz")]
        changed = [CHANGED] if (path / CHANGED).exists() and not self._bare else []
        self._keep_copy((path / AUDITS).read_bytes(), (*arrays, *changed))
        if not taken:
            raise RuntimeError(f"W&B did not take the run directory ({self._refused})")

    def _doubt(self, reason: str) -> None:
        """What the last audit said is not the last word; a violation stays one."""
        name, violated = self.session.name, self._audits and self._audits[-1].judgement.violations
        outcome = Outcome.VIOLATED if violated else Outcome.INCONCLUSIVE
        self._run.summary.update({f"{name}/outcome": str(outcome), f"{name}/failed": reason})

    @property
    def _artifact_name(self) -> str:
        return f"{self._keys.word}-{self.session.manifest.run_id}"

    def _numbers(self, result: AuditResult) -> dict[str, float]:
        found: dict[str, float] = {self._keys.violations: len(result.judgement.violations)}
        for finding in result.judgement.findings:
            found[self._keys.verdict(finding.kind, finding.name)] = LEVELS[finding.verdict]
        for series in self._keys.series(result.estimates, result.scores.methods[0]):
            e = series.estimate
            # A carried number is no new measurement, and of one that could not be made there is no point.
            if e.measured and not e.age:
                assert e.value is not None and e.low is not None and e.high is not None
                found |= {series.key: e.value, series.low: e.low, series.high: e.high}
        return found

    def _order_by_step(self, logged: dict[str, Any]) -> None:
        """Draw each key against the training step; by its whole name, as patterns are matched in no fixed order."""
        # A star would make a pattern of a name.
        for key in [key for key in logged if key != STEP and key not in self._defined and "*" not in key]:
            self._run.define_metric(key, step_metric=STEP)
            self._defined.add(key)

    def _since(self) -> dict[tuple[str, str], int | None]:
        """The step since which each region or attribute is relied on, or suspected to be."""
        return {(o.kind, o.name): o.since for o in onsets(self._audits)}

    def _findings(self, result: AuditResult) -> wandb.Table:
        import wandb

        found, since = result.judgement.findings, self._since()
        rows = [[f.kind, f.name, str(f.verdict), since.get((f.kind, f.name)), f.sentence] for f in found]
        return wandb.Table(columns=["kind", "name", "verdict", "since step", "why"], data=rows)

    def _summary(self, result: AuditResult) -> dict[str, Any]:
        name, since = self.session.name, self._since()
        found: dict[str, Any] = {f"{name}/outcome": str(result.judgement.outcome), f"{name}/failed": ""}
        for f in result.judgement.findings:
            word, step = self._keys.subject(f.kind, f.name), since.get((f.kind, f.name))
            found[f"{name}/verdict/{word}"] = str(f.verdict)
            found[f"{name}/why/{word}"] = f.sentence
            found[f"{name}/since/{word}"] = "" if step is None else f"step {step}"
        return found

    def _alert(self, result: AuditResult) -> None:
        """Tell each violated rule once, and not too often: what comes too soon is told by a later audit, or the end."""
        violated = {check.subject: check.message for check in result.judgement.violations}
        new = {subject: text for subject, text in violated.items() if subject not in self._told}
        self._held_back = {subject: f"At step {result.step}: {text}" for subject, text in new.items()}
        if time.monotonic() - self._told_at >= ALERT_EVERY_S:
            self._send_alert(self._held_back)

    def _send_alert(self, texts: dict[str, str]) -> None:
        if not texts or not self._live:
            return
        title = _short(f"{self.session.name}: policy violated", _LONGEST_TITLE)
        self._run.alert(title, _short("; ".join(texts.values()), _LONGEST_TEXT), level="WARN", wait_duration=1)
        self._told |= set(texts)
        self._held_back, self._told_at = {}, time.monotonic()

    def _metadata(self, error: str = "") -> dict[str, Any]:
        """What a person needs to find the checkpoint of an audit, and the audit of a checkpoint."""
        manifest = self.session.manifest
        facts: dict[str, Any] = {
            "audit_run": manifest.run_id,
            "fingerprint": manifest.fingerprint,
            "layer": manifest.layer,
            # Lightning's name for them. The audit comes before the checkpoint of its step, so no version can be named.
            "checkpoints": f"model-{self._run.id}, where the WandbLogger logs them: the version of this step",
            "error": error,
        }
        if self._audits:
            last = self._audits[-1]
            facts |= {"step": last.step, "epoch": last.epoch, "weights": last.weights, "trigger": last.trigger}
            facts |= {"outcome": str(last.judgement.outcome)}
            facts |= {f"verdict {f.kind} {f.name}": str(f.verdict) for f in last.judgement.findings}
        return facts

    def _send_records(self, result: AuditResult) -> bool:
        """The run directory as of this audit: whoever downloads it can run the gate on it; False where it was not sent.

        Nothing is lost then: a later artifact holds this audit, too.
        """
        import wandb

        records, arrays = _records_until(self.session.path, result)
        if not records:
            return False
        artifact = wandb.Artifact(self._artifact_name, type="bias-audit", metadata=self._metadata())
        with artifact.new_file(AUDITS, "wb") as file:
            file.write(records)
        # What stays as it is W&B reads when it comes to it, and sends once; of what may go it takes a copy.
        stays: Literal["immutable", "mutable"] = (
            "immutable" if self.session.keep is None and not self._bare else "mutable"
        )
        try:
            artifact.add_file(str(self._file(MANIFEST)), skip_cache=True)
            for name in (SAMPLES, *arrays):
                artifact.add_file(str(self._file(name)), name=name, skip_cache=True, policy=stays)
        except (OSError, ValueError):
            if all((self.session.path / name).is_file() for name in arrays):
                raise
            # Dropped since: this audit's directory is not there any more.
            return False
        if not self._log_artifact(artifact, ["latest", f"step-{result.step}"]):
            return False
        self._keep_copy(records, arrays)
        return True

    def _log_artifact(self, artifact: wandb.Artifact, aliases: list[str]) -> bool:
        """Whether W&B took it, about which it asks the network at once."""
        import wandb

        try:
            self._run.log_artifact(artifact, aliases=aliases)
        except wandb.Error as error:
            self._refused = described(error)
            return False
        return True

    @property
    def _bare(self) -> bool:
        """Whether no picture may leave the run directory."""
        return self.session.manifest.thumbnails == "local"

    def _file(self, name: str) -> Path:
        """A file of the run directory, or what is sent in its place."""
        if self._instead is not None and name in (SAMPLES, MANIFEST):
            return Path(self._instead.name) / name
        return self.session.path / name

    def _page(self) -> wandb.Html | None:
        """The page as it is now: a copy in W&B does not change, so it neither reloads itself nor says that it does."""
        import wandb

        path = self.session.path / REPORT
        if not path.exists():
            return None
        html = render(read_run(path.parent), thumbnails=False) if self._bare else path.read_text(encoding="utf-8")
        html = re.sub(r'<p class="note" id="live">.*?</p>', "", html.replace(" data-live>", ">", 1), count=1)
        return wandb.Html(html, inject=False, data_is_not_path=True)

    def _note(self) -> None:
        """Note in the run directory which W&B run was given how many of its audits."""
        if self.session.path.is_dir() and not self._run.disabled:
            write_whole(self.session.path / WHERE, where(self._run, self.session.name, len(self._audits)))

    @property
    def _copy(self) -> Path:
        return Path(self._run.dir).parent / COPIES / self._keys.word

    def _keep_copy(self, records: bytes, names: Sequence[str]) -> None:
        """Keep the records in W&B's directory of the run."""
        folder = self._copy
        (folder / "audits").mkdir(parents=True, exist_ok=True)
        for name in (SAMPLES, *names):
            _link(self._file(name), folder / name)
        write_whole(folder / AUDITS, records)
        # The manifest comes last: a directory that has one is complete.
        write_whole(folder / MANIFEST, self._file(MANIFEST).read_bytes())
        for file in (folder / "audits").iterdir():
            if f"audits/{file.name}" not in names:
                # A link to arrays that were dropped would keep them on the disk.
                file.unlink()


def _next(count: int, step: int) -> int:
    """When to send again what holds all audits, after it was sent with audit `count`."""
    return count + (step if count < MANY else count // 10)


def where(run: wandb.Run, name: str, audits: int) -> bytes:
    """Which W&B run was given how many of the recorded audits, for `bias-audit dashboard push`."""
    facts = {"entity": run.entity, "project": run.project, "id": run.id, "offline": run.offline, "name": name}
    return json.dumps(facts | {"audits": audits}).encode() + b"\n"


def _link(source: Path, target: Path) -> None:
    """The same file in another place, which costs nothing: records are replaced, never changed. A copy elsewhere."""
    if target.exists() and target.samefile(source):
        return
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        # Another file system, or one without links.
        shutil.copyfile(source, target)


def _records_until(path: Path, result: AuditResult) -> tuple[bytes, tuple[str, ...]]:
    """The lines up to this audit's, which the training thread may have gone beyond, and the arrays they name.

    With it come the lines that say which arrays were dropped for its sake. Nothing where the records do not have it
    (their own sink has said why), or where arrays that it goes with have been dropped since.
    """
    try:
        lines = (path / AUDITS).read_bytes().split(b"\n")[:-1]
    except OSError:
        return b"", ()
    end, dropped = len(lines), False
    for number in reversed(range(len(lines))):
        body = json.loads(lines[number])["body"]
        audit, kind = body.get("audit", {}), body["kind"]
        named = audit.get("step"), audit.get("created"), audit.get("trigger", "manual")
        if named == (result.step, result.created, result.trigger):
            names = (f"audits/{file.name}" for file in sorted((path / "audits").glob("*.npz")))
            return b"\n".join(lines[:end]) + b"\n", tuple(name for name in names if name <= body["arrays"])
        dropped = dropped or kind == "dropped"
        if kind not in ("dropped", "best"):
            if dropped:
                break
            end = number
    return b"", ()


def _picture(scores: SampleScores, sheet: SampleSheet, subjects: Subjects, index: int) -> wandb.Image:
    import wandb

    thumbnail = opened(sheet.thumbnails[index]).convert("RGB")
    heat = np.nan_to_num(scores.maps[0, index].astype(np.float32))
    picture = overlay(thumbnail, heat)
    factor = picture.width // thumbnail.width
    caption = f"{_short(sheet.ids[index], _LONGEST_CAPTION)}: {subjects.class_name(int(scores.labels[index]))}"
    if scores.labels[index] != scores.predictions[index]:
        caption += f", predicted {subjects.class_name(int(scores.predictions[index]))}"
    if not heat.any():
        caption += ", no heat"
    masks = {
        layer: {"mask_data": drawn.repeat(factor, axis=0).repeat(factor, axis=1)[: picture.height, : picture.width]}
        | {"class_labels": labels}
        for layer, labels, drawn in _layers(sheet.masks[index], subjects)
    }
    return wandb.Image(picture, caption=caption, masks=masks or None, file_type="jpg")


def _layers(
    masks: npt.NDArray[np.bool_], subjects: Subjects
) -> Iterator[tuple[str, dict[int, str], npt.NDArray[np.uint8]]]:
    """The regions of each role as numbers from 1 on; one that would hide another has a layer of its own.

    A layer is as large as the masks, which are padded to the largest thumbnail.
    """
    order = [name for name, _ in subjects.regions]
    for role in ROLES:
        labels = {k: _short(name, _LONGEST_CAPTION) for k, name in enumerate(subjects.regions_with(role), 1)}
        layers: list[npt.NDArray[np.uint8]] = []
        for number, name in enumerate(subjects.regions_with(role), 1):
            mask = masks[order.index(name)]
            free = next((layer for layer in layers if not layer[mask].any()), None)
            if free is None:
                layers.append(free := np.zeros(mask.shape, dtype=np.uint8))
            free[mask] = number
        for count, layer in enumerate(layers, 1):
            yield (role if count == 1 else f"{role} {count}"), labels, layer


def _shares(estimates: Sequence[Estimate], subjects: Subjects, method: str) -> Any:
    import wandb

    roles = dict(subjects.regions)
    found = [e for e in estimates if e.metric == "energy_share" and e.method == method]
    rows = []
    for e in found:
        if e.class_name is None and e.group is None and e.region is not None:
            label = f"{_short(e.region, _LONGEST_CAPTION)} ({roles.get(e.region, 'no region')})"
            rows.append([label if e.measured else f"{label}: not measured", e.value])
    table = wandb.Table(columns=["region", "share of heat"], data=rows)
    title = f"Share of the {method} heat by region"
    return wandb.plot.bar(table, "region", "share of heat", title, split_table=True)


def _confusions(keys: Keys, scores: SampleScores, sheet: SampleSheet, subjects: Subjects) -> Iterator[tuple[str, Any]]:
    """A confusion matrix over all images and one of each group, as far as a person can read them."""
    import wandb

    count = len(subjects.classes)
    if not 0 < count <= MOST_CLASSES:
        return
    names = [_short(name, _LONGEST_CAPTION) for name in subjects.classes]
    known = scores.predictions >= 0
    if not known.all():
        names.append("not finite")
    predicted = np.where(known, scores.predictions, count).clip(max=len(names) - 1)
    groups = [(attribute, value) for attribute, values in subjects.attributes for value in values]
    for attribute, value in [("", ""), *groups[:MOST_CONFUSIONS]]:
        chosen = np.ones(len(scores.ids), dtype=bool)
        if attribute:
            column = [name for name, _ in subjects.attributes].index(attribute)
            chosen = sheet.attributes[:, column] == value
        if chosen.any():
            group = _short(f", {attribute} = {value}", _LONGEST_CAPTION) if attribute else ""
            yield (
                keys.confusion(attribute, value),
                wandb.plot.confusion_matrix(
                    y_true=scores.labels[chosen].tolist(),
                    preds=predicted[chosen].tolist(),
                    class_names=names,
                    title=f"Confusion{group} (n = {chosen.sum()})",
                    split_table=True,
                ),
            )


def _table(
    scores: SampleScores, sheet: SampleSheet, subjects: Subjects, removed: tuple[SampleScores, int] | None
) -> wandb.Table:
    """A row for each sample; the effects of removals are those last measured, at the step that they say."""
    import wandb

    method = scores.methods[0]
    # An attribute may have the name of another column, and two columns must not.
    names: list[str | int] = ["id", "label", "predicted", "correct", "margin"]
    names += [_other(name, names) for name, _ in subjects.attributes]
    columns: list[list[float | None]] = []
    for region in scores.regions:
        for metric in ("energy_share", "enrichment"):
            names.append(_other(f"{metric} {region}", names))
            columns.append([_number(x) for x in scores.of(metric, method, region)])
    if removed is not None:
        earlier, step = removed
        at = {name: i for i, name in enumerate(earlier.ids)}
        places = [at.get(name) for name in scores.ids]
        for metric in ("removal_flips", "removal_margin"):
            for r, (region, _) in enumerate(subjects.regions):
                measured = earlier.effects[earlier.effect_metrics.index(metric), :, r]
                if np.isfinite(measured).any():
                    names.append(_other(f"{metric} {region}", names))
                    columns.append([None if i is None else _number(measured[i]) for i in places])
        names.append("removals at step")
        columns.append([step] * len(scores.ids))
    rows = [
        [
            sheet.ids[i],
            subjects.class_name(int(scores.labels[i])),
            subjects.class_name(int(scores.predictions[i])),
            bool(scores.correct[i]),
            _number(scores.margin[i]),
            *(str(v) or None for v in sheet.attributes[i]),
            *(column[i] for column in columns),
        ]
        for i in sorted(fixed_panel(sheet, MOST_ROWS))
    ]
    return wandb.Table(columns=names, data=rows)


def _other(name: str, names: Sequence[str | int]) -> str:
    while name in names:
        name += " "
    return name


def _number(x: np.float32) -> float | None:
    return float(x) if np.isfinite(x) else None


def _short(text: str, longest: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= longest else text[: longest - 1] + "…"
