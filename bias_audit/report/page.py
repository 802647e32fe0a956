"""Turn a recorded run into one self-contained HTML page for a reviewer.

Enters: a `Run`, or the path of a run directory. Leaves: `report.html`, which needs neither network nor server and says
whether there is a problem, where, since when, for whom, whether it matters, and which images show it.

torch is not imported here: a report can be made where the records are.
"""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from bias_audit.atomic import write_whole
from bias_audit.records.files import REPORT
from bias_audit.records.runs import Run, read_run
from bias_audit.report.association import association_tables
from bias_audit.report.charts import draw
from bias_audit.report.facts import facts, glance
from bias_audit.report.groups import grouped
from bias_audit.report.pages import content_security_policy, resource, template
from bias_audit.report.samples import viewer_data
from bias_audit.report.verdicts import check_rows, explainer_rows, finding_rows, headline

MOST_HELD_SHOWN = 8


def write_report(run: Run | str | Path, *, thumbnails: bool = True) -> Path:
    """Write `report.html` into the run's directory; readers never see half a page.

    Args:
        run: a run that was read, or the path of a run directory or of one above the only one.
        thumbnails: as of `render`.

    Raises:
        RecordError: there is no readable run directory.
        OSError: the page cannot be written.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from bias_audit import AuditPlan, audit_model
        >>> from bias_audit.data.scenes import scene_dataset
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> few = scene_dataset({("doctor", "female"): 4, ("nurse", "male"): 4}, seed=0)
        >>> plan = AuditPlan(fitness_samples=0, intervention_samples=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = audit_model(net, few, plan=plan, out=folder)
        ...     page = write_report(folder)
        ...     page.name, page.stat().st_size > 100_000
        ('report.html', True)
    """
    run = run if isinstance(run, Run) else read_run(run)
    target = run.path / REPORT
    # A file name that is not text stays legible; it must not cost the reader the page.
    write_whole(target, render(run, thumbnails=thumbnails).encode("utf-8", "backslashreplace"))
    return target


def render(run: Run, *, thumbnails: bool = True) -> str:
    """The run as one HTML page; without `thumbnails` the heatmaps lie over bare outlines and no picture is disclosed.

    Raises:
        RecordError: the samples or an audit's arrays cannot be read.
    """
    script, style = resource("pictures.js") + resource("viewer.js"), resource("page.css")
    thumbnails = thumbnails and bool(run.manifest.thumbnails)
    return template("page.html.j2").render(
        content_security_policy=content_security_policy(style, script),
        # Both are this package's own files; they must reach the page unchanged, or their hashes forbid them.
        css=Markup(style),
        script=Markup(script),
        manifest=run.manifest,
        run=run,
        last=run.audits[-1] if run.audits else None,
        headline=headline(run),
        glance=glance(run),
        facts=facts(run),
        findings=finding_rows(run),
        checks=check_rows(run),
        explainers=explainer_rows(run),
        questions=draw(run),
        associations=association_tables(run),
        grouped=grouped(run, thumbnails=thumbnails),
        viewer=viewer_data(run, thumbnails=thumbnails),
        pictures=thumbnails,
        most_held_shown=MOST_HELD_SHOWN,
    )
