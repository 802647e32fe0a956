"""torchvision's own detectors with weights set by hand, so that they find one person drawn in known colours.

Every layer passes colours on: a channel is active where the image has one of 18 colours. 17 are the keypoints', the
last is the body's. The region proposals are the whole image, which is a person's box where any colour is seen; her
mask is where one is.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torchvision.models import get_model

GREY, RADIUS, COLOURS = 0.5, 0.45, 18
BODY = COLOURS - 1
# To so many pixels the detectors scale an image's shorter side: few, and quickly.
SIZE = 96
MASKS, KEYPOINTS = "maskrcnn_resnet50_fpn_v2", "keypointrcnn_resnet50_fpn"
# COCO's order: nose, eyes, ears, shoulders, elbows, wrists, hips, knees, ankles; each left, right. For a picture of
# 96 x 96; the person's left is the viewer's right.
POSE = (
    *((48, 20), (52, 16), (44, 16), (57, 18), (39, 18), (62, 36), (34, 36), (72, 50), (24, 50)),
    *((78, 64), (18, 64), (57, 66), (39, 66), (58, 78), (38, 78), (58, 90), (38, 90)),
)


def directions() -> Tensor:
    """18 directions `(18, 3)` spread over a sphere (a Fibonacci lattice)."""
    place = torch.arange(COLOURS) + 0.5
    up = 1 - 2 * place / COLOURS
    turn = place * torch.pi * (1 + 5**0.5)
    return torch.stack([turn.cos() * (1 - up**2).sqrt(), turn.sin() * (1 - up**2).sqrt(), up], dim=1)


def colour(index: int) -> tuple[int, int, int]:
    red, green, blue = (255 * (GREY + RADIUS * directions()[index])).round().int().tolist()
    return red, green, blue


def person(
    scale: float = 1.0, seen: tuple[int, ...] = tuple(range(17)), size: tuple[int, int] = (96, 96)
) -> Image.Image:
    """A person on grey, `size` (height, width) times `scale`, with the keypoints `seen` as dots."""
    grey = round(255 * GREY)
    image = Image.new("RGB", (round(size[1] * scale), round(size[0] * scale)), (grey, grey, grey))
    draw = ImageDraw.Draw(image)
    body = colour(BODY)

    def at(*numbers: float) -> list[float]:
        return [number * scale for number in numbers]

    draw.ellipse(at(34, 2, 62, 30), fill=body)
    draw.rectangle(at(30, 28, 66, 70), fill=body)
    draw.line(at(64, 36, 76, 52, 79, 66), fill=body, width=round(9 * scale))
    draw.line(at(32, 36, 20, 52, 17, 66), fill=body, width=round(9 * scale))
    draw.rectangle(at(33, 68, 46, 94), fill=body)
    draw.rectangle(at(50, 68, 63, 94), fill=body)
    for index in seen:
        x, y = POSE[index]
        draw.ellipse(at(x - 1.7, y - 1.7, x + 1.7, y + 1.7), fill=colour(index))
    return image


def silhouette(image: Image.Image) -> np.ndarray:
    """Where the picture is not grey."""
    return (np.abs(np.asarray(image, dtype=int) - round(255 * GREY)) > 20).any(axis=2)


def nobody(size: tuple[int, int] = (96, 96)) -> Image.Image:
    return Image.new("RGB", size[::-1], (round(255 * GREY),) * 3)


@cache
def detector(architecture: str) -> nn.Module:
    model = get_model(architecture, weights=None, weights_backbone=None)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.fill_(1.0)
            elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                module.weight.zero_()
                if module.bias is not None:
                    module.bias.zero_()
        body = model.backbone.body
        # The transform has taken ImageNet's mean and divided by its deviation; 0.75 tells neighbouring colours apart.
        mean, std = torch.tensor(model.transform.image_mean), torch.tensor(model.transform.image_std)
        seen_as = directions() * std / RADIUS
        body.conv1.weight[:BODY, :, 3, 3] = seen_as[:BODY]
        # The mean over 5 x 5 pixels takes from the body's edge what the pooling after it adds.
        body.conv1.weight[BODY, :, 1:6, 1:6] = seen_as[BODY, :, None, None] / 25
        body.bn1.bias[:COLOURS] = directions() @ (mean - GREY) / RADIUS - 0.75
        for conv in (body.layer1[0].downsample[0], *_convolutions(model)):
            _pass(conv)
        # The largest box that there may be, cut to the image.
        model.rpn.head.bbox_pred.bias.view(-1, 4)[:, 2:] = 10.0
        heads = model.roi_heads
        first, *more = [m for m in heads.box_head.modules() if isinstance(m, nn.Linear)]
        first.weight.view(first.out_features, -1, 7, 7)[0, :COLOURS] = 1.0
        for linear in more:
            linear.weight[0, 0] = 1.0
        heads.box_predictor.cls_score.weight[1, 0] = 10.0
        heads.box_predictor.cls_score.bias[:] = -10.0
        heads.box_predictor.cls_score.bias[0] = 1.0
        if heads.mask_predictor is not None:
            heads.mask_predictor.conv5_mask.weight[range(COLOURS), range(COLOURS)] = 1.0
            heads.mask_predictor.mask_fcn_logits.weight[1, :COLOURS] = 50.0
            heads.mask_predictor.mask_fcn_logits.bias[1] = -4.0
        else:
            tent = torch.tensor([0.25, 0.75, 0.75, 0.25])
            heads.keypoint_predictor.kps_score_lowres.weight[range(17), range(17)] = 100.0 * torch.outer(tent, tent)
    return model


def write_weights(folder: Path, *architectures: str) -> list[Path]:
    """State dicts of these detectors, for `--weights`."""
    paths = []
    for architecture in architectures:
        paths.append(folder / f"{architecture}.pth")
        state = detector(architecture).state_dict()
        # Nearly all of it is zeros, of which one is enough to write down.
        torch.save(
            {k: v if v.any() else torch.zeros((), dtype=v.dtype).expand(v.shape) for k, v in state.items()}, paths[-1]
        )
    return paths


def _convolutions(model: nn.Module) -> list[nn.Conv2d]:
    pyramid, heads = model.backbone.fpn, model.roi_heads
    through = [pyramid.inner_blocks[0], pyramid.layer_blocks[0], heads.box_head, heads.mask_head, heads.keypoint_head]
    return [m for part in through if part is not None for m in part.modules() if isinstance(m, nn.Conv2d)]


def _pass(conv: nn.Conv2d) -> None:
    """Each of the colours' channels goes on as it is."""
    conv.weight[range(COLOURS), range(COLOURS), conv.kernel_size[0] // 2, conv.kernel_size[1] // 2] = 1.0
