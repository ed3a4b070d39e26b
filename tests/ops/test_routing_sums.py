"""The operator of statistics against the same sums in plain torch; tests/diagnostics holds it to NumPy."""

import math

import pytest
import torch
from samples import DTYPES
from support import as_tuple
from tolerances import assert_close, tolerance

from edl.diagnostics.statistics.sums import LayerSums, sums_in_torch
from edl.ops import checks

KINDS = [*checks.router_scores(), "none"]
# T, S, E, K
SIZES = [(0, 3, 6, 2), (1, 1, 1, 1), (7, 3, 5, 2), (9, 2, 4, 4), (300, 11, 24, 6), (40, 500, 8, 2), (33, 2, 300, 8)]


def routing_sums(*arguments):
    return LayerSums(*torch.ops.edl._routing_sums(*arguments))


def make(num_tokens, num_segments, num_experts, top_k, kind="softmax", dtype=torch.float64, runs=False, seed=0):
    """Arguments: choices that are not always the highest, some of them none or twice the same."""
    generator = torch.Generator().manual_seed(seed)
    routing = 2.5 * torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64)
    if kind == "none":  # 64ths, which every type has
        draws = (torch.rand(num_tokens, 64, generator=generator).square() * num_experts).long()
        routing = torch.zeros_like(routing).scatter_add_(1, draws, torch.full_like(draws, 1 / 64, dtype=routing.dtype))
    experts = torch.randint(0, num_experts + 1, (num_tokens, top_k), generator=generator)
    ids = torch.randint(-1, num_segments, (num_tokens,), generator=generator, dtype=torch.int32)
    ids = ids.sort().values.roll(num_tokens // 3) if runs else ids
    return routing.to(dtype), experts, ids, num_segments, num_experts, top_k, kind


def assert_sums(arguments, relative):
    actual = routing_sums(*arguments)
    routing, *others = arguments
    wanted = sums_in_torch(None if routing is None else routing.double(), *others)
    for name, sums in actual._asdict().items():
        if name in ("choices", "tokens", "coactivation"):
            assert sums.dtype == torch.int64 and sums.equal(getattr(wanted, name)), name
        else:
            assert sums.dtype == torch.float64
            assert_close(sums, getattr(wanted, name), relative, scale=1.0)
    return actual


@pytest.mark.parametrize("runs", [False, True], ids=["shuffled", "runs"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_size(size, kind, runs):
    for name, dtype in DTYPES.items():
        arguments = make(*size, kind=kind, dtype=dtype, runs=runs)
        sums = assert_sums(arguments, tolerance(torch.float32 if name != "fp64" else dtype, size[0] + size[2]))
        assert sums.margin.isnan().all() == (size[2] == size[3])


@pytest.mark.parametrize("layout", ["sliced", "transposed", "int32"])
def test_every_layout(layout):
    routing, experts, ids, *others = make(50, 3, 9, 3)
    if layout == "sliced":
        wide = torch.cat([routing, torch.full_like(routing, math.nan)], 1)
        arguments = wide[:, :9], torch.cat([experts, experts - 99], 1)[:, :3], ids.repeat_interleave(2)[::2], *others
    elif layout == "transposed":
        arguments = routing.T.contiguous().T, experts.T.contiguous().T, ids, *others
    else:
        arguments = routing, experts.int(), ids.long(), *others
    assert_sums(arguments, tolerance(torch.float64, 59))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
@pytest.mark.parametrize("kind", KINDS)
def test_choices_that_are_not_told_are_the_highest(kind, dtype):
    _, _, ids, *others = make(130, 4, 12, 3, kind=kind)
    routing = (torch.rand(130, 12).argsort(1) * 1.0).to(dtype)  # in every type without ties
    routing = torch.exp2(routing - 12) / (1 - 2.0**-12) if kind == "none" else routing
    told = routing_sums(routing, routing.argsort(1, descending=True)[:, :3], ids, *others)
    for one, other in zip(routing_sums(routing, None, ids, *others), told, strict=True):
        assert one.equal(other)


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_count_is_not_looked_at(kind):
    routing, experts, ids, *others = make(600, 3, 10, 2, kind=kind)
    hostile = torch.tensor([math.nan, math.inf, -math.inf, -7.0], dtype=torch.float64)[torch.arange(600) % 4]
    others_routing = torch.where((ids < 0).unsqueeze(1), hostile.unsqueeze(1), routing)
    others_experts = experts.masked_fill((ids < 0).unsqueeze(1), -(10**12))
    clean = routing_sums(routing, experts, ids, *others)
    for one, other in zip(routing_sums(others_routing, others_experts, ids, *others), clean, strict=True):
        assert one.equal(other)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
@pytest.mark.parametrize("kind", checks.router_scores())
def test_hostile_logits(kind, dtype):
    """Masked, far apart, all alike, too small for any score, not finite: each shows in its own segment alone."""
    rows = torch.randn(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    rows[1, 2:] = -math.inf
    rows[2] = -math.inf
    rows[3] *= 1e4
    rows[4] = 3.0
    rows[5] = -60.0
    rows[6, 5] = math.nan
    rows[7, 0] = math.inf
    rows[8] = torch.tensor([-1e4, -1e4, 88.0, 89.0, -104.0, 0.0])
    routing = rows.to(dtype)
    experts, ids = torch.tensor([[0, 1]]).expand(9, 2), torch.arange(9, dtype=torch.int32)
    for order in (torch.arange(9), torch.tensor([4, 2, 0, 6, 8, 1, 3, 5, 7])):
        arguments = (routing[order], experts, ids[order], 9, 6, 2, kind)
        sums = assert_sums(arguments, tolerance(torch.float64 if dtype == torch.float64 else torch.float32, 6))
        assert sums.entropy[[2, 6]].isnan().all() and sums.margin[[2, 6]].isnan().all()
        assert sums.entropy[[0, 1, 3, 4, 5, 8]].isfinite().all()


def test_hostile_scores():
    scores = torch.tensor(
        [[1.0, 0.0, 0.0, -0.0], [0.25] * 4, [1e-310, 1.0, 0.0, 0.0], [0.5, math.nan, 0.5, 0.0], [0.5, 0.5, 0.0, 0.0]]
    ).double()
    arguments = (scores, torch.tensor([[0, 4]]).expand(5, 2), torch.arange(5), 5, 4, 2, "none")
    sums = assert_sums(arguments, 1e-15)
    assert (
        sums.margin[3].isnan()
        and sums.entropy[3].isnan()
        and sums.mass[3].isnan().tolist() == [False, True] + [False] * 2
    )


def test_choices_alone():
    _, *others = make(90, 3, 7, 2)
    sums = assert_sums((None, *others), 0.0)
    assert sums.mass.isnan().all() and sums.entropy.isnan().all() and sums.margin.isnan().all()


@pytest.mark.parametrize("runs", [False, True], ids=["shuffled", "runs"])
def test_bitwise_equal_for_any_number_of_threads(runs):
    arguments = make(20_000, 5, 16, 4, dtype=torch.float32, runs=runs)
    before, found = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            found.append(routing_sums(*arguments))
    finally:
        torch.set_num_threads(before)
    for sums in found[1:]:
        assert all(one.equal(other) for one, other in zip(sums, found[0], strict=True))


@pytest.mark.parametrize("told", [True, False])
def test_without_data_and_under_compilation(told):
    routing, experts, *others = make(20, 3, 6, 2)
    arguments = (routing, experts if told else None, *others)
    torch.library.opcheck(torch.ops.edl._routing_sums.default, arguments)
    on_meta = torch.ops.edl._routing_sums(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments))
    for wanted, actual in zip(routing_sums(*arguments), as_tuple(on_meta), strict=True):
        assert (actual.shape, actual.dtype, actual.stride()) == (wanted.shape, wanted.dtype, wanted.stride())


def changed(**options):
    names = ("routing", "experts", "segment_ids", "num_segments", "num_experts", "top_k", "scores")
    return tuple({**dict(zip(names, make(8, 2, 4, 2), strict=True)), **options}.values())


def freed(tensor):
    tensor.untyped_storage().resize_(0)
    return tensor


EXPERTS = torch.zeros(8, 2, dtype=torch.long)
REFUSED = {
    "routing or experts must be given": lambda: changed(routing=None, experts=None),
    "routing must have the shape [T, E] (got 1 dimensions)": lambda: changed(routing=torch.zeros(8)),
    "routing must have the shape [T, E] of the ids": lambda: changed(routing=torch.zeros(7, 4)),
    "routing must be float32, float64": lambda: changed(routing=torch.zeros(8, 4, dtype=torch.long)),
    "experts must have the shape [T, K] of the ids": lambda: changed(experts=EXPERTS[:, :1]),
    "experts must be int32 or int64": lambda: changed(experts=torch.zeros(8, 2)),
    "segment_ids must have the shape [T]": lambda: changed(segment_ids=EXPERTS),
    "segment_ids must be int32 or int64": lambda: changed(segment_ids=torch.zeros(8)),
    "num_segments must not be negative": lambda: changed(num_segments=-1),
    "top_k must be at least 1": lambda: changed(top_k=0),
    "top_k must not exceed the number of experts (got 5 of 4)": lambda: changed(top_k=5),
    "scores must be 'softmax', 'sigmoid' or 'none'": lambda: changed(scores="tanh"),
    "a tensor must have the memory of its shape": lambda: changed(experts=freed(torch.zeros_like(EXPERTS))),
    "segment_ids must be at least -1 and below 2": lambda: changed(segment_ids=torch.full([8], 2)),
    "experts must be in [0, 4], 4 for none (got 5)": lambda: changed(experts=EXPERTS + 5, segment_ids=EXPERTS[:, 0]),
    "experts must be in [0, 4], 4 for none (got -1)": lambda: changed(experts=EXPERTS - 1, segment_ids=EXPERTS[:, 0]),
    "with scores = 'none' every row of routing must be a distribution": lambda: changed(scores="none"),
    "with scores = 'softmax' or 'sigmoid' routing must be logits": lambda: changed(routing=torch.full((8, 4), 0.25)),
}


@pytest.mark.parametrize("rule", REFUSED)
def test_what_is_refused(rule):
    with pytest.raises((ValueError, IndexError)) as error:
        routing_sums(*REFUSED[rule]())
    assert str(error.value).startswith("edl::_routing_sums: ") and rule in str(error.value)
    assert isinstance(error.value, IndexError) == ("got 5)" in rule or "got -1)" in rule or "below 2" in rule)
