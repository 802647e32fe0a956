"""The commands `bias-audit regions ...`.

Enters: arguments. Leaves: files, text on the terminal and an exit code, as the gate's. Neither torch nor Lightning is
imported unless a command needs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Regions for an audit set: propose, convert, check and choose.", no_args_is_help=True)


@app.command()
def propose(
    images: Annotated[Path, typer.Argument(help="The folder of the images.")],
    using: Annotated[
        list[str],
        typer.Option(
            help="What to look for, with commas between or repeated: person, face, hair, torso, hands, background; "
            "or prompt:WORDS, such as prompt:stethoscope, with --prompt-model."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The COCO file to write.")],
    only: Annotated[
        Path | None, typer.Option(help="A table of labels, as `regions sample` writes it: look at its images alone.")
    ] = None,
    weights: Annotated[
        list[Path] | None,
        typer.Option(
            help="State dict of torchvision's maskrcnn_resnet50_fpn_v2, maskrcnn_resnet50_fpn or "
            "keypointrcnn_resnet50_fpn; may be repeated. By default torchvision downloads its own."
        ),
    ] = None,
    prompt_model: Annotated[
        str | None,
        typer.Option(
            help="Folder, or name on the Hugging Face Hub, of a CLIPSeg or SAM 3 (masks), OWL-ViT, OWLv2 or "
            "Grounding DINO (boxes)."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Images that are looked at at once.")] = 4,
    size: Annotated[
        int,
        typer.Option(
            min=1, help="Pixels that an image's shorter side is scaled to, to find people: fewer take less time."
        ),
    ] = 800,
    min_score: Annotated[float, typer.Option(help="Least score of a person, 0 to 1.")] = 0.5,
    prompt_score: Annotated[
        float | None, typer.Option(help="Least score of what a prompt finds; by default what its model is made for.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Propose regions for a folder of images, to be checked and corrected in an editor.

    What is found is kept beside the output while this works: the same command goes on where it was interrupted.

    Exit codes: 0 written; 2 wrong input, images that do not decode; 3 something was found in no image: if nothing at
    all was, no file is written.
    """
    from bias_audit.regions.propose import Options
    from bias_audit.regions.propose import propose as look
    from bias_audit.terminal.regions import print_proposals
    from bias_audit.terminal.text import console

    found = look(
        Options(
            images=images,
            out=output,
            using=tuple(using),
            only=only,
            weights=tuple(weights or ()),
            prompt_model=prompt_model,
            device=device,
            batch_size=batch_size,
            size=size,
            min_score=min_score,
            prompt_score=prompt_score,
            force=force,
        )
    )
    print_proposals(console(), found)
    absent = [one.region for one in found if not one.images]
    if len(absent) < len(found):
        typer.echo(output)
    if absent:
        none = "; nothing is written" if len(absent) == len(found) else ""
        advice = "a lower --min-score or --prompt-score, or a larger --size, finds more"
        typer.echo(f"bias-audit: found in no image: {', '.join(absent)}{none}: {advice}", err=True)
        raise typer.Exit(3)


@app.command()
def sample(
    labels: Annotated[Path, typer.Argument(help="CSV with the columns file and label, and one for each attribute.")],
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many images to choose.")],
    attribute: Annotated[
        list[str] | None,
        typer.Option(help="A column to balance by; by default all but file and label; may be repeated."),
    ] = None,
    annotated: Annotated[
        Path | None, typer.Option(help="Annotations in any format: images in which something is drawn are left out.")
    ] = None,
    annotated_format: Annotated[
        str | None, typer.Option("--from", help="The format of the annotations, where it cannot be recognised.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the images, which some formats need.")] = None,
    run: Annotated[
        Path | None,
        typer.Option(help="A run that audited these images: those come first whose heatmaps lie in no region."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The table to write.")] = Path("to_annotate.csv"),
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Choose the images to annotate first, as many of each label and attribute value as there are to be had.

    Exit codes: 0 chosen; 2 wrong input, or no image is left.
    """
    from bias_audit.atomic import write_whole
    from bias_audit.regions.choose import as_csv, choose_from_files
    from bias_audit.terminal.regions import print_choices
    from bias_audit.terminal.text import console

    if annotated_format is not None and annotated is None:
        raise typer.BadParameter("goes with --annotated, whose format it is", param_hint="--from")
    for source in (labels, annotated):
        if source is not None and source.exists() and output.exists() and output.samefile(source):
            raise ValueError(f"{output}: is what is read: name another file with --output")
    if output.exists() and not force:
        raise FileExistsError(f"{output}: is there already: name another file with --output, or give --force")
    _expect_folder_of(output)
    found = choose_from_files(
        labels,
        count,
        attributes=attribute,
        annotated=annotated,
        format=annotated_format,
        images=images,
        run=run,
        seed=seed,
    )
    write_whole(output, as_csv(found))
    print_choices(console(), found)
    typer.echo(output)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="The annotations: a file or folder of any format.")],
    to: Annotated[
        str, typer.Option(help="The format to write: coco, masks, voc, labelme, cvat, labelstudio, yolo or boxes.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file or folder to write, not there yet.")],
    source_format: Annotated[
        str | None, typer.Option("--from", help="The format of SOURCE, where it cannot be recognised.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="The folder of the images, for formats that do not say their sizes.")
    ] = None,
) -> None:
    """Convert annotations between formats, to hand them to an editor and to take them back; says what is lost.

    Exit codes: 0 written; 2 wrong input, or a format that cannot hold it.
    """
    from bias_audit.regions.bar import bar
    from bias_audit.regions.convert import convert as write
    from bias_audit.terminal.text import text

    with bar("comparing what is written", "images") as progress:
        found = write(source, to, output, source_format, images, progress)
    typer.echo(f"{found.source} to {found.to}: {found.annotations} things in {found.images} images")
    for loss in found.losses:
        typer.echo(f"lost: {text(loss).plain}")
    typer.echo(output)


@app.command()
def check(
    data: Annotated[
        Path, typer.Argument(help="YAML that declares an audit set; or, with --images, annotations in any format.")
    ],
    images: Annotated[
        Path | None, typer.Option(help="The folder of the images of annotations: they have neither labels nor roles.")
    ] = None,
    format: Annotated[str | None, typer.Option("--from", help="Of the annotations, where it is not clear.")] = None,
    policy: Annotated[Path | None, typer.Option(help="YAML or TOML whose min_samples is asked of each cell.")] = None,
    other: Annotated[
        Path | None,
        typer.Option(help="A second annotator's work on the same images: annotations; or, if DATA is a YAML, another."),
    ] = None,
    most_overlap: Annotated[
        float,
        typer.Option(min=0, max=1, help="Most of the smaller of an object and a spurious region that may be in both."),
    ] = 0.5,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A page with the images, .html.")] = None,
) -> None:
    """Check regions before they are audited: what is missing, empty, overlapping, uneven, or too few to tell.

    Exit codes: 0 nothing must be mended, 1 something must, 2 wrong usage or unreadable input, 3 too few images.
    """
    from bias_audit.policies.file import read_policy
    from bias_audit.regions.bar import bar
    from bias_audit.regions.check import check_regions
    from bias_audit.regions.checked import Limits
    from bias_audit.regions.region_set import read_set, with_other
    from bias_audit.regions.survey import survey
    from bias_audit.terminal.regions import print_region_check
    from bias_audit.terminal.text import console

    if format is not None and images is None:
        raise typer.BadParameter("goes with --images: a YAML says itself what it reads", param_hint="--from")
    # Nothing that is read here ends so.
    if output is not None and (output.suffix.lower() not in (".html", ".htm") or output.is_dir()):
        raise typer.BadParameter(f"{output}: expected the name of a page, such as regions.html", param_hint="--output")
    _expect_folder_of(output)
    asked = Limits(read_policy(policy).policy.min_samples, most_overlap)
    found = read_set(data, images, format)
    if other is not None:
        found = with_other(found, other, images)
    with bar("Regions", "images") as progress:
        report = check_regions(survey(found, progress), asked)
    print_region_check(console(), report)
    if output is not None:
        from bias_audit.report.regions import write_regions

        typer.echo(write_regions(output, report))
    raise typer.Exit(report.exit_code)


def _expect_folder_of(output: Path | None) -> None:
    """Said before anything is read, which may take long."""
    if output is not None and not output.parent.is_dir():
        raise ValueError(f"{output}: the folder {output.parent} is not there: make it, or name another file")
