"""What is known of a routing once statistics and record were looked at: what a page shows, as arrays.

P is the number of pairs of domains, in the order of `numpy.triu_indices(D, 1)`. Divergences are in nats. NaN stands for
what is not known. "Corrected" values are without the bias of small samples, and may be negative.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from edl.diagnostics.layers import LayerFacts


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number and how sure it is.

    Attributes:
        value (float): corrected.
        low (float): of the 95 % interval; NaN without one.
        high (float): of the 95 % interval; where the test does not reject, the bound below which the value is.
        p (float): of the test that there is no difference; NaN where there were too few documents for one.
    """

    value: float
    low: float
    high: float
    p: float


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """Differences of domains in the choices of experts, for all layers and pairs.

    Attributes:
        whole (Estimate): the mean over layers and pairs, with one test for the model.
        layer_value (array[L]): corrected, the mean over pairs.
        layer_low, layer_high (array[L]): of their intervals.
        layer_p (array[L]): adjusted for the number of layers.
        plain (array[L, P]): as the sample has it.
        corrected (array[L, P]): without its bias.
        p (array[L, P]): adjusted for the number of layers and pairs.
    """

    whole: Estimate
    layer_value: Any
    layer_low: Any
    layer_high: Any
    layer_p: Any
    plain: Any
    corrected: Any
    p: Any


@dataclasses.dataclass(frozen=True, eq=False)
class BeyondToken:
    """What of the differences is left at equal tokens.

    Attributes:
        standardised (Comparison): of the routings standardised to equal tokens.
        composition (array[L, P]): divergence that a router would show which sees the token alone, corrected.
        same_token (array[L, P]): mean divergence of the routings of one and the same token id, corrected.
        covered (array[P]): share of the two domains' tokens that the control covers, from 0 to 1.
    """

    standardised: Comparison
    composition: Any
    same_token: Any
    covered: Any


@dataclasses.dataclass(frozen=True, eq=False)
class LayerFindings:
    """What one layer does.

    Attributes:
        facts (LayerFacts): which.
        usage (array[D, E]): share of a domain's choices that fall on each expert; rows add up to 1, or are NaN.
        is_certain (array[D, E]): bool, whether the expert's use by the domain differs from the other domains' by more
            than chance (adjusted within the layer); None without a record.
        coactivation (array[E, E]): how often two experts were chosen by one token, choices on the diagonal; None where
            it is not known.
        token_entropy (array[D]): mean entropy of a token's scores, nats; NaN where it is not known.
        margin (array[D]): mean distance of the K-th score to the next, as shares of 1; NaN where it is not known.
        document_entropy (array[D]): mean entropy of a document's choices, nats; NaN without a record.
        document_overlap (array[2]): mean share of choices that two documents have in common, of one domain and of two;
            NaN without a record.
        top_tokens (sequence of sequences): for each expert, (token id, its choices by this token, lift over the
            layer's mean) of the tokens that it reads most for their number; empty without a record.
        scores (array[D, E], optional): mean of a token's score of each expert, chosen or not; None where it is not
            known.
    """

    facts: LayerFacts
    usage: Any
    is_certain: Any
    coactivation: Any
    token_entropy: Any
    margin: Any
    document_entropy: Any
    document_overlap: Any
    top_tokens: Sequence[Sequence[tuple[int, int, float]]]
    scores: Any = None


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """The beginning of a sampled document.

    Attributes:
        domain (int): its label.
        tokens (sequence of str): texts of tokens.
        experts (array[L, tokens]): the first choice of each.
    """

    domain: int
    tokens: Sequence[str]
    experts: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Course:
    """Measures over the snapshots of a training.

    Attributes:
        steps (array[M]): of the snapshots.
        information (array[M, L]): mutual information of expert and domain, nats.
        max_violation (array[M, L]): (busiest expert - mean) / mean.
        dead (array[M, L]): number of experts without a choice.
        token_entropy (array[M, L]): nats.
    """

    steps: Any
    information: Any
    max_violation: Any
    dead: Any
    token_entropy: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Interventions:
    """What a model loses when experts are silent or swapped: rises of the cross entropy, nats per token.

    Rises are rows (mean, low, high) with a 95 % interval over documents; NaN where there were too few.

    Attributes:
        tokens (array[D]): that were predicted.
        documents (array[D]): that they are of.
        loss (array[D]): of the model as it is.
        own (array[D, 3]): rise on a domain's text while a quarter of every layer's experts is silent, its favourites.
        others (array[D, 3]): rise on the other domains' text meanwhile.
        random (array[D, 3]): rise on a domain's text while as many random experts are silent, the control.
        permuted (array[L, 3]): rise on all text while the choices of one layer mean other experts.
    """

    tokens: Any
    documents: Any
    loss: Any
    own: Any
    others: Any
    random: Any
    permuted: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Findings:
    """All of a run.

    Attributes:
        title (str): of the run, its folder's name unless given.
        facts (mapping of str to str): model, text, sample, versions, for people to read.
        domains (sequence of str): names, D.
        documents (array[D]): sampled ones; 0 without a record.
        tokens (array[D]): that were counted.
        layers (sequence of LayerFindings): L.
        load_violation (array[L]): MaxVio, (busiest expert - mean) / mean.
        dead (sequence of sequences of int): experts of each layer that nobody chose.
        coverage (array[L, D]): how few experts hold 90 % of a domain's choices.
        overlap (array[L, P]): shared choices of two domains, the sum over experts of the smaller share, 0 to 1.
        information (array[L]): mutual information of expert and domain, domains weighing alike, corrected where there
            is a record; nats.
        decomposition (array[L, 4]): H(mean routing), I(E;D), mean entropy of the domains' routings less that of a
            document's, mean entropy of a document's; nats. NaN without a record.
        divergence (array[L, P]): plain Jensen-Shannon divergence of the choices of all counted tokens.
        compared (Comparison, optional): of the record's documents.
        beyond_token (BeyondToken, optional): of the record's tokens.
        token_texts (mapping of int to str): of the tokens in `top_tokens`.
        examples (sequence of Example): only where they were asked for.
        course (Course, optional): where there are snapshots.
        interventions (Interventions, optional): where they were asked for.
        notes (sequence of str): sentences that a reader must know: what was left out, what could not be tested.
    """

    title: str
    facts: Mapping[str, str]
    domains: Sequence[str]
    documents: Any
    tokens: Any
    layers: Sequence[LayerFindings]
    load_violation: Any
    dead: Sequence[Sequence[int]]
    coverage: Any
    overlap: Any
    information: Any
    decomposition: Any
    divergence: Any
    compared: Comparison | None = None
    beyond_token: BeyondToken | None = None
    token_texts: Mapping[int, str] = dataclasses.field(default_factory=dict)
    examples: Sequence[Example] = ()
    course: Course | None = None
    interventions: Interventions | None = None
    notes: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Change:
    """What differs between two runs on the same documents, the later one less the earlier one.

    Attributes:
        earlier, later (str): titles.
        paired (int): documents that are in both.
        information (Estimate): of I(E;D), mean over layers.
        standardised (Estimate): of the standardised divergence, mean over layers and pairs.
        layers (sequence of int): numbers of the layers that both have, L.
        layer_information (array[L]): difference of I(E;D).
        layer_saturation (array[L]): share of a token's choices in the earlier run that the later one makes too, mean
            over tokens; NaN where the tokens are others.
        note (str): what the comparison cannot say, "one seed each" where it is so.
    """

    earlier: str
    later: str
    paired: int
    information: Estimate
    standardised: Estimate
    layers: Sequence[int]
    layer_information: Any
    layer_saturation: Any
    note: str
