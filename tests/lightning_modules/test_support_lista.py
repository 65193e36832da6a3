"""The transform against its definition, the network against a plain implementation of its formula."""

import math

import numpy as np
import pytest
import torch

import pibinn_plugin as pb
from lightning_modules.block_patterns import BlockPatterns
from lightning_modules.solvers.support_lista import BlockTransform, SupportLISTA


def cosine(size):
    """The matrix of the orthonormal DCT-II, from its definition."""
    rows = [[math.cos(math.pi * (2 * n + 1) * k / (2 * size)) for n in range(size)] for k in range(size)]
    matrix = np.array(rows) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def analyse(image, size, stride):
    """Coefficients (size², rows, columns) of all blocks of an image (height, width), block by block."""
    margin = size - stride
    pads = [(margin, margin + -extent % stride) for extent in image.shape]
    padded, transform = np.pad(image, pads, mode="reflect"), cosine(size)
    rows, columns = ((extent - size) // stride + 1 for extent in padded.shape)
    result = np.zeros((size**2, rows, columns))
    for row in range(rows):
        for column in range(columns):
            block = padded[row * stride : row * stride + size, column * stride : column * stride + size]
            result[:, row, column] = (transform @ block @ transform.T).ravel()
    return result


def average(coefficients, size, stride, shape):
    """Images as the mean, pixel by pixel, of all transformed blocks."""
    margin, transform = size - stride, cosine(size)
    _, rows, columns = coefficients.shape
    total = np.zeros(((rows - 1) * stride + size, (columns - 1) * stride + size))
    for row in range(rows):
        for column in range(columns):
            block = transform.T @ coefficients[:, row, column].reshape(size, size) @ transform
            total[row * stride : row * stride + size, column * stride : column * stride + size] += block
    return total[margin : margin + shape[0], margin : margin + shape[1]] / (size // stride) ** 2


def convolve(state, weight):
    """Cross-correlation with zeros beyond the rim; state (in, height, width), weight (out, in, kernel, kernel)."""
    reach = weight.shape[2] // 2
    padded = np.pad(state, ((0, 0), (reach, reach), (reach, reach)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, weight.shape[2:], axis=(1, 2))
    return np.einsum("oikl,ihwkl->ohw", weight, windows)


class Identity:
    """The operator of denoising."""

    A = A_dagger = linear_estimate = staticmethod(lambda values: values)


def reference(solver, y):
    """The iteration of the docstring on one measurement, in numpy."""
    value = {name: parameter.detach().numpy() for name, parameter in solver.named_parameters()}
    transform, (stages, *_) = solver.transform, value["log_thresholds"].shape
    size, stride = transform.size, transform.stride
    operator = solver.operator or Identity()

    def apply(method, values):
        return method(torch.from_numpy(values)[None]).numpy()[0]

    x, state = apply(operator.linear_estimate, y)[0], None
    for stage in range(stages):
        moved = x + value["gradient_step_sizes"][stage] * apply(operator.A_dagger, y - apply(operator.A, x[None]))[0]
        pilot = analyse(moved + value["pilot_weights"][stage] * (x - moved), size, stride)
        thresholds = np.concatenate([np.full((1, 1, 1), -4.0), value["log_thresholds"][stage]])
        log_odds = 4 * (0.5 * np.log(pilot**2 + 1e-8) - thresholds)
        if solver.channels:
            for layer in range(stage * solver.layers, (stage + 1) * solver.layers):
                seen = value["input_step_sizes"][stage] * np.tanh(log_odds / 2)
                first = (layer - stage * solver.layers) * solver.channels
                weight = value[f"inputs.{stage}.weight"][first : first + solver.channels]
                total = convolve(seen, weight) - value["state_thresholds"][layer]
                if state is not None:
                    weight = value["state_step_sizes"][layer - 1] * value[f"states.{layer - 1}.weight"]
                    total = total + state + convolve(state, weight)
                state = np.maximum(total, 0)
            weight = value["output_step_sizes"][stage] * value[f"outputs.{stage}.weight"]
            log_odds = log_odds + convolve(state, weight)
        x = average(analyse(moved, size, stride) / (1 + np.exp(-log_odds)), size, stride, x.shape)
    return x


@pytest.mark.parametrize(("size", "stride", "height", "width"), [(8, 2, 13, 10), (4, 4, 8, 12), (4, 1, 7, 5)])
def test_transform_agrees_with_its_definition(size, stride, height, width):
    torch.manual_seed(0)
    transform, image = BlockTransform(size, stride).double(), torch.rand(1, 1, height, width, dtype=torch.float64)
    coefficients = transform.analyse(image)
    np.testing.assert_allclose(coefficients[0].numpy(), analyse(image[0, 0].numpy(), size, stride), atol=1e-6)
    changed = torch.tanh(coefficients)
    expected = average(changed[0].numpy(), size, stride, (height, width))
    np.testing.assert_allclose(transform.average(changed, height, width)[0, 0].numpy(), expected, atol=1e-6)
    torch.testing.assert_close(transform.average(coefficients, height, width), image, atol=1e-6, rtol=0)


@pytest.mark.parametrize("channels", [0, 5])
@pytest.mark.parametrize("operator", [None, BlockPatterns(block_size=8, measurements=12)])
def test_agrees_with_numpy(operator, channels):
    torch.manual_seed(0)
    solver = SupportLISTA(operator, stages=3, layers=2, channels=channels, size=4, stride=2).double()
    with torch.no_grad():
        for parameter in solver.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    y = torch.rand(2, 1, 9, 14) if operator is None else operator.A(torch.rand(2, 1, 8, 16, dtype=torch.float64))
    y = y.double()
    expected = np.stack([reference(solver, image) for image in y.numpy()])
    np.testing.assert_allclose(solver(y)[:, 0].detach().numpy(), expected, atol=1e-6)


def test_untrained_it_removes_noise():
    torch.manual_seed(0)
    clean = torch.linspace(0, 1, 64).expand(1, 1, 64, 64)
    noisy = clean + 25 / 255 * torch.randn(clean.shape)
    estimate = SupportLISTA(channels=0)(noisy)
    assert (estimate - clean).square().mean() < 0.05 * (noisy - clean).square().mean()


def test_one_bit_weights_of_the_default_size_take_less_than_8_kilobytes(tmp_path):
    path = pb.save(pb.convert(pb.prepare(SupportLISTA(), {"*.weight": None})), tmp_path / "solver.safetensors")
    assert path.stat().st_size <= 8000


def test_packed_solver_computes_the_same():
    torch.manual_seed(0)
    solver = pb.prepare(SupportLISTA(stages=2, layers=2, channels=4), {"*.weight": None})
    noisy = torch.rand(1, 1, 20, 24)
    torch.testing.assert_close(pb.convert(solver)(noisy), solver(noisy), atol=1e-5, rtol=1e-5)


def test_every_parameter_gets_a_finite_gradient():
    torch.manual_seed(0)
    operator = BlockPatterns(block_size=8, measurements=16)
    solver = SupportLISTA(operator, stages=3, layers=1, channels=4)
    solver(operator.A(torch.rand(2, 1, 32, 32))).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in solver.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert [name for name, gradient in gradients.items() if not gradient.any()] == []


def test_constant_images_have_finite_gradients():
    solver = SupportLISTA(stages=2, layers=1, channels=4)
    solver(torch.zeros(1, 1, 16, 16)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in solver.parameters())


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 2, 16, 16), (1, 1, 16, 7)])
def test_unfit_images_are_refused_and_named(shape):
    with pytest.raises(ValueError, match="at least 8 by 8") as error:
        SupportLISTA(channels=0)(torch.zeros(shape))
    assert str(shape) in str(error.value)


@pytest.mark.parametrize(
    "arguments", [{"stages": 0}, {"layers": 0}, {"channels": -1}, {"stride": 3}, {"threshold": (0.1, 0.0)}]
)
def test_unfit_arguments_are_refused_and_named(arguments):
    (name, value), *_ = arguments.items()
    with pytest.raises(ValueError) as error:
        SupportLISTA(**arguments)
    assert f"{name}={value}" in str(error.value)
