"""The examples of the Grad-CAM paper's wider claims, trained here and now: captions, answers, and maps under attack.

What must be found (the map lies on what the word names) stands beside what must not be (that of a network that has
learned nothing does not).
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from example_files import example
from PIL import Image
from scipy import stats
from torch import Tensor, nn

from bias_audit.stats import newcombe

captioning, vqa, attack = example("captioning"), example("vqa"), example("attack")


def run(module: ModuleType, out: Path, *arguments: str) -> Any:
    """What the example's `main` returns."""
    return module.main(["--out", str(out), *arguments])


def lowest_mean(values: list[float]) -> float:
    """The lower end of the 95 % t-interval of the mean over networks."""
    return float(stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))[0])


def beats(first: Any, second: Any, of: str) -> bool:
    """Whether a proportion of the first row is above the second's by more than chance."""
    counts = [(round(getattr(row, of)[0] * row.n), row.n) for row in (first, second)]
    return newcombe(*counts)[1] > 0


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(scope="module")
def captions(out: Path) -> Any:
    return run(captioning, out / "captioning")


@pytest.fixture(scope="module")
def answers(out: Path) -> Any:
    return run(vqa, out / "vqa")


@pytest.fixture(scope="module")
def attacked(out: Path) -> Any:
    return run(attack, out / "attack", "--epsilon", "16")


def rows_of_people(rows: list[Any]) -> list[Any]:
    return [row for row in rows if row.word in captioning.PEOPLE]


@pytest.mark.slow
def test_the_map_of_a_word_lies_on_what_it_names(captions: Any, out: Path) -> None:
    # Two orders of the people are right, of 6 pairs times 3 things.
    assert captions.right_captions[1] > 0.5 > 2 / 18
    assert [row.word for row in captions.rows] == [*captioning.PEOPLE, *captioning.THINGS, "(caption)"]
    for row in captions.rows:
        assert row.hits[1] > row.chance, row
    for row in rows_of_people(captions.rows):
        assert row.on_other[2] < row.hits[1], row
        assert row.right_person[1] > 0.5, row
    assert Image.open(out / "captioning" / "words.png").size == (5 * 264, 6 * 276 + 8)


@pytest.mark.slow
def test_captions_of_other_scenes_teach_nothing(captions: Any, out: Path) -> None:
    control = run(captioning, out / "shuffled", "--shuffled", "--scenes", "600", "--epochs", "4")
    assert control.right_captions[2] < captions.right_captions[1]
    for trained, shuffled in zip(rows_of_people(captions.rows), rows_of_people(control.rows), strict=True):
        assert beats(trained, shuffled, of="hits"), (trained, shuffled)
        assert beats(trained, shuffled, of="right_person"), (trained, shuffled)


@pytest.mark.slow
def test_untrained_captioners_do_not_tell_the_people_apart(captions: Any) -> None:
    """One untrained network may favour a person by luck, in all images alike, so the unit is the network; and any may
    point at people rather than walls, so that the measure is one person against the other."""
    scenes = captioning.draw_scenes(100, seed=7)
    hits, more_than_other, right = [], [], []
    for seed in range(12):
        torch.manual_seed(seed)
        people = rows_of_people(captioning.localise(captioning.Captioner(), scenes))
        hits.append(np.mean([row.hits[0] for row in people]))
        more_than_other.append(np.mean([row.hits[0] - row.on_other[0] for row in people]))
        right.append(np.mean([row.right_person[0] for row in people]))
    assert lowest_mean(more_than_other) < 0
    assert lowest_mean(right) < 0.5
    assert min(row.hits[1] for row in rows_of_people(captions.rows)) > max(hits)


def test_scenes_and_captions_agree() -> None:
    scenes = captioning.draw_scenes(50, seed=3)
    again, other = captioning.draw_scenes(50, seed=3), captioning.draw_scenes(50, seed=4)
    assert torch.equal(scenes.images, again.images) and not torch.equal(scenes.images, other.images)
    assert scenes.masks.any(dim=(2, 3)).all()
    assert scenes.masks.sum(dim=1).max() == 1
    words = [[captioning.WORDS[token] for token in caption] for caption in scenes.tokens]
    assert all(w[captioning.FIRST] in captioning.PEOPLE and w[captioning.THING] in captioning.THINGS for w in words)
    assert all(w[captioning.FIRST] != w[captioning.SECOND] for w in words)
    # A child is smaller than whoever stands beside it: the masks are in the caption's order.
    areas = scenes.masks.sum(dim=(2, 3))
    for w, area in zip(words, areas, strict=True):
        if "child" in w:
            assert (area[0] < area[1]) == (w[captioning.FIRST] == "child")


def gradcam_by_hand(features: nn.Module, head: Any, images: Tensor) -> Tensor:
    """Maps of the score that `head` makes of the features."""
    activations = features(images).detach().requires_grad_()
    (gradients,) = torch.autograd.grad(head(activations).sum(), activations)
    return (gradients.mean(dim=(2, 3), keepdim=True) * activations).sum(dim=1).relu().detach()


def test_maps_of_words_are_those_of_the_definition() -> None:
    torch.manual_seed(0)
    model, scenes = captioning.Captioner().eval(), captioning.draw_scenes(3, seed=0)
    maps = captioning.explain_words(model, scenes).maps
    for i in range(3):
        tokens = scenes.tokens[i]

        def log_p(activations: Tensor, tokens: Tensor = tokens) -> Tensor:
            seen = activations.mean(dim=(2, 3))[:, None].expand(-1, len(tokens) - 1, -1)
            read = torch.cat([model.embedding(tokens[None, :-1]), seen], dim=2)
            return model.words(model.lstm(read)[0])[0].log_softmax(dim=1)

        heads = [
            lambda a, w=tokens[2]: log_p(a)[1, w],
            lambda a, w=tokens[5]: log_p(a)[1, w],
            lambda a, w=tokens[8]: log_p(a)[7, w],
            lambda a, t=tokens: sum(log_p(a)[step, t[step + 1]] for step in range(len(t) - 1)),
        ]
        for k, head in enumerate(heads):
            expected = gradcam_by_hand(model.features, head, scenes.images[i : i + 1])[0]
            torch.testing.assert_close(maps[k, i], expected, atol=1e-8, rtol=1e-3)


@pytest.mark.slow
def test_the_map_of_an_answer_lies_on_what_was_asked_about(answers: Any, out: Path) -> None:
    assert [row.asks_for for row in answers] == ["colour", "shape"]
    for row in answers:
        # Who knows which three answers are in the picture and guesses is right in a third of the cases.
        assert row.right[1] > 0.5 > 1 / 3, row
        assert row.hits[1] > row.chance, row
        assert row.on_other[2] < row.hits[1], row
        assert row.asked_thing[1] > 0.5, row
        assert row.moves[1] > 0.5, row
    assert Image.open(out / "vqa" / "answers.png").size == (5 * 264, 6 * 276 + 8)


@pytest.mark.slow
def test_untrained_answerers_do_not_tell_the_things_apart(answers: Any) -> None:
    scenes = vqa.draw_scenes(100, seed=7)
    controls = []
    for seed in range(12):
        torch.manual_seed(seed)
        controls.append(vqa.localise(vqa.Answerer(), scenes))
    for kind, trained in enumerate(answers):
        rows = [control[kind] for control in controls]
        assert lowest_mean([row.hits[0] - row.on_other[0] for row in rows]) < 0
        assert lowest_mean([row.asked_thing[0] for row in rows]) < 0.5
        assert lowest_mean([row.moves[0] for row in rows]) < 0.5
        assert trained.hits[1] > max(row.hits[0] for row in rows)


def test_maps_of_answers_are_those_of_the_definition() -> None:
    torch.manual_seed(0)
    model, scenes = vqa.Answerer().eval(), vqa.draw_scenes(3, seed=0)
    questions, answers = vqa.ask(scenes.shapes[:, :2], scenes.colours[:, :2], of_colour=True)
    maps = vqa.explain_answers(model, scenes.images, questions, answers).maps
    for i in range(3):
        for q in range(2):
            asked = model.asked(model.lstm(model.embedding(questions[i : i + 1, q]))[0][:, -1])

            def log_p(activations: Tensor, asked: Tensor = asked, answer: Tensor = answers[i, q]) -> Tensor:
                seen = model.seen(activations.mean(dim=(2, 3)))
                return model.answers(seen * asked).log_softmax(dim=1)[0, answer]

            expected = gradcam_by_hand(model.features, log_p, scenes.images[i : i + 1])[0]
            torch.testing.assert_close(maps[q, i], expected, atol=1e-8, rtol=1e-3)


def test_questions_and_answers() -> None:
    scenes = vqa.draw_scenes(20, seed=1)
    assert scenes.masks.sum(dim=1).max() == 1
    for of_colour in (True, False):
        questions, answers = vqa.ask(scenes.shapes, scenes.colours, of_colour)
        for i in range(20):
            for thing in range(vqa.THINGS):
                shape, colour = vqa.SHAPES[scenes.shapes[i, thing]], vqa.COLOURS[scenes.colours[i, thing]]
                asked = " ".join(vqa.WORDS[word] for word in questions[i, thing])
                assert asked == (f"what colour is the {shape} ?" if of_colour else f"what shape is the {colour} one")
                assert vqa.ANSWERS[answers[i, thing]] == (colour if of_colour else shape)
                # The picture shows that colour there; yellow is red and green.
                red, green, blue = scenes.images[i, :, scenes.masks[i, thing]].mean(dim=1).tolist()
                seen = "blue" if blue > max(red, green) else "yellow" if min(red, green) > 2 * blue else None
                assert (seen or ("red" if red > green else "green")) == colour


@pytest.mark.slow
def test_maps_under_attack(attacked: Any, out: Path) -> None:
    assert attacked.right[1] > 0.5
    before, fooled = attacked.rows
    assert (before.epsilon, fooled.epsilon) == (0, 16 / 255)
    assert before.fooled[2] < 0.5 and before.change == (0, 0, 0)
    # The network is certain of what is not there.
    assert fooled.fooled[1] > 0.5 and fooled.certain[1] > 0.5
    assert fooled.present[2] < 0.5 < before.present[1]
    # And the map of what is there stays on it, as the paper says.
    for row in (before, fooled):
        assert row.hits[1] > row.chance
        assert row.right_thing[1] > 0.5
    assert Image.open(out / "attack" / "attack.png").size == (4 * 200, 6 * 212 + 8)


def test_the_attack_keeps_within_epsilon_and_descends() -> None:
    torch.manual_seed(0)
    model, scenes = attack.Classifier().eval(), attack.draw_scenes(8, seed=0)
    wanted, epsilon = torch.arange(8) % 6, 4 / 255
    changed = attack.attack(model, scenes.images, wanted, epsilon, steps=10)
    assert not changed.requires_grad
    assert (changed - scenes.images).abs().max() <= epsilon + 1e-6
    assert changed.min() >= 0 and changed.max() <= 1
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(model(x), wanted, reduction="none") for x in (scenes.images, changed)]
    assert (losses[1] < losses[0]).all()


def test_the_attack_on_a_linear_model_reaches_the_corner() -> None:
    """There the gradient's sign never changes, so the worst image is known."""
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 2)), torch.rand(5, 3, 4, 4)
    wanted, epsilon = torch.tensor([0, 1, 1, 0, 1]), 0.1
    towards = (model[1].weight[wanted] - model[1].weight[1 - wanted]).detach().sign().view_as(images)
    expected = (images + epsilon * towards).clamp(0, 1)
    torch.testing.assert_close(attack.attack(model, images, wanted, epsilon, steps=5), expected)
