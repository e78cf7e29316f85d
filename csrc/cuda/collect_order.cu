// The winners of `collect` in global order, where there may be millions: a merge sort by place.
//
//   1. Runs of 1,024 are sorted: an entry's place in its run is how many there are below it.
//   2. Eight runs at a time become one: to how far it is in its own, an entry adds how many of the
//      others are below it, by a binary search in each.
//
// All places differ, so that each of them is taken once. Bytes: 24 an entry and launch, and the
// searches, which are in the cache. For 500,000: three merges, 60 MB in all. Predicted: bytes /
// bandwidth = 0.03 ms on A100 (2.0 TB/s), 0.08 on A6000 (0.77), 0.02 on H100 (3.35), 0.01 on H200
// (4.8). Launches: two, and one for each factor of eight above 1,024.
#include "cuda/collected_halves.h"

namespace sparse_optim::cuda {
namespace {

#if defined(SPARSE_OPTIM_EMULATED)  // small, so that small cases have several
constexpr int64_t kRun = 16, kWays = 3;
#else
constexpr int64_t kRun = 1024, kWays = 8;
#endif
constexpr int kBlocksPerMultiprocessor = 8;

__global__ void __launch_bounds__(kThreads, kResident) sort_runs_kernel(Halves halves) {
  __shared__ uint64_t places[kRun];
  const int64_t count = halves.state->kept;
  const Candidates from = halves.of(halves.state->half), to = halves.of(1 - halves.state->half);
  for (int64_t first = blockIdx.x * kRun; first < count; first += gridDim.x * kRun) {
    const int size = int(min(kRun, count - first));
    __syncthreads();  // all have read the run before
    for (int i = int(threadIdx.x); i < size; i += kThreads) places[i] = from.place[first + i];
    __syncthreads();
    for (int i = int(threadIdx.x); i < size; i += kThreads) {
      const uint64_t place = places[i];
      int before = 0;
      for (int j = 0; j < size; ++j) before += places[j] < place;
      to.place[first + before] = place;
      to.grad[first + before] = from.grad[first + i];
    }
  }
}

// `moved`: how often the candidates were moved to the other half since `half` was noted.
__global__ void __launch_bounds__(kThreads, kResident)
    merge_kernel(Halves halves, int moved, int64_t run) {
  const int64_t count = halves.state->kept, all = run * kWays;
  const int half = (halves.state->half + moved) % 2;
  const Candidates from = halves.of(half), to = halves.of(1 - half);
  for (int64_t i = global_thread(); i < count; i += grid_threads()) {
    const uint64_t place = from.place[i];
    const int64_t group = i / all * all, own = i / run * run;
    int64_t out = group + i - own;
    for (int64_t first = group; first < min(group + all, count); first += run) {
      if (first == own) continue;
      int64_t low = first, high = min(first + run, count);
      while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (from.place[middle] < place) low = middle + 1;
        else high = middle;
      }
      out += low - first;
    }
    to.place[out] = place;
    to.grad[out] = from.grad[i];
  }
}

__global__ void __launch_bounds__(kThreads, kResident)
    write_kernel(Halves halves, int moved, NewEntries found, float* threshold, float* grad) {
  const int64_t count = halves.state->kept;
  const Candidates from = halves.of((halves.state->half + moved) % 2);
  for (int64_t i = global_thread(); i < count; i += grid_threads()) {
    found.tensor[i] = int32_t(from.place[i] >> 32);
    found.position[i] = int32_t(from.place[i] & 0xffffffffu);
    grad[i] = from.grad[i];
  }
  if (global_thread() != 0) return;
  *found.count = count;
  if (count) *threshold = from_bits(halves.state->selection.least);
}

}  // namespace

void write_in_order(const Halves& halves, const NewEntries& found, float* threshold, float* grad,
                    cudaStream_t stream) {
  const int64_t by_run = grid_for(found.capacity, kRun, kBlocksPerMultiprocessor);
  const int64_t by_entry = grid_for(found.capacity, kThreads, kBlocksPerMultiprocessor);
  SPARSE_OPTIM_LAUNCH(sort_runs_kernel, by_run, kThreads, stream, halves);
  int moved = 1;
  for (int64_t run = kRun; run < found.capacity; run *= kWays, ++moved)
    SPARSE_OPTIM_LAUNCH(merge_kernel, by_entry, kThreads, stream, halves, moved, run);
  SPARSE_OPTIM_LAUNCH(write_kernel, by_entry, kThreads, stream, halves, moved, found, threshold,
                      grad);
}

}  // namespace sparse_optim::cuda
