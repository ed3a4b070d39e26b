"""Who looks at the routing that objectives see, and adds nothing to the loss."""

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from edl.labels.batch import Batch
from edl.routing import Observation


@runtime_checkable
class Statistics(Protocol):
    """Takes what each forward pass observed, `edl.RoutingStatistics` for instance.

    Attributes:
        needs (frozenset of str): the fields of an `edl.routing.Observation` that it reads, where they are there.
        label_sets (frozenset of str): the names of the sets of labels that it needs.
    """

    needs: frozenset[str]
    label_sets: frozenset[str]

    def add(self, layers: list[Observation], batch: Batch) -> None:
        """Takes a forward pass into account.

        Args:
            layers (list of Observation): of all layers.
            batch (Batch): what is known of their tokens.
        """


class Watching:
    """The statistics of training and of evaluation. Copies of objectives, one for each router, share them, so that
    there is one sum.

    Args:
        training (Statistics, optional): of passes in training mode.
        evaluation (Statistics, optional): of passes in evaluation mode.
    """

    def __init__(self, training: Statistics | None, evaluation: Statistics | None) -> None:
        self.training, self.evaluation = _checked(training), _checked(evaluation)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Watching":
        return Watching(self.training, self.evaluation)

    def of_mode(self, training: bool) -> Statistics | None:
        return self.training if training else self.evaluation

    def set(self, training: bool, statistics: Statistics | None) -> None:
        if training:
            self.training = _checked(statistics)
        else:
            self.evaluation = _checked(statistics)

    def all(self) -> list[Statistics]:
        return [each for each in (self.training, self.evaluation) if each is not None]


def _checked(statistics: Statistics | None) -> Statistics | None:
    if statistics is not None and not isinstance(statistics, Statistics):
        raise ValueError(
            f"edl::Objectives: statistics must be edl.RoutingStatistics or alike (got {type(statistics).__name__})"
        )
    return statistics


def look(statistics: Statistics, layers: list[Observation], batch: Batch) -> None:
    """Counts a forward pass, and no replay of one."""
    if torch._C._current_autograd_node() is None:
        statistics.add(layers, batch)


if not TYPE_CHECKING:  # torch's decorator is untyped and would hide the types
    look = torch.compiler.disable(look)
