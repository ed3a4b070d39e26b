"""How the sums of objectives become those of the whole batch: over the ranks that it is split over, then over
micro-batches.

What travels at each seam is one row of numbers. Whatever goes wrong on a rank, others wait for its part: it takes part
with NaN, and raises once they have it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from edl.labels.segments import Segments
from edl.objectives.base import Layers, Objective, Sums
from edl.reduction.micro_batches import Carried, DomainMemory
from edl.reduction.ranks import Ranks
from edl.reduction.share import share


class Part(NamedTuple):
    """An objective on layers that have what it needs, and are of one size."""

    name: str
    objective: Objective
    layers: Layers
    segments: Segments
    places: tuple[int, ...] = ()  # of the layers in the model


Parts = list[Part]
Shared = tuple[Parts, list[Sums]]  # parts, and the sums that each one's formula takes


class Layout(NamedTuple):
    """What all ranks must agree on; units may differ in number between ranks of `group`, and from call to call."""

    objectives: tuple[tuple[str, str], ...]  # of each part: its name, and the objective with its options
    sums: tuple[str, ...]  # of each part: names, shapes and types; -1 stands for the number of units
    device: str
    averaging_ranks: int


class Exchange:
    """Computes parts, of all ranks and micro-batches.

    Args:
        op (str): in whose name it refuses.
        ranks (Ranks): that the batch is split over.
    """

    def __init__(self, op: str, ranks: Ranks) -> None:
        self._op = op
        self._ranks = ranks
        self._seen: tuple[list[Any], Layout] | None = None  # of the last call
        self._stand_ins: list[tuple[Objective, Sums]] = []  # sums over no tokens, of a rank that has none to give

    @property
    def is_alone(self) -> bool:
        """Whether there are no other ranks, and no factor that they would need."""
        ranks = self._ranks
        return ranks.sequence_group is None and ranks.group is None and ranks.averaging_ranks == 1

    def begin(self, parts_of: Callable[[], Parts], memory: DomainMemory | None) -> Callable[[], Shared]:
        """Begins: the all-reduce over `group` runs while the caller goes on, except with a memory.

        Args:
            parts_of (Callable): makes the parts of this rank; an error in it keeps no other rank waiting.
            memory (DomainMemory, optional): of a loss that is in use.

        Returns:
            A function that waits for the other ranks; it returns the parts, and the sums that each one's formula takes.
        """
        ranks = self._ranks
        before = None if memory is None else memory.before_pass()
        parts, sums, layout, problem = self._sum_own_tokens(parts_of, memory)
        problem = ranks.agree(layout, lambda: "nothing" if before is None else before.described(), problem)
        if problem is None and not (self._stand_ins or ranks.is_alone or torch.compiler.is_compiling()):
            self._stand_ins = [(part.objective, _of_no_token(part, of_part)) for part, of_part in zip(parts, sums)]
        if ranks.sequence_group is not None:
            sums, problem = self._over_sequence_group(parts, sums, problem)
        sums, problem = self._over_units(parts, sums, problem)

        read = [] if torch.compiler.is_compiling() else [x for part in parts for x in _read(part)]
        versions = [_version(x) for x in read]
        own: Sequence[Tensor] = []
        if self.is_alone and memory is None:
            wait: Callable[[], tuple[Any, Exception | None]] = lambda: (None, problem)
        else:
            own = self._sums_of_no_token() if problem is not None else _in_a_row(sums)
            # In the second of two passes what was collected is the sum already.
            group = None if memory is not None and memory.has_collected else ranks.group
            wait = ranks.start_sum(group, own, torch.float64, problem)
        carried: Carried | None = None
        if memory is not None:  # micro-batches are carried in the order in which they begin
            total, problem = wait()
            if problem is None:
                carried = memory.add(before, Carried(total, _meaning(parts, sums), total.new_ones(())))
            wait = lambda: (total, problem)

        def finish() -> Shared:
            total, problem = wait()
            if problem is not None:
                raise problem
            if versions != [_version(x) for x in read]:
                raise RuntimeError(
                    f"edl::{self._op}: router_logits and labels must stay as they are until a loss that was begun is "
                    "finished (got one that was changed in place)"
                )
            if not own:
                return parts, sums
            worth = None if carried is None else carried.worth
            whole = total if carried is None else carried.numbers
            return parts, _named(share(own, whole, float(ranks.averaging_ranks), worth), sums)

        return finish

    def reserve(self, parts: Parts, memory: DomainMemory) -> None:
        """Fixes the size of a memory's state as the first micro-batch would, by an example of one."""
        with torch.no_grad():
            sums = [_of_tokens(part) for part in parts]
            sums, problem = self._over_units(parts, sums, None)
        if problem is not None:
            raise problem
        memory.reserve(_meaning(parts, sums), sum(x.numel() for of_part in sums for x in of_part.values()))

    def _sum_own_tokens(
        self, parts_of: Callable[[], Parts], memory: DomainMemory | None
    ) -> tuple[Parts, list[Sums], Layout | None, Exception | None]:
        try:
            parts = parts_of()
            if memory is not None:
                memory.refuse_without_values(_read(parts[0])[0])
            sums = [_of_tokens(part) for part in parts]
            first = next(iter(sums[0].values()))
            if self._ranks.compares_values(first):
                # Labels are looked at with the units; the ranks of sequence_group must hear of wrong ones before.
                with torch.no_grad():
                    for part, of_part in zip(parts, sums):
                        _of_units(part, of_part)
            if self._ranks.is_alone or torch.compiler.is_compiling():
                return parts, sums, None, None
            return parts, sums, self._layout(parts, sums, first.device.type), None
        except Exception as error:
            return [], [], None, error

    def _layout(self, parts: Parts, sums: list[Sums], device: str) -> Layout:
        """What ranks compare, in words; made anew only where something differs from the last call."""
        seen = [(part.name, part.objective, _shapes(part, of_part), device) for part, of_part in zip(parts, sums)]
        if self._seen is None or seen != self._seen[0]:
            objectives = tuple((part.name, repr(part.objective)) for part in parts)
            shapes = tuple(", ".join(f"{name} {shape} {dtype}" for name, shape, dtype in each[2]) for each in seen)
            self._seen = seen, Layout(objectives, shapes, device, self._ranks.averaging_ranks)
        return self._seen[1]

    def _over_sequence_group(
        self, parts: Parts, sums: list[Sums], problem: Exception | None
    ) -> tuple[list[Sums], Exception | None]:
        labels = [part.segments.labels for part in parts if part.objective.by_unit]
        total, problem = self._ranks.sum_tokens(_in_a_row(sums), labels, problem, self._units_of_no_token)
        return (sums if problem is not None else _named(total, sums)), problem

    def _over_units(
        self, parts: Parts, sums: list[Sums], problem: Exception | None
    ) -> tuple[list[Sums], Exception | None]:
        if problem is None:
            try:
                return [_of_units(part, of_part) for part, of_part in zip(parts, sums)], None
            except Exception as error:
                if self._ranks.is_alone or torch.compiler.is_compiling():
                    raise
                problem = error
        return [], problem

    def _units_of_no_token(self, num_units: list[int]) -> list[Tensor]:
        units = iter(num_units)
        rows = []
        for objective, sums in self._stand_ins:
            size = next(units) if objective.by_unit else 0
            shapes = [(x.shape[0], size, *x.shape[2:]) if objective.by_unit else x.shape for x in sums.values()]
            rows.append({name: x.new_zeros(shape) for (name, x), shape in zip(sums.items(), shapes)})
        return _in_a_row(rows)

    def _sums_of_no_token(self) -> list[Tensor]:
        no_label = next(iter(self._stand_ins[0][1].values())).new_zeros(0, dtype=torch.int64)
        with torch.no_grad():
            return _in_a_row(
                [each.of_units(sums, no_label) if each.by_unit else sums for each, sums in self._stand_ins]
            )


def _of_tokens(part: Part) -> Sums:
    """Sums of a part, on the device of its segments, which is that of the batch, wherever the layers lie."""
    ids = part.segments.segment_ids
    device = _read(part)[0].device
    if device == ids.device:
        return _checked(part, part.objective.of_tokens(part.layers, part.segments))
    there = part.segments._replace(segment_ids=ids.to(device), labels=part.segments.labels.to(device))
    sums = _checked(part, part.objective.of_tokens(part.layers, there))
    return {name: x.to(ids.device) for name, x in sums.items()}


def _of_units(part: Part, sums: Sums) -> Sums:
    return part.objective.of_units(sums, part.segments.labels) if part.objective.by_unit else sums


def _checked(part: Part, sums: Sums) -> Sums:
    """The sums of an objective, which must say of which layer they are."""
    sizes = {x.shape[0] if x.dim() > 0 else 0 for x in sums.values()}
    if len(sizes - {1} if part.objective.by_unit else sizes) > 1 or 0 in sizes:
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in sums.items())
        raise ValueError(
            f"edl::Objectives: of_tokens must give sums of each layer, [L, ...] (got {shapes} of {part.name!r})"
        )
    return sums


def _read(part: Part) -> list[Tensor]:
    """What the sums of a part are computed from."""
    needs = part.objective.needs
    return [
        *[getattr(layer, field) for layer in part.layers for field in needs],
        part.segments.segment_ids,
        part.segments.labels,
    ]


def _version(tensor: Tensor) -> int:
    """Tells whether a tensor was changed in place, where there is telling."""
    return -1 if tensor.is_inference() else tensor._version


def _of_no_token(part: Part, sums: Sums) -> Sums:
    if not part.objective.by_unit:
        return {name: torch.zeros_like(x) for name, x in sums.items()}
    return {name: x.new_zeros((x.shape[0], 0, *x.shape[2:])) for name, x in sums.items()}


def _shapes(part: Part, sums: Sums) -> list[tuple[str, list[int], torch.dtype]]:
    of_unit = part.objective.by_unit
    return [(name, [x.shape[0], -1, *x.shape[2:]] if of_unit else list(x.shape), x.dtype) for name, x in sums.items()]


def _meaning(parts: Parts, sums: list[Sums]) -> str:
    """What packed sums are of; a change of options that they do not show is the user's affair."""
    of_parts = []
    for part, of_part in zip(parts, sums):
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in of_part.items())
        of_parts.append(f"{type(part.objective).__name__}: {shapes}")
    return "; ".join(of_parts)


def _in_a_row(sums: Sequence[Sums]) -> list[Tensor]:
    return [x for of_part in sums for x in of_part.values()]


def _named(row: Sequence[Tensor], sums: Sequence[Sums]) -> list[Sums]:
    tensors = iter(row)
    return [{name: next(tensors) for name in of_part} for of_part in sums]
