"""Figures for papers: what the page shows, as files."""

import os
import pathlib
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from edl.diagnostics.extras import require
from edl.diagnostics.findings import Findings, LayerFindings
from edl.report import colours, packing, summaries, words

_WIDTH = 6.75  # inches, of a page of two columns
_INK, _SOFT, _GREY = "#16202a", "#56616d", "#e6e9ed"
# DejaVu comes with matplotlib; the others are there for domains whose names it has no letters for.
_FONTS = ["DejaVu Sans", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "PingFang SC", "Microsoft YaHei", "Arial Unicode MS"]
_MOST_TICKS = 24
_WIDEST_RATIO = 3.0  # log2


def write_figures(runs: Sequence[Findings], folder: str | os.PathLike[str]) -> list[pathlib.Path]:
    """Writes PNG files of 300 dots per inch: the use of experts in each layer of each run, and over runs divergence and
    specialisation by layer and the course of training.

    Args:
        runs (sequence of Findings): one or several.
        folder: which is made where it is not there.

    Returns:
        list of pathlib.Path: what was written.

    Raises:
        ImportError: no matplotlib, numpy.
        OSError: it cannot be written.
        ValueError: no run.
    """
    if not runs:
        raise ValueError("edl::figures: runs must be one or more (got none)")
    matplotlib = require("matplotlib", "figures")
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(_style()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        for name, figure in _figures(runs):
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=300, metadata={"Software": None})
            written.append(path)
    return written


def _style() -> dict[str, Any]:
    """What all figures share."""
    fonts = require("matplotlib.font_manager", "figures")
    installed = set(fonts.get_font_names())
    return {
        "font.family": [font for font in _FONTS if font in installed] or ["sans-serif"],
        "font.size": 8,
        "text.parse_math": False,  # a domain may be called US$_vs_CA$
        "text.color": _INK,
        "axes.edgecolor": "#aab3bd",
        "axes.labelcolor": _INK,
        "axes.titlesize": 8.5,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.6,
        "xtick.color": _SOFT,
        "ytick.color": _SOFT,
        "xtick.labelsize": 7,
        "ytick.labelsize": 7,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "legend.frameon": False,
        "lines.linewidth": 1.4,
    }


def _figures(runs: Sequence[Findings]) -> Iterator[tuple[str, Any]]:
    """Names and figures."""
    taken: set[str] = set()
    for number, run in enumerate(runs):
        prefix = re.sub(r"[^\w.-]+", "-", run.title).strip("-.")[:60] or "run"
        prefix = prefix if prefix not in taken else f"{prefix}-{number}"
        taken.add(prefix)
        digits = len(str(run.layers[-1].facts.number))
        for layer in run.layers:
            yield f"{prefix}-usage-layer-{layer.facts.number:0{digits}}", usage(run, layer)
        yield f"{prefix}-specialisation", specialisation(run)
    yield "divergence", divergence(runs)
    if any(run.course is not None for run in runs):
        yield "course", course(runs)


def _new(*size: float, rows: int = 1, columns: int = 1, is_shared: bool = False) -> tuple[Any, Any]:
    """A figure that no window shows, and its axes [rows, columns], which may share their heights."""
    figure = require("matplotlib.figure", "figures").Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharey=is_shared)


def _colours(anchors: Sequence[str], unknown: str = "white") -> Any:
    """A colour map; what is masked has a colour of its own."""
    listed = require("matplotlib.colors", "figures").LinearSegmentedColormap.from_list("edl", list(anchors))
    return listed.with_extremes(bad=unknown)


def usage(run: Findings, layer: LayerFindings) -> Any:
    """Domain by expert: log2 of the share by the mean share; experts stand by the domain that prefers them."""
    np = require("numpy", "figures")
    D, E = np.shape(layer.usage)
    ratio = summaries.ratios(layer.usage)
    with np.errstate(divide="ignore"):
        values = np.log2(ratio).clip(-_WIDEST_RATIO, _WIDEST_RATIO)
    if layer.is_certain is not None:
        values = np.where(layer.is_certain, values, np.nan)
    order = _by_domain(ratio)
    figure, axes = _new(_WIDTH, 0.75 + min(7.0, max(0.9, 0.15 * D)))
    axis = axes[0, 0]
    norm = {"vmin": -_WIDEST_RATIO, "vmax": _WIDEST_RATIO}
    shown = np.ma.masked_invalid(values[:, order])
    image = axis.imshow(shown, cmap=_colours(colours.DIVERGING, _GREY), aspect="auto", interpolation="none", **norm)
    axis.set_title(f"Layer {layer.facts.number}")
    _name_rows(axis, [words.name(name, 28) for name in run.domains])
    step = max(1, -(-E // _MOST_TICKS))
    axis.set_xticks(range(0, E, step), [str(each) for each in order[::step]])
    axis.set_xlabel(
        "expert, by the domain that prefers it" + ("" if layer.is_certain is None else "; grey: not certain")
    )
    bar = figure.colorbar(image, ax=axis, fraction=0.03, pad=0.01, ticks=[-3, -1, 0, 1, 3])
    bar.ax.set_yticklabels(["⅛×", "½×", "mean", "2×", "8×"])
    bar.outline.set_visible(False)
    return figure


def _by_domain(ratio: Any) -> Any:
    """The order of experts in which specialisation shows as blocks along the diagonal; unknown ones are last."""
    np = require("numpy", "figures")
    known = np.where(np.isfinite(ratio), ratio, -np.inf)
    owner = np.where(np.isfinite(ratio).any(0), known.argmax(0), len(ratio))
    return np.lexsort((-known.max(0), owner))


def _name_rows(axis: Any, names: Sequence[str]) -> None:
    """Names on the left, as many as fit."""
    step = max(1, -(-len(names) // 60))
    axis.set_yticks(range(0, len(names), step), names[::step])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def specialisation(run: Findings) -> Any:
    """Layer by expert: how narrow each expert is, the narrowest first."""
    np = require("numpy", "figures")
    widest = max(layer.facts.num_experts for layer in run.layers)
    values = np.full((len(run.layers), widest), np.nan)
    for row, layer in zip(values, run.layers):
        found = summaries.specialisation(layer.usage)
        row[: len(found)] = np.sort(np.where(np.isfinite(found), -found, np.inf))
    values = np.where(np.isfinite(values), -values, np.nan)
    figure, axes = _new(_WIDTH, 0.75 + min(7.0, max(0.9, 0.11 * len(values))))
    axis = axes[0, 0]
    shown = np.ma.masked_invalid(values)
    highest = shown.max() if shown.count() else 1.0
    image = axis.imshow(
        shown,
        cmap=_colours(colours.SEQUENTIAL),
        aspect="auto",
        interpolation="none",
        vmin=0,
        vmax=max(float(highest), 1e-9),
    )
    axis.set_title("How narrow each expert is")
    _name_rows(axis, [str(layer.facts.number) for layer in run.layers])
    axis.set_ylabel("layer")
    axis.set_xlabel("experts of the layer, the narrowest first")
    bar = figure.colorbar(image, ax=axis, fraction=0.03, pad=0.01)
    bar.set_label(f"bits, of {words.bits(len(run.domains)):.2f}")
    bar.outline.set_visible(False)
    return figure


def divergence(runs: Sequence[Findings]) -> Any:
    """Divergence over layers with 95 % intervals, raw and at equal tokens; hollow: no more than chance."""
    panels = [("raw", "Divergence of the domains’ choices")]
    if any(run.beyond_token is not None for run in runs):
        panels.append(("standardised", "At equal tokens"))
    figure, axes = _new(_WIDTH, 2.5, columns=len(panels), is_shared=True)
    for axis, (kind, title) in zip(axes[0], panels):
        for number, run in enumerate(runs):
            _layer_line(axis, run, kind, number, len(runs))
        axis.set_title(title)
        axis.set_xlabel("layer")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.axhline(0, color="#aab3bd", linewidth=0.6, zorder=0)
    axes[0, 0].set_ylabel("nats, mean over pairs")
    _legend(figure, runs)
    return figure


def _layer_line(axis: Any, run: Findings, kind: str, number: int, of: int) -> None:
    """The values of one run, with its intervals."""
    np = require("numpy", "figures")
    colour = _colour(number, of, kind)
    places = [layer.facts.number for layer in run.layers]
    comparison = packing.comparisons(run).get(kind)
    if comparison is None:
        if kind == "raw":
            axis.plot(places, summaries.mean_of(run.divergence, 1), color=colour, marker="o", markersize=2.5)
        return
    value, p = np.asarray(comparison.layer_value, np.float64), np.asarray(comparison.layer_p, np.float64)
    is_chance = p > words.CHANCE
    low, high = (np.where(is_chance, np.nan, end) for end in (comparison.layer_low, comparison.layer_high))
    axis.fill_between(places, low, high, color=colour, alpha=0.16, linewidth=0)
    axis.plot(places, value, color=colour)
    for chosen, face in ((~is_chance, colour), (is_chance, "white")):
        axis.plot(np.array(places)[chosen], value[chosen], "o", color=colour, markerfacecolor=face, markersize=3)


def _colour(number: int, of: int, kind: str = "raw") -> str:
    """Of a run; a single one has the page's colours."""
    return colours.LINES[kind == "standardised"] if of == 1 else colours.LINES[number % len(colours.LINES)]


def _legend(figure: Any, runs: Sequence[Findings]) -> None:
    """Which line is which run."""
    if len(runs) < 2:
        return
    line = require("matplotlib.lines", "figures").Line2D
    lines = [line([], [], color=_colour(number, len(runs)), marker="o", markersize=3) for number in range(len(runs))]
    names = [words.name(run.title) for run in runs]
    figure.legend(lines, names, loc="outside upper center", ncols=min(4, len(runs)))


def course(runs: Sequence[Findings]) -> Any:
    """Measures over snapshots: the mean over layers, and the layers' range."""
    np = require("numpy", "figures")
    panels = (
        ("information", "I(E;D), nats"),
        ("max_violation", "MaxVio"),
        ("dead", "Dead experts of a layer"),
        ("token_entropy", "Entropy of a token’s scores, nats"),
    )
    figure, axes = _new(_WIDTH, 4.2, rows=2, columns=2)
    for axis, (key, title) in zip(axes.flat, panels):
        for number, run in enumerate(runs):
            if run.course is None:
                continue
            values = np.ma.masked_invalid(np.asarray(getattr(run.course, key), np.float64))
            ends = [end.filled(np.nan) for end in (values.min(1), values.max(1))]
            colour = _colour(number, len(runs))
            axis.fill_between(run.course.steps, *ends, color=colour, alpha=0.16, linewidth=0)
            axis.plot(run.course.steps, summaries.mean_of(values.filled(np.nan), 1), color=colour)
        axis.set_title(title)
        axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    for axis in axes[1]:
        axis.set_xlabel("step")
    _legend(figure, runs)
    return figure
