// The few entries that may win, stored: the tiles that may hold winners are read once.
#pragma once
#include "cuda/winners.h"

namespace sparse_optim::cuda {

// Room of a step's candidates, and of those that are collected tensor by tensor.
#if defined(SPARSE_OPTIM_EMULATED)  // small: small cases then take every path
constexpr int64_t kCandidates = 160, kCollected = 320;
#else
constexpr int64_t kCandidates = 1 << 15, kCollected = 1 << 17;
#endif

// Quotas for which that is enough, as a rule.
inline bool few_candidates(int64_t max_quota) {
  return max_quota <= kCandidates / 8;
}

struct Candidates {
  uint64_t* place;  // (room,) tensor << 32 | position
  int32_t* key;     // (room,)
  float* grad;      // (room,); null where it can be read later
  int64_t room;
};

// Collects the entries of a share of the tiles that reach the limit, in any order. `count` goes
// beyond the room if there are more: how many more is not counted.
template <class Importance>
__device__ inline void collect(const Importance& importance, const Entries& entries,
                               const int32_t* bound, int32_t limit, int64_t first_tensor,
                               unsigned long long* count, const Candidates& out) {
  __shared__ uint32_t marks[kWarps][kTileWords];
  for_each_reaching(bound, entries.pool.num_tiles, limit, [&](int64_t tile_index) {
    visit_tile_by_warp(
        entries, importance, tile_index, marks[warp()],
        [&](const Tile& tile, int i, int32_t key, float grad) {
          const unsigned reaching = __ballot_sync(kAllLanes, key >= limit);
          if (reaching == 0) return;
          unsigned long long slot = 0;
          if (lane() == 0) {
            slot = __ldcg(count);
            if (int64_t(slot) <= out.room)
              slot = atomicAdd(count, static_cast<unsigned long long>(__popc(reaching)));
          }
          slot = __shfl_sync(kAllLanes, slot, 0) + __popc(reaching & ((1u << lane()) - 1u));
          if (key < limit || int64_t(slot) >= out.room) return;
          out.key[slot] = key;
          out.place[slot] = uint64_t(first_tensor + tile.tensor) << 32 | uint64_t(tile.first + i);
          if (out.grad) out.grad[slot] = grad;
        });
  });
}

}  // namespace sparse_optim::cuda
