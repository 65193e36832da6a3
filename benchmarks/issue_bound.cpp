// How fast this processor can look up and add, from registers and the first cache alone: the bound of the native kernel.
// Compiled by products.py for the vectors of the kernel's path: -DLANES=4, 8 or 16.

#include <immintrin.h>
#include <stdint.h>

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Words __attribute__((vector_size(4 * LANES)));

// Sums beside each other: more than the cycles of an addition times the additions that start in one.
constexpr int SUMS = 16, CHAINS = LANES == 16 ? 12 : 6;

// So many additions of vectors from a table of 8 KiB: a lookup of the form for many samples.
extern "C" void lookups_in_memory(long lookups) {
  constexpr int count = 8192 / sizeof(Floats);
  alignas(64) static Floats table[count];
  Floats sums[SUMS] = {};
  asm volatile("" ::"r"(table) : "memory");  // what is in it is not known
  for (long n = 0; n < lookups; n += count) {
    for (int i = 0; i < count; i += SUMS) {
      for (int j = 0; j < SUMS; j++) {
        sums[j] += table[i + j];
        asm volatile("" : "+x"(sums[j]));
      }
    }
  }
}

// So many permutations of a register, each with its shift of the index and its addition: the form for few samples.
extern "C" void lookups_in_registers(long lookups) {
#if LANES > 4
  Floats table, sums[CHAINS] = {};
  Words index[CHAINS] = {};
  for (int i = 0; i < LANES; i++) table[i] = (float)i;
  for (long n = 0; n < lookups; n += CHAINS) {
#pragma GCC unroll 16
    for (int j = 0; j < CHAINS; j++) {
      Words words = index[j];
#if LANES == 16
      Floats sum = sums[j] + (Floats)_mm512_permutexvar_ps((__m512i)words, (__m512)table);
#else
      Floats sum = sums[j] + (Floats)_mm256_permutevar8x32_ps((__m256)table, (__m256i)words);
#endif
      words >>= 3;
      asm volatile("" : "+v"(words), "+v"(sum));  // of variables: elements of an array would stay in memory
      index[j] = words, sums[j] = sum;
    }
  }
#endif
}
