"""Data parallel training: the loss over the batch of all ranks. What edl adds to DDP is marked with `# +`.

    torchrun --nproc-per-node 2 examples/distributed/train.py

Runs with gloo on CPUs and with NCCL on GPUs, on any number of processes. It prints how far the averaged gradients are
from those of one process that sees the whole batch, with the loss over all ranks and with a loss per rank.
"""

import copy
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import edl  # +

sys.path.insert(0, str(Path(__file__).parents[1]))
from small_model import NUM_DOMAINS, SmallModel, make_batch, next_token_loss

STEPS = 20
BETA = 0.1
SEQUENCES_PER_RANK = 2  # fewer than there are domains: alone, no rank could tell all of them apart


def total_loss(model, divergence, tokens, domain_ids):
    logits, router_logits = model(tokens)
    return next_token_loss(logits, tokens) + BETA * divergence(router_logits, domain_ids)  # +


def difference_to_one_process(model, divergence, tokens, domain_ids, mine):
    """The largest difference of a parameter's gradient, relative to its largest entry."""
    alone = copy.deepcopy(model.module)
    total_loss(alone, edl.ExpertDivergenceLoss(NUM_DOMAINS), tokens, domain_ids).backward()
    model.zero_grad()
    total_loss(model, divergence, tokens[mine], domain_ids[mine]).backward()
    differences = [
        (own.grad - expected.grad).abs().max() / expected.grad.abs().max()
        for own, expected in zip(model.module.parameters(), alone.parameters())
    ]
    return max(differences).item()


def main():
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = slice(rank * SEQUENCES_PER_RANK, (rank + 1) * SEQUENCES_PER_RANK)
    torch.manual_seed(0)
    model = DistributedDataParallel(SmallModel().to(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    divergence = edl.ExpertDivergenceLoss(NUM_DOMAINS, group=dist.group.WORLD)  # +

    def batch(step):
        return (x.to(device) for x in make_batch(SEQUENCES_PER_RANK * ranks, 64, seed=step))

    tokens, domain_ids = batch(0)
    over_all = difference_to_one_process(model, divergence, tokens, domain_ids, mine)
    per_rank = difference_to_one_process(model, edl.ExpertDivergenceLoss(NUM_DOMAINS), tokens, domain_ids, mine)
    if rank == 0:
        print(f"{ranks} ranks, gradients against one process with the whole batch:")
        print(f"  loss over all ranks  differs by {over_all:.1e}")
        print(f"  loss per rank        differs by {per_rank:.1e}")
    for step in range(STEPS):
        tokens, domain_ids = batch(step)
        optimizer.zero_grad()
        loss = total_loss(model, divergence, tokens[mine], domain_ids[mine])
        loss.backward()
        optimizer.step()
        if rank == 0 and step % 5 == 4:
            print(f"step {step + 1:2}  loss of rank 0 {loss.item():.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
