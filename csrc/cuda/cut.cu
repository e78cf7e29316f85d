// cut: the `quota` frozen entries of largest importance, exactly, ties to the lower global index.
//
//   1. bound[j] of each tile (with exp = 0, tile_max itself, perturbed already where entries are
//      sampled); a floor just below the quota-th largest is the limit.
//   2. Unless exp = 0: the tiles that reach it are opened; a floor of their exact maxima is the
//      limit.
//   3. Only tiles with a bound at or above the limit can hold winners. If the quota is small, their
//      entries at or above the limit are collected in one reading (candidates.h), and the last
//      block to finish selects the quota-th largest of them. How many winners come before a
//      candidate, counted by one warp each, is its place.
//   4. Otherwise, or if there are more candidates than room, as where many entries tie or winners
//      crowd into a few tiles, these tiles are read five times (winners.h). The launches for that
//      follow always, and return at once if they are not needed.
//
// All on the device: each kernel returns at once if the quota is 0. The same result as
// csrc/cpu/cut.cpp. Delegates that stand for groups of candidates: Gaihre et al. 2021, Dr. Top-k,
// arXiv 2109.08219.
//
// Bytes: 4 per tile three times; tiles that reach the limit (about quota of 16 KB, with their
// parameters unless exp = 0) once. 7B in bfloat16, quota 466, exp 0: 24 MB. Predicted: bytes /
// bandwidth = 12 us on A100 (2.0 TB/s), 31 on A6000 (0.77), 7 on H100 (3.35), 5 on H200 (4.8): less
// than its launches take: 5 with exp = 0, else 9, and seven that return at once.
#include "core/schedule.h"
#include "cuda/candidates.h"
#include "cuda/compact.h"
#include "cuda/exponents.h"

namespace sparse_optim::cuda {
namespace {

// Blocks a multiprocessor; opening a tile is bound by latency, so that many help.
constexpr int kBlocksPerMultiprocessor = 8;

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
  state->num_candidates = 0;
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

// Selects among the candidates, by one block.
__device__ inline void choose(const CutScratch& at, const NewEntries& found, float* threshold) {
  Selection& state = *at.selection;
  const int64_t count = int64_t(__ldcg(&state.num_candidates));
  __syncthreads();  // all have read the count
  if (count > kCandidates) {
    if (threadIdx.x != 0) return;
    state.passes = 1;
    state.num_candidates = 0;
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
  Selection& state = *at.selection;
  if (state.quota == 0) return;
  collect(listed.importance, listed.entries, bound, state.limit, 0, &state.num_candidates,
          {at.place, at.key, nullptr, kCandidates});
  if (is_last_block(&state.arrived)) choose(at, found, threshold);
}

__global__ void __launch_bounds__(kThreads, kResident)
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
  select_kth(KeyArray{bound, num_tiles}, by_key, at.selection, kFloorDigits, stream);
  if constexpr (!kExactBounds) {
    SPARSE_OPTIM_LAUNCH(score_kernel, by_warp, kThreads, stream, importance, entries, at);
    select_kth(KeyArray{at.maxima, num_tiles}, by_key, at.selection, kFloorDigits, stream);
  }
  const ListedEntries<Importance> listed{importance, entries, at.list};
  if (collects(num_tiles, found.capacity)) {
    const int64_t by_candidate = grid_for(kCandidates, kWarps, kBlocksPerMultiprocessor);
    SPARSE_OPTIM_LAUNCH(collect_kernel, by_warp, kThreads, stream, listed, bound, at, found,
                        threshold);
    SPARSE_OPTIM_LAUNCH(place_kernel, by_candidate, kThreads, stream, at, found);
  }
  const int64_t by_tile = grid_for(num_tiles, 1, kBlocksPerMultiprocessor);
  compact(bound, num_tiles, at.selection, at.chunk, at.list, stream);
  select_kth(listed, by_tile, at.selection, kAllDigits, stream);
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
