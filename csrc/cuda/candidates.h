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

  __device__ void store(int64_t slot, int32_t key_of, int64_t tensor, int64_t position,
                        float grad_of) const {
    key[slot] = key_of;
    place[slot] = uint64_t(tensor) << 32 | uint64_t(position);
    if (grad) grad[slot] = grad_of;
  }
};

// A slot for each lane that wants one, or `room` if there is none left; by a whole warp. `count`
// goes beyond the room if more are wanted: how many more is not counted.
__device__ inline int64_t take_slot(bool wants, unsigned long long* count, int64_t room) {
  const unsigned wanting = __ballot_sync(kAllLanes, wants);
  if (wanting == 0) return room;
  unsigned long long slot = 0;
  if (lane() == 0) {
    slot = __ldcg(count);
    if (int64_t(slot) <= room)
      slot = atomicAdd(count, static_cast<unsigned long long>(__popc(wanting)));
  }
  slot = __shfl_sync(kAllLanes, slot, 0) + __popc(wanting & ((1u << lane()) - 1u));
  return wants && int64_t(slot) < room ? int64_t(slot) : room;
}

// Collects the entries of a share of the tiles that reach the limit, in any order, and calls
// note(key) for each, whether there was room for it or not. With `scored`, gradients are where the
// pool has its parameters.
template <class Importance, class Note>
__device__ inline void collect(const Importance& importance, const Entries& entries,
                               const int32_t* bound, int32_t limit, bool scored,
                               int64_t first_tensor, unsigned long long* count,
                               const Candidates& out, Note&& note) {
  __shared__ uint32_t marks[kWarps][kTileWords];
  for_each_reaching(bound, entries.pool.num_tiles, limit, [&](int64_t tile_index) {
    visit_tile_by_warp(entries, importance, tile_index, marks[warp()],
                       [&](const Tile& tile, int i, int32_t key, float grad) {
                         if (key >= limit) note(key);
                         const int64_t slot = take_slot(key >= limit, count, out.room);
                         if (slot >= out.room) return;
                         const Row& row = tile.row;
                         const int64_t position = tile.first + i;
                         if (scored) grad = read(row.param_dtype, row.param, position);
                         out.store(slot, key, first_tensor + tile.tensor, position, grad);
                       });
  });
}

// Candidates that tie the limit, by what decides among them: the lower tensor, then the lower
// position, as keys of which the largest belong.
struct Tied {
  const Candidates& all;
  int64_t count;
  int32_t limit;
  int64_t tensor;  // < 0: ranks tensors; else the positions of this one

  __device__ int32_t least(const Selection&) const { return 1; }
  template <class Visit>
  __device__ void visit(const Selection&, Share, Visit&& visit) const {
    for (int64_t i = threadIdx.x; i < count; i += kThreads) {
      if (all.key[i] != limit) continue;
      const int64_t of_tensor = int64_t(all.place[i] >> 32);
      if (tensor < 0) visit(INT32_MAX - int32_t(of_tensor));
      else if (of_tensor == tensor) visit(INT32_MAX - int32_t(all.place[i] & 0xffffffffu));
    }
  }
};

// The place of the last of the `ties` candidates that belong among those that tie the limit.
__device__ inline uint64_t last_tied(const Candidates& all, int64_t count, int32_t limit,
                                     int64_t ties, Selection& selection) {
  if (threadIdx.x == 0) selection.wanted = ties;
  __syncthreads();
  select_kth_in_block(Tied{all, count, limit, -1}, selection);
  const int64_t tensor = INT32_MAX - selection.limit;
  __syncthreads();
  if (threadIdx.x == 0) selection.wanted = selection.ties;
  __syncthreads();
  select_kth_in_block(Tied{all, count, limit, tensor}, selection);
  return uint64_t(tensor) << 32 | uint64_t(INT32_MAX - selection.limit);
}

// Drops the candidates below a selection's limit, and those that tie it in vain: the higher places.
// By one block; returns how many are left. `selection` is used up.
__device__ inline int64_t drop_losers(const Candidates& all, int64_t count, Selection& selection) {
  const int32_t limit = selection.limit;
  const int64_t ties = selection.ties;
  int64_t tied = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) tied += all.key[i] == limit;
  tied = block_prefix(tied).total;  // its barriers: all have read the selection
  const uint64_t last = tied > ties ? last_tied(all, count, limit, ties, selection) : UINT64_MAX;
  int64_t kept = 0;
  for (int64_t first = 0; first < count; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    const int32_t key = i < count ? all.key[i] : 0;
    const uint64_t place = i < count ? all.place[i] : 0;
    const float grad = i < count && all.grad ? all.grad[i] : 0.f;
    const bool belongs = key > limit || (i < count && key == limit && place <= last);
    const Prefix prefix = block_prefix(belongs);  // its barriers: all have read
    if (belongs) {
      const int64_t to = kept + prefix.before;
      all.key[to] = key;
      all.place[to] = place;
      if (all.grad) all.grad[to] = grad;
    }
    kept += prefix.total;
  }
  __syncthreads();
  return kept;
}

// Sorts, ascending, by one block (bitonic); what is behind the values, up to the next power of two,
// is overwritten.
__device__ inline void sort_in_block(uint64_t* values, int64_t count) {
  int64_t size = 1;
  while (size < count) size *= 2;
  for (int64_t i = count + threadIdx.x; i < size; i += kThreads) values[i] = UINT64_MAX;
  __syncthreads();
  for (int64_t run = 2; run <= size; run *= 2) {
    for (int64_t step = run / 2; step > 0; step /= 2) {
      for (int64_t i = threadIdx.x; i < size / 2; i += kThreads) {
        const int64_t low = i / step * 2 * step + i % step, high = low + step;
        const uint64_t a = values[low], b = values[high];
        if ((a > b) == ((low & run) == 0)) {
          values[low] = b;
          values[high] = a;
        }
      }
      __syncthreads();
    }
  }
}

}  // namespace sparse_optim::cuda
