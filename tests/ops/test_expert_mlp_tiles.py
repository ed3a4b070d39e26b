"""expert_mlp in bfloat16 on tiles: on the stand-in of their instructions everywhere, on the instructions where the
processor has them."""

import ctypes
import itertools
import mmap
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tile_stand_in
import torch

from edl import ops

TESTS = Path(__file__).parents[1]
HAS_TILES = torch.ops.edl._cpu_instruction_set() == "avx512_amx"
EPS = torch.finfo(torch.bfloat16).eps / 2  # of a rounding to nearest
EPS32 = torch.finfo(torch.float32).eps


@pytest.fixture(params=["stand-in", "instructions"])
def tiles(request):
    """The loops on tiles, in use."""
    if request.param == "instructions":
        if not HAS_TILES:
            pytest.skip("needs a processor with AMX")
        yield
    else:
        with tile_stand_in.in_use():
            yield


def make(rows, hidden_size, intermediate_size, top_k=1, scale=1.0, padding=0):
    """Arguments of expert_mlp in bfloat16; rows of float parameters are `padding` numbers of NaN apart."""

    def normal(*shape, scale=1.0):
        whole = torch.full((*shape[:-1], shape[-1] + padding), float("nan"), dtype=torch.bfloat16)
        whole[..., : shape[-1]] = torch.randn(shape) * scale
        return whole[..., : shape[-1]]

    num_experts = len(rows)
    slots = torch.arange(num_experts).repeat_interleave(torch.tensor(rows))
    slots = slots[torch.randperm(len(slots))]
    experts = slots[: len(slots) // top_k * top_k].view(-1, top_k)
    tokens, weights = normal(len(experts), hidden_size), torch.randn(experts.shape)
    gate_up = normal(num_experts, 2 * intermediate_size, hidden_size, scale=scale * hidden_size**-0.5)
    down = normal(num_experts, hidden_size, intermediate_size, scale=intermediate_size**-0.5)
    return tokens, weights, *ops.sort_by_expert(experts, num_experts), gate_up, down


def run(arguments, grad_output):
    """Output, pre-activation, and the gradients of tokens, weights, gate_up and down."""
    output, pre_activation, *_ = torch.ops.edl._expert_mlp_forward(*arguments, False, False)
    grads = torch.ops.edl._expert_mlp_backward(grad_output, None, None, *arguments, pre_activation, None, [True] * 4)
    return [output, pre_activation, *grads]


def expected(arguments, grad_output, kept):
    """What `run` gives in float64, each with a bound of its error: every product of bfloat16 operands within its length
    of float32 sums, with one rounding of what is multiplied again, and one of the result. Backward reads the
    pre-activation as it was `kept`."""
    tokens, weights, row_order, offsets, gate_up, down = (
        x.double() if x.is_floating_point() else x.long() for x in arguments
    )
    top_k, (hidden, intermediate) = weights.shape[1], down.shape[1:]
    results = [torch.zeros_like(x) for x in (tokens, kept.double(), tokens, weights, gate_up, down)]
    bounds = [torch.zeros_like(x) for x in results]
    flat_grad = results[3].view(-1)

    def add(which, where, value, bound):
        for sums, part in ((results, value), (bounds, bound)):
            if isinstance(where, int):
                sums[which][where] += part
            else:
                sums[which].index_add_(0, where, part)

    for e, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        slots = row_order[begin:end]
        x, factor, token = tokens[slots // top_k], weights.view(-1)[slots, None], slots // top_k
        grad = grad_output.double()[token]

        pre = x @ gate_up[e].T
        pre_bound = hidden * EPS32 * (x.abs() @ gate_up[e].T.abs())
        results[1][begin:end], bounds[1][begin:end] = pre, pre_bound + EPS * (pre.abs() + pre_bound)
        gate, up = pre.chunk(2, 1)
        gate_bound, up_bound = pre_bound.chunk(2, 1)
        activation = torch.nn.functional.silu(gate) * up
        # Slopes of silu are at most 1.1.
        activation_bound = (1.1 * gate_bound * (up.abs() + up_bound) + gate.abs() * up_bound) + 8 * EPS32 * (
            activation.abs()
        )
        activation_bound = activation_bound + EPS * (activation.abs() + activation_bound)
        size = activation.abs() @ down[e].T.abs()
        add(
            0,
            token,
            factor * (activation @ down[e].T),
            factor.abs() * (activation_bound @ down[e].T.abs() + (intermediate + 8) * EPS32 * size),
        )

        gate, up = kept.double()[begin:end].chunk(2, 1)
        sigmoid = gate.sigmoid()
        silu, slope = gate * sigmoid, sigmoid * (1 + gate * (1 - sigmoid))
        d = grad @ down[e]
        d_bound = hidden * EPS32 * (grad.abs() @ down[e].abs())
        flat_grad[slots] = (d * silu * up).sum(1)
        bounds[3].view(-1)[slots] = ((d_bound + (intermediate + 16) * EPS32 * d.abs()) * (silu * up).abs()).sum(1)
        slopes = torch.cat([up * slope, silu], 1)
        absolute = torch.cat([up * (sigmoid + (gate * sigmoid).abs()), silu], 1).abs()  # before the slope cancels
        wide, wide_bound = torch.cat([d, d], 1), torch.cat([d_bound, d_bound], 1)
        grad_pre = factor * wide * slopes
        grad_pre_bound = factor.abs() * (wide_bound * absolute + 16 * EPS32 * wide.abs() * absolute)
        grad_pre_bound = grad_pre_bound + EPS * (grad_pre.abs() + grad_pre_bound)
        size = (grad_pre.abs() + grad_pre_bound) @ gate_up[e].abs()
        add(2, token, grad_pre @ gate_up[e], grad_pre_bound @ gate_up[e].abs() + (2 * intermediate + 8) * EPS32 * size)
        length = (end - begin + 8) * EPS32
        size = (grad_pre.abs() + grad_pre_bound).T @ x.abs()
        add(4, e, grad_pre.T @ x, grad_pre_bound.T @ x.abs() + length * size)
        scaled = factor * silu * up
        scaled_bound = 16 * EPS32 * scaled.abs() + EPS * scaled.abs() * (1 + 16 * EPS32)
        size = grad.abs().T @ (scaled.abs() + scaled_bound)
        add(5, e, grad.T @ scaled, grad.abs().T @ scaled_bound + length * size)
    for i in (0, 2, 4, 5):  # results are bfloat16
        bounds[i] = bounds[i] + EPS * (results[i].abs() + bounds[i])
    return results, bounds


NAMES = ["output", "pre-activation", "grad tokens", "grad weights", "grad gate_up", "grad down"]


def assert_within(actual, results, bounds):
    for name, value, wanted, bound in zip(NAMES, actual, results, bounds, strict=True):
        excess = (value.double() - wanted).abs() - bound * 1.0001
        assert (excess <= 1e-30).all(), f"{name}: {excess.max().item():.3g} beyond its bound"


SIZES = [(1, 1), (2, 3), (15, 16), (16, 15), (17, 31), (31, 33), (32, 32), (33, 17), (47, 64), (64, 47), (130, 260)]


@pytest.mark.parametrize("hidden_size, intermediate_size", SIZES)
def test_each_product_is_within_the_bound_of_its_length(tiles, hidden_size, intermediate_size):
    """Rows from 0 on, no size a multiple of anything, NaN between the rows, a factor of 0, and K of 2."""
    arguments = make(
        [0, 1, 2, 15, 16, 17, 0, 31, 32, 33, 63, 64, 65, 149, 0], hidden_size, intermediate_size, 2, padding=5
    )
    arguments[1].view(-1)[3] = 0
    grad_output = torch.randn(arguments[0].shape).bfloat16()
    actual = run(arguments, grad_output)
    assert_within(actual, *expected(arguments, grad_output, actual[1]))
    assert all((grad[[0, 6, 14]] == 0).all() for grad in actual[4:])


@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_small_and_large_pre_activations(tiles, scale):
    arguments = make([40, 3, 0, 90], 48, 40, scale=scale)
    grad_output = torch.randn(arguments[0].shape).bfloat16()
    actual = run(arguments, grad_output)
    assert_within(actual, *expected(arguments, grad_output, actual[1]))


def test_bitwise_equal_for_one_to_eight_threads(tiles):
    """An expert is longer than the window of one thread, of two, of three, and windows end elsewhere for each."""
    arguments = make([1, 33, 1100, 64, 0, 5, 200], 2048, 16)
    grad_output = torch.randn(arguments[0].shape).bfloat16()
    before, first = torch.get_num_threads(), None
    try:
        for num_threads in range(1, 9):
            torch.set_num_threads(num_threads)
            results = run(arguments, grad_output)
            first = first or results
            assert all(map(torch.equal, results, first)), f"{num_threads} threads"
    finally:
        torch.set_num_threads(before)
    assert_within(first, *expected(arguments, grad_output, first[1]))


def test_threads_may_change_between_forward_and_backward(tiles):
    arguments = make([100, 700], 64, 80)
    leaves = [x.requires_grad_() for x in arguments if x.is_floating_point()]
    before, results = torch.get_num_threads(), []
    try:
        for forward, backward in ((1, 1), (2, 1), (1, 3)):
            torch.set_num_threads(forward)
            output = ops.expert_mlp(*arguments)
            torch.set_num_threads(backward)
            results.append(torch.autograd.grad(output.float().square().sum(), leaves))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, results[0], results[1])) and all(map(torch.equal, results[0], results[2]))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["tokens", "grad_output", "gate_up", "down", "weights"])
def test_nan_and_infinity_travel_as_without_tiles(tiles, where, poison):
    arguments = list(make([20, 5, 0, 40], 20, 18))
    grad_output = torch.randn(arguments[0].shape).bfloat16()
    place = {"tokens": 0, "weights": 1, "gate_up": 4, "down": 5}
    tensor = grad_output if where == "grad_output" else arguments[place[where]]
    tensor.view(-1)[17] = poison
    arguments[1].view(-1)[30] = 0
    wide = [x.float() if x.is_floating_point() else x for x in arguments]
    for name, actual, wanted in zip(NAMES, run(arguments, grad_output), run(wide, grad_output.float()), strict=True):
        assert torch.equal(actual.isfinite(), wanted.isfinite()), name
        assert torch.equal(actual.isnan(), wanted.isnan()), name


def at_the_end_of_a_page(tensor):
    """The same numbers, behind which reading faults."""
    page = mmap.PAGESIZE
    size = -(-tensor.numel() * tensor.element_size() // page) * page
    memory = mmap.mmap(-1, size + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    assert protect(ctypes.c_void_p(address + size), ctypes.c_size_t(page), 0) == 0
    offset = size - tensor.numel() * tensor.element_size()
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
    return copy.copy_(tensor)


@pytest.mark.parametrize("hidden_size, intermediate_size", [(33, 17), (48, 40), (64, 32), (1, 1)])
def test_nothing_is_read_behind_the_last_row(tiles, hidden_size, intermediate_size):
    arguments = make([3, 40, 17], hidden_size, intermediate_size)
    grad_output = torch.randn(arguments[0].shape).bfloat16()
    wanted = run(arguments, grad_output)
    guarded = [at_the_end_of_a_page(x) for x in arguments]
    assert all(map(torch.equal, run(guarded, at_the_end_of_a_page(grad_output)), wanted))


def test_two_layers_of_different_sizes_in_two_threads(tiles):
    layers = [make([50, 0, 33, 7], 40, 24), make([5, 90], 70, 100)]
    grads = [torch.randn(arguments[0].shape).bfloat16() for arguments in layers]
    wanted = list(map(run, layers, grads))
    wrong = []

    def repeat(i):
        results = [run(layers[i], grads[i]) for _ in range(10)]
        wrong.extend(i for result in results if not all(map(torch.equal, result, wanted[i])))

    threads = [threading.Thread(target=repeat, args=(i % 2,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_beside_the_products_of_torch_in_turn(tiles):
    """torch's own products in bfloat16 use the same registers, in this thread and others, also from compiled code."""
    arguments = make([64, 33], 96, 64)
    grad_output = torch.randn(arguments[0].shape).bfloat16()
    a, b = torch.randn(65, 130).bfloat16(), torch.randn(130, 257).bfloat16()
    compiled = torch.compile(lambda x, y: (x @ y).relu())
    wanted, product, activated = run(arguments, grad_output), a @ b, compiled(a, b)
    wrong = []

    def take_turns():
        for _ in range(5):
            right = torch.equal(a @ b, product) and all(map(torch.equal, run(arguments, grad_output), wanted))
            if not right or not torch.equal(compiled(a, b), activated):
                wrong.append(threading.current_thread())

    threads = [threading.Thread(target=take_turns) for _ in range(3)]
    for thread in threads:
        thread.start()
    take_turns()
    for thread in threads:
        thread.join()
    assert not wrong


def test_all_claims_about_expert_mlp_hold_on_the_stand_in():
    """Also with the fault handler of pytest, whose stack for signals the system may find too small beside tiles."""
    files = [str(TESTS / "ops" / name) for name in ("test_expert_mlp.py", "test_expert_mlp_with_gram.py")]
    plugins = ["-p", "no:cacheprovider", "-p", "tile_stand_in", "-p", "faulthandler"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *plugins, "-m", "not cuda", *files],
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])},
    )
    assert result.returncode == 0, result.stdout
