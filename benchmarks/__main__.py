"""`python -m benchmarks`: measure, and write the raw timings, the table and the plot."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.contenders import GROUPS, Skipped
from benchmarks.gpu import measure_device
from benchmarks.memory import can_measure, measure_all, tasks_of
from benchmarks.peers import agreements
from benchmarks.report import write_page, written
from benchmarks.results import Block, Results, checks, this_machine, today
from benchmarks.timing import alternate
from benchmarks.workloads import SPECS, Spec, make_workload

RESULTS = Path(__file__).parent / "results"
ROUNDS = 6


def main(arguments: Sequence[str] | None = None) -> Results:
    """Run with these command line arguments; returns what was measured.

    Raises:
        RuntimeError: a peer explains something else than we do, or a measured process failed.
    """
    options = _parser().parse_args(arguments)
    console = Console()
    if options.redraw:
        path = Path(options.redraw).with_suffix("")
        results = Results.read(path.with_suffix(".json"))
        write_page(results, path)
    else:
        torch.set_num_threads(options.threads)
        specs = [_overridden(SPECS[name], options.batch, options.images) for name in options.models]
        empty = Results(today(), this_machine(), torch.get_num_threads(), options.rounds)
        path = Path(options.out) / f"{empty.machine.slug}-{empty.created}"
        for results in _stages(empty, specs, options, console):
            # After each stage: what was measured stays, should the next one be broken off.
            results.write(path.with_name(path.name + ".json"))
            write_page(results, path)
    _say(results, path, console)
    return results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=SPECS, default=list(SPECS), help="which models")
    parser.add_argument("--rounds", type=_positive, default=ROUNDS, help="rounds; audits get half")
    parser.add_argument("--batch", type=_positive, help="images per batch; by default chosen for each model")
    parser.add_argument("--images", type=_positive, help="images in an audit; by default chosen for each model")
    parser.add_argument("--threads", type=_positive, default=os.cpu_count(), help="threads of torch")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--out", default=str(RESULTS), help="folder for the results")
    parser.add_argument("--redraw", metavar="JSON", help="draw table and plot anew from these results, measure nothing")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def _overridden(spec: Spec, batch: int | None, images: int | None) -> Spec:
    images = images or spec.images
    return dataclasses.replace(spec, batch=min(batch or spec.batch, images), images=images)


def _stages(
    results: Results, specs: Sequence[Spec], options: argparse.Namespace, console: Console
) -> Iterator[Results]:
    """The results so far, after each stage: each model's time, then memory, then the accelerator."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        for spec in specs:
            results = _timed(results, spec, progress)
            yield results
        if not options.no_memory and can_measure():
            tasks = [t for b in results.blocks for t in tasks_of(_of(specs, b.model), b.group, _names(b))]
            bar = progress.add_task("peak memory", total=len(tasks))
            memory = measure_all(tasks, lambda task: progress.advance(bar))
            results = dataclasses.replace(results, memory=memory)
            yield results
        if torch.cuda.is_available():
            bar = progress.add_task("accelerator", total=None)
            rows = measure_device(specs, progress=lambda what: progress.update(bar, description=what))
            results = dataclasses.replace(results, device_rows=rows)
            yield results


def _timed(results: Results, spec: Spec, progress: Progress) -> Results:
    bar = progress.add_task(f"{spec.model}: loads", total=None)
    work = make_workload(spec)
    agreed = agreements(work)
    blocks: list[Block] = []
    skipped: list[Skipped] = []
    with TemporaryDirectory() as folder:
        for name, make in GROUPS.items():
            group = make(work, Path(folder) / name)
            rounds = max(1, results.rounds // group.effort)
            total = sum(1 + -(-rounds // c.every) for c in group.contenders)
            progress.update(bar, total=total, completed=-1)

            def step(contender: str) -> None:
                progress.update(bar, description=f"{spec.model}: {contender}", advance=1)

            series = alternate(group.contenders, rounds, tidy=work.model.zero_grad, progress=step)
            blocks.append(Block(spec.model, name, group.images, spec.batch, series))
            skipped += group.skipped
    progress.update(bar, description=spec.model, completed=total)
    return dataclasses.replace(
        results,
        blocks=(*results.blocks, *blocks),
        agreements=(*results.agreements, *agreed),
        skipped=(*results.skipped, *skipped),
    )


def _of(specs: Sequence[Spec], model: str) -> Spec:
    return next(spec for spec in specs if spec.model == model)


def _names(block: Block) -> list[str]:
    return [series.contender for series in block.series]


def _say(results: Results, path: Path, console: Console) -> None:
    table = Table(title="Targets", title_justify="left")
    for title in ("model", "what", "target", "measured", "outcome"):
        table.add_column(title)
    for check in checks(results):
        table.add_row(check.model, check.what, check.target, written(check.value), check.outcome)
    console.print(table)
    console.print(f"{path}.md, {path}.png, {path}.json", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
