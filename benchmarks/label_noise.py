"""What wrong labels do to the divergence that training reaches.

`python benchmarks/label_noise.py TEXT`: TEXT has a sub-folder for each domain. The examples' small model, on bytes;
a share of the passages has the label of another domain, throughout. The divergence is that of the true domains, on
passages that were not trained on: the Jensen-Shannon divergence of their mean router probabilities, over layers, in
nats, with its 95 % interval over seeds.
"""

import argparse
import os
import pathlib
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "examples"))

import numpy as np
import torch
from labels import cut, texts_of
from scipy import stats
from small_model import SmallModel, next_token_loss

import edl

NOISE = (0.0, 0.05, 0.2, 0.4, 2 / 3)  # of three domains, two thirds are labels at random
SEEDS, STEPS, BATCH, LENGTH, BETA = 4, 150, 16, 128, 1e-2


def divergence_of(model: SmallModel, tokens: torch.Tensor, domains: torch.Tensor) -> float:
    with torch.no_grad():
        _, logits = model(tokens)
    total = 0.0
    for layer in logits:
        scores = layer.double().softmax(-1).view(len(tokens), -1, layer.shape[-1]).mean(1)
        means = torch.stack([scores[domains == domain].mean(0) for domain in domains.unique()])
        total += float((means * (means / means.mean(0)).log()).sum(1).mean())
    return total / len(logits)


def reached(tokens: torch.Tensor, domains: torch.Tensor, noise: float | None, corrected: bool, seed: int) -> float:
    """The divergence after training; noise None: without the loss."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(tokens), generator=generator)
    held_out, known = order[: len(order) // 5], order[len(order) // 5 :]
    num_domains = int(domains.max()) + 1
    others = (domains + torch.randint(1, num_domains, domains.shape, generator=generator)) % num_domains
    labels = torch.where(torch.rand(domains.shape, generator=generator) < (noise or 0.0), others, domains)
    torch.manual_seed(seed)
    model = SmallModel(vocabulary=256)
    objective = edl.ExpertDivergenceLoss(num_domains, bias_correction=corrected)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(STEPS):
        batch = known[torch.randint(len(known), (BATCH,), generator=generator)]
        logits, router_logits = model(tokens[batch])
        loss = next_token_loss(logits, tokens[batch])
        if noise is not None:
            loss = loss + BETA * objective(router_logits, labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return divergence_of(model, tokens[held_out], domains[held_out])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", help="folder with a sub-folder for each domain")
    passages = cut(texts_of(parser.parse_args().text), LENGTH)
    domains = torch.tensor([place for place, texts in enumerate(passages.values()) for _ in texts])
    content = [list(text.encode()[:LENGTH]) for texts in passages.values() for text in texts]
    tokens = torch.tensor(content)
    print("| labels that are wrong | loss | bias-corrected loss |\n|---|---|---|")
    for noise in (*NOISE, None):
        cells = []
        for corrected in (False, True):
            found = [reached(tokens, domains, noise, corrected, seed) for seed in range(SEEDS)]
            half = stats.t.ppf(0.975, SEEDS - 1) * stats.sem(found)
            cells.append(f"{np.mean(found):.3f} ± {half:.3f}")
        print(f"| {'the loss left out' if noise is None else f'{noise:.0%}'} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
