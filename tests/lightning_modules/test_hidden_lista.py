"""The network against a plain numpy implementation of its formula."""

import numpy as np
import pytest
import torch

from lightning_modules.solvers.hidden_lista import HiddenLISTA


def convolve(signal, weight):
    """Cross-correlation with zeros beyond the ends; signal (in, length), weight (out, in, kernel)."""
    kernel = weight.shape[2]
    padded = np.pad(signal, ((0, 0), (kernel // 2, kernel // 2)))
    windows = np.stack([padded[:, position : position + kernel] for position in range(signal.shape[1])])
    return np.einsum("oik,pik->op", weight, windows)


def reference(solver, noisy):
    """One epoch at a time, one group at a time; `noisy` has shape (samples,)."""
    value = {name: parameter.detach().double().numpy() for name, parameter in solver.named_parameters()}
    value |= {name: weight.squeeze(2) for name, weight in value.items() if name.endswith(".weight")}
    stride, groups, (layers, channels, *_) = solver.stride, solver.groups, value["thresholds"].shape
    phases = np.stack([noisy[phase::stride] for phase in range(stride)])
    state = np.zeros((channels, phases.shape[1]))
    for layer in range(layers):
        step = value.get("input_step_sizes", np.ones(layers))[layer]
        total = state + step * convolve(phases, value[f"input_convolutions.{layer}.weight"])
        if layer:
            size = channels // groups
            weight = value[f"state_convolutions.{layer - 1}.weight"]
            step = value.get("state_step_sizes", np.ones(layers - 1))[layer - 1]
            for group in range(groups):
                rows = slice(group * size, (group + 1) * size)
                convolved = step * convolve(state[rows], weight[rows])
                for channel in range(size):
                    total[channel * groups + group] += convolved[channel]
        state = np.maximum(total - value["thresholds"][layer, :, :, 0], 0)
    artifact = value.get("output_step_size", np.ones(1)) * convolve(state, value["output_convolution.weight"])
    return noisy - np.stack([artifact[n % stride, n // stride] for n in range(len(noisy))])


@pytest.mark.parametrize("step_sizes", [True, False])
@pytest.mark.parametrize(
    ("channels", "layers", "kernel_size", "stride", "groups"),
    [(12, 4, 9, 16, 4), (6, 2, 5, 4, 2), (5, 3, 3, 2, 1), (4, 1, 1, 8, 4)],
)
def test_agrees_with_numpy(channels, layers, kernel_size, stride, groups, step_sizes):
    torch.manual_seed(0)
    solver = HiddenLISTA(channels, layers, kernel_size, stride, groups, step_sizes).double()
    with torch.no_grad():
        solver.thresholds.normal_(std=0.1)
    noisy = torch.randn(3, 8 * stride, dtype=torch.float64)
    expected = np.stack([reference(solver, epoch) for epoch in noisy.numpy()])
    np.testing.assert_allclose(solver(noisy).detach().numpy(), expected, atol=1e-12)


def test_step_sizes_do_not_change_the_initial_function():
    torch.manual_seed(0)
    with_steps = HiddenLISTA(8, 3)
    torch.manual_seed(0)
    without = HiddenLISTA(8, 3, step_sizes=False)
    noisy = torch.randn(2, 64)
    torch.testing.assert_close(with_steps(noisy), without(noisy))


def test_with_step_sizes_all_weights_begin_at_one_magnitude():
    weights = [parameter for name, parameter in HiddenLISTA().named_parameters() if name.endswith("weight")]
    magnitudes = torch.stack([weight.abs().mean() for weight in weights])
    torch.testing.assert_close(magnitudes, magnitudes.mean().expand_as(magnitudes), rtol=0.05, atol=0)


def test_only_convolutions_are_named_weight_and_hold_structural_weights_only():
    solver = HiddenLISTA(channels=8, layers=3, kernel_size=5, stride=4, groups=2)
    shapes = {name: tuple(parameter.shape) for name, parameter in solver.named_parameters() if name.endswith(".weight")}
    assert shapes == {
        **{f"input_convolutions.{layer}.weight": (8, 4, 1, 5) for layer in range(3)},
        **{f"state_convolutions.{layer}.weight": (8, 4, 1, 5) for layer in range(2)},
        "output_convolution.weight": (4, 8, 1, 5),
    }


def test_without_step_sizes_thresholds_are_the_only_other_parameters():
    names = [name for name, _ in HiddenLISTA(step_sizes=False).named_parameters() if not name.endswith(".weight")]
    assert names == ["thresholds"]


def test_default_size_in_one_bit_weights_is_within_27_kilobytes():
    parameters = dict(HiddenLISTA().named_parameters())
    bits = sum(parameter.numel() for name, parameter in parameters.items() if name.endswith(".weight"))
    floats = 1 + sum(parameter.numel() for name, parameter in parameters.items() if not name.endswith(".weight"))
    header = 2300
    assert bits / 8 + 4 * floats + header <= 27_000


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


@pytest.mark.parametrize("arguments", [{"channels": 10}, {"kernel_size": 4}, {"layers": 0}, {"stride": -1}])
def test_unfit_arguments_are_refused_and_named(arguments):
    (name, value), *_ = arguments.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        HiddenLISTA(**arguments)
