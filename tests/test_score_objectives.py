"""Objectives on router scores: each against its equation, computed in another way in float64, and against finite
differences; masks, packing, labels in every form, and what is nothing."""

import functools
import itertools
import math

import pytest
import torch
from tolerances import assert_close, tolerance

import edl
from edl.objectives import LoadBalancing, Objectives, RouterEntropy
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


# ---- LoadBalancing ----


def test_load_balancing_of_the_worked_example():
    scores = torch.tensor([[0.5, 0.3, 0.1, 0.1], [0.4, 0.4, 0.1, 0.1], [0.1, 0.2, 0.6, 0.1]], dtype=torch.float64)
    found = loss_of(LoadBalancing(), observation(scores.log()))
    assert_close(found, torch.tensor(11 / 9, dtype=torch.float64), EXACT)  # 4 · (2 · 1/3 + 3 · 0.3 + 1 · 0.8/3) / 6


def balance(scores, sent, total):
    """N · Σ_i f_i P_i, of scores [T, N] and of what was sent, [T, N], of so much in all."""
    return scores.shape[1] * (sent.double().sum(0) / total * scores.mean(0)).sum()


def chosen_of(experts):
    return torch.nn.functional.one_hot(experts, E).sum(1)


@pytest.mark.parametrize("form", ["logits", "mask", "documents"])
def test_balance_per_sequence_is_the_mean_of_the_sequences_that_have_tokens(form):
    lengths = [3, 0, 4, 5] if form == "documents" else [3, 3, 3, 3]
    logits, keep = random(T, E, seed=1), torch.ones(T, dtype=torch.bool)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    keep[ends[2] : ends[3]] = form == "documents"
    keep[1] = False
    layer = observation(logits)
    of_sequences = []
    for begin, end in itertools.pairwise(ends):
        mine = torch.arange(begin, end)[keep[begin:end]]
        if len(mine):
            sent = chosen_of(layer.experts[mine])
            of_sequences.append(balance(layer.scores[mine], sent, K * len(mine)))
    assert len(of_sequences) == 3
    given = {
        "logits": lambda: (layer._replace(batch_size=4), keep),
        "mask": lambda: (layer, keep.view(4, 3)),
        "documents": lambda: (layer, keep, None, ends),
    }[form]()
    found = loss_of(LoadBalancing(scope="sequence"), *given)
    assert_close(found, torch.stack(of_sequences).mean(), EXACT)
    assert (found - loss_of(LoadBalancing(), *given)).abs() > 1e-3


def test_balance_per_sequence_must_be_told_the_sequences():
    with pytest.raises(ValueError) as error:
        loss_of(LoadBalancing(scope="sequence"), observation(random(T, E)))
    assert str(error.value) == (
        "edl::Objectives: what is summed by sequence must be told the sequences, by cu_seqlens, a mask [B, S_len] or "
        "router logits [B, S_len, E] (got 12 tokens without)"
    )


@pytest.mark.parametrize("scope", ["global", "micro_batch", "rank"])
def test_balance_of_devices_and_of_what_is_sent_to_them(scope):
    layer = observation(random(T, E, seed=2), top_k=4)
    of_device = layer.scores.unflatten(1, (3, 2)).sum(2)
    choices = chosen_of(layer.experts).unflatten(1, (3, 2)).sum(2)
    by_choices = loss_of(LoadBalancing(scope=scope, devices=3), layer)
    assert_close(by_choices, balance(of_device, choices, 4 * T), EXACT)
    sent = loss_of(LoadBalancing(scope=scope, devices=3, devices_per_token=2), layer)
    assert_close(sent, balance(of_device, choices > 0, 2 * T), EXACT)
    assert (sent - by_choices).abs() > 1e-3
    as_experts = loss_of(LoadBalancing(scope=scope, devices=E), layer)
    assert_close(as_experts, edl.load_balancing_loss(layer.logits, top_k=4), EXACT)


def test_balance_of_perfect_devices_is_1():
    logits = torch.zeros(4, 4, dtype=torch.float64)
    experts = torch.tensor([[0, 2], [1, 3], [2, 1], [3, 0]])
    for objective in (LoadBalancing(devices=2), LoadBalancing(devices=2, devices_per_token=2)):
        assert loss_of(objective, Observation(logits=logits, experts=experts)) == 1


def test_balance_counts_what_was_chosen_or_what_scores_would_choose():
    layer = observation(random(T, E, seed=4))
    biased = layer._replace(experts=(layer.experts + 1) % E)
    assert_close(loss_of(LoadBalancing(choices="by_score"), biased), loss_of(LoadBalancing(), layer), EXACT)
    assert (loss_of(LoadBalancing(), biased) - loss_of(LoadBalancing(), layer)).abs() > 1e-3


def test_choices_that_were_dropped_count_nowhere():
    layer = observation(random(T, E, seed=5))
    for objective in (LoadBalancing(), LoadBalancing(scope="sequence"), LoadBalancing(devices=3, devices_per_token=2)):
        dropped = layer._replace(experts=layer.experts.index_fill(0, torch.tensor([0, 4]), E), batch_size=1)
        one = layer._replace(experts=layer.experts[:, :1], batch_size=1)
        second_dropped = layer._replace(experts=torch.where(torch.arange(K) == 0, layer.experts, E), batch_size=1)
        assert_close(loss_of(objective, second_dropped), loss_of(objective, one), EXACT)
        assert loss_of(objective, dropped) != loss_of(objective, layer._replace(batch_size=1))
        with pytest.raises(IndexError, match=r"edl::LoadBalancing: experts must be in \[0, 6\], 6 for none \(got 7\)"):
            loss_of(objective, layer._replace(experts=layer.experts + 7 - layer.experts.min(), batch_size=1))


def test_counts_of_choices_are_exact_beyond_float32():
    many = 2**24
    sums = {"scores": torch.tensor([[1.0, 1.0]]) * many, "tokens": torch.tensor([2.0 * many])}
    sums = {name: x.double() for name, x in sums.items()} | {"choices": torch.tensor([[many + 1, many - 1]])}
    assert LoadBalancing().formula(sums) == 1
    sums["scores"] = torch.tensor([[2.0, 0.0]], dtype=torch.float64) * many
    assert LoadBalancing().formula(sums) == 2 * (many + 1) / (2 * many)


# ---- every objective ----

ALL = {
    "router_entropy": RouterEntropy(),
    "router_entropy of sigmoid": RouterEntropy(scores="sigmoid"),
    "load_balancing": LoadBalancing(),
    "load_balancing of sequences": LoadBalancing("sigmoid", scope="sequence", choices="by_score"),
    "load_balancing of micro-batches": LoadBalancing(scope="micro_batch", devices=3),
    "load_balancing of what is sent": LoadBalancing(scope="rank", devices=3, devices_per_token=2),
}
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
    "edl::LoadBalancing: devices must be at least 1 (got 0)": lambda: LoadBalancing(devices=0),
    "edl::LoadBalancing: devices must be an integer (got 2.5)": lambda: LoadBalancing(devices=2.5),
    "edl::LoadBalancing: devices must divide the number of experts, 6 (got 4)": lambda: loss_of(
        LoadBalancing(devices=4), observation(random(T, E))
    ),
    "edl::LoadBalancing: devices_per_token must be at most devices (got 3 of 2)": lambda: LoadBalancing(
        devices=2, devices_per_token=3
    ),
    "edl::LoadBalancing: devices_per_token must be at most devices (got 1 of None)": lambda: LoadBalancing(
        devices_per_token=1
    ),
    "edl::LoadBalancing: choices must be one of ['made', 'by_score'] (got 1)": lambda: LoadBalancing(choices=1),
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
