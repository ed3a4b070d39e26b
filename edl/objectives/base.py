"""What an objective is."""

import abc
import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from edl.labels.batch import Batch
from edl.labels.segments import Segments
from edl.routing import Observation

Sums = dict[str, Tensor]
"""What objectives add up over tokens and ranks: name → Tensor[L, ...]."""
Made = TypeVar("Made")
_CLASSES: dict[str, type["Objective"]] = {}


def available() -> dict[str, type["Objective"]]:
    """All classes of objectives, one's own included, by the names under which files and flags know them: the class's
    own in words, `load_balancing` for `LoadBalancing`."""
    return dict(_CLASSES)


class Layers(list[Observation]):
    """The layers of a call that an objective sees.

    Objectives that see the same ones share it, so that what several of them need is computed once.
    """

    def __init__(self, layers: Sequence[Observation]) -> None:
        super().__init__(layers)
        self._made: dict[Hashable, Any] = {}

    def once(self, name: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` gives, which is made at the first call with this name.

        Args:
            name (hashable): of all that the result depends on beside the layers; a tensor stands for itself.
            make (Callable): pure.
        """
        if name not in self._made:
            self._made[name] = make()
        made: Made = self._made[name]
        return made


class Objective(abc.ABC):
    """A loss of a layer's routing, as a formula of sums over tokens.

    Sums can be added: over ranks, over micro-batches. So an objective is up to three pure functions, and whoever binds
    it (`edl.objectives.Objectives`) adds the sums of all ranks in between: the formula then sees the whole batch, and
    each rank differentiates its own part.

        of_tokens ─ add over ranks with parts of a sequence ─ of_units ─ add over ranks and micro-batches ─ formula

    Derive a frozen dataclass, whose fields are the options, checked in `__post_init__`. It holds no state and no
    groups. `available()` lists it from then on.

    Attributes:
        labels (str, optional): the name of the set of labels that `segments` asks for. Default: it needs none.
        takes_all_layers (bool): `of_tokens` gets all layers of a call that have what it needs, in their order, of
            whatever sizes and devices; L is then what it makes of them. Default: those of one size and device at a
            time.
    """

    labels: str | None = None
    takes_all_layers: bool = False

    def __init_subclass__(cls) -> None:
        _CLASSES[re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()] = cls

    def __repr__(self) -> str:
        """The options, which are compared among ranks; a dataclass has its own."""
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

    @property
    def needs(self) -> frozenset[str]:
        """The fields of an `edl.routing.Observation` that it reads; layers that lack one are skipped."""
        return frozenset()

    @property
    def by_unit(self) -> bool:
        """Whether `of_tokens` gives sums for each unit, a sequence for instance, which `of_units` sees whole."""
        return False

    def segments(self, batch: Batch) -> Segments:
        """The unit of each token, and the units' labels: by default all tokens that count are one."""
        return batch.counted()

    @abc.abstractmethod
    def of_tokens(self, layers: Layers, segments: Segments) -> Sums:
        """Sums over this rank's tokens.

        Args:
            layers (Layers): a list of one `Observation` for each of L layers with equally many tokens and experts, what
                is needed in each. `edl.objectives.tokens` computes of it what other objectives need too, of all layers
                at once.
            segments (Segments): what `segments` gave. A token of id -1 does not count, and may hold NaN; the id
                `num_segments` stands for a label or mask value that is not allowed, and operators of edl refuse it.

        Returns:
            Name → Tensor[L, ...], with a gradient where there is one; with `by_unit` Tensor[L, S, ...], or [1, S, ...]
            where all layers have the same. A mean is a sum and the number of what was added, called tokens where these
            are tokens.
        """

    def of_units(self, sums: Sums, labels: Tensor) -> Sums:
        """With `by_unit`: sums over units, of any function of a whole one.

        Args:
            sums (Sums): what `of_tokens` gave, of whole units.
            labels (Tensor[S, ...]): of the units.

        Returns:
            Name → Tensor[L, ...]; also for S = 0.
        """
        raise NotImplementedError(f"edl::{type(self).__name__}: an objective by unit must have of_units")

    @abc.abstractmethod
    def formula(self, sums: Sums) -> Tensor:
        """The loss of each layer, Tensor[L], of the sums of all ranks."""

    def has_effect(self, sums: Sums) -> Tensor:
        """Whether there was anything to act on, a bool scalar; where not, the loss is 0 and no log counts it. By
        default: whether there are "tokens", of sums of this name; always, without."""
        tokens = sums.get("tokens")
        if tokens is None:
            return torch.ones((), dtype=torch.bool, device=next(iter(sums.values())).device)
        return tokens.sum() > 0

    def measures(self, sums: Sums) -> dict[str, Tensor]:
        """What a log shows beside the loss: name → a scalar of layers of one size, of the sums of all ranks, without
        gradient; NaN where there is nothing to measure, which no log counts. Of layers of several sizes a log takes
        their mean, weighted by their numbers. No name is loss, weight, steps_without_effect or begins with layer_."""
        return {}
