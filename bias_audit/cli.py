"""The command `bias-audit`.

Enters: arguments. Leaves: text on the terminal and an exit code: 0 passed, 1 violated, 2 wrong usage, configuration or
an error, 3 inconclusive. Neither torch nor Lightning is imported unless a command needs it.
"""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer

from bias_audit.data.annotations import Misfit
from bias_audit.gate.result import FailOn, OnInconclusive
from bias_audit.outputs.destinations import defused
from bias_audit.redaction import without_secrets
from bias_audit.regions.commands import app as regions
from bias_audit.terminal.clusters import print_clusters
from bias_audit.terminal.compare import print_comparison
from bias_audit.terminal.policies import print_baseline, print_policy
from bias_audit.terminal.run import print_run
from bias_audit.terminal.text import console
from bias_audit.wording import one_line

app = typer.Typer(
    name="bias-audit",
    help="Whether a vision model looks at the right thing for the right reason.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Of all that is wrong with some files so many are said, then how many more there are.
MOST_LINES = 50

RunDir = Annotated[Path, typer.Argument(help="The directory that holds manifest.json, or one above exactly one such.")]
NoThumbnails = Annotated[
    bool, typer.Option("--no-thumbnails", help="Show no picture: heatmaps lie over outlines of the regions.")
]


@app.command()
def gate(
    source: Annotated[
        str,
        typer.Argument(
            help="A run directory, or one above exactly one; a W&B run on this machine; a run or an artifact in W&B: "
            "entity/project/run, entity/project/artifact:version; or, with --model, a checkpoint to audit on the spot."
        ),
    ],
    policy: Annotated[
        Path | None, typer.Option(help="YAML, or TOML with \\[tool.bias_audit]; by default the one the run recorded.")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="A file by `baseline update`, or a run directory, for `max_regression`.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="What is to be merged: evidence older than it is stale.")
    ] = None,
    trust_checkpoint: Annotated[
        bool,
        typer.Option("--trust-checkpoint", help="Unpickle objects of any kind in the checkpoint: runs code in it."),
    ] = False,
    format: Annotated[
        list[str] | None, typer.Option(help="human, json, markdown, junit or github; may be repeated.")
    ] = None,
    output: Annotated[
        list[Path] | None,
        typer.Option(
            help="A file for the first --format, the second ...; beyond these its name tells: .json .md .xml .txt. "
            "Formats without a file go to standard output."
        ),
    ] = None,
    fail_on: Annotated[FailOn, typer.Option(help="Whether rules of severity warn decide as well.")] = "error",
    on_inconclusive: Annotated[
        OnInconclusive, typer.Option(help="Exit with 3, or with 0: saying so, or not.")
    ] = "fail",
    exit_zero: Annotated[bool, typer.Option("--exit-zero", help="Exit with 0 unless it is an error.")] = False,
    model: Annotated[
        str | None, typer.Option(help="Audit SOURCE on the spot: package.module:name of its LightningModule or model.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="With --model: YAML that declares the audit set.")] = None,
    out: Annotated[Path | None, typer.Option(help="With --model: where the run directory is to stay.")] = None,
) -> None:
    """Check what a run recorded against a policy.

    Exit codes: 0 passed, 1 violated, 2 wrong usage, configuration or an error, 3 inconclusive.
    """
    from bias_audit.outputs.destinations import clear, destinations, write
    from bias_audit.policies.file import read_policy
    from bias_audit.sources import audited, judge_source

    where = destinations(format or [], output or [])
    clear(where)
    if trust_checkpoint and checkpoint is None and model is None:
        raise ValueError("--trust-checkpoint: there is no checkpoint to trust: name one by --checkpoint or --model")
    rules = None if policy is None else read_policy(policy)
    opened = None
    if model is not None and data is not None:
        opened = audited(source, model=model, data=data, out=out, policy=policy, trust=trust_checkpoint)
    elif model is not None or data is not None or out is not None:
        raise ValueError("expected --model and --data together, to audit SOURCE on the spot, and --out only with them")
    result = judge_source(
        source,
        rules,
        opened=opened,
        baseline=baseline,
        checkpoint=checkpoint,
        trust_checkpoint=trust_checkpoint,
        fail_on=fail_on,
        on_inconclusive=on_inconclusive,
        exit_zero=exit_zero,
    )
    write(result, where)
    raise typer.Exit(result.exit_code)


@app.command()
def run(
    model: Annotated[
        str, typer.Option(help="package.module:name, a function or class that gives the model, or a LightningModule.")
    ],
    data: Annotated[Path, typer.Option(help="YAML that declares the audit set: reader, paths, roles, transform.")],
    out: Annotated[Path, typer.Option(help="The run directory; an earlier run there moves to previous/ in it.")],
    checkpoint: Annotated[Path | None, typer.Option(help="Lightning checkpoint of the class --model.")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="State dict for the model: .pt, .safetensors or a Lightning checkpoint.")
    ] = None,
    trust_checkpoint: Annotated[
        bool, typer.Option("--trust-checkpoint", help="Unpickle objects of any kind in the file: runs code in it.")
    ] = False,
    policy: Annotated[Path | None, typer.Option(help="YAML or TOML, recorded with the run.")] = None,
    training: Annotated[
        Path | None, typer.Option(help="CSV of the training set's labels and attributes, for association in it.")
    ] = None,
    layer: Annotated[
        str | None, typer.Option(help="Submodule to explain; by default the last that keeps the image's places.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images per forward pass.")] = 32,
    max_samples: Annotated[int, typer.Option(help="Of a larger audit set so many are drawn.")] = 512,
    seed: Annotated[int, typer.Option(help="Of that draw and of every resampling.")] = 0,
    no_thumbnails: Annotated[
        bool, typer.Option("--no-thumbnails", help="Write no picture: heatmaps lie over outlines of the regions.")
    ] = False,
    accelerator: Annotated[str, typer.Option(help="As the Trainer has it: cpu, gpu, auto ...")] = "auto",
    devices: Annotated[str, typer.Option(help="As the Trainer has it: a number, a list such as 0,1, or auto.")] = "1",
    num_nodes: Annotated[int, typer.Option(help="As the Trainer has it.")] = 1,
    strategy: Annotated[str, typer.Option(help="As the Trainer has it: ddp, ...")] = "auto",
    precision: Annotated[str | None, typer.Option(help="As the Trainer has it: bf16-mixed, ...")] = None,
) -> None:
    """Audit a model without training it, on one device or many, and print the run directory."""
    from bias_audit.callbacks.running import RunOptions, audit_checkpoint

    if trust_checkpoint and checkpoint is None and weights is None:
        raise ValueError("--trust-checkpoint: there is no file to trust: name one by --checkpoint or --weights")
    options = RunOptions(
        model=model,
        data=data,
        out=out,
        checkpoint=checkpoint,
        weights=weights,
        trust_checkpoint=trust_checkpoint,
        policy=policy,
        training=training,
        layer=layer,
        batch_size=batch_size,
        max_samples=max_samples,
        seed=seed,
        thumbnails=not no_thumbnails,
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
        precision=precision,
    )
    typer.echo(audit_checkpoint(options))


@app.command()
def report(run_dir: RunDir, no_thumbnails: NoThumbnails = False) -> None:
    """Draw a run's page anew and print its path."""
    from bias_audit.report.page import write_report

    typer.echo(write_report(run_dir, thumbnails=not no_thumbnails))


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
    from bias_audit.records.runs import read_run
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
    from bias_audit.records.runs import read_run

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
    no_thumbnails: NoThumbnails = False,
) -> None:
    """Say what changed from one run to another, with intervals; it is no gate and exits with 0."""
    from bias_audit.gate.compare import compare_runs
    from bias_audit.records.runs import read_run
    from bias_audit.report.compare import write_comparison

    found = compare_runs(read_run(run_a), read_run(run_b))
    print_comparison(console(), found)
    path = found.b.run.path / "compare.html" if out is None else out
    typer.echo(write_comparison(path, found, thumbnails=not no_thumbnails))


baselines = typer.Typer(help="What a model must not be worse than.", no_args_is_help=True)
app.add_typer(baselines, name="baseline")


@baselines.command()
def update(
    source: Annotated[str, typer.Argument(help="A run that training ended well; as for `gate`.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file, to be kept with the code; a baseline there is replaced.")
    ] = Path("bias-audit-baseline.jsonl"),
) -> None:
    """Make the last audit of a run the baseline that `gate --baseline` compares with.

    What a run shows may be made the baseline whether or not a policy allows it: review the change as one of code.
    """
    from bias_audit.gate.baseline import Baseline
    from bias_audit.gate.baseline_file import read_baseline, write_baseline
    from bias_audit.gate.gate import run_gate
    from bias_audit.records.errors import RecordError
    from bias_audit.records.runs import read_run
    from bias_audit.sources import open_run

    with open_run(source) as path:
        run = read_run(path)
        made, outcome = Baseline.of_run(run), run_gate(run).outcome
        try:
            before = read_baseline(output) if output.is_file() else None
        except RecordError:
            # It may be damaged: whether it was one at all is asked before it is written over.
            before = None
        size = write_baseline(made, output)
    print_baseline(console(), made, output, size, before, outcome)


app.add_typer(regions, name="regions")

policies = typer.Typer(help="What an audit must show.", no_args_is_help=True)
app.add_typer(policies, name="policy")


@policies.command()
def init(
    source: Annotated[str, typer.Argument(help="A run to make it from; as for `gate`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file.")] = Path("audit.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Write a commented policy: what may be asked of a run like this one, and what it measures today."""
    from bias_audit.atomic import write_whole
    from bias_audit.gate.policy_draft import draft_policy
    from bias_audit.records.runs import read_run
    from bias_audit.sources import open_run

    if output.exists() and not force:
        raise FileExistsError(f"{output}: is there already: name another file with --output, or give --force")
    with open_run(source) as path:
        write_whole(output, draft_policy(read_run(path)).encode())
    typer.echo(output)


@policies.command()
def check(
    policy: Annotated[Path, typer.Argument(help="YAML, or TOML with \\[tool.bias_audit].")],
    source: Annotated[str | None, typer.Argument(help="A run to try it on; as for `gate`.")] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="A file by `baseline update`, or a run directory, for `max_regression`.")
    ] = None,
) -> None:
    """Explain each rule: what it asks, what it is about in a run, and how it would come out.

    Exit codes: 0 all rules are decided, violated or not; 2 something is misspelt; 3 the run leaves a rule undecided.
    """
    from bias_audit.gate.baseline_file import read_baseline
    from bias_audit.gate.policy_check import check_policy
    from bias_audit.policies.file import read_policy
    from bias_audit.records.errors import MissingEvidenceError
    from bias_audit.records.runs import read_run
    from bias_audit.sources import open_run

    file = read_policy(policy)
    if source is None:
        if baseline is not None:
            raise typer.BadParameter("a baseline is compared with a run: name the run as well", param_hint="--baseline")
        report = check_policy(file)
    else:
        against = None if baseline is None else read_baseline(baseline)
        try:
            with open_run(source) as path:
                report = check_policy(file, read_run(path), against)
        except MissingEvidenceError as error:
            print_policy(console(), check_policy(file), str(error))
            raise typer.Exit(3) from error
    print_policy(console(), report)
    raise typer.Exit(report.exit_code)


@policies.command()
def schema() -> None:
    """Print the JSON Schema of a policy, for editors."""
    from bias_audit.policies.schema import policy_schema

    typer.echo(policy_schema(), nl=False)


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
    from bias_audit.callbacks.wandb.workspace import push as push_workspace

    typer.echo(push_workspace(run_dir, entity=entity, project=project, send=send, dry_run=dry_run))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the two run directories, biased/ and balanced/, go.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Of the scenes and of the training.")] = 0,
) -> None:
    """Train the doctor/nurse case of the Grad-CAM paper twice, on biased and on balanced data, and audit both."""
    from bias_audit.demo import run_demo

    run_demo(out, seed, console())


def _complain(words: str) -> None:
    """One line on standard error."""
    # Names from the data must not steer the terminal.
    said = f"bias-audit: {without_secrets(one_line(words))}"
    typer.echo(defused(said) if "GITHUB_ACTIONS" in os.environ else said, err=True)


def _check_arguments(arguments: list[str]) -> None:
    """Raise if an argument is empty: a path of no letters would be the current directory."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if argument == "" or (argument.startswith("--") and argument.endswith("=")):
            what = argument or before
            name = f"{what.removesuffix('=')}: " if what.startswith("-") else ""
            raise ValueError(f"{name}expected a value, got nothing: set the variable it comes from, or leave it out")


def main() -> Any:
    """The console script: every error becomes a line for each thing that is wrong, and exit code 2, because 1 means
    "violated"."""
    if isinstance(sys.stdout, TextIOWrapper):
        # A name that the terminal cannot write must not cost the outcome.
        sys.stdout.reconfigure(errors="replace")
    try:
        _check_arguments(sys.argv[1:])
        code = app(standalone_mode=False)
    except typer.Abort:
        code = 130
    except Exception as error:
        # What the command line itself finds wrong knows its own way to say so.
        show = getattr(error, "show", None)
        if show is not None:
            show()
        else:
            lines = error.lines if isinstance(error, Misfit) else (str(error) or type(error).__name__,)
            if isinstance(error, ModuleNotFoundError):
                lines = (f"{error}: this takes bias-audit with all its dependencies: pip install bias-audit",)
            known = isinstance(error, ValueError | OSError | ModuleNotFoundError)
            kind = "" if known else f"internal error: {type(error).__name__}: "
            for line in lines[:MOST_LINES]:
                _complain(f"{kind}{line}")
            if len(lines) > MOST_LINES:
                _complain(f"and {len(lines) - MOST_LINES} more")
        code = 2
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
