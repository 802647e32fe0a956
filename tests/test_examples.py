"""What the examples of clips and of a Vision Transformer rest on; `make examples` runs all of them."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from example_files import example
from PIL import Image
from torch.utils.data import DataLoader

from bias_audit import Auditor, AuditPlan, audit_model, explain
from bias_audit.data.samples import AuditBatch
from bias_audit.gate.gate import run_gate
from bias_audit.stages.riding import RideAlong

video = example("video")


def test_a_sheet_holds_the_frames_of_its_clip() -> None:
    clips = video.film(4, usual=0.5, seed=0).frames
    sheets = video.as_sheets(clips)
    assert sheets.shape == (4, 3, 64, 128)
    for frame in range(8):
        top, left = frame // 4 * 32, frame % 4 * 32
        assert torch.equal(sheets[:, :, top : top + 32, left : left + 32], clips[:, :, frame])
    assert torch.equal(video.as_clips(sheets), clips)


def plan() -> AuditPlan:
    """The example's, and neither interventions nor a test of the methods."""
    return AuditPlan(
        layer="features",
        forward_fn=lambda model, sheets: model(video.as_clips(sheets)),
        layout=video.as_sheets,
        fitness_samples=0,
        intervention_samples=0,
    )


def test_an_audit_of_sheets_has_the_maps_of_the_clips() -> None:
    torch.manual_seed(0)
    model, clips = video.Classifier().eval(), video.film(8, usual=0.5, seed=0)
    # As the audit reads them: in steps of a 255th.
    frames = (255 * clips.frames).byte().float() / 255
    scores = audit_model(model, video.audit_set_of(clips), plan=plan()).scores
    assert scores is not None and scores.maps.shape == (2, 8, 16, 32)

    def margin(outputs: torch.Tensor) -> torch.Tensor:
        own = outputs.gather(1, clips.actions[:, None])[:, 0]
        return own - outputs.gather(1, 1 - clips.actions[:, None])[:, 0]

    for method, found in zip(scores.methods, torch.from_numpy(scores.maps).float(), strict=True):
        expected = video.as_sheets(explain(model, frames, layer="features", method=method, target=margin).maps[:, None])
        peak = expected.flatten(1).amax(dim=1).clamp_min(1e-30)
        torch.testing.assert_close(found, expected[:, 0] / peak[:, None, None], atol=1e-3, rtol=0)


def test_an_audit_of_sheets_rides_along_with_their_validation() -> None:
    torch.manual_seed(0)
    model, audit_set = video.Classifier().eval(), video.audit_set_of(video.film(8, usual=0.5, seed=0))
    auditor = Auditor(audit_set, plan())
    auditor.prepare(model)
    riding = RideAlong(auditor, model, {index: index for index in range(8)}, nullcontext)
    with torch.no_grad():
        for batch in DataLoader(audit_set, batch_size=4, collate_fn=AuditBatch.collate):  # type: ignore[type-var]
            riding.begin(batch)
            model(video.as_clips(batch.images))
            riding.end()
    ridden = riding.finish()
    assert ridden is not None, riding.reason
    own = auditor.run(model).scores
    assert own is not None
    torch.testing.assert_close(ridden[0].maps, torch.from_numpy(own.maps), atol=1e-3, rtol=0)


def test_without_a_layout_clips_are_refused_with_what_to_give() -> None:
    wrong = AuditPlan(layer="features", forward_fn=lambda model, sheets: model(video.as_clips(sheets)))
    with pytest.raises(ValueError, match="give the `layout`"):
        audit_model(video.Classifier().eval(), video.audit_set_of(video.film(4, usual=0.5, seed=0)), plan=wrong)


@pytest.mark.slow
def test_the_place_of_an_action_is_found_and_its_twin_cleared(tmp_path: Path) -> None:
    biased, balanced = video.main(["--out", str(tmp_path)]).values()
    assert run_gate(biased).outcome == "violated"
    assert [str(f.verdict) for f in biased.audits[-1].judgement.findings] == ["reliance", "reliance"]
    assert "reliance" not in [str(f.verdict) for f in balanced.audits[-1].judgement.findings]
    assert str(balanced.audits[-1].judgement.findings[0].verdict) == "cleared"
    with Image.open(tmp_path / "maps.png") as picture:
        assert picture.width > 768


@pytest.mark.slow
def test_a_transformer_that_reads_gender_is_found(tmp_path: Path) -> None:
    run = example("vit_timm").main(["--out", str(tmp_path)])
    assert run.manifest.layer == "net.blocks.2.norm1"
    assert run_gate(run).outcome == "violated"
    assert {f.name: str(f.verdict) for f in run.audits[-1].judgement.findings}["gender"] == "reliance"
    with Image.open(tmp_path / "maps.png") as picture:
        assert picture.width > 4 * 256
