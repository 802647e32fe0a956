"""What an answer says, in words, and the numbers that are said along with it.

Enters: an `Answer`, and the `Evidence` it is from. Leaves: a part of a finding's sentence, with its numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

from bias_audit.terms import Estimate
from bias_audit.verdicts.questions import Answer, Evidence
from bias_audit.wording import interval, percent, plain_percent

# What is said along with an estimate: of the same subject, but for the metric.
_COMPANIONS = {
    "removal_flips": ("control_flips", "removal_effect", "control_effect"),
    "removal_contrast": ("removal_effect", "control_effect", "removal_score", "control_score"),
    "alignment_gap": ("conflicting_accuracy", "aligned_accuracy"),
    "swap_gap": ("swap_conflicting_accuracy", "swap_aligned_accuracy", "swap_follows"),
}


def companions(e: Estimate, asked: Evidence) -> list[Estimate]:
    """The estimates that are said along with one, as far as there was an image to measure them on."""
    wanted = _COMPANIONS.get(e.metric, ())
    # A contrast is of an attribute, the effects that it is made of are not.
    group = None if e.metric == "removal_contrast" else e.group
    same = {
        other.metric: other
        for other in asked.estimates
        if other.metric in wanted
        and other.n > 0
        and (other.region, other.class_name, other.group) == (e.region, e.class_name, group)
    }
    return [same[metric] for metric in wanted if metric in same]


def with_companions(answer: Answer, asked: Evidence) -> Iterator[Estimate]:
    """The estimate that an answer rests on, and what is said along with it."""
    if answer.estimate is not None:
        yield answer.estimate
        yield from companions(answer.estimate, asked)


def say_attention(region: str, look: Answer) -> str:
    """Whether the heatmaps look at a region."""
    if look.estimate is None or not look.estimate.measured:
        return f"attention to {region} was not measured"
    for_class = f"for class {look.estimate.class_name} " if look.estimate.class_name else ""
    times = f"{interval(look.estimate, 2)} times the share its area would ({look.estimate.method})"
    return f"{for_class}the heatmaps give {region} {'' if look.there else 'at most '}{times}"


def say_removal(region: str, removal: Answer, asked: Evidence) -> str:
    """What removing a region does to decisions, or what it says of an attribute carries of the margin."""
    e = removal.estimate
    if e is None or not e.measured:
        return f"the removal of {region} was not measured"
    others = {other.metric: other for other in companions(e, asked) if other.measured}
    for_class = f"for class {e.class_name} " if e.class_name else ""
    size = "" if removal.there else "at most "
    if e.metric in ("removal_flips", "fill_flips"):
        said = f"{for_class}removing {region} changes {size}{percent(e)} of the decisions"
        control = others.get("control_flips")
        return said if control is None else f"{said} beyond the {plain_percent(control)} that a control region changes"
    said = f"what {region} says of {e.group} carries {size}{percent(e)} of the margin"
    effect = others.get("removal_effect")
    if effect is None or effect.low is None or (effect.low <= 0 and not removal.there):
        return for_class + said
    moves = f"removing {region} moves the decision by {percent(effect)} of its margin"
    if (control := others.get("control_effect")) is not None:
        moves += f" beyond the {plain_percent(control)} that a control region does"
    if not removal.there:
        return f"{for_class}{said}, though {moves}"
    score, control = others.get("removal_score"), others.get("control_score")
    if score is not None and score.low is not None and score.low > 0:
        moves += f", and lowers the score by {interval(score, 2)}"
        moves += "" if control is None else f" beyond the {control.value:z.2f} that a control region does"
    return f"{for_class}{moves}; {said}"


def say_value(value: Answer, asked: Evidence) -> str:
    """Whether decisions follow an attribute's value, by a swap or by accuracy."""
    swapped = value.estimate is not None and value.estimate.metric.startswith("swap_")
    return say_swap(value, asked) if swapped else say_performance(value, asked)


def say_swap(swap: Answer, asked: Evidence) -> str:
    """What swapping an attribute's cue does."""
    e = swap.estimate
    if e is None or not e.measured:
        return "no cue was swapped"
    where = f"in class {e.class_name} " if e.class_name else ""
    what = f"{e.group}" + (f" in {e.region}" if e.region else "")
    size = "" if swap.there else "at most "
    if e.metric == "swap_flips":
        return f"{where}swapping {what} changes {size}{percent(e)} of the decisions"
    others = {other.metric: other for other in companions(e, asked)}
    conflicting, aligned = others.get("swap_conflicting_accuracy"), others.get("swap_aligned_accuracy")
    both = ""
    if conflicting is not None and aligned is not None and conflicting.measured and aligned.measured:
        both = f", from {plain_percent(aligned)} to {plain_percent(conflicting)}"
    cost = percent(e, unit="points")
    return f"{where}swapping {what} against the class costs {size}{cost} of accuracy{both}"


def say_performance(gap: Answer, asked: Evidence) -> str:
    """Where accuracy differs by an attribute."""
    e = gap.estimate
    if e is None or not e.measured:
        return "accuracy by group was not measured"
    where = f"within class {e.class_name} " if e.class_name else ""
    size = "" if gap.there else "at most "
    if e.metric == "alignment_gap":
        others = {other.metric: other for other in companions(e, asked)}
        conflicting, aligned = others.get("conflicting_accuracy"), others.get("aligned_accuracy")
        known = conflicting is not None and aligned is not None and conflicting.measured and aligned.measured
        if gap.there and conflicting is not None and aligned is not None and known:
            return (
                f"{where}accuracy is {plain_percent(conflicting)} where {e.group} and class disagree, "
                f"{plain_percent(aligned)} where they agree (difference {interval(e, 2)})"
            )
        return f"{where}accuracy is {size}{interval(e, 2)} higher where {e.group} and class agree"
    return f"{where}accuracy differs by {e.group} by {size}{interval(e, 2)}"


def say_association(tie: Answer) -> str:
    """Whether attribute and label go together in the training data."""
    e = tie.estimate
    if e is None or not e.measured:
        return "association in the training data was not measured"
    how = "" if tie.there else "hardly "
    return f"in the training data {e.group} and label {how}go together (Cramér's V {interval(e, 2)})"
