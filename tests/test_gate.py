"""The gate passes only on evidence: through real processes, and over damage of every kind."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from synthetic import make_run

from bias_audit.gate.gate import run_gate
from bias_audit.policies.policy import Policy
from bias_audit.records.errors import RecordError
from bias_audit.records.files import AUDITS, MANIFEST
from bias_audit.records.runs import read_run
from bias_audit.terms import Outcome

CLEAN: dict[str, Any] = {"hair_enrichment": 0.7, "gap": 0.02, "spread": 0.02}
STRICT = "rules: [{metric: enrichment, region: spurious, max: 0.1}]\nmin_samples: 5\n"
LAX = "rules: [{metric: enrichment, region: spurious, max: 100}]\nmin_samples: 5\n"
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHONIOENCODING", "FORCE_COLOR"))}


def bias_audit(*arguments: str | Path, module: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
    script = Path(sys.executable).with_name("bias-audit")
    command = [sys.executable, "-m", "bias_audit.cli"] if module else [str(script)]
    return subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        env=ENVIRONMENT | environment,
        check=False,
    )


def squeezed(text: str) -> str:
    return " ".join(text.replace("│", " ").split())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run directory of each kind, made once; not to be written to."""
    made: dict[str, Path] = {}
    kinds: dict[str, dict[str, Any]] = {
        "clean": CLEAN,
        "biased": {},
        "wide": CLEAN | {"spread": 3.0},
        "empty": {"audits": 0},
        "reference": CLEAN | {"audits": 0, "reference": True},
        "torn": CLEAN | {"torn": True, "ended": False},
        "torn after its end": CLEAN | {"torn": True},
        "failed": CLEAN | {"failed": "CUDA out of memory"},
        "not ended": CLEAN | {"ended": False},
        "biased and killed": {"torn": True, "ended": False},
        "markup": {
            "regions": (("[red]", "spurious"), ("[/]", "object"), ("hair", "spurious"), ("a\\", "context")),
            "attributes": (("gender", ("[bold]", "[/red]")),),
            "classes": ("[link=x]", "nurse"),
            "ids": [f"[/]{i}" for i in range(24)],
        },
        "unmeasured": {"regions": (("hår", "spurious"),), "samples": 3, "classes": ("a", "b", "c", "d"), "silent": 0},
    }

    def of(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_run(tmp_path_factory.mktemp("runs") / "run", **{"audits": 1} | kinds[kind])
        return made[kind]

    return of


def assert_one_line_error(done: subprocess.CompletedProcess[str], *words: str | Path) -> None:
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert done.stdout == "" and done.stderr.count("\n") == 1 and done.stderr.startswith("bias-audit: "), done.stderr
    assert "Traceback" not in done.stderr and "internal error" not in done.stderr
    assert all(str(word) in done.stderr for word in words), done.stderr


# Exit codes


def test_passes_on_evidence(runs: Callable[[str], Path]) -> None:
    done = bias_audit("gate", runs("clean"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.rstrip().endswith("bias-audit gate: passed")
    assert "region hair cleared" in squeezed(done.stdout) and "Inconclusive" not in done.stdout


def test_a_planted_bias_is_violated(runs: Callable[[str], Path]) -> None:
    for module in (False, True):
        done = bias_audit("gate", runs("biased").parent, module=module)
        assert (done.returncode, done.stderr) == (1, "")
        text = squeezed(done.stdout)
        assert "region hair reliance" in text and "enrichment on hair (gradcam)" in text
        assert "bias-audit gate: violated: verdict on region hair: reliance." in text and "(and 2 more)" in text
        # The region beside it that is not looked at is not accused.
        assert "region face reliance" not in text and "enrichment on face (gradcam)" in text


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("wide", "gate: inconclusive: verdict on region hair: inconclusive"),
        ("empty", "no audit was recorded"),
        ("reference", "only the audit before training was recorded"),
        ("torn", "the last record was cut off while it was written"),
        ("torn after its end", "the last record was cut off while it was written"),
        ("failed", "the audit at step 200 failed: CUDA out of memory"),
        ("not ended", "training has not finished, or was killed"),
    ],
)
def test_doubt_is_never_a_pass(kind: str, words: str, runs: Callable[[str], Path]) -> None:
    done = bias_audit("gate", runs(kind))
    assert (done.returncode, done.stderr) == (3, "")
    assert words in squeezed(done.stdout) and "gate: inconclusive" in done.stdout and "passed" not in done.stdout


def test_doubt_does_not_excuse_a_violation(runs: Callable[[str], Path]) -> None:
    done = bias_audit("gate", runs("biased and killed"))
    assert done.returncode == 1 and "cut off" in done.stdout and "gate: violated" in done.stdout


def test_wrong_usage() -> None:
    for arguments, words in (
        (("gates", "x"), "gates"),
        (("gate", "x", "--polcy", "y"), "--polcy"),
        (("gate",), "Missing argument"),
        (("gate", "x", "y"), "unexpected extra argument"),
        # As a script writes it whose variable is not set.
        (("gate", "x", "--policy", ""), "--policy: expected a value, got nothing"),
        (("gate", "x", "--baseline="), "--baseline: expected a value, got nothing"),
        (("gate", ""), "bias-audit: expected a value, got nothing"),
        (("gate", "x", "--trust-checkpoint"), "there is no checkpoint to trust"),
    ):
        done = bias_audit(*arguments)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert bias_audit().returncode == 2
    shown = bias_audit("gate", "--help")
    assert shown.returncode == 0 and "3 inconclusive" in squeezed(shown.stdout)


def test_directories_that_hold_no_run(tmp_path: Path, runs: Callable[[str], Path]) -> None:
    assert_one_line_error(bias_audit("gate", tmp_path / "absent"), tmp_path / "absent", "no such file or directory")
    assert_one_line_error(bias_audit("gate", "two\nlines"), "two lines: no such file or directory")
    # A place that exists and holds no evidence is a doubt, not a mistake in the command.
    done = bias_audit("gate", tmp_path)
    assert done.returncode == 3 and "no manifest.json here or below" in squeezed(done.stdout), done.stdout
    for name in ("one", "two"):
        shutil.copytree(runs("clean"), tmp_path / name)
    assert_one_line_error(bias_audit("gate", tmp_path), "holds 2 run directories", tmp_path / "one", tmp_path / "two")


def test_damaged_runs(tmp_path: Path, runs: Callable[[str], Path]) -> None:
    path = shutil.copytree(runs("clean"), tmp_path / "run")
    manifest = (path / MANIFEST).read_bytes()
    assert manifest.count(b'"threshold": 1.5') == 1
    (path / MANIFEST).write_bytes(manifest.replace(b'"threshold": 1.5', b'"threshold": 9.5'))
    assert_one_line_error(bias_audit("gate", path), path / MANIFEST, "checksum")
    (path / MANIFEST).write_bytes(manifest)
    arrays = path / "audits" / "000000.npz"
    arrays.rename(tmp_path / "elsewhere.npz")
    done = bias_audit("gate", path)
    assert done.returncode == 3 and "000000.npz: is missing" in squeezed(done.stdout), done.stdout
    arrays.write_bytes(b"half of it")
    assert_one_line_error(bias_audit("gate", path), arrays, "has 10 bytes")
    arrays.unlink()
    (tmp_path / "elsewhere.npz").rename(arrays)
    assert bias_audit("gate", path).returncode == 0
    (path / AUDITS).write_bytes((path / AUDITS).read_bytes().replace(b'"n":24', b'"n":25', 1))
    assert_one_line_error(bias_audit("gate", path), path / AUDITS, "line 1")
    (path / AUDITS).unlink()
    done = bias_audit("gate", path)
    assert done.returncode == 3 and "audits.jsonl: cannot be read" in squeezed(done.stdout), done.stdout


def test_policies(tmp_path: Path, runs: Callable[[str], Path]) -> None:
    for name, text in (
        ("strict.yaml", STRICT),
        ("lax.yaml", LAX),
        ("misspelt.yaml", LAX.replace("max:", "maks:")),
        ("region.yaml", LAX.replace("spurious", "hare")),
        ("[red].yaml", "min_sample: 3\n"),
        (
            "pyproject.toml",
            '[tool.bias_audit]\nmin_samples = 5\n[[tool.bias_audit.rules]]\nmetric = "accuracy"\nmin = 1\n',
        ),
    ):
        (tmp_path / name).write_text(text)
    # It overrides the recorded policy both ways.
    strict = bias_audit("gate", runs("clean"), "--policy", tmp_path / "strict.yaml")
    assert strict.returncode == 1 and "above the maximum 0.1" in squeezed(strict.stdout)
    assert bias_audit("gate", runs("biased"), "--policy", tmp_path / "lax.yaml").returncode == 0
    assert bias_audit("gate", runs("clean"), f"--policy={tmp_path / 'pyproject.toml'}").returncode == 1
    for name, words in (
        ("misspelt.yaml", ("rules.0.maks", "unknown key", "max, min")),
        ("region.yaml", ("unknown region 'hare'", "coat, face, hair")),
        ("[red].yaml", ("[red].yaml", "min_sample", "min_samples")),
        ("absent.yaml", ("absent.yaml", "cannot be read")),
    ):
        done = bias_audit("gate", runs("clean"), "--policy", tmp_path / name)
        assert_one_line_error(done, *words, *([tmp_path / name] if name != "region.yaml" else []))
    # With nothing to judge, a policy that is wrong is still wrong.
    assert_one_line_error(bias_audit("gate", runs("empty"), "--policy", tmp_path / "region.yaml"), "hare")


def test_names_that_look_like_markup(runs: Callable[[str], Path]) -> None:
    done = bias_audit("gate", runs("markup"), COLUMNS="300")
    assert (done.returncode, done.stderr) == (1, "")
    text = squeezed(done.stdout)
    assert "region [red] inconclusive" in text and "enrichment on [/] (gradcam)" in text
    assert "Within class [link=x]" in text or "Within class nurse" in text
    report = bias_audit("report", runs("markup"))
    assert (report.returncode, report.stderr) == (0, "")
    assert report.stdout == f"{runs('markup') / 'report.html'}\n"


def test_terminals_that_know_only_ascii(runs: Callable[[str], Path]) -> None:
    done = bias_audit("gate", runs("unmeasured"), PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (3, "")
    assert "gate: inconclusive" in done.stdout
    absent = bias_audit("gate", "hår", PYTHONIOENCODING="ascii")
    assert absent.returncode == 2 and absent.stderr.startswith("bias-audit: h") and absent.stderr.count("\n") == 1


def test_report_writes_the_page(tmp_path: Path, runs: Callable[[str], Path]) -> None:
    path = shutil.copytree(runs("biased"), tmp_path / "run")
    (path / "report.html").unlink(missing_ok=True)
    done = bias_audit("report", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{path / 'report.html'}\n"
    page = (path / "report.html").read_text(encoding="utf-8")
    assert page.lstrip().lower().startswith("<!doctype html") and page.rstrip().endswith("</html>")
    assert_one_line_error(bias_audit("report", tmp_path / "absent"), "no such directory")


HEAVY = ("torch", "torchvision", "lightning", "pytorch_lightning", "wandb", "scipy", "sklearn", "matplotlib")
PROBE = """
import sys
before = set(sys.modules)
import bias_audit
print(sorted({*HEAVY, "numpy"} & (set(sys.modules) - before)))
sys.argv[0] = "bias-audit"
import bias_audit.cli
try:
    bias_audit.cli.main()
except SystemExit as end:
    print(end.code)
print(sorted({*HEAVY, "numpy"} & set(sys.modules)))
"""


@pytest.mark.parametrize(("kind", "code", "numeric"), [("clean", 0, False), ("empty", 3, False), ("biased", 1, True)])
def test_the_gate_needs_no_torch(
    kind: str, code: int, numeric: bool, runs: Callable[[str], Path], tmp_path: Path
) -> None:
    """Images are looked up where a rule is violated, which takes NumPy and SciPy; nothing else takes any of it."""
    program = f"HEAVY = {HEAVY!r}\n{PROBE}"
    formats = [f"--format={name}" for name in ("json", "markdown", "junit", "human", "github")]
    files = [f"--output={tmp_path / name}" for name in ("gate.json", "gate.md", "gate.xml", "gate.txt")]
    command = [sys.executable, "-c", program, "gate", str(runs(kind)), *formats, *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert (lines[0], lines[-2:]) == ("[]", [str(code), "['numpy', 'scipy']" if numeric else "[]"])


# The function itself


def test_gate_says_what_it_rests_on(runs: Callable[[str], Path]) -> None:
    run = read_run(make_run(runs("clean").parent / "three", **CLEAN, audits=3, reference=True))
    result = run_gate(run)
    assert result.outcome is Outcome.HELD and result.exit_code == 0 and result.doubts == ()
    assert result.audit is run.audits[-1] and result.judgement == run.audits[-1].judgement
    nothing = run_gate(read_run(runs("reference")))
    assert (nothing.outcome, nothing.audit, nothing.judgement) == (Outcome.INCONCLUSIVE, None, None)
    assert run_gate(run, {"rules": [{"metric": "accuracy", "min": 1}]}).exit_code == 1
    assert run_gate(run, Policy(min_samples=25)).exit_code == 3
    with pytest.raises(ValueError, match="unknown region 'hare'"):
        run_gate(run, {"rules": [{"metric": "iou", "region": "hare", "max": 1}]})


def test_what_a_removal_shows_outweighs_what_the_heatmaps_show(tmp_path: Path) -> None:
    """Looking is not relying, and a cue that the maps miss is found all the same."""
    runs = {
        # Looked at, in a model that is right as often for everybody: a removal tells whether it matters.
        "salient": {"hair_enrichment": 2.0, "gap": 0.02, "removal": {"hair": 0.01, "face": 0.0}},
        "relied on": {"hair_enrichment": 2.0, "gap": 0.02, "removal": {"hair": 0.5, "face": 0.0}},
        # Not looked at: the decision may move for the hole, whatever was there.
        "a hole": {"hair_enrichment": 0.7, "gap": 0.02, "removal": {"hair": 0.5, "face": 0.0}},
        # Accuracy follows the gender: is it read from the hair, or from something that says the same?
        "unseen": {"hair_enrichment": 0.7, "gap": 0.3, "removal": {"hair": 0.5, "face": 0.0}, "shows": ("hair",)},
        "elsewhere": {"hair_enrichment": 0.7, "gap": 0.3, "removal": {"hair": 0.01, "face": 0.5}, "shows": ("hair",)},
        "redundant": {"hair_enrichment": 2.0, "gap": 0.3, "removal": {"hair": 0.01, "face": 0.0}, "shows": ("hair",)},
    }
    rules = [{"metric": "verdict", "region": "hair", "forbid": ["reliance", "suspected"]}]
    policy = Policy.model_validate({"rules": rules, "min_samples": 5, "tolerance": {"enrichment": 1.25}})
    results = {
        name: run_gate(read_run(make_run(tmp_path / name, spread=0.02, audits=1, policy=policy, **options)))
        for name, options in runs.items()
    }
    verdicts = {name: str(r.judgement.findings[0].verdict) for name, r in results.items() if r.judgement is not None}
    assert verdicts == {
        "salient": "cleared",
        "relied on": "reliance",
        "a hole": "suspected",
        "unseen": "reliance",
        "elsewhere": "cleared",
        "redundant": "suspected",
    }
    assert {r.exit_code for name, r in results.items() if verdicts[name] == "cleared"} == {0}
    assert {r.exit_code for name, r in results.items() if verdicts[name] != "cleared"} == {1}
    # Without a removal and without an attribute there is no pass, whatever the heatmaps show.
    for looks in (0.7, 2.0):
        path = make_run(tmp_path / str(looks), hair_enrichment=looks, attributes=(), audits=1, policy=policy)
        assert run_gate(read_run(path), Policy(min_samples=5)).exit_code == 3
    # A rule can ask for the removal itself.
    for rule, expected in (
        ({"metric": "removal_flips", "region": "hair", "max": 0.1}, [0, 1, 1, 1, 0, 0]),
        ({"metric": "removal_contrast", "region": "hair", "group": "gender", "max": 0.1}, [3, 3, 3, 1, 0, 0]),
    ):
        limit = {"min_samples": 5, "rules": [rule]}
        assert [run_gate(read_run(tmp_path / name), limit).exit_code for name in runs] == expected


def test_the_recorded_outcome_is_not_believed(tmp_path: Path, runs: Callable[[str], Path]) -> None:
    """What counts are the estimates: the gate judges them anew."""
    import hashlib

    path = shutil.copytree(runs("biased"), tmp_path / "run")
    record = json.loads((path / AUDITS).read_bytes().splitlines()[0])["body"]
    record["audit"]["judgement"]["checks"] = []
    canonical = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
    line = json.dumps({"body": record, "sha256": hashlib.sha256(canonical).hexdigest()})
    (path / AUDITS).write_text(line + "\n")
    run = read_run(path)
    assert run.audits[0].judgement.checks == ()
    assert run_gate(run).outcome is Outcome.VIOLATED


# Damage


def flips(content: bytes, rng: random.Random, count: int) -> bytes:
    damaged = bytearray(content)
    for _ in range(count):
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    return bytes(damaged)


def splice(content: bytes, rng: random.Random) -> bytes:
    a, b = sorted(rng.randrange(len(content)) for _ in range(2))
    return content[:a] + content[b:]


def by_lines(change: Callable[[list[bytes], random.Random], list[bytes]]) -> Callable[[bytes, random.Random], bytes]:
    return lambda content, rng: b"".join(change(content.splitlines(keepends=True), rng))


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "cut": lambda content, rng: content[: rng.randrange(len(content))],
    "flip": lambda content, rng: flips(content, rng, 1),
    "flips": lambda content, rng: flips(content, rng, 20),
    "splice": splice,
    "shuffle": by_lines(lambda lines, rng: rng.sample(lines, len(lines))),
    "drop": by_lines(lambda lines, rng: rng.sample(lines, len(lines) - 1)),
    "repeat": by_lines(lambda lines, rng: [*lines, rng.choice(lines)]),
    "insert": by_lines(lambda lines, rng: [*lines[:1], rng.choice(lines), *lines[1:]]),
    "few": by_lines(lambda lines, rng: lines[: rng.randrange(len(lines))]),
    "noise": lambda content, rng: content + rng.randbytes(30),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_damage_turns_a_violated_run_into_a_pass(damage: str, tmp_path: Path) -> None:
    # Its first audit holds: what is lost at the end is what matters.
    rules = [{"metric": "enrichment", "region": "spurious", "max": 1.5}]
    policy = Policy.model_validate({"rules": rules, "min_samples": 5})
    path = make_run(
        tmp_path / "run", regions=(("hair", "spurious"),), hair_enrichment=1.7, spread=0.02, policy=policy, audits=3
    )
    run = read_run(path)
    assert run.audits[0].judgement.outcome is Outcome.HELD and run_gate(run).outcome is Outcome.VIOLATED
    whole = {name: (path / name).read_bytes() for name in (AUDITS, MANIFEST)}
    rng = random.Random(damage)
    outcomes = []
    for case in range(18):
        name = MANIFEST if case % 6 == 5 and damage in ("cut", "flip", "flips", "splice", "noise") else AUDITS
        (path / name).write_bytes(DAMAGES[damage](whole[name], rng))
        try:
            outcomes.append(str(run_gate(read_run(path)).outcome))
        except (RecordError, ValueError):
            outcomes.append("refused")
        (path / name).write_bytes(whole[name])
    assert set(outcomes) <= {"refused", "inconclusive", "violated"}
    if damage in ("cut", "few"):
        assert "inconclusive" in outcomes
    elif damage != "noise":
        assert outcomes.count("refused") >= 8


def test_a_clean_run_cut_short_is_no_pass_either(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", **CLEAN, audits=2, regions=(("hair", "spurious"),))
    content = (path / AUDITS).read_bytes()
    assert run_gate(read_run(path)).outcome is Outcome.HELD
    rng = random.Random(0)
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")][:-1]
    for size in (*ends, *(e - 1 for e in ends), len(content) - 1, *(rng.randrange(len(content)) for _ in range(20))):
        (path / AUDITS).write_bytes(content[:size])
        assert run_gate(read_run(path)).outcome is Outcome.INCONCLUSIVE, size
