"""What the manifest and the lines of audits.jsonl look like, each with its checksum.

Enters: a `Manifest` or a `Line`, or the bytes of one, which may come from anywhere. Leaves: the bytes, or the same read
back and checked.

A line holds its predecessor's checksum, so that none can be taken out, put in or moved.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from bias_audit.records.errors import RecordError
from bias_audit.records.manifest import SCHEMA_VERSION, Manifest
from bias_audit.records.results import AuditSummary


@dataclass(frozen=True)
class Line:
    """One line of audits.jsonl, less its checksums."""

    kind: Literal["audit", "failed", "rewind", "best", "dropped", "end"]
    audit: AuditSummary | None = None
    arrays: str | None = None
    arrays_bytes: int = 0
    arrays_sha256: str = ""
    samples: int | None = None
    step: int | None = None
    reason: str = ""
    names: tuple[str, ...] = ()


def line_bytes(line: Line, previous: str) -> tuple[bytes, str]:
    """A line that follows one with the checksum `previous`, and its own checksum."""
    body = json.loads(_LINE.dump_json(line, exclude_defaults=True)) | {"previous": previous}
    canonical = _canonical(body, allow_nan=False)
    digest = sha256(canonical)
    return _BEFORE_BODY + canonical + _AFTER_BODY % digest.encode() + b"\n", digest


def parse_line(raw: bytes, place: str, previous: str) -> tuple[Line, str]:
    """A line that follows one with the checksum `previous`, and its own.

    Raises:
        RecordError: it is no record, or its checksum does not match; `place` is where the message says it stands.
    """
    try:
        outer = json.loads(raw)
        body, digest = outer["body"], outer["sha256"]
        # As `line_bytes` writes it: to write its content anew would take half of the time.
        canonical = raw[len(_BEFORE_BODY) : -len(_AFTER_BODY % digest.encode()) - 1]
        if not raw.startswith(_BEFORE_BODY) or sha256(canonical) != digest:
            canonical = _canonical(body)
        intact = sha256(canonical) == digest and body["previous"] == previous
        line = _LINE.validate_json(canonical) if intact else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RecordError(f"{place}: is not a record ({type(error).__name__}): it was damaged") from error
    if line is None:
        raise RecordError(f"{place}: its checksum does not match: it was changed, moved or damaged")
    return line, digest


def whole_lines(content: bytes) -> list[bytes]:
    """The lines of a file, less one at its end that was cut off."""
    return content.split(b"\n")[:-1]


def kind_of(raw: bytes) -> str:
    """The kind of a line that was checked before."""
    return str(json.loads(raw)["body"]["kind"])


def read_manifest(path: Path) -> Manifest:
    """The manifest of a run.

    Raises:
        RecordError: it is missing, damaged or of another version; the message names the file.
    """
    try:
        outer = json.loads(path.read_bytes())
        body, digest = outer["body"], outer["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RecordError(f"{path}: is not a whole manifest ({type(error).__name__}): record the run again") from error
    if sha256(_canonical(body)) != digest:
        raise RecordError(f"{path}: its checksum does not match its content: it was changed or damaged")
    version = body.get("schema_version") if isinstance(body, dict) else None
    if version != SCHEMA_VERSION:
        raise RecordError(f"{path}: has schema version {version!r}, this tool reads {SCHEMA_VERSION}: use the other's")
    try:
        return Manifest.model_validate_json(json.dumps(body))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise RecordError(f"{path}: {key}: {first['msg']}") from error


def manifest_bytes(manifest: Manifest) -> bytes:
    """The content of `manifest.json`."""
    body = manifest.model_dump(mode="json", by_alias=True)
    digest = sha256(_canonical(body))
    return json.dumps({"body": body, "sha256": digest}, indent=1, allow_nan=False).encode() + b"\n"


def _canonical(body: Any, allow_nan: bool = True) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=allow_nan).encode()


def sha256(content: bytes) -> str:
    """The checksum of a line, a manifest or a file of arrays."""
    return hashlib.sha256(content).hexdigest()


_BEFORE_BODY, _AFTER_BODY = b'{"body":', b',"sha256":"%b"}'
_LINE: TypeAdapter[Line] = TypeAdapter(Line)
