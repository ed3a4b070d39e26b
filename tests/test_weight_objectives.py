"""Objectives on weights: each against its equation, computed in another way in float64, and against finite differences;
the noise of the coupling; layers that tell of their weights, in every form, and with experts spread over ranks; and the
step beside the optimizer."""

import copy
import io
import itertools
import math

import numpy
import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from tolerances import assert_close, tolerance
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import edl
from edl import expert_parallel
from edl.moe import router_weights
from edl.moe.router_weights import gram_of, responses_of, spread_of, uniform_of
from edl.objectives import (
    ExpertRouterCoupling,
    Objectives,
    RouterEntropy,
    RouterOrthogonality,
    RouterSimilarity,
)
from edl.routing import Observation

E, H, I = 6, 5, 4  # noqa: E741
EXACT = tolerance(torch.float64, 64)
BOTH = {"router_gram": True, "router_responses": True}
OF_ROWS = [
    RouterOrthogonality(),
    RouterOrthogonality(groups=2),
    RouterOrthogonality(groups=3, margin=0.2),
    RouterOrthogonality(margin=0.1),
    RouterSimilarity(),
]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_of(objective, layers, *masks, **labels):
    return Objectives({"it": (objective, 1.0)}).eval()(layers, *masks, **labels)[0]


def of_weight(objective, weight):
    return loss_of(objective, Observation(router_gram=gram_of(weight)))


def scalar(value):
    return torch.tensor(float(value), dtype=torch.float64)


def check_gradient(function, *inputs):
    assert torch.autograd.gradcheck(function, [x.clone().requires_grad_(True) for x in inputs], atol=1e-7, rtol=1e-6)


# ---- RouterOrthogonality, RouterSimilarity ----


def orthogonality(weight, groups=1, margin=0.0):
    """Row by row, group by group, in NumPy."""
    rows, total = weight.numpy(), 0.0
    size = len(rows) // groups
    for group in range(groups):
        for i, j in itertools.permutations(range(group * size, (group + 1) * size), 2):
            cosine = rows[i] @ rows[j] / numpy.linalg.norm(rows[i]) / numpy.linalg.norm(rows[j])
            total += max(abs(cosine) - margin, 0.0) ** 2
    return scalar(total / (groups * size**2))


def test_orthogonality_of_the_worked_example():
    weight = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
    assert_close(of_weight(RouterOrthogonality(), weight), scalar(2 / 9), EXACT)
    whole = torch.nn.functional.normalize(weight)
    difference = whole @ whole.T - torch.eye(3)
    assert_close(of_weight(RouterOrthogonality(), weight), difference.square().sum() / 9, EXACT)


@pytest.mark.parametrize("margin", [0.0, 0.3])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_orthogonality_compares_the_rows_of_a_group(groups, margin):
    objective, weight = RouterOrthogonality(groups, margin), random(E, H)
    expected = orthogonality(weight, groups, margin)
    assert expected > 1e-3
    assert_close(of_weight(objective, weight), expected, EXACT)
    assert_close(of_weight(objective, weight * random(E, 1, seed=1).abs()), expected, EXACT)  # lengths do not matter
    check_gradient(lambda x: of_weight(objective, x), weight)


def test_orthogonality_lies_between_0_and_what_parallel_rows_have():
    for groups in (1, 2, 3):
        parallel = random(1, H) * random(E, 1, seed=1)
        assert_close(of_weight(RouterOrthogonality(groups), parallel), scalar(1 - groups / E), EXACT)
    assert of_weight(RouterOrthogonality(), torch.eye(E, dtype=torch.float64) * 3) == 0


@pytest.mark.parametrize("objective", OF_ROWS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_of_zeros_have_a_value_and_finite_gradients(objective, dtype):
    weight = random(E, H).to(dtype)
    weight[:2] = 0
    weight.requires_grad_(True)
    loss = of_weight(objective, weight)
    loss.backward()
    assert loss.isfinite() and weight.grad.isfinite().all()
    assert weight.grad[:2].eq(0).all() and weight.grad[2:].ne(0).any()
    nothing = torch.zeros(E, H, dtype=dtype, requires_grad=True)
    of_weight(objective, nothing).backward()
    assert nothing.grad.eq(0).all()


def test_short_rows_are_divided_by_eps():
    weight = torch.tensor([[1e-3, 0.0], [1.0, 0.0]], dtype=torch.float64)
    assert_close(of_weight(RouterOrthogonality(), weight), scalar(0.5), EXACT)
    assert_close(of_weight(RouterOrthogonality(eps=1e-2), weight), scalar(0.5 * 0.1**2), EXACT)
    check_gradient(lambda x: of_weight(RouterOrthogonality(eps=1e-2), x), weight)


def test_similarity_is_the_mean_distance_from_the_identity():
    weight = random(E, H)
    distances = [abs(sum(a * b) - float(i == j)) for i, a in enumerate(weight) for j, b in enumerate(weight)]
    assert_close(of_weight(RouterSimilarity(), weight), torch.stack(distances).mean(), EXACT)
    check_gradient(lambda x: of_weight(RouterSimilarity(), x), weight)
    perfect = torch.eye(E, dtype=torch.float64).requires_grad_(True)
    loss = of_weight(RouterSimilarity(), perfect)
    loss.backward()
    assert loss == 0 and perfect.grad.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_grams_are_wide_and_autocast_does_not_touch_them(dtype):
    weight = random(E, H).to(dtype)
    gram = gram_of(weight)
    assert gram.dtype == torch.float32
    assert_close(gram, weight.double() @ weight.double().T, tolerance(torch.float32, H))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gram_of(weight).equal(gram)


# ---- ExpertRouterCoupling ----


def coupling(responses, alpha):
    found = responses.tolist()
    total = 0.0
    for i, j in itertools.permutations(range(len(found)), 2):
        total += max(found[i][j] - alpha * found[i][i], 0.0) + max(found[j][i] - alpha * found[i][i], 0.0)
    return scalar(total / len(found) ** 2)


@pytest.mark.parametrize("alpha, expected", [(1.0, 0.2777778), (0.5, 0.8333333)])
def test_coupling_of_the_worked_example(alpha, expected):
    responses = torch.tensor([[3, 1, 2], [2.5, 2, 0], [1, 4, 5]], dtype=torch.float64)
    found = loss_of(ExpertRouterCoupling(alpha), Observation(router_responses=responses))
    assert found.item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
def test_coupling_compares_each_expert_with_all_others(alpha):
    responses = random(3, E, E).abs()
    layers = lambda x: [Observation(router_responses=each) for each in x]
    expected = torch.stack([coupling(each, alpha) for each in responses]).mean()
    assert expected > 0
    assert_close(loss_of(ExpertRouterCoupling(alpha), layers(responses)), expected, EXACT)
    check_gradient(lambda x: loss_of(ExpertRouterCoupling(alpha), layers(x)), responses)


def spread_by_hand(rows):
    rows = rows.double().numpy()
    found = []
    for i, row in enumerate(rows):
        others = [numpy.linalg.norm(row - other) for j, other in enumerate(rows) if j != i]
        size = numpy.linalg.norm(row)
        found.append(min(others) / (2 * size) if others and size > 0 else 0.0)
    return torch.tensor(found)


def test_rows_are_moved_as_far_as_they_stay_nearest_to_themselves():
    rows = random(40, H)
    rows[3] = 0
    rows[7] = rows[5]
    rows[8] = rows[6] + 1e-9  # a difference that a product of matrices would lose
    assert_close(spread_of(rows), spread_by_hand(rows), EXACT)
    assert spread_of(rows)[[3, 5, 7]].eq(0).all() and 0 < spread_of(rows)[6] < 1e-8
    assert spread_of(rows[:1]).tolist() == [0.0]


def test_responses_are_norms_of_what_gates_answer_to_perturbed_rows():
    weight, gate_up = random(E, H), random(E - 2, 2 * I, H, seed=1)
    factors = 1 + spread_by_hand(weight).unsqueeze(1) * uniform_of(weight)
    expected = torch.empty(E, E - 2, dtype=torch.float64)
    for i, j in itertools.product(range(E), range(E - 2)):
        expected[i, j] = (gate_up[j, :I] @ (weight[i] * factors[i])).norm()
    assert (factors - 1).abs().max() > 0.1
    assert_close(responses_of(weight, gate_up), expected, EXACT)


def test_the_gradient_of_responses_takes_the_noise_as_a_constant(monkeypatch):
    weight, gate_up, cotangent = random(E, H), random(E, 2 * I, H, seed=1), random(E, E, seed=2)
    inputs = [x.clone().requires_grad_(True) for x in (weight, gate_up)]
    found = torch.autograd.grad((responses_of(*inputs) * cotangent).sum(), inputs)
    spread, uniform = spread_of(weight), uniform_of(weight)
    monkeypatch.setattr(router_weights, "spread_of", lambda rows: spread)
    monkeypatch.setattr(router_weights, "uniform_of", lambda rows: uniform)
    check_gradient(responses_of, weight, gate_up)
    expected = torch.autograd.grad((responses_of(*inputs) * cotangent).sum(), inputs)
    for actual, wanted in zip(found, expected, strict=True):
        assert actual.equal(wanted)
    assert found[1][:, I:].eq(0).all() and found[1][:, :I].ne(0).any()  # of the gates alone


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_responses_of_narrow_weights(dtype):
    weight, gate_up = random(E, H).to(dtype), random(E, 2 * I, H, seed=1).to(dtype)
    rows = weight.float()
    perturbed = (rows * (1 + spread_of(rows).unsqueeze(1) * uniform_of(rows))).double()
    found = responses_of(weight, gate_up)
    assert found.dtype == torch.float32
    expected = torch.einsum("eh,jih->eji", perturbed, gate_up[:, :I].double()).norm(dim=2)
    assert_close(found, expected, tolerance(dtype, H * I, 2))


def test_under_autocast_gates_answer_in_its_type():
    layer, tokens = make_layer(**BOTH, dtype=torch.float32), torch.randn(4, 12)
    expected = layer(tokens)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(tokens)[1]
    assert found.router_gram.equal(expected.router_gram)
    assert found.router_responses.dtype == torch.float32
    assert_close(found.router_responses, expected.router_responses, tolerance(torch.bfloat16, 12 * 8, 3))
    assert not found.router_responses.equal(expected.router_responses)


# ---- the noise ----


def test_noise_is_a_function_of_digits():
    rows = random(E, H).float()
    assert uniform_of(rows).equal(uniform_of(rows.clone())) and uniform_of(rows).dtype == torch.float32
    after = rows.clone()
    after[0, 0] = torch.nextafter(after[0, 0], torch.tensor(9.0))
    changed = uniform_of(after) != uniform_of(rows)
    assert changed.double().mean() > 0.9
    wide = random(E, H)
    assert (uniform_of(wide) != uniform_of(wide * (1 + 1e-15))).double().mean() > 0.9


def is_distributed(sample, distribution, tests=1):
    """The test of Kolmogorov and Smirnov: whether numbers follow a distribution function. False by chance once in a
    thousand, of so many tests in all."""
    expected, number = distribution(sample.double().flatten().sort().values), sample.numel()
    ranks = torch.arange(number + 1, dtype=torch.float64) / number
    distance = torch.maximum(ranks[1:] - expected, expected - ranks[:-1]).max().item()
    return distance * math.sqrt(number) < math.sqrt(math.log(2 * tests * 1000) / 2)


def uniform(x):
    return (x + 1) / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_noise_is_uniform_in_a_weight_in_its_rows_and_in_its_columns(dtype, seed):
    noise = uniform_of(random(128, 256, seed=seed).to(dtype))
    assert noise.min() >= -1 and noise.max() < 1
    assert is_distributed(noise, uniform) and not is_distributed(noise + 0.05, uniform)
    for lines in (noise, noise.T):
        assert all(is_distributed(line, uniform, len(lines)) for line in lines)


def correlations_are_chance(noise):
    """Whether lines [N, M] of independent numbers could correlate so: √M times a correlation is about normal."""
    places = torch.triu_indices(len(noise), len(noise), 1)
    found = torch.corrcoef(noise.double())[places[0], places[1]] * math.sqrt(noise.shape[1])
    return is_distributed(found, torch.special.ndtr) and found.abs().max() < 5.5


@pytest.mark.parametrize("seed", range(3))
def test_noise_of_rows_columns_and_steps_is_independent(seed):
    rows = random(100, 200, seed=seed).float()
    noise = uniform_of(rows)
    assert correlations_are_chance(noise) and correlations_are_chance(noise.T)
    # Steps of an optimizer, and the least that can be: one bit of one weight each.
    steps, bits = [], []
    for step in range(60):
        steps.append(uniform_of(rows * (1 - 1e-3 * step)).flatten())
        changed = rows.clone()
        changed.view(torch.int32)[0, 0] += step  # the next number that there is
        bits.append(uniform_of(changed).flatten())
    assert correlations_are_chance(torch.stack(steps)) and correlations_are_chance(torch.stack(bits))


def test_noise_of_neighbours_is_independent():
    noise = uniform_of(random(64, 512).float()).double()
    pairs = {1: noise.flatten()[:-1] * noise.flatten()[1:], 512: noise[:-1] * noise[1:]}
    for product in pairs.values():  # of variance 1/9, mean 0
        assert abs(product.mean()) < 4 * (1 / 9 / product.numel()) ** 0.5


# ---- of weights alone, and beside tokens ----


def test_no_mask_or_label_is_looked_at():
    weight = random(E, H).requires_grad_(True)
    mask, labels = torch.full((3, 7), 9), torch.full((2,), -5)
    for objective in OF_ROWS:
        layer = Observation(router_gram=gram_of(weight))
        assert loss_of(objective, layer, mask, domain_ids=labels).equal(loss_of(objective, layer))
    layer = Observation(router_responses=random(E, E).abs())
    assert loss_of(ExpertRouterCoupling(), layer, mask).equal(loss_of(ExpertRouterCoupling(), layer))


def test_tokens_are_those_of_the_layers_that_have_some():
    gram, logits = gram_of(random(E, H)), random(9, E)
    keep = torch.arange(9) % 2
    objectives = Objectives({"rows": (RouterOrthogonality(), 1.0), "entropy": (RouterEntropy(), 1.0)}).eval()
    with pytest.warns(UserWarning, match="skips layers that do not offer what it needs"):
        layers = [Observation(router_gram=gram, tokens_per_expert=torch.ones(E)), Observation(logits=logits)]
        values = objectives(layers, keep)[1]
    assert_close(values["rows"], loss_of(RouterOrthogonality(), Observation(router_gram=gram)), EXACT)
    assert_close(values["entropy"], loss_of(RouterEntropy(), logits, keep), EXACT)
    beside = objectives(Observation(logits=logits, router_gram=gram), keep)[1]
    assert beside["rows"].equal(values["rows"]) and beside["entropy"].equal(values["entropy"])


def test_layers_of_several_sizes_are_a_mean():
    grams = [gram_of(random(size, H)) for size in (6, 4, 6)]
    each = [loss_of(RouterSimilarity(), Observation(router_gram=gram)) for gram in grams]
    found = loss_of(RouterSimilarity(), [Observation(router_gram=gram) for gram in grams])
    assert_close(found, torch.stack(each).mean(), EXACT)


def test_a_log_has_each_layer():
    objectives = Objectives({"rows": (RouterOrthogonality(), 1.0)})
    weights = [random(E, H, seed=seed).requires_grad_(True) for seed in range(2)]
    objectives([Observation(router_gram=gram_of(weight)) for weight in weights])
    objectives.step()
    log = objectives.log()
    for place, weight in enumerate(weights):
        assert_close(log[f"rows/layer_{place}"], orthogonality(weight.detach()), EXACT)
    assert log["rows/steps_without_effect"] == 0


def refused(sentence, function, *arguments, **options):
    with pytest.raises(ValueError) as error:
        function(*arguments, **options)
    assert str(error.value) == sentence


def test_what_is_no_gram_matrix_is_refused():
    shapes = "router_gram must be float32 or float64 and have the shape [E, E] (got "
    for gram, got in [(random(E, H), "torch.float64 [6, 5]"), (random(E, E).bfloat16(), "torch.bfloat16 [6, 6]")]:
        layer = Observation(router_gram=gram)
        refused(f"edl::RouterSimilarity: {shapes}{got})", loss_of, RouterSimilarity(), layer)
        refused(f"edl::RouterOrthogonality: {shapes}{got})", loss_of, RouterOrthogonality(), layer)
    groups = (
        "edl::RouterOrthogonality: groups must divide the number of experts into two or more each, which it compares "
        "(got {} for {})"
    )
    for number, size in ((4, 6), (6, 6), (1, 1)):
        gram = gram_of(random(size, H))
        refused(groups.format(number, size), loss_of, RouterOrthogonality(number), Observation(router_gram=gram))
    shape = (
        "edl::ExpertRouterCoupling: router_responses must have the shape [E, E_local] for two or more experts, of "
        "which those of the columns are some (got {})"
    )
    for responses, first, got in [
        (random(1, 1), 0, "[1, 1] from expert 0 on"),
        (random(2, 3), 0, "[2, 3] from expert 0 on"),
        (random(4, 2), 3, "[4, 2] from expert 3 on"),
        (random(4, 2), -1, "[4, 2] from expert -1 on"),
    ]:
        layer = Observation(router_responses=responses, first_expert=first)
        refused(shape.format(got), loss_of, ExpertRouterCoupling(), layer)


def test_what_is_no_option_is_refused():
    for make, sentence in [
        (lambda: RouterOrthogonality(0), "edl::RouterOrthogonality: groups must be at least 1 (got 0)"),
        (lambda: RouterOrthogonality(1.5), "edl::RouterOrthogonality: groups must be an integer (got 1.5)"),
        (lambda: RouterOrthogonality(margin=1.0), "edl::RouterOrthogonality: margin must be in [0, 1) (got 1.0)"),
        (lambda: RouterOrthogonality(margin="m"), "edl::RouterOrthogonality: margin must be a number (got 'm')"),
        (lambda: RouterOrthogonality(eps=0), "edl::RouterOrthogonality: eps must be finite and above 1e-18 (got 0)"),
        (
            lambda: ExpertRouterCoupling(-1.0),
            "edl::ExpertRouterCoupling: alpha must be finite and not negative (got -1.0)",
        ),
    ]:
        refused(sentence, make)


def test_weights_whose_memory_was_freed_are_refused():
    weight = random(E, H)
    weight.untyped_storage().resize_(0)
    rest = "weight must have memory (got a tensor whose storage was freed)"
    refused(f"edl::router_weights: {rest}", gram_of, weight)
    refused(f"edl::router_weights: {rest}", responses_of, weight, random(E, 2 * I, H))
    refused(f"edl::decoupled_router_step: {rest}", edl.decoupled_router_step, weight, RouterSimilarity(), 0.1)


def test_an_observation_of_nothing_is_refused():
    sentence = "edl::Objectives: observations must hold what was observed (got 2 of nothing)"
    refused(sentence, Objectives({"it": (RouterEntropy(), 1.0)}), [Observation(), Observation()])


# ---- what layers tell ----


def make_layer(**options):
    torch.manual_seed(3)
    return edl.MoELayer(12, 8, 5, 3, **{"dtype": torch.float64, **options})


def loss_of_layer(results):
    output, observed = results
    of_weights = [x for x in (observed.router_gram, observed.router_responses) if x is not None]
    return output.square().sum() + sum(x.square().sum() for x in of_weights)


def gradients(layer, call, tokens):
    layer.zero_grad()
    tokens = tokens.clone().requires_grad_()
    loss_of_layer(call(tokens)).backward()
    return [tokens.grad, *(x.grad for x in layer.parameters())]


@pytest.mark.parametrize("asked", [("router_gram",), ("router_responses",), tuple(BOTH)], ids=str)
def test_a_layer_tells_beside_the_routing(asked):
    layer, plain = make_layer(**dict.fromkeys(asked, True)), make_layer()
    tokens = torch.randn(2, 7, 12, dtype=torch.float64)
    output, observed = layer(tokens)
    expected, routing = plain(tokens)
    assert output.equal(expected)
    for name in routing._fields:
        assert getattr(observed, name).equal(getattr(routing, name))
    weight = layer.router.weight
    if "router_gram" in asked:
        assert_close(observed.router_gram, weight @ weight.T, EXACT)
    if "router_responses" in asked:
        assert observed.router_responses.equal(responses_of(weight, layer.gate_up_proj)) and observed.first_expert == 0
    for name in BOTH:
        assert (getattr(observed, name) is None) == (name not in asked)
    assert all(f"{name}=True" in repr(layer) for name in asked) and "router_gram" not in repr(plain)


@pytest.mark.parametrize("form", ["scripted", "saved", "compiled", "dynamic", "exported", "copied"])
def test_in_every_form_a_layer_tells_the_same(form):
    layer = make_layer(**BOTH, activation_gram=True)
    tokens = torch.randn(9, 12, dtype=torch.float64)
    call = layer
    if form in ("scripted", "saved"):
        call = torch.jit.script(layer)
        if form == "saved":
            file = io.BytesIO()
            torch.jit.save(call, file)
            file.seek(0)
            call = torch.jit.load(file)
    elif form in ("compiled", "dynamic"):
        call = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=form == "dynamic")
    elif form == "exported":
        call = torch.export.export(layer, (tokens,)).module()
    else:
        call = copy.deepcopy(layer)
    owner = layer if form in ("compiled", "dynamic") else call
    expected = gradients(layer, layer, tokens)
    assert all(x.ne(0).any() for x in expected)
    for actual, wanted in zip(gradients(owner, call, tokens), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


def test_compiled_by_inductor_the_noise_is_the_same():
    weight, gate_up = random(7, H), random(7, 2 * I, H, seed=1).float()

    def run(weight, gate_up):
        return responses_of(weight.float(), gate_up), uniform_of(weight.float()), uniform_of(weight)

    responses, *noise = torch.compile(run, fullgraph=True)(weight, gate_up)
    expected, *expected_noise = run(weight, gate_up)
    assert_close(responses, expected.double(), tolerance(torch.float32, H * I))
    assert all(x.equal(wanted) for x, wanted in zip(noise, expected_noise, strict=True))


def test_on_meta_there_are_shapes():
    layer = make_layer(**BOTH, device="meta")
    observed = layer(torch.empty(4, 12, device="meta", dtype=torch.float64))[1]
    assert observed.router_gram.shape == observed.router_responses.shape == (5, 5)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_replays_have_the_same_noise(use_reentrant):
    layer = make_layer(**BOTH)
    tokens = torch.randn(9, 12, dtype=torch.float64)

    def run(tokens):  # reentrant checkpointing hands on gradients of plain tensors alone
        output, observed = layer(tokens)
        return output, observed.router_gram, observed.router_responses

    def call(tokens):
        output, gram, responses = checkpoint(run, tokens, use_reentrant=use_reentrant)
        return output, Observation(router_gram=gram, router_responses=responses)

    for actual, wanted in zip(gradients(layer, call, tokens), gradients(layer, layer, tokens), strict=True):
        assert actual.equal(wanted)


def test_objectives_push_the_weights_of_layers():
    layers = [make_layer(**BOTH), make_layer(**BOTH, num_shared_experts=1)]
    objectives = Objectives({"rows": (RouterOrthogonality(), 1.0), "coupling": (ExpertRouterCoupling(), 0.5)})
    tokens = torch.randn(4, 12, dtype=torch.float64)
    total, values = objectives([layer(tokens)[1] for layer in layers])
    wanted = torch.stack([coupling(responses_of(x.router.weight, x.gate_up_proj).detach(), 1.0) for x in layers])
    assert_close(values["coupling"], wanted.mean(), EXACT)
    assert_close(values["rows"], orthogonality(layers[0].router.weight.detach()), EXACT)
    total.backward()
    for layer in layers:
        assert layer.router.weight.grad.ne(0).any() and layer.down_proj.grad is None
        assert layer.gate_up_proj.grad[:, :8].ne(0).any() and layer.gate_up_proj.grad[:, 8:].eq(0).all()


class Total(nn.Module):
    """All objectives on the weights of a layer, beside one on its tokens."""

    def __init__(self):
        super().__init__()
        self.layer = make_layer(**BOTH)
        bound = {
            repr(objective): (objective, 0.5) for objective in (RouterOrthogonality(margin=0.1), RouterSimilarity())
        }
        self.bound = Objectives({**bound, "coupling": (ExpertRouterCoupling(), 1.0), "entropy": (RouterEntropy(), 1.0)})

    def forward(self, tokens):
        output, observed = self.layer(tokens)
        return output.sum() + self.bound(observed)[0]


@pytest.mark.parametrize("form", ["compiled", "exported"])
def test_layers_and_objectives_are_one_graph(form):
    model, tokens = Total().eval(), torch.randn(9, 12, dtype=torch.float64)
    results = []
    expected = model(tokens)
    if form == "compiled":
        call, owner = torch.compile(model, fullgraph=True, backend="aot_eager"), model
    else:
        call = owner = torch.export.export(model, (tokens,)).module()
    for run, module in ((model, model), (call, owner)):
        total = run(tokens)
        results.append([total, *torch.autograd.grad(total, list(module.parameters()))])
    assert_close(results[0][0], expected, EXACT)
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


class RowsOfAnother(edl.routers.Router):
    """Has no weight of its own."""

    def __init__(self):
        super().__init__()
        self.inner = edl.routers.TopK(12, 5, 3)

    def forward(self, tokens, context: edl.RoutingContext | None = None):
        return self.inner(tokens, context)


@pytest.mark.parametrize("name", BOTH)
def test_layers_refuse_what_they_cannot_tell(name):
    sentence = (
        "edl::MoELayer: router_gram and router_responses need a router with a row for each expert, weight [E, H] (got "
        "one without)"
    )
    for router in (RowsOfAnother(), edl.routers.TopK(12, 4, 3)):
        refused(sentence, edl.MoELayer, 12, 8, 5, router=router, **{name: True})
    sentence = (
        "edl::MoELayer: output_gram, activation_gram, router_gram, router_responses are returned with the routing, "
        "they need return_routing=True (got False)"
    )
    refused(sentence, make_layer, return_routing=False, **{name: True})
    refused(f"edl::MoELayer: {name} must be True or False (got 1)", make_layer, **{name: 1})
    layer = edl.MoELayer(12, 8, 5, router=RowsOfAnother())  # not asked
    assert torch.jit.script(layer)(torch.randn(3, 12))[1].logits.shape == (3, 5)


# ---- over ranks ----


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


OVER_RANKS = {
    "coupling": (ExpertRouterCoupling(0.7), 0.5),
    "rows": (RouterOrthogonality(), 0.25),
    "similarity": (RouterSimilarity(), 1.0),
}


def assert_same_gradients(model, one):
    for reference, parameter in zip(one.parameters(), model.parameters(), strict=True):
        assert_close(whole(parameter.grad), reference.grad, 1e-11)


def spread_over_ranks(framework, replicas):
    """Experts over R ranks, their replicas, and all ranks' tokens, as one process has them."""
    mesh = init_device_mesh(
        "cpu", (replicas, dist.get_world_size() // replicas), mesh_dim_names=("replicas", "experts")
    )
    data = init_device_mesh("cpu", (dist.get_world_size(),))
    options = {**BOTH, "num_shared_experts": 1, "dtype": torch.float64}
    models = []
    for group in (None, mesh["experts"]):
        torch.manual_seed(1)
        models.append(edl.MoELayer(H, I, 8, 2, **options, expert_group=group))
    one, spread = models
    model = spread
    if framework == "FSDP2":
        expert_parallel.fully_shard_layer(spread, data, mesh["replicas"])
    elif framework == "DDP":
        expert_parallel.exclude_from_ddp(spread)
        model = DistributedDataParallel(spread)
    tokens = [random(count, H, seed=count) for count in (5, 3, 0, 7)][: dist.get_world_size()]
    objectives = Objectives(OVER_RANKS, group=dist.group.WORLD)
    for _ in range(2):  # two micro-batches
        output, observed = model(tokens[dist.get_rank()])
        assert observed.router_responses.shape == (8, 8 // mesh["experts"].size())
        (output.square().sum() + objectives(observed)[0]).backward()
        reference = sum(one(each)[0].square().sum() for each in tokens) / len(tokens)
        (reference + Objectives(OVER_RANKS)(one(tokens[0])[1])[0]).backward()
    if framework == "DDP":
        expert_parallel.average_expert_gradients(model, mesh["replicas"].get_group())
    assert_same_gradients(spread, one)


def sequence_parallel_experts():
    """Ranks with parts of the same sequences hold the experts; the framework sums their gradients."""
    world = dist.group.WORLD
    torch.manual_seed(1)
    one = edl.MoELayer(H, I, 8, 2, **BOTH, dtype=torch.float64)
    torch.manual_seed(1)
    spread = edl.MoELayer(H, I, 8, 2, **BOTH, dtype=torch.float64, expert_group=world)
    tokens = random(4, H, seed=dist.get_rank())
    Objectives(OVER_RANKS, sequence_group=world, averaging_ranks=1)(spread(tokens)[1])[0].backward()
    Objectives(OVER_RANKS)(one(tokens)[1])[0].backward()
    dist.all_reduce(spread.router.weight.grad)
    assert_close(spread.router.weight.grad, one.router.weight.grad, 1e-11)
    assert_close(whole(spread.gate_up_proj.grad), one.gate_up_proj.grad, 1e-11)


def spread_experts_in_two_passes():
    """Micro-batches are carried as whatever is summed."""
    torch.manual_seed(1)
    one = edl.MoELayer(H, I, 8, 2, **BOTH, dtype=torch.float64)
    torch.manual_seed(1)
    spread = edl.MoELayer(H, I, 8, 2, **BOTH, dtype=torch.float64, expert_group=dist.group.WORLD)
    memory = edl.DomainMemory()
    objectives = Objectives(OVER_RANKS, group=dist.group.WORLD, memory=memory)
    batches = [random(count, H, seed=dist.get_rank()) for count in (4, 1)]
    with memory.collect(), torch.no_grad():
        for tokens in batches:
            objectives(spread(tokens)[1])
    for tokens in batches:
        (objectives(spread(tokens)[1])[0] / 2).backward()
    objectives.step()
    Objectives(OVER_RANKS)(one(batches[0])[1])[0].backward()
    dist.all_reduce(spread.router.weight.grad)
    assert_close(spread.router.weight.grad / 2, one.router.weight.grad, 1e-11)
    assert_close(whole(spread.gate_up_proj.grad) / 2, one.gate_up_proj.grad, 1e-11)


def experts_on_no_rank():
    layer = edl.MoELayer(H, I, 8, 2, router_responses=True, expert_group=dist.group.WORLD)
    observed = layer(torch.randn(3, H))[1]
    sentence = (
        "edl::ExpertRouterCoupling: group and sequence_group must hold all ranks of the layer's expert_group (got 4 of "
        "8 experts on none of them)"
    )
    refused(sentence, Objectives({"it": (ExpertRouterCoupling(), 1.0)}), observed)


def rows_that_are_not_whole():
    layer = edl.MoELayer(H, I, 8, 2, router_gram=True)
    fully_shard(layer.router, mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=True)
    sentence = (
        "edl::router_weights: a router's weight must be whole where it is looked at, so shard the layer and not its "
        "router alone (got a DTensor)"
    )
    refused(sentence, layer, torch.randn(3, H))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.ModuleList(edl.MoELayer(H, I, 7, 2, **BOTH, dtype=torch.float64) for _ in range(2))

    def forward(self, tokens):
        observations = []
        for layer in self.layers:
            tokens, observed = layer(tokens)
            observations.append(observed)
        return tokens, observations


def replicated_layers_under_fsdp2():
    """The gradient of one process, and the step beside the optimizer on each rank's shard."""
    one, model = Model(), Model()
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    tokens = [random(4, H, seed=1), random(2, H, seed=2)]
    output, observed = model(tokens[dist.get_rank()])
    (output.sum() + Objectives(OVER_RANKS, group=dist.group.WORLD)(observed)[0]).backward()
    reference = sum(one(each)[0].sum() for each in tokens) / 2
    (reference + Objectives(OVER_RANKS)(one(tokens[0])[1])[0]).backward()
    assert_same_gradients(model, one)
    before = [layer.router.weight.to_local().clone() for layer in model.layers]
    for each in (one, model):
        edl.decoupled_router_step(each, RouterOrthogonality(), 0.5)
    for layer, reference, old in zip(model.layers, one.layers, before, strict=True):
        assert layer.router.weight.to_local().ne(old).any()
        assert_close(whole(layer.router.weight), reference.router.weight, EXACT)
    assert model(tokens[0])[0].isfinite().all()  # and it trains on
    torch.optim.SGD(model.parameters(), 0.1).step()


def test_spread_experts_compile_in_one_graph(group_of_one):
    torch.manual_seed(1)
    spread = edl.MoELayer(H, I, 6, 2, **BOTH, dtype=torch.float64, expert_group=group_of_one)
    tokens = random(5, H)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(copy.deepcopy(spread), fullgraph=True, backend="aot_eager")
        if torch.__version__ < (2, 12):  # where no layer with an expert_group compiles
            return
        found, expected = compiled(tokens)[1], spread(tokens)[1]
    assert_close(found.router_responses, expected.router_responses, EXACT)
    assert found.first_expert == expected.first_expert == 0


ON_TWO = [
    sequence_parallel_experts,
    spread_experts_in_two_passes,
    experts_on_no_rank,
    rows_that_are_not_whole,
    replicated_layers_under_fsdp2,
]


@pytest.mark.parametrize("check", ON_TWO, ids=lambda check: check.__name__)
def test_on_two_ranks(check):
    on_ranks(2, check)


@pytest.mark.parametrize("framework, ranks, replicas", [("DDP", 2, 1), ("DDP", 4, 2), ("FSDP2", 2, 2), ("FSDP2", 4, 2)])
def test_experts_over_ranks_are_those_of_one_process(framework, ranks, replicas):
    on_ranks(ranks, spread_over_ranks, framework, replicas)


# ---- the step beside the optimizer ----


@pytest.mark.parametrize("objective", OF_ROWS, ids=repr)
def test_step_is_rate_times_the_gradient_of_each_layer(objective):
    weights = [random(E, H, seed=seed).requires_grad_(True) for seed in range(2)]
    wanted = []
    for weight in weights:
        (gradient,) = torch.autograd.grad(of_weight(objective, weight), weight)
        wanted.append((weight - 0.3 * gradient).detach())
    with torch.no_grad():
        edl.decoupled_router_step(iter(weights), objective, 0.3)
    for weight, expected in zip(weights, wanted, strict=True):
        assert_close(weight, expected, EXACT)
        assert weight.grad is None and weight.is_leaf and weight.requires_grad
    before = weights[0].detach().clone()
    edl.decoupled_router_step(weights[0], objective, 0)
    assert weights[0].equal(before)


def test_steps_make_rows_orthogonal():
    weight = random(E, 2 * E).float()
    for _ in range(200):
        edl.decoupled_router_step(weight, RouterOrthogonality(), 2.0)
    assert of_weight(RouterOrthogonality(), weight) < 1e-6


def test_step_of_a_model_takes_every_trainable_router_once():
    torch.manual_seed(0)
    layers = [edl.MoELayer(H, I, E, 2) for _ in range(3)]
    layers += [edl.MoELayer(H, I, E, router=layers[0].router), edl.MoELayer(12, I, 5, router=RowsOfAnother())]
    layers[1].requires_grad_(False)
    model = nn.Sequential(nn.Linear(H, H), *layers)
    before = copy.deepcopy(model.state_dict())
    expected = layers[0].router.weight.detach().clone()
    edl.decoupled_router_step([expected], RouterSimilarity(), 0.1)
    edl.decoupled_router_step(model, RouterSimilarity(), 0.1)
    assert layers[0].router.weight.equal(expected)
    changed = {name for name, tensor in model.state_dict().items() if not tensor.equal(before[name])}
    assert changed == {"1.router.weight", "3.router.weight", "4.router.weight"}


def test_weights_in_16_bits_are_stepped_on_their_masters():
    weight = nn.Parameter(random(E, H).bfloat16())
    weight.main_param = random(E, H).float()
    expected = weight.main_param.clone()
    for _ in range(3):
        edl.decoupled_router_step(weight, RouterOrthogonality(), 1e-3)
        edl.decoupled_router_step(expected, RouterOrthogonality(), 1e-3)
    assert weight.main_param.equal(expected) and weight.equal(expected.bfloat16())


def test_what_cannot_be_stepped_is_refused():
    objective, op = RouterOrthogonality(), "edl::decoupled_router_step:"
    wide = (
        f"{op} a router's weight must be float32 or float64, or have a whole float32 master as main_param, as its type "
        "loses small steps (got torch.bfloat16 {})"
    )
    narrow, sharded, held_elsewhere = (nn.Parameter(random(E, H).bfloat16()) for _ in range(3))
    sharded.main_param, sharded.main_param_sharded = torch.zeros(E * H // 2), True
    held_elsewhere.main_param, held_elsewhere.main_param_sharded = None, True
    others = "give the weights of others (got Linear with 0 layers)"
    shaped = f"{op} a router's weight must be floating-point and have the shape [E, H] (got {{}})"
    for weights, sentence in [
        (narrow, wide.format("without")),
        (sharded, wide.format("with a sharded master")),
        (held_elsewhere, wide.format("with a sharded master")),
        (random(E), shaped.format("torch.float64 [6]")),
        (torch.ones(E, H, dtype=torch.int64), shaped.format("torch.int64 [6, 5]")),
        ([None], shaped.format("NoneType")),
        (7, f"{op} weights must be a model or routers' weights (got int)"),
        (
            nn.Linear(H, E),
            f"{op} a model must have an edl.MoELayer whose router has a weight [E, H], {others}",
        ),
    ]:
        refused(sentence, edl.decoupled_router_step, weights, objective, 0.1)
    weight = random(E, H)
    refused(
        f"{op} objective must be a RouterOrthogonality or a RouterSimilarity (got ExpertRouterCoupling)",
        edl.decoupled_router_step,
        weight,
        ExpertRouterCoupling(),
        0.1,
    )
    for rate in (-0.1, float("nan"), float("inf")):
        sentence = f"{op} rate must be finite and not negative (got {rate})"
        refused(sentence, edl.decoupled_router_step, weight, objective, rate)
    first, second = random(E, H), random(E, H)
    second[2, 1] = float("nan")
    sentence = f"{op} a router's weight must be finite (got NaN or infinity)"
    refused(sentence, edl.decoupled_router_step, [first, second], objective, 0.1)
    assert first.equal(random(E, H))
