"""The audit set: batches, transforms, subsets, and what it refuses."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from annotated_images import (
    HEIGHT,
    ONE_MASK,
    WIDTH,
    Items,
    annotation,
    block,
    noise,
    picture,
    rectangle,
    sample,
    write_coco,
)
from hypothesis import given
from hypothesis import strategies as st
from torchvision import transforms as v1
from torchvision import tv_tensors
from torchvision.models import ResNet18_Weights
from torchvision.transforms import v2

from bias_audit.data.dataset import AuditDataset
from bias_audit.data.samples import AuditSample, Decoded, PendingSample
from bias_audit.data.sheet import describe
from bias_audit.data.stratified import shares


def global_states() -> tuple[Any, ...]:
    # The global generators are what is looked at.
    numpy = np.random.get_state(legacy=False)["state"]  # noqa: NPY002
    return random.getstate(), numpy["key"].tolist(), numpy["pos"], torch.get_rng_state().tolist()


def drawing(seed: int) -> Callable[[], tuple[torch.Tensor, dict[str, Any]]]:
    """An item that draws from all three global generators."""

    def item() -> tuple[torch.Tensor, dict[str, Any]]:
        drawn = int(torch.randint(5, ())) + int(np.random.randint(5)) + random.randrange(5)  # noqa: NPY002
        return noise(seed) // 2 + drawn, {"label": 0, "masks": ONE_MASK}

    return item


def test_a_random_transform_draws_once_and_leaves_the_global_generators_alone() -> None:
    transform = v2.Compose(
        [v2.RandomCrop(20), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4), v2.ToDtype(torch.float32)]
    )
    samples = [sample(i) for i in range(6)]
    before = global_states()
    audit_set = AuditDataset(samples, object=["tie"], transform=transform, cache_bytes=0)
    first = audit_set.batch([0, 1, 2, 3, 4, 5])
    again = AuditDataset(samples, object=["tie"], transform=transform).batch([5, 3])
    assert global_states() == before
    assert torch.equal(audit_set.batch([0, 1, 2, 3, 4, 5]).images, first.images)
    assert torch.equal(again.images, first.images[[5, 3]]) and torch.equal(again.masks, first.masks[[5, 3]])
    # It is random all the same: a constant crop would show the same part of the same picture.
    same = [AuditSample(noise(0), 0, {"tie": block(0, 0, 9, 9)}, {}, str(i)) for i in range(6)]
    crops = AuditDataset(same, object=["tie"], transform=transform).batch(range(6)).images
    assert len({tuple(crop.flatten().tolist()) for crop in crops}) > 1


def test_a_dataset_that_draws_leaves_the_global_generators_alone_and_gives_the_same_each_time() -> None:
    before = global_states()
    audit_set = AuditDataset.from_dataset(
        Items([drawing(i) for i in range(4)]), regions=["tie"], object=["tie"], cache_bytes=0
    )
    first = audit_set.batch([0, 1, 2, 3]).images
    assert torch.equal(audit_set.batch([3, 1]).images, first[[3, 1]])
    assert global_states() == before


@pytest.mark.parametrize("resize", [v2.Resize((60, 80), v2.InterpolationMode.NEAREST), v2.Resize((60, 80))])
def test_image_and_mask_move_together(resize: v2.Transform) -> None:
    mask = block(4, 3, 17, 12)
    image = mask.to(torch.uint8).mul(255).expand(3, -1, -1)
    transform = v2.Compose([resize, v2.CenterCrop((50, 70)), v2.RandomHorizontalFlip(1.0), v2.Pad(3)])
    audit_set = AuditDataset([AuditSample(image, 0, {"tie": mask}, {}, "a")], object=["tie"], transform=transform)
    batch = audit_set.batch([0])
    # Twice as large, less 5 at each side, mirrored, 3 more at each side.
    expected = block(4 * 2 - 5 + 3, 73 - (12 * 2 - 5), 17 * 2 - 5 + 3, 73 - (3 * 2 - 5), 56, 76)
    assert torch.equal(batch.masks[0, 0], expected)
    assert torch.equal(batch.images[0, 0] > 0.5, expected)


@pytest.mark.parametrize(
    "transform",
    [
        v2.Compose(
            [
                v2.Resize(24),
                v2.CenterCrop(20),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([0.4] * 3, [0.2] * 3),
            ]
        ),
        v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Resize(24), v2.Normalize([0.4] * 3, [0.2] * 3)]),
        v2.Compose([v2.Resize(24), v2.ConvertImageDtype(torch.float32), v2.ToPureTensor()]),
        v2.Compose([v2.ToDtype(torch.float32)]),
        v2.ToDtype(torch.float32, scale=True),
    ],
)
def test_a_batch_is_what_the_whole_transform_makes_of_each_image(transform: v2.Transform) -> None:
    audit_set = AuditDataset([sample(i) for i in range(3)], object=["tie"], transform=transform)
    expected = [transform(tv_tensors.Image(noise(i))).as_subclass(torch.Tensor) for i in range(3)]
    batch = audit_set.batch([0, 1, 2])
    torch.testing.assert_close(batch.images, torch.stack(expected), rtol=0, atol=1e-6)
    assert type(batch.images) is torch.Tensor and batch.images.dtype == torch.float32
    assert batch.masks.dtype == torch.bool and batch.masks.shape[-2:] == batch.images.shape[-2:]


@pytest.mark.filterwarnings("ignore:.*ToTensor.*")
def test_to_tensor_scales_although_the_image_is_a_tensor_by_then() -> None:
    transform = v2.Compose([v2.Resize(24), v2.ToTensor(), v2.Normalize([0.4] * 3, [0.2] * 3)])
    audit_set = AuditDataset([sample(0)], object=["tie"], transform=transform)
    resized = v2.functional.resize(noise(0), [24])
    torch.testing.assert_close(audit_set.batch([0]).images[0], (resized / 255 - 0.4) / 0.2)


def test_a_weights_preset_is_applied_to_image_and_mask() -> None:
    preset = ResNet18_Weights.DEFAULT.transforms()
    mask = block(30, 20, 200, 150, 300, 400)
    audit_set = AuditDataset([sample(0, mask)], object=["tie"], transform=preset)
    batch = audit_set.batch([0])
    # One grey level: v1 rounds after resizing in floats, v2 resizes integers.
    torch.testing.assert_close(batch.images[0], preset(noise(0, 300, 400)), rtol=0, atol=1.01 / 255 / min(preset.std))
    marked = AuditSample(mask.to(torch.uint8).mul(255).expand(3, -1, -1), 0, {"tie": mask}, {}, "a")
    moved = AuditDataset([marked], object=["tie"], transform=preset).batch([0])
    bright = preset(marked.image)[0] > 0
    assert (bright ^ moved.masks[0, 0]).float().mean() < 0.01 and bright.any()


def test_pictures_of_one_size_need_no_transform_and_masks_keep_their_order() -> None:
    regions = {"tie": block(0, 0, 5, 5), "hair": block(6, 6, 9, 9), "unnamed": block(0, 0, 30, 40)}
    both = AuditSample(picture(4).convert("L"), 1, regions, {}, "both")
    audit_set = AuditDataset([both], object=["hair"], context=["tie"])
    batch = audit_set.batch([0])
    assert torch.equal(batch.masks[0], torch.stack([regions["hair"], regions["tie"]]))
    assert torch.equal(batch.images[0, 0], batch.images[0, 2]) and batch.labels.tolist() == [1]


def counted(i: int, reads: list[int]) -> PendingSample:
    def decode() -> Decoded:
        reads.append(i)
        return noise(i), {"tie": block(2, 3, 10, 12)}

    return PendingSample(0, {}, f"s{i}", decode)


@pytest.mark.parametrize(("room", "second_pass"), [(5, 0), (2, 3), (0, 5)])
def test_images_are_decoded_once_as_far_as_they_fit(room: int, second_pass: int) -> None:
    reads: list[int] = []
    each = (3 + 1) * HEIGHT * WIDTH
    audit_set = AuditDataset([counted(i, reads) for i in range(5)], object=["tie"], cache_bytes=room * each)
    assert not reads
    first = audit_set.batch(range(5))
    assert sorted(reads) == [0, 1, 2, 3, 4]
    second = audit_set.batch(range(5))
    assert len(reads) == 5 + second_pass
    assert torch.equal(first.images, second.images) and torch.equal(first.masks, second.masks)


def test_a_kept_crop_does_not_keep_the_picture() -> None:
    audit_set = AuditDataset([sample(0)], object=["tie"], transform=v2.CenterCrop(8))
    audit_set.batch([0])
    (kept,) = audit_set._cache.values()
    assert kept.image.untyped_storage().nbytes() + kept.masks.untyped_storage().nbytes() == 4 * 8 * 8


def test_an_audit_set_of_files_can_be_pickled(tmp_path: Path) -> None:
    # Processes that are spawned, not forked, get a copy.
    files = write_coco(tmp_path, [annotation(5, rectangle(0, 0, 9, 9))])
    audit_set = AuditDataset.from_coco(
        **files, object=["tie"], transform=v2.Compose([v2.Resize(20), v2.ToDtype(torch.float32)])
    )
    copy = pickle.loads(pickle.dumps(audit_set))
    assert torch.equal(copy.batch([0, 1]).images, audit_set.batch([0, 1]).images)
    assert describe(copy).fingerprint == describe(audit_set).fingerprint


def cells_of(audit_set: AuditDataset) -> dict[tuple[int, str], int]:
    counts: dict[tuple[int, str], int] = {}
    for label, (gender,) in zip(audit_set.labels.tolist(), audit_set.attribute_table.tolist(), strict=True):
        counts[label, gender] = counts.get((label, gender), 0) + 1
    return counts


def test_a_subset_is_stratified_and_depends_on_the_seed_alone() -> None:
    sizes = {(0, "m"): 120, (0, "f"): 40, (1, "m"): 38, (1, "f"): 2}
    cells = [cell for cell, n in sizes.items() for _ in range(n)]
    random.Random(0).shuffle(cells)
    samples = [
        PendingSample(label, {"gender": g}, f"s{i}", lambda: (noise(0), {})) for i, (label, g) in enumerate(cells)
    ]
    audit_set = AuditDataset(samples, object=["tie"])
    before = global_states()
    drawn = audit_set.subset(50, seed=3)
    assert global_states() == before
    assert cells_of(drawn) == {(0, "m"): 30, (0, "f"): 10, (1, "m"): 9, (1, "f"): 1}
    assert drawn.ids == audit_set.subset(50, seed=3).ids != audit_set.subset(50, seed=4).ids
    assert len(set(drawn.ids)) == 50 and list(drawn.ids) == sorted(drawn.ids, key=audit_set.ids.index)
    assert set(cells_of(audit_set.subset(4, seed=0)).values()) == {1}
    assert len(audit_set.subset(1, seed=0)) == 1
    assert audit_set.subset(200, seed=0).ids == audit_set.ids
    assert drawn.subjects == audit_set.subjects
    with pytest.raises(ValueError, match="at least 1, got 0"):
        audit_set.subset(0, seed=0)


def test_a_subset_holds_the_same_images(tmp_path: Path) -> None:
    audit_set = AuditDataset([sample(i, label=i % 2) for i in range(9)], object=["tie"])
    whole = audit_set.batch(range(9))
    drawn = audit_set.subset(4, seed=1)
    places = [audit_set.ids.index(i) for i in drawn.ids]
    assert torch.equal(drawn.batch(range(4)).images, whole.images[places])


@given(st.data())
def test_shares(data: st.DataObject) -> None:
    sizes = np.array(data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=12)), dtype=np.int64)
    total = data.draw(st.integers(1, int(sizes.sum())))
    quota = shares(sizes, total)
    exact = sizes * total / sizes.sum()
    assert quota.sum() == total
    assert (quota >= 0).all() and (quota <= sizes).all()
    if total >= len(sizes):
        assert (quota >= 1).all()
    if exact.min() >= 1 or total < len(sizes):
        assert (np.abs(quota - exact) < 1 + 1e-9).all()
    larger = sizes[:, None] > sizes[None, :]
    assert (quota[:, None] - quota[None, :])[larger].min(initial=0) >= -1


@pytest.mark.parametrize(
    ("samples", "arguments", "says"),
    [
        ([], {}, "the audit set is empty"),
        ([sample(0), sample(1), sample(0)], {}, "sample id 's0' occurs more than once"),
        ([sample(0)], {"spurious": ["tie"]}, "region 'tie' is named in more than one role"),
        ([sample(0)], {"spurious": "tie"}, r"write \['tie'\]"),
        ([sample(0)], {"spurious": ["remainder"]}, "'remainder': the name is taken"),
        ([sample(0)], {"object": []}, "no region has a role"),
        ([sample(0), sample(1, label=2)], {"classes": ["a", "b"]}, "sample 's1': label 2 has no name"),
        ([sample(0, label=-1)], {}, "sample 's0': expected a class index"),
        ([sample(0, gender="f")], {"attributes": ["gander"]}, r"unknown attribute 'gander'.*\['gender'\]"),
        ([sample(0)], {"transform": v1.Compose([v1.Resize(8)])}, "transforms.v2, got torchvision.transforms.Compose"),
        ([sample(0)], {"transform": v1.Resize(8)}, "transforms.v2, got torchvision.transforms.Resize"),
        ([sample(0)], {"transform": v2.Compose([v1.Resize(8)])}, "transforms.v2, got torchvision.transforms.Resize"),
    ],
)
def test_a_wrong_audit_set_says_what_is_wrong(samples: list[AuditSample], arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        AuditDataset(samples, **{"object": ["tie"], **arguments})


@pytest.mark.parametrize(
    ("wrong", "arguments", "says"),
    [
        (
            AuditSample(noise(1), 0, {"tie": block(0, 0, 5, 5, 30, 41)}, {}, "s1"),
            {},
            r"mask of region 'tie' is \(30, 41\)",
        ),
        (AuditSample(noise(1) / 255, 0, {}, {}, "s1"), {}, r"uint8 tensor \(3, H, W\), got torch.float32"),
        (AuditSample(noise(1)[:1], 0, {}, {}, "s1"), {}, r"got torch.uint8 \(1, 30, 40\)"),
        (sample(1, block(0, 0, 5, 5, 31, 40)), {}, r"expected the size \(3, 30, 40\) of sample 's0'.*that resizes"),
        (sample(1), {"transform": lambda image, masks: (image[:, :9], masks)}, "must move both together"),
    ],
)
def test_a_wrong_sample_is_named_when_its_batch_is_made(
    wrong: AuditSample, arguments: dict[str, Any], says: str
) -> None:
    audit_set = AuditDataset([sample(0), wrong], object=["tie"], **arguments)
    with pytest.raises(ValueError, match=rf"sample 's[01]': .*{says}"):
        audit_set.batch([0, 1])


def test_sizes_may_differ_where_the_transform_makes_them_one() -> None:
    samples = [sample(0), sample(1, block(3, 3, 40, 40, 50, 60))]
    batch = AuditDataset(samples, object=["tie"], transform=v2.Resize((16, 16))).batch([0, 1])
    assert batch.images.shape == (2, 3, 16, 16) and batch.masks.flatten(2).any(2).all()
