"""What a model loses when some of its experts are silent, or when its choices mean other experts."""

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edl.diagnostics import measures
from edl.diagnostics.extras import require
from edl.diagnostics.findings import Interventions
from edl.diagnostics.layers import LayerFacts
from edl.diagnostics.looking import counts_of
from edl.diagnostics.record import Record
from edl.integrations.transformers.routers import choices_of_arguments
from edl.moe.routers import Router
from edl.observe.models import WatchedModel
from edl.observe.sample import SampledDocument
from edl.observe.watch import Watch
from edl.routing import Choice

# Share of a layer's experts that are silent.
_SHARE = 0.25
# Sets of random experts, whose mean is the control.
_CONTROLS = 3

Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def silenced(experts: Tensor) -> Change:
    """Choices of these experts add nothing; what is left of a token's weights is scaled up to their sum.

    Args:
        experts (Tensor[n]): int64.
    """

    def change(chosen: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        is_silent = torch.isin(chosen, experts.to(chosen.device, chosen.dtype))
        left = weights.masked_fill(is_silent, 0.0)
        total, rest = weights.sum(-1, keepdim=True), left.sum(-1, keepdim=True)
        return chosen, torch.where(rest > 0, left * (total / rest.where(rest > 0, 1.0)), left)

    return change


def permuted(order: Tensor) -> Change:
    """Each choice means another expert.

    Args:
        order (Tensor[E]): int64, a permutation.
    """

    def change(chosen: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        order_here = order.to(chosen.device)
        is_expert = (chosen >= 0) & (chosen < len(order_here))
        others = order_here[chosen.clamp(0, len(order_here) - 1).long()].to(chosen.dtype)
        return chosen.where(~is_expert, others), weights

    return change


@contextlib.contextmanager
def changed(watch: Watch, changes: Mapping[str, Change]) -> Iterator[None]:
    """Layers whose experts are told of other choices than those that their routers made.

    Args:
        watch (Watch): of the model.
        changes (mapping): by the name of the router.

    Raises:
        ValueError: a layer whose experts are not told of choices.
    """
    hooks = []
    told = dict(watch.experts)
    for name, router, _ in watch.routers:
        if name not in changes:
            continue
        if name in told:
            hooks.append(told[name].register_forward_pre_hook(_on_arguments(changes[name]), with_kwargs=True))
        elif isinstance(router, Router):
            hooks.append(router.register_forward_hook(_on_choice(changes[name])))
        else:
            raise ValueError(
                f"edl::observe: --knock-out needs experts that are told of their router's choices (got {name}, whose "
                "are not)"
            )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _on_choice(change: Change) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], choice: Choice) -> Choice:
        experts, weights = change(choice.experts, choice.weights)
        return choice._replace(experts=experts, weights=weights)

    return hook


def _on_arguments(change: Change) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        places = choices_of_arguments(args, kwargs)
        assert places is not None
        (chosen, weights), put = places
        return put(*change(chosen, weights))

    return hook


class LanguageModel:
    """The losses of documents, one at a time, as logits of a large vocabulary are large.

    Args:
        watched: with its head.
        advance: is told how many tokens were read.
    """

    def __init__(self, watched: WatchedModel, advance: Callable[[int], None]) -> None:
        self.watched, self.watch, self._advance = watched, Watch(watched.model), advance

    @torch.no_grad()
    def losses(self, documents: Sequence[SampledDocument], changes: Mapping[str, Change]) -> Any:
        """The mean cross entropy of the next token in each document's window, array[N]."""
        np = require("numpy", "observe")
        values = []
        for document in documents:
            begin, end = int(document.window[0]), int(document.window[-1]) + 1
            ids = torch.from_numpy(document.tokens.ids[:end]).long().unsqueeze(0).to(self.watched.device)
            with changed(self.watch, changes):
                logits = self._logits(ids)
            predicted, wanted = logits[0, begin - 1 : end - 1].float(), ids[0, begin:end]
            values.append(float(F.cross_entropy(predicted, wanted.to(predicted.device))))
            self._advance(end)
        return np.asarray(values)

    def _logits(self, ids: Tensor) -> Tensor:
        given = self.watched.model(ids)
        logits = getattr(given, "logits", given[0] if isinstance(given, tuple) else given)
        if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != ids.shape:
            raise ValueError(
                "edl::observe: --knock-out needs a model that returns logits [B, S_len, vocabulary], alone or first "
                f"(got {type(given).__name__})"
            )
        return logits


def documents_within(
    documents: Sequence[Sequence[SampledDocument]], tokens: int
) -> tuple[tuple[SampledDocument, ...], ...]:
    """Of each domain the first documents that have so many tokens in their windows, two at least."""
    window = len(documents[0][0].window)
    number = max(2, math.ceil(tokens / window))
    return tuple(tuple(of_domain[:number]) for of_domain in documents)


def tokens_read(documents: Sequence[Sequence[SampledDocument]], num_layers: int) -> int:
    """How many tokens `intervene` reads of these documents of each domain."""
    passes = 1 + len(documents) + _CONTROLS + num_layers
    return passes * sum(int(document.window[-1]) + 1 for of_domain in documents for document in of_domain)


def intervene(
    watched: WatchedModel,
    documents: Sequence[Sequence[SampledDocument]],
    record: Record,
    seed: int,
    advance: Callable[[int], None],
) -> Interventions:
    """Silences a quarter of every layer's experts, each domain's favourites in turn and random ones, and permutes the
    choices of one layer after another.

    Args:
        watched: the model, with its head.
        documents: of each domain.
        record: of the model, which says what domains favour.
        seed: of the random experts and permutations.
        advance: is told how many tokens were read.
    """
    layers = record.layers
    usage = [measures.shares(counts_of(record, place)).numpy() for place in range(len(layers))]
    np = require("numpy", "observe")
    model, draw = LanguageModel(watched, advance), random.Random(seed)
    labels = np.repeat(np.arange(len(documents)), [len(of_domain) for of_domain in documents])
    everything = [document for of_domain in documents for document in of_domain]
    before = model.losses(everything, {})
    favourites = [_silencing(layers, usage, domain) for domain in range(len(documents))]
    knocked = [model.losses(everything, changes) - before for changes in favourites]
    controls = [model.losses(everything, _silencing_random(layers, draw)) - before for _ in range(_CONTROLS)]
    moved = [model.losses(everything, {layer.name: _permuting(layer, draw)}) - before for layer in layers]
    control = np.mean(controls, axis=0)
    of_domains = range(len(documents))
    return Interventions(
        tokens=np.array([sum(len(document.window) for document in of_domain) for of_domain in documents]),
        documents=np.bincount(labels, minlength=len(documents)),
        loss=np.array([before[labels == domain].mean() for domain in of_domains]),
        own=np.array([_interval(knocked[domain][labels == domain]) for domain in of_domains]),
        others=np.array([_interval(knocked[domain][labels != domain]) for domain in of_domains]),
        random=np.array([_interval(control[labels == domain]) for domain in of_domains]),
        permuted=np.array([_interval(rise) for rise in moved]),
    )


def _silent(layer: LayerFacts) -> int:
    """How many experts of a layer are silent: a quarter, as long as K are left, and one at least. A token all of whose
    choices are silent gets nothing from the layer."""
    return max(1, min(int(layer.num_experts * _SHARE), layer.num_experts - layer.top_k))


def _silencing(layers: Sequence[LayerFacts], usage: Sequence[Any], domain: int) -> dict[str, Change]:
    """The experts that a domain uses most in comparison with the others: what everybody uses is nobody's favourite."""
    np = require("numpy", "observe")
    changes = {}
    for layer, shares in zip(layers, usage):
        others = np.delete(shares, domain, axis=0)
        advantage = shares[domain] - (np.nanmean(others, axis=0) if len(others) else 0.0)
        changes[layer.name] = silenced(torch.from_numpy(np.argsort(-advantage, kind="stable")[: _silent(layer)].copy()))
    return changes


def _silencing_random(layers: Sequence[LayerFacts], draw: random.Random) -> dict[str, Change]:
    return {
        layer.name: silenced(torch.tensor(draw.sample(range(layer.num_experts), _silent(layer)))) for layer in layers
    }


def _permuting(layer: LayerFacts, draw: random.Random) -> Change:
    return permuted(torch.tensor(draw.sample(range(layer.num_experts), layer.num_experts)))


def _interval(rises: Any) -> tuple[float, float, float]:
    """Mean and 95 % interval (Student's t over documents); NaN without documents."""
    if len(rises) == 0:
        return math.nan, math.nan, math.nan
    mean = float(rises.mean())
    if len(rises) < 2:
        return mean, math.nan, math.nan
    stats = require("scipy.stats", "observe")
    half = float(stats.sem(rises) * stats.t.ppf(0.975, len(rises) - 1))
    return mean, mean - half, mean + half
