"""The ways to compute a layer of experts: edl's, and every peer's.

Each is a function (tokens [T, H], weights [T, K], experts [T, K], gate_up [E, 2I, H], down [E, H, I]) -> output [T, H],
and includes whatever sorting it needs.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from shapes import Inputs
from torch import Tensor, nn

from edl import ops

MOST_COPIED_BYTES = 2 << 30
ExpertsFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class Peer(NamedTuple):
    function: ExpertsFunction
    package: str = "torch"  # that it needs
    cuda: bool = False  # runs there only
    copies_weights: bool = False  # per row, which only small shapes can afford
    compiled: bool = False

    def lacks(self, device: torch.device) -> str | None:
        """What this machine lacks to run it."""
        if self.cuda and device.type != "cuda":
            return "a CUDA device"
        return None if importlib.util.find_spec(self.package) else f"the package {self.package}"

    def obstacle(self, inputs: Inputs) -> str | None:
        """Why it cannot run on these inputs."""
        copied = inputs.experts.numel() * (inputs.gate_up[0].nbytes + inputs.down[0].nbytes)
        if self.copies_weights and copied > MOST_COPIED_BYTES:
            return f"would copy {copied / 2**30:.1f} GiB of weights, one expert's per row"
        return None


def by_edl(
    tokens: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    recompute_activations: bool = False,
) -> Tensor:
    row_order, offsets = ops.sort_by_expert(experts, gate_up.shape[0])
    return ops.expert_mlp(tokens, weights, row_order, offsets, gate_up, down, recompute_activations)


_MODULES: dict[tuple, nn.Module] = {}  # no functools.cache: torch.compile would look behind it


def _transformers_module(implementation: str, num_experts: int, hidden: int, intermediate: int) -> nn.Module:
    """transformers' own module of experts, without parameters."""
    key = (implementation, num_experts, hidden, intermediate)
    if key not in _MODULES:
        from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        config = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=intermediate, num_experts=num_experts)
        config._experts_implementation = implementation
        with torch.device("meta"):
            _MODULES[key] = Qwen3MoeExperts(config)
    return _MODULES[key]


def by_transformers(
    implementation: str, tokens: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    module = _transformers_module(implementation, *down.shape)
    parameters = {"gate_up_proj": gate_up, "down_proj": down}
    return torch.func.functional_call(module, parameters, (tokens, experts, weights))


def by_grouped_mm(tokens: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """As written by hand around torch's grouped product."""
    order = experts.flatten().argsort(stable=True)
    ends = torch.bincount(experts.flatten(), minlength=gate_up.shape[0]).cumsum(0).to(torch.int32)
    token = order // experts.shape[1]
    gate, up = torch._grouped_mm(tokens[token], gate_up.mT, offs=ends).chunk(2, dim=1)
    rows = torch._grouped_mm(F.silu(gate) * up, down.mT, offs=ends)
    return torch.zeros_like(tokens).index_add(0, token, rows * weights.flatten()[order].unsqueeze(1))


def by_index_add(tokens: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """As written by hand, one expert after the other."""
    output = torch.zeros_like(tokens)
    for expert in range(gate_up.shape[0]):
        token, choice = torch.where(experts == expert)
        gate, up = F.linear(tokens[token], gate_up[expert]).chunk(2, dim=1)
        rows = F.linear(F.silu(gate) * up, down[expert])
        output.index_add_(0, token, rows * weights[token, choice].unsqueeze(1))
    return output


def by_liger(tokens: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    return LigerFusedMoEFunction.apply(tokens, gate_up, down, experts.int(), weights)


def by_scattermoe(tokens: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    order = flatten_sort_count(experts, num_experts=gate_up.shape[0])
    gate, up = parallel_linear(tokens, gate_up.mT, experts.shape[1], *order, grouped_out=True).chunk(2, dim=-1)
    return parallel_linear(F.silu(gate) * up, down.mT, 1, *order, gates=weights, grouped_in=True)


def _transformers(implementation: str, **conditions: bool) -> Peer:
    return Peer(functools.partial(by_transformers, implementation), "transformers", **conditions)


EDL = "edl"
GROUPED_MM = "transformers grouped_mm"  # transformers' default, and the peer that ratios name
PEERS = {
    EDL: Peer(by_edl),
    GROUPED_MM: _transformers("grouped_mm"),
    "transformers eager": _transformers("eager"),
    "transformers batched_mm": _transformers("batched_mm", copies_weights=True),
    "torch._grouped_mm": Peer(by_grouped_mm),
    "index_add loop": Peer(by_index_add),
    "SonicMoE (transformers)": _transformers("sonicmoe", cuda=True),
    "Liger": Peer(by_liger, "liger_kernel", cuda=True),
    "ScatterMoE": Peer(by_scattermoe, "scattermoe", cuda=True),
}


def present(device: torch.device) -> dict[str, Peer]:
    """The ways that this machine can run."""
    return {name: peer for name, peer in PEERS.items() if peer.lacks(device) is None}


def absent(device: torch.device) -> str:
    """The others, and what each lacks."""
    missing = [f"{name} needs {peer.lacks(device)}" for name, peer in PEERS.items() if peer.lacks(device)]
    return "; ".join(missing) or "none"


def compiled(peers: dict[str, Peer]) -> dict[str, Peer]:
    """Each peer under torch.compile, for exactly the shapes it is given."""
    return {
        f"{name}, compiled": peer._replace(function=torch.compile(peer.function, dynamic=False), compiled=True)
        for name, peer in peers.items()
        if not peer.cuda and name != EDL
    }
