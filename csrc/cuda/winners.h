// The winners among the entries of listed tiles, in several passes over these tiles: for quotas of
// any size, as no candidate is stored.
//
//   1. The quota-th largest key, and how many of its equals belong: radix selection, three passes.
//   2. Winners are counted by tile, the counts added up in tile order, the winners written.
//
// By a grid, one launch a pass, or by one block in one launch.
#pragma once
#include "cuda/open_tile.h"
#include "cuda/select.h"

namespace sparse_optim::cuda {

struct CutScratch {
  Selection* selection;
  int64_t* start;     // (num_tiles,) winners before each listed tile
  int32_t* bound;     // (num_tiles,) keys, by tile
  int32_t* maxima;    // (num_tiles,) exact keys of tiles that were opened, else 0
  int32_t* list;      // (num_tiles,) tiles, ascending
  uint32_t* winners;  // (num_tiles,) by listed tile: entries above the limit << 16 | equal to it
  int32_t* chunk;     // (num_chunks,) of `compact`
  uint64_t* place;    // (kCandidates,) as in candidates.h
  int32_t* key;       // (kCandidates,)
};

CutScratch cut_layout(void* scratch, int64_t num_tiles);

// The entries of the listed tiles, as a source of keys.
template <class Importance>
struct ListedEntries {
  Importance importance;
  Entries entries;
  const int32_t* list;

  __device__ bool wanted(const Selection& state) const { return state.passes != 0; }
  __device__ int32_t least(const Selection& state) const { return state.limit; }
  template <class Visit>
  __device__ void visit(const Selection& state, Share share, Visit&& visit) const {
    __shared__ uint32_t marks[kTileWords];
    for (int64_t i = share.block; i < state.num_listed; i += share.blocks)
      visit_tile(entries, importance, list[i], marks, [&](int, int32_t key) { visit(key); });
  }
};

// The entries of the tiles whose bound reaches the limit, as a source of keys; the grid shares
// these tiles.
template <class Importance>
struct ReachingEntries {
  Importance importance;
  Entries entries;
  const int32_t* bound;

  __device__ bool wanted(const Selection& state) const { return state.passes != 0; }
  __device__ int32_t least(const Selection& state) const { return state.limit; }
  template <class Visit>
  __device__ void visit(const Selection& state, Share, Visit&& visit) const {
    __shared__ uint32_t marks[kWarps][kTileWords];
    for_each_reaching(bound, entries.pool.num_tiles, state.limit, [&](int64_t tile_index) {
      visit_tile_by_warp(entries, importance, tile_index, marks[warp()],
                         [&](const Tile&, int, int32_t key, float) { visit(key); });
    });
  }
};

// Counts the winners of a share of the listed tiles, and finds the least of them.
template <class Importance>
__device__ inline void count_winners(const ListedEntries<Importance>& listed, const CutScratch& at,
                                     Share share) {
  __shared__ uint32_t marks[kTileWords];
  __shared__ uint32_t winners;
  Selection& state = *at.selection;
  const int32_t limit = state.limit;
  int32_t least = kInfinityBits;
  for (int64_t i = share.block; i < state.num_listed; i += share.blocks) {
    if (threadIdx.x == 0) winners = 0;
    uint32_t mine = 0;
    visit_tile(listed.entries, listed.importance, at.list[i], marks, [&](int, int32_t key) {
      mine += key > limit ? 1u << 16 : uint32_t(key == limit);
      if (key >= limit) least = min(least, key);
    });
    mine = warp_sum(mine);
    if (lane() == 0) atomicAdd(&winners, mine);
    __syncthreads();
    if (threadIdx.x == 0) at.winners[i] = winners;
  }
  least = __reduce_min_sync(kAllLanes, least);
  if (lane() == 0) atomicMin(&state.least, least);
}

// By one block, from the counts of all listed tiles: where each tile's winners go, and how many
// entries that tie it may keep (the first tiles have them all).
__device__ inline void place_winners(const CutScratch& at, int64_t* new_count, float* threshold) {
  const int64_t count = at.selection->num_listed, ties = at.selection->ties;
  int64_t tied_before = 0, kept_before = 0;
  for (int64_t first = 0; first < count; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    const uint32_t winners = i < count ? __ldcg(&at.winners[i]) : 0;
    const int64_t above = winners >> 16, tied = winners & 0xffff;
    const Prefix all_tied = block_prefix(tied);
    const int64_t left = ties - tied_before - all_tied.before;
    const int64_t kept = left < 0 ? 0 : (left < tied ? left : tied);
    const Prefix out = block_prefix(above + kept);
    if (i < count) {
      at.start[i] = kept_before + out.before;
      at.winners[i] = uint32_t(above << 16 | kept);
    }
    tied_before += all_tied.total;
    kept_before += out.total;
  }
  if (threadIdx.x != 0) return;
  *new_count = kept_before;
  if (kept_before) *threshold = from_bits(__ldcg(&at.selection->least));
}

// The lowest `count` set bits.
__device__ inline uint32_t lowest_bits(uint32_t bits, int64_t count) {
  uint32_t kept = 0;
  for (; bits && count > 0; --count) {
    kept |= bits & (0u - bits);
    bits &= bits - 1;
  }
  return kept;
}

// Writes the winners of a share of the listed tiles: as bits, 32 entries a word; each word's thread
// writes them in order.
template <class Importance>
__device__ inline void write_winners(const ListedEntries<Importance>& listed, const CutScratch& at,
                                     const NewEntries& found, Share share) {
  __shared__ uint32_t marks[kTileWords], above[kTileWords], tied[kTileWords];
  const int32_t limit = at.selection->limit;
  for (int64_t i = share.block; i < at.selection->num_listed; i += share.blocks) {
    const uint32_t winners = at.winners[i];
    if (winners == 0) continue;
    const Tile tile = visit_tile(listed.entries, listed.importance, at.list[i], marks,
                                 [&](int word, int32_t key) {
                                   const uint32_t is_above = __ballot_sync(kAllLanes, key > limit);
                                   const uint32_t is_tied = __ballot_sync(kAllLanes, key == limit);
                                   if (lane() == 0) above[word] = is_above, tied[word] = is_tied;
                                 });
    const int word = int(threadIdx.x);
    const bool inside = word * kWarp < tile.count;
    const uint32_t ties = inside ? tied[word] : 0;
    const int64_t kept = winners & 0xffff;
    uint32_t bits = lowest_bits(ties, kept - block_prefix(__popc(ties)).before);
    if (inside) bits |= above[word];
    int64_t out = at.start[i] + block_prefix(__popc(bits)).before;
    for (; bits; bits &= bits - 1, ++out) {
      found.tensor[out] = int32_t(tile.tensor);
      found.position[out] = int32_t(tile.first + word * kWarp + __ffs(int(bits)) - 1);
    }
  }
}

template <class Importance>
__global__ void __launch_bounds__(kThreads, kResident)
    count_kernel(ListedEntries<Importance> listed, CutScratch at, int64_t* new_count,
                 float* threshold) {
  if (at.selection->passes == 0) return;
  count_winners(listed, at, Share::of_grid());
  if (is_last_block(&at.selection->arrived)) place_winners(at, new_count, threshold);
}

template <class Importance>
__global__ void __launch_bounds__(kThreads, kResident)
    write_kernel(ListedEntries<Importance> listed, CutScratch at, NewEntries found) {
  if (at.selection->passes == 0) return;
  write_winners(listed, at, found, Share::of_grid());
}

// All passes by one block, from the bounds of tiles: slow, and so for what hardly ever happens.
template <class Importance>
__device__ inline void cut_in_block(const ListedEntries<Importance>& listed, const int32_t* bound,
                                    int64_t num_tiles, const CutScratch& at,
                                    const NewEntries& found, float* threshold) {
  Selection& state = *at.selection;
  int64_t count = 0;
  for (int64_t first = 0; first < num_tiles; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    const bool reaches = i < num_tiles && bound[i] >= state.limit;
    const Prefix prefix = block_prefix(reaches);
    if (reaches) at.list[count + prefix.before] = int32_t(i);
    count += prefix.total;
  }
  if (threadIdx.x == 0) state.num_listed = count;
  __syncthreads();
  select_kth_in_block(listed, state);
  count_winners(listed, at, {0, 1});
  __syncthreads();
  place_winners(at, found.count, threshold);
  __syncthreads();
  write_winners(listed, at, found, {0, 1});
}

}  // namespace sparse_optim::cuda
