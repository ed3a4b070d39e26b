"""How often the tests of edl.diagnostics reject, and how often their intervals hold the truth, on routings made for it.

    python tools/calibrate_tests.py --repetitions 1000 > table.md
    python tools/calibrate_tests.py --repetitions 50 --only "sees the token"

Prints a Markdown table. Every case draws documents anew in each repetition; the same seed gives the same table.
"""

import argparse
import sys
import time
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from edl.diagnostics.findings import Estimate
from edl.diagnostics.layers import LayerFacts
from edl.diagnostics.record import Record
from edl.diagnostics.significance import beyond_token, certain_cells, compare, compare_runs

LEVEL = 0.05
EXPERTS = 16
TOP_K = 2


class Source(NamedTuple):
    """A domain whose documents route by distributions of their own, around a common one."""

    documents: int
    tokens: tuple[int, int] = (64, 64)  # the shortest and the longest document
    concentration: float = 30.0  # of the Dirichlet distribution: the smaller, the less alike are documents
    group: int = 1  # documents of one origin, which route alike


def record_of(
    rng: np.random.Generator, sources: list[Source], means: np.ndarray, are_shared: bool = False, tells: bool = True
) -> Record:
    """A record of choices, whose tokens say nothing.

    Args:
        rng: of everything.
        sources: of each domain.
        means: [L, D, E], mean routings of domains.
        are_shared: a group has documents in each domain, which route somewhat alike.
        tells: the record knows of groups.
    """
    lengths = [rng.integers(source.tokens[0], source.tokens[1] + 1, source.documents) for source in sources]
    groups = [np.arange(source.documents) // source.group for source in sources]
    experts = []
    for mean in means:
        routings: list[np.ndarray] = []
        for source, own, group in zip(sources, mean, groups):
            of_groups = rng.dirichlet(source.concentration * own, group[-1] + 1)
            if are_shared and routings:  # half of it is the group's routing in the first domain
                of_groups = (of_groups + routings[0][:: source.group]) / 2
            routings.append(of_groups[group])
        bounds = np.repeat(np.concatenate(routings), np.concatenate(lengths), 0).cumsum(1)
        points = rng.random((TOP_K, len(bounds), 1)) * bounds[:, -1:]
        experts.append((points > bounds).sum(2).T)
    numbers = np.concatenate([group + (0 if are_shared else 10**6 * place) for place, group in enumerate(groups)])
    offsets = np.append(0, np.cumsum(np.concatenate(lengths)))
    return Record(
        [LayerFacts(place, "", means.shape[2], TOP_K) for place in range(len(means))],
        [f"domain {place}" for place in range(len(sources))],
        np.zeros(offsets[-1], int),
        offsets,
        np.repeat(np.arange(len(sources)), [source.documents for source in sources]),
        experts,
        groups=numbers if tells else None,
    )


def means_of(
    rng: np.random.Generator, domains: int, shift: float, layers: int = 1, experts: int = EXPERTS, evenness: float = 3.0
) -> np.ndarray:
    """Mean routings [L, D, E]; shift is the standard deviation of logits between domains."""
    base = rng.dirichlet(np.full(experts, evenness), (layers, 1)) + 1e-4
    means = base * np.exp(shift * rng.standard_normal((layers, domains, experts)))
    return means / means.sum(2, keepdims=True)


class Reader(NamedTuple):
    """A router that sees tokens, and two domains that use them differently.

    Attributes:
        documents: of the two domains.
        tokens: of a document.
        distance: of the vocabularies, standard deviation of the logarithm of the ratio of frequencies.
        shift: of the logits in the second domain, standard deviation: what shows that a router sees the domain.
        effect: of a document on its logits, standard deviation.
    """

    documents: tuple[int, int] = (60, 60)
    tokens: int = 256
    distance: float = 1.0
    shift: float = 0.0
    effect: float = 0.0


VOCABULARY = 2000


def read(rng: np.random.Generator, reader: Reader) -> tuple[Record, np.ndarray, np.ndarray]:
    """Documents of two domains routed by a router that sees tokens; logits [vocabulary, E] and their shift [E]."""
    logits = 1.5 * rng.standard_normal((VOCABULARY, EXPERTS))
    shift = reader.shift * rng.standard_normal(EXPERTS)
    ids, experts = [], []
    for domain, number in enumerate(reader.documents):
        frequencies = np.exp(reader.distance * domain * rng.standard_normal(VOCABULARY)) / np.arange(1, VOCABULARY + 1)
        tokens = rng.choice(VOCABULARY, (number, reader.tokens), p=frequencies / frequencies.sum())
        effects = reader.effect * rng.standard_normal((number, 1, EXPERTS))
        noise = -np.log(rng.standard_exponential((*tokens.shape, EXPERTS), np.float32) + 1e-30)  # Gumbel's
        seen = (logits + domain * shift).astype(np.float32)[tokens] + effects.astype(np.float32) + noise
        experts.append(np.argpartition(-seen, TOP_K, axis=2)[:, :, :TOP_K].reshape(-1, TOP_K))
        ids.append(tokens.ravel())
    total = sum(reader.documents)
    record = Record(
        [LayerFacts(0, "", EXPERTS, TOP_K)],
        ["first", "second"],
        np.concatenate(ids),
        np.arange(total + 1) * reader.tokens,
        np.repeat([0, 1], reader.documents),
        [np.concatenate(experts)],
    )
    return record, logits, shift


def divergence(first: np.ndarray, second: np.ndarray) -> float:
    """Jensen-Shannon divergence of two routings without zeros."""
    mean = (first + second) / 2
    return float((first * np.log(first / mean) + second * np.log(second / mean)).sum() / 2)


def information(means: np.ndarray) -> float:
    """Mutual information of expert and domain, of routings [D, E] without zeros."""
    return float((means * np.log(means / means.mean(0))).sum(1).mean())


def mean_routing(logits: np.ndarray, effect: float, rng: np.random.Generator) -> np.ndarray:
    """How often experts are among the two chosen, of logits [vocabulary, E], over documents."""
    total = np.zeros_like(logits)
    effects = effect * rng.standard_normal((200 if effect else 1, logits.shape[1]))
    for own in np.concatenate([effects, -effects]):
        first = np.exp(logits + own)
        first /= first.sum(1, keepdims=True)
        odds = first / (1 - first)
        total += first * (1 + odds.sum(1, keepdims=True) - odds)
    return total / (2 * len(effects) * TOP_K)


def weights_of(record: Record) -> np.ndarray:
    """Mantel and Haenszel's weights of tokens in at least 8 documents of both domains, [vocabulary]."""
    labels = record.labels[record.documents]
    cells = np.unique(record.documents * VOCABULARY + record.token_ids)
    by_domain = [cells[record.labels[cells // VOCABULARY] == domain] % VOCABULARY for domain in (0, 1)]
    enough = np.all([np.bincount(tokens, minlength=VOCABULARY) >= 8 for tokens in by_domain], axis=0)
    first, second = (np.bincount(record.token_ids[labels == domain], minlength=VOCABULARY) for domain in (0, 1))
    weights = np.where(enough, first * second / np.maximum(first + second, 1), 0)
    return weights / weights.sum()


def holds(estimate: Estimate, truth: float) -> bool:
    """Whether what is said of a divergence is true: its interval, or its upper bound."""
    return bool(truth <= estimate.high and not truth < estimate.low)


Trial = Callable[[np.random.Generator], float | list[float]]


def rejects(sources: list[Source], shift: float = 0.0, evenness: float = 3.0, **options: bool) -> Trial:
    """Whether the test of the model rejects."""
    return lambda rng: (
        compare(record_of(rng, sources, means_of(rng, len(sources), shift, evenness=evenness), **options)).whole.p
        <= LEVEL
    )


def rejects_raw(reader: Reader) -> Trial:
    """Whether the test without a look at tokens rejects."""
    return lambda rng: compare(read(rng, reader)[0]).whole.p <= LEVEL


def rejects_beyond(reader: Reader) -> Trial:
    """Whether the test at equal tokens rejects."""
    return lambda rng: beyond_token(read(rng, reader)[0]).standardised.whole.p <= LEVEL


def shows(reader: Reader) -> Trial:
    """Divergences, in thousandths of a nat: raw, composition, standardised, same token."""

    def trial(rng: np.random.Generator) -> list[float]:
        record = read(rng, reader)[0]
        found = beyond_token(record)
        values = (compare(record).corrected, found.composition, found.standardised.corrected, found.same_token)
        return [1000 * float(value[0, 0]) for value in values]

    return trial


def covers(sources: list[Source], shift: float) -> Trial:
    """Whether the interval or bound of a divergence is right."""

    def trial(rng: np.random.Generator) -> float:
        means = means_of(rng, len(sources), shift)
        return holds(compare(record_of(rng, sources, means)).whole, divergence(*means[0]))

    return trial


def covers_beyond(reader: Reader) -> Trial:
    """Whether the interval or bound of a standardised divergence is right, at the sample's weights."""

    def trial(rng: np.random.Generator) -> float:
        record, logits, shift = read(rng, reader)
        weights = weights_of(record)
        tokens = np.flatnonzero(weights)
        first, second = (
            weights[tokens] @ mean_routing(logits[tokens] + each, reader.effect, np.random.default_rng(0))
            for each in (np.zeros(EXPERTS), shift)
        )
        return holds(beyond_token(record).standardised.whole, divergence(first, second))

    return trial


def changed(sources: list[Source], before: float, after: float, answers: Callable[[Estimate, float], bool]) -> Trial:
    """What is said of the change of I(E;D) between two runs on the same documents."""

    def trial(rng: np.random.Generator) -> float:
        earlier, later = (means_of(rng, len(sources), shift) for shift in (before, after))
        # The same lengths in both, by the same stream; routings of their own.
        lengths = rng.integers(2**32)
        records = [record_of(np.random.default_rng([lengths, 0]), sources, means) for means in (earlier, later)]
        found = compare_runs(records[0], records[1], "earlier", "later").information
        return answers(found, information(later[0]) - information(earlier[0]))

    return trial


def any_adjusted(domains: int, layers: int, what: str) -> Trial:
    """Whether any adjusted p of a comparison rejects, where nothing differs."""

    def trial(rng: np.random.Generator) -> float:
        means = means_of(rng, domains, 0.0, layers)
        found = compare(record_of(rng, [Source(40), Source(60), *[Source(30)] * (domains - 2)], means))
        return bool((getattr(found, what) <= LEVEL).any())

    return trial


def any_cell(domains: int, experts: int, evenness: float, source: Source) -> Trial:
    """Whether any cell of expert and domain is called certain, where nothing differs."""

    def trial(rng: np.random.Generator) -> float:
        means = means_of(rng, domains, 0.0, 1, experts, evenness)
        return bool(certain_cells(record_of(rng, [source] * domains, means), 0).any())

    return trial


NO_DIFFERENCE = "rejects, no difference, % (wanted: 5)"
FINDS = "rejects, a difference, % (the more the better)"
TOKEN = "rejects, a router that sees the token alone, % (wanted: at most 5)"
HOLDS = "interval or bound is right, % (wanted: 95 or more)"
FAMILY = "any of many rejects, no difference, % (wanted: at most 5)"
VALUES = "a router that sees the token alone shows, 1/1000 nat"
SHORT_AND_WILD = Source(40, (8, 64), 5.0)
LONG_AND_TAME = Source(200, (128, 512), 100.0)
PLAIN = [Source(60), Source(60)]

CASES: list[tuple[str, str, Trial]] = [
    (NO_DIFFERENCE, "30 and 30 documents", rejects([Source(30), Source(30)])),
    (NO_DIFFERENCE, "60 and 60", rejects(PLAIN)),
    (NO_DIFFERENCE, "30 and 300", rejects([Source(30), Source(300)])),
    (NO_DIFFERENCE, "of 16 to 64 and of 128 to 512 tokens", rejects([Source(60, (16, 64)), Source(60, (128, 512))])),
    (NO_DIFFERENCE, "of 1 to 512 tokens in one domain", rejects([Source(60, (1, 512)), Source(60, (1, 512))])),
    (
        NO_DIFFERENCE,
        "dispersed 20 times as much",
        rejects([Source(60, concentration=5), Source(60, concentration=100)]),
    ),
    (NO_DIFFERENCE, "40 short and dispersed, 200 long and alike", rejects([SHORT_AND_WILD, LONG_AND_TAME])),
    (NO_DIFFERENCE, "30 and 30, few experts with most choices", rejects([Source(30), Source(30)], evenness=0.3)),
    (NO_DIFFERENCE, "3 domains of 30, 60, 120", rejects([Source(30), Source(60), Source(120)])),
    (NO_DIFFERENCE, "40 groups of 5", rejects([Source(200, group=5)] * 2)),
    (NO_DIFFERENCE, "40 groups of 5, which the record does not know", rejects([Source(200, group=5)] * 2, tells=False)),
    (NO_DIFFERENCE, "60 groups with documents in both", rejects(PLAIN, are_shared=True)),
    (FINDS, "logits shifted by 0.1, 30 documents of 64 tokens", rejects([Source(30)] * 2, 0.1)),
    (FINDS, "by 0.1, 60", rejects(PLAIN, 0.1)),
    (FINDS, "by 0.1, 200", rejects([Source(200)] * 2, 0.1)),
    (FINDS, "by 0.2, 60", rejects(PLAIN, 0.2)),
    (TOKEN, "raw test: 60 and 60 documents of 256 tokens", rejects_raw(Reader())),
    (TOKEN, "standardised test: the same", rejects_beyond(Reader())),
    (TOKEN, "the same vocabulary", rejects_beyond(Reader(distance=0.0))),
    (TOKEN, "vocabularies far apart", rejects_beyond(Reader(distance=2.5))),
    (TOKEN, "effects of documents on logits, 0.3", rejects_beyond(Reader(effect=0.3))),
    (TOKEN, "30 and 200 documents", rejects_beyond(Reader((30, 200)))),
    (TOKEN, "30 and 200, far apart, effects 0.3", rejects_beyond(Reader((30, 200), distance=2.5, effect=0.3))),
    (TOKEN, "30 and 30 documents of 64 tokens", rejects_beyond(Reader((30, 30), 64))),
    (TOKEN, "200 and 200, effects 0.3", rejects_beyond(Reader((200, 200), effect=0.3))),
    (VALUES, "raw, composition, standardised, same token; as above", shows(Reader())),
    (
        FINDS,
        "standardised test: logits shifted by 0.05, 60 documents of 256 tokens",
        rejects_beyond(Reader(shift=0.05)),
    ),
    (FINDS, "standardised test: by 0.05, 200", rejects_beyond(Reader((200, 200), shift=0.05))),
    (FINDS, "standardised test: by 0.1, 60", rejects_beyond(Reader(shift=0.1))),
    (FINDS, "standardised test: by 0.1, 60, effects 0.3", rejects_beyond(Reader(shift=0.1, effect=0.3))),
    (HOLDS, "no difference, 60 and 60", covers(PLAIN, 0.0)),
    (HOLDS, "shift 0.1, 30 and 30", covers([Source(30)] * 2, 0.1)),
    (HOLDS, "shift 0.1, 60 and 60", covers(PLAIN, 0.1)),
    (HOLDS, "shift 0.3, 60 and 60", covers(PLAIN, 0.3)),
    (HOLDS, "shift 1, 30 and 30", covers([Source(30)] * 2, 1.0)),
    (HOLDS, "shift 0.3, short and dispersed, long and alike", covers([SHORT_AND_WILD, LONG_AND_TAME], 0.3)),
    (HOLDS, "standardised, the token alone", covers_beyond(Reader())),
    (HOLDS, "standardised, shift 0.1", covers_beyond(Reader(shift=0.1))),
    (HOLDS, "standardised, shift 0.3, effects 0.3", covers_beyond(Reader(shift=0.3, effect=0.3))),
    (
        HOLDS,
        "standardised, shift 0.3, 30 and 200, far apart",
        covers_beyond(Reader((30, 200), distance=2.5, shift=0.3)),
    ),
    (HOLDS, "change of I(E;D), from shift 0.1 to 0.3", changed(PLAIN, 0.1, 0.3, holds)),
    (HOLDS, "change of I(E;D), from 0.3 to 0.3", changed(PLAIN, 0.3, 0.3, holds)),
    (HOLDS, "change of I(E;D), from 0 to 0", changed(PLAIN, 0.0, 0.0, holds)),
    (FAMILY, "p of 8 layers, 4 domains", any_adjusted(4, 8, "layer_p")),
    (FAMILY, "p of 8 layers × 6 pairs", any_adjusted(4, 8, "p")),
    (FAMILY, "cells, 4 domains × 16 experts, 60 documents", any_cell(4, 16, 3.0, Source(60))),
    (FAMILY, "cells, 4 × 64, many of them rare", any_cell(4, 64, 0.3, Source(60))),
    (FAMILY, "cells, 16 × 64, many of them rare, 30 documents", any_cell(16, 64, 0.3, Source(30))),
]


def main(arguments: list[str]) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=1000, help="of each case (default 1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="cases whose words hold this")
    options = parser.parse_args(arguments)
    chosen = [case for case in CASES if options.only in f"{case[0]}: {case[1]}"]
    print("| what | case | repetitions | result |\n|---|---|---|---|")
    for question, case, trial in chosen:
        began = time.monotonic()
        # A case of its own stream: alone or among others it gives the same numbers.
        name = zlib.crc32(f"{question}: {case}".encode())
        results = np.array(
            [
                trial(np.random.default_rng([options.seed, name, repetition]))
                for repetition in range(options.repetitions)
            ],
            float,
        )
        scale, digits = (1, 2) if question == VALUES else (100, 1)
        rows = scale * results.reshape(len(results), -1)
        errors = 1.96 * rows.std(0) / np.sqrt(len(rows))
        words = ", ".join(f"{mean:.{digits}f} ± {error:.{digits}f}" for mean, error in zip(rows.mean(0), errors))
        print(f"| {question} | {case} | {options.repetitions} | {words} |", flush=True)
        print(f"{time.monotonic() - began:6.1f} s  {case}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
