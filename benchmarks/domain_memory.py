"""What one pass over micro-batches costs in exactness: gradients with `DomainMemory` against those of the whole batch.

    python benchmarks/domain_memory.py [--data FOLDER] [--save benchmarks/results/domain_memory.md]

Trains the demo's language model on its text for some steps, then differentiates the loss of the same batches of 24
sequences as a whole and in micro-batches, and compares the gradients of the routers by direction (cosine) and size
(ratio of norms).
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from report import markdown_table, save
from torch import Tensor

import edl

sys.path.append(str(Path(__file__).parents[1] / "examples" / "pretrain"))
import data
import model as models

SEQUENCES = 24
LENGTH = 256
MICRO_BATCHES = [1, 2, 4, 8, 24]
BATCHES = 6
TWO_PASSES = "two passes"


def train(model: torch.nn.Module, batches: "data.Batches", divergence: edl.ExpertDivergenceLoss) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(len(batches) - BATCHES):
        sequences = batches.sequences(step)
        logits, routings = model(sequences[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten())
        loss = loss + 1e-2 * edl.load_balancing_loss(routings)
        loss = loss + 1e-2 * divergence([routing.logits for routing in routings], batches.labels[step])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def gradient(
    model: torch.nn.Module,
    divergence: edl.ExpertDivergenceLoss,
    sequences: Tensor,
    labels: Tensor,
    order: Tensor,
    parts: int,
    two_passes: bool = False,
) -> Tensor:
    """The routers' gradient, averaged over micro-batches, in one vector."""
    model.zero_grad()
    micro_batches = order.chunk(parts)

    def loss_of(rows: Tensor) -> Tensor:
        return divergence([routing.logits for routing in model(sequences[rows, :-1])[1]], labels[rows])

    if two_passes:
        with divergence.memory.collect():
            for rows in micro_batches:
                loss_of(rows)
    for rows in micro_batches:
        loss = loss_of(rows)
        if loss.requires_grad:
            (loss / len(micro_batches)).backward()
    if divergence.memory is not None:
        divergence.memory.step()
    routers = [parameter for name, parameter in model.named_parameters() if "router" in name]
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in routers])


def ways() -> dict[str, Callable[[], edl.DomainMemory | None]]:
    """The memories to compare; each starts empty."""
    return {
        "no memory": lambda: None,
        "one pass": edl.DomainMemory,
        "one pass, decay 0.9": lambda: edl.DomainMemory(decay=0.9),
        TWO_PASSES: edl.DomainMemory,
    }


def compare(model, batches, num_domains: int, by_domain: bool) -> list[list[str]]:
    rows = []
    for parts in MICRO_BATCHES:
        row = [str(parts)]
        for name, make_memory in ways().items():
            divergence = edl.ExpertDivergenceLoss(num_domains, memory=make_memory())
            cosines, ratios = [], []
            for step in range(len(batches) - BATCHES, len(batches)):
                sequences, labels = batches.sequences(step), batches.labels[step]
                order = labels.argsort(stable=True) if by_domain else torch.randperm(SEQUENCES)
                whole = gradient(model, edl.ExpertDivergenceLoss(num_domains), sequences, labels, order, 1)
                own = gradient(model, divergence, sequences, labels, order, parts, name == TWO_PASSES)
                cosines.append(F.cosine_similarity(own, whole, dim=0).item())
                ratios.append((own.norm() / whole.norm()).item())
            row.append(f"{statistics.mean(cosines):.2f} ({statistics.mean(ratios):.2f})")
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--data", default="", help="folder with a sub-folder of text per domain (default: the demo's text)"
    )
    parser.add_argument("--cache", default="demo-text", help="folder for downloaded packages")
    parser.add_argument("--steps", type=int, default=100, help="training steps before (default: 100)")
    parser.add_argument("--save", help="also write the report to this file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    domains = data.load(arguments.data, arguments.cache, LENGTH)
    batches = data.Batches(domains, arguments.steps + BATCHES, SEQUENCES, LENGTH, 0)
    model = models.LanguageModel(models.ModelSettings(sequence_length=LENGTH))
    train(model, batches, edl.ExpertDivergenceLoss(len(domains)))
    header = ["micro-batches", *ways()]
    tables = [
        f"Micro-batches of {name}, cosine (ratio of norms) to the gradient of the whole batch, mean of {BATCHES} "
        "batches:\n\n" + markdown_table(header, compare(model, batches, len(domains), by_domain))
        for name, by_domain in (("sequences in random order", False), ("sequences sorted by domain", True))
    ]
    title = (
        f"DomainMemory: gradients of the routers of the demo's model after {arguments.steps} steps, {SEQUENCES} "
        "sequences"
    )
    save(title, torch.device("cpu"), tables, arguments.save)


if __name__ == "__main__":
    main()
