"""The router and the whole layer: each part's share of the layer's time, and the parts beside torch's idioms.

    python benchmarks/router.py [--device cuda] [--threads N] [--quick] [--save FILE]

Everything is forward and backward, but the sort, which has no backward pass.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from measure import Timing, error, interleaved
from peers import GROUPED_MM, PEERS
from report import Run, Section, main, markdown_table
from shapes import LAYER, Shape
from torch import Tensor, nn
from watch import milliseconds

import edl
from edl import ops

ROUTERS = [(2048, 64, 8), (8192, 128, 8), (8192, 256, 8)]  # T, E, K
SEQUENCES, DOMAINS = 16, 4
Function = Callable[[], object]


def by_softmax_topk(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """As transformers writes it."""
    weights, experts = logits.softmax(dim=1, dtype=torch.float32).topk(top_k, dim=1)
    return weights / weights.sum(dim=1, keepdim=True), experts


def sort_by_argsort(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    return order, F.pad(torch.bincount(flat, minlength=num_experts).cumsum(0), (1, 0))


def sort_by_histogram(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """As transformers' grouped_mm writes it; the order within an expert is left open."""
    sorted_experts, order = torch.sort(experts.flatten())
    floats = sorted_experts.float() if experts.device.type == "cpu" else sorted_experts.int()
    counts = torch.histc(floats, bins=num_experts, min=0, max=num_experts - 1)
    return order, F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))


def measure_route(size: tuple[int, int, int], run: Run) -> list[str]:
    """One row: scores, the choice of K experts and their weights."""
    num_tokens, num_experts, top_k = size
    logits = torch.randn(num_tokens, num_experts, device=run.device).requires_grad_()
    upstream = torch.randn(num_tokens, top_k, device=run.device)
    compiled = torch.compile(by_softmax_topk, dynamic=False)
    ways = {
        "edl": lambda x: ops.route_tokens(x, top_k, "softmax"),
        "softmax + topk": lambda x: by_softmax_topk(x, top_k),
        "compiled": lambda x: compiled(x, top_k),
    }

    def step(way: Callable) -> Callable[[], tuple[Tensor, Tensor]]:
        def run_step() -> tuple[Tensor, Tensor]:
            weights, _ = way(logits)
            return weights, torch.autograd.grad(weights, logits, upstream)[0]

        return run_step

    exact = logits.detach().double().requires_grad_()
    weights = exact.softmax(dim=1).topk(top_k, dim=1).values
    weights = weights / weights.sum(dim=1, keepdim=True)
    expected = weights.detach(), torch.autograd.grad(weights, exact, upstream.double())[0]
    steps = {name: step(way) for name, way in ways.items()}
    for name, function in steps.items():
        distance = error(function(), expected)
        if not distance < 1e-5:
            raise ArithmeticError(f"route_tokens, {name}: wrong by {distance:.1e} of the float64 result")
    return [*map(str, size), *cells(interleaved(steps, run.watch, run.seconds))]


def measure_sort(size: tuple[int, int, int], run: Run) -> list[str]:
    """One row: the order of rows by expert, and where each expert's begin."""
    num_tokens, num_experts, top_k = size
    experts = torch.rand(num_tokens, num_experts, device=run.device).topk(top_k, dim=1).indices
    ways: dict[str, Function] = {
        "edl": lambda: ops.sort_by_expert(experts, num_experts),
        "argsort": lambda: sort_by_argsort(experts, num_experts),
        "sort + histc": lambda: sort_by_histogram(experts, num_experts),
    }
    order, offsets = ways["edl"]()
    expected_order, expected_offsets = ways["argsort"]()
    if not (torch.equal(order.long(), expected_order) and torch.equal(offsets.long(), expected_offsets)):
        raise ArithmeticError("sort_by_expert: differs from a stable argsort")
    ways["sort + histc"]()
    return [*map(str, size), *cells(interleaved(ways, run.watch, run.seconds))]


def cells(times: dict[str, Timing]) -> list[str]:
    """Each time, and how many times edl's it is."""
    return [f"{time} {time.median / times['edl'].median:.2f}x" for time in times.values()]


class TransformersBlock(nn.Module):
    """transformers' own block with the layer's parameters."""

    def __init__(self, layer: edl.MoELayer, implementation: str = "grouped_mm") -> None:
        super().__init__()
        self.block = layer.to_transformers("qwen3_moe")
        self.block.experts.config._experts_implementation = implementation

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [T, H] to their update [T, H] and the router's logits [T, E]."""
        logits, weights, experts = self.block.gate(hidden)
        return self.block.experts(hidden, experts, weights), logits


def layer_parts(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Function]:
    """The whole layer, and each of its parts on the layer's own data."""
    num_tokens, hidden, intermediate, num_experts, top_k = shape
    layer = edl.MoELayer(hidden, intermediate, num_experts, top_k, device=device, dtype=dtype)
    tokens, upstream = (torch.randn(num_tokens, hidden, device=device).to(dtype) for _ in range(2))
    tokens.requires_grad_()
    divergence = edl.ExpertDivergenceLoss(num_domains=DOMAINS)
    labels = torch.arange(SEQUENCES, device=device) % DOMAINS
    with torch.no_grad():
        logits = layer.router.logits_of(tokens)
        weights, experts = ops.route_tokens(logits, top_k, "softmax")
        row_order, offsets = ops.sort_by_expert(experts, num_experts)
    logits, weights = logits.requires_grad_(), weights.requires_grad_()
    logits_upstream, weights_upstream = torch.randn_like(logits), torch.randn_like(weights)
    leaves = [tokens, weights, layer.gate_up_proj, layer.down_proj]
    gradients = torch.autograd.grad
    parts = {
        "layer": lambda: gradients(layer(tokens)[0], [tokens, *layer.parameters()], upstream),
        "router product": lambda: gradients(
            layer.router.logits_of(tokens), [tokens, layer.router.weight], logits_upstream
        ),
        "route_tokens": lambda: gradients(ops.route_tokens(logits, top_k, "softmax")[0], logits, weights_upstream),
        "sort_by_expert": lambda: ops.sort_by_expert(experts, num_experts),
        "divergence loss": lambda: gradients(divergence(logits, labels), logits),
        "expert_mlp": lambda: gradients(
            ops.expert_mlp(tokens, weights, row_order, offsets, *leaves[2:]), leaves, upstream
        ),
    }
    if (
        dtype == torch.float32 and PEERS[GROUPED_MM].lacks(device) is None
    ):  # in 16 bits its router chooses other experts
        block = TransformersBlock(layer)
        parts["transformers block"] = lambda: gradients(block(tokens)[0], [tokens, *block.parameters()], upstream)
    return parts


def check_layer(parts: dict[str, Function]) -> None:
    """The layer's gradients are those of transformers' block; moe.py holds the experts to float64."""
    if "transformers block" in parts:
        distance = error(parts["layer"]()[:1], parts["transformers block"]()[:1])
        if not distance < 1e-4:
            raise ArithmeticError(f"the layer's gradient is {distance:.1e} away from that of transformers' block")


SMALL_PARTS = ["router product", "route_tokens", "sort_by_expert", "divergence loss"]


def measure_layer(shape: Shape, dtype: torch.dtype, run: Run) -> list[str]:
    """One row: the layer's milliseconds, each part's share, and the time of transformers' block."""
    parts = layer_parts(shape, dtype, run.device)
    check_layer(parts)
    known = {name: milliseconds(function, run.device) for name, function in parts.items()}
    times = interleaved(parts, run.watch, run.seconds, known)
    whole = times["layer"].median
    shares = [times[name].median / whole for name in SMALL_PARTS]
    cells = [f"{share:.1%}" for share in [*shares, sum(shares)]]
    block = times.get("transformers block")
    cells += [f"{times['expert_mlp'].median / whole:.0%}", f"{block} {block.median / whole:.2f}x" if block else "-"]
    return [str(dtype).removeprefix("torch."), str(times["layer"]), *cells]


def sections(run: Run) -> Iterator[Section]:
    """The layer's shares, then the parts beside idioms."""
    torch._inductor.config.cpp.threads = run.threads
    dtypes = [torch.float32, torch.bfloat16]
    header = ["type", "layer ms", *SMALL_PARTS, "all four", "expert_mlp", "transformers block ms"]
    rows = [measure_layer(LAYER, dtype, run) for dtype in dtypes]
    title = f"The layer's parts, share of its time, {LAYER}{run.memory}"
    yield Section(title, markdown_table(header, rows), summary=True)
    sizes = ROUTERS[:1] if run.quick else ROUTERS
    torch._dynamo.reset()
    rows = [measure_route(size, run) for size in sizes]
    yield Section("route_tokens, ms", markdown_table(["T", "E", "K", "edl", "softmax + topk", "compiled"], rows))
    rows = [measure_sort(size, run) for size in sizes]
    yield Section("sort_by_expert, ms", markdown_table(["T", "E", "K", "edl", "argsort", "sort + histc"], rows))


if __name__ == "__main__":
    main(__doc__, sections)
