"""What a run's statistics and record say, put together: everything that a page shows."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edl.diagnostics import measures, significance
from edl.diagnostics.extras import require
from edl.diagnostics.findings import Course, Example, Findings, Interventions, LayerFindings
from edl.diagnostics.layers import LayerFacts
from edl.diagnostics.multipliers import FEWEST
from edl.diagnostics.record import Record
from edl.diagnostics.statistics import LayerSums, RoutingStatistics

# Tokens of an expert, and tokens of an example, that a page has room for.
_TOP_TOKENS = 10
_EXAMPLE_TOKENS = 96
# Domains that a sentence lists.
_MOST_NAMED = 8
# Experts of a layer whose pairs are counted: 128 MiB.
_MOST_PAIRED = 2**12

Progress = Callable[[str, int, int], None]


def findings_of(
    statistics: RoutingStatistics | None,
    record: Record | None,
    title: str,
    interventions: Interventions | None = None,
    examples: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Findings:
    """Measures, tests and intervals of a run.

    Numbers of tokens, loads and shares are of the statistics where there are some: they have seen more. What has an
    interval or a test, and what is of single tokens, is of the record.

    Args:
        statistics (RoutingStatistics, optional): sums; of the same layers and domains as the record.
        record (Record, optional): of documents. One of the two is needed.
        title (str): of the run.
        interventions (Interventions, optional): what experts are needed for.
        examples (int): documents of each domain whose text is shown. Default: 0.
        seed (int): of the tests. Default: 0.
        progress (callable, optional): is told what is computed, how many steps of it are done, and how many there are.

    Raises:
        ImportError: no numpy or scipy.
        ValueError: neither statistics nor record, or two that do not belong together.
    """
    layers, domains = _common(statistics, record)
    if interventions is not None and _sizes(interventions) != (len(domains), len(layers)):
        raise ValueError(
            "edl::report: interventions must be of the run's domains and layers, "
            f"{len(domains)} and {len(layers)} (got {' and '.join(map(str, _sizes(interventions)))})"
        )
    np = require("numpy", "report")
    looks = [_look(place, layer, statistics, record) for place, layer in enumerate(layers)]
    tell = progress or (lambda what, done, total: None)
    found = []
    for place, look in enumerate(looks):
        found.append(_layer_findings(place, look, record, seed))
        tell("layers", place + 1, len(looks))
    first, second = np.triu_indices(len(domains), 1)
    loads = [look.load for look in looks]
    shares = [look.shares for look in looks]
    compared = beyond = None
    if record is not None and len(domains) > 1:
        compared = significance.compare(record, seed, lambda done, total: tell("choices", done, total))
        beyond = significance.beyond_token(record, seed, lambda done, total: tell("tokens", done, total))
    return Findings(
        title=title,
        facts={**_facts(statistics), **_facts(record)},
        domains=domains,
        documents=_documents(record, len(domains)),
        tokens=_tokens(statistics, record, len(domains)),
        layers=found,
        load_violation=np.array([float(measures.max_violation(load)) for load in loads]),
        dead=[np.flatnonzero(load == 0).tolist() for load in loads],
        coverage=np.stack([measures.coverage(share).numpy() for share in shares]),
        overlap=np.stack([measures.overlap(share).numpy()[first, second] for share in shares]),
        information=np.array([_information(place, look, record) for place, look in enumerate(looks)]),
        decomposition=np.stack([_decomposition(place, record) for place in range(len(looks))]),
        divergence=np.stack([measures.pairwise_divergence(share).numpy()[first, second] for share in shares]),
        compared=compared,
        beyond_token=beyond,
        token_texts=_texts_of(found, record),
        examples=_examples(record, examples),
        course=_course(statistics),
        interventions=interventions,
        notes=_notes(record, domains),
    )


def _common(
    statistics: RoutingStatistics | None, record: Record | None
) -> tuple[tuple[LayerFacts, ...], tuple[str, ...]]:
    """The layers and domains of a run."""
    if statistics is None and record is None:
        raise ValueError("edl::report: a run must have statistics or a record (got neither)")
    if statistics is not None and not statistics.layers:
        raise ValueError("edl::report: statistics must have counted tokens (got none)")
    if statistics is None or record is None:
        one: Any = record if statistics is None else statistics
        return one.layers, one.domains
    # Statistics have them by number, a record as the model does.
    sizes = [sorted((layer.number, layer.num_experts) for layer in each.layers) for each in (statistics, record)]
    if sizes[0] != sizes[1] or statistics.domains != record.domains:
        raise ValueError(
            "edl::report: statistics and record of a run must have the same layers and domains (got "
            f"{len(sizes[0])} layers, {list(statistics.domains)}, and {len(sizes[1])} layers, {list(record.domains)})"
        )
    return record.layers, record.domains


def _sizes(interventions: Interventions) -> tuple[int, int]:
    """D and L."""
    return len(interventions.own), len(interventions.permuted)


class _Look:
    """What a layer's choices add up to.

    Attributes:
        facts (LayerFacts): which.
        sums (LayerSums, optional): of the statistics.
        counts (array[D, E]): choices.
    """

    def __init__(self, facts: LayerFacts, sums: LayerSums | None, counts: Any) -> None:
        self.facts, self.sums, self.counts = facts, sums, counts

    @property
    def load(self) -> Any:
        """array[E], of all domains."""
        return self.counts.sum(0)

    @property
    def shares(self) -> Any:
        """Tensor[D, E]."""
        return measures.shares(self.counts)


def _look(place: int, facts: LayerFacts, statistics: RoutingStatistics | None, record: Record | None) -> _Look:
    if statistics is not None:
        sums = statistics.sums[facts.number]
        return _Look(facts, sums, sums.choices.cpu().double().numpy())
    assert record is not None
    return _Look(facts, None, counts_of(record, place))


def counts_of(record: Record, place: int) -> Any:
    """How often each domain chose each expert of the place-th layer, array[D, E]."""
    np = require("numpy", "report")
    counts = np.zeros((len(record.domains), record.layers[place].num_experts))
    np.add.at(counts, record.labels, record.counts(place))
    return counts


def _layer_findings(place: int, look: _Look, record: Record | None, seed: int) -> LayerFindings:
    np = require("numpy", "report")
    number = len(look.counts)
    unknown = np.full(number, np.nan)
    entropy, margin, coactivation, scores = unknown, unknown, None, None
    if look.sums is not None:
        tokens = look.sums.tokens.cpu().double()
        entropy, margin = ((x.cpu() / tokens).numpy() for x in (look.sums.entropy, look.sums.margin))
        coactivation = look.sums.coactivation.cpu().double().numpy()
        scores = (look.sums.mass.cpu() / tokens.unsqueeze(1)).numpy()
    elif record is not None:
        coactivation = _coactivation(record.experts(place), look.facts.num_experts)
    of_documents, overlap, certain, top = unknown, np.full(2, np.nan), None, []
    if record is not None:
        counts = record.counts(place)
        of_documents = measures.document_entropy(counts, record.labels, number).numpy()
        overlap = measures.document_overlap(counts, record.labels).numpy()
        certain = significance.certain_cells(record, place, seed)
        top = measures.top_tokens(record.token_ids, record.experts(place), look.facts.num_experts, _TOP_TOKENS)
    shares = look.shares.numpy()
    return LayerFindings(look.facts, shares, certain, coactivation, entropy, margin, of_documents, overlap, top, scores)


def _coactivation(experts: Any, num_experts: int) -> Any:
    """How many tokens chose two experts, array[E, E], of choices [T, K]; None where these are too many to look at."""
    if num_experts > _MOST_PAIRED:
        return None
    np = require("numpy", "report")
    counts = np.zeros((num_experts + 1) ** 2)
    for first in range(experts.shape[1]):
        for second in range(experts.shape[1]):
            pairs = experts[:, first] * (num_experts + 1) + experts[:, second]
            counts += np.bincount(pairs, minlength=len(counts))
    return counts.reshape(num_experts + 1, -1)[:num_experts, :num_experts]


def _information(place: int, look: _Look, record: Record | None) -> float:
    if record is not None:
        return significance.information(record, place)
    return float(measures.information(look.shares))


def _decomposition(place: int, record: Record | None) -> Any:
    np = require("numpy", "report")
    if record is None:
        return np.full(4, np.nan)
    return measures.decomposition(record.counts(place), record.labels).numpy()


def _facts(given: RoutingStatistics | Record | None) -> dict[str, str]:
    return {} if given is None else {str(name): str(value) for name, value in given.facts.items()}


def _documents(record: Record | None, num_domains: int) -> Any:
    np = require("numpy", "report")
    labels = np.zeros(0, np.int64) if record is None else record.labels
    return np.bincount(labels, minlength=num_domains)


def _tokens(statistics: RoutingStatistics | None, record: Record | None, num_domains: int) -> Any:
    """Of the layer that counted most, where they differ."""
    np = require("numpy", "report")
    if statistics is not None:
        return np.max([sums.tokens.cpu().numpy() for sums in statistics.sums.values()], axis=0)
    assert record is not None
    return np.bincount(record.labels, np.diff(record.offsets), minlength=num_domains).astype(np.int64)


def _texts_of(found: Sequence[LayerFindings], record: Record | None) -> Mapping[int, str]:
    if record is None:
        return {}
    wanted = {token for layer in found for tokens in layer.top_tokens for token, _, _ in tokens}
    return {token: record.token_texts[token] for token in sorted(wanted) if token in record.token_texts}


def _examples(record: Record | None, number: int) -> list[Example]:
    """The beginnings of the first documents of each domain."""
    np = require("numpy", "report")
    if record is None or number == 0:
        return []
    chosen = [record.experts(place) for place in range(len(record.layers))]
    found = []
    for domain in range(len(record.domains)):
        for document in np.flatnonzero(record.labels == domain)[:number]:
            begin = record.offsets[document]
            end = min(record.offsets[document + 1], begin + _EXAMPLE_TOKENS)
            texts = [record.token_texts.get(int(token), f"[{token}]") for token in record.token_ids[begin:end]]
            found.append(Example(domain, texts, np.stack([layer[begin:end, 0] for layer in chosen])))
    return found


def _course(statistics: RoutingStatistics | None) -> Course | None:
    np = require("numpy", "report")
    if statistics is None or not statistics.snapshots:
        return None
    numbers = [layer.number for layer in statistics.layers]

    def of_all(measure: Callable[[Any], float]) -> Any:
        rows = [
            [measure(snapshot.sums[number]) if number in snapshot.sums else np.nan for number in numbers]
            for snapshot in statistics.snapshots
        ]
        return np.array(rows, float)

    return Course(
        steps=np.array([snapshot.step for snapshot in statistics.snapshots]),
        information=of_all(lambda sums: float(measures.information(measures.shares(sums.choices)))),
        max_violation=of_all(lambda sums: float(measures.max_violation(sums.choices.sum(0)))),
        dead=of_all(lambda sums: float(measures.dead_experts(sums.choices.sum(0)))),
        token_entropy=of_all(lambda sums: float(sums.entropy.sum() / sums.tokens.sum())),
    )


def _notes(record: Record | None, domains: Sequence[str]) -> list[str]:
    np = require("numpy", "report")
    if record is None:
        sentence = "There is no record of single documents: numbers come without tests and intervals, and nothing is "
        return [f"{sentence}known of tokens. `edl observe` writes one."]
    groups = [len(np.unique(record.groups[record.labels == domain])) for domain in range(len(domains))]
    few = [f"{name} ({number})" for name, number in zip(domains, groups) if number < FEWEST]
    others = [f"and {len(few) - _MOST_NAMED} others"] if len(few) > _MOST_NAMED else []
    listed = ", ".join(few[:_MOST_NAMED] + others)
    notes = [f"Fewer than {FEWEST} independent documents, and so without a test: {listed}."] if few else []
    if len(domains) == 1:
        notes.append("There is one domain, and nothing to compare it with.")
    return notes
