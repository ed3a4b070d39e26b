"""Findings as long tables, a row for each layer, domain, pair and cell."""

import csv
import io
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from edl.diagnostics import measures
from edl.diagnostics.exports.load import check_findings, load_measures, loads
from edl.diagnostics.extras import require
from edl.diagnostics.files import write_whole
from edl.diagnostics.findings import Comparison, Findings


def write_csv(findings: Findings, folder: str | os.PathLike[str]) -> None:
    """Writes `layers.csv`, `domains.csv`, `pairs.csv` and `cells.csv`; each is whole or as before.

    Domains have a row per layer, pairs a row per layer and two domains, cells one per layer, domain and expert. What is
    not known is empty. Divergences and entropies are in nats, specialisation is in bits.

    Args:
        findings (Findings): of a run.
        folder: where they are written; made where there is none.

    Raises:
        ImportError: no numpy.
        ValueError: no findings.
        OSError: they cannot be written.
    """
    check_findings("write_csv", findings)
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("layers", _layers), ("domains", _domains), ("pairs", _pairs), ("cells", _cells)):
        write_whole(folder / f"{name}.csv", _table(rows(findings)))


def _table(rows: Iterable[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    for number, row in enumerate(rows):
        if number == 0:
            table.writerow(row)
        table.writerow([_cell(value) for value in row.values()])
    return text.getvalue().encode("utf-8", "replace")  # half a surrogate pair in a name is no reason to stop


def _cell(value: Any) -> Any:
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else value


def _at(array: Any, *place: int) -> Any:
    """An element as a Python number; None where there is no array."""
    return None if array is None else array[place].item()


def _array(values: Any) -> Any:
    return None if values is None else require("numpy", "write_csv").asarray(values)


def _compared(comparison: Comparison | None, names: Sequence[str], prefix: str, *place: int) -> dict[str, Any]:
    """Values of a comparison at a place, by the names of its fields."""
    return {
        f"{prefix}_{name.removeprefix('layer_')}": _at(_array(getattr(comparison, name, None)), *place)
        for name in names
    }


def _standardised(findings: Findings) -> Comparison | None:
    return None if findings.beyond_token is None else findings.beyond_token.standardised


def _layers(findings: Findings) -> Iterator[dict[str, Any]]:
    np = require("numpy", "write_csv")
    decomposition, information = np.asarray(findings.decomposition), np.asarray(findings.information)
    names = ["layer_value", "layer_low", "layer_high", "layer_p"]
    for place, (layer, load) in enumerate(zip(findings.layers, loads(findings))):
        overlap = np.asarray(layer.document_overlap)
        yield {
            "layer": layer.facts.number,
            "name": layer.facts.name,
            "num_experts": layer.facts.num_experts,
            "top_k": layer.facts.top_k or None,
            "max_violation": _at(np.asarray(findings.load_violation), place),
            "dead_experts": len(findings.dead[place]),
            **load_measures(load),
            "information": _at(information, place),
            "entropy_of_mean": _at(decomposition, place, 0),
            "information_of_documents": _at(decomposition, place, 1),
            "between_documents": _at(decomposition, place, 2),
            "within_documents": _at(decomposition, place, 3),
            "document_overlap_within": _at(overlap, 0),
            "document_overlap_between": _at(overlap, 1),
            **_compared(findings.compared, names, "divergence", place),
            **_compared(_standardised(findings), names, "beyond_token", place),
        }


def _domains(findings: Findings) -> Iterator[dict[str, Any]]:
    np = require("numpy", "write_csv")
    coverage = np.asarray(findings.coverage)
    for place, layer in enumerate(findings.layers):
        for domain, name in enumerate(findings.domains):
            yield {
                "layer": layer.facts.number,
                "domain": name,
                "documents": _at(np.asarray(findings.documents), domain),
                "tokens": _at(np.asarray(findings.tokens), domain),
                "coverage_90": _at(coverage, place, domain),
                "token_entropy": _at(_array(layer.token_entropy), domain),
                "margin": _at(_array(layer.margin), domain),
                "document_entropy": _at(_array(layer.document_entropy), domain),
            }


def _pairs(findings: Findings) -> Iterator[dict[str, Any]]:
    np = require("numpy", "write_csv")
    names = ["plain", "corrected", "p"]
    beyond = findings.beyond_token
    for place, layer in enumerate(findings.layers):
        for pair, (one, other) in enumerate(zip(*np.triu_indices(len(findings.domains), 1))):
            yield {
                "layer": layer.facts.number,
                "domain": findings.domains[one],
                "other_domain": findings.domains[other],
                "divergence": _at(np.asarray(findings.divergence), place, pair),
                "overlap": _at(np.asarray(findings.overlap), place, pair),
                **_compared(findings.compared, names, "divergence_of_documents", place, pair),
                "composition": _at(_array(beyond and beyond.composition), place, pair),
                "same_token": _at(_array(beyond and beyond.same_token), place, pair),
                "covered": _at(_array(beyond and beyond.covered), pair),
                **_compared(_standardised(findings), names, "beyond_token", place, pair),
            }


def _cells(findings: Findings) -> Iterator[dict[str, Any]]:
    np = require("numpy", "write_csv")
    for layer in findings.layers:
        usage = np.asarray(layer.usage, dtype=np.float64)
        specialisation = measures.specialisation(usage).tolist()
        certain = None if layer.is_certain is None else np.asarray(layer.is_certain).tolist()
        for domain, name in enumerate(findings.domains):
            for expert, share in enumerate(usage[domain].tolist()):
                yield {
                    "layer": layer.facts.number,
                    "domain": name,
                    "expert": expert,
                    "share": share,
                    "specialisation": specialisation[domain][expert],
                    "is_certain": None if certain is None else certain[domain][expert],
                }
