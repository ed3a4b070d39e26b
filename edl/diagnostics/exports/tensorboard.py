"""Findings in TensorBoard, under the names by which other trainers log them."""

import math
from typing import Any

from edl.diagnostics.exports.load import check_findings, load_measures, loads
from edl.diagnostics.extras import require
from edl.diagnostics.findings import Estimate, Findings
from edl.ops import checks

# Pixels of a cell of a heat map, and the colours of its lowest and highest value.
_PIXELS = 6
_COLOURS = ((245, 248, 251), (8, 48, 107))


def write_tensorboard(findings: Findings, writer: Any, step: int) -> None:
    """Writes scalars, heat maps and a text; what is not known is left out.

    Scalars are `moe/cv_mean` and `_median`, `_min`, `_max`, `moe/expert_utilization_*` (an expert's load over the
    mean), `moe/dead_expert_frac_mean`, `moe/expert_diversity_mean` and `_min`, `moe/max_vio_mean`, and ours:
    `moe/information_mean`, `moe/divergence_mean`, `moe/divergence_corrected`, `moe/divergence_beyond_token`. Those of a
    layer are `moe/layer_<i>/cv`, `dead_expert_frac`, `expert_diversity`, `max_vio`, `information`, `divergence`,
    `token_entropy`, `margin`, where i is the layer's number in the model. Heat maps show `moe/load` (layers × experts)
    and `moe/layer_<i>/usage` (domains × experts), white for 0 and dark for the highest value.

    Args:
        findings (Findings): of a run.
        writer: of `torch.utils.tensorboard.SummaryWriter`, or what has its add_scalar, add_image and add_text.
        step (int): of the training.

    Raises:
        ImportError: no numpy, or no Pillow.
        ValueError: no findings, no writer, a negative step.
    """
    check_findings("write_tensorboard", findings)
    if not all(callable(getattr(writer, name, None)) for name in ("add_scalar", "add_image", "add_text")):
        raise ValueError(f"edl::write_tensorboard: writer must be a SummaryWriter (got {type(writer).__name__})")
    step = checks.as_integer("write_tensorboard", "step", step)
    np = require("numpy", "write_tensorboard")
    require("PIL", "write_tensorboard")
    for name, value in _scalars(findings).items():
        if math.isfinite(value):
            writer.add_scalar(name, value, step)
    widest = max((layer.facts.num_experts for layer in findings.layers), default=0)
    load = [np.pad(load * len(load), (0, widest - len(load)), constant_values=np.nan) for load in loads(findings)]
    if load:
        writer.add_image("moe/load", _heat_map(np.stack(load)), step, dataformats="HWC")
    for layer in findings.layers:
        writer.add_image(f"moe/layer_{layer.facts.number}/usage", _heat_map(layer.usage), step, dataformats="HWC")
    writer.add_text("moe/findings", _text(findings), step)


def _scalars(findings: Findings) -> dict[str, float]:
    np = require("numpy", "write_tensorboard")
    scalars: dict[str, float] = {}
    rows, utilisation = [], []
    for place, (layer, load) in enumerate(zip(findings.layers, loads(findings))):
        measured = load_measures(load)
        rows.append(
            {
                "cv": measured["coefficient_of_variation"],
                "dead_expert_frac": measured["dead_expert_fraction"],
                "expert_diversity": measured["expert_diversity"],
                "max_vio": float(np.asarray(findings.load_violation)[place]),
                "information": float(np.asarray(findings.information)[place]),
                "divergence": _mean(np.asarray(findings.divergence)[place]),
                "token_entropy": _mean(layer.token_entropy),
                "margin": _mean(layer.margin),
            }
        )
        utilisation.append(load * len(load))
        scalars |= {f"moe/layer_{layer.facts.number}/{name}": value for name, value in rows[-1].items()}
    if not rows:
        return {}
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    spread = {"median": np.nanmedian, "min": np.nanmin, "max": np.nanmax}
    scalars |= {f"moe/{name}_mean": _mean(columns[name]) for name in columns if name not in ("token_entropy", "margin")}
    if not np.isnan(columns["cv"]).all():
        scalars |= {f"moe/cv_{name}": float(function(columns["cv"])) for name, function in spread.items()}
        scalars["moe/expert_diversity_min"] = float(np.nanmin(columns["expert_diversity"]))
        quantiles = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "max": 1.0}
        found = np.nanquantile(np.concatenate(utilisation), list(quantiles.values()))
        scalars |= {f"moe/expert_utilization_{name}": float(value) for name, value in zip(quantiles, found)}
    if findings.compared is not None:
        scalars["moe/divergence_corrected"] = float(findings.compared.whole.value)
    if findings.beyond_token is not None:
        scalars["moe/divergence_beyond_token"] = float(findings.beyond_token.standardised.whole.value)
    return scalars


def _mean(values: Any) -> float:
    """The mean of what is known; NaN where nothing is."""
    np = require("numpy", "write_tensorboard")
    values = np.asarray(values, dtype=np.float64)
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else math.nan


def _heat_map(values: Any) -> Any:
    """Rows and columns as an image [H, W, 3] of uint8; what is not known is grey."""
    np = require("numpy", "write_tensorboard")
    values = np.asarray(values, dtype=np.float64)
    known = np.isfinite(values)
    highest = max(float(values[known].max(initial=0.0)), np.finfo(np.float64).tiny)
    part = np.where(known, values, 0.0)[..., None] / highest
    low, high = np.array(_COLOURS, dtype=np.float64)
    colours = np.where(known[..., None], low + (high - low) * part, 128.0)
    return colours.round().astype(np.uint8).repeat(_PIXELS, axis=0).repeat(_PIXELS, axis=1)


def _text(findings: Findings) -> str:
    """What a reader must know besides the scalars, in Markdown."""
    lines = [
        f"**{_plain(findings.title)}**",
        "",
        f"Domains, in the order of rows: {_plain(', '.join(findings.domains))}",
    ]
    if findings.compared is not None:
        lines += ["", f"Domains differ by {_estimate(findings.compared.whole)}"]
    if findings.beyond_token is not None:
        lines += ["", f"Beyond the token they differ by {_estimate(findings.beyond_token.standardised.whole)}"]
    for note in findings.notes:
        lines += ["", _plain(note)]
    return "\n".join(lines)


def _estimate(estimate: Estimate) -> str:
    """A number and how sure it is."""
    test = "too few documents for a test" if math.isnan(estimate.p) else f"p = {estimate.p:.3g}"
    if math.isfinite(estimate.low):
        return f"{estimate.value:.4g} nats ({estimate.low:.4g} to {estimate.high:.4g}, {test})"
    if math.isfinite(estimate.high):
        return f"no more than chance would, below {estimate.high:.4g} nats ({test})"
    return f"{estimate.value:.4g} nats ({test})"


def _plain(text: str) -> str:
    """Foreign text without Markdown, lines of its own or half characters."""
    text = " ".join(text.encode("utf-8", "replace").decode("utf-8").split())
    return "".join(f"\\{letter}" if letter in r"\`*_{}[]<>#|" else letter for letter in text)
