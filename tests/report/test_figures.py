"""Figures for papers: one for each layer, and over layers and steps; whatever is not known."""

import dataclasses
import struct

import numpy as np
import pytest
import synthetic_findings as made

from edl.report import figures


def size_of(path):
    """(width, height) of a PNG file, pixels."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


@pytest.mark.parametrize(
    "runs, expected",
    [
        (lambda: [made.findings(2, 4, 2, title="a b/c")],
         {"a-b-c-usage-layer-1", "a-b-c-usage-layer-2", "a-b-c-specialisation", "divergence", "course"}),
        (lambda: [dataclasses.replace(made.findings(1, 1, 1, record=False, title="../"), course=None)],
         {"run-usage-layer-1", "run-specialisation", "divergence"}),
        (lambda: [made.findings(1, 4, 2, title="x"), made.unknown(made.findings(1, 4, 2, title="x"))],
         {"x-usage-layer-1", "x-specialisation", "x-1-usage-layer-1", "x-1-specialisation", "divergence", "course"}),
    ],
)  # fmt: skip
def test_every_figure_is_a_file_of_the_width_of_a_page(tmp_path, recwarn, runs, expected):
    written = figures.write_figures(runs(), tmp_path / "new")
    assert {path.stem for path in written} == expected
    assert {size_of(path)[0] for path in written} == {2025}  # 6.75 inches
    assert sorted(written) == sorted((tmp_path / "new").iterdir())
    assert not recwarn.list


def test_hostile_names_are_drawn(tmp_path, recwarn):
    run = made.findings(1, 3, names=["a$b$", "\ud800", "x" * 256], title="\ud800 <b>/..")
    written = figures.write_figures([dataclasses.replace(run, course=None)], tmp_path)
    assert [path.name for path in written] == ["b-usage-layer-1.png", "b-specialisation.png", "divergence.png"]
    assert not recwarn.list


def image_of(axis):
    return axis.images[0].get_array()


def test_usage_shows_the_ratio_of_certain_cells_in_blocks():
    run = made.findings(1, 12, 4)
    (layer,) = run.layers
    figure = figures.usage(run, layer)
    axis = figure.axes[0]
    usage = np.asarray(layer.usage)
    order = [int(label.get_text()) for label in axis.get_xticklabels()]
    owner = (usage / usage.mean(0)).argmax(0)
    assert sorted(order) == list(range(12)) and (np.diff(owner[order]) >= 0).all()
    wanted = np.log2(usage / usage.mean(0))[:, order]
    certain = np.asarray(layer.is_certain)[:, order]
    np.testing.assert_array_equal(image_of(axis).mask, ~certain)
    np.testing.assert_allclose(image_of(axis).data[certain], wanted[certain].clip(-3, 3))


def test_specialisation_is_sorted_and_layers_may_differ():
    run = made.findings(2, 6, 3)
    small = dataclasses.replace(
        run.layers[0], usage=np.full((3, 4), 0.25), facts=run.layers[0].facts._replace(num_experts=4)
    )
    figure = figures.specialisation(dataclasses.replace(run, layers=[small, run.layers[1]]))
    image = image_of(figure.axes[0])
    assert image.shape == (2, 6) and image.mask[0].tolist() == [False] * 4 + [True] * 2
    np.testing.assert_allclose(image[0, :4], 0, atol=1e-12)
    assert (np.diff(image[1].compressed()) <= 0).all()


def test_divergence_is_hollow_where_it_may_be_chance():
    run = made.findings(3, 8, 4)
    p = np.array([0.2, 0.001, np.nan])
    compared = dataclasses.replace(run.compared, layer_p=p)
    figure = figures.divergence([dataclasses.replace(run, compared=compared, beyond_token=None)])
    (axis,) = figure.axes
    drawn = {line.get_markerfacecolor(): line.get_xydata() for line in axis.lines if line.get_marker() == "o"}
    np.testing.assert_allclose(drawn["white"], [[1, compared.layer_value[0]]])
    assert len(drawn) == 2 and sum(map(len, drawn.values())) == 3


def test_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^edl::figures: runs must be one or more \(got none\)$"):
        figures.write_figures([], tmp_path)
