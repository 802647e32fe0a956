"""What a region check found, as one self-contained HTML page: what is wrong first, then the images with their outlines.

Enters: a `RegionReport`. Leaves: a page that needs neither network nor server. The images that it shows are opened
again, so that a check of many keeps none in memory; where they do not fit, those that a check names come first.

torch is not imported here.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from markupsafe import Markup
from PIL import Image

from bias_audit.atomic import write_whole
from bias_audit.data.outlines import Mask
from bias_audit.regions.checked import RegionReport, Result
from bias_audit.regions.region_set import RegionSet
from bias_audit.report.pages import content_security_policy, resource, template
from bias_audit.report.samples import BUDGET, Blocks, outline
from bias_audit.report.series import HUES, region_styles
from bias_audit.terms import Subjects

MOST_SHOWN = 500
# The longer side of a picture: few images are shown larger, since what is wrong is looked for in them.
LEAST_SIDE, USUAL_SIDE, MOST_SIDE = 96, 160, 384
# So many images tell how much room the others will take.
TRIED = 8
# What compression leaves of a letter of an outline.
_LETTER = 0.3
# Rows of a table, and images named in words, beyond which the rest is counted.
MOST_ROWS, MOST_NAMED = 60, 5


@dataclass(frozen=True)
class _Viewer:
    """What the page's viewer shows, and how much of the set that is; `text` is for the viewer only."""

    text: str
    shown: int
    available: int
    annotators: tuple[str, ...]


def write_regions(path: str | Path, report: RegionReport) -> Path:
    """Write the page to `path` and return it; readers never see half a page.

    Raises:
        ValueError: an image that was measured no longer decodes.
        OSError: the page cannot be written.

    Example:
        >>> write_regions("regions.html", check_regions(survey(read_set("data.yaml"))))  # doctest: +SKIP
        PosixPath('regions.html')
    """
    path = Path(path)
    write_whole(path, render_regions(report).encode("utf-8", "backslashreplace"))
    return path


def render_regions(report: RegionReport) -> str:
    """The report as one HTML page.

    Raises:
        ValueError: an image that was measured no longer decodes.
    """
    script = resource("pictures.js") + resource("regions.js")
    style = resource("page.css") + resource("regions.css")
    found = report.survey.of
    return template("regions.html.j2").render(
        content_security_policy=content_security_policy(style, script),
        css=Markup(style),
        script=Markup(script),
        name=found.name,
        report=report,
        headline=report.headline,
        facts=_facts(report),
        named={r.check.code: [(found.items[f.index].file, f.said) for f in r.found.flags] for r in report.results},
        viewer=_viewer(report),
        most_rows=MOST_ROWS,
        most_named=MOST_NAMED,
        tool=f"bias-audit {version('bias-audit')}",
    )


def _facts(report: RegionReport) -> list[tuple[str, str]]:
    found = report.survey.of
    facts = [
        ("Images", str(len(found.items))),
        ("Regions", ", ".join(found.region_names) or "none"),
        ("Classes", ", ".join(found.classes) or "not known"),
        ("Attributes", ", ".join(name for name, _ in found.attributes) or "none known"),
        ("Images asked for", f"{report.limits.min_samples} in each cell and for each region"),
    ]
    return facts + [("Annotators", ", ".join(one.name for one in found.annotators))] * bool(found.annotators)


def _viewer(report: RegionReport) -> _Viewer | None:
    found, measured = report.survey.of, report.survey.measured
    order = [index for index in _order(report) if measured[index]]
    side = _side(report, order[:MOST_SHOWN])
    results = report.results
    flags: dict[int, list[tuple[int, int, str, str]]] = {}
    for k, result in enumerate(results):
        for rank, flag in enumerate(result.found.flags):
            flags.setdefault(flag.index, []).append((k, rank, flag.region, flag.said))
    blocks, taken = Blocks(), 0.0
    samples: list[dict[str, Any]] = []
    for index in order[:MOST_SHOWN]:
        sample = _sample(report, index, side)
        taken += _bytes_of(sample)
        if samples and taken > BUDGET:
            break
        samples.append(sample | {"image": blocks.add(sample["image"]), "flags": flags.get(index, [])})
    if not samples:
        return None
    header = {
        "classes": found.classes,
        "attributes": [{"name": name, "values": values} for name, values in found.attributes],
        "regions": _regions(found),
        "checks": [{"code": r.check.code, "state": r.found.state} for r in results],
        "annotators": [one.name for one in found.annotators],
        "samples": samples,
    }
    text = base64.b64encode(blocks.packed(header)).decode()
    return _Viewer(text, len(samples), len(found.items), tuple(one.name for one in found.annotators))


def _order(report: RegionReport) -> Iterator[int]:
    """Every image once: one from each check in turn, the worst of it first, then those that none names."""

    def named(result: Result) -> Iterator[int]:
        return (flag.index for flag in result.found.flags)

    queues, seen = [named(result) for result in report.worst_first], set[int]()
    while queues:
        for queue in list(queues):
            index = next((i for i in queue if i not in seen), None)
            if index is None:
                queues.remove(queue)
            else:
                seen.add(index)
                yield index
    yield from (i for i in range(len(report.survey.of.items)) if i not in seen)


def _side(report: RegionReport, shown: Sequence[int]) -> int:
    """How large pictures can be for all of these images to fit."""
    tried = [_bytes_of(_sample(report, index, USUAL_SIDE)) for index in shown[:: 1 + len(shown) // TRIED]]
    each = max(1.0, float(np.mean(tried))) if tried else 1.0
    # A smaller picture has more in each of its pixels, and those that are tried may be plain ones.
    fits = USUAL_SIDE * math.sqrt(0.8 * BUDGET / (each * max(len(shown), 1)))
    return int(np.clip(fits, LEAST_SIDE, MOST_SIDE))


def _bytes_of(sample: dict[str, Any]) -> float:
    return len(sample["image"]) + _LETTER * sum(map(len, sample["outlines"]))


def _regions(found: RegionSet) -> list[dict[str, Any]]:
    """Each region with its role and hue, then, if there are annotators, the same as drawn by each but the first.

    `annotator` is whose it is, by place.
    """
    roled = tuple((name, role) for name, role in found.regions if role is not None)
    styles = region_styles(Subjects(roled, (), ()))
    hues = {
        name: HUES[i % len(HUES)] if role is None else styles[name].hue for i, (name, role) in enumerate(found.regions)
    }
    regions = [{"name": name, "role": role or "", "hue": hues[name], "annotator": 0} for name, role in found.regions]
    return regions + [
        {"name": f"{name}, by {one.name}", "role": "another", "hue": hues[name], "annotator": place}
        for place, one in enumerate(found.annotators[1:], 1)
        for name in found.region_names
    ]


def _sample(report: RegionReport, index: int, side: int) -> dict[str, Any]:
    found, item = report.survey.of, report.survey.of.items[index]
    picture, masks = item.decode()
    size = (picture.height, picture.width)
    drawn = [masks.get(name) for name in found.region_names]
    if found.annotators:
        by = [one.draw(item.file, size) if item.file in one.files else {} for one in found.annotators]
        drawn = [theirs.get(name) for theirs in by for name in found.region_names]
    shrink = min(1.0, side / max(size))
    height, width = (max(1, round(length * shrink)) for length in size)
    areas = report.survey.areas[index]
    return {
        "id": item.file,
        "label": item.label,
        "attributes": item.attributes,
        "size": [width, height],
        "outlines": ["" if mask is None else outline(_smaller(mask, (height, width))) for mask in drawn],
        "areas": [None if np.isnan(area) else round(float(area), 5) for area in areas],
        "seen_by": [place for place, one in enumerate(found.annotators) if item.file in one.files],
        "boxed": report.survey.boxed[index].tolist(),
        "image": _jpeg(picture, (width, height)),
    }


def _smaller(mask: Mask, size: tuple[int, int]) -> Mask:
    """The mask at a smaller size: where half of a pixel is covered, or any of it where that leaves nothing."""
    share = cv2.resize(mask.astype(np.float32), (size[1], size[0]), interpolation=cv2.INTER_AREA)
    half: Mask = share >= 0.5
    return half if half.any() else share > 0


def _jpeg(picture: Image.Image, size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    picture.convert("RGB").resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0).save(buffer, "JPEG", quality=75)
    return buffer.getvalue()
