// rank: read dense scores once.
//
//   tile_max[j] = max over the frozen entries of tile j of the bits of |score| (/ sqrt(E))
//
// Bytes: one read of the scores, 4 per tile. 7B (N = 6.74e9) with scores in float32: 27 GB.
// Predicted: bytes / bandwidth = 13 ms on A100 (2.0 TB/s), 35 on A6000 (0.77), 8.0 on H100 (3.35),
// 5.6 on H200 (4.8); half of that in bfloat16. With noise it should be bound by arithmetic: ten
// rounds of Philox for four entries, a logarithm, a root and two divisions for each. Bitwise equal
// to the reference.
#include "cuda/open_tile.h"

namespace sparse_optim::cuda {
namespace {

constexpr int kBlocksPerMultiprocessor = 8;

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T entry[4];
};

// Entries first..first + 3 of a tensor, by one load where that is aligned; 0 outside begin..end
// - 1.
template <class T>
__device__ inline void load_four(const T* data, int64_t first, int64_t begin, int64_t end,
                                 float (&out)[4]) {
  const T* at = data + first;
  if (begin <= first && first + 4 <= end &&
      reinterpret_cast<uintptr_t>(at) % sizeof(Four<T>) == 0) {
    const Four<T> four = *reinterpret_cast<const Four<T>*>(at);
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = to_float(four.entry[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      out[i] = begin <= first + i && first + i < end ? to_float(at[i]) : 0.f;
  }
}

// The largest key that this thread sees of a tile. Threads take groups of four entries as the
// noise does, which need not begin where the tile does.
template <class Importance, class T>
__device__ inline int32_t largest_key(const Importance& importance, const T* scores,
                                      const Tile& tile, const uint32_t (&marks)[kTileWords]) {
  const int64_t end = tile.first + tile.count;
  int32_t most = 0;
  for (int64_t group = tile.first / 4 + threadIdx.x; 4 * group < end; group += kThreads) {
    float four[4];
    int32_t keys[4];
    load_four(scores, 4 * group, tile.first, end, four);
    group_keys(importance, four, tile.tensor, group, keys);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t at = 4 * group + i - tile.first;
      const bool frozen = at >= 0 && at < tile.count && !(marks[at / kWarp] >> (at % kWarp) & 1u);
      if (frozen) most = max(most, keys[i]);
    }
  }
  return most;
}

template <class Importance>
__global__ void __launch_bounds__(kThreads, kResident)
    rank_kernel(Importance importance, Entries entries, int32_t* tile_max) {
  __shared__ uint32_t marks[kTileWords];
  __shared__ int32_t largest;
  for (int64_t j = blockIdx.x; j < entries.pool.num_tiles; j += gridDim.x) {
    if (threadIdx.x == 0) largest = 0;
    const Tile tile = mark_tile(entries, j, marks);
    int32_t most = 0;
    if (tile.row.grad) {
      visit_dtype(tile.row.grad_dtype, tile.row.grad,
                  [&](auto* scores) { most = largest_key(importance, scores, tile, marks); });
    }
    most = __reduce_max_sync(kAllLanes, most);
    if (lane() == 0) atomicMax(&largest, most);
    __syncthreads();
    if (threadIdx.x == 0) tile_max[j] = largest;
  }
}

}  // namespace

cudaError_t rank(const Pool& pool, const int32_t* position, const int64_t* offsets,
                 const int64_t* noise, int32_t* tile_max, cudaStream_t stream) {
  if (pool.num_tiles == 0) return cudaGetLastError();
  const int64_t blocks = grid_for(pool.num_tiles, 1, kBlocksPerMultiprocessor);
  const Entries entries{pool, position, offsets};
  if (noise) {
    SPARSE_OPTIM_LAUNCH(rank_kernel, blocks, kThreads, stream, Sampled{noise}, entries, tile_max);
  } else {
    SPARSE_OPTIM_LAUNCH(rank_kernel, blocks, kThreads, stream, Exp0{0.f}, entries, tile_max);
  }
  return cudaGetLastError();
}

}  // namespace sparse_optim::cuda
