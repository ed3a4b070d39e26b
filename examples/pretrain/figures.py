"""Pictures of a run: heat maps of expert use and training curves."""

import io
import warnings

import matplotlib

matplotlib.use("Agg")  # no display is needed, and none may be there

import matplotlib.colors
import matplotlib.font_manager
import matplotlib.pyplot as plt
import numpy as np

# The palette of Okabe and Ito can be told apart with every common form of colour blindness. Hue says which labels an
# arm was trained on, the dash whether the bias was corrected.
STYLES = {
    "baseline": {"color": "#7b8794", "linestyle": "-"},
    "divergence": {"color": "#0072B2", "linestyle": "-"},
    "random": {"color": "#D55E00", "linestyle": "-"},
    "corrected": {"color": "#0072B2", "linestyle": (0, (4, 1.5))},
    "corrected_random": {"color": "#D55E00", "linestyle": (0, (4, 1.5))},
}
INK = "#1f2933"
SHADES = matplotlib.colors.LinearSegmentedColormap.from_list("shades", ["#f5f8fb", "#9ecae1", "#2b7bba", "#08306b"])
# DejaVu comes with matplotlib; the others are there for domains whose names it has no letters for.
FONTS = ["DejaVu Sans", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "PingFang SC", "Microsoft YaHei", "Arial Unicode MS"]
SMOOTHING_SHARE = 0.04  # of the steps, for the running mean of the curves
MOST_NUMBERED_EXPERTS = 12  # with more experts, numbers in the cells would be too small to read


def style():
    """Returns the settings that all pictures share."""
    warnings.filterwarnings("ignore", message="Glyph .* missing from")
    installed = set(matplotlib.font_manager.get_font_names())
    return {
        "font.family": [font for font in FONTS if font in installed] or ["sans-serif"],
        "font.size": 10,
        "text.parse_math": False,  # a domain may be called US$_vs_CA$
        "text.color": INK,
        "axes.edgecolor": "#b8c2cc",
        "axes.labelcolor": INK,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": INK,
        "ytick.color": INK,
        "svg.hashsalt": "edl",  # the same run gives the same file
        "svg.fonttype": "none",  # the reader's fonts know more alphabets than matplotlib's
    }


def expert_order(usage):
    """Orders the experts of a layer by the domain that uses them most, then by how much more it does.

    The numbers of experts mean nothing; in this order specialisation shows as blocks along the diagonal.

    Arguments:
        usage: [D, E] array of shares.

    Returns:
        [E] indices.
    """
    owner = usage.argmax(axis=0)
    return np.lexsort((-(usage.max(axis=0) - usage.mean(axis=0)), owner))


def heat_maps(runs):
    """Draws domain x expert use, one row of panels per layer, one column per run.

    Arguments:
        runs: list of edl.diagnostics.findings.Findings, of the same layers and domains.

    Returns:
        matplotlib Figure.
    """
    names, layers = runs[0].domains, len(runs[0].layers)
    experts = runs[0].layers[0].facts.num_experts
    highest = max(layer.usage.max() for run in runs for layer in run.layers)
    height = max(0.9, 0.3 * len(names)) + 0.35
    with plt.rc_context(style()):
        figure, axes = plt.subplots(
            layers,
            len(runs),
            squeeze=False,
            layout="constrained",
            figsize=(2.7 * len(runs) + 1.9, height * layers + 0.75),
        )
        for column, run in enumerate(runs):
            for layer, found in enumerate(run.layers):
                axis = axes[layer][column]
                order = expert_order(found.usage)
                shares = found.usage[:, order]
                image = axis.imshow(shares, cmap=SHADES, vmin=0, vmax=highest, aspect="auto")
                _label_panel(axis, shares, order, highest)
                axis.set_yticks(range(len(names)), names if column == 0 else [""] * len(names))
                if layer == 0:
                    axis.set_title(run.title.replace(", ", ",\n"))
                if column == 0:
                    axis.set_ylabel(f"layer {found.facts.number}", fontweight="bold")
        bar = figure.colorbar(image, ax=axes, fraction=0.02, pad=0.01, ticks=[0, 1 / experts, highest])
        bar.ax.set_yticklabels(["0 %", f"{100 / experts:.1f} %\n(even use)", f"{100 * highest:.0f} %"])
        bar.outline.set_visible(False)
    return figure


def _label_panel(axis, shares, order, highest):
    """Puts expert numbers below a panel and percentages into its cells."""
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_xticks(
        range(len(order)), order if len(order) <= MOST_NUMBERED_EXPERTS else [], fontsize=8, color="#7b8794"
    )
    axis.set_xticks(np.arange(len(order) - 1) + 0.5, minor=True)
    axis.set_yticks(np.arange(len(shares) - 1) + 0.5, minor=True)
    axis.grid(which="minor", color="white", linewidth=1.2)
    axis.tick_params(which="minor", length=0)
    if len(order) > MOST_NUMBERED_EXPERTS:
        return
    for (row, column), value in np.ndenumerate(shares):
        colour = "white" if value > 0.5 * highest else INK
        axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7.5, color=colour)


CURVES = {
    "language_model": ("Language model", "bits per byte"),
    "balance": ("Load balancing loss", "1 is even"),
    "divergence": ("Expert divergence loss, each arm's own labels", "lower is further apart"),
    "domains": ("Divergence of the true domains in a step", "nats"),
}
RULE = "#e4e7eb"
# What an SVG file for light paper has, and what stands for it on dark paper.
ON_DARK = {INK: "#e8ecf0", RULE: "#2c333b"}


def curve(results, key):
    """Draws one of `CURVES` over the steps of all arms, narrow enough for a phone.

    Arguments:
        results: list of train.Result.
        key: of the curve.

    Returns:
        matplotlib Figure without a background.
    """
    with plt.rc_context({**style(), "axes.edgecolor": RULE}):
        figure, axis = plt.subplots(figsize=(4.4, 2.6))
        figure.subplots_adjust(left=0.17, right=0.98, bottom=0.18, top=0.97)
        for result in results:
            steps, values = smooth(result.curves[key])
            axis.plot(steps, values, linewidth=1.6, **STYLES[result.arm.key])
        axis.set_ylabel(CURVES[key][1])
        axis.set_xlabel("step")
        axis.grid(color=RULE, linewidth=0.8)
        axis.set_axisbelow(True)
    return figure


def for_dark(picture):
    """Returns the text of an SVG file with ink for dark paper."""
    for light, dark in ON_DARK.items():
        picture = picture.replace(light, dark)
    return picture


def as_png(figure):
    """Returns a figure as the bytes of a PNG file for a README, and closes it."""
    file = io.BytesIO()
    with plt.rc_context(style()):
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
    return file.getvalue()


def as_svg(figure):
    """Returns a figure as the text of an SVG file without a background, and closes it."""
    file = io.StringIO()
    with plt.rc_context(style()):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return file.getvalue()


def smooth(values):
    """Returns (steps, running mean) of a list of values, over a small share of the steps."""
    width = max(1, round(SMOOTHING_SHARE * len(values)))
    averaged = np.convolve(values, np.full(width, 1 / width), mode="valid")
    return np.arange(len(averaged)) + width, averaged
