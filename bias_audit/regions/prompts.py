"""Anything that words name, found by open-vocabulary models of Hugging Face transformers.

Enters: the name or folder of a model, and prompts: a stethoscope, a white coat. Leaves: a `PromptDetector`, which gives
each image's annotations, a region for each prompt. CLIPSeg gives one mask of all that fits (Lüddecke and Ecker, 2022,
arXiv 2112.10003), SAM 3 a mask of each thing (Carion et al., 2025, arXiv 2511.16719); OWL-ViT, OWLv2 and Grounding DINO
give boxes, which hold some of what lies around, and are written as boxes.

transformers comes with the extra `prompts`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image, nms

from bias_audit.data.annotations import Annotation
from bias_audit.regions.pictures import Picture


@dataclass(frozen=True)
class Kind:
    """A kind of model: transformers' names for it and for what prepares its input, and the threshold it is run with by
    its authors. `padded` ones get the images of a batch in their own shapes, filled up to the largest."""

    model: str
    processor: str
    boxes: bool
    threshold: float
    padded: bool = False


# Of boxes for one prompt that overlap by more, the best is kept.
MOST_IOU = 0.5
# By what a model's configuration calls itself. SAM 3 is published as a model of videos, which holds that of images.
KINDS: Mapping[str, Kind] = {
    "clipseg": Kind("CLIPSegForImageSegmentation", "CLIPSegProcessor", False, 0.5),
    "sam3": Kind("Sam3Model", "Sam3Processor", False, 0.5),
    "sam3_video": Kind("Sam3Model", "Sam3Processor", False, 0.5),
    "owlvit": Kind("OwlViTForObjectDetection", "OwlViTProcessor", True, 0.1),
    "owlv2": Kind("Owlv2ForObjectDetection", "Owlv2Processor", True, 0.1),
    "grounding-dino": Kind("GroundingDinoForObjectDetection", "GroundingDinoProcessor", True, 0.25, padded=True),
    "mm-grounding-dino": Kind("MMGroundingDinoForObjectDetection", "GroundingDinoProcessor", True, 0.25, padded=True),
}


@dataclass(frozen=True)
class PromptDetector:
    """Finds what `regions`, its prompts, name, at a score above `threshold`; `made_by` says which model it is."""

    model: nn.Module
    processor: Any
    kind: Kind
    regions: tuple[str, ...]
    threshold: float
    made_by: str

    @property
    def source(self) -> str:
        """What everything it finds depends on."""
        return f"{self.made_by}; {', '.join(self.regions)}; score above {self.threshold:g}"

    def alike(self, size: tuple[int, int]) -> Hashable:
        """Images for which this is the same have the same result in a batch as alone."""
        return size if self.kind.padded else ()

    def __call__(self, pictures: Sequence[Picture]) -> list[tuple[Annotation, ...]]:
        """The annotations of each picture, in the order of the prompts, the highest score first.

        CLIPSeg's score of a mask is the mean over its pixels.
        """
        each = [self._one(pictures, prompt) for prompt in self.regions]
        return [tuple(a for some in found for a in some) for found in zip(*each, strict=True)]

    def _one(self, pictures: Sequence[Picture], prompt: str) -> list[list[Annotation]]:
        sizes = [(p.image.height, p.image.width) for p in pictures]
        # Detectors take several prompts for an image, the others one.
        text: Any = [[prompt] if self.kind.boxes else prompt] * len(pictures)
        inputs = self.processor(images=[p.image for p in pictures], text=text, return_tensors="pt")
        with torch.inference_mode():
            outputs = self.model(**inputs.to(next(self.model.parameters()).device))
            if self.kind.model.startswith("CLIPSeg"):
                found = [
                    _whole(logits, size, self.threshold) for logits, size in zip(outputs.logits, sizes, strict=True)
                ]
            elif self.kind.boxes:
                found = self.processor.post_process_grounded_object_detection(
                    outputs, threshold=self.threshold, target_sizes=sizes
                )
            else:
                found = self.processor.post_process_instance_segmentation(
                    outputs, threshold=self.threshold, target_sizes=sizes
                )
        return [self._annotations(p, prompt, one) for p, one in zip(pictures, found, strict=True)]

    def _annotations(self, picture: Picture, prompt: str, found: Mapping[str, Tensor]) -> list[Annotation]:
        source = f"{self.made_by}; prompt {prompt!r}; score above {self.threshold:g}"
        annotations = []
        places = found["scores"].argsort(descending=True, stable=True)
        if self.kind.boxes:
            # They find a thing several times, and look beyond the image's border.
            shown = clip_boxes_to_image(found["boxes"], (picture.image.height, picture.image.width))
            places = nms(shown, found["scores"], MOST_IOU)
        for place in places.tolist():
            score = float(found["scores"][place])
            if self.kind.boxes:
                box = picture.box(*found["boxes"][place].tolist())
                if box is not None:
                    annotations.append(Annotation(prompt, box, score, f"{source}; a box"))
            elif (mask := found["masks"][place].cpu().numpy() > 0).any():
                annotations.append(Annotation(prompt, picture.runs(mask), score, source))
        return annotations


def load_prompts(
    name: str, prompts: Sequence[str], device: torch.device, threshold: float | None = None
) -> PromptDetector:
    """A model of one of the `KINDS` by its folder, or by its name on the Hugging Face Hub.

    Args:
        name: of the model. What is named is loaded, but no code that lies with it is run.
        prompts: what to look for.
        device: where it runs.
        threshold: least score, 0 to 1; by default the one of its kind.

    Raises:
        ValueError: transformers is missing, there is no such model, or it is of another kind.

    Example:
        >>> cpu = torch.device("cpu")
        >>> load_prompts("CIDAS/clipseg-rd64-refined", ["stethoscope"], cpu).threshold  # doctest: +SKIP
        0.5
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ValueError("--prompt-model needs the package transformers: pip install 'bias-audit[prompts]'") from error
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(_unloaded(name, error)) from error
    kind = KINDS.get(config.model_type)
    if kind is None:
        raise ValueError(
            f"--prompt-model {name}: is of the kind {config.model_type!r}, expected one of {', '.join(KINDS)}"
        )
    try:
        model, loaded = getattr(transformers, kind.model).from_pretrained(name, output_loading_info=True)
        processor = getattr(transformers, kind.processor).from_pretrained(name)
    # Damaged files make it raise errors of many kinds, SafetensorError and JSONDecodeError among them.
    except Exception as error:
        raise ValueError(_unloaded(name, error)) from error
    # transformers would draw these at random, and go on.
    missing = sorted(set(loaded["missing_keys"]) & {name for name, _ in model.named_parameters()})
    if missing:
        raise ValueError(f"--prompt-model {name}: lacks weights ({', '.join(missing[:3])} ...): save the whole model")
    most = processor.tokenizer.model_max_length
    for prompt in prompts:
        length = len(processor.tokenizer(prompt)["input_ids"])
        if length > most:
            raise ValueError(f"prompt {prompt!r}: takes {length} tokens of {name}, which reads {most}: use fewer words")
    # The folder's name, not where on this machine it lies.
    called = Path(name).name if Path(name).is_dir() else name
    made_by = f"transformers {transformers.__version__} {kind.model} {called} (sha256 {_digest(model)[:8]})"
    least = kind.threshold if threshold is None else threshold
    return PromptDetector(model.eval().to(device), processor, kind, tuple(prompts), least, made_by)


def _whole(logits: Tensor, size: tuple[int, int], threshold: float) -> dict[str, Tensor]:
    """CLIPSeg's map of logits `(h, w)` as one mask of the image, or none."""
    scaled = nn.functional.interpolate(logits[None, None].float(), size, mode="bilinear", align_corners=False)[0]
    probabilities = scaled.sigmoid()
    masks = probabilities > threshold
    if not masks.any():
        return {"masks": masks[:0], "scores": probabilities.new_zeros(0)}
    return {"masks": masks, "scores": probabilities[masks].mean()[None]}


def _digest(model: nn.Module) -> str:
    """A fingerprint of the weights, wherever they came from."""
    digest = hashlib.sha256()
    for name, values in model.state_dict().items():
        digest.update(name.encode())
        digest.update(values.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _unloaded(name: str, error: Exception) -> str:
    said = " ".join(str(error).split())[:300]
    return (
        f"--prompt-model {name}: cannot be loaded ({said}): give the folder of a model, or, online, its name on the "
        "Hugging Face Hub"
    )
