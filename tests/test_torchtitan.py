"""Expert Divergence in torchtitan's routers gives the gradient of one process that saw the whole step.

Run on the layers of torchtitan 0.3, where it is installed; and as an auxiliary loss, which torchtitan only has in
development, on a stand-in for that interface (`torchtitan_interface.py`).
"""

import importlib.metadata
import re
import warnings

import pytest
import torch
import torchtitan_interface as interface
import torchtitan_objectives as samples
import torchtitan_released as released
from ranks import on_ranks
from tolerances import assert_close, tolerance

import edl

# The gradient divides by the root of the divergence of two domains: the smallest in these models is 5.5e-4.
ROOT = 5e-4**0.5
TOLERANCE = tolerance(torch.float32, released.BATCH * released.LENGTH, roundings=4) / ROOT
EXACT = tolerance(torch.float64, released.BATCH * released.LENGTH, roundings=4) / ROOT


def is_installed(name, version=""):
    try:
        return importlib.metadata.version(name).startswith(version)
    except importlib.metadata.PackageNotFoundError:
        return False


needs_torchtitan = pytest.mark.skipif(not is_installed("torchtitan", "0.3."), reason="torchtitan 0.3 is not installed")
needs_remat = pytest.mark.skipif(not is_installed("torch_remat"), reason="torch_remat is not installed")


def assert_equal_to(found, expected):
    """(gradients of the gates, losses of the layers), each."""
    for actual, reference in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        assert_close(actual, reference, TOLERANCE)
        assert reference.abs().max() > 0  # there is something to compare


@pytest.fixture(scope="module")
def single():
    return on_ranks(1, released.on_one_process)[0]


@pytest.fixture(scope="module")
def pair():
    return on_ranks(2, released.on_ranks_of_torchtitan)


@needs_torchtitan
@pytest.mark.parametrize("score_func", ["sigmoid", "softmax"])
def test_gradient_and_value_are_those_of_one_process_in_float64(single, score_func):
    assert_equal_to(*single["scores_of_every_kind"][score_func])


@needs_torchtitan
def test_memory_carries_domains_over_micro_batches_and_ends_with_the_step(single):
    steps, expected = single["accumulation_with_memory"]
    for step in steps:
        assert_equal_to(step, expected)


@needs_torchtitan
def test_a_step_of_another_number_of_micro_batches_is_told(single):
    assert single["wrong_number_of_micro_batches"] == (
        "edl::torchtitan: micro_batches must be the number of labelled forward passes of a step, 1 (got 2)"
    )


@needs_torchtitan
def test_the_rest_of_the_model_stays(single):
    found = single["beside_a_language_model_loss"]
    assert torch.equal(*found["outputs"])
    assert found["keys"][0] == found["keys"][1]
    divergence = single["scores_of_every_kind"]["sigmoid"][1][0]
    for both, alone, own, reference in zip(found["both"], found["alone"], found["own"], divergence, strict=True):
        assert torch.equal(alone, own)
        assert_close(both - alone, reference, TOLERANCE, scale=own.abs().max().item())


@needs_torchtitan
def test_a_pass_without_a_pair_is_left_out_of_metrics_and_warned_about(single):
    metrics, losses, warned = single["without_a_pair"]
    expected_loss = torch.stack(losses).mean()
    assert metrics["expert_divergence/pairs"] == 1.5  # three and none
    assert_close(metrics["expert_divergence_loss"].float(), expected_loss, TOLERANCE)
    assert len(warned) == 1 and warned[0].endswith("(got none for 4 steps)")


@needs_torchtitan
@pytest.mark.parametrize("policy", ["FullAC", "SelectiveAC"])
def test_activation_checkpointing_changes_nothing(single, policy):
    for plain, checkpointed in zip(single["checkpointed"]["none"], single["checkpointed"][policy], strict=True):
        assert torch.equal(plain, checkpointed)


@needs_torchtitan
def test_a_copy_of_the_model_has_the_loss(single):
    assert_equal_to(*single["copied"])


def assert_metrics_are(metrics, values, tolerance):
    """Metrics of several objectives, against the values [layer][batch] of a plain loop."""
    names = list(values[0][0])
    for name in names:
        of_layers = torch.stack([torch.stack([of_batch[name] for of_batch in batches]).mean() for batches in values])
        found = [entry for entry in metrics if entry.startswith(f"{name}/") and entry.endswith(("router", "aux_loss"))]
        assert len(found) == len(values)
        for entry, expected in zip(found, of_layers, strict=True):
            assert_close(metrics[entry], expected, tolerance)
        assert_close(metrics[f"{name}_loss"], of_layers.mean(), tolerance)
    assert {name: round(metrics[f"{name}/weight"].item(), 6) for name in names} == {
        "sequences": 0.7,
        "tokens": 0.3,
        "certainty": 0.2,
    }


@needs_torchtitan
def test_several_objectives_are_those_of_a_plain_loop(single):
    (gradients, metrics, losses), (expected, values) = single["several_objectives"]
    for found, reference in zip(gradients, expected, strict=True):
        assert_close(found, reference, TOLERANCE)
    assert_metrics_are(metrics, values, TOLERANCE)
    assert metrics["sequences/pairs"] == metrics["tokens/pairs"] == 1
    for name, of_layers in losses.items():
        for latest, batches in zip(of_layers, values, strict=True):
            assert_close(latest, batches[-1][name], TOLERANCE)


NO_MODALITIES = "edl::Objectives: modality_ids must be given (got labels ['domain_ids'])"


def assert_two_sets_are_those_of_a_plain_loop(found, of_loop):
    (gradients, metrics), (expected, values) = found, of_loop
    for actual, reference in zip(gradients, expected, strict=True):
        assert_close(actual, reference, TOLERANCE)
    for name in ("domains", "modalities"):
        assert_close(metrics[f"{name}_loss"], torch.stack([batch[0][name] for batch in values]).mean(), TOLERANCE)


@needs_torchtitan
def test_labels_go_by_name(single, pair):
    found, of_loop, missing = single["two_sets_of_labels"]
    assert_two_sets_are_those_of_a_plain_loop(found, of_loop)
    assert missing == NO_MODALITIES
    for rank in pair:
        assert_two_sets_are_those_of_a_plain_loop(*rank["two sets of labels, context"])


@needs_torchtitan
def test_routers_of_ones_own_are_configured_by_hand(single):
    for one, other in zip(*single["configured_by_hand"], strict=True):
        assert torch.equal(one, other) and one.abs().max() > 0


@needs_torchtitan
def test_outside_any_scope_objectives_without_labels_act(single):
    (gradients, metrics), (expected, values) = single["outside_any_scope"]
    for found, reference in zip(gradients, expected, strict=True):
        assert_close(found, reference, TOLERANCE)
        assert reference.abs().max() > 0
    assert_close(metrics["certainty_loss"], torch.stack([batch[0]["certainty"] for batch in values]).mean(), TOLERANCE)
    assert metrics["sequences_loss"].isnan() and metrics["tokens_loss"].isnan()


@needs_torchtitan
def test_weights_follow_the_optimizer_steps(single):
    found, resumed = single["warmed_up"]
    _, whole = found["hook"][4]
    for name in ("hook", "no hook"):
        assert [weight for weight, _ in found[name]] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 0.8])
        for weight, gradient in found[name]:
            assert_close(gradient, whole * (weight / 0.8), TOLERANCE, scale=whole.abs().max().item())
    assert [weight for weight, _ in resumed] == pytest.approx([0.6, 0.8])


@needs_torchtitan
def test_without_a_hook_memory_ends_after_the_micro_batches(single):
    steps, expected = single["memory_without_a_hook"]
    for step in steps:
        assert_equal_to(step, expected)


@needs_torchtitan
def test_a_model_may_be_built_without_memory_and_its_configuration_written(single):
    found, expected, text = single["built_on_meta"]
    assert_equal_to(found, expected)
    assert text.count("ExpertDivergence(num_domains=3") == 2


def assert_objectives_are_refused(sentences):
    offered = "objectives must do with experts, scores, weights, which is what routers hand over"
    assert sentences == {
        "logits": f"edl::torchtitan: {offered} (got 'z', which needs logits)",
        "balance": f"edl::torchtitan: {offered} (got 'balance', which needs logits)",
        "bound": "edl::Objectives: an integration binds objectives to ranks and memory itself, pass them without "
        "group, sequence_group, averaging_ranks and memory (got some that are bound)",
        "no objectives": "edl::torchtitan: objectives must be edl.objectives.Objectives (got dict)",
        "micro_batches": "edl::torchtitan: micro_batches must be an integer (got 2.5)",
        "memory": "edl::torchtitan: memory must be True or False (got 'yes')",
    }


@needs_torchtitan
def test_evaluation_has_no_loss(single):
    for model, own in zip(*single["evaluated"], strict=True):
        assert torch.equal(model, own)


@needs_torchtitan
def test_what_is_refused(single):
    refused = single["refused"]
    assert refused["twice"].endswith("(got a router that has the loss)")
    assert refused["no router"] == "edl::torchtitan: a model must have routers (got RoutedExperts.Config)"
    assert refused["another router"].startswith("edl::torchtitan: layers.1.router must be a TokenChoiceTopKRouter, ")
    assert refused["left alone"]
    assert refused["micro_batches"] == "edl::torchtitan: micro_batches must be at least 1 (got 0)"
    assert_objectives_are_refused(refused["objectives"])
    assert refused["untouched"]
    assert refused["unknown objective"] == (
        "edl::torchtitan: objective must be one of ['expert_divergence'] (got 'balance')"
    )


@needs_torchtitan
@pytest.mark.parametrize("split", ["data", "data and micro-batches", "context", "context, labels per token"])
def test_two_ranks_have_the_gradient_of_one(pair, split):
    for rank in pair:
        assert_equal_to(*rank[split])


@needs_torchtitan
@pytest.mark.parametrize("split", ["data", "context"])
def test_several_objectives_of_two_ranks_are_those_of_a_plain_loop(pair, split):
    for rank in pair:
        (gradients, metrics), (expected, values), *all_reduces = rank[f"several objectives, {split}"]
        for found, reference in zip(gradients, expected, strict=True):
            assert_close(found, reference, TOLERANCE)
        assert_metrics_are(metrics, values, TOLERANCE)
        assert all_reduces in ([], [len(values)])  # one of each router, for all objectives


@needs_torchtitan
def test_what_is_refused_on_two_ranks(pair):
    for rank in pair:
        assert rank["refused"]["no mesh"].endswith("with parallelism.spmd_backend='spmd_types' (got no mesh)")
        assert rank["refused"]["tensor parallel"].endswith("tensor parallelism is not supported (got a degree of 2)")


def assert_equals(found, expected):
    """(gradients of the gates, metric), each in float64 throughout."""
    for actual, reference in zip((*found[0], found[1]), (*expected[0], expected[1]), strict=True):
        assert_close(actual, reference, EXACT)


@pytest.fixture(scope="module")
def interface_pair():
    return on_ranks(2, interface.on_ranks_of_interface)


def step(model, batches, tokens_of_step, **options):
    """(gradients, metric) of the micro-batches (hidden, ids, arguments) of a step."""
    for hidden, ids, arguments in batches:
        interface.train(model, ids, hidden, tokens_of_step, **arguments, **options)
    return interface.gate_gradients(model), interface.collect_aux_loss_metrics(model)["expert_divergence_loss/mean"]


def test_auxiliary_loss_has_the_gradient_and_metric_of_one_batch():
    hidden, tokens = interface.inputs(), interface.inputs().shape[0]
    found = step(interface.model_with_divergence(), [(hidden, interface.DOMAINS, {})], tokens)
    assert_equals(found, interface.expected([(hidden, interface.DOMAINS, {})], [1.0]))


def test_auxiliary_loss_weighs_micro_batches_by_tokens():
    """T_m / N of three sequences and of one and padding: 18 and 4 tokens of 22."""
    hidden, ids = interface.inputs(), interface.DOMAINS
    padding = torch.arange(6) >= 4
    batches = [(hidden[:18], ids[:3], {}), (hidden[18:], ids[3:], {"padding_mask": padding})]
    found = step(interface.model_with_divergence(), batches, 22)
    gradients, _ = interface.expected(batches, [18 / 22, 4 / 22])
    _, value = interface.expected(batches[:1], [1.0])  # one sequence has no pair, and leaves the metric
    assert_equals(found, (gradients, value))


def test_auxiliary_loss_takes_packed_documents():
    """A stream of tokens without a batch axis: documents of any length, each with its label."""
    hidden, documents = interface.inputs(), {"cu_seqlens": torch.tensor([0, 3, 11, 20, 24])}
    found = step(interface.model_with_divergence(), [(hidden, interface.DOMAINS, documents)], 24)
    assert_equals(found, interface.expected([(hidden, interface.DOMAINS, documents)], [1.0]))


def test_auxiliary_loss_takes_the_mask_of_the_scope_first():
    hidden, ids = interface.inputs(), interface.DOMAINS
    kept = torch.arange(24) % 3 > 0
    model = interface.model_with_divergence()
    interface.train(model, ids, hidden, 24, padding_mask=torch.arange(24) < 2, attention_mask=kept)
    # The token counts stay the router's: 22 of 24.
    reference, _ = interface.expected([(hidden, ids, {"attention_mask": kept})], [22 / 24])
    for actual, gradient in zip(interface.gate_gradients(model), reference, strict=True):
        assert_close(actual, gradient, EXACT)


def test_memory_of_an_auxiliary_loss_ends_with_the_step():
    hidden, ids = interface.inputs(), torch.tensor([0, 0, 1, 2])
    model = interface.model_with_divergence(memory=True)
    steps = []
    for _ in range(2):
        model.zero_grad()
        steps.append(step(model, [(hidden[:12], ids[:2], {}), (hidden[12:], ids[2:], {})], 24))
    assert steps[0][1] > 0
    assert_equals(steps[1], steps[0])
    forgetful = step(interface.model_with_divergence(), [(hidden[:12], ids[:2], {}), (hidden[12:], ids[2:], {})], 24)
    assert not torch.allclose(steps[0][0][0], forgetful[0][0])


def assert_gradients_and_metrics_are(found, expected):
    for actual, reference in zip(found[0], expected[0], strict=True):
        assert_close(actual, reference, EXACT)
    assert set(found[1]) == set(expected[1])
    for name, metric in found[1].items():
        assert_close(metric, expected[1][name], EXACT)


def test_auxiliary_loss_of_several_objectives_is_a_plain_loop_and_logs_each():
    """Of micro-batches of 12 and, without padding, 10 tokens; choices come as a map, and weights in any order."""
    model, hidden, padding = interface.model_with_objectives(samples.objectives()), interface.inputs(), None
    batches = []
    for tokens, ids in zip(hidden.chunk(2), interface.DOMAINS.chunk(2)):
        interface.train(model, ids, tokens, 22, padding)
        batches.append((tokens, {"domain_ids": ids, "padding_mask": padding}))
        padding = torch.arange(12) >= 10
    found = interface.gate_gradients(model), interface.collect_aux_loss_metrics(model)
    assert_gradients_and_metrics_are(found, interface.of_plain_loop(batches, [12 / 22, 10 / 22]))
    assert set(found[1]) == {f"{name}_loss/mean" for name in ("sequences", "tokens", "certainty")}


def test_auxiliary_loss_takes_labels_by_name():
    """Scores of modality of the stream's tokens, beside the labels of its sequences."""
    model, hidden = interface.model_with_objectives(samples.of_two_sets()), interface.inputs()
    interface.train(model, interface.DOMAINS, hidden, 24, modality_ids=samples.MODALITIES.flatten(0, 1))
    found = interface.gate_gradients(model), interface.collect_aux_loss_metrics(model)
    labels = {"domain_ids": interface.DOMAINS, "modality_ids": samples.MODALITIES}
    assert_gradients_and_metrics_are(found, interface.of_plain_loop([(hidden, labels)], [1.0], samples.of_two_sets))
    assert set(found[1]) == {"domains_loss/mean", "modalities_loss/mean"}
    with pytest.raises(ValueError, match=f"^{re.escape(NO_MODALITIES)}$"):
        interface.train(model, interface.DOMAINS, hidden, 24)


def test_auxiliary_loss_outside_any_scope_has_the_objectives_without_labels():
    model, hidden = interface.model_with_objectives(samples.objectives()), interface.inputs()
    (model(hidden, torch.tensor(24.0)) * 0.0).sum().backward()
    none = {"domain_ids": torch.full((4,), -1)}
    found = interface.gate_gradients(model), interface.collect_aux_loss_metrics(model)
    assert_gradients_and_metrics_are(found, interface.of_plain_loop([(hidden, none)], [1.0]))
    assert found[1]["certainty_loss/mean"] > 0


def test_weights_of_an_auxiliary_loss_follow_the_steps_that_torchtitan_ends():
    titan, model = interface.integration(), interface.model_with_objectives(samples.warmed_up())
    titan.set_step(model, 1)
    found = []
    for _ in range(3):
        model.zero_grad()
        interface.train(model, interface.DOMAINS, interface.inputs(), 24)
        found.append((titan.objective_metrics(model)["divergence/weight"].item(), interface.gate_gradients(model)[0]))
        interface.collect_aux_loss_metrics(model)  # ends the step
    assert [weight for weight, _ in found] == pytest.approx([0.2, 0.4, 0.6])
    assert_close(found[1][1], 2 * found[0][1], EXACT)
    assert_close(found[2][1], 3 * found[0][1], EXACT)


def test_what_an_auxiliary_loss_refuses():
    config = interface.Model.Config(layers=[interface.TokenChoiceTopKRouter.Config(num_experts=8)])
    assert_objectives_are_refused(samples.refused(interface.integration().add_objectives, config))
    assert config.layers[0].aux_loss is None


def test_another_auxiliary_loss_of_the_router_stays():
    hidden, ids = interface.inputs(), interface.DOMAINS
    other = interface.MeanScore.Config(coeff=0.3)
    model = interface.model_with_divergence(also=other)
    interface.train(model, ids, hidden, 24)
    metrics = interface.collect_aux_loss_metrics(model)
    assert set(metrics) == {"MeanScore/mean", "expert_divergence_loss/mean"}
    divergence, value = interface.expected([(hidden, ids, {})], [1.0])
    assert_close(metrics["expert_divergence_loss/mean"], value, EXACT)
    routers = [interface.TokenChoiceTopKRouter.Config(num_experts=8, aux_loss=other) for _ in range(2)]
    torch.manual_seed(1)
    alone = interface.Model.Config(layers=routers).build()
    interface.train(alone, ids, hidden, 24)
    for both, one, two in zip(*map(interface.gate_gradients, (model, alone)), divergence, strict=True):
        assert_close(both, one + two, EXACT)


def test_layers_that_share_a_configuration_get_one_loss_each():
    router = interface.TokenChoiceTopKRouter.Config(num_experts=8)
    config = interface.Model.Config(layers=[router, router])
    titan = interface.integration()
    titan.add_expert_divergence(config, num_domains=3, coeff=1.0)
    assert [layer.aux_loss.coeff for layer in config.layers] == [0.5, 0.5]
    assert config.layers[0].aux_loss.also is None
    with pytest.raises(ValueError, match="must be called once for a model"):
        titan.add_expert_divergence(config, num_domains=3, coeff=1.0)


def test_options_outside_their_range_are_refused_before_the_model_is_built():
    config = interface.Model.Config(layers=[interface.TokenChoiceTopKRouter.Config(num_experts=8)])
    for options, got in (({"num_domains": 1}, "num_domains must be at least 2"), ({"eps": -1.0}, "eps must be finite")):
        with pytest.raises(ValueError, match=f"^edl::ExpertDivergence: {got}"):
            interface.integration().add_expert_divergence(config, **{"num_domains": 3, "coeff": 1.0, **options})
    with pytest.raises(
        ValueError, match=r"^edl::torchtitan: the options of ExpertDivergence must be .*\(got 'beta'\)$"
    ):
        interface.integration().add_expert_divergence(config, num_domains=3, coeff=1.0, beta=2.0)
    with pytest.raises(
        ValueError, match=r"a weight must be finite and not negative \(got -1.0 of 'expert_divergence'\)"
    ):
        interface.integration().add_expert_divergence(config, num_domains=3, coeff=-1.0)
    assert config.layers[0].aux_loss is None


def test_auxiliary_loss_without_labels_is_none():
    model, hidden = interface.model_with_divergence(), interface.inputs()
    (model(hidden, torch.tensor(24.0)) * 0.0).sum().backward()
    assert all(gradient.eq(0).all() for gradient in interface.gate_gradients(model))
    assert interface.collect_aux_loss_metrics(model)["expert_divergence_loss/mean"] == 0


def test_passes_without_a_pair_leave_the_logged_means():
    """Of two domains: the loss is -log(nats + eps)."""
    titan = interface.integration()
    model, hidden = interface.model_with_divergence(), interface.inputs()
    pair, no_pair, unlabelled = torch.tensor([0, 1, 1, 0]), torch.ones(4, dtype=torch.long), torch.full((4,), -1)
    _, value = interface.expected([(hidden, pair, {})], [1.0])
    assert titan.objective_metrics(model) == {} == titan.layer_losses(model)

    def metrics(*labels):
        for ids in labels:
            interface.train(model, ids, hidden, 24 * len(labels))
        return titan.objective_metrics(model), interface.collect_aux_loss_metrics(model)["expert_divergence_loss/mean"]

    own, torchtitans = metrics(unlabelled, no_pair)
    assert own["expert_divergence/pairs"] == 0
    assert all(own[name].isnan() for name in ("expert_divergence_loss", "expert_divergence/nats"))
    assert torchtitans == 0 and all(loss.isnan() for loss in titan.layer_losses(model).values())
    own, torchtitans = metrics(pair, no_pair)
    layers = torch.stack(list(titan.layer_losses(model).values()))
    assert own["expert_divergence/pairs"] == 0.5
    for found in (own["expert_divergence_loss"], torchtitans, layers.mean()):
        assert_close(found, value, EXACT)
    assert_close(own["expert_divergence/nats"], ((-layers).exp() - 1e-6).mean(), EXACT)
    own, torchtitans = metrics(unlabelled)  # the last pass with a pair stands for it
    assert_close(torchtitans, value, EXACT)
    assert own["expert_divergence_loss"].isnan()


def test_a_hundred_steps_without_a_pair_are_one_warning(monkeypatch):
    monkeypatch.setattr(edl.objectives.log, "STEPS_WITHOUT_EFFECT", 4)
    model, hidden = interface.model_with_divergence(), interface.inputs()

    def steps(count, label):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(count):
                interface.train(model, torch.tensor([0, 0, 0, label]), hidden, 24)
                interface.collect_aux_loss_metrics(model)
        return [str(warning.message) for warning in caught if "two domains" in str(warning.message)]

    assert steps(3, 0) == [] == steps(1, 1) == steps(3, 0)  # the fourth had a pair
    (sentence,) = steps(1, 0)
    assert sentence.startswith(
        "edl::Objectives: a batch must hold something for expert_divergence to act on, for a divergence two domains"
    )
    assert steps(8, 0) == []


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_auxiliary_loss_under_activation_checkpointing(use_reentrant):
    hidden, ids = interface.inputs(), interface.DOMAINS
    model = interface.model_with_divergence()
    leaf = hidden.clone().requires_grad_()  # reentrant checkpointing needs one

    def checkpointed(labels):
        with edl.domain_scope(labels):
            return torch.utils.checkpoint.checkpoint(model, leaf, torch.tensor(24.0), use_reentrant=use_reentrant)

    output = checkpointed(ids)
    checkpointed(torch.zeros_like(ids))  # a later micro-batch in flight
    (output * 0.0).sum().backward()
    reference, _ = interface.expected([(hidden, ids, {})], [1.0])
    for actual, gradient in zip(interface.gate_gradients(model), reference, strict=True):
        assert_close(actual, gradient, EXACT)


@needs_remat
@pytest.mark.parametrize(
    "make",
    [
        interface.model_with_divergence,
        lambda: interface.model_with_divergence(memory=True),
        lambda: interface.model_with_objectives(samples.objectives(), memory=True),
    ],
    ids=["divergence", "memory", "several objectives"],
)
def test_auxiliary_loss_under_torch_remat(make):
    """The checkpointing of the interface's version: it keeps what an injection did, and replays the rest."""
    import torch_remat as remat

    def two_micro_batches(wrap):
        model, hidden, ids = make(), interface.inputs(), interface.DOMAINS
        forward = wrap(model)
        with edl.domain_scope(ids):
            first = forward(hidden, torch.tensor(48.0))
        with edl.domain_scope(ids.roll(1)):
            second = forward(hidden.flip(0), torch.tensor(48.0))
        ((first + second) * 0.0).sum().backward()
        return interface.gate_gradients(model), interface.collect_aux_loss_metrics(model)

    plain, plain_metrics = two_micro_batches(lambda model: model)
    replayed, metrics = two_micro_batches(remat.checkpoint(region_name="model"))
    assert metrics == plain_metrics
    for one, other in zip(plain, replayed, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("split", ["data", "data, unequal padding", "context", "context, inside a sequence"])
def test_auxiliary_losses_of_two_ranks_add_up_to_those_of_one(interface_pair, split):
    for rank in interface_pair:
        assert_equals(*rank[split])


def test_several_objectives_of_an_auxiliary_loss_add_up_to_those_of_one(interface_pair):
    for rank in interface_pair:
        assert_gradients_and_metrics_are(*rank["several objectives"])


def test_context_parallelism_of_a_stream_needs_labels_per_token(interface_pair):
    for rank in interface_pair:
        assert rank["sequences"].startswith("edl::torchtitan: context parallelism cuts the token stream anywhere")
