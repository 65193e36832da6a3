// The portable path: what every processor can run.
#include "kernel.h"

#define LANES 4
#define VECTORS 2
#include "path.inc"

namespace pibinn {
extern const Path portable_path{"portable", LANES, scratch_bytes, compute, prepare, convolution_scratch_bytes, convolve,
                                sparse_scratch_bytes, compute_sparse};
}  // namespace pibinn
