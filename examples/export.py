"""torch.export: a model saved as a program without its Python classes, then loaded, run and trained."""

import argparse

import torch
from small_model import NUM_DOMAINS, SmallModel, make_batch, next_token_loss

import edl  # a process that loads the program needs the operators, and only them

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--output", default="small_model.pt2", help="file of the exported program")
path = parser.parse_args().output

torch.manual_seed(0)
model = SmallModel()
tokens, _ = make_batch(12, 64, seed=0)
batch_size, length = torch.export.Dim("batch_size", min=2), torch.export.Dim("length", min=2)
program = torch.export.export(model, (tokens,), dynamic_shapes=({0: batch_size, 1: length},))
torch.export.save(program, path)

loaded = torch.export.load(path).module()
tokens, domain_ids = make_batch(6, 40, seed=1)
assert torch.equal(loaded(tokens)[0], model(tokens)[0])

divergence = edl.ExpertDivergenceLoss(NUM_DOMAINS)
optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
for step in range(3):
    logits, router_logits = loaded(tokens)
    loss = next_token_loss(logits, tokens) + 1e-2 * divergence(router_logits, domain_ids)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step} of the loaded program: loss {loss.item():.4f}")
