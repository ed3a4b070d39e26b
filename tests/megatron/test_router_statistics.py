"""Statistics of Megatron's routers are those of one process under every split, by hand from its routers' own output."""

import importlib.util

import pytest
import router_statistics
import torch
from ranks import on_ranks
from tolerances import assert_close, tolerance

pytestmark = pytest.mark.skipif(importlib.util.find_spec("megatron.core") is None, reason="needs megatron-core")

IN_FLOAT32 = 16 * tolerance(torch.float32, 32)  # as Megatron computes scores for auxiliary losses


@pytest.fixture(scope="module", params=["sequences", "padding", "token labels"])
def kind(request):
    return request.param


def test_every_split_counts_each_token_once(kind):
    layers, labels = on_ranks(1, router_statistics.by_hand, kind)[0]
    found = {
        name: each
        for ranks in (1, 2)
        for name, each in on_ranks(ranks, router_statistics.counted, ranks, kind)[0].items()
    }
    assert set(found) == {"one", "full", "dp", "tp", "cp", "pp"}
    assert found["one"][1] == [0, 1] and found["pp"][1] == [0]  # of the first stage
    of_domain = torch.nn.functional.one_hot(labels + 1, 4)[:, 1:].double()
    for number, (logits, routing_map) in enumerate(layers):
        scores, chosen = logits.softmax(1), routing_map.double()
        best = scores.sort(1, descending=True).values
        wanted = {
            "tokens": of_domain.sum(0),
            "choices": of_domain.T @ chosen,
            "mass": of_domain.T @ scores,
            "coactivation": (chosen * of_domain.sum(1, keepdim=True)).T @ chosen,
            "entropy": of_domain.T @ -(scores * scores.log()).sum(1),
            "margin": of_domain.T @ (best[:, 1] - best[:, 2]),
        }
        for name, (state, _) in found.items():
            for field, value in wanted.items():
                is_count = field in ("tokens", "choices", "coactivation")
                assert_close(state[f"layer.{number}.{field}"], value, 0.0 if is_count else IN_FLOAT32)
            assert torch.equal(state[f"snapshots.{number}.choices"][0], state[f"layer.{number}.choices"]), name


def test_training_and_evaluation_count_apart():
    trained, evaluated, warned, sentence = on_ranks(1, router_statistics.evaluated)[0]
    assert trained == {0: [48, 48, 32], 1: [48, 48, 32]}
    assert evaluated == {0: [32, 16, 16], 1: [32, 16, 16]}
    assert warned == ["edl::EDTopKRouter: statistics count no token outside any edl.domain_scope, without domain_ids"]
    assert sentence.startswith("edl::EDTopKRouter: statistics need the number of the layer")


def test_tensor_ranks_count_once_without_sequence_parallelism():
    assert on_ranks(2, router_statistics.tensor_ranks_without_sequence_parallelism) == [[5, 10]] * 2
