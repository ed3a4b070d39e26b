"""How alike a token's experts answer: against NumPy, by differences, and without work where it is not asked for."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import edl
from edl import ops

NAMES = ["tokens", "weights", "gate_up", "down"]


def arguments(num_tokens=7, hidden_size=5, intermediate_size=4, num_experts=6, top_k=3, seed=0):
    """Empty experts, a sentinel, a choice of weight 0, and two choices of one expert, whose rows are parallel."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    experts = torch.randint(0, num_experts - 2, (num_tokens, top_k), generator=generator)
    experts[0] = 1
    experts[1, 0] = num_experts  # no expert
    weights = normal(num_tokens, top_k)
    weights[2, top_k - 1] = 0
    row_order, offsets = ops.sort_by_expert(experts, num_experts)
    gate_up, down = (
        normal(num_experts, 2 * intermediate_size, hidden_size),
        normal(num_experts, hidden_size, intermediate_size),
    )
    return experts, (normal(num_tokens, hidden_size), weights, row_order, offsets, gate_up, down)


def by_numpy(experts, tokens, weights, gate_up, down):
    """Gram matrices [T, K, K] of outputs and activations, choice by choice."""
    num_tokens, top_k = experts.shape
    outputs = np.zeros((num_tokens, top_k, down.shape[1]))
    activations = np.zeros((num_tokens, top_k, down.shape[2]))
    for t in range(num_tokens):
        for k in range(top_k):
            expert = experts[t, k]
            if expert < len(down) and weights[t, k] != 0:
                gate, up = np.split(gate_up[expert] @ tokens[t], 2)
                activations[t, k] = gate / (1 + np.exp(-gate)) * up
                outputs[t, k] = down[expert] @ activations[t, k]
    return [np.einsum("tjh,tkh->tjk", x, x) for x in (outputs, activations)]


def mean_squared_cosines(gram):
    values = []
    for products in gram:
        squares = [
            products[j, k] ** 2 / (products[j, j] * products[k, k])
            for j in range(len(products))
            for k in range(j)
            if products[j, j] > 0 and products[k, k] > 0
        ]
        values.append(np.mean(squares) if squares else 0.0)
    return np.array(values)


@pytest.mark.parametrize("top_k", [1, 2, 3, 6])
def test_equals_numpy(top_k):
    experts, given = arguments(top_k=top_k)
    tokens, weights, _, _, gate_up, down = given
    expected = by_numpy(*(x.numpy() for x in (experts, tokens, weights, gate_up, down)))
    output, *grams = ops.expert_mlp_with_gram(*given, output_gram=True, activation_gram=True)
    assert output.equal(ops.expert_mlp(*given))
    for gram, wanted in zip(grams, expected, strict=True):
        assert gram.equal(gram.mT)
        np.testing.assert_allclose(gram.numpy(), wanted, rtol=1e-12, atol=1e-12)
        cosines = ops.mean_squared_cosine(gram)
        np.testing.assert_allclose(cosines.numpy(), mean_squared_cosines(wanted), rtol=1e-12, atol=1e-12)
    if top_k == 2:
        assert ops.mean_squared_cosine(grams[1])[0] == pytest.approx(1)  # one expert twice


def objective_by_numpy(experts, arrays, cotangents):
    """A function of both statistics and of the output, of which differences are taken."""
    tokens, weights, gate_up, down = arrays
    of_outputs, of_activations = by_numpy(experts, tokens, weights, gate_up, down)
    total = (of_outputs * cotangents[0]).sum() + (mean_squared_cosines(of_activations) * cotangents[1]).sum()
    for t in range(len(tokens)):
        for k in range(experts.shape[1]):
            expert = experts[t, k]
            if expert < len(down):
                gate, up = np.split(gate_up[expert] @ tokens[t], 2)
                row = down[expert] @ (gate / (1 + np.exp(-gate)) * up)
                total += weights[t, k] * (row * cotangents[2][t]).sum()
    return total


def test_gradients_are_those_of_differences():
    experts, (tokens, weights, row_order, offsets, gate_up, down) = arguments(num_tokens=4, hidden_size=3)
    leaves = [x.clone().requires_grad_() for x in (tokens, weights, gate_up, down)]
    output, of_outputs, of_activations = ops.expert_mlp_with_gram(
        leaves[0], leaves[1], row_order, offsets, leaves[2], leaves[3], output_gram=True, activation_gram=True
    )
    generator = np.random.default_rng(5)
    cotangents = [generator.normal(size=shape) for shape in (of_outputs.shape, of_outputs.shape[:1], output.shape)]
    values = of_outputs, ops.mean_squared_cosine(of_activations), output
    loss = sum((value * torch.from_numpy(cotangent)).sum() for value, cotangent in zip(values, cotangents))
    arrays = [x.detach().numpy().copy() for x in leaves]
    assert loss.item() == pytest.approx(objective_by_numpy(experts.numpy(), arrays, cotangents), rel=1e-12)
    loss.backward()
    step = 3e-4
    for leaf, array, name in zip(leaves, arrays, NAMES):
        for place in np.ndindex(array.shape):
            if name == "weights" and array[place] == 0:
                continue  # where a choice begins to take part, the Gram matrix jumps
            kept, slope = array[place], 0.0
            for steps, factor in ((1, 8), (-1, -8), (2, -1), (-2, 1)):  # of fourth order
                array[place] = kept + steps * step
                slope += factor * objective_by_numpy(experts.numpy(), arrays, cotangents) / (12 * step)
            array[place] = kept
            assert leaf.grad[place].item() == pytest.approx(slope, rel=1e-7, abs=1e-8), (name, place)


@pytest.mark.parametrize("asked", ["output_gram", "activation_gram"])
def test_a_gradient_of_the_statistic_alone(asked):
    _, given = arguments()
    together = [x.clone().requires_grad_() if x.is_floating_point() else x for x in given]
    alone = [x.clone().requires_grad_() if x.is_floating_point() else x for x in given]
    results = ops.expert_mlp_with_gram(*together, output_gram=True, activation_gram=True)
    place = 1 if asked == "output_gram" else 2
    cotangent = torch.randn(results[place].shape, dtype=torch.float64)
    (results[place] * cotangent).sum().backward()
    results = ops.expert_mlp_with_gram(*alone, **{asked: True})
    assert results[3 - place].numel() == 0
    (results[place] * cotangent).sum().backward()
    for one, other in zip(together, alone):
        if one.is_floating_point():
            assert one.grad.allclose(other.grad, rtol=1e-12, atol=1e-12)
    assert (together[1].grad == 0).all()  # a Gram matrix is one before the weights


GRAMS = {"output_gram": 1, "activation_gram": 2}  # to their places in the results


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("used", [[], ["output_gram"], ["activation_gram"], list(GRAMS)], ids=str)
def test_what_is_recomputed_gives_the_same_bits(used, dtype):
    """Whichever of the matrices have gradients, the backward pass has what it needs; nothing is saved for it."""
    _, given = arguments(num_tokens=40, hidden_size=33, intermediate_size=70)
    leaves = [(x / 8).to(dtype).requires_grad_() if x.is_floating_point() else x for x in given]  # no overflow
    gradients, saved = [], []
    for recomputes in (False, True):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            results = ops.expert_mlp_with_gram(*leaves, True, True, recompute_activations=recomputes)
        loss = sum(x.float().square().sum() for x in (results[0], *(results[GRAMS[name]] for name in used)))
        gradients.append(torch.autograd.grad(loss, [x for x in leaves if x.requires_grad]))
    assert {x.data_ptr() for x in saved} == {x.data_ptr() for x in leaves}
    assert all(map(torch.equal, *gradients))


def test_frozen_arguments_cost_nothing_where_all_else_is_recomputed():
    _, given = arguments()
    _, *saved = torch.ops.edl._expert_mlp_forward(*given, True, True)
    grads = torch.randn(7, 5, dtype=torch.float64), *torch.randn(2, 7, 3, 3, dtype=torch.float64).unbind()
    for needed in torch.eye(4, dtype=torch.bool).tolist():
        kept = torch.ops.edl._expert_mlp_backward(*grads, *given, *saved[:2], needed)
        again = torch.ops.edl._expert_mlp_backward(*grads, *given, None, None, needed)
        assert [x.numel() > 0 for x in again] == needed and all(map(torch.equal, kept, again))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_takes_no_part_may_hold_nan(dtype):
    experts, given = arguments()
    given = [x.to(dtype) if x.is_floating_point() else x for x in given]
    tokens, weights, row_order, offsets, gate_up, down = given
    clean = ops.expert_mlp_with_gram(*given, output_gram=True, activation_gram=True)
    own = experts[2, 2].item()
    others = experts.clone()
    others[2, 2] = 99
    row_order, offsets = ops.sort_by_expert(torch.where(experts == own, 5, experts).clamp(max=6), 6)
    weights = torch.where(experts == own, 0.0, weights)  # all choices of this expert weigh 0, and it holds NaN
    gate_up, down = gate_up.clone(), down.clone()
    gate_up[5], down[5] = torch.nan, torch.nan
    leaves = [x.clone().requires_grad_() for x in (tokens, weights, gate_up, down)]
    results = ops.expert_mlp_with_gram(
        leaves[0], leaves[1], row_order, offsets, leaves[2], leaves[3], output_gram=True, activation_gram=True
    )
    for result, before in zip(results[1:], clean[1:]):
        assert result.isfinite().all()
        takes_part = (experts != own) & (weights != 0) & (experts < 6)
        pairs = takes_part.unsqueeze(1) & takes_part.unsqueeze(2)
        assert result[pairs].equal(before[pairs]) and (result[~pairs] == 0).all()
    sum(result.float().sum() for result in results).backward()
    for leaf, name in zip(leaves, NAMES):
        if name != "weights":  # whose gradient alone reads such rows
            assert leaf.grad.isfinite().all(), name


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_not_asked_for_it_is_no_work():
    layer = edl.MoELayer(8, 6, 4, 2)
    with Operators() as operators:
        output, _ = layer(torch.randn(5, 8))
        output.sum().backward()
    assert not [name for name in operators.names if "gram" in name]


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)], ids=str
)
def test_in_other_types_it_is_the_same_within_their_rounding(dtype, tolerance):
    _, given = arguments(num_tokens=40, hidden_size=64, intermediate_size=48)
    cotangent = torch.randn(40, 3, 3)

    def statistics_and_gradients(given):
        leaves = [x.requires_grad_() for x in given if x.is_floating_point()]
        grams = ops.expert_mlp_with_gram(*given, output_gram=True, activation_gram=True)[1:]
        gradients = (torch.autograd.grad((gram * cotangent).sum(), leaves, retain_graph=True) for gram in grams)
        return grams, [gradient for each in gradients for gradient in each]

    narrow = [((x / 4).to(dtype) if x.is_floating_point() else x) for x in given]  # gradients below 65504
    wide = [x.detach().double() if x.is_floating_point() else x for x in narrow]
    grams, gradients = statistics_and_gradients(narrow)
    expected_grams, expected_gradients = statistics_and_gradients(wide)
    assert all(gram.dtype == torch.float32 for gram in grams)
    for actual, expected in zip((*grams, *gradients), (*expected_grams, *expected_gradients), strict=True):
        assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(
    "gram, got", [(torch.zeros(3, 3), "[3, 3] torch.float32"), (torch.zeros(2, 3, 4), "[2, 3, 4] torch.float32")]
)
def test_cosines_are_of_gram_matrices(gram, got):
    with pytest.raises(ValueError) as error:
        ops.mean_squared_cosine(gram)
    rule = "edl::mean_squared_cosine: gram must have the shape [T, K, K] and be floating"
    assert str(error.value) == f"{rule} (got {got})"


def test_cosines_hold_for_rows_of_any_length():
    rows = torch.tensor([[1.0, 0.0], [0.0, 1e-18], [3e15, 0.0], [0.0, 0.0]])
    gram = ops.token_gram(rows, None, torch.arange(4, dtype=torch.int32), 4)
    assert ops.mean_squared_cosine(gram).tolist() == pytest.approx([1 / 3])


def test_cosines_do_not_hide_what_is_no_number():
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [torch.nan, 1.0]])
    gram = ops.token_gram(rows, None, torch.arange(3, dtype=torch.int32), 3)
    assert ops.mean_squared_cosine(gram).isnan().all()
