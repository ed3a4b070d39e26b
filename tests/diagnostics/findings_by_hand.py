"""Findings that were made up, of layers that differ, an absent domain and a dead expert."""

import dataclasses

import numpy as np

from edl.diagnostics import measures
from edl.diagnostics.findings import BeyondToken, Comparison, Course, Estimate, Example, Findings, LayerFindings
from edl.diagnostics.layers import LayerFacts

DOMAINS = ("code", 'news, "today"', "=empty|\n", "prose")
TOKENS = np.array([1000, 3000, 0, 500])
FACTS = (LayerFacts(1, "model.layers.1.gate", 4, 2), LayerFacts(3, "", 6, 2))
PAIRS = 6


def layer(facts, generator):
    counts = generator.integers(1, 50, (len(DOMAINS), facts.num_experts)).astype(np.float64)
    counts[:, 1] = 0  # a dead expert
    counts[2] = 0  # an absent domain
    usage = measures.shares(counts).numpy()
    return LayerFindings(
        facts=facts,
        usage=usage,
        is_certain=usage > 0.3,
        coactivation=generator.integers(0, 9, (facts.num_experts,) * 2),
        token_entropy=np.array([0.5, 0.7, np.nan, 0.9]),
        margin=np.full(len(DOMAINS), np.nan),
        document_entropy=np.array([0.4, 0.6, np.nan, 0.8]),
        document_overlap=np.array([0.7, 0.5]),
        top_tokens=[[(5, 12, 3.5)], *[[] for _ in range(facts.num_experts - 1)]],
        scores=usage / 2,
    )


def comparison(generator):
    per_layer, per_pair = (len(FACTS),), (len(FACTS), PAIRS)
    plain = generator.random(per_pair)
    plain[:, 1] = np.nan
    return Comparison(
        whole=Estimate(0.02, 0.01, 0.03, 0.001),
        layer_value=generator.random(per_layer),
        layer_low=np.array([0.1, np.nan]),
        layer_high=generator.random(per_layer),
        layer_p=np.array([0.002, 0.4]),
        plain=plain,
        corrected=plain - 0.01,
        p=generator.random(per_pair),
    )


def findings(seed=0, **changes):
    """Findings of two layers and four domains."""
    generator = np.random.default_rng(seed)
    layers = [layer(facts, generator) for facts in FACTS]
    usages = [each.usage for each in layers]
    loads = [np.nansum(TOKENS[:, None] * usage, axis=0) for usage in usages]
    overlaps = [measures.overlap(usage).numpy()[np.triu_indices(len(DOMAINS), 1)] for usage in usages]
    whole = Findings(
        title="a run",
        facts={"model": "made up", "tokens": "4500"},
        domains=DOMAINS,
        documents=np.array([40, 50, 0, 3]),
        tokens=TOKENS,
        layers=layers,
        load_violation=np.array([load.max() / load.mean() - 1 for load in loads]),
        dead=[[1], [1]],
        coverage=np.stack([measures.coverage(usage).numpy() for usage in usages]),
        overlap=np.stack(overlaps),
        information=np.array([0.1, 0.2]),
        decomposition=generator.random((len(FACTS), 4)),
        divergence=generator.random((len(FACTS), PAIRS)),
        compared=comparison(generator),
        beyond_token=BeyondToken(
            comparison(generator), *(generator.random((len(FACTS), PAIRS)) for _ in range(2)), generator.random(PAIRS)
        ),
        token_texts={5: "<b>"},
        examples=[Example(0, ["a", " b"], np.zeros((len(FACTS), 2), dtype=np.int64))],
        course=Course(np.array([10, 20]), *(generator.random((2, len(FACTS))) for _ in range(4))),
        notes=["One domain has 3 documents: it was not tested."],
    )
    return dataclasses.replace(whole, **changes)


def without_record(seed=0):
    """What statistics alone give."""
    given = findings(seed)
    nothing = np.full(len(DOMAINS), np.nan)
    bare = [
        dataclasses.replace(
            each,
            is_certain=None,
            coactivation=None,
            document_entropy=nothing,
            document_overlap=np.full(2, np.nan),
            top_tokens=[],
            scores=None,
        )
        for each in given.layers
    ]
    unknown = np.full((len(FACTS), 4), np.nan)
    return dataclasses.replace(
        given, layers=bare, decomposition=unknown, compared=None, beyond_token=None, examples=(), course=None
    )
