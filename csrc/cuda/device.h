// What kernels share: warp and block sums, searches in sorted arrays, reads of any dtype.
#pragma once
#include "cuda/kernels.h"

namespace sparse_optim::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline int lane() {
  return int(threadIdx.x) % kWarp;
}
__device__ inline int warp() {
  return int(threadIdx.x) / kWarp;
}
__device__ inline int64_t global_thread() {
  return int64_t(blockIdx.x) * kThreads + threadIdx.x;
}
__device__ inline int64_t grid_threads() {
  return int64_t(gridDim.x) * kThreads;
}

// Which part of some work is a block's: items block, block + blocks, ... With {0, 1}, one block
// does all of it.
struct Share {
  int64_t block, blocks;

  __device__ static Share of_grid() { return {blockIdx.x, gridDim.x}; }
};

// Calls visit(pointer of the element type).
template <class Visit>
__device__ inline void visit_dtype(DType dtype, const void* data, Visit&& visit) {
  switch (dtype) {
    case DType::kFloat32: return visit(static_cast<const float*>(data));
    case DType::kBFloat16: return visit(static_cast<const BFloat16*>(data));
    case DType::kFloat16: return visit(static_cast<const Float16*>(data));
  }
}

__device__ inline float read(DType dtype, const void* data, int64_t index) {
  float value = 0.f;
  visit_dtype(dtype, data, [&](auto* typed) { value = to_float(typed[index]); });
  return value;
}

// Sum over the warp, in the same order in every lane and every run.
template <class T>
__device__ inline T warp_sum(T value) {
  for (int distance = kWarp / 2; distance; distance /= 2)
    value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

// Sum over the block. Every thread calls it.
__device__ inline double block_sum(double value) {
  __shared__ double of_warp[kWarps];
  value = warp_sum(value);
  if (lane() == 0) of_warp[warp()] = value;
  __syncthreads();
  double total = 0.0;
  for (int w = 0; w < kWarps; ++w) total += of_warp[w];
  __syncthreads();
  return total;
}

struct Prefix {
  int64_t before;  // sum over the threads before this one
  int64_t total;   // sum over the block
};

// Every thread calls it.
__device__ inline Prefix block_prefix(int64_t value) {
  __shared__ int64_t of_warp[kWarps];
  int64_t through = value;
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int64_t other = __shfl_up_sync(kAllLanes, through, distance);
    if (lane() >= distance) through += other;
  }
  if (lane() == kWarp - 1) of_warp[warp()] = through;
  __syncthreads();
  Prefix prefix{through - value, 0};
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp()) prefix.before += of_warp[w];
    prefix.total += of_warp[w];
  }
  __syncthreads();
  return prefix;
}

// True in all threads of the block that is the last of its grid to come here; what the others wrote
// before is then visible. `arrived` starts at 0 and is left at 0.
__device__ inline bool is_last_block(unsigned* arrived) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(arrived, 1u) == gridDim.x - 1;
    if (last) *arrived = 0;
  }
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// First index in [first, last) whose value is above `limit`, else last.
template <class T>
__device__ inline int64_t upper_bound(const T* values, int64_t first, int64_t last, int64_t limit) {
  while (first < last) {
    const int64_t middle = first + (last - first) / 2;
    if (int64_t(values[middle]) > limit) last = middle;
    else first = middle + 1;
  }
  return first;
}

// First index in [first, last) whose value is at least `limit`, else last; for a whole warp, whose
// lanes probe 32 places at a time: four rounds of memory latency for a million values, not twenty.
__device__ inline int64_t warp_lower_bound(const int32_t* values, int64_t first, int64_t last,
                                           int64_t limit) {
  while (first < last) {
    const int64_t step = (last - first - 1) / kWarp + 1;
    const int64_t probe = first + (lane() + 1) * step - 1;
    const bool below = probe < last && values[probe] < limit;
    first += __popc(__ballot_sync(kAllLanes, below)) * step;
    last = first + step - 1 < last ? first + step - 1 : last;
  }
  return first;
}

// Where a warp begins to compare the sorted values with `limit`: lower_bound, or simply the first
// of few, which costs a read less than a search.
__device__ inline int64_t warp_first_near(const int32_t* values, int64_t first, int64_t last,
                                          int64_t limit) {
  return last - first <= 2 * kWarp ? first : warp_lower_bound(values, first, last, limit);
}

// The tensor of a tile; tensors without tiles share their successor's first and are passed over.
__device__ inline int64_t tensor_of_tile(const Pool& pool, int64_t tile_index) {
  return upper_bound(pool.tile_offsets, 0, pool.num_tensors + 1, tile_index) - 1;
}

// The entries of a tensor's tile.
struct Tile {
  Row row;
  int64_t tensor;
  int64_t first;
  int count;
};

__device__ inline Tile locate_tile(const Pool& pool, int64_t tensor, int64_t tile_index) {
  const Row row = read_row(pool.table, tensor);
  const int64_t first = (tile_index - pool.tile_offsets[tensor]) * pool.tile;
  const int64_t left = row.numel - first;
  return {row, tensor, first, int(left < pool.tile ? left : pool.tile)};
}

// Blocks for `work` units at `each` a block, enough to fill the device and no more.
inline int64_t grid_for(int64_t work, int64_t each, int per_multiprocessor) {
  const int64_t wanted = (work + each - 1) / each;
  const int64_t most = int64_t(multiprocessors()) * per_multiprocessor;
  return wanted < most ? wanted : most;
}

}  // namespace sparse_optim::cuda
