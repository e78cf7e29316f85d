// The importances of one tile at a time, and the vector loops that search integer keys.
#pragma once
#include <algorithm>

#include "cpu/support.h"

namespace sparse_optim::cpu {

struct Opened {
  int64_t tensor, first, count;  // entries first..first + count - 1 of a pool tensor
};

// Importance keys of the entries of a tile; 0 for active ones, up to the next multiple of 16, and
// where the gradient is missing.
Opened open_tile(const Problem& problem, int64_t tile_index, int32_t* out);

// Fetches the gradients of a tile that will be opened soon, and the parameters if they count.
void prefetch_tile(const Problem& problem, int64_t tile_index);

// keys[i] = importance_key(importance(grad[i], param[i]))
void importance_keys(double exp, float eps, const float* grad, const float* param, int64_t count,
                     int32_t* keys);

int32_t largest(const int32_t* values, int64_t count);

// The largest of each run of 16 values.
void block_maxima(const int32_t* values, int64_t count, int32_t* maxima);

// counts[b] = how many of the 16 values from 16 b on reach the limit.
void count_reaching(const int32_t* values, int64_t blocks, int32_t limit, int32_t* counts);

// visit(i) for every values[i] >= limit, in order. `values` is readable up to a multiple of 16.
// Most runs of 16 hold none, and are passed over by one comparison.
template <class Visit>
void visit_reaching(const int32_t* values, int64_t count, int32_t limit, Visit&& visit) {
  int32_t counts[kMaxTile / 16];
  const int64_t blocks = (count + 15) / 16;
  count_reaching(values, blocks, limit, counts);
  for (int64_t b = 0; b < blocks; ++b) {
    if (counts[b] == 0) continue;
    const int64_t end = std::min(count, 16 * b + 16);
    for (int64_t i = 16 * b; i < end; ++i)
      if (values[i] >= limit) visit(i);
  }
}

}  // namespace sparse_optim::cpu
