// The AVX2 path. Its target is set here and not by compiler flags, which would hold for every file.
#if defined(__x86_64__)
#include "kernel.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2")
#endif
#include <immintrin.h>

#define LANES 8
#define VECTORS 1  // more would need tables that crowd the first cache
#define GROUP 3  // inputs whose sums fill a register
#define PERMUTE(table, index) ((Floats)_mm256_permutevar8x32_ps((__m256)(table), (__m256i)(index)))
#define FEW_SAMPLES 3  // beyond so few samples the other form is faster; measured on Zen 4
#define MOST_VECTORS 4  // of outputs of one sample that are looked up together, by what registers there are
#define SHARED 2  // samples, each for 4 vectors, likewise
#include "path.inc"

namespace pibinn {
extern const Path avx2_path{"avx2", LANES, scratch_bytes, compute, prepare, convolution_scratch_bytes, convolve,
                            sparse_scratch_bytes, compute_sparse};
}  // namespace pibinn

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
