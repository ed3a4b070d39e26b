"""The load of a layer's experts, and measures of it that the page does not show."""

from typing import Any

from edl.diagnostics import measures
from edl.diagnostics.extras import require
from edl.diagnostics.findings import Findings


def check_findings(op: str, findings: object) -> None:
    """Raises where an argument is none."""
    if not isinstance(findings, Findings):
        raise ValueError(f"edl::{op}: findings must be Findings (got {type(findings).__name__})")


def loads(findings: Findings) -> list[Any]:
    """The share of all choices that falls on each expert, array[E] for each layer; domains weigh as their tokens."""
    np = require("numpy", "exports")
    tokens = np.asarray(findings.tokens, dtype=np.float64)
    found = []
    for layer in findings.layers:
        usage = np.asarray(layer.usage, dtype=np.float64)
        present = ~np.isnan(usage).any(1)
        found.append(measures.shares(tokens[present] @ usage[present]).numpy())
    return found


def load_measures(load: Any) -> dict[str, float]:
    """Measures of a load [E] by name; NaN where nothing was chosen.

    `min_violation` and `mean_violation` are to the least used expert and to the mean of all what MaxVio is to the
    busiest: (load - mean) / mean, and its absolute value. `expert_diversity` is exp(H) / E.
    """
    np = require("numpy", "exports")
    relative = load / load.mean()
    return {
        "coefficient_of_variation": float(measures.coefficient_of_variation(load)),
        "min_violation": float(relative.min() - 1),
        "mean_violation": float(np.abs(relative - 1).mean()),
        "dead_expert_fraction": float(measures.dead_experts(load)) / len(load),
        "expert_diversity": float(measures.entropy(load).exp()) / len(load),
    }
