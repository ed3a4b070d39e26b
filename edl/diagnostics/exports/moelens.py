"""Findings for the viewer MoELens: its `domain_specialization.json`."""

import json
import os
from typing import Any

from edl.diagnostics.exports.load import check_findings
from edl.diagnostics.exports.numbers import as_json
from edl.diagnostics.extras import require
from edl.diagnostics.files import write_whole
from edl.diagnostics.findings import Findings

# What MoELens adds to rates before it compares them, and how many experts it lists.
_ADDED = 1e-4
_MOST_SPECIALISTS = 12


def write_moelens(findings: Findings, path: str | os.PathLike[str]) -> None:
    """Writes `domain_specialization.json` of MoELens; the file is whole or as before.

    Domains without tokens are left out. Layers without experts are zeros and listed in `dense_layers`; those after the
    last one with experts are not known. `avg_prob` is null where the findings have no scores, which the viewer shows as
    0. Tokens come from the examples, if there are any, but not which expert read them: `expert_token_idx` is empty.

    Args:
        findings (Findings): of a run.
        path: of the file.

    Raises:
        ImportError: no numpy.
        ValueError: no findings, or layers that differ in experts or K, or whose K is not known: the format has one.
        OSError: it cannot be written.

    Source: github.com/Resource-Efficient-AI-Lab/MoELens.
    """
    check_findings("write_moelens", findings)
    np = require("numpy", "write_moelens")
    num_experts, top_k = _sizes(findings)
    numbers = [layer.facts.number for layer in findings.layers]
    num_layers = max(numbers) + 1
    tokens = np.asarray(findings.tokens)
    kept = [domain for domain in range(len(findings.domains)) if tokens[domain] > 0]
    shape = (len(kept), num_layers, num_experts)
    rates, scores = np.zeros(shape), np.zeros(shape)
    for layer in findings.layers:
        rates[:, layer.facts.number] = np.asarray(layer.usage)[kept] * top_k
        scores[:, layer.facts.number] = np.nan if layer.scores is None else np.asarray(layer.scores)[kept]
    present = ~np.isnan(rates)
    with np.errstate(invalid="ignore"):  # a layer without a choice
        mean = rates.sum(0, where=present) / present.sum(0)
    per_domain = {
        "token_counts": tokens[kept].astype(int),
        "prompt_counts": np.asarray(findings.documents)[kept].astype(int),
        "example_prompts": [_examples(findings, domain, "".join) for domain in kept],
        "activation_rate": rates,
        "avg_prob": scores,
        "specialization_score": np.log2((rates + _ADDED) / (mean + _ADDED)),
        "layer_divergence": np.abs(rates - mean).sum(2) / 2 / top_k,
        "domain_rate": -np.sort(-rates, axis=2)[:, :, :top_k].mean(2),
        "domain_tokens": [[token for text in _examples(findings, domain, list) for token in text] for domain in kept],
        "expert_token_idx": [[[[]] * num_experts] * num_layers] * len(kept),
        "expert_token_count": (rates * tokens[kept][:, None, None]).round(),
        "top_specialists": [_specialists(of_domain) for of_domain in rates],
    }
    names = [findings.domains[domain] for domain in kept]
    content = {
        "domains": names,
        "num_layers": num_layers,
        "num_experts": num_experts,
        "top_k_experts": top_k,
        **{name: dict(zip(names, as_json(values))) for name, values in per_domain.items()},
        "dense_layers": sorted(set(range(num_layers)) - set(numbers)),
    }
    write_whole(path, json.dumps(content, allow_nan=False).encode())


def _sizes(findings: Findings) -> tuple[int, int]:
    """E and K of all layers."""
    sizes = {(layer.facts.num_experts, layer.facts.top_k) for layer in findings.layers}
    if len(sizes) != 1 or 0 in min(sizes):
        raise ValueError(
            "edl::write_moelens: layers must be alike in their experts and K, and K must be known (got E and K "
            f"{sorted(sizes)[:8]})"
        )
    return sizes.pop()


def _examples(findings: Findings, domain: int, form: Any) -> list[Any]:
    return [form(example.tokens) for example in findings.examples if example.domain == domain]


def _specialists(rates: Any) -> list[dict[str, Any]]:
    """The experts of all layers [num_layers, E] that a domain uses most."""
    np = require("numpy", "write_moelens")
    order = np.argsort(-np.nan_to_num(rates), axis=None, kind="stable")[:_MOST_SPECIALISTS]
    places = [np.unravel_index(place, rates.shape) for place in order]
    return [
        {"layer": int(layer), "expert": int(expert), "activation_rate": float(rates[layer, expert])}
        for layer, expert in places
    ]
