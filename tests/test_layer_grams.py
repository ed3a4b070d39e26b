"""A layer that tells how alike its experts answer: in every form it is used in, and to objectives."""

import copy
import dataclasses
import io

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import edl
from edl import ops
from edl.objectives import Objective, Objectives

BOTH = {"output_gram": True, "activation_gram": True}


def make_layer(**options):
    torch.manual_seed(3)
    return edl.MoELayer(12, 8, 5, 3, dtype=torch.float64, **options)


def loss_of(results):
    output, observed = results
    grams = [x for x in (observed.output_gram, observed.activation_gram) if x is not None]
    return output.square().sum() + sum(ops.mean_squared_cosine(x).sum() + x.sum() for x in grams)


def gradients(layer, call, tokens):
    layer.zero_grad()
    tokens = tokens.clone().requires_grad_()
    loss_of(call(tokens)).backward()
    return [tokens.grad, *(x.grad for x in layer.parameters())]


@pytest.mark.parametrize("asked", [("output_gram",), ("activation_gram",), ("output_gram", "activation_gram")], ids=str)
def test_it_tells_beside_the_routing(asked):
    layer, plain = make_layer(**dict.fromkeys(asked, True)), make_layer()
    tokens = torch.randn(2, 7, 12, dtype=torch.float64)
    output, observed = layer(tokens)
    expected, routing = plain(tokens)
    assert output.equal(expected)
    for name in ("weights", "experts", "tokens_per_expert"):
        assert getattr(observed, name).equal(getattr(routing, name))
    assert observed.logits.equal(routing.logits)
    for name in BOTH:
        gram = getattr(observed, name)
        assert (gram is None) == (name not in asked)
        assert gram is None or gram.shape == (14, 3, 3)
    assert all(f"{name}=True" in repr(layer) for name in asked) and "gram" not in repr(plain)


@pytest.mark.parametrize("form", ["scripted", "saved", "compiled", "exported", "copied"])
def test_in_every_form_it_is_the_same(form):
    layer = make_layer(**BOTH)
    tokens = torch.randn(9, 12, dtype=torch.float64)
    call = layer
    if form in ("scripted", "saved"):
        call = torch.jit.script(layer)
        if form == "saved":
            file = io.BytesIO()
            torch.jit.save(call, file)
            file.seek(0)
            call = torch.jit.load(file)
    elif form == "compiled":
        call = torch.compile(layer, fullgraph=True, backend="aot_eager")
    elif form == "exported":
        call = torch.export.export(layer, (tokens,)).module()
    else:
        call = copy.deepcopy(layer)
    owner = layer if form == "compiled" else call
    expected = gradients(layer, layer, tokens)
    for actual, wanted in zip(gradients(owner, call, tokens), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_what_is_kept_is_computed_once_more_under_checkpointing(use_reentrant):
    layer = make_layer(**BOTH)
    tokens = torch.randn(9, 12, dtype=torch.float64)

    def run(tokens):  # reentrant checkpointing hands on gradients of plain tensors alone
        output, observed = layer(tokens)
        return output, observed.output_gram, observed.activation_gram

    def call(tokens):
        output, of_outputs, of_activations = checkpoint(run, tokens, use_reentrant=use_reentrant)
        return output, edl.routing.Observation(output_gram=of_outputs, activation_gram=of_activations)

    for actual, wanted in zip(gradients(layer, call, tokens), gradients(layer, layer, tokens), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


@dataclasses.dataclass(frozen=True)
class _Cosine(Objective):
    """The mean over tokens of how parallel their experts' activations are."""

    needs = frozenset({"activation_gram"})

    def of_tokens(self, layers, segments):
        counts = (segments.segment_ids == 0).to(torch.float64)
        cosines = torch.stack([ops.mean_squared_cosine(layer.activation_gram) for layer in layers])
        return {"sums": cosines @ counts, "tokens": counts.sum().expand(len(layers))}

    def formula(self, sums):
        return sums["sums"] / sums["tokens"]


def test_an_objective_reads_it():
    layers = [make_layer(activation_gram=True) for _ in range(2)]
    tokens = torch.randn(10, 12, dtype=torch.float64)
    mask = torch.tensor([1, 1, 1, 1, 0, 1, 1, 1, 1, 0])
    observed = [layer(tokens)[1] for layer in layers]
    total, values = Objectives({"cosine": (_Cosine(), 0.5)})(observed, mask)
    counted = ops.mean_squared_cosine(observed[0].activation_gram)[mask == 1]
    assert values["cosine"].item() == pytest.approx(counted.mean().item(), rel=1e-12)
    total.backward()
    assert (layers[0].gate_up_proj.grad != 0).any() and (layers[0].down_proj.grad == 0).all()


@pytest.mark.parametrize("given", [torch.zeros(4, 9), torch.zeros(4)])
def test_an_objective_refuses_what_is_no_gram_matrix(given):
    with pytest.raises(ValueError) as error:
        Objectives({"cosine": (_Cosine(), 0.5)})(edl.routing.Observation(activation_gram=given))
    assert str(error.value) == (
        f"edl::Objectives: activation_gram must have the shape [T, K, K] (got {list(given.shape)})"
    )


def test_it_comes_with_the_routing_alone():
    with pytest.raises(ValueError) as error:
        make_layer(output_gram=True, return_routing=False)
    assert str(error.value) == (
        "edl::MoELayer: output_gram, activation_gram, router_gram, router_responses are returned with the routing, "
        "they need return_routing=True (got False)"
    )
