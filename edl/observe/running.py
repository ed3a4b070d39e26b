"""Runs sampled documents through a model, and keeps what its routers do."""

import dataclasses
import hashlib
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from edl.diagnostics.extras import require
from edl.diagnostics.layers import LayerFacts
from edl.diagnostics.record import Record, joined
from edl.diagnostics.statistics import RoutingStatistics
from edl.observe.models import WatchedModel
from edl.observe.sample import Sample, SampledDocument, texts_of
from edl.observe.unfinished import Unfinished
from edl.observe.watch import Watch, observe_batch
from edl.routing import Observation

# Seconds between two steps that a killed run can go on from.
_PATIENCE = 30.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """In which batches the documents are run, longest first: the first batch takes the most memory.

    Attributes:
        documents (tuple): of all domains.
        labels (tuple of int): the domain of each.
        batch_size (int): documents at a time.
    """

    documents: tuple[SampledDocument, ...]
    labels: tuple[int, ...]
    batch_size: int

    @property
    def order(self) -> list[int]:
        """Where each document is that the record has, by domain and rank."""
        keys = [(label, document.rank) for label, document in zip(self.labels, self.documents)]
        return sorted(range(len(keys)), key=keys.__getitem__)

    @property
    def num_tokens(self) -> int:
        """That the model reads."""
        return sum(len(document.tokens.ids) for document in self.documents)


def plan_of(sample: Sample, batch_size: int) -> Plan:
    """The batches of a sample."""
    pairs = [(document, label) for label, documents in enumerate(sample.documents) for document in documents]
    pairs.sort(key=lambda pair: (-len(pair[0].tokens.ids), pair[1], pair[0].rank))
    return Plan(tuple(document for document, _ in pairs), tuple(label for _, label in pairs), batch_size)


def run_of(watched: WatchedModel, plan: Plan, domains: Sequence[str], options: Sequence[object]) -> str:
    """A word that is another one for another model, sample or other options."""
    digest = hashlib.sha256(repr([watched.identity, domains, plan.batch_size, options]).encode())
    for document, label in zip(plan.documents, plan.labels):
        digest.update(repr((document.key, label, document.group)).encode())
        digest.update(document.tokens.ids.tobytes() + document.window.tobytes())
    return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What a run will take, after its first batch.

    Attributes:
        record_bytes (int): of the record.
        tokens_per_second (float): that the model reads.
        seconds (float): that are left.
        memory_bytes (int): at the most so far; of the device where there is one.
    """

    record_bytes: int
    tokens_per_second: float
    seconds: float
    memory_bytes: int


def observe(
    watched: WatchedModel,
    plan: Plan,
    domains: Sequence[str],
    unfinished: Unfinished,
    keep_weights: bool,
    scores: str,
    foretell: Callable[[Forecast], None],
    advance: Callable[[int], None],
) -> None:
    """Runs the documents that are not done yet.

    Args:
        watched: the model.
        plan: the documents.
        domains: their names.
        unfinished: where what was seen is kept.
        keep_weights: whether the record has weights.
        scores: of the model's logits, "softmax" or "sigmoid".
        foretell: is told what the run will take, after its first batch.
        advance: is told how many tokens were read since last time.
    """
    watch = Watch(watched.model)
    unfinished.begin()
    statistics = unfinished.statistics() or RoutingStatistics(list(domains), scores=scores)
    pieces, last = [], time.monotonic()
    begin = first = unfinished.done
    for done in range(first):
        advance(len(plan.documents[done].tokens.ids))
    while begin < len(plan.documents):
        start = time.monotonic()
        end = min(begin + plan.batch_size, len(plan.documents))
        batch = _Batch(plan.documents[begin:end], plan.labels[begin:end])
        seen = observe_batch(watched.model, watch, *batch.inputs(watched.device))
        labels, counted = torch.tensor(batch.labels, device=watched.device), batch.counted().to(watched.device)
        observations = [observation for _, observation in seen]
        statistics.update(observations, labels, attention_mask=counted)
        _check_scores(seen, counted)
        pieces.append(batch.record(seen, domains, keep_weights))
        if begin == first:
            foretell(_forecast(plan, begin, end, seen, keep_weights, time.monotonic() - start, watched.device))
        advance(batch.num_tokens)
        begin = end
        if time.monotonic() - last > _PATIENCE or begin == len(plan.documents):
            unfinished.step(joined(pieces, range(sum(map(len, pieces))), {}, {}), statistics)
            pieces, last = [], time.monotonic()


def _check_scores(seen: Sequence[tuple[LayerFacts, Observation]], counted: Tensor) -> None:
    """Raises where a choice among scores that are no numbers would be taken for one."""
    for facts, layer in seen:
        routing = layer.logits if layer.scores is None else layer.scores
        if routing is not None and routing.isnan()[counted.flatten().to(routing.device) > 0].any():
            raise ValueError(
                f"edl::observe: scores of counted tokens must be numbers (got NaN from {facts.name}: weights that are "
                "not finite, or a model that needs another --dtype)"
            )


class _Batch:
    """Documents that are run together, padded behind."""

    def __init__(self, documents: Sequence[SampledDocument], labels: Sequence[int]) -> None:
        self.documents, self.labels = documents, labels
        self.length = max(len(document.tokens.ids) for document in documents)

    @property
    def num_tokens(self) -> int:
        return sum(len(document.tokens.ids) for document in self.documents)

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, [B, S_len]."""
        ids, mask = torch.zeros(2, len(self.documents), self.length, dtype=torch.int64)
        for row, document in enumerate(self.documents):
            ids[row, : len(document.tokens.ids)] = torch.from_numpy(document.tokens.ids)
            mask[row, : len(document.tokens.ids)] = 1
        return ids.to(device), mask.to(device)

    def counted(self) -> Tensor:
        """Which tokens count, [B, S_len]."""
        counted = torch.zeros(len(self.documents), self.length, dtype=torch.int64)
        for row, document in enumerate(self.documents):
            counted[row, : len(document.tokens.ids)] = torch.from_numpy(document.tokens.is_counted)
        return counted

    def record(
        self, seen: Sequence[tuple[LayerFacts, Observation]], domains: Sequence[str], keep_weights: bool
    ) -> Record:
        """What the record keeps of it."""
        np = require("numpy", "observe")
        rows = [row * self.length + document.window for row, document in enumerate(self.documents)]
        places = torch.from_numpy(np.concatenate(rows))
        lengths = [len(document.window) for document in self.documents]

        def of_windows(rows: Tensor) -> Any:
            return rows[places.to(rows.device)].cpu().numpy()

        layers = [layer for layer, _ in seen]
        chosen = [(layer.experts, layer.weights) for _, layer in seen]
        return Record(
            layers,
            domains,
            np.concatenate([document.tokens.ids[document.window] for document in self.documents]),
            np.concatenate([[0], np.cumsum(lengths)]),
            list(self.labels),
            [of_windows(experts) for experts, _ in chosen if experts is not None],
            [of_windows(weights.float()) for _, weights in chosen if weights is not None] if keep_weights else None,
            [document.key for document in self.documents],
            [document.group for document in self.documents],
        )


def _forecast(
    plan: Plan,
    begin: int,
    end: int,
    seen: Sequence[tuple[LayerFacts, Observation]],
    keep_weights: bool,
    seconds: float,
    device: torch.device,
) -> Forecast:
    window_tokens = sum(len(document.window) for document in plan.documents)
    of_choice = [(1 if layer.num_experts < 2**8 else 2) + 2 * keep_weights for layer, _ in seen]
    of_token = 4 + sum(size * layer.top_k for size, (layer, _) in zip(of_choice, seen))
    lengths = [len(document.tokens.ids) for document in plan.documents]
    rate = sum(lengths[begin:end]) / seconds
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Forecast(window_tokens * of_token, rate, sum(lengths[end:]) / rate, memory)


def texts_in(plan: Plan, tokenizer: Any) -> dict[int, str]:
    """The texts of the tokens in the windows."""
    np = require("numpy", "observe")
    ids = np.unique(np.concatenate([document.tokens.ids[document.window] for document in plan.documents]))
    return texts_of(tokenizer, ids.tolist())
