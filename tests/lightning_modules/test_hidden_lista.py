"""The network against a plain numpy implementation of its formula."""

import numpy as np
import pytest
import torch

import pibinn_plugin as pb
from lightning_modules.solvers.hidden_lista import HiddenLISTA


def convolve(signal, weight):
    """Cross-correlation with zeros beyond the ends; signal (in, length), weight (out, in, kernel)."""
    kernel = weight.shape[2]
    padded = np.pad(signal, ((0, 0), (kernel // 2, kernel // 2)))
    windows = np.stack([padded[:, position : position + kernel] for position in range(signal.shape[1])])
    return np.einsum("oik,pik->op", weight, windows)


def transform(stride, frequencies):
    """DCT-II of a frame by its definition, shape (frequencies, stride)."""
    position, frequency = np.arange(stride), np.arange(frequencies)[:, None]
    basis = np.sqrt(2 / stride) * np.cos(np.pi * frequency * (2 * position + 1) / (2 * stride))
    basis[0] /= np.sqrt(2)
    return basis


def reference(solver, noisy):
    """One epoch at a time, one group at a time; `noisy` has shape (samples,)."""
    tensors = {**dict(solver.named_parameters()), **dict(solver.named_buffers())}
    value = {name: tensor.detach().double().numpy() for name, tensor in tensors.items()}
    value |= {name: weight.squeeze(2) for name, weight in value.items() if name.endswith(".weight")}
    stride, groups, (layers, channels, *_) = solver.stride, solver.groups, value["thresholds"].shape
    basis = value["basis"].T
    np.testing.assert_allclose(basis, transform(stride, value["input_gains"].shape[1]), atol=1e-7)
    spectra = basis @ noisy.reshape(-1, stride).T
    state, artifact = np.zeros((channels, spectra.shape[1])), np.zeros_like(spectra)
    for layer in range(layers):
        seen = value["input_gains"][layer][:, None] * (spectra - artifact)
        total = state + convolve(seen, value[f"input_convolutions.{layer}.weight"])
        if layer:
            size = channels // groups
            weight = value[f"state_convolutions.{layer - 1}.weight"]
            step = value["state_step_sizes"][layer - 1]
            for group in range(groups):
                rows = slice(group * size, (group + 1) * size)
                convolved = step * convolve(state[rows], weight[rows])
                for channel in range(size):
                    total[channel * groups + group] += convolved[channel]
        state = np.maximum(total - value["thresholds"][layer, :, :, 0], 0)
        written = convolve(state, value[f"output_convolutions.{layer}.weight"])
        artifact += value["output_gains"][layer][:, None] * written
    return noisy - (basis.T @ artifact).T.reshape(-1)


@pytest.mark.parametrize("step_sizes", [True, False])
@pytest.mark.parametrize(
    ("channels", "layers", "kernel_size", "stride", "frequencies", "groups"),
    [(12, 4, 9, 16, 8, 4), (6, 2, 5, 4, 4, 2), (5, 3, 3, 2, 1, 1), (4, 1, 1, 8, 3, 4)],
)
def test_agrees_with_numpy(channels, layers, kernel_size, stride, frequencies, groups, step_sizes):
    torch.manual_seed(0)
    solver = HiddenLISTA(channels, layers, kernel_size, stride, frequencies, groups, step_sizes).double()
    noisy = torch.randn(3, 8 * stride, dtype=torch.float64)
    with torch.no_grad():
        solver.thresholds.normal_(std=0.1)
        for name in ("input_gains", "output_gains", "state_step_sizes"):
            getattr(solver, name).normal_()
    expected = np.stack([reference(solver, epoch) for epoch in noisy.numpy()])
    np.testing.assert_allclose(solver(noisy).detach().numpy(), expected, atol=1e-12)


def test_artifacts_beyond_the_kept_frequencies_are_left_alone():
    torch.manual_seed(0)
    solver = HiddenLISTA(channels=8, layers=3, stride=16, frequencies=5, groups=2)
    with torch.no_grad():
        solver.thresholds.zero_()
    high = torch.randn(2, 4, 11) @ torch.from_numpy(transform(16, 16)[5:]).float()
    torch.testing.assert_close(solver(high.flatten(1)), high.flatten(1), atol=1e-5, rtol=0)
    noisy = torch.randn(2, 64)
    difference = (noisy - solver(noisy)).unflatten(1, (4, 16)) @ torch.from_numpy(transform(16, 16)).float().T
    assert difference[..., 5:].abs().max() < 1e-5 < difference[..., :5].abs().min()


def test_step_sizes_do_not_change_the_initial_function():
    torch.manual_seed(0)
    learned = HiddenLISTA(8, 3)
    torch.manual_seed(0)
    fixed = HiddenLISTA(8, 3, step_sizes=False)
    noisy = torch.randn(2, 64)
    torch.testing.assert_close(learned(noisy), fixed(noisy), rtol=0, atol=0)


def test_gains_begin_coarse_and_end_fine():
    solver = HiddenLISTA(layers=5, frequencies=4)
    frequency, layer = torch.arange(1.0, 5), torch.arange(1.0, 6)
    seen, written = solver.input_gains.detach(), solver.output_gains.detach()
    torch.testing.assert_close(seen[0] / seen[0, 0], frequency)
    torch.testing.assert_close(seen[4], seen[4, :1].expand(4))
    torch.testing.assert_close(written[0] / written[0, 0], frequency**-3)
    torch.testing.assert_close(written[4] / written[4, 0], 1 / frequency)
    torch.testing.assert_close(written[:, 0] / written[0, 0], layer**-0.5)


@pytest.mark.parametrize("step_sizes", [True, False])
def test_all_weights_begin_at_one_magnitude(step_sizes):
    parameters = HiddenLISTA(step_sizes=step_sizes).named_parameters()
    magnitudes = torch.stack([weight.abs().mean() for name, weight in parameters if name.endswith("weight")])
    torch.testing.assert_close(magnitudes, magnitudes.mean().expand_as(magnitudes), rtol=0.05, atol=0)


def test_only_convolutions_are_named_weight_and_hold_structural_weights_only():
    solver = HiddenLISTA(channels=8, layers=3, kernel_size=5, stride=4, frequencies=3, groups=2)
    shapes = {name: tuple(parameter.shape) for name, parameter in solver.named_parameters() if name.endswith(".weight")}
    assert shapes == {
        **{f"input_convolutions.{layer}.weight": (8, 3, 1, 5) for layer in range(3)},
        **{f"state_convolutions.{layer}.weight": (8, 4, 1, 5) for layer in range(2)},
        **{f"output_convolutions.{layer}.weight": (3, 8, 1, 5) for layer in range(3)},
    }


def test_without_step_sizes_thresholds_are_all_that_is_learned_and_kept_besides_weights():
    solver = HiddenLISTA(step_sizes=False)
    assert [name for name in solver.state_dict() if not name.endswith(".weight")] == ["thresholds"]
    assert [name for name, _ in solver.named_parameters() if not name.endswith(".weight")] == ["thresholds"]


def test_default_file_of_one_bit_weights_is_within_27_kilobytes(tmp_path):
    solver = HiddenLISTA()
    pb.prepare(solver, {"*_convolution*.weight": None})
    pb.save(pb.convert(solver), tmp_path / "solver.safetensors")
    assert (tmp_path / "solver.safetensors").stat().st_size <= 27_000


def test_every_parameter_gets_a_gradient():
    torch.manual_seed(0)
    solver = HiddenLISTA(channels=16, layers=3)
    solver(torch.randn(4, 256)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in solver.parameters())


@pytest.mark.parametrize("shape", [(3, 500), (3, 0), (512,), (3, 1, 512)])
def test_unfit_input_is_refused_and_named(shape):
    with pytest.raises(ValueError, match="stride, 16") as error:
        HiddenLISTA(channels=4, layers=1)(torch.zeros(shape))
    assert str(shape) in str(error.value)


@pytest.mark.parametrize(
    "arguments", [{"channels": 10}, {"kernel_size": 4}, {"layers": 0}, {"stride": -1}, {"frequencies": 17}]
)
def test_unfit_arguments_are_refused_and_named(arguments):
    (name, value), *_ = arguments.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        HiddenLISTA(**arguments)
