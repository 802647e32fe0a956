"""The regions of people that keypoints give, beside what other networks see on the same photographs.

Enters: photographs with polygons of persons (the layout of `../shared/data/coco_people`: COCO's). Leaves: `detect`
writes keypoints and the outlines of faces and hands as numbers, no pixels; `measure` draws regions from the keypoints
and compares them with the outlines; `picture` draws for the documentation what the regions are, on mannequins. The
keypoints are of MediaPipe's pose, the outlines of its face mesh and its hand landmarks: networks of their own, which
the pose only tells where to look.

MediaPipe 0.10.21, whose wheel brings its weights, wants another NumPy than this project, so `detect` runs in an
environment of its own:

    python -m venv people && people/bin/pip install mediapipe==0.10.21 pycocotools
    PYTHONPATH=. people/bin/python -m benchmarks.people detect ../shared/data/coco_people
    python -m benchmarks.people measure ../shared/data/coco_people
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from benchmarks.mannequin import mannequin
from bias_audit.data.annotations import Polygons
from bias_audit.data.outlines import Mask, mask_of, picture
from bias_audit.regions.keypoints import people_regions

Points = npt.NDArray[np.float64]

DETECTED = Path(__file__).parents[1] / "tests" / "coco_people_keypoints.json"
RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).parents[1] / "docs" / "people.svg"
COLOURS = {"body": "#d7dbe0", "face": "#c8553d", "hair": "#7d5ba6", "torso": "#2a8c82", "hands": "#d99a2b"}
# MediaPipe's 33 points of a pose in COCO's order: nose, eyes, ears, shoulders, elbows, wrists, hips, knees, ankles.
COCO_ORDER = (0, 2, 5, 7, 8, 11, 12, 13, 14, 15, 16, 23, 24, 25, 26, 27, 28)
# Persons below this many pixels show no face that a mesh could be laid on.
LEAST_AREA = 64 * 64
SEEN = 0.5
# Annotations of persons whose face the photograph does not show, by eye: backs of heads, hair over it, only legs. The
# pose names eyes and a nose on every one of them.
FACELESS = frozenset(1000000000000 + number for number in (16, 52, 215, 239, 241)) | frozenset(
    (191529, 200887, 425542, 476498, 512854, 1202977, 1242217, 2161544)
)
# A pose of which fewer of the seen points lie on the person is somebody else's.
OWN = 0.75


@dataclass(frozen=True)
class Person:
    """A person of a photograph: keypoints `(17, 3)` x, y, seen 0 or 1, the outline of the face where the mesh found
    one, and those of hands, each `(x1, y1, x2, y2, ...)` in pixels."""

    file: str
    annotation: int
    keypoints: tuple[tuple[float, float, int], ...]
    face: tuple[float, ...] | None
    hands: tuple[tuple[float, ...], ...]


def persons(data: Path) -> Iterator[tuple[str, tuple[int, int], list[tuple[int, Mask]]]]:
    """Of each photograph its file, its size and its persons' annotation ids and masks."""
    content = json.loads((data / "instances.json").read_text())
    person = {row["id"] for row in content["categories"] if row["name"] == "person"}
    found = defaultdict(list)
    for row in content["annotations"]:
        if row["category_id"] in person and isinstance(row["segmentation"], list):
            found[row["image_id"]].append(row)
    for image in content["images"]:
        size = (image["height"], image["width"])
        masks = [
            (row["id"], mask_of(Polygons(tuple(map(tuple, row["segmentation"]))), size)) for row in found[image["id"]]
        ]
        yield image["file_name"], size, masks


def detect(data: Path) -> Iterator[Person]:
    """The persons of photographs on whom MediaPipe finds a pose."""
    import mediapipe  # type: ignore[import-not-found]

    solutions = mediapipe.solutions
    oval = _ring(solutions.face_mesh.FACEMESH_FACE_OVAL)
    with (
        solutions.pose.Pose(static_image_mode=True, model_complexity=1) as pose,
        solutions.face_mesh.FaceMesh(static_image_mode=True, min_detection_confidence=0.5) as mesh,
        solutions.hands.Hands(static_image_mode=True, max_num_hands=1, min_detection_confidence=0.5) as hands,
    ):
        for file, _, masks in persons(data):
            pixels = np.asarray(picture(data / "images" / file).convert("RGB"))
            for annotation, mask in masks:
                if mask.sum() < LEAST_AREA:
                    continue
                keypoints = _pose(pose, pixels, mask)
                if keypoints is not None:
                    face = _face(mesh, pixels, mask, keypoints, oval)
                    points = tuple((round(float(x), 1), round(float(y), 1), int(seen)) for x, y, seen in keypoints)
                    yield Person(file, annotation, points, face, tuple(_hands(hands, pixels, mask, keypoints)))


def _pose(pose: Any, pixels: npt.NDArray[np.uint8], mask: Mask) -> Points | None:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    centre = np.array([columns[[0, -1]].mean(), rows[[0, -1]].mean()])
    crop, corner, scale = _crop(pixels, centre, 0.6 * max(np.ptp(rows), np.ptp(columns)))
    found = pose.process(crop).pose_landmarks
    if found is None:
        return None
    points = np.array([(p.x, p.y, p.visibility) for p in found.landmark])[list(COCO_ORDER)]
    points[:, :2] = points[:, :2] * (crop.shape[1], crop.shape[0]) / scale + corner
    inside = ((points[:, :2] >= 0) & (points[:, :2] < mask.shape[::-1])).all(axis=1)
    seen = (points[:, 2] > SEEN) & inside
    near = cv2.dilate(mask.astype(np.uint8), np.ones((9, 9), np.uint8)).astype(bool)
    columns, rows = np.where(seen, points[:, :2].T, 0).astype(int)
    if not seen.any() or near[rows, columns][seen].mean() < OWN:
        return None
    points[:, 2] = seen
    return points


def _face(
    mesh: Any, pixels: npt.NDArray[np.uint8], mask: Mask, keypoints: Points, oval: Sequence[int]
) -> tuple[float, ...] | None:
    head = keypoints[:5][keypoints[:5, 2] > 0, :2]
    if len(head) < 2:
        return None
    crop, corner, scale = _crop(pixels, head.mean(axis=0), 3 * max(np.ptp(head, axis=0).max(), 8.0))
    found = mesh.process(crop).multi_face_landmarks
    if not found:
        return None
    points = np.array([(found[0].landmark[k].x, found[0].landmark[k].y) for k in oval])
    points = np.asarray(points * (crop.shape[1], crop.shape[0]) / scale + corner, dtype=np.float64)
    return _own(points, mask)


def _hands(hands: Any, pixels: npt.NDArray[np.uint8], mask: Mask, keypoints: Points) -> Iterator[tuple[float, ...]]:
    for elbow, wrist in ((7, 9), (8, 10)):
        if not keypoints[[elbow, wrist], 2].all():
            continue
        forearm = keypoints[wrist, :2] - keypoints[elbow, :2]
        crop, corner, scale = _crop(pixels, keypoints[wrist, :2] + 0.35 * forearm, max(float(np.hypot(*forearm)), 16.0))
        found = hands.process(crop).multi_hand_landmarks
        if found:
            points = np.array([(p.x, p.y) for p in found[0].landmark])
            points = np.asarray(points * (crop.shape[1], crop.shape[0]) / scale + corner, dtype=np.float64)
            outline = _own(cv2.convexHull(points.astype(np.float32))[:, 0].astype(np.float64), mask)
            if outline is not None:
                yield outline


def _crop(pixels: npt.NDArray[np.uint8], centre: Points, half: float) -> tuple[npt.NDArray[np.uint8], Points, float]:
    """A square of a photograph, small ones enlarged; its upper left corner, and by how much it is enlarged."""
    low = np.maximum(np.floor(centre - half), 0).astype(int)
    high = np.minimum(np.ceil(centre + half), pixels.shape[1::-1]).astype(int)
    crop = pixels[low[1] : high[1], low[0] : high[0]]
    scale = max(1.0, 384 / max(crop.shape[:2]))
    enlarged = np.asarray(cv2.resize(crop, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC), dtype=np.uint8)
    return enlarged, low.astype(float), scale


def _own(points: Points, mask: Mask) -> tuple[float, ...] | None:
    """The outline, rounded, unless it lies on somebody else."""
    ring = tuple(round(float(x), 1) for x in points.reshape(-1))
    drawn = mask_of(Polygons((ring,)), mask.shape)
    return ring if drawn.any() and mask[drawn].mean() > OWN else None


def _ring(edges: Any) -> list[int]:
    """Edges of a closed line as its points in turn."""
    following = dict(edges)
    ring = [next(iter(following))]
    while len(ring) < len(following):
        ring.append(following[ring[-1]])
    return ring


def detected() -> list[Person]:
    """What `detect` found, as it is kept."""
    rows = json.loads(DETECTED.read_text())
    return [
        Person(
            row["file"],
            row["annotation"],
            tuple((x, y, seen) for x, y, seen in row["keypoints"]),
            None if row["face"] is None else tuple(row["face"]),
            tuple(map(tuple, row["hands"])),
        )
        for row in rows
    ]


@dataclass(frozen=True)
class Share:
    """A mean of shares over persons, its 95% interval, and the lower quartile."""

    what: str
    persons: int
    mean: float
    low: float
    high: float
    quartile: float


@dataclass(frozen=True)
class Count:
    """How many persons of how many."""

    what: str
    count: int
    of: int


@dataclass(frozen=True)
class Measured:
    """What `measure` found."""

    photographs: int
    persons: int
    large: int
    shares: tuple[Share, ...]
    counts: tuple[Count, ...]


def measure(data: Path) -> Measured:
    """The regions drawn from the detected keypoints, beside the outlines."""
    bodies = {(file, number): mask for file, _, masks in persons(data) for number, mask in masks}
    people = detected()
    faces, hands, drawn = [], [], Counter[str]()
    for place, person in enumerate(people):
        body = bodies[person.file, person.annotation]
        regions = {name: mask[0] for name, mask in people_regions([person.keypoints], body[None]).items()}
        for name, mask in regions.items():
            drawn[name] += bool(mask.any())
        drawn["faceless"] += person.annotation in FACELESS and not regions["face"].any()
        drawn["faces lost"] += person.annotation not in FACELESS and not regions["face"].any()
        drawn["faces"] += person.annotation not in FACELESS
        if person.face is not None:
            seen = mask_of(Polygons((person.face,)), body.shape) & body
            both = (seen & regions["face"]).sum()
            union = (seen | regions["face"]).sum()
            hair = (seen & regions["hair"]).sum() / max(regions["hair"].sum(), 1)
            faces.append((place % 2, both / union, both / seen.sum(), both / max(regions["face"].sum(), 1), hair))
        for hand in person.hands:
            seen = mask_of(Polygons((hand,)), body.shape) & body
            hands.append(((seen & regions["hands"]).sum() / seen.sum(), (seen & regions["torso"]).sum() / seen.sum()))
    half, iou, recall, precision, hair = np.array(faces).T
    return Measured(
        len({person.file for person in people}),
        len(people),
        sum(bool(mask.sum() >= LEAST_AREA) for mask in bodies.values()),
        (
            _share("IoU of the face and the face mesh's outline, persons the sizes were set on", iou[half == 0]),
            _share("the same, the other persons", iou[half == 1]),
            _share("share of the mesh's face that the face covers", recall),
            _share("share of the face that lies in the mesh's face", precision),
            _share("share of the hair that lies in the mesh's face", hair),
            _share("share of a hand's landmarks' hull that the hands cover", np.array(hands)[:, 0]),
            _share("share of a hand's landmarks' hull that the torso covers", np.array(hands)[:, 1]),
        ),
        (
            *(Count(f"persons with {name}", drawn[name], len(people)) for name in ("face", "hair", "torso", "hands")),
            Count("persons whose face is not to be seen, and who get none", drawn["faceless"], len(FACELESS)),
            Count("persons whose face is to be seen, and who get none", drawn["faces lost"], drawn["faces"]),
        ),
    )


def _share(what: str, values: Points) -> Share:
    rng = np.random.default_rng(0)
    means = rng.choice(values, (10_000, len(values))).mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    numbers = (round(float(number), 3) for number in (values.mean(), low, high, np.quantile(values, 0.25)))
    return Share(what, len(values), *numbers)


def written(measured: Measured) -> str:
    """The page of the results."""
    lines = [
        "# Regions of people from keypoints, on photographs",
        "",
        f"{measured.persons} persons on {measured.photographs} photographs of COCO 2017, of {measured.large} with at "
        f"least {LEAST_AREA:,} pixels: those on whom a pose of MediaPipe lies, which marks eyes on backs of heads too. "
        "Regions are cut by COCO's own polygons of the persons. The face mesh and the hand landmarks are networks of "
        "their own; where they find nothing there is nothing to compare with. No such measure is at hand for hair and "
        "torso.",
        "",
        "The size of the face and how far a point may lie off were set on every second person; all of them were looked "
        "at. Keypoint R-CNN, which `bias-audit regions propose` uses, was not at hand here.",
        "",
        "| what | persons | mean | 95% interval | lower quartile |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {row.what} | {row.persons} | {row.mean:.2f} | [{row.low:.2f}, {row.high:.2f}] | {row.quartile:.2f} |"
            for row in measured.shares
        ),
        "",
        "| what | count | of |",
        "| --- | --- | --- |",
        *(f"| {row.what} | {row.count} | {row.of} |" for row in measured.counts),
        "",
        "A hull of landmarks is smaller than its hand. Made by `python -m benchmarks.people`, see there.",
        "",
    ]
    return "\n".join(lines)


def drawing() -> str:
    """An SVG of what the regions are: mannequins that face the camera or do not, with their regions."""
    views = {
        "from the front": mannequin(scale=0.3),
        "turned": mannequin(40, 10, body=25, scale=0.3),
        "from the side": mannequin(90, body=90, scale=0.3),
        "from behind": mannequin(180, body=180, scale=0.3),
        "lying": mannequin(-20, roll=90, scale=0.3),
    }
    wide, high = 240, 270
    columns = []
    for place, (caption, person) in enumerate(views.items()):
        # From the crown to the knees.
        x, y = person.keypoints[5:13, :2].mean(axis=0)
        drawn = {"body": person.mask, **person.regions()}
        paths = "".join(f'<path class="{name}" d="{_path(mask)}"/>' for name, mask in drawn.items())
        columns.append(
            f'<text x="{(place + 0.5) * wide:.0f}" y="20" text-anchor="middle">{caption}</text>'
            f'<svg x="{place * wide}" y="30" width="{wide}" height="{high}" '
            f'viewBox="{x - 0.85 * wide:.0f} {y - 0.85 * high:.0f} {1.7 * wide:.0f} {1.7 * high:.0f}">'
            f"<g>{paths}</g></svg>"
        )
    first = (len(views) * wide - (len(COLOURS) - 1) * 110) // 2
    legend = "".join(
        f'<rect class="{name}" x="{first + place * 110}" y="{high + 42}" width="14" height="14"/>'
        f'<text x="{first + place * 110 + 22}" y="{high + 54}">{name}</text>'
        for place, name in enumerate(list(COLOURS)[1:])
    )
    style = "".join(f".{name}{{fill:{colour}}}" for name, colour in COLOURS.items())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {len(views) * wide} {high + 70}">'
        f"<style>text{{font:15px sans-serif}}{style}</style>"
        f'<rect width="100%" height="100%" fill="white"/>{"".join(columns)}{legend}</svg>\n'
    )


def _path(mask: Mask) -> str:
    """Without the roughness of strewn points."""
    smooth = (cv2.blur(mask.astype(np.float32), (7, 7)) > 0.5).astype(np.uint8)
    found, _ = cv2.findContours(smooth, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    rings = (cv2.approxPolyDP(ring, 0.8, True)[:, 0] for ring in found)
    return "".join("M" + " ".join(f"{x},{y}" for x, y in ring) + "Z" for ring in rings if len(ring) > 2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run with these command line arguments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.people", description=__doc__)
    parser.add_argument("what", choices=("detect", "measure", "picture"))
    parser.add_argument("data", type=Path, nargs="?", help="folder with images/ and instances.json, but for a picture")
    parser.add_argument("--out", type=Path, help="folder for what is made; by default where it is kept")
    options = parser.parse_args(arguments)
    if options.what == "picture":
        ((options.out or PICTURE.parent) / PICTURE.name).write_text(drawing())
    elif options.data is None:
        parser.error(f"{options.what} needs the folder of photographs")
    elif options.what == "detect":
        rows = ",\n".join(json.dumps(asdict(person)) for person in detect(options.data))
        ((options.out or DETECTED.parent) / DETECTED.name).write_text(f"[\n{rows}\n]\n")
    else:
        measured = measure(options.data)
        (options.out or RESULTS).joinpath("people.json").write_text(json.dumps(asdict(measured), indent=1) + "\n")
        (options.out or RESULTS).joinpath("people.md").write_text(written(measured))


if __name__ == "__main__":
    main()
