// The importances of one tile at a time, worked out by a block.
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

// The importance key of an entry; the parameter is read only where it counts.
template <class Importance>
__device__ inline int32_t entry_key(const Importance& importance, const Tile& tile, int64_t i) {
  const Row& row = tile.row;
  const float grad = read(row.grad_dtype, row.grad, i);
  if constexpr (std::is_same_v<Importance, Sampled>)
    return sampled_key(importance, grad, tile.tensor, i);
  else if constexpr (kGradAlone<Importance>) return importance_key(importance(grad, 0.f));
  else return importance_key(importance(grad, read(row.param_dtype, row.param, i)));
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

}  // namespace sparse_optim::cuda
