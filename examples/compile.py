"""torch.compile: the whole step, losses included, is one graph for all batch sizes and lengths."""

import torch
from small_model import NUM_DOMAINS, SmallModel, make_batch, next_token_loss

import edl

torch.manual_seed(0)
model = SmallModel()
divergence = edl.ExpertDivergenceLoss(NUM_DOMAINS)


def objective(tokens, domain_ids):
    logits, router_logits = model(tokens)
    return next_token_loss(logits, tokens) + 1e-2 * divergence(router_logits, domain_ids)


compiled = torch.compile(objective, fullgraph=True, dynamic=True)
parameters = list(model.parameters())

for batch_size, length in ((12, 64), (9, 40), (15, 33)):
    batch = make_batch(batch_size, length, seed=length)
    eager_loss, compiled_loss = objective(*batch), compiled(*batch)
    eager = torch.autograd.grad(eager_loss, parameters)
    fast = torch.autograd.grad(compiled_loss, parameters)
    difference = max((a - b).abs().max().item() for a, b in zip(eager, fast))
    assert difference < 1e-5, difference
    print(
        f"{batch_size} x {length} tokens: loss {compiled_loss.item():.4f}, gradients within {difference:.1e} of eager"
    )
