// cut: the `quota` frozen entries of largest importance, exactly, ties to the lower global index.
//
//   1. bound[j] of each tile (with exp = 0, tile_max itself, perturbed already where entries are
//      sampled); the quota-th largest is the limit.
//   2. Unless exp = 0: the tiles that reach it are opened, the quota-th largest of their exact
//      maxima is the limit.
//   3. Every tile with a bound at or above the limit is listed; no other can hold a winner.
//   4. The quota-th largest key among the entries of listed tiles, and how many of its equals
//      belong, by radix selection: three readings of the listed tiles. No candidate is stored, so
//      that no buffer grows with how many there are.
//   5. Winners are counted by tile, the counts added up in tile order, the winners written.
//
// All on the device: each kernel returns at once if the quota is 0, and kernels over the listed
// tiles stride over a count that a kernel before wrote. The same steps as csrc/cpu/cut.cpp.
// Delegates that stand for groups of candidates: Gaihre et al. 2021, Dr. Top-k, arXiv 2109.08219.
//
// Bytes: 4 per tile some five times; listed tiles (about quota to 3 quota of 16 KB, with their
// parameters unless exp = 0) five or six times, mostly from L2.
#include "core/schedule.h"
#include "cuda/compact.h"
#include "cuda/open_tile.h"
#include "cuda/select.h"

namespace sparse_optim::cuda {
namespace {

// Blocks a multiprocessor; opening a tile is bound by latency, so that many help.
constexpr int kBlocksPerMultiprocessor = 8;
// Keys of an array that a block counts at least: setting up 2048 bins costs as much.
constexpr int64_t kKeysPerBlock = 4096;

struct Scratch {
  Selection* selection;
  int64_t* start;     // (num_tiles,) winners before each listed tile
  int32_t* bound;     // (num_tiles,) keys, by tile
  int32_t* maxima;    // (num_tiles,) exact keys, by listed tile
  int32_t* list;      // (num_tiles,) tiles, ascending
  uint32_t* winners;  // (num_tiles,) by listed tile: entries above the limit << 16 | equal to it
  int32_t* chunk;     // (num_chunks,) of `compact`
};

Scratch layout(void* scratch, int64_t num_tiles) {
  Scratch at;
  at.selection = static_cast<Selection*>(scratch);
  at.start = reinterpret_cast<int64_t*>(at.selection + 1);
  at.bound = reinterpret_cast<int32_t*>(at.start + num_tiles);
  at.maxima = at.bound + num_tiles;
  at.list = at.maxima + num_tiles;
  at.winners = reinterpret_cast<uint32_t*>(at.list + num_tiles);
  at.chunk = reinterpret_cast<int32_t*>(at.winners + num_tiles);
  return at;
}

__global__ void __launch_bounds__(kThreads, kResident)
    prepare_kernel(CutInput in, int64_t capacity, Selection* state, int64_t* new_count) {
  for (int b = int(threadIdx.x); b < kBins; b += kThreads) state->bins[b] = 0;
  if (threadIdx.x != 0) return;
  const int64_t quota =
      step_quota(in.targets, in.num_targets, in.progress, *in.found_inf, capacity);
  state->quota = state->wanted = quota;
  state->ties = state->num_listed = 0;
  state->prefix = state->exhausted = 0;
  state->limit = 1;
  state->least = kInfinityBits;
  state->arrived = 0;
  *new_count = 0;
}

template <class Importance>
__global__ void __launch_bounds__(kThreads, kResident)
    bound_kernel(Importance importance, CutInput in, int64_t num_tiles, const Selection* state,
                 int32_t* bound) {
  if (state->quota == 0) return;
  for (int64_t j = global_thread(); j < num_tiles; j += grid_threads())
    bound[j] =
        bound_key(importance, from_bits(in.tile_max[j]), in.param_bound ? in.param_bound[j] : 0.f);
}

// The exact maxima of the listed tiles, which replace their bounds.
template <class Importance>
__global__ void __launch_bounds__(kThreads, kResident)
    score_kernel(Importance importance, Entries entries, Scratch at) {
  __shared__ uint32_t marks[kTileWords];
  __shared__ int32_t largest;
  if (at.selection->quota == 0) return;
  for (int64_t i = blockIdx.x; i < at.selection->num_listed; i += gridDim.x) {
    if (threadIdx.x == 0) largest = 0;
    int32_t most = 0;
    visit_tile(entries, importance, at.list[i], marks,
               [&](int, int32_t key) { most = max(most, key); });
    most = __reduce_max_sync(kAllLanes, most);
    if (lane() == 0) atomicMax(&largest, most);
    __syncthreads();
    if (threadIdx.x == 0) at.maxima[i] = at.bound[at.list[i]] = largest;
  }
}

// The entries of the listed tiles, as a source of keys.
template <class Importance>
struct ListedEntries {
  Importance importance;
  Entries entries;
  const int32_t* list;

  __device__ int32_t least(const Selection& state) const { return state.limit; }
  template <class Visit>
  __device__ void visit(const Selection& state, Visit&& visit) const {
    __shared__ uint32_t marks[kTileWords];
    for (int64_t i = blockIdx.x; i < state.num_listed; i += gridDim.x)
      visit_tile(entries, importance, list[i], marks, [&](int, int32_t key) { visit(key); });
  }
};

// By one block, from the counts of all listed tiles: where each tile's winners go, and how many
// entries that tie it may keep (the first tiles have them all).
__device__ inline void place_winners(const Scratch& at, int64_t* new_count, float* threshold) {
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

template <class Importance>
__global__ void __launch_bounds__(kThreads, kResident)
    count_kernel(Importance importance, Entries entries, Scratch at, int64_t* new_count,
                 float* threshold) {
  __shared__ uint32_t marks[kTileWords];
  __shared__ uint32_t winners;
  Selection& state = *at.selection;
  if (state.quota == 0) return;
  const int32_t limit = state.limit;
  int32_t least = kInfinityBits;
  for (int64_t i = blockIdx.x; i < state.num_listed; i += gridDim.x) {
    if (threadIdx.x == 0) winners = 0;
    uint32_t mine = 0;
    visit_tile(entries, importance, at.list[i], marks, [&](int, int32_t key) {
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
  if (is_last_block(&state.arrived)) place_winners(at, new_count, threshold);
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

// Winners of a tile as bits, 32 entries a word; each word's thread writes them in order.
template <class Importance>
__global__ void __launch_bounds__(kThreads, kResident)
    write_kernel(Importance importance, Entries entries, Scratch at, NewEntries found) {
  __shared__ uint32_t marks[kTileWords], above[kTileWords], tied[kTileWords];
  if (at.selection->quota == 0) return;
  const int32_t limit = at.selection->limit;
  for (int64_t i = blockIdx.x; i < at.selection->num_listed; i += gridDim.x) {
    if (at.winners[i] == 0) continue;
    const Tile tile =
        visit_tile(entries, importance, at.list[i], marks, [&](int word, int32_t key) {
          const uint32_t is_above = __ballot_sync(kAllLanes, key > limit);
          const uint32_t is_tied = __ballot_sync(kAllLanes, key == limit);
          if (lane() == 0) above[word] = is_above, tied[word] = is_tied;
        });
    const int word = int(threadIdx.x);
    const bool inside = word * kWarp < tile.count;
    const uint32_t ties = inside ? tied[word] : 0;
    const int64_t kept = at.winners[i] & 0xffff;
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
void cut_by(Importance importance, const Entries& entries, const CutInput& in,
            const NewEntries& found, float* threshold, const Scratch& at, cudaStream_t stream) {
  const int64_t num_tiles = entries.pool.num_tiles;
  const int64_t by_key = grid_for(num_tiles, kKeysPerBlock, kBlocksPerMultiprocessor);
  const int64_t by_tile = grid_for(num_tiles, 1, kBlocksPerMultiprocessor);
  constexpr bool kExactBounds = kGradAlone<Importance>;
  const int32_t* bound = kExactBounds ? in.tile_max : at.bound;
  if constexpr (!kExactBounds) {
    SPARSE_OPTIM_LAUNCH(bound_kernel, by_key, kThreads, stream, importance, in, num_tiles,
                        at.selection, at.bound);
  }
  select_kth(KeyArray{bound, num_tiles}, by_key, at.selection, stream);
  compact(bound, num_tiles, at.selection, at.chunk, at.list, stream);
  if constexpr (!kExactBounds) {
    SPARSE_OPTIM_LAUNCH(score_kernel, by_tile, kThreads, stream, importance, entries, at);
    select_kth(KeyArray{at.maxima, -1}, by_key, at.selection, stream);
    compact(bound, num_tiles, at.selection, at.chunk, at.list, stream);
  }
  select_kth(ListedEntries<Importance>{importance, entries, at.list}, by_tile, at.selection,
             stream);
  SPARSE_OPTIM_LAUNCH(count_kernel, by_tile, kThreads, stream, importance, entries, at, found.count,
                      threshold);
  SPARSE_OPTIM_LAUNCH(write_kernel, by_tile, kThreads, stream, importance, entries, at, found);
}

}  // namespace

int64_t cut_scratch_bytes(int64_t num_tiles) {
  const int64_t by_tile = sizeof(int64_t) + 3 * sizeof(int32_t) + sizeof(uint32_t);
  return int64_t(sizeof(Selection)) + num_tiles * by_tile +
         num_chunks(num_tiles) * int64_t(sizeof(int32_t));
}

cudaError_t cut(const Pool& pool, const int32_t* position, const int64_t* offsets,
                const CutInput& in, const NewEntries& found, float* threshold, void* scratch,
                cudaStream_t stream) {
  const Scratch at = layout(scratch, pool.num_tiles);
  SPARSE_OPTIM_LAUNCH(prepare_kernel, 1, kThreads, stream, in, found.capacity, at.selection,
                      found.count);
  if (pool.num_tiles && found.capacity) {
    auto by = [&](auto importance) {
      cut_by(importance, {pool, position, offsets}, in, found, threshold, at, stream);
    };
    if (in.noise) by(Sampled{in.noise});
    else visit_importance(in.exp, in.eps, by);
  }
  return cudaGetLastError();
}

}  // namespace sparse_optim::cuda
