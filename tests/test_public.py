"""Public data sets read from tiny folders of the same layout, against torchvision's own classes where it has them."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from bias_audit.data.annotations import Misfit
from bias_audit.data.dataset import AuditDataset
from bias_audit.data.public import ALIGNED, FACE_REGIONS, celeba, face_regions, oxford_pets, waterbirds
from bias_audit.data.sheet import describe

# Where the aligned pictures have the eyes, the nose and the corners of the mouth.
ALIKE = (69, 111, 108, 111, 88, 136, 72, 152, 105, 152)
NAMES = [f"A{i}" for i in range(38)] + ["Blond_Hair", "Male"]
BREEDS = {"Abyssinian": (1, 1), "american_bulldog": (2, 2), "Bengal": (3, 1)}
LANDBIRD, WATERBIRD = "001.Black_footed_Albatross", "002.Laysan_Albatross"


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    """Nine faces: three of each split, every second one blond, every third a man's."""
    folder = tmp_path / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    rng = np.random.default_rng(0)
    attributes, landmarks, splits, more = [], [], [], []
    for i in range(9):
        name = f"{i + 1:06d}.jpg"
        Image.fromarray(rng.integers(0, 256, (*ALIGNED, 3), dtype=np.uint8)).save(folder / "img_align_celeba" / name)
        values = [*rng.choice([-1, 1], 38), 1 if i % 2 else -1, -1 if i % 3 else 1]
        attributes.append(f"{name} " + " ".join(f"{v:2d}" for v in values))
        landmarks.append(f"{name} " + " ".join(f"{p + rng.integers(-3, 4):4d}" for p in ALIKE))
        splits.append(f"{name} {i // 3}")
        more.append(f"{name} 1 2 3 4")
    (folder / "list_attr_celeba.txt").write_text("\n".join(["9", " ".join(NAMES) + " ", *attributes]) + "\n")
    points = " ".join(
        f"{p}_{axis}" for p in ("lefteye", "righteye", "nose", "leftmouth", "rightmouth") for axis in "xy"
    )
    (folder / "list_landmarks_align_celeba.txt").write_text("\n".join(["9", points, *landmarks]) + "\n")
    (folder / "list_eval_partition.txt").write_text("\n".join(splits) + "\n")
    (folder / "list_bbox_celeba.txt").write_text("\n".join(["9", "image_id x_1 y_1 width height", *more]) + "\n")
    (folder / "identity_CelebA.txt").write_text("\n".join(line.rsplit(" ", 3)[0] for line in more) + "\n")
    return tmp_path


class Unchecked(datasets.CelebA):
    """torchvision's CelebA less its checksums, which a made-up folder cannot have."""

    def _check_integrity(self) -> bool:
        return True


@pytest.mark.parametrize("split", ["train", "valid", "test", "all"])
def test_celeba_is_what_torchvision_reads(faces: Path, split: str) -> None:
    peer = Unchecked(faces, split, target_type=["attr", "landmarks"])
    found = celeba(faces, split=split, attributes=["Male", "A0"])  # type: ignore[arg-type]
    assert found.ids == tuple(peer.filename) and found.subjects.classes == ("not Blond_Hair", "Blond_Hair")
    assert found.labels.tolist() == peer.attr[:, 38].tolist()
    assert found.attribute_table.tolist() == [
        ["yes" if row[39] else "no", "yes" if row[0] else "no"] for row in peer.attr.tolist()
    ]
    for i, (picture, (_, points)) in enumerate(peer):
        batch = found.batch([i])
        assert torch.equal((batch.images[0] * 255).round().byte(), torch.from_numpy(np.array(picture)).permute(2, 0, 1))
        drawn = face_regions(points.reshape(1, 5, 2), ALIGNED)
        assert torch.equal(batch.masks[0], torch.stack([drawn["hair"][0], drawn["face"][0]]))


@pytest.fixture
def wild(faces: Path) -> Path:
    """The same nine as they were found: pictures of several sizes, each with a box around the head."""
    folder = faces / "celeba"
    (folder / "img_celeba").mkdir()
    landmarks, boxes = [], []
    for i in range(9):
        name, (height, width) = f"{i + 1:06d}.jpg", (250 + 10 * i, 220 + 7 * i)
        Image.new("RGB", (width, height), (10 * i, 90, 120)).save(folder / "img_celeba" / name)
        landmarks.append(f"{name} " + " ".join(str(p + 20 + i) for p in ALIKE))
        boxes.append(f"{name} {30 + i} {40 + 2 * i} {100 + i} {140 + i}")
    (folder / "list_landmarks_celeba.txt").write_text("\n".join(["9", "lefteye_x ...", *landmarks]) + "\n")
    (folder / "list_bbox_celeba.txt").write_text("\n".join(["9", "image_id x_1 y_1 width height", *boxes]) + "\n")
    return faces


def test_boxes_belong_to_the_pictures_as_they_were_found(wild: Path) -> None:
    found = celeba(wild, split="all", aligned=False, object=["mouth"], spurious=["box"], context=["face"])
    peer = Unchecked(wild, "all", target_type="bbox")
    for i, (_, (left, top, width, height)) in enumerate(peer):
        mouth, box, face = found.batch([i]).masks[0]
        size = Image.open(wild / "celeba" / "img_celeba" / found.ids[i]).size
        expected = torch.zeros(size[::-1], dtype=torch.bool)
        expected[top : top + height, left : left + width] = True
        assert torch.equal(box, expected & ~mouth) and mouth.any()
        points = torch.tensor([p + 20 + i for p in ALIKE], dtype=torch.float32).reshape(1, 5, 2)
        assert torch.equal(face, face_regions(points, size[::-1])["face"][0] & ~mouth)
    assert {count.region: (count.boxed, count.absent) for count in describe(found).annotated} == {
        "mouth": (0, 0),
        "box": (9, 0),
        "face": (0, 0),
    }


def test_aligned_pictures_have_no_box(wild: Path) -> None:
    with pytest.raises(ValueError, match="unknown region 'box'"):
        celeba(wild, spurious=["box"])
    boxes = wild / "celeba" / "list_bbox_celeba.txt"
    boxes.write_text("\n".join(line for line in boxes.read_text().splitlines() if "000005" not in line))
    (line,) = lines_of(lambda: celeba(wild, aligned=False))
    assert line.endswith("image '000005.jpg': has no box: unpack the data set again")


def test_what_an_object_region_covers_is_no_other_regions(faces: Path) -> None:
    found = celeba(faces, object=["mouth"], spurious=["face", "hair"], context=["eyes", "background"])
    mouth, face, hair, eyes, background = found.batch([0]).masks[0]
    assert mouth.any() and not (mouth & face).any() and (eyes & face).any()
    assert torch.equal(face | mouth | hair | background, torch.ones(ALIGNED, dtype=torch.bool))


def turned(points: np.ndarray, degrees: float, scale: float, shift: tuple[float, float]) -> torch.Tensor:
    """The points turned about their middle, enlarged and moved."""
    a = math.radians(degrees)
    turn = scale * np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])
    middle = points.mean(axis=0)
    return torch.from_numpy((points - middle) @ turn.T + middle + shift)


def test_regions_of_a_face_against_a_loop() -> None:
    """An upright face, drawn pixel by pixel from the lengths that the docstring states."""
    points = np.array(ALIKE, dtype=float).reshape(5, 2)
    masks = {name: mask[0].numpy() for name, mask in face_regions(torch.tensor(points)[None], ALIGNED).items()}
    assert tuple(masks) == FACE_REGIONS
    unit = 41.0  # from 111 to 152; the eyes are 39 apart
    for y in range(0, ALIGNED[0], 3):
        for x in range(0, ALIGNED[1], 3):
            face = ((x - 88.5) / (1.05 * unit)) ** 2 + ((y - (70 + 182.75) / 2) / (112.75 / 2)) ** 2 <= 1
            top = 111 - 1.9 * unit
            head = ((x - 88.5) / (1.6 * unit)) ** 2 + ((y - (top + 182.75) / 2) / ((182.75 - top) / 2)) ** 2 <= 1
            eyes = any(((x - e) / (0.4 * unit)) ** 2 + ((y - 111) / (0.25 * unit)) ** 2 <= 1 for e in (69, 108))
            mouth = ((x - 88.5) / (16.5 + 0.1 * unit)) ** 2 + ((y - 152) / (0.25 * unit)) ** 2 <= 1
            hair = head and y < 152 and not face
            expected = (face, eyes, mouth, hair, not face and not hair)
            assert tuple(bool(masks[name][y, x]) for name in FACE_REGIONS) == expected, (x, y)


@pytest.mark.parametrize("degrees", [0, 30, -90, 180])
def test_what_is_claimed_of_a_face(degrees: float) -> None:
    """However the head is turned: the parts that lie in others, and the hair above what is below the mouth."""
    points = np.array(ALIKE, dtype=float).reshape(5, 2)
    upright = face_regions(torch.from_numpy(points)[None] + 60, (360, 360))
    found = face_regions(turned(points, degrees, 1.0, (60, 60))[None], (360, 360))
    for name in FACE_REGIONS:
        assert abs(int(found[name].sum()) - int(upright[name].sum())) < 0.02 * int(upright[name].sum()) + 40
    face, eyes, mouth, hair, background = (found[name][0] for name in FACE_REGIONS)
    assert not (face & hair).any() and not ((face | hair) & background).any() and (face | hair | background).all()
    assert (eyes & face).sum() > 0.97 * eyes.sum() and (mouth & ~face).sum() == 0 and not (eyes & mouth).any()
    up = np.array([math.sin(math.radians(degrees)), -math.cos(math.radians(degrees))])
    corners = turned(points, degrees, 1.0, (60, 60)).numpy()[3:]
    rows, columns = np.nonzero(hair.numpy())
    assert ((np.stack([columns, rows], 1) - corners.mean(axis=0)) @ up).min() > -1e-6


def test_faces_are_drawn_as_large_as_they_are_and_one_by_one() -> None:
    points = np.array(ALIKE, dtype=float).reshape(5, 2)
    batch = torch.stack([turned(points, 10, scale, (80, 80)) for scale in (0.5, 1.0)])
    found = face_regions(batch, (400, 400))
    for name in ("face", "eyes", "mouth", "hair"):
        small, large = (int(mask.sum()) for mask in found[name])
        assert large == pytest.approx(4 * small, rel=0.03)
        alone = [face_regions(one[None], (400, 400))[name][0] for one in batch]
        assert torch.equal(found[name], torch.stack(alone))
    # In half profile the eyes come closer, and the face stays as high and as wide.
    profile = points.copy()
    profile[:2, 0] = 88.5 + (profile[:2, 0] - 88.5) / 2
    assert torch.equal(*(face_regions(torch.from_numpy(p)[None], ALIGNED)["face"] for p in (points, profile)))
    nowhere = face_regions(torch.full((1, 5, 2), 7.0), ALIGNED)
    assert not any(mask.any() for mask in nowhere.values())


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    folder = tmp_path / "oxford-iiit-pet"
    (folder / "annotations/trimaps").mkdir(parents=True)
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for i in range(9):
        breed, (number, species) = list(BREEDS.items())[i % 3]
        name = f"{breed}_{100 + i}"
        # One is a GIF under the name of a JPEG, as some of the data set are no JPEGs either.
        picture = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        picture.save(folder / f"images/{name}.jpg", "GIF" if i == 4 else "JPEG")
        trimap = rng.integers(1, 4, (12, 16), dtype=np.uint8)
        trimap[0, :3] = 1, 2, 3
        Image.fromarray(trimap).save(folder / f"annotations/trimaps/{name}.png")
        lines.append(f"{name} {number} {species} {i + 1}")
    (folder / "annotations/trainval.txt").write_text("\n".join(lines[:6]) + "\n")
    (folder / "annotations/test.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.mark.parametrize("split", ["trainval", "test"])
def test_pets_are_what_torchvision_reads(pets: Path, split: str) -> None:
    peer = datasets.OxfordIIITPet(pets, split, target_types=["category", "binary-category", "segmentation"])
    by_breed = oxford_pets(pets, split=split, target="breed", attributes=["species"])  # type: ignore[arg-type]
    by_species = oxford_pets(pets / "oxford-iiit-pet", split=split, attributes=["breed"])  # type: ignore[arg-type]
    assert by_breed.subjects.classes == tuple(peer.classes) and by_species.subjects.classes == tuple(peer.bin_classes)
    for i, (picture, (breed, species, trimap)) in enumerate(peer):
        assert (by_breed.labels[i], by_species.labels[i]) == (breed, species)
        assert by_breed.attribute_table[i] == peer.bin_classes[species]
        assert by_species.attribute_table[i] == peer.classes[breed]
        batch = by_species.batch([i])
        assert torch.equal((batch.images[0] * 255).round().byte(), torch.from_numpy(np.array(picture)).permute(2, 0, 1))
        values = torch.from_numpy(np.array(trimap))
        assert torch.equal(batch.masks[0], torch.stack([values == 1, values == 2, values == 3]))
    assert oxford_pets(pets).subjects.attributes == () and len(oxford_pets(pets)) == 9


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    folder, masks = tmp_path / "waterbirds_v1.0", tmp_path / "segmentations"
    rng = np.random.default_rng(0)
    rows = []
    for i in range(12):
        species = (LANDBIRD, WATERBIRD)[i % 2]
        file = f"{species}/Bird_{i:04d}_{i}.jpg"
        for base in (folder, masks):
            (base / species).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (10, 14, 3), dtype=np.uint8)).save(folder / file)
        soft = rng.choice(np.array([0, 51, 102, 153, 204, 255], dtype=np.uint8), (10, 14))
        mask = Image.fromarray(soft).convert("RGBA" if i == 3 else "L")
        if i != 5:
            mask.save(masks / file.replace(".jpg", ".png"))
        rows.append((i + 1, file, i % 2, i // 4, i // 2 % 2, "/o/ocean/00002296.jpg"))
    with (folder / "metadata.csv").open("w", newline="") as out:
        header = ("img_id", "img_filename", "y", "split", "place", "place_filename")
        csv.writer(out).writerows([header, *rows])
    return tmp_path


def test_waterbirds(birds: Path) -> None:
    found = waterbirds(birds, masks=birds / "segmentations", split="all")
    assert found.subjects.classes == ("landbird", "waterbird") and len(found) == 12
    assert found.subjects.attributes == (("place", ("land", "water")),)
    assert found.subjects.regions == (("bird", "object"), ("background", "spurious"))
    for i, name in enumerate(found.ids):
        assert int(name[-5]) == i % 10 and found.labels[i] == i % 2 == (WATERBIRD in name)
        assert found.attribute_table[i] == ("land", "water")[i // 2 % 2]
        bird, background = found.batch([i]).masks[0]
        if i == 5:  # has no mask: it lacks both regions
            assert not bird.any() and not background.any()
            continue
        soft = Image.open(birds / "segmentations" / name.replace(".jpg", ".png")).convert("L")
        said = np.array(soft).astype(int) // 51  # of five annotators
        assert torch.equal(bird, torch.from_numpy(said >= 3)) and torch.equal(background, ~bird)
    for k, split in enumerate(("train", "val", "test")):
        part = waterbirds(birds, masks=birds / "segmentations", split=split)  # type: ignore[arg-type]
        assert part.ids == found.ids[4 * k : 4 * k + 4]


def lines_of(read: Callable[[], AuditDataset]) -> list[str]:
    with pytest.raises(Misfit) as wrong:
        read()
    return list(wrong.value.lines)


def change(path: Path, before: str, after: str) -> None:
    content = path.read_text()
    assert content.count(before) == 1
    path.write_text(content.replace(before, after))


def test_all_that_is_wrong_with_celeba_is_said_at_once(faces: Path) -> None:
    folder = faces / "celeba"
    attributes = (folder / "list_attr_celeba.txt").read_text().splitlines()
    attributes[5] = attributes[5].rsplit(" ", 1)[0]  # 000004 lacks a value
    attributes[6] = attributes[6].rsplit(" ", 1)[0] + " 7"
    (folder / "list_attr_celeba.txt").write_text("\n".join(attributes))
    landmarks = (folder / "list_landmarks_align_celeba.txt").read_text().splitlines()
    landmarks[6] = landmarks[6].rsplit(" ", 1)[0] + " here"
    (folder / "list_landmarks_align_celeba.txt").write_text("\n".join(landmarks))
    (folder / "img_align_celeba/000006.jpg").unlink()
    lines = lines_of(lambda: celeba(faces))
    for place, image, said in (
        ("list_landmarks_align_celeba.txt, line 7", "000005.jpg", "10 whole numbers"),
        ("list_attr_celeba.txt, line 6", "000004.jpg", "expected 40 values, got 39"),
        ("list_attr_celeba.txt, line 7", "000005.jpg", "Male is '7'"),
        ("list_attr_celeba.txt, line 7", "000005.jpg", "has no landmarks"),
        ("list_attr_celeba.txt, line 8", "000006.jpg", "is not in"),
        ("list_eval_partition.txt", "000004.jpg", "has no row"),
    ):
        assert sum(place in line and repr(image) in line and said in line for line in lines) == 1, (place, lines)
    assert len(lines) == 6
    # What is wrong in another split is not this one's, but for a line that cannot be read.
    assert len(lines_of(lambda: celeba(faces, split="test"))) == 1
    # An image of no split would be in none, unseen.
    splits = folder / "list_eval_partition.txt"
    splits.write_text(splits.read_text().replace("000004.jpg 1", "000004.jpg 7"))
    (line,) = (line for line in lines_of(lambda: celeba(faces)) if "no split" in line)
    assert "list_eval_partition.txt, line 4: image '000004.jpg': '7'" in line


def test_pictures_of_another_size_are_not_celebas_aligned_ones(faces: Path) -> None:
    found = celeba(faces)
    Image.new("RGB", (64, 64)).save(faces / "celeba/img_align_celeba/000004.jpg")
    with pytest.raises(ValueError, match=r"000004\.jpg: is 64 x 64 pixels.*218 x 178"):
        found.batch([0])


def test_all_that_is_wrong_with_pets_is_said_at_once(pets: Path) -> None:
    folder = pets / "oxford-iiit-pet"
    change(folder / "annotations/test.txt", "american_bulldog_101 2 2", "american_bulldog_101 2 3")
    change(folder / "annotations/test.txt", "Bengal_102 3 1 3", "Bengal_102 3 1")
    change(folder / "annotations/test.txt", "Abyssinian_103 1", "Abyssinian_103 3")
    change(folder / "annotations/test.txt", "american_bulldog_104 2", "../american_bulldog_104 2")
    (folder / "annotations/trimaps/Bengal_105.png").unlink()
    lines = lines_of(lambda: oxford_pets(pets))
    assert [line.split(": ")[0].rsplit(" ", 1)[1] for line in lines] == ["2", "3", "5", "5", "6", "9"]
    assert "leaves the folder" in lines[2] and "no file" in lines[4] and "class 3 is 'Abyssinian'" in lines[5]


def test_a_trimap_with_another_value_is_named(pets: Path) -> None:
    found = oxford_pets(pets)
    path = pets / "oxford-iiit-pet/annotations/trimaps/Abyssinian_100.png"
    Image.fromarray(np.full((12, 16), 9, dtype=np.uint8)).save(path)
    with pytest.raises(ValueError, match=r"Abyssinian_100\.png: has the value 9"):
        found.batch([0])


def test_all_that_is_wrong_with_waterbirds_is_said_at_once(birds: Path) -> None:
    table, masks = birds / "waterbirds_v1.0/metadata.csv", birds / "segmentations"
    change(table, f"{LANDBIRD}/Bird_0000_0.jpg,0", f"{LANDBIRD}/Bird_0000_0.jpg,2")
    change(table, f"{LANDBIRD}/Bird_0002_2.jpg,0,0,1", f"{LANDBIRD}/Bird_0002_2.jpg,0,0,")
    change(table, f"{WATERBIRD}/Bird_0003_3.jpg", "../Bird_0003_3.jpg")
    (birds / f"waterbirds_v1.0/{WATERBIRD}/Bird_0005_5.jpg").unlink()
    lines = lines_of(lambda: waterbirds(birds, masks=masks, split="all"))
    assert [line.split(": ")[0].rsplit(" ", 1)[1] for line in lines] == ["2", "4", "5", "7"]
    for line, said in zip(lines, ("y is '2'", "place is ''", "leaves the folder", "no file"), strict=True):
        assert said in line
    assert "has no mask of any of 4 images" in lines_of(lambda: waterbirds(birds, masks=birds, split="test"))[-1]
    change(table, "img_filename", "file")
    assert "line 1: no column 'img_filename'" in lines_of(lambda: waterbirds(birds, masks=masks))[0]


def test_names_that_there_are_not_are_refused(faces: Path, pets: Path, birds: Path) -> None:
    for read, said in (
        (lambda: celeba(faces, target="Blond_Hare"), "did you mean 'Blond_Hair'"),
        (lambda: celeba(faces, object=["hairs"]), "did you mean 'hair'"),
        (lambda: celeba(faces, object="hair"), "write \\['hair'\\]"),
        (lambda: celeba(faces, split="val"), "expected one of train, valid"),  # type: ignore[arg-type]
        (lambda: celeba(faces / "nowhere"), "cannot be read"),
        (lambda: oxford_pets(pets, attributes=["colour"]), "species or breed"),
        (lambda: oxford_pets(pets, split="train"), "trainval or test"),  # type: ignore[arg-type]
        (lambda: waterbirds(birds, masks=birds, split="valid"), "train, val, test"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=said):
            read()
