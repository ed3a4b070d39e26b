"""Findings as text within a page: JSON and typed arrays, compressed, in base64, which holds nothing that HTML reads."""

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from edl.diagnostics import measures
from edl.diagnostics.extras import require
from edl.diagnostics.findings import Change, Comparison, Findings
from edl.report import summaries, words

# Pages of more numbers than these hold them with 11 significant bits, which is three digits.
MOST_EXACT = 2**17
MOST_PARTNERS = 8
MOST_TOKENS = 8
# What the page's scripts only hand on.
_LAYER_ARRAYS = {
    "tokenEntropy": "token_entropy",
    "margin": "margin",
    "documentEntropy": "document_entropy",
    "documentOverlap": "document_overlap",
}


def pack(header: Mapping[str, Any], arrays: Mapping[str, Any]) -> str:
    """A header and arrays as text.

    The bytes are compressed (zlib): the header's length (uint32), the header (JSON, which also says each array's type,
    offset and length), and the arrays, little-endian; of those of two bytes first all low ones, then all high ones,
    which compresses better.
    """
    np = require("numpy", "page")
    parts, facts, offset = [], {}, 0
    for name, array in arrays.items():
        flat = np.ascontiguousarray(array).reshape(-1)
        facts[name] = [flat.dtype.str[1:], offset, len(flat)]
        raw = flat.astype(flat.dtype.newbyteorder("<"), copy=False).view(np.uint8)
        if flat.dtype.itemsize == 2:
            raw = raw.reshape(-1, 2).T.reshape(-1)
        parts.append(raw.tobytes())
        offset += raw.size
    text = json.dumps({**header, "arrays": facts}, allow_nan=False).encode()
    whole = len(text).to_bytes(4, "little") + text + b"".join(parts)
    return base64.b64encode(zlib.compress(whole, 9)).decode()


def clean(value: Any) -> Any:
    """A value as JSON has it: NaN is null, half a character a question mark."""
    if isinstance(value, Mapping):
        return {key: clean(each) for key, each in value.items()}
    if hasattr(value, "tolist"):
        return clean(value.tolist())
    if isinstance(value, str):
        return words.whole(value)
    if isinstance(value, Sequence):
        return [clean(each) for each in value]
    return None if isinstance(value, float) and not words.is_known(value) else value


def pack_run(run: Findings) -> str:
    """A run as text."""
    np = require("numpy", "page")
    layers = run.layers
    cells = sum(np.size(layer.usage) for layer in layers)
    real = np.float32 if cells <= MOST_EXACT else np.float16
    partners, together = zip(*[partners_of(layer.coactivation, layer.facts.num_experts) for layer in layers])
    arrays = {
        "usage": joined([layer.usage for layer in layers], real),
        "partners": joined(partners, np.uint16),
        "together": joined(together, real),
        "load": joined([summaries.load(run, layer) for layer in layers], real),
        "specialisation": joined([summaries.specialisation(layer.usage) for layer in layers], real),
        "coverage": np.asarray(run.coverage, np.float32),
        "information": np.asarray(run.information, np.float32),
        "decomposition": np.asarray(run.decomposition, np.float32),
        "loadViolation": np.asarray(run.load_violation, np.float32),
        "overlap": np.asarray(run.overlap, real),
        "divergence": np.asarray(run.divergence, real),
    }
    for name, of_layer in _LAYER_ARRAYS.items():
        arrays[name] = joined([getattr(layer, of_layer) for layer in layers], np.float32)
    if all(layer.is_certain is not None for layer in layers):
        certain = joined([layer.is_certain for layer in layers], np.bool_)
        arrays["certain"] = np.packbits(certain, bitorder="little")
    arrays |= compared_arrays(run, real) | token_arrays(run, real)
    header = {
        "title": run.title,
        "domains": run.domains,
        "documents": run.documents,
        "tokens": run.tokens,
        "layers": [
            {"number": layer.facts.number, "experts": layer.facts.num_experts, "topK": layer.facts.top_k, "dead": dead}
            for layer, dead in zip(layers, run.dead)
        ],
        "tree": summaries.tree(run),
        "tokenTexts": {number: words.token(text) for number, text in run.token_texts.items()},
        "examples": [{"domain": each.domain, "tokens": each.tokens, "experts": each.experts} for each in run.examples],
        "course": None
        if run.course is None
        else {
            "steps": run.course.steps,
            "information": run.course.information,
            "maxViolation": run.course.max_violation,
            "dead": run.course.dead,
            "tokenEntropy": run.course.token_entropy,
        },
    }
    return pack(clean(header), arrays)


def joined(arrays: Sequence[Any], kind: Any) -> Any:
    """Arrays one after the other."""
    np = require("numpy", "page")
    return np.concatenate([np.asarray(array).reshape(-1) for array in arrays]).astype(kind)


def partners_of(coactivation: Any, experts: int) -> tuple[Any, Any]:
    """The strongest partners of each expert, and how many times more often they are chosen together than their loads
    say, [E, 8]; NaN where there is none."""
    np = require("numpy", "page")
    shape = (experts, MOST_PARTNERS)
    partners, lifts = np.zeros(shape, np.uint16), np.full(shape, np.nan)
    if coactivation is None or not np.isfinite(coactivation).all():
        return partners, lifts
    best, found = (each.numpy() for each in measures.partners(coactivation, MOST_PARTNERS))
    partners[:, : best.shape[1]] = best.clip(0)
    lifts[:, : best.shape[1]] = found
    return partners, lifts


def compared_arrays(run: Findings, real: Any) -> dict[str, Any]:
    """What the tests of a run say."""
    np = require("numpy", "page")
    found: dict[str, Any] = {}
    for name, comparison in comparisons(run).items():
        found |= {
            f"{name}Corrected": np.asarray(comparison.corrected, real),
            f"{name}P": np.asarray(comparison.p, real),
        }
        for part in ("value", "low", "high", "p"):
            found[f"{name}Layer{part.title()}"] = np.asarray(getattr(comparison, f"layer_{part}"), np.float32)
    if run.beyond_token is not None:
        found["composition"] = np.asarray(run.beyond_token.composition, real)
        found["sameToken"] = np.asarray(run.beyond_token.same_token, real)
        found["covered"] = np.asarray(run.beyond_token.covered, np.float32)
    return found


def comparisons(run: Findings) -> dict[str, Comparison]:
    """The comparisons that a run has, by name."""
    found = {} if run.compared is None else {"raw": run.compared}
    return found if run.beyond_token is None else {**found, "standardised": run.beyond_token.standardised}


def token_arrays(run: Findings, real: Any) -> dict[str, Any]:
    """The tokens that experts read, one after the other; how many each expert has."""
    np = require("numpy", "page")
    rows = [row[:MOST_TOKENS] for layer in run.layers if len(layer.top_tokens) for row in layer.top_tokens]
    numbers = [
        len(row[:MOST_TOKENS]) for layer in run.layers for row in (layer.top_tokens or [()] * layer.facts.num_experts)
    ]
    tokens = [token for row in rows for token in row]
    columns = list(zip(*tokens)) or [(), (), ()]
    return {
        "tokenNumbers": np.asarray(numbers, np.uint8),
        "tokenIds": np.asarray(columns[0], np.uint32),
        "tokenChoices": np.asarray(columns[1], np.uint32),
        "tokenLifts": np.asarray(columns[2], real),
    }


def pack_changes(changes: Sequence[Change]) -> str:
    """Differences between runs as text."""
    return pack(
        {
            "changes": [
                clean(
                    {
                        "earlier": change.earlier,
                        "later": change.later,
                        "layers": list(change.layers),
                        "information": change.layer_information,
                        "saturation": change.layer_saturation,
                    }
                )
                for change in changes
            ]
        },
        {},
    )
