"""`DomainBatchSampler`: every batch holds the domains it promises, an epoch is the corpus, and the order depends on
seed and epoch alone."""

import itertools
import json
import math
import warnings

import pytest
import torch
from ranks import on_ranks
from torch.utils.data import DataLoader, StackDataset

import edl
from edl.labels import DomainBatchSampler


def zipf(num_sequences, num_domains, unlabelled=0.02, seed=0):
    """Labels of domains whose sizes fall as 1, 1/2, 1/3, …, in random order."""
    generator = torch.Generator().manual_seed(seed)
    weights = 1 / torch.arange(1, num_domains + 1)
    labels = torch.multinomial(weights, num_sequences, replacement=True, generator=generator)
    return labels.masked_fill(torch.rand(num_sequences, generator=generator) < unlabelled, -1)


def batches_of_ranks(labels, num_ranks, *arguments, epoch=0, **options):
    """[batch][rank] → sequences."""
    of_ranks = []
    for rank in range(num_ranks):
        sampler = DomainBatchSampler(labels, *arguments, rank=rank, num_ranks=num_ranks, **options)
        sampler.set_epoch(epoch)
        of_ranks.append(list(sampler))
        assert len(sampler) == len(of_ranks[-1])
    return list(zip(*of_ranks, strict=True))


def sequences_of_domains(labels, sequences):
    known = labels[sequences]
    return known[known >= 0].bincount(minlength=int(labels.max()) + 1)


GAPS = zipf(900, 6)
# labels, batch size, domains, sequences of each, ranks
CASES = {
    "one rank": (zipf(2003, 7), 16, 4, 2, 1),
    "four ranks": (zipf(2003, 7), 4, 4, 2, 4),
    "one sequence a rank": (zipf(1001, 20), 1, 5, 1, 8),
    "pairs of two": (torch.tensor([0, 1]).repeat(50), 2, 2, 1, 1),
    "nothing unlabelled": (zipf(500, 3, unlabelled=0), 10, 3, 1, 1),
    "mostly unlabelled": (zipf(3000, 5, unlabelled=0.8), 32, 3, 1, 2),
    "gaps between labels": (torch.where(GAPS < 0, -1, 1000 * GAPS), 12, 3, 2, 3),
    "int16": (zipf(900, 6).short(), 12, 3, 2, 3),
    "one batch": (zipf(32, 3), 32, 3, 2, 1),
    "many rare domains": (torch.arange(4000) % 1500, 20, 19, 1, 1),
}


@pytest.mark.parametrize("labels, batch_size, domains, each, ranks", CASES.values(), ids=CASES.keys())
def test_every_batch_of_all_ranks_holds_the_domains_it_promises(labels, batch_size, domains, each, ranks):
    labels = labels.long()
    batches = batches_of_ranks(labels, ranks, batch_size, domains, each)
    assert len(batches) == len(labels) // (batch_size * ranks)
    for batch in batches:
        assert all(len(part) == batch_size for part in batch)
        assert (sequences_of_domains(labels, list(itertools.chain.from_iterable(batch))) >= each).sum() >= domains


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("labels, batch_size, domains, each, ranks", CASES.values(), ids=CASES.keys())
def test_an_epoch_draws_every_sequence_once(labels, batch_size, domains, each, ranks, drop_last):
    batches = batches_of_ranks(labels, ranks, batch_size, domains, each, drop_last=drop_last)
    drawn = list(itertools.chain.from_iterable(itertools.chain.from_iterable(batches)))
    assert len(set(drawn)) == len(drawn)
    assert set(drawn) <= set(range(len(labels)))
    rest = len(labels) % (batch_size * ranks)
    assert len(labels) - len(drawn) == (rest if drop_last or rest < ranks else 0)
    sizes = [len(part) for part in batches[-1]]
    assert max(sizes) - min(sizes) <= 1


def test_each_rank_gets_its_part_of_every_domain():
    labels, ranks = zipf(4000, 7), 4
    for batch in batches_of_ranks(labels, ranks, 8, 4, 2):
        parts = torch.stack([sequences_of_domains(labels, list(part)) for part in batch])
        assert (parts.amax(0) - parts.amin(0)).max() <= 1


def test_sequences_for_all_ranks_give_each_rank_its_own():
    labels, ranks = zipf(4000, 7), 4
    for batch in batches_of_ranks(labels, ranks, 8, 3, 2 * ranks):
        for part in batch:
            assert (sequences_of_domains(labels, part) >= 2).sum() >= 3


def test_ranks_are_alike():
    """No rank gets the domains at one end of the order."""
    labels = torch.arange(8).repeat(500)
    of_first = sequences_of_domains(labels, [batch[0][0] for batch in batches_of_ranks(labels, 8, 1, 4, 1)])
    assert ((of_first - 62.5).abs() < 5 * math.sqrt(62.5)).all(), of_first


@pytest.mark.parametrize("each, size", [(1, 8), (2, 8), (1, 20)])
def test_the_proportions_of_the_corpus_hold_over_time(each, size):
    """Any tenth of an epoch has a tenth of each domain; not farther off than at random, by five deviations."""
    labels = zipf(20_000, 12)
    whole = sequences_of_domains(labels, torch.arange(len(labels))).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        order = torch.tensor(list(DomainBatchSampler(labels, size, 4, each))).flatten()
    for part in order.tensor_split(10):
        found = sequences_of_domains(labels, part).double()
        assert ((found - whole / 10).abs() < 5 * (whole / 10).sqrt()).all()


def test_a_rare_domain_is_spread_evenly():
    """20 sequences of a domain in 1000 batches, all of which are needed: no twentieth of the epoch has more than 3."""
    labels = torch.cat([torch.zeros(980, dtype=torch.long), torch.arange(1020) // 20 + 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler = DomainBatchSampler(labels, 2, 2, 1)
    places = labels[torch.tensor(list(sampler))]
    for domain in range(1, 52):
        twentieths = (places == domain).any(1).view(20, 50).sum(1)
        assert twentieths.sum() == 20
        assert twentieths.max() <= 3


@pytest.mark.filterwarnings("ignore:edl::DomainBatchSampler")
def test_a_domain_of_five_sequences_comes_from_the_beginning_to_the_end():
    """Not in a part of the epoch: its first and last are farther apart than half."""
    labels = torch.cat([torch.zeros(4900, dtype=torch.long), torch.arange(100) // 5 + 1])
    places = labels[torch.tensor(list(DomainBatchSampler(labels, 2, 2, 1)))]
    for domain in range(1, 21):
        found = (places == domain).any(1).nonzero().flatten()
        assert found[-1] - found[0] > 1250


def test_all_pairs_of_domains_meet_alike():
    labels = torch.arange(10).repeat(2000)
    meetings = torch.zeros(10, 10)
    for first, second in DomainBatchSampler(labels, 2, 2, 1):
        meetings[labels[first], labels[second]] += 1
    pairs = (meetings + meetings.T)[torch.triu_indices(10, 10, 1).unbind()]
    expected = 10_000 / 45
    assert meetings.diagonal().sum() == 0
    assert ((pairs - expected).abs() < 5 * math.sqrt(expected)).all(), pairs


def test_a_lack_of_domains_is_spread_counted_and_warned_of_once():
    """9 of 10 sequences are of one domain: 100 sequences of others are enough for half of the 200 batches."""
    labels = (torch.arange(1000) % 10 == 0).long()
    with pytest.warns(UserWarning, match=r"in 100 of 200, and 1\.50 domains on average") as caught:
        sampler = DomainBatchSampler(labels, 5, 2, 1)
        batches = list(sampler)
    assert len(caught) == 1
    assert sampler.short_batches == 100
    both = [sequences_of_domains(labels, batch).count_nonzero().item() == 2 for batch in batches]
    assert sum(both) >= 100
    assert sum(both[:100]) == pytest.approx(sum(both) / 2, abs=7)  # stretches of 14 batches
    assert sorted(itertools.chain.from_iterable(batches)) == list(range(1000))


def test_one_domain_more_in_a_batch_than_there_are_is_counted_in_all():
    labels = torch.cat([torch.zeros(990, dtype=torch.long), torch.tensor([1, 2] * 5)])
    with pytest.warns(UserWarning, match="in 0 of 100"):
        assert DomainBatchSampler(labels, 10, 3, 1).short_batches == 100


def test_no_warning_where_nothing_lacks():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert DomainBatchSampler(zipf(2003, 7), 16, 4, 2).short_batches == 0


def test_order_depends_on_seed_and_epoch_alone():
    labels = zipf(500, 5)
    batches = lambda seed, epoch: batches_of_ranks(labels, 1, 8, 3, 1, seed=seed, epoch=epoch)
    state = torch.get_rng_state()
    first = batches(0, 0)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(3)
    assert batches(0, 0) == first
    others = [batches(0, 1), batches(1, 0), batches(1, 1)]
    for one, other in itertools.combinations([first, *others], 2):
        assert one != other
    with torch.device("meta"):  # a default device
        assert batches(0, 0) == first


def test_the_order_stays_what_it_is():
    """A version of edl that draws other batches does not continue what was begun with this one."""
    sampler = DomainBatchSampler(torch.arange(12) % 3, 4, 2, 1, seed=1)
    assert list(sampler) == [[3, 10, 4, 8], [9, 7, 6, 11], [2, 1, 0, 5]]


# ---- data loaders ----


def dataset_of(labels):
    return StackDataset(sequences=torch.arange(len(labels)), domain_ids=labels)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_data_loader_gives_its_batches_with_any_workers(workers):
    labels = zipf(60, 3)
    sampler = DomainBatchSampler(labels, 6, 2, 2)
    loader = DataLoader(dataset_of(labels), batch_sampler=sampler, num_workers=workers)
    assert len(loader) == 10
    batches = [(batch["sequences"].tolist(), batch["domain_ids"].tolist()) for batch in loader]
    assert [sequences for sequences, _ in batches] == list(sampler)
    assert all(labels[sequences].tolist() == domain_ids for sequences, domain_ids in batches)


def test_a_state_continues_with_the_batches_that_remain():
    labels = zipf(200, 4)
    make = lambda: DomainBatchSampler(labels, 3, 2, 1, rank=1, num_ranks=2, drop_last=False)
    sampler = make()
    sampler.set_epoch(2)
    whole = list(sampler)
    for done in (0, 1, 7, len(whole) - 1, len(whole)):
        begun, resumed = make(), make()
        begun.set_epoch(2)
        before = list(itertools.islice(begun, done))
        state = json.loads(json.dumps(begun.state_dict()))  # of plain numbers
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        resumed.set_epoch(2)  # as a loop over epochs does, and loses nothing
        assert before + list(resumed) == whole
        assert list(resumed) == whole  # the next time from the beginning
        resumed.set_epoch(3)
        assert resumed.state_dict()["batches"] == 0
        assert len(list(resumed)) == len(whole)


def test_a_state_is_the_same_on_all_ranks_and_refused_by_another_sampler():
    labels = zipf(200, 4)
    sampler = DomainBatchSampler(labels, 3, 2, 1, rank=0, num_ranks=2)
    state = sampler.state_dict()
    assert state == DomainBatchSampler(labels, 3, 2, 1, rank=1, num_ranks=2).state_dict()
    for others in (
        {"batch_size": 6, "rank": 0, "num_ranks": 1},
        {"seed": 1},
        {"drop_last": False},
        {"labels": labels[:-1]},
        {"labels": labels.flip(0)},
        {"domains_per_batch": 3},
    ):
        options = {"labels": labels, "batch_size": 3, "rank": 0, "num_ranks": 2, **others}
        with pytest.raises(ValueError, match="^edl::DomainBatchSampler: state must be of a sampler with "):
            DomainBatchSampler(**options).load_state_dict(state)


@pytest.mark.parametrize("change", [{"batches": -1}, {"batches": 1000}, {"epoch": -1}, {"epoch": 0.5}, {"more": 1}])
def test_a_state_that_cannot_be_is_a_sentence(change):
    sampler = DomainBatchSampler(zipf(200, 4), 3)
    for state in ({**sampler.state_dict(), **change}, {}, None, 3):
        with pytest.raises(ValueError, match="^edl::DomainBatchSampler: "):
            sampler.load_state_dict(state)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [1, 4])
def test_a_stateful_data_loader_continues_in_the_middle(workers, done):
    stateful = pytest.importorskip("torchdata.stateful_dataloader")
    labels = zipf(60, 3)

    def make():
        sampler = DomainBatchSampler(labels, 6, 2, 2)
        return stateful.StatefulDataLoader(dataset_of(labels), batch_sampler=sampler, num_workers=workers), sampler

    loader, sampler = make()
    sampler.set_epoch(1)
    whole = [batch["sequences"].tolist() for batch in loader]
    loader, sampler = make()
    sampler.set_epoch(1)
    iterator = iter(loader)
    for _ in range(done):
        next(iterator)
    state = loader.state_dict()
    resumed, _ = make()
    resumed.load_state_dict(state)
    assert [batch["sequences"].tolist() for batch in resumed] == whole[done:]


# ---- ranks ----


def batches_by_default(labels):
    early = DomainBatchSampler(labels, 4, 3, 1, rank=torch.distributed.get_rank(), num_ranks=2)
    sampler = DomainBatchSampler(labels, 4, 3, 1)
    assert (sampler.rank, sampler.num_ranks) == (torch.distributed.get_rank(), 2)
    assert list(early) == list(sampler)
    return list(sampler)


def test_ranks_by_default_are_those_of_the_processes():
    labels = zipf(203, 4)
    first, second = on_ranks(2, batches_by_default, labels)
    assert list(zip(first, second)) == batches_of_ranks(labels, 2, 4, 3, 1)


def test_a_sampler_made_before_its_ranks_is_refused(monkeypatch):
    sampler = DomainBatchSampler(zipf(60, 3), 4)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="must be made after init_process_group"):
        next(iter(sampler))


# ---- arguments ----

LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, -1])
WRONG = {
    "floating labels": {"labels": LABELS.float()},
    "labels per token": {"labels": LABELS.view(2, 4)},
    "flags": {"labels": LABELS.bool()},
    "text": {"labels": ["a", "b"]},
    "no labels": {"labels": None},
    "labels below -1": {"labels": LABELS - 1},
    "labels beyond 64 bits": {"labels": [2**70, 1, 0, 1]},
    "an empty corpus": {"labels": LABELS[:0]},
    "one domain": {"labels": torch.zeros(8, dtype=torch.long)},
    "unlabelled": {"labels": torch.full((8,), -1)},
    "too few sequences of two domains": {"labels": torch.tensor([0, 0, 0, 0, 1, 2, 3]), "sequences_per_domain": 2},
    "sparse labels": {"labels": LABELS.to_sparse()},
    "meta labels": {"labels": LABELS.to("meta")},
    "no batch": {"batch_size": 0},
    "half a batch": {"batch_size": 1.5},
    "a batch above the corpus": {"batch_size": 9},
    "no domain": {"domains_per_batch": 0},
    "no sequence": {"sequences_per_domain": 0},
    "more than a batch": {"domains_per_batch": 3, "sequences_per_domain": 2},
    "a rank alone": {"rank": 0},
    "ranks alone": {"num_ranks": 2},
    "a rank outside": {"rank": 2, "num_ranks": 2},
    "a negative rank": {"rank": -1, "num_ranks": 2},
    "no ranks": {"rank": 0, "num_ranks": 0},
    "a negative seed": {"seed": -1},
    "a seed in words": {"seed": "seed"},
    "drop_last in words": {"drop_last": "yes"},
}


@pytest.mark.parametrize("options", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_argument_is_a_sentence(options):
    with pytest.raises(ValueError, match=r"^edl::DomainBatchSampler: [^\n]*\(got [^\n]*\)$"):
        DomainBatchSampler(**{"labels": LABELS, "batch_size": 4, **options})


@pytest.mark.parametrize("epoch", [-1, 0.5, "1", None])
def test_a_wrong_epoch_is_a_sentence(epoch):
    with pytest.raises(ValueError, match="^edl::DomainBatchSampler: epoch "):
        DomainBatchSampler(LABELS, 4).set_epoch(epoch)


def test_labels_come_in_any_form():
    import numpy

    wanted = list(DomainBatchSampler(LABELS, 4))
    unsigned = DomainBatchSampler(numpy.array([0, 1, 2, 0], numpy.uint16), 4)
    assert list(unsigned) == list(DomainBatchSampler([0, 1, 2, 0], 4))
    for labels in (LABELS.tolist(), LABELS.numpy(), LABELS.numpy().astype(numpy.int16), LABELS.int(), LABELS.char()):
        assert list(edl.labels.DomainBatchSampler(labels, 4)) == wanted
