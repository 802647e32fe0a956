"""A baseline kept in one file, with the code.

Enters: a `Baseline`, or the path of a baseline. Leaves: the file, or the baseline read back.

The file is text, for a reader of a pull request: a line with the checksum of all that follows, a line on what was
audited, a line for each estimate, and a last line with what image-by-image comparison needs. It holds neither heatmaps
nor pictures, no time of writing and no path; of the same run it has the same bytes.

NumPy is imported only where images are compared: the gate imports this module and must start in a blink.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from bias_audit.atomic import write_whole
from bias_audit.gate.baseline import About, Baseline, BaselineSamples
from bias_audit.records.arrays import load_npz, npz_bytes
from bias_audit.records.errors import RecordError
from bias_audit.records.runs import read_run
from bias_audit.terms import Estimate

FILE = "bias-audit-baseline.jsonl"
MAGIC = "bias_audit_baseline"
VERSION = 1


def read_baseline(source: str | Path) -> Baseline:
    """The baseline in a file, or the last audit of a run directory.

    Raises:
        RecordError: there is no such file or directory, or it cannot be a baseline; a file that `bias-audit baseline
            update` did not write is none, nor one that was changed since.
    """
    path = Path(source)
    if path.is_dir():
        return Baseline.of_run(read_run(path))
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RecordError(
            f"baseline {path}: cannot be read ({error.strerror}): name a run directory, or a file that "
            "`bias-audit baseline update RUN_DIR` wrote"
        ) from error
    # Git may write other line ends on some systems; none stands inside a line.
    head, _, rest = content.replace(b"\r\n", b"\n").partition(b"\n")
    _check_head(path, head, rest)
    try:
        about, *middle, last = rest.splitlines()
        estimates = tuple(_ESTIMATE.validate_json(line) for line in middle)
        samples = base64.b64decode(json.loads(last)["samples"], validate=True)
        return Baseline(path, About.model_validate_json(about), estimates, partial(_unpacked, path, samples))
    except (ValidationError, ValueError, KeyError, TypeError, RecursionError, binascii.Error) as error:
        raise RecordError(f"baseline {path}: is not whole ({type(error).__name__}): {_ANEW}") from error


_ANEW = "make it anew by `bias-audit baseline update`"
_ESTIMATE: TypeAdapter[Estimate] = TypeAdapter(Estimate)


def _check_head(path: Path, head: bytes, rest: bytes) -> None:
    try:
        found = json.loads(head)
        version, digest = found[MAGIC], found["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RecordError(
            f"baseline {path}: is no baseline: name a run directory, or a file that `bias-audit baseline update "
            "RUN_DIR` wrote"
        ) from error
    if version != VERSION:
        raise RecordError(f"baseline {path}: has version {version!r}, this tool reads {VERSION}: {_ANEW}")
    if hashlib.sha256(rest).hexdigest() != digest:
        raise RecordError(
            f"baseline {path}, line 1: sha256: the checksum does not match what follows: it was edited or damaged: "
            f"restore it, or {_ANEW}"
        )


def write_baseline(baseline: Baseline, path: Path) -> int:
    """Write a baseline's file, whole or not at all; how many bytes it has.

    Raises:
        RecordError: there is a file that is no baseline; or the samples cannot be read.
        OSError: the file cannot be written.
    """
    if path.exists() and not _is_baseline(path):
        raise RecordError(f"{path}: is another file, no baseline: it is not written over: name another one")
    lines = [_line(baseline.about.model_dump(mode="json"))]
    lines += [_line(_without_defaults(e)) for e in baseline.estimates]
    lines.append(_line({"samples": base64.b64encode(_packed(baseline.samples)).decode()}))
    rest = b"".join(lines)
    content = _line({MAGIC: VERSION, "sha256": hashlib.sha256(rest).hexdigest()}) + rest
    write_whole(path, content)
    return len(content)


def _is_baseline(path: Path) -> bool:
    try:
        found = json.loads(path.read_bytes().partition(b"\n")[0])
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and MAGIC in found


def _line(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _without_defaults(e: Estimate) -> dict[str, Any]:
    return {f.name: value for f in fields(e) if (value := getattr(e, f.name)) != f.default}


# As `BaselineSamples` and `SampleColumns` call them: names and arrays.
_NAMES = ("ids", "metrics", "methods", "regions", "effect_metrics")
_ARRAYS = ("correct", "areas", "values", "effects")


def _packed(samples: BaselineSamples) -> bytes:
    columns = samples.columns
    kept = {name: getattr(columns, name) for name in (*_NAMES, *_ARRAYS)}
    return npz_bytes({"labels": samples.labels, "attributes": samples.attributes, **kept})


def _unpacked(path: Path, content: bytes) -> BaselineSamples:
    import numpy as np

    from bias_audit.gate.columns import SampleColumns

    try:
        arrays = load_npz(path, content, ("labels", "attributes", *_NAMES, *_ARRAYS))
        names: dict[str, Any] = {name: tuple(str(x) for x in arrays[name]) for name in _NAMES}
        kept = names | {name: arrays[name] for name in _ARRAYS}
        columns = SampleColumns(**kept)
        n, r = len(columns.ids), len(columns.regions)
        shapes = [
            (arrays["labels"], (n,)),
            (arrays["attributes"], (n, arrays["attributes"].shape[-1])),
            (columns.correct, (n,)),
            (columns.areas, (n, r)),
            (columns.values, (len(columns.metrics), len(columns.methods), n, r)),
        ]
        if columns.effect_metrics:
            shapes.append((columns.effects, (len(columns.effect_metrics), n, columns.effects.shape[-1])))
        if any(array.shape != shape for array, shape in shapes):
            raise ValueError("arrays of the wrong shape")
        return BaselineSamples(arrays["labels"].astype(np.int64), arrays["attributes"].astype(np.str_), columns)
    except (ValueError, TypeError, IndexError) as error:
        raise RecordError(f"baseline {path}: its samples are not whole: {_ANEW}") from error
