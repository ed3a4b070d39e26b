"""What a log says of divergence losses: added up where they were computed, read when somebody looks."""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from edl import ops
from edl.reduction.micro_batches import Moments

STEPS_WITHOUT_PAIR = 100
_MOST_WAITING = 64


def has_pair(moments: Moments) -> Tensor:
    """Whether a loss had two domains to push apart, a scalar."""
    counts = moments.packed[-moments.shape[1] :]  # of the last layer, as of all
    return _is_present(counts, moments.bias_correction).sum() > 1


def _is_present(counts: Tensor, bias_correction: bool) -> Tensor:
    """Which domains the loss compares."""
    return counts >= 2 if bias_correction else counts > 0


def pairs_and_nats(moments: Sequence[Moments]) -> tuple[Tensor, Tensor]:
    """What losses of one shape compared.

    Args:
        moments (sequence of Moments): of N losses.

    Returns:
        pairs (Tensor[N]), the pairs of domains of each; nats (Tensor[N]), their Jensen-Shannon divergence, the mean
        over pairs and layers, NaN without a pair.
    """
    shape, bias_correction = moments[0].shape, moments[0].bias_correction
    packed = torch.stack([each.packed for each in moments])
    num_sums, num_counts = math.prod(shape), shape[0] * shape[1]
    sums = packed[:, :num_sums].view(-1, *shape)
    counts = packed[:, -num_counts:].view(-1, *shape[:2])
    divergences = ops.pairwise_divergence(sums, packed.new_empty(0), counts)
    is_present = _is_present(counts, bias_correction)
    is_pair = (is_present.unsqueeze(-1) & is_present.unsqueeze(-2)).triu(diagonal=1)
    nats = divergences.where(is_pair, 0.0).sum((1, 2, 3)) / is_pair.sum((1, 2, 3))
    return is_pair[:, 0].sum((1, 2)), nats


class DivergenceLog:
    """Sums over the losses of a router, or of all together, since the log was last cleared.

    Nothing here waits for a device. A loss without a pair of domains is 0, which would look perfect: it counts among
    the losses and in no sum.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Moments]] = []
        self._sums: Tensor | None = None

    def add(self, loss: Tensor, moments: Moments) -> None:
        """Counts a loss, a scalar."""
        self._waiting.append((loss.detach(), moments))
        if len(self._waiting) == _MOST_WAITING:
            self._add_up()

    def sums(self) -> Tensor | None:
        """The sums; None where there was no loss.

        Returns:
            Tensor[5], float64: the losses and the nats of those with a pair, pairs, losses with a pair, losses.
        """
        self._add_up()
        return self._sums

    def clear(self) -> None:
        """Begins anew."""
        self._waiting, self._sums = [], None

    def _add_up(self) -> None:
        if not self._waiting:
            return
        losses, moments = zip(*self._waiting)
        self._waiting = []
        pairs, nats = pairs_and_nats(moments)
        counts, values = pairs > 0, torch.stack(losses).double()
        counted = (values.where(counts, 0.0), nats.where(counts, 0.0), pairs, counts, torch.ones_like(values))
        sums = torch.stack([column.double() for column in counted]).sum(1)
        self._sums = sums if self._sums is None else self._sums + sums


class PairWatch:
    """Tells when a hundred steps had no loss with a pair of domains; looks, and so waits, once in a hundred steps."""

    def __init__(self) -> None:
        self._num_steps = 0
        self._has_pair: Tensor | None = None  # in the running step
        self._steps_without: Tensor | None = None

    def see(self, has_pair: Tensor) -> None:
        """Takes a loss of the running step into account: a scalar, whether it had a pair."""
        self._has_pair = has_pair if self._has_pair is None else self._has_pair | has_pair

    def end_step(self) -> bool:
        """Ends a step; True where it is time to warn. A step without any loss is none."""
        if self._has_pair is None:
            return False
        steps = (~self._has_pair).long()
        self._steps_without = steps if self._steps_without is None else (self._steps_without + 1) * steps
        self._has_pair = None
        self._num_steps += 1
        return self._num_steps % STEPS_WITHOUT_PAIR == 0 and bool(self._steps_without >= STEPS_WITHOUT_PAIR)


def warn_of_no_pair(name: str, num_steps: int = STEPS_WITHOUT_PAIR) -> None:
    """Warns in the name of an integration; each warns once."""
    warnings.warn(
        f"edl::{name}: a batch must hold two domains for a divergence loss, mix domains in batches or check the labels "
        f"(got none with two for {num_steps} steps)",
        stacklevel=3,
    )
