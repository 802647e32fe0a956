"""What a run audited and how: the same for all its audits.

Enters: fields, from `audit.Auditor` or read back by `log`. Leaves: a `Manifest`, frozen.

Standard library and pydantic only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from bias_audit.policies.policy import Policy
from bias_audit.terms import Subjects

SCHEMA_VERSION: Literal[1] = 1
# Whether pictures of the audited images are kept: everywhere, in the run directory only, or nowhere.
Thumbnails = bool | Literal["local"]


@dataclass(frozen=True)
class RegionCount:
    """On how many audited images a region is drawn as an outline, as a box (wholly or in part), and not at all.

    Example:
        >>> print(RegionCount("hair", outlined=272, boxed=40, absent=88))
        hair is on 312 of 400 images, on 40 of them as a box
    """

    region: str
    outlined: int
    boxed: int
    absent: int

    @property
    def present(self) -> int:
        """On how many images it is."""
        return self.outlined + self.boxed

    def __str__(self) -> str:
        which = self.boxed if self.outlined else "all"
        boxes = f", on {which} of them as a box" if self.boxed else ""
        return f"{self.region} is on {self.present} of {self.present + self.absent} images{boxes}"

    @property
    def caveat(self) -> str:
        """A sentence where some images lack the region, or have it as a box; "" where all have its outline.

        Example:
            >>> RegionCount("hair", outlined=0, boxed=40, absent=8).caveat
            'hair is on 40 of 48 images, on all of them as a box, which holds some of what lies around.'
        """
        around = ", which holds some of what lies around" if self.boxed else ""
        return f"{self}{around}." if self.boxed or self.absent else ""


class Manifest(BaseModel):
    """What a run audited and how: fixed when the run directory is made.

    `annotated` has a count for each region, in their order; nothing in runs of versions that did not count.
    `thumbnails` is False where the records hold no picture, and "local" where none leaves the run directory and its
    page; then `pictures.shareable` is what may.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = SCHEMA_VERSION
    run_id: str
    created: str
    tool: str
    model: str
    layer: str
    methods: tuple[str, ...]
    target: str
    sign: str
    subjects: Subjects
    fingerprint: str
    samples_available: Annotated[int, Field(ge=0)]
    samples_audited: Annotated[int, Field(ge=0)]
    seed: int
    policy: Policy
    thumbnails: Thumbnails = True
    annotated: tuple[RegionCount, ...] = ()

    @property
    def caveats(self) -> dict[str, str]:
        """Of each region that some images lack, or whose areas are boxes, a sentence that says so."""
        return {one.region: one.caveat for one in self.annotated if one.caveat}
