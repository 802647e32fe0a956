"""Damage and malice: no record, baseline or policy that is truncated, reordered, flipped or hostile makes the gate exit
with 0 where the untouched one exits with 1, and none ends in a traceback.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from synthetic import make_run

from bias_audit import cli
from bias_audit.gate.baseline_file import read_baseline, write_baseline
from bias_audit.policies.file import read_policy
from bias_audit.records.files import AUDITS, MANIFEST

FUZZED = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
POLICY = """\
min_samples: 5
rules:
  - metric: verdict
    region: spurious
    op: "!="
    threshold: reliance
  - {metric: enrichment, region: hair, op: "<=", threshold: 1.5, class: each, name: "too much"}
  - metric: worst_group_accuracy
    group: gender
    op: ">="
    threshold: 0.5
"""


@dataclass(frozen=True)
class Ended:
    """How a gate ended."""

    code: int
    out: str
    error: str


def gate(*arguments: str | Path) -> Ended:
    """The console script in this process: a process each would take minutes."""
    out, error = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["bias-audit", "gate", *map(str, arguments)]),
        redirect_stdout(out),
        redirect_stderr(error),
        pytest.raises(SystemExit) as ended,
    ):
        cli.main()
    assert isinstance(ended.value.code, int)
    return Ended(ended.value.code, out.getvalue(), error.getvalue())


def assert_orderly(ended: Ended) -> None:
    assert ended.code in (0, 1, 2, 3)
    assert "Traceback" not in ended.out + ended.error and "internal error" not in ended.error, ended.error
    if ended.code == 2:
        assert ended.out == "" and ended.error.startswith("bias-audit: ") and ended.error.count("\n") == 1, ended.error
    else:
        assert ended.error == "" and ended.out


@pytest.fixture(scope="module")
def violated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose first audit holds and whose last is violated: what is lost at the end is what matters."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "audit.yaml").write_text(POLICY)
    policy = read_policy(folder / "audit.yaml").policy
    path = make_run(folder / "run", audits=4, hair_enrichment=1.8, spread=0.02, policy=policy, reference=True)
    assert gate(path).code == 1
    return path


@pytest.fixture
def copied(violated: Path, tmp_path: Path) -> Path:
    return shutil.copytree(violated, tmp_path / "run")


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A change of some bytes, or of the order of lines."""
    kind = draw(st.sampled_from(["cut", "flip", "insert", "remove", "swap lines", "drop line", "repeat line", "glue"]))
    place, other = draw(st.floats(0, 1, exclude_max=True)), draw(st.floats(0, 1, exclude_max=True))
    bit, noise = draw(st.integers(0, 7)), draw(st.binary(min_size=1, max_size=12))

    def damage(content: bytes) -> bytes:
        i, j = sorted((int(place * len(content)), int(other * len(content))))
        lines = content.splitlines(keepends=True)
        k, m = int(place * len(lines)), int(other * len(lines))
        match kind:
            case "cut":
                return content[:i]
            case "flip":
                return content[:i] + bytes([content[i] ^ 1 << bit]) + content[i + 1 :]
            case "insert":
                return content[:i] + noise + content[i:]
            case "remove":
                return content[:i] + content[j:]
            case "swap lines":
                lines[k], lines[m] = lines[m], lines[k]
            case "drop line":
                del lines[k]
            case "repeat line":
                lines.insert(k, lines[m])
            case "glue":
                return content + content[i:]
        return b"".join(lines)

    return damage


@FUZZED
@given(damage=damages(), name=st.sampled_from([AUDITS, AUDITS, MANIFEST, "audits/000004.npz", "samples.npz"]))
def test_damaged_records(damage: Callable[[bytes], bytes], name: str, violated: Path, copied: Path) -> None:
    whole = (violated / name).read_bytes()
    (copied / name).write_bytes(damage(whole))
    try:
        ended = gate(copied)
    finally:
        (copied / name).write_bytes(whole)
    assert_orderly(ended)
    assert ended.code != 0


HOSTILE: list[Any] = [
    None, True, -1, 0, 10**400, float("nan"), float("inf"), 1e308, "", "x" * 5000, "<script>", "\x00\x1b[2J",
    "::error::x", "../../etc/passwd", [], [[]], {}, {"a": {}}, "2\n3", "\ud800",
]  # fmt: skip


def places(content: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The place of each value in a JSON document."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [here, *(place for key, value in items for place in places(value, (*here, key)))]


def put(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return content


def signed(body: Any) -> bytes:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    return json.dumps({"body": body, "sha256": hashlib.sha256(canonical).hexdigest()}).encode()


@FUZZED
@given(data=st.data(), value=st.sampled_from(HOSTILE), name=st.sampled_from([AUDITS, MANIFEST]))
def test_hostile_records_with_right_checksums(
    data: st.DataObject, value: Any, name: str, violated: Path, copied: Path
) -> None:
    """Whoever can sign can say anything, a pass among it; but not crash the gate."""
    whole = (violated / name).read_bytes()
    if name == MANIFEST:
        body = json.loads(whole)["body"]
        content = signed(put(body, data.draw(st.sampled_from(places(body))), value))
    else:
        lines = whole.splitlines()
        body = json.loads(lines[-2])["body"]
        last = signed(put(body, data.draw(st.sampled_from(places(body))), value))
        content = b"\n".join([*lines[:-2], last, b""])
    (copied / name).write_bytes(content)
    try:
        assert_orderly(gate(copied))
    finally:
        (copied / name).write_bytes(whole)


@FUZZED
@given(damage=damages())
def test_damaged_policies(damage: Callable[[bytes], bytes], violated: Path, tmp_path: Path) -> None:
    path = tmp_path / "audit.yaml"
    path.write_bytes(damage(POLICY.encode()))
    ended = gate(violated, "--policy", path)
    assert_orderly(ended)
    if ended.code == 0:
        # It asks for something else, and says what: a policy that still says the same is still violated.
        assert read_policy(path).policy != read_policy(violated.parent / "audit.yaml").policy
    elif ended.code == 2:
        assert str(path) in ended.error or "policy rule" in ended.error


@FUZZED
@given(data=st.data(), value=st.sampled_from(HOSTILE))
def test_hostile_policies(data: st.DataObject, value: Any, violated: Path, tmp_path: Path) -> None:
    import yaml

    assume(value != "\ud800")
    content = yaml.safe_load(POLICY)
    path = tmp_path / "audit.yaml"
    path.write_text(yaml.safe_dump(put(content, data.draw(st.sampled_from(places(content))), value)), encoding="utf-8")
    ended = gate(
        violated, "--policy", path, "--format", data.draw(st.sampled_from(["human", "json", "junit", "github"]))
    )
    assert_orderly(ended)


@settings(FUZZED, max_examples=30)
@given(damage=damages())
def test_damaged_baselines(damage: Callable[[bytes], bytes], violated: Path, tmp_path: Path) -> None:
    before = violated.parent / "before"
    if not before.exists():
        make_run(before, audits=1, hair_enrichment=0.7, spread=0.02)
    path = tmp_path / "baseline.jsonl"
    path.unlink(missing_ok=True)
    write_baseline(read_baseline(before), path)
    (tmp_path / "audit.yaml").write_text(
        "min_samples: 5\nrules: [{metric: enrichment, region: hair, op: <=, max_regression: 0.2}]\n"
    )
    whole = path.read_bytes()
    arguments = (violated, "--policy", tmp_path / "audit.yaml", "--baseline", path)
    assert gate(*arguments).code == 1
    path.write_bytes(damage(whole))
    ended = gate(*arguments)
    assert_orderly(ended)
    assert ended.code == 2 or path.read_bytes() == whole
