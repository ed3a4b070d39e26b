"""Objectives on router scores: each against its equation, computed in another way in float64, and against finite
differences; masks, packing, labels in every form, and what is nothing."""

import functools
import itertools
import math
import sys

import pytest
import torch
from tolerances import assert_close, tolerance

import edl
from edl.objectives import (
    CrossLayerCoupling,
    DirichletPrior,
    LoadBalancing,
    ModalityDivergence,
    ModalityMutualInformation,
    MutualInformation,
    Objectives,
    RouterEntropy,
    RoutingVariance,
)
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
        with pytest.raises(IndexError, match=r"edl::Objectives: experts must be in \[0, 6\], 6 for none \(got 7\)"):
            loss_of(objective, layer._replace(experts=layer.experts + 7 - layer.experts.min(), batch_size=1))


def test_counts_of_choices_are_exact_beyond_float32():
    many = 2**24
    sums = {"scores": torch.tensor([[1.0, 1.0]]) * many, "tokens": torch.tensor([2.0 * many])}
    sums = {name: x.double() for name, x in sums.items()} | {"choices": torch.tensor([[many + 1, many - 1]])}
    assert LoadBalancing().formula(sums) == 1
    sums["scores"] = torch.tensor([[2.0, 0.0]], dtype=torch.float64) * many
    assert LoadBalancing().formula(sums) == 2 * (many + 1) / (2 * many)


# ---- MutualInformation ----

MEANS = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]], dtype=torch.float64)
DIVERGENCE = torch.tensor(0.25310161544280674, dtype=torch.float64)  # Jensen-Shannon, of the two


def information(joint):
    """By the entropies of the joint distribution and its marginals."""
    return entropy(joint.sum(1)) + entropy(joint.sum(0)) - entropy(joint.flatten())


def test_mutual_information_of_two_domains_alike_in_size_is_their_divergence():
    found = loss_of(MutualInformation(2), MEANS.log(), domain_ids=torch.tensor([[0, 1]]))
    assert_close(found, -DIVERGENCE, EXACT)
    disjoint = torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]], dtype=torch.float64).requires_grad_(True)
    loss = loss_of(MutualInformation(2), disjoint, domain_ids=torch.tensor([[0, 1]]))
    loss.backward()
    assert_close(loss, torch.tensor(-math.log(2), dtype=torch.float64), EXACT)
    assert disjoint.grad.eq(0).all()


@pytest.mark.parametrize("prior", ["batch", "uniform"])
@pytest.mark.parametrize("labels", ["tokens", "sequences", "weights", "weights of sequences"])
def test_mutual_information_is_that_of_the_joint_distribution(prior, labels):
    logits, keep = random(T, E, seed=6), torch.arange(T) % 5 > 0
    given = {
        "tokens": torch.arange(T).view(4, 3) % 4 % D - (torch.arange(T).view(4, 3) == 7).long(),
        "sequences": torch.tensor([2, 0, 2, -1]),
        "weights": random(T, D, seed=7).abs() * (torch.arange(T) != 3).unsqueeze(1),
        "weights of sequences": random(4, D, seed=8).abs(),
    }[labels]
    weights = given.repeat_interleave(T // len(given), 0) if labels.endswith("sequences") else given.flatten(0, -2)
    if not given.is_floating_point():
        of_tokens = given.flatten() if labels == "tokens" else given.repeat_interleave(3)
        weights = torch.nn.functional.one_hot(of_tokens + 1, D + 1)[:, 1:].double()
    weights = weights[keep]
    scores = torch.softmax(logits, -1)[keep]
    joint = weights.T @ scores
    if prior == "uniform":
        occurs = weights.sum(0) > 0
        joint = joint[occurs] / weights.sum(0)[occurs].unsqueeze(1)
    objective = MutualInformation(D, prior)
    found = loss_of(objective, logits, keep, domain_ids=given)
    assert_close(found, -information(joint / joint.sum()), EXACT, scale=math.log(D * E))
    check_gradient(lambda x: loss_of(objective, x, keep, domain_ids=given), logits)
    as_scores = Observation(scores=torch.softmax(logits, -1))
    assert_close(loss_of(MutualInformation(D, prior, "probs"), as_scores, keep, domain_ids=given), found, EXACT)


def test_weights_of_documents_are_those_of_their_tokens():
    logits, ends = random(T, E, seed=9), torch.tensor([0, 4, 4, 10])  # an empty one, and tokens that are in none
    weights = random(3, D, seed=10).abs()
    of_tokens = weights.repeat_interleave(ends.diff(), 0)
    found = loss_of(MutualInformation(D), logits, None, None, ends, domain_ids=weights)
    assert_close(found, loss_of(MutualInformation(D), logits[:10], domain_ids=of_tokens), EXACT)
    with pytest.raises(IndexError):
        loss_of(MutualInformation(D), logits, None, None, ends + 1, domain_ids=weights)


@pytest.mark.parametrize("value", [-0.5, NAN, math.inf])
def test_weights_that_are_not_allowed_are_refused_where_they_count(value):
    logits, weights, keep = random(T, E), torch.ones(T, D), torch.arange(T) != 2
    weights[2] = value
    assert loss_of(MutualInformation(D), logits, keep, domain_ids=weights).isfinite()
    with pytest.raises(IndexError):
        loss_of(MutualInformation(D), logits, domain_ids=weights)


def test_one_domain_tells_nothing():
    logits = random(T, E).float().requires_grad_(True)
    bound = Objectives({"it": (MutualInformation(D), 1.0)})
    total, _ = bound(logits, domain_ids=torch.tensor([1, 1, -1]))
    total.backward()
    assert total == 0 and logits.grad.eq(0).all() and not bound.has_effect["it"]
    bound(logits, domain_ids=torch.tensor([1, 0, -1]))
    assert bound.has_effect["it"]


def test_the_part_of_domains_that_experts_tell_is_logged():
    bound = Objectives({"it": (MutualInformation(2), 1.0)})
    bound(MEANS.log().requires_grad_(True), domain_ids=torch.tensor([[0, 1]]))
    assert_close(bound.log()["it/part_known"], DIVERGENCE / math.log(2), EXACT)


# ---- ModalityDivergence ----


def means_of(logits, weights):
    """The mean distribution of each modality, of weights [T, M]."""
    return (weights.T @ torch.softmax(logits, -1)) / weights.sum(0).unsqueeze(1)


def divergence(p, q, eps):
    return (p * ((p + eps) / (q + eps)).log()).sum()


@pytest.mark.parametrize("direction", ["forward", "backward", "symmetric"])
def test_modality_divergence_is_the_mean_over_pairs_in_its_direction(direction):
    logits, weights = random(T, E, seed=12), random(T, 4, seed=13).abs()
    weights[:, 1] = 0  # a modality that does not occur
    p = means_of(logits, weights[:, [0, 2, 3]])
    pairs = [(0, 1), (0, 2), (1, 2)]
    forward = sum(divergence(p[m], p[n], 1e-3) for m, n in pairs) / 3
    backward = sum(divergence(p[n], p[m], 1e-3) for m, n in pairs) / 3
    expected = {"forward": forward, "backward": backward, "symmetric": (forward + backward) / 2}[direction]
    objective = ModalityDivergence(4, direction, eps=1e-3)
    assert_close(loss_of(objective, logits, modality_ids=weights), -expected, EXACT, scale=math.log(E))
    check_gradient(lambda x: loss_of(objective, x, modality_ids=weights), logits)


def test_a_pair_at_its_limit_is_pushed_no_further():
    logits, labels = random(3, 4, E, seed=14).flatten(0, 1), torch.tensor([0, 1, 2]).repeat_interleave(4)
    p = means_of(logits, torch.nn.functional.one_hot(labels).double())
    values = [divergence(p[m], p[n], 1e-6) for m, n in ((0, 1), (0, 2), (1, 2))]
    limit = float(sorted(values)[1]) + 1e-9
    x = logits.clone().requires_grad_(True)
    loss = loss_of(ModalityDivergence(3, "forward", limit), x, modality_ids=labels.view(3, 4))
    assert_close(loss, -sum(value.clamp(max=limit) for value in values) / 3, EXACT)
    assert torch.autograd.grad(loss, x)[0].abs().max() > 0
    bound = Objectives({"it": (ModalityDivergence(3, "forward", 1e-4), 1.0)})
    total, _ = bound(x, modality_ids=labels.view(3, 4))
    assert_close(total, torch.tensor(-1e-4, dtype=torch.float64), EXACT)
    assert torch.autograd.grad(total, x)[0].eq(0).all()
    logged = bound.log()
    assert_close(logged["it/nats"], sum(values) / 3, EXACT)
    assert logged["it/pairs"] == 3


def test_modalities_without_a_common_expert_stay_finite():
    logits = torch.full((2, 2), -torch.inf).double().fill_diagonal_(0.0).requires_grad_(True)
    loss = loss_of(ModalityDivergence(), logits, modality_ids=torch.tensor([[0, 1]]))
    loss.backward()
    assert_close(loss, torch.tensor(math.log(1e-6 / (1 + 1e-6)), dtype=torch.float64), EXACT)
    assert logits.grad.eq(0).all()


# ---- ModalityMutualInformation ----


@pytest.mark.parametrize("binning", ["place", "specialisation"])
def test_information_of_modalities_is_that_of_bins_of_experts(binning):
    logits, weights = random(2, T, E, seed=15), random(T, 2, seed=16).abs()
    expected = []
    for each in logits:
        joint = means_of(each, weights) / 2
        if binning == "specialisation":
            joint = joint[:, sorted(range(E), key=lambda e: -float(joint[0, e] / joint[:, e].sum()))]
        expected.append(-information(joint.reshape(2, 3, 2).sum(2)))
    objective = ModalityMutualInformation(bins=3, binning=binning)
    found = loss_of(objective, list(logits), modality_ids=weights)
    assert_close(found, torch.stack(expected).mean(), EXACT, scale=math.log(6))
    check_gradient(lambda x: loss_of(objective, list(x), modality_ids=weights), logits)


def test_modalities_that_keep_to_their_bin_have_all_there_is_to_know():
    sharp = torch.tensor([[60.0, 60.0, 0.0, 0.0], [0.0, 0.0, 60.0, 60.0]]).double()
    modality_ids = torch.tensor([[0, 1]])
    apart = loss_of(ModalityMutualInformation(bins=2), sharp, modality_ids=modality_ids)
    assert_close(apart, torch.tensor(-math.log(2), dtype=torch.float64), 1e-9)
    across = sharp[:, [0, 2, 1, 3]]
    assert_close(loss_of(ModalityMutualInformation(bins=2), across, modality_ids=modality_ids), 0 * apart, 0, 1.0)
    sort = ModalityMutualInformation(bins=2, binning="specialisation")
    assert_close(loss_of(sort, across, modality_ids=modality_ids), apart, EXACT)


# ---- RoutingVariance ----

SPARSE = torch.tensor([[0.6, 0.4, 0, 0], [0, 0.5, 0.5, 0], [0.3, 0, 0, 0.7]], dtype=torch.float64)
CHOSEN = torch.tensor([[0, 1], [1, 2], [0, 3]])


def sparse(weights, experts=CHOSEN):
    return Observation(logits=torch.zeros(3, 4).double(), weights=weights, experts=experts)


def test_routing_variance_of_the_worked_example():
    weights = SPARSE.gather(1, CHOSEN).requires_grad_(True)
    loss = loss_of(RoutingVariance(), sparse(weights))
    assert_close(loss, torch.tensor(-0.61 / 3 / 3, dtype=torch.float64), EXACT)  # a mean where Eq. 7 adds 3 tokens
    # dL/ds_te = -(2 / 4)(s_te - mean_e) / 3, of which the renormalisation takes each token's weighted mean.
    of_shares = -(SPARSE - SPARSE.mean(0)) / 2
    assert_close(of_shares[0, 0], torch.tensor(-0.15, dtype=torch.float64), EXACT)
    expected = (of_shares / 3).gather(1, CHOSEN)
    expected = expected - (expected * weights).sum(1, keepdim=True)
    assert_close(torch.autograd.grad(loss, weights)[0], expected, EXACT)
    found = loss_of(RoutingVariance("released_code"), SPARSE.log())
    assert_close(found, torch.tensor(-0.34 / 3.6, dtype=torch.float64), EXACT)  # -0.0944444


def test_a_factor_of_the_layer_and_dropped_choices_change_no_share():
    weights = SPARSE.gather(1, CHOSEN)
    expected = loss_of(RoutingVariance(), sparse(weights))
    assert_close(loss_of(RoutingVariance(), sparse(2.5 * weights)), expected, EXACT)
    dropped = torch.tensor([[0, 4], [1, 2], [4, 4]])
    shares = torch.tensor([[1.0, 0, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 0, 0]], dtype=torch.float64)
    x = weights.clone().requires_grad_(True)
    loss = loss_of(RoutingVariance(), sparse(x, dropped))
    assert_close(loss, -shares.var(0, unbiased=False).mean(), EXACT)
    assert torch.autograd.grad(loss, x)[0].isfinite().all()


def test_one_expert_per_token_has_a_variance_and_no_gradient():
    logits = random(T, E).requires_grad_(True)
    layer = observation(logits, top_k=1)
    loss = loss_of(RoutingVariance(), layer)
    assert_close(loss, -chosen_of(layer.experts).double().var(0, unbiased=False).mean(), EXACT)
    assert torch.autograd.grad(loss, logits)[0].abs().max() < 1e-15


# ---- CrossLayerCoupling ----


def coupled(first, second, top_k=K):
    """The sum over pairs of chosen experts, pair by pair."""
    of_tokens = []
    for x, y in zip(first, second):
        best = [each.topk(top_k).indices for each in (x, y)]
        of_tokens.append(sum(x.softmax(0)[e] * y.softmax(0)[v] for e in best[0] for v in best[1]))
    return torch.stack(of_tokens)


def test_coupling_is_the_mean_over_pairs_of_adjacent_layers_of_whatever_size():
    layers = [random(T, size, seed=size) for size in (6, 4, 6)]
    keep = torch.arange(T) % 3 > 0
    values = [coupled(*pair)[keep].mean() for pair in itertools.pairwise(layers)]
    bound = Objectives({"it": (CrossLayerCoupling(), 1.0)})
    total, _ = bound([observation(x.requires_grad_(True)) for x in layers], keep)
    assert_close(total, -sum(values) / 2, EXACT)
    logged = bound.log()
    assert_close(logged["it/layer_0"], -values[0], EXACT)
    assert_close(logged["it/layer_1"], -values[1], EXACT)
    assert "it/layer_2" not in logged
    check_gradient(lambda *x: loss_of(CrossLayerCoupling(), [observation(each) for each in x], keep), *layers)


def test_coupling_of_all_experts_is_constant_and_of_dropped_ones_nothing():
    logits = random(2, T, E, seed=1)
    assert_close(loss_of(CrossLayerCoupling(), [observation(x, E) for x in logits]), -torch.ones(()).double(), EXACT)
    layers = [observation(x) for x in logits]
    layers[1] = layers[1]._replace(experts=torch.full_like(layers[1].experts, E))
    assert loss_of(CrossLayerCoupling(), layers) == 0


# ---- DirichletPrior ----


def of_the_table(alpha, num_experts, x):
    from edl.objectives import dirichlet_prior

    table = dirichlet_prior._distribution_function(alpha, num_experts, "cpu", x.dtype)
    return dirichlet_prior._interpolated(table, x.log())


SCORES = torch.logspace(-6, -0.1, 999, dtype=torch.float64)
SCORES = torch.cat([SCORES, 1 - SCORES])


@pytest.mark.parametrize(
    "alpha, num_experts, of_beta",
    [
        (1.0, 2, lambda x: x),
        (1.0, 64, lambda x: 1 - (1 - x) ** 63),
        (2.0, 2, lambda x: x**2 * (3 - 2 * x)),
        (0.5, 2, lambda x: 2 / math.pi * x.sqrt().asin()),  # a density without bound at 1
        (0.5, 3, lambda x: x.sqrt()),
        (2.0, 3, lambda x: 1 - (1 - x) ** 4 * (1 + 4 * x)),
    ],
)
def test_the_distribution_function_of_the_prior_is_that_of_beta(alpha, num_experts, of_beta):
    x = SCORES.clone().requires_grad_(True)
    expected = of_beta(x)
    slopes = x.detach() * torch.autograd.grad(expected.sum(), x)[0]  # over log x
    values, found = of_the_table(alpha, num_experts, SCORES)
    assert_close(values, expected, 1e-9)
    assert_close(found, slopes, 1e-6)


@pytest.mark.parametrize("num_experts", [2, 3, 8, 256])
@pytest.mark.parametrize("alpha, error", [(0.01, 1e-8), (0.75, 1e-8), (8.0, 1e-8), (1000.0, 1e-4)])
def test_the_table_of_the_prior_is_as_exact_as_it_says(alpha, num_experts, error):
    from scipy import special

    expected = special.betainc(alpha, alpha * (num_experts - 1), SCORES.numpy())
    assert (of_the_table(alpha, num_experts, SCORES)[0] - torch.from_numpy(expected)).abs().max() <= error


def test_without_scipy_the_prior_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError) as error:
        DirichletPrior()
    rule = "edl::DirichletPrior: SciPy must be installed, pip install 'expert-divergence[dirichlet]'"
    assert str(error.value) == f"{rule} (got import of scipy halted; None in sys.modules)"


def test_the_table_of_the_prior_is_made_once_for_a_device_and_serves_every_mode(monkeypatch):
    from edl.objectives import dirichlet_prior

    made, make = [], dirichlet_prior._cubics
    monkeypatch.setattr(dirichlet_prior, "_tables", {})
    monkeypatch.setattr(dirichlet_prior, "_cubics", lambda *beta: made.append(beta) or make(*beta))
    logits = random(T, E).requires_grad_(True)
    with torch.inference_mode():
        expected = loss_of(DirichletPrior(2.0), logits)
    total = loss_of(DirichletPrior(2.0), logits)
    total.backward()
    assert total == expected and logits.grad.ne(0).any()
    assert made == [(2.0, 2.0 * (E - 1))]
    for _ in range(2):
        loss_of(DirichletPrior(2.0), logits.detach().to("meta"))
    assert len(made) == 2


def sorted_prior(logits, alpha=1.0):
    """The loss of sorted scores, of Beta(1, E - 1)."""
    values = 1 - (1 - torch.softmax(logits, -1)) ** (logits.shape[1] - 1)
    ranks = (values.argsort(0).argsort(0) + 1) / (len(logits) + 1)
    return (values - ranks).square().mean()


@pytest.mark.parametrize(
    "size, of_gradient",
    [(1e-3, 0.25), (0.1, 0.01), (1.0, 0.1), (3.0, 0.01)],
    ids=["even", "flat", "as the prior", "sharp"],
)
def test_the_loss_of_the_histogram_nears_that_of_sorted_scores(size, of_gradient):
    logits = (size * random(2000, 8, seed=17)).requires_grad_(True)
    expected, found = sorted_prior(logits), loss_of(DirichletPrior(), logits)
    assert abs(found / expected - 1) < 0.01
    gradient, wanted = (torch.autograd.grad(loss, logits)[0] for loss in (found, expected))
    assert (gradient - wanted).norm() < of_gradient * wanted.norm()


def test_each_token_in_a_bin_of_its_own_is_the_sorted_loss():
    logits = random(8, 4, seed=18)
    found = loss_of(DirichletPrior(bins=10**6), logits)
    assert_close(found, sorted_prior(logits), 1e-8)


def test_scores_of_the_prior_have_next_to_no_loss():
    generator = torch.Generator().manual_seed(0)
    exponential = -torch.rand(
        4000, 8, generator=generator, dtype=torch.float64
    ).log()  # of sum 1: evenly on the simplex
    assert loss_of(DirichletPrior(), exponential.log()) < 1e-4 < loss_of(DirichletPrior(alpha=0.75), exponential.log())


# ---- every objective ----

ALL = {
    "router_entropy": RouterEntropy(),
    "router_entropy of sigmoid": RouterEntropy(scores="sigmoid"),
    "load_balancing": LoadBalancing(),
    "load_balancing of sequences": LoadBalancing("sigmoid", scope="sequence", choices="by_score"),
    "load_balancing of micro-batches": LoadBalancing(scope="micro_batch", devices=3),
    "load_balancing of what is sent": LoadBalancing(scope="rank", devices=3, devices_per_token=2),
    "mutual_information": MutualInformation(D),
    "modality_divergence": ModalityDivergence(),
    "modality_mutual_information": ModalityMutualInformation(bins=3),
    "modality_mutual_information of the batch's bins": ModalityMutualInformation(
        D, bins=2, binning="specialisation", labels="weights"
    ),
    "dirichlet_prior": DirichletPrior(),
    "dirichlet_prior of few bins": DirichletPrior(0.75, bins=4, scores="sigmoid"),
    "routing_variance": RoutingVariance(),
    "routing_variance of the code": RoutingVariance("released_code"),
    "cross_layer_coupling": CrossLayerCoupling(),
    "mutual_information of weights": MutualInformation(D, "uniform", scores="sigmoid", labels="weights"),
}
LABELS = {
    "domain_ids": torch.arange(4) % D,
    "modality_ids": torch.arange(4) % 2,
    "weights": random(T, D, seed=11).abs(),
}


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
def test_an_expert_without_any_score_is_finite(name):
    logits, keep = batch()
    x = logits.index_fill(2, torch.tensor(4), -torch.inf).requires_grad_(True)
    loss = loss_of(ALL[name], layers_of(x), keep, **LABELS)
    gradient = torch.autograd.grad(loss, x)[0]
    assert loss.isfinite() and gradient.isfinite().all() and gradient[..., 4].eq(0).all()


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
    found, values_found = torch.compile(losses_of, fullgraph=True, backend="eager")(compiled)
    assert_close(values_found, values, EXACT)
    assert_close(*(torch.autograd.grad(x, y)[0] for x, y in ((found, compiled), (expected, eager))), EXACT)


class _Total(torch.nn.Module):
    def __init__(self, objectives):
        super().__init__()
        self.bound = Objectives({name: (objective, 1.0) for name, objective in objectives.items()}).eval()

    def forward(self, x):
        return self.bound(layers_of(x), batch()[1], **LABELS)[0]


@pytest.mark.parametrize("alpha", [1.0, 1.25])  # the table of the first is known from other tests, or not yet
def test_all_together_are_exported(alpha):
    logits, total = batch()[0], _Total(ALL | {"dirichlet_prior": DirichletPrior(alpha)})
    if alpha == 1.0:
        total(logits)
    exported = torch.export.export(total, (logits,)).module()
    assert_close(exported(logits), total(logits), EXACT)


REFUSED = {
    "edl::DirichletPrior: alpha must be finite and above 0 (got 0.0)": lambda: DirichletPrior(0.0),
    "edl::DirichletPrior: bins must be at least 1 (got 0)": lambda: DirichletPrior(bins=0),
    "edl::DirichletPrior: needs at least two experts, whose scores have a distribution (got 1)": lambda: loss_of(
        DirichletPrior(), random(T, 1)
    ),
    "edl::ModalityDivergence: num_modalities must be at least 2, or there is no pair (got 1)": lambda: (
        ModalityDivergence(1)
    ),
    "edl::ModalityDivergence: limit must be finite and above 0 (got inf)": lambda: ModalityDivergence(limit=math.inf),
    "edl::ModalityDivergence: eps must be finite and above 0 (got 0.0)": lambda: ModalityDivergence(eps=0.0),
    "edl::ModalityDivergence: direction must be one of ['symmetric', 'forward', 'backward'] (got 'both')": lambda: (
        ModalityDivergence(direction="both")
    ),
    "edl::ModalityMutualInformation: bins must be at least 2 (got 1)": lambda: ModalityMutualInformation(bins=1),
    "edl::ModalityMutualInformation: bins must divide the number of experts, 6 (got 8)": lambda: loss_of(
        ModalityMutualInformation(), random(T, E), **LABELS
    ),
    "edl::ModalityMutualInformation: binning must be one of ['place', 'specialisation'] (got 0)": lambda: (
        ModalityMutualInformation(binning=0)
    ),
    "edl::RoutingVariance: variant must be one of ['equation', 'released_code'] (got 'code')": lambda: RoutingVariance(
        "code"
    ),
    "edl::RoutingVariance: variant='released_code' needs at least two experts, whose variance it is (got 1)": lambda: (
        loss_of(RoutingVariance("released_code"), random(T, 1))
    ),
    "edl::RoutingVariance: weights and experts must have one shape (got [3, 1] and [3, 2])": lambda: loss_of(
        RoutingVariance(), sparse(torch.ones(3, 1))
    ),
    "edl::CrossLayerCoupling: needs two MoE layers or more in one call, which routers that compute their losses alone "
    "do not have (got 1)": lambda: loss_of(CrossLayerCoupling(), observation(random(T, E))),
    "edl::CrossLayerCoupling: all layers must have the same tokens (got 12 and 11)": lambda: loss_of(
        CrossLayerCoupling(), [observation(random(T, E)), observation(random(T - 1, E))]
    ),
    "edl::MutualInformation: num_domains must be at least 2, or there is nothing to tell (got 1)": lambda: (
        MutualInformation(1)
    ),
    "edl::MutualInformation: prior must be one of ['batch', 'uniform'] (got 'flat')": lambda: MutualInformation(
        2, "flat"
    ),
    "edl::MutualInformation: labels must be a string (got 3)": lambda: MutualInformation(2, labels=3),
    "edl::Objectives: weights must have the shape [T, 3] of the 12 tokens, [B, S_len, 3], [B, 3] of sequences of one "
    "length, or [N, 3] with cu_seqlens (got [5, 3])": lambda: loss_of(
        MutualInformation(3), random(T, E), domain_ids=torch.ones(5, 3)
    ),
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
