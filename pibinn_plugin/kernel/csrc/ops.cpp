// The torch operators, through the stable ABI: one shared object for every torch from 2.11 on.

#include "dispatch.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

namespace pibinn {
namespace {

#include "scalars.inc"

namespace stable = torch::stable;
using stable::detail::to;

constexpr int64_t MOST_INT8_INPUTS = 1 << 24;  // sums of so many stay within 32 bits

struct Delete {
  void operator()(AtenTensorOpaque* tensor) const { aoti_torch_delete_tensor_object(tensor); }
};
// Handles and not stable::Tensor, whose shared ownership costs an allocation a tensor: a small product takes 1 µs.
using Handle = std::unique_ptr<AtenTensorOpaque, Delete>;

Handle take_tensor(StableIValue value) { return Handle(to<AtenTensorHandle>(value)); }

Handle take_optional_tensor(StableIValue value) {
  const auto tensor = to<std::optional<AtenTensorHandle>>(value);
  return Handle(tensor ? *tensor : nullptr);
}

void check(AOTITorchError error) { STABLE_TORCH_ERROR_CODE_CHECK(error); }

int32_t dtype_of(const Handle& tensor) {
  int32_t dtype;
  check(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

char* data_of(const Handle& tensor) {
  void* data;
  check(aoti_torch_get_data_ptr(tensor.get(), &data));
  return static_cast<char*>(data);
}

struct Dimensions {
  int64_t count;
  int64_t *sizes, *strides;

  explicit Dimensions(const Handle& tensor) {
    check(aoti_torch_get_dim(tensor.get(), &count));
    check(aoti_torch_get_sizes(tensor.get(), &sizes));
    check(aoti_torch_get_strides(tensor.get(), &strides));
  }

  bool is_contiguous() const {
    int64_t expected = 1;
    for (int64_t i = count - 1; i >= 0; i--) {
      if (sizes[i] != 1 && strides[i] != expected) return false;
      expected *= sizes[i];
    }
    return true;
  }

  // Whether the samples lie at one distance from each other, and the elements of each side by side.
  bool is_rows() const { return is_contiguous() || (count == 2 && strides[1] == 1); }
};

Scalar scalar_of(int32_t dtype) {
  static const int32_t float32 = aoti_torch_dtype_float32(), bfloat16 = aoti_torch_dtype_bfloat16(),
                       float16 = aoti_torch_dtype_float16();
  if (dtype == float32) return Scalar::float32;
  if (dtype == bfloat16) return Scalar::bfloat16;
  STD_TORCH_CHECK(dtype == float16, "pibinn: expected float32, bfloat16 or float16");
  return Scalar::float16;
}

// λ, or what GlobalScale makes of its parameter: never negative, at least the smallest (subnormal) number of its dtype.
float value_of(const Handle& scale, bool absolute) {
  const Dimensions dimensions(scale);
  STD_TORCH_CHECK(dimensions.count == 1 && dimensions.sizes[0] == 1, "pibinn: expected a scale of shape (1,)");
  const Scalar scalar = scalar_of(dtype_of(scale));
  float value;
  read_floats(scalar, data_of(scale), 0, 1, &value);
  const float smallest = scalar == Scalar::float16 ? 0x1p-24f : scalar == Scalar::bfloat16 ? 0x1p-133f : 0x1p-149f;
  return absolute ? std::max(std::abs(value), smallest) : value;
}

// For sizes that come from a caller: without an overflow.
int64_t multiply(int64_t a, int64_t b) {
  int64_t result;
  STD_TORCH_CHECK(!__builtin_mul_overflow(a, b, &result), "pibinn: ", a, " times ", b, " does not fit 64 bits");
  return result;
}

int64_t add(int64_t a, int64_t b) {
  int64_t result;
  STD_TORCH_CHECK(!__builtin_add_overflow(a, b, &result), "pibinn: ", a, " plus ", b, " does not fit 64 bits");
  return result;
}

// A weight, transposed or not: how many inputs and outputs it has, and the most inputs that are summed.
struct Weight {
  int64_t inputs = 0, outputs = 0, most_inputs = 0;

  Weight(const std::vector<Block>& blocks, bool transposed) {
    for (const Block& block : blocks) {
      inputs += block.inputs(transposed);
      outputs += block.outputs(transposed);
      most_inputs = std::max(most_inputs, block.inputs(transposed));
    }
  }

  Weight(const SparseRows& rows, bool transposed)
      : inputs(transposed ? rows.row_count : rows.column_count),
        outputs(transposed ? rows.column_count : rows.row_count),
        most_inputs(inputs) {}
};

void check_bits(const Handle& bits, int64_t weights) {
  const Dimensions given(bits);
  const int64_t bytes = weights / 8 + (weights % 8 != 0);
  STD_TORCH_CHECK(dtype_of(bits) == aoti_torch_dtype_uint8() && given.is_contiguous() && given.count == 1 &&
                      given.sizes[0] == bytes,
                  "pibinn: expected the bits of ", weights, " weights, which the input and the sizes make: uint8, ",
                  "contiguous, of shape (", bytes, ",)");
}

// S x for the sign matrix of these blocks or rows, whose bits were checked, times the scale, plus the bias; null stands
// for 1 and 0. With activation scales, one a sample, x is rounded to int8 multiples of them.
template <typename Layout>
AtenTensorHandle product(Handle input, const Handle& bits, const Handle& scale, const Handle& activation_scales,
                         const Handle& bias, const Layout& layout, bool transposed, bool absolute_scale) {
  const Weight weight(layout, transposed);
  Dimensions given(input);
  STD_TORCH_CHECK(given.count > 0 && given.sizes[given.count - 1] == weight.inputs, "pibinn: expected an input of ",
                  weight.inputs, " features, got ", given.count ? given.sizes[given.count - 1] : 0);
  const int32_t dtype = dtype_of(input);
  std::vector<int64_t> sizes(given.sizes, given.sizes + given.count), strides(given.count);
  sizes.back() = weight.outputs;

  Problem problem;
  problem.scalar = scalar_of(dtype);
  problem.samples = 1;
  for (int64_t i = given.count - 1, stride = 1; i >= 0; i--) {
    strides[i] = stride;
    stride = multiply(stride, sizes[i]);
    if (i < given.count - 1) problem.samples = multiply(problem.samples, sizes[i]);
  }
  problem.scale = scale ? value_of(scale, absolute_scale) : 1.0f;
  problem.transposed = transposed;
  problem.activation_scales = nullptr;
  if (activation_scales) {
    const Dimensions scales(activation_scales);
    int64_t count = 1;
    for (int64_t i = 0; i < scales.count; i++) count *= scales.sizes[i];
    STD_TORCH_CHECK(scalar_of(dtype_of(activation_scales)) == Scalar::float32 && scales.is_contiguous() &&
                        count == problem.samples && weight.most_inputs < MOST_INT8_INPUTS,
                    "pibinn: expected ", problem.samples, " activation scales, contiguous, in float32, and fewer than ",
                    MOST_INT8_INPUTS, " columns in a block");
    problem.activation_scales = reinterpret_cast<const float*>(data_of(activation_scales));
  }
  problem.bias = nullptr;
  if (bias) {
    const Dimensions shape(bias);
    STD_TORCH_CHECK(
        dtype_of(bias) == dtype && shape.count == 1 && shape.sizes[0] == weight.outputs && shape.is_contiguous(),
        "pibinn: expected a bias of shape (", weight.outputs, ",), contiguous, of the dtype of the input");
    problem.bias = data_of(bias);
  }

  AtenTensorHandle result;
  check(aoti_torch_empty_strided(given.count, sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &result));
  Handle output(result);
  if (problem.samples == 0 || weight.outputs == 0) return output.release();
  if (!given.is_rows()) {
    AtenTensorHandle copy;
    check(aoti_torch_new_tensor_handle(stable::contiguous(stable::Tensor(input.release())).get(), &copy));
    input.reset(copy);
    given = Dimensions(input);
  }
  problem.bits = reinterpret_cast<const uint8_t*>(data_of(bits));
  problem.bytes = Dimensions(bits).sizes[0];
  problem.input = data_of(input);
  problem.output = data_of(output);
  problem.input_stride = given.is_contiguous() ? weight.inputs : given.strides[0];
  problem.output_stride = weight.outputs;
  compute(*chosen_path(), problem, layout);
  return output.release();
}

std::vector<Block> take_even_blocks(const Handle& input, const Handle& bits, StableIValue rows_value,
                                    StableIValue columns_value, bool transposed) {
  const int64_t rows = to<int64_t>(rows_value), columns = to<int64_t>(columns_value);
  STD_TORCH_CHECK(rows > 0 && columns > 0, "pibinn: expected blocks of at least one row and one column, got ", rows,
                  " and ", columns);
  const Dimensions given(input);
  const int64_t features = given.count > 0 ? given.sizes[given.count - 1] : 0, inputs = transposed ? rows : columns;
  STD_TORCH_CHECK(features > 0 && features % inputs == 0, "pibinn: expected an input with a multiple of ", inputs,
                  " features, got ", features);
  const int64_t count = features / inputs;
  check_bits(bits, multiply(count, multiply(rows, columns)));  // before there is a block for each
  return even_blocks(count, rows, columns, transposed);
}

std::vector<Block> take_uneven_blocks(const Handle& bits, StableIValue rows_value, StableIValue columns_value,
                                      bool transposed) {
  const auto rows = to<std::vector<int64_t>>(rows_value), columns = to<std::vector<int64_t>>(columns_value);
  STD_TORCH_CHECK(rows.size() == columns.size(), "pibinn: expected as many rows as columns, got ", rows.size(), " and ",
                  columns.size());
  int64_t weights = 0, row_count = 0, column_count = 0;
  for (size_t b = 0; b < rows.size(); b++) {
    STD_TORCH_CHECK(rows[b] >= 0 && columns[b] >= 0, "pibinn: expected blocks of no negative size, got ", rows[b],
                    " rows and ", columns[b], " columns");
    weights = add(weights, multiply(rows[b], columns[b]));
    row_count = add(row_count, rows[b]);
    column_count = add(column_count, columns[b]);
  }
  check_bits(bits, weights);
  return uneven_blocks(rows, columns, transposed);
}

// Whether all numbers lie in 0 ... end - 1, for an end of at least 1. The sign bits of each number and of its distance
// to the last one are gathered: without a branch, and in vectors on every processor.
bool are_below(const int32_t* numbers, int64_t count, int64_t end) {
  const uint32_t last = static_cast<uint32_t>(std::min<int64_t>(end - 1, INT32_MAX));
  uint32_t signs = 0;
  for (int64_t i = 0; i < count; i++) {
    const uint32_t number = static_cast<uint32_t>(numbers[i]);
    signs |= number | (last - number);
  }
  return signs <= INT32_MAX;
}

// Looks at every number of an index, which takes a tenth to a fifth of the time of a product with one sample.
void check_index(const SparseRows& rows) {
  const int64_t nonzeros = rows.starts[rows.row_count];
  STD_TORCH_CHECK(std::is_sorted(rows.starts, rows.starts + rows.row_count + 1),
                  "pibinn: expected an index in which no row starts before the one before it");
  STD_TORCH_CHECK(are_below(rows.columns, nonzeros, rows.column_count), "pibinn: expected an index of ",
                  rows.column_count, " columns, got one that names others");
  STD_TORCH_CHECK(!rows.order || are_below(rows.order, nonzeros, nonzeros), "pibinn: expected an index of ", nonzeros,
                  " bits, got one that names others");
}

// The index is starts, columns and, unless bits lie by row, their order, one after the other.
template <bool Checked>
SparseRows take_sparse_rows(const Handle& bits, const Handle& index, StableIValue shape_value) {
  const auto shape = to<std::vector<int64_t>>(shape_value);
  const Dimensions given(index);
  STD_TORCH_CHECK(shape.size() == 2 && shape[0] > 0 && shape[1] > 0 && dtype_of(index) == aoti_torch_dtype_int32() &&
                      given.count == 1 && given.is_contiguous() && given.sizes[0] > shape[0],
                  "pibinn: expected the shape of a matrix, and its index in int32, contiguous");
  const auto* starts = reinterpret_cast<const int32_t*>(data_of(index));
  const int64_t nonzeros = starts[shape[0]], rest = given.sizes[0] - shape[0] - 1;
  STD_TORCH_CHECK(starts[0] == 0 && nonzeros > 0 && (rest == nonzeros || rest == 2 * nonzeros),
                  "pibinn: expected an index of ", shape[0], " rows, got one of another number");
  check_bits(bits, nonzeros);
  const int32_t* columns = starts + shape[0] + 1;
  const SparseRows rows{starts, columns, rest == nonzeros ? nullptr : columns + nonzeros, shape[0], shape[1]};
  if (Checked) check_index(rows);
  return rows;
}

// Every handle is taken before anything can throw: what is taken is also given back.

template <bool Even>
void packed_linear(StableIValue* stack, uint64_t, uint64_t) {
  Handle input = take_tensor(stack[0]);
  const Handle bits = take_tensor(stack[1]), scale = take_tensor(stack[2]), bias = take_optional_tensor(stack[5]);
  const bool transposed = to<bool>(stack[6]), signed_scale = to<bool>(stack[7]);
  const auto blocks = Even ? take_even_blocks(input, bits, stack[3], stack[4], transposed)
                           : take_uneven_blocks(bits, stack[3], stack[4], transposed);
  stack[0] = stable::detail::from(product(std::move(input), bits, scale, nullptr, bias, blocks, transposed, !signed_scale));
}

template <bool Checked>
void packed_linear_sparse(StableIValue* stack, uint64_t, uint64_t) {
  Handle input = take_tensor(stack[0]);
  const Handle bits = take_tensor(stack[1]), scale = take_tensor(stack[2]), index = take_tensor(stack[3]);
  const Handle bias = take_optional_tensor(stack[5]);
  const bool transposed = to<bool>(stack[6]), signed_scale = to<bool>(stack[7]);
  const SparseRows rows = take_sparse_rows<Checked>(bits, index, stack[4]);
  stack[0] =
      stable::detail::from(product(std::move(input), bits, scale, nullptr, bias, rows, transposed, !signed_scale));
}

template <bool Even>
void packed_linear_int8(StableIValue* stack, uint64_t, uint64_t) {
  Handle input = take_tensor(stack[0]);
  const Handle bits = take_tensor(stack[1]), scale = take_tensor(stack[2]), activation_scales = take_tensor(stack[3]);
  const Handle bias = take_optional_tensor(stack[6]);
  const auto blocks =
      Even ? take_even_blocks(input, bits, stack[4], stack[5], false)
           : take_uneven_blocks(bits, stack[4], stack[5], false);
  stack[0] =
      stable::detail::from(product(std::move(input), bits, scale, activation_scales, bias, blocks, false, false));
}

template <bool Even>
void sign_product(StableIValue* stack, uint64_t, uint64_t) {
  Handle input = take_tensor(stack[0]);
  const Handle bits = take_tensor(stack[1]);
  const bool transposed = to<bool>(stack[4]);
  const auto blocks = Even ? take_even_blocks(input, bits, stack[2], stack[3], transposed)
                           : take_uneven_blocks(bits, stack[2], stack[3], transposed);
  stack[0] = stable::detail::from(product(std::move(input), bits, nullptr, nullptr, nullptr, blocks, transposed, false));
}

template <bool Checked>
void sign_product_sparse(StableIValue* stack, uint64_t, uint64_t) {
  Handle input = take_tensor(stack[0]);
  const Handle bits = take_tensor(stack[1]), index = take_tensor(stack[2]);
  const bool transposed = to<bool>(stack[4]);
  const SparseRows rows = take_sparse_rows<Checked>(bits, index, stack[3]);
  stack[0] = stable::detail::from(product(std::move(input), bits, nullptr, nullptr, nullptr, rows, transposed, false));
}

}  // namespace
}  // namespace pibinn

// packed_linear has the scale and the bias in it and no gradient; sign_product is linear and has one, given in Python.
// packed_linear_int8 rounds each sample to int8 multiples of its activation scale; its scale is a signed one.
// Rows and columns are those of each block; index and shape are those of a matrix of any pattern. Unchecked: the
// numbers of the index are taken to lie within the matrix, as they do where sparse_rows made it. An unsigned scale is
// what GlobalScale makes of its parameter. What has a default is last: each argument that a call passes costs as much
// as a hundred multiply-adds.
STABLE_TORCH_LIBRARY(pibinn, m) {
  m.def(
      "packed_linear(Tensor input, Tensor bits, Tensor scale, int rows, int columns, Tensor? bias=None, "
      "bool transposed=False, bool signed_scale=False) -> Tensor");
  m.def(
      "packed_linear.uneven(Tensor input, Tensor bits, Tensor scale, int[] rows, int[] columns, Tensor? bias=None, "
      "bool transposed=False, bool signed_scale=False) -> Tensor");
  m.def(
      "packed_linear.sparse(Tensor input, Tensor bits, Tensor scale, Tensor index, int[] shape, Tensor? bias=None, "
      "bool transposed=False, bool signed_scale=False) -> Tensor");
  m.def(
      "packed_linear.sparse_unchecked(Tensor input, Tensor bits, Tensor scale, Tensor index, int[] shape, "
      "Tensor? bias=None, bool transposed=False, bool signed_scale=False) -> Tensor");
  m.def(
      "packed_linear_int8(Tensor input, Tensor bits, Tensor scale, Tensor activation_scales, int rows, int columns, "
      "Tensor? bias=None) -> Tensor");
  m.def(
      "packed_linear_int8.uneven(Tensor input, Tensor bits, Tensor scale, Tensor activation_scales, int[] rows, "
      "int[] columns, Tensor? bias=None) -> Tensor");
  m.def("sign_product(Tensor input, Tensor bits, int rows, int columns, bool transposed=False) -> Tensor");
  m.def("sign_product.uneven(Tensor input, Tensor bits, int[] rows, int[] columns, bool transposed=False) -> Tensor");
  m.def("sign_product.sparse(Tensor input, Tensor bits, Tensor index, int[] shape, bool transposed=False) -> Tensor");
  m.def(
      "sign_product.sparse_unchecked(Tensor input, Tensor bits, Tensor index, int[] shape, bool transposed=False) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pibinn, CPU, m) {
  m.impl("packed_linear", &pibinn::packed_linear<true>);
  m.impl("packed_linear.uneven", &pibinn::packed_linear<false>);
  m.impl("packed_linear.sparse", &pibinn::packed_linear_sparse<true>);
  m.impl("packed_linear.sparse_unchecked", &pibinn::packed_linear_sparse<false>);
  m.impl("packed_linear_int8", &pibinn::packed_linear_int8<true>);
  m.impl("packed_linear_int8.uneven", &pibinn::packed_linear_int8<false>);
  m.impl("sign_product", &pibinn::sign_product<true>);
  m.impl("sign_product.uneven", &pibinn::sign_product<false>);
  m.impl("sign_product.sparse", &pibinn::sign_product_sparse<true>);
  m.impl("sign_product.sparse_unchecked", &pibinn::sign_product_sparse<false>);
}

// Raised with every change of the operators above: Python leaves a shared object that was built before it alone.
extern "C" __attribute__((visibility("default"))) int pibinn_interface() { return 4; }

// The name of the path in use, for Python; an error as its message, which starts with PIBINN_KERNEL.
extern "C" __attribute__((visibility("default"))) const char* pibinn_kernel() {
  static std::string name;
  try {
    const pibinn::Path* path = pibinn::chosen_path();
    name = path ? path->name : "torch";
  } catch (const std::exception& error) {
    name = error.what();
  }
  return name.c_str();
}
