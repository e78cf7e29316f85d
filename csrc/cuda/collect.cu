// collect: an exact running selection over gradients that come one at a time, as in the backward
// pass, each of which may be freed after its call.
//
//   collect_begin  the quota of the step; no candidates
//   collect        frozen entries that reach the limit join the candidates
//   collect_end    the quota best, in global order
//
// The limit is the floor, or just below the quota-th largest maximum of the call's tiles, if that
// is more. The floor is 1 until there are eight times as many candidates as wanted; the last block
// to finish then drops all but the best, ties to the lower global index, and the floor is the least
// of them: entries below it cannot win. Where a call has more entries above the limit than there is
// room for, as where 100,000 entries tie, its last block finds the call's own best by itself, in
// several passes over the tiles (winners.h): slow, some 10 ms by an estimate. So for quotas of at
// most 4,096; the candidates of larger ones are kept by the whole grid (collect_many.cu).
//
// Bytes: 4 per tile three times; tiles that reach the limit once (unless exp = 0 twice, with their
// parameters; two times more where tiles are few). All of 7B in bfloat16 at exp = 0 (1.65e6 tiles,
// about 2,000 opened): 36 MB in a backward pass. Predicted: bytes / bandwidth = 18 us on A100 (2.0
// TB/s), 47 on A6000 (0.77), 11 on H100 (3.35), 8 on H200 (4.8), over 291 tensors: its launches are
// what it takes. Launches: a call three with exp = 0, else four;
// the beginning one, the end two.
#include "core/schedule.h"
#include "cuda/candidates.h"
#include "cuda/collect.h"
#include "cuda/collect_many.h"
#include "cuda/exponents.h"

namespace sparse_optim::cuda {
namespace {

constexpr int kBlocksPerMultiprocessor = 8;

__device__ inline Candidates candidates_of(const Collected& at) {
  return {at.place, at.key, at.grad, kCollected};
}

__global__ void __launch_bounds__(kThreads, kResident)
    begin_kernel(CollectInput in, int64_t max_quota, Collected at) {
  Selection& selection = at.state->selection;
  for (int b = int(threadIdx.x); b < kBins; b += kThreads) selection.bins[b] = 0;
  if (threadIdx.x != 0) return;
  selection.quota = selection.wanted =
      step_quota(in.targets, in.num_targets, in.progress, 0.f, max_quota);
  selection.num_candidates = 0;
  selection.prefix = selection.exhausted = 0;
  selection.arrived = 0;
  at.state->before = 0;
  at.state->floor = 1;
}

// Bounds of tiles; exact maxima of those that reach the floor.
template <class Importance>
__global__ void __launch_bounds__(kThreads, kResident)
    maxima_kernel(Importance importance, Entries entries, const int32_t* tile_max,
                  const float* param_bound, Collected at, int32_t* bound) {
  __shared__ uint32_t marks[kWarps][kTileWords];
  if (at.state->selection.quota == 0) return;
  const int64_t warps = int64_t(gridDim.x) * kWarps;
  for (int64_t j = int64_t(blockIdx.x) * kWarps + warp(); j < entries.pool.num_tiles; j += warps) {
    int32_t key = bound_key(importance, from_bits(tile_max[j]), param_bound ? param_bound[j] : 0.f);
    if (key >= at.state->floor) {
      key = 0;
      visit_tile_by_warp(entries, importance, j, marks[warp()],
                         [&](const Tile&, int, int32_t own, float) { key = max(key, own); });
      key = __reduce_max_sync(kAllLanes, key);
    }
    if (lane() == 0) bound[j] = key;
  }
}

// The entries that reach the floor, as a source of keys; the grid shares their tiles.
template <class Importance>
struct EntriesAboveFloor {
  Importance importance;
  Entries entries;
  const int32_t* bound;
  const int32_t* floor;

  __device__ bool wanted(const Selection& state) const { return state.quota != 0; }
  __device__ int32_t least(const Selection&) const { return *floor; }
  template <class Visit>
  __device__ void visit(const Selection&, Share, Visit&& visit) const {
    __shared__ uint32_t marks[kWarps][kTileWords];
    for_each_reaching(bound, entries.pool.num_tiles, *floor, [&](int64_t tile_index) {
      visit_tile_by_warp(entries, importance, tile_index, marks[warp()],
                         [&](const Tile&, int, int32_t key, float) { visit(key); });
    });
  }
};

// Drops all but the `quota` best of `count` candidates, by one block; returns how many are left.
// Raises the floor.
__device__ inline int64_t keep_best(const Collected& at, int64_t count) {
  Selection& selection = at.state->selection;
  if (count < selection.quota) return count;
  select_kth_in_block(KeyArray{at.key, count}, selection);
  const int32_t limit = selection.limit;
  const int64_t kept = drop_losers(candidates_of(at), count, selection);
  if (threadIdx.x == 0) at.state->floor = limit;
  __syncthreads();
  return kept;
}

// The best entries of a call's tensors above the selection's limit, added to `count` candidates by
// one block in several passes; returns how many there are then.
template <class Importance>
__device__ inline int64_t add_best(const ListedEntries<Importance>& listed, const int32_t* bound,
                                   bool scored, int64_t first_tensor, const CutScratch& work,
                                   const NewEntries& found, const Collected& at, int64_t count) {
  const Pool& pool = listed.entries.pool;
  cut_in_block(listed, bound, pool.num_tiles, work, found, &at.state->threshold);
  __syncthreads();
  const int64_t number = *found.count;
  for (int64_t q = threadIdx.x; q < number; q += kThreads) {
    const int64_t tensor = found.tensor[q], position = found.position[q];
    const Row row = read_row(pool.table, tensor);
    const float grad = read(row.grad_dtype, row.grad, position);
    const bool reads_param = scored || !kGradAlone<Importance>;
    const float param = reads_param ? read(row.param_dtype, row.param, position) : 0.f;
    at.key[count + q] = key_of(listed.importance, grad, param, tensor, position);
    at.place[count + q] = uint64_t(first_tensor + tensor) << 32 | uint64_t(position);
    at.grad[count + q] = scored ? param : grad;
  }
  __syncthreads();
  return count + number;
}

// It needs more than 64 registers.
template <class Importance>
__global__ void __launch_bounds__(kThreads, kResident / 2)
    collect_kernel(ListedEntries<Importance> listed, const int32_t* bound, bool scored,
                   int64_t first_tensor, CutScratch work, NewEntries found, Collected at) {
  Selection& selection = at.state->selection;
  if (selection.quota == 0) return;
  const int32_t limit = max(selection.limit, at.state->floor);
  collect(listed.importance, listed.entries, bound, limit, scored, first_tensor,
          &selection.num_candidates, candidates_of(at), [](int32_t) {});
  if (!is_last_block(&selection.arrived)) return;
  int64_t count = int64_t(__ldcg(&selection.num_candidates));
  if (count > kCollected) {
    if (threadIdx.x == 0) selection.limit = limit;
    __syncthreads();
    count = add_best(listed, bound, scored, first_tensor, work, found, at, at.state->before);
  }
  if (count > min(8 * selection.quota, kCollected / 2)) count = keep_best(at, count);
  if (threadIdx.x == 0) selection.num_candidates = at.state->before = count;
}

// Leaves the best, as many as there is room for, or none if the step is to be skipped.
__global__ void __launch_bounds__(kThreads, kResident)
    finish_kernel(const float* found_inf, Collected at, NewEntries found, float* threshold) {
  Selection& selection = at.state->selection;
  if (threadIdx.x == 0) selection.quota = selection.wanted = min(selection.quota, found.capacity);
  __syncthreads();
  int64_t count = *found_inf != 0.f || selection.quota == 0 ? 0 : at.state->before;
  if (count) count = keep_best(at, count);
  __shared__ int32_t least;
  if (threadIdx.x == 0) least = kInfinityBits;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < count; i += kThreads) atomicMin(&least, at.key[i]);
  __syncthreads();
  if (threadIdx.x != 0) return;
  at.state->before = *found.count = count;
  if (count) *threshold = from_bits(least);
}

// Winners and their gradients by place, which is how many come before: by one warp each.
__global__ void __launch_bounds__(kThreads, kResident)
    order_kernel(Collected at, NewEntries found, float* grad) {
  const int64_t count = at.state->before;
  for (int64_t i = global_thread() / kWarp; i < count; i += grid_threads() / kWarp) {
    const uint64_t place = at.place[i];
    int64_t before = 0;
    for (int64_t j = lane(); j < count; j += kWarp) before += at.place[j] < place;
    before = warp_sum(before);
    if (lane() != 0) continue;
    found.tensor[before] = int32_t(place >> 32);
    found.position[before] = int32_t(place & 0xffffffffu);
    grad[before] = at.grad[i];
  }
}

Collected layout(void* buffer) {
  Collected at;
  at.state = static_cast<CollectState*>(buffer);
  at.place = reinterpret_cast<uint64_t*>(at.state + 1);
  at.key = reinterpret_cast<int32_t*>(at.place + kCollected);
  at.grad = reinterpret_cast<float*>(at.key + kCollected);
  return at;
}

}  // namespace

int64_t collected_bytes(int64_t max_quota) {
  if (!few_candidates(max_quota)) return many_collected_bytes(max_quota);
  return int64_t(sizeof(CollectState)) +
         kCollected * int64_t(sizeof(uint64_t) + sizeof(int32_t) + sizeof(float));
}

cudaError_t collect_begin(const CollectInput& in, int64_t max_quota, void* collected,
                          cudaStream_t stream) {
  if (!few_candidates(max_quota)) {
    collect_many_begin(in, max_quota, collected, stream);
    return cudaGetLastError();
  }
  SPARSE_OPTIM_LAUNCH(begin_kernel, 1, kThreads, stream, in, max_quota, layout(collected));
  return cudaGetLastError();
}

cudaError_t collect(const Pool& pool, const int32_t* position, const int64_t* offsets,
                    const int32_t* tile_max, const float* param_bound, double exp, float eps,
                    bool scored, int64_t first_tensor, int64_t max_quota, void* collected,
                    void* scratch, cudaStream_t stream) {
  if (pool.num_tiles == 0 || max_quota == 0) return cudaSuccess;
  const Entries entries{pool, position, offsets};
  if (!few_candidates(max_quota)) {
    const CollectCall call{entries, tile_max, param_bound, exp, eps, scored, first_tensor};
    collect_many(call, max_quota, collected, stream);
    return cudaGetLastError();
  }
  const Collected at = layout(collected);
  CutScratch work = cut_layout(scratch, pool.num_tiles);
  work.selection = &at.state->selection;
  // The best of a call are listed where `cut` has its candidates.
  int32_t* const tensor = reinterpret_cast<int32_t*>(work.place);
  const NewEntries found{tensor, tensor + kCandidates, &at.state->found, max_quota};
  const int64_t blocks = grid_for(pool.num_tiles, kWarps, kBlocksPerMultiprocessor);
  visit_exponent(exp, eps, [&](auto importance) {
    using Importance = decltype(importance);
    const int32_t* bound = tile_max;
    if constexpr (!kGradAlone<Importance>) {
      SPARSE_OPTIM_LAUNCH(maxima_kernel, blocks, kThreads, stream, importance, entries, tile_max,
                          param_bound, at, work.bound);
      bound = work.bound;
    }
    if (pool.num_tiles >= 2 * max_quota) {
      const int64_t by_key = grid_for(pool.num_tiles, kKeysPerBlock, kBlocksPerMultiprocessor);
      select_kth(KeyArray{bound, pool.num_tiles}, by_key, work.selection, 0, kFloorDigits, stream);
    } else {
      const EntriesAboveFloor<Importance> above{importance, entries, bound, &at.state->floor};
      select_kth(above, blocks, work.selection, 0, kFloorDigits, stream);
    }
    const ListedEntries<Importance> listed{importance, entries, work.list};
    SPARSE_OPTIM_LAUNCH(collect_kernel, blocks, kThreads, stream, listed, bound, scored,
                        first_tensor, work, found, at);
  });
  return cudaGetLastError();
}

cudaError_t collect_end(const float* found_inf, const NewEntries& found, float* threshold,
                        float* grad, int64_t max_quota, void* collected, cudaStream_t stream) {
  if (!few_candidates(max_quota)) {
    collect_many_end(found_inf, found, threshold, grad, max_quota, collected, stream);
    return cudaGetLastError();
  }
  const Collected at = layout(collected);
  SPARSE_OPTIM_LAUNCH(finish_kernel, 1, kThreads, stream, found_inf, at, found, threshold);
  if (found.capacity) {
    const int64_t blocks = grid_for(found.capacity, kWarps, kBlocksPerMultiprocessor);
    SPARSE_OPTIM_LAUNCH(order_kernel, blocks, kThreads, stream, at, found, grad);
  }
  return cudaGetLastError();
}

}  // namespace sparse_optim::cuda
