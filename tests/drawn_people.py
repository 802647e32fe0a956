"""A drawn person, and detectors that find it without any weights."""

from __future__ import annotations

from collections.abc import Sequence

import wired

from bias_audit.regions.people import REGIONS, Detector, PeopleDetector


def people(regions: Sequence[str] = REGIONS, min_score: float = 0.5) -> PeopleDetector:
    """torchvision's detectors, wired to find the drawn person."""
    detectors = []
    for architecture in (wired.MASKS, wired.KEYPOINTS):
        model = wired.detector(architecture).eval()
        model.transform.min_size, model.transform.max_size = (wired.SIZE,), round(wired.SIZE * 1333 / 800)
        detectors.append(Detector(model, architecture))
    return PeopleDetector(detectors[0], detectors[1], tuple(regions), min_score)
