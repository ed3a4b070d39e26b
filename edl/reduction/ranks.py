"""The loss of a batch that several ranks hold: what is added over them, by whom, and what becomes of a rank that fails.

Two seams, each one all-reduce forward and nothing backward: sums over tokens, over the ranks that hold parts of the
same sequences (where values are looked at, after a comparison of the segments); sums over whole sequences, over the
ranks that share the batch. Every rank then has the loss of the whole batch and differentiates its own contribution.
"""

import copy
import os
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Optional, TypeVar, Union

import torch
import torch.distributed as dist
from torch import Tensor

from edl.reduction.share import share

Group = Union["torch.distributed.ProcessGroup", "torch.distributed.device_mesh.DeviceMesh"]  # a mesh of one dimension
_Item = TypeVar("_Item")


def process_group(name: str, group: Group | None) -> Optional["dist.ProcessGroup"]:
    """The process group of a ProcessGroup or of a DeviceMesh of one dimension; None stays None."""
    if group is None:
        return None
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            f"edl::parallel: {name} needs torch.distributed to be initialised (got a {type(group).__name__} before)"
        )
    if isinstance(group, dist.DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"edl::parallel: {name} must be one dimension of a DeviceMesh, as mesh['dp'] (got {group.ndim})"
            )
        return group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"edl::parallel: {name} must be a ProcessGroup of this rank or a DeviceMesh of one dimension (got "
            f"{type(group).__name__})"
        )
    return group


def _with_others(group: Optional["dist.ProcessGroup"]) -> Optional["dist.ProcessGroup"]:
    """A group of several ranks; None where this rank is alone in it, and there is nothing to add."""
    return None if group is None or dist.get_world_size(group) == 1 else group


def gather(group: Optional["dist.ProcessGroup"], item: _Item) -> list[tuple[int, _Item]]:
    """(rank, item) of every rank of a group; of no group nothing."""
    if group is None:
        return []
    items: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(items, item, group=group)
    return list(zip(dist.get_process_group_ranks(group), items))


def first_problem(group: "dist.ProcessGroup", problem: Exception | None, op: str) -> Exception | None:
    """This rank's problem, or else that of the first rank that has one; all ranks of the group call it."""
    for rank, sentence in gather(group, None if problem is None else str(problem)):
        if problem is None and sentence is not None:
            problem = RuntimeError(f"{op}: rank {rank} failed: {sentence}")
    return problem


class Ranks:
    """The ranks a loss spans.

    Args:
        sequence_group (ProcessGroup or DeviceMesh of one dimension, optional): ranks that hold parts of the same
            sequences.
        group (ProcessGroup or DeviceMesh of one dimension, optional): ranks that share the batch, one per
            `sequence_group`.
        averaging_ranks (int, optional): how many ranks the framework averages gradients over; default: the size of
            `group`.

    Raises:
        ValueError: no such group, groups that share another rank than this one, `averaging_ranks` below 1, or missing
            with `sequence_group`.
    """

    def __init__(self, sequence_group: Group | None, group: Group | None, averaging_ranks: int | None) -> None:
        self.sequence_group = process_group("sequence_group", sequence_group)
        self.group = process_group("group", group)
        self.averaging_ranks = self._averaging_ranks(averaging_ranks)
        self._check_disjoint()
        self.sequence_group, self.group = _with_others(self.sequence_group), _with_others(self.group)
        self.layout: tuple[Any, ...] | None = None  # of the last call without a problem
        self._num_units: list[int] = []  # of the last call

    def __deepcopy__(self, memo: dict[int, Any]) -> "Ranks":
        return copy.copy(self)  # groups cannot be copied; a copy of a model spans the same ranks

    def _averaging_ranks(self, averaging_ranks: int | None) -> int:
        if averaging_ranks is None:
            if self.sequence_group is not None:
                raise ValueError(
                    "edl::parallel: averaging_ranks is required with sequence_group: the number of ranks over which "
                    "the framework averages gradients (got None)"
                )
            return 1 if self.group is None else dist.get_world_size(self.group)
        if not isinstance(averaging_ranks, int) or averaging_ranks < 1:
            raise ValueError(
                f"edl::parallel: averaging_ranks must be an integer of at least 1 (got {averaging_ranks!r})"
            )
        return averaging_ranks

    def _check_disjoint(self) -> None:
        if self.sequence_group is None or self.group is None:
            return
        ranks = set(dist.get_process_group_ranks(self.sequence_group))
        shared = ranks.intersection(dist.get_process_group_ranks(self.group)) - {dist.get_rank()}
        if shared:
            raise ValueError(
                "edl::parallel: group must hold one rank of each sequence_group, or tokens are counted twice "
                f"(got ranks {sorted(shared)} in both)"
            )

    @property
    def is_alone(self) -> bool:
        """Whether nothing is added over other ranks."""
        return self.sequence_group is None and self.group is None

    def compares_values(self, tensor: Tensor) -> bool:
        """Whether wrong values are looked for before segments are summed."""
        return self.sequence_group is not None and reads_values(tensor)

    def agree(
        self, layout: tuple[Any, ...] | None, held_now: Callable[[], str], problem: Exception | None
    ) -> Exception | None:
        """Compares layouts: among the ranks at the first call, with what was agreed at later ones.

        Args:
            layout (NamedTuple, optional): of this rank's call, what all ranks must give alike; None where it failed.
            held_now (Callable): says what a memory, restored perhaps, holds; asked at the first call.
            problem (Exception, optional): why this rank failed.

        Returns:
            This rank's problem, if any.

        Raises:
            Exception: at the first call: the problem of any rank, or layouts that differ, on all ranks.
        """
        if torch.compiler.is_compiling() or self.is_alone:
            if problem is not None:
                raise problem
            return None
        if self.layout is not None:
            if problem is None and layout != self.layout:
                return ValueError(
                    f"edl::parallel: a loss over several ranks must be given one layout, {self.layout} (got {layout})"
                )
            return problem
        held = held_now()
        # What the first exchange finds travels in the second, so that every rank of every group learns it.
        for group in (self.sequence_group, self.group):
            item = None if problem is None else str(problem), layout, held
            for rank, (sentence, other, other_held) in gather(group, item):
                if problem is not None or rank == dist.get_rank():
                    continue
                if sentence is not None:
                    problem = RuntimeError(f"edl::parallel: rank {rank} failed: {sentence}")
                elif other != layout:
                    problem = ValueError(
                        f"edl::parallel: all ranks must have one layout (got {layout}, and {other} on rank {rank})"
                    )
                elif other_held != held:
                    problem = ValueError(
                        f"edl::parallel: the memories of all ranks must hold the same (got {held}, and "
                        f"{other_held} on rank {rank})"
                    )
        if problem is not None:
            raise problem
        self.layout = layout
        return None

    def sum_tokens(
        self,
        own: list[Tensor],
        labels: list[Tensor],
        problem: Exception | None,
        stand_in: Callable[[list[int]], list[Tensor]],
    ) -> tuple[Sequence[Tensor], Exception | None]:
        """Adds sums over tokens over `sequence_group`, so that those of a unit, a sequence for instance, are whole.

        Args:
            own (list of Tensor): this rank's; none where it has a problem.
            labels (list of Tensor[S, ...]): of the units that the sums are of, compared between ranks where values are
                looked at; none where there is a problem.
            problem (Exception, optional): why this rank has none of them.
            stand_in (Callable): sums for so many units, for a rank that has none to give.

        Returns:
            The totals, differentiable in one's own parts; NaN, and a problem, where a rank failed.
        """
        group = self.sequence_group
        assert group is not None
        sums = own if problem is None else stand_in(self._num_units)
        numbers = [len(each) for each in labels] if problem is None else self._num_units
        if numbers and reads_values(sums[0]):
            # A collective of different sizes may end the process; other labels would be a wrong loss without a word.
            item = None if problem else [(len(each), zlib.crc32(repr(each.tolist()).encode())) for each in labels]
            given = {rank: units for rank, units in gather(group, item) if units is not None}
            sizes = {rank: [size for size, _ in units] for rank, units in given.items()}
            first = next(iter(sizes.values()), numbers)
            are_equal = all(each == first for each in sizes.values())
            if problem is None and not all(units == item for units in given.values()):
                got = (
                    f" labels that differ between ranks {list(given)}"
                    if are_equal
                    else f", by rank, these numbers of segments: { {rank: each[0] for rank, each in sizes.items()} }"
                )
                problem = ValueError(
                    "edl::parallel: all ranks of sequence_group must pass the same segments: labels, or cu_seqlens, "
                    f"of whole sequences (got{got})"
                )
            if not are_equal or not given:
                return sums, problem
            numbers = first
            sums = own if problem is None else stand_in(numbers)
        self._num_units = numbers
        # Numbers of choices are exact in float64 only.
        dtype = torch.float32 if all(x.dtype == torch.float32 for x in sums) else torch.float64
        total, problem = self.start_sum(group, sums, dtype, problem)()
        return share(sums, total), problem

    def start_sum(
        self,
        group: Optional["dist.ProcessGroup"],
        numbers: Sequence[Tensor],
        dtype: torch.dtype,
        problem: Exception | None,
    ) -> Callable[[], tuple[Tensor, Exception | None]]:
        """Starts to add up this rank's numbers over a group; a rank that failed takes part with NaN.

        Returns a function that waits for the total, one row of a type without gradient; NaN, and a problem, where a
        rank failed.
        """
        with torch.no_grad():
            rows = [x.reshape(-1).to(dtype) for x in numbers]
            if group is None:
                own = torch.cat(rows)
                return lambda: (own, problem)
            failed = numbers[0].new_full([1], float(problem is not None), dtype=dtype)  # counts the ranks that did
            row = torch.cat([*rows, failed])
            if problem is not None:
                row[:-1] = float("nan")
            total = torch.ops._c10d_functional.all_reduce(row, "sum", group.group_name)
        return lambda: self._finish_sum(group, total, problem)

    @torch.no_grad()
    def _finish_sum(
        self, group: "dist.ProcessGroup", total: Tensor, problem: Exception | None
    ) -> tuple[Tensor, Exception | None]:
        total = torch.ops._c10d_functional.wait_tensor(total)
        if reads_values(total) and total[-1].item() > 0:
            problem = first_problem(group, problem, "edl::parallel")
        return total[:-1], problem


def reads_values(tensor: Tensor) -> bool:
    """Whether the host may look at values: never while compiling, and where it means to wait for a device if
    EDL_CHECK=1 asks."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or os.environ.get("EDL_CHECK") == "1"
