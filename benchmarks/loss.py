"""The Expert Divergence loss beside the idioms people write in torch, forward and backward, in one run.

    python benchmarks/loss.py [--device cuda] [--threads N] [--save benchmarks/results/NAME.md]

Every way computes the whole loss of probabilities [T, E] with one label per sequence of 128 tokens and its gradient, and is
checked against float64 first. The floor is what memory allows: read the probabilities once and fill a fresh tensor of their
size. A second table takes logits, beside `torch.softmax` forward and backward alone on the same tensor.
"""

import argparse
from typing import Callable

import torch
from measure import interleaved, markdown_table, report
from torch import Tensor

import edl

SEQUENCE_LENGTH = 128
EPS = 1e-6
SHAPES = [(8192, 64, 4), (32768, 64, 8), (32768, 128, 49), (131072, 128, 49)]


def pair_loss(means: Tensor) -> Tensor:
    """-log(JSD + eps), averaged over the pairs of domain means [D, E], as written by hand: textbook logarithms."""
    first, second = torch.triu_indices(means.shape[0], means.shape[0], offset=1, device=means.device)
    p, q = means[first], means[second]
    middle = (p + q) / 2
    divergence = (torch.xlogy(p, p / middle) + torch.xlogy(q, q / middle)).sum(dim=1) / 2
    return -(divergence + EPS).log().mean()


def domain_means(sequence_means: Tensor, labels: Tensor, num_domains: int) -> Tensor:
    weights = torch.nn.functional.one_hot(labels, num_domains).to(sequence_means.dtype)
    return (weights.T @ sequence_means) / weights.sum(dim=0).unsqueeze(1)


def by_index_add(probs: Tensor, labels: Tensor, num_domains: int) -> Tensor:
    rows = torch.arange(labels.shape[0], device=probs.device).repeat_interleave(SEQUENCE_LENGTH)
    sums = probs.new_zeros(labels.shape[0], probs.shape[1]).index_add(0, rows, probs)
    return pair_loss(domain_means(sums / SEQUENCE_LENGTH, labels, num_domains))


def by_one_hot(probs: Tensor, labels: Tensor, num_domains: int) -> Tensor:
    # Sequences have one length here, so the domain mean is the mean over tokens: one matrix product does it.
    tokens = labels.repeat_interleave(SEQUENCE_LENGTH)
    weights = torch.nn.functional.one_hot(tokens, num_domains).to(probs.dtype)
    return pair_loss((weights.T @ probs) / weights.sum(dim=0).unsqueeze(1))


def by_view(probs: Tensor, labels: Tensor, num_domains: int) -> Tensor:
    # The best idiom, where it applies: no padding, no packing, one length.
    return pair_loss(domain_means(probs.view(labels.shape[0], SEQUENCE_LENGTH, -1).mean(dim=1), labels, num_domains))


def forward_backward(loss: Callable[[Tensor], Tensor], routing: Tensor) -> Callable[[], None]:
    leaf = routing.detach().requires_grad_()

    def step() -> None:
        leaf.grad = None
        loss(leaf).backward()

    return step


def check(ways: dict[str, Callable[[Tensor], Tensor]], routing: Tensor, expected: Tensor) -> None:
    """Every way must compute the same loss before it is timed."""
    for name, way in ways.items():
        error = abs(way(routing).item() - expected.item()) / abs(expected.item())
        if not error < 1e-4:
            raise RuntimeError(f"{name} is off by {error:.1e} of the float64 value")


def sample(num_tokens: int, num_experts: int, num_domains: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits whose domains differ a little, and a label per sequence with every domain present."""
    labels = torch.arange(num_tokens // SEQUENCE_LENGTH, device=device) % num_domains
    preference = torch.randn(num_domains, num_experts, device=device) * 0.3
    logits = torch.randn(num_tokens, num_experts, device=device) * 2
    return logits + preference[labels].repeat_interleave(SEQUENCE_LENGTH, dim=0), labels


def measure_probabilities(shape: tuple[int, int, int], device: torch.device, repeats: int) -> list[str]:
    num_tokens, num_experts, num_domains = shape
    logits, labels = sample(num_tokens, num_experts, num_domains, device)
    probs = logits.softmax(dim=1)
    module = edl.ExpertDivergenceLoss(num_domains, eps=EPS, input="probs")
    compiled = torch.compile(by_one_hot)
    ways = {
        "edl": lambda x: module(x, labels),
        "view + mean": lambda x: by_view(x, labels, num_domains),
        "index_add": lambda x: by_index_add(x, labels, num_domains),
        "one_hot GEMM": lambda x: by_one_hot(x, labels, num_domains),
        "compiled": lambda x: compiled(x, labels, num_domains),
    }
    check(ways, probs, by_view(probs.double(), labels, num_domains))
    functions: dict[str, Callable[[], object]] = {
        "read": lambda: probs.sum(),
        "fill": lambda: torch.empty_like(probs).fill_(1.0),
    }
    functions |= {name: forward_backward(way, probs) for name, way in ways.items()}
    times = interleaved(functions, device, repeats)
    floor = times["read"] + times["fill"]
    return [*map(str, shape), f"{floor:.2f}", *[f"{times[name]:.2f} ({times[name] / floor:.1f}x)" for name in ways]]


def measure_logits(shape: tuple[int, int, int], device: torch.device, repeats: int) -> list[str]:
    num_tokens, num_experts, num_domains = shape
    logits, labels = sample(num_tokens, num_experts, num_domains, device)
    upstream = torch.randn_like(logits)
    module = edl.ExpertDivergenceLoss(num_domains, eps=EPS)
    leaf = logits.detach().requires_grad_()

    def softmax() -> None:
        leaf.grad = None
        leaf.softmax(dim=1).backward(upstream)

    check({"edl": lambda x: module(x, labels)}, logits, by_view(logits.double().softmax(1), labels, num_domains))
    times = interleaved(
        {"edl": forward_backward(lambda x: module(x, labels), logits), "softmax": softmax}, device, repeats
    )
    ratio = times["edl"] / times["softmax"]
    return [*map(str, shape), f"{times['softmax']:.2f}", f"{times['edl']:.2f} ({ratio:.2f}x)"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--repeats", type=int, default=25, help="timed calls of each way (default: 25)")
    parser.add_argument("--save", help="also write the report to this file")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    probabilities = markdown_table(
        ["T", "E", "D", "floor ms", "edl", "view + mean", "index_add", "one_hot GEMM", "compiled one_hot"],
        [measure_probabilities(shape, device, arguments.repeats) for shape in SHAPES],
    )
    logits = markdown_table(
        ["T", "E", "D", "torch.softmax ms", "edl"],
        [measure_logits(shape, device, arguments.repeats) for shape in SHAPES],
    )
    report(
        "Expert Divergence loss, forward + backward, float32",
        device,
        [
            f"Probabilities in, milliseconds (times the floor):\n\n{probabilities}",
            f"Logits in, milliseconds (times torch.softmax forward + backward alone):\n\n{logits}",
        ],
        arguments.save,
    )


if __name__ == "__main__":
    main()
