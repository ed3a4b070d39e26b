"""Statistics and record put together: each number is of the one that knows it, and against NumPy."""

import itertools
import json

import numpy as np
import pytest
import torch

import edl
from edl.diagnostics import significance
from edl.diagnostics.interventions import read_interventions
from edl.diagnostics.layers import LayerFacts
from edl.diagnostics.looking import findings_of
from edl.diagnostics.record import Record
from edl.routing import Observation

D, E, K, N, W = 3, 6, 2, 99, 7
LAYERS = [LayerFacts(1, "model.layers.1.gate", E, K), LayerFacts(3, "model.layers.3.gate", 4, 1)]


def record_of(seed=0, layers=LAYERS, number=N, domains=("a", "b", "c")):
    """Random choices, of which the last expert is never one."""
    draw = np.random.default_rng(seed)
    labels = np.arange(number) % len(domains)
    experts = []
    for layer in layers:
        shares = draw.dirichlet(np.ones(layer.num_experts - 1), len(domains))
        rows = [
            draw.choice(layer.num_experts - 1, layer.top_k, replace=False, p=shares[label])
            for label in np.repeat(labels, W)
        ]
        experts.append(np.array(rows))
    ids = draw.integers(0, 9, number * W)
    texts = {place: f"t{place}" for place in range(9)}
    offsets = np.arange(number + 1) * W
    return Record(layers, domains, ids, offsets, labels, experts, token_texts=texts, facts={"seed": 0})


def statistics_of(record, seed=0):
    """Sums over the same tokens."""
    draw = torch.Generator().manual_seed(seed)
    statistics = edl.RoutingStatistics(list(record.domains), facts={"model": "none"})
    observations = [
        Observation(
            logits=torch.randn(record.num_tokens, layer.num_experts, generator=draw),
            experts=torch.from_numpy(record.experts(place)),
            layer=layer.number,
            router=layer.name,
        )
        for place, layer in enumerate(record.layers)
    ]
    statistics.update(observations, torch.from_numpy(np.repeat(record.labels, W).astype(np.int64)))
    return statistics, observations


def shares_of(record, place):
    counts = np.zeros((len(record.domains), record.layers[place].num_experts))
    for token, label in enumerate(np.repeat(record.labels, W)):
        for expert in record.experts(place)[token]:
            counts[label, expert] += 1
    return counts


def divergence(p, q):
    m = (p + q) / 2
    return sum(x * np.log(x / y) / 2 for one in (p, q) for x, y in zip(one, m) if x > 0)


@pytest.mark.parametrize("has_statistics", [True, False], ids=["both", "record"])
def test_numbers_of_a_run(has_statistics):
    record = record_of()
    statistics, observations = statistics_of(record)
    found = findings_of(statistics if has_statistics else None, record, "run", examples=1)
    assert found.domains == ("a", "b", "c") and found.documents.tolist() == [33] * 3 and found.notes == []
    assert found.tokens.tolist() == [33 * W] * 3 and found.facts["seed"] == "0"
    for place, layer in enumerate(found.layers):
        counts = shares_of(record, place)
        load = counts.sum(0)
        shares = counts / counts.sum(1, keepdims=True)
        np.testing.assert_allclose(layer.usage, shares)
        assert found.dead[place] == [record.layers[place].num_experts - 1]
        assert found.load_violation[place] == pytest.approx(load.max() / load.mean() - 1)
        for pair, (first, second) in enumerate(itertools.combinations(range(D), 2)):
            assert found.divergence[place, pair] == pytest.approx(divergence(shares[first], shares[second]))
            assert found.overlap[place, pair] == pytest.approx(np.minimum(shares[first], shares[second]).sum())
            assert found.compared.plain[place, pair] == pytest.approx(found.divergence[place, pair])
        for domain in range(D):
            held = np.cumsum(np.sort(shares[domain])[::-1])
            assert found.coverage[place, domain] == np.searchsorted(held, 0.9 - 1e-9) + 1
        together = np.zeros_like(layer.coactivation)
        for row in record.experts(place):
            for first, second in itertools.product(row, row):
                together[first, second] += 1
        np.testing.assert_array_equal(layer.coactivation, together)
        assert found.information[place] == significance.information(record, place)
        assert found.decomposition[place, 0] == pytest.approx(found.decomposition[place, 1:].sum())
        if has_statistics:
            scores = observations[place].logits.double().softmax(-1).numpy()
            labels = np.repeat(record.labels, W)
            for domain in range(D):
                own = scores[labels == domain]
                np.testing.assert_allclose(layer.scores[domain], own.mean(0), rtol=1e-5)
                best = np.sort(own, axis=1)[:, ::-1]
                top_k = record.layers[place].top_k
                assert layer.margin[domain] == pytest.approx((best[:, top_k - 1] - best[:, top_k]).mean(), rel=1e-5)
                assert layer.token_entropy[domain] == pytest.approx(-(own * np.log(own)).sum(1).mean(), rel=1e-5)
        else:
            assert layer.scores is None and np.isnan(layer.margin).all()
    shown = {token for layer in found.layers for tokens in layer.top_tokens for token, _, _ in tokens}
    assert set(found.token_texts) == shown
    assert [example.domain for example in found.examples] == [0, 1, 2]
    assert list(found.examples[1].tokens) == [f"t{token}" for token in record.token_ids[W : 2 * W]]
    np.testing.assert_array_equal(found.examples[1].experts[1], record.experts(1)[W : 2 * W, 0])


def test_layers_that_a_model_holds_in_another_order_are_found_by_their_numbers():
    record = record_of(layers=LAYERS[::-1])
    found = findings_of(statistics_of(record)[0], record, "run")
    assert [layer.facts.number for layer in found.layers] == [3, 1]
    for place, layer in enumerate(found.layers):
        counts = shares_of(record, place)
        np.testing.assert_allclose(layer.usage, counts / counts.sum(1, keepdims=True))


def test_very_many_experts_are_looked_at_without_their_pairs():
    record = record_of(layers=[LayerFacts(0, "", 60_000, 1)], number=4, domains=("a", "b"))
    [layer] = findings_of(None, record, "run").layers
    assert layer.coactivation is None
    np.testing.assert_allclose(layer.usage.sum(1), 1)


def test_statistics_alone_have_no_tests_and_say_so():
    record = record_of()
    statistics, _ = statistics_of(record)
    statistics.snapshot(10)
    statistics.update(
        [Observation(experts=torch.zeros(4, K, dtype=torch.int64), logits=torch.zeros(4, E), layer=1)],
        torch.tensor([0, 0, 1, 1]),
    )
    statistics.snapshot(20)
    found = findings_of(statistics, None, "run")
    assert found.compared is None and found.beyond_token is None and "no record" in found.notes[0]
    assert np.isnan(found.decomposition).all() and found.documents.tolist() == [0, 0, 0]
    assert found.course.steps.tolist() == [10, 20]
    assert found.course.dead[0].tolist() == [1, 1] and found.course.dead[1][0] == E - 1
    assert np.isnan(found.course.max_violation[1, 1])  # that layer saw nothing more
    assert found.course.max_violation[1, 0] == pytest.approx(E - 1)
    assert found.course.token_entropy[1, 0] == pytest.approx(np.log(E))
    assert found.information[0] == pytest.approx(statistics.measures(per_layer=True)["moe/layer_1/domain_information"])


@pytest.mark.parametrize("number", [2, 20, 80])
def test_few_documents_are_told(number):
    found = findings_of(None, record_of(number=number, domains=("a", "b")), "run")
    assert (len(found.notes) == 1) == (number < 60)
    assert np.isnan(found.compared.whole.p) == (number < 60)


def test_a_note_does_not_list_all_of_many_domains():
    record = record_of(layers=LAYERS[1:], number=40, domains=[str(number) for number in range(20)])
    [note] = findings_of(None, record, "run").notes
    assert note.endswith(": 0 (2), 1 (2), 2 (2), 3 (2), 4 (2), 5 (2), 6 (2), 7 (2), and 12 others.")


def test_one_domain_has_nothing_to_compare_it_with():
    found = findings_of(None, record_of(domains=("a",)), "run")
    assert found.compared is None and found.divergence.shape == (2, 0) and found.overlap.shape == (2, 0)
    assert found.notes == ["There is one domain, and nothing to compare it with."]


BROKEN = {
    "a number for a row": {"tokens": 5},
    "a number for rows": {"permuted": 3.0},
    "a number without end": {"tokens": [10**400, 1, 1]},
    "documents that are not known": {"documents": [None, 1, 1]},
    "fewer than none": {"tokens": [-1, 1, 1]},
    "rows of two": {"own": [[0, 0]] * 3},
    "fewer domains": {"loss": [0.0] * 2},
}


def rows_of(**changes):
    rises = {"own": [[0.1, None, None]] * D, "others": [[0.1, 0.0, 0.2]] * D, "random": [[0.0, 0.0, 0.0]] * D}
    rows = {"tokens": [7] * D, "documents": [1] * D, "loss": [2.0] * D, **rises, "permuted": [[0.5, 0.4, 0.6]] * 2}
    return json.dumps(rows | changes)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_interventions_are_a_sentence(name, tmp_path):
    path = tmp_path / "interventions.json"
    path.write_text(rows_of(**BROKEN[name]))
    with pytest.raises(ValueError, match="^edl::report: .*interventions.json must "):
        read_interventions(path)


def test_interventions_of_other_domains_or_layers_are_refused(tmp_path):
    path, record = tmp_path / "interventions.json", record_of()
    path.write_text(rows_of())
    assert findings_of(None, record, "run", read_interventions(path)).interventions.own[0, 0] == 0.1
    path.write_text(rows_of(permuted=[[0, 0, 0]]))
    with pytest.raises(ValueError, match=r"^edl::report: interventions must be of the run's .* 3 and 2 \(got 3 and 1"):
        findings_of(None, record, "run", read_interventions(path))


def test_what_does_not_belong_together_is_refused():
    record = record_of()
    with pytest.raises(ValueError, match="edl::report: a run must have statistics or a record"):
        findings_of(None, None, "run")
    with pytest.raises(ValueError, match="edl::report: statistics must have counted tokens"):
        findings_of(edl.RoutingStatistics(3), record, "run")
    statistics, _ = statistics_of(record_of(domains=("a", "b")))
    with pytest.raises(ValueError, match="must have the same layers and domains"):
        findings_of(statistics, record, "run")
