"""Losses and gradients of random batches in float64, stored: `python tests/stored_losses.py` writes what the code of
this tree gives, and the tests hold later code against the file.

Written before objectives had one path, by the operators and the module that the divergence had for itself.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh

import edl

FILE = Path(__file__).parent / "stored" / "expert_divergence.safetensors"
D, E, H = 4, 12, 6
SPLITS = [(2, 1), (3, 1), (1, 2), (2, 2), (4, 1)]  # data × context ranks
PACKED = torch.tensor([0, 5, 8, 8, 20, 33, 41])  # of 48 tokens, with an empty document and tokens that belong to none


class Case:
    """Router logits [L, B, S_len, E] of 12 sequences of 4 tokens, by hidden states and weights, and their labels."""

    def __init__(self, name: str, labels: str, packed: bool = False, masked: bool = True, **options) -> None:
        self.name, self.options = name, options
        generator = torch.Generator().manual_seed(sum(name.encode()))
        random = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
        layers = 1 + len(name) % 3
        self.hidden, self.router = random(layers, 12, 4, H), random(layers, E, H)
        if options.get("input") == "probs":
            self.hidden = self.hidden.abs()
        num_labelled = len(PACKED) - 1 if packed else 12
        self.labels = {
            "sequence": lambda: torch.randint(-1, D, (num_labelled,), generator=generator),
            "token": lambda: torch.randint(-1, D, (12, 4), generator=generator),
            "soft": lambda: random(num_labelled, D).abs() * (torch.arange(num_labelled) % 3 > 0).unsqueeze(1),
        }[labels]()
        self.cu_seqlens = PACKED if packed else None
        self.keep = torch.rand(12, 4, generator=generator) < 0.8 if masked else None


CASES = [
    Case("sequences", "sequence"),
    Case("sequences without a mask", "sequence", masked=False),
    Case("labels per token", "token"),
    Case("weights", "soft"),
    Case("documents", "sequence", packed=True),
    Case("documents with weights", "soft", packed=True, masked=False),
    Case("documents with labels per token", "token", packed=True),
    Case("corrected", "sequence", bias_correction=True),
    Case("corrected sigmoid", "token", bias_correction=True, scores="sigmoid", eps=0.0),
    Case("tokens", "sequence", sequence_reduction="token"),
    Case("tokens with labels per token", "token", sequence_reduction="token", pair_reduction="log_of_mean"),
    Case("log of mean", "sequence", pair_reduction="log_of_mean", layer_reduction="sum"),
    Case("each layer", "sequence", layer_reduction="none", eps=1e-3),
    Case("probabilities", "sequence", input="probs"),
]


def loss_and_gradient(divergence, case: Case, sequences=slice(None), positions=slice(None)) -> list[torch.Tensor]:
    """Of a part of a case's batch; packed documents are not cut."""
    router = case.router.clone().requires_grad_(True)
    layers = [h[sequences, positions] @ w.T for h, w in zip(case.hidden, router)]
    if case.options.get("input") == "probs":
        layers = [layer.abs() / layer.abs().sum(-1, keepdim=True) for layer in layers]
    labels = case.labels
    if case.cu_seqlens is None:
        labels = labels[sequences]
        labels = labels[:, positions] if case.labels.shape == (12, 4) and not labels.is_floating_point() else labels
    keep = None if case.keep is None else case.keep[sequences, positions]
    loss = divergence(layers, labels, keep, cu_seqlens=case.cu_seqlens)
    weight = torch.arange(1.0, loss.numel() + 1, dtype=loss.dtype).view_as(loss)  # tells layers apart
    return [loss.detach(), torch.autograd.grad((loss * weight).sum(), router)[0]]


def of_one_process() -> dict[str, torch.Tensor]:
    """The local path; with a memory: two micro-batches, in one pass with and without decay, over two steps, and in
    two passes."""
    stored = {}
    for case in CASES:
        stored[f"{case.name}, alone"] = loss_and_gradient(edl.ExpertDivergenceLoss(D, **case.options), case)
        if case.cu_seqlens is not None:
            continue
        halves = [slice(0, 6), slice(6, 12)]
        for decay in (0.0, 0.5):
            memory = edl.DomainMemory(decay)
            divergence = edl.ExpertDivergenceLoss(D, memory=memory, **case.options)
            for step in range(2):
                for m, half in enumerate(halves):
                    found = loss_and_gradient(divergence, case, half)
                    stored[f"{case.name}, decay {decay}, step {step}, micro-batch {m}"] = found
                memory.step()
        memory = edl.DomainMemory()
        divergence = edl.ExpertDivergenceLoss(D, memory=memory, **case.options)
        with memory.collect():
            for half in halves:
                with torch.no_grad():
                    layers = [h[half] @ w.T for h, w in zip(case.hidden, case.router)]
                    if case.options.get("input") == "probs":
                        layers = [layer.abs() / layer.abs().sum(-1, keepdim=True) for layer in layers]
                    divergence(layers, case.labels[half], None if case.keep is None else case.keep[half])
        for m, half in enumerate(halves):
            stored[f"{case.name}, two passes, micro-batch {m}"] = loss_and_gradient(divergence, case, half)
        memory.step()
    return _flat(stored)


def of_a_rank(data_ranks: int, context_ranks: int) -> dict[str, torch.Tensor]:
    """What this rank gets of its part, without and with a memory over two steps."""
    mesh = init_device_mesh("cpu", (data_ranks, context_ranks), mesh_dim_names=("data", "context"))
    groups: dict = {"group": mesh["data"] if data_ranks > 1 else None}
    if context_ranks > 1:
        groups |= {"sequence_group": mesh["context"], "averaging_ranks": data_ranks * context_ranks}
    data, context = divmod(dist.get_rank(), context_ranks)
    sequences, positions = 12 // data_ranks, 4 // context_ranks
    part = (
        slice(data * sequences, (data + 1) * sequences),
        slice(context * positions, (context + 1) * positions),
    )
    stored = {}
    for case in CASES:
        if case.cu_seqlens is not None:
            continue
        name = f"{case.name}, {data_ranks} x {context_ranks}, rank {dist.get_rank()}"
        stored[name] = loss_and_gradient(edl.ExpertDivergenceLoss(D, **case.options, **groups), case, *part)
        memory = edl.DomainMemory(0.5)
        divergence = edl.ExpertDivergenceLoss(D, memory=memory, **case.options, **groups)
        for step in range(2):
            stored[f"{name}, step {step}"] = loss_and_gradient(divergence, case, *part)
            memory.step()
    return _flat(stored)


def _flat(stored: dict[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {f"{name}, {kind}": x for name, pair in stored.items() for kind, x in zip(("loss", "gradient"), pair)}


def all_values() -> dict[str, torch.Tensor]:
    from ranks import on_ranks

    values = dict(on_ranks(1, of_one_process)[0])
    for split in SPLITS:
        for of_rank in on_ranks(split[0] * split[1], of_a_rank, *split):
            values |= of_rank
    return values


if __name__ == "__main__":
    import stored_losses  # so that ranks find the functions in a module of this name

    save_file({name: value.contiguous() for name, value in stored_losses.all_values().items()}, FILE)
