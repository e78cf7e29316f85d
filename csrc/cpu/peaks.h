// The largest magnitude and the sum of squares of tiles of a gradient: the pass of `scan` that is
// bound by memory.
#pragma once
#include "cpu/support.h"

namespace sparse_optim::cpu {

// Of consecutive tiles together: sums are float32 in a tile, float64 above.
struct Peaks {
  double squares = 0.0;
  int32_t bits = 0;
};

// tile_max[j] = the largest magnitude_bits(grad) of the j-th tile of `tile` entries.
Peaks peaks(const float* grad, int64_t count, int64_t tile, int32_t* tile_max);
Peaks peaks(const BFloat16* grad, int64_t count, int64_t tile, int32_t* tile_max);
Peaks peaks(const Float16* grad, int64_t count, int64_t tile, int32_t* tile_max);

// The largest magnitude_bits(grad[i]) & keep[i].
int32_t kept_peak(const float* grad, const int32_t* keep, int64_t count);
int32_t kept_peak(const BFloat16* grad, const int32_t* keep, int64_t count);
int32_t kept_peak(const Float16* grad, const int32_t* keep, int64_t count);

}  // namespace sparse_optim::cpu
