// The winners among few candidates, which are stored: the tiles that may hold winners are read
// once.
//
//   collect  entries at or above the limit, in any order; the last block to finish selects the
//            quota-th largest among them
//   place    a candidate wins if it is above that, or ties it and few enough that tie come before
//   it;
//            how many winners come before it is its place: counted, by one warp a candidate
//
// If there are more candidates than there is room for, as where many entries tie or winners crowd
// into a few tiles, several passes are taken (winners.h). Where bounds are exact, hardly more tiles
// than the quota are at stake: the last block takes them by itself, at the cost of no launch. Where
// they are not, all tiles may be: launches follow, which return at once if they are not needed.
#pragma once
#include "cuda/winners.h"

namespace sparse_optim::cuda {

#if defined(SPARSE_OPTIM_EMULATED)  // small, so that small cases come to every path
constexpr int64_t kCandidates = 160;
#else
constexpr int64_t kCandidates = 1 << 15;
#endif

// Whether a step may collect candidates: as far as the host knows, they will be few. Quotas beyond
// the number of tiles leave no floor.
inline bool few_candidates(int64_t num_tiles, int64_t max_quota) {
  return max_quota <= kCandidates / 8 && 2 * max_quota <= num_tiles;
}

// Selects among the candidates, by one block.
template <class Importance>
__device__ inline void choose(const ListedEntries<Importance>& listed, const int32_t* bound,
                              const CutScratch& at, const NewEntries& found, float* threshold) {
  Selection& state = *at.selection;
  const int64_t count = int64_t(__ldcg(&state.num_candidates));
  __syncthreads();  // all have read the count
  if (count > kCandidates) {
    if constexpr (kGradAlone<Importance>) {
      cut_in_block(listed, bound, listed.entries.pool.num_tiles, at, found, threshold);
    } else if (threadIdx.x == 0) {
      state.passes = 1;
    }
    if (threadIdx.x == 0) state.num_candidates = 0;
    return;
  }
  const KeyArray keys{at.key, count};
  int32_t least = kInfinityBits;
  keys.visit(state, {0, 1}, [&](int32_t key) { least = min(least, key); });
  least = __reduce_min_sync(kAllLanes, least);
  if (lane() == 0) atomicMin(&state.least, least);
  select_kth_in_block(keys, state);
  if (threadIdx.x != 0) return;
  *found.count = count < state.quota ? count : state.quota;
  if (count) *threshold = from_bits(max(state.limit, __ldcg(&state.least)));
}

template <class Importance>
__global__ void __launch_bounds__(kThreads, kResident)
    collect_kernel(ListedEntries<Importance> listed, const int32_t* bound, CutScratch at,
                   NewEntries found, float* threshold) {
  __shared__ uint32_t marks[kWarps][kTileWords];
  Selection& state = *at.selection;
  if (state.quota == 0) return;
  const int32_t limit = state.limit;
  for_each_reaching(bound, listed.entries.pool.num_tiles, limit, [&](int64_t tile_index) {
    visit_tile_by_warp(listed.entries, listed.importance, tile_index, marks[warp()],
                       [&](const Tile& tile, int i, int32_t key) {
                         if (key < limit) return;
                         const auto slot = atomicAdd(&state.num_candidates, 1ull);
                         if (slot >= kCandidates) return;
                         at.key[slot] = key;
                         at.place[slot] = uint64_t(tile.tensor) << 32 | uint64_t(tile.first + i);
                       });
  });
  if (is_last_block(&state.arrived)) choose(listed, bound, at, found, threshold);
}

static __global__ void __launch_bounds__(kThreads, kResident)
    place_kernel(CutScratch at, NewEntries found) {
  const Selection& state = *at.selection;
  if (state.quota == 0) return;
  const int64_t count = int64_t(state.num_candidates), ties = state.ties;
  const int32_t limit = state.limit;
  for (int64_t i = global_thread() / kWarp; i < count; i += grid_threads() / kWarp) {
    const int32_t key = at.key[i];
    const uint64_t place = at.place[i];
    if (key < limit) continue;
    int64_t above = 0, tied = 0;  // that come before it
    for (int64_t j = lane(); j < count; j += kWarp) {
      if (at.place[j] >= place) continue;
      above += at.key[j] > limit;
      tied += at.key[j] == limit;
    }
    above = warp_sum(above);
    tied = warp_sum(tied);
    if (lane() != 0 || (key == limit && tied >= ties)) continue;
    const int64_t out = above + (tied < ties ? tied : ties);
    found.tensor[out] = int32_t(place >> 32);
    found.position[out] = int32_t(place & 0xffffffffu);
  }
}

}  // namespace sparse_optim::cuda
