"""Regions of people: where they lie, whose parts are whose, and the weights that find them."""

from __future__ import annotations

import functools
import http.server
import itertools
import os
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torchvision
import wired
from drawn_people import people
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.detection import KeypointRCNN_ResNet50_FPN_Weights, keypointrcnn_resnet50_fpn
from torchvision.transforms.v2 import functional as F
from typer.testing import CliRunner

from bias_audit.cli import app
from bias_audit.data.annotations import AnnotatedImage, Annotation, Misfit
from bias_audit.data.formats.known import read_annotations
from bias_audit.data.outlines import mask_of, union
from bias_audit.regions.people import REGIONS, SEEN, Detector, PeopleDetector, same_people
from bias_audit.regions.pictures import MOST_SIDE, Picture, opened
from bias_audit.regions.propose import Options, partial_of, propose, write_proposals
from bias_audit.regions.weights import load_people

Mask = npt.NDArray[np.bool_]
CPU = torch.device("cpu")


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
