"""The router, its spec, its labels and its log, each on ranks of its own."""

import importlib.util

import one_rank
import pytest
import torch
from ranks import on_ranks
from tolerances import assert_close, tolerance

pytestmark = pytest.mark.skipif(importlib.util.find_spec("megatron.core") is None, reason="needs megatron-core")


@pytest.mark.parametrize("newest_first", [False, True])
def test_two_micro_batches_in_flight_keep_their_own_labels(newest_first):
    together, alone, second = on_ranks(1, one_rank.in_flight, newest_first)[0]
    assert second.abs().max() == 0  # one domain: no pair, and all that a global "current labels" would leave of both
    assert alone.norm() > 0.1
    assert_close(together, alone, tolerance(torch.float64, 128))


@pytest.mark.parametrize("pp, moe_layers", [(1, [1, 1]), (2, [1, 1]), (2, [1, 0])])
def test_log_shows_the_mean_over_layers_and_micro_batches(pp, moe_layers):
    shown = on_ranks(pp, one_rank.logged, pp, moe_layers)
    assert all(rank == shown[0] for rank in shown)
    (names,) = shown[0]
    assert set(names) == {"expert_divergence_loss", "expert_divergence/nats", "expert_divergence/pairs"}
    assert names["expert_divergence/pairs"] == 3
    if moe_layers == [1, 1]:
        values = torch.tensor(on_ranks(1, one_rank.divergences)[0])
        assert names["expert_divergence_loss"] == pytest.approx(values.mean().item(), rel=tolerance(torch.float32, 4))


@pytest.mark.parametrize("pp", [1, 2])
def test_micro_batches_without_a_pair_leave_the_logged_mean(pp):
    """Weights stay, so that each step's numbers are those of its labels alone: of one pair, -log(nats + eps)."""
    no_pair, unlabelled, pair = [1, 1, 1, 1], [-1, -1, 2, -1], [0, 1, 1, 0]
    steps = torch.tensor([[no_pair, unlabelled], [unlabelled, pair], [no_pair, no_pair], [pair, pair], [pair, no_pair]])
    shown = on_ranks(pp, one_rank.logged, pp, [1, 1], steps)[0]
    by_layer = torch.tensor(on_ranks(1, one_rank.divergences, torch.tensor([pair, pair]))[0], dtype=torch.float64)
    first, second = by_layer
    losses = [None, second, second, by_layer.mean(0), first]  # of a step without pair: the last that had one
    assert [names["expert_divergence/pairs"] for names in shown] == [0, 0.5, 0, 1, 0.5]
    assert all(shown[0][name] != shown[0][name] for name in ("expert_divergence_loss", "expert_divergence/nats"))
    for names, loss, is_mean in list(zip(shown, losses, [False, False, False, True, False]))[1:]:
        assert names["expert_divergence_loss"] == pytest.approx(loss.mean().item(), rel=tolerance(torch.float32, 4))
        nats = ((-(by_layer if is_mean else loss)).exp() - 1e-6).mean().item()
        assert names["expert_divergence/nats"] == pytest.approx(nats, rel=tolerance(torch.float32, 16))


def test_a_hundred_steps_without_a_pair_are_one_warning():
    assert on_ranks(1, one_rank.warnings_of_steps_without_a_pair, 3)[0] == []
    (sentence,) = on_ranks(1, one_rank.warnings_of_steps_without_a_pair, 8)[0]
    assert sentence.startswith(
        "edl::Objectives: a batch must hold something for expert_divergence to act on, for a divergence two domains"
    )


def test_specs():
    claims, sentences = on_ranks(1, one_rank.specs)[0]
    assert [claim for claim, holds in claims.items() if not holds] == []
    for sentence, part in zip(
        sentences,
        [
            "must hold a Mixture-of-Experts layer",
            "must be a class derived from TopKRouter",
            "must be a class derived from TopKRouter (got functools.partial",
            "num_domains must be given",
            "coeff must be finite and not negative (got -1.0)",
            "coeff must be finite and not negative (got nan)",
            "must have a field for the router, as from megatron-core 0.16 on",
        ],
        strict=True,
    ):
        assert sentence.startswith("edl::megatron.patch_spec: ") and part in sentence


def test_router_refuses_what_it_cannot_label_and_is_plain_without_labels():
    sentences, warned, is_plain, has_same_keys = on_ranks(1, one_rank.routers)[0]
    for sentence, part in zip(
        sentences,
        [
            "mlp_chunks_for_training 1 (got 2)",
            "(got hybrid_context_parallel)",
            "(got overlap_",
            "'local'",
            "'transformer_engine'",
        ],
        strict=True,
    ):
        assert sentence.startswith("edl::EDTopKRouter: ") and part in sentence
    assert len(warned) == 1 and "outside any edl.domain_scope" in warned[0]
    assert is_plain and has_same_keys


def test_flat_logits_have_the_loss_of_their_sequences():
    results, sentences = on_ranks(1, one_rank.flat_logits)[0]
    for name, (gradient, wanted) in results.items():
        assert wanted.norm() > 1e-3, name
        assert_close(gradient, wanted, tolerance(torch.float64, 128))
    cannot_tell = "edl::EDTopKRouter: with router logits [T, E], token s of sequence b in row s·B + b, labels must tell"
    for sentence, (start, got) in zip(
        sentences,
        [
            (cannot_tell, "(got 24 rows, domain_ids [24])"),
            (cannot_tell, "(got 24 rows, domain_ids [5])"),
            (cannot_tell, "(got 24 rows, domain_ids [0])"),
            (cannot_tell, "(got 24 rows, domain_ids [2] and cu_seqlens)"),
            ("edl::Objectives: domain_ids [B, S_len] must have one label per token, 24", "(got [4, 3])"),
            ("edl::EDTopKRouter: router logits must be [S_len, B, E] or [T, E]", "(got [24])"),
            ("edl::EDTopKRouter: router logits must be [S_len, B, E] or [T, E]", "(got [1, 1, 24, 4])"),
        ],
        strict=True,
    ):
        assert sentence.startswith(start) and sentence.endswith(got), sentence


def test_wrong_labels_of_one_rank_are_an_error_on_all():
    first, second = on_ranks(2, one_rank.wrong_labels)
    assert "domain_ids must have one row per sequence, 2 (got [1])" in second
    assert "rank 1 failed" in first and "(got [1])" in first


def test_labels_come_from_the_blend(tmp_path):
    thirds, seen, sentences = on_ranks(1, one_rank.blend, str(tmp_path))[0]
    (ids, same, extra), (mapped, _, _), (in_evaluation, _, _) = seen
    assert torch.equal(ids, thirds) and same and extra == 1
    assert torch.equal(mapped, torch.tensor([2, -1, 0])[thirds])
    assert in_evaluation is None
    parts = [
        "must hold 'dataset_id'",
        "on every stage (got no data on stage 0 of 1)",
        "shape [B] (got [2, 2])",
        "(got 2 for path 2)",
    ]
    for sentence, part in zip(sentences, parts, strict=True):
        assert sentence.startswith("edl::megatron.with_domain_ids: ") and part in sentence
