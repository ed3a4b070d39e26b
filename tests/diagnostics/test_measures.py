"""Measures are what NumPy makes of their definitions, and NaN where there is nothing to measure."""

import itertools
import math

import numpy as np
import pytest
import torch

from edl.diagnostics import measures

LAYERS, DOMAINS, EXPERTS, DOCUMENTS = 3, 4, 6, 17


def choices(*shape, seed=0):
    """Counts with zeros among them, and an expert that nobody uses."""
    counts = np.random.default_rng(seed).poisson(2.0, shape).astype(np.float64)
    counts[..., 2] = 0
    return counts


def normalised(counts):
    with np.errstate(invalid="ignore"):
        return counts / counts.sum(-1, keepdims=True)


def entropy(row):
    return -sum(p * math.log(p) for p in row if p > 0)


def divergence(p, q):
    middle = (p + q) / 2
    return entropy(middle) - (entropy(p) + entropy(q)) / 2


def of_rows(function, rows):
    """A function of the last dimension, applied row by row."""
    return np.apply_along_axis(function, -1, rows)


def domain_shares(absent=True):
    """[L, D, E], with a domain that is absent from the second layer."""
    counts = choices(LAYERS, DOMAINS, EXPERTS)
    if absent:
        counts[1, 2] = 0
    return normalised(counts)


def assert_close(got, wanted, tolerance=1e-12):
    np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), rtol=tolerance, atol=tolerance)


def test_shares():
    counts = choices(LAYERS, DOMAINS, EXPERTS)
    counts[1, 2] = 0
    shares = measures.shares(torch.from_numpy(counts))
    assert shares.dtype == torch.float64
    assert_close(shares, normalised(counts))
    assert shares[1, 2].isnan().all() and shares.isnan().sum() == EXPERTS
    assert_close(measures.shares(torch.tensor([1, 3], dtype=torch.int16)), [0.25, 0.75])


def test_entropy():
    shares = domain_shares()
    assert_close(measures.entropy(shares), of_rows(lambda row: math.nan if np.isnan(row[0]) else entropy(row), shares))
    assert measures.entropy(torch.tensor([1.0, 0.0])) == 0
    assert_close(measures.entropy(torch.full((8,), 1 / 8)), math.log(8))


def test_load():
    load = choices(LAYERS, EXPERTS)
    assert_close(measures.max_violation(load), load.max(-1) / load.mean(-1) - 1)
    assert_close(measures.dead_experts(load), (load == 0).sum(-1))
    assert_close(measures.coefficient_of_variation(load), load.std(-1) / load.mean(-1))
    alone = torch.tensor([0, 5, 0, 0])
    assert measures.max_violation(alone) == 3 and measures.dead_experts(alone) == 3
    assert_close(measures.coefficient_of_variation(alone), math.sqrt(3))


@pytest.mark.parametrize("name", ["max_violation", "dead_experts", "coefficient_of_variation"])
def test_load_of_nothing_is_not_known(name):
    measure = getattr(measures, name)
    load = torch.tensor([[0.0, 0.0], [1.0, 1.0], [math.nan, 1.0]])
    assert measure(load).isnan().tolist() == [True, False, True]
    assert measure(load)[1] == 0


@pytest.mark.parametrize("mass", [0.3, 0.9, 1.0])
def test_coverage(mass):
    def fewest(row):
        if np.isnan(row[0]):
            return math.nan
        sizes = range(1, EXPERTS + 1)
        return next(
            float(size)
            for size in sizes
            if any(sum(some) >= mass - 1e-9 for some in itertools.combinations(row.tolist(), size))
        )

    shares = domain_shares()
    assert_close(measures.coverage(shares, mass), of_rows(fewest, shares))


def test_coverage_is_not_one_more_by_rounding():
    for num_experts in (9, 10, 11, 64):
        alike = torch.full((num_experts,), 1 / num_experts, dtype=torch.float64)
        masses = [number / num_experts for number in range(1, num_experts + 1)]
        assert [measures.coverage(alike, mass).item() for mass in masses] == list(range(1, num_experts + 1))
    assert measures.coverage(torch.full((10,), 0.1)) == 9
    assert measures.coverage(torch.tensor([0.0, 1.0, 0.0]), mass=1.0) == 1


def test_pairwise_divergence():
    shares = domain_shares()
    got = measures.pairwise_divergence(shares)
    for layer, a, b in itertools.product(range(LAYERS), range(DOMAINS), range(DOMAINS)):
        p, q = shares[layer, a], shares[layer, b]
        assert_close(got[layer, a, b], math.nan if np.isnan(p + q).any() else divergence(p, q))
    assert got[1, 2].isnan().all() and got[1, :, 2].isnan().all()
    assert_close(measures.pairwise_divergence(np.eye(2))[0, 1], math.log(2))


def test_information():
    shares = domain_shares()
    wanted = []
    for layer in shares:
        there = [row for row in layer if not np.isnan(row[0])]
        wanted.append(entropy(np.mean(there, axis=0)) - np.mean([entropy(row) for row in there]))
    assert_close(measures.information(shares), wanted)
    assert_close(measures.information(np.eye(5)), math.log(5))
    assert_close(measures.information(np.full((3, 4), 0.25)), 0)


def test_information_of_domains_that_are_nearly_alike_keeps_its_digits():
    shift = 1e-9
    shares = np.array([[0.5 + shift, 0.5 - shift], [0.5 - shift, 0.5 + shift]])
    assert_close(measures.information(shares) / (2 * shift**2), 1.0, 1e-6)  # Σ (p - m)² / (2 m), mean over domains


def test_information_needs_two_domains():
    one = normalised(choices(2, EXPERTS))
    one[1] = math.nan
    assert measures.information(one).isnan() and measures.information(one[:1]).isnan()
    assert measures.information(np.full((2, 3), math.nan)).isnan()


def test_overlap():
    shares = domain_shares()
    wanted = np.minimum(shares[:, :, None], shares[:, None]).sum(-1)
    assert_close(measures.overlap(shares), wanted)
    assert_close(measures.overlap(np.eye(3)), np.eye(3))


def test_specialisation():
    shares = domain_shares()
    with np.errstate(divide="ignore", invalid="ignore"):
        wanted = np.log2(shares / np.nanmean(shares, axis=1, keepdims=True))
    np.testing.assert_allclose(measures.specialisation(shares), wanted, rtol=1e-12, atol=1e-12)
    assert np.isneginf(wanted).any()  # an expert of other domains
    assert measures.specialisation(shares)[0, :, 2].isnan().all()  # an expert of nobody
    assert_close(measures.specialisation(np.eye(4)).diagonal(), 2.0)


def documents(seed=0, domains=DOMAINS):
    """Counts [L, N, E] and labels [N], -1 among them; a document without a choice in one layer, one of one token."""
    generator = np.random.default_rng(seed)
    counts = choices(LAYERS, DOCUMENTS, EXPERTS, seed=seed)
    labels = generator.integers(-1, domains, DOCUMENTS)
    labels[:2] = 0, domains - 1
    counts[1, 0] = 0
    counts[:, 1] = np.eye(EXPERTS)[1]
    return counts, labels


def of_domains(counts, labels):
    """Routings of the documents of each domain that is there."""
    kept = {label: [] for label in sorted(set(labels.tolist()) - {-1})}
    for row, label in zip(counts, labels.tolist()):
        if label != -1 and row.sum() > 0:
            kept[label].append(row / row.sum())
    return [np.array(rows) for rows in kept.values() if rows]


@pytest.mark.parametrize("domains", [1, DOMAINS])
def test_decomposition(domains):
    counts, labels = documents(domains=domains)
    got = measures.decomposition(counts, torch.from_numpy(labels))
    for layer, row in enumerate(counts):
        routings = of_domains(row, labels)
        means = [rows.mean(0) for rows in routings]
        total, between = entropy(np.mean(means, axis=0)), np.mean([entropy(mean) for mean in means])
        within = np.mean([np.mean([entropy(document) for document in rows]) for rows in routings])
        assert_close(got[layer], [total, total - between, between - within, within])


@pytest.mark.parametrize("seed", range(5))
def test_decomposition_adds_up(seed):
    parts = measures.decomposition(*documents(seed))
    assert_close(parts[..., 0], parts[..., 1:].sum(-1))
    assert (parts > -1e-12).all()


def test_decomposition_agrees_with_information_where_documents_are_of_one_length():
    counts = np.random.default_rng(0).multinomial(32, np.full(EXPERTS, 1 / EXPERTS), size=DOCUMENTS)
    labels = np.arange(DOCUMENTS) % DOMAINS
    usage = np.stack([counts[labels == domain].sum(0) for domain in range(DOMAINS)])
    assert_close(measures.decomposition(counts, labels)[1], measures.information(measures.shares(usage)))


def test_document_entropy():
    counts, labels = documents()
    got = measures.document_entropy(counts, labels, DOMAINS + 1)
    for layer, domain in itertools.product(range(LAYERS), range(DOMAINS)):
        rows = [row / row.sum() for row in counts[layer][labels == domain] if row.sum() > 0]
        assert_close(got[layer, domain], np.mean([entropy(row) for row in rows]) if rows else math.nan)
    assert got[:, DOMAINS].isnan().all()  # a domain without a document


@pytest.mark.parametrize("seed", range(3))
def test_document_overlap(seed):
    counts, labels = documents(seed)
    got = measures.document_overlap(counts, labels)
    for layer, row in enumerate(counts):
        routings = of_domains(row, labels)
        common = lambda pairs: np.mean([np.minimum(a, b).sum() for a, b in pairs])
        within = np.mean([common(itertools.combinations(rows, 2)) for rows in routings if len(rows) > 1])
        across = np.mean([common(itertools.product(a, b)) for a, b in itertools.combinations(routings, 2)])
        assert_close(got[layer], [within, across])


def test_document_overlap_of_documents_that_have_no_pair():
    counts = np.eye(3)
    assert measures.document_overlap(counts, [0, 1, 2]).isnan().tolist() == [True, False]
    assert measures.document_overlap(counts, [0, 0, -1]).isnan().tolist() == [False, True]
    assert measures.document_overlap(counts[:1], [0]).isnan().all()


@pytest.mark.parametrize("counts, labels", [(np.zeros((0, 3)), []), (np.zeros((2, 3)), [0, 1]), (np.eye(3), [-1] * 3)])
def test_no_document_is_not_known(counts, labels):
    labels = np.array(labels, dtype=np.int64)
    assert measures.decomposition(counts, labels).isnan().all()
    assert measures.document_overlap(counts, labels).isnan().all()
    assert measures.document_entropy(counts, labels, 2).isnan().all()


def test_labels_may_be_far_apart():
    counts, labels = documents()
    far = np.where(labels < 0, labels, labels * 10**12)
    assert measures.decomposition(counts, far).equal(measures.decomposition(counts, labels))


def choices_of_tokens(tokens=400, top_k=2, num_experts=EXPERTS, seed=0):
    generator = np.random.default_rng(seed)
    ids = generator.zipf(1.5, tokens).clip(max=50)
    scores = generator.normal(size=(tokens, num_experts)) + np.sin(ids[:, None] * np.arange(1, num_experts + 1))
    return ids, np.argsort(-scores, axis=1)[:, :top_k]


def test_partners():
    _, experts = choices_of_tokens(top_k=3)
    together = np.zeros((EXPERTS, EXPERTS))
    for row in experts:
        together[np.ix_(row, row)] += 1
    found, lifts = measures.partners(together, 2)
    load = together.diagonal()
    for a in range(EXPERTS):
        others = [b for b in range(EXPERTS) if b != a]
        number = sum(together[a, b] for b in others)
        expected = {b: number * load[b] / sum(load[c] for c in others) for b in others}
        order = sorted(others, key=lambda b: -(together[a, b] + 10) / (expected[b] + 10))
        wanted = [b for b in order if together[a, b] > expected[b]][:2]
        assert [b for b in found[a].tolist() if b >= 0] == wanted
        assert_close(lifts[a][: len(wanted)], [together[a, b] / expected[b] for b in wanted])
        assert lifts[a][len(wanted) :].isnan().all()


def test_experts_without_partners():
    alone = torch.diag(torch.tensor([4, 0, 2]))  # one expert a token
    experts, lifts = measures.partners(alone)
    assert (experts == -1).all() and lifts.isnan().all() and experts.shape == (3, 2)
    assert measures.partners(torch.zeros(2, 1, 1))[0].shape == (2, 1, 0)
    alike = torch.full((4, 4), 7) + torch.diag(torch.full((4,), 14))  # K = 2, each pair as often
    assert (measures.partners(alike)[0] == -1).all()


def test_a_pair_seen_once_is_not_the_strongest():
    pairs = [(0, 1)] * 50 + [(0, 2)] + [(0, 3)] * 20 + [(1, 3)] * 10 + [(3, 4)] * 100
    together = torch.zeros(5, 5)
    for a, b in pairs:
        together[[a, a, b, b], [a, b, a, b]] += 1
    experts, lifts = measures.partners(together)
    assert experts[0].tolist() == [1, 2, -1, -1]
    assert lifts[0, 1] > lifts[0, 0]


def test_saturation():
    _, earlier = choices_of_tokens(seed=1)
    _, later = choices_of_tokens(seed=2, top_k=3)
    earlier[:5, 0] = -1  # no choice
    earlier[5, :] = EXPERTS
    later[5, :2] = EXPERTS
    wanted = []
    for ours, theirs in zip(earlier.tolist(), later.tolist()):
        real = {expert for expert in ours if 0 <= expert < EXPERTS}
        if real:
            wanted.append(len(real & set(theirs)) / len(real))
    assert_close(measures.saturation(earlier, later, EXPERTS), np.mean(wanted))
    assert measures.saturation(earlier[10:], earlier[10:], EXPERTS) == 1
    assert measures.saturation(np.full((3, 2), EXPERTS), np.full((3, 2), EXPERTS), EXPERTS).isnan()


def tokens_by_hand(ids, experts, num_experts, number):
    valid = [(v, e) for v, row in zip(ids.tolist(), experts.tolist()) for e in row if 0 <= e < num_experts]
    lists = []
    for expert in range(num_experts):
        mine = [v for v, e in valid if e == expert]
        rows = []
        for token in sorted(set(mine)):
            seen = mine.count(token)
            expected = len(mine) * sum(v == token for v, _ in valid) / len(valid)
            if seen > expected * (1 + 1e-9):
                rows.append((token, seen, seen / expected, (seen + 10) / (expected + 10)))
        lists.append([row[:3] for row in sorted(rows, key=lambda row: -row[3])[:number]])
    return lists


def test_top_tokens(monkeypatch):
    ids, experts = choices_of_tokens()
    experts[3] = -1
    experts[4] = EXPERTS
    experts[experts == 1] = 0  # nobody chooses expert 1
    wanted = tokens_by_hand(ids, experts, EXPERTS, 4)
    for cells in (2**24, 1):  # all experts at once, and one by one
        monkeypatch.setattr("edl.diagnostics.measures.tokens._CELLS", cells)
        got = measures.top_tokens(ids, experts, EXPERTS, 4)
        for ours, theirs in zip(got, wanted, strict=True):
            assert [row[:2] for row in ours] == [row[:2] for row in theirs]
            assert_close([row[2] for row in ours], [row[2] for row in theirs])
    assert got[1] == []


def test_a_token_seen_once_does_not_come_first():
    ids = np.array([7] * 60 + [8] * 100 + [9])
    experts = np.array([0] * 60 + [0] * 30 + [1] * 70 + [0])[:, None]
    first = measures.top_tokens(ids, experts, 2, 3)[0]
    assert [token for token, _, _ in first] == [7, 9]
    assert first[0][2] == pytest.approx(first[1][2])  # both are read by this expert alone


def test_tokens_that_are_not_known_are_no_top_tokens():
    ids, experts = choices_of_tokens()
    unknown = -1 - np.arange(5)
    got = measures.top_tokens(np.concatenate([ids, unknown]), np.concatenate([experts, experts[:5]]), EXPERTS, 4)
    assert got == measures.top_tokens(ids, experts, EXPERTS, 4)


def test_what_says_nothing_has_no_top_tokens():
    assert measures.top_tokens(np.array([1, 2, 2]), np.zeros((3, 1), dtype=np.int64), 1, 5) == [[]]
    assert measures.top_tokens(np.zeros(0, dtype=np.int64), np.zeros((0, 2), dtype=np.int64), 2, 5) == [[], []]


SHARES = [measures.entropy, measures.coverage, measures.pairwise_divergence, measures.information, measures.overlap]
SHARES += [measures.specialisation]


@pytest.mark.parametrize("measure", SHARES)
@pytest.mark.parametrize(
    "shares",
    [
        [[3.0, 4.0]],
        [[-0.5, 1.5]],
        [[math.inf, 0.0]],
        np.zeros((2, 0)),
        "shares",
        None,
        [[True, False]],
        [[1j, 0]],
        torch.tensor(1.0),
        torch.eye(2).to_sparse(),
    ],
)
def test_what_is_no_share_is_refused(measure, shares):
    with pytest.raises(ValueError, match=f"^edl::{measure.__name__}: shares must .*\\(got .*\\)$"):
        measure(shares)


def test_arrays_that_are_views_or_read_only():
    load = np.arange(6.0)
    load.flags.writeable = False
    assert measures.max_violation(load[::-1]) == measures.max_violation(load.copy())
    assert measures.coverage(np.broadcast_to(0.25, (3, 4))).tolist() == [4, 4, 4]


REFUSED = {
    "no values": lambda: measures.shares(torch.empty(3, device="meta")),
    "a negative load": lambda: measures.max_violation([1, -1]),
    "no expert": lambda: measures.shares(np.zeros((3, 0))),
    "an infinite load": lambda: measures.dead_experts([math.inf, 1.0]),
    "words": lambda: measures.coefficient_of_variation(["a", "b"]),
    "a mass above 1": lambda: measures.coverage([1.0], mass=1.5),
    "a mass of NaN": lambda: measures.coverage([1.0], mass=math.nan),
    "a mass in words": lambda: measures.coverage([1.0], mass="all"),
    "a rectangle": lambda: measures.partners(np.zeros((2, 3))),
    "no partner": lambda: measures.partners(np.eye(2), 0),
    "too few labels": lambda: measures.decomposition(np.eye(3), [0, 1]),
    "labels below -1": lambda: measures.decomposition(np.eye(3), [0, 1, -2]),
    "labels above D": lambda: measures.document_entropy(np.eye(3), [0, 1, 2], 2),
    "labels in words": lambda: measures.document_overlap(np.eye(3), ["a", "b", "c"]),
    "labels that are no integers": lambda: measures.document_overlap(np.eye(3), [0.0, 1.0, 2.0]),
    "counts of NaN": lambda: measures.decomposition(np.full((1, 2), math.nan), [0]),
    "other tokens": lambda: measures.saturation(np.zeros((2, 1), int), np.zeros((3, 1), int), 2),
    "experts as numbers": lambda: measures.saturation(np.zeros((2, 1)), np.zeros((2, 1)), 2),
    "E of nothing": lambda: measures.saturation(np.zeros((2, 1), int), np.zeros((2, 1), int), 0),
    "too few tokens": lambda: measures.top_tokens(np.zeros(1, int), np.zeros((2, 1), int), 2, 3),
    "no number": lambda: measures.top_tokens(np.zeros(1, int), np.zeros((1, 1), int), 2, None),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_measured_is_refused_in_a_sentence(call):
    with pytest.raises(ValueError, match=r"^edl::\w+: .* must .* \(got [^\n]*\)$"):
        call()
