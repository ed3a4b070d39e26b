"""What a run answers, in sentences that say no more than was tested."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from edl.diagnostics.extras import require
from edl.diagnostics.findings import Change, Comparison, Estimate, Findings
from edl.report import summaries, words

MOST_POSSIBLE = math.log(2)  # of a Jensen-Shannon divergence, nats


class Verdict(NamedTuple):
    """A question with its answer in a word.

    Attributes:
        question (str): short.
        answer (str): a word or two.
        tone (str): "raw" or "standardised" where there is a difference of that kind, else "open".
        detail (str): a phrase.
    """

    question: str
    answer: str
    tone: str
    detail: str


class Bar(NamedTuple):
    """A divergence as a bar.

    Attributes:
        label (str): what it is.
        meaning (str): in a line.
        text (str): its value as people read it.
        width (float): in percent of the widest; 0 where it is not known.
        low, high (float): ends of its interval in percent; NaN without one.
        kind (str): which colour.
    """

    label: str
    meaning: str
    text: str
    width: float
    low: float
    high: float
    kind: str


def verdicts(run: Findings) -> list[Verdict]:
    """Are the experts specialised, beyond chance, beyond the token?"""
    if len(run.domains) < 2:
        return [Verdict("Do domains differ?", "One domain", "open", "there is nothing to compare it with")]
    value = mean_divergence(run)
    share = words.percent(max(value, 0) / MOST_POSSIBLE) if words.is_known(value) else "Not known"
    size = Verdict("How far apart?", share, "raw", "of the most that domains can differ")
    beyond_token = None if run.beyond_token is None else run.beyond_token.standardised
    return [
        size,
        verdict("Beyond chance?", run.compared, "raw", "domains choose differently"),
        verdict("Beyond the token?", beyond_token, "standardised", "they do so at equal tokens"),
    ]


def verdict(question: str, comparison: Comparison | None, tone: str, meaning: str) -> Verdict:
    """The answer of one test."""
    if comparison is None:
        return Verdict(question, "Not tested", "open", "that needs a record, which edl observe writes")
    p = comparison.whole.p
    if not words.is_known(p):
        return Verdict(question, "Not tested", "open", "too few documents for a test")
    if words.rejects(p):
        return Verdict(question, "Yes", tone, f"{meaning}, {words.of_test(p)}")
    return Verdict(question, "Not found", "open", f"not distinguishable from chance, {words.of_test(p)}")


def mean_divergence(run: Findings) -> float:
    """Over layers and pairs, corrected where there is a record."""
    if run.compared is not None and words.is_known(run.compared.whole.value):
        return run.compared.whole.value
    return float(summaries.mean_of(summaries.divergence(run)))


def sentences(run: Findings, strongest: Sequence[Sequence[summaries.Cell]]) -> list[str]:
    """Three: whether domains differ, what is left at equal tokens, where it shows most.

    Args:
        run (Findings): which.
        strongest: the experts that set each domain apart.
    """
    if len(run.domains) < 2:
        only = words.name(run.domains[0]) if run.domains else "no text"
        return [f"The text has one domain only, {only}: its load and coverage are shown, and nothing can differ."]
    return [text for text in (difference(run), at_equal_tokens(run), where(run, strongest)) if text]


def difference(run: Findings) -> str:
    """How much domains differ in their experts."""
    domains, value = words.count(len(run.domains), "domain"), mean_divergence(run)
    if not words.is_known(value):
        return f"How much the {domains} differ in their choice of experts is not known."
    if run.compared is None:
        return (
            f"The choices of the {domains} diverge by {words.number(value)} nats on average; without a record of "
            "documents this was not tested, and small samples alone make it larger than 0."
        )
    whole = run.compared.whole
    if words.is_known(whole.p) and not words.rejects(whole.p):
        return f"Differences between the choices of the {domains} are {words.estimated(whole)}."
    nats = words.estimated(whole, with_test=False)
    return f"Averaged over layers and pairs, the choices of the {domains} diverge by {nats}."


def at_equal_tokens(run: Findings) -> str:
    """What is left once domains are compared on the same tokens."""
    if run.beyond_token is None:
        return "Whether experts know more than the current token needs a record with token ids."
    whole = run.beyond_token.standardised.whole
    covered = words.percent(float(summaries.mean_of(run.beyond_token.covered)))
    tokens = f"At equal tokens, which cover {covered} of the text,"
    if not words.is_known(whole.value):
        return "What is left of it at equal tokens is not known."
    if not words.is_known(whole.p):
        return f"{tokens} {words.estimated(whole)} are left."
    if not words.rejects(whole.p):
        return f"{tokens} the rest is {words.estimated(whole)}: the router may see no more than the current token."
    nats = words.estimated(whole, with_test=False)
    return (
        f"{tokens} {nats} are left: the text around a token decides too, be it the topic or only the tokens before it."
    )


def where(run: Findings, strongest: Sequence[Sequence[summaries.Cell]]) -> str:
    """The layer and the cell in which it shows most."""
    place = strongest_layer(run)
    if place is None:
        return ""
    text = f"Domains are furthest apart in layer {run.layers[place].facts.number}"
    cells = [cell for found in strongest for cell in found[:1]]
    if not cells:
        return f"{text}."
    cell = max(cells, key=lambda each: each.share * math.log2(each.ratio))
    return (
        f"{text}; the most distinctive choice is that of {words.name(run.domains[cell.domain])} in layer "
        f"{run.layers[cell.layer].facts.number}, where expert {cell.expert} takes {words.percent(cell.share)} of it, "
        f"{words.times(cell.ratio)} the mean over domains."
    )


def strongest_layer(run: Findings) -> int | None:
    """The place of the layer in which domains are furthest apart; None where nothing is known."""
    np = require("numpy", "page")
    values = summaries.mean_of(summaries.divergence(run), 1)
    return int(np.nanargmax(values)) if np.isfinite(values).any() else None


def bars(run: Findings, widest: float) -> list[Bar]:
    """The divergence, and what is left of it with the token controlled.

    Args:
        run (Findings): which.
        widest (float): what the widest bar on the page reaches, nats.
    """
    return [bar(label, meaning, value, kind, widest) for label, meaning, value, kind in parts_of(run)]


def parts_of(run: Findings) -> list[tuple[str, str, Any, str]]:
    """What bars are of: label, meaning, an Estimate or an array, kind."""
    if len(run.domains) < 2:
        return []
    whole = run.divergence if run.compared is None else run.compared.whole
    rows = [("All of it", "difference of the domains’ choices", whole, "raw")]
    if run.beyond_token is not None:
        token, rest = run.beyond_token.composition, run.beyond_token.standardised.whole
        rows.append(("Vocabulary", "what a router would show that sees the token alone", token, "token"))
        rows.append(("At equal tokens", "what the text around adds", rest, "standardised"))
    return rows


def reach(run: Findings) -> float:
    """How far the bars of a run reach, nats."""
    found = [0.0]
    for _, _, value, _ in parts_of(run):
        is_estimate = isinstance(value, Estimate)
        found += [value.value, value.high] if is_estimate else [float(summaries.mean_of(value))]
    return max(end for end in found if words.is_known(end))


def bar(label: str, meaning: str, value: Any, kind: str, widest: float) -> Bar:
    """A bar of an estimate, or of the mean of an array."""

    def percent(nats: float) -> float:
        return min(100.0, max(0.0, 100 * nats / widest)) if words.is_known(nats) else math.nan

    if not isinstance(value, Estimate):
        middle = float(summaries.mean_of(value))
        text = f"{words.number(middle)} nats" if words.is_known(middle) else words.UNKNOWN
        width = percent(middle) if words.is_known(middle) else 0.0
        return Bar(label, meaning, text, width, math.nan, math.nan, kind)
    is_chance = words.is_known(value.p) and not words.rejects(value.p)
    low, high = (math.nan, math.nan) if is_chance else (percent(value.low), percent(value.high))
    width = percent(value.value) if words.is_known(value.value) else 0.0
    return Bar(label, meaning, words.estimated(value), width, low, high, f"{kind} chance" if is_chance else kind)


def of_load(run: Findings) -> str:
    """Dead and overloaded experts."""
    np = require("numpy", "page")
    experts = sum(layer.facts.num_experts for layer in run.layers)
    dead, layers = sum(len(each) for each in run.dead), sum(bool(each) for each in run.dead)
    if dead:
        text = f"{dead:,} of {words.count(experts, 'expert')} {'was' if dead == 1 else 'were'} never chosen, in "
        text += f"{words.count(layers, 'layer')}"
    else:
        text = f"Every one of the {words.count(experts, 'expert')} was chosen"
    violation = np.asarray(run.load_violation, np.float64)
    if not np.isfinite(violation).any():
        return f"{text}; how evenly is not known."
    place = int(np.nanargmax(violation))
    busiest = summaries.load(run, run.layers[place])
    which = f"expert {int(np.nanargmax(busiest))} of " if np.isfinite(busiest).any() else ""
    return (
        f"{text}; the busiest is {which}layer {run.layers[place].facts.number}, with "
        f"{words.times(1 + violation[place])} an even share."
    )


def of_coverage(run: Findings) -> str:
    """How few experts hold a domain."""
    np = require("numpy", "page")
    sizes = np.array([layer.facts.num_experts for layer in run.layers])[:, None]
    coverage = np.asarray(run.coverage, np.float64)
    share = np.where(coverage > 0, coverage, np.nan) / sizes
    if not np.isfinite(share).any():
        return "How many experts a domain needs is not known."
    place, domain = np.unravel_index(int(np.nanargmin(share)), share.shape)
    average = words.percent(float(summaries.mean_of(share)))
    return (
        f"On average {average} of a layer’s experts hold 90\u00a0% of a domain’s choices; "
        f"{words.name(run.domains[domain])} needs the fewest, in layer {run.layers[place].facts.number}: "
        f"{int(coverage[place, domain])} of {sizes[place, 0]}."
    )


def of_silenced(run: Findings) -> str:
    """What domains lose without their favourite experts, against as many random ones."""
    np = require("numpy", "page")
    cost = run.interventions
    if cost is None:
        return ""
    own, random, others = (
        float(summaries.mean_of(np.asarray(rises)[:, 0])) for rises in (cost.own, cost.random, cost.others)
    )
    return (
        f"Without its favourite experts, a quarter of every layer, a domain's loss rises by {words.number(own)} nats "
        f"per token on average; without as many random ones by {words.number(random)}. The other domains lose "
        f"{words.number(others)} without a domain's favourites."
    )


def of_change(change: Change) -> list[tuple[str, str]]:
    """What differs from the earlier run: what it is, how much."""
    return [
        ("What an expert tells of the domain, I(E;D)", words.changed(change.information)),
        ("Divergence at equal tokens", words.changed(change.standardised)),
        ("Documents that both runs have seen", f"{change.paired:,}"),
    ]
