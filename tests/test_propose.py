"""Regions that detectors propose: where they land, how work is gone on with, and what is refused."""

from __future__ import annotations

import functools
import http.server
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torchvision
import wired
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.detection import KeypointRCNN_ResNet50_FPN_Weights, keypointrcnn_resnet50_fpn
from torchvision.transforms.v2 import functional as F
from typer.testing import CliRunner

from bias_audit.cli import app
from bias_audit.data.annotations import AnnotatedImage, Annotation, Box, Misfit
from bias_audit.data.formats import read_annotations
from bias_audit.data.outlines import mask_of, runs_of, union
from bias_audit.regions.people import REGIONS, SEEN, Detector, PeopleDetector, load_people, same_people
from bias_audit.regions.pictures import MOST_SIDE, Picture, image_files, opened
from bias_audit.regions.propose import Found, Options, partial_of, propose, write_proposals

Mask = npt.NDArray[np.bool_]
CPU = torch.device("cpu")


def people(regions: Sequence[str] = REGIONS, min_score: float = 0.5) -> PeopleDetector:
    """torchvision's detectors, wired to find the drawn person."""
    detectors = []
    for architecture in (wired.MASKS, wired.KEYPOINTS):
        model = wired.detector(architecture).eval()
        model.transform.min_size, model.transform.max_size = (wired.SIZE,), round(wired.SIZE * 1333 / 800)
        detectors.append(Detector(model, architecture))
    return PeopleDetector(detectors[0], detectors[1], tuple(regions), min_score)


def masks(image: AnnotatedImage) -> dict[str, Mask]:
    assert image.size is not None
    return {a.region: mask_of(a.outline, image.size) for a in image.annotations}


def looked_at(
    image: Image.Image, path: Path, found: Callable[[Sequence[Picture]], list[tuple[Annotation, ...]]]
) -> dict[str, Mask]:
    image.save(path)
    picture = opened(path)
    return masks(AnnotatedImage(path.name, picture.size, found([picture])[0], ""))


def iou(a: Mask, b: Mask) -> float:
    return float((a & b).sum() / (a | b).sum())


# Where regions lie


@pytest.mark.parametrize("scale", [1.0, 2.5, pytest.param(22.0, marks=pytest.mark.slow)])
def test_regions_lie_on_the_drawn_person(scale: float, tmp_path: Path) -> None:
    image = wired.person(scale)
    assert (max(image.size) > MOST_SIDE) == (scale == 22.0)
    found = looked_at(image, tmp_path / "a.png", people())
    assert list(found) == list(REGIONS)
    person, points = found["person"], (np.array(wired.POSE) * scale).astype(int)
    assert iou(person, wired.silhouette(image)) > 0.8
    assert (found["background"] == ~person).all()
    nose, eyes, shoulders, wrists, hips = (
        points[at] for at in (slice(0, 1), slice(1, 3), slice(5, 7), slice(9, 11), slice(11, 13))
    )
    assert all(found["face"][y, x] for x, y in [*nose, *eyes])
    assert np.nonzero(found["hair"])[0].mean() < eyes[:, 1].min()
    rows = np.nonzero(found["torso"])[0]
    assert shoulders[:, 1].min() - 6 * scale < rows.min() and rows.max() < hips[:, 1].max() + 6 * scale
    assert all(
        found["hands"][y - round(3 * scale) : y + round(6 * scale), x - round(4 * scale) : x + round(4 * scale)].any()
        for x, y in wrists
    )
    for name in ("face", "hair", "torso", "hands"):
        assert found[name].any() and not (found[name] & ~person).any()
    for a, b in itertools.combinations(("face", "hair", "torso", "hands"), 2):
        assert not (found[a] & found[b]).any()


def test_a_wide_and_a_high_picture(tmp_path: Path) -> None:
    for size in ((96, 126), (126, 96)):
        image = wired.person(size=size)
        assert iou(looked_at(image, tmp_path / "a.png", people())["person"], wired.silhouette(image)) > 0.7


def test_what_is_not_seen_is_no_region(tmp_path: Path) -> None:
    behind = tuple(index for index in range(17) if index > 4)
    found = looked_at(wired.person(seen=behind), tmp_path / "a.png", people())
    assert "face" not in found and {"person", "torso", "hands", "background"} <= set(found)
    assert looked_at(wired.nobody(), tmp_path / "b.png", people()) == {}


def test_only_what_is_asked_for(tmp_path: Path) -> None:
    assert list(looked_at(wired.person(), tmp_path / "a.png", people(["background", "face"]))) == ["face", "background"]
    alone = PeopleDetector(people().masks, None, ("person",), 0.5)
    assert list(looked_at(wired.person(), tmp_path / "a.png", alone)) == ["person"]


def test_a_batch_is_what_its_images_are_alone(tmp_path: Path) -> None:
    detector = PeopleDetector(people().masks, None, ("person", "background"), 0.5)
    sizes = [(96, 96), (96, 120), (120, 96), (64, 64)]
    for index, size in enumerate(sizes):
        wired.person(size=size).save(tmp_path / f"{index}.png")
    for batch_size in (1, 4):
        write_proposals(tmp_path, tmp_path / f"{batch_size}.json", [detector], batch_size, device="cpu")
    one, four = (read_annotations(tmp_path / f"{batch_size}.json") for batch_size in (1, 4))
    assert [i.file for i in one.images] == [f"{index}.png" for index in range(len(sizes))]
    for alone, together in zip(one.images, four.images, strict=True):
        assert [(a.region, a.outline) for a in alone.annotations] == [
            (a.region, a.outline) for a in together.annotations
        ]
    # What torchvision pads an image to alone is what it is padded to among those that are alike.
    padded = {}
    for size in sizes:
        image = torch.zeros(3, *size)
        padded.setdefault(detector.alike(size), set()).add(detector.masks.model.transform([image])[0].tensors.shape)
    assert all(len(shapes) == 1 for shapes in padded.values()) and len(padded) == 3


@pytest.mark.slow
def test_persons_in_photographs(tmp_path: Path) -> None:
    photographs = Path(__file__).parents[2] / "shared" / "data" / "coco_people"
    weights = Path(torch.hub.get_dir()) / "checkpoints" / "maskrcnn_resnet50_fpn_v2_coco-73cbd019.pth"
    if not photographs.is_dir() or not weights.is_file():
        pytest.skip(f"needs ../shared/data/coco_people, and torchvision's weights as {weights}")
    propose(Options(photographs / "images", tmp_path / "a.json", ("person",), weights=(weights,)))
    by_hand = {image.file: image for image in read_annotations(photographs / "instances.json").images}
    overlaps = []
    for image in read_annotations(tmp_path / "a.json").images:
        if image.file in by_hand and image.size is not None:
            drawn = union([a.outline for a in by_hand[image.file].annotations if a.region == "person"], image.size)
            overlaps.append(iou(union([a.outline for a in image.annotations], image.size), drawn))
    assert len(overlaps) > 80 and np.median(overlaps) > 0.6


def test_masks_are_enlarged_pixel_by_pixel() -> None:
    picture = Picture(Image.new("RGB", (70, 50)), (123, 167))
    mask = np.random.default_rng(0).random((50, 70)) < 0.5
    rows, columns = ((np.arange(most) + 0.5) * few / most for most, few in ((123, 50), (167, 70)))
    wanted = mask[rows.astype(int)[:, None], columns.astype(int)]
    assert (mask_of(picture.runs(mask), (123, 167)) == wanted).all()
    assert (mask_of(picture.runs(~mask), (123, 167)) == ~wanted).all()


# Whose parts are whose


class Outputs(nn.Module):
    """Gives every image the same."""

    def __init__(self, **outputs: Tensor) -> None:
        super().__init__()
        self.outputs = outputs
        self.place = nn.Parameter(torch.zeros(()))

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return [self.outputs for _ in images]


def test_parts_belong_to_the_person_whose_pose_it_is(tmp_path: Path) -> None:
    wired.nobody((100, 300)).save(tmp_path / "a.png")
    boxes = torch.tensor([[0.0, 0, 96, 96], [100, 0, 196, 96], [200, 0, 296, 96], [0, 0, 96, 96], [100, 0, 196, 96]])
    shapes = torch.zeros(5, 1, 100, 300)
    for index, (left, top, right, bottom) in enumerate(boxes.int().tolist()):
        shapes[index, 0, top:bottom, left:right] = 0.6
    masked = {"labels": torch.tensor([1, 1, 1, 2, 1]), "scores": torch.tensor([0.9, 0.8, 0.7, 0.6, 0.3])}
    pose = torch.tensor(wired.POSE, dtype=torch.float)
    moved = torch.stack([pose + torch.tensor([x, 0.0]) for x in (100.0, 0.0, 0.0)])
    points = torch.cat([moved, torch.ones(3, 17, 1)], dim=2)
    seen = torch.full((3, 17), SEEN + 0.1)
    # The second does not show her wrists.
    seen[1, 9:11] = SEEN - 0.1
    posed = {"labels": torch.tensor([1, 1, 1]), "scores": torch.tensor([0.95, 0.6, 0.4])}
    detector = PeopleDetector(
        Detector(Outputs(boxes=boxes, masks=shapes, **masked), "m"),
        Detector(Outputs(boxes=boxes[[1, 0, 2]] + 3, keypoints=points, keypoints_scores=seen, **posed), "k"),
        ("person", "face", "hands", "background"),
        0.5,
    )
    found = detector([opened(tmp_path / "a.png")])[0]
    said = [(a.region, a.instance, a.score and round(a.score, 2)) for a in found]
    assert said == [
        ("person", 0, 0.9),
        ("face", 0, 0.6),
        ("person", 1, 0.8),
        ("face", 1, 0.8),
        ("hands", 1, 0.8),
        ("person", 2, 0.7),
        ("background", None, None),
    ]
    for a in found[:5]:
        columns = np.nonzero(mask_of(a.outline, (100, 300)))[1]
        assert a.instance is not None and 100 * a.instance <= columns.min() and columns.max() < 100 * a.instance + 96
    assert mask_of(found[-1].outline, (100, 300)).sum() == 100 * 300 - 3 * 96 * 96
    assert [a.source.split(" by ")[0] for a in found] == (
        ["m; score above 0.5", "drawn from keypoints"] + ["m; score above 0.5"] + ["drawn from keypoints"] * 2
    ) + ["m; score above 0.5", "what no person covers"]
    assert all("m; score above 0.5" in a.source for a in found) and "k" in found[1].source


@pytest.mark.parametrize("seed", range(6))
def test_the_best_pairing_of_all(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(7, 2, generator=generator) * 3
    boxes = torch.cat([corners, corners + 3 + torch.rand(7, 2, generator=generator)], dim=1)
    first, second = boxes[:3], boxes[3:]

    def overlap(a: Tensor, b: Tensor) -> float:
        width = (torch.minimum(a[2], b[2]) - torch.maximum(a[0], b[0])).clamp(min=0)
        height = (torch.minimum(a[3], b[3]) - torch.maximum(a[1], b[1])).clamp(min=0)
        areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
        found = float(width * height / (areas - width * height))
        return found if found >= 0.5 else 0.0

    def gain(pairs: Sequence[tuple[int, int]]) -> float:
        return sum(overlap(first[a], second[b]) for a, b in pairs)

    found = same_people(first, second)
    assert all(overlap(first[a], second[b]) > 0 for a, b in found)
    best = max(gain(list(enumerate(order))) for order in itertools.permutations(range(4), 3))
    assert gain(found) == pytest.approx(best, abs=1e-5)
    assert same_people(first[:0], second) == []


# Weights


def test_the_command_with_weights_from_files(tmp_path: Path) -> None:
    masks_file, points_file = wired.write_weights(tmp_path, wired.MASKS, wired.KEYPOINTS)
    (tmp_path / "images" / "ward").mkdir(parents=True)
    wired.person(2, seen=tuple(index for index in range(17) if index not in (9, 10))).save(
        tmp_path / "images" / "ward" / "b.png"
    )
    wired.nobody().save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "labels.csv").write_text("file,label\n")
    out = tmp_path / "regions.json"
    command = ["regions", "propose", str(tmp_path / "images"), "--using", "person,face", "--using", "hands,background"]
    command += ["-o", str(out), "--weights", str(points_file), "--weights", str(masks_file), "--size", str(wired.SIZE)]
    done = CliRunner().invoke(app, command)
    # She does not show her hands, and nobody else is there.
    assert done.exit_code == 3 and "bias-audit: found in no image: hands: a lower" in done.stderr, done.output
    assert str(out) in done.stdout and not partial_of(out).exists()
    annotations = read_annotations(out)
    assert annotations.regions == ("person", "face", "hands", "background")
    assert [(i.file, i.size) for i in annotations.images] == [("a.png", (96, 96)), ("ward/b.png", (192, 192))]
    assert [[a.region for a in i.annotations] for i in annotations.images] == [[], ["person", "face", "background"]]
    digest = subprocess.check_output(["sha256sum", masks_file]).decode()[:8]
    for a in annotations.images[1].annotations:
        assert f"maskrcnn_resnet50_fpn_v2 {masks_file.name} (sha256 {digest}), size 96; score above 0.5" in a.source
        assert torchvision.__version__ in a.source
    assert f"keypointrcnn_resnet50_fpn {points_file.name} (sha256" in annotations.images[1].annotations[1].source


def head(architecture: str, classes: int = 91) -> dict[str, Tensor]:
    """As much of a state dict as tells what it is of."""
    names = {"roi_heads.box_predictor.cls_score.bias": torch.zeros(classes)}
    part = (
        "keypoint_predictor.kps_score_lowres" if architecture == wired.KEYPOINTS else "mask_predictor.mask_fcn_logits"
    )
    names[f"roi_heads.{part}.weight"] = torch.zeros(1)
    return names


def test_weights_that_cannot_be_used(tmp_path: Path) -> None:
    files = {
        "one.pth": head(wired.KEYPOINTS),
        "two.pth": head(wired.KEYPOINTS),
        "five.pth": head(wired.MASKS, 5),
        "other.pth": {"weight": torch.zeros(1)},
        "list.pth": [torch.zeros(1)],
        "part.pth": head(wired.MASKS),
        "code.pth": {"weight": Evil()},
        "headless.pth": {"roi_heads.mask_predictor.mask_fcn_logits.weight": torch.zeros(1)},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "torn.pth").write_bytes((tmp_path / "one.pth").read_bytes()[:-200])
    save_file(head(wired.MASKS), tmp_path / "part.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"\x08")

    def said(*names: str) -> str:
        with pytest.raises(ValueError, match=r".") as caught:
            load_people(["person"], [tmp_path / name for name in names], CPU, 96, 0.5)
        assert str(tmp_path) in str(caught.value)
        return str(caught.value)

    assert "two.pth: is for keypoints as" in said("one.pth", "two.pth")
    assert "tells 5 classes apart, expected 91" in said("five.pth")
    assert "other.pth: is no state dict of maskrcnn_resnet50_fpn_v2" in said("other.pth")
    assert "list.pth: is no state dict" in said("list.pth")
    assert "headless.pth: is no state dict" in said("headless.pth")
    assert [line.split(":")[0] for line in said("list.pth", "one.pth", "absent.pth", "two.pth").splitlines()] == [
        f"--weights {tmp_path / name}" for name in ("list.pth", "absent.pth", "two.pth")
    ]
    (tmp_path / "photo.pth").write_bytes(b"\x89PNG\r\n")
    assert "is no file of weights" in said("photo.pth")
    assert "part.pth: does not fit maskrcnn_resnet50_fpn: " in said("part.pth")
    assert "part.safetensors: does not fit maskrcnn_resnet50_fpn: " in said("part.safetensors")
    assert "may run code" in said("code.pth") and not (tmp_path / "ran").exists()
    assert "cannot be read as weights" in said("torn.pth")
    assert "cannot be read as weights" in said("torn.safetensors")
    assert "cannot be read (No such file" in said("absent.pth")


class Evil:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch ran",)


def test_without_a_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("https_proxy", "HTTPS_PROXY"):
        # Nothing listens there.
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"coco-73cbd019\.pth: cannot be downloaded .*give it with --weights maskrcnn"):
        load_people(["person"], [], CPU, 96, 0.5)
    with pytest.raises(Misfit) as caught:
        load_people(["face"], [], CPU, 96, 0.5)
    masks_line, points_line = caught.value.lines
    assert "/maskrcnn_resnet50_fpn_v2" in masks_line and "/keypointrcnn_resnet50" in points_line
    assert not list(tmp_path.rglob("*.pth"))


@pytest.mark.slow
def test_torchvisions_own_weights_run_as_torchvision_runs_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = tmp_path / "served"
    served.mkdir()
    torch.manual_seed(0)
    model = keypointrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                # So small that what is added to it shows.
                module.running_var.uniform_(1e-5, 3e-5)
                module.weight.fill_(1e-3)
        model.rpn.head.bbox_pred.bias.view(-1, 4)[:, 2:] = 10.0
        model.roi_heads.box_predictor.cls_score.bias[1] = 3.0
    torch.save(model.state_dict(), served / "kept.pth")
    digest = subprocess.check_output(["sha256sum", served / "kept.pth"]).decode()[:8]
    (served / "kept.pth").rename(served / f"points-{digest}.pth")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(served))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/points-{digest}.pth"
        weights = KeypointRCNN_ResNet50_FPN_Weights.COCO_V1
        before = weights.url
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
        object.__setattr__(weights.value, "url", url)
        try:
            mask_file = wired.write_weights(tmp_path, wired.MASKS)
            detector = load_people(["face"], mask_file, CPU, 96, 0.0)
            peer = keypointrcnn_resnet50_fpn(weights=weights, min_size=96, max_size=160, box_score_thresh=0.0).eval()
            kept = tmp_path / "home" / "hub" / "checkpoints" / f"points-{digest}.pth"
            assert detector.points is not None and f"COCO_V1 (sha256 {digest})" in detector.points.source
            image = [F.to_dtype(F.pil_to_tensor(wired.person()), torch.float32, scale=True)]
            with torch.inference_mode():
                own, other = detector.points.model(image)[0], peer(image)[0]
            assert len(own["boxes"]) and own["keypoints_scores"].std() > 0
            torch.testing.assert_close(own["keypoints_scores"], other["keypoints_scores"], rtol=1e-4, atol=1e-6)
            kept.write_bytes(kept.read_bytes() + b"\0")
            with pytest.raises(ValueError, match=r"is not what http.* holds: remove it"):
                load_people(["face"], mask_file, CPU, 96, 0.0)
            # A download that is not what its name says is not kept.
            kept.unlink()
            (served / f"points-{digest}.pth").write_bytes(b"something else")
            with pytest.raises(ValueError, match="cannot be downloaded"):
                load_people(["face"], mask_file, CPU, 96, 0.0)
            assert not kept.exists()
        finally:
            object.__setattr__(weights.value, "url", before)
            server.shutdown()


# Going on


@dataclass
class Bright:
    """Finds what is red as a mask, and a box around it; `asked` are the sizes of the batches it was given."""

    regions: tuple[str, ...] = ("bright", "around")
    source: str = "red above 200"
    asked: list[int] = field(default_factory=list)
    last: int = 10**9

    def alike(self, size: tuple[int, int]) -> Hashable:
        return size

    def __call__(self, pictures: Sequence[Picture]) -> list[tuple[Annotation, ...]]:
        if len(self.asked) == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        self.asked.append(len(pictures))
        return [self._one(picture) for picture in pictures]

    def _one(self, picture: Picture) -> tuple[Annotation, ...]:
        red = np.asarray(picture.image)[..., 0] > 200
        if not red.any():
            return ()
        rows, columns = np.nonzero(red)
        box = picture.box(columns.min() - 0.25, rows.min(), columns.max() + 1, rows.max() + 1)
        assert box is not None
        return (
            Annotation("bright", picture.runs(red), float(red.mean()), self.source, 0),
            Annotation("around", box, 0.1 + 0.2, self.source),
        )


def draw(folder: Path, count: int = 7) -> Path:
    folder.mkdir(exist_ok=True)
    for index in range(count):
        image = np.zeros((8 + index % 2, 10, 3), dtype=np.uint8)
        image[2:5, index % 5 : 9] = 255 if index != 3 else 0
        Image.fromarray(image).save(folder / f"{index}.png")
    return folder


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    found = write_proposals(draw(tmp_path / "images"), tmp_path / "a.json", [Bright()], 3, device="cpu")
    assert found == (Found("bright", 6, 6, 0), Found("around", 6, 6, 6))
    annotations = read_annotations(tmp_path / "a.json")
    assert [len(image.annotations) for image in annotations.images] == [2, 2, 2, 0, 2, 2, 2]
    red = np.zeros((9, 10), dtype=bool)
    red[2:5, 1:9] = True
    assert annotations.images[1].annotations == (
        Annotation("bright", runs_of(red), 24 / 90, "red above 200", 0),
        Annotation("around", Box(0.75, 2, 9, 5), 0.1 + 0.2, "red above 200"),
    )
    assert image_files(tmp_path / "images") == tuple(image.file for image in annotations.images)


def test_gone_on_with_after_any_byte(tmp_path: Path) -> None:
    images, out = draw(tmp_path / "images"), tmp_path / "a.json"
    bad = images / "z.png"
    bad.write_bytes(b"no picture")
    with pytest.raises(Misfit, match=r"z\.png"):
        write_proposals(images, out, [Bright()], 2, device="cpu")
    bad.unlink()
    kept = partial_of(out).read_bytes()
    assert not out.exists() and len(kept.splitlines()) == 1 + 7
    write_proposals(images, tmp_path / "whole.json", [Bright()], 2, device="cpu")
    whole = (tmp_path / "whole.json").read_bytes()
    asked = set()
    for cut in {0, 1, 2000, *(at + step for at, byte in enumerate(kept) if byte == 10 for step in (0, 1, 99))}:
        partial_of(out).write_bytes(kept[:cut])
        bright = Bright()
        write_proposals(images, out, [bright], 2, device="cpu")
        assert out.read_bytes() == whole and not partial_of(out).exists()
        out.unlink()
        # Batches are those of an unbroken call: what depends on a batch depends on the same.
        assert bright.asked in [[2, 2, 2, 1][begun:] for begun in range(5)] + [[2, 1], [2, 2, 1]]
        asked.add(len(bright.asked))
    assert asked == {0, 1, 2, 3, 4}
    # Not a torn line, but one that something else has damaged: it and what follows are looked at again.
    lines = kept.splitlines(keepends=True)
    partial_of(out).write_bytes(b"".join([*lines[:3], b"\0" * len(lines[3]), *lines[4:]]))
    write_proposals(images, out, [Bright()], 2, device="cpu")
    assert out.read_bytes() == whole


def killed(images: Path, out: Path, calls: int) -> None:
    process = multiprocessing.get_context("fork").Process(
        target=write_proposals, args=(images, out, [Bright(last=calls)], 1), kwargs={"device": "cpu"}
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_killed_at_any_batch(tmp_path: Path) -> None:
    images = draw(tmp_path / "images")
    write_proposals(images, tmp_path / "whole.json", [Bright()], 1, device="cpu")
    for calls in range(7):
        out = tmp_path / f"{calls}.json"
        killed(images, out, calls)
        assert not out.exists() and len(partial_of(out).read_bytes().splitlines()) == 1 + calls
        bright = Bright()
        write_proposals(images, out, [bright], 1, device="cpu")
        assert out.read_bytes() == (tmp_path / "whole.json").read_bytes() and len(bright.asked) == 7 - calls


def test_a_torn_line_is_cut_off(tmp_path: Path) -> None:
    images, out = draw(tmp_path / "images"), tmp_path / "a.json"
    killed(images, out, 3)
    partial_of(out).write_bytes(partial_of(out).read_bytes()[:-20])
    killed(images, out, 2)
    # The third is found again, and no line stands behind what was left of it.
    lines = [json.loads(line) for line in partial_of(out).read_bytes().splitlines()]
    assert [line.get("file") for line in lines[1:]] == sorted(line["file"] for line in lines[1:]) and len(lines) == 5


@pytest.mark.slow
def test_the_command_killed_and_gone_on_with(tmp_path: Path) -> None:
    files = wired.write_weights(tmp_path, wired.MASKS, wired.KEYPOINTS)
    (tmp_path / "images").mkdir()
    for index in range(12):
        wired.person(1 + index % 3, size=(96, 96 + 8 * (index % 5))).save(tmp_path / "images" / f"{index:02}.png")

    def command(name: str) -> list[str]:
        options = [option for file in files for option in ("--weights", str(file))]
        told = [str(tmp_path / "images"), "--using", ",".join(REGIONS), "-o", str(tmp_path / name), *options]
        return [
            sys.executable,
            "-m",
            "bias_audit.cli",
            "regions",
            "propose",
            *told,
            "--size",
            "96",
            "--batch-size",
            "2",
        ]

    subprocess.run(command("whole.json"), check=True)
    partial = partial_of(tmp_path / "a.json")
    for lines in (1, 5, 9):
        with subprocess.Popen(command("a.json")) as process:
            while process.poll() is None and (not partial.exists() or partial.read_bytes().count(b"\n") < lines):
                time.sleep(0.01)
            process.kill()
        assert process.returncode == -signal.SIGKILL and not (tmp_path / "a.json").exists()
    subprocess.run(command("a.json"), check=True)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "whole.json").read_bytes() and not partial.exists()


def test_an_image_that_changed_is_looked_at_again(tmp_path: Path) -> None:
    images, out = draw(tmp_path / "images"), tmp_path / "a.json"
    killed(images, out, 5)
    # As long as before, and of another day.
    shutil.copy(images / "1.png", images / "0.png")
    os.utime(images / "0.png", (1, 1))
    (images / "2.png").unlink()
    Image.new("RGB", (9, 9), "red").save(images / "new.png")
    bright = Bright()
    write_proposals(images, out, [bright], 1, device="cpu")
    assert len(bright.asked) == 1 + 1 + 2
    annotations = read_annotations(out)
    assert [image.file for image in annotations.images] == [*(f"{i}.png" for i in (0, 1, 3, 4, 5, 6)), "new.png"]
    assert annotations.images[0].annotations == annotations.images[1].annotations


def test_other_settings_do_not_go_on(tmp_path: Path) -> None:
    images, out = draw(tmp_path / "images"), tmp_path / "a.json"
    killed(images, out, 2)
    before = partial_of(out).read_bytes()
    with pytest.raises(
        ValueError, match=r"made_by was \['red above 200'\], is \['red above 100'\]; batch_size was 1, is 2"
    ):
        write_proposals(images, out, [Bright(source="red above 100")], 2, device="cpu")
    with pytest.raises(ValueError, match="device was 'cpu', is 'cuda'"):
        write_proposals(images, out, [Bright()], 1, device="cuda")
    assert partial_of(out).read_bytes() == before
    partial_of(out).write_text('{"notes": 1}\n')
    with pytest.raises(ValueError, match="is not what this writes: move it away"):
        write_proposals(images, out, [Bright()], 1, device="cpu")
    assert partial_of(out).read_text() == '{"notes": 1}\n'


# What is wrong


def test_all_images_that_do_not_decode_are_named(tmp_path: Path) -> None:
    images, out = draw(tmp_path / "images"), tmp_path / "a.json"
    (images / "ward").mkdir()
    (images / "ward" / "text.jpg").write_text("no picture")
    Image.new("RGB", (400, 300), "red").save(images / "torn.jpg")
    (images / "torn.jpg").write_bytes((images / "torn.jpg").read_bytes()[:700])
    Image.fromarray(np.zeros((5, 5), dtype=np.uint16)).save(images / "deep.png")
    (images / "0a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(Misfit) as caught:
        write_proposals(images, out, [Bright()], 4, device="cpu")
    assert [line.split(":")[0] for line in caught.value.lines] == [
        str(images / name) for name in ("0a.png", "deep.png", "torn.jpg", "ward/text.jpg")
    ]
    assert all("\n" not in line for line in caught.value.lines) and not out.exists()
    for name in ("0a.png", "deep.png", "torn.jpg", "ward/text.jpg"):
        (images / name).unlink()
    bright = Bright()
    write_proposals(images, out, [bright], 4, device="cpu")
    assert bright.asked == [] and len(read_annotations(out).images) == 7


def test_images_too_narrow_to_look_at_are_named(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    wired.person().save(images / "a.png")
    for name, size in {"wide.png": (3000, 2), "high.png": (1, 1400)}.items():
        Image.new("RGB", size).save(images / name)
    with pytest.raises(Misfit) as caught:
        write_proposals(images, tmp_path / "a.json", [people(["person"])], 4, device="cpu")
    assert [line.split(":")[0] for line in caught.value.lines] == [
        str(images / name) for name in ("high.png", "wide.png")
    ]
    assert "too narrow to find people in: crop it" in str(caught.value)
    assert len(partial_of(tmp_path / "a.json").read_text().splitlines()) == 2


def test_folders_and_outputs_that_cannot_be_used(tmp_path: Path) -> None:
    images = draw(tmp_path / "images", 1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".hidden.png").write_bytes(b"")
    cases = {
        "absent: is no folder": (tmp_path / "absent", "a.json"),
        "has no image": (tmp_path / "empty", "a.json"),
        "the folder .*nowhere is not there": (images, "nowhere/a.json"),
        "there.json: is there already: name another file, or give --force": (images, "there.json"),
    }
    (tmp_path / "there.json").write_text("by hand")
    for match, (folder, out) in cases.items():
        with pytest.raises(ValueError, match=match):
            write_proposals(folder, tmp_path / out, [Bright()], 1, device="cpu")
    assert (tmp_path / "there.json").read_text() == "by hand"
    assert not list(tmp_path.rglob("*.jsonl"))
    write_proposals(images, tmp_path / "there.json", [Bright()], 1, device="cpu", force=True)
    assert len(read_annotations(tmp_path / "there.json").images) == 1
    name = os.fsdecode(b"caf\xe9.png")
    shutil.copy(images / "0.png", images / name)
    with pytest.raises(Misfit, match="is not UTF-8: rename it"):
        image_files(images)


def test_only_the_images_of_a_table_are_looked_at(tmp_path: Path) -> None:
    images, out = draw(tmp_path / "images"), tmp_path / "a.json"
    (images / "6.png").write_bytes(b"no picture")
    only = tmp_path / "chosen.csv"
    only.write_text("file,label,why\n4.png,x,balance\n0.png,y,balance\n")
    write_proposals(images, out, [Bright()], 3, device="cpu", only=only)
    assert [image.file for image in read_annotations(out).images] == ["0.png", "4.png"]
    (images / "note.txt").touch()
    only.write_text("file,label\n../0.png,x\n0.png,\n0.png,y\nnote.txt,y\n8.png,y\n")
    with pytest.raises(Misfit) as wrong:
        propose(Options(images, tmp_path / "b.json", ("person",), only=only))
    said = (("line 3", "no value"), ("line 2", "leaves"), ("line 5", "does not end in"), ("line 6", "no file"))
    assert len(wrong.value.lines) == len(said)
    for line, (place, what) in zip(wrong.value.lines, said, strict=True):
        assert place in line and what in line
    only.write_text("file,label\n")
    with pytest.raises(Misfit, match="no row below its header"):
        write_proposals(images, tmp_path / "b.json", [Bright()], 3, device="cpu", only=only)


def test_options_that_cannot_be(tmp_path: Path) -> None:
    images = draw(tmp_path / "images", 1)

    def said(**options: object) -> str:
        with pytest.raises(ValueError, match=r".") as caught:
            propose(Options(images, tmp_path / "a.json", **{"using": ("person",)} | options))  # type: ignore[arg-type]
        return str(caught.value)

    wrong = said(using=("persn,face,prompt:", "hair,,face"))
    assert "unknown region 'persn': did you mean 'person'?; for anything else write prompt:WORDS" in wrong
    assert "region 'face' is named twice" in wrong and "prompt: has no words" in wrong and "a name is empty" in wrong
    assert len(wrong.splitlines()) == 4
    assert "region 'face' is named twice" in said(using=("face,prompt:face",))
    assert "expected --prompt-model together with" in said(using=("prompt:tie",))
    assert "expected --prompt-model together with" in said(prompt_model="x")
    assert "--weights are for person" in said(using=("prompt:tie",), prompt_model="x", weights=(tmp_path,))
    assert "expected scores from 0 to below 1" in said(min_score=1.0)
    assert "expected scores from 0 to below 1" in said(prompt_score=-0.1)
    assert "expected --batch-size and --size" in said(batch_size=0)
    assert "--device warp: cannot be used" in said(device="warp")
    assert not list(tmp_path.glob("*.json*"))


def test_nothing_found(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    wired.nobody().save(tmp_path / "images" / "a.png")
    files = wired.write_weights(tmp_path, wired.MASKS)
    out = tmp_path / "a.json"
    command = ["regions", "propose", str(tmp_path / "images"), "--using", "person,background", "-o", str(out)]
    command += ["--weights", str(files[0]), "--size", "96"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 3 and "found in no image: person, background; nothing is written" in done.stderr
    assert not out.exists() and not partial_of(out).exists() and str(out) not in done.stdout
