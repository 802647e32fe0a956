"""A saved workspace in Weights & Biases, laid out by the questions that a reader asks.

Enters: a run directory. Leaves: the workspace in a W&B project, or its specification as JSON; and where the audits were
never sent, or only offline, a W&B run with all of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bias_audit.callbacks.sinks import Session
from bias_audit.callbacks.wandb.keys import MOST_CLASSES, STEP, Keys, Series
from bias_audit.callbacks.wandb.media import MOST_CONFUSIONS
from bias_audit.callbacks.wandb.sink import own_run
from bias_audit.callbacks.wandb.writer import LEVELS, WandbWriter
from bias_audit.policies.policy import Policy
from bias_audit.records.errors import RecordError
from bias_audit.records.files import WANDB
from bias_audit.records.pictures import shareable
from bias_audit.records.results import AuditResult
from bias_audit.records.runs import Run, read_run
from bias_audit.terms import Estimate, Subjects

if TYPE_CHECKING:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

# More line charts than these nobody scrolls through.
MOST_CHARTS = 24
# A person waits for it, and a network that hangs never ends.
SENT_WITHIN_S = 1800.0
EXTRA = "bias-audit[wandb-workspaces]"
_COLUMNS = 3
_UNITS = {
    "energy_share": "share of the heat",
    "enrichment": "share over area; 1 = chance",
    "removal_flips": "share of decisions changed",
    "swap_flips": "share of decisions changed",
    "removal_contrast": "difference between groups",
    "removal_effect": "fall of the probability",
    "swap_gap": "difference in accuracy",
    "swap_follows": "share of decisions that follow",
    "accuracy": "accuracy",
    "worst_group_accuracy": "accuracy",
    "accuracy_gap": "difference in accuracy",
    "alignment_gap": "difference in accuracy",
    "equalized_odds_difference": "difference in rates",
}
_CONTROLS = ("control_flips", "control_effect")


@dataclass(frozen=True)
class Target:
    """Where a workspace goes; `run_id` is the W&B run that it shows, "" for all of the project.

    `missing` says what W&B does not have of the run, "" where it has all.
    """

    entity: str
    project: str
    run_id: str
    name: str
    missing: str = ""


def push(
    run_dir: str | Path,
    *,
    entity: str | None = None,
    project: str | None = None,
    send: bool = False,
    dry_run: bool = False,
) -> str:
    """Save a workspace for the run in `run_dir`; return its address, or with `dry_run` its specification as JSON.

    Args:
        run_dir: a run directory, or one above exactly one such.
        entity: the W&B user or team; by default that of the run the audits were sent to, or the account's own.
        project: the W&B project; by default that of the run the audits were sent to.
        send: make a new W&B run of what is recorded, because it was not sent, or only offline.
        dry_run: neither account nor network is needed, and nothing is sent.

    Raises:
        ValueError: the run directory cannot be read or holds no audit; the project is not known, or the run was not
            sent; there is no account; W&B refuses; or wandb-workspaces is not installed.
    """
    import wandb

    run = read_run(run_dir)
    if not run.audits:
        raise ValueError(f"{run.path}: holds no audit yet: there is nothing to lay out")
    target = _target(run, entity, project)
    _import_workspaces()
    if dry_run:
        return json.dumps(specification(layout(run, target)), indent=1, ensure_ascii=False)
    entity = _account(target.entity)
    run_id = target.run_id
    if send:
        run_id = send_run(run, entity=entity, project=target.project, name=target.name)
    elif target.missing:
        raise ValueError(f"{run.path}: {target.missing}")
    target = Target(entity, target.project, run_id, target.name)
    workspace = layout(run, target)
    try:
        workspace.save()  # type: ignore[no-untyped-call]
    except (wandb.Error, KeyError) as error:
        # The package looks in W&B's answer for what a refusal does not hold.
        raise ValueError(f"W&B did not take the workspace for {entity}/{target.project}: {error}") from error
    return str(workspace.url)


def send_run(run: Run, *, entity: str | None, project: str, name: str = "bias_audit") -> str:
    """Make a W&B run of all recorded audits, in their order, as if it had been logged meanwhile; return its id.

    Alerts are not sent: what they would tell is past. Of audits whose scores were dropped the run has the records only.

    Raises:
        RecordError: the samples or an audit's arrays cannot be read.
        TimeoutError: W&B did not take it all within half an hour of the last; what is left `wandb sync` sends.
    """
    sheet = shareable(run.sheet(), run.manifest)
    wandb_run = own_run(
        {
            "entity": entity or None,
            "project": project,
            "job_type": "bias-audit",
            "reinit": "create_new",
            "settings": {"finish_timeout": SENT_WITHIN_S},
        }
    )
    code = 1
    try:
        sink = WandbWriter(wandb_run, own=True, live=False)
        sink.start(Session(name, run.path, run.manifest, sheet))
        for index, audit in enumerate(run.audits):
            if run.has_scores(index):
                sink.write(AuditResult(**vars(audit), scores=run.scores(index)))
            else:
                sink.skip(audit)
        sink.end(run.failed)
        code = 1 if run.failed else 0
    finally:
        wandb_run.finish(exit_code=code)
    return wandb_run.id


def specification(workspace: ws.Workspace) -> Any:
    """What would be sent to W&B, without the ids that are drawn anew each time."""
    # The package has no public way to say what it would send.
    view = workspace._to_model()
    found = json.loads(view.spec.model_dump_json(by_alias=True, exclude_none=True))
    named = {"entity": workspace.entity, "project": workspace.project, "name": workspace.name}
    return {**named, "spec": _without(found, "__id__")}


def layout(run: Run, target: Target) -> ws.Workspace:
    """The workspace: what is found, where the model looks, whether it relies on it, for whom, overlays, samples."""
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces.expr import And

    manifest, last = run.manifest, run.audits[-1]
    keys, subjects, policy = Keys(target.name, manifest.subjects), manifest.subjects, manifest.policy
    # An audit before training has no interventions yet; each number is laid out that some audit measured.
    estimates: dict[tuple[str | None, ...], Estimate] = {}
    for audit in (last, *run.audits):
        for e in audit.estimates:
            if e.measured:
                estimates.setdefault((e.metric, e.region, e.class_name, e.group, e.method), e)
    series = keys.series(estimates.values(), manifest.methods[0])
    where, rely, whom = (tuple(s for s in series if s.question == q) for q in ("where", "rely", "whom"))
    sections = [
        _section("What is found", _found(keys, run), rows=3),
        _section("Where it looks", _where(keys, where, policy, subjects)),
        _section("Does it rely on it", _charts(rely, policy, subjects) or [_note(_NO_INTERVENTION)]),
        _section("For whom", _whom(keys, whom, policy, subjects)),
        _section("Overlays", _pictures(keys), columns=1, rows=2),
        _section("Samples", [_tables(keys.samples)], columns=1, rows=1),
    ]
    return ws.Workspace(
        entity=target.entity,
        project=target.project,
        name=f"Bias audit: {target.name}"[:100],
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis=STEP),
        runset_settings=ws.RunsetSettings(filters=And(ws.Metric("ID") == target.run_id) if target.run_id else []),
    )


_LEVELS = ", ".join(f"{level} {verdict}" for verdict, level in LEVELS.items())
_GUIDE = (
    "**How to read this.** A verdict weighs where the model looks, what happens when a region is removed or swapped, "
    f"how accuracy differs by group, and how label and attribute go together. Its line shows: {_LEVELS}. The table "
    "says since which step, and why. Looking is not relying: attention alone is at most *suspected*.\n\n"
    "Each number is drawn with the ends of its 95 % interval, a removal beside that of a control region of equal area. "
    "A number that an audit did not measure anew is not drawn again. The slider of the overlays replays the training."
)
_NO_INTERVENTION = (
    "**Unknown.** No audit of this run has measured an intervention so far: whether the model relies on what it looks "
    "at is not shown."
)


def _found(keys: Keys, run: Run) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    # A region or attribute may be judged at a later audit only.
    judged = {(f.kind, f.name): None for audit in run.audits for f in audit.judgement.findings}
    verdicts = wr.LinePlot(
        title=f"Verdicts ({_LEVELS})",
        x=STEP,
        y=[keys.verdict(kind, name) for kind, name in judged],
        range_y=(0, 3),
        title_x="training step",
        title_y="verdict",
    )
    return [
        _note(_GUIDE),
        verdicts,
        wr.ScalarChart(title="Rules violated at the last audit", metric=keys.violations),
        _tables(keys.findings),
        wr.MediaBrowser(title="The page", media_keys=[keys.page], num_columns=1),
    ]


def _where(keys: Keys, series: tuple[Series, ...], policy: Policy, subjects: Subjects) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    shares = [s for s in series if s.estimate.metric == "energy_share"]
    together = wr.LinePlot(
        title="Share of the heat by region",
        x=STEP,
        y=[s.key for s in shares],
        title_x="training step",
        title_y=_UNITS["energy_share"],
    )
    bars = _chart(keys.shares, "wandb/bar/v0", {"label": "region", "value": "share of heat"}, "Share of the heat, last")
    return [together, bars, *_charts([s for s in series if s not in shares], policy, subjects)]


def _whom(keys: Keys, series: tuple[Series, ...], policy: Policy, subjects: Subjects) -> list[Any]:
    charts = _charts(series, policy, subjects)
    if not 0 < len(subjects.classes) <= MOST_CLASSES:
        return [*charts, _note(f"No confusion matrix is drawn of more than {MOST_CLASSES} classes.")]
    groups = [(attribute, value) for attribute, values in subjects.attributes for value in values]
    fields = {name: name for name in ("Actual", "Predicted", "nPredictions")}
    for attribute, value in [("", ""), *groups[:MOST_CONFUSIONS]]:
        title = f"Confusion, {attribute} = {value}" if attribute else "Confusion"
        charts.append(_chart(keys.confusion(attribute, value), "wandb/confusion_matrix/v1", fields, title))
    return charts


def _pictures(keys: Keys) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    named = {"The same samples at every audit": keys.panel, "The worst samples of each audit": keys.worst}
    return [
        wr.MediaBrowser(title=title, media_keys=[key], num_columns=4, mode="gallery", gallery_axis="step")
        for title, key in named.items()
    ]


def _charts(series: Sequence[Series], policy: Policy, subjects: Subjects) -> list[Any]:
    """One chart a number, with the ends of its interval, and the policy's limits in its title.

    What the removal of a control region does lies in the chart of the region that it is a control for.
    """
    import wandb_workspaces.reports.v2 as wr

    controls = {(s.estimate.metric, s.estimate.region): s.key for s in series if s.estimate.metric in _CONTROLS}
    return [
        wr.LinePlot(
            title=_title(s.estimate, policy, subjects),
            x=STEP,
            y=[s.key, s.low, s.high, *_control_of(s.estimate, controls)],
            title_x="training step",
            title_y=_UNITS.get(s.estimate.metric, "value"),
        )
        for s in [s for s in series if s.key not in controls.values()][:MOST_CHARTS]
    ]


def _control_of(e: Estimate, controls: Mapping[tuple[str, str | None], str]) -> tuple[str, ...]:
    key = controls.get((e.metric.replace("removal_", "control_"), e.region))
    return () if key is None else (key,)


def _title(e: Estimate, policy: Policy, subjects: Subjects) -> str:
    roles = dict(subjects.regions)
    limits = []
    for rule in policy.rules:
        # A role stands for its regions, an attribute for its values.
        region = rule.region == e.region or (e.region is not None and roles.get(e.region) == rule.region)
        group = rule.group == e.group or (e.group is not None and rule.group == e.group.partition("=")[0])
        class_name = rule.class_name == e.class_name or (e.class_name is not None and rule.class_name == "each")
        if rule.metric == e.metric and rule.method in (None, e.method) and region and group and class_name:
            ends = (("at least", rule.lower), ("at most", rule.upper))
            limits += [f"{word} {limit:g}" for word, limit in ends if limit is not None]
    text = e.subject.replace("_", " ")
    return f"{text}; policy: {', '.join(dict.fromkeys(limits))}" if limits else text


def _section(name: str, panels: list[Any], *, columns: int = _COLUMNS, rows: int = 2) -> ws.Section:
    import wandb_workspaces.workspaces as ws

    size = ws.SectionLayoutSettings(columns=columns, rows=rows)
    return ws.Section(
        name=name,
        panels=panels,
        is_open=True,
        layout_settings=size,
        panel_settings=ws.SectionPanelSettings(x_axis=STEP),
    )


def _note(text: str) -> wr.MarkdownPanel:
    import wandb_workspaces.reports.v2 as wr

    return wr.MarkdownPanel(markdown=text)


def _tables(key: str) -> wr.WeavePanelSummaryTable:
    import wandb_workspaces.reports.v2 as wr

    return wr.WeavePanelSummaryTable(table_name=key)


def _chart(key: str, kind: str, columns: dict[str, str], title: str) -> wr.CustomChart:
    import wandb_workspaces.reports.v2 as wr

    # W&B keeps the numbers of a chart apart, under this name.
    query = {"summaryTable": {"tableKey": f"Custom Chart Tables/{key}_table"}}
    return wr.CustomChart(query=query, chart_name=kind, chart_fields=columns, chart_strings={"title": title})


def _target(run: Run, entity: str | None, project: str | None) -> Target:
    """Where the audits went, as the run directory says; what the user gives comes before it."""
    path, found = run.path, dict[str, Any]()
    try:
        found = json.loads((path / WANDB).read_bytes())
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise RecordError(f"{path / WANDB}: cannot be read ({error}): remove it, and give --send") from error
    elsewhere = {"entity": entity, "project": project}
    same = bool(found) and all(given in (None, found.get(key)) for key, given in elsewhere.items())
    project = project or found.get("project")
    if not project:
        raise ValueError(f"{path}: was not sent to W&B, so its project is not known: give --project")
    missing, given = "", found.get("audits", len(run.audits))
    if not same or found["offline"]:
        missing = "is not known to be in W&B: `wandb sync` its offline run, or give --send to make a run of it"
    elif run.ended and given < len(run.audits):
        missing = f"W&B was given {given} of {len(run.audits)} audits: give --send to make a run of all of them"
    return Target(
        entity or found.get("entity") or "",
        project,
        str(found["id"]) if same else "",
        str(found.get("name", "bias_audit")),
        missing,
    )


def _account(entity: str) -> str:
    """The entity, if there is an account to save in."""
    import wandb

    if os.environ.get("WANDB_MODE", "online") != "online":
        raise ValueError(
            f"WANDB_MODE is {os.environ['WANDB_MODE']}: a workspace cannot be saved; unset it, or give --dry-run"
        )
    try:
        found = wandb.Api().default_entity
    except wandb.errors.UsageError as error:
        raise ValueError(f"there is no W&B account ({error}): run `wandb login`, or give --dry-run") from error
    entity = entity or found or ""
    if not entity:
        raise ValueError("the W&B account has no default entity: give --entity")
    return entity


def _import_workspaces() -> None:
    try:
        import wandb_workspaces.workspaces  # noqa: F401
    except ImportError as error:
        raise ValueError(f"a workspace needs the package wandb-workspaces: pip install '{EXTRA}'") from error


def _without(found: Any, key: str) -> Any:
    if isinstance(found, dict):
        return {k: _without(v, key) for k, v in found.items() if k != key}
    return [_without(v, key) for v in found] if isinstance(found, list) else found
