// The AVX-512 path. Its target is set here and not by compiler flags, which would hold for every file.
#if defined(__x86_64__)
#include "kernel.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2,prefer-vector-width=512")
#endif
#include <immintrin.h>

#define LANES 16
#define VECTORS 1  // more would need tables that crowd the first cache
#define GROUP 4  // inputs whose sums fill a register
#define PERMUTE(table, index) ((Floats)_mm512_permutexvar_ps((__m512i)(index), (__m512)(table)))
#define FEW_SAMPLES 9  // beyond so few samples the other form is as fast; 8 measured on a Xeon, a quarter faster like this
#define MOST_VECTORS 8  // of outputs of one sample that are looked up together, by what registers there are
#define SHARED 4  // samples, each for 4 vectors, likewise
#include "path.inc"

namespace pibinn {
extern const Path avx512_path{"avx512", LANES, scratch_bytes, compute, prepare, convolution_scratch_bytes, convolve,
                              sparse_scratch_bytes, compute_sparse};
}  // namespace pibinn

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
