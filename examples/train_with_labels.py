"""Training on a corpus that `edl label` has labelled: a DataLoader of its documents and their domains.

    edl label apply my-text --output labels
    python examples/train_with_labels.py my-text labels

Reads the beginning of each document as bytes, and prints how far apart the domains' routing ends up without and with
the loss.
"""

import argparse

import torch
from small_model import SmallModel, next_token_loss
from torch.utils.data import DataLoader, TensorDataset

import edl
from edl.corpus.readers import shards_of

LENGTH = 64  # bytes of a document
STEPS = 60


def sequences(corpus: str, labels: edl.labels.LabelFiles) -> TensorDataset:
    """The first bytes of each document [N, LENGTH], and its domain [N]; short documents and those without text go."""
    rows, domain_ids = [], []
    for shard in shards_of([corpus]):
        for document, domain in zip(shard.documents(), labels[shard.name].tolist()):
            content = (document.text or "").encode()[:LENGTH]
            if len(content) == LENGTH:
                rows.append(torch.frombuffer(bytearray(content), dtype=torch.uint8))
                domain_ids.append(domain)
    return TensorDataset(torch.stack(rows).long(), torch.tensor(domain_ids))


def train(dataset: TensorDataset, num_domains: int, beta: float) -> float:
    """Returns the divergence loss of the last step: the lower, the further apart are the domains."""
    torch.manual_seed(0)
    model = SmallModel(vocabulary=256)
    divergence = edl.ExpertDivergenceLoss(num_domains)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    step = 0
    while step < STEPS:
        for tokens, domain_ids in DataLoader(dataset, batch_size=24, shuffle=True, drop_last=len(dataset) > 24):
            logits, router_logits = model(tokens)
            language = next_token_loss(logits, tokens)
            apart = divergence(router_logits, domain_ids)  # -1 = unlabelled: learned from, not pushed
            (language + beta * apart).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 20 == 0:
                print(f"beta {beta:g}  step {step:2}  language {language.item():.3f}  divergence {apart.item():.3f}")
            step += 1
            if step == STEPS:
                break
    return apart.item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("corpus", help="what was labelled")
    parser.add_argument("labels", help="the folder that `edl label apply` has written")
    options = parser.parse_args()
    labels = edl.labels.read(options.labels)
    dataset = sequences(options.corpus, labels)
    print(f"{len(dataset)} sequences of {', '.join(f'{name} ({count})' for name, count in labels.counts.items())}")
    without, with_loss = (train(dataset, len(labels.domains), beta) for beta in (0.0, 1e-2))
    print(
        f"divergence loss: {without:.3f} without, {with_loss:.3f} with (lower: the domains' routing is further apart)"
    )
