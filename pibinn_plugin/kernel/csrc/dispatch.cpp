#include "dispatch.h"
#include "torch_abi.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>

namespace pibinn {
namespace {

constexpr int64_t SERIAL_PRODUCTS = 1 << 20;  // below so many multiply-adds a second thread costs more than it brings

bool is_supported(const Path& path) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (&path == &avx512_path)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  if (&path == &avx2_path)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
           __builtin_cpu_supports("bmi2");
#endif
  return true;
}

// Best first.
const Path* const paths[] = {
#if defined(__x86_64__)
    &avx512_path,
    &avx2_path,
#endif
    &portable_path,
};

// Memory of a thread, kept from call to call: asking the system for it anew costs more than a small product.
char* scratch_of_thread(int64_t bytes) {
  static thread_local std::unique_ptr<char, decltype(&std::free)> memory(nullptr, &std::free);
  static thread_local int64_t size = 0;
  if (bytes > size) {
    size = (bytes + 4095) / 4096 * 4096;
    memory.reset(static_cast<char*>(std::aligned_alloc(4096, size)));
    if (!memory) {
      size = 0;
      throw std::bad_alloc();
    }
  }
  return memory.get();
}

// How many outputs and samples a part has at most.
struct Division {
  int64_t outputs = PANEL, samples;
};

int64_t count_parts(const Problem& problem, const std::vector<Block>& blocks, const Division& division) {
  int64_t panels = 0;
  for (const Block& block : blocks) panels += (block.outputs(problem.transposed) + division.outputs - 1) / division.outputs;
  return panels * ((problem.samples + division.samples - 1) / division.samples);
}

// As large as the caches allow, and small enough for every thread to have its share. Each part builds its tables anew,
// which for 64 outputs costs as much as all lookups: parts are that small only where a thread would have none. Where a
// part ends must not change a sum: samples are cut at multiples of 8 vectors, and a path chooses by block, not by part.
Division divide(const Path& path, const Problem& problem, const std::vector<Block>& blocks, int64_t threads) {
  Division division;
  division.samples = 256;  // staged bits are used for so many
  const auto least = [&] { return division.outputs > 128 ? 4 * threads : threads; };
  while (threads > 1 && count_parts(problem, blocks, division) < least()) {
    if (division.samples > 8 * path.lanes && division.samples >= problem.samples / threads) {
      division.samples /= 2;
    } else if (division.outputs > 64) {
      division.outputs /= 2;
    } else {
      break;
    }
  }
  return division;
}

// A part for every thread: of whole steps of samples and, where these are too few, of rows with as many nonzeros each.
std::vector<SparsePart> divide_sparse(const Problem& problem, const SparseRows& rows, int64_t threads) {
  const int64_t steps = (problem.samples + SAMPLES - 1) / SAMPLES, samples = (steps + threads - 1) / threads * SAMPLES;
  const int64_t ranges = problem.transposed ? 1 : (threads + steps - 1) / steps;
  std::vector<SparsePart> parts;
  for (int64_t i = 0, row = 0; i < ranges; i++) {
    const int64_t nonzeros = rows.starts[rows.row_count] * (i + 1) / ranges;
    const int64_t end =
        i + 1 < ranges ? std::lower_bound(rows.starts + row, rows.starts + rows.row_count, nonzeros) - rows.starts
                       : rows.row_count;
    for (int64_t n = 0; n < problem.samples && row < end; n += samples)
      parts.push_back({row, end, n, std::min(n + samples, problem.samples)});
    row = end;
  }
  return parts;
}

struct Samples {
  int64_t begin, end;
};

// The samples of a convolution, about so many at a time: whole images, rows of one image, or a piece of one row, so that
// what a part needs of the images is a box that holds little else.
std::vector<Samples> cut_positions(const Convolution& convolution, int64_t most) {
  const int64_t positions = convolution.positions(), width = convolution.columns.outputs;
  const int64_t images = positions > most ? 1 : most / positions, rows = width > most ? 1 : most / width;
  std::vector<Samples> pieces;
  if (positions <= most) {
    for (int64_t image = 0; image < convolution.images; image += images)
      pieces.push_back({image * positions, std::min(image + images, convolution.images) * positions});
    return pieces;
  }
  const int64_t step = width > most ? most : rows * width, range = width > most ? width : positions;
  for (int64_t start = 0; start < convolution.images * positions; start += range)
    for (int64_t n = 0; n < range; n += step) pieces.push_back({start + n, start + std::min(n + step, range)});
  return pieces;
}

std::vector<Part> divide_convolution(const Path& path, const Convolution& convolution, const std::vector<Block>& groups,
                                     int64_t threads) {
  int64_t most_samples = 256, most_outputs = PANEL;
  while (true) {
    const std::vector<Samples> pieces = cut_positions(convolution, most_samples);
    std::vector<Part> parts;
    for (const Block& group : groups)
      for (const Samples& samples : pieces)
        for (int64_t o = 0; o < group.rows; o += most_outputs)
          parts.push_back({group, o, std::min(o + most_outputs, group.rows), samples.begin, samples.end});
    if (threads == 1 || (int64_t)parts.size() >= 4 * threads) return parts;
    if (most_samples > 8 * path.lanes) {
      most_samples /= 2;
    } else if (most_outputs > 64) {
      most_outputs /= 2;
    } else {
      return parts;
    }
  }
}

// Calls compute_part(i, scratch) for each of so many parts.
template <typename Function>
void run_parts(int64_t count, int64_t threads, int64_t scratch_bytes, const Function& compute_part) {
  const auto run = [&](int64_t begin, int64_t end) {
    char* scratch = scratch_of_thread(scratch_bytes);
    for (int64_t i = begin; i < end; i++) compute_part(i, scratch);
  };
  if (threads == 1) {
    run(0, count);
  } else {
    parallel_for(count, 1, run);
  }
}

}  // namespace

const Path* chosen_path() {
  static const Path* const path = []() -> const Path* {
    const char* variable = std::getenv("PIBINN_KERNEL");
    const std::string name = variable ? variable : "";
    for (const Path* candidate : paths) {
      if (name.empty() ? is_supported(*candidate) : name == candidate->name) {
        if (!is_supported(*candidate))
          throw std::runtime_error("PIBINN_KERNEL=" + name + ": this processor cannot run it");
        return candidate;
      }
    }
    throw std::runtime_error("PIBINN_KERNEL=" + name + ": expected torch, portable, avx2 or avx512");
  }();
  return path;
}

std::vector<Block> even_blocks(int64_t count, int64_t rows, int64_t columns, bool transposed) {
  std::vector<Block> blocks(count);
  for (int64_t b = 0; b < count; b++) {
    const int64_t row = b * rows, column = b * columns;
    blocks[b] = {row * columns, b * Block::words(rows, columns), rows, columns, transposed ? row : column,
                 transposed ? column : row};
  }
  return blocks;
}

std::vector<Block> uneven_blocks(const std::vector<int64_t>& rows, const std::vector<int64_t>& columns, bool transposed) {
  std::vector<Block> blocks;
  int64_t bit = 0, word = 0, row = 0, column = 0;
  for (size_t b = 0; b < rows.size(); b++) {
    blocks.push_back({bit, word, rows[b], columns[b], transposed ? row : column, transposed ? column : row});
    bit += rows[b] * columns[b];
    word += Block::words(rows[b], columns[b]);
    row += rows[b];
    column += columns[b];
  }
  return blocks;
}

void compute(const Path& path, const Problem& problem, const std::vector<Block>& blocks) {
  int64_t products = 0, most_inputs = 0;
  for (const Block& block : blocks) {
    products += block.rows * block.columns * problem.samples;
    most_inputs = std::max(most_inputs, block.inputs(problem.transposed));
  }
  const int64_t threads = products < SERIAL_PRODUCTS ? 1 : get_num_threads();
  const Division division = divide(path, problem, blocks, threads);
  const int64_t bytes = path.scratch_bytes(most_inputs);

  std::vector<Part> parts;
  parts.reserve(count_parts(problem, blocks, division));
  for (const Block& block : blocks) {
    const int64_t outputs = block.outputs(problem.transposed);
    for (int64_t n = 0; n < problem.samples; n += division.samples)
      for (int64_t o = 0; o < outputs; o += division.outputs)
        parts.push_back({block, o, std::min(o + division.outputs, outputs), n,
                         std::min(n + division.samples, problem.samples)});
  }
  run_parts(parts.size(), threads, bytes, [&](int64_t i, char* scratch) { path.compute(problem, parts[i], scratch); });
}

void compute(const Path& path, const Problem& problem, const SparseRows& rows) {
  const int64_t products = rows.starts[rows.row_count] * problem.samples;
  const int64_t threads = products < SERIAL_PRODUCTS ? 1 : get_num_threads();
  const std::vector<SparsePart> parts = divide_sparse(problem, rows, threads);
  run_parts(parts.size(), threads, path.sparse_scratch_bytes(rows, problem.transposed),
            [&](int64_t i, char* scratch) { path.compute_sparse(problem, rows, parts[i], scratch); });
}

void compute(const Path& path, const Problem& problem, const Convolution& convolution, const std::vector<Block>& groups) {
  const int64_t products = static_cast<int64_t>(groups.size()) * groups[0].rows * groups[0].columns * problem.samples;
  const int64_t threads = products < SERIAL_PRODUCTS ? 1 : get_num_threads();
  const std::vector<Part> parts = divide_convolution(path, convolution, groups, threads);
  int64_t bytes = 0;
  for (const Part& part : parts) {
    if (Box::of(convolution, part.sample_begin, part.sample_end).size() > INT32_MAX)
      throw std::runtime_error("pibinn: expected a convolution of which a few hundred positions need less than 2^31 inputs");
    bytes = std::max(bytes, path.convolution_scratch_bytes(convolution, part));
  }
  run_parts(parts.size(), threads, bytes,
            [&](int64_t i, char* scratch) { path.convolve(problem, convolution, parts[i], scratch); });
}

}  // namespace pibinn
