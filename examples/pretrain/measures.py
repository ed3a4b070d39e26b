"""What the experts have learned, measured on held-out text.

Letters in shapes: N sequences, S bytes per sequence, T = N·S tokens, D domains, L layers, E experts, K experts per
token. Divergences, entropies and mutual information are in nats.
"""

import contextlib
import math
import statistics
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F

import edl

# Sequences per forward pass at evaluation; only memory depends on it.
EVALUATION_BATCH = 24
# A byte counts for the same-byte divergence when this many sequences of both domains hold it; fewer estimate no
# variance.
SEQUENCES_PER_BYTE = 8
VOCABULARY = 256


class Observation(NamedTuple):
    """One pass over held-out text.

    Attributes:
        loss: [N] cross entropy of each sequence, in bits per byte.
        probabilities: [L, T, E] router probabilities.
        experts: [L, T, K] chosen experts.
    """

    loss: torch.Tensor
    probabilities: torch.Tensor
    experts: torch.Tensor


class Measures(NamedTuple):
    """The measures of one arm.

    Attributes:
        bits_per_byte: [D] on held-out text.
        standard_error: [D] of bits_per_byte, over sequences: what other held-out text might have given. It says nothing
            about other seeds.
        usage: [L, D, E] share of a domain's choices that fall on each expert; rows sum to 1.
        load: [L] load of the busiest expert over the mean load.
        divergence: [L, D, D] Jensen-Shannon divergence between the domains' mean router probabilities.
        same_byte: [L, D, D] the same, between tokens that are the same byte, corrected for the noise of small samples;
            NaN where two domains share no byte often enough.
        information: [L] mutual information of chosen expert and domain, all domains weighing the same.
        overlap: [L, D, D] shared choices: sum over experts of the smaller of two domains' usage; 1 is the same experts.
        token_entropy: [L] mean entropy of a token's router probabilities; log E is undecided, 0 is certain.
        rise_own: [D] bits per byte that a domain loses when its favourite experts are switched off.
        rise_others: [D] bits per byte that the other domains lose by that, on average.
    """

    bits_per_byte: torch.Tensor
    standard_error: torch.Tensor
    usage: torch.Tensor
    load: torch.Tensor
    divergence: torch.Tensor
    same_byte: torch.Tensor
    information: torch.Tensor
    overlap: torch.Tensor
    token_entropy: torch.Tensor
    rise_own: torch.Tensor
    rise_others: torch.Tensor

    @property
    def knock_out_ratio(self):
        """Loss rise on a domain's own text over that on the others'; NaN when the others did not lose anything."""
        own, others = self.rise_own.mean().item(), self.rise_others.mean().item()
        return own / others if others > 0 else math.nan


def measure(model, sequences, labels, num_domains):
    """Computes all measures of a model.

    Arguments:
        model: LanguageModel.
        sequences: [N, S + 1] int64 held-out bytes.
        labels: [N] int64 domains, as many sequences of each.
        num_domains: D.

    Returns:
        Measures.
    """
    seen = observe(model, sequences)
    usage = expert_usage(seen.experts, labels, num_domains, seen.probabilities.shape[-1])
    by_domain = torch.stack([seen.loss[labels == domain] for domain in range(num_domains)])
    rise_own, rise_others = knock_out(model, sequences, labels, seen.loss, usage)
    load = usage.mean(dim=1)
    return Measures(
        bits_per_byte=by_domain.mean(dim=1),
        standard_error=by_domain.std(dim=1) / by_domain.shape[1] ** 0.5,
        usage=usage,
        load=load.amax(dim=-1) / load.mean(dim=-1),
        divergence=domain_divergence(seen.probabilities, labels, num_domains),
        same_byte=same_byte_divergence(seen.probabilities, sequences[:, :-1], labels, num_domains),
        information=torch.special.entr(load).sum(dim=-1) - torch.special.entr(usage).sum(dim=-1).mean(dim=-1),
        overlap=torch.minimum(usage[:, :, None], usage[:, None]).sum(dim=-1),
        token_entropy=torch.special.entr(seen.probabilities).sum(dim=-1).mean(dim=-1),
        rise_own=rise_own,
        rise_others=rise_others,
    )


@torch.no_grad()
def observe(model, sequences):
    """Runs the model over sequences [N, S + 1] and returns the Observation."""
    losses, probabilities, experts = [], [], []
    for batch in sequences.split(EVALUATION_BATCH):
        logits, routings = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        losses.append(loss.view(len(batch), -1).mean(dim=1) / math.log(2))
        probabilities.append(torch.stack([routing.logits.softmax(dim=-1) for routing in routings]))
        experts.append(torch.stack([routing.experts for routing in routings]))
    return Observation(torch.cat(losses), torch.cat(probabilities, dim=1), torch.cat(experts, dim=1))


def expert_usage(experts, labels, num_domains, num_experts):
    """Counts choices: experts [L, T, K], labels [N] -> [L, D, E] shares that sum to 1 over E."""
    layers, tokens, top_k = experts.shape
    domains = labels.repeat_interleave(tokens * top_k // len(labels))
    cells = domains * num_experts + experts.reshape(layers, -1)
    counts = torch.stack([torch.bincount(row, minlength=num_domains * num_experts) for row in cells])
    counts = counts.view(layers, num_domains, num_experts).double()
    return counts / counts.sum(dim=-1, keepdim=True)


def domain_divergence(probabilities, labels, num_domains):
    """Compares the domains' mean router probabilities.

    Arguments:
        probabilities: [L, T, E].
        labels: [N] int64.
        num_domains: D.

    Returns:
        [L, D, D] Jensen-Shannon divergences.
    """
    domains = labels.repeat_interleave(probabilities.shape[1] // len(labels))
    totals = [edl.ops.aggregate_routing(layer, domains, num_domains, "none") for layer in probabilities]
    sums = torch.stack([layer_sums for layer_sums, _ in totals]).double()
    counts = torch.stack([layer_counts for _, layer_counts in totals]).double()
    return edl.ops.pairwise_divergence(sums, counts)


def same_byte_divergence(probabilities, inputs, labels, num_domains):
    """Compares the routing of the same byte in different domains.

    Chinese is told from English by a single byte, and so are formulas from prose to some degree. What is left when the
    byte is the same comes from the text around it. A segment here is one byte value in one sequence; the few segments
    of rare bytes make their divergence too large by chance, which the bias correction takes out again.

    Arguments:
        probabilities: [L, T, E].
        inputs: [N, S] int64, the bytes that the router saw.
        labels: [N] int64.
        num_domains: D.

    Returns:
        [L, D, D] divergences, mean over bytes, each weighing as much as it is common in the domain where it is rarer.
    """
    number, length = inputs.shape
    segments = (torch.arange(number)[:, None] * VOCABULARY + inputs).flatten()
    places = torch.arange(VOCABULARY).repeat(number) * num_domains + labels.repeat_interleave(VOCABULARY)
    present = torch.bincount(segments, minlength=number * VOCABULARY) > 0
    cells = (VOCABULARY, num_domains)
    counts = torch.bincount(places[present], minlength=VOCABULARY * num_domains).view(cells).double()
    tokens = torch.bincount(inputs.flatten() * num_domains + labels.repeat_interleave(length), minlength=counts.numel())
    frequency = tokens.view(cells).double()
    weight = torch.minimum(frequency[:, :, None], frequency[:, None])
    weight *= torch.minimum(counts[:, :, None], counts[:, None]) >= SEQUENCES_PER_BYTE
    layers = []
    for layer in probabilities:
        sums, sizes = edl.ops.aggregate_routing(layer, segments, number * VOCABULARY, "none")
        means = sums[present].double() / sizes[present].double()[:, None]
        empty = means.new_zeros(counts.numel(), layer.shape[-1])
        totals = empty.index_add(0, places[present], means).view(*cells, -1)
        squares = empty.index_add(0, places[present], means.square()).view(*cells, -1)
        divergence = edl.ops.pairwise_divergence(totals, counts, squares)
        shared = torch.where(weight > 0, weight * divergence, 0.0).sum(dim=0)
        layers.append(shared / weight.sum(dim=0))  # 0 / 0 is the NaN of domains without a common byte
    return torch.stack(layers)


def favourite_experts(usage, number):
    """Returns for every layer and domain the experts it uses most in comparison with the other domains.

    The most used experts would not do: an expert that everybody uses is nobody's.

    Arguments:
        usage: [L, D, E].
        number: how many experts.

    Returns:
        [L, D, number] int64.
    """
    others = (usage.sum(dim=1, keepdim=True) - usage) / (usage.shape[1] - 1)
    return (usage - others).topk(number, dim=-1).indices


@contextlib.contextmanager
def switched_off(model, experts):
    """Keeps tokens from choosing experts for as long as the context lasts; experts: [L, number] int64."""

    def hook(chosen):
        return lambda router, arguments, choice: router.choice_of(choice.logits.index_fill(-1, chosen, -math.inf))

    handles = [block.experts.router.register_forward_hook(hook(chosen)) for block, chosen in zip(model.blocks, experts)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def knock_out(model, sequences, labels, loss, usage):
    """Switches off a quarter of the experts in every layer, each domain's favourites in turn.

    Arguments:
        model: LanguageModel.
        sequences: [N, S + 1] int64.
        labels: [N] int64.
        loss: [N] bits per byte with all experts.
        usage: [L, D, E].

    Returns:
        (rise of bits per byte on the domain's own text [D], on the others' [D]).
    """
    domains, experts = usage.shape[1:]
    top_k = model.settings.top_k
    favourites = favourite_experts(usage, max(1, min(experts // 4, experts - top_k)))
    own, others = [], []
    for domain in range(domains):
        mine = labels == domain
        # As many sequences of others as of its own, evenly spaced: the cost must not grow with the square of D.
        rest = torch.nonzero(~mine).flatten()
        rest = rest[torch.linspace(0, len(rest) - 1, int(mine.sum())).round().long()]
        chosen = torch.cat((torch.nonzero(mine).flatten(), rest))
        with switched_off(model, favourites[:, domain]):
            rise = observe(model, sequences[chosen]).loss - loss[chosen]
        own.append(rise[: int(mine.sum())].mean())
        others.append(rise[int(mine.sum()) :].mean())
    return torch.stack(own), torch.stack(others)


def seconds_of_loss(loss, logits, labels, repeats=31):
    """Times what the divergence loss adds to a step: its forward and backward pass down to the router logits.

    The rest of the step does not change with the loss. The difference of two whole steps would say the same with a
    hundred times the noise.

    Arguments:
        loss: edl.ExpertDivergenceLoss.
        logits: list of [T, E], one per layer.
        labels: [B] int64.
        repeats: number of measurements.

    Returns:
        Median seconds.
    """
    leaves = [layer.detach().clone().requires_grad_() for layer in logits]
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf)  # the gradient of the language model is there already, and is added to
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        loss(leaves, labels).backward()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
