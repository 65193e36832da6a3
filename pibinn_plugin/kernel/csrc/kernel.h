// What the paths of the kernel share: the problem, and the function that each path gives to compute a part of it.
//
// No standard C++ header may be included from a file that is compiled for one instruction set only: an inline function
// of it, kept once for the whole library, would then be an illegal instruction elsewhere.
#pragma once

#include <stdint.h>

namespace pibinn {

enum class Scalar { float32, bfloat16, float16 };

// y = scale * S x + bias, or scale * S^T x, for S in {-1, +1} in blocks; all pointers are to element 0 of sample 0.
struct Problem {
  const uint8_t* bits;  // one bit a weight, little-endian; set: +1
  int64_t bytes;        // of bits
  const uint32_t* words;  // what `prepare` made of the bits, for products that are not transposed; or null
  const char* input;
  char* output;
  const char* bias;  // may be null
  Scalar scalar;     // of input, output and bias
  int64_t input_stride, output_stride;  // elements from one sample to the next
  int64_t samples;
  float scale;
  bool transposed;
  // Of each sample, where its inputs are rounded to int8 multiples of it; null where they are taken as they are.
  const float* activation_scales;
};

// One block: rows x columns bits, row after row. Inputs are its columns, outputs its rows; transposed, the reverse.
struct Block {
  int64_t bit_start, word_start, rows, columns, input_start, output_start;

  // Prepared, of which word_start counts: one bit for each weight, and for what fills rows and columns up to 32.
  static int64_t words(uint64_t rows, uint64_t columns) { return (rows + 31) / 32 * 32 * ((columns + 31) / 32); }

  int64_t inputs(bool transposed) const { return transposed ? rows : columns; }
  int64_t outputs(bool transposed) const { return transposed ? columns : rows; }
};

// Some outputs of a block for some samples: what one thread computes at a time.
struct Part {
  Block block;
  int64_t output_begin, output_end, sample_begin, sample_end;
};

// Any pattern: row r has the nonzeros starts[r] ... starts[r + 1] - 1, each with its column. The sign of nonzero i is
// bit i, or bit order[i] where order is not null.
struct SparseRows {
  const int32_t *starts, *columns, *order;
  int64_t row_count, column_count;
};

// Some rows for some samples. What is transposed has all rows in every part: they share their outputs.
struct SparsePart {
  int64_t row_begin, row_end, sample_begin, sample_end;
};

// One of the two axes of the images that a convolution goes over.
struct Axis {
  int64_t inputs, kernel, stride, padding, dilation, outputs;
  int64_t input_stride;  // elements from one input to the next
};

// A convolution is a product that has a sample for each position of its outputs: image after image, row after row. The
// inputs of a sample are what lies under the kernel there: channel after channel of a group, row after row.
struct Convolution {
  int64_t images, channels;  // channels: of a group
  Axis rows, columns;
  int64_t image_stride, channel_stride;
  bool channels_last;  // of the outputs

  int64_t positions() const { return rows.outputs * columns.outputs; }
};

// What some samples need of an axis, in inputs; those outside of the image are its padding.
struct Range {
  int64_t begin, count;

  static Range of(const Axis& axis, int64_t first_output, int64_t last_output) {
    return {first_output * axis.stride - axis.padding,
            (last_output - first_output) * axis.stride + (axis.kernel - 1) * axis.dilation + 1};
  }
};

// What some samples need of the inputs of a group.
struct Box {
  int64_t first_image, images, channels;
  Range rows, columns;

  static Box of(const Convolution& convolution, int64_t sample_begin, int64_t sample_end) {
    const int64_t positions = convolution.positions(), width = convolution.columns.outputs;
    const int64_t first = sample_begin / positions, last = (sample_end - 1) / positions;
    int64_t begin = sample_begin - first * positions, end = sample_end - 1 - last * positions;
    if (first < last) begin = 0, end = positions - 1;
    const int64_t row = begin / width, last_row = end / width;
    const int64_t column = row < last_row ? 0 : begin % width, last_column = row < last_row ? width - 1 : end % width;
    return {first, last - first + 1, convolution.channels, Range::of(convolution.rows, row, last_row),
            Range::of(convolution.columns, column, last_column)};
  }

  int64_t size() const { return images * channels * rows.count * columns.count; }
};

constexpr int64_t SAMPLES = 32;  // of a sparse product, that are summed at a time
constexpr int64_t PANEL = 512;  // the most outputs of a part; a multiple of 32 vectors of any path

struct Path {
  const char* name;
  int lanes;
  int64_t (*scratch_bytes)(int64_t inputs);                             // that compute needs, for blocks of so many inputs
  void (*compute)(const Problem&, const Part&, char* scratch);  // scratch is aligned to 64 bytes
  // Writes the bits of a block in the order in which its products use them, from its word_start on.
  void (*prepare)(const uint8_t* bits, int64_t bytes, const Block&, uint32_t* words);
  int64_t (*convolution_scratch_bytes)(const Convolution&, const Part&);
  void (*convolve)(const Problem&, const Convolution&, const Part&, char* scratch);
  int64_t (*sparse_scratch_bytes)(const SparseRows&, bool transposed);
  void (*compute_sparse)(const Problem&, const SparseRows&, const SparsePart&, char* scratch);
};

extern const Path portable_path;
#if defined(__x86_64__)
extern const Path avx2_path;
extern const Path avx512_path;
#endif

}  // namespace pibinn
