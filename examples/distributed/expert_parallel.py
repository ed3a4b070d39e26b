"""Expert parallelism: the 8 experts of a layer spread over ranks that also share the batch, beside one process that has
both.

torchrun --nproc-per-node 2 examples/distributed/expert_parallel.py
"""

import copy
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import edl

HIDDEN, CLASSES, BATCH = 32, 4, 64


class Model(nn.Module):
    """A layer of 8 experts between two linear ones."""

    def __init__(self, expert_group=None) -> None:
        super().__init__()
        self.first = nn.Linear(HIDDEN, HIDDEN)
        self.experts = edl.MoELayer(HIDDEN, 48, num_experts=8, top_k=2, num_shared_experts=1, expert_group=expert_group)
        self.last = nn.Linear(HIDDEN, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """`Tensor[T, H]` → logits `Tensor[T, CLASSES]`."""
        hidden = self.first(tokens)
        return self.last(hidden + self.experts(hidden)[0])


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """A group of parameters for the experts, which are DTensors, and one for all others."""
    experts = edl.expert_parallel.expert_parameters(model)
    others = [parameter for name, parameter in model.named_parameters() if name not in experts]
    groups = [{"params": parameters} for parameters in (list(experts.values()), others) if parameters]
    return torch.optim.AdamW(groups, lr=1e-2)


def make_batch(step: int) -> tuple[Tensor, Tensor]:
    """The batch of all ranks: the class of a token is its largest entry among the first few."""
    tokens = torch.randn(BATCH, HIDDEN, generator=torch.Generator().manual_seed(step))
    return tokens, tokens[:, :CLASSES].argmax(dim=1)


def main() -> None:
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()

    with torch.device(device_type):
        torch.manual_seed(0)  # the same on every rank: each keeps what it holds of the same start
        model = Model(dist.group.WORLD)
        torch.manual_seed(0)
        alone = Model()
    edl.expert_parallel.exclude_from_ddp(model)
    wrapped = DistributedDataParallel(model)
    optimizers = [make_optimizer(wrapped), make_optimizer(alone)]
    start = copy.deepcopy(alone.state_dict())

    for step in range(20):
        tokens, classes = (x.to(device_type) for x in make_batch(step))
        own = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
        loss = F.cross_entropy(wrapped(tokens[own]), classes[own])
        loss.backward()
        edl.expert_parallel.average_expert_gradients(wrapped)
        edl.expert_parallel.clip_grad_norm_(wrapped, 1.0)

        loss_alone = F.cross_entropy(alone(tokens), classes)
        loss_alone.backward()
        nn.utils.clip_grad_norm_(alone.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        dist.all_reduce(loss.detach_())
        if rank == 0 and step % 5 == 4:
            print(f"step {step + 1:2}  loss {loss.item() / size:.6f}, one process {loss_alone.item():.6f}")

    held = model.experts.gate_up_proj.to_local().shape[0]
    weights = model.experts.gate_up_proj.full_tensor()
    difference = (weights - alone.experts.gate_up_proj).abs().max().item()
    change = (alone.experts.gate_up_proj - start["experts.gate_up_proj"]).abs().max().item()
    if rank == 0:
        print(f"each of {size} ranks holds {held} of 8 experts")
        print(
            f"largest difference of their weights to one process {difference:.1e}, largest change by training "
            f"{change:.1e}"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
