"""What a notebook shows: everything that comes from data escaped, and a figure that belongs to who asked for it."""

from __future__ import annotations

import io
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import training
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from synthetic import make_run

from bias_audit import Auditor
from bias_audit.overlays import overlay
from bias_audit.records.panels import most_looked
from bias_audit.records.results import AuditResult
from bias_audit.records.runs import Run, read_run
from bias_audit.terms import Verdict

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return read_run(make_run(tmp_path_factory.mktemp("runs") / "run", audits=1, removal={"hair": 0.6, "face": 0.0}))


@pytest.fixture(scope="module")
def result(run: Run) -> AuditResult:
    return result_of(run)


def result_of(run: Run) -> AuditResult:
    return AuditResult(**vars(run.audits[-1]), scores=run.scores(-1))


class _Read(HTMLParser):
    """The text of a page, and the tags and attributes in it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.tags, self.attributes = "", set[str](), set[str]()
        self.open: list[str] = []
        self.feed(html)
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def drawn(figure: Figure) -> np.ndarray[Any, Any]:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=60)
    return np.asarray(Image.open(buffer).convert("RGB"))


def words(figure: Figure) -> list[str]:
    """All texts of a figure, in its parts too."""
    return [artist.get_text() for artist in figure.findobj(Text) if artist.get_text()]  # type: ignore[attr-defined]


def test_an_audit_says_its_verdicts(result: AuditResult) -> None:
    read = _Read(result._repr_html_())
    assert "Bias audit at step 100, epoch 0, raw weights: policy violated" in read.text
    for finding in result.judgement.findings:
        assert f"{finding.kind} {finding.name}" in read.text and finding.sentence in read.text
    assert "✕ reliance" in read.text and "✓ cleared" in read.text
    overall = result.estimate("enrichment", region="hair", method="gradcam")
    assert str(overall) in read.text and str(result.estimate("accuracy", class_name="nurse")) not in read.text
    # A run read back shows its audits in the same way.
    assert result.summary()._repr_html_() == result._repr_html_()


def test_a_finding_says_its_evidence(result: AuditResult) -> None:
    hair = result.judgement.findings[0]
    read = _Read(hair._repr_html_())
    assert hair.verdict is Verdict.RELIANCE and "✕ reliance region hair" in read.text and hair.sentence in read.text
    assert hair.evidence and all(str(e) in read.text for e in hair.evidence)


def test_names_are_escaped(tmp_path: Path) -> None:
    path = make_run(
        tmp_path / "run",
        audits=1,
        regions=((HOSTILE, "spurious"), ("coat", "object")),
        attributes=(('"><img src=x onerror=alert(1)>', ("x", "y")),),
    )
    result = result_of(read_run(path))
    for html in (result._repr_html_(), *(f._repr_html_() for f in result.judgement.findings)):
        read = _Read(html)
        assert not read.tags & {"script", "img"} and read.attributes <= {"style"}
    assert HOSTILE in _Read(result._repr_html_()).text


def test_the_figure_shows_verdicts_enrichment_and_the_worst(result: AuditResult, run: Run) -> None:
    figure = result.plot(run.sheet())
    shown = " ".join(words(figure))
    for finding in result.judgement.findings:
        assert f"{finding.verdict}: {finding.kind} {finding.name}" in shown
    verdicts, charts, worst = figure.subfigs
    (axes,) = charts.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["coat", "hair", "face"]
    # Points and intervals are those that were measured.
    for method, container in zip(("gradcam", "hirescam"), axes.containers, strict=True):
        points, _, (bars,) = container
        wanted = [result.estimate("enrichment", region=r, method=method) for r in ("coat", "hair", "face")]
        assert points.get_xdata().tolist() == pytest.approx([e.value for e in wanted])
        ends = [segment[:, 0].tolist() for segment in bars.get_segments()]
        assert np.array(ends) == pytest.approx(np.array([[e.low, e.high] for e in wanted]))
    order = most_looked(result.scores, ("hair", "face"), 4)
    titles = [a.get_title() for a in worst.axes]
    assert [title.split("\n")[0] for title in titles] == [result.scores.ids[looked.row] for looked in order]
    picture = Image.open(io.BytesIO(run.sheet().thumbnails[order[0].row])).convert("RGB")
    wanted = overlay(picture, result.scores.maps[0, order[0].row].astype(np.float32))
    assert np.array_equal(worst.axes[0].images[0].get_array(), np.asarray(wanted))
    assert drawn(figure).shape[1] == 480 and verdicts.texts


def test_the_figure_without_images_shows_the_maps(result: AuditResult) -> None:
    figure = result.plot(samples=5)
    shown = [a.images[0].get_array() for a in figure.subfigs[2].axes if a.images]
    assert len(shown) == 5
    row = most_looked(result.scores, ("hair", "face"), 1)[0].row
    assert np.array_equal(shown[0], result.scores.maps[0, row].astype(np.float32))
    drawn(figure)


def test_nothing_to_draw_is_no_error(tmp_path: Path, result: AuditResult) -> None:
    assert len(result.plot(samples=0).subfigs) == 2
    path = make_run(tmp_path / "run", audits=1, regions=(("coat", "object"),), attributes=(), samples=4, silent=4)
    figure = result_of(read_run(path)).plot()
    assert len(figure.subfigs) == 2
    drawn(figure)


def test_odd_names_are_drawn_as_text_within_the_figure(tmp_path: Path) -> None:
    path = make_run(
        tmp_path / "run",
        audits=1,
        regions=(("$\\frac{1}$", "spurious"), ("x" * 300, "object"), ("a\nb\x07", "spurious")),
        ids=["y" * 300, "$\\bad", *map(str, range(22))],
    )
    figure = result_of(read_run(path)).plot(samples=12)
    drawn(figure)
    renderer = FigureCanvasAgg(figure).get_renderer()
    for artist in figure.findobj(Text):
        # Numbers of ticks beyond an axis' end are there, but not drawn.
        if len(artist.get_text()) > 5 and artist.get_visible():  # type: ignore[attr-defined]
            box = artist.get_window_extent(renderer)
            assert box.x0 >= -1 and box.x1 <= figure.bbox.width + 1, artist


@pytest.mark.parametrize("samples", [-1, 13])
def test_samples_out_of_range(samples: int, result: AuditResult) -> None:
    with pytest.raises(ValueError, match=f"samples: expected 0 to 12, got {samples}"):
        result.plot(samples=samples)


def test_a_sheet_of_other_images_is_refused(result: AuditResult, tmp_path: Path) -> None:
    other = read_run(make_run(tmp_path / "run", audits=1, samples=3)).sheet()
    with pytest.raises(ValueError, match="it lacks 21 of the audited samples"):
        result.plot(other)


def test_a_real_audit(tmp_path: Path) -> None:
    auditor = Auditor(training.audit_set())
    result = auditor.run(training.Net(), step=0)
    assert "Bias audit at step 0" in _Read(result._repr_html_()).text
    assert drawn(result.plot(auditor.sheet)).std() > 10


def test_what_is_imported_and_what_is_missing(run: Run) -> None:
    script = f"""
import sys
from bias_audit.records.runs import read_run
from bias_audit.records.results import AuditResult
import bias_audit.verdicts.findings
heavy = {{"torch", "numpy", "markupsafe", "matplotlib"}} & set(sys.modules)
assert not heavy, heavy
run = read_run({str(run.path)!r})
result = AuditResult(**vars(run.audits[-1]), scores=run.scores(-1))
result._repr_html_()
assert "matplotlib" not in sys.modules
sys.modules["matplotlib"] = sys.modules["matplotlib.figure"] = None
try:
    result.plot()
except ModuleNotFoundError as error:
    assert "pip install 'bias-audit[plot]'" in str(error), error
else:
    raise AssertionError("drawn without matplotlib")
del sys.modules["matplotlib"], sys.modules["matplotlib.figure"]
result.plot(run.sheet())
assert not {{"torch", "matplotlib.pyplot"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
