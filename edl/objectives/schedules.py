"""Weights that change with the optimizer steps."""

import dataclasses
import math
from collections.abc import Callable

from edl.ops import checks

Weight = float | Callable[[int], float]


def weight_at(weight: Weight, step: int) -> float:
    """A weight after so many optimizer steps.

    Raises:
        ValueError: a function that returns no number.
    """
    value = weight(step) if callable(weight) else weight
    checks.check_numbers("Objectives", weight=value)
    return value


@dataclasses.dataclass(frozen=True)
class _LinearWarmup:
    weight: Weight
    steps: int

    def __call__(self, step: int) -> float:
        return weight_at(self.weight, step) * min(1.0, step / self.steps)


@dataclasses.dataclass(frozen=True)
class _LinearDecay:
    weight: Weight
    begin: int
    end: int
    final: float

    def __call__(self, step: int) -> float:
        part = min(1.0, max(0.0, (step - self.begin) / (self.end - self.begin)))
        return (1 - part) * weight_at(self.weight, step) + part * self.final


@dataclasses.dataclass(frozen=True)
class _OffAfter:
    weight: Weight
    step: int

    def __call__(self, step: int) -> float:
        return weight_at(self.weight, step) if step < self.step else 0.0


def linear_warmup(weight: Weight, steps: int) -> Callable[[int], float]:
    """A weight that rises from 0 to `weight` over so many optimizer steps, and stays.

    Args:
        weight (float or function): a number of at least 0, or another schedule, whose weights it multiplies.
        steps (int): at least 1.

    Raises:
        ValueError: a weight that is negative or not finite, steps below 1.
    """
    weight = _checked("linear_warmup", "weight", weight)
    return _LinearWarmup(weight, checks.as_integer("linear_warmup", "steps", steps, lowest=1))


def linear_decay(weight: Weight, begin: int, end: int, final: float = 0.0) -> Callable[[int], float]:
    """A weight that goes from `weight` in a straight line to `final` between two optimizer steps, and stays.

        linear_decay(linear_warmup(1e-2, steps=1000), begin=8000, end=10000)

    Args:
        weight (float or function): a number of at least 0, or another schedule, which it leaves by and by.
        begin (int): the last step of the whole weight, at least 0.
        end (int): the first step of `final`, above `begin`.
        final (float): at least 0. Default: 0.

    Raises:
        ValueError: a weight that is negative or not finite, steps that are negative or do not rise.
    """
    weight = _checked("linear_decay", "weight", weight)
    begin = checks.as_integer("linear_decay", "begin", begin)
    end = checks.as_integer("linear_decay", "end", end)
    if end <= begin:
        raise ValueError(f"edl::linear_decay: end must be above begin (got {begin} and {end})")
    return _LinearDecay(weight, begin, end, _number("linear_decay", "final", final))


def off_after(weight: Weight, step: int) -> Callable[[int], float]:
    """A weight for the first so many optimizer steps, then 0.

    Args:
        weight (float or function): a number of at least 0, or another schedule.
        step (int): the number of steps with it, at least 0.

    Raises:
        ValueError: a weight that is negative or not finite, a negative step.
    """
    weight = _checked("off_after", "weight", weight)
    return _OffAfter(weight, checks.as_integer("off_after", "step", step))


def _checked(op: str, name: str, weight: Weight) -> Weight:
    return weight if callable(weight) else _number(op, name, weight)


def _number(op: str, name: str, number: float) -> float:
    checks.check_numbers(op, **{name: number})
    if not 0.0 <= number < math.inf:
        raise ValueError(f"edl::{op}: {name} must be finite and not negative (got {number})")
    return float(number)
