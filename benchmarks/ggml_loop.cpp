// A matrix product by the dot products of ggml, as its own graph computes it on one thread: each sample is rounded to
// int8 once for each block, and then every row of the block is one call.

#include <cstddef>
#include <cstdint>

using Dot = void (*)(int, float*, size_t, const void*, size_t, const void*, size_t, int);
using Quantize = void (*)(const float*, void*, int64_t);

extern "C" void product(Dot dot, Quantize quantize, const char* weight, size_t row_bytes, const float* x, char* rounded,
                        size_t rounded_bytes, float* y, int blocks, int rows, int columns, int batch) {
    for (int block = 0; block < blocks; ++block) {
        for (int sample = 0; sample < batch; ++sample)
            quantize(x + (size_t(sample) * blocks + block) * columns, rounded + sample * rounded_bytes, columns);
        for (int row = 0; row < rows; ++row) {
            const char* weights = weight + (size_t(block) * rows + row) * row_bytes;
            for (int sample = 0; sample < batch; ++sample) {
                float* output = y + (size_t(sample) * blocks + block) * rows + row;
                dot(columns, output, 0, weights, 0, rounded + sample * rounded_bytes, 0, 1);
            }
        }
    }
}
