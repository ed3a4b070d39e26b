"""What only a CUDA device can show: streams, the same bits every time, values that no kernel can refuse, and
sizes at which the kernels change their plan. The rest runs on CUDA through the `device` fixture of other tests."""

import math

import pytest
import torch
from cuda_support import CUDA, experts_arguments, forward_and_backward, needs_grouped_kernel
from samples import REFUSALS, operator
from support import as_tuple, cotangents, divergence_arguments, first_samples, with_gradients
from tolerances import assert_close, tolerance

import edl
from edl import ops, reference
from edl.moe.router_weights import gram_of, responses_of

pytestmark = pytest.mark.cuda


# ---- what the grouped products have met on no device: no rows at all, and rows that are not there ----


def experts_with(offsets, num_slots=8, top_k=1, hidden_size=64, intermediate_size=40):
    """Arguments of expert_mlp in bfloat16 with offsets as they are given."""

    def normal(*shape):
        return torch.randn(shape, device=CUDA, dtype=torch.bfloat16).requires_grad_()

    num_experts = len(offsets) - 1
    row_order = torch.arange(num_slots, dtype=torch.int32, device=CUDA)
    bounds = torch.tensor(offsets, dtype=torch.int32, device=CUDA)
    tokens = normal(num_slots // top_k, hidden_size)
    weights = torch.rand(num_slots // top_k, top_k, device=CUDA).requires_grad_()
    gate_up = normal(num_experts, 2 * intermediate_size, hidden_size)
    return [tokens, weights, row_order, bounds, gate_up, normal(num_experts, hidden_size, intermediate_size)]


@pytest.mark.parametrize("num_experts", [1, 9])
@pytest.mark.parametrize("num_slots, top_k", [(8, 1), (600, 3)])
def test_experts_without_any_row_give_zeros(num_slots, top_k, num_experts):
    arguments = experts_with([0] * (num_experts + 1), num_slots, top_k)
    found = forward_and_backward(ops.expert_mlp, arguments, [torch.ones_like(arguments[0])])
    torch.cuda.synchronize()
    assert [x.shape for x in found[1:]] == [arguments[i].shape for i in (0, 1, 4, 5)]
    assert not any(x.any() for x in found)


def test_one_expert_with_every_row():
    arguments = experts_with([0, 300], 300)
    grads = [torch.randn_like(arguments[0])]
    doubles = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in arguments]
    expected = forward_and_backward(reference.expert_mlp, doubles, [grads[0].double()])
    for one, other in zip(forward_and_backward(ops.expert_mlp, arguments, grads), expected, strict=True):
        assert_close(one, other, 4 * tolerance(torch.bfloat16, 364))


BAD_OFFSETS = [[0, 4096], [0, 5, 3, 8], [0, -1, 8], [3, 5], [0, 8, 9], [0, 2**31 - 1], [0, -(2**31)]]


@pytest.mark.parametrize("offsets", BAD_OFFSETS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_offsets_that_do_not_rise_to_the_number_of_rows_make_every_token_nan(dtype, offsets):
    arguments = experts_with(offsets, hidden_size=8, intermediate_size=8)
    arguments = [x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x for x in arguments]
    output, grad_tokens, grad_weights, *_ = forward_and_backward(
        ops.expert_mlp, arguments, [torch.ones_like(arguments[0])]
    )
    torch.cuda.synchronize()
    assert output.isnan().all() and grad_tokens.isnan().all() and grad_weights.isnan().all()


@needs_grouped_kernel
def test_weights_off_a_boundary_of_16_bytes_are_copied_and_do_not_wait():
    arguments = experts_arguments()
    for position in (4, 5):
        weight = arguments[position].detach()
        flat = torch.empty(weight.numel() + 1, dtype=weight.dtype, device=CUDA)
        flat[1:].copy_(weight.flatten())
        arguments[position] = flat[1:].view(weight.shape).requires_grad_()
    assert arguments[4].data_ptr() % 16 != 0
    grads = [torch.ones_like(arguments[0])]
    found = forward_and_backward(ops.expert_mlp, arguments, grads)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = forward_and_backward(ops.expert_mlp, arguments, grads)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    aligned = [x.detach().clone().requires_grad_(x.requires_grad) for x in arguments]
    for one, two, three in zip(found, again, forward_and_backward(ops.expert_mlp, aligned, grads), strict=True):
        assert one.equal(two) and one.equal(three)


# ---- reproducible ----


def repeat(function, leaves, times=20):
    grads = [g.to(CUDA) for g in cotangents(as_tuple(function(*leaves)))]
    first = forward_and_backward(function, leaves, grads)
    side = torch.cuda.Stream()
    busy = torch.randn(512, 512, device=CUDA)
    for _ in range(times):
        with torch.cuda.stream(side):  # blocks are dealt out differently beside other work
            busy @ busy
        for once, again in zip(first, forward_and_backward(function, leaves, grads), strict=True):
            assert once.equal(again)


@pytest.mark.parametrize("order", ["runs", "shuffled"])
@pytest.mark.parametrize("scores", ["softmax", "none"])
def test_sums_have_the_same_bits_every_time(scores, order):
    ids = torch.randint(-1, 50, (70000,), device=CUDA)
    ids = ids.sort().values if order == "runs" else ids
    routing = torch.randn(70000, 64, device=CUDA).softmax(dim=1).requires_grad_()
    repeat(lambda x: ops.aggregate_routing(x, ids, 50, scores), [routing])


@pytest.mark.parametrize(
    "reduction, corrected", [("mean_of_logs", False), ("log_of_mean", False), ("mean_of_logs", True)]
)
def test_loss_has_the_same_bits_every_time(reduction, corrected):
    sums = torch.rand(2, 400, 64, device=CUDA)
    counts = torch.full((2, 400), 1.0, device=CUDA)
    labels = torch.randint(-1, 30, (400,), device=CUDA)

    def loss(segment_sums):
        moments = ops.domain_moments(segment_sums, counts, labels, 30, corrected)
        return ops.expert_divergence(*divergence_arguments(*moments, 1e-6, reduction, corrected))

    repeat(loss, [sums.requires_grad_()])


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_routing_has_the_same_bits_every_time(scores):
    logits = torch.randn(5000, 96, device=CUDA).round(decimals=1).requires_grad_()  # with ties

    def route(x):
        weights, experts = ops.route_tokens(x, 6, scores)
        return weights, experts, *ops.sort_by_expert(experts, 96)

    repeat(route, [logits])


# ---- wrong values ----


@pytest.mark.parametrize("refusal", [r for r in REFUSALS if r.by_value], ids=str)
def test_checked_values_are_refused_with_the_sentence_of_the_cpu(refusal, monkeypatch):
    monkeypatch.setenv("EDL_CHECK", "1")
    with pytest.raises(refusal.error) as error:
        operator(refusal.op)(*refusal.arguments(CUDA))
    assert str(error.value).startswith(refusal.sentence)


@pytest.mark.parametrize("bad", [-2, 3, 2**33])
@pytest.mark.parametrize("num_tokens", [5, 70000])
def test_a_wrong_segment_makes_sums_counts_and_gradients_nan(num_tokens, bad):
    routing = torch.randn(num_tokens, 6, device=CUDA)
    ids = torch.zeros(num_tokens, dtype=torch.int64, device=CUDA)
    ids[num_tokens // 2] = bad
    sums, counts = ops.aggregate_routing(routing, ids, 3)
    assert sums.isnan().all() and counts.isnan().all()
    grad = torch.ops.edl._aggregate_routing_backward(torch.ones(3, 6, device=CUDA), routing, ids, "none")
    assert grad.isnan().all(dim=1).nonzero().flatten().tolist() == [num_tokens // 2]


@pytest.mark.parametrize("bad", [-2, 3])
def test_a_wrong_label_makes_the_loss_nan(bad):
    module = edl.ExpertDivergenceLoss(num_domains=3)
    labels = torch.tensor([0, 1, 2, bad], device=CUDA)
    assert module(torch.randn(4, 5, 8, device=CUDA), labels).isnan()
    assert module(torch.randn(4, 5, 8, device=CUDA), labels.unsqueeze(1).expand(4, 5)).isnan()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_limits_of_a_choice_that_the_cpu_refuses_make_their_token_nan(scores, normalize):
    def refused(**limits):
        logits = torch.randn(4, 6, device=CUDA, requires_grad=True)
        limits = {name: torch.tensor(limit, device=CUDA) for name, limit in limits.items()}
        weights, experts = ops.route_tokens(logits, 2, scores, None, normalize, **limits)
        (gradient,) = torch.autograd.grad(weights.sum(), logits)
        nan = weights.isnan().all(dim=1)
        for found in (weights.isnan().any(dim=1), gradient.isnan().all(dim=1), gradient.isnan().any(dim=1)):
            assert found.equal(nan)
        return nan.tolist(), experts.tolist()

    few = [[True] * 6, [False, True] + [False] * 4, [False] * 6, [True, False, False, False, False, True]]
    assert refused(allowed=few)[0] == [False, True, True, False]
    nan, experts = refused(experts=[[0, 1], [6, 1], [-2, 1], [-1, 1]])
    assert nan == [False, True, True, False] and experts == [[0, 1], [-1, 1], [-1, 1], [6, 1]]
    assert refused(experts=[[0, 1], [2**40, -1], [3, 3], [-1, -1]])[0] == [False, True, True, False]
    assert refused(allowed=few, experts=[[0, 1], [1, 2], [-1, 0], [5, -1]])[0] == [False, True, True, False]


def test_a_wrong_expert_makes_its_token_nan():
    tokens, experts = torch.randn(3, 8, device=CUDA), torch.tensor([[0, 1], [7, 1], [1, 0]], device=CUDA)
    row_order, offsets = ops.sort_by_expert(experts, 2)
    gate_up, down = torch.randn(2, 16, 8, device=CUDA), torch.randn(2, 8, 8, device=CUDA)
    output = ops.expert_mlp(tokens, torch.ones(3, 2, device=CUDA), row_order, offsets, gate_up, down)
    assert output.isnan().all(dim=1).tolist() == [False, True, False]
    assert output[[0, 2]].isfinite().all()


def test_more_experts_than_shared_memory_holds_are_refused():
    with pytest.raises(ValueError, match="edl::route_tokens: on CUDA the number of experts must be at most"):
        ops.route_tokens(torch.zeros(1, 20000, device=CUDA), 1, "softmax")
    with pytest.raises(ValueError, match="edl::sort_by_expert: on CUDA num_experts must be at most"):
        ops.sort_by_expert(torch.zeros(1, 1, dtype=torch.int64, device=CUDA), 20000)


# ---- sizes at which the kernels change their plan ----

ORDERS = {
    "runs": lambda t, s: torch.arange(t) * s // t,
    "interleaved": lambda t, s: torch.arange(t) % s,
    "shuffled": lambda t, s: torch.randint(-1, s, (t,)),
    "falling": lambda t, s: s - 1 - torch.arange(t) * s // t,
    "padded": lambda t, s: (torch.arange(t) * s // t).masked_fill(torch.arange(t) % 100 < 9, -1),
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
@pytest.mark.parametrize("num_tokens", [63, 64, 65, 16384, 16385, 65536, 65537, 300001])
@pytest.mark.parametrize("num_segments", [1, 7, 64, 3000])
def test_sums_at_every_chunk_size(num_segments, num_tokens, order):
    ids = order(num_tokens, num_segments).to(CUDA)
    for num_experts, dtype, scores in ((128, torch.float32, "none"), (20, torch.bfloat16, "softmax")):
        logits = torch.randn(num_tokens, num_experts, device=CUDA)
        routing = (logits.softmax(dim=1) if scores == "none" else logits).to(dtype)
        sums, counts = ops.aggregate_routing(routing, ids, num_segments, scores)
        expected, expected_counts = reference.aggregate_routing(routing.double(), ids, num_segments, scores)
        # Accumulated in float32 over a chunk at most, then in float64.
        assert_close(sums, expected, tolerance(torch.float32, 256))
        assert counts.double().equal(expected_counts)


def test_more_than_2_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free device memory")
    torch.use_deterministic_algorithms(False)  # poisoning the memory would take longer than the test
    num_tokens, num_experts = 2**23 + 5, 512  # 2^32 elements
    routing = torch.zeros(num_tokens, num_experts, dtype=torch.bfloat16, device=CUDA)
    routing[-1] = 1
    ids = torch.zeros(num_tokens, dtype=torch.int32, device=CUDA)
    ids[-1] = 1
    sums, counts = ops.aggregate_routing(routing, ids, 2, "none")
    assert counts.tolist() == [num_tokens - 1, 1]
    assert (sums[0] == 0).all() and (sums[1] == 1).all()
    grad_sums = torch.tensor([[0.0], [1.0]], device=CUDA).expand(2, num_experts)
    grad = torch.ops.edl._aggregate_routing_backward(grad_sums, routing, ids, "none")
    assert (grad[-1] == 1).all() and not grad[:-1].any()


@pytest.mark.parametrize("num_experts", [1, 8, 128, 1000])
@pytest.mark.parametrize("num_slots", [1, 1023, 1024, 1025, 300000])
def test_sort_at_every_number_of_chunks(num_slots, num_experts):
    experts = torch.randint(0, num_experts + 1, (num_slots, 1), device=CUDA)
    row_order, offsets = ops.sort_by_expert(experts, num_experts)
    assert row_order.equal(experts.flatten().argsort(stable=True).int())
    assert offsets.equal((experts.flatten()[None] < torch.arange(num_experts + 1, device=CUDA)[:, None]).sum(1).int())


# ---- experts ----


@needs_grouped_kernel
@pytest.mark.parametrize("num_tokens", [1, 9, 300, 4000])
@pytest.mark.parametrize("hidden_size, intermediate_size", [(8, 8), (64, 40), (256, 512)])
def test_grouped_experts_against_float64(hidden_size, intermediate_size, num_tokens):
    arguments = experts_arguments(num_tokens, hidden_size, intermediate_size)
    doubles = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in arguments]
    grads = [torch.randn(num_tokens, hidden_size, device=CUDA, dtype=torch.bfloat16)]
    actual = forward_and_backward(ops.expert_mlp, arguments, grads)
    expected = forward_and_backward(reference.expert_mlp, doubles, [grads[0].double()])
    # The rows between the products are stored in bfloat16: four roundings on the longest way.
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, 4 * tolerance(torch.bfloat16, num_tokens + hidden_size))
    offsets = arguments[3].tolist()
    for e in range(len(offsets) - 1):
        if offsets[e] == offsets[e + 1]:
            assert (actual[3][e] == 0).all() and (actual[4][e] == 0).all()


@needs_grouped_kernel
def test_grouped_experts_do_not_wait_for_the_device():
    arguments = experts_arguments()
    gradient = torch.ones_like(arguments[0])
    forward_and_backward(ops.expert_mlp, arguments, [gradient])
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_backward(ops.expert_mlp, arguments, [gradient])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_scale_on_the_cpu_does_not_wait_for_the_device():
    carrier, loss = torch.ones(3, device=CUDA, requires_grad=True), torch.ones((), device=CUDA, requires_grad=True)
    scale = torch.tensor(2.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        edl.inject(carrier, loss, scale).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.grad == 2


def test_boundaries_of_packed_documents_do_not_wait_for_the_device():
    pytest.importorskip("transformers")
    from edl.integrations.transformers.trainer import _PackedDocuments

    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]], device=CUDA)
    torch.cuda.set_sync_debug_mode("error")
    try:
        boundaries = _PackedDocuments(positions, positions.diff(dim=-1) != 1, positions.shape).boundaries()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert boundaries.tolist() == [0, 3, 5, 10]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tf32_does_not_reach_the_router(dtype):
    tokens, weight = (torch.randn(n, 512, device=CUDA).to(dtype).requires_grad_() for n in (300, 16))
    grads = [torch.randn(300, 16, device=CUDA)]
    router = lambda x, w: torch.ops.edl._router_logits(x, w, torch.float32)
    expected = forward_and_backward(
        lambda x, w: x @ w.T, [x.detach().double().requires_grad_() for x in (tokens, weight)], [grads[0].double()]
    )
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            logits, grad_tokens, grad_weight = forward_and_backward(router, [tokens, weight], grads)
            assert_close(logits, expected[0], tolerance(torch.float32, 512))
            assert_close(grad_tokens, expected[1], tolerance(dtype, 16))
            assert_close(grad_weight, expected[2], tolerance(dtype, 300))
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("sample", [s for s in first_samples() if s.op != "expert_mlp"], ids=str)
def test_no_operator_waits_for_the_device(sample):
    leaves = with_gradients(sample, sample.arguments(CUDA))
    grads = [g.to(CUDA) for g in cotangents(as_tuple(operator(sample.op)(*leaves)))]
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_backward(operator(sample.op), leaves, grads)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_operators_follow_the_current_stream():
    routing = torch.zeros(50000, 64, device=CUDA)
    ids = torch.zeros(50000, dtype=torch.int64, device=CUDA)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # whoever does not queue behind this reads zeros
        routing.fill_(1.0)
        sums, counts = ops.aggregate_routing(routing, ids, 1, "none")
    torch.cuda.current_stream().wait_stream(stream)
    assert (sums == 50000).all() and counts.item() == 50000


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_operators_run_on_the_device_of_their_arguments():
    other = torch.device("cuda:1")
    sums, _ = ops.aggregate_routing(
        torch.ones(9, 4, device=other), torch.zeros(9, dtype=torch.int32, device=other), 1, "none"
    )
    assert sums.device == other and math.isclose(sums.sum().item(), 36)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_values_are_checked_on_the_stream_of_their_device(monkeypatch):
    monkeypatch.setenv("EDL_CHECK", "1")
    other = torch.device("cuda:1")
    arguments = torch.ones(9, 4, device=other), torch.zeros(9, dtype=torch.int32, device=other), 1
    with torch.cuda.graph(torch.cuda.CUDAGraph()):  # of the first device
        ops.aggregate_routing(*arguments)
    stream = torch.cuda.Stream(other)
    with (
        pytest.raises((ValueError, RuntimeError), match="EDL_CHECK=1 reads values on the host"),
        torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream),
    ):
        torch.cuda.set_device(0)
        ops.aggregate_routing(*arguments)


# ---- objectives, of several operators each ----


def observations_on(device, dtype):
    """Two layers of 40 tokens, the last ten of them padding of NaN, on a device."""
    generator = torch.Generator().manual_seed(3)
    layers = []
    for _ in range(2):
        logits, rows = (torch.randn(shape, generator=generator) for shape in ((40, 12), (40, 3, 7)))
        logits[30:], rows[30:] = math.nan, math.nan
        experts = ops.route_tokens(logits.nan_to_num(), 3, "softmax")[1]
        weights = torch.rand(40, 3, generator=generator)
        router, gates = torch.randn(12, 7, generator=generator), torch.randn(12, 10, 7, generator=generator)
        read = [x.to(device, dtype).requires_grad_() for x in (logits, weights, rows, router, gates)]
        gram = read[2] @ read[2].mT
        layers.append((read, read[0], read[1], experts.to(device), gram, read[3], read[4]))
    return layers


OBJECTIVES = {name: each for name, each in edl.objectives.available().items() if each.__module__.startswith("edl.")}


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_objectives_are_those_of_the_cpu(name):
    objective = OBJECTIVES[name]
    options = {"num_domains": 3} if name in ("expert_divergence", "mutual_information") else {}
    options |= {"bins": 4} if name == "modality_mutual_information" else {}
    keep = torch.arange(40) < 30
    labels = {"domain_ids": torch.arange(40) // 10 % 3, "modality_ids": torch.arange(40) % 2}
    if name == "expert_divergence":
        options["sequence_reduction"] = "token"
    results = []
    for device, dtype in ((torch.device("cpu"), torch.float64), (CUDA, torch.float32)):
        layers = observations_on(device, dtype)
        seen = [
            edl.routing.Observation(
                logits,
                weights=weights,
                experts=experts,
                output_gram=gram,
                activation_gram=gram,
                router_gram=gram_of(router),
                router_responses=responses_of(router.float(), gates.float()),
            )
            for _, logits, weights, experts, gram, router, gates in layers
        ]
        bound = edl.objectives.Objectives({name: (objective(**options), 1.0)})
        total, _ = bound(seen, keep.to(device), **{key: each.to(device) for key, each in labels.items()})
        total.backward()
        gradients = [x.grad for read, *_ in layers for x in read if x.grad is not None]
        results.append([total, *gradients])
    for expected, found in zip(*results, strict=True):
        assert_close(found, expected, 1e-4)
