"""Numbers and names as people read them."""

import math
from collections.abc import Sequence

from edl.diagnostics.findings import Estimate, Findings

# Tests are at this level.
CHANCE = 0.05
UNKNOWN = "not known"


def is_known(value: float) -> bool:
    """Whether a number is one."""
    return math.isfinite(value)


def number(value: float) -> str:
    """A number with about three digits, never with an exponent."""
    if not is_known(value):
        return "–"
    if abs(value) < 0.0995:
        return f"{value:.4f}".replace("-0.0000", "0.0000").replace("-", "−")
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}".replace("-", "−")


def percent(share: float) -> str:
    """A share of 1 as a percentage."""
    if not is_known(share):
        return "–"
    return f"{100 * share:.{0 if share >= 0.995 else 1 if share >= 0.00995 else 2}f}\u00a0%"


def times(ratio: float) -> str:
    """A ratio: 4.2×."""
    return f"{ratio:.1f}×" if is_known(ratio) else "–"


def count(value: int, one: str, more: str = "") -> str:
    """A number of things: "1 expert", "2 experts"."""
    return f"{value:,} {one if value == 1 else more or one + 's'}"


def whole(text: str) -> str:
    """A text that files can hold: half a character is a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


def name(text: str, most: int = 40) -> str:
    """A foreign name for a sentence: short, on one line, and whatever its direction, apart from what is around it."""
    text = " ".join(whole(text).split()) or "(no name)"
    return f"\u2068{text if len(text) <= most else text[: most - 1] + '…'}\u2069"


def token(text: str) -> str:
    """The text of a token with what is invisible made visible."""
    return text.replace(" ", "␣").replace("\n", "↵").replace("\t", "→").replace("\r", "←") or "(empty)"


def interval(low: float, high: float) -> str:
    """The two ends of an interval."""
    return f"{number(low)} to {number(high)}" if is_known(low) and is_known(high) else "–"


def risen(rise: Sequence[float]) -> str:
    """A rise with its interval: mean, low, high."""
    mean, low, high = rise
    return f"{number(mean)} ({interval(low, high)})" if is_known(low) else number(mean)


def rejects(p: float) -> bool:
    """Whether a test says that there is a difference."""
    return p <= CHANCE


def of_test(p: float) -> str:
    """The result of a test."""
    return f"p\u00a0=\u00a0{p:.{3 if p < 0.1 else 2}f}"


def upper(bound: float) -> str:
    """What something is below: nothing is below 0."""
    return number(max(bound, 0.0001))


def changed(difference: Estimate) -> str:
    """A difference of either sign, with its interval whether or not that holds 0."""
    if not is_known(difference.value):
        return UNKNOWN
    known = []
    if is_known(difference.low) and is_known(difference.high):
        known.append(f"95\u00a0% interval {interval(difference.low, difference.high)}")
    if not is_known(difference.p):
        known.append("not tested")
    elif not rejects(difference.p):
        known.append("not distinguishable from chance")
    return f"{number(difference.value)} nats" + (f" ({', '.join(known)})" if known else "")


def estimated(estimate: Estimate, with_test: bool = True) -> str:
    """An estimate with its interval, and with its test unless that stands elsewhere, within a sentence."""
    if not is_known(estimate.value):
        return UNKNOWN
    if is_known(estimate.p) and not rejects(estimate.p):
        bound = f", below {upper(estimate.high)} nats" if is_known(estimate.high) else ""
        return f"not distinguishable from chance{bound}"
    known = []
    if is_known(estimate.low) and is_known(estimate.high):
        known.append(f"95\u00a0% interval {interval(estimate.low, estimate.high)}")
    if with_test or not is_known(estimate.p):
        known.append(of_test(estimate.p) if is_known(estimate.p) else "not tested")
    return f"{number(estimate.value)} nats" + (f" ({', '.join(known)})" if known else "")


def sizes(run: Findings) -> str:
    """How many experts the layers have: "64", or "8 to 64"."""
    numbers = sorted({layer.facts.num_experts for layer in run.layers})
    return f"{numbers[0]:,}" if len(numbers) == 1 else f"{numbers[0]:,} to {numbers[-1]:,}"


def bits(number_of_domains: int) -> float:
    """The most that an expert can tell of the domain."""
    return math.log2(max(1, number_of_domains))
