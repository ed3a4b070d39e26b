"""Routers with several objectives: their log, schedules, masks, choices, and what they refuse."""

import importlib.util

import pytest
import router_objectives
import torch
from ranks import on_ranks
from tolerances import assert_close, tolerance

pytestmark = pytest.mark.skipif(importlib.util.find_spec("megatron.core") is None, reason="needs megatron-core")
EXACT = tolerance(torch.float64, 128)
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.fixture(scope="module")
def plain_values():
    return on_ranks(1, router_objectives.plain_values)[0]


@pytest.mark.parametrize(
    "pp, moe_layers, config", [(1, [1, 1], {}), (2, [1, 1], {}), (2, [1, 0], {}), (1, [1, 1], FULL)]
)
def test_log_shows_every_objective(plain_values, pp, moe_layers, config):
    by_rank = on_ranks(pp, router_objectives.logged, pp, moe_layers, config)
    assert all(shown == by_rank[0] for shown in by_rank)
    first, second = by_rank[0]
    measures = {"expert_divergence/nats", "expert_divergence/pairs"}
    assert set(first) == {"expert_divergence_loss", "load_balancing_loss", "router_z_loss"} | measures
    assert first["expert_divergence/pairs"] == 3 and second["expert_divergence/pairs"] == 0
    assert second["expert_divergence_loss"] == first["expert_divergence_loss"]  # of the last step with a pair
    assert second["router_z_loss"] == first["router_z_loss"]  # the same tokens
    if moe_layers == [1, 1]:
        for name, value in plain_values.items():
            assert first[f"{name}_loss"] == pytest.approx(value, rel=tolerance(torch.float32, 4))


def test_weights_follow_megatrons_steps():
    (from_start, resumed), is_plain, sentence = on_ranks(1, router_objectives.schedules)[0]
    assert from_start == [[0.125] * 2, [0.25] * 2, [0.375] * 2]
    assert resumed == [[0.875] * 2, [1.0] * 2, [1.0] * 2]
    assert is_plain  # the first step has the weight 0
    assert sentence.startswith("edl::EDTopKRouter: weights with a schedule need") and sentence.endswith("(got None)")


def test_objectives_without_labels_need_no_scope():
    results = on_ranks(1, router_objectives.outside_of_a_scope)[0]
    for gradient, of_flat, wanted, _ in results.values():
        assert wanted.norm() > 1e-3
        assert_close(gradient, wanted, EXACT)
        assert_close(of_flat, wanted, EXACT)
    assert results["without labels"][3] == []
    assert set(results["both"][3]) == {
        "edl::EDTopKRouter: trains outside any edl.domain_scope, without expert_divergence"
    }


def test_sequences_and_weights_of_tokens_stand_in_the_order_of_the_rows():
    gradient, of_flat, wanted = on_ranks(1, router_objectives.sequences_and_weights_of_tokens)[0]
    assert wanted.norm() > 1e-3
    assert_close(gradient, wanted, EXACT)
    assert_close(of_flat, wanted, EXACT)


def test_a_scope_need_not_have_labels_that_no_objective_names():
    gradient, wanted, sentences = on_ranks(1, router_objectives.boundaries_alone)[0]
    assert wanted.norm() > 1e-3
    assert_close(gradient, wanted, EXACT)
    assert sentences == [
        f"edl::Objectives: {name} must be given (got labels ['topics'])" for name in ("domain_ids", "modality_ids")
    ]


def test_masks_of_a_scope_count_for_all_objectives():
    results, has_loss, sentence = on_ranks(1, router_objectives.masks_of_a_scope)[0]
    for gradient, wanted in results:
        assert wanted.norm() > 1e-3
        assert_close(gradient, wanted, EXACT)
    assert has_loss
    assert sentence.startswith("edl::EDTopKRouter: with router logits [T, E]")


def test_objectives_see_choices_and_their_weights():
    gradient, wanted, (missing, without), (fewer, more) = on_ranks(1, router_objectives.choices)[0]
    assert wanted.norm() > 1e-3
    assert_close(gradient, wanted, EXACT)
    assert fewer == "no error" and missing == without > 0
    assert more == "edl::EDTopKRouter: a token must have at most 2 experts, moe_router_topk (got 4)"


def test_objectives_of_scores_see_those_of_megatron():
    of_scores, of_logits = on_ranks(1, router_objectives.scores)[0]
    assert_close(of_scores, of_logits, 16 * tolerance(torch.float32, 32))


def test_a_router_has_one_all_reduce():
    assert on_ranks(2, router_objectives.collectives) == [["all_reduce", "wait_tensor"]] * 2


def test_data_without_labels_goes_where_none_are_needed():
    assert on_ranks(1, router_objectives.unlabelled_data)[0] == [({"tokens": 0}, None)] * 2


def test_what_is_refused(tmp_path):
    sentences, names, rest = on_ranks(1, router_objectives.errors, str(tmp_path))[0]
    for name, (start, got) in {
        "bound": ("edl::Objectives: an integration binds objectives", "(got some that are bound)"),
        "two": ("edl::megatron.patch_spec: objectives must be given once", "(got two)"),
        "mapping": ("edl::megatron.patch_spec: objectives must be edl.objectives.Objectives", "(got dict)"),
        "coefficient": ("edl::megatron.patch_spec: objectives, --objectives, must have", "(got coeff too)"),
        "eps": ("edl::megatron.patch_spec: objectives, --objectives, must have", "(got eps too)"),
        "no coefficient": ("edl::megatron.patch_spec: coeff must be finite", "(got None)"),
        "one domain": ("edl::ExpertDivergence: num_domains must be at least 2", "(got 1)"),
        "dropped tokens": ("edl::EDTopKRouter: objectives that read choices need all", "(got 1.0)"),
        "hybrid": ("edl::EDTopKRouter: an objective's weight is", "(got is_hybrid_model)"),
        "Megatron's name": ("edl::EDTopKRouter: an objective must have another name", "(got 'load_balancing' twice)"),
        "both flags": ("edl::megatron.options: objectives, --objectives, must have", "(got coeff too)"),
        "both options": ("edl::megatron.options: objectives, --objectives, must have", "(got bias_correction too)"),
        "no JSON": ("edl::objectives: ", ")"),
        "no file": ("[Errno 2] No such file", "x'"),
    }.items():
        sentence = sentences.pop(name)
        assert sentence.startswith(start) and sentence.endswith(got), sentence
    assert sentences == {}
    assert names == ["router_z"] and rest == {"accumulate": True, "steps_taken": 7}
