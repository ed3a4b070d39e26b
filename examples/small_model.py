"""What the other examples train: a small Mixture-of-Experts model, and a made-up text of three domains."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edl

NUM_DOMAINS = 3
VOCABULARY = 96


class SmallModel(nn.Module):
    """Predicts the next token from the present one, through two Mixture-of-Experts layers."""

    def __init__(
        self, hidden_size: int = 32, num_experts: int = 8, top_k: int = 2, vocabulary: int = VOCABULARY
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden_size)
        self.norms = nn.ModuleList([nn.LayerNorm(hidden_size) for _ in range(2)])
        self.layers = nn.ModuleList([edl.MoELayer(hidden_size, 32, num_experts, top_k) for _ in range(2)])
        self.unembedding = nn.Linear(hidden_size, vocabulary)

    def forward(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Tokens [B, S] to logits [B, S, V], and the router's logits [B·S, E] of each layer."""
        hidden = self.embedding(tokens)
        router_logits: list[Tensor] = []
        for norm, layer in zip(self.norms, self.layers):
            output, routing = layer(norm(hidden))
            hidden = hidden + output
            router_logits.append(routing.logits)
        return self.unembedding(hidden), router_logits


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross entropy of tokens [B, S] under the logits [B, S, V] of their predecessors."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def make_batch(batch_size: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens [B, S] and the domain [B] of each sequence: every domain has letters of its own, some shared, and its own
    grammar."""
    generator = torch.Generator().manual_seed(seed)
    domain_ids = torch.arange(batch_size) % NUM_DOMAINS
    steps = torch.randint(1, 4, (batch_size, length), generator=generator) * (domain_ids + 1).unsqueeze(1)
    tokens = (steps.cumsum(1) % 40 + domain_ids.unsqueeze(1) * 28) % VOCABULARY
    return tokens, domain_ids
