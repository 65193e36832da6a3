// The torch operators, through the stable ABI: one shared object for every torch from 2.11 on.

#include "dispatch.h"
#include "torch_abi.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace pibinn {
namespace {

#include "scalars.inc"
#include "tensors.inc"

constexpr int64_t MOST_INT8_INPUTS = 1 << 24;  // sums of so many stay within 32 bits

Scalar scalar_of(int32_t dtype) {
  static const int32_t float32 = aoti_torch_dtype_float32(), bfloat16 = aoti_torch_dtype_bfloat16(),
                       float16 = aoti_torch_dtype_float16();
  if (dtype == float32) return Scalar::float32;
  if (dtype == bfloat16) return Scalar::bfloat16;
  expect(dtype == float16, "expected float32, bfloat16 or float16");
  return Scalar::float16;
}

// λ, or what GlobalScale makes of its parameter: never negative, at least the smallest (subnormal) number of its dtype.
float value_of(const Handle& scale, bool absolute) {
  const Dimensions dimensions(scale);
  expect(dimensions.count == 1 && dimensions.sizes[0] == 1, "expected a scale of shape (1,)");
  const Scalar scalar = scalar_of(dtype_of(scale));
  float value;
  read_floats(scalar, data_of(scale), 0, 1, &value);
  const float smallest = scalar == Scalar::float16 ? 0x1p-24f : scalar == Scalar::bfloat16 ? 0x1p-133f : 0x1p-149f;
  return absolute ? std::max(std::abs(value), smallest) : value;
}

// For sizes that come from a caller: without an overflow.
int64_t multiply(int64_t a, int64_t b) {
  int64_t result;
  expect(!__builtin_mul_overflow(a, b, &result), a, " times ", b, " does not fit 64 bits");
  return result;
}

int64_t add(int64_t a, int64_t b) {
  int64_t result;
  expect(!__builtin_add_overflow(a, b, &result), a, " plus ", b, " does not fit 64 bits");
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

// Whether these are no bits, but what `prepare` made of them.
bool is_prepared(const Handle& bits) { return dtype_of(bits) == aoti_torch_dtype_int32(); }

void check_words(const Handle& words, int64_t count, bool transposed) {
  const Dimensions given(words);
  expect(!transposed && given.is_contiguous() && given.count == 1 && given.sizes[0] == count,
         "expected ", count, " prepared words, contiguous, and a product that is not transposed");
}

void check_bits(const Handle& bits, int64_t weights) {
  const Dimensions given(bits);
  const int64_t bytes = weights / 8 + (weights % 8 != 0);
  expect(dtype_of(bits) == aoti_torch_dtype_uint8() && given.is_contiguous() && given.count == 1 &&
                      given.sizes[0] == bytes,
                  "expected the bits of ", weights, " weights, which the input and the sizes make: uint8, ",
                  "contiguous, of shape (", bytes, ",)");
}

// Bits, or words that were prepared.
void take_signs(const Handle& bits, Problem& problem) {
  const bool prepared = is_prepared(bits);
  problem.words = prepared ? reinterpret_cast<const uint32_t*>(data_of(bits)) : nullptr;
  problem.bits = prepared ? nullptr : reinterpret_cast<const uint8_t*>(data_of(bits));
  problem.bytes = prepared ? 0 : Dimensions(bits).sizes[0];
}

const char* bias_of(const Handle& bias, int32_t dtype, int64_t outputs) {
  const Dimensions shape(bias);
  expect(dtype_of(bias) == dtype && shape.count == 1 && shape.sizes[0] == outputs && shape.is_contiguous(),
         "expected a bias of shape (", outputs, ",), contiguous, of the dtype of the input");
  return data_of(bias);
}

// S x for the sign matrix of these blocks or rows, whose bits were checked, times the scale, plus the bias; null stands
// for 1 and 0. With activation scales, one a sample, x is rounded to int8 multiples of them.
template <typename Layout>
AtenTensorHandle product(Handle input, const Handle& bits, const Handle& scale, const Handle& activation_scales,
                         const Handle& bias, const Layout& layout, bool transposed, bool absolute_scale) {
  const Weight weight(layout, transposed);
  Dimensions given(input);
  expect(given.count > 0 && given.sizes[given.count - 1] == weight.inputs, "expected an input of ",
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
    expect(scalar_of(dtype_of(activation_scales)) == Scalar::float32 && scales.is_contiguous() &&
                        count == problem.samples && weight.most_inputs < MOST_INT8_INPUTS,
                    "expected ", problem.samples, " activation scales, contiguous, in float32, and fewer than ",
                    MOST_INT8_INPUTS, " columns in a block");
    problem.activation_scales = reinterpret_cast<const float*>(data_of(activation_scales));
  }
  problem.bias = bias ? bias_of(bias, dtype, weight.outputs) : nullptr;

  AtenTensorHandle result;
  check(aoti_torch_empty_strided(given.count, sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &result));
  Handle output(result);
  if (problem.samples == 0 || weight.outputs == 0) return output.release();
  if (!given.is_rows()) {
    input = contiguous(std::move(input));
    given = Dimensions(input);
  }
  take_signs(bits, problem);
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
  expect(rows > 0 && columns > 0, "expected blocks of at least one row and one column, got ", rows,
                  " and ", columns);
  const Dimensions given(input);
  const int64_t features = given.count > 0 ? given.sizes[given.count - 1] : 0, inputs = transposed ? rows : columns;
  expect(features > 0 && features % inputs == 0, "expected an input with a multiple of ", inputs,
                  " features, got ", features);
  const int64_t count = features / inputs;
  const int64_t weights = multiply(count, multiply(rows, columns));  // checked before there is a block for each
  is_prepared(bits) ? check_words(bits, multiply(count, Block::words(rows, columns)), transposed) : check_bits(bits, weights);
  return even_blocks(count, rows, columns, transposed);
}

std::vector<Block> take_uneven_blocks(const Handle& bits, StableIValue rows_value, StableIValue columns_value,
                                      bool transposed) {
  const auto rows = take_list(rows_value), columns = take_list(columns_value);
  expect(rows.size() == columns.size(), "expected as many rows as columns, got ", rows.size(), " and ",
                  columns.size());
  int64_t weights = 0, words = 0, row_count = 0, column_count = 0;
  for (size_t b = 0; b < rows.size(); b++) {
    expect(rows[b] >= 0 && columns[b] >= 0, "expected blocks of no negative size, got ", rows[b],
                    " rows and ", columns[b], " columns");
    weights = add(weights, multiply(rows[b], columns[b]));
    words = add(words, Block::words(rows[b], columns[b]));
    row_count = add(row_count, rows[b]);
    column_count = add(column_count, columns[b]);
  }
  is_prepared(bits) ? check_words(bits, words, transposed) : check_bits(bits, weights);
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
  expect(std::is_sorted(rows.starts, rows.starts + rows.row_count + 1),
                  "expected an index in which no row starts before the one before it");
  expect(are_below(rows.columns, nonzeros, rows.column_count), "expected an index of ",
                  rows.column_count, " columns, got one that names others");
  expect(!rows.order || are_below(rows.order, nonzeros, nonzeros), "expected an index of ", nonzeros,
                  " bits, got one that names others");
}

// The index is starts, columns and, unless bits lie by row, their order, one after the other.
template <bool Checked>
SparseRows take_sparse_rows(const Handle& bits, const Handle& index, StableIValue shape_value) {
  const auto shape = take_list(shape_value);
  const Dimensions given(index);
  expect(shape.size() == 2 && shape[0] > 0 && shape[1] > 0 && dtype_of(index) == aoti_torch_dtype_int32() &&
                      given.count == 1 && given.is_contiguous() && given.sizes[0] > shape[0],
                  "expected the shape of a matrix, and its index in int32, contiguous");
  const auto* starts = reinterpret_cast<const int32_t*>(data_of(index));
  const int64_t nonzeros = starts[shape[0]], rest = given.sizes[0] - shape[0] - 1;
  expect(starts[0] == 0 && nonzeros > 0 && (rest == nonzeros || rest == 2 * nonzeros),
                  "expected an index of ", shape[0], " rows, got one of another number");
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
  stack[0] = from(product(std::move(input), bits, scale, nullptr, bias, blocks, transposed, !signed_scale));
}

template <bool Checked>
void packed_linear_sparse(StableIValue* stack, uint64_t, uint64_t) {
  Handle input = take_tensor(stack[0]);
  const Handle bits = take_tensor(stack[1]), scale = take_tensor(stack[2]), index = take_tensor(stack[3]);
  const Handle bias = take_optional_tensor(stack[5]);
  const bool transposed = to<bool>(stack[6]), signed_scale = to<bool>(stack[7]);
  const SparseRows rows = take_sparse_rows<Checked>(bits, index, stack[4]);
  stack[0] =
      from(product(std::move(input), bits, scale, nullptr, bias, rows, transposed, !signed_scale));
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
      from(product(std::move(input), bits, scale, activation_scales, bias, blocks, false, false));
}

template <bool Even>
void sign_product(StableIValue* stack, uint64_t, uint64_t) {
  Handle input = take_tensor(stack[0]);
  const Handle bits = take_tensor(stack[1]);
  const bool transposed = to<bool>(stack[4]);
  const auto blocks = Even ? take_even_blocks(input, bits, stack[2], stack[3], transposed)
                           : take_uneven_blocks(bits, stack[2], stack[3], transposed);
  stack[0] = from(product(std::move(input), bits, nullptr, nullptr, nullptr, blocks, transposed, false));
}

void prepare(StableIValue* stack, uint64_t, uint64_t) {
  const Handle bits = take_tensor(stack[0]);
  const auto blocks = take_uneven_blocks(bits, stack[1], stack[2], false);
  expect(!is_prepared(bits), "expected bits, got what was prepared before");
  int64_t count = 0, stride = 1;
  for (const Block& block : blocks) count += Block::words(block.rows, block.columns);
  AtenTensorHandle result;
  check(aoti_torch_empty_strided(1, &count, &stride, aoti_torch_dtype_int32(), aoti_torch_device_type_cpu(), 0, &result));
  Handle words(result);
  std::memset(data_of(words), 0, 4 * count);  // what fills rows up to 32 is never written
  for (const Block& block : blocks)
    chosen_path()->prepare(reinterpret_cast<const uint8_t*>(data_of(bits)), Dimensions(bits).sizes[0], block,
                           reinterpret_cast<uint32_t*>(data_of(words)));
  stack[0] = from(words.release());
}

#include "convolution_operator.inc"

template <bool Checked>
void sign_product_sparse(StableIValue* stack, uint64_t, uint64_t) {
  Handle input = take_tensor(stack[0]);
  const Handle bits = take_tensor(stack[1]), index = take_tensor(stack[2]);
  const bool transposed = to<bool>(stack[4]);
  const SparseRows rows = take_sparse_rows<Checked>(bits, index, stack[3]);
  stack[0] = from(product(std::move(input), bits, nullptr, nullptr, nullptr, rows, transposed, false));
}

#include "unpack.inc"

// Of the operators that kernel/operators.py defines, under their names.
struct Operator {
  const char* name;
  void (*function)(StableIValue*, uint64_t, uint64_t);
};

const Operator operators[] = {
    {"packed_linear", &packed_linear<true>},
    {"packed_linear.uneven", &packed_linear<false>},
    {"packed_linear.sparse", &packed_linear_sparse<true>},
    {"packed_linear.sparse_unchecked", &packed_linear_sparse<false>},
    {"packed_linear_int8", &packed_linear_int8<true>},
    {"packed_linear_int8.uneven", &packed_linear_int8<false>},
    {"sign_product", &sign_product<true>},
    {"sign_product.uneven", &sign_product<false>},
    {"sign_product.sparse", &sign_product_sparse<true>},
    {"sign_product.sparse_unchecked", &sign_product_sparse<false>},
    {"packed_convolution", &packed_convolution},
    {"prepare", &prepare},
    {"unpack", &unpack},
    {"refresh", &refresh},
};

void register_operators() {
  TorchLibraryHandle library;  // kept for as long as the process runs
  check(aoti_torch_library_init_impl("pibinn", "CPU", __FILE__, __LINE__, &library));
  for (const Operator& each : operators) check(torch_library_impl(library, each.name, each.function, TORCH_VERSION));
}

}  // namespace
}  // namespace pibinn

// Raised with every change of the operators above: Python leaves a shared object that was built before it alone.
extern "C" __attribute__((visibility("default"))) int pibinn_interface() { return 9; }

// Implement the operators, once. The name of the path in use, for Python; or an error as its message, which starts with
// PIBINN_KERNEL where the environment is at fault.
extern "C" __attribute__((visibility("default"))) const char* pibinn_kernel() {
  static const std::string name = [] {
    try {
      const std::string path = pibinn::chosen_path()->name;
      pibinn::register_operators();
      return path;
    } catch (const std::exception& error) {
      return std::string(error.what());
    }
  }();
  return name.c_str();
}
