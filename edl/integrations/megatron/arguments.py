"""Command-line arguments of the loss for Megatron-LM's parser."""

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the arguments `--expert-divergence-…`; pass it to Megatron-LM as `extra_args_provider`.

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
        help="Compare the domains over all micro-batches of a step so far, not within each micro-batch.",
    )
    return parser


def options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments as those of `patch_spec`: `patch_spec(spec, **options(args))`.

    Args:
        args (Namespace): parsed by a parser that `add_arguments` has seen.

    Returns:
        num_domains, coeff, eps, bias_correction and accumulate.
    """
    names = ("num_domains", "coeff", "eps", "bias_correction", "accumulate")
    return {name: getattr(args, f"expert_divergence_{name}") for name in names}
