"""Objectives on router scores: each against its equation, computed in another way in float64, and against finite
differences; masks, packing, labels in every form, and what is nothing."""

import functools
import math

import pytest
import torch
from tolerances import assert_close, tolerance

import edl
from edl.objectives import Objectives, RouterEntropy
from edl.routing import Observation

T, E, K, D = 12, 6, 2, 3
EXACT = tolerance(torch.float64, 64)
NAN = float("nan")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def observation(logits, top_k=K):
    """What a layer with softmax weights after top-k tells of logits [T, E]."""
    chosen = edl.ops.route_tokens(logits.detach().nan_to_num(), top_k, "softmax")[1]
    scores = torch.softmax(logits, -1)
    weights = scores.gather(1, chosen)
    return Observation(logits=logits, scores=scores, weights=weights / weights.sum(1, keepdim=True), experts=chosen)


def loss_of(objective, layers, *masks, **labels):
    return Objectives({"it": (objective, 1.0)}).eval()(layers, *masks, **labels)[0]


def check_gradient(function, *inputs):
    assert torch.autograd.gradcheck(function, [x.clone().requires_grad_(True) for x in inputs], atol=1e-7, rtol=1e-6)


# ---- RouterEntropy ----


def entropy(distribution):
    return -torch.special.xlogy(distribution, distribution).sum(-1)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_router_entropy_is_the_mean_over_tokens(scores):
    logits, keep = random(2, T, E), torch.arange(T) % 4 > 0
    gates = torch.softmax(logits, -1) if scores == "softmax" else torch.sigmoid(logits)
    expected = entropy(gates / gates.sum(-1, keepdim=True))[:, keep].mean()
    assert_close(loss_of(RouterEntropy(scores=scores), list(logits), keep), expected, EXACT)
    check_gradient(lambda x: loss_of(RouterEntropy(scores=scores), list(x), keep), logits)


def test_router_entropy_of_scores_is_that_of_their_logits():
    layer = observation(random(T, E))
    assert_close(loss_of(RouterEntropy(input="probs"), layer), loss_of(RouterEntropy(), layer), EXACT)
    check_gradient(lambda x: loss_of(RouterEntropy(input="probs"), Observation(scores=x.softmax(-1))), layer.logits)
    with pytest.raises(ValueError, match="every row of routing must be a distribution"):
        loss_of(RouterEntropy(input="probs"), Observation(scores=layer.logits))


def test_router_entropy_of_certainty_is_0_and_of_indifference_log_e():
    assert_close(
        loss_of(RouterEntropy(), torch.zeros(T, E).double()), torch.tensor(math.log(E), dtype=torch.float64), EXACT
    )
    certain = torch.full((T, E), -torch.inf, dtype=torch.float64)
    certain[:, 1] = 0.0
    for objective in (RouterEntropy(), RouterEntropy(scores="sigmoid")):
        logits = certain.clone().requires_grad_(True)
        loss = loss_of(objective, logits)
        loss.backward()
        assert loss == 0 and logits.grad.eq(0).all()
    scores = certain.exp().requires_grad_(True)
    loss = loss_of(RouterEntropy(input="probs"), Observation(scores=scores))
    loss.backward()
    assert loss == 0 and scores.grad.isfinite().all()
    assert loss_of(RouterEntropy(), random(T, 1)) == 0


# ---- every objective ----

ALL = {"router_entropy": RouterEntropy(), "router_entropy of sigmoid": RouterEntropy(scores="sigmoid")}
LABELS = {"domain_ids": torch.arange(4) % D, "modality_ids": torch.arange(4) % 2}


def layers_of(logits):
    return [observation(each) for each in logits]


@functools.cache
def batch():
    """Logits [L, T, E] of four sequences of three tokens, of which some do not count."""
    return random(2, T, E, seed=3), (torch.arange(T) % 5 > 0).view(4, 3)


each_objective = pytest.mark.parametrize("name", ALL)


@each_objective
def test_the_gradient_is_that_of_finite_differences(name):
    logits, keep = batch()
    check_gradient(lambda x: loss_of(ALL[name], layers_of(x), keep, **LABELS), logits)


@each_objective
def test_padding_is_not_read(name):
    logits, keep = batch()
    losses, gradients = [], []
    for content in (NAN, torch.inf, 7.0):
        x = logits.masked_fill(~keep.view(T, 1), content).requires_grad_(True)
        with torch.no_grad():
            seen = layers_of(x)
        seen = [layer._replace(logits=each) for layer, each in zip(seen, x)]
        losses.append(loss_of(ALL[name], seen, keep, **LABELS))
        if losses[-1].requires_grad:
            gradients.append(torch.autograd.grad(losses[-1], x)[0])
    assert losses[0].isfinite() and losses[0] != 0 and losses[0] == losses[1] == losses[2]
    for gradient in gradients:
        assert gradient.equal(gradients[0]) and gradient[:, ~keep.flatten()].eq(0).all()


@each_objective
def test_nothing_that_counts_is_0_and_has_no_effect(name):
    logits, keep = batch()
    x = logits.clone().requires_grad_(True)
    bound = Objectives({"it": (ALL[name], 1.0)})
    total, _ = bound(layers_of(x), torch.zeros_like(keep), **LABELS)
    total.backward()
    assert total == 0 and x.grad.eq(0).all() and not bound.has_effect["it"]


@each_objective
def test_what_counts_and_is_not_a_number_is_not_hidden(name):
    logits, keep = batch()
    x = logits.clone()
    x[:, 1] = NAN
    assert loss_of(ALL[name], layers_of(x), keep, **LABELS).isnan()


@each_objective
def test_a_mask_value_that_is_not_allowed_is_refused(name):
    logits, keep = batch()
    with pytest.raises(IndexError):
        loss_of(ALL[name], layers_of(logits), keep.long() * 2, **LABELS)


@each_objective
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_types_give_what_float64_does(name, dtype):
    logits, keep = batch()
    stored = logits.to(dtype)
    found = loss_of(ALL[name], [layer._replace(scores=None) for layer in layers_of(stored)], keep, **LABELS)
    exact = loss_of(ALL[name], layers_of(stored.double()), keep, **LABELS)
    assert found.dtype == torch.float32
    assert_close(found, exact, tolerance(dtype, T * E, roundings=2), scale=1.0)


def test_all_together_compile_in_one_graph():
    logits, keep = batch()
    bound = Objectives({name: (objective, 1.0) for name, objective in ALL.items()})

    def losses_of(x):
        total, values = bound(layers_of(x), keep, **LABELS)
        return total, torch.stack(list(values.values()))

    eager, compiled = (logits.clone().requires_grad_(True) for _ in range(2))
    expected, values = losses_of(eager)
    found, values_found = torch.compile(losses_of, fullgraph=True, backend="aot_eager")(compiled)
    assert_close(values_found, values, EXACT)
    assert_close(*(torch.autograd.grad(x, y)[0] for x, y in ((found, compiled), (expected, eager))), EXACT)


REFUSED = {
    "edl::RouterEntropy: scores must be one of ['softmax', 'sigmoid'] (got 'tanh')": lambda: RouterEntropy(
        scores="tanh"
    ),
    "edl::RouterEntropy: input must be one of ['logits', 'probs'] (got None)": lambda: RouterEntropy(input=None),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_refused_with_a_sentence(sentence):
    with pytest.raises(ValueError) as error:
        REFUSED[sentence]()
    assert str(error.value) == sentence
