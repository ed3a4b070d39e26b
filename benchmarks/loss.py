"""The Expert Divergence loss beside the idioms people write in torch, forward and backward.

    python benchmarks/loss.py [--device cuda] [--threads N] [--quick] [--save FILE]

Every way computes the whole loss and its gradient, and is checked against float64 first. The floor is what memory
allows: read the routing once, fill a fresh tensor of its size. Labels belong to sequences of 128 tokens or to tokens;
logits are also measured beside `torch.softmax` forward and backward alone.
"""

from collections.abc import Callable, Iterator

import torch
from measure import error, interleaved, witness
from report import Run, Section, main, markdown_table
from torch import Tensor

import edl

SEQUENCE_LENGTH = 128
EPS = 1e-6
SHAPES = [(8192, 64, 4), (32768, 64, 8), (32768, 128, 49), (131072, 128, 49)]  # T, E, D
Way = Callable[[Tensor], Tensor]


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


def by_segment_reduce(probs: Tensor, labels: Tensor, num_domains: int) -> Tensor:
    lengths = torch.full_like(labels, SEQUENCE_LENGTH)
    return pair_loss(domain_means(torch.segment_reduce(probs, "mean", lengths=lengths, axis=0), labels, num_domains))


def by_index_add_of_tokens(probs: Tensor, labels: Tensor, num_domains: int) -> Tensor:
    sums = probs.new_zeros(num_domains, probs.shape[1]).index_add(0, labels, probs)
    return pair_loss(sums / labels.bincount(minlength=num_domains).unsqueeze(1))


def by_one_hot_of_tokens(probs: Tensor, labels: Tensor, num_domains: int) -> Tensor:
    return pair_loss(domain_means(probs, labels, num_domains))


def forward_backward(way: Way, routing: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    leaf = routing.detach().requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        loss = way(leaf)
        return loss, torch.autograd.grad(loss, leaf)[0]

    return step


def check(steps: dict[str, Callable[[], tuple[Tensor, Tensor]]], expected: tuple[Tensor, ...]) -> None:
    """Every way must compute the same loss and gradient before it is timed."""
    for name, step in steps.items():
        distance = error(step(), expected)
        if not distance < 1e-3:  # where domains are alike, textbook logarithms cancel
            raise ArithmeticError(f"{name}: wrong by {distance:.1e} of the float64 result")


def sample(num_tokens: int, num_experts: int, num_domains: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits whose domains differ a little, and a label per sequence with every domain present."""
    labels = torch.arange(num_tokens // SEQUENCE_LENGTH, device=device) % num_domains
    preference = torch.randn(num_domains, num_experts, device=device) * 0.3
    logits = torch.randn(num_tokens, num_experts, device=device) * 2
    return logits + preference[labels].repeat_interleave(SEQUENCE_LENGTH, dim=0), labels


def measure(routing: Tensor, ways: dict[str, Way], exact: Way, run: Run) -> list[str]:
    """Cells with each way's time as a multiple of the floor, and what edl and index_add save beside the routing."""
    steps = {name: forward_backward(way, routing) for name, way in ways.items()}
    check(steps, forward_backward(exact, routing.double())())
    saved = {name: witness(step, [routing], run.device).saved_bytes for name, step in steps.items()}
    floor = {"read": routing.sum, "fill": lambda: torch.empty_like(routing).fill_(1.0)}
    times = interleaved(steps | floor, run.watch, run.seconds)
    bound = times["read"].median + times["fill"].median
    cells = [f"{bound:.2f}", *[f"{times[x].mark}{times[x].median:.2f} ({times[x].median / bound:.1f}x)" for x in ways]]
    return [*cells, *[f"{saved[name] / 1e6:.2f}" for name in ("edl", "index_add")]]


def measure_sequences(shape: tuple[int, int, int], run: Run) -> list[str]:
    """One row: probabilities in, one label per sequence."""
    num_tokens, num_experts, num_domains = shape
    logits, labels = sample(num_tokens, num_experts, num_domains, run.device)
    module = edl.ExpertDivergenceLoss(num_domains, eps=EPS, input="probs")
    idioms = {"view + mean": by_view, "index_add": by_index_add, "segment_reduce": by_segment_reduce}
    idioms |= {"one_hot GEMM": by_one_hot, "compiled one_hot": torch.compile(by_one_hot, dynamic=False)}
    ways: dict[str, Way] = {"edl": lambda x: module(x, labels)}
    ways |= {name: with_labels(idiom, labels, num_domains) for name, idiom in idioms.items()}
    return [*map(str, shape), *measure(logits.softmax(dim=1), ways, with_labels(by_view, labels, num_domains), run)]


def measure_tokens(shape: tuple[int, int, int], run: Run) -> list[str]:
    """One row: probabilities in, one label per token."""
    num_tokens, num_experts, num_domains = shape
    logits, labels = sample(num_tokens, num_experts, num_domains, run.device)
    labels = labels.repeat_interleave(SEQUENCE_LENGTH)
    module = edl.ExpertDivergenceLoss(num_domains, eps=EPS, input="probs", sequence_reduction="token")
    ways: dict[str, Way] = {"edl": lambda x: module(x, labels)}
    idioms = {"index_add": by_index_add_of_tokens, "one_hot GEMM": by_one_hot_of_tokens}
    ways |= {name: with_labels(idiom, labels, num_domains) for name, idiom in idioms.items()}
    exact = with_labels(by_one_hot_of_tokens, labels, num_domains)
    return [*map(str, shape), *measure(logits.softmax(dim=1), ways, exact, run)]


def with_labels(idiom: Callable[[Tensor, Tensor, int], Tensor], labels: Tensor, num_domains: int) -> Way:
    return lambda x: idiom(x, labels, num_domains)


def measure_logits(shape: tuple[int, int, int], run: Run) -> list[str]:
    """One row: logits in, beside the softmax alone."""
    num_tokens, num_experts, num_domains = shape
    logits, labels = sample(num_tokens, num_experts, num_domains, run.device)
    upstream = torch.randn_like(logits)
    module = edl.ExpertDivergenceLoss(num_domains, eps=EPS)
    step = forward_backward(lambda x: module(x, labels), logits)
    exact = forward_backward(lambda x: by_view(x.softmax(dim=1), labels, num_domains), logits.double())
    check({"edl": step}, exact())
    leaf = logits.detach().requires_grad_()
    softmax = lambda: torch.autograd.grad(leaf.softmax(dim=1), leaf, upstream)
    times = interleaved({"edl": step, "softmax": softmax}, run.watch, run.seconds)
    ratio = times["edl"].median / times["softmax"].median
    return [*map(str, shape), str(times["softmax"]), f"{times['edl']} {ratio:.2f}x"]


def sections(run: Run) -> Iterator[Section]:
    """Labels per sequence, labels per token, logits."""
    torch._inductor.config.cpp.threads = run.threads
    torch._dynamo.reset()
    shapes = SHAPES[:2] if run.quick else SHAPES
    saved = ["edl saves MB", "index_add saves MB"]
    idioms = ["view + mean", "index_add", "segment_reduce", "one_hot GEMM", "compiled one_hot"]
    header = ["T", "E", "D", "floor ms", "edl", *idioms, *saved]
    text = markdown_table(header, [measure_sequences(shape, run) for shape in shapes])
    yield Section("Loss of probabilities, labels per sequence, ms (times the floor)", text, summary=True)
    header = ["T", "E", "D", "floor ms", "edl", "index_add", "one_hot GEMM", *saved]
    text = markdown_table(header, [measure_tokens(shape, run) for shape in shapes])
    yield Section("Loss of probabilities, labels per token, ms (times the floor)", text)
    header = ["T", "E", "D", "torch.softmax ms", "edl ms"]
    text = markdown_table(header, [measure_logits(shape, run) for shape in shapes])
    yield Section("Loss of logits beside torch.softmax alone", text)


if __name__ == "__main__":
    main(__doc__, sections)
