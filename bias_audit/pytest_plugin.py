"""The gate among a team's tests: a pytest plugin.

Enters: the mark `bias_audit` on a test, or a call of the fixture `bias_gate` in one. Leaves: a test that passes only if
the gate does; else what `bias-audit gate` prints, as the reason of its failure.

pytest loads this module wherever bias-audit is installed, so that it imports nothing until a test asks for the gate,
and then neither torch nor Lightning unless a checkpoint is to be dated.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import pytest

if TYPE_CHECKING:
    from bias_audit.gate.result import FailOn, GateResult, OnInconclusive
    from bias_audit.policies.policy import Policy

    Rules = Policy | str | Path | Mapping[str, Any]

MARK = "bias_audit"
FIXTURE = "bias_gate"
RUN = "bias_audit_run"


class BiasAuditWarning(pytest.PytestWarning):
    """The gate let pass what a person should know of: a violated warning, or evidence that shows nothing."""


class BiasGate:
    """What the fixture `bias_gate` gives: the gate, to be called by a test."""

    def __init__(self, item: pytest.Item) -> None:
        self._item, self.called = item, False

    def __call__(
        self,
        run: str | Path | None = None,
        *,
        policy: Rules | None = None,
        baseline: str | Path | None = None,
        checkpoint: str | Path | None = None,
        fail_on: FailOn | None = None,
        on_inconclusive: OnInconclusive | None = None,
    ) -> GateResult:
        """Fail the test unless the gate passes; return what it found.

        What is not given is taken from the test's mark. Relative paths start at pytest's rootdir.

        Args:
            run: a run directory, or what else `bias-audit gate` takes; by default what `--bias-audit-run` says, or
                `bias_audit_run` in pytest's configuration.
            policy: by default the one that the run recorded.
            baseline: what rules with `max_regression` are compared with.
            checkpoint: what is to be released: evidence that is older is stale.
            fail_on: "error" (the default), or "warn": violated rules of severity `warn` fail too. Else they are pytest
                warnings.
            on_inconclusive: "fail" (the default); "warn" and "pass" let a test pass that shows nothing either way.

        Raises:
            pytest.fail.Exception: the gate does not pass, or what it is given is wrong.

        Example:
            >>> def test_every_check_rests_on_many_images(bias_gate):
            ...     result = bias_gate("runs/today", policy="audit.yaml")
            ...     assert all(c.check.estimate.n >= 200 for c in result.checks)
        """
        self.called = True
        given = {name: value for name, value in locals().items() if name in _KNOWN and value is not None}
        try:
            result = self._judge(**(_marked(self._item) | given))
        except (ValueError, OSError) as error:
            wrong = " ".join(str(error).split())
        else:
            _tell(self._item, result)
            return result
        # Not in the handler: the message is all that a person needs, and pytest would show the error as well.
        pytest.fail(f"bias-audit: {wrong}", pytrace=False)

    def _judge(
        self,
        run: str | Path | None = None,
        policy: Rules | None = None,
        baseline: str | Path | None = None,
        checkpoint: str | Path | None = None,
        fail_on: FailOn = "error",
        on_inconclusive: OnInconclusive = "fail",
    ) -> GateResult:
        from bias_audit.gate.result import FailOn, OnInconclusive
        from bias_audit.sources import judge_source

        _check_one_of("fail_on", fail_on, get_args(FailOn))
        _check_one_of("on_inconclusive", on_inconclusive, get_args(OnInconclusive))
        root = self._item.config.rootpath
        return judge_source(
            self._source(run),
            root / policy if isinstance(policy, str | Path) else policy,
            baseline=None if baseline is None else root / baseline,
            checkpoint=None if checkpoint is None else root / checkpoint,
            fail_on=fail_on,
            on_inconclusive=on_inconclusive,
        )

    def _source(self, run: str | Path | None) -> str:
        config = self._item.config
        option, setting = config.getoption(RUN), config.getini(RUN)
        if run is not None:
            base, named = config.rootpath, run
        elif option:
            # As on every command line, a path starts where the person stands.
            base, named = config.invocation_params.dir, option
        elif setting:
            base, named = config.rootpath, setting
        else:
            raise ValueError(
                "which run? Name it in the mark or in the call, by --bias-audit-run, or as bias_audit_run in pytest's "
                "configuration"
            )
        name, path = str(named), base / named
        # One in Weights & Biases, entity/project/run, is no path on this machine.
        elsewhere = name.count("/") == 2 and not name.startswith((".", "/")) and not os.path.lexists(path)
        return name if elsewhere else str(path)


_KNOWN = tuple(inspect.signature(BiasGate.__call__).parameters)[1:]


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option and the setting that name the run."""
    what = "the run that tests marked `bias_audit` judge, where they name none"
    parser.getgroup("bias-audit").addoption("--bias-audit-run", dest=RUN, metavar="DIR", help=what)
    parser.addini(RUN, f"{what}; --bias-audit-run goes before it", default="")


def pytest_configure(config: pytest.Config) -> None:
    """Make the mark known, so that --strict-markers takes it."""
    config.addinivalue_line("markers", f"{MARK}({', '.join(_KNOWN)}): fail the test unless `bias-audit gate` passes.")


@pytest.fixture
def bias_gate(request: pytest.FixtureRequest) -> BiasGate:
    """The gate, to be called by the test: `bias_gate("runs/today", policy="audit.yaml")`."""
    return BiasGate(request.node)


# The innermost wrapper: what pytest does about xfail or captured output then holds for the gate as well.
@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Judge what a test's mark asks for before the test runs; or see that a test which has the fixture judges."""
    asks = FIXTURE in getattr(item, "fixturenames", ())
    if not asks and item.get_closest_marker(MARK) is not None:
        BiasGate(item)()
    result = yield
    if asks and not item.funcargs[FIXTURE].called:  # type: ignore[attr-defined]
        pytest.fail(f"bias-audit: the test has the fixture {FIXTURE} and never called it: nothing is shown", False)
    return result


def _marked(item: pytest.Item) -> dict[str, Any]:
    """The arguments of all marks of a test: its own, its class's, its module's."""
    found: dict[str, Any] = {}
    for mark in item.iter_markers(MARK):
        if mark.args:
            raise ValueError(f"the mark takes named arguments ({', '.join(_KNOWN)}), got {mark.args[0]!r} alone")
        for name, value in mark.kwargs.items():
            if name not in _KNOWN:
                raise ValueError(f"the mark has no argument {name!r}; it takes {', '.join(_KNOWN)}")
            # The nearer mark would win, and one of two policies would never be asked.
            if found.setdefault(name, value) != value:
                raise ValueError(f"two marks of the test give `{name}` ({found[name]!r}, {value!r}): make it two tests")
    return {name: value for name, value in found.items() if value is not None}


def _check_one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")


def _tell(item: pytest.Item, result: GateResult) -> None:
    """Fail the test with what the gate would print, or let it pass and warn of what a person should know."""
    from bias_audit.gate.rows import outcome_words, rows, tally
    from bias_audit.outputs.destinations import defused
    from bias_audit.outputs.formats import render
    from bias_audit.terms import Outcome

    # pytest's summary shows the first line.
    said = f"bias-audit gate: {outcome_words(result)} ({tally(result)})"
    if result.exit_code != 0:
        page = f"{said}\n\n{render(result, 'human')}"
        pytest.fail(defused(page) if "GITHUB_ACTIONS" in os.environ else page, pytrace=False)
    unsaid = result.outcome is Outcome.INCONCLUSIVE and result.on_inconclusive == "pass"
    if any(row.state == "warning" for row in rows(result)) or (result.outcome is not Outcome.HELD and not unsaid):
        item.warn(BiasAuditWarning(f"{result.source}: {said}"))
