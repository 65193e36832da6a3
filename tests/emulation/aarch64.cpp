// The portable path of the kernel as a process of an emulated processor: it runs what it is told to on its standard
// input, in memory whose regions are followed by pages that are not there. See aarch64.py.
#include "kernel.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

using namespace pibinn;

namespace {

void take(void* to, size_t count) {
  if (fread(to, 1, count, stdin) != count) exit(0);  // the other side is done
}

uint64_t take_number() {
  uint64_t number;
  take(&number, sizeof(number));
  return number;
}

void give(const void* from, size_t count) {
  if (fwrite(from, 1, count, stdout) != count) exit(1);
  fflush(stdout);
}

// The end of so many bytes of new memory, rounded up to pages, after which there is none.
uint64_t map(uint64_t bytes) {
  const uint64_t page = sysconf(_SC_PAGESIZE), size = (bytes + page - 1) / page * page;
  char* start = static_cast<char*>(mmap(nullptr, size + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (start == MAP_FAILED || mprotect(start + size, page, PROT_NONE)) exit(1);
  return reinterpret_cast<uint64_t>(start + size);
}

template <typename Type>
Type* at(uint64_t address) {
  return reinterpret_cast<Type*>(address);
}

// Bytes of scratch memory that the products need; without scratch memory that alone.
int64_t in_blocks(const Problem& problem, const Part* parts, int64_t count, char* scratch) {
  int64_t bytes = 0;
  for (int64_t i = 0; i < count; i++) {
    const int64_t needed = portable_path.scratch_bytes(parts[i].block.inputs(problem.transposed));
    bytes = needed > bytes ? needed : bytes;
    if (!scratch) continue;
    if (problem.words && parts[i].output_begin == 0 && parts[i].sample_begin == 0)  // the first part of its block
      portable_path.prepare(problem.bits, problem.bytes, parts[i].block, (uint32_t*)problem.words);
    portable_path.compute(problem, parts[i], scratch);
  }
  return bytes;
}

int64_t in_positions(const Problem& problem, const Part* parts, int64_t count, char* scratch,
                     const Convolution& convolution) {
  int64_t bytes = 0;
  for (int64_t i = 0; i < count; i++) {
    const int64_t needed = portable_path.convolution_scratch_bytes(convolution, parts[i]);
    bytes = needed > bytes ? needed : bytes;
    if (scratch) portable_path.convolve(problem, convolution, parts[i], scratch);
  }
  return bytes;
}

int64_t in_rows(const Problem& problem, const SparsePart* parts, int64_t count, char* scratch, const SparseRows& rows) {
  for (int64_t i = 0; scratch && i < count; i++) portable_path.compute_sparse(problem, rows, parts[i], scratch);
  return portable_path.sparse_scratch_bytes(rows, problem.transposed);
}

}  // namespace

int main() {
  for (;;) {
    char command;
    take(&command, 1);
    const uint64_t first = take_number(), second = command == 'm' ? 0 : take_number();
    if (command == 'm') {
      const uint64_t end = map(first);
      give(&end, sizeof(end));
    } else if (command == 'w') {
      take(at<char>(first), second);
    } else if (command == 'r') {
      give(at<char>(first), second);
    } else {
      const uint64_t count = take_number(), scratch = take_number();
      const auto& problem = *at<Problem>(first);
      int64_t bytes;
      if (command == 'b') {
        bytes = in_blocks(problem, at<Part>(second), count, at<char>(scratch));
      } else if (command == 'p') {
        bytes = in_positions(problem, at<Part>(second), count, at<char>(scratch), *at<Convolution>(take_number()));
      } else {
        bytes = in_rows(problem, at<SparsePart>(second), count, at<char>(scratch), *at<SparseRows>(take_number()));
      }
      give(&bytes, sizeof(bytes));
    }
  }
}
