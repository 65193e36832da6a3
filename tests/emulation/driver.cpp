// One path of the kernel without an operating system: products for an emulated processor. See avx512.py.
#include "kernel.h"

using namespace pibinn;

extern "C" {

void* memcpy(void* to, const void* from, unsigned long count) {
  for (unsigned long i = 0; i < count; i++) {
    ((char*)to)[i] = ((const char*)from)[i];
    asm volatile("");  // or the compiler makes a call of memcpy of it
  }
  return to;
}

void* memset(void* to, int value, unsigned long count) {
  for (unsigned long i = 0; i < count; i++) {
    ((char*)to)[i] = (char)value;
    asm volatile("");
  }
  return to;
}

// All end the emulation, with the bytes of scratch memory that the products would need in rax.
[[gnu::used]] void in_blocks(const Problem* problem, const Part* parts, int64_t count, char* scratch) {
  int64_t bytes = 0;
  for (int64_t i = 0; i < count; i++) {
    const int64_t needed = avx512_path.scratch_bytes(parts[i].block.inputs(problem->transposed));
    bytes = needed > bytes ? needed : bytes;
    if (!scratch) continue;
    if (problem->words && parts[i].output_begin == 0 && parts[i].sample_begin == 0)  // the first part of its block
      avx512_path.prepare(problem->bits, problem->bytes, parts[i].block, (uint32_t*)problem->words);
    avx512_path.compute(*problem, parts[i], scratch);
  }
  asm volatile("hlt" ::"a"(bytes));
}

[[gnu::used]] void in_positions(const Problem* problem, const Part* parts, int64_t count, char* scratch,
                                const Convolution* convolution) {
  int64_t bytes = 0;
  for (int64_t i = 0; i < count; i++) {
    const int64_t needed = avx512_path.convolution_scratch_bytes(*convolution, parts[i]);
    bytes = needed > bytes ? needed : bytes;
    if (scratch) avx512_path.convolve(*problem, *convolution, parts[i], scratch);
  }
  asm volatile("hlt" ::"a"(bytes));
}

[[gnu::used]] void in_rows(const Problem* problem, const SparsePart* parts, int64_t count, char* scratch,
                           const SparseRows* rows) {
  const int64_t bytes = avx512_path.sparse_scratch_bytes(*rows, problem->transposed);
  for (int64_t i = 0; i < count; i++) {
    if (scratch) avx512_path.compute_sparse(*problem, *rows, parts[i], scratch);
  }
  asm volatile("hlt" ::"a"(bytes));
}
}
