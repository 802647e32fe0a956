"""The pytest plugin, as a team has it: installed, in pytest processes of their own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic import make_run

pytest_plugins = ["pytester"]

CLEAN = {"hair_enrichment": 0.7, "gap": 0.02, "spread": 0.02, "audits": 1}
LAX = "min_samples: 5\nrules: [{metric: enrichment, region: spurious, max: 100}]\n"
STRICT = LAX.replace("100", "0.1")
WARNS = STRICT.replace("}]", ", severity: warn}, {metric: enrichment, region: spurious, max: 100}]")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs clean, biased and wide; not to be written to."""
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "clean", **CLEAN)
    make_run(folder / "biased", audits=2)
    make_run(folder / "wide", **CLEAN | {"spread": 3.0})
    return folder


@pytest.fixture
def project(pytester: pytest.Pytester, runs: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """An empty project that is strict about marks, with policies and links to the runs."""
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    monkeypatch.setenv("COLUMNS", "160")
    # Others' plugins take a second to load.
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:hypothesispytest -p no:xdist -p no:anyio -p no:cacheprovider")
    for name, text in (("lax", LAX), ("strict", STRICT), ("warns", WARNS), ("misspelt", LAX.replace("max", "maks"))):
        (pytester.path / f"{name}.yaml").write_text(text)
    (pytester.path / "runs").symlink_to(runs)
    pytester.makeini("[pytest]\naddopts = --strict-markers\nbias_audit_run = runs/clean\n")
    return pytester


def outcomes(result: pytest.RunResult) -> dict[str, str]:
    """The outcome of each test by its name, of a run with -v."""
    words = (line.split() for line in result.outlines if "::" in line and "%]" in line)
    return {name.split("::")[-1]: outcome.lower() for name, outcome, *_ in words}


def test_a_planted_bias_fails_its_test_and_no_other(project: pytest.Pytester) -> None:
    project.makepyfile(
        """
        import unittest
        import pytest

        @pytest.mark.bias_audit
        def test_clean(): print("the body ran")

        @pytest.mark.bias_audit(run="runs/biased")
        def test_biased(): raise SystemExit("the body must not run")

        @pytest.mark.bias_audit(run="runs/wide")
        def test_wide(): pass

        @pytest.mark.bias_audit(run="runs/wide", on_inconclusive="pass")
        def test_wide_passed(): pass

        @pytest.mark.bias_audit(policy="strict.yaml")
        def test_strict(): pass

        @pytest.mark.bias_audit(run="runs/biased", policy="lax.yaml")
        def test_lax(): pass

        @pytest.mark.bias_audit(policy="warns.yaml", fail_on="warn")
        def test_warns_fail(): pass

        @pytest.mark.xfail(strict=True, reason="known")
        @pytest.mark.bias_audit(run="runs/biased")
        def test_known(): pass

        @pytest.mark.bias_audit(run="runs/biased")
        class TestOfClass:
            @pytest.mark.bias_audit(policy="lax.yaml")
            def test_its_policy(self): pass
            def test_its_run(self): pass

        @pytest.mark.bias_audit(run="runs/biased")
        class TestOfUnittest(unittest.TestCase):
            def test_unittest(self): pass

        def test_unmarked(): pass
        """
    )
    result = project.runpytest_subprocess("-v")
    assert outcomes(result) == {
        "test_clean": "passed",
        "test_biased": "failed",
        "test_wide": "failed",
        "test_wide_passed": "passed",
        "test_strict": "failed",
        "test_lax": "passed",
        "test_warns_fail": "failed",
        "test_known": "xfail",
        "test_its_policy": "passed",
        "test_its_run": "failed",
        "test_unittest": "failed",
        "test_unmarked": "passed",
    }
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    # What bias-audit gate prints is the whole reason: no traceback, and the outcome in its first line.
    result.stdout.fnmatch_lines(
        [
            "*_ test_biased _*",
            "bias-audit gate: violated (3 violated, *",
            "*enrichment on hair (gradcam)*violated*",
            "*images: portrait-*",
            "bias-audit gate: violated: verdict on region hair: reliance.*",
            "*_ test_wide _*",
            "bias-audit gate: inconclusive (*",
            "bias-audit gate: inconclusive: verdict on region hair: inconclusive*",
            "FAILED *::test_biased - Failed: bias-audit gate: violated (*",
        ]
    )
    text = result.stdout.str()
    assert "Traceback" not in text and "pytest_plugin" not in text and "BiasAuditWarning" not in text


def test_what_passes_is_told_of_where_it_should_be(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning is one of pytest's; and what data says is no command to GitHub's runner, which reads the log."""
    make_run(project.path / "hostile", audits=1, ids=[f"##[error]{i}" for i in range(24)])
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    project.makepyfile(
        """
        import pytest

        @pytest.mark.bias_audit(run="hostile")
        def test_hostile(): pass

        @pytest.mark.bias_audit(run="runs/wide", on_inconclusive="warn")
        def test_wide(): pass

        @pytest.mark.bias_audit(policy="warns.yaml")
        def test_warns(): pass
        """
    )
    result = project.runpytest_subprocess()
    result.assert_outcomes(passed=2, failed=1, warnings=2)
    assert "# #[error]" in result.stdout.str() and "##[" not in result.stdout.str()
    result.stdout.fnmatch_lines(
        [
            "*BiasAuditWarning: *runs/wide: bias-audit gate: inconclusive (exit code 0, as asked) (*",
            "*BiasAuditWarning: *runs/clean: bias-audit gate: passed (*violated as a warning*",
        ]
    )


def test_the_fixture(project: pytest.Pytester) -> None:
    project.makepyfile(
        """
        import pytest

        def test_result(bias_gate):
            result = bias_gate()
            assert result.exit_code == 0 and result.source.endswith("runs/clean")
            assert {c.check.outcome for c in result.checks} == {"held"}

        def test_biased(bias_gate):
            bias_gate("runs/biased")

        def test_mapping(bias_gate):
            bias_gate("runs/biased", policy={"min_samples": 5, "rules": [{"metric": "accuracy", "min": 0.2}]})

        def test_forgotten(bias_gate): pass

        @pytest.mark.bias_audit(policy="strict.yaml")
        def test_forgotten_with_mark(bias_gate): pass

        @pytest.mark.bias_audit(policy="strict.yaml")
        def test_mark_gives_the_rest(bias_gate):
            bias_gate("runs/clean")

        @pytest.mark.bias_audit(policy="strict.yaml")
        def test_call_goes_before_the_mark(bias_gate):
            bias_gate(policy="lax.yaml")
        """
    )
    result = project.runpytest_subprocess("-v", "-rf")
    assert outcomes(result) == {
        "test_result": "passed",
        "test_biased": "failed",
        "test_mapping": "passed",
        "test_forgotten": "failed",
        "test_forgotten_with_mark": "failed",
        "test_mark_gives_the_rest": "failed",
        "test_call_goes_before_the_mark": "passed",
    }
    result.stdout.fnmatch_lines(["bias-audit: the test has the fixture bias_gate and never called it*"])
    assert result.stdout.str().count("enrichment on hair") > 0


def test_what_is_misspelt_fails_in_one_line(project: pytest.Pytester) -> None:
    project.makepyfile(
        """
        import pytest
        bias_audit = pytest.mark.bias_audit

        @bias_audit(polcy="lax.yaml")
        def test_argument(): pass

        @bias_audit("runs/clean")
        def test_unnamed(): pass

        @bias_audit(policy="misspelt.yaml")
        def test_key(): pass

        @bias_audit(run="runs/cleen")
        def test_run(): pass

        @bias_audit(on_inconclusive="ignore")
        def test_choice(): pass

        @bias_audit(policy="lax.yaml")
        @bias_audit(policy="strict.yaml")
        def test_two_policies(): pass
        """
    )
    result = project.runpytest_subprocess("-v")
    assert set(outcomes(result).values()) == {"failed"}
    text = result.stdout.str()
    root = project.path
    for line in (
        "bias-audit: the mark has no argument 'polcy'; it takes run, policy, baseline, checkpoint, fail_on, ",
        "bias-audit: the mark takes named arguments (run, policy, ",
        f"bias-audit: policy {root}/misspelt.yaml, line 2: rules.0.maks: unknown key",
        f"bias-audit: {root}/runs/cleen: no such file or directory",
        "bias-audit: on_inconclusive: expected one of fail, warn, pass, got 'ignore'",
        "bias-audit: two marks of the test give `policy` ('strict.yaml', 'lax.yaml'): make it two tests",
    ):
        assert f"\n{line}" in text
    assert "Traceback" not in text and "exception occurred" not in text


@pytest.mark.parametrize("kind", ["clean", "biased"])
def test_what_the_documentation_shows(kind: str, project: pytest.Pytester, runs: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "gate.md").read_text()
    code, setting = (re.search(rf"^```{name}\n(.*?)^```", page, re.DOTALL | re.MULTILINE) for name in ("python", "ini"))
    assert code is not None and setting is not None
    project.makepyfile(code[1])
    project.makeini(setting[1])
    (project.path / "runs").unlink()
    (project.path / "runs").mkdir()
    (project.path / "runs" / "candidate").symlink_to(runs / kind)
    (project.path / "audit.yaml").write_text(LAX.replace("100", "1.5"))
    result = project.runpytest_subprocess("-v")
    expected = {"clean": ("passed", "passed"), "biased": ("failed", "passed")}[kind]
    names = ("test_the_model_looks_at_the_right_thing", "test_it_is_no_worse_for_anybody")
    assert outcomes(result) == dict(zip(names, expected, strict=True))


def test_the_run_by_option(project: pytest.Pytester) -> None:
    """The option goes before the setting and starts at the working directory; without either there is no pass."""
    (project.path / "tests").mkdir()
    (project.path / "tests" / "test_it.py").write_text(
        "import pytest\n@pytest.mark.bias_audit(policy='lax.yaml')\ndef test_it(): pass\n"
        "@pytest.mark.bias_audit\ndef test_recorded(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-v", "--rootdir", str(project.path)]

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [*command, *arguments], cwd=project.path / "tests", capture_output=True, text=True, check=False
        )
        return done.stdout

    text = run("--bias-audit-run", "../runs/biased")
    assert "test_it PASSED" in text and "test_recorded FAILED" in text and "1 failed, 1 passed" in text
    (project.path / "tox.ini").write_text("[pytest]\n")
    text = run()
    assert "2 failed" in text and text.count("\nbias-audit: which run? Name it in the mark") == 2


PROBE = """
import sys
import pytest

code = pytest.main(["-q", *sys.argv[1:]])
heavy = {"torch", "pytorch_lightning", "lightning", "wandb", "numpy", "pydantic", "rich", "typer"}
print(sorted(heavy & set(sys.modules)), sorted(name for name in sys.modules if name.startswith("bias_audit")))
sys.exit(code)
"""


def test_pytest_starts_as_fast_as_without(project: pytest.Pytester) -> None:
    """Nothing is imported until a test asks for the gate, and then neither torch nor Lightning nor wandb."""
    project.makepyfile(
        "import pytest\ndef test_other(): pass\n@pytest.mark.bias_audit(run='runs/biased')\ndef test_gate(): pass\n"
    )
    (project.path / "probe.py").write_text(PROBE)
    other = project.runpython_c(f"import sys; sys.argv[1:] = ['-k', 'test_other']\n{PROBE}")
    assert other.ret == 0 and other.outlines[-1] == "[] ['bias_audit', 'bias_audit.lazily', 'bias_audit.pytest_plugin']"
    gate = project.runpython_c(f"import sys; sys.argv[1:] = ['-k', 'test_gate']\n{PROBE}")
    assert gate.ret == 1 and gate.outlines[-1].startswith("['numpy', 'pydantic', 'rich']")
