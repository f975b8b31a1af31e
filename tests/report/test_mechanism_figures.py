"""The figures of single mechanisms show what they were given."""

from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from localgpt_core import LayerNormProjectedSurrogate
from localgpt_core.layers.norms import LayerNormSTE
from localgpt_core.report.mechanism_figures import code_map, norm_fields, places_over_training, winner_masks

matplotlib.use("Agg")


def test_places_have_a_line_each_and_arms_a_panel():
    rows = [
        ("a", 1, 0, "blocks.0.alpha_mlp", 1.0),
        ("a", 2, 0, "blocks.0.alpha_mlp", 3.0),
        ("a", 1, 10, "blocks.0.alpha_mlp", 5.0),
        ("a", 1, 0, "blocks.1.alpha_mlp", 0.5),
    ]
    table = pd.DataFrame(rows, columns=["arm", "seed", "step", "name", "value"])
    labels = {"a": "with gates", "b": "none"}
    results = SimpleNamespace(diagnostics=lambda quantity: table, label=labels.get)
    figure = places_over_training(results, ["a", "b"], "gates", "gate")
    left, right = figure.axes
    assert [line.get_ydata().tolist() for line in left.lines] == [[2.0, 5.0], [0.5]]
    assert [text.get_text() for text in figure.legends[0].texts] == ["0.alpha_mlp", "1.alpha_mlp"]
    assert not right.lines and left.get_title() == "with gates"
    alone = places_over_training(results, ["a"], "gates", "gate")
    assert alone.get_figheight() < figure.get_figheight()
    many = places_over_training(results, ["a", "b", "b", "a", "b"], "gates", "gate")
    assert many.axes[0].get_gridspec().get_geometry() == (3, 2)
    assert [ax.axison for ax in many.axes] == [True] * 5 + [False] and len(many.axes[3].lines) == 2
    assert [ax.get_ylabel() for ax in many.axes[:5]] == ["gate", "", "gate", "", "gate"]
    (band, _) = left.collections
    assert band.get_paths()[0].vertices[:, 1].max() == 5.0 and band.get_paths()[0].vertices[:, 1].min() == 1.0


def test_a_code_map_writes_each_code_into_its_cell():
    (ax,) = code_map({"block 0": [7, 7, 300], "block 1": [4, 7, 4]}, "a b").axes
    assert [text.get_text() for text in ax.texts] == ["7", "7", "300", "4", "7", "4"]
    assert ax.images[0].get_array().tolist() == [[1, 1, 2], [0, 1, 0]]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "·", "b"]


def test_winners_are_ordered_by_their_first_win():
    values = torch.tensor([[0.0, 0.0, -2.0, 0.0], [0.0, 1.0, 3.0, 0.0]])  # two characters, four units
    ax, other = winner_masks({"k = 1": values, "dense": torch.ones(2, 4)}, "a\n").axes
    assert ax.images[0].get_array().tolist() == [[True, True], [False, True], [False] * 2, [False] * 2]
    assert other.images[0].get_array().all()
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "⏎"]


def test_only_the_exact_field_is_tangential_and_the_others_are_what_they_claim():
    norms = {
        "exact": nn.LayerNorm(3),
        "no radial term": LayerNormProjectedSurrogate(3, "center_scale"),
        "identity": LayerNormSTE(3),
    }
    fields = []
    for ax in norm_fields(norms, target=(0.0, 2.0)).axes:
        assert ax.lines[0].get_xydata().tolist() == [
            [0.0, pytest.approx(3**0.5)]
        ]  # the target, on the circle
        arrows = ax.collections[0]
        points, steps = arrows.get_offsets(), np.stack((arrows.U, arrows.V), axis=1)
        radial = np.abs((points * steps).sum(1)) / np.linalg.norm(points, axis=1)
        fields.append((points, steps, radial.max()))
    assert fields[0][2] < 1e-3 and fields[1][2] > 0.3
    # Without the radial term arrows point to the target and shrink with distance; the identity's do not.
    points, steps, _ = fields[1]
    assert np.abs(steps[:, 0]).max() < 1e-6 and (steps[:, 1] > 0).all()
    lengths = steps[:, 1] * np.linalg.norm(points, axis=1)
    assert lengths.max() == pytest.approx(lengths.min(), rel=1e-3)
    assert np.allclose(fields[2][1], [0, 1], atol=1e-6)
