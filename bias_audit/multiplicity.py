"""What intervals say when many questions are asked of one audit.

Enters: values with the bounds of their 95 % intervals, and limits. Leaves: p-values, p-values corrected for their
number, and the number of images that would settle what an interval leaves open.

Standard library only: the gate imports this module and must start in a blink.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

# A 95 % interval reaches so many standard errors to each side.
_DEVIATE = NormalDist().inv_cdf(0.975)


def exceedance_p(value: float, bound: float, limit: float) -> float:
    """One-sided p-value of a quantity being at most `limit`: small where it is shown to lie above.

    The distance from the value to the bound is taken as 1.96 standard errors of a normal distribution: p is 0.025 where
    a lower bound lies on the limit. To ask whether a quantity lies below a limit, negate all three numbers.

    An interval of no width leaves no doubt: p is 0 where the value lies above the limit, else 1.

    Args:
        value: what was measured.
        bound: the end of its 95 % interval that faces the limit: the lower one where the value lies above the limit,
            else the upper one.
        limit: in the unit of the value.

    Raises:
        ValueError: a number is not finite.

    Example:
        >>> round(exceedance_p(0.3, 0.1, 0.1), 3), round(exceedance_p(0.3, 0.2, 0.1), 5)
        (0.025, 4e-05)
    """
    if not all(math.isfinite(x) for x in (value, bound, limit)):
        raise ValueError(
            f"expected finite numbers, got value {value}, bound {bound} and limit {limit}: leave out what is unmeasured"
        )
    error = abs(value - bound) / _DEVIATE
    if error == 0:
        return 0.0 if value > limit else 1.0
    # NormalDist().cdf would round small p-values to 0.
    return math.erfc((value - limit) / error / math.sqrt(2)) / 2


def holm(ps: Sequence[float]) -> tuple[float, ...]:
    """p-values corrected for their number, in the order given: below 0.05, the chance of any false alarm is below 0.05.

    Holm's step-down procedure; it holds however the hypotheses depend on each other.

    Raises:
        ValueError: a p-value is not between 0 and 1.

    Reference: Holm, Scandinavian Journal of Statistics 6 (1979) 65-70.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        (0.03, 0.06, 0.06)
    """
    order = _ascending(ps)
    corrected, greatest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        greatest = max(greatest, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = greatest
    return tuple(corrected)


def _ascending(ps: Sequence[float]) -> list[int]:
    wrong = [p for p in ps if not 0 <= p <= 1]
    if wrong:
        raise ValueError(f"expected p-values between 0 and 1, got {wrong[0]}: leave out what is unmeasured")
    return sorted(range(len(ps)), key=lambda i: ps[i])


def samples_to_settle(value: float, low: float, high: float, limit: float, n: int) -> int | None:
    """Images at which a 95 % interval would no longer reach the limit, its width shrinking with the square root of n.

    None where it would take more than a million times the images: nobody gathers them.

    Args:
        value, low, high: what was measured on `n` images, with its interval.
        limit: what the interval is compared with.

    Example:
        >>> samples_to_settle(0.2, 0.0, 0.4, 0.1, n=100)
        400
    """
    distance = abs(value - limit)
    side = high - value if value < limit else value - low
    return None if distance <= side / 1000 else math.ceil(n * (side / distance) ** 2)
