// The importances of one tile at a time, worked out by a block or by a warp.
#pragma once
#include <type_traits>

#include "cuda/noise.h"

namespace sparse_optim::cuda {

constexpr int kTileWords = kMaxTile / kWarp;

// The pool, and the active entries to leave out.
struct Entries {
  Pool pool;
  const int32_t* position;
  const int64_t* offsets;
};

// Whether keys come from the gradient alone: the maxima of tiles are then exact.
template <class Importance>
constexpr bool kGradAlone = std::is_same_v<Importance, Exp0> || std::is_same_v<Importance, Sampled>;

// The importance key of an entry with these values.
template <class Importance>
__device__ inline int32_t key_of(const Importance& importance, float grad, float param,
                                 int64_t tensor, int64_t position) {
  if constexpr (std::is_same_v<Importance, Sampled>)
    return sampled_key(importance, grad, tensor, position);
  else return importance_key(importance(grad, param));
}

// The same of an entry of a tile; the parameter is read only where it counts.
template <class Importance>
__device__ inline int32_t entry_key(const Importance& importance, const Tile& tile, int64_t i) {
  const Row& row = tile.row;
  const float grad = read(row.grad_dtype, row.grad, i);
  const float param = kGradAlone<Importance> ? 0.f : read(row.param_dtype, row.param, i);
  return key_of(importance, grad, param, tile.tensor, i);
}

// Locates a tile and marks its active entries. Every thread of the block takes part, and those of
// the tile before have read its marks.
__device__ inline Tile mark_tile(const Entries& entries, int64_t tile_index,
                                 uint32_t (&marks)[kTileWords]) {
  const int64_t tensor = tensor_of_tile(entries.pool, tile_index);
  const Tile tile = locate_tile(entries.pool, tensor, tile_index);
  const int64_t end = entries.offsets[tensor + 1], last = tile.first + tile.count;
  for (int w = int(threadIdx.x); w < kTileWords; w += kThreads) marks[w] = 0;
  __syncthreads();
  int64_t i = warp_lower_bound(entries.position, entries.offsets[tensor], end, tile.first);
  for (i += threadIdx.x; i < end && entries.position[i] < last; i += kThreads) {
    const int at = int(entries.position[i] - tile.first);
    atomicOr(&marks[at / kWarp], 1u << (at % kWarp));
  }
  __syncthreads();
  return tile;
}

// Calls visit(word, key) for all entries of a tile, 32 consecutive ones by a warp at a time: `word`
// is which 32, key is 0 for active entries and beyond the tile's end. Every thread of the block
// takes part; `marks` is shared memory.
template <class Importance, class Visit>
__device__ inline Tile visit_tile(const Entries& entries, const Importance& importance,
                                  int64_t tile_index, uint32_t (&marks)[kTileWords],
                                  Visit&& visit) {
  const Tile tile = mark_tile(entries, tile_index, marks);
  for (int word = warp(); word * kWarp < tile.count; word += kWarps) {
    const int at = word * kWarp + lane();
    const bool frozen = at < tile.count && !(marks[word] >> lane() & 1u);
    visit(word, frozen ? entry_key(importance, tile, tile.first + at) : 0);
  }
  __syncthreads();
  return tile;
}

// As `mark_tile`, by one warp with marks of its own.
__device__ inline Tile mark_tile_by_warp(const Entries& entries, int64_t tile_index,
                                         uint32_t (&marks)[kTileWords]) {
  const int64_t tensor = tensor_of_tile(entries.pool, tile_index);
  const Tile tile = locate_tile(entries.pool, tensor, tile_index);
  const int64_t end = entries.offsets[tensor + 1], last = tile.first + tile.count;
  __syncwarp();
  for (int w = lane(); w < kTileWords; w += kWarp) marks[w] = 0;
  __syncwarp();
  int64_t i = warp_first_near(entries.position, entries.offsets[tensor], end, tile.first);
  for (i += lane(); i < end && entries.position[i] < last; i += kWarp) {
    const int at = int(entries.position[i] - tile.first);
    if (at >= 0) atomicOr(&marks[at / kWarp], 1u << (at % kWarp));
  }
  __syncwarp();
  return tile;
}

// Entries of a tile that a lane reads at a time, to have the reads in flight together.
constexpr int kAhead = 4;

// Entries at, at + 32, ... of a tile; 0 beyond its end.
__device__ inline void read_ahead(DType dtype, const void* data, const Tile& tile, int at,
                                  float (&out)[kAhead]) {
  visit_dtype(dtype, data, [&](auto* typed) {
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      out[k] = at + k * kWarp < tile.count ? to_float(typed[tile.first + at + k * kWarp]) : 0.f;
  });
}

// Calls visit(tile, at, key, grad) for all entries of a tile, by one warp, all of whose lanes take
// part: key is 0 for active entries and beyond the tile's end.
template <class Importance, class Visit>
__device__ inline void visit_tile_by_warp(const Entries& entries, const Importance& importance,
                                          int64_t tile_index, uint32_t (&marks)[kTileWords],
                                          Visit&& visit) {
  const Tile tile = mark_tile_by_warp(entries, tile_index, marks);
  for (int start = 0; start < tile.count; start += kAhead * kWarp) {
    const int first = start + lane();
    float grad[kAhead], param[kAhead] = {};
    read_ahead(tile.row.grad_dtype, tile.row.grad, tile, first, grad);
    if constexpr (!kGradAlone<Importance>)
      read_ahead(tile.row.param_dtype, tile.row.param, tile, first, param);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int at = first + k * kWarp;
      int32_t key = 0;
      if (at < tile.count && !(marks[at / kWarp] >> (at % kWarp) & 1u))
        key = key_of(importance, grad[k], param[k], tile.tensor, tile.first + at);
      visit(tile, at, key, grad[k]);
    }
  }
}

// Calls open(tile index) for every tile whose bound[tile index] reaches the limit, by the warps of
// a share's blocks. The 32 tiles that a warp looks at lie far apart, as those that reach it lie
// close together.
template <class Bounds, class Open>
__device__ inline void for_each_reaching(const Bounds& bound, int64_t num_tiles, int32_t limit,
                                         Open&& open, Share share) {
  const int64_t warps = share.blocks * kWarps;
  for (int64_t first = share.block * kWarps + warp(); first < num_tiles; first += warps * kWarp) {
    const int64_t mine = first + lane() * warps;
    const bool reaches = mine < num_tiles && bound[mine] >= limit;
    for (unsigned left = __ballot_sync(kAllLanes, reaches); left; left &= left - 1)
      open(first + (__ffs(int(left)) - 1) * warps);
  }
}
template <class Bounds, class Open>
__device__ inline void for_each_reaching(const Bounds& bound, int64_t num_tiles, int32_t limit,
                                         Open&& open) {
  for_each_reaching(bound, num_tiles, limit, open, Share::of_grid());
}

}  // namespace sparse_optim::cuda
