"""The benchmark's arithmetic on given timings, and a tiny run that writes what it should. Nothing depends on speed."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import benchmarks.contenders
from benchmarks import dashboard, peers
from benchmarks.__main__ import main
from benchmarks.contenders import (
    AFTERWARDS,
    AUDIT,
    AUDIT_GROUP,
    BARE,
    EXPLAIN,
    EXPLANATION_GROUP,
    RIDE,
    TESTED,
    VALIDATION,
    VALIDATION_GROUP,
    Skipped,
    complete_audit,
    explanation,
    validation,
)
from benchmarks.gpu import PRECISIONS, matmul_tflops, measure_device
from benchmarks.memory import Memory, Task, can_measure, measure_all, tasks_of
from benchmarks.peers import CAPTUM, GRADCAM, PEERS, QUANTUS, TORCHCAM, Peer, agreements
from benchmarks.report import markdown, plot, written
from benchmarks.results import Block, Machine, Results, checks
from benchmarks.timing import Contender, Interval, Series, alternate, median_interval, nothing, ratios
from benchmarks.workloads import SPECS, Spec, Workload, make_workload, random_model, tokens_as_map
from bias_audit import AuditPlan, explain, read_run
from bias_audit.attribution.borrow import borrowed
from bias_audit.attribution.layers import find_layer
from bias_audit.data.samples import AuditBatch

TINY = dataclasses.replace(SPECS["resnet18"], batch=2, images=4)
MACHINE = Machine("Abacus(R) 3 CPU @ 1.00GHz", 2, 8.0, "Linux", "3.11", ("torch 2.15.0",), "", 0.1)
PNG = b"\x89PNG\r\n"


@pytest.fixture(scope="module")
def work() -> Workload:
    return make_workload(TINY)


# Timing


@pytest.mark.slow
def test_every_round_runs_each_contender_that_is_due_once_and_in_changing_order() -> None:
    log: list[str] = []
    each = [
        Contender(n, partial(log.append, n), every, nothing) for n, every in (("a", 1), ("b", 1), ("c", 1), ("d", 4))
    ]
    series = alternate(each, rounds=9, seed=1)
    assert [s.contender for s in series] == ["a", "b", "c", "d"]
    rounds = []
    for number in range(9):
        size = 4 if number % 4 == 0 else 3
        rounds.append("".join(log[:size]))
        del log[:size]
    assert not log
    assert all(sorted(r) == list("abcd")[: len(r)] for r in rounds)
    assert len({r.replace("d", "") for r in rounds}) > 2
    assert [s is None for s in series[3].seconds] == [number % 4 != 0 for number in range(9)]
    assert all(s is not None and s >= 0 for s in series[0].seconds)


def test_warm_up_tidying_and_waiting_come_before_the_clock() -> None:
    log: list[str] = []
    contenders = [
        Contender("a", partial(log.append, "run"), warm_up=partial(log.append, "warm")),
        Contender("b", partial(log.append, "run")),
    ]
    alternate(contenders, 1, tidy=partial(log.append, "tidy"), wait=partial(log.append, "wait"))
    assert log == ["tidy", "warm", "tidy", "run", *["tidy", "wait", "run", "wait"] * 2]


def test_ratios_are_taken_within_rounds() -> None:
    fast, slow = Series("fast", (1.0, 2.0, 4.0, None)), Series("slow", (3.0, None, 2.0, 7.0))
    assert ratios(slow, fast).tolist() == [3.0, 0.5]
    assert ratios(fast, slow).tolist() == [1 / 3, 2.0]


def test_the_median_has_the_bootstraps_interval_and_a_few_values_their_range() -> None:
    values = np.random.default_rng(0).normal(2.0, 0.5, 40)
    found = median_interval(values, seed=3)
    rng = np.random.default_rng(7)
    medians = sorted(float(np.median([values[i] for i in rng.integers(40, size=40)])) for _ in range(4000))
    assert found.median == pytest.approx(np.median(values)) and found.rounds == 40
    assert found.low == pytest.approx(medians[100], abs=0.03) and found.high == pytest.approx(medians[3900], abs=0.03)
    assert median_interval(np.array([4.0, 1.0, 2.0, 3.0, 9.0])) == (3.0, 1.0, 9.0, 5)
    assert median_interval(np.array([])).rounds == 0


# Targets


def block(group: str, **seconds: tuple[float | None, ...]) -> Block:
    names = {
        "bare": BARE,
        "explain": EXPLAIN,
        "audit": AUDIT,
        "captum": CAPTUM,
        "torchcam": TORCHCAM,
        "quantus": QUANTUS,
        "alone": VALIDATION,
        "ride": RIDE,
        "tested": TESTED,
        "afterwards": AFTERWARDS,
    }
    return Block("resnet18", group, 10, 5, tuple(Series(names[k], v) for k, v in seconds.items()))


def given(*blocks: Block, memory: tuple[Memory, ...] = ()) -> Results:
    return Results("2026-01-02", MACHINE, threads=2, rounds=3, blocks=blocks, memory=memory)


def outcomes(results: Results) -> dict[str, str]:
    return {check.what: check.outcome for check in checks(results)}


@pytest.mark.parametrize(
    ("explained", "expected"),
    [((1.0, 1.01, 1.02), "met"), ((1.01, 1.02, 1.03), "undecided"), ((1.03, 1.04, 1.05), "missed")],
)
def test_a_target_is_met_or_missed_where_the_whole_interval_is(explained: tuple[float, ...], expected: str) -> None:
    results = given(block(EXPLANATION_GROUP, bare=(1.0, 1.0, 1.0), explain=explained))
    assert outcomes(results) == {"time of an explanation / bare forward": expected}


def test_a_tie_with_a_peer_is_enough_and_being_slower_is_not() -> None:
    timed = block(
        EXPLANATION_GROUP,
        bare=(1.0, 1.0, 1.0),
        explain=(1.0, 1.0, 1.0),
        captum=(0.9, 0.95, 1.1),
        torchcam=(0.8, 0.9, 0.9),
    )
    found = outcomes(given(timed))
    assert found["time of an explanation / captum"] == "met"
    assert found["time of an explanation / torchcam"] == "missed"


def test_targets_of_audits_and_validations() -> None:
    audited = block(AUDIT_GROUP, bare=(1.0, 2.0), audit=(1.04, 2.06), quantus=(4.2, None))
    ridden = block(VALIDATION_GROUP, alone=(1.0, 1.0), ride=(1.02, 1.05))
    found = {check.what: check for check in checks(given(audited, ridden))}
    assert found["time of a complete audit / bare forward"].outcome == "met"
    assert found["time of a complete audit / bare forward"].value.median == pytest.approx(1.035)
    faster = found["time of grad-cam + Quantus / complete audit"]
    assert faster.outcome == "met" and faster.value == (*[pytest.approx(4.2 / 1.04)] * 3, 1)
    assert found["time of a validation with an audit / alone"].outcome == "undecided"


def test_targets_of_memory_compare_what_is_on_top() -> None:
    memory = (
        Memory("resnet18", AUDIT_GROUP, BARE, 800.0, 900.0),
        Memory("resnet18", AUDIT_GROUP, AUDIT, 850.0, 975.0),
        Memory("resnet18", EXPLANATION_GROUP, BARE, 800.0, 900.0),
        Memory("resnet18", EXPLANATION_GROUP, EXPLAIN, 800.0, 910.0),
        Memory("resnet18", EXPLANATION_GROUP, CAPTUM, 800.0, 929.0),
    )
    timed = block(EXPLANATION_GROUP, bare=(1.0,))
    found = {c.what: c for c in checks(given(timed, memory=memory))}
    audit = found["peak memory of a complete audit / bare forward"]
    assert audit.value.median == pytest.approx(1.25) and audit.outcome == "missed"
    captum = found["memory that captum adds to the bare forward / that an explanation adds"]
    assert captum.value.median == pytest.approx(2.9) and captum.outcome == "missed"


# Table and plot


def test_the_table_is_computed_from_the_timings() -> None:
    audited = block(
        AUDIT_GROUP, bare=(1.0, 2.0, 1.0), audit=(1.2, 2.2, 1.3), tested=(1.5, None, None), afterwards=(0.1, 0.1, 0.1)
    )
    page = markdown(given(audited), "plot.png")
    assert "| bare forward | 1000 | 100.00 | 1 | 3 |" in page
    assert "| bias-audit: complete audit | 1300 | 130.00 | 1.20 [1.10, 1.30] | 3 |" in page
    assert "| of it statistics and records | 100 | 10.00 | 0.10 [0.05, 0.10] | 3 |" in page
    # So many images in every so many audits, at 1.5 - 1.3 s each, on top of 1.3 s; the bare forward takes 1 s.
    plan = AuditPlan()
    on_average = 1.3 + 0.2 * plan.fitness_samples / plan.fitness_every
    assert f"takes {on_average:.2f} times the bare forward on average" in page
    assert "![" in page and "(plot.png)" in page and "Abacus" in page


def test_who_took_no_part_is_in_the_table_with_the_reason() -> None:
    skipped = (Skipped("resnet18", EXPLANATION_GROUP, CAPTUM, "not supported: reasons"),)
    results = dataclasses.replace(given(block(EXPLANATION_GROUP, bare=(1.0,))), skipped=skipped)
    assert "| captum | not supported: reasons |" in markdown(results, "plot.png")


@pytest.mark.parametrize(("value", "expected"), [((1.0, 0.9, 1.1, 3), "1.00 [0.90, 1.10]"), ((7.04, 7, 8, 1), "7.0")])
def test_intervals_as_text(value: tuple[float, float, float, int], expected: str) -> None:
    assert written(Interval(*value)) == expected


def test_results_survive_the_disk_and_draw_the_same(tmp_path: Path) -> None:
    results = given(
        block(EXPLANATION_GROUP, bare=(1.0, 2.0), explain=(1.0, None)),
        memory=(Memory("resnet18", EXPLANATION_GROUP, BARE, 1.0, 2.5),),
    )
    results.write(tmp_path / "results.json")
    again = Results.read(tmp_path / "results.json")
    assert again == results
    assert plot(again) == plot(results) and plot(results).startswith(PNG)


def test_the_files_are_named_by_the_machine() -> None:
    assert MACHINE.slug == "abacus-3-2-cores"
    assert dataclasses.replace(MACHINE, device="NVIDIA Adding Machine").slug == "nvidia-adding-machine-2-cores"


# Workloads


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_explained_layer_is_the_one_that_would_be_found(spec: Spec) -> None:
    with borrowed(random_model(spec.model)) as lent:
        images = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        assert find_layer(lent, images) == spec.layer


def test_tokens_are_laid_out_row_by_row() -> None:
    tokens = torch.arange(1 + 4 * 4 * 3).float()[: 1 + 9, None].expand(-1, 2)[None].clone()
    tokens[..., 1] *= -1
    laid_out = tokens_as_map(tokens)
    assert laid_out.shape == (1, 2, 3, 3)
    for row in range(3):
        for column in range(3):
            assert laid_out[0, :, row, column].tolist() == [1 + 3 * row + column, -(1 + 3 * row + column)]


def test_a_workload_holds_all_cells_and_needs_one_image_of_each(work: Workload) -> None:
    assert [len(b.labels) for b in work.batches] == [2, 2]
    assert sorted((s.label, s.attributes["gender"]) for s in work.audit_set.samples) == [
        (label, gender) for label in (0, 1) for gender in ("female", "male")
    ]
    with pytest.raises(ValueError, match="at least 4 images"):
        make_workload(dataclasses.replace(TINY, images=3))


# Contenders


def test_peers_that_explain_the_same_agree_and_others_are_refused(
    work: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    def same(work: Workload, batch: AuditBatch) -> Tensor:
        return 3 * explain(work.model, batch.images, target=batch.labels, layer="layer4").maps + 1

    def other_class(work: Workload, batch: AuditBatch) -> Tensor:
        return explain(work.model, batch.images, target=1 - batch.labels, layer="layer4").maps

    def use(maps: Callable[[Workload, AuditBatch], Tensor]) -> None:
        monkeypatch.setattr(peers, "PEERS", (Peer("peer", ("torch",), maps),))

    use(same)
    (agreement,) = agreements(work)
    assert agreement.images == 2 and agreement.correlation == pytest.approx(1)
    use(other_class)
    with pytest.raises(RuntimeError, match="peer's maps are not ours"):
        agreements(work)


def test_the_installed_peers_explain_the_same(work: Workload) -> None:
    found = {a.contender for a in agreements(work)}
    # Both are among the development tools.
    assert {GRADCAM, CAPTUM} <= found


def test_a_peer_that_is_missing_or_unsuited_says_so(work: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = dataclasses.replace(PEERS[0], modules=("torch", "no_such_package"))
    monkeypatch.setattr(benchmarks.contenders, "PEERS", (missing,))
    group = explanation(work, Path())
    assert [c.name for c in group.contenders] == [BARE, EXPLAIN]
    assert group.skipped == (Skipped("resnet18", EXPLANATION_GROUP, GRADCAM, "not installed"),)
    of_tokens = dataclasses.replace(work, spec=dataclasses.replace(TINY, reshape=tokens_as_map))
    captum = next(p for p in PEERS if p.name == CAPTUM)
    assert captum.excuse(of_tokens).startswith("not supported") and not captum.excuse(work)


def test_the_audit_that_is_timed_is_recorded_each_time(work: Workload, tmp_path: Path) -> None:
    group = complete_audit(work, tmp_path / "run")
    by_name = {c.name: c for c in group.contenders}
    assert list(by_name)[:4] == [BARE, AUDIT, AFTERWARDS, TESTED]
    by_name[AUDIT].run()
    by_name[AFTERWARDS].run()
    audits = read_run(tmp_path / "run").audits
    assert [a.trigger for a in audits] == ["reference", "manual", "manual"]
    # What comes after the last forward pass comes to the same whoever made the passes.
    assert audits[1].estimates == audits[2].estimates
    metrics = {e.metric for e in audits[1].estimates}
    assert {"energy_share_gain", "relevance_rank_accuracy", "accuracy_gap"} <= metrics


def test_the_audit_that_rides_along_measures_the_same(work: Workload, tmp_path: Path) -> None:
    group = validation(work, tmp_path / "ridden")
    assert [c.name for c in group.contenders] == [VALIDATION, RIDE] and not group.skipped
    passes: list[object] = []
    handle = work.model.register_forward_hook(lambda *_: passes.append(None))
    group.contenders[1].run()
    handle.remove()
    assert len(passes) == len(work.batches)
    own = complete_audit(work, tmp_path / "own")
    own.contenders[1].run()
    ridden, apart = (read_run(tmp_path / name).audits[-1] for name in ("ridden", "own"))
    assert len(ridden.estimates) == len(apart.estimates)
    for a, b in zip(ridden.estimates, apart.estimates, strict=True):
        assert (a.metric, a.region, a.class_name, a.group, a.n) == (b.metric, b.region, b.class_name, b.group, b.n)
        assert a.value == pytest.approx(b.value, abs=1e-4)


def test_a_model_that_nobody_may_ride_along_with_is_left_out(work: Workload, tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer4 = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.ReLU())
            self.head = nn.Linear(4, 2)

        def forward(self, images: Tensor) -> Tensor:
            maps = self.layer4(images)
            # Grad makes this model compute something else.
            offset = 1.0 if maps.requires_grad else 0.0
            return self.head(maps.mean(dim=(2, 3))) + offset

    group = validation(dataclasses.replace(work, model=Twice().eval()), tmp_path / "run")
    assert [c.name for c in group.contenders] == [VALIDATION]
    assert [s.contender for s in group.skipped] == [RIDE] and group.skipped[0].reason


# Memory


def test_who_is_measured() -> None:
    names = [BARE, AUDIT, AFTERWARDS, TESTED]
    spec = dataclasses.replace(TINY, batch=4, images=64)
    tasks = tasks_of(spec, AUDIT_GROUP, names)
    assert [(t.contender, t.spec.images) for t in tasks] == [(BARE, 4), (AUDIT, 4)]
    assert tasks_of(spec, VALIDATION_GROUP, [VALIDATION, RIDE]) == []


@pytest.mark.slow
@pytest.mark.skipif(not can_measure(), reason="this system does not tell a process its own peak")
def test_a_graph_through_the_whole_model_is_seen_in_the_memory() -> None:
    spec = dataclasses.replace(TINY, batch=8, images=8)
    tasks = [Task(spec, EXPLANATION_GROUP, name) for name in (BARE, EXPLAIN, CAPTUM)]
    bare, ours, captum = measure_all(tasks)
    assert [m.contender for m in (bare, ours, captum)] == [BARE, EXPLAIN, CAPTUM]
    # The first convolution's output alone, 8 x 64 x 112 x 112 floats, takes 24.5 MiB.
    assert bare.added > 24
    assert ours.added < 1.5 * bare.added < captum.added


def test_a_measurement_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="memory of nobody"):
        measure_all([Task(dataclasses.replace(TINY, model="none"), EXPLANATION_GROUP, "nobody")])


# The accelerator's part, on the processor


@pytest.mark.slow
def test_the_accelerators_part_goes_through_its_steps() -> None:
    rows = measure_device([SPECS["resnet18"]], device="cpu", batches=(2,), rounds=1, size=64, matmul_size=64)
    assert [(r.model, r.precision, r.batch) for r in rows] == [("resnet18", p.name, 2) for p in PRECISIONS]
    for row in rows:
        # ResNet-18 takes 1.8e9 multiplications and additions at 224 pixels, as many floating point operations twice.
        per_image = row.tflops * 1e12 / row.images_per_second
        assert per_image == pytest.approx(2 * 1.814e9 * (64 / 224) ** 2, rel=0.02)
        assert row.explanation.median > 0 and row.audit.rounds == 1 and row.bare_mib is None and row.waits == ()
    assert "channels-last | 2 |" in markdown(dataclasses.replace(given(), device_rows=rows), "plot.png")


def test_the_rate_of_a_matrix_product_is_positive() -> None:
    assert matmul_tflops(torch.float32, "cpu", 32, repeats=1) > 0


# All of it


@pytest.mark.slow
def test_a_tiny_run_writes_table_plot_and_timings_and_can_be_redrawn(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    small = ["--models", "resnet18", "--rounds", "1", "--batch", "2", "--images", "4", "--threads", str(threads)]
    results = main([*small, "--no-memory", "--out", str(tmp_path)])
    (data,) = tmp_path.glob("*.json")
    page, image = data.with_suffix(".md"), data.with_suffix(".png")
    assert Results.read(data) == results and image.read_bytes().startswith(PNG)
    text = page.read_text()
    rows = {line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")}
    names = {BARE, EXPLAIN, AUDIT, AFTERWARDS, TESTED, VALIDATION, RIDE, GRADCAM, CAPTUM, TORCHCAM, QUANTUS}
    assert names <= rows
    timed = {s.contender: s for b in results.blocks for s in b.series}
    assert names - set(timed) == {s.contender for s in results.skipped}
    # The figures in the table are those of the raw timings.
    explained = results.blocks[0]
    ours, bare = explained.of(EXPLAIN), explained.of(BARE)
    assert ours is not None and bare is not None and ours.seconds[0] is not None and bare.seconds[0] is not None
    ratio = ours.seconds[0] / bare.seconds[0]
    row = re.search(rf"\| {EXPLAIN} \| (\S+) \| (\S+) \| (\S+) \| 1 \|", text)
    assert row is not None
    assert float(row[1]) == pytest.approx(1e3 * ours.seconds[0], abs=0.5)
    assert float(row[2]) == pytest.approx(1e3 * ours.seconds[0] / 2, abs=0.01)
    assert float(row[3]) == pytest.approx(ratio, abs=0.05)
    page.write_text("")
    image.unlink()
    assert main(["--redraw", str(data)]) == results
    assert page.read_text() == text and image.read_bytes().startswith(PNG)


@pytest.mark.slow
def test_the_dashboards_are_measured_on_a_real_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--images", "12", "--audits", "2", "--foreground-audits", "1", "--overlays", "5"]
    measured = dashboard.main([*options, "--out", str(tmp_path / "out")])
    # One more audit than asked for: the last carries evidence on, so training ends with one.
    assert len(measured.background) == measured.audits == 3 and len(measured.foreground) == 1
    assert all(0 < stall < 60_000 for stall in (*measured.background, *measured.foreground))
    assert (measured.page_samples, measured.page_audits) == (12, 3) and measured.page_bytes > 100_000
    (page,) = (tmp_path / "out").glob("dashboard-*.md")
    assert f"{measured.page_bytes:,} bytes" in page.read_text() and "| 3 | at most 50 ms |" in page.read_text()
    (raw,) = (tmp_path / "out").glob("dashboard-*.json")
    assert json.loads(raw.read_text())["page_bytes"] == measured.page_bytes
