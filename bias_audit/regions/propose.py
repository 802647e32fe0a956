"""Proposes regions for a folder of images, by detectors, for people to check and correct.

Enters: a folder, and detectors: functions from pictures to annotations. Leaves: a COCO file with every image of the
folder; each annotation says which detector made it, from which weights and at which threshold, and how sure it was.

While it works, what is found goes to a `Partial` file beside the output, which a later call goes on from: with the same
images and settings the output is the same, to the bit, however often it was interrupted. It is written whole, at the
end, or not at all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from bias_audit.data.annotations import Annotation, Annotations, Box, Complaints, Misfit
from bias_audit.data.files import near, size_of
from bias_audit.data.formats.known import write_annotations
from bias_audit.regions.bar import bar
from bias_audit.regions.partial import Line, Partial, Settings, partial_of, state_of
from bias_audit.regions.people import REGIONS
from bias_audit.regions.pictures import Picture, chosen_files, opened, taken_size
from bias_audit.regions.weights import load_people

PROMPT = "prompt:"
_THREADS = 4


class Proposer(Protocol):
    """A detector of regions."""

    @property
    def regions(self) -> Sequence[str]:
        """The names of all that it looks for."""

    @property
    def source(self) -> str:
        """What its result depends on: models, weights, thresholds."""

    def alike(self, size: tuple[int, int]) -> Hashable:
        """Images whose (height, width) give the same may be looked at in one batch.

        Raises:
            ValueError: such images cannot be looked at.
        """

    def __call__(self, pictures: Sequence[Picture]) -> list[tuple[Annotation, ...]]:
        """What is found in each of the pictures."""


@dataclass(frozen=True)
class Options:
    """What `bias-audit regions propose` is told.

    `using` names regions of `people.REGIONS`, and `prompt:...` with the words for anything else, which `prompt_model`
    looks for. `only` is a table of labels, whose images alone are looked at. `size` is that of `people.load_people`; a
    `prompt_score` of None is the model's own.
    """

    images: Path
    out: Path
    using: tuple[str, ...]
    only: Path | None = None
    weights: tuple[Path, ...] = ()
    prompt_model: str | None = None
    device: str = "auto"
    batch_size: int = 4
    size: int = 800
    min_score: float = 0.5
    prompt_score: float | None = None
    force: bool = False


@dataclass(frozen=True)
class Found:
    """In how many images a region was found, how often, and how often as a box only."""

    region: str
    images: int
    annotations: int
    boxes: int


def propose(options: Options) -> tuple[Found, ...]:
    """Load the detectors that are needed, look at every image of the folder, and write what is found.

    Raises:
        ValueError: an option, a file of weights or a model that cannot be used.
        Misfit: images that do not decode, all of them.

    Example:
        >>> found = propose(Options(Path("images"), Path("regions.json"), ("person", "face")))  # doctest: +SKIP
        >>> [(one.region, one.images) for one in found]  # doctest: +SKIP
        [('person', 388), ('face', 312)]
    """
    people, prompts = _asked(options.using)
    if not 0 <= options.min_score < 1 or not 0 <= (options.prompt_score or 0.0) < 1:
        raise ValueError("expected scores from 0 to below 1: see --min-score and --prompt-score")
    if options.batch_size < 1 or options.size < 1:
        raise ValueError("expected --batch-size and --size to be at least 1")
    if bool(prompts) != (options.prompt_model is not None):
        raise ValueError(
            f"expected --prompt-model together with regions {PROMPT}..., which it looks for: give both or neither"
        )
    if options.weights and not people:
        raise ValueError(f"--weights are for {', '.join(REGIONS)}, and none of these is asked for: leave them out")
    # What is wrong with the folder or the output is said before gigabytes are loaded.
    chosen_files(options.images, options.only)
    _check_output(options.out, options.force)
    device = _device(options.device)
    proposers: list[Proposer] = []
    if people:
        proposers.append(load_people(people, options.weights, device, options.size, options.min_score))
    if options.prompt_model is not None:
        from bias_audit.regions.prompts import load_prompts

        proposers.append(load_prompts(options.prompt_model, prompts, device, options.prompt_score))
    return write_proposals(
        options.images,
        options.out,
        proposers,
        options.batch_size,
        only=options.only,
        force=options.force,
        device=device.type,
    )


def write_proposals(
    images: Path,
    out: Path,
    proposers: Sequence[Proposer],
    batch_size: int,
    *,
    device: str,
    only: Path | None = None,
    force: bool = False,
) -> tuple[Found, ...]:
    """Have detectors look at every image of a folder, and write what they find as COCO; or go on with that.

    What was found is kept, per image, in `out` with `.partial.jsonl` behind its name until `out` is written. If
    nothing is found in any image, nothing is written.

    Args:
        images: the folder.
        out: the file.
        proposers: the detectors.
        batch_size: how many images a detector is given at once.
        device: what they run on: kept with what is found, since rounding differs.
        only: a table of labels: its images alone are looked at.
        force: whether a file that is there is written over.

    Returns:
        How often each region was found.

    Raises:
        ValueError: no image, a file that is there already, or what was found by other settings.
        Misfit: images that do not decode, or that a detector cannot look at, all of them; what was found in the others
            is kept.
    """
    files = chosen_files(images, only)
    _check_output(out, force)
    regions = tuple(name for proposer in proposers for name in proposer.regions)
    settings = Settings(
        made_by=[proposer.source for proposer in proposers],
        batch_size=batch_size,
        device=device,
        torch=torch.__version__,
    )
    wrong = Complaints()
    batches = _batches(images, files, proposers, batch_size, wrong)
    with Partial.open(partial_of(out), settings) as partial, bar("looking at", "images") as progress:
        todo = [batch for batch in batches if not all(partial.has(images, file) for file in batch)]
        done = len(files) - sum(map(len, todo))
        progress(done, len(files))
        for looks in _read_ahead(images, todo):
            _look(looks, proposers, partial, wrong)
            done += len(looks)
            progress(done, len(files))
    if wrong.lines:
        raise Misfit(sorted(wrong.lines))
    annotations = Annotations(tuple(partial.done[file].image() for file in files), regions)
    found = tuple(_found(region, annotations) for region in regions)
    if any(one.annotations for one in found):
        write_annotations(annotations, out, "coco")
    partial_of(out).unlink()
    return found


def _asked(using: Sequence[str]) -> tuple[list[str], list[str]]:
    """The regions of people and the prompts among the names that are asked for."""
    names = [name.strip() for text in using for name in text.split(",")]
    prompts = [" ".join(name.removeprefix(PROMPT).split()) for name in names if name.startswith(PROMPT)]
    people = [name for name in names if not name.startswith(PROMPT)]
    wrong = Complaints()
    for name in people:
        if name not in REGIONS:
            what = f"unknown region {name!r}: {near(name, REGIONS)}" if name else "a name is empty: leave it out"
            wrong.add("--using", f"{what}; for anything else write {PROMPT}WORDS" if name else what)
    for name in sorted({n for n in [*people, *prompts] if n and [*people, *prompts].count(n) > 1}):
        wrong.add("--using", f"region {name!r} is named twice: name it once")
    if "" in prompts:
        wrong.add("--using", f"{PROMPT} has no words: say what to look for")
    wrong.end()
    return people, prompts


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        said = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: cannot be used ({said}): give auto, cpu, cuda, mps ...") from error
    return device


def _check_output(out: Path, force: bool) -> None:
    if out.exists() and not force and not partial_of(out).exists():
        raise ValueError(f"{out}: is there already: name another file, or give --force")
    if not out.parent.is_dir():
        raise ValueError(f"{out}: the folder {out.parent} is not there: make it, or name another file")


def _batches(
    images: Path, files: Sequence[str], proposers: Sequence[Proposer], batch_size: int, wrong: Complaints
) -> list[list[str]]:
    """The files in batches of images that are alike, each in alphabetical order; those that are no images aside."""
    alike: dict[Hashable, list[str]] = {}
    for file in files:
        size = wrong.attempt(lambda file=file: size_of(images / file))  # type: ignore[misc]
        if size is not None:
            taken = taken_size(size)
            key = wrong.attempt(lambda taken=taken: tuple(p.alike(taken) for p in proposers), str(images / file))  # type: ignore[misc]
            if key is not None:
                alike.setdefault(key, []).append(file)
    return [names[at : at + batch_size] for names in alike.values() for at in range(0, len(names), batch_size)]


@dataclass(frozen=True)
class _Looked:
    """A file on its way to the detectors: how it was when it was opened, and what opening it gives."""

    file: str
    state: tuple[int, int]
    picture: Future[Picture]


def _read_ahead(images: Path, batches: Sequence[Sequence[str]]) -> Iterator[list[_Looked]]:
    """The batches in their order, opened by threads while the detectors look at those before."""
    with ThreadPoolExecutor(_THREADS) as threads:
        ahead: deque[list[_Looked]] = deque()
        for batch in batches:
            ahead.append([_Looked(f, state_of(images, f), threads.submit(opened, images / f)) for f in batch])
            if len(ahead) > 1:
                yield ahead.popleft()
        yield from ahead


def _look(batch: Sequence[_Looked], proposers: Sequence[Proposer], partial: Partial, wrong: Complaints) -> None:
    """All detectors look at a batch; what they find is kept once all have."""
    whole = [(one, picture) for one in batch if (picture := wrong.attempt(one.picture.result)) is not None]
    if not whole:
        return
    pictures = [picture for _, picture in whole]
    try:
        each = [proposer(pictures) for proposer in proposers]
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{len(pictures)} images at once are too many for the device's memory: give a smaller --batch-size"
        ) from error
    for (one, picture), *found in zip(whole, *each, strict=True):
        partial.add(Line.of(one.file, one.state, picture.size, [annotation for some in found for annotation in some]))
    partial.sync()


def _found(region: str, annotations: Annotations) -> Found:
    own = [[a for a in image.annotations if a.region == region] for image in annotations.images]
    boxes = sum(isinstance(a.outline, Box) for some in own for a in some)
    return Found(region, sum(map(bool, own)), sum(map(len, own)), boxes)
