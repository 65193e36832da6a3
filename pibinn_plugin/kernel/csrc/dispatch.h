// Which path is used, and how a product is divided into parts.
#pragma once

#include "kernel.h"

#include <vector>

namespace pibinn {

// The path that PIBINN_KERNEL names, or the best one that this processor can run; null for PIBINN_KERNEL=torch.
// Throws std::runtime_error where it names none, or one that this processor cannot run.
const Path* chosen_path();

// The blocks of a weight whose bits follow each other.
std::vector<Block> even_blocks(int64_t count, int64_t rows, int64_t columns, bool transposed);
std::vector<Block> uneven_blocks(const std::vector<int64_t>& rows, const std::vector<int64_t>& columns, bool transposed);

void compute(const Path& path, const Problem& problem, const std::vector<Block>& blocks);
void compute(const Path& path, const Problem& problem, const SparseRows& rows);
void compute(const Path& path, const Problem& problem, const Convolution& convolution, const std::vector<Block>& groups);

}  // namespace pibinn
