"""The layer: `edl.MoELayer` as the feed-forward part of a transformer block, trained with its auxiliary losses."""

import torch
import torch.nn.functional as F
from small_model import NUM_DOMAINS, VOCABULARY, make_batch, next_token_loss
from torch import Tensor, nn

import edl


class Block(nn.Module):
    """A transformer block: causal attention, then 8 routed experts of which 2 run, and one shared expert."""

    def __init__(self, hidden_size: int = 48, num_heads: int = 4) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.projection = nn.Linear(hidden_size, hidden_size)
        self.feed_forward_norm = nn.LayerNorm(hidden_size)
        self.feed_forward = edl.MoELayer(hidden_size, 48, num_experts=8, top_k=2, num_shared_experts=1)

    def forward(self, hidden: Tensor) -> tuple[Tensor, edl.Routing]:
        """`Tensor[B, S, H]` to the same, and the routing of its B·S tokens."""
        qkv = self.qkv(self.attention_norm(hidden)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.projection(attended.transpose(1, 2).flatten(2))
        output, routing = self.feed_forward(self.feed_forward_norm(hidden))
        return hidden + output, routing


if __name__ == "__main__":
    torch.manual_seed(0)
    embedding, unembedding = nn.Embedding(VOCABULARY, 48), nn.Linear(48, VOCABULARY)
    blocks = nn.ModuleList([Block(), Block()])
    divergence = edl.ExpertDivergenceLoss(NUM_DOMAINS)
    model = nn.ModuleList([embedding, blocks, unembedding])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    for step in range(40):
        tokens, domain_ids = make_batch(12, 64, seed=step)
        hidden, routings = embedding(tokens), []
        for block in blocks:
            hidden, routing = block(hidden)
            routings.append(routing)
        language = next_token_loss(unembedding(hidden), tokens)
        balance = edl.load_balancing_loss(routings)
        loss = (
            language
            + 1e-2 * balance
            + 1e-3 * edl.router_z_loss(routings)
            + 1e-2 * divergence([routing.logits for routing in routings], domain_ids)
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == 39:
            print(f"step {step:2}  language {language.item():.3f}  balance {balance.item():.3f} (1 = perfect)")
    print(f"tokens per expert in the last layer: {routings[-1].tokens_per_expert.tolist()}")
