"""Plots show the numbers of their results, differ without colour, and are saved whole; and the history of signs."""

import sys

import pytest
import torch

from lightning_modules.analysis.comparison import compare_convergence, plain_ista
from lightning_modules.analysis.generalization import FAILURE, CodeBounds
from lightning_modules.analysis.geometry import compare_geometry
from lightning_modules.analysis.kl_bound import code_bound
from lightning_modules.analysis.phase_transition import PairCurve, sign_accuracy
from lightning_modules.analysis.plots import (
    plot_bounds,
    plot_convergence,
    plot_pairs,
    plot_sign_history,
    plot_spectra,
    save_figure,
)
from lightning_modules.analysis.sign_history import SignHistory, read_sign_history
from lightning_modules.analysis.variants import weight_variants
from pibinn_plugin.errors import PIBiNNError

matplotlib = pytest.importorskip("matplotlib")

HISTORY = SignHistory((0, 1, 2), (0.25, 0.1, 0.0), (0.1, 0.12, 0.11), ("warm-up", "signs", "scale"))
LOG = """epoch,qat/flipped,qat/scale,qat/stage,step,train/loss
0,,,,9,0.5
0,0.25,0.1,0.0,9,
1,0.1,0.12,1.0,19,
2,0.0,0.11,2.0,29,
"""


def line(axes, label):
    return next(drawn for drawn in axes.lines if drawn.get_label() == label)


def styles(axes):
    return [(drawn.get_linestyle(), drawn.get_marker(), drawn.get_markerfacecolor()) for drawn in axes.lines]


def comparison(**thresholds):
    operator = torch.eye(4)[None].repeat(2, 1, 1) + 0.02
    networks = {name: plain_ista(operator, torch.full((5,), theta)) for name, theta in thresholds.items()}
    x = torch.eye(8)
    return compare_convergence(networks, torch.einsum("rc,nc->nr", torch.block_diag(*operator), x), x)


def test_errors_are_drawn_beside_their_certificates():
    result = comparison(a=0.4, b=1e-6)
    axes = plot_convergence(result).axes[0]
    for name, measured in result.measurements.items():
        drawn = line(axes, f"{name}: measured, mean").get_ydata()
        assert list(drawn) == pytest.approx(measured.errors.sum(-1).mean(1).tolist())
    certified = result.measurements["a"].certificate.errors.sum(-1)
    assert list(line(axes, "a: certified to layer 5").get_ydata()) == pytest.approx(certified.tolist())
    assert len(line(axes, "b: certified to layer 0").get_ydata()) == 1  # nothing beyond the start
    assert len(set(styles(axes))) == len(axes.lines)


def test_the_measured_contraction_is_drawn_where_nothing_is_certified():
    result = comparison(a=1e-6, b=1e-3)
    axes = plot_convergence(result).axes[0]
    for name, measured in result.measurements.items():
        ratio = measured.errors.sum(-1)[1:] / measured.errors.sum(-1)[:-1]
        assert list(line(axes, f"{name}: mean").get_ydata()) == pytest.approx(ratio.mean(1).tolist())
        assert list(line(axes, f"{name}: largest").get_ydata()) == pytest.approx(ratio.amax(1).tolist())
    assert list(line(axes, "no progress").get_ydata()) == [1, 1]


def test_spectra_are_those_of_the_table():
    A = torch.randn(2, 3, 6)
    table = compare_geometry(weight_variants(A), A, samples=5)
    axes = plot_spectra(table).axes[0]
    expected = torch.linalg.svdvals(A.double()).flatten().sort(descending=True).values
    assert list(line(axes, "float").get_ydata()) == pytest.approx((expected / expected[0]).tolist(), rel=1e-6)
    assert len(set(styles(axes))) == len(table.rows)


def test_signs_are_bars_and_the_scale_a_line():
    axes, second = plot_sign_history(HISTORY).axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([25, 10, 0])
    assert len({bar.get_hatch() for bar in axes.patches}) == 3
    assert list(second.lines[0].get_ydata()) == [0.1, 0.12, 0.11]
    assert axes.get_ylim()[0] == 0


def test_bounds_fall_with_the_examples():
    bits = {"one-bit": torch.tensor(400.0), "float": torch.tensor(9000.0)}
    losses = {scheme: (torch.tensor([0.1, 0.2]),) for scheme in bits}
    axes = plot_bounds(CodeBounds(bits, losses, frozenset(["one-bit"]), (1000,), "")).axes[0]
    for scheme in bits:
        drawn = line(axes, scheme)
        values = list(drawn.get_ydata())
        assert values == sorted(values, reverse=True)
        count = round(drawn.get_xdata()[30])
        assert values[30] == pytest.approx(code_bound(torch.tensor([0.1, 0.2]), bits[scheme], count, FAILURE))
    assert line(axes, "N = 1,000").get_xdata()[0] == 1000
    assert line(axes, "train loss, one-bit").get_ydata()[0] == pytest.approx(0.15)


def test_pairs_are_a_curve_and_measured_points():
    curve = PairCurve((20, 30, 40), 64, 0.01, (0.72, 0.84, 0.94), (0.74, 0.87, 0.96), (0.0, 0.0, 0.1))
    axes = plot_pairs(curve).axes[0]
    assert list(line(axes, "box, measured").get_ydata()) == list(curve.box)
    assert list(line(axes, "SignsFromPairs, measured").get_ydata()) == list(curve.start)
    predicted = line(axes, "box, predicted (arXiv 1510.01413)")
    assert predicted.get_ydata()[0] == pytest.approx(sign_accuracy(20, 64, 0.01))
    assert line(axes, "N = n / 2").get_xdata()[0] == 32


@pytest.mark.parametrize("name", ["signs.png", "deeper/signs.pdf"])
def test_figures_are_saved_whole(tmp_path, name):
    path = save_figure(plot_sign_history(HISTORY), tmp_path / name)
    assert path.stat().st_size > 1000
    assert [entry.name for entry in path.parent.iterdir() if entry.is_file()] == [path.name]


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "signs.png"
    path.write_text("old")
    figure = plot_sign_history(HISTORY)
    figure.savefig = lambda *arguments, **options: (_ for _ in ()).throw(OSError("no space"))
    with pytest.raises(OSError, match="no space"):
        save_figure(figure, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_absence_of_matplotlib_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install pibinn-plugin\[plot\]"):
        plot_sign_history(HISTORY)


def test_the_history_of_signs_is_read_from_the_log(tmp_path):
    log = tmp_path / "metrics.csv"
    log.write_text(LOG)
    assert read_sign_history(log) == HISTORY
    text = str(HISTORY)
    assert "25.000%" in text and "warm-up" in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epoch,step\n0,1\n", "has no row with"),
        ("", "has no row with"),
        (LOG.replace("0.12", "many"), "is no log of TwoStageQAT"),
        (LOG.replace("2.0", "7.0"), "is no log of TwoStageQAT"),
    ],
)
def test_other_files_are_refused(tmp_path, text, words):
    log = tmp_path / "metrics.csv"
    log.write_text(text)
    with pytest.raises(PIBiNNError, match=words):
        read_sign_history(log)
    with pytest.raises(FileNotFoundError):
        read_sign_history(tmp_path / "absent.csv")
