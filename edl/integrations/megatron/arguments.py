"""Command-line arguments of the objectives for Megatron-LM's parser."""

import argparse
from typing import Any

from edl.objectives import objectives_from_file


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the arguments `--expert-divergence-…` and `--objectives`; pass it to Megatron-LM as `extra_args_provider`.

    Args:
        parser (ArgumentParser): Megatron-LM's.

    Returns:
        The parser.
    """
    group = parser.add_argument_group(title="expert divergence")
    group.add_argument(
        *("--expert-divergence-coeff", "--expert-divergence-coefficient"),
        type=float,
        default=0.0,
        help="Weight of the Expert Divergence loss of each MoE layer; 0 (default) leaves the routers as they are.",
    )
    group.add_argument(
        "--expert-divergence-num-domains",
        type=int,
        default=None,
        help="Number of domains; with labels from the blend, the number of data paths.",
    )
    group.add_argument(
        "--expert-divergence-eps", type=float, default=1e-6, help="eps in -log(divergence + eps); default 1e-6."
    )
    group.add_argument(
        "--expert-divergence-bias-correction",
        action="store_true",
        help="Take the gradient of the divergence less what noise between the sequences of a domain contributes.",
    )
    group.add_argument(
        "--expert-divergence-accumulate",
        action="store_true",
        help="Compare the domains over all micro-batches of a step so far, not within each micro-batch; so for all of "
        "the objectives of a file.",
    )
    group.add_argument(
        "--objectives",
        metavar="FILE.json",
        default=None,
        help="Objectives of the routing with their weights and options, in place of the Expert Divergence loss alone.",
    )
    return parser


def options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments as those of `patch_spec`: `patch_spec(spec, **options(args))`.

    Args:
        args (Namespace): parsed by a parser that `add_arguments` has seen.

    Returns:
        num_domains, coeff, eps, bias_correction and accumulate; with `--objectives` the objectives of the file,
        accumulate, and the steps that Megatron-LM restored (`args.iteration`).

    Raises:
        OSError: no such file.
        ValueError: a file of another form, `edl.objectives.objectives_from_file`; or options of the loss beside it.
    """
    names = ("num_domains", "coeff", "eps", "bias_correction")
    short = {name: getattr(args, f"expert_divergence_{name}") for name in names}
    accumulate = args.expert_divergence_accumulate
    if args.objectives is None:
        return {**short, "accumulate": accumulate}
    refuse_both_forms("megatron.options", **short)
    return {
        "objectives": objectives_from_file(args.objectives),
        "accumulate": accumulate,
        "steps_taken": lambda: getattr(args, "iteration", 0),
    }


def refuse_both_forms(op: str, num_domains: Any, coeff: Any, eps: Any, bias_correction: Any) -> None:
    """Raises where an option of the Expert Divergence loss alone comes beside objectives."""
    given = {
        "num_domains": num_domains is not None,
        "coeff": coeff not in (None, 0.0),
        "eps": eps != 1e-6,
        "bias_correction": bias_correction is not False,
    }
    both = [name for name, is_given in given.items() if is_given]
    if both:
        raise ValueError(
            f"edl::{op}: objectives, --objectives, must have their options with them, without those of the Expert "
            f"Divergence loss alone (got {both[0]} too)"
        )
