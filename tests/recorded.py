"""A run of a few samples whose every number is known, for tests of records.

Enters: steps, seeds, and what is to be other than usual. Leaves: parts of a run, and run directories."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from bias_audit.policies.policy import Policy
from bias_audit.records.manifest import Manifest
from bias_audit.records.results import AuditResult
from bias_audit.records.runs import Run
from bias_audit.records.samples import PackedMasks, SampleScores, SampleSheet
from bias_audit.records.writing import RunDirectory
from bias_audit.terms import Estimate, Subjects
from bias_audit.verdicts.judgement import judge

SUBJECTS = Subjects((("hair", "spurious"),), (("gender", ("female", "male")),), ("doctor", "nurse"))


def manifest(**fields: Any) -> Manifest:
    values = {
        "run_id": "run-a",
        "created": "2025-01-02T03:04:05+00:00",
        "tool": "bias-audit 0",
        "model": "net",
        "layer": "layer4",
        "methods": ("gradcam",),
        "target": "logit",
        "sign": "positive",
        "subjects": SUBJECTS,
        "fingerprint": "f" * 64,
        "samples_available": 3,
        "samples_audited": 3,
        "seed": 0,
        "policy": Policy(min_samples=1),
    }
    return Manifest(**values | fields)


def sheet() -> SampleSheet:
    masks = np.zeros((3, 1, 5, 7), bool)
    masks[1, 0, 2:4, 3:] = True
    attributes = np.array([["female"], ["male"], [""]])
    return SampleSheet(
        ("a", "ü", "c"), np.array([0, 1, 0]), attributes, (b"\xff\xd8one", b"", b"three"), PackedMasks.of(masks)
    )


def scores(seed: int = 0) -> SampleScores:
    rng = np.random.default_rng(seed)
    values = rng.random((2, 1, 3, 2), np.float32)
    values[0, 0, 1, 0] = np.nan
    areas = rng.random((3, 2), np.float32)
    areas[2, 0] = np.nan
    margin = np.array([1.5, np.nan, -0.0], np.float32)
    maps = rng.random((1, 3, 2, 2)).astype(np.float16)
    return SampleScores(
        ("energy_share", "enrichment"),
        ("gradcam",),
        ("hair", "remainder"),
        ("a", "ü", "c"),
        np.array([0, 1, 0]),
        np.array([0, 0, -1]),
        margin,
        areas,
        values,
        maps,
        rng.random((1, 3), np.float32),
    )


def result(step: int, *estimates: Estimate, seed: int | None = None, **fields: Any) -> AuditResult:
    estimates = estimates or (Estimate("enrichment", 1 + step / 7, 0.1 + 0.2, 3.0, 3, "hair", method="gradcam"),)
    judgement = judge(estimates, SUBJECTS, Policy(min_samples=1))
    values = {"epoch": 0, "weights": "raw", "created": "2025-01-02T04:00:00+00:00", "seconds": 1 / 3}
    return AuditResult(
        step, estimates=estimates, judgement=judgement, scores=scores(step if seed is None else seed), **values | fields
    )


def tiny(path: Path, steps: tuple[int, ...] = (10, 20, 30), ended: bool = True, **fields: Any) -> Path:
    directory = RunDirectory.create(path, manifest(**fields), sheet())
    for step in steps:
        directory.append(result(step))
    if ended:
        directory.end()
    return path


def steps_of(run: Run) -> list[int]:
    return [audit.step for audit in run.audits]


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def assert_same(one: Any, other: Any) -> None:
    """Equal field by field, arrays bit for bit and of the same type."""
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, np.ndarray):
            assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), field.name
        elif isinstance(a, PackedMasks):
            assert_same(a, b)
        else:
            assert a == b, field.name


class Touches:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))
