"""Regions that words name: what open-vocabulary models find is where they find it, in masks or in boxes."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import transformers
import wired
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from bias_audit.cli import app
from bias_audit.data.annotations import Annotation, Box
from bias_audit.data.formats.known import read_annotations
from bias_audit.data.outlines import mask_of
from bias_audit.regions.pictures import opened
from bias_audit.regions.prompts import KINDS, load_prompts

CPU = torch.device("cpu")
TEXT = {
    "vocab_size": 54,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "bos_token_id": 52,
    "eos_token_id": 53,
    "pad_token_id": 53,
    "projection_dim": 16,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
SQUARE = {"height": 32, "width": 32}


def tokenizer(folder: Path) -> Any:
    """CLIP's, of single letters."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def clipseg(folder: Path) -> tuple[nn.Module, Any]:
    config = transformers.CLIPSegConfig(
        text_config=TEXT,
        vision_config=VISION,
        projection_dim=16,
        extract_layers=[0, 1, 2],
        reduce_dim=8,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    images = transformers.ViTImageProcessor(size=SQUARE)
    return transformers.CLIPSegForImageSegmentation(config), transformers.CLIPSegProcessor(images, tokenizer(folder))


def owl(version: str, folder: Path) -> tuple[nn.Module, Any]:
    config = getattr(transformers, f"{version}Config")(text_config=TEXT, vision_config=VISION, projection_dim=16)
    images = getattr(transformers, f"{version}ImageProcessor")(size=SQUARE)
    processor = getattr(transformers, f"{version}Processor")(images, tokenizer(folder))
    return getattr(transformers, f"{version}ForObjectDetection")(config), processor


def sam3_config() -> Any:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_layers": 1, "num_attention_heads": 2}
    backbone = {
        "model_type": "sam3_vit_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        "window_size": 2,
        "global_attn_indexes": [1],
        "pretrain_image_size": 28,
    }
    return transformers.Sam3Config(
        vision_config={
            "backbone_config": backbone,
            "fpn_hidden_size": 16,
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        },
        text_config={**TEXT, "max_position_embeddings": 32, "model_type": "clip_text_model"},
        geometry_encoder_config=small,
        detr_encoder_config=small,
        detr_decoder_config={**small, "num_queries": 6},
        mask_decoder_config={"hidden_size": 16, "num_attention_heads": 2},
    )


def sam3(folder: Path) -> tuple[nn.Module, Any]:
    images = transformers.Sam3ImageProcessor(size={"height": 56, "width": 56})
    return transformers.Sam3Model(sam3_config()), transformers.Sam3Processor(images, tokenizer(folder))


def grounding(version: str, folder: Path) -> tuple[nn.Module, Any]:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "a", "tie", "dog"]
    (folder / "words.txt").write_text("\n".join(words))
    resnet = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    bert = transformers.BertConfig(
        vocab_size=10, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    config = getattr(transformers, f"{version}Config")(
        backbone_config=resnet,
        text_config=bert,
        num_queries=5,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
    )
    images = transformers.GroundingDinoImageProcessor(size={"shortest_edge": 96, "longest_edge": 160})
    tokens = transformers.BertTokenizer(str(folder / "words.txt"))
    return getattr(transformers, f"{version}ForObjectDetection")(config), transformers.GroundingDinoProcessor(
        images, tokens
    )


MAKERS: dict[str, Callable[[Path], tuple[nn.Module, Any]]] = {
    "clipseg": clipseg,
    "sam3": sam3,
    "owlvit": partial(owl, "OwlViT"),
    "owlv2": partial(owl, "Owlv2"),
    "grounding-dino": partial(grounding, "GroundingDino"),
    "mm-grounding-dino": partial(grounding, "MMGroundingDino"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes a small model of a kind, with weights drawn at random, and saves it; once for each kind."""
    root = tmp_path_factory.mktemp("models")

    def make(kind: str) -> Path:
        folder = root / kind
        if not folder.exists():
            folder.mkdir()
            torch.manual_seed(0)
            model, processor = MAKERS[kind](folder)
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
        return folder

    return make


def pictures(folder: Path) -> list[Path]:
    """Two alike and one of another shape."""
    paths = [folder / name for name in ("a.png", "b.png", "c.png")]
    for path, scale, size in zip(paths, (1.0, 1.0, 0.5), ((80, 96), (80, 96), (96, 96)), strict=True):
        image = wired.person(scale, size=size)
        (image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).rotate(20) if path.name == "b.png" else image).save(path)
    return paths


@cache
def loaded(folder: Path, kind: str) -> tuple[Any, Any]:
    model = getattr(transformers, KINDS[kind].model).from_pretrained(folder).eval()
    return model, getattr(transformers, KINDS[kind].processor).from_pretrained(folder)


def as_by_hand(folder: Path, kind: str, path: Path, prompt: str, threshold: float) -> list[tuple[float, Any]]:
    """What a model finds in one image, by its own documentation, the highest score first: a mask, or edges."""
    model, processor = loaded(folder, kind)
    image = Image.open(path).convert("RGB")
    with torch.no_grad():
        if kind == "clipseg":
            logits = model(**processor(images=[image], text=[prompt], return_tensors="pt")).logits.squeeze().numpy()
            mask = 1 / (1 + np.exp(-cv2.resize(logits, image.size, interpolation=cv2.INTER_LINEAR)))
            return [(float(mask[mask > threshold].mean()), mask > threshold)] if (mask > threshold).any() else []
        if kind == "sam3":
            inputs = processor(images=image, text=prompt, return_tensors="pt")
            found = processor.post_process_instance_segmentation(
                model(**inputs), threshold=threshold, target_sizes=inputs["original_sizes"].tolist()
            )[0]
            pairs = [(float(s), m.numpy() > 0) for s, m in zip(found["scores"], found["masks"], strict=True)]
            return sorted((pair for pair in pairs if pair[1].any()), key=lambda pair: -pair[0])
        detector = transformers.pipeline(
            "zero-shot-object-detection",
            model=model,
            tokenizer=processor.tokenizer,
            image_processor=processor.image_processor,
            processor=processor,
        )
        # Grounding DINO is trained on phrases that end so; its processor adds what the pipeline does not.
        words = f"{prompt}." if KINDS[kind].padded else prompt
        boxes = [(one["score"], one["box"]) for one in detector(image, candidate_labels=[words], threshold=threshold)]
        return sorted(boxes, key=lambda pair: -pair[0])


@pytest.mark.parametrize(
    "kind",
    [
        "clipseg",
        pytest.param("sam3", marks=pytest.mark.newest("transformers 5.0 calls classes of SAM 3 otherwise")),
        "owlv2",
        pytest.param("owlvit", marks=pytest.mark.slow),
        pytest.param("grounding-dino", marks=pytest.mark.slow),
        pytest.param("mm-grounding-dino", marks=pytest.mark.slow),
    ],
)
def test_what_the_model_finds_by_hand(kind: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder, paths = saved(kind), pictures(tmp_path)
    threshold = {"clipseg": 0.5, "owlvit": 1e-6}.get(kind, 0.01)
    detector = load_prompts(str(folder), ["a tie", "dog"], CPU, threshold)
    found = detector([opened(path) for path in paths[:2]]) + detector([opened(paths[2])])
    total = 0
    for path, things in zip(paths, found, strict=True):
        size = opened(path).size
        for prompt in ("a tie", "dog"):
            own = [a for a in things if a.region == prompt]
            by_hand = as_by_hand(folder, kind, path, prompt, threshold)
            total += len(own)
            if not KINDS[kind].boxes:
                assert len(own) == len(by_hand)
                for a, (score, mask) in zip(own, by_hand, strict=True):
                    assert a.score == pytest.approx(score, abs=1e-4)
                    assert (mask_of(a.outline, size) != mask).mean() < 0.002
                continue
            # Of those that lie on each other the best is kept; the others lie where it lies.
            assert 0 < len(own) <= len(by_hand)
            edges = [clipped(box, size) for _, box in by_hand]
            for a in own:
                assert isinstance(a.outline, Box) and a.source.endswith("; a box")
                at = next(i for i, (score, _) in enumerate(by_hand) if abs(score - (a.score or 0)) < 1e-3)
                box = (a.outline.left, a.outline.top, a.outline.right, a.outline.bottom)
                # The pipeline gives whole pixels.
                assert any(np.abs(np.subtract(box, edge)).max() <= 1 for edge in edges[at:])
            for a, b in ((a, b) for a in own for b in own if a is not b):
                assert overlap(a, b) <= 0.5
    assert total


def clipped(box: dict[str, int], size: tuple[int, int]) -> tuple[int, ...]:
    (height, width), names = size, ("xmin", "ymin", "xmax", "ymax")
    return tuple(min(max(box[n], 0), most) for n, most in zip(names, (width, height) * 2, strict=True))


def overlap(a: Annotation, b: Annotation) -> float:
    one, two = a.outline, b.outline
    assert isinstance(one, Box) and isinstance(two, Box)
    width = max(0.0, min(one.right, two.right) - max(one.left, two.left))
    height = max(0.0, min(one.bottom, two.bottom) - max(one.top, two.top))
    areas = sum((box.right - box.left) * (box.bottom - box.top) for box in (one, two))
    return width * height / (areas - width * height)


@pytest.mark.parametrize("kind", ["clipseg", pytest.param("grounding-dino", marks=pytest.mark.slow)])
def test_in_a_large_file_what_is_found_has_its_size(kind: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    large, shrunk = tmp_path / "large.png", tmp_path / "shrunk.png"
    Image.effect_noise((512, 40), 90).convert("RGB").resize((4096, 320)).save(large)
    opened(large).image.save(shrunk)
    detector = load_prompts(str(saved(kind)), ["dog"], CPU, 0.3)
    [found], [looked_at] = detector([opened(large)]), detector([opened(shrunk)])
    assert opened(shrunk).size == (160, 2048) and len(found) == len(looked_at) > 0
    for a, b in zip(found, looked_at, strict=True):
        if isinstance(a.outline, Box) and isinstance(b.outline, Box):
            sides = ("left", "top", "right", "bottom")
            assert [getattr(a.outline, side) for side in sides] == [2 * getattr(b.outline, side) for side in sides]
        else:
            assert (
                mask_of(a.outline, (320, 4096)) == np.kron(mask_of(b.outline, (160, 2048)), np.ones((2, 2), dtype=bool))
            ).all()


@pytest.mark.newest("transformers 5.0 calls classes of SAM 3 otherwise")
def test_the_model_of_videos_holds_that_of_images(saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder = saved("sam3")
    transformers.Sam3VideoConfig(detector_config=sam3_config().to_dict()).save_pretrained(tmp_path)
    transformers.Sam3Processor.from_pretrained(folder).save_pretrained(tmp_path)
    weights = {f"detector_model.{name}": values for name, values in load_file(folder / "model.safetensors").items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    one, two = load_prompts(str(folder), ["dog"], CPU), load_prompts(str(tmp_path), ["dog"], CPU)
    assert one.made_by.split("(")[1] == two.made_by.split("(")[1] and one.threshold == 0.5


def test_the_command_mixes_people_and_prompts(saved: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    pictures(tmp_path / "images")
    weights, out = wired.write_weights(tmp_path, wired.MASKS), tmp_path / "regions.json"
    command = ["regions", "propose", str(tmp_path / "images"), "--using", "person,prompt:a tie", "-o", str(out)]
    command += ["--prompt-model", str(saved("owlv2")), "--prompt-score", "0.01", "--size", "96"]
    done = CliRunner().invoke(app, [*command, "--weights", str(weights[0])])
    assert done.exit_code == 0 and done.stdout.endswith(f"{out}\n"), done.output
    assert "A box holds some of what lies around" in done.stdout
    annotations = read_annotations(out)
    assert annotations.regions == ("person", "a tie")
    for image in annotations.images:
        assert {a.region for a in image.annotations} == {"person", "a tie"}
        for a in image.annotations:
            assert isinstance(a.outline, Box) == (a.region == "a tie")
            wanted = "Owlv2ForObjectDetection owlv2 (sha256 " if a.region == "a tie" else "maskrcnn_resnet50_fpn_v2"
            assert wanted in a.source and "score above 0." in a.source
    # In a folder, other weights are another model.
    detectors = []
    for scale in (1, 2):
        folder = tmp_path / f"model{scale}"
        folder.mkdir()
        for file in saved("owlv2").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        state = {name: values * scale for name, values in load_file(folder / "model.safetensors").items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        detectors.append(load_prompts(str(folder), ["dog"], CPU))
    assert detectors[0].source.split("(")[1] != detectors[1].source.split("(")[1]


@pytest.mark.newest("transformers 5.0 says otherwise what is wrong")
def test_models_that_cannot_be_used(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(name: Path | str, prompt: str = "dog") -> str:
        with pytest.raises(ValueError, match=r".") as caught:
            load_prompts(str(name), [prompt], CPU)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def copied(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file in saved("clipseg").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    (tmp_path / "empty").mkdir()
    assert "cannot be loaded" in said(tmp_path / "empty")
    other = tmp_path / "bert"
    transformers.BertConfig().save_pretrained(other)
    assert "is of the kind 'bert', expected one of clipseg, sam3" in said(other)
    torn = copied("torn")
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:999])
    assert "cannot be loaded" in said(torn)
    part = copied("part")
    weights = {n: v for n, v in load_file(part / "model.safetensors").items() if not n.startswith("decoder")}
    save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
    assert "part: lacks weights (decoder." in said(part)
    long = said(saved("clipseg"), "a very long prompt")
    assert "takes 17 tokens of" in long and "which reads 16: use fewer words" in long
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "give the folder of a model, or, online, its name" in said("nobody/has-this-model")
