// `collect` for quotas of any size, by the grid: see collect_many.cu. `collected` is
// many_collected_bytes(max_quota) long.
#pragma once
#include "cuda/open_tile.h"

namespace sparse_optim::cuda {

// A call of `collect`.
struct CollectCall {
  Entries entries;
  const int32_t* tile_max;
  const float* param_bound;
  double exp;
  float eps;
  bool scored;
  int64_t first_tensor;
};

int64_t many_collected_bytes(int64_t max_quota);
void collect_many_begin(const CollectInput& in, int64_t max_quota, void* collected,
                        cudaStream_t stream);
void collect_many(const CollectCall& call, int64_t max_quota, void* collected, cudaStream_t stream);
void collect_many_end(const float* found_inf, const NewEntries& found, float* threshold,
                      float* grad, int64_t max_quota, void* collected, cudaStream_t stream);

}  // namespace sparse_optim::cuda
