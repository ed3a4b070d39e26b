"""Pre-trains a small byte-level Mixture-of-Experts model five times and compares what the experts learned.

    python examples/pretrain/train.py --output demo

All arms start from the same weights and see the same text in the same order; they differ in the loss alone. The trained
models are saved and observed as `edl observe` does, and `edl report`'s page shows them beside each other.
`--data` takes a folder whose sub-folders are domains of your own text; without it the text comes from Debian's
documentation packages, or from the Python environment where Debian's tools are not installed.
"""

import argparse
import copy
import math
import os
import pathlib
import statistics
import sys
import time
from typing import NamedTuple

import data
import held_out
import model as models
import observing
import openmp  # noqa: F401  (before torch)
import progress
import report
import text
import torch
import torch.nn.functional as F

import edl

WARM_UP_SHARE = 0.08
FINAL_LEARNING_RATE = 0.1  # share of the highest one


class Arm(NamedTuple):
    """One way to train: with or without expert divergence, on true or random labels, with or without the correction.

    Attributes:
        key: its name in files.
        title: its name for people.
        meaning: what it is, in words.
        compared_with: keys of the arms from which its changes are shown: the one without the loss, and the control.
        divergence: whether it trains on expert divergence.
        random_labels: whether labels are shuffled.
        bias_correction: whether the loss is corrected.
    """

    key: str
    title: str
    meaning: str
    compared_with: tuple = ("baseline",)
    divergence: bool = True
    random_labels: bool = False
    bias_correction: bool = False


ARMS = (
    Arm("baseline", "baseline", "no expert divergence, load balancing only.", (), divergence=False),
    Arm(
        "divergence",
        "expert divergence",
        "the loss of the paper, which pushes the routing of the domains apart.",
        ("baseline", "random"),
    ),
    Arm(
        "random",
        "random labels",
        "the same loss, but the labels are shuffled within each step; the control of the paper, which shows what the "
        "loss does without knowing the domains.",
        random_labels=True,
    ),
    Arm(
        "corrected",
        "bias-corrected",
        "expert divergence on true labels, without the part that mere variety between sequences would earn.",
        ("baseline", "corrected_random"),
        bias_correction=True,
    ),
    Arm(
        "corrected_random",
        "bias-corrected, random labels",
        "that, on shuffled labels.",
        random_labels=True,
        bias_correction=True,
    ),
)


class Result(NamedTuple):
    """What became of an arm.

    Attributes:
        arm: Arm.
        model: LanguageModel, trained.
        curves: name -> list of one value per step: `language_model` (bits per byte), `balance` (load balancing loss),
            `divergence` (expert divergence loss on the arm's own labels; watched, not trained on, in the baseline) and
            `domains` (mean Jensen-Shannon divergence between the true domains of the batch).
        bits_per_byte: name of a domain -> (bits per byte of its held-out text, standard error over documents).
        step_seconds: median time of a training step.
        loss_seconds: median time of the divergence loss in it, forward and backward; NaN where the arm has none.
    """

    arm: Arm
    model: models.LanguageModel
    curves: dict
    bits_per_byte: dict
    step_seconds: float
    loss_seconds: float

    @property
    def mean_bits(self):
        """Bits per byte, mean over domains."""
        return statistics.fmean(bits for bits, _ in self.bits_per_byte.values())


def main(arguments=None):
    """Runs the demo; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that lacks a character should show a question mark
    settings = parse(arguments)
    torch.set_num_threads(settings.threads)
    output = pathlib.Path(settings.output)
    try:
        report.check(output)
        domains = data.load(settings.data, settings.cache, settings.sequence_length)
        pieces = pieces_of(domains, settings.sequence_length)
        held_out.write(pieces, output / held_out.FOLDER)
        chosen = observing.sample(output / held_out.FOLDER, settings.sequence_length)
    except (data.DataError, ValueError) as error:
        return fail(f"{str(error).removesuffix('.')}.")
    except OSError as error:
        return fail(f"Cannot write to or read from {error.filename or output}: {error.strerror}.")
    start = time.perf_counter()
    results, sizes = compare(domains, pieces, settings)
    run = report.Run(domains, settings, results, sizes, time.perf_counter() - start)
    try:
        for result in results:
            models.save(result.model, output / "models" / result.arm.key)
        seen = observing.observe_all(results, chosen, output, settings.knock_out_tokens)
        run = run._replace(findings=seen[0], changes=seen[1], seconds=time.perf_counter() - start)
        report.write(run, output)
    except (OSError, ValueError) as error:
        print(report.as_text(run), flush=True)
        if isinstance(error, OSError):
            reason = f"cannot write {error.filename or output}: {error.strerror}"
        elif str(error).startswith("edl::"):  # an arm whose routing is no numbers
            reason = str(error)
        else:
            raise
        return fail(f"The table above is all there is: {reason}.")
    print(report.as_text(run), flush=True)
    print(f"Report: {text.printable(str(output / report.REPORT))}")
    return 0


def fail(sentence):
    """Says what went wrong; returns the exit code."""
    print(text.printable(sentence), file=sys.stderr)
    return 1


def parse(arguments):
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--data", default="", help="folder with a sub-folder of text per domain; or `debian`; or `python`"
    )
    parser.add_argument("--output", default="demo", help="folder for report.html, the models and all numbers")
    parser.add_argument("--cache", default="demo-text", help="folder for downloaded packages")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the data order and the random labels")
    parser.add_argument("--threads", type=_positive, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--steps", type=_positive, default=250, help="per arm")
    parser.add_argument("--batch-size", type=_positive, default=18, help="sequences per step")
    parser.add_argument("--sequence-length", type=_positive, default=256, help="bytes")
    parser.add_argument("--layers", type=_positive, default=2)
    parser.add_argument("--hidden-size", type=_positive, default=96)
    parser.add_argument("--intermediate-size", type=_positive, default=96, help="of an expert")
    parser.add_argument("--experts", type=_positive, default=8)
    parser.add_argument("--top-k", type=_positive, default=2, help="experts per token")
    parser.add_argument("--learning-rate", type=_weight, default=1e-2)
    parser.add_argument("--balance-weight", type=_weight, default=1e-2, help="alpha")
    parser.add_argument("--divergence-weight", type=_weight, default=1e-2, help="beta")
    parser.add_argument(
        "--knock-out-tokens", type=_positive, default=4096, help="of a domain, read without its experts"
    )
    settings = parser.parse_args(arguments)
    if settings.sequence_length < 2:
        parser.error("--sequence-length must be at least 2, or there is no byte to predict")
    if settings.top_k >= settings.experts:
        parser.error("--top-k must be smaller than --experts, or there is nothing to choose")
    if settings.hidden_size % 8:
        parser.error("--hidden-size must be a multiple of 8 (four heads with an even number of channels)")
    return settings


def _positive(word):
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1 (got {number})")
    return number


def _weight(word):
    number = float(word)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number of at least 0 (got {number})")
    return number


def pieces_of(domains, sequence_length):
    """Returns name of a domain -> pieces of each of its held-out documents: as many as `edl observe` wants."""
    wanted = held_out.size_of(sequence_length).documents(len(domains))
    return {domain.name: held_out.pieces_of(domain.held_out, sequence_length, wanted) for domain in domains}


def compare(domains, pieces, settings):
    """Trains every arm from the same start, and measures its bits per byte and what the loss costs.

    Arguments:
        domains: list of D data.Domain.
        pieces: what `pieces_of` has made of them.
        settings: parsed command line.

    Returns:
        (list of Result, dict of sizes for the report).
    """
    batches = data.Batches(domains, settings.steps, settings.batch_size, settings.sequence_length, settings.seed)
    torch.manual_seed(settings.seed)
    start = models.LanguageModel(
        models.ModelSettings(
            sequence_length=settings.sequence_length,
            layers=settings.layers,
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            experts=settings.experts,
            top_k=settings.top_k,
        )
    )
    results = []
    for place, arm in enumerate(ARMS, 1):
        model = copy.deepcopy(start)
        loss = edl.ExpertDivergenceLoss(len(domains), bias_correction=arm.bias_correction)
        curves, step_seconds = train(model, loss, arm, batches, settings, f"{place}/{len(ARMS)} {arm.title}")
        bits = {name: held_out.bits_per_byte(model, documents) for name, documents in pieces.items()}
        loss_seconds = time_loss(model, loss, batches) if arm.divergence else math.nan
        results.append(Result(arm, model, curves, bits, step_seconds, loss_seconds))
    sizes = {
        "parameters": sum(parameter.numel() for parameter in start.parameters()),
        "sequences per step": batches.labels.shape[1],
        "training bytes per arm": batches.labels.numel() * settings.sequence_length,
        "held-out pieces": sum(len(each) for documents in pieces.values() for each in documents),
    }
    return results, sizes


def train(model, divergence_loss, arm, batches, settings, title):
    """Trains a model for the fixed number of steps.

    Arguments:
        model: LanguageModel, changed in place.
        divergence_loss: edl.ExpertDivergenceLoss.
        arm: Arm.
        batches: data.Batches.
        settings: parsed command line.
        title: words in front of the progress bar.

    Returns:
        (curves as in Result, median seconds per step).
    """
    optimizer, schedule = optimizer_for(model, settings)
    curves = {"language_model": [], "balance": [], "divergence": [], "domains": []}
    seconds = []
    with progress.bar(range(len(batches)), desc=title, unit="step") as steps:
        for step in steps:
            labels = (batches.random_labels if arm.random_labels else batches.labels)[step]
            start = time.perf_counter()
            sequences = batches.sequences(step)
            logits, routings = model(sequences[:, :-1])
            language_model = F.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten())
            balance = edl.load_balancing_loss(routings)
            total = language_model + settings.balance_weight * balance
            with torch.set_grad_enabled(arm.divergence):
                divergence = divergence_loss([routing.logits for routing in routings], labels)
            if arm.divergence:
                total = total + settings.divergence_weight * divergence
            optimizer.zero_grad()
            total.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            seconds.append(time.perf_counter() - start)

            curves["language_model"].append(language_model.item() / math.log(2))
            curves["balance"].append(balance.item())
            curves["divergence"].append(divergence.item())
            curves["domains"].append(divergence_of_true_domains(routings, batches.labels[step], len(batches.domains)))
            steps.set_postfix(latest(curves), refresh=False)
    return curves, statistics.median(seconds)


def latest(curves):
    """Returns the newest values for the progress bar."""
    return {
        "bits/byte": f"{curves['language_model'][-1]:.2f}",
        "balance": f"{curves['balance'][-1]:.2f}",
        "divergence": f"{curves['domains'][-1]:.3f}",
    }


def optimizer_for(model, settings):
    """Returns AdamW and the schedule of its learning rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_at(step, settings.steps))


def learning_rate_at(step, steps):
    """Returns the share of the highest learning rate: a linear rise, then half a cosine down to a tenth."""
    rise = max(1, round(WARM_UP_SHARE * steps))
    if step < rise:
        return (step + 1) / rise
    done = (step - rise) / max(1, steps - rise)
    return FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * (1 + math.cos(math.pi * done)) / 2


@torch.no_grad()
def divergence_of_true_domains(routings, labels, num_domains):
    """Returns the mean divergence between the domains that a batch holds, over pairs and layers."""
    present = labels.unique()
    first, second = torch.triu_indices(len(present), len(present), offset=1)
    found = []
    for routing in routings:
        probabilities = routing.logits.softmax(dim=-1)
        of_tokens = labels.repeat_interleave(len(probabilities) // len(labels))
        sums, counts = edl.ops.aggregate_routing(probabilities, of_tokens, num_domains, "none")
        divergence = edl.ops.pairwise_divergence(sums.double(), counts.double())
        found.append(divergence[present[first], present[second]].mean())
    return torch.stack(found).mean().item()


def time_loss(model, divergence_loss, batches, repeats=31):
    """Times what the divergence loss adds to a step: its forward and backward pass down to the router logits.

    The rest of the step does not change with the loss. The difference of two whole steps would say the same with a
    hundred times the noise.

    Arguments:
        model: LanguageModel, whose logits on the first batch are taken.
        divergence_loss: edl.ExpertDivergenceLoss.
        batches: data.Batches.
        repeats: number of measurements.

    Returns:
        Median seconds.
    """
    with torch.no_grad():
        _, routings = model(batches.sequences(0)[:, :-1])
    leaves = [routing.logits.detach().clone().requires_grad_() for routing in routings]
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf)  # the gradient of the language model is there already, and is added to
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        divergence_loss(leaves, batches.labels[0]).backward()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
