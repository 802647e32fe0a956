"""Targets: each score recomputed by a loop over images, words and classes; and what is no target is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from bias_audit import explain
from bias_audit.attribution.targets import (
    BinaryLogit,
    CaptionLogProbability,
    ClassLogit,
    ClassMargin,
    Contrast,
    LogProbability,
    RankedLogit,
    Target,
    WordLogProbability,
    top_k,
)

PADDING = 0


def log_probability(logits: Tensor, index: int) -> float:
    """By the definition, in double precision."""
    total = sum(math.exp(float(z)) for z in logits)
    return math.log(math.exp(float(logits[index])) / total)


@pytest.fixture
def answers() -> Tensor:
    return 3 * torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def words() -> Tensor:
    """Logits (B, T, words)."""
    return 3 * torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(1))


def test_the_log_probability_of_an_answer(answers: Tensor) -> None:
    classes = torch.tensor([0, 5, 2, 2])
    expected = [log_probability(row, int(c)) for row, c in zip(answers, classes, strict=True)]
    assert LogProbability(classes)(answers).tolist() == pytest.approx(expected, abs=1e-5)
    assert LogProbability(classes)(answers.bfloat16()).dtype == torch.float32


def test_the_log_probability_of_a_word(words: Tensor) -> None:
    positions, chosen = torch.tensor([0, 4, 2, 2]), torch.tensor([6, 0, 3, 1])
    expected = [log_probability(words[i, positions[i]], int(chosen[i])) for i in range(4)]
    assert WordLogProbability(positions, chosen)(words).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("padding", [PADDING, -100])
def test_the_log_probability_of_a_caption(words: Tensor, padding: int) -> None:
    captions = [[4, 1, 6], [2], [3, 3, 3, 3, 3], [5, 6, 1, 2]]
    tokens = torch.tensor([caption + [padding] * (5 - len(caption)) for caption in captions])
    expected = [sum(log_probability(words[i, t], w) for t, w in enumerate(c)) for i, c in enumerate(captions)]
    target = CaptionLogProbability(tokens, padding)
    assert target(words).tolist() == pytest.approx(expected, abs=1e-4)
    # What the model says where there is no word does not matter.
    spoken = (tokens != padding)[..., None]
    assert torch.equal(target(torch.where(spoken, words, 100 * words)), target(words))


def test_without_padding_every_place_counts(words: Tensor) -> None:
    tokens = torch.zeros(4, 5, dtype=torch.int64)
    each = [WordLogProbability(torch.full((4,), t), tokens[:, t])(words) for t in range(5)]
    torch.testing.assert_close(CaptionLogProbability(tokens)(words), torch.stack(each).sum(0))


def test_the_gradient_is_that_of_log_softmax(words: Tensor) -> None:
    tokens = torch.tensor([[4, 1, 6, 0, 0], [2, 0, 0, 0, 0], [3, 3, 3, 3, 3], [5, 6, 1, 2, 0]])
    leaf = words.double().requires_grad_()
    spoken = leaf.log_softmax(-1).gather(2, tokens[..., None])[..., 0] * (tokens != PADDING)
    (expected,) = torch.autograd.grad(spoken.sum(), leaf)
    leaf = words.clone().requires_grad_()
    (got,) = torch.autograd.grad(CaptionLogProbability(tokens, PADDING)(leaf).sum(), leaf)
    torch.testing.assert_close(got, expected.float(), atol=1e-6, rtol=1e-5)


def test_the_gradient_of_a_certain_answer_keeps_its_direction() -> None:
    """1 - p is 0 in single precision here; what is left of log_softmax's gradient forgets the answer itself."""
    logits = torch.tensor([[40.0, 1.0, 0.0]])

    def direction(score: Tensor, leaf: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(score.sum(), leaf)
        return gradient.double() / gradient.double().norm()

    exact = logits.double().requires_grad_()
    # The direction is that of the log odds, which is exact in double precision.
    expected = direction(exact[:, 0] - exact[:, 1:].logsumexp(1), exact)
    leaf = logits.clone().requires_grad_()
    torch.testing.assert_close(direction(LogProbability(torch.tensor([0]))(leaf), leaf), expected)
    naive = direction(leaf.log_softmax(1)[:, 0], leaf)
    assert naive[0, 0] == 0
    assert expected[0, 0] > 0.7


def test_ranks(answers: Tensor) -> None:
    ranked = [sorted(row, reverse=True) for row in answers.tolist()]
    for rank in range(1, 7):
        assert RankedLogit(rank)(answers).tolist() == [row[rank - 1] for row in ranked]
    assert top_k(3) == (RankedLogit(1), RankedLogit(2), RankedLogit(3))
    one_logit = torch.tensor([[-2.0], [3.0]])
    assert [target(one_logit).tolist() for target in top_k(2)] == [[2.0, 3.0], [-2.0, -3.0]]


def test_the_maps_of_the_highest_ranked_classes_are_those_of_their_logits() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    images = torch.rand(5, 3, 8, 8)
    ranked = explain(net, images, target=top_k(3), layer="1")
    assert ranked.maps.shape == (3, 5, 6, 6)
    for k, classes in enumerate(net(images).topk(3).indices.T):
        torch.testing.assert_close(ranked.maps[k], explain(net, images, target=classes, layer="1").maps)


class Captioner(nn.Module):
    """One convolution, pooled; the logits of five positions of seven words."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU())
        self.words = nn.Linear(6, 35)

    def forward(self, images: Tensor) -> Tensor:
        return self.words(self.features(images).mean(dim=(2, 3))).unflatten(1, (5, 7))


def test_the_map_of_a_word_weighs_channels_by_the_gradient_of_its_log_probability() -> None:
    torch.manual_seed(0)
    net, images = Captioner(), torch.rand(4, 3, 8, 8)
    positions, words = torch.tensor([0, 4, 2, 2]), torch.tensor([6, 0, 3, 1])
    with torch.no_grad():
        activations = net.features(images)
        p = net(images).softmax(-1)
    weights = net.words.weight.detach().unflatten(0, (5, 7))
    for i, (t, w) in enumerate(zip(positions.tolist(), words.tolist(), strict=True)):
        # d log p_w / d pooled = W_w - sum_v p_v W_v, and each place has a 36th of the pooled gradient.
        of_channels = (weights[t, w] - (p[i, t, :, None] * weights[t]).sum(0)) / 36
        expected = (of_channels[:, None, None] * activations[i]).sum(0).relu()
        got = explain(net, images, target=WordLogProbability(positions, words), layer="features").maps[i]
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)


ONE, TWO = torch.tensor([1, 2]), torch.tensor([[1, 2], [2, 0]])


@pytest.mark.parametrize(
    ("target", "shape", "message"),
    [
        (LogProbability(ONE), (2, 2), r"class 2 of image 1 is out of range: the outputs have 2, 0 to 1"),
        (LogProbability(-ONE), (2, 3), r"class -1 of image 0 is out of range"),
        (LogProbability(ONE), (3, 3), r"target is for 2 images, the batch has 3"),
        (LogProbability(ONE), (2, 3, 3), r"expected logits \(B, answers\), got \(2, 3, 3\)"),
        (LogProbability(ONE - 1), (2, 1), r"BinaryLogit"),
        (WordLogProbability(ONE, ONE), (2, 2, 9), r"position 2 of image 1 is out of range"),
        (WordLogProbability(ONE, ONE), (2, 9, 2), r"word 2 of image 1 is out of range"),
        (WordLogProbability(ONE, ONE), (2, 9), r"expected logits \(B, T, words\), got \(2, 9\)"),
        (CaptionLogProbability(TWO), (2, 2, 2), r"word 2 of image 0 is out of range"),
        (CaptionLogProbability(TWO, padding=-1), (2, 3, 3), r"each of the 3 predictions, got captions of 2"),
        (RankedLogit(4), (2, 3), r"rank 4 is out of range: the model has 3 classes"),
        (RankedLogit(1), (2, 3, 4), r"expected logits \(B, classes\), got \(2, 3, 4\)"),
    ],
)
def test_outputs_that_do_not_suit_the_target(target: Target, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        target(torch.zeros(shape))


def test_indices_that_are_none() -> None:
    with pytest.raises(ValueError, match=r"expected classes as int64 \(B,\), got torch.float32 \(2,\)"):
        LogProbability(torch.zeros(2))
    with pytest.raises(ValueError, match=r"expected words as int64 \(B,\), got torch.int64 \(2, 2\)"):
        WordLogProbability(ONE, TWO)
    with pytest.raises(ValueError, match="got 2 positions and 3 words"):
        WordLogProbability(ONE, torch.tensor([0, 0, 0]))
    with pytest.raises(ValueError, match=r"expected tokens as int64 \(B, T\)"):
        CaptionLogProbability(ONE)
    with pytest.raises(ValueError, match="caption 1 holds nothing but padding"):
        CaptionLogProbability(torch.tensor([[1, 0], [0, 0]]), padding=0)
    with pytest.raises(ValueError, match="rank of at least 1"):
        RankedLogit(0)
    with pytest.raises(ValueError, match="at least one class"):
        top_k(0)


def test_targets_of_a_classifier() -> None:
    outputs = torch.tensor([[1.0, 4.0, 2.0], [5.0, 0.0, 3.0]])
    classes = torch.tensor([2, 0])
    assert ClassLogit(classes)(outputs).tolist() == [2.0, 5.0]
    assert ClassMargin(classes)(outputs).tolist() == [-2.0, 2.0]
    assert Contrast(1, 0)(outputs).tolist() == [3.0, -5.0]
    assert BinaryLogit(torch.tensor([0, 1]))(torch.tensor([[2.0], [3.0]])).tolist() == [-2.0, 3.0]
