"""The products of the CUDA backend: its kernels in Triton's interpreter, without a device; and whole layers on one."""

import importlib.util
import itertools
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import pibinn_plugin as pb
from pibinn_plugin.kernel import native
from pibinn_plugin.kernel.operators import FUSED, PRODUCT
from pibinn_plugin.packed import _is_small_on_cuda

HAS_TRITON = importlib.util.find_spec("triton") is not None
HAS_DEVICE = torch.cuda.is_available()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture(scope="module")
def kernels():
    """The module of the kernels: for the device where there is one, and else in Triton's interpreter."""
    if not HAS_TRITON:
        pytest.skip("Triton is not installed")
    if HAS_DEVICE:
        from pibinn_plugin.kernel import cuda

        yield cuda
        return
    if "triton" in sys.modules:
        pytest.skip("Triton was imported before, and not for its interpreter")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # read when functions are decorated, those of Triton too, and later
        from pibinn_plugin.kernel import cuda

        interpreter = pytest.importorskip("triton.runtime.interpreter")
        patch_tensor, create_dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

        def patch_tensor_for_new_numpy(tensor, scope):  # which makes no number of an array of one element
            patch_tensor(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

        def values_of(handle):  # the interpreter would multiply the 16 bits of a bfloat16 number, as an integer
            if str(handle.dtype.scalar) != "bf16":
                return handle
            values = (handle.data.astype(np.uint32) << 16).view(np.float32)
            return interpreter.TensorHandle(values, interpreter.tl.float32)

        def dot(self, left, right, *arguments):
            return create_dot(self, values_of(left), values_of(right), *arguments)

        patch.setattr(interpreter, "_patch_lang_tensor", patch_tensor_for_new_numpy)
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
        yield cuda


def reference(x, bits, rows, columns, transposed):
    """The product in float64, block by block, of the bits as numpy unpacks them."""
    inputs = rows if transposed else columns
    blocks = x.shape[-1] // inputs
    flags = np.unpackbits(bits.cpu().numpy(), bitorder="little")[: blocks * rows * columns]
    signs = (flags * 2.0 - 1).reshape(blocks, rows, columns)
    values = x.detach().cpu().double().numpy().reshape(-1, blocks, inputs)
    y = [values[:, b] @ (signs[b] if transposed else signs[b].T) for b in range(blocks)]
    outputs = columns if transposed else rows
    return torch.from_numpy(np.concatenate(y, axis=-1)).reshape(*x.shape[:-1], blocks * outputs)


def check(output, expected, x, scale=1.0):
    """Up to the rounding of a float32 sum, whose terms are as random as its errors, and of the result."""
    assert output.dtype == x.dtype and output.shape == expected.shape and output.is_contiguous()
    norm = x.double().norm(dim=-1).amax().item() if x.numel() else 0.0
    allowed = 8 * 2.0**-24 * x.shape[-1] ** 0.5 * norm * abs(scale) + 2 * ROUNDING[x.dtype] * expected.abs() + 1e-7
    assert ((output.cpu().double() - expected).abs() <= allowed).all()


def make(blocks, rows, columns, batch, dtype, transposed=False):
    device = "cuda" if HAS_DEVICE else "cpu"
    x = torch.randn(*batch, blocks * (rows if transposed else columns), device=device).to(dtype)
    return x, torch.randint(256, (-(-blocks * rows * columns // 8),), dtype=torch.uint8, device=device)


SIZES = st.one_of(st.integers(1, 40), st.sampled_from([32, 64, 96, 128, 136, 256, 544]))
BATCHES = st.sampled_from([(), (1,), (2,), (3,), (4,), (2, 4), (5,), (9,), (2, 1, 8), (17,), (40,), (0,), (3, 0)])


@settings(max_examples=15 if HAS_DEVICE else 30)  # each may compile two kernels
@given(
    st.integers(1, 3), SIZES, SIZES, BATCHES, st.sampled_from(DTYPES), st.booleans(), st.booleans(), st.integers(0, 99)
)
@example(2, 130, 640, (1,), torch.float32, False, True, 0)
@example(1, 33, 1024, (1,), torch.bfloat16, False, False, 0)
@example(2, 256, 130, (3,), torch.float32, True, True, 0)
def test_products_are_those_of_unpacked_signs(kernels, blocks, rows, columns, batch, dtype, transposed, has_bias, seed):
    torch.manual_seed(seed)
    x, bits = make(blocks, rows, columns, batch, dtype, transposed)
    expected = reference(x, bits, rows, columns, transposed)
    check(kernels.sign_product(x, bits, rows, columns, transposed), expected, x)
    bias = torch.randn(expected.shape[-1], device=x.device).to(dtype) if has_bias else None
    expected = -0.7 * expected + (bias.cpu().double() if has_bias else 0)
    scale = torch.tensor([-0.7], dtype=torch.float64, device=x.device).float()
    check(kernels.packed_linear(x, bits, scale, rows, columns, bias, transposed, True), expected, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("width", "height", "inputs", "slots", "warps"),
    [
        *((1, height, 512, 8, warps) for height, warps in ((16, 1), (32, 2), (64, 2), (64, 4), (128, 4), (128, 8))),
        *((2, 64, 512, 4, 2), (4, 32, 512, 4, 1), (8, 64, 512, 4, 4), (16, 64, 512, 4, 4)),
        *((16, 32, 32, 0, 1), (16, 64, 64, 0, 4), (32, 128, 64, 0, 4), (64, 64, 128, 0, 8)),
    ],
)
def test_every_tile_gives_the_same(kernels, dtype, width, height, inputs, slots, warps):
    x, bits = make(2, 150, 640, (5,), dtype)
    tile = kernels.Tile(width, height, inputs, slots, warps, 2)
    check(kernels.multiply(x, bits, 150, 640, False, tile=tile), reference(x, bits, 150, 640, False), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("batch", [1, 20])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), "largest", "low nan"])
def test_infinite_missing_and_huge_inputs_keep_their_meaning(kernels, dtype, transposed, batch, value):
    x, bits = make(2, 40, 40, (batch,), dtype, transposed)
    if value == "low nan":  # whose upper half is that of infinity
        value = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32).item()
        x = x.zero_()
        x.view(torch.int32 if dtype == torch.float32 else torch.int16)[0, 3] = (
            0x7F800001 if dtype == torch.float32 else {torch.bfloat16: 0x7F81, torch.float16: 0x7C01}[dtype]
        )
    else:
        x = x.zero_()
        x[0, 3] = torch.finfo(dtype).max if value == "largest" else value
    y = kernels.sign_product(x, bits, 40, 40, transposed)
    signs = reference(torch.eye(x.shape[1])[3:4], bits, 40, 40, transposed)[0]
    expected = torch.where(signs == 0, 0.0, signs * x[0, 3].cpu().double())  # the other block does not see it
    torch.testing.assert_close(y[0].cpu().double(), expected, rtol=0, atol=0, equal_nan=True)
    assert (y[1:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides_give_what_contiguous_inputs_give(kernels, dtype):
    _, bits = make(3, 7, 12, (1,), dtype)
    wide = torch.randn(4, 36, 7, 2, device=bits.device).to(dtype)
    for x in (wide[..., 0].mT, wide[:, :, 3, 0], wide[1:, :, 3, 1].expand(3, 36), wide[0, :, 0, 0].expand(9, 36)):
        assert torch.equal(kernels.sign_product(x, bits, 7, 12), kernels.sign_product(x.contiguous(), bits, 7, 12))


@pytest.mark.parametrize("offset", [1, 4, 8])
@pytest.mark.parametrize("transposed", [False, True])
def test_bits_may_lie_anywhere(kernels, offset, transposed):
    x, bits = make(2, 64, 128, (2,), torch.float32, transposed)
    moved = torch.cat([bits.new_zeros(offset), bits])[offset:]
    check(kernels.sign_product(x, moved, 64, 128, transposed), reference(x, bits, 64, 128, transposed), x)


@pytest.mark.parametrize("value", [-0.3, 0.0, 1e-45, float("nan")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_parameter_of_the_scale_is_read_as_the_global_scale_reads_it(kernels, value, dtype):
    scale = pb.quantizer.GlobalScale(0.5, dtype=dtype)
    scale.value.data.fill_(value)
    x, bits = make(1, 5, 40, (3,), torch.float32)
    x *= 1e37  # so that a λ which is almost nothing shows
    y = kernels.packed_linear(x, bits, scale.value.to(x.device), 5, 40)
    expected = reference(x, bits, 5, 40, False) * scale().double().item()
    torch.testing.assert_close(y.cpu().double(), expected.detach(), rtol=1e-5, atol=1e-45, equal_nan=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": torch.ones(2, 9)}, "multiple of 8 features, got 9"),
        ({"input": torch.ones(2, 0)}, "multiple of 8 features, got 0"),
        ({"input": torch.ones(2, 8).double()}, "float64"),
        ({"bits": torch.zeros(7, dtype=torch.uint8)}, "64 weights"),
        ({"bits": torch.zeros(8, dtype=torch.int8)}, "uint8"),
        ({"bits": torch.zeros(16, dtype=torch.uint8)[::2]}, "contiguous"),
        ({"scale": torch.ones(2)}, "scale of shape"),
        ({"bias": torch.ones(7)}, "bias of shape"),
        ({"bias": torch.ones(8).half()}, "dtype of the input"),
        ({"bias": torch.ones(8, device="meta")}, "one device"),
        ({"rows": 0}, "at least one row"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(kernels, changes, message):
    given = {"input": torch.ones(2, 8), "bits": torch.zeros(8, dtype=torch.uint8), "scale": torch.ones(1)}
    device = "cuda" if HAS_DEVICE else "cpu"
    given = {**given, "rows": 8, "columns": 8, **changes}
    for name, value in given.items():
        if isinstance(value, torch.Tensor) and not value.is_meta:  # with its strides, which `to` would drop
            there = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
            given[name] = there.copy_(value)
    with pytest.raises(RuntimeError, match=message):
        kernels.packed_linear(**given)


# ------------------------------------------------------------------------------------------------------ what it takes


@pytest.fixture
def fake_device(monkeypatch):
    """Tensors of a device that does not exist, and Triton for it."""
    monkeypatch.setattr(native, "_HAS_TRITON", True)
    monkeypatch.setattr(native, "_multiplies_bfloat16", lambda device: True)
    with FakeTensorMode():
        yield


def arguments(**changes):
    tensors = {"input": (3, 8), "bits": (8,), "scale": (1,), "bias": (8,)}
    made = {name: torch.empty(shape, device="cuda") for name, shape in tensors.items()}
    made["bits"] = torch.empty(8, dtype=torch.uint8, device="cuda")
    return {**made, "layout": (8, 8), **changes}


@pytest.mark.skipif(HAS_DEVICE, reason="for machines without a device")
@pytest.mark.usefixtures("fake_device")
def test_equal_blocks_on_one_device_are_taken_and_nothing_else(monkeypatch):
    assert native.can_run(**arguments())
    assert native.can_run(**arguments(bias=None))
    for name in ("input", "bits", "scale", "bias"):
        assert not native.can_run(**arguments(**{name: arguments()[name].cpu()}))
    index = torch.zeros(9, dtype=torch.int32, device="cpu")
    for layout in (None, ((8,), (8,)), (index, (8, 8)), (2**30, 8), (8, 2**31)):
        assert not native.can_run(**arguments(layout=layout))
    assert not native.can_run(**arguments(input=torch.empty(3, 8, device="cuda", dtype=torch.float64), bias=None))
    monkeypatch.setattr(native, "_multiplies_bfloat16", lambda device: False)
    assert not native.can_run(**arguments())
    monkeypatch.undo()
    assert not native.can_run(**arguments())


@pytest.mark.skipif(HAS_DEVICE, reason="for machines without a device")
@pytest.mark.usefixtures("fake_device")
def test_layouts_of_a_device_are_equal_blocks_in_their_order():
    x, bits, scale = (arguments()[name] for name in ("input", "bits", "scale"))
    permuted = pb.BlockDiagonal(2, row_order=tuple(range(8)), column_order=tuple(range(8)))
    for structure, layout in (
        (pb.Dense(), (8, 8)),
        (pb.BlockDiagonal(2), (4, 4)),
        (pb.BlockDiagonal(rows=(2, 6), columns=(4, 4)), None),
        (pb.Banded(1, 1), None),
        (permuted, None),
    ):
        assert native.layout_for(x, bits, scale, None, structure, (8, 8)) == layout


def test_small_products_read_the_kept_weight_unless_they_are_in_a_graph(monkeypatch):
    x, keeps = SimpleNamespace(is_cuda=True), SimpleNamespace(keeps_weight=True)
    bits = torch.empty(8, dtype=torch.uint8)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert _is_small_on_cuda(x, bits, keeps)
    assert not _is_small_on_cuda(torch.empty(3, 8), bits, keeps)
    assert not _is_small_on_cuda(x, bits, SimpleNamespace(keeps_weight=False))
    assert not _is_small_on_cuda(x, torch.empty(2**23, dtype=torch.uint8), keeps)
    with FakeTensorMode():
        assert not _is_small_on_cuda(x, bits, keeps)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not _is_small_on_cuda(x, bits, keeps)


def test_operators_call_the_kernels(kernels):
    x, bits = make(2, 5, 8, (3,), torch.float32)
    scale, bias = torch.full((1,), 0.5, device=x.device), torch.ones(10, device=x.device)
    y = native._at_first_use("packed_linear")(x, bits, scale, 5, 8, bias)
    torch.testing.assert_close(y.cpu().double(), 0.5 * reference(x, bits, 5, 8, False) + 1)


# -------------------------------------------------------------------------------------------------------- on a device


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_DEVICE, reason="needs a CUDA device")
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_operators_keep_their_contracts_on_a_device():
    for dtype, transposed in itertools.product(DTYPES, (False, True)):
        x, bits = make(2, 24, 40, (3,), dtype, transposed)
        scale = torch.full((1,), 0.5, device="cuda")
        utilities = ("test_schema", "test_faketensor")
        torch.library.opcheck(FUSED[int], (x, bits, scale, 24, 40, None, transposed), test_utils=utilities)
        leaf = x.detach().requires_grad_()
        torch.library.opcheck(PRODUCT[int], (leaf, bits, 24, 40, transposed), test_utils=utilities)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_DEVICE, reason="needs a CUDA device")
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_large_products_reach_beyond_32_bits():
    """More than 2³¹ weights, and more than 2³¹ elements of an input."""
    rows, columns = 2**16, 2**15 + 128
    bits = torch.zeros(rows * columns // 8, dtype=torch.uint8, device="cuda")
    bits[-columns // 8 :] = 255  # the last row
    y = PRODUCT[int](torch.ones(1, columns, device="cuda"), bits, rows, columns)
    assert (y[0, :-1] == -columns).all() and y[0, -1] == columns
    samples = 2**21 + 3
    x = torch.zeros(samples, 1024, dtype=torch.bfloat16, device="cuda")
    x[-1] = 1
    y = PRODUCT[int](x, torch.full((1024 * 8 // 8,), 255, dtype=torch.uint8, device="cuda"), 8, 1024)
    assert (y[-1] == 1024).all() and (y[:-1] == 0).all()
