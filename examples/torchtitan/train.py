"""Trains a small model of torchtitan's Mixture-of-Experts layers (0.3.0). What edl adds is marked with `# +`.

pip install --no-deps torchtitan==0.3.0 spmd_types==0.2.3 torch_remat tyro docstring-parser typeguard
python examples/torchtitan/train.py

torchtitan's own Trainer wants CUDA; docs/torchtitan.md has the lines for it, which are the same.
"""

import argparse
import dataclasses
import importlib.util
import sys
import types

import torch
import torch.nn.functional as F
from torch import Tensor

import edl  # +

if importlib.util.find_spec("triton") is None:
    # torchtitan imports triton, which comes with torch for CUDA, for an expert-parallel backend that is not used here.
    backend = "combine_op dispatch_op init_buffer maybe_update_minimal_async_ep_config MinimalAsyncEPDispatchMetadata"
    sys.modules["torchtitan.distributed.minimal_async_ep"] = types.SimpleNamespace(
        **dict.fromkeys(backend.split(), object)
    )

from torchtitan.models.common.config_utils import make_moe_config, make_routed_experts_config, make_router_config
from torchtitan.protocols.module import Module, ModuleDict

from edl.integrations.torchtitan import add_expert_divergence, layer_losses  # +

VOCABULARY, LENGTH, NUM_DOMAINS = 96, 32, 3
SIZE, NUM_EXPERTS, TOP_K = 32, 8, 2


class Model(Module):
    """Predicts the next token from the present one, through two Mixture-of-Experts layers."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        layers: list

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.layers = ModuleDict({str(place): layer.build() for place, layer in enumerate(config.layers)})
        self.embedding = torch.nn.Parameter(0.3 * torch.randn(VOCABULARY, SIZE))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, S] to logits [B, S, V]."""
        hidden = self.embedding[tokens]
        for layer in self.layers.values():
            hidden = hidden + layer(hidden)
        return F.layer_norm(hidden, (SIZE,)) @ self.embedding.T


def model_config() -> Model.Config:
    """Two layers, as a torchtitan model's configuration holds them."""

    def normal(parameter: Tensor) -> Tensor:
        return torch.nn.init.normal_(parameter, std=0.2)

    sizes = {"dim": SIZE, "num_experts": NUM_EXPERTS, "top_k": TOP_K}
    weights = dict.fromkeys(["w1_EFD", "w2_EDF", "w3_EFD"], normal)
    layers = [
        make_moe_config(
            num_experts=NUM_EXPERTS,
            router=make_router_config(**sizes, gate_param_init={"weight": normal}, score_func="softmax"),
            routed_experts=make_routed_experts_config(
                **sizes, hidden_dim=SIZE, param_init=weights, comm_backend="standard"
            ),
        )
        for _ in range(2)
    ]
    return Model.Config(layers=layers)


def make_batch(step: int, sequences: int = 12) -> tuple[Tensor, Tensor]:
    """Tokens [B, S + 1] and domains [B]: sequences that count upwards in their domain's own third of the vocabulary."""
    domain_ids = torch.arange(sequences) % NUM_DOMAINS
    starts = torch.randint(VOCABULARY, (sequences, 1), generator=torch.Generator().manual_seed(step))
    third = VOCABULARY // NUM_DOMAINS
    counted = (starts + torch.arange(LENGTH + 1) * (domain_ids[:, None] + 1)) % third
    return domain_ids[:, None] * third + counted, domain_ids


def train(coeff: float, steps: int) -> float:
    """Returns the divergence loss of the last step, mean over layers: the lower, the further apart are the domains."""
    torch.manual_seed(0)
    config = model_config()
    add_expert_divergence(config, num_domains=NUM_DOMAINS, coeff=coeff)  # +
    model = config.build()
    for layer in model.layers.values():
        layer.init_states()
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
    for step in range(steps):
        tokens, domain_ids = make_batch(step)
        with edl.domain_scope(domain_ids):  # +
            logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        apart = torch.stack(list(layer_losses(model).values())).mean().item()  # +
        if step % 20 == 0 or step == steps - 1:
            print(f"coeff {coeff:g}  step {step:2}  language {loss.item():.3f}  divergence loss {apart:.3f}")
    return apart


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    without, with_loss = train(1e-12, arguments.steps), train(5e-2, arguments.steps)
    print(f"divergence loss: {without:.3f} without, {with_loss:.3f} with")
