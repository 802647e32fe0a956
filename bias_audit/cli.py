"""The command `bias-audit`.

Enters: arguments. Leaves: text on the terminal and an exit code: 0 passed, 1 violated, 2 wrong usage, configuration or
an error, 3 inconclusive. Neither torch nor Lightning is imported unless a command needs it.
"""

from __future__ import annotations

import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer

from bias_audit.terminal import console, print_clusters, print_comparison, print_gate, print_run

app = typer.Typer(
    name="bias-audit",
    help="Whether a vision model looks at the right thing for the right reason.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RunDir = Annotated[Path, typer.Argument(help="The directory that holds manifest.json, or one above exactly one such.")]


@app.command()
def gate(
    run_dir: RunDir,
    policy: Annotated[
        Path | None, typer.Option(help="YAML, or TOML with [tool.bias_audit]; by default the one the run recorded.")
    ] = None,
) -> None:
    """Check a run's last audit against a policy.

    Exit codes: 0 passed, 1 violated, 2 wrong usage, configuration or an error, 3 inconclusive.
    """
    from bias_audit.gate import run_gate
    from bias_audit.history import onsets
    from bias_audit.records import read_run

    run = read_run(run_dir)
    result = run_gate(run, policy)
    print_gate(console(), result, onsets(run.audits))
    raise typer.Exit(result.exit_code)


@app.command()
def report(run_dir: RunDir) -> None:
    """Draw a run's page anew and print its path."""
    from bias_audit.report import write_report

    typer.echo(write_report(run_dir))


@app.command()
def clusters(
    run_dir: RunDir,
    audit: Annotated[int, typer.Option(help="Which audit, counted from 0; -1 is the last.")] = -1,
    method: Annotated[str | None, typer.Option(help="Which explanation method; by default the run's first.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The picture, .png or .svg; by default clusters.png in the run directory.")
    ] = None,
) -> None:
    """Look for cues that nobody annotated: images of one class whose heatmaps lie elsewhere than the others'."""
    from bias_audit.evidence.clusters import ranked
    from bias_audit.records import read_run
    from bias_audit.report.clusters import draw_clusters, run_clusters

    run = read_run(run_dir)
    found = run_clusters(run, audit=audit, method=method)
    screen = console()
    print_clusters(screen, found, ranked(found.classes))
    if any(one.clusters for one in found.classes):
        path = run.path / "clusters.png" if out is None else out
        drawn = draw_clusters(path, found)
        screen.print(f"{drawn} of {len(found.classes)} classes drawn:", highlight=False)
        typer.echo(path)


@app.command()
def show(
    run_dir: RunDir,
    audit: Annotated[int, typer.Option(help="Which audit, counted from 0; -1 is the last.")] = -1,
    samples: Annotated[
        int | None, typer.Option(min=0, help="How many samples to draw; by default 4 on a terminal, else none.")
    ] = None,
) -> None:
    """Print an audit's verdicts, how its numbers came about, and the samples that are looked at worst."""
    from bias_audit.records import read_run

    run, asked = read_run(run_dir), samples
    if asked is None:
        asked = 4 if sys.stdout.isatty() else 0
    print_run(console(colours=bool(samples)), run, audit, asked)


@app.command()
def compare(
    run_a: Annotated[Path, typer.Argument(help="A run directory, or one above exactly one such.")],
    run_b: Annotated[Path, typer.Argument(help="Another; differences are B less A.")],
    out: Annotated[
        Path | None, typer.Option(help="The page; by default compare.html in the directory of run B.")
    ] = None,
) -> None:
    """Say what changed from one run to another, with intervals; it is no gate and exits with 0."""
    from bias_audit.compare import compare_runs
    from bias_audit.records import read_run
    from bias_audit.report.compare import write_comparison

    found = compare_runs(read_run(run_a), read_run(run_b))
    print_comparison(console(), found)
    typer.echo(write_comparison(found.b.run.path / "compare.html" if out is None else out, found))


dashboard = typer.Typer(help="The run in Weights & Biases.", no_args_is_help=True)
app.add_typer(dashboard, name="dashboard")


@dashboard.command()
def push(
    run_dir: RunDir,
    entity: Annotated[str | None, typer.Option(help="W&B user or team; by default that of the logged run.")] = None,
    project: Annotated[str | None, typer.Option(help="W&B project; by default that of the logged run.")] = None,
    send: Annotated[
        bool, typer.Option(help="Make a W&B run of the recorded audits: they were not sent, or only offline.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option(help="Print the workspace's specification as JSON; needs neither account nor network.")
    ] = False,
) -> None:
    """Save a workspace in Weights & Biases, laid out by what a reader asks, and print its address."""
    from bias_audit.callbacks.workspace import push as push_workspace

    typer.echo(push_workspace(run_dir, entity=entity, project=project, send=send, dry_run=dry_run))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the two run directories, biased/ and balanced/, go.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Of the scenes and of the training.")] = 0,
) -> None:
    """Train the doctor/nurse case of the Grad-CAM paper twice, on biased and on balanced data, and audit both."""
    from bias_audit.demo import run_demo

    run_demo(out, seed, console())


def main() -> Any:
    """The console script: every error becomes one line and exit code 2, because 1 means "violated"."""
    if isinstance(sys.stdout, TextIOWrapper):
        # A name that the terminal cannot write must not cost the outcome.
        sys.stdout.reconfigure(errors="replace")
    try:
        code = app(standalone_mode=False)
    except typer.Abort:
        code = 130
    except Exception as error:
        # What the command line itself finds wrong knows its own way to say so.
        show = getattr(error, "show", None)
        if show is not None:
            show()
        else:
            text = " ".join(str(error).split()) or type(error).__name__
            known = isinstance(error, ValueError | OSError)
            typer.echo(f"bias-audit: {'' if known else f'internal error: {type(error).__name__}: '}{text}", err=True)
        code = 2
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
