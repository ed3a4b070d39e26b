"""token → segment: values and gradients against plain torch in float64, on inputs of every layout and size, and on bad
ones."""

import math

import pytest
import torch
from tolerances import assert_close, tolerance

import edl
from edl import ops, reference
from edl.ops import checks

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SCORES = [*checks.router_scores(), "none"]
INF = math.inf
NAN = math.nan


def make_routing(num_tokens, num_experts, scores, dtype):
    logits = torch.randn(num_tokens, num_experts, dtype=torch.float64) * 2.5
    return (logits.softmax(dim=-1) if scores == "none" else logits).to(dtype)


def make_ids(num_tokens, num_segments, order):
    ids = torch.randint(-1, num_segments, (num_tokens,))
    return ids.sort().values if order == "runs" else ids


def differentiate(function, routing, segment_ids, num_segments, scores, grad_sums):
    leaf = routing.detach().requires_grad_()
    sums, counts = function(leaf, segment_ids, num_segments, scores)
    (grad,) = torch.autograd.grad(sums, leaf, grad_sums.to(sums))
    return sums.detach(), counts, grad


def check(routing, segment_ids, num_segments, scores, device="cpu"):
    """Kernel against definition; returns the kernel's results."""
    routing, segment_ids = routing.to(device), segment_ids.to(device)
    grad_sums = torch.randn(num_segments, routing.shape[1], dtype=torch.float64, device=device)
    arguments = segment_ids, num_segments, scores, grad_sums
    sums, counts, grad = differentiate(ops.aggregate_routing, routing, *arguments)
    expected = differentiate(reference.aggregate_routing, routing.double(), *arguments)
    assert sums.dtype == (torch.float64 if routing.dtype == torch.float64 else torch.float32)
    assert counts.dtype == sums.dtype and grad.dtype == routing.dtype
    assert_close(sums, expected[0], tolerance(sums.dtype, routing.shape[0] + routing.shape[1]))
    assert counts.tolist() == expected[1].tolist()
    terms = 0.0 if scores == "none" or grad_sums.numel() == 0 else grad_sums.abs().max().item()  # they cancel
    assert_close(grad, expected[2], tolerance(grad.dtype, routing.shape[1]), terms)
    return sums, counts, grad


@pytest.mark.parametrize("order", ["runs", "shuffled"])
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_of_experts(dtype, scores, order, device):
    for num_experts in (
        1,
        2,
        3,
        7,
        8,
        15,
        16,
        17,
        31,
        32,
        33,
        48,
        63,
        64,
        65,
        100,
        128,
        130,
        160,
        256,
        257,
        1024,
        1030,
        2048,
    ):
        check(make_routing(70, num_experts, scores, dtype), make_ids(70, 5, order), 5, scores, device)


@pytest.mark.parametrize("order", ["runs", "shuffled"])
@pytest.mark.parametrize("num_segments", [0, 1, 3, 1000])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 255, 256, 257, 1030])
def test_every_number_of_tokens(num_tokens, num_segments, order, device):
    check(
        make_routing(num_tokens, 12, "softmax", torch.float32),
        make_ids(num_tokens, num_segments, order),
        num_segments,
        "softmax",
        device,
    )


@pytest.mark.parametrize("num_experts", [128, 129])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scores", SCORES)
def test_large_enough_to_be_streamed_and_threaded(scores, dtype, num_experts, device):
    check(make_routing(17000, num_experts, scores, dtype), make_ids(17000, 9, "runs"), 9, scores, device)


LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "columns of a wider tensor": lambda x: torch.cat([x * NAN, x, x * NAN], dim=1)[:, x.shape[1] : 2 * x.shape[1]],
    "every second row": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "every second column": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "offset of one element": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
    "one row for all": lambda x: x[:1].expand_as(x),
    "middle of three dimensions": lambda x: torch.stack([x, x, x], dim=1)[:, 1],
    "negated lazily": lambda x: torch._neg_view(-x),
}


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(layout, dtype, scores, device):
    for num_experts in (5, 64):
        check(layout(make_routing(40, num_experts, scores, dtype)), make_ids(40, 4, "shuffled"), 4, scores, device)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_ids_of_both_types_with_strides(dtype, device):
    ids = torch.stack([make_ids(40, 4, "shuffled"), torch.full((40,), 99)], dim=1).to(dtype)[:, 0]
    check(make_routing(40, 10, "softmax", torch.float32), ids, 4, "softmax", device)
    check(
        make_routing(40, 10, "softmax", torch.float32), torch.tensor([3], dtype=dtype).expand(40), 4, "softmax", device
    )


def test_gradients_arrive_in_any_layout(device):
    routing = make_routing(30, 6, "softmax", torch.float32).to(device).requires_grad_()
    ids = make_ids(30, 4, "shuffled").to(device)
    (ones,) = torch.autograd.grad(ops.aggregate_routing(routing, ids, 4)[0].sum(), routing)  # expanded from one number
    assert_close(ones, torch.zeros(30, 6), tolerance(torch.float32, 6), 1.0)
    weights = torch.randn(6, 4, device=device)
    (actual,) = torch.autograd.grad((ops.aggregate_routing(routing, ids, 4)[0].t() * weights).sum(), routing)
    (expected,) = torch.autograd.grad(
        (reference.aggregate_routing(routing.double(), ids, 4)[0].t() * weights).sum(), routing
    )
    assert_close(actual, expected.double(), tolerance(torch.float32, 6))


# ---- hostile numbers ----


@pytest.mark.parametrize("scores", checks.router_scores())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_experts", [9, 64])
def test_experts_masked_with_minus_infinity(num_experts, dtype, scores, device):
    routing = make_routing(50, num_experts, scores, dtype)
    routing[torch.rand(50, num_experts) < 0.4] = -INF
    routing[:, 2] = 0.5  # one is left in every row
    sums, _, grad = check(routing, make_ids(50, 3, "shuffled"), 3, scores, device)
    assert sums.isfinite().all() and grad.isfinite().all()
    assert not grad[routing == -INF].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scores", checks.router_scores())
@pytest.mark.parametrize("size", [30.0, 80.0, 1e3, 1e4])
def test_logits_of_large_magnitude(size, scores, dtype, device):
    routing = ((torch.rand(60, 33, dtype=torch.float64) * 2 - 1) * size).to(dtype)
    routing[::7, 3] = size
    ids = make_ids(60, 4, "shuffled")
    sums, _, grad = check(routing, ids, 4, scores, device)
    assert sums.isfinite().all() and grad.isfinite().all()
    assert (sums >= 0).all()


@pytest.mark.parametrize("scores", checks.router_scores())
def test_a_shift_of_all_logits_does_not_overflow(scores, device):
    for shift in (-3e4, 3e4):
        routing = make_routing(20, 8, "softmax", torch.float32).double() + (shift if scores == "softmax" else 0.0)
        check(routing.float(), make_ids(20, 3, "runs"), 3, scores, device)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ["runs", "shuffled"])
def test_rows_that_are_not_counted_do_not_leak(order, dtype, scores, value, device):
    routing = make_routing(60, 20, scores, dtype)
    ids = make_ids(60, 4, order)
    ids[::5] = -1
    routing[ids < 0] = value
    sums, _, grad = check(routing, ids, 4, scores, device)
    assert sums.isfinite().all()
    assert grad.isfinite().all() and not grad[ids < 0].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("num_experts", [7, 16, 64])
def test_a_counted_nan_reaches_its_segment_and_no_other(num_experts, scores, dtype, device):
    for column in range(0, num_experts, 3):
        routing = make_routing(40, num_experts, scores, dtype).to(device)
        ids = make_ids(40, 3, "shuffled").to(device)
        ids[8], routing[8, column] = 1, NAN
        sums, _ = ops.aggregate_routing(routing, ids, 3, scores)
        assert sums[[0, 2]].isfinite().all()
        assert sums[1].isnan().any() if scores == "none" else sums[1].isnan().all()


@pytest.mark.parametrize("row", [[INF, 0.0, 1.0, 2.0], [-INF] * 4, [NAN, INF, 0.0, 1.0]])
def test_a_row_without_a_softmax_is_nan_as_in_torch(row, device):
    routing = torch.tensor([row, [0.0, 1.0, 2.0, 3.0]], device=device)
    assert torch.tensor(row).softmax(0).isnan().any()
    sums, _ = ops.aggregate_routing(routing, torch.tensor([0, 1], device=device), 2, "softmax")
    assert sums[0].isnan().any() and sums[1].isfinite().all()


def test_a_long_segment_loses_no_digits(device):
    """Tokens of one segment are summed in pieces: the error does not grow with their number."""
    routing = make_routing(1 << 18, 3, "none", torch.float32).to(device)
    sums, _ = ops.aggregate_routing(routing, torch.zeros(1 << 18, dtype=torch.int32, device=device), 1, "none")
    assert_close(sums, routing.double().sum(dim=0, keepdim=True), tolerance(torch.float32, 16))


# ---- 16-bit storage, bit by bit ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_experts", [3, 16, 64])
def test_every_16_bit_number_is_read_right(num_experts, dtype, device):
    everything = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = everything[(everything >= 0) & (everything <= 1)]
    routing = torch.zeros(len(numbers), num_experts, dtype=dtype)
    routing[:, 1], routing[:, 0] = numbers, 1 - numbers
    ids = torch.arange(len(numbers))
    sums, _ = ops.aggregate_routing(routing.to(device), ids.to(device), len(numbers), "none")
    assert sums.cpu().equal(routing.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_experts", [3, 16, 64])
def test_gradients_are_rounded_to_16_bits_like_torch_does(num_experts, dtype, device):
    everything = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    finite = everything[everything.isfinite()].sort().values
    between = (finite[1:].double() + finite[:-1].double()) / 2  # ties, and their neighbours on both sides
    ties = between.float()
    numbers = torch.cat([everything, ties, ties.nextafter(torch.tensor(INF)), ties.nextafter(torch.tensor(-INF))])
    numbers = torch.cat(
        [numbers, torch.tensor([65503.9, 65519.9, 65520.0, 65536.0, 1e30, -1e30, 3.4e38, -3.4e38, 1e-45])]
    )
    numbers = torch.cat([numbers, numbers.new_zeros(-len(numbers) % num_experts)]).view(-1, num_experts)
    routing = torch.full((len(numbers), num_experts), 1 / num_experts, dtype=dtype).to(device).requires_grad_()
    sums, _ = ops.aggregate_routing(routing, torch.arange(len(numbers), device=device), len(numbers), "none")
    (grad,) = torch.autograd.grad(sums, routing, numbers.to(device))
    torch.testing.assert_close(grad.cpu(), numbers.to(dtype), rtol=0, atol=0, equal_nan=True)


# ---- what it refuses ----

LOGITS = torch.randn(8, 4, generator=torch.Generator().manual_seed(3))
PROBABILITIES = LOGITS.softmax(dim=-1)
IDS = torch.tensor([0, 0, 1, 1, 1, 0, -1, 1])

SHAPE_ERRORS = {
    "routing must have the shape [T, E] (got 1 dimensions)": (LOGITS[0], IDS, 2, "softmax"),
    "routing must have the shape [T, E] (got 3 dimensions)": (LOGITS[None], IDS, 2, "softmax"),
    "routing must be float32, float64, bfloat16 or float16 (got Int)": (LOGITS.int(), IDS, 2, "softmax"),
    "routing must be float32, float64, bfloat16 or float16 (got ComplexFloat)": (
        LOGITS.to(torch.complex64),
        IDS,
        2,
        "softmax",
    ),
    "routing must have at least one expert (got a tensor of 8 by 0)": (LOGITS[:, :0], IDS, 2, "softmax"),
    "segment_ids must have the shape [T] (got 2 dimensions)": (LOGITS, IDS[None], 2, "softmax"),
    "segment_ids must be int32 or int64 (got Float)": (LOGITS, IDS.float(), 2, "softmax"),
    "segment_ids must be int32 or int64 (got Bool)": (LOGITS, IDS.bool(), 2, "softmax"),
    "segment_ids must be on the device of routing (got meta and cpu)": (LOGITS, IDS.to("meta"), 2, "softmax"),
    "segment_ids must have one entry per row of routing (got 7 ids for 8 rows)": (LOGITS, IDS[:7], 2, "softmax"),
    "num_segments must not be negative (got -1)": (LOGITS, IDS, -1, "softmax"),
    "scores must be 'softmax', 'sigmoid' or 'none' (got 'relu')": (LOGITS, IDS, 2, "relu"),
}


@pytest.mark.parametrize("sentence", SHAPE_ERRORS)
def test_sentences(sentence):
    with pytest.raises(ValueError) as error:
        ops.aggregate_routing(*SHAPE_ERRORS[sentence])
    assert str(error.value) == f"edl::aggregate_routing: {sentence}"


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("wrong", [2, 3, -2, 2**31 - 1, -(2**31), 2**32, 2**40 + 1, -(2**40)])
def test_an_id_outside_its_range(wrong, dtype):
    if dtype == torch.int32 and abs(wrong) > 2**31:
        return
    ids = IDS.clone().to(dtype)
    ids[5] = wrong
    with pytest.raises(IndexError) as error:
        ops.aggregate_routing(LOGITS, ids, 2)
    assert str(error.value) == (
        f"edl::aggregate_routing: segment_ids must be at least -1 and below 2, the number of segments (got {wrong} at "
        "row 5; edl.segments gives this id to a token whose label or mask value is not allowed, and to all where "
        "cu_seqlens does not rise from 0)"
    )


@pytest.mark.parametrize("scores", checks.router_scores())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", [IDS, IDS.sort().values], ids=["shuffled", "runs"])
def test_probabilities_passed_as_logits(order, dtype, scores):
    with pytest.raises(ValueError) as error:
        ops.aggregate_routing(PROBABILITIES.to(dtype), order, 2, scores)
    assert str(error.value) == (
        "edl::aggregate_routing: with scores = 'softmax' or 'sigmoid' routing must be logits (got 7 rows that all "
        "sum to 1 with entries of at least 0; for probabilities pass scores = 'none', or to ExpertDivergenceLoss "
        "input = 'probs')"
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_passed_as_probabilities(dtype):
    wrong = PROBABILITIES.clone()
    wrong[4] = LOGITS[4]
    with pytest.raises(ValueError) as error:
        ops.aggregate_routing(wrong.to(dtype), IDS, 2, "none")
    assert str(error.value) == (
        "edl::aggregate_routing: with scores = 'none' every row of routing must be a distribution, entries of at "
        "least 0 that sum to 1 (got something else at row 4; for logits pass scores = 'softmax' or 'sigmoid', or to "
        "ExpertDivergenceLoss input = 'logits')"
    )


@pytest.mark.parametrize("num_experts", [1, 5, 64])
def test_a_negative_entry_is_no_probability_even_where_the_sum_is_1(num_experts):
    for column in range(1, num_experts):
        rows = torch.zeros(3, num_experts)
        rows[:, 0] = 1.0
        rows[1, 0], rows[1, column] = 1.25, -0.25
        with pytest.raises(ValueError, match="got something else at row 1;"):
            ops.aggregate_routing(rows, torch.zeros(3, dtype=torch.int64), 1, "none")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_how_far_from_1_a_sum_may_be(dtype):
    allowed = 1e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-3
    ids = torch.zeros(8, dtype=torch.int64)
    for factor in (1 - 0.4 * allowed, 1 + 0.4 * allowed):
        rows = torch.full((8, 2), 0.5 * factor, dtype=dtype)
        ops.aggregate_routing(rows, ids, 1, "none")
        with pytest.raises(ValueError):
            ops.aggregate_routing(rows, ids, 1, "softmax")
    for factor in (1 - 1.8 * allowed, 1 + 1.8 * allowed):
        rows = torch.full((8, 2), 0.5 * factor, dtype=dtype)
        ops.aggregate_routing(rows, ids, 1, "softmax")
        with pytest.raises(ValueError):
            ops.aggregate_routing(rows, ids, 1, "none")


def test_only_counted_finite_rows_are_judged():
    ops.aggregate_routing(PROBABILITIES[:1], IDS[:1], 2, "softmax")  # a single row proves nothing
    one_counted = torch.full((8,), -1).index_fill(0, torch.tensor(2), 0)
    ops.aggregate_routing(PROBABILITIES, one_counted, 2, "softmax")
    bad = PROBABILITIES.clone()
    bad[6] = 3.0  # not counted
    bad[1, 2] = NAN
    bad[2, 0] = INF
    ops.aggregate_routing(bad, IDS, 2, "none")
    with pytest.raises(ValueError, match="got 5 rows that all sum to 1"):
        ops.aggregate_routing(bad, IDS, 2, "softmax")
    mixed = PROBABILITIES.clone()
    mixed[7] = LOGITS[7]
    ops.aggregate_routing(mixed, IDS, 2, "softmax")  # one row of logits among them: logits
    ops.aggregate_routing(torch.ones(4, 1), torch.zeros(4, dtype=torch.int64), 1, "softmax")  # one expert: both at once


# ---- differentiation ----


@pytest.mark.parametrize("scores", SCORES)
def test_the_second_derivative_raises(scores):
    routing = (PROBABILITIES if scores == "none" else LOGITS).clone().requires_grad_()
    sums, counts = ops.aggregate_routing(routing, IDS, 2, scores)
    assert not counts.requires_grad
    (grad,) = torch.autograd.grad(sums.square().sum(), routing, create_graph=True)
    with pytest.raises(RuntimeError, match="derivative for edl::_aggregate_routing_backward is not implemented"):
        grad.sum().backward()


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev], ids=["grad", "jacrev"])
def test_function_transforms_are_refused(transform):
    with pytest.raises(RuntimeError, match="functorch transforms"):
        transform(lambda x: ops.aggregate_routing(x, IDS, 2)[0].sum())(LOGITS)


def test_forward_mode_is_refused():
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp is not implemented"):
        ops.aggregate_routing(torch.autograd.forward_ad.make_dual(LOGITS, LOGITS), IDS, 2)


def test_without_gradients():
    expected = ops.aggregate_routing(LOGITS, IDS, 2)[0]
    leaf = LOGITS.clone().requires_grad_()
    with torch.no_grad():
        sums = ops.aggregate_routing(leaf, IDS, 2)[0]
        assert not sums.requires_grad and sums.equal(expected)
    with torch.inference_mode():
        inference = LOGITS.clone()
        assert ops.aggregate_routing(inference, IDS, 2)[0].equal(expected)
    assert ops.aggregate_routing(inference, IDS, 2)[0].equal(expected)


def test_ids_changed_before_backward_are_noticed():
    ids = IDS.clone()
    sums, _ = ops.aggregate_routing(LOGITS.clone().requires_grad_(), ids, 2)
    ids[0] = 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sums.sum().backward()


def test_a_batch_of_gradients():
    """Jacobian rows at once, as torch.autograd.functional.jacobian(vectorize=True) asks for them."""
    leaf = LOGITS.double().requires_grad_()
    sums, _ = ops.aggregate_routing(leaf, IDS, 2)
    basis = torch.eye(sums.numel(), dtype=torch.float64).view(-1, *sums.shape)
    (rows,) = torch.autograd.grad(sums, leaf, basis, is_grads_batched=True, retain_graph=True)
    for row, direction in zip(rows, basis, strict=True):
        torch.testing.assert_close(
            row, torch.autograd.grad(sums, leaf, direction, retain_graph=True)[0], rtol=0, atol=0
        )


# ---- all layers at once ----


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_layers", [1, 3, 40])
def test_layers_at_once_have_the_bits_of_each_alone(num_layers, dtype, scores, device):
    layers = [make_routing(90, 16, scores, dtype).to(device) for _ in range(num_layers)]
    ids = make_ids(90, 7, "shuffled").to(device)
    sums, counts = torch.ops.edl._aggregate_layers(layers, ids, 7, scores)
    grad_sums = torch.randn(sums.shape, device=device, dtype=sums.dtype)
    gradients = torch.ops.edl._aggregate_layers_backward(grad_sums, layers, ids, scores)
    assert sums.shape == (num_layers, 7, 16) and len(gradients) == num_layers
    for layer, own, slope, gradient in zip(layers, sums, grad_sums, gradients, strict=True):
        alone, counted = ops.aggregate_routing(layer, ids, 7, scores)
        assert own.equal(alone) and counts.equal(counted)
        assert gradient.equal(torch.ops.edl._aggregate_routing_backward(slope, layer, ids, scores))


def test_layers_at_once_in_several_layouts_and_without_tokens(device):
    wide = torch.randn(50, 3, 17, device=device)
    layers = [wide[:, 0, 1:], wide[:, 1, :16], torch.randn(16, 50, device=device).t()]
    ids = torch.arange(50, device=device) % 4
    sums, _ = torch.ops.edl._aggregate_layers(layers, ids, 4, "softmax")
    for layer, own in zip(layers, sums, strict=True):
        assert_close(
            own, reference.aggregate_routing(layer.double(), ids, 4, "softmax")[0], tolerance(torch.float32, 50)
        )
    sums, counts = torch.ops.edl._aggregate_layers([layer[:0] for layer in layers], ids[:0], 4, "softmax")
    assert sums.shape == (3, 4, 16) and not sums.any() and not counts.any()


def test_torchs_own_checks_of_layers_at_once(device):
    layers = [torch.randn(20, 8, device=device) for _ in range(3)]
    ids = torch.arange(20, device=device) % 4
    checks = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(torch.ops.edl._aggregate_layers, (layers, ids, 4, "softmax"), test_utils=checks)
    arguments = torch.randn(3, 4, 8, device=device), layers, ids, "softmax"
    torch.library.opcheck(torch.ops.edl._aggregate_layers_backward, arguments, test_utils=checks)


@pytest.mark.parametrize("frozen", [[], [1], [0, 2]], ids=str)
def test_a_loss_of_layers_differentiates_those_that_need_it(frozen, device):
    layers = [torch.randn(24, 8, device=device, requires_grad=layer not in frozen) for layer in range(3)]
    labels = torch.arange(6, device=device) % 2
    module = edl.ExpertDivergenceLoss(num_domains=2)
    module(layers, labels).backward()
    for number, layer in enumerate(layers):
        assert (layer.grad is None) == (number in frozen)
        if number not in frozen:
            leaf = layer.detach().double().requires_grad_()
            (module([leaf], labels) / 3).backward()
            assert_close(layer.grad, leaf.grad, tolerance(torch.float32, 24))
