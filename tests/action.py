"""Runs the steps of action.yml as GitHub's runner would.

Enters: the inputs of the action. Leaves: its outputs, exit code, log and step summary. Only steps that are scripts are
run; of a step that uses another action the values it would get are kept.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text())
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
# The two kinds of expression that values in action.yml are made of.
_EXPRESSION = re.compile(r"\$\{\{ (inputs|steps)\.([\w-]+)(?:\.outputs\.([\w-]+))? \}\}")


@dataclass(frozen=True)
class Ran:
    """What is left of an action that ran; `uploaded` are the paths that it uploads, () for none."""

    code: int
    log: str
    outputs: dict[str, str]
    summary: str
    uploaded: tuple[Path, ...]


def run_action(folder: Path, **inputs: str | Path) -> Ran:
    """Run the action in `folder`, with `_` for `-` in the names of inputs; by default with the installed command."""
    given = {name: str(spec.get("default", "")) for name, spec in ACTION["inputs"].items()}
    given |= {name.replace("_", "-"): str(value) for name, value in ({"install": "none"} | inputs).items()}
    assert set(given) == set(ACTION["inputs"]), "an unknown input"
    temporary = folder / "runner-temp"
    temporary.mkdir(exist_ok=True)
    summary, log, code = temporary / "summary", "", 0
    summary.write_text("")
    outputs: dict[str, dict[str, str]] = {}

    def filled(text: str) -> str:
        return _EXPRESSION.sub(lambda m: given[m[2]] if m[1] == "inputs" else outputs.get(m[2], {}).get(m[3], ""), text)

    for step in ACTION["runs"]["steps"]:
        if "run" not in step or code:
            continue
        assert step["shell"] == "bash"
        script, said = temporary / "script.sh", temporary / f"output-{step['id']}"
        script.write_text(step["run"])
        said.write_text("")
        environment = os.environ | {
            "PATH": PATH,
            "GITHUB_ACTIONS": "true",
            "GITHUB_ACTION_PATH": str(ROOT),
            "GITHUB_WORKSPACE": str(folder),
            "GITHUB_OUTPUT": str(said),
            "GITHUB_STEP_SUMMARY": str(summary),
            "RUNNER_TEMP": str(temporary),
            **{name: filled(value) for name, value in step.get("env", {}).items()},
        }
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            check=False,
        )
        log, code = log + done.stdout, done.returncode
        outputs[step["id"]] = dict(line.split("=", 1) for line in said.read_text().splitlines())
    values = {name: filled(spec["value"]) for name, spec in ACTION["outputs"].items()}
    (upload,) = (step for step in ACTION["runs"]["steps"] if "uses" in step)
    always, *conditions = upload["if"].removeprefix("${{ ").removesuffix(" }}").split(" && ")
    assert always == "always()" and all(condition.endswith(" != ''") for condition in conditions)
    wanted = all(filled(f"${{{{ {condition.split()[0]} }}}}") for condition in conditions)
    paths = tuple(Path(line) for line in filled(upload["with"]["path"]).splitlines()) if wanted else ()
    return Ran(code, log, values, summary.read_text(), paths)
