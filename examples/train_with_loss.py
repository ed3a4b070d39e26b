"""Eager training: the Expert Divergence loss added to a training loop. What edl adds is marked with `# +`.

Trains the same model without and with the loss, and prints how far apart the domains' routing ends up.
"""

import torch
from small_model import NUM_DOMAINS, SmallModel, make_batch, next_token_loss

import edl  # +

STEPS = 60


def train(beta: float) -> float:
    """Returns the divergence loss of the last step: the lower, the further apart are the domains."""
    torch.manual_seed(0)
    model = SmallModel()
    divergence = edl.ExpertDivergenceLoss(NUM_DOMAINS)  # +
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(STEPS):
        tokens, domain_ids = make_batch(12, 64, seed=step)  # + domain_ids
        logits, router_logits = model(tokens)  # + router_logits
        language = next_token_loss(logits, tokens)
        apart = divergence(router_logits, domain_ids)  # +
        loss = language + beta * apart  # +
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == STEPS - 1:
            print(f"beta {beta:g}  step {step:2}  language {language.item():.3f}  divergence loss {apart.item():.3f}")
    return apart.item()


if __name__ == "__main__":
    without, with_loss = train(beta=0.0), train(beta=1e-2)
    print(
        f"divergence loss: {without:.3f} without, {with_loss:.3f} with (lower: the domains' routing is further apart)"
    )
