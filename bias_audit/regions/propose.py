"""Proposes regions for a folder of images, by detectors, for people to check and correct.

Enters: a folder, and detectors: functions from pictures to annotations. Leaves: a COCO file with every image of the
folder; each annotation says which detector made it, from which weights and at which threshold, and how sure it was.

While it works, what is found goes line by line to a file beside the output, which a later call goes on from: with the
same images and settings the output is the same, to the bit, however often it was interrupted. It is written whole, at
the end, or not at all.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bias_audit.data.annotations import AnnotatedImage, Annotation, Annotations, Box, Complaints, Misfit, Runs
from bias_audit.data.files import near, size_of
from bias_audit.data.formats import write_annotations
from bias_audit.regions.people import REGIONS, load_people
from bias_audit.regions.pictures import Picture, chosen_files, opened, taken_size

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
    settings = _Settings(
        made_by=[proposer.source for proposer in proposers],
        batch_size=batch_size,
        device=device,
        torch=torch.__version__,
    )
    wrong = Complaints()
    batches = _batches(images, files, proposers, batch_size, wrong)
    with _Partial.open(partial_of(out), settings) as partial, _bar(len(files)) as advance:
        todo = [batch for batch in batches if not all(partial.has(images, file) for file in batch)]
        advance(len(files) - sum(map(len, todo)))
        for looks in _read_ahead(images, todo):
            _look(looks, proposers, partial, wrong)
            advance(len(looks))
    if wrong.lines:
        raise Misfit(sorted(wrong.lines))
    annotations = Annotations(tuple(partial.done[file].image() for file in files), regions)
    found = tuple(_found(region, annotations) for region in regions)
    if any(one.annotations for one in found):
        write_annotations(annotations, out, "coco")
    partial_of(out).unlink()
    return found


def partial_of(out: Path) -> Path:
    """Where what is found is kept until the output is written."""
    return out.with_name(f"{out.name}.partial.jsonl")


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
            ahead.append([_Looked(f, _state(images, f), threads.submit(opened, images / f)) for f in batch])
            if len(ahead) > 1:
                yield ahead.popleft()
        yield from ahead


def _look(batch: Sequence[_Looked], proposers: Sequence[Proposer], partial: _Partial, wrong: Complaints) -> None:
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
        partial.add(_Line.of(one, picture, [annotation for some in found for annotation in some]))
    partial.sync()


def _found(region: str, annotations: Annotations) -> Found:
    own = [[a for a in image.annotations if a.region == region] for image in annotations.images]
    boxes = sum(isinstance(a.outline, Box) for some in own for a in some)
    return Found(region, sum(map(bool, own)), sum(map(len, own)), boxes)


def _state(images: Path, file: str) -> tuple[int, int]:
    """A file's length and the time of its last change: another image in its place is looked at again."""
    found = (images / file).stat()
    return found.st_size, found.st_mtime_ns


class _Settings(BaseModel):
    """What the found depends on beside the images; the first line of the file."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    made_by: list[str]
    batch_size: int
    device: str
    torch: str


class _Thing(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    region: str
    runs: str | None
    box: tuple[float, float, float, float] | None
    score: float | None
    source: str
    instance: int | None


class _Line(BaseModel):
    """An image that all detectors have looked at."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    file: str
    state: tuple[int, int]
    size: tuple[int, int]
    things: list[_Thing]

    @staticmethod
    def of(one: _Looked, picture: Picture, found: Iterable[Annotation]) -> _Line:
        """What was found in an image."""
        things = []
        for each in found:
            runs, edges = None, None
            if isinstance(each.outline, Box):
                edges = (each.outline.left, each.outline.top, each.outline.right, each.outline.bottom)
            elif isinstance(each.outline, Runs) and isinstance(each.outline.counts, str):
                runs = each.outline.counts
            else:
                raise TypeError(f"expected a box or compressed runs, got {each.outline!r}")
            things.append(
                _Thing(
                    region=each.region,
                    runs=runs,
                    box=edges,
                    score=each.score,
                    source=each.source,
                    instance=each.instance,
                )
            )
        return _Line(file=one.file, state=one.state, size=picture.size, things=things)

    def image(self) -> AnnotatedImage:
        """The same as an annotated image."""
        found = tuple(
            Annotation(
                thing.region,
                Runs(thing.runs or "", self.size) if thing.box is None else Box(*thing.box),
                thing.score,
                thing.source,
                thing.instance,
            )
            for thing in self.things
        )
        return AnnotatedImage(self.file, self.size, found, self.file)


@dataclass(frozen=True)
class _Partial:
    """What was found so far, in a file of lines: the settings, then an image each; a later line replaces an earlier."""

    file: BinaryIO
    done: dict[str, _Line]

    @staticmethod
    @contextmanager
    def open(path: Path, settings: _Settings) -> Iterator[_Partial]:
        """Begin such a file, or go on with one.

        Raises:
            ValueError: it is of other settings, or not one of these files.
        """
        with path.open("ab") as file:
            lines = path.read_bytes().splitlines(keepends=True)
            done, whole = _read(path, lines, settings)
            # What a killed process left of its last line.
            file.truncate(whole)
            partial = _Partial(file, done)
            if not whole:
                partial._write(settings)
                partial.sync()
            yield partial

    def has(self, images: Path, file: str) -> bool:
        """Whether an image is done, and still the one that was looked at."""
        return file in self.done and self.done[file].state == _state(images, file)

    def add(self, line: _Line) -> None:
        """One image more."""
        self._write(line)
        self.done[line.file] = line

    def sync(self) -> None:
        """All of it is on disk when this returns."""
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            # A full disk names no file.
            raise OSError(error.errno, error.strerror, self.file.name) from error

    def _write(self, line: BaseModel) -> None:
        self.file.write(line.model_dump_json().encode() + b"\n")


def _read(path: Path, lines: Sequence[bytes], settings: _Settings) -> tuple[dict[str, _Line], int]:
    """The images in such a file, and how many of its bytes are whole lines."""
    if not lines or not lines[0].endswith(b"\n"):
        return {}, 0
    try:
        begun = _Settings.model_validate_json(lines[0])
    except ValidationError as error:
        raise ValueError(f"{path}: is not what this writes: move it away, or name another output") from error
    other = [
        f"{name} was {was!r}, is {settings.model_dump()[name]!r}"
        for name, was in begun.model_dump().items()
        if was != settings.model_dump()[name]
    ]
    if other:
        raise ValueError(
            f"{path}: was begun with other settings ({'; '.join(other)}): give those again, or remove it to begin anew"
        )
    done: dict[str, _Line] = {}
    whole = len(lines[0])
    for raw in lines[1:]:
        try:
            line = _Line.model_validate_json(raw)
        except ValidationError:
            break
        if not raw.endswith(b"\n"):
            break
        done[line.file] = line
        whole += len(raw)
    return done, whole


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int], None]]:
    screen = Console(stderr=True)
    columns = (TextColumn("looking at"), BarColumn(), MofNCompleteColumn(), TextColumn("images"), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bars:
        task = bars.add_task("", total=total)
        yield lambda more: bars.advance(task, more)
