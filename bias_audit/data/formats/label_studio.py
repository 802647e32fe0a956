"""Label Studio's JSON: a list of tasks, one per image (https://labelstud.io/guide/export).

    [{"id": 7, "data": {"image": "/data/local-files/?d=ward/a.jpg"}, "annotations": [{"completed_by": 3, "result": [
      {"type": "rectanglelabels", "original_width": 640, "original_height": 480,
       "value": {"x": 5, "y": 2.5, "width": 10, "height": 20, "rotation": 0, "rectanglelabels": ["tie"]}}]}]}]

Places are percents of the image's width and height. `rectanglelabels`, `polygonlabels`, `ellipselabels` and
`brushlabels` are read, and `labels` that stand apart from their rectangles, polygons, ellipses or brushes; what is
turned becomes a polygon, brushes hold runs of the picture's RGBA bytes
(https://www.npmjs.com/package/@thi.ng/rle-pack), of which the last of four is the mask. Key points, bit masks, vectors
and shapes without a label are refused; choices, texts and the like are passed over.

A task's annotations are those of all annotators, each as a source: "annotator 3". Cancelled ones are passed over, and
predictions are read where nobody has annotated: their `model_version` is the source. An image is found by the end of
its path: in the folder of the images where that is given, else it is what follows `?d=`, or the last part. The eight
letters that Label Studio puts before the name of a file that is uploaded are taken off.

Enters: such a file. Leaves: `Annotations`; or such a file, to be imported: things with a score as predictions, unless
an image has others too, in which case the score is lost. Instances, groups and regions on no image are not held, nor
sources of things without a score but "annotator N". A labelling setup that opens it:

    <View><Image name="image" value="$image"/>
      <RectangleLabels name="box" toName="image"><Label value="hair"/></RectangleLabels>
      <PolygonLabels name="polygon" toName="image"><Label value="hair"/></PolygonLabels>
      <BrushLabels name="brush" toName="image"><Label value="hair"/></BrushLabels></View>
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, RootModel

from bias_audit.atomic import write_whole
from bias_audit.data.annotations import (
    AnnotatedImage,
    Annotation,
    Annotations,
    Box,
    Complaints,
    Outline,
    Polygons,
)
from bias_audit.data.files import leaves, unfound
from bias_audit.data.formats import shapes
from bias_audit.data.json_files import read_json, top_level
from bias_audit.data.outlines import runs_of

# Shapes that lack a label of their own, and what tells them where the label stands apart.
_BARE = ("rectangle", "polygon", "ellipse", "brush")
_TELLING = {
    "points": "polygonlabels",
    "rle": "brushlabels",
    "radiusX": "ellipselabels",
    "height": "rectanglelabels",
    "x": "keypointlabels",
}
_REFUSED = ("keypointlabels", "keypoint", "bitmasklabels", "bitmask", "vectorlabels", "vector", "videorectangle")
_KINDS = ("rectanglelabels", "polygonlabels", "ellipselabels", "brushlabels", *_BARE, *_REFUSED)
# What is put before the name of a file that is uploaded.
_PREFIX = re.compile(r"[0-9a-f]{8}-(?=.)")
_ANNOTATOR = re.compile(r"annotator (\d+)")
# Bits of a run's length that may follow its two bits of choice, in the files that are written.
_WIDTHS = (3, 4, 8, 16)


class _FromFile(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class _Result(_FromFile):
    id: Any = None
    type: str = ""
    value: dict[str, Any] = {}
    original_width: int | None = None
    original_height: int | None = None
    image_rotation: float = 0
    score: float | None = None


class _Answer(_FromFile):
    result: list[_Result] = []
    completed_by: int | dict[str, Any] | None = None
    was_cancelled: bool = False
    model_version: str | None = None
    score: float | None = None


class _Task(_FromFile):
    data: dict[str, Any]
    annotations: list[_Answer] = []
    predictions: list[_Answer | int] = []


class _Tasks(RootModel[list[_Task]]):
    pass


def recognises(path: Path) -> bool:
    """Whether it is a JSON list whose first object is a task."""
    if path.suffix.lower() != ".json" or not path.is_file():
        return False
    task = top_level(path)
    return "data" in task and bool({"annotations", "predictions"} & set(task))


def read(path: Path, images: Path | None = None) -> Annotations:
    """The images in the order of the tasks.

    Raises:
        Misfit: it cannot be read, a task has no image, or a result cannot be or has no area.
    """
    tasks, where = read_json(path, _Tasks, "tasks as Label Studio exports them")
    wrong = Complaints()
    listed = []
    for index, task in enumerate(tasks.root):
        said = task.data.get("image") or next((v for v in task.data.values() if isinstance(v, str)), "")
        try:
            name = _name(said, images)
        except ValueError as error:
            wrong.add(where((index, "data")), f"{error}")
            continue
        size: tuple[int, int] | None = None
        drawn: list[Annotation] = []
        for key, number, answer in _answers(task):
            for place, result in enumerate(_labelled(answer.result)):
                try:
                    found = _annotations(result, answer)
                    here = _size(result)
                    if found and size not in (None, here):
                        raise ValueError(f"its size is {here} here and {size} before (height, width): export it again")
                except ValueError as error:
                    wrong.add(where((index, key, number, "result", place)), f"image {name!r}: {error}")
                    continue
                drawn += found
                size = here if found else size
        listed.append(AnnotatedImage(name, size, tuple(drawn), f"{path}: task {index + 1}"))
    return shapes.collected(listed, (), wrong)


def write(annotations: Annotations, path: Path, images: Path | None = None) -> None:
    """A file of tasks; sizes that are not known are read from `images`.

    Raises:
        Misfit: a size is not known, or an outline is empty or does not fit.
    """
    # A task of an image in which nothing is drawn says no size.
    drawn = replace(annotations, images=tuple(image for image in annotations.images if image.annotations))
    sizes = {image.file: image.size for image in shapes.sized(drawn, images).images}
    wrong = Complaints()
    tasks = []
    for number, image in enumerate(annotations.images, 1):
        answers: dict[str, list[dict[str, Any]]] = {}
        is_predicted = bool(image.annotations) and all(a.score is not None for a in image.annotations)
        for annotation in image.annotations:
            where = f"{image.where}: image {image.file!r}: {annotation.region!r}"
            results = wrong.attempt(partial(_results, annotation, sizes[image.file] or (0, 0)), where) or []
            score = {"score": annotation.score} if is_predicted else {}
            listed = answers.setdefault(annotation.source, [])
            listed += [result | score | {"id": f"{number}-{len(listed) + k}"} for k, result in enumerate(results)]
        tasks.append(
            {
                "id": number,
                "data": {"image": f"/data/local-files/?d={quote(image.file)}"},
                "annotations": [] if is_predicted else [_signed(s, results) for s, results in answers.items()],
                "predictions": [
                    {"model_version": source, "result": results} for source, results in answers.items() if is_predicted
                ],
            }
        )
    wrong.end()
    write_whole(path, json.dumps(tasks, indent=1, allow_nan=False).encode())


def _signed(source: str, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    annotator = _ANNOTATOR.fullmatch(source)
    return {"result": results} | ({"completed_by": int(annotator[1])} if annotator else {})


def _name(said: Any, images: Path | None) -> str:
    """The image's path below the folder of the images."""
    if not isinstance(said, str) or not said:
        raise ValueError("a task has no image: expected its path or address in `data`")
    parts = urlsplit(said.replace("\\", "/"))
    if parts.scheme == "data":
        raise ValueError("a task holds its image itself: import the images as files, and export it again")
    local = parse_qs(parts.query).get("d", [""])[0].replace("\\", "/")
    path = posixpath.normpath(local or unquote(parts.path)).strip("/")
    last = posixpath.basename(path)
    if images is not None and not leaves(path):
        pieces = path.split("/")
        ends = ["/".join(pieces[start:]) for start in range(len(pieces))]
        found = next((end for end in [*ends, _PREFIX.sub("", last)] if not unfound(end, images)), None)
        if found is not None:
            return found
    return path if local else _PREFIX.sub("", last)


def _answers(task: _Task) -> Iterable[tuple[str, int, _Answer]]:
    """The annotations, or else the predictions; with their places."""
    done = [(number, a) for number, a in enumerate(task.annotations) if not a.was_cancelled]
    if done:
        return [("annotations", number, answer) for number, answer in done]
    # Some exports give the predictions' numbers only.
    return [("predictions", number, a) for number, a in enumerate(task.predictions) if isinstance(a, _Answer)]


def _labelled(results: Sequence[_Result]) -> list[_Result]:
    """The results with their labels, where those stand in results of their own, which have the shapes too: the results
    with the shapes alone are nothing then."""
    named = {result.id for result in results if result.type == "labels" and result.id is not None}
    found = []
    for result in results:
        if result.type == "labels":
            kind = next((kind for key, kind in _TELLING.items() if key in result.value), "")
            result = result.model_copy(
                update={"type": kind, "value": result.value | {kind: result.value.get("labels")}}
            )
        elif result.type in _BARE and result.id in named:
            result = result.model_copy(update={"type": ""})
        found.append(result)
    return found


def _annotations(result: _Result, answer: _Answer) -> list[Annotation]:
    if result.type not in _KINDS:
        return []
    if result.type in _REFUSED:
        raise ValueError(f"{result.type} are not read: draw a rectangle, polygon, ellipse or brush, or remove it")
    labels = result.value.get(result.type)
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
        raise ValueError("it has no label: give it one, or remove it")
    by = answer.completed_by
    by = (by.get("id") or by.get("email")) if isinstance(by, dict) else by
    source = answer.model_version or ("" if by is None else f"annotator {by}")
    score = result.score if result.score is not None else answer.score
    score = score if score is not None and 0 <= score <= 1 else None
    outline = _outline(result)
    return [Annotation(label, outline, score=score, source=source) for label in labels]


def _size(result: _Result) -> tuple[int, int]:
    return shapes.size(result.original_height or 0, result.original_width or 0) if result.type in _KINDS else (0, 0)


def _outline(result: _Result) -> Outline:
    height, width = _size(result)
    if result.image_rotation:
        raise ValueError(f"its image is turned by {result.image_rotation:g} degrees: turn it back, and export it again")

    def number(name: str) -> float:
        return shapes.number(str(result.value.get(name, "")), name)

    degrees = number("rotation") if result.value.get("rotation") else 0.0
    if result.type == "rectanglelabels":
        left, top = number("x") * width / 100, number("y") * height / 100
        found = shapes.box(left, top, left + number("width") * width / 100, top + number("height") * height / 100)
        return shapes.turned(found, degrees, (left, top)) if degrees else found
    if result.type == "ellipselabels":
        across, down = number("radiusX") * width / 100, number("radiusY") * height / 100
        return shapes.ellipse(number("x") * width / 100, number("y") * height / 100, across, down, degrees)
    if result.type == "polygonlabels":
        try:
            points = np.array(result.value.get("points"), dtype=float).reshape(-1, 2)
        except (TypeError, ValueError) as error:
            raise ValueError("its `points` are no pairs of numbers: export it again") from error
        return shapes.polygon((points * (width, height) / 100).reshape(-1).tolist())
    if result.type == "brushlabels":
        return runs_of(_unpacked(result.value, (height, width)))
    raise AssertionError(f"no outline of {result.type}")


def _unpacked(value: dict[str, Any], size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """The mask in a brush's runs: 32 bits say how many values there are, 5 how long one is, four times 4 how long the
    four kinds of a run's length are; then runs of one value (1) or values in turn (0), all in bits."""
    packed = value.get("rle")
    # Of a number `bytes` would make so many.
    if not isinstance(packed, list):
        raise ValueError("its `rle` is no list of bytes: export it again")
    try:
        octets = bytes(packed)
    except (TypeError, ValueError) as error:
        raise ValueError("its `rle` is no list of bytes: export it again") from error
    bits = (np.unpackbits(np.frombuffer(octets, dtype=np.uint8)) + ord("0")).tobytes().decode()
    at = 0

    def take(count: int) -> int:
        nonlocal at
        if at + count > len(bits):
            raise ValueError("its `rle` ends too early: export it again")
        at += count
        return int(bits[at - count : at], 2)

    total, length = take(32), take(5) + 1
    widths = [take(4) + 1 for _ in range(4)]
    if total != size[0] * size[1] * 4:
        raise ValueError(
            f"its `rle` is of {total} values, expected {size[0] * size[1] * 4} of an image of {size[1]} x {size[0]}: "
            "export it again"
        )
    mask = np.zeros(size[0] * size[1], dtype=np.bool_)
    done = 0
    while done < total:
        is_run = take(1)
        count = min(take(widths[take(2)]) + 1, total - done)
        if is_run:
            if take(length):
                # Of pixel p the last of four bytes stands at 4 p + 3.
                mask[done // 4 : (done + count) // 4] = True
        else:
            for place in range(done, done + count):
                if take(length) and place % 4 == 3:
                    mask[place // 4] = True
        done += count
    return mask.reshape(size)


def _results(annotation: Annotation, size: tuple[int, int]) -> list[dict[str, Any]]:
    outline = annotation.outline
    height, width = size
    if isinstance(outline, Box):
        outline = shapes.around(outline, size)
        value = {
            "x": outline.left / width * 100,
            "y": outline.top / height * 100,
            "width": (outline.right - outline.left) / width * 100,
            "height": (outline.bottom - outline.top) / height * 100,
            "rotation": 0,
        }
        drawn: list[tuple[str, str, dict[str, Any]]] = [("box", "rectanglelabels", value)]
    elif isinstance(outline, Polygons):
        rings = (np.reshape(ring, (-1, 2)) / (width, height) * 100 for ring in shapes.ringed(outline, size))
        drawn = [("polygon", "polygonlabels", {"points": ring.tolist(), "closed": True}) for ring in rings]
    else:
        drawn = [("brush", "brushlabels", {"format": "rle", "rle": _packed(shapes.filled(outline, size))})]
    return [
        {
            "type": kind,
            "from_name": name,
            "to_name": "image",
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "value": value | {kind: [annotation.region]},
        }
        for name, kind, value in drawn
    ]


def _packed(mask: npt.NDArray[np.bool_]) -> list[int]:
    """A mask as a brush's runs, each with its length in 16 bits."""
    flat = np.repeat(mask.reshape(-1), 4)
    bounds = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1, [flat.size]])
    # A run has at most 65,536 values.
    pieces = -(-np.diff(bounds) // (1 << 16))
    starts = np.repeat(bounds[:-1], pieces)
    within = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = starts + within * (1 << 16)
    lengths = np.diff(np.append(starts, flat.size))
    # 1 for a run, 3 for the fourth width, the length less 1, and the value: 27 bits.
    words = (0b111 << 24) | ((lengths - 1) << 8) | (flat[starts].astype(np.int64) * 255)
    runs = (words[:, None] >> np.arange(26, -1, -1)) & 1
    head = f"{flat.size:032b}{7:05b}" + "".join(f"{width - 1:04b}" for width in _WIDTHS)
    bits = np.concatenate([np.array(list(head), dtype=np.int64), runs.reshape(-1)])
    packed: list[int] = np.packbits(bits.astype(np.uint8)).tolist()
    return packed
