// How fast this processor can look up and add, from registers and the first cache alone: the bound of the native kernel.
// Compiled by products.py for the vectors of the kernel's path: -DLANES=4, 8 or 16.

#include <immintrin.h>
#include <stdint.h>
#include <time.h>

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Words __attribute__((vector_size(4 * LANES)));

static double seconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec + 1e-9 * now.tv_nsec;
}

// Additions of vectors from a table of 8 KiB a second: a lookup of the form for many samples.
extern "C" double lookups_in_memory(int rounds) {
  alignas(64) static Floats table[8192 / sizeof(Floats)];
  constexpr int count = 8192 / sizeof(Floats);
  Floats sums[8] = {};
  const double start = seconds();
  for (int r = 0; r < rounds; r++) {
    for (int i = 0; i < count; i += 8) {
      for (int j = 0; j < 8; j++) sums[j] += table[i + j];
      asm volatile("" ::: "memory");
    }
  }
  const double elapsed = seconds() - start;
  for (int j = 0; j < 8; j++) asm volatile("" ::"x"(sums[j]));
  return (double)rounds * count / elapsed;
}

// Permutations of a register, each with its shift of the index and its addition: the form for few samples.
extern "C" double lookups_in_registers(int rounds) {
#if LANES == 4
  return 0.0;
#else
  Floats table, sums[4] = {};
  Words index[4] = {};
  for (int i = 0; i < LANES; i++) table[i] = (float)i;
  const double start = seconds();
  for (int r = 0; r < rounds; r++) {
    for (int j = 0; j < 4; j++) {
#if LANES == 16
      sums[j] += (Floats)_mm512_permutexvar_ps((__m512i)index[j], (__m512)table);
#else
      sums[j] += (Floats)_mm256_permutevar8x32_ps((__m256)table, (__m256i)index[j]);
#endif
      index[j] >>= 3;
      asm volatile("" : "+x"(index[j]));
    }
  }
  const double elapsed = seconds() - start;
  for (int j = 0; j < 4; j++) asm volatile("" ::"x"(sums[j]));
  return 4.0 * rounds / elapsed;
#endif
}
