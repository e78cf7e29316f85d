// cut: the `quota` frozen entries of largest importance, exactly, ties to the lower global index.
//
//   1. bound[j] of each tile (with exp = 0, tile_max itself, perturbed already where entries are
//      sampled); a floor just below the quota-th largest is the limit.
//   2. Unless exp = 0: the tiles that reach it are opened; a floor of their exact maxima is the
//      limit.
//   3. Only tiles with a bound at or above the limit can hold winners. If the quota is small, their
//      entries at or above the limit are collected in one reading (candidates.h), and the last
//      block to finish selects the quota-th largest of them and sorts the winners by place.
//   4. If there are more candidates than room, as where winners crowd into a few tiles, three more
//      readings find the quota-th largest key, and collect those above it and those that tie it.
//      Where too many tie it, one block looks for the first of them, in the order of the tiles:
//      at most quota tiles hold winners. The launches for that follow always, and return at once
//      if they are not needed.
//   5. If the quota is large, no candidates are stored: the tiles are read five times (winners.h).
//
// All on the device: each kernel returns at once if the quota is 0. The same result as
// csrc/cpu/cut.cpp. Delegates that stand for groups of candidates: Gaihre et al. 2021, Dr. Top-k,
// arXiv 2109.08219.
//
// Bytes: 4 per tile three times; tiles that reach the limit (about quota of 16 KB, with their
// parameters unless exp = 0) once. 7B in bfloat16, quota 466, exp 0: 24 MB. Predicted: bytes /
// bandwidth = 12 us on A100 (2.0 TB/s), 31 on A6000 (0.77), 7 on H100 (3.35), 5 on H200 (4.8): less
// than its launches take: 4 with exp = 0, else 8, and three that return at once; 10 or 14 if the
// quota is large.
#include "core/schedule.h"
#include "cuda/candidates.h"
#include "cuda/compact.h"
#include "cuda/exponents.h"

namespace sparse_optim::cuda {
namespace {

// Blocks a multiprocessor; opening a tile is bound by latency, so that many help.
constexpr int kBlocksPerMultiprocessor = 8;

__device__ inline Candidates candidates_of(const CutScratch& at) {
  return {at.place, at.key, nullptr, kCandidates};
}

// Quotas beyond the number of tiles leave no floor.
bool collects(int64_t num_tiles, int64_t max_quota) {
  return few_candidates(max_quota) && 2 * max_quota <= num_tiles;
}

__global__ void __launch_bounds__(kThreads, kResident)
    prepare_kernel(CutInput in, int64_t capacity, bool few, Selection* state, int64_t* new_count) {
  for (int b = int(threadIdx.x); b < kBins; b += kThreads) state->bins[b] = 0;
  if (threadIdx.x != 0) return;
  const int64_t quota =
      step_quota(in.targets, in.num_targets, in.progress, *in.found_inf, capacity);
  state->quota = state->wanted = quota;
  state->ties = state->num_listed = 0;
  state->num_candidates = state->num_tied = 0;
  state->prefix = state->exhausted = 0;
  state->limit = 1;
  state->passes = quota && !few;
  state->least = kInfinityBits;
  state->arrived = 0;
  *new_count = 0;
}

template <class Importance>
__global__ void __launch_bounds__(kThreads, kResident)
    bound_kernel(Importance importance, CutInput in, int64_t num_tiles, CutScratch at) {
  if (at.selection->quota == 0) return;
  for (int64_t j = global_thread(); j < num_tiles; j += grid_threads()) {
    at.bound[j] =
        bound_key(importance, from_bits(in.tile_max[j]), in.param_bound ? in.param_bound[j] : 0.f);
    at.maxima[j] = 0;
  }
}

// The exact maxima of the tiles that reach the limit, which also replace their bounds.
template <class Importance>
__global__ void __launch_bounds__(kThreads, kResident)
    score_kernel(Importance importance, Entries entries, CutScratch at) {
  __shared__ uint32_t marks[kWarps][kTileWords];
  if (at.selection->quota == 0) return;
  const int32_t limit = at.selection->limit;
  for_each_reaching(at.bound, entries.pool.num_tiles, limit, [&](int64_t tile_index) {
    int32_t largest = 0;
    visit_tile_by_warp(entries, importance, tile_index, marks[warp()],
                       [&](const Tile&, int, int32_t key, float) { largest = max(largest, key); });
    largest = __reduce_max_sync(kAllLanes, largest);
    if (lane() == 0) at.maxima[tile_index] = at.bound[tile_index] = largest;
  });
}

// Writes the candidates that win, by one block.
__device__ inline void write_best(const Candidates& all, int64_t count, Selection& selection,
                                  const NewEntries& found, float* threshold) {
  const int64_t kept = drop_losers(all, count, selection);
  int32_t least = kInfinityBits;
  for (int64_t i = threadIdx.x; i < kept; i += kThreads) least = min(least, all.key[i]);
  least = __reduce_min_sync(kAllLanes, least);
  if (lane() == 0) atomicMin(&selection.least, least);
  sort_in_block(all.place, kept);
  for (int64_t i = threadIdx.x; i < kept; i += kThreads) {
    found.tensor[i] = int32_t(all.place[i] >> 32);
    found.position[i] = int32_t(all.place[i] & 0xffffffffu);
  }
  if (threadIdx.x != 0) return;
  *found.count = kept;
  if (kept) *threshold = from_bits(__ldcg(&selection.least));
}

// Collects candidates, and counts the first digit of all of them. The last block selects among
// them, or if there are more than room, begins to look for a higher limit.
template <class Importance>
__global__ void __launch_bounds__(kThreads, kResident / 2)
    collect_kernel(ReachingEntries<Importance> reaching, CutScratch at, NewEntries found,
                   float* threshold) {
  __shared__ unsigned bins[kBins];
  Selection& state = *at.selection;
  if (state.quota == 0) return;
  const Digit digit = digit_of(0);
  clear_bins(bins);
  collect(reaching.importance, reaching.entries, reaching.bound, state.limit, false, 0,
          &state.num_candidates, candidates_of(at),
          [&](int32_t key) { atomicAdd(&bins[digit.of(key)], 1u); });
  add_bins(bins, state);
  if (!is_last_block(&state.arrived)) return;
  const int64_t count = int64_t(__ldcg(&state.num_candidates));
  take_digit(state, digit);
  __syncthreads();
  if (count > kCandidates) {
    if (threadIdx.x != 0) return;
    state.passes = 1;
    state.num_candidates = 0;
    return;
  }
  select_kth_in_block(KeyArray{at.key, count}, state, 1);
  write_best(candidates_of(at), count, state, found, threshold);
}

// The first `wanted` entries that equal the limit, appended to `count` candidates by one block, as
// far as there are any: its warps take the tiles that reach it in their order.
template <class Importance>
__device__ inline int64_t add_first_tied(const ReachingEntries<Importance>& reaching, int32_t limit,
                                         int64_t wanted, const Candidates& out, int64_t count) {
  __shared__ uint32_t marks[kWarps][kTileWords];
  __shared__ int64_t list[kThreads];
  int64_t taken = 0;
  const int64_t num_tiles = reaching.entries.pool.num_tiles;
  for (int64_t first = 0; first < num_tiles && taken < wanted; first += kThreads) {
    const int64_t mine = first + threadIdx.x;
    const bool reaches = mine < num_tiles && reaching.bound[mine] >= limit;
    const Prefix listed = block_prefix(reaches);
    if (reaches) list[listed.before] = mine;
    __syncthreads();
    for (int64_t t = 0; t < listed.total && taken < wanted; t += kWarps) {
      const bool opens = t + warp() < listed.total;
      auto visit = [&](auto&& each) {
        if (opens)
          visit_tile_by_warp(reaching.entries, reaching.importance, list[t + warp()], marks[warp()],
                             each);
      };
      int64_t tied = 0;
      visit([&](const Tile&, int, int32_t key, float) { tied += key == limit; });
      tied = warp_sum(tied);
      const Prefix before = block_prefix(lane() == 0 ? tied : 0);
      int64_t slot = taken + __shfl_sync(kAllLanes, before.before, 0);
      visit([&](const Tile& tile, int i, int32_t key, float grad) {
        const unsigned those = __ballot_sync(kAllLanes, key == limit);
        const int64_t own = slot + __popc(those & ((1u << lane()) - 1u));
        if (key == limit && own < wanted)
          out.store(count + own, key, tile.tensor, tile.first + i, grad);
        slot += __popc(those);
      });
      taken += before.total;
    }
    __syncthreads();
  }
  return count + (taken < wanted ? taken : wanted);
}

// Where there were more candidates than room, and the limit is now that of the winners: collects
// those above it, which are fewer than wanted, and those that tie it behind `quota` others. If
// there are too many of these, the last block looks for the first.
template <class Importance>
__global__ void __launch_bounds__(kThreads, kResident / 2)
    collect_again_kernel(ReachingEntries<Importance> reaching, CutScratch at, NewEntries found,
                         float* threshold) {
  __shared__ uint32_t marks[kWarps][kTileWords];
  Selection& state = *at.selection;
  if (state.passes == 0) return;
  const int32_t limit = state.limit;
  const int64_t quota = state.quota;
  const Candidates all = candidates_of(at), above{all.place, all.key, nullptr, quota},
                   tied{all.place + quota, all.key + quota, nullptr, all.room - quota};
  const Entries& entries = reaching.entries;
  for_each_reaching(reaching.bound, entries.pool.num_tiles, limit, [&](int64_t tile_index) {
    visit_tile_by_warp(entries, reaching.importance, tile_index, marks[warp()],
                       [&](const Tile& tile, int i, int32_t key, float grad) {
                         const int64_t slot =
                             take_slot(key > limit, &state.num_candidates, above.room);
                         if (slot < above.room)
                           above.store(slot, key, tile.tensor, tile.first + i, grad);
                         const int64_t other = take_slot(key == limit, &state.num_tied, tied.room);
                         if (other < tied.room)
                           tied.store(other, key, tile.tensor, tile.first + i, grad);
                       });
  });
  if (!is_last_block(&state.arrived)) return;
  int64_t count = int64_t(__ldcg(&state.num_candidates));
  const int64_t num_tied = int64_t(__ldcg(&state.num_tied)), ties = state.ties;
  if (num_tied > tied.room) {
    count = add_first_tied(reaching, limit, ties, all, count);
  } else {
    for (int64_t first = 0; first < num_tied; first += kThreads) {
      const int64_t i = first + threadIdx.x;
      const uint64_t place = i < num_tied ? tied.place[i] : 0;
      __syncthreads();  // all have read; what they write lies before what is still to be read
      if (i < num_tied) all.store(count + i, limit, place >> 32, place & 0xffffffffu, 0.f);
    }
    count += num_tied;
  }
  __syncthreads();
  write_best(all, count, state, found, threshold);
}

template <class Importance>
void cut_by(Importance importance, const Entries& entries, const CutInput& in,
            const NewEntries& found, float* threshold, const CutScratch& at, cudaStream_t stream) {
  const int64_t num_tiles = entries.pool.num_tiles;
  const int64_t by_key = grid_for(num_tiles, kKeysPerBlock, kBlocksPerMultiprocessor);
  const int64_t by_warp = grid_for(num_tiles, kWarps, kBlocksPerMultiprocessor);
  constexpr bool kExactBounds = kGradAlone<Importance>;
  const int32_t* bound = kExactBounds ? in.tile_max : at.bound;
  if constexpr (!kExactBounds) {
    SPARSE_OPTIM_LAUNCH(bound_kernel, by_key, kThreads, stream, importance, in, num_tiles, at);
  }
  select_kth(KeyArray{bound, num_tiles}, by_key, at.selection, 0, kFloorDigits, stream);
  if constexpr (!kExactBounds) {
    SPARSE_OPTIM_LAUNCH(score_kernel, by_warp, kThreads, stream, importance, entries, at);
    select_kth(KeyArray{at.maxima, num_tiles}, by_key, at.selection, 0, kFloorDigits, stream);
  }
  if (collects(num_tiles, found.capacity)) {
    const ReachingEntries<Importance> reaching{importance, entries, bound};
    SPARSE_OPTIM_LAUNCH(collect_kernel, by_warp, kThreads, stream, reaching, at, found, threshold);
    select_kth(reaching, by_warp, at.selection, 1, kAllDigits, stream);
    SPARSE_OPTIM_LAUNCH(collect_again_kernel, by_warp, kThreads, stream, reaching, at, found,
                        threshold);
    return;
  }
  const ListedEntries<Importance> listed{importance, entries, at.list};
  const int64_t by_tile = grid_for(num_tiles, 1, kBlocksPerMultiprocessor);
  compact(bound, num_tiles, at.selection, at.chunk, at.list, stream);
  select_kth(listed, by_tile, at.selection, 0, kAllDigits, stream);
  SPARSE_OPTIM_LAUNCH(count_kernel, by_tile, kThreads, stream, listed, at, found.count, threshold);
  SPARSE_OPTIM_LAUNCH(write_kernel, by_tile, kThreads, stream, listed, at, found);
}

}  // namespace

CutScratch cut_layout(void* scratch, int64_t num_tiles) {
  CutScratch at;
  at.selection = static_cast<Selection*>(scratch);
  at.place = reinterpret_cast<uint64_t*>(at.selection + 1);
  at.start = reinterpret_cast<int64_t*>(at.place + kCandidates);
  at.key = reinterpret_cast<int32_t*>(at.start + num_tiles);
  at.bound = at.key + kCandidates;
  at.maxima = at.bound + num_tiles;
  at.list = at.maxima + num_tiles;
  at.winners = reinterpret_cast<uint32_t*>(at.list + num_tiles);
  at.chunk = reinterpret_cast<int32_t*>(at.winners + num_tiles);
  return at;
}

int64_t cut_scratch_bytes(int64_t num_tiles) {
  const int64_t by_tile = sizeof(int64_t) + 3 * sizeof(int32_t) + sizeof(uint32_t);
  const int64_t by_candidate = sizeof(uint64_t) + sizeof(int32_t);
  return int64_t(sizeof(Selection)) + num_tiles * by_tile + kCandidates * by_candidate +
         num_chunks(num_tiles) * int64_t(sizeof(int32_t));
}

cudaError_t cut(const Pool& pool, const int32_t* position, const int64_t* offsets,
                const CutInput& in, const NewEntries& found, float* threshold, void* scratch,
                cudaStream_t stream) {
  const CutScratch at = cut_layout(scratch, pool.num_tiles);
  SPARSE_OPTIM_LAUNCH(prepare_kernel, 1, kThreads, stream, in, found.capacity,
                      collects(pool.num_tiles, found.capacity), at.selection, found.count);
  if (pool.num_tiles && found.capacity) {
    auto by = [&](auto importance) {
      cut_by(importance, {pool, position, offsets}, in, found, threshold, at, stream);
    };
    if (in.noise) by(Sampled{in.noise});
    else visit_exponent(in.exp, in.eps, by);
  }
  return cudaGetLastError();
}

}  // namespace sparse_optim::cuda
