"""What batches do to the divergence's gradient: random ones, those of `DomainBatchSampler`, and with `DomainMemory`.

    python benchmarks/domain_batches.py [--save benchmarks/results/domain-batches.md]

A corpus is made of sequences that lie around the centres of their domains, and a router stays as it is. An epoch of
batches is differentiated, each on its own, with bias correction, or with a memory of those before it, and the gradients
are compared with that of the divergence of the whole corpus: their mean (what training drifts towards) and each one
(how noisy it is).
"""

import argparse
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from report import markdown_table, save
from torch import Tensor
from torch.utils.data import BatchSampler, RandomSampler

import edl
from edl.labels import DomainBatchSampler

SEQUENCES, LENGTH, HIDDEN, EXPERTS = 2048, 16, 16, 16
BATCH_SIZES = [2, 8, 32, 128]
DECAY = 0.9
OPTIONS = ["", "bias correction", "memory"]


class Corpus(NamedTuple):
    name: str
    labels: Tensor  # [N]
    hidden: Tensor  # [N, LENGTH, HIDDEN]


def make_corpus(num_domains: int, is_zipf: bool) -> Corpus:
    weights = 1 / torch.arange(1, num_domains + 1) if is_zipf else torch.ones(num_domains)
    labels = torch.multinomial(weights, SEQUENCES, replacement=True)
    centres = 0.5 * torch.randn(num_domains, 1, HIDDEN)[labels] + 0.5 * torch.randn(SEQUENCES, 1, HIDDEN)
    name = f"{num_domains} domains, {'Zipf' if is_zipf else 'equal'}"
    return Corpus(name, labels, centres + torch.randn(SEQUENCES, LENGTH, HIDDEN))


def batches_of(corpus: Corpus, batch_size: int, by_domain: bool) -> Iterator[list[int]]:
    """By domain: two sequences of each of as many domains as fill half a batch; of batches of two, one of each."""
    if not by_domain:
        return iter(BatchSampler(RandomSampler(corpus.labels), batch_size, drop_last=True))
    domains, each = (2, 1) if batch_size < 8 else (min(int(corpus.labels.max()) + 1, batch_size // 4), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table shows what is lacking
        return iter(DomainBatchSampler(corpus.labels, batch_size, domains, each))


def gradient(divergence: edl.ExpertDivergenceLoss, router: Tensor, corpus: Corpus, rows: Tensor) -> Tensor:
    loss = divergence(corpus.hidden[rows] @ router, corpus.labels[rows])
    (found,) = torch.autograd.grad(loss, router) if loss.requires_grad else (torch.zeros_like(router),)
    return found.flatten()


def share_with_a_pair(corpus: Corpus, batches: list[list[int]]) -> float:
    return sum(len(corpus.labels[batch].unique()) > 1 for batch in batches) / len(batches)


def compare(corpus: Corpus, router: Tensor, whole: Tensor, batches: list[list[int]], option: str) -> str:
    """Cosine to the gradient of the whole corpus: of a batch, and of the mean of all; and the mean's ratio of norms."""
    memory = edl.DomainMemory(decay=DECAY) if option == "memory" else None
    divergence = edl.ExpertDivergenceLoss(
        int(corpus.labels.max()) + 1, memory=memory, bias_correction=option == "bias correction"
    )
    found = torch.empty(len(batches), whole.numel())
    for place, batch in enumerate(batches):
        found[place] = gradient(divergence, router, corpus, torch.tensor(batch))
        if memory is not None:
            memory.step()
    single = F.cosine_similarity(found, whole.expand_as(found)).mean()
    mean = found.mean(0)
    return f"{single:.2f}, {F.cosine_similarity(mean, whole, dim=0):.2f} ({mean.norm() / whole.norm():.1f})"


def row_of(corpus: Corpus, router: Tensor, whole: Tensor, batch_size: int) -> list[str]:
    random, by_domain = (list(batches_of(corpus, batch_size, by_domain)) for by_domain in (False, True))
    pairs = " → ".join(f"{share_with_a_pair(corpus, batches):.0%}" for batches in (random, by_domain))
    cells = [compare(corpus, router, whole, batches, option) for option in OPTIONS for batches in (random, by_domain)]
    return [corpus.name, str(batch_size), pairs, *cells]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--save", help="also write the report to this file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for num_domains in (3, 49):
        for is_zipf in (False, True):
            corpus = make_corpus(num_domains, is_zipf)
            router = torch.randn(HIDDEN, EXPERTS, requires_grad=True)
            everything = torch.arange(SEQUENCES)
            whole = gradient(edl.ExpertDivergenceLoss(num_domains), router, corpus, everything)
            rows += [row_of(corpus, router, whole, batch_size) for batch_size in BATCH_SIZES]
    header = [f"{way}{', ' if option else ''}{option}" for option in OPTIONS for way in ("random", "by domain")]
    table = markdown_table(["corpus", "batch", "with a pair", *header], rows)
    text = (
        f"{SEQUENCES} sequences. With a pair: the share of batches that hold two domains, random → by domain. Then the "
        "cosine to the gradient of the whole corpus, of a single batch (mean), of the mean of an epoch, and in "
        f"brackets the ratio of norms of that mean. Memory: decay {DECAY}."
    )
    save("Batches and the divergence's gradient", torch.device("cpu"), [f"{text}\n\n{table}"], arguments.save)


if __name__ == "__main__":
    main()
