"""Objectives on what experts answer: each against its equation, computed from rows in NumPy, and against finite
differences through the layer; empty slots, padding, one expert per token, ranks that share experts."""

import functools
import re

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from tolerances import assert_close, tolerance

import edl
from edl import expert_parallel, reference
from edl.objectives import ActivationCosine, ExpertOrthogonality, Objectives
from edl.routing import Choice, Observation

T, K, H = 11, 4, 7
EXACT = tolerance(torch.float64, 64)
NAN = float("nan")
WORKED = [[1.0, 0, 0], [1, 1, 0], [0, 2, 0]]
OBJECTIVES = {
    "orthogonality": ExpertOrthogonality(),
    "orthogonality, eps": ExpertOrthogonality(eps=0.5),
    "cosines of outputs": ExpertOrthogonality(normalize=True),
    "orthogonality of the code": ExpertOrthogonality("released_code"),
    "cosines of activations": ActivationCosine(),
}
each_objective = pytest.mark.parametrize("name", OBJECTIVES)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram_of(rows):
    return rows @ rows.mT


def observation(gram):
    return Observation(output_gram=gram, activation_gram=gram)


def loss_of(objective, layers, *masks):
    layers = layers if isinstance(layers, list) else [layers]
    return Objectives({"it": (objective, 1.0)}).eval()([observation(gram) for gram in layers], *masks)[0]


# ---- by NumPy, from a token's rows [K, H] ----


def equation(rows, eps=1e-6):
    total = 0.0
    for j, x in enumerate(rows):
        for k, y in enumerate(rows):
            if j != k and y.any():
                total += np.sum((x @ y / (y @ y + eps) * y) ** 2)
    return total


def squared_cosines(rows):
    long = [x for x in rows if x.any()]
    return [(x @ y) ** 2 / (x @ x * (y @ y)) for j, x in enumerate(long) for y in long[:j]]


def released_code(rows, eps=1e-6):
    total = 0.0
    for own, x in enumerate(rows):
        units = []
        for other in np.delete(rows, own, axis=0):
            for unit in units:
                other = other - (other @ unit) * unit
            units.append(other / (np.linalg.norm(other) + eps))
        total += sum(np.sum(((x @ unit) * unit) ** 2) for unit in units)
    return total / len(rows)


BY_NUMPY = {
    "orthogonality": equation,
    "orthogonality, eps": functools.partial(equation, eps=0.5),
    "cosines of outputs": lambda rows: 2 * sum(squared_cosines(rows)),
    "orthogonality of the code": released_code,
    "cosines of activations": lambda rows: np.mean(squared_cosines(rows) or 0.0),
}


def rows_of_every_kind():
    """Of tokens whose experts all answer, and of some without: of one slot, of all but one, of all."""
    rows = random(T, K, H)
    rows[3, 1] = 0
    rows[4, 1:] = 0
    rows[5] = 0
    rows[6, 2] = 0
    rows[6, 0] *= 1e-3
    return rows


@each_objective
def test_it_is_the_mean_over_tokens_of_its_equation(name):
    rows = rows_of_every_kind()
    keep = torch.arange(T) % 5 > 0
    expected = np.mean([BY_NUMPY[name](x) for x in rows[keep].numpy()])
    found = loss_of(OBJECTIVES[name], gram_of(rows), keep)
    assert_close(found, torch.tensor(expected), 1e-12)
    halves = [gram_of(rows), gram_of(0.5 * rows.flip(0))]
    of_layers = [loss_of(OBJECTIVES[name], half, keep) for half in halves]
    assert of_layers[0] != of_layers[1]
    assert_close(loss_of(OBJECTIVES[name], halves, keep), sum(of_layers) / 2, EXACT)


def test_the_worked_example():
    gram = gram_of(torch.tensor([WORKED], dtype=torch.float64))
    assert loss_of(ExpertOrthogonality(eps=0.0), gram).item() == pytest.approx(4.5, rel=1e-12)
    assert loss_of(ExpertOrthogonality(normalize=True), gram).item() == pytest.approx(2.0, rel=1e-12)
    assert loss_of(ExpertOrthogonality("released_code"), gram).item() == pytest.approx(2.33332, abs=5e-6)
    assert loss_of(ExpertOrthogonality("released_code", eps=0.0), gram).item() == pytest.approx(7 / 3, rel=1e-12)
    assert loss_of(ActivationCosine(), gram).item() == pytest.approx(1 / 3, rel=1e-12)


def test_the_code_from_inner_products_is_the_code_on_rows():
    """Value and gradient in the rows, also of two experts that answer the same."""
    rows = random(T, K, H, seed=1)
    rows[2, 3] = rows[2, 0]
    rows[3, 1] = 0
    leaves = [rows.clone().requires_grad_(True) for _ in range(2)]
    expected = reference.projections_on_others(leaves[0]).mean()
    found = loss_of(ExpertOrthogonality("released_code"), gram_of(leaves[1]))
    assert_close(found, expected, 1e-9)
    wanted, gradient = (torch.autograd.grad(loss, x)[0] for loss, x in ((expected, leaves[0]), (found, leaves[1])))
    clear = torch.arange(T) != 2  # where outputs are dependent, it hangs on how sums are rounded
    assert_close(gradient[clear], wanted[clear], 1e-9)
    assert gradient.isfinite().all()


def test_of_two_experts_the_code_is_half_of_the_equation():
    gram = gram_of(random(T, 2, H, seed=2))
    of_equation = loss_of(ExpertOrthogonality(eps=0.0), gram)
    assert_close(loss_of(ExpertOrthogonality("released_code", eps=0.0), gram), of_equation / 2, 1e-12)
    gram = gram_of(random(T, 3, H, seed=2))
    assert (loss_of(ExpertOrthogonality("released_code"), gram) - loss_of(ExpertOrthogonality(), gram) / 3).abs() > 0.01


def test_only_the_equation_sees_the_lengths_of_outputs():
    rows, factors = random(T, K, H, seed=3), torch.tensor([1e-4, 3.0, 1.0, 200.0]).double()
    scaled = rows * factors[:, None]
    for objective in (ExpertOrthogonality(normalize=True), ActivationCosine()):
        assert_close(loss_of(objective, gram_of(scaled)), loss_of(objective, gram_of(rows)), 1e-12)
    grown = loss_of(ExpertOrthogonality(eps=0.0), gram_of(3 * rows))
    assert_close(grown, 9 * loss_of(ExpertOrthogonality(eps=0.0), gram_of(rows)), 1e-12)


@each_objective
def test_orthogonal_rows_have_no_loss(name):
    rows = torch.linalg.qr(random(H, H))[0][:K].unsqueeze(0)
    assert loss_of(OBJECTIVES[name], gram_of(rows)) < 1e-20


# ---- through the layer ----


class _Given(edl.routers.Router):
    """Choices that no finite difference changes: with slots without an expert or weight, and an expert unused."""

    def __init__(self, top_k):
        super().__init__()
        generator = torch.Generator().manual_seed(top_k)
        experts = torch.stack([torch.randperm(5, generator=generator)[:top_k] for _ in range(5)])
        experts[1, 0] = 6  # of E = 6 experts none
        experts[2] = 6
        weights = torch.rand(5, top_k, generator=generator, dtype=torch.float64) + 0.1
        weights[3, -1] = 0
        self.experts, self.weights = experts, weights

    def forward(self, tokens, context=None):
        return Choice(tokens.new_zeros(len(tokens), 6), self.weights, self.experts)


@each_objective
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_gradient_is_that_of_finite_differences_through_the_layer(name, top_k):
    torch.manual_seed(4)
    asked = "activation_gram" if name == "cosines of activations" else "output_gram"
    layer = edl.MoELayer(5, 4, 6, router=_Given(top_k), dtype=torch.float64, **{asked: True})
    bound = Objectives({"it": (OBJECTIVES[name], 1.0)}).eval()
    keep = torch.arange(5) != 4
    inputs = random(5, 5, seed=5), layer.gate_up_proj.detach(), layer.down_proj.detach()

    def total(tokens, gate_up, down):
        parameters = {"gate_up_proj": gate_up, "down_proj": down}
        _, observed = torch.func.functional_call(layer, parameters, (tokens,))
        return bound(observed, keep)[0]

    assert (total(*inputs) == 0) == (top_k == 1)
    assert torch.autograd.gradcheck(total, [x.clone().requires_grad_(True) for x in inputs], atol=1e-7, rtol=1e-6)


def with_experts_on_two_ranks():
    tokens, keep = random(9, 8, seed=6), torch.arange(9) % 4 > 0
    layers = []
    for group in (None, dist.group.WORLD):
        torch.manual_seed(7)
        layers.append(edl.MoELayer(8, 6, 4, 3, dtype=torch.float64, output_gram=True, expert_group=group))
    one, spread = layers
    mine = slice(0, 5) if dist.get_rank() == 0 else slice(5, 9)
    objectives = {name: (each, 0.5) for name, each in OBJECTIVES.items() if isinstance(each, ExpertOrthogonality)}
    expected, values = Objectives(objectives)(one(tokens)[1], keep)
    expected.backward()
    found, of_ranks = Objectives(objectives, dist.group.WORLD)(spread(tokens[mine])[1], keep[mine])
    found.backward()
    expert_parallel.average_expert_gradients(spread)
    for name, value in of_ranks.items():
        assert_close(value, values[name], 1e-12)
    for name in ("gate_up_proj", "down_proj"):
        wanted, gradient = getattr(one, name).grad, getattr(spread, name).grad.full_tensor()
        assert wanted.abs().max() > 0
        assert_close(gradient, wanted, 1e-12)


def test_experts_spread_over_ranks_have_the_gradient_of_one_process():
    on_ranks(2, with_experts_on_two_ranks)


@pytest.mark.parametrize("asked", ["output_gram", "activation_gram", "router_responses", "return_routing"])
@pytest.mark.parametrize("dimensions", [(1, 2), (2, 1)], ids=["rows", "columns"])
def test_tensor_parallel_experts_are_refused(group_of_one, asked, dimensions):
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (1,))
    layer = edl.MoELayer(8, 6, 4, 2, **{asked: True})
    for name, dimension in zip(("gate_up_proj", "down_proj"), dimensions):
        sharded = distribute_tensor(getattr(layer, name).detach(), mesh, [Shard(dimension)])
        setattr(layer, name, torch.nn.Parameter(sharded))
    with pytest.raises(ValueError) as error:
        layer(torch.randn(3, 8))
    assert str(error.value) == (
        "edl::MoELayer: experts must be whole where the layer runs, so spread them by expert_group, not by tensor "
        "parallelism, and call the module that FSDP2 gathers, not the layer inside (got a DTensor)"
    )


# ---- every objective ----


@functools.cache
def batch():
    return gram_of(torch.stack([rows_of_every_kind(), random(T, K, H, seed=8)])), torch.arange(T) % 4 > 0


@each_objective
def test_padding_is_not_read(name):
    grams, keep = batch()
    losses, gradients = [], []
    for content in (NAN, torch.inf, 7.0):
        x = grams.masked_fill(~keep[:, None, None], content).requires_grad_(True)
        losses.append(loss_of(OBJECTIVES[name], list(x), keep))
        gradients.append(torch.autograd.grad(losses[-1], x)[0])
        assert losses[-1] == losses[0] and losses[0].isfinite() and losses[0] > 0
        assert gradients[-1].equal(gradients[0]) and gradients[-1].isfinite().all()
        assert gradients[-1][:, ~keep].eq(0).all() and gradients[-1][:, keep].ne(0).any()


@each_objective
def test_nothing_that_counts_is_0_and_has_no_effect(name):
    for grams, keep in (
        (batch()[0], torch.zeros(T, dtype=torch.bool)),
        (random(2, T, 1, 1).square(), batch()[1]),  # one expert per token
        (random(2, 0, K, K), torch.zeros(0, dtype=torch.bool)),
    ):
        x = grams.clone().requires_grad_(True)
        bound = Objectives({"it": (OBJECTIVES[name], 1.0)})
        total, _ = bound([observation(each) for each in x], keep)
        total.backward()
        assert total == 0 and x.grad.eq(0).all() and not bound.has_effect["it"]
        assert bound.log()["it_loss"].isnan()


@each_objective
@pytest.mark.parametrize("content", [NAN, torch.inf])
def test_what_counts_and_is_not_finite_is_not_hidden(name, content):
    rows, keep = random(T, K, H), torch.ones(T, dtype=torch.bool)
    rows[3, 2] = content
    assert loss_of(OBJECTIVES[name], gram_of(rows), keep).isnan()


@each_objective
def test_a_mask_value_that_is_not_allowed_is_refused(name):
    for size in (1, K):
        with pytest.raises(IndexError):
            loss_of(OBJECTIVES[name], gram_of(random(T, size, H)), torch.full((T,), 2))


@each_objective
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_types_give_what_float64_does(name, dtype):
    grams, keep = batch()
    stored = grams[1].to(dtype)
    found = loss_of(OBJECTIVES[name], stored, keep)
    assert found.dtype == torch.float32
    assert_close(found, loss_of(OBJECTIVES[name], stored.double(), keep), tolerance(torch.float32, T * K * K))


@each_objective
def test_short_rows_without_eps_are_finite(name):
    """Products that float32 can hold, their squares not."""
    objective = OBJECTIVES[name]
    if isinstance(objective, ExpertOrthogonality):
        objective = ExpertOrthogonality(objective.variant, objective.normalize, eps=0.0)
    rows = random(T, K, H, seed=9)
    gram = gram_of((1e-10 * rows).float()).requires_grad_(True)
    loss = loss_of(objective, gram)
    assert_close(loss, loss_of(objective, gram_of(1e-10 * rows)), 1e-5)
    assert loss > 0 and torch.autograd.grad(loss, gram)[0].isfinite().all()


class _Step(torch.nn.Module):
    """A layer with its objectives."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(10)
        self.layer = edl.MoELayer(8, 6, 5, 3, dtype=torch.float64, output_gram=True, activation_gram=True)
        self.bound = Objectives({name: (objective, 1.0) for name, objective in OBJECTIVES.items()}).eval()

    def forward(self, tokens, keep):
        return self.bound(self.layer(tokens)[1], keep)[0]


@pytest.mark.parametrize("form", ["compiled", "exported"])
def test_with_their_layer_they_are_compiled_and_exported(form):
    step, tokens, keep = _Step(), random(9, 8, seed=11), torch.arange(9) % 4 > 0
    if form == "compiled":
        call, owner = torch.compile(step, fullgraph=True, backend="aot_eager"), step
    else:
        call = owner = torch.export.export(step, (tokens, keep)).module()
    found = []
    for each, parameters in ((step, step), (call, owner)):
        parameters.zero_grad()
        total = each(tokens, keep)
        total.backward()
        by_name = dict(parameters.named_parameters())
        found.append((total, *(by_name[f"layer.{name}"].grad.clone() for name in ("gate_up_proj", "down_proj"))))
    for expected, actual in zip(*found):
        assert expected.abs().max() > 0
        assert_close(actual, expected, 1e-12)


REFUSED = {
    "edl::ExpertOrthogonality: variant must be one of ['equation', 'released_code'] (got 'code')": lambda: (
        ExpertOrthogonality("code")
    ),
    "edl::ExpertOrthogonality: normalize must be True or False (got 1)": lambda: ExpertOrthogonality(normalize=1),
    "edl::ExpertOrthogonality: normalize is an option of variant='equation' (got variant='released_code')": lambda: (
        ExpertOrthogonality("released_code", normalize=True)
    ),
    "edl::ExpertOrthogonality: eps must be finite and not negative (got nan)": lambda: ExpertOrthogonality(eps=NAN),
    "edl::ExpertOrthogonality: eps must be a number (got '0')": lambda: ExpertOrthogonality(eps="0"),
    "edl::ExpertOrthogonality: output_gram must be floating and have the shape [T, K, K] of the 5 tokens (got "
    "[5, 2, 3] torch.float32)": lambda: loss_of(ExpertOrthogonality(), torch.zeros(5, 2, 3)),
    "edl::ExpertOrthogonality: output_gram must be floating and have the shape [T, K, K] of the 5 tokens (got "
    "[4, 2, 2] torch.float32)": lambda: loss_of(ExpertOrthogonality(), [torch.zeros(5, 2, 2), torch.zeros(4, 2, 2)]),
    "edl::ActivationCosine: activation_gram must be floating and have the shape [T, K, K] of the 5 tokens (got "
    "[5, 2, 2] torch.int64)": lambda: loss_of(ActivationCosine(), torch.zeros(5, 2, 2, dtype=torch.int64)),
    "edl::Objectives: activation_gram must have the shape [T, K, K] (got [5, 4])": lambda: loss_of(
        ActivationCosine(), torch.zeros(5, 4)
    ),
    "edl::Objectives: a layer must offer what 'it' needs, output_gram (got 1 without)": lambda: Objectives(
        {"it": (ExpertOrthogonality(), 1.0)}
    )(Observation(logits=torch.zeros(5, 4))),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_refused_with_a_sentence(sentence):
    with pytest.raises(ValueError, match=re.escape(sentence) + "$"):
        REFUSED[sentence]()
