"""Expert Divergence in torchtitan's routers gives the gradient of one process that saw the whole step.

Run on the layers of torchtitan 0.3, where it is installed; and as an auxiliary loss, which torchtitan only has in
development, on a stand-in for that interface (`torchtitan_interface.py`).
"""

import importlib.metadata
import warnings

import pytest
import torch
import torchtitan_interface as interface
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
    assert len(warned) == 1 and warned[0].endswith("(got none for 100 steps)")


@needs_torchtitan
@pytest.mark.parametrize("policy", ["FullAC", "SelectiveAC"])
def test_activation_checkpointing_changes_nothing(single, policy):
    for plain, checkpointed in zip(single["checkpointed"]["none"], single["checkpointed"][policy], strict=True):
        assert torch.equal(plain, checkpointed)


@needs_torchtitan
def test_a_copy_of_the_model_has_the_loss(single):
    assert_equal_to(*single["copied"])


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


@needs_torchtitan
@pytest.mark.parametrize("split", ["data", "data and micro-batches", "context", "context, labels per token"])
def test_two_ranks_have_the_gradient_of_one(pair, split):
    for rank in pair:
        assert_equal_to(*rank[split])


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
    titan = interface.integration()
    titan._warn_of_no_effect.cache_clear()
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
        "edl::torchtitan: a batch must hold something for expert_divergence to act on, for a divergence two domains"
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
@pytest.mark.parametrize("memory", [False, True])
def test_auxiliary_loss_under_torch_remat(memory):
    """The checkpointing of the interface's version: it keeps what an injection did, and replays the rest."""
    import torch_remat as remat

    def two_micro_batches(wrap):
        model, hidden, ids = interface.model_with_divergence(memory=memory), interface.inputs(), interface.DOMAINS
        forward = wrap(model)
        with edl.domain_scope(ids):
            first = forward(hidden, torch.tensor(48.0))
        with edl.domain_scope(ids.roll(1)):
            second = forward(hidden.flip(0), torch.tensor(48.0))
        ((first + second) * 0.0).sum().backward()
        return interface.gate_gradients(model), interface.collect_aux_loss_metrics(model)["expert_divergence_loss/mean"]

    plain, plain_metric = two_micro_batches(lambda model: model)
    replayed, metric = two_micro_batches(remat.checkpoint(region_name="model"))
    assert torch.equal(metric, plain_metric)
    for one, other in zip(plain, replayed, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("split", ["data", "data, unequal padding", "context", "context, inside a sequence"])
def test_auxiliary_losses_of_two_ranks_add_up_to_those_of_one(interface_pair, split):
    for rank in interface_pair:
        assert_equals(*rank[split])


def test_context_parallelism_of_a_stream_needs_labels_per_token(interface_pair):
    for rank in interface_pair:
        assert rank["sequences"].startswith("edl::torchtitan: context parallelism cuts the token stream anywhere")
