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
    "baseline": {"color": "#555555", "linestyle": "-"},
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


def heat_maps(results, names, *, panel_width=2.35, numbers=True):
    """Draws domain x expert use, one row of panels per layer, one column per arm.

    Arguments:
        results: list of Result.
        names: list of D names of domains.
        panel_width: inches.
        numbers: whether to write the share in each cell, as a percentage.

    Returns:
        matplotlib Figure.
    """
    layers, domains, experts = results[0].measures.usage.shape
    highest = max(result.measures.usage.max().item() for result in results)
    height = max(0.9, 0.3 * domains) + 0.35
    with plt.rc_context(style()):
        figure, axes = plt.subplots(
            layers,
            len(results),
            squeeze=False,
            layout="constrained",
            figsize=(panel_width * len(results) + 1.9, height * layers + 0.75),
        )
        for column, result in enumerate(results):
            for layer in range(layers):
                axis = axes[layer][column]
                shares = result.measures.usage[layer].numpy()
                order = expert_order(shares)
                image = axis.imshow(shares[:, order], cmap=SHADES, vmin=0, vmax=highest, aspect="auto")
                _label_panel(axis, shares[:, order], order, numbers and experts <= MOST_NUMBERED_EXPERTS, highest)
                axis.set_yticks(range(domains), names if column == 0 else [""] * domains)
                if layer == 0:
                    axis.set_title(result.arm.title.replace(", ", ",\n"))
                if column == 0:
                    axis.set_ylabel(f"layer {layer + 1}", fontweight="bold")
        bar = figure.colorbar(image, ax=axes, fraction=0.02, pad=0.01, ticks=[0, 1 / experts, highest])
        bar.ax.set_yticklabels(["0 %", f"{100 / experts:.1f} %\n(even use)", f"{100 * highest:.0f} %"])
        bar.outline.set_visible(False)
    return figure


def _label_panel(axis, shares, order, numbers, highest):
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
    if not numbers:
        return
    for (row, column), value in np.ndenumerate(shares):
        colour = "white" if value > 0.5 * highest else INK
        axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7.5, color=colour)


def curves(results):
    """Draws the losses and the divergence of the true domains over the steps of all arms.

    Returns:
        matplotlib Figure.
    """
    panels = (
        ("language_model", "language model", "bits per byte"),
        ("balance", "load balancing loss", "1 is even"),
        ("divergence", "expert divergence loss, each arm's own labels", "lower is further apart"),
        ("domains", "divergence of the true domains", "Jensen-Shannon, nats"),
    )
    with plt.rc_context(style()):
        figure, axes = plt.subplots(2, 2, figsize=(11, 6.4), layout="constrained")
        for axis, (key, title, unit) in zip(axes.flat, panels):
            for result in results:
                steps, values = smooth(result.curves[key])
                axis.plot(steps, values, label=result.arm.title, linewidth=1.8, **STYLES[result.arm.key])
            axis.set_title(title, loc="left")
            axis.set_ylabel(unit)
            axis.grid(color="#e4e7eb", linewidth=0.8)
            axis.set_axisbelow(True)
        figure.get_layout_engine().set(h_pad=0.1)
        for axis in axes[1]:
            axis.set_xlabel("step")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(results), frameon=False, handlelength=3)
    return figure


def as_png(figure):
    """Returns a figure as the bytes of a PNG file for a README, and closes it."""
    file = io.BytesIO()
    with plt.rc_context(style()):
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
    return file.getvalue()


def as_svg(figure):
    """Returns a figure as the text of an SVG file, and closes it."""
    file = io.StringIO()
    with plt.rc_context(style()):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return file.getvalue()


def smooth(values):
    """Returns (steps, running mean) of a list of values, over a small share of the steps."""
    width = max(1, round(SMOOTHING_SHARE * len(values)))
    averaged = np.convolve(values, np.full(width, 1 / width), mode="valid")
    return np.arange(len(averaged)) + width, averaged
