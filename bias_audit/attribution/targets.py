"""Which score a heatmap explains.

Enters: a model's outputs, logits, never probabilities: a softmax squeezes the gradient of a confident decision to
nothing. They are `(B, classes)` for a classifier, `(B, answers)` for visual question answering, `(B, T, words)` for a
captioner. Leaves: one score per image `(B,)`. A target is any such function; these are the ready ones.

The class indices, positions and words that make up a target are best kept on the CPU: they are checked against the
outputs' shape there, and a check of indices on a GPU would wait for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Target = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ClassLogit:
    """The logit of one class per image; `classes` is int64 `(B,)`."""

    classes: Tensor

    def __call__(self, outputs: Tensor) -> Tensor:
        """Scores `(B,)`."""
        return outputs.gather(1, self.classes.to(outputs.device)[:, None])[:, 0]


@dataclass(frozen=True)
class ClassMargin:
    """The logit of one class minus the largest other, per image: what decides for or against the class.

    With two classes only the difference of the logits is trained, and this is it. `classes` is int64 `(B,)`.
    """

    classes: Tensor

    def __call__(self, outputs: Tensor) -> Tensor:
        """Scores `(B,)`."""
        index = self.classes.to(outputs.device)[:, None]
        others = outputs.scatter(1, index, -torch.inf)
        return (outputs.gather(1, index) - others.amax(dim=1, keepdim=True))[:, 0]


def check_logits(outputs: Any) -> None:
    """Raise ValueError unless a model's outputs are logits `(B, classes)`."""
    if not isinstance(outputs, Tensor):
        raise ValueError(
            f"expected a model output (B, classes), got {type(outputs).__name__}: give a `target`, a function from "
            "that output to one score per image"
        )
    if outputs.ndim != 2:
        raise ValueError(f"expected a model output (B, classes), got {tuple(outputs.shape)}: give a `target` function")


def predicted_logit(outputs: Tensor) -> Tensor:
    """The logit of the predicted class, `(B,)`; of a head with one logit, the logit turned for class 0."""
    check_logits(outputs)
    return outputs[:, 0].abs() if outputs.shape[1] == 1 else outputs.amax(dim=1)


@dataclass(frozen=True)
class Contrast:
    """The logit of class `of` minus that of class `against`: why one rather than the other."""

    of: int
    against: int

    def __call__(self, outputs: Tensor) -> Tensor:
        """Scores `(B,)`."""
        return outputs[:, self.of] - outputs[:, self.against]


@dataclass(frozen=True)
class BinaryLogit:
    """The score of a head with one logit, `(B, 1)`, turned for images whose class is 0.

    `classes` is int64 `(B,)` of 0 and 1: the logit speaks for class 1.
    """

    classes: Tensor

    def __call__(self, outputs: Tensor) -> Tensor:
        """Scores `(B,)`."""
        return outputs.flatten() * (2 * self.classes.to(outputs.device) - 1)


@dataclass(frozen=True)
class RankedLogit:
    """The logit of the class that the model ranks `rank`-th for each image, 1 being the predicted class.

    A head with one logit z has two classes, with -z and z.

    Raises:
        ValueError: a rank below 1, or beyond the number of classes.

    Example:
        >>> RankedLogit(2)(torch.tensor([[1.0, 4.0, 2.0], [5.0, 0.0, 3.0]]))
        tensor([2., 3.])
    """

    rank: int

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"expected a rank of at least 1 (the predicted class), got {self.rank}")

    def __call__(self, outputs: Tensor) -> Tensor:
        """Scores `(B,)`."""
        _check_shape(outputs, "(B, classes)")
        if outputs.shape[1] == 1:
            outputs = torch.cat([-outputs, outputs], dim=1)
        if self.rank > outputs.shape[1]:
            raise ValueError(f"rank {self.rank} is out of range: the model has {outputs.shape[1]} classes")
        return outputs.topk(self.rank, dim=1).values[:, -1]


def top_k(k: int) -> tuple[RankedLogit, ...]:
    """One target for each of the `k` classes that the model ranks highest, best first.

    The classes themselves are `outputs.topk(k).indices`, `(B, k)`.

    Raises:
        ValueError: `k` below 1.

    Example:
        >>> top_k(2)
        (RankedLogit(rank=1), RankedLogit(rank=2))
    """
    if k < 1:
        raise ValueError(f"expected at least one class, got k = {k}")
    return tuple(RankedLogit(rank) for rank in range(1, k + 1))


@dataclass(frozen=True)
class LogProbability:
    """The natural logarithm of the probability of one class or answer per image, from logits `(B, answers)`.

    It is what the Grad-CAM paper explains in visual question answering (arXiv 1610.02391, "Visual Question Answering");
    at most 0. Its gradient is `1 - p` times that of the log odds, so the map of a certain answer is faint, not wrong:
    see `_log_probability`. `classes` is int64 `(B,)`.

    Raises:
        ValueError: classes that are not int64 `(B,)` or out of range, outputs that are not `(B, answers)`.

    Example:
        >>> LogProbability(torch.tensor([0]))(torch.tensor([[0.0, 0.0]])).exp()
        tensor([0.5000])
    """

    classes: Tensor

    def __post_init__(self) -> None:
        _check_indices(self.classes, 1, "classes", "(B,)")

    def __call__(self, outputs: Tensor) -> Tensor:
        """Scores `(B,)`."""
        _check_shape(outputs, "(B, answers)", self.classes)
        _check_range(self.classes, outputs.shape[1], "class")
        return _log_probability(outputs, self.classes.to(outputs.device))


@dataclass(frozen=True)
class WordLogProbability:
    """The natural logarithm of the probability of one word at one position per image, from logits `(B, T, words)`.

    `positions` and `words` are int64 `(B,)`: score i is the log probability that `outputs[i, positions[i]]` gives to
    `words[i]`. Which position predicts a word is the model's affair; a decoder under teacher forcing that reads
    `tokens[:, t]` at step t predicts `tokens[:, t + 1]` there.

    Raises:
        ValueError: positions or words that are not int64 `(B,)` or out of range, outputs that are not
            `(B, T, words)`.

    Example:
        >>> outputs = torch.zeros(1, 3, 4)
        >>> WordLogProbability(positions=torch.tensor([2]), words=torch.tensor([3]))(outputs).exp()
        tensor([0.2500])
    """

    positions: Tensor
    words: Tensor

    def __post_init__(self) -> None:
        _check_indices(self.positions, 1, "positions", "(B,)")
        _check_indices(self.words, 1, "words", "(B,)")
        if len(self.positions) != len(self.words):
            raise ValueError(
                f"expected a position per word, got {len(self.positions)} positions and {len(self.words)} words"
            )

    def __call__(self, outputs: Tensor) -> Tensor:
        """Scores `(B,)`."""
        _check_shape(outputs, "(B, T, words)", self.words)
        _check_range(self.positions, outputs.shape[1], "position")
        _check_range(self.words, outputs.shape[2], "word")
        index = self.positions.to(outputs.device)[:, None, None].expand(-1, 1, outputs.shape[2])
        return _log_probability(outputs.gather(1, index)[:, 0], self.words.to(outputs.device))


@dataclass(frozen=True)
class CaptionLogProbability:
    """The natural logarithm of the probability of one caption per image: the sum over its words, given those before.

    It is what the Grad-CAM paper explains in captioning (arXiv 1610.02391, "Image Captioning"). `tokens` is int64
    `(B, T)`: `tokens[i, t]` is the word that `outputs[i, t]` predicts, outputs being logits `(B, T, words)` under
    teacher forcing. Places that hold `padding` count nothing; -100 and the like are as good as a word's number.

    Raises:
        ValueError: tokens that are not int64 `(B, T)` or out of range, a caption of padding alone, outputs that
            are not `(B, T, words)` of the same T.

    Example:
        >>> target = CaptionLogProbability(torch.tensor([[3, 1, 0], [2, 0, 0]]), padding=0)
        >>> target(torch.zeros(2, 3, 4)).exp()
        tensor([0.0625, 0.2500])
    """

    tokens: Tensor
    padding: int | None = None

    def __post_init__(self) -> None:
        _check_indices(self.tokens, 2, "tokens", "(B, T)")
        empty = (~self._spoken()).all(dim=1).nonzero()
        if len(empty):
            raise ValueError(f"caption {int(empty[0])} holds nothing but padding ({self.padding}): leave the image out")

    def __call__(self, outputs: Tensor) -> Tensor:
        """Scores `(B,)`."""
        _check_shape(outputs, "(B, T, words)", self.tokens)
        if outputs.shape[1] != self.tokens.shape[1]:
            raise ValueError(
                f"expected a word for each of the {outputs.shape[1]} predictions, got captions of "
                f"{self.tokens.shape[1]}: give the words that are predicted, without the one that starts a caption"
            )
        spoken = self._spoken()
        words = torch.where(spoken, self.tokens, 0)
        _check_range(words, outputs.shape[2], "word")
        each = _log_probability(outputs, words.to(outputs.device))
        return torch.where(spoken.to(outputs.device), each, 0).sum(dim=1)

    def _spoken(self) -> Tensor:
        return torch.ones_like(self.tokens, dtype=torch.bool) if self.padding is None else self.tokens != self.padding


def _log_probability(logits: Tensor, index: Tensor) -> Tensor:
    """Log probabilities `(...)` of the classes `index` `(...)` under `logits` `(..., classes)`, float32.

    The value is that of log_softmax. Its gradient is not: log_softmax takes `1 - p` as a difference, which rounds to 0
    for a class that is certain, and what is left of the gradient then speaks of its rivals alone. As the logistic
    function of the log odds, `log p = logsigmoid(z_c - logsumexp(z_others))`, the gradient keeps its direction.
    """
    logits, index = logits.float(), index[..., None]
    others = logits.scatter(-1, index, -torch.inf).logsumexp(dim=-1)
    return nn.functional.logsigmoid(logits.gather(-1, index)[..., 0] - others)


def _check_indices(indices: Tensor, ndim: int, name: str, shape: str) -> None:
    if indices.ndim != ndim or indices.dtype != torch.int64:
        raise ValueError(f"expected {name} as int64 {shape}, got {indices.dtype} {tuple(indices.shape)}")


def _check_shape(outputs: Tensor, shape: str, indices: Tensor | None = None) -> None:
    if outputs.ndim != shape.count(",") + 1:
        raise ValueError(f"expected logits {shape}, got {tuple(outputs.shape)}: choose the target for such outputs")
    if indices is None:
        return
    if len(outputs) != len(indices):
        raise ValueError(f"the target is for {len(indices)} images, the batch has {len(outputs)}")
    if outputs.shape[-1] == 1:
        raise ValueError(
            "a choice of one has no log probability: expected logits of two or more (for one logit, BinaryLogit)"
        )


def _check_range(indices: Tensor, count: int, what: str) -> None:
    wrong = ((indices < 0) | (indices >= count)).nonzero()
    if len(wrong):
        sample = int(wrong[0, 0])
        value = int(indices[tuple(wrong[0])])
        raise ValueError(
            f"{what} {value} of image {sample} is out of range: the outputs have {count}, 0 to {count - 1}"
        )
