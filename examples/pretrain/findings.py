"""Sentences about the arms, made from their numbers: what was seen, not what was hoped."""

import math

from table import mean_rise, number

# Three seeds of every arm, at the default sizes and on Debian's packages, lay within 0.03 bits per byte of each other.
NOISE_BITS = 0.05
# Relative differences of divergences and ratios below this are called "about the same".
ALIKE = 0.15
# Divergences below this, in nats, are no specialisation to speak of, however large they are beside each other.
SMALLEST_DIVERGENCE = 0.005
# Below this rise, in bits per byte, a ratio of rises would be a ratio of noise.
SMALLEST_RISE = 0.005


def write(results, runs):
    """Writes the findings.

    Arguments:
        results: list of train.Result, one per arm of train.ARMS.
        runs: list of edl.diagnostics.findings.Findings, one per arm; empty where nothing could be observed.

    Returns:
        List of paragraphs.
    """
    broken = [result.arm.title for result in results if not math.isfinite(result.mean_bits)]
    if broken:
        return [f"The training of {join(broken)} broke down: the loss is not a number. A lower learning rate may help."]
    by_key = {result.arm.key: result for result in results}
    seen = {result.arm.key: run for result, run in zip(results, runs)}
    return [text for text in (_language_model(by_key), _control(seen), _knock_out(seen), _cost(by_key)) if text]


def _language_model(by_key):
    """Compares the arms' language models with the baseline's."""
    baseline = by_key["baseline"].mean_bits
    worse, better, same = [], [], []
    for key, result in by_key.items():
        difference = result.mean_bits - baseline
        if key != "baseline":
            words = f"{result.arm.title} ({_signed(difference)})"
            (same if abs(difference) < NOISE_BITS else worse if difference > 0 else better).append(words)
    sentences = [f"The baseline reached {baseline:.2f} bits per byte on held-out text, mean over domains."]
    if worse:
        sentences.append(f"Worse than it: {join(worse)}.")
    if better:
        sentences.append(f"Better than it: {join(better)}.")
    if same:
        sentences.append(f"Not told apart from it: {join(same)}.")
    sentences.append(
        f"Single runs of this size do not tell differences below {NOISE_BITS} bits per byte from the noise of the "
        "seed, and so short a training says nothing about the end of a long one."
    )
    return " ".join(sentences)


def _control(seen):
    """Says how far the domains' choices came apart, and how much of that random labels did as well."""
    level = {key: run.compared.whole.value for key, run in seen.items() if run.compared}
    if not level or not all(map(math.isfinite, level.values())):
        return ""
    base = level["baseline"]
    text = [
        (
            f"The divergence between the domains' choices was {base:.3f} nats in the baseline, "
            f"{level['divergence']:.3f} with expert divergence and {level['corrected']:.3f} with the bias correction."
        )
    ]
    for labels, control, kind in (
        ("divergence", "random", "plain"),
        ("corrected", "corrected_random", "bias-corrected"),
    ):
        rise, control_rise = level[labels] - base, level[control] - base
        if rise <= max(ALIKE * base, SMALLEST_DIVERGENCE):
            text.append(f"In this run the {kind} loss did not raise it clearly.")
        elif control_rise <= max(ALIKE * base, SMALLEST_DIVERGENCE):
            text.append(
                f"Random labels left it at {level[control]:.3f} under the {kind} loss: "
                "it takes true labels to raise it."
            )
        else:
            text.append(
                f"Random labels, which say nothing about the domain, brought it to {level[control]:.3f} under the "
                f"{kind} loss: {100 * control_rise / rise:.0f} % of the rise with true labels."
            )
    if level["random"] - base > 0.5 * (level["divergence"] - base) > SMALLEST_DIVERGENCE:
        text.append(
            "So a high divergence alone is no proof that the labels mattered: with few sequences per group the plain "
            "loss rewards any variety between sequences, and the domain is the largest source of it."
        )
    return " ".join(text)


def _knock_out(seen):
    """Says whom it hurts when a domain's favourite experts are silent, and random ones."""
    if not seen:
        return ""
    rises = {
        key: [mean_rise(getattr(run.interventions, name)) for name in ("own", "others", "random")]
        for key, run in seen.items()
    }
    text = "A quarter of each layer's experts silent, those that a domain favours, cost its own text "
    text += f"{_lost(rises['baseline'])} in the baseline and {_lost(rises['divergence'])} with expert divergence."
    ratio = {key: own / others for key, (own, others, _) in rises.items() if others >= SMALLEST_RISE}
    if not {"baseline", "divergence", "random"} <= ratio.keys():
        return f"{text} The others lost too little for ratios to be compared."
    text += (
        f" The ratio of own to others was {ratio['baseline']:.1f}, {ratio['divergence']:.1f} and, with random labels, "
        f"{ratio['random']:.1f}:"
    )
    if ratio["divergence"] > (1 + ALIKE) * ratio["random"]:
        return f"{text} by this measure true labels made the experts more specialised than random ones did."
    if ratio["divergence"] < (1 - ALIKE) * ratio["random"]:
        return f"{text} by this measure random labels made the experts more specialised than true ones did."
    return f"{text} by this measure true and random labels did about the same."


def _lost(rises):
    """Puts the rises on own text, on others', and with random experts into words."""
    own, others, control = (number(rise, 2, sign="+") for rise in rises)
    return f"{own} bits per byte, the others' {others} (random experts: {control})"


def _cost(by_key):
    """Says what the loss took of a step."""
    added = {key: result for key, result in by_key.items() if not math.isnan(result.loss_seconds)}
    most = max(added.values(), key=lambda result: result.loss_seconds / result.step_seconds)
    return (
        f"The divergence loss added {1e3 * most.loss_seconds:.2f} ms to a step of {1e3 * most.step_seconds:.0f} ms, or "
        f"{100 * most.loss_seconds / most.step_seconds:.2f} %, in the arm where its share was largest "
        f"({most.arm.title})."
    )


def _signed(difference):
    """Formats a difference; one that rounds to nothing has no sign."""
    return "±0.00" if abs(difference) < 0.005 else f"{difference:+.2f}"


def join(words):
    """Joins words as in a sentence."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
