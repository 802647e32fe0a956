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
W&B keeps them and draws no panel of them unless a person asks for one.

A `WandbWriter` may write beside a training that logs to the same run: it passes W&B no step, so that W&B puts all rows
in one order.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from bias_audit.callbacks.scalars import scalars
from bias_audit.callbacks.sinks import Session
from bias_audit.callbacks.wandb.keys import MOST_CLASSES, STEP, Keys
from bias_audit.callbacks.wandb.media import MOST_ROWS, confusions, picture, samples_table, shares, short
from bias_audit.callbacks.wandb.records import SentRecords
from bias_audit.records.files import REPORT
from bias_audit.records.history import onsets
from bias_audit.records.panels import PANEL, WORST, fixed_panel, worst
from bias_audit.records.results import AuditResult, AuditSummary
from bias_audit.records.runs import (
    read_run,
)
from bias_audit.records.samples import SampleScores
from bias_audit.report.page import render
from bias_audit.terms import Outcome, Verdict

if TYPE_CHECKING:
    import wandb


# W&B shows so many pictures of one key and step, and drops the others.
MOST_PICTURES = 108
# The page is a few megabytes: it is sent with the first trained audit, then with every so-many-th, and at the end.
PAGE_EVERY = 5
# Page and artifact hold every audit so far: from so many on they are sent when there are a tenth more, so that all that
# is sent grows with the number of audits, and not with its square.
MANY = 100
ALERT_EVERY_S = 600.0
LEVELS = {Verdict.CLEARED: 0, Verdict.INCONCLUSIVE: 1, Verdict.SUSPECTED: 2, Verdict.RELIANCE: 3}
_LONGEST_TITLE, _LONGEST_TEXT = 63, 2000


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
        self._records = SentRecords(self._run, session, self._keys.word)
        self._records.start(len(self._audits))

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
            keys.shares: shares(result.estimates, subjects, scores.methods[0]),
            keys.samples: samples_table(scores, sheet, subjects, effects),
            **dict(confusions(keys, scores, sheet, subjects)),
        }
        for key, indices in (
            (keys.panel, fixed_panel(sheet, self._panel)),
            (keys.worst, worst(scores, subjects, self._worst)),
        ):
            if indices:
                logged[key] = [picture(scores, sheet, subjects, i) for i in indices]
        page = self._page() if self._live and len(self._audits) > self._page_due else None
        if page is not None:
            logged[keys.page] = page
        raw = scalars(result, self.session.name)
        # W&B would draw a panel of each of hundreds; what is looked at has sections of its own.
        self._define(raw, hidden=True)
        if self._own:
            logged |= raw
            self._define(logged)
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
        if not result.is_reference:
            self._alert(result)
        count = len(self._audits) - 1
        if count >= self._artifact_due and self._records.send(result, self._metadata()):
            self._artifact_due = _next(count, 1)
        self._records.note(len(self._audits))

    def skip(self, audit: AuditSummary) -> None:
        """Count an audit that cannot be logged, because its scores are gone."""
        self._audits.append(audit)
        self._records.note(len(self._audits))

    def fail(self, step: int, reason: str) -> None:
        """Say in the summary that an audit could not be made."""
        self._doubt(f"the audit at step {step} failed: {reason}")

    def end(self, error: str = "") -> None:
        """Log the page and the run directory, and what alerts were held back.

        Raises:
            RuntimeError: W&B did not take the run directory.
        """
        self._send_alert(self._held_back)
        if error:
            self._doubt(error)
        page = self._page()
        if page is not None:
            self._run.log({self._keys.page: page})
        self._records.send_all(self._metadata(error), None if page is None else page.html)

    def _doubt(self, reason: str) -> None:
        """What the last audit said is not the last word; a violation stays one."""
        name, violated = self.session.name, self._audits and self._audits[-1].judgement.violations
        outcome = Outcome.VIOLATED if violated else Outcome.INCONCLUSIVE
        self._run.summary.update({f"{name}/outcome": str(outcome), f"{name}/failed": reason})

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

    def _define(self, keys: Iterable[str], hidden: bool = False) -> None:
        """Draw each key against the training step, or not unless a person asks for it; by its whole name, as patterns
        are matched in no fixed order."""
        # A star would make a pattern of a name.
        for key in [key for key in keys if key != STEP and key not in self._defined and "*" not in key]:
            self._run.define_metric(key, step_metric=STEP, hidden=hidden)
            self._defined.add(key)

    def _since(self) -> dict[tuple[str, str], int | None]:
        """The step since which each region or attribute is relied on, or suspected to be."""
        return {(o.kind, o.name): o.since for o in onsets(self._audits)}

    def _findings(self, result: AuditResult) -> wandb.Table:
        import wandb

        since, caveats = self._since(), self.session.manifest.caveats
        rows = []
        for f in result.judgement.findings:
            caveat = caveats.get(f.name, "") if f.kind == "region" else ""
            rows.append([f.kind, f.name, str(f.verdict), since.get((f.kind, f.name)), f"{f.sentence} {caveat}".strip()])
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
        title = short(f"{self.session.name}: policy violated", _LONGEST_TITLE)
        self._run.alert(title, short("; ".join(texts.values()), _LONGEST_TEXT), level="WARN", wait_duration=1)
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

    def _page(self) -> wandb.Html | None:
        """The page as it is now: a copy in W&B does not change, so it neither reloads itself nor says that it does."""
        import wandb

        path = self.session.path / REPORT
        if not path.exists():
            return None
        html = (
            render(read_run(path.parent), thumbnails=False) if self._records.bare else path.read_text(encoding="utf-8")
        )
        html = re.sub(r'<p class="note" id="live">.*?</p>', "", html.replace(" data-live>", ">", 1), count=1)
        return wandb.Html(html, inject=False, data_is_not_path=True)


def _next(count: int, step: int) -> int:
    """When to send again what holds all audits, after it was sent with audit `count`."""
    return count + (step if count < MANY else count // 10)
