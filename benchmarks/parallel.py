"""What the loss costs across ranks: time and bytes of its all-reduce, in one for all layers or one per layer, on gloo.

    python benchmarks/parallel.py [--save benchmarks/results/NAME.md]

The last table is the demo's model under DDP on two processes: what the loss over both adds to a training step.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
import torch.nn.functional as F
from report import markdown_table, save
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

import edl

sys.path.append(str(Path(__file__).parents[1] / "examples" / "pretrain"))
import model as models

L, E, D, SEQUENCES, LENGTH = 48, 128, 49, 8, 64
REPEATS = 30


def medians(*functions: Callable[[], object], repeats: int = REPEATS) -> list[float]:
    """Milliseconds of each function in turn, over and over, each call started together on all ranks."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats + 2):
        for function, taken in zip(functions, times):
            dist.barrier()
            start = time.perf_counter()
            function()
            taken.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(taken[2:]) for taken in times]


def measure_seam(bias_correction: bool) -> list[float]:
    """Milliseconds of the loss forward: in one process alone, over the group in one call, and layer by layer."""
    logits = [torch.randn(SEQUENCES, LENGTH, E) for _ in range(L)]
    labels = torch.arange(SEQUENCES)
    alone = edl.ExpertDivergenceLoss(D, bias_correction=bias_correction)
    together = edl.ExpertDivergenceLoss(D, bias_correction=bias_correction, group=dist.group.WORLD)
    per_layer = [edl.ExpertDivergenceLoss(D, bias_correction=bias_correction, group=dist.group.WORLD) for _ in range(L)]
    return medians(
        lambda: alone(logits, labels),
        lambda: together(logits, labels),
        lambda: [loss(layer, labels) for loss, layer in zip(per_layer, logits)],
        repeats=7,
    )


def measure_routers() -> list[float]:
    """Milliseconds of 48 routers in turn, each with its own loss: without it, waiting at once, or once it has
    routed."""
    logits = torch.randn(SEQUENCES * LENGTH, E)
    segments = edl.segments.make_segments(SEQUENCES * LENGTH, torch.arange(SEQUENCES), D)
    losses = [edl.ExpertDivergenceLoss(D, group=dist.group.WORLD) for _ in range(L)]

    def route() -> None:
        """What a router does between its logits and its result, as in Megatron-core: scores, choice, map, balance."""
        weights, experts = logits.softmax(dim=-1).topk(8)
        chosen = torch.zeros_like(logits).scatter(1, experts, weights)
        (chosen.bool().sum(dim=0) * logits.softmax(dim=-1).mean(dim=0)).sum()

    def at_once(loss: edl.ExpertDivergenceLoss) -> None:
        loss.from_segments(logits, segments)
        route()

    def beside(loss: edl.ExpertDivergenceLoss) -> None:
        finish = loss.begin_from_segments(logits, segments)
        route()
        finish()

    return medians(
        lambda: [route() for _ in losses],
        lambda: [at_once(loss) for loss in losses],
        lambda: [beside(loss) for loss in losses],
    )


def measure_step() -> list[list[float]]:
    """A training step of the demo's model under DDP, in milliseconds.

    Returns for each of nothing, an all-reduce of as many numbers, the loss of each rank alone, and that of all ranks at
    once and begun beside the other losses: what it adds between the model's output and the backward pass, the time of
    the loss's own backward, and the step.
    """
    torch.manual_seed(0)
    model = DistributedDataParallel(models.LanguageModel(models.ModelSettings()))
    tokens = torch.randint(256, (9, 257))
    labels = torch.arange(9) % 3
    alone, joint = edl.ExpertDivergenceLoss(3), edl.ExpertDivergenceLoss(3, group=dist.group.WORLD)
    routings = model(tokens[:, :-1])[1]
    numbers = torch.zeros(len(routings) * 3 * (routings[0].logits.shape[-1] + 1) + 1, dtype=torch.float64)

    def at_once(loss: edl.ExpertDivergenceLoss, router_logits: list[torch.Tensor]) -> Callable[[], torch.Tensor]:
        result = loss(router_logits, labels)
        return lambda: result

    def all_reduce(_: list[torch.Tensor]) -> None:
        dist.all_reduce(numbers)

    def step(begin: Callable[[list[torch.Tensor]], Callable | None]) -> tuple[float, float, float]:
        dist.barrier()
        start = time.perf_counter()
        model.zero_grad()
        logits, routings = model(tokens[:, :-1])
        dist.barrier()  # a rank that is late would be waited for in any of the sums, and without them in DDP's
        forward = time.perf_counter()
        # Tensors of the loss alone, to see when its own backward pass ends.
        router_logits = [routing.logits.view_as(routing.logits) for routing in routings]
        finish = begin(router_logits)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) + edl.load_balancing_loss(routings)
        backward = []
        if finish is not None:
            divergence = finish()
            divergence.grad_fn.register_prehook(lambda _: backward.append(-time.perf_counter()))
            ends = [0.0]
            for layer in router_logits:
                layer.register_hook(lambda _: ends.append(time.perf_counter()))
            loss = loss + 0.01 * divergence
        forward = time.perf_counter() - forward
        loss.backward()
        end = time.perf_counter()
        return forward, max(ends) + sum(backward) if backward else 0.0, end - start

    arms = [
        lambda _: None,
        all_reduce,
        lambda router_logits: at_once(alone, router_logits),
        lambda router_logits: at_once(joint, router_logits),
        lambda router_logits: joint.begin(router_logits, labels),
    ]
    times = 1e3 * torch.tensor([[step(arm) for arm in arms] for _ in range(2 * REPEATS + 2)][2:], dtype=torch.float64)
    times[:, :, 0] -= times[:, :1, 0].clone()
    return times.median(dim=0).values.tolist()


def rank_main(rank: int, ranks: int, folder: str, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(minutes=5))
    result = function(*arguments)
    if rank == 0:
        torch.save(result, f"{folder}/result")
    dist.destroy_process_group()


def on_ranks(ranks: int, function: Callable, *arguments) -> list:
    with TemporaryDirectory() as folder:
        multiprocessing.spawn(rank_main, (ranks, folder, function, arguments), nprocs=ranks)
        return torch.load(f"{folder}/result")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--save", help="also write the report to this file")
    arguments = parser.parse_args()
    rows = []
    for ranks in (1, 2, 4):
        for bias_correction in (False, True):
            numbers = L * (D * E * (2 if bias_correction else 1) + D) + 1
            alone, together, per_layer = on_ranks(ranks, measure_seam, bias_correction)
            rows.append(
                [str(ranks), "yes" if bias_correction else "no", f"{8 * numbers / 1e6:.2f}"]
                + [f"{value:.1f}" for value in (alone, together, per_layer)]
            )
    seam = markdown_table(
        ["ranks", "bias correction", "MB sent in", "alone ms", "one all-reduce ms", f"{L} all-reduces ms"], rows
    )
    routers = markdown_table(
        ["ranks", "routing alone ms", "loss, then routing ms", "loss beside routing ms"],
        [[str(ranks), *(f"{value:.1f}" for value in on_ranks(ranks, measure_routers))] for ranks in (1, 2)],
    )
    names = [
        "nothing",
        "a bare all-reduce of as many numbers",
        "the loss of each rank alone",
        "the loss of both ranks",
        "the loss of both ranks, begun before the other losses",
    ]
    times = on_ranks(2, measure_step)
    plain = times[0][2]
    step = markdown_table(
        ["added to the step", "forward ms", "its backward ms", "share of the plain step", "step ms"],
        [
            [name, f"{forward:.2f}", f"{backward:.2f}", f"{100 * (forward + backward) / plain:.2f} %", f"{whole:.1f}"]
            for name, (forward, backward, whole) in zip(names, times)
        ],
    )
    save(
        "Expert Divergence loss across ranks (gloo, one thread a rank)",
        torch.device("cpu"),
        [
            (
                f"Forward of {L} layers, E = {E}, D = {D}, {SEQUENCES} sequences of {LENGTH} tokens a rank; backward "
                f"makes no collective:\n\n{seam}"
            ),
            (
                f"{L} routers in turn, each with its own loss, E = {E}, D = {D}, {SEQUENCES * LENGTH} tokens a "
                f"rank:\n\n{routers}"
            ),
            f"The demo's model under DDP on two processes, 9 sequences of 256 bytes each:\n\n{step}",
        ],
        arguments.save,
    )


if __name__ == "__main__":
    main()
