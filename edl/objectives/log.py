"""What a log says of objectives: added up where they were computed, read when somebody looks."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from edl.objectives.base import Objective, Sums

STEPS_WITHOUT_EFFECT = 100
_MOST_WAITING = 64


class _Loss(NamedTuple):
    """One loss of an objective, detached."""

    losses: Tensor  # [L]
    sums: list[Sums]  # of groups of these layers
    sizes: list[int]  # of the groups, in layers


class ObjectiveLog:
    """Means over the losses of an objective since the log was last cleared.

    Nothing here waits for a device. A loss that had nothing to act on is 0, which would look perfect: it counts in no
    mean but that of a measure which has a value nevertheless.

    Args:
        objective (Objective): whose losses they are.
        layers (sequence of int): the place of each layer in the model, which names it.
    """

    def __init__(self, objective: Objective, layers: Sequence[int]) -> None:
        self._objective = objective
        self._layers = list(layers)
        self._waiting: list[_Loss] = []
        self._names: list[str] = []
        self._sums: Tensor | None = None  # [2, M]: of each name the values that count, and their number

    def add(self, losses: Tensor, sums: Sequence[Sums], sizes: Sequence[int]) -> Tensor:
        """Counts losses [L], computed from these sums, of groups of so many layers; returns whether there was something
        to act on."""
        detached = [{name: x.detach() for name, x in of_group.items()} for of_group in sums]
        self._waiting.append(_Loss(losses.detach(), detached, list(sizes)))
        has_effect = self._has_effect(detached)
        if len(self._waiting) == _MOST_WAITING:
            self._add_up()
        return has_effect

    def sums(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Of "loss", "layer_<i>" and each measure: the sum of the values that count, and their number; nothing where
        there was no loss."""
        self._add_up()
        if self._sums is None:
            return {}
        return {name: (total, count) for name, total, count in zip(self._names, *self._sums)}

    def means(self) -> dict[str, Tensor]:
        """The means, float64 scalars, NaN where no value counts; nothing where there was no loss."""
        return {name: total / count for name, (total, count) in self.sums().items()}

    def clear(self) -> None:
        """Begins anew."""
        self._waiting, self._sums = [], None

    def _has_effect(self, sums: Sequence[Sums]) -> Tensor:
        effects = [self._objective.has_effect(of_group) for of_group in sums]
        if any(effect.dim() != 0 for effect in effects):
            raise ValueError(
                f"edl::Objectives: has_effect must give a bool scalar (got {list(effects[0].shape)} of "
                f"{type(self._objective).__name__})"
            )
        return effects[0] if len(effects) == 1 else torch.stack(effects).any()

    @torch.no_grad()
    def _add_up(self) -> None:
        if not self._waiting:
            return
        rows, are_counted = [], []
        for losses, sums, sizes in self._waiting:
            has_effect = self._has_effect(sums)
            measures = [self._objective.measures(of_group) for of_group in sums]
            values = {"loss": losses.mean(), **dict(zip((f"layer_{place}" for place in self._layers), losses))}
            number_of_losses = len(values)
            for name in measures[0]:
                values[name] = self._mean(name, [of_group[name] for of_group in measures], sizes)
            self._names = list(values)
            row = torch.stack([value.double() for value in values.values()])
            is_counted = ~row.isnan()
            is_counted[:number_of_losses] = False
            rows.append(row)
            are_counted.append(is_counted | has_effect)
        self._waiting = []
        row, is_counted = torch.stack(rows), torch.stack(are_counted)
        sums_now = torch.stack([row.where(is_counted, 0.0).sum(0), is_counted.sum(0).double()])
        self._sums = sums_now if self._sums is None else self._sums + sums_now

    def _mean(self, name: str, measured: list[Tensor], sizes: list[int]) -> Tensor:
        """The mean over all layers of a measure of groups of layers."""
        if name in ("loss", "weight", "steps_without_effect") or name.startswith("layer_") or measured[0].dim() != 0:
            raise ValueError(
                "edl::Objectives: measures must give scalars by names other than loss, weight, steps_without_effect "
                f"and layer_<i> (got {name!r} {list(measured[0].shape)} of {type(self._objective).__name__})"
            )
        return torch.stack([x.double() * size for x, size in zip(measured, sizes)]).sum() / sum(sizes)


class EffectWatch:
    """Counts steps whose losses all had nothing to act on, without waiting for a device."""

    def __init__(self) -> None:
        self._num_steps = 0
        self._has_effect: Tensor | None = None  # in the running step
        self._steps_without: Tensor | None = None  # since the last step with an effect
        self._counted: Tensor | None = None  # steps without, since `take`

    def see(self, has_effect: Tensor) -> None:
        """Takes a loss of the running step into account, a bool scalar."""
        self._has_effect = has_effect if self._has_effect is None else self._has_effect | has_effect

    def end_step(self) -> bool:
        """Ends a step; True where a hundred in a row had no effect, at which it looks, and so waits, once in a hundred
        steps. A step without any loss is none."""
        if self._has_effect is None:
            return False
        step = (~self._has_effect).long()
        self._steps_without = step if self._steps_without is None else (self._steps_without + 1) * step
        self._counted = step if self._counted is None else self._counted + step
        self._has_effect = None
        self._num_steps += 1
        return self._num_steps % STEPS_WITHOUT_EFFECT == 0 and bool(self._steps_without >= STEPS_WITHOUT_EFFECT)

    def take(self) -> Tensor | None:
        """The number of steps without effect since it was last taken; None where no step ended."""
        counted, self._counted = self._counted, None
        return counted


def warn_of_no_effect(name: str) -> None:
    """Warns that an objective does nothing."""
    warnings.warn(
        f"edl::Objectives: a batch must hold something for {name} to act on, for a divergence two domains: mix domains "
        f"in batches or check masks and labels (got none for {STEPS_WITHOUT_EFFECT} steps)",
        stacklevel=3,
    )
