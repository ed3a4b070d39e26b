"""What the loss costs across ranks: time and bytes of its all-reduce, in one for all layers or one per layer, on gloo.

    python benchmarks/parallel.py [--save benchmarks/results/NAME.md]

The last table is the demo's model under DDP on two processes: a training step without and with the loss over both.
"""

import argparse
import statistics
import sys
import time
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from report import markdown_table, save
from torch.nn.parallel import DistributedDataParallel

import edl

sys.path.append(str(Path(__file__).parents[1] / "examples" / "pretrain"))
import model as models  # noqa: E402

L, E, D, SEQUENCES, LENGTH = 48, 128, 49, 8, 64
REPEATS = 7


def median_milliseconds(function: Callable[[], object]) -> float:
    """Median over repeats, each started together on all ranks."""
    seconds = []
    for _ in range(REPEATS + 2):
        dist.barrier()
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds[2:])


def measure_seam(bias_correction: bool) -> list[float]:
    """Milliseconds of the loss forward: in one process alone, over the group in one call, and layer by layer."""
    logits = [torch.randn(SEQUENCES, LENGTH, E) for _ in range(L)]
    labels = torch.arange(SEQUENCES)
    alone = edl.ExpertDivergenceLoss(D, bias_correction=bias_correction)
    together = edl.ExpertDivergenceLoss(D, bias_correction=bias_correction, group=dist.group.WORLD)
    per_layer = [edl.ExpertDivergenceLoss(D, bias_correction=bias_correction, group=dist.group.WORLD) for _ in range(L)]
    return [
        median_milliseconds(lambda: alone(logits, labels)),
        median_milliseconds(lambda: together(logits, labels)),
        median_milliseconds(lambda: [loss(layer, labels) for loss, layer in zip(per_layer, logits)]),
    ]


def measure_step() -> list[float]:
    """Milliseconds of a training step of the demo's model under DDP: without the loss, and with it over all ranks."""
    torch.manual_seed(0)
    model = DistributedDataParallel(models.LanguageModel(models.ModelSettings()))
    tokens = torch.randint(256, (9, 257))
    labels = torch.arange(9) % 3
    divergence = edl.ExpertDivergenceLoss(3, group=dist.group.WORLD)

    def step(beta: float) -> None:
        model.zero_grad()
        logits, routings = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) + edl.load_balancing_loss(routings)
        if beta:
            loss = loss + beta * divergence([routing.logits for routing in routings], labels)
        loss.backward()

    def loss_alone() -> None:
        leaves = [logits.clone().requires_grad_() for logits in router_logits]
        divergence(leaves, labels).backward()

    with torch.no_grad():
        router_logits = [routing.logits for routing in model(tokens[:, :-1])[1]]
    return [
        median_milliseconds(lambda: step(0.0)),
        median_milliseconds(lambda: step(0.01)),
        median_milliseconds(loss_alone),
    ]


def rank_main(rank: int, ranks: int, folder: str, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(minutes=5))
    result = function(*arguments)
    if rank == 0:
        torch.save(result, f"{folder}/result")
    dist.destroy_process_group()


def on_ranks(ranks: int, function: Callable, *arguments) -> list[float]:
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
    plain, with_loss, loss = on_ranks(2, measure_step)
    step = markdown_table(
        ["step ms", "step with the loss ms", "loss alone ms", "share of the step"],
        [[f"{plain:.1f}", f"{with_loss:.1f}", f"{loss:.2f}", f"{100 * loss / plain:.2f} %"]],
    )
    save(
        "Expert Divergence loss across ranks (gloo, one thread a rank)",
        torch.device("cpu"),
        [
            f"Forward of {L} layers, E = {E}, D = {D}, {SEQUENCES} sequences of {LENGTH} tokens a rank; backward makes no collective:\n\n{seam}",
            f"The demo's model under DDP on two processes, 9 sequences of 256 bytes each:\n\n{step}",
        ],
        arguments.save,
    )


if __name__ == "__main__":
    main()
