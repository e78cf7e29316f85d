// Radix selection: the k-th largest of many 31-bit keys, and how many of its equals belong.
//
// Three passes over the keys, 11 + 11 + 9 bits from the top: each counts the digit of the keys that
// agree with the prefix found so far; the last block to finish finds the digit's bin that holds the
// k-th largest. Counts are integers, so that the order of the additions does not matter. A key of
// 0 never counts.
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
};
constexpr Digit kDigits[] = {{20, 11}, {9, 11}, {0, 9}};
constexpr int kBins = 1 << 11;

// Lives in scratch memory; `prepare` of cut.cu starts it. Between selections bins and `arrived` are
// 0, and `wanted` is the quota.
struct Selection {
  unsigned long long bins[kBins];
  int64_t quota;
  int64_t wanted;      // of the keys that agree with `prefix`, how many belong
  int64_t ties;        // result: how many of the keys equal to `limit` belong
  int64_t num_listed;  // tiles that `compact` listed
  int32_t prefix;
  int32_t limit;      // result: the k-th largest key; the least that counts, if fewer than k do
  int32_t exhausted;  // fewer than k
  int32_t least;      // least key among the new entries
  unsigned arrived;   // blocks of the running kernel
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
    }
    if (!found) above += count;
  }
}

// Notes the result after the last digit, and makes ready for the next selection.
__device__ inline void finish_selection(Selection& state, int32_t least) {
  state.limit = state.exhausted ? least : state.prefix;
  state.ties = state.exhausted ? state.quota : state.wanted;
  state.wanted = state.quota;
  state.prefix = 0;
  state.exhausted = 0;
}

// Counts one digit of the keys of a source. Source: visit(state, f) calls f(key) for this block's
// keys; least(state) is what a key must reach to count.
template <class Source>
__global__ void __launch_bounds__(kThreads, kResident)
    digit_kernel(Source source, Selection* selection, Digit digit) {
  __shared__ unsigned bins[kBins];
  Selection& state = *selection;
  if (state.quota == 0) return;
  const int32_t least = source.least(state);
  if (!state.exhausted) {
    for (int b = int(threadIdx.x); b < kBins; b += kThreads) bins[b] = 0;
    __syncthreads();
    const int32_t prefix = state.prefix;
    const int above = digit.shift + digit.bits;
    source.visit(state, [&](int32_t key) {
      if (key < least || (key ^ prefix) >> above) return;
      atomicAdd(&bins[(key >> digit.shift) & ((1 << digit.bits) - 1)], 1u);
    });
    __syncthreads();
    for (int b = int(threadIdx.x); b < kBins; b += kThreads)
      if (bins[b]) atomicAdd(&state.bins[b], static_cast<unsigned long long>(bins[b]));
  }
  if (!is_last_block(&state.arrived)) return;
  if (!state.exhausted) take_digit(state, digit);
  __syncthreads();
  if (threadIdx.x == 0 && digit.shift == 0) finish_selection(state, least);
}

template <class Source>
void select_kth(const Source& source, int64_t blocks, Selection* state, cudaStream_t stream) {
  for (const Digit digit : kDigits)
    SPARSE_OPTIM_LAUNCH(digit_kernel, blocks, kThreads, stream, source, state, digit);
}

// An array of keys: `size` of them, or as many as tiles are listed.
struct KeyArray {
  const int32_t* keys;
  int64_t size;  // < 0: state.num_listed

  __device__ int32_t least(const Selection&) const { return 1; }
  template <class Visit>
  __device__ void visit(const Selection& state, Visit&& visit) const {
    const int64_t count = size < 0 ? state.num_listed : size;
    for (int64_t i = global_thread(); i < count; i += grid_threads()) visit(keys[i]);
  }
};

}  // namespace sparse_optim::cuda
