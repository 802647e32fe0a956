"""Audit sets that a YAML file declares: each reader and step of a transform, and one line for each mistake."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from planted import DATA, write_planted
from torchvision.transforms import v2

from bias_audit import AuditDataset
from bias_audit.data import declared as module
from bias_audit.data.declared import read_declared
from bias_audit.data.sheet import describe
from bias_audit.imports import imported

OWN = """
import sys
from torchvision.models import ResNet18_Weights
from torchvision.transforms import v2
from bias_audit.data.scenes import balanced_scenes
def scenes(): return balanced_scenes(1, seed=0)
def number(): return 3
def fails(): raise KeyError("no such\\nbucket")
def exits(): sys.exit(0)
def preset(): return ResNet18_Weights.DEFAULT.transforms()
def old(): return __import__("torchvision").transforms.Resize(8)
def small(): return v2.Compose([v2.Resize([8, 8]), v2.ToDtype(__import__("torch").float32, scale=True)])
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_planted(tmp_path_factory.mktemp("planted"), per_cell=2)
    (root / "own_readers.py").write_text(OWN)
    (root / "empty.csv").write_text("file,label\n")
    (root / "own_that_exits.py").write_text("raise SystemExit(0)")
    (root / "own_that_breaks.py").write_text("def (:")
    return root


@pytest.fixture(autouse=True)
def _importable(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(planted)


def declare(planted: Path, text: str) -> Path:
    path = planted / "declared.yaml"
    path.write_text(text)
    return path


def test_a_folder_is_read_from_where_the_file_lies(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    found = read_declared(planted / "audit.yaml")
    expected = AuditDataset.from_folder(
        planted / "images",
        labels=planted / "labels.csv",
        masks=planted / "masks",
        object=["middle"],
        spurious=["corner"],
    )
    assert found.subjects == expected.subjects
    assert found.subjects.attributes == (("colour", ("blue", "red")),)
    assert describe(found).fingerprint == describe(expected).fingerprint


def test_coco_is_read_with_all_it_takes(tmp_path: Path) -> None:
    root = write_planted(tmp_path / "p", per_cell=1)
    names = sorted(path.name for path in (root / "images").iterdir())
    box = [2, 2, 9, 2, 9, 9, 2, 9]
    coco = {
        "images": [{"id": i, "file_name": n, "height": 24, "width": 24} for i, n in enumerate(names)],
        "categories": [{"id": 1, "name": "tag"}, {"id": 2, "name": "bloom", "supercategory": "plant"}],
        "annotations": [
            {"image_id": i, "category_id": c, "segmentation": [[p + 4 * (c - 1) for p in box]]}
            for i in range(len(names))
            for c in (1, 2)
        ],
    }
    (root / "instances.json").write_text(json.dumps(coco))
    path = declare(
        root,
        "reader: coco\nannotations: instances.json\nimages: images\nlabels: labels.csv\n"
        "object: {flower: [plant]}\nspurious: [tag]\nminus: {flower: [tag]}\nattributes: [colour]\n"
        "classes: [petal, leaf]\ntransform: [{resize: 12}]\n",
    )
    found = read_declared(path)
    assert found.subjects.regions == (("flower", "object"), ("tag", "spurious"))
    assert found.subjects.classes == ("petal", "leaf")
    assert found.batch([0]).masks.shape == (1, 2, 12, 12)
    wanted = AuditDataset.from_coco(
        root / "instances.json",
        root / "images",
        labels=root / "labels.csv",
        object={"flower": ["plant"]},
        spurious=["tag"],
        minus={"flower": ["tag"]},
        classes=["petal", "leaf"],
        transform=v2.Resize([12]),
    )
    assert describe(found).fingerprint == describe(wanted).fingerprint
    text = path.read_text()
    for old, new, message in (
        ("[plant]", "[\n  plant, animal]", r"line 6: object.flower.1: .*unknown category 'animal'"),
        ("{flower: [tag]}", "{flour: [tag]}", r"line 7: minus.flour: minus: unknown region 'flour'"),
        ("[tag]\nminus", "[flower]\nminus", r"line 6: spurious.0: .*unknown category 'flower'"),
        ("[tag]\nminus", "{flower: [tag]}\nminus", r"line 6: spurious.flower: region 'flower' is named in more than"),
    ):
        with pytest.raises(ValueError, match=message):
            read_declared(declare(root, text.replace(old, new)))


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ("[{resize: [10, 12]}]", v2.Resize([10, 12])),
        ("[{resize: 10}, {center_crop: 8}]", v2.Compose([v2.Resize([10]), v2.CenterCrop(8)])),
        ("[{center_crop: [8, 6]}]", v2.CenterCrop([8, 6])),
        (
            "[{resize: {size: 9, interpolation: bicubic}}, {normalize: {mean: [0.5, 0.4, 0], std: [0.2, 1, 2]}}]",
            v2.Compose(
                [
                    v2.Resize([9], interpolation=v2.InterpolationMode.BICUBIC),
                    v2.ToDtype(torch.float32, scale=True),
                    v2.Normalize([0.5, 0.4, 0], [0.2, 1, 2]),
                ]
            ),
        ),
        ("own_readers:small", v2.Compose([v2.Resize([8, 8]), v2.ToDtype(torch.float32, scale=True)])),
        ("[own_readers:small, {center_crop: 4}]", v2.Compose([v2.Resize([8, 8]), v2.CenterCrop(4)])),
    ],
)
def test_steps_of_a_transform(planted: Path, steps: str, expected: Any) -> None:
    found = read_declared(declare(planted, f"{DATA}transform: {steps}\n")).batch([0, 3])
    wanted = AuditDataset.from_folder(
        planted / "images",
        labels=planted / "labels.csv",
        masks=planted / "masks",
        object=["middle"],
        spurious=["corner"],
        transform=expected,
    ).batch([0, 3])
    torch.testing.assert_close(found.images, wanted.images)
    assert torch.equal(found.masks, wanted.masks)


def test_a_preset_of_torchvision_is_known_for_one(planted: Path) -> None:
    assert read_declared(declare(planted, f"{DATA}transform: own_readers:preset\n")).batch([0]).images.shape[2:] == (
        224,
        224,
    )


def test_an_own_reader(planted: Path) -> None:
    assert len(read_declared(declare(planted, "reader: own_readers:scenes\n"))) == 4


def test_yaml_that_python_would_run_is_text(planted: Path) -> None:
    path = declare(planted, "reader: !!python/object/apply:os.system ['touch ran']\n")
    with pytest.raises(ValueError, match=r"declared\.yaml, line 1: not valid YAML"):
        read_declared(path)
    assert not (planted / "ran").exists() and not Path("ran").exists()


WRONG = [
    ("reader: coca\n", r"line 1: reader: expected coco, voc, .*boxes, folder or package.module:function, got 'coca'"),
    ("images: images\n", r"reader: expected coco, voc, .*boxes, folder or package.module:function, got None"),
    ("", r"expected a mapping with the key `reader`, got nothing"),
    ("- reader: coco\n", r"expected a mapping with the key `reader`, got list"),
    ("reader: folder\nreader: coco\n", r"line 2: reader: stands twice"),
    ("reader: [\n", r"line 2: not valid YAML"),
    ("reader: \x00\n", r"not valid YAML"),
    (f"{DATA}transfrom: []\n", r"line 7: transfrom: unknown key; did you mean `transform`\? known are: reader, images"),
    (f"{DATA}transform:\n  - rezise: 8\n", r"line 8: transform.0.rezise: unknown key; did you mean `resize`\?"),
    (f"{DATA}transform:\n  - resize: {{sise: 8}}\n", r"line 8: transform.0.resize.*size.*"),
    (f"{DATA}transform:\n  - resize: 0\n", r"line 8: transform.0.resize: .*greater than or equal to 1"),
    (f"{DATA}transform:\n  - resize: [8, 8, 8]\n", r"line 8: transform.0.resize: .*at most 2 items"),
    (
        f"{DATA}transform:\n  - resize: true\n",
        r"line 8: transform.0.resize: expected pixels, such as 224 or .*got True",
    ),
    (f"{DATA}transform:\n  - center_crop: nine\n", r"line 8: transform.0.center_crop: expected pixels.*got 'nine'"),
    (f"{DATA}transform:\n  - {{resize: 8, center_crop: 8}}\n", r"line 8: transform.0: expected one step"),
    (f"{DATA}transform:\n  - {{}}\n", r"line 8: transform.0: expected one step"),
    (f"{DATA}transform:\n  - normalize: {{mean: [1, 1, 1]}}\n", r"line 8: transform.0.normalize.std: is missing"),
    (
        f"{DATA}transform:\n  - normalize:\n      mean: [1, 1, 1]\n      std: [1, 0, 1]\n",
        r"line 10: transform.0.normalize.std.1: .*greater than 0",
    ),
    (f"{DATA}transform:\n  - normalize: {{mean: [.nan, 1, 1], std: [1, 1, 1]}}\n", r"line 8: .*mean.0: .*finite"),
    (f"{DATA}transform:\n  - own_readers:number\n", r"line 8: transform.0: .*returned int, expected a transform"),
    (f"{DATA}transform: os:sep\n", r"line 7: transform.0: 'os:sep' is str, expected a function or a class"),
    (
        f"{DATA}transform:\n  - own_readers:old\n",
        r"line 7: transform: expected a transform of torchvision.transforms.v2",
    ),
    (f"{DATA}transform:\n  - own_readers:fails\n", r"line 8: transform.0: .*raised KeyError"),
    (f"{DATA}classes: [3, 4]\n", r"line 7: classes.0: .*valid string: write it in quotes"),
    (f"{DATA}images: 3\n".replace("images: images\n", ""), r"line 6: images: .*valid string: write it in quotes"),
    (DATA.replace("labels: labels.csv\n", ""), r"declared.yaml: labels: is missing"),
    (DATA.replace("[middle]", "middle"), r"line 5: object: .*valid list"),
    (DATA.replace("folder", "coco"), r"line 3: masks: unknown key"),
    (
        DATA.replace("folder", "coco").replace("masks: masks", "annotations: a.json"),
        r"line 3: annotations: .*a.json is not there, expected a file",
    ),
    (
        DATA.replace("folder", "coco").replace("masks: masks", "annotations: labels.csv"),
        r"line 3: annotations: .*labels.csv: content: ",
    ),
    (
        DATA.replace("folder", "coco").replace("masks: masks", "annotations: a").replace("[middle]", "tie"),
        r"line 5: object: expected a list of categories, or a mapping",
    ),
    (
        DATA.replace("folder", "coco").replace("masks: masks", "annotations: a").replace("[middle]", "[a, a]"),
        r"line 5: object: a region is named twice",
    ),
    (DATA.replace("[middle]", "[corner]"), r"line 6: spurious.0: region 'corner' is named in more than one role"),
    (DATA.replace("[middle]", "[corner, corner]"), r"line 5: object: 'corner' stands twice: remove one"),
    (DATA.replace("[middle]", "[\n  middle,\n  midle]"), r"line 7: object.1: .*no folder of region 'midle'"),
    (DATA.replace("images: images", "images: nowhere"), r"line 2: images: .*nowhere is not there, expected a folder"),
    (DATA.replace("masks: masks", "masks: nowhere"), r"line 3: masks: .*nowhere is not there, expected a folder"),
    (DATA.replace("masks: masks", "masks: labels.csv"), r"line 3: masks: .*labels.csv is a file, expected a folder"),
    (DATA.replace("labels.csv", "nowhere.csv"), r"line 4: labels: .*nowhere.csv is not there, expected a file"),
    (DATA.replace("labels.csv", "images"), r"line 4: labels: .*images is a folder, expected a file"),
    (DATA.replace("labels.csv", "training.csv"), r"line 4: labels: .*training.csv, line 1: no column 'file'"),
    (DATA.replace("labels.csv", "empty.csv"), r"line 4: labels: the audit set is empty"),
    (f"{DATA}classes: [leaf]\n", r"line 4: labels: .*labels.csv, line \d+: label 'petal' is not among `classes`"),
    (f"{DATA}classes: [leaf, leaf, petal]\n", r"line 7: classes: 'leaf' stands twice: remove one"),
    (f"{DATA}attributes: [colour, colour]\n", r"line 7: attributes: 'colour' stands twice: remove one"),
    (f"{DATA}attributes:\n  - colour\n  - size\n", r"line 9: attributes.1: .*line 1: no column 'size'"),
    (DATA.replace("masks: masks\n", ""), r"line 4: object.0: masks: is not given, which region 'middle' needs"),
    ("reader: own_readers:scenes\nimages: x\n", r"line 2: images: unknown key; known are: reader"),
    ("reader: own_readers:number\n", r"line 1: reader: .*returned int, expected an AuditDataset"),
    ("reader: own_readers:fails\n", r"line 1: reader: 'own_readers:fails' raised KeyError"),
    ("reader: own_readers:exits\n", r"line 1: reader: 'own_readers:exits' raised SystemExit"),
    ("reader: own_readers:nothing\n", r"line 1: reader: .*cannot be imported \(AttributeError"),
    ("reader: own_nowhere:nothing\n", r"line 1: reader: .*cannot be imported \(ModuleNotFoundError"),
    ("reader: own_that_exits:nothing\n", r"line 1: reader: .*cannot be imported \(SystemExit"),
    ("reader: own_that_breaks:nothing\n", r"line 1: reader: .*cannot be imported \(SyntaxError"),
    ("reader: 'a:b c'\n", r"line 1: reader: expected package.module:name, got 'a:b c'"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_mistakes_name_the_file_the_line_and_the_key(planted: Path, text: str, message: str) -> None:
    path = declare(planted, text)
    with pytest.raises(ValueError, match=message) as caught:
        read_declared(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("images", [".", "photos"])
def test_of_paths_that_begin_alike_the_one_that_is_meant_is_named(tmp_path: Path, images: str) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "set").write_text("file,region,left,top,right,bottom\na.png,hair,9,1,3,4\n")
    (tmp_path / "set.csv").write_text("file,label\na.png,\n")
    path = tmp_path / "audit.yaml"
    path.write_text(f"reader: boxes\nannotations: set\nimages: {images}\nlabels: set.csv\n")
    with pytest.raises(ValueError, match=r"line 2: annotations: .*set, line 2") as caught:
        read_declared(path)
    assert f"{path}, line 4: labels: {tmp_path / 'set.csv'}, line 2: no value" in str(caught.value)


def test_images_without_any_region_need_no_masks(planted: Path) -> None:
    found = read_declared(declare(planted, "reader: folder\nimages: images\nlabels: labels.csv\n"))
    assert len(found) == 8 and found.subjects.regions == ()
    assert found.batch([0]).masks.shape[:2] == (1, 0)


def test_files_that_are_none(tmp_path: Path) -> None:
    for path, content in ((tmp_path / "no.yaml", None), (tmp_path, None), (tmp_path / "b.yaml", b"reader: \xff")):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: cannot be read"):
            read_declared(path)
    large = tmp_path / "large.yaml"
    large.write_text("reader: folder\n#" + "x" * (1 << 20))
    with pytest.raises(ValueError, match=r"large.yaml: has \d+ bytes"):
        read_declared(large)


def test_the_example_in_the_docstring_is_one() -> None:
    text = re.search(r"\n\n(    reader:.*?)\n\nLeaves", module.__doc__ or "", re.DOTALL)[1]  # type: ignore[index]
    content = yaml.safe_load(re.sub(r"^    ", "", text, flags=re.MULTILINE))
    assert module._Annotated.model_validate(content).transform[1].center_crop == [224]


def test_imported_names() -> None:
    assert imported("torch.nn:Linear", "--model") is torch.nn.Linear
    with pytest.raises(ValueError, match=r"--model: expected package.module:name, got 'torch.nn'"):
        imported("torch.nn", "--model")


def test_the_files_in_the_docs_can_be_read() -> None:
    page = (Path(__file__).parent.parent / "docs" / "run.md").read_text(encoding="utf-8")
    contents = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    assert [content["reader"] for content in contents] == ["coco", "folder", "mypackage.data:audit_set"]
    for content in contents:
        module._READERS.get(content["reader"], module._Own).model_validate(content)
