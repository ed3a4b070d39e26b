"""The experts: sentinels, empty experts, frozen parameters, what is saved, and properties of the sum."""

import itertools

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from tolerances import assert_close, tolerance

from edl import ops, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def make(
    num_tokens=20,
    hidden_size=12,
    intermediate_size=10,
    num_experts=6,
    top_k=2,
    dtype=torch.float64,
    experts=None,
    device="cpu",
):
    """Arguments of expert_mlp, with gradients on all that have one."""
    if experts is None:
        experts = torch.rand(num_tokens, num_experts).argsort(-1)[:, :top_k]
    row_order, offsets = ops.sort_by_expert(experts, num_experts)
    tokens, weights = torch.randn(num_tokens, hidden_size), torch.rand(experts.shape)
    gate_up = torch.randn(num_experts, 2 * intermediate_size, hidden_size) * hidden_size**-0.5
    down = torch.randn(num_experts, hidden_size, intermediate_size) * intermediate_size**-0.5
    floats = [x.to(device, dtype).requires_grad_() for x in (tokens, weights, gate_up, down)]
    return floats[0], floats[1], row_order.to(device), offsets.to(device), floats[2], floats[3]


def gradients(arguments, output=None):
    output = ops.expert_mlp(*arguments) if output is None else output
    leaves = [x for x in arguments if x.requires_grad]
    return torch.autograd.grad(
        (output.float() * torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)).sum(), leaves
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_experts_without_tokens_get_exact_zeros(dtype, device):
    experts = torch.randint(2, 4, (20, 2))
    arguments = make(experts=experts, dtype=dtype, device=device)
    _, _, grad_gate_up, grad_down = gradients(arguments)
    for gradient in (grad_gate_up, grad_down):
        assert (gradient[[0, 1, 4, 5]] == 0).all()
        assert (gradient[2:4] != 0).any() and gradient.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sentinels_contribute_zeros_and_get_zero_gradients(dtype, device):
    experts = torch.rand(20, 6).argsort(-1)[:, :3]
    experts[::3, 1] = 6
    experts[4] = 6
    arguments = make(experts=experts, dtype=dtype, device=device)
    experts = experts.to(device)
    output = ops.expert_mlp(*arguments)
    assert (output[4] == 0).all()
    grad_tokens, grad_weights, *_ = gradients(arguments, output)
    assert (grad_tokens[4] == 0).all()
    assert (grad_weights[experts == 6] == 0).all() and (grad_weights[experts != 6] != 0).all()
    # What a sentinel's weight is does not matter, not even NaN.
    weights = arguments[1].detach().masked_fill(experts == 6, float("nan"))
    assert ops.expert_mlp(arguments[0], weights, *arguments[2:]).equal(output)


def test_all_slots_sentinels(device):
    arguments = make(experts=torch.full((7, 2), 6), num_tokens=7, device=device)
    output = ops.expert_mlp(*arguments)
    assert output.shape == (7, 12) and (output == 0).all()
    assert all((gradient == 0).all() for gradient in gradients(arguments, output))


def test_frozen_arguments_get_no_gradient_and_cost_none():
    arguments = make()
    everything = gradients(arguments)
    saved = torch.ops.edl._expert_mlp_forward(*arguments, False, False)[1].detach()
    grad = torch.randn(20, 12, dtype=torch.float64)
    detached = [x.detach() for x in arguments]
    for i, position in enumerate((0, 1, 4, 5)):
        frozen = [x.detach() if p != position else x for p, x in enumerate(arguments)]
        needed = [j == i for j in range(4)]
        for recomputes in (False, True):
            (alone,) = gradients(frozen, ops.expert_mlp(*frozen, recomputes))
            assert alone.equal(everything[i])
            kept = None if recomputes else saved
            results = torch.ops.edl._expert_mlp_backward(grad, None, None, *detached, kept, None, needed)
            assert [x.numel() > 0 for x in results] == needed


def test_what_is_saved_for_the_backward_pass(device):
    arguments = make(dtype=torch.bfloat16, device=device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        ops.expert_mlp(*arguments)
    own = [x for x in saved if not any(x is y or x.data_ptr() == y.data_ptr() for y in arguments)]
    assert [tuple(x.shape) for x in own] == [(40, 20)] and own[0].dtype == torch.bfloat16  # the pre-activation
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        ops.expert_mlp(*arguments, recompute_activations=True)
    assert {x.data_ptr() for x in saved} == {x.data_ptr() for x in arguments}
    saved.clear()
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        ops.expert_mlp(*arguments)
    assert not saved


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_recomputed_activations_give_the_same_bits(dtype, device):
    experts = torch.rand(40, 6).argsort(-1)[:, :3]
    experts[::3, 1] = 6  # sentinels
    arguments = make(num_tokens=40, experts=experts, dtype=dtype, device=device)
    with torch.no_grad():
        arguments[1][::4, 2] = 0
        arguments[0][8] = torch.nan  # of which one choice weighs 0, and none is left out
    outputs = [ops.expert_mlp(*arguments, recomputes) for recomputes in (False, True)]
    for kept, recomputed in zip(*[[output, *gradients(arguments, output)] for output in outputs], strict=True):
        torch.testing.assert_close(recomputed, kept, rtol=0, atol=0, equal_nan=True)


def test_recomputed_activations_are_never_there_at_once():
    arguments = make(20_000, 4, 64, 2, 1, dtype=torch.float32, experts=torch.arange(20_000).unsqueeze(1) % 2)
    before, most = torch.get_num_threads(), []
    torch.set_num_threads(1)  # a window has more rows for more threads
    try:
        for recomputes in (False, True):
            activities = [torch.profiler.ProfilerActivity.CPU]
            with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
                gradients(arguments, ops.expert_mlp(*arguments, recomputes))
            events = profile.profiler.kineto_results.events()
            most.append(max(event.nbytes() for event in events if event.name() == "[memory]"))
    finally:
        torch.set_num_threads(before)
    whole = 20_000 * 2 * 64 * 4
    assert most[0] == whole and most[1] < whole / 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_gradient_the_output_is_the_same(dtype):
    arguments = make(num_tokens=33, dtype=dtype)
    with torch.no_grad():
        assert ops.expert_mlp(*arguments).equal(ops.expert_mlp(*(x.detach() for x in arguments)))
    assert ops.expert_mlp(*arguments).detach().equal(ops.expert_mlp(*(x.detach() for x in arguments)))


def test_a_token_that_chooses_an_expert_twice_counts_twice():
    experts = torch.tensor([[1, 1], [0, 2], [2, 2]])
    tokens, weights, row_order, offsets, gate_up, down = make(num_tokens=3, num_experts=3, experts=experts)
    once = torch.tensor([[1, 3], [0, 2], [2, 3]])
    merged = torch.tensor([[1.0, 0], [1, 1], [1, 0]], dtype=torch.float64) * weights.detach()
    merged[0, 0], merged[2, 0] = weights[0].sum(), weights[2].sum()
    expected = ops.expert_mlp(tokens, merged, *ops.sort_by_expert(once, 3), gate_up, down)
    torch.testing.assert_close(ops.expert_mlp(tokens, weights, row_order, offsets, gate_up, down), expected)


def test_nan_in_one_token_stays_there():
    arguments = [x.detach().clone() for x in make()]
    expected = ops.expert_mlp(*arguments)
    arguments[0][7] = float("nan")
    output = ops.expert_mlp(*arguments)
    assert output[7].isnan().all()
    others = torch.arange(20) != 7
    torch.testing.assert_close(output[others], expected[others])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_a_token_of_weight_zero_holds_does_not_matter(dtype):
    arguments = make(dtype=dtype)
    with torch.no_grad():
        arguments[1][7] = 0
    results = []
    for value in (1.0, torch.nan):
        with torch.no_grad():
            arguments[0][7] = value
        output = ops.expert_mlp(*arguments)
        grad_tokens, _, grad_gate_up, grad_down = gradients(arguments, output)
        results.append([output, grad_tokens, grad_gate_up, grad_down])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinity_meets_no_zeros_behind_the_last_column(dtype):
    """Among positive numbers infinity has no way to become NaN, whatever loops pad their rows with."""
    arguments = make(dtype=dtype)
    with torch.no_grad():
        for x in (arguments[i] for i in (0, 1, 4, 5)):
            x.abs_()
    grad_output = torch.ones(20, 12, dtype=dtype)
    grad_output[7, 3] = torch.inf
    leaves = [x for x in arguments if x.requires_grad]
    gradients = torch.autograd.grad(ops.expert_mlp(*arguments), leaves, grad_output)
    for gradient in gradients[:2]:
        assert (gradient.isinf().all(1) == (torch.arange(20) == 7)).all()
    assert not any(gradient.isnan().any() for gradient in gradients)
    with torch.no_grad():
        arguments[0][5, 2] = torch.inf
        arguments[1][9] = torch.inf
    output = ops.expert_mlp(*arguments)
    assert (output[[5, 9]] == torch.inf).all() and output.isinf().sum() == 24
    (grad_tokens,) = torch.autograd.grad(output, leaves[:1], torch.ones_like(output))
    assert (grad_tokens[9] == torch.inf).all()


@pytest.mark.parametrize("scale", [1e-4, 30.0, 3e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_and_large_pre_activations_stay_right(dtype, scale):
    arguments = make(dtype=torch.float64)
    with torch.no_grad():
        arguments[4].mul_(scale)
    narrow = [x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x for x in arguments]
    wide = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in narrow]
    output, expected = ops.expert_mlp(*narrow), ops.expert_mlp(*wide)
    allowed = tolerance(dtype, 42, roundings=4)
    assert_close(output, expected, allowed)
    for actual, wanted in zip(gradients(narrow, output), gradients(wide, expected), strict=True):
        assert actual.isfinite().all()
        assert_close(actual, wanted, 4 * allowed)  # silu'(g) cancels around g = -1.28


def test_autocast_casts_tokens_and_experts_and_leaves_the_routing_weights():
    arguments = [x.detach().float().requires_grad_() if x.is_floating_point() else x for x in make()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = ops.expert_mlp(*arguments)
    cast = [x if i in (1, 2, 3) else x.bfloat16() for i, x in enumerate(arguments)]
    assert output.dtype == torch.bfloat16 and output.equal(ops.expert_mlp(*cast))
    results = gradients(arguments, output)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in results)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = ops.expert_mlp(*arguments, recompute_activations=True)
    assert all(map(torch.equal, gradients(arguments, output), results))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.expert_mlp(*make()).dtype == torch.float64


@pytest.mark.parametrize("recomputes", [False, True])
def test_forward_mode_is_refused_instead_of_dropping_the_tangent(recomputes):
    arguments = [x.detach() for x in make()]
    with torch.autograd.forward_ad.dual_level():
        arguments[4] = torch.autograd.forward_ad.make_dual(arguments[4], torch.ones_like(arguments[4]))
        with pytest.raises(RuntimeError, match="jvp is not implemented"):
            ops.expert_mlp(*arguments, recomputes)


def test_random_indices_are_refused_or_right_and_never_leave_the_tensors():
    """Whatever row_order and offsets hold, nothing is read or written outside: it is a sentence or a finite result."""
    arguments = [x.detach() for x in make(num_tokens=8)]
    refused = 0
    for _ in range(300):
        row_order, offsets = arguments[2].clone(), arguments[3].clone()
        for indices in (row_order, offsets):
            position = torch.randint(len(indices), ())
            indices[position] = torch.tensor([0, 1, 7, 15, 16, 17, -1, -(2**31), 2**31 - 1])[torch.randint(9, ())]
        try:
            output = ops.expert_mlp(*arguments[:2], row_order, offsets, *arguments[4:])
            assert output.isfinite().all()
        except IndexError as error:
            assert str(error).startswith("edl::expert_mlp: ")
            refused += 1
    assert 100 < refused < 300


@pytest.mark.parametrize("recomputes", [False, True])
def test_second_derivatives_are_refused(recomputes):
    arguments = make()
    output = ops.expert_mlp(*arguments, recomputes).square().sum()
    (gradient,) = torch.autograd.grad(output, arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match="derivative for edl::_expert_mlp_backward is not implemented"):
        torch.autograd.grad(gradient.sum(), arguments[0])


def of_many_sizes(dtype):
    """Experts with 0, 1, ... rows, one with more than the scratch of a thread holds; misaligned and strided; no size is
    even."""
    rows = torch.tensor([0, 1, 5, 7, 0, 13, 85, 600, 6900, 2, 0])
    experts = torch.arange(11).repeat_interleave(rows)[torch.randperm(int(rows.sum()))].unsqueeze(1)
    arguments = list(make(len(experts), 17, 71, 11, dtype=dtype, experts=experts))
    for i in (0, 4, 5):
        x = arguments[i].detach()
        arguments[i] = torch.nn.functional.pad(x, (1, 2))[..., 1:-2].requires_grad_()
        assert arguments[i].stride(-2) == x.stride(-2) + 3
    return arguments


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_rows_is_right_and_bitwise_equal_for_any_number_of_threads(dtype):
    arguments = of_many_sizes(dtype)
    wide = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in arguments]
    expected = reference.expert_mlp(*wide)
    expected = [expected, *gradients(wide, expected)]
    before, first = torch.get_num_threads(), None
    try:
        for num_threads, recomputes in itertools.product((1, 2, 3), (False, True)):
            torch.set_num_threads(num_threads)
            output = ops.expert_mlp(*arguments, recomputes)
            results = [output, *gradients(arguments, output)]
            first = first or results
            assert all(torch.equal(x, y) for x, y in zip(results, first, strict=True)), f"{num_threads} threads"
    finally:
        torch.set_num_threads(before)
    for actual, wanted in zip(first, expected, strict=True):
        assert_close(actual, wanted, tolerance(dtype, 6900, roundings=4))


@hypothesis.given(st.integers(0, 40), st.integers(1, 8), st.data())
@hypothesis.settings(max_examples=30, deadline=None, derandomize=True, database=None)
def test_permuting_tokens_or_experts_permutes_everything(num_tokens, num_experts, data):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    top_k = data.draw(st.integers(1, num_experts))
    experts = torch.randint(0, num_experts + 1, (num_tokens, top_k))
    tokens, weights, row_order, offsets, gate_up, down = make(num_tokens, 5, 4, num_experts, experts=experts)
    output = ops.expert_mlp(tokens, weights, row_order, offsets, gate_up, down)
    order = torch.randperm(num_tokens)
    moved = ops.expert_mlp(
        tokens[order], weights[order], *ops.sort_by_expert(experts[order], num_experts), gate_up, down
    )
    torch.testing.assert_close(moved, output[order])
    names = torch.randperm(num_experts)
    renamed = torch.cat([names.argsort(), torch.tensor([num_experts])])[experts]
    moved = ops.expert_mlp(tokens, weights, *ops.sort_by_expert(renamed, num_experts), gate_up[names], down[names])
    torch.testing.assert_close(moved, output)


def test_any_order_inside_an_expert():
    tokens, weights, row_order, offsets, gate_up, down = make(num_tokens=50)
    shuffled = row_order.clone()
    for begin, end in itertools.pairwise(offsets):
        shuffled[begin:end] = row_order[begin:end].flip(0)
    expected = ops.expert_mlp(tokens, weights, row_order, offsets, gate_up, down)
    torch.testing.assert_close(ops.expert_mlp(tokens, weights, shuffled, offsets, gate_up, down), expected)


def test_the_batch_may_be_cut_anywhere():
    tokens, weights, _, _, gate_up, down = make(num_tokens=30)
    experts = torch.rand(30, 6).argsort(-1)[:, :2]
    whole = ops.expert_mlp(tokens, weights, *ops.sort_by_expert(experts, 6), gate_up, down)
    parts = [
        ops.expert_mlp(tokens[i:j], weights[i:j], *ops.sort_by_expert(experts[i:j], 6), gate_up, down)
        for i, j in ((0, 1), (1, 1), (1, 17), (17, 30))
    ]
    torch.testing.assert_close(torch.cat(parts), whole)
    direct = torch.autograd.grad(whole.square().sum(), gate_up)[0]
    torch.testing.assert_close(torch.autograd.grad(torch.cat(parts).square().sum(), gate_up)[0], direct)
