// collect for large quotas: the same running selection as collect.cu, with nothing that grows with
// the quota left to one block.
//
//   1. The call's frozen entries that reach the floor join the candidates. If there is room for all
//      of them, that is it: the launches that follow return at once.
//   2. Else the quota-th best of the candidates before the call and of the call's entries is looked
//      for, digit by digit (entry_rank.h), four digits in as many launches, until little more than
//      the quota reaches what was found. Only if even these leave more than there is room for
//      does one block find more digits by itself, slowly: where entries tie in a pool of at least
//      16 million times as many places as half the room (2^39 for quotas up to 32,768).
//   3. The entries that reach it are moved to the other half of the buffer. It is the new floor:
//      at least as many as are wanted reach it, so that no other can win.
//
// A half has room for twice the largest quota. In the end the same digits, to the last, leave
// exactly the quota, which is then sorted by place (collect_order.cu). Of two entries that tie the
// lower place ranks higher, so that ties need no passes of their own.
//
// Launches: a call takes six, for any exponent; the beginning one; the end twelve, two of which
// sort, and one for each factor of eight in max_quota above 1,024.
//
// Bytes: 4 per tile; tiles whose bound reaches the floor once, and at least twice more in calls
// that make room; 16 a candidate that is written. Of 7B in bfloat16 at exp = 0, 500,000 of 6.74
// billion entries where max_quota is twice as much, all 224 large tensors alike: by their expected
// values, four calls make room and 71% of the tiles are opened once, 10.4 GB in a backward pass.
// Predicted: bytes / bandwidth = 5.2 ms on A100 (2.0 TB/s), 13 on A6000 (0.77), 3.1 on H100
// (3.35), 2.2 on H200 (4.8). Where all entries tie and lower tensors come later,
// every call makes room, and reads its gradient six times: 81 GB, 40 ms on A100.
#include "core/schedule.h"
#include "cuda/collect_many.h"
#include "cuda/collected_halves.h"
#include "cuda/exponents.h"

namespace sparse_optim::cuda {
namespace {

constexpr int kBlocksPerMultiprocessor = 8;
constexpr int kDigitsOfCall = 4;  // beside the first

// The bound of each tile, worked out where it is asked for.
template <class Importance>
struct TileBounds {
  Importance importance;
  const int32_t* tile_max;
  const float* param_bound;

  __device__ int32_t operator[](int64_t j) const {
    if constexpr (kGradAlone<Importance>) return tile_max[j];
    else return bound_key(importance, from_bits(tile_max[j]), param_bound ? param_bound[j] : 0.f);
  }
};

// Sources of entries: visit(share, limit, f) calls f(key, place, gradient) for all that may reach a
// key and for others, by whole warps; `gradient` reads it. Keys of 0 stand for nothing.
struct KeptCandidates {
  Halves halves;

  template <class Visit>
  __device__ void visit(Share share, int32_t, Visit&& visit) const {
    const Candidates all = halves.of(halves.state->half);
    const int64_t count = halves.state->kept, step = share.blocks * kThreads;
    for (int64_t first = share.block * kThreads; first < count; first += step) {
      const int64_t i = first + threadIdx.x;
      const int32_t key = i < count ? all.key[i] : 0;
      const uint64_t place = i < count ? all.place[i] : 0;
      visit(key, place, [&] { return all.grad[i]; });
    }
  }
};

// Those of the call that reach the floor; others have a key of 0.
template <class Importance>
struct EntriesOfCall {
  Importance importance;
  Entries entries;
  TileBounds<Importance> bound;
  bool scored;  // gradients are where the pool has its parameters
  int64_t first_tensor;
  const Limit* floor;

  template <class Visit>
  __device__ void visit(Share share, int32_t limit, Visit&& visit) const {
    __shared__ uint32_t marks[kWarps][kTileWords];
    const Limit least = *floor;
    auto open = [&](int64_t tile_index) {
      visit_tile_by_warp(
          entries, importance, tile_index, marks[warp()],
          [&](const Tile& tile, int i, int32_t key, float grad) {
            const int64_t position = tile.first + i;
            const uint64_t place = uint64_t(first_tensor + tile.tensor) << 32 | uint64_t(position);
            const Row& row = tile.row;
            visit(least.admits(key, place) ? key : 0, place,
                  [&] { return scored ? read(row.param_dtype, row.param, position) : grad; });
          });
    };
    for_each_reaching(bound, entries.pool.num_tiles, max(limit, least.key), open, share);
  }
};

template <class Importance>
struct KeptAndOfCall {
  KeptCandidates kept;
  EntriesOfCall<Importance> of_call;

  template <class Visit>
  __device__ void visit(Share share, int32_t limit, Visit&& visit) const {
    kept.visit(share, limit, visit);
    of_call.visit(share, limit, visit);
  }
};

__global__ void __launch_bounds__(kThreads, kResident)
    begin_kernel(CollectInput in, int64_t max_quota, Halves halves) {
  ManyState& state = *halves.state;
  for (int b = int(threadIdx.x); b < kBins; b += kThreads) state.selection.bins[b] = 0;
  if (threadIdx.x != 0) return;
  const int64_t quota = step_quota(in.targets, in.num_targets, in.progress, 0.f, max_quota);
  state.selection.quota = quota;
  state.selection.prefix = state.selection.exhausted = 0;
  state.selection.num_candidates = 0;
  state.selection.arrived = 0;
  state.floor = {1, UINT64_MAX};
  state.bits = {1, 1};
  // A floor far below what it could be costs more tiles than making room does.
  state.room = min(halves.size, max(8 * quota, kHalf));
  state.kept = 0;
  state.half = state.selecting = state.moving = 0;
}

// Begins to look for the `quota` best: by the first digits, which were counted.
__device__ inline void take_rank_digit(ManyState& state, RankDigit digit) {
  Selection& selection = state.selection;
  __syncthreads();
  take_digit(selection, Digit{0, digit.bits});
  __syncthreads();
  if (threadIdx.x == 0) {
    digit.set(state.cut, selection.prefix);
    selection.prefix = 0;
    state.reaching = selection.quota - selection.wanted + selection.within;
    state.selecting = state.reaching > state.enough;
  }
  __syncthreads();
}
__device__ inline void begin_selecting(ManyState& state, int64_t enough) {
  if (threadIdx.x == 0) {
    state.selection.wanted = state.selection.quota;
    state.selection.num_candidates = 0;
    state.selection.least = kInfinityBits;
    state.cut = {0, 0};
    state.enough = enough;
    state.moving = 1;
  }
  take_rank_digit(state, kFirstRankDigit);
}

// Counts the digit of those entries of a share that follow the cut so far.
template <class Source>
__device__ inline void count_rank_digit(const Source& source, ManyState& state, Share share,
                                        RankDigit digit) {
  __shared__ unsigned bins[kBins];
  clear_bins(bins);
  const EntryRank cut = state.cut;
  const PlaceBits bits = state.bits;
  source.visit(share, limit_of(cut, bits).key, [&](int32_t key, uint64_t place, auto&&) {
    if (key == 0) return;
    const EntryRank rank = rank_of(key, place, bits);
    if (digit.follows(cut, rank)) atomicAdd(&bins[digit.of(rank)], 1u);
  });
  add_bins(bins, state.selection);
}

// With `is_last`, the digits that are still needed are found by one block.
template <class Source>
__global__ void __launch_bounds__(kThreads, kResident / 2)
    rank_digit_kernel(Source source, ManyState* at, RankDigit digit, bool is_last) {
  ManyState& state = *at;
  if (!state.selecting) return;
  count_rank_digit(source, state, Share::of_grid(), digit);
  if (!is_last_block(&state.selection.arrived)) return;
  take_rank_digit(state, digit);
  if (!is_last) return;
  // Should other code change a gradient meanwhile, no digit may be enough.
  while (state.selecting && state.reaching > state.room && !digit.is_last()) {
    digit = digit_after(digit);
    count_rank_digit(source, state, {0, 1}, digit);
    take_rank_digit(state, digit);
  }
  __syncthreads();
  if (threadIdx.x == 0) state.selecting = 0;
}

// It needs more than 64 registers.
template <class Importance>
__global__ void __launch_bounds__(kThreads, kResident / 2)
    join_kernel(EntriesOfCall<Importance> of_call, PlaceBits bits, Halves halves) {
  __shared__ unsigned bins[kBins];
  ManyState& state = *halves.state;
  Selection& selection = state.selection;
  if (selection.quota == 0) return;
  clear_bins(bins);
  const Candidates out = halves.of(state.half);
  of_call.visit(Share::of_grid(), 1, [&](int32_t key, uint64_t place, auto&& grad) {
    if (key) atomicAdd(&bins[digit_of(0).of(key)], 1u);
    const int64_t slot = take_slot(key != 0, &selection.num_candidates, out.room);
    if (slot < out.room) out.store(slot, key, place >> 32, place & 0xffffffffu, grad());
  });
  add_bins(bins, selection);
  if (!is_last_block(&selection.arrived)) return;
  const int64_t count = int64_t(__ldcg(&selection.num_candidates));
  if (threadIdx.x == 0) {
    state.bits.tensor = max(state.bits.tensor, bits.tensor);
    state.bits.position = max(state.bits.position, bits.position);
    if (count <= out.room) state.kept = count;
  }
  __syncthreads();
  if (count > out.room) begin_selecting(state, selection.quota + (out.room - selection.quota) / 8);
}

// Moves what reaches the cut to the other half.
template <class Source>
__global__ void __launch_bounds__(kThreads, kResident / 2)
    make_room_kernel(Source source, Halves halves) {
  __shared__ unsigned bins[kBins];
  ManyState& state = *halves.state;
  Selection& selection = state.selection;
  if (!state.moving) return;
  clear_bins(bins);
  const Limit cut = limit_of(state.cut, state.bits);
  const Candidates out = halves.of(1 - state.half);
  int32_t least = kInfinityBits;
  source.visit(Share::of_grid(), cut.key, [&](int32_t key, uint64_t place, auto&& grad) {
    const bool stays = key != 0 && cut.admits(key, place);
    const int64_t slot = take_slot(stays, &selection.num_candidates, out.room);
    if (slot >= out.room) return;
    out.store(slot, key, place >> 32, place & 0xffffffffu, grad());
    atomicAdd(&bins[digit_of(0).of(key)], 1u);
    least = min(least, key);
  });
  least = __reduce_min_sync(kAllLanes, least);
  if (lane() == 0) atomicMin(&selection.least, least);
  add_bins(bins, selection);
  if (!is_last_block(&selection.arrived) || threadIdx.x != 0) return;
  selection.num_candidates = state.kept = min(int64_t(__ldcg(&selection.num_candidates)), out.room);
  state.half = 1 - state.half;
  state.moving = 0;
  if (!state.floor.admits(cut.key, cut.place)) return;
  state.floor = cut;
}

// Nothing wins in a step that is to be skipped, and no more than there is room for.
__global__ void __launch_bounds__(kThreads, kResident)
    end_kernel(const float* found_inf, NewEntries found, Halves halves) {
  ManyState& state = *halves.state;
  const int64_t quota = min(state.selection.quota, found.capacity);
  const int64_t count = *found_inf != 0.f || quota == 0 ? 0 : state.kept;
  __syncthreads();
  if (threadIdx.x == 0) {
    state.selection.quota = quota;
    state.kept = *found.count = count;
  }
  __syncthreads();
  if (count > quota) {
    begin_selecting(state, quota);
  } else if (threadIdx.x == 0 && count) {  // all of them win
    state.selection.num_candidates = 0;
    state.selection.least = kInfinityBits;
    state.cut = {0, 0};
    state.moving = 1;
  }
}

int64_t blocks_for_kept(const Halves& halves) {
  return grid_for(halves.size, kKeysPerBlock, kBlocksPerMultiprocessor);
}

}  // namespace

int64_t many_collected_bytes(int64_t max_quota) {
  return int64_t(sizeof(ManyState)) +
         2 * half_size(max_quota) * int64_t(sizeof(uint64_t) + sizeof(int32_t) + sizeof(float));
}

void collect_many_begin(const CollectInput& in, int64_t max_quota, void* collected,
                        cudaStream_t stream) {
  SPARSE_OPTIM_LAUNCH(begin_kernel, 1, kThreads, stream, in, max_quota,
                      halves_of(collected, max_quota));
}

void collect_many(const CollectCall& call, int64_t max_quota, void* collected,
                  cudaStream_t stream) {
  const Halves halves = halves_of(collected, max_quota);
  const Pool& pool = call.entries.pool;
  const PlaceBits bits{bits_of(call.first_tensor + pool.num_tensors - 1),
                       bits_of(pool.num_tiles * pool.tile - 1)};
  const int64_t by_warp = grid_for(pool.num_tiles, kWarps, kBlocksPerMultiprocessor);
  const int64_t blocks = std::max(by_warp, blocks_for_kept(halves));
  visit_exponent(call.exp, call.eps, [&](auto importance) {
    using Importance = decltype(importance);
    const EntriesOfCall<Importance> of_call{
        importance,  call.entries,      {importance, call.tile_max, call.param_bound},
        call.scored, call.first_tensor, &halves.state->floor};
    SPARSE_OPTIM_LAUNCH(join_kernel, by_warp, kThreads, stream, of_call, bits, halves);
    const KeptAndOfCall<Importance> both{{halves}, of_call};
    RankDigit digit = kFirstRankDigit;
    for (int d = 1; d <= kDigitsOfCall; ++d) {
      digit = digit_after(digit);
      SPARSE_OPTIM_LAUNCH(rank_digit_kernel, blocks, kThreads, stream, both, halves.state, digit,
                          d == kDigitsOfCall);
    }
    SPARSE_OPTIM_LAUNCH(make_room_kernel, blocks, kThreads, stream, both, halves);
  });
}

void collect_many_end(const float* found_inf, const NewEntries& found, float* threshold,
                      float* grad, int64_t max_quota, void* collected, cudaStream_t stream) {
  const Halves halves = halves_of(collected, max_quota);
  const KeptCandidates kept{halves};
  const int64_t blocks = blocks_for_kept(halves);
  SPARSE_OPTIM_LAUNCH(end_kernel, 1, kThreads, stream, found_inf, found, halves);
  if (found.capacity == 0) return;
  for (RankDigit digit = kFirstRankDigit; !digit.is_last();) {
    digit = digit_after(digit);
    SPARSE_OPTIM_LAUNCH(rank_digit_kernel, blocks, kThreads, stream, kept, halves.state, digit,
                        digit.is_last());
  }
  SPARSE_OPTIM_LAUNCH(make_room_kernel, blocks, kThreads, stream, kept, halves);
  write_in_order(halves, found, threshold, grad, stream);
}

}  // namespace sparse_optim::cuda
