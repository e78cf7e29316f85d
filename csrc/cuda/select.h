// Radix selection: the k-th largest of many 31-bit keys, and how many of its equals belong.
//
// Passes over the keys, 11 + 11 + 9 bits from the top: each counts the digit of the keys that agree
// with the prefix found so far; the last block to finish finds the digit's bin that holds the k-th
// largest. Counts are integers, so that the order of the additions does not matter. A key of 0
// never counts. Without the last pass the result is a floor, at most 2^-14 below the k-th largest.
//
// Not by cub: CUDA 13.0 has no device-wide selection of the k-th, and its sorts take the number of
// keys from the host, which does not know how many tiles are listed. Of its blocks' pieces only
// BlockScan and BlockReduce would be of use, for the few lines of block_prefix and block_sum; the
// emulator, which has no cub, would then run other code in their place.
#pragma once
#include "core/importance.h"
#include "cuda/device.h"

namespace sparse_optim::cuda {

struct Digit {
  int shift, bits;

  SPARSE_OPTIM_INLINE int of(int32_t key) const { return (key >> shift) & ((1 << bits) - 1); }
};
constexpr int kAllDigits = 3, kFloorDigits = 2;

SPARSE_OPTIM_INLINE Digit digit_of(int pass) {
  return pass == 0 ? Digit{20, 11} : pass == 1 ? Digit{9, 11} : Digit{0, 9};
}

constexpr int kBins = 1 << 11;
// Keys of an array that a block counts at least: setting up its bins costs as much.
constexpr int64_t kKeysPerBlock = 4096;

// Lives on the device; prepare_kernel of cut.cu or a begin_kernel of `collect` starts it. Between
// selections bins and `arrived` are 0, and `wanted` is the quota.
struct Selection {
  unsigned long long bins[kBins];
  int64_t quota;
  int64_t wanted;                     // of the keys that agree with `prefix`, how many belong
  int64_t ties;                       // result: how many of the keys equal to `limit` belong
  int64_t num_listed;                 // tiles that `compact` listed
  unsigned long long num_candidates;  // entries that `collect_kernel` found
  unsigned long long num_tied;        // entries that tie the limit, of `collect_again_kernel`
  int32_t prefix;
  int32_t limit;      // result: the k-th largest key; the least that counts, if fewer than k do
  int32_t exhausted;  // fewer than k
  int32_t least;      // least key among the new entries
  int32_t passes;     // winners are found in several passes over the listed tiles
  unsigned arrived;   // blocks of the running kernel
  int64_t within;     // keys in the bin of the last digit that was taken
};

// Finds the bin of the wanted-th largest and moves on to it; by one whole block.
__device__ inline void take_digit(Selection& state, Digit digit) {
  constexpr int kEach = kBins / kThreads;
  unsigned long long counts[kEach];
  int64_t sum = 0;
  const int first = kBins - 1 - int(threadIdx.x) * kEach;  // threads begin with the largest bins
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    counts[i] = atomicExch(&state.bins[first - i], 0ull);
    sum += int64_t(counts[i]);
  }
  const int64_t wanted = state.wanted;
  const Prefix prefix = block_prefix(sum);  // its barriers: all have read `wanted`
  if (threadIdx.x == 0 && prefix.total < wanted) state.exhausted = 1;
  if (prefix.before >= wanted || prefix.before + sum < wanted) return;
  int64_t above = prefix.before;
  bool found = false;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64_t count = int64_t(counts[i]);
    if (!found && above + count >= wanted) {
      found = true;
      state.prefix |= int32_t(first - i) << digit.shift;
      state.wanted = wanted - above;
      state.within = count;
    }
    if (!found) above += count;
  }
}

// Notes the result after the last digit, and prepares the next selection.
__device__ inline void finish_selection(Selection& state, int32_t least) {
  state.limit = state.exhausted || state.prefix < least ? least : state.prefix;
  state.ties = state.exhausted ? state.quota : state.wanted;
  state.wanted = state.quota;
  state.prefix = 0;
  state.exhausted = 0;
}

// Every thread of the block calls these.
__device__ inline void clear_bins(unsigned (&bins)[kBins]) {
  for (int b = int(threadIdx.x); b < kBins; b += kThreads) bins[b] = 0;
  __syncthreads();
}
__device__ inline void add_bins(const unsigned (&bins)[kBins], Selection& state) {
  __syncthreads();
  for (int b = int(threadIdx.x); b < kBins; b += kThreads)
    if (bins[b]) atomicAdd(&state.bins[b], static_cast<unsigned long long>(bins[b]));
}

// Counts one digit of a share of the keys of a source. Source: wanted(state) tells whether anything
// is to be done, visit(state, share, f) calls f(key) for each, least(state) is what a key must
// reach to count. Every thread of the block calls it.
template <class Source>
__device__ inline void count_digit(const Source& source, Selection& state, Share share, Digit digit,
                                   int32_t least) {
  __shared__ unsigned bins[kBins];
  clear_bins(bins);
  const int32_t prefix = state.prefix;
  const int above = digit.shift + digit.bits;
  source.visit(state, share, [&](int32_t key) {
    if (key < least || (key ^ prefix) >> above) return;
    atomicAdd(&bins[digit.of(key)], 1u);
  });
  add_bins(bins, state);
}

template <class Source>
__global__ void __launch_bounds__(kThreads, kResident)
    digit_kernel(Source source, Selection* selection, Digit digit, bool is_last) {
  Selection& state = *selection;
  if (!source.wanted(state)) return;
  const int32_t least = source.least(state);
  if (!state.exhausted) count_digit(source, state, Share::of_grid(), digit, least);
  if (!is_last_block(&state.arrived)) return;
  if (!state.exhausted) take_digit(state, digit);
  __syncthreads();
  if (threadIdx.x == 0 && is_last) finish_selection(state, least);
}

// Digits first, ..., num_digits - 1; those before have been taken.
template <class Source>
void select_kth(const Source& source, int64_t blocks, Selection* state, int first, int num_digits,
                cudaStream_t stream) {
  for (int d = first; d < num_digits; ++d)
    SPARSE_OPTIM_LAUNCH(digit_kernel, blocks, kThreads, stream, source, state, digit_of(d),
                        d == num_digits - 1);
}

// The same by one block, all of whose threads call it.
template <class Source>
__device__ inline void select_kth_in_block(const Source& source, Selection& state, int first = 0) {
  const int32_t least = source.least(state);
#pragma unroll 1
  for (int d = first; d < kAllDigits; ++d) {
    const Digit digit = digit_of(d);
    if (!state.exhausted) count_digit(source, state, {0, 1}, digit, least);
    __syncthreads();
    if (!state.exhausted) take_digit(state, digit);
    __syncthreads();
  }
  if (threadIdx.x == 0) finish_selection(state, least);
  __syncthreads();
}

// An array of keys.
struct KeyArray {
  const int32_t* keys;
  int64_t size;

  __device__ bool wanted(const Selection& state) const { return state.quota != 0; }
  __device__ int32_t least(const Selection&) const { return 1; }
  template <class Visit>
  __device__ void visit(const Selection&, Share share, Visit&& visit) const {
    const int64_t step = share.blocks * kThreads;
    for (int64_t i = share.block * kThreads + threadIdx.x; i < size; i += step)
      visit(__ldcg(&keys[i]));
  }
};

}  // namespace sparse_optim::cuda
