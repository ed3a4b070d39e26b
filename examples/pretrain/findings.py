"""Sentences about a run, made from its numbers: what was seen, not what was hoped."""

import math

from table import SMALLEST_RISE, mean, off_diagonal, pairs

# Three seeds of every arm, at the default sizes and on Debian's packages, lay within 0.03 bits per byte of each other.
NOISE_BITS = 0.05
# Relative differences of divergences and ratios below this are called "about the same".
ALIKE = 0.15
# Divergences below this, in nats, are no specialisation to speak of, however large they are beside each other.
SMALLEST_DIVERGENCE = 0.005


def write(results, names):
    """Writes the findings.

    Arguments:
        results: list of Result, one per arm of train.ARMS.
        names: list of D names of domains.

    Returns:
        List of paragraphs.
    """
    broken = [result.arm.title for result in results if not math.isfinite(_bits(result))]
    if broken:
        return [f"The training of {join(broken)} broke down: the loss is not a number. A lower learning rate may help."]
    by_key = {result.arm.key: result for result in results}
    writers = (_language_model, _divergence, _hard_pair, _same_byte, _knock_out, _balance, _cost)
    return [paragraph for writer in writers if (paragraph := writer(by_key, names))]


def _bits(result):
    """Returns the held-out bits per byte, mean over domains."""
    return result.measures.bits_per_byte.mean().item()


def _mean_divergence(result):
    """Returns the divergence between domains, mean over pairs and layers."""
    return mean([value for layer in result.measures.divergence for value in off_diagonal(layer)])


def _language_model(by_key, names):
    """Compares the arms' language models with the baseline's."""
    baseline = _bits(by_key["baseline"])
    worse, better, same = [], [], []
    for key, result in by_key.items():
        difference = _bits(result) - baseline
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


def _divergence(by_key, names):
    """Says how far the domains' routing came apart, and how much of that random labels did as well."""
    level = {key: _mean_divergence(result) for key, result in by_key.items()}
    base = level["baseline"]
    text = [
        (
            f"The mean divergence between the domains' routing was {base:.3f} nats in the baseline, "
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


def _hard_pair(by_key, names):
    """Speaks of the pair of domains that the baseline routes most alike; other pairs may be told apart by one byte."""
    if len(names) < 3:
        return ""
    j, k = _closest_pair(by_key["baseline"])
    values = {key: result.measures.divergence.mean(dim=0)[j, k].item() for key, result in by_key.items()}
    return (
        f"The hard pair is {names[j]} and {names[k]}, which the baseline routes most alike: {values['baseline']:.3f} "
        f"there, {values['divergence']:.3f} with expert divergence against {values['random']:.3f} with random labels, "
        f"{values['corrected']:.3f} against {values['corrected_random']:.3f} with the correction."
    )


def _closest_pair(result):
    """Returns the two domains with the smallest divergence, mean over layers."""
    over_layers = result.measures.divergence.mean(dim=0)
    return min(pairs(len(over_layers)), key=lambda pair: over_layers[pair].item())


def _same_byte(by_key, names):
    """Says how much of the divergence remains when the byte is the same."""
    level = {
        key: mean([value for layer in result.measures.same_byte for value in off_diagonal(layer)])
        for key, result in by_key.items()
    }
    if any(math.isnan(value) for value in level.values()):
        return "The domains share too few bytes to compare the routing of the same byte."
    text = (
        f"Between tokens that are the same byte the mean divergence was {level['baseline']:.3f} in the baseline, "
        f"{level['divergence']:.3f} with expert divergence and {level['random']:.3f} with random labels; with the "
        f"correction {level['corrected']:.3f} and {level['corrected_random']:.3f}."
    )
    part = level["divergence"] / _mean_divergence(by_key["divergence"])
    return text + (
        f" With expert divergence that is {100 * part:.0f} % of the divergence over all bytes, and can only come from "
        "the text around the byte."
    )


def _knock_out(by_key, names):
    """Says whom it hurts when a domain's favourite experts are gone."""
    ratio = {
        key: result.measures.knock_out_ratio
        for key, result in by_key.items()
        if result.measures.rise_others.mean() >= SMALLEST_RISE
    }
    if "baseline" not in ratio or "divergence" not in ratio:
        return "Switching off a domain's favourite experts hardly touched the others, so there is no ratio to compare."
    text = [
        "Switching off the quarter of the experts that a domain favours cost its own text "
        f"{ratio['baseline']:.1f} times as much as the others' in the baseline, {ratio['divergence']:.1f} times with "
        "expert divergence" + (f" and {ratio['random']:.1f} times with random labels." if "random" in ratio else ".")
    ]
    corrected = [
        f"{ratio[key]:.1f} with {kind} labels"
        for key, kind in (("corrected", "true"), ("corrected_random", "random"))
        if key in ratio
    ]
    if corrected:
        text.append(f"With the correction: {join(corrected)}.")
    if "random" in ratio:
        if ratio["divergence"] > (1 + ALIKE) * ratio["random"]:
            text.append("By this measure true labels made the experts more specialised than random ones did.")
        elif ratio["divergence"] < (1 - ALIKE) * ratio["random"]:
            text.append("By this measure random labels made the experts more specialised than true ones did.")
        else:
            text.append("By this measure true and random labels did about the same.")
    return " ".join([*text, _knock_out_of_hard_pair(by_key, names)]).strip()


def _knock_out_of_hard_pair(by_key, names):
    """Gives the ratio for the hard pair alone: a domain that is easy to tell apart can make most of the whole ratio."""
    if len(names) < 3:
        return ""
    pair = list(_closest_pair(by_key["baseline"]))
    ratio = {
        key: (result.measures.rise_own[pair].sum() / result.measures.rise_others[pair].sum()).item()
        for key, result in by_key.items()
        if result.measures.rise_others[pair].min() >= SMALLEST_RISE
    }
    if len(ratio) < len(by_key):
        return ""
    return (
        f"For {join([names[place] for place in pair])} alone it was {ratio['baseline']:.1f} in the baseline, "
        f"{ratio['divergence']:.1f} with expert divergence, {ratio['random']:.1f} with random labels, and "
        f"{ratio['corrected']:.1f} and {ratio['corrected_random']:.1f} with the correction."
    )


def _balance(by_key, names):
    """Names the busiest experts."""
    load = {key: result.measures.load.max().item() for key, result in by_key.items()}
    heaviest = max(load, key=load.get)
    return (
        f"The busiest expert carried {load['baseline']:.2f} times the mean load in the baseline's worst layer and "
        f"{load['divergence']:.2f} times with expert divergence; the highest of all arms was {load[heaviest]:.2f} "
        f"({by_key[heaviest].arm.title})."
    )


def _cost(by_key, names):
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
