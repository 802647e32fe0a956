"""What detectors have found so far, kept line by line beside the output, so that a later call goes on from it.

Enters: settings, and what was found in each image. Leaves: the same, after any interruption; a line that was not
finished is dropped, and images that have changed since are looked at again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pydantic import BaseModel, ConfigDict, ValidationError

from bias_audit.data.annotations import AnnotatedImage, Annotation, Box, Runs


def partial_of(out: Path) -> Path:
    """Where what is found is kept until the output is written."""
    return out.with_name(f"{out.name}.partial.jsonl")


def state_of(images: Path, file: str) -> tuple[int, int]:
    """A file's length and the time of its last change: another image in its place is looked at again."""
    found = (images / file).stat()
    return found.st_size, found.st_mtime_ns


class Settings(BaseModel):
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


class Line(BaseModel):
    """An image that all detectors have looked at."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    file: str
    state: tuple[int, int]
    size: tuple[int, int]
    things: list[_Thing]

    @staticmethod
    def of(file: str, state: tuple[int, int], size: tuple[int, int], found: Iterable[Annotation]) -> Line:
        """What was found in an image.

        Raises:
            TypeError: an outline that no detector gives: neither a box nor compressed runs.
        """
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
        return Line(file=file, state=state, size=size, things=things)

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
class Partial:
    """What was found so far, in a file of lines: the settings, then an image each; a later line replaces an earlier."""

    file: BinaryIO
    done: dict[str, Line]

    @staticmethod
    @contextmanager
    def open(path: Path, settings: Settings) -> Iterator[Partial]:
        """Begin such a file, or go on with one.

        Raises:
            ValueError: it is of other settings, or not one of these files.
        """
        with path.open("ab") as file:
            lines = path.read_bytes().splitlines(keepends=True)
            done, whole = _read(path, lines, settings)
            # What a killed process left of its last line.
            file.truncate(whole)
            partial = Partial(file, done)
            if not whole:
                partial._write(settings)
                partial.sync()
            yield partial

    def has(self, images: Path, file: str) -> bool:
        """Whether an image is done, and still the one that was looked at."""
        return file in self.done and self.done[file].state == state_of(images, file)

    def add(self, line: Line) -> None:
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


def _read(path: Path, lines: Sequence[bytes], settings: Settings) -> tuple[dict[str, Line], int]:
    """The images in such a file, and how many of its bytes are whole lines."""
    if not lines or not lines[0].endswith(b"\n"):
        return {}, 0
    try:
        begun = Settings.model_validate_json(lines[0])
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
    done: dict[str, Line] = {}
    whole = len(lines[0])
    for raw in lines[1:]:
        try:
            line = Line.model_validate_json(raw)
        except ValidationError:
            break
        if not raw.endswith(b"\n"):
            break
        done[line.file] = line
        whole += len(raw)
    return done, whole
