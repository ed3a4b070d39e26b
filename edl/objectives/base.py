"""What an objective is."""

import abc
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from edl.routing import Observation

Sums = dict[str, Tensor]


class Objective(abc.ABC):
    """A loss of a layer's routing, as a formula of sums over tokens.

    Sums can be added: over ranks, over micro-batches. So an objective is two pure functions, and whoever binds it
    (`edl.objectives.Objectives`) adds the sums of all ranks in between: the formula then sees the whole batch, and each
    rank differentiates its own part.

    Derive a frozen dataclass, whose fields are the options, checked in `__post_init__`. It holds no state and no
    groups.

    Attributes:
        needs (frozenset of str): which fields of an `edl.routing.Observation` it reads; layers that lack one are
            skipped.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    @abc.abstractmethod
    def of_tokens(self, layers: Sequence[Observation], counted: Tensor) -> Sums:
        """Sums over this rank's tokens.

        Args:
            layers (sequence of Observation): of L layers with equally many tokens and experts, what is needed in each.
            counted (Tensor[T]): int32, 0 = the token counts, -1 = it does not (it may hold NaN); 1 = its mask value is
                not allowed, which operators of edl refuse.

        Returns:
            Name → Tensor[L, ...], with a gradient where there is one. A mean is a sum and the number of what was added.
        """

    @abc.abstractmethod
    def formula(self, sums: Sums) -> Tensor:
        """The loss of each layer, Tensor[L], of the sums of all ranks, in float64."""
