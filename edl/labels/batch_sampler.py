"""Batches that hold several domains, drawn so that the proportions of the corpus stay what they are."""

import math
import warnings
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from edl.ops import checks

_OP = "DomainBatchSampler"


class _Corpus(NamedTuple):
    """What is known of the sequences once and for all.

    domains: [N], the D that occur numbered from 0, D = unlabelled; counts: [D] sequences of each; checksum: of domains
    and their places."""

    domains: Tensor
    counts: Tensor
    checksum: int


class DomainBatchSampler(Sampler[list[int]]):
    """Batches in which at least `domains_per_batch` domains have `sequences_per_domain` sequences, for
    `DataLoader(dataset, batch_sampler=...)`.

    **Each sequence is drawn once per epoch**, whatever its domain: none is repeated to fill a batch, and over an epoch
    the proportions are those of the corpus. Of each domain a share of the sequences is set apart in groups of
    `sequences_per_domain`: the same share of all, as far as it goes (a rare domain has only so many, and none is twice
    among the groups of a batch). Each batch gets `domains_per_batch` groups, drawn at random: the chance of a domain
    is the number of its groups that are left by that of the batches that are left. An epoch is cut into stretches, as
    many as they have batches, and each has its part of every domain's groups, within one. What is not set apart,
    sequences without label included, fills the batches in random order.

    **The batch is that of all ranks together**, num_ranks · batch_size sequences, as this is what the loss sees (its
    `group`, which the integrations set). Its sequences are dealt to the ranks in the order of their domains, so that a
    rank has its part of each domain, within one. Where each rank has a loss of its own, ask for num_ranks times as
    many `sequences_per_domain`: then each rank has `sequences_per_domain` of them.

    Where there are too few groups for all batches (rare domains run out early, or one domain is most of the corpus),
    the lack is spread over the epoch: all batches get as many groups, within one. `short_batches` counts those that
    have too few, and one warning tells it.

    Batches depend on seed and epoch only, not on workers; call `set_epoch` as with torch's `DistributedSampler`. All
    ranks have as many batches. `state_dict` and `load_state_dict` continue in the middle of an epoch with the batches
    that remain; `torchdata.stateful_dataloader.StatefulDataLoader` calls them. A plain `DataLoader` with workers draws
    ahead of what it has given: put the number of batches that were done into the state,
    `{**sampler.state_dict(), "batches": done}`.

    Args:
        labels (Tensor[N] or anything that is one for torch): the domain of each sequence of the data set, whole
            numbers, -1 = unlabelled. Gaps between them do no harm.
        batch_size (int): sequences of each rank, at least 1.
        domains_per_batch (int): m, at least 1. Default: 2.
        sequences_per_domain (int): n, at least 1; m · n at most num_ranks · batch_size. Bias correction of the loss
            wants 2 or more. Default: 1.
        rank (int, optional): of the data-parallel ranks. Default: this process's in `torch.distributed`, 0 without.
        num_ranks (int, optional): R. Default: the processes of `torch.distributed`, 1 without. Where ranks share
            sequences (tensor, context, pipeline parallel), give both.
        seed (int): the same on all ranks. Default: 0.
        drop_last (bool): leave out the sequences, others in each epoch, that fill no batch. Else the last batch is
            smaller, promises nothing, and leaves out only what would give it to some ranks and not to others (fewer
            than num_ranks sequences). Default: True.

    Attributes:
        epoch (int): set by `set_epoch`.
        short_batches (int): batches of an epoch with fewer groups than were asked for.

    Raises:
        ValueError: labels that are no whole numbers [N] from -1 on, fewer than m domains with n sequences, fewer
            sequences than a batch, an option outside its range, a state of another sampler; when it is iterated, ranks
            by default that changed since.
    """

    def __init__(
        self,
        labels: Any,
        batch_size: int,
        domains_per_batch: int = 2,
        sequences_per_domain: int = 1,
        rank: int | None = None,
        num_ranks: int | None = None,
        seed: int = 0,
        drop_last: bool = True,
    ) -> None:
        self.batch_size = checks.as_integer(_OP, "batch_size", batch_size, lowest=1)
        self.domains_per_batch = checks.as_integer(_OP, "domains_per_batch", domains_per_batch, lowest=1)
        self.sequences_per_domain = checks.as_integer(_OP, "sequences_per_domain", sequences_per_domain, lowest=1)
        self.rank, self.num_ranks = _ranks(rank, num_ranks)
        self._has_default_ranks = rank is None
        self.seed = checks.as_integer(_OP, "seed", seed)
        checks.check_flags(_OP, drop_last=drop_last)
        self.drop_last = drop_last
        self.epoch = 0
        with torch.device("cpu"):
            self._corpus = _corpus(labels)
            self._check_sizes()
            self._groups = self._groups_of_domains()
        wanted = self._num_full * self.domains_per_batch
        total = int(self._groups.sum())
        lacks_in_all = total < wanted - self._num_full
        self.short_batches = self._num_full if lacks_in_all else wanted - total
        self._next = 0  # the batch that a state says is next
        self._drawn = 0
        if self.short_batches:
            warnings.warn(
                f"edl::{_OP}: {self.domains_per_batch} domains with {self.sequences_per_domain} sequences each should "
                f"be in every batch (got them in {self._num_full - self.short_batches} of {self._num_full}, and "
                f"{total / self._num_full:.2f} domains on average, spread over the epoch)",
                stacklevel=2,
            )

    def _check_sizes(self) -> None:
        size, asked = self.num_ranks * self.batch_size, self.domains_per_batch * self.sequences_per_domain
        if asked > size:
            raise ValueError(
                f"edl::{_OP}: domains_per_batch times sequences_per_domain must be at most the {size} sequences of the "
                f"batch of all ranks (got {asked})"
            )
        if len(self._corpus.domains) < size:
            raise ValueError(
                f"edl::{_OP}: labels must be of at least the {size} sequences of a batch of all ranks "
                f"(got {len(self._corpus.domains)})"
            )
        num_enough = int((self._corpus.counts >= self.sequences_per_domain).sum())
        if num_enough < self.domains_per_batch:
            raise ValueError(
                f"edl::{_OP}: labels must have at least {self.domains_per_batch} domains with "
                f"{self.sequences_per_domain} sequences (got {num_enough})"
            )
        self._num_full = len(self._corpus.domains) // size
        rest = len(self._corpus.domains) % size
        self._num_last = 0 if self.drop_last or rest < self.num_ranks else rest

    def _groups_of_domains(self) -> Tensor:
        """How many groups of each domain the batches of an epoch get, [D]: min(cap, share · count) with one share
        for all, rounded by the largest remainders."""
        counts = self._corpus.counts.double()
        caps = (self._corpus.counts // self.sequences_per_domain).clamp(max=self._num_full)
        total = min(self._num_full * self.domains_per_batch, int(caps.sum()))
        low, high = 0.0, 1.0
        for _ in range(60):
            share = (low + high) / 2
            if int(torch.minimum(caps, (share * counts).long()).sum()) <= total:
                low = share
            else:
                high = share
        wanted = torch.minimum(caps.double(), low * counts)
        groups = torch.minimum(caps, wanted.long())
        remainders = torch.where(groups < caps, high * counts - groups, -1.0)
        groups[remainders.argsort(descending=True, stable=True)[: total - int(groups.sum())]] += 1
        return groups

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the batches that are drawn from now on.

        Args:
            epoch (int): at least 0. Another one than before begins with its first batch.
        """
        epoch = checks.as_integer(_OP, "epoch", epoch)
        if epoch != self.epoch:
            self.epoch, self._next, self._drawn = epoch, 0, 0

    def __len__(self) -> int:
        """Batches of an epoch, the same on all ranks."""
        return self._num_full + (self._num_last > 0)

    def __iter__(self) -> Iterator[list[int]]:
        if self._has_default_ranks and _ranks(None, None) != (self.rank, self.num_ranks):
            raise ValueError(
                f"edl::{_OP}: must be made after init_process_group, or be given rank and num_ranks "
                f"(got rank {self.rank} of {self.num_ranks} when it was made, and now {_ranks(None, None)})"
            )
        first, self._next = self._next, 0
        self._drawn = first
        with torch.device("cpu"):
            full, last = self._batches()
        for place in range(first, len(self)):
            self._drawn = place + 1
            yield (full[place] if place < self._num_full else last).tolist()

    def state_dict(self) -> dict[str, Any]:
        """Where it is in the epoch, the same on all ranks.

        Returns:
            dict: epoch, batches drawn from it, and what both depend on.
        """
        return {"epoch": self.epoch, "batches": self._drawn, **self._settings()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where a state was taken: the next iteration gives the batches that remain of that epoch.

        Args:
            state (mapping): of `state_dict`.

        Raises:
            ValueError: no such state, or one of a sampler with other labels or options.
        """
        settings = self._settings()
        if not isinstance(state, Mapping) or set(state) != {"epoch", "batches", *settings}:
            raise ValueError(f"edl::{_OP}: state must be one of its state_dict (got {state!r})")
        for name, value in settings.items():
            if state[name] != value:
                raise ValueError(f"edl::{_OP}: state must be of a sampler with {name} {value} (got {state[name]!r})")
        epoch, batches = (checks.as_integer(_OP, name, state[name]) for name in ("epoch", "batches"))
        if batches > len(self):
            raise ValueError(f"edl::{_OP}: batches of a state must be at most {len(self)} (got {batches})")
        self.epoch, self._next, self._drawn = epoch, batches, batches

    def _settings(self) -> dict[str, Any]:
        """What the batches of an epoch depend on."""
        names = ("batch_size", "domains_per_batch", "sequences_per_domain", "num_ranks", "seed", "drop_last")
        of_labels = {"sequences": len(self._corpus.domains), "checksum": self._corpus.checksum}
        return {name: getattr(self, name) for name in names} | of_labels

    def _batches(self) -> tuple[Tensor, Tensor]:
        """This rank's sequences of the full batches [Q, batch_size], and of the last one."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {self.epoch}".encode()))
        size = self.num_ranks * self.batch_size
        chosen = _chosen_domains(self._groups, self._num_full, self.domains_per_batch, generator)
        grouped, rest = _sequences_of_groups(self._corpus, chosen, self.sequences_per_domain, generator)
        batches = torch.full((self._num_full, size), -1, dtype=grouped.dtype)
        batches[:, : grouped.shape[1]] = grouped
        num_free = self._num_full * size - int((grouped >= 0).sum())
        batches[batches < 0] = rest[:num_free]
        del grouped
        columns = torch.rand(batches.shape, generator=generator).argsort(dim=1, stable=True)
        batches = batches.gather(1, columns)
        del columns
        last = rest[num_free : num_free + self._num_last].unsqueeze(0)
        return self._own(batches, generator).view(-1, self.batch_size), self._own(last, generator).flatten()

    def _own(self, batches: Tensor, generator: torch.Generator) -> Tensor:
        """This rank's sequences of batches [Q, num_ranks · batch_size], one rank after another in the order of their
        domains, beginning with any."""
        if self.num_ranks == 1:
            return batches
        by_domain = self._corpus.domains[batches.long()].argsort(dim=1, stable=True)
        begins = torch.randint(self.num_ranks, (len(batches), 1), generator=generator)
        ranks = (begins + torch.arange(batches.shape[1])) % self.num_ranks
        return batches[torch.empty_like(ranks).scatter_(1, by_domain, ranks) == self.rank]


def _ranks(rank: int | None, num_ranks: int | None) -> tuple[int, int]:
    """Those that were given, else those of torch.distributed."""
    if (rank is None) != (num_ranks is None):
        raise ValueError(f"edl::{_OP}: rank and num_ranks must be given together (got {rank} and {num_ranks})")
    if rank is None or num_ranks is None:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return 0, 1
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    num_ranks = checks.as_integer(_OP, "num_ranks", num_ranks, lowest=1)
    rank = checks.as_integer(_OP, "rank", rank)
    if rank >= num_ranks:
        raise ValueError(f"edl::{_OP}: rank must be below num_ranks {num_ranks} (got {rank})")
    return rank, num_ranks


def _corpus(labels: Any) -> _Corpus:
    try:
        given = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"edl::{_OP}: labels must be whole numbers [N] (got {type(labels).__name__})") from None
    checks.check_tensor(_OP, "labels", given)
    checks.check_memory(_OP, labels=given)
    if given.dim() != 1 or given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise ValueError(f"edl::{_OP}: labels must be whole numbers [N] (got {given.dtype} {list(given.shape)})")
    given = given.to("cpu", torch.int64)
    if len(given) and given.min() < -1:
        raise ValueError(f"edl::{_OP}: labels must be at least -1 (got {int(given.min())})")
    names, domains, counts = given.unique(return_inverse=True, return_counts=True)
    num_unlabelled = int(counts[0]) if len(names) and names[0] == -1 else 0
    if num_unlabelled:
        counts = counts[1:]
        domains = torch.where(domains == 0, len(counts), domains - 1)
    checksum = int((domains + 1).mul_(torch.arange(1, len(domains) + 1)).sum())
    return _Corpus(domains.to(torch.int16 if len(counts) < 2**15 else torch.int32), counts, checksum)


def _chosen_domains(groups: Tensor, num_batches: int, per_batch: int, generator: torch.Generator) -> Tensor:
    """The domains whose groups each batch gets, [Q, m]: all different, D where there is none left; each domain as often
    as it has groups [D], at most Q.

    A batch takes a domain with the probability of its groups that are left by the batches that are left: domains lie
    in random order on a line, each as long as its groups, and points at the distance of the batches that are left
    choose those they fall on, behind the last one none. So none is chosen twice, and one that must be in all batches
    that are left is chosen. Stretches of the epoch are drawn side by side.
    """
    num_domains, num_stretches = len(groups), math.isqrt(num_batches)
    order = torch.randperm(num_domains, generator=generator)
    left, sizes = _stretches(groups, order, num_batches, num_stretches, generator)
    longest = int(sizes.max())
    chosen = torch.full((num_stretches, longest, per_batch), num_domains, dtype=torch.int32)
    for step in range(longest):
        batches_left = (sizes - step).clamp(min=0)
        order = torch.randperm(num_domains, generator=generator)
        ends = left[:, order].cumsum(1)
        begins = (torch.rand(num_stretches, generator=generator, dtype=torch.float64) * batches_left).long()
        points = begins.unsqueeze(1) + batches_left.unsqueeze(1) * torch.arange(per_batch)
        taken = torch.cat([order, torch.tensor([num_domains])])[torch.searchsorted(ends, points, right=True)]
        left.scatter_add_(1, taken, torch.full_like(taken, -1))
        chosen[:, step] = taken
    return chosen[torch.arange(longest) < sizes.unsqueeze(1)]


def _stretches(
    groups: Tensor, order: Tensor, num_batches: int, num_stretches: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Groups of each domain in each stretch of the epoch [V, D + 1], the last column 0, and batches of each [V].

    Groups are dealt to the batches one after another, domain by domain, and with them to the stretches; each gets its
    part of a domain within one, and at most one a batch. Neighbours in this deal are apart by the golden section of the
    epoch in time, which spreads those of a rare domain evenly over it.
    """
    num_domains = len(groups)
    domains = order.repeat_interleave(groups[order])
    begin = int(torch.randint(num_batches, (1,), generator=generator))
    places = (torch.arange(len(domains)) + begin) % num_batches % num_stretches
    sections = torch.arange(num_stretches, dtype=torch.float64) * ((math.sqrt(5) - 1) / 2)
    time = sections.frac().argsort().argsort()  # when a stretch comes
    keys = time[places] * (num_domains + 1) + domains
    counts = keys.bincount(minlength=num_stretches * (num_domains + 1)).view(num_stretches, num_domains + 1)
    sizes = time[torch.arange(num_batches) % num_stretches].bincount(minlength=num_stretches)
    return counts, sizes


def _sequences_of_groups(
    corpus: _Corpus, chosen: Tensor, per_group: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The sequences of the domains that were chosen [Q, m · n], -1 where there is none, and all others in random
    order."""
    num_sequences, num_domains = len(corpus.domains), len(corpus.counts)
    dtype = torch.int32 if num_sequences < 2**31 else torch.int64
    shuffled = torch.randperm(num_sequences, generator=generator, dtype=dtype)
    by_domain = shuffled[corpus.domains[shuffled].argsort(stable=True)]
    del shuffled
    flat = chosen.flatten()
    places = flat.argsort(stable=True)
    uses = flat.bincount(minlength=num_domains + 1)[:num_domains]
    places = places[: int(uses.sum())]  # behind them stands what is none
    # The k-th group of a domain holds the k-th n of its sequences.
    firsts = (corpus.counts.cumsum(0) - corpus.counts).repeat_interleave(uses)
    numbers = torch.arange(len(places)) - (uses.cumsum(0) - uses).repeat_interleave(uses)
    members = (firsts + per_group * numbers).unsqueeze(1) + torch.arange(per_group)
    grouped = torch.full((len(flat), per_group), -1, dtype=dtype)
    grouped[places] = by_domain[members]
    is_rest = torch.ones(num_sequences, dtype=torch.bool)
    is_rest[members.flatten()] = False
    rest = by_domain[is_rest]
    rest = rest[torch.randperm(len(rest), generator=generator)]
    return grouped.view(len(chosen), -1), rest
