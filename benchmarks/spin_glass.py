"""Couplings of a spin glass from 20 to 320 samples, at two temperatures: where each precision starts, in one table.

    python benchmarks/spin_glass.py [--output benchmarks/results]

The solutions are those that ``python -m lightning_modules compare`` starts its rows at, of the data of
configs/spin_glass.yaml; what training adds to them, the comparison of N = 40 shows.
"""

import argparse
import statistics
from pathlib import Path

import torch
from torch import nn

from lightning_modules.analysis.plots import save_figure
from lightning_modules.compare.callback import BASELINES
from lightning_modules.compare.table import markdown, mean_and_deviation
from lightning_modules.coupling_start import COUPLINGS
from lightning_modules.data.spin_samples import SpinSamples
from lightning_modules.inverse_ising import fit_scale
from lightning_modules.machine import machine
from lightning_modules.metrics import nmse_db, sign_accuracy
from lightning_modules.pseudo_likelihood import negative_log_pseudo_likelihood
from lightning_modules.solvers.local_fields import local_fields
from pibinn_plugin.targets import resolve_targets

SCALES, SAMPLES, SEEDS = (0.6, 0.4), (20, 40, 80, 160, 320), range(3)
MARKERS = "os^vD<>pP"

# Row: the bits of its 512 weights and scales; ternary codes five in a byte, see `pibinn_plugin`'s packed files.
BITS = {
    "one bit": 512 + 32,
    "ternary, chosen threshold": 824 + 32,
    "ternary b1.58": 824 + 32,
    "fp32, rounded to ±λ": 512 + 32,
    "fp32, box": 32 * 512,
    "fp32, ridge": 32 * 512,
    "best start by validation": 32 * 512,
}

TEXT = """# Couplings of a spin glass from N samples

`python benchmarks/spin_glass.py`: 16 × 16 torus, 512 couplings ±λ, N samples; mean ± standard deviation over three
seeds, each with other couplings and samples. Coupling error in dB: 10 log10(‖Ŵ − W‖² / ‖W‖²).
"""

LEGEND = """Every row is told the lattice and N samples, and none the signs or λ. Where it has a choice that the N
samples do not make, all have the same N / 2 further ones, by their pseudo-likelihood. Penalty (ridge), box (the others)
and threshold are chosen by four-fold cross-validation on the N samples.

- one bit: the signs of a box solution, and the one λ that fits them. That all couplings are ±λ is the model of this
  row, and true of these data.
- ternary, chosen threshold: -α, 0, α; the threshold below which a coupling of a box solution is 0 is chosen.
- ternary b1.58: the codes of BitNet b1.58, of the box or the ridge solution, with the α that fits them.
- fp32, rounded to ±λ: the signs of the box or the ridge solution, times its mean absolute value.
- fp32, box and fp32, ridge: float couplings.
- best start by validation: what an fp32 row takes that is offered all solutions; where it is that of one bit, the
  constraint is the information, and the other 31 bits hold none.

There is no row with a scale for each channel: an edge belongs to two spins, and no group of edges is a channel. Where
all signs are found, what is left is the error of λ, one number, and mostly luck: read differences below -30 dB as none.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures = {
        (scale, samples): [estimate_errors(scale, samples, seed) for seed in SEEDS]
        for samples in SAMPLES
        for scale in SCALES
    }
    parts = [TEXT]
    for scale in SCALES:
        parts += [f"## λ = {scale}\n", table(figures, scale, decibels), "\nSigns that are wrong or 0, of 512:\n"]
        parts += [table(figures, scale, wrong_signs), ""]
    plot(figures, args.output / "spin_glass.png")
    parts += [LEGEND, "![coupling error against N](spin_glass.png)\n", machine()]
    (args.output / "spin_glass.md").write_text("\n".join(parts) + "\n")


def estimate_errors(scale, samples, seed):
    """Coupling error in dB and number of wrong signs of each row."""
    data = SpinSamples(16, scale, samples, samples // 2, seed=seed)
    data.setup("fit")
    spins, validation = next(iter(data.train_dataloader()))[0], data.val_set.tensors[0]
    found = {name: solve(spins) for name, solve in COUPLINGS.items()}

    def best(candidates):
        losses = [
            negative_log_pseudo_likelihood(local_fields(validation, each), validation).mean() for each in candidates
        ]
        return candidates[int(torch.stack(losses).argmin())]

    floats = [found["ridge"], found["box"]]
    estimates = {
        "one bit": found["signs"],
        "ternary, chosen threshold": found["ternary"],
        "ternary b1.58": best([ternary_b158(couplings, spins) for couplings in floats]),
        "fp32, rounded to ±λ": best([couplings.sign() * couplings.abs().mean() for couplings in floats]),
        "fp32, box": found["box"],
        "fp32, ridge": found["ridge"],
        "best start by validation": best(list(found.values())),
    }
    errors = {
        name: (float(nmse_db(each, data.couplings)), round(512 * (1 - float(sign_accuracy(each, data.couplings)))))
        for name, each in estimates.items()
    }
    print(scale, samples, seed, {name: f"{error:.1f} ({wrong})" for name, (error, wrong) in errors.items()}, flush=True)
    return errors


def ternary_b158(couplings, spins):
    holder = nn.ParameterDict({"weight": nn.Parameter(couplings, requires_grad=False)})
    [target] = resolve_targets(holder, {"weight": None})
    codes = BASELINES["ternary_b158"](target).codes_and_scales(couplings.flatten())[0].reshape(couplings.shape)
    return fit_scale(spins, codes) * codes


def table(figures, scale, cell):
    rows = [
        [name, *(cell([each[name] for each in figures[scale, samples]]) for samples in SAMPLES), f"{bits:,}"]
        for name, bits in BITS.items()
    ]
    return markdown(["", *(f"N = {samples}" for samples in SAMPLES), "bits"], rows)


def decibels(figures):
    mean, deviation = mean_and_deviation([error for error, _ in figures])
    return f"{mean:.1f} ± {deviation:.1f}"


def wrong_signs(figures):
    return f"{statistics.fmean(wrong for _, wrong in figures):.1f}"


def plot(figures, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    for axes, scale in zip(figure.subplots(1, len(SCALES), sharey=True), SCALES, strict=True):
        for name, marker in zip(BITS, MARKERS, strict=False):
            means = [statistics.fmean(each[name][0] for each in figures[scale, samples]) for samples in SAMPLES]
            is_ours = name == "one bit"
            axes.plot(
                SAMPLES,
                means,
                marker=marker,
                color="black" if is_ours else "0.45",
                markerfacecolor="black" if is_ours else "white",
                linewidth=1.6 if is_ours else 0.8,
                label=name,
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(SAMPLES, [str(samples) for samples in SAMPLES])
        axes.set_title(f"λ = {scale}")
        axes.set_xlabel("samples N")
        axes.grid(True, color="0.9")
    figure.axes[0].set_ylabel("coupling error, dB")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize="small")
    save_figure(figure, path)


if __name__ == "__main__":
    main()
