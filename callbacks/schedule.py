"""When to audit.

Enters: what the user asked for, and where a Trainer is. Leaves: whether an audit is due, and by which trigger.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytorch_lightning import Trainer


@dataclass(frozen=True)
class Schedule:
    """Every so many epochs, or steps, or so much time; after each validation where nothing is given.

    Raises:
        ValueError: more than one is given, or one that is not positive.

    Example:
        >>> Schedule.of(every={"minutes": 30}).every
        datetime.timedelta(seconds=1800)
    """

    every_n_epochs: int | None = None
    every_n_steps: int | None = None
    every: timedelta | None = None

    def __post_init__(self) -> None:
        given = [name for name, value in vars(self).items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"expected one schedule, got {' and '.join(given)}: keep one of them")
        for name, value in (("every_n_epochs", self.every_n_epochs), ("every_n_steps", self.every_n_steps)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.every is not None and self.every <= timedelta(0):
            raise ValueError(f"every must be longer than nothing, got {self.every}")

    @classmethod
    def of(
        cls,
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        every: timedelta | Mapping[str, float] | None = None,
    ) -> Schedule:
        """From what a user gives; `every` also as a mapping of timedelta's arguments."""
        return cls(every_n_epochs, every_n_steps, timedelta(**every) if isinstance(every, Mapping) else every)

    @property
    def by_validation(self) -> bool:
        """Whether an audit follows each validation."""
        return self == Schedule()

    def after_steps(self, before: int, now: int) -> bool:
        """Whether an audit is due that was not `before`, by the Trainer's count of steps."""
        # `global_step % n` would repeat under accumulation and skip under manual optimization.
        return self.every_n_steps is not None and now // self.every_n_steps > before // self.every_n_steps

    def after_time(self, seconds: float) -> bool:
        """Whether an audit is due so many seconds after the last began."""
        return self.every is not None and seconds >= self.every.total_seconds()

    def after_epoch(self, trainer: Trainer) -> bool:
        """Whether an audit is due at the end of the present epoch."""
        return self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def after_validation(self, trainer: Trainer) -> str:
        """The trigger of the audit after the present validation; "" if there is none."""
        if trainer.sanity_checking or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return ""
        if trainer.state.fn == "validate":
            return "validate"
        if self.by_validation:
            return "validation"
        return "epoch" if self.after_epoch(trainer) and trainer.is_last_batch else ""


def is_final(trainer: Trainer, trigger: str) -> bool:
    """Whether the weights are those that training ends with, as far as is known, or no training's at all."""
    last_epoch = trainer.current_epoch + 1 == trainer.max_epochs and trainer.is_last_batch
    return trigger in ("end", "validate", "test") or (trigger in ("validation", "epoch") and last_epoch)
