"""Tests and intervals of a routing: their numbers by hand, how often they are right, and what has none."""

import numpy as np
import pytest
from calibrate_tests import Reader, Source, read, record_of
from calibrate_tests import information as true_information

from edl.diagnostics import multipliers, standardised
from edl.diagnostics.choices import moves_of, routings_of
from edl.diagnostics.information import information_of, moved
from edl.diagnostics.layers import LayerFacts
from edl.diagnostics.record import Record
from edl.diagnostics.significance import beyond_token, certain_cells, compare, compare_runs, information


def jensen_shannon(first, second):
    total = 0.0
    for own, other in zip(first, second):
        for value in (own, other):
            total += value * np.log(2 * value / (own + other)) / 2 if value > 0 else 0.0
    return total


def random_record(
    seed=0, domains=2, documents=40, experts=5, layers=1, top_k=2, vocabulary=12, none=0.1, groups=None, tokens=(1, 40)
):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(*tokens, domains * documents)
    chosen = []
    for _ in range(layers):
        layer = rng.integers(0, experts, (lengths.sum(), top_k))
        chosen.append(np.where(rng.random(layer.shape) < none, experts, layer))
    return Record(
        [LayerFacts(3 * place, "", experts, top_k) for place in range(layers)],
        [f"domain {place}" for place in range(domains)],
        rng.integers(0, vocabulary, lengths.sum()),
        np.append(0, np.cumsum(lengths)),
        rng.permutation(np.repeat(np.arange(domains), documents)),
        chosen,
        keys=rng.permutation(domains * documents) + 1000,
        groups=None if groups is None else rng.integers(0, groups, domains * documents),
    )


def part(record, documents, layers=None):
    """A record of some of the documents, in this order."""
    tokens = np.concatenate([np.arange(record.offsets[each], record.offsets[each + 1]) for each in documents])
    layers = range(len(record.layers)) if layers is None else layers
    return Record(
        [record.layers[place] for place in layers],
        record.domains,
        record.token_ids[tokens],
        np.append(0, np.cumsum(np.diff(record.offsets)[documents])),
        record.labels[documents],
        [record.experts(place)[tokens] for place in layers],
        keys=record.keys[documents],
        groups=record.groups[documents],
    )


def usage(record, domain, place=0):
    counts = record.counts(place)[record.labels == domain].sum(0)
    return counts / counts.sum()


# Numbers by hand


@pytest.mark.parametrize("groups", [None, 70])
def test_influences_are_what_leaving_a_unit_out_changes(groups):
    record = random_record(groups=groups)
    units = multipliers.units_of(record)
    routings = routings_of(record, 0, units)
    for unit, domain in enumerate(units.domains):
        rest = part(record, np.flatnonzero(units.of_documents != unit))
        np.testing.assert_allclose(routings.influences[unit], usage(record, domain) - usage(rest, domain), atol=1e-12)
    np.testing.assert_allclose(routings.shares, [usage(record, domain) for domain in (0, 1)])
    pairs = {(label, group) for label, group in zip(record.labels, record.groups)}
    assert len(units.domains) == len(pairs)


def test_test_and_divergence_are_the_formulas():
    record = random_record(1)
    units = multipliers.units_of(record)
    signs, influences = multipliers.signs_of(units, 7), routings_of(record, 0, units).influences
    assert set(np.unique(signs)) == {-1, 1} and signs.shape == (999, 80)
    first, second = usage(record, 0), usage(record, 1)
    mean = (first + second) / 2
    statistic, count = ((first - second) ** 2 / mean).sum(), 0
    for row in signs.astype(float):
        change = row[units.domains == 0] @ influences[units.domains == 0]
        change -= row[units.domains == 1] @ influences[units.domains == 1]
        count += (change**2 / mean).sum() >= statistic
    found = compare(record, seed=7)
    assert found.p[0, 0] == found.layer_p[0] == found.whole.p == (count + 1) / 1000
    np.testing.assert_allclose(found.plain, [[jensen_shannon(first, second)]], rtol=1e-10)
    assert found.whole.value == found.layer_value[0] == found.corrected[0, 0]


def test_bias_is_the_jackknife():
    record = random_record(2, documents=60, tokens=(20, 40))
    plain, corrected = compare(record).plain[0, 0], compare(record).corrected[0, 0]
    assert information(record, 0) < true_information(np.array([usage(record, 0), usage(record, 1)]))
    bias = of_information = 0.0
    for domain in (0, 1):
        left_out = []
        for document in np.flatnonzero(record.labels == domain):
            rest = part(record, np.flatnonzero(np.arange(len(record)) != document))
            left_out.append(
                (
                    jensen_shannon(usage(rest, 0), usage(rest, 1)),
                    true_information(np.array([usage(rest, 0), usage(rest, 1)])),
                )
            )
        both = np.mean(left_out, axis=0) - [plain, plain]  # two domains: the information is the divergence
        bias, of_information = bias + 59 * both[0], of_information + 59 * both[1]
    np.testing.assert_allclose(plain - corrected, bias, rtol=0.1)
    np.testing.assert_allclose(plain - information(record, 0), of_information, rtol=0.05)


def test_terms_are_derivatives():
    record = random_record(3, domains=3, documents=20)
    units = multipliers.units_of(record)
    routings = routings_of(record, 0, units)
    moves = [move / 20 for move in moves_of(routings, units, multipliers.signs_of(units, 0))]
    pairs = multipliers.pairs_of(routings.shares[[0]], routings.shares[[1]], [(moves[0], moves[1])], np.array([20]))
    found = information_of(routings, units)
    change = moved(routings, found.domains, moves)
    for draw in range(20):
        shifted = [routings.shares[each] + moves[each][draw] for each in range(3)]
        exact = jensen_shannon(shifted[0], shifted[1]) - pairs.plain[0]
        np.testing.assert_allclose(pairs.linear[0, draw] + pairs.quadratic[0, draw], exact, rtol=0.02, atol=1e-8)
        exact = true_information(np.array(shifted)) - found.plain
        np.testing.assert_allclose(change[draw], exact, rtol=0.02, atol=1e-8)


def choices_by_token(record, domain, token):
    of_tokens = (record.labels[record.documents] == domain) & (record.token_ids == token)
    return np.bincount(record.experts(0)[of_tokens].ravel(), minlength=6)[:5].astype(float)


def hand_weights(record, tokens=range(12)):
    """Mantel and Haenszel's weights, of tokens in 8 documents of both."""
    weights = {}
    for token in tokens:
        holders = record.documents[record.token_ids == token]
        if all(len({each for each in holders if record.labels[each] == domain}) >= 8 for domain in (0, 1)):
            first, second = (choices_by_token(record, domain, token).sum() for domain in (0, 1))
            weights[token] = first * second / (first + second)
    return {token: weight / sum(weights.values()) for token, weight in weights.items()}


def standardised_routing(record, weights, domain):
    tables = {token: choices_by_token(record, domain, token) for token in weights}
    return sum(weights[token] * table / table.sum() for token, table in tables.items())


def test_standardised_routings_and_their_influences_are_the_formulas():
    record = random_record(4, vocabulary=12)
    weights = hand_weights(record)
    units = multipliers.units_of(record)
    layer = standardised.Layer(record, 0, standardised.vocabulary_of(record, units))
    rates = layer.rates()
    routings = [standardised_routing(record, weights, domain) for domain in (0, 1)]
    for domain in (0, 1):
        own = rates[domain].weights[1 - domain] @ rates[domain].shares
        np.testing.assert_allclose(own, routings[domain], rtol=1e-10)
        for unit in range(0, 40, 7):
            document = np.flatnonzero(record.labels == domain)[unit]
            rest = part(record, np.flatnonzero(np.arange(len(record)) != document))
            change = routings[domain] - standardised_routing(rest, weights, domain)
            np.testing.assert_allclose(rates[domain].influences[unit, 1 - domain], change, atol=1e-6)
    found = beyond_token(record)
    np.testing.assert_allclose(found.standardised.plain, [[jensen_shannon(*routings)]], rtol=1e-8)
    is_covered = np.isin(record.token_ids, list(weights))
    np.testing.assert_allclose(found.covered, [is_covered.mean()])


def test_blocks_of_units_change_nothing(monkeypatch):
    record = random_record(5, domains=3, layers=2, groups=50)
    whole = beyond_token(record)
    monkeypatch.setattr(standardised, "_BLOCK", 40)
    blocks = beyond_token(record)
    np.testing.assert_allclose(whole.composition, blocks.composition, atol=1e-7)
    np.testing.assert_allclose(whole.same_token, blocks.same_token, atol=1e-7)
    np.testing.assert_allclose(whole.standardised.corrected, blocks.standardised.corrected, atol=1e-7)
    np.testing.assert_array_equal(whole.standardised.p, blocks.standardised.p)


def fixed_record(experts_of, tokens, documents=40):
    """Documents of one domain are alike: `tokens` of each, with the choice that the domain makes for a token."""
    ids = np.concatenate([np.tile(own, documents) for own in tokens])
    chosen = np.concatenate([np.tile(experts_of[domain][own], documents) for domain, own in enumerate(tokens)])
    lengths = np.repeat([len(own) for own in tokens], documents)
    return Record(
        [LayerFacts(0, "", 8, 1)],
        [f"domain {place}" for place in range(len(tokens))],
        ids,
        np.append(0, np.cumsum(lengths)),
        np.repeat(np.arange(len(tokens)), documents),
        [chosen[:, None]],
    )


def test_what_does_not_vary_is_exact():
    same = np.arange(8)
    other = np.array([0, 1, 2, 3, 5, 4, 6, 7])  # tokens 4 and 5 change places
    tokens = [np.array([0, 1, 4, 4, 6]), np.array([0, 1, 2, 4, 5, 7])]
    found = beyond_token(fixed_record([same, other], tokens))
    # Shared are 0, 1, 4, with weights 40·40/80, the same, 80·40/120.
    weights = np.array([20, 20, 80 / 3]) / (40 + 80 / 3)
    np.testing.assert_allclose(found.same_token, [[weights[2] * np.log(2)]], rtol=1e-6)
    np.testing.assert_allclose(found.standardised.corrected, [[weights[2] * np.log(2)]], rtol=1e-6)
    assert found.standardised.whole.p == 0.001
    np.testing.assert_allclose(
        [found.standardised.whole.low, found.standardised.whole.high], weights[2] * np.log(2), rtol=1e-6
    )
    np.testing.assert_allclose(found.covered, [(4 + 3) / 11])
    # A token's rate is the mean over domains, by its frequency in each; unshared tokens are their domain's own.
    rate = np.array([2 / 5, 1 / 6]) / (2 / 5 + 1 / 6)
    first, second = np.zeros(8), np.zeros(8)
    first[[0, 1, 6]], second[[0, 1, 2, 4, 7]] = 1 / 5, 1 / 6
    first[[4, 5]] += 2 / 5 * rate
    second[[4, 5]] += rate / 6
    np.testing.assert_allclose(found.composition, [[jensen_shannon(first, second)]], rtol=1e-6)


def test_a_router_that_sees_the_token_alone_is_all_composition():
    record, _, _ = read(np.random.default_rng(0), Reader((200, 200), distance=1.5))
    raw, found = compare(record).corrected[0, 0], beyond_token(record)
    assert raw > 3e-3
    np.testing.assert_allclose(found.composition[0, 0], raw, rtol=0.05)
    assert abs(found.standardised.corrected[0, 0]) < 0.02 * raw and abs(found.same_token[0, 0]) < 1e-3


def test_cells_are_those_that_differ():
    means = np.full((1, 3, 10), 0.1)
    means[0, 1, [2, 7]] = [0.18, 0.02]
    certain = certain_cells(record_of(np.random.default_rng(0), [Source(80)] * 3, means), 0)
    assert certain.dtype == bool and certain.shape == (3, 10) and certain[1, [2, 7]].all()
    assert not certain[:, [0, 1, 3, 4, 5, 6, 8, 9]].any()


# What has little to say


def everything(record):
    """All that may be asked; the whole comparisons."""
    for place in range(len(record.layers)):
        assert certain_cells(record, place).shape == (len(record.domains), record.layers[place].num_experts)
        assert isinstance(information(record, place), float)
    raw, beyond = compare(record), beyond_token(record)
    pairs = len(record.domains) * (len(record.domains) - 1) // 2
    for found in (raw, beyond.standardised):
        assert found.plain.shape == found.corrected.shape == found.p.shape == (len(record.layers), pairs)
        assert found.layer_value.shape == found.layer_p.shape == (len(record.layers),)
    assert beyond.composition.shape == beyond.same_token.shape == raw.p.shape and beyond.covered.shape == (pairs,)
    compare_runs(record, record, "earlier", "later")
    return raw, beyond


def is_untested(found):
    values = [found.whole.p, found.whole.low, found.whole.high, *found.layer_p, *found.layer_low, *found.p.ravel()]
    return bool(np.isnan(values).all())


def test_one_domain_has_no_differences():
    raw, beyond = everything(random_record(domains=1))
    assert is_untested(raw) and is_untested(beyond.standardised) and np.isnan(raw.whole.value)
    assert information(random_record(domains=1), 0) == pytest.approx(0, abs=1e-12)


def test_fewer_than_30_documents_have_numbers_and_no_test():
    for record in (random_record(documents=29), random_record(documents=60, groups=29)):
        raw, beyond = everything(record)
        assert is_untested(raw) and is_untested(beyond.standardised) and not certain_cells(record, 0).any()
        assert np.isfinite([raw.whole.value, beyond.standardised.whole.value, beyond.same_token[0, 0]]).all()


def test_a_small_domain_beside_others_is_left_out_of_the_mean():
    record = random_record(domains=3, documents=40)
    kept = np.flatnonzero((record.labels < 2) | (np.cumsum(record.labels == 2) <= 10))
    small = compare(part(record, kept))
    assert np.isnan(small.p[0, 1:]).all() and np.isfinite(small.corrected).all() and np.isfinite(small.p[0, 0])
    assert small.whole.value == small.corrected[0, 0] and np.isfinite(small.whole.p)


def test_a_single_document_has_no_bias():
    record = part(random_record(), [0, *np.flatnonzero(random_record().labels != random_record().labels[0])])
    raw, beyond = everything(record)
    assert np.isfinite(raw.plain).all() and np.isnan(raw.corrected).all() and np.isnan(raw.whole.value)
    assert np.isnan(information(record, 0)) and np.isnan(beyond.composition).all() and np.isnan(beyond.same_token).all()


def test_no_documents_have_no_numbers():
    empty = Record([LayerFacts(0, "", 4, 2)], ["one", "two"], [], [0], [], [np.zeros((0, 2), int)])
    assert np.isnan(compare(empty).whole.value) and np.isnan(beyond_token(empty).composition).all()
    assert np.isnan(information(empty, 0)) and not certain_cells(empty, 0).any()
    half = part(random_record(), np.flatnonzero(random_record().labels == 1))
    assert np.isnan(everything(half)[0].plain).all()


def test_equal_documents_do_not_differ():
    raw, beyond = everything(fixed_record([np.arange(8)] * 2, [np.arange(6)] * 2))
    for found in (raw, beyond.standardised):
        assert found.whole.p == 1 and np.isnan(found.whole.low) and found.whole.high == pytest.approx(0, abs=1e-9)
    assert not certain_cells(fixed_record([np.arange(8)] * 2, [np.arange(6)] * 2), 0).any()
    assert beyond.same_token[0, 0] == 0 and beyond.covered[0] == 1


def test_no_shared_tokens():
    raw, beyond = everything(fixed_record([np.arange(8)] * 2, [np.arange(3), np.arange(3, 6)]))
    assert raw.whole.value == pytest.approx(np.log(2)) and raw.whole.p == 0.001
    assert is_untested(beyond.standardised) and np.isnan(beyond.same_token).all() and beyond.covered[0] == 0
    assert beyond.composition[0, 0] == pytest.approx(np.log(2))


@pytest.mark.parametrize(
    "options", [{"top_k": 1}, {"tokens": (1, 2)}, {"none": 0.95}, {"experts": 1}, {"vocabulary": 1}]
)
def test_small_records_have_finite_numbers(options):
    raw, beyond = everything(random_record(documents=60, layers=2, **options))
    assert np.isfinite([*raw.plain.ravel(), *raw.corrected.ravel(), *raw.p.ravel(), raw.whole.value]).all()
    assert (beyond.covered >= 0).all() and (beyond.covered <= 1).all()


def test_a_layer_that_chose_nothing_is_not_known():
    record = random_record(layers=2)
    silent = Record(
        record.layers,
        record.domains,
        record.token_ids,
        record.offsets,
        record.labels,
        [record.experts(0), np.full_like(record.experts(1), -1)],
    )
    raw, beyond = everything(silent)
    for found in (raw, beyond.standardised):
        assert np.isnan(found.plain[1]).all() and np.isnan([found.layer_value[1], found.layer_p[1]]).all()
        assert found.whole.value == found.layer_value[0] and np.isfinite(found.whole.p)


def test_documents_without_tokens_change_nothing():
    record = random_record()
    longer = Record(
        record.layers,
        record.domains,
        record.token_ids,
        np.append(record.offsets, [record.num_tokens] * 3),
        np.append(record.labels, [0, 1, 1]),
        [record.experts(0)],
    )
    (raw, beyond), (raw_before, beyond_before) = everything(longer), everything(record)
    for found, before in ((raw, raw_before), (beyond.standardised, beyond_before.standardised)):
        np.testing.assert_allclose(found.plain, before.plain)
        np.testing.assert_allclose(found.corrected, before.corrected, atol=1e-3)  # other signs


def test_an_unused_expert_changes_nothing():
    record = random_record()
    more = Record(
        [LayerFacts(0, "", 9, 2)],
        record.domains,
        record.token_ids,
        record.offsets,
        record.labels,
        [np.where(record.experts(0) == 5, 9, record.experts(0))],
    )
    np.testing.assert_allclose(compare(more).corrected, compare(record).corrected, rtol=1e-4)
    np.testing.assert_allclose(beyond_token(more).composition, beyond_token(record).composition, rtol=1e-3)
    assert not certain_cells(more, 0)[:, 5:].any()


def test_the_same_seed_gives_the_same_and_progress_is_told():
    record, calls = random_record(layers=3), []
    first = compare(record, 5, lambda done, total: calls.append((done, total)))
    beyond_token(record, 5, lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)] * 2
    assert first.whole == compare(record, 5).whole
    for seed in (-1, 1.5, None, True, "0"):
        with pytest.raises(ValueError, match=r"edl::significance: seed must be .* \(got "):
            compare(record, seed)


def test_a_record_without_domains_is_refused():
    with pytest.raises(ValueError, match="edl::significance: a record must have domains and layers"):
        compare(Record([LayerFacts(0, "", 4, 1)], [], [], [0], [], [np.zeros((0, 1), int)]))


# Two runs


def test_order_of_documents_domains_and_layers_does_not_matter():
    record = random_record(domains=3, layers=3)
    other = random_record(domains=3, layers=3, seed=9)
    later = Record(
        record.layers,
        record.domains,
        record.token_ids,
        record.offsets,
        record.labels,
        [np.resize(other.experts(place), record.experts(place).shape) for place in range(3)],
        keys=record.keys,
    )
    straight = compare_runs(record, later, "a", "b")
    assert (straight.earlier, straight.later, straight.paired, straight.layers) == ("a", "b", 120, [0, 3, 6])
    turned = part(later, np.random.default_rng(0).permutation(120), [2, 1, 0])
    turned.domains, turned.labels = turned.domains[::-1], 2 - turned.labels
    crossed = compare_runs(record, turned, "a", "b")
    assert crossed.layers == straight.layers
    np.testing.assert_allclose(crossed.layer_information, straight.layer_information)
    np.testing.assert_allclose(crossed.layer_saturation, straight.layer_saturation)
    for name in ("value", "low", "high", "p"):
        for ours, theirs in (
            (crossed.information, straight.information),
            (crossed.standardised, straight.standardised),
        ):
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), abs=1e-7)
    by_hand = [information(later, place) - information(record, place) for place in range(3)]
    np.testing.assert_allclose(straight.layer_information, by_hand)
    assert straight.information.value == pytest.approx(np.mean(by_hand))
    both = [beyond_token(each).standardised.whole.value for each in (later, record)]
    assert straight.standardised.value == pytest.approx(both[0] - both[1], abs=1e-9)


def test_saturation_by_hand():
    record = random_record(documents=30, none=0.3)
    later = part(record, range(60))
    chosen = np.random.default_rng(1).integers(0, 6, record.experts(0).shape)
    later._experts = [chosen].__getitem__
    shares = []
    for before, after in zip(record.experts(0), chosen):
        own = [expert for expert in before if expert < 5]
        shares += [np.mean([expert in after for expert in own])] if own else []
    assert compare_runs(record, later, "a", "b").layer_saturation[0] == pytest.approx(np.mean(shares))


def test_runs_that_differ_in_more_than_training_say_so():
    record = random_record(domains=2, layers=2)
    half = part(record, np.flatnonzero(record.keys < 1050), [1])
    found = compare_runs(record, half, "a", "b")
    assert found.paired == 50 and found.layers == [3]
    for words in ("One seed each", "30 documents of a run", "Fewer than 30", "Layers that one run alone"):
        assert words in found.note
    assert np.isnan([found.information.p, found.information.low]).all() and np.isfinite(found.information.value)
    other = part(record, range(80))
    other.token_ids = other.token_ids + 1
    found = compare_runs(record, other, "a", "b")
    assert np.isnan(found.layer_saturation).all() and "tokens are others" in found.note
    wider = part(record, range(80))
    wider.layers = (wider.layers[0]._replace(num_experts=9), wider.layers[1])
    found = compare_runs(record, wider, "a", "b")
    assert np.isnan(found.layer_saturation[0]) and found.layer_saturation[1] == 1 and "[0]" in found.note


def test_runs_with_nothing_in_common_are_refused():
    record = random_record()
    others = [part(record, range(80)) for _ in range(4)]
    others[0].keys = others[0].keys + 10**6
    others[1].layers = (others[1].layers[0]._replace(number=7),)
    others[2].domains = ("domain 0", "another")
    others[3].keys = np.zeros(80, int)
    for other, words in zip(others, ("documents in common", "layers of one number", "of one domain", "differ within")):
        with pytest.raises(ValueError, match=rf"edl::compare_runs: .*{words}.* \(got "):
            compare_runs(record, other, "a", "b")
