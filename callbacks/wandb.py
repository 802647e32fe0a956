"""Results in Weights & Biases.

Enters: a W&B run and each `AuditResult`. Leaves, in that run: overlays of a fixed panel and of the worst samples with
masks to switch on and off, a table of samples, an alert when other rules are violated than before, a summary, and at
the end the page and the run directory as an artifact. Scalars come by the Trainer's logger, or for a run of the sink's
own by the sink. With no account all of it works offline.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from bias_audit.callbacks.overlays import overlay
from bias_audit.callbacks.sinks import Session, scalars
from bias_audit.records import PREVIOUS, AuditResult, SampleScores, SampleSheet
from bias_audit.terms import Subjects

if TYPE_CHECKING:
    import wandb

# The key by which Lightning's WandbLogger orders what it logs; W&B's own step is left to it.
STEP = "trainer/global_step"
PANEL = WORST = 8


class WandbSink:
    """Logs to `run`; with `own`, the run is the sink's: it logs the scalars too, and finishes the run at the end."""

    def __init__(self, run: wandb.Run, *, own: bool = False) -> None:
        self._run, self._own = run, own
        self._session: Session | None = None
        self._alerted: frozenset[str] = frozenset()

    @property
    def session(self) -> Session:
        """What is audited; after `start`."""
        assert self._session is not None
        return self._session

    def start(self, session: Session) -> None:
        """Note what is audited in the run's config."""
        self._session = session
        manifest = session.manifest
        facts = {"layer": manifest.layer, "fingerprint": manifest.fingerprint, "samples": manifest.samples_audited}
        self._run.config.update({session.name: facts}, allow_val_change=True)  # type: ignore[no-untyped-call]

    def write(self, result: AuditResult) -> None:
        """Log one audit."""

        name, sheet = self.session.name, self.session.sheet
        subjects = self.session.manifest.subjects
        logged: dict[str, Any] = {
            STEP: result.step,
            f"{name}/samples": _table(result.scores, sheet, subjects),
            f"{name}/overlays/panel": self._pictures(result, fixed_panel(sheet, PANEL)),
            f"{name}/overlays/worst": self._pictures(result, worst(result.scores, subjects, WORST)),
        }
        if self._own:
            logged |= scalars(result, name)
        self._run.log(logged)
        violated = {c.subject: c.message for c in result.judgement.violations}
        if violated and frozenset(violated) != self._alerted and result.trigger != "reference":
            text = f"At step {result.step}: " + "; ".join(violated.values())
            self._run.alert(title=f"{name}: policy violated", text=text, level="WARN")
            self._alerted = frozenset(violated)
        self._run.summary[f"{name}/outcome"] = str(result.judgement.outcome)
        for finding in result.judgement.findings:
            self._run.summary[f"{name}/verdict/{finding.name}"] = str(finding.verdict)
            self._run.summary[f"{name}/why/{finding.name}"] = finding.sentence

    def fail(self, step: int, reason: str) -> None:
        """Say in the summary that an audit could not be made."""
        self._run.summary[f"{self.session.name}/outcome"] = f"inconclusive: the audit at step {step} failed: {reason}"

    def end(self, error: str = "") -> None:
        """Log the page and the run directory."""
        import wandb

        name, path = self.session.name, self.session.path
        page = path / "report.html"
        if page.exists():
            self._run.log({f"{name}/report": wandb.Html(page.read_text(encoding="utf-8"), inject=False)})
        artifact = wandb.Artifact(f"{name}-{self.session.manifest.run_id}", type="bias-audit")
        for item in sorted(path.iterdir()):
            if item.is_dir() and item.name != PREVIOUS:
                artifact.add_dir(str(item), name=item.name)
            elif item.is_file():
                artifact.add_file(str(item))
        self._run.log_artifact(artifact)
        if self._own:
            self._run.finish(exit_code=1 if error else 0)

    def _pictures(self, result: AuditResult, indices: Iterable[int]) -> list[Any]:
        subjects, sheet = self.session.manifest.subjects, self.session.sheet
        return [_picture(result.scores, sheet, subjects, i) for i in indices]


def fixed_panel(sheet: SampleSheet, count: int) -> list[int]:
    """The same `count` samples at every audit: in turn one from each label x attributes cell."""
    seen: dict[tuple[str, ...], int] = {}
    turns = []
    for index, (label, values) in enumerate(zip(sheet.labels, sheet.attributes, strict=True)):
        cell = (str(label), *map(str, values))
        turns.append((seen.setdefault(cell, 0), cell, index))
        seen[cell] += 1
    return [index for _, _, index in sorted(turns)[:count]]


def worst(scores: SampleScores, subjects: Subjects, count: int) -> list[int]:
    """The samples with the most energy on spurious regions; with the least on objects where nothing is spurious."""
    names, direction = subjects.regions_with("spurious"), 1
    if not names:
        names, direction = subjects.regions_with("object"), -1
    if not names:
        return []
    total = np.nansum([scores.of("energy_share", scores.methods[0], name) for name in names], axis=0)
    return [int(i) for i in np.argsort(-direction * total, kind="stable")[:count]]


def _picture(scores: SampleScores, sheet: SampleSheet, subjects: Subjects, index: int) -> Any:
    import wandb

    thumbnail = Image.open(io.BytesIO(sheet.thumbnails[index])).convert("RGB")
    picture = overlay(thumbnail, scores.maps[0, index].astype(np.float32))
    factor = picture.width // thumbnail.width
    caption = f"{sheet.ids[index]}: {_class(subjects, scores.labels[index])}"
    if scores.labels[index] != scores.predictions[index]:
        caption += f", predicted {_class(subjects, scores.predictions[index])}"
    masks = {}
    for role in ("object", "spurious"):
        names = subjects.regions_with(role)
        if names:
            labels = dict(enumerate(names, 1))
            masks[role] = {
                "mask_data": _drawn(sheet.masks[index], subjects, names, picture, factor),
                "class_labels": labels,
            }
    return wandb.Image(picture, caption=caption, masks=masks or None, file_type="jpg")


def _drawn(
    masks: npt.NDArray[np.bool_], subjects: Subjects, names: tuple[str, ...], picture: Image.Image, factor: int
) -> npt.NDArray[np.uint8]:
    """Regions as numbers from 1 on at the picture's size."""
    order = [name for name, _ in subjects.regions]
    height, width = masks.shape[1:]
    numbered = np.zeros((height, width), dtype=np.uint8)
    for k, name in enumerate(names, 1):
        numbered[masks[order.index(name)]] = k
    # Masks are padded to the largest thumbnail; this picture is a whole multiple of its own.
    return numbered.repeat(factor, axis=0).repeat(factor, axis=1)[: picture.height, : picture.width]


def _table(scores: SampleScores, sheet: SampleSheet, subjects: Subjects) -> Any:
    import wandb

    method = scores.methods[0]
    attributes = [name for name, _ in subjects.attributes]
    measured = [(metric, region) for region in scores.regions for metric in ("energy_share", "enrichment")]
    columns = [[_number(x) for x in scores.of(metric, method, region)] for metric, region in measured]
    rows = [
        [
            sheet.ids[i],
            _class(subjects, scores.labels[i]),
            _class(subjects, scores.predictions[i]),
            bool(scores.correct[i]),
            _number(scores.margin[i]),
            *(str(v) for v in sheet.attributes[i]),
            *(column[i] for column in columns),
        ]
        for i in range(len(sheet.ids))
    ]
    names: list[str | int] = [
        "id",
        "label",
        "predicted",
        "correct",
        "margin",
        *attributes,
        *(f"{m} {r}" for m, r in measured),
    ]
    return wandb.Table(columns=names, data=rows)


def _class(subjects: Subjects, index: np.int64) -> str:
    if index < 0:
        return "not finite"
    return subjects.classes[index] if index < len(subjects.classes) else str(index)


def _number(x: np.float32) -> float | None:
    return float(x) if np.isfinite(x) else None
