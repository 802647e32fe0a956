"""Pictures of interventions: they are what the model saw, of the images on which it told most, and come back whole."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from bias_audit import AuditDataset, AuditPlan, AuditSample, audit_model
from bias_audit.audit import Auditor
from bias_audit.data.sheet import thumbnail
from bias_audit.evidence.changes import Changes
from bias_audit.evidence.pictures import changed_pictures
from bias_audit.evidence.removal import inpainted, widened
from bias_audit.records.errors import RecordError
from bias_audit.records.files import CHANGED
from bias_audit.records.results import AuditResult
from bias_audit.records.runs import read_run
from bias_audit.records.samples import ChangedPictures
from bias_audit.records.writing import RunDirectory

SIDE, COUNT = 24, 10
PLAN = AuditPlan(batch_size=4, fitness_samples=0, swaps={"gender": lambda sample, value: 255 - sample.image})


def person(number: int) -> AuditSample:
    image = torch.randint(40, 216, (3, SIDE, SIDE), generator=torch.Generator().manual_seed(number)).to(torch.uint8)
    regions = {name: torch.zeros(SIDE, SIDE, dtype=torch.bool) for name in ("hair", "tie")}
    regions["hair"][3:9, 4:10] = number != 3
    regions["tie"][15:20, 10:16] = True
    return AuditSample(
        image, number % 2, regions, {"gender": ("female", "male")[number // 2 % 2]}, f"portrait-{number}"
    )


@pytest.fixture(scope="module")
def people() -> AuditDataset:
    samples = [person(i) for i in range(COUNT)]
    return AuditDataset(samples, object=["tie"], spurious=["hair"], classes=["doctor", "nurse"])


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 5, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 2)
    )


@pytest.fixture(scope="module")
def audited(people: AuditDataset, net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[AuditResult, Path]:
    path = tmp_path_factory.mktemp("pictures") / "run"
    return audit_model(net, people, plan=PLAN, out=path), path


def decided(net: nn.Module, image: Tensor, label: int) -> tuple[int, float]:
    with torch.no_grad():
        logits = net(image[None].float() / 255 if not image.is_floating_point() else image[None])[0]
    return int(logits.argmax()), float(logits[label] - logits[1 - label])


def of_kind(changed: ChangedPictures, kind: str) -> list[int]:
    return [i for i, its in enumerate(changed.kinds) if its == kind]


def test_they_are_what_the_model_saw_and_decided(people: AuditDataset, net: nn.Module, audited: Any) -> None:
    changed = audited[0].changed
    assert changed is not None and changed.step == 0
    number = {name: i for i, name in enumerate(people.ids)}
    # Hair of all but the one that has none, and the user's swap of all.
    assert len(of_kind(changed, "removal")) == COUNT - 1 and len(of_kind(changed, "swap")) == COUNT
    for i, name in enumerate(changed.ids):
        sample = person(number[name])
        image = sample.image
        assert isinstance(image, Tensor)
        if changed.kinds[i] == "removal":
            assert (changed.regions[i], changed.attributes[i], changed.values[i]) == ("hair", "", "")
            expected = inpainted(image, widened(sample.regions["hair"].numpy()))
        else:
            others = {"female": "male", "male": "female"}
            assert (changed.regions[i], changed.attributes[i]) == ("", "gender")
            assert changed.values[i] == others[str(sample.attributes["gender"])]
            expected = 255 - image
        assert changed.pictures[i] == thumbnail(expected)
        before, after = decided(net, image, sample.label), decided(net, expected, sample.label)
        assert changed.decisions[i] == after[0]
        assert changed.falls[i] == pytest.approx(before[1] - after[1], abs=1e-4)


def test_those_that_told_most_come_first_and_no_more_than_asked_for(people: AuditDataset) -> None:
    changes = Changes(people, 1, 0, {}, (), 0)
    for index in range(COUNT):
        list(changes.pictures(index))
    generator = np.random.default_rng(0)
    margins = generator.normal(size=(COUNT, len(changes.list)))
    margins[5, 1] = margins[5, 0] - 50
    margins[3, 1:] = np.nan
    decisions = generator.integers(0, 2, margins.shape)
    found = changed_pictures(changes, people.ids, people.subjects, decisions, margins, 7, most=3)
    removed = of_kind(found, "removal")
    falls = {name: margins[i, 0] - margins[i, 1] for i, name in enumerate(people.ids) if i != 3}
    expected = sorted(falls, key=lambda name: -abs(falls[name]))[:3]
    assert [found.ids[i] for i in removed] == expected and expected[0] == "portrait-5"
    assert found.step == 7 and "portrait-3" not in found.ids
    assert all(np.isfinite(found.falls))


def test_records_give_them_back(audited: Any) -> None:
    result, path = audited
    back = read_run(path).changed()
    assert back is not None
    for name, value in vars(result.changed).items():
        np.testing.assert_array_equal(getattr(back, name), value)
    assert Image.open(io.BytesIO(back.pictures[0])).size == (SIDE, SIDE)


def test_an_audit_without_interventions_has_none(people: AuditDataset, net: nn.Module, tmp_path: Path) -> None:
    result = audit_model(net, people, plan=replace(PLAN, intervention_samples=0), out=tmp_path / "run")
    assert result.changed is None
    assert read_run(tmp_path).changed() is None and not (tmp_path / "run" / CHANGED).exists()


def test_a_resumed_run_keeps_those_of_its_own_past_only(people: AuditDataset, net: nn.Module, tmp_path: Path) -> None:
    auditor = Auditor(people, PLAN)
    results = [auditor.run(net, step=step) for step in (10, 20)]
    manifest = auditor.manifest(net)
    directory = RunDirectory.create(tmp_path / "run", manifest, auditor.sheet)
    for result in results:
        directory.append(result)
    for step, kept in ((10, None), (20, 20)):
        for path in (tmp_path / f"copy-{step}", tmp_path / "run"):
            if path == tmp_path / "run" and kept is None:
                continue
            RunDirectory.resume(path, tmp_path / "run", manifest, auditor.sheet, step)
            changed = read_run(path).changed()
            assert (changed and changed.step) == kept
    RunDirectory.resume(tmp_path / "run", tmp_path / "run", manifest, auditor.sheet, 10)
    assert read_run(tmp_path / "run").changed() is None


def test_a_damaged_file_is_named(audited: Any, tmp_path: Path) -> None:
    path = audited[1] / CHANGED
    content = path.read_bytes()
    path.write_bytes(content[:-30])
    try:
        with pytest.raises(RecordError, match=r"changed\.npz: is not a whole \.npz file"):
            read_run(audited[1]).changed()
    finally:
        path.write_bytes(content)
