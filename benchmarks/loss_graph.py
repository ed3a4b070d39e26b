"""The loss's operators on CUDA, as training runs them: inside a CUDA graph, over buffers larger than the caches.

    python benchmarks/loss_graph.py [--save FILE]

Forward and backward from ready segment ids (64 segments, 49 domains), beside the floor: the bytes of one read and one
write of the routing at the copy bandwidth measured in this run.
"""

from collections.abc import Callable, Iterator

import torch
from report import Run, Section, main, markdown_table
from torch import Tensor

from edl import ops

SEGMENTS, DOMAINS = 64, 49
SHAPES = [(8192, 128), (32768, 128), (131072, 128), (1048576, 128)]  # T, E
CACHE_BYTES = 256 << 20  # work on more than this, so that nothing stays in the caches
DEVICE = torch.device("cuda")


def microseconds(function: Callable[[], object], replays: int = 20) -> float:
    """Median time of a graph of the function."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    times = []
    for _ in range(replays + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return sorted(times[3:])[replays // 2]


def copy_bandwidth() -> float:
    """Bytes read and written per second by torch's copy."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / (microseconds(lambda: target.copy_(source)) * 1e-6)


def loss_of(routing: Tensor, ids: Tensor, labels: Tensor, scores: str) -> Tensor:
    sums, counts = ops.aggregate_routing(routing, ids, SEGMENTS, scores)
    moments, _, segments = ops.domain_moments(sums, counts, labels, DOMAINS)
    return ops.expert_divergence(moments, segments)


def measure_loss(shape: tuple[int, int], dtype: torch.dtype, scores: str, bandwidth: float) -> list[str]:
    """One row: microseconds of a step and of its first operator alone, and the floor."""
    num_tokens, num_experts = shape
    size = num_tokens * num_experts * dtype.itemsize
    copies = max(1, CACHE_BYTES // size)
    logits = [torch.randn(num_tokens, num_experts, device=DEVICE) * 2 for _ in range(copies)]
    leaves = [(x.softmax(dim=1) if scores == "none" else x).to(dtype).requires_grad_() for x in logits]
    ids = torch.arange(num_tokens, device=DEVICE) * SEGMENTS // num_tokens
    labels = torch.arange(SEGMENTS, device=DEVICE) % DOMAINS

    def step() -> None:
        for leaf in leaves:
            torch.autograd.grad(loss_of(leaf, ids, labels, scores), leaf)

    def first_operator() -> None:
        for leaf in leaves:
            ops.aggregate_routing(leaf.detach(), ids, SEGMENTS, scores)

    reads = 1 if scores == "none" else 2  # the backward pass needs the logits again
    floor = (reads + 1) * size / bandwidth * 1e6
    total, first = microseconds(step) / copies, microseconds(first_operator) / copies
    name = f"{str(dtype).removeprefix('torch.')}, {scores}"
    return [str(num_tokens), name, f"{floor:.1f}", f"{total:.1f} ({total / floor:.1f}x)", f"{first:.1f}"]


def sections(run: Run) -> Iterator[Section]:
    """Every shape and type."""
    bandwidth = copy_bandwidth()
    kinds = [(torch.float32, "none"), (torch.bfloat16, "none"), (torch.float32, "softmax"), (torch.bfloat16, "softmax")]
    text = markdown_table(
        ["T", "routing", "floor µs", "three operators", "aggregate_routing forward"],
        [measure_loss(shape, *kind, bandwidth) for shape in SHAPES for kind in kinds],
    )
    yield Section(f"Loss under a CUDA graph, forward + backward, E = 128, copies at {bandwidth / 1e12:.2f} TB/s", text)


if __name__ == "__main__":
    main(__doc__, sections)
